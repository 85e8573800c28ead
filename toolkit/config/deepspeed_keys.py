"""A DeepSpeed JSON as the user wrote it: read, its keys held against the table, and what cannot be
used refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.config.deepspeed_table import KEYS, SIZE, SWITCH, Key, names, sections
from toolkit.config.describe import show
from toolkit.config.explain import nearest
from toolkit.config.yaml_text import read_text
from toolkit.errors import ConfigError


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON; raises ConfigError that names line and column, or a key given twice."""
    name = show(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"DeepSpeed JSON {name} has the key {show(key)} twice", fix="Remove one.")
            seen[key] = value
        return seen

    try:
        data = json.loads(read_text(path, kind="DeepSpeed JSON"), object_pairs_hook=once, parse_constant=_no_constant)
    except json.JSONDecodeError as e:
        why = f"{e.msg} (JSON has no comments and no commas at the end of a list)"
        raise ConfigError(
            f"DeepSpeed JSON {name}, line {e.lineno}, column {e.colno} is not valid JSON", why=why, fix="Correct that line."
        ) from None
    except (ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise ConfigError(f"DeepSpeed JSON {name} cannot be read", why=why, fix="Correct the file.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"DeepSpeed JSON {name} holds {show(data)}, not an object", fix='Start it with "{".')
    return data


def copied(data: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A deep copy; raises ConfigError where a value is not JSON."""
    try:
        text = json.dumps(data, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
        copy: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as e:
        raise ConfigError(f"{source} cannot be written as JSON", why=str(e), fix="Use numbers, strings, lists and mappings only.") from None
    return copy


def check_keys(data: dict[str, Any], *, source: str) -> None:
    """Refuse misspelt keys and those that would break or bend a run, and drop those that are
    switched off; changes data.
    """
    tree = sections()
    for section, known in tree.items():
        holder, name = _holder(data, section) if section else ({"": data}, "")
        body = holder.get(name) if holder is not None else None
        if body is None:
            continue
        if not isinstance(body, dict):
            raise ConfigError(f"{section}={show(body)} in {source} is not an object", fix=f'Write "{name}": {{...}}.')
        _check_spelling(body, known, prefix=f"{section}." if section else "", source=source)
    for dotted in names("refused"):
        holder, name = _holder(data, dotted)
        if holder is None or name not in holder:
            continue
        value = holder.pop(name)
        if not _is_off(dotted, value):
            key = KEYS[dotted]
            raise ConfigError(f"{dotted}={show(value)} in {source} cannot be used", why=key.note, fix=f"{key.fix}.")


def _is_off(dotted: str, value: Any) -> bool:
    """Whether a value of a refused key changes nothing."""
    key = KEYS[dotted]
    if value == "auto" or value in key.off:
        return True
    if key.none_off:
        return False
    if dotted == "compile" and isinstance(value, dict) and not value.get("deepcompile"):
        return True
    return not value or (isinstance(value, dict) and value.get("enabled") is False)


def _check_spelling(body: dict[str, Any], known: Mapping[str, Key], *, prefix: str, source: str) -> None:
    for key, value in body.items():
        if key not in known:
            if near := nearest(key.lower(), known, cutoff=0.8):
                raise ConfigError(
                    f"{prefix}{show(key)[1:-1]} in {source} looks misspelt",
                    why="DeepSpeed would ignore or refuse it",
                    fix=f"Did you mean {prefix}{near}?",
                )
            continue
        wanted = known[key].accepts
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wrong = (
            not isinstance(value, bool) if wanted == SWITCH else not number or value < 0 or value != int(value) if wanted == SIZE else False
        )
        if wrong and value not in ("auto", None):
            raise ConfigError(f"{prefix}{key}={show(value)} in {source} is not accepted", fix=f"Set it to {wanted}.")


def _holder(data: dict[str, Any], dotted: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that would hold a dotted key, and the key's last name."""
    *parents, name = dotted.split(".")
    at: Any = data
    for parent in parents:
        at = at.get(parent) if isinstance(at, dict) else None
    return (at if isinstance(at, dict) else None), name


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
