"""config.json of Hugging Face and model_args of nanoGPT to our model section, and back, by the
tables of toolkit.arch; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from toolkit.arch.families import FORMATS
from toolkit.arch.family import Format, Key
from toolkit.config.schema import ModelSection
from toolkit.errors import ConvertError

ARCHITECTURES = {form.architecture: form for _, form in FORMATS.values() if form.architecture}
_TYPES = {form.model_type: form for form in ARCHITECTURES.values()}
_ANY_MODEL = {"preset", "impl", "dropout", "init_std", "compile", "vocab_multiple", "family"}  # keys that change no weight and no logit


class _Reader:
    """A foreign config whose values are asked for by name and type; errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def number(self, name: str, default: Any = None, *, kind: type = int) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)) or value < 0:
            raise ConvertError(f"{self.where} has {name}={value!r}", why="a number belongs there", fix="Correct the file.")
        return kind(value)

    def one_of(self, name: str, allowed: tuple[Any, ...], why: str) -> Any:
        """A value that must be one of those that the model here can have, the first where there is none."""
        value = self.values.get(name)
        value = allowed[0] if value is None else value
        if value not in allowed:
            choice = " or ".join(repr(a) for a in allowed)
            raise ConvertError(f"{self.where} has {name}={value!r}", why=why, fix=f"Only models with {name}={choice} can be imported.")
        return value

    def key(self, key: Key) -> Any:
        """What a key of a table says in our section, None where ours is to be filled as usual."""
        names = (key.theirs,) if isinstance(key.theirs, str) else key.theirs
        default = key.default(self.values) if callable(key.default) else key.default
        absent = all(self.values.get(name) is None for name in names)
        if key.null and absent and (default is None or names[0] in self.values):
            return None
        if key.choices:
            return key.choices[self.one_of(names[0], (default, *key.choices), "its MLP has another activation")]
        if key.kind is bool:
            value = self.values.get(names[0])
            return bool(default if value is None else value)
        values = {self.number(name, default, kind=key.kind) for name in names}
        return values.pop() if len(values) == 1 else 0.0


def format_of(config: Mapping[str, Any], *, where: str) -> Format:
    """The format that a config.json's model is kept in; ConvertError names the nearest architecture
    that there is.
    """
    kind = str(config.get("model_type"))
    names = config.get("architectures") or [_TYPES[kind].architecture if kind in _TYPES else kind]
    known = [n for n in names if n in ARCHITECTURES]
    if known:
        return ARCHITECTURES[known[0]]
    near = get_close_matches(str(names[0]), ARCHITECTURES, n=1, cutoff=0.5)
    raise ConvertError(
        f"{where} is of a {', '.join(map(str, names))}",
        why="its layers are not those of a model here" + (f"; the nearest one that is supported is {near[0]}" if near else ""),
        fix=f"Supported are {', '.join(ARCHITECTURES)}, and nanoGPT's ckpt.pt.",
    )


def model_section(form: Format, config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The keys of our model section; raises ConvertError for what the model here does not compute."""
    read, family = _Reader(config, where), FORMATS[form.name][0]
    for fixed in form.fixed:
        read.one_of(fixed.theirs, fixed.allowed, fixed.why)
    section: dict[str, Any] = {"family": family.name, **form.says}
    for key in form.keys:
        value = read.key(key)
        if value is not None:
            section |= dict.fromkeys((key.ours,) if isinstance(key.ours, str) else key.ours, value)
    section["init_std"] = section.get("init_std") or 0.02  # a model may say 0
    return section | (_read_rope(read) if family.positions == "rotary" else {})


def _read_rope(read: _Reader) -> dict[str, Any]:
    """Transformers 5 has rope_parameters; before it, rope_theta and rope_scaling, whose key was
    first type and then rope_type.
    """
    inner = _Reader(read.values.get("rope_parameters") or read.values.get("rope_scaling") or {}, f"{read.where}'s rope parameters")
    theta = inner.number("rope_theta", read.number("rope_theta", 10000.0, kind=float), kind=float)
    kind = inner.values.get("rope_type", inner.values.get("type")) or "default"
    found: dict[str, Any] = {"rope_theta": theta}
    if kind == "linear":
        found["rope_scaling"] = {"type": "linear", "factor": inner.number("factor", 1.0, kind=float)}
    elif kind == "llama3":
        scaling = {n: inner.number(n, kind=float) for n in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling["original_max_position_embeddings"] = inner.number("original_max_position_embeddings")
        found["rope_scaling"] = {"type": "llama3", **scaling}
    elif kind == "yarn" and inner.values.get("truncate", True) and not inner.values.get("mscale"):
        yarn: dict[str, Any] = {"factor": inner.number("factor", kind=float)}
        yarn |= {n: inner.number(n, default, kind=float) for n, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        # transformers goes by the model's own length where the context before scaling is not named
        positions = read.number("max_position_embeddings", 2048)
        yarn["original_max_position_embeddings"] = inner.number("original_max_position_embeddings", positions)
        if inner.values.get("attention_factor") is not None:
            yarn["attention_factor"] = inner.number("attention_factor", kind=float)
        found["rope_scaling"] = {"type": "yarn", **yarn}
    elif kind != "default":
        raise ConvertError(
            f"{read.where} has RoPE scaling of type {kind}",
            why="its frequencies would be others here",
            fix="Only default, linear, llama3 and yarn (without mscale, and with whole dimensions) can be imported.",
        )
    return found


def foreign_config(m: ModelSection, *, dtype: str) -> tuple[Format, dict[str, Any]]:
    """The format to export a model in, and its config.json with names that transformers 4.45 and later read.

    Raises ConvertError naming every key that no model of transformers' has.
    """
    form = m.of_family.formats[0]
    config: dict[str, Any] = {"architectures": [form.architecture], "model_type": form.model_type}
    for key in form.keys:
        value = getattr(m, key.ours if isinstance(key.ours, str) else key.ours[-1])
        if key.choices:
            value = next(theirs for theirs, ours in key.choices.items() if ours == value)
        config |= dict.fromkeys((key.theirs,) if isinstance(key.theirs, str) else key.theirs, value)
    config |= {fixed.theirs: fixed.allowed[0] for fixed in form.fixed if fixed.written}
    if m.of_family.positions == "rotary":
        config |= _written_rope(m)
    _check_survives(m, form, config)
    return form, {**config, **form.constants, "torch_dtype": dtype}


def _written_rope(m: ModelSection) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if m.rope_scaling is not None:
        scaling = {"rope_type": m.rope_scaling.type, "factor": m.rope_scaling.factor}
        if m.rope_scaling.type == "llama3":
            names = ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
            scaling |= {n: getattr(m.rope_scaling, n) for n in names}
        if m.rope_scaling.type == "yarn":
            names = ["beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"]
            scaling |= {n: value for n in names if (value := getattr(m.rope_scaling, n)) is not None}
    return {"rope_theta": m.rope_theta, "rope_scaling": scaling}


def _check_survives(m: ModelSection, form: Format, config: Mapping[str, Any]) -> None:
    """Refuse a model that would come back from its config.json as another one."""
    back = ModelSection.model_validate(model_section(form, config, where="its config.json")).model_dump()
    biases = {"attention_bias", "qkv_bias", "mlp_bias", "norm_bias"} if form.biased else set()
    lost = [k for k, v in m.model_dump().items() if k not in _ANY_MODEL | biases and back[k] != v]
    if lost:
        said = ", ".join(f"model.{k}={str(getattr(m, k)).lower()}" for k in lost)
        raise ConvertError(
            f"the model has {said}", why=f"{form.title} in transformers has no such thing", fix="Such a model cannot be exported."
        )
