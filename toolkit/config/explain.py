"""pydantic's findings as one ConfigError that names every wrong key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from toolkit.config.describe import expected, field_at, keys, section_model, show
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError


def validate(raw: Mapping[str, Any], *, origins: Mapping[str, str] | None = None) -> RunConfig:
    """Validate a mapping of sections; raises one ConfigError naming every wrong key.

    origins: where a value came from, by dotted key, when that is not the YAML.
    """
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(e, origins or {}) for e in error.errors(include_url=False)]
    if len(problems) == 1:
        what, fix = problems[0]
        raise ConfigError(what, fix=fix)
    lines = "".join(f"\n  {what}. {fix}".rstrip() for what, fix in problems)
    raise ConfigError(f"{len(problems)} settings are wrong:{lines}")


def unknown_key(dotted: str) -> tuple[str, str]:
    """What is wrong with a key the schema does not know, and the nearest one that it knows."""
    *parents, name = dotted.split(".")
    holder = field_at(tuple(parents))
    model = section_model(holder) if holder else None
    if not parents:
        near = nearest(name, RunConfig.model_fields)
        owner = somewhere(name)
        hint = f"Did you mean the section {near}?" if near else f"Did you mean {owner}?" if owner else ""
        return f"{dotted} is not a section", hint or "Sections are " + ", ".join(RunConfig.model_fields) + "."
    siblings = list(model.model_fields) if model else []
    prefix = ".".join(parents)
    if near := nearest(name, siblings):
        return f"{dotted} is not a known key", f"Did you mean {prefix}.{near}?"
    if owner := somewhere(name):
        return f"{dotted} is not a known key", f"Did you mean {owner}?"
    return f"{dotted} is not a known key", f"Keys of {prefix} are " + ", ".join(siblings) + "." if siblings else ""


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word most like a name, or None when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def somewhere(name: str) -> str | None:
    """The section.key whose key is most like a name, in whichever section it stands first."""
    owners: dict[str, str] = {}
    for dotted, _ in keys():
        owners.setdefault(dotted.split(".")[1], dotted)
    near = nearest(name, owners, cutoff=0.8)
    return owners[near] if near else None


def _problem(error: Any, origins: Mapping[str, str]) -> tuple[str, str]:
    path = tuple(p for p in error["loc"] if isinstance(p, int) or p.isprintable())
    dotted = ".".join(show(p)[1:-1] if isinstance(p, str) else str(p) for p in path)
    kind = error["type"]
    if kind == "extra_forbidden":
        return unknown_key(dotted)
    if kind == "missing":
        if dotted == "model":
            return "there is no model section", "Set model.preset, or model.num_layers, model.hidden_size and model.num_attention_heads."
        hint = ", or set model.preset" if dotted.startswith("model.") else ""
        if isinstance(path[-1], int):
            holder = field_at(path[:-1])
            key = dotted.rpartition(".")[0]
            return f"{key} has too few values", f"Set it to {expected(holder) if holder else 'more values'}."
        field = field_at(path)
        return f"{dotted} is missing", f"Set it to {expected(field) if field else 'a value'}{hint}."
    given = f"{dotted}={show(error['input'])}"
    if origin := origins.get(dotted):
        given += f" ({origin})"
    field = field_at(path)
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        if field is not None and section_model(field) is None:
            return f"{given} {text}", f"Set {dotted} to {expected(field)}."
        return f"{dotted}: {text}", ""
    while field is None and len(path) > 1:  # an entry of a list or a mapping: say what the whole key accepts
        path = path[:-1]
        field = field_at(path)
    if field is None or (len(path) == 1 and section_model(field)):
        return f"{given} is not a section", f"Write {dotted}: with one key: value per line below it."
    key = ".".join(map(str, path))
    return f"{given} is not accepted", f"Set {key} to {expected(field)}."
