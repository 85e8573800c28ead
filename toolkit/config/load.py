"""From a YAML file and overrides to a RunConfig, and back."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from toolkit.config.deepspeed import merge_deepspeed_json
from toolkit.config.describe import show
from toolkit.config.explain import somewhere, unknown_key, validate
from toolkit.config.presets import with_preset
from toolkit.config.schema import BUILT_IN, RunConfig
from toolkit.config.yaml_text import read_text, read_yaml, write_yaml
from toolkit.errors import ConfigError
from toolkit.redact import redact_values

log = logging.getLogger("toolkit.train")


def load_config(path: Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply `section.key=value` overrides (or a mapping of them) and validate
    the whole.

    What the file names to be read (data, tokenizer, weights, a DeepSpeed JSON) is looked for in its
    own folder first, then in the working folder. What is written (run.dir and the like) is relative
    to the working folder, as overrides are. Raises ConfigError, and nothing else, for anything
    wrong with the file or the overrides.
    """
    raw = read_yaml(read_text(path, kind="config file"), source=show(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"config file {show(path)} holds {show(raw)}, not sections", fix='Start it with "model:" and one "key: value" per line below.'
        )
    base = Path(path).parent
    return parse_config(_with_short_warm_up(raw, _overridden(_beside(raw, base), overrides)), base=base)


def as_config(config: RunConfig | Mapping[str, Any] | str | PathLike[str], overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """The config that a program means: a YAML file, a mapping of sections or a config, with
    overrides; what is given stays as it is.

    overrides: `section.key=value` texts, or a mapping from `section.key` to values. Raises
    ConfigError.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={show(overrides)} is one text", fix='Give a list, ["section.key=value"], or {"section.key": value}.')
    if isinstance(config, str | PathLike):
        return load_config(Path(config), overrides)
    raw = config.model_dump(exclude_unset=True) if isinstance(config, RunConfig) else copy.deepcopy(config)
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{show(raw)} is not a config", fix="Give a YAML file, a mapping of its sections, or a Config.")
    return parse_config(_overridden(dict(raw), overrides))


def override_config(resolved: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """A config that was dumped whole, such as a checkpoint's, with `section.key=value` overrides;
    its DeepSpeed JSON's file is not needed.
    """
    raw = {name: dict(section) for name, section in resolved.items()}
    raw["zero"]["config"] = None
    return parse_config(_overridden(raw, overrides))


def parse_config(raw: Mapping[str, Any], *, base: Path | None = None) -> RunConfig:
    """Validate a mapping of sections, with presets and the DeepSpeed JSON merged in; raises
    ConfigError.

    base: the folder that zero.config may be relative to, besides the working folder.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{show(raw)} is not a config", fix='It needs sections such as "model:", each with "key: value" lines.')
    _check_names(raw)
    sections = {name: section for name, section in raw.items() if section is not None}  # "train:" with nothing below it
    if isinstance(sections.get("model"), dict):
        sections["model"] = with_preset(sections["model"])
    config = validate(sections)
    return merge_deepspeed_json(config, base=base)


def dump_config(config: RunConfig, *, open_data: bool = False) -> str:
    """The config as YAML that load_config() reads back to an equal config, every key written out.

    open_data: leave out the data keys that the user left unset. Written out, a default such as
    data.tokenizer=bytes would be held against the data, which may have been prepared with another
    tokenizer.
    """
    raw = config.model_dump(mode="json")
    if open_data:
        raw["data"] = config.data.model_dump(mode="json", exclude_unset=True)
    return write_yaml(raw)


def saved_config(config: RunConfig) -> dict[str, Any]:
    """The config as a checkpoint keeps it: JSON values, without secrets of the environment."""
    return dict(redact_values(config.model_dump(mode="json")))


READ = ("data.source", "data.tokenizer", "checkpoint.init_from")  # paths; data.blend has some as its keys
PREPARED = (".idx", ".bin", ".manifest.json")  # files of a prepared prefix


def _beside(raw: Mapping[Any, Any], base: Path) -> dict[Any, Any]:
    """The sections of a YAML with paths that are read made absolute where they exist in the YAML's folder."""
    result = {name: dict(body) if isinstance(body, Mapping) else body for name, body in raw.items()}

    def in_folder(name: Any) -> Any:
        if not isinstance(name, str) or not name or name in (BUILT_IN, "bytes") or name.startswith(("train:", "~", "/")):
            return name
        try:
            exists = any(os.path.exists(f"{base / name}{end}") for end in ("", *PREPARED))
        except ValueError:  # a name that no file can have: the schema says so
            return name
        return os.path.abspath(base / name) if exists else name

    for dotted in READ:
        section, key = dotted.split(".")
        body = result.get(section)
        if isinstance(body, dict) and key in body:
            body[key] = in_folder(body[key])
    data = result.get("data")
    if isinstance(data, dict) and isinstance(data.get("blend"), Mapping):
        data["blend"] = {in_folder(name): weight for name, weight in data["blend"].items()}
    return result


def _with_short_warm_up(written: Mapping[Any, Any], raw: dict[Any, Any]) -> dict[Any, Any]:
    """A run that an override of train.steps cuts short keeps the share of warm-up that its YAML has."""
    try:
        before, steps = written["train"]["steps"], raw["train"]["steps"]
        warm_up = raw["optimizer"]["warmup_steps"]
        if warm_up != written["optimizer"]["warmup_steps"] or not 0 < steps < warm_up <= before:
            return raw
    except (KeyError, TypeError):  # not given, or no numbers: the schema and the rules say so
        return raw
    short = warm_up * steps // before
    log.info("optimizer.warmup_steps=%d is shortened to %d, the same share of train.steps=%d", warm_up, short, steps)
    return {**raw, "optimizer": {**raw["optimizer"], "warmup_steps": short}}


def _check_names(raw: Mapping[Any, Any]) -> None:
    for section, body in raw.items():
        names = [section, *(body if isinstance(body, Mapping) else ())]
        for name in names:
            if not isinstance(name, str):
                where = "" if name is section else f" in {show(section)}"
                raise ConfigError(f"the key {show(name)}{where} is not a name", fix="Keys are words, such as train or steps.")


def _overridden(raw: dict[Any, Any], overrides: Mapping[str, Any] | Sequence[str]) -> dict[Any, Any]:
    """A copy of raw with the overrides set, creating sections as needed."""
    result = dict(raw)
    for override in overrides:
        key, equals, text = str(override).partition("=")
        key = key.strip()
        if not equals and not isinstance(overrides, Mapping):
            raise ConfigError(f"override {show(override)} has no =", fix="Write section.key=value, for example train.steps=100.")
        *parents, name = key.split(".")
        if not parents or not all([*parents, name]):
            owner = somewhere(name)
            hint = f"Did you mean {owner}?" if owner else "Write section.key=value, for example train.steps=100."
            raise ConfigError(f"override {show(override)} names no section.key", fix=hint)
        if parents[0] not in RunConfig.model_fields:
            what, fix = unknown_key(parents[0])
            raise ConfigError(f"override {show(override)}: {what}", fix=fix)
        value = overrides[override] if isinstance(overrides, Mapping) else read_yaml(text, source=f"override {show(override)}")
        target = result
        for depth, parent in enumerate(parents):
            inner = target.get(parent)
            if inner is not None and not isinstance(inner, dict):
                path = ".".join(parents[: depth + 1])
                raise ConfigError(f"override {show(override)}: {path}={show(inner)} has no keys of its own", fix=f"Set {path} instead.")
            target[parent] = dict(inner or {})
            target = target[parent]
        target[name] = value
    return result
