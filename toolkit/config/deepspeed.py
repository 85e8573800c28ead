"""A user's DeepSpeed JSON, merged with the YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.arch.optimizers import OPTIMIZERS
from toolkit.config.deepspeed_keys import check_keys, copied, read_deepspeed_json
from toolkit.config.deepspeed_table import SAME
from toolkit.config.describe import show
from toolkit.config.explain import validate
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError

GPUS_PER_NODE = 8  # assumed where hpZ's group size is "auto"

_OPTIMIZER_DEFAULTS = {  # parameters of DeepSpeed's optimizers that have no key here, with the values that change nothing
    "torch_adam": (True, False),
    "bias_correction": (True,),
    "amsgrad": (False,),
    "fp32_optimizer_states": (True,),
    "dampening": (0,),
    "maximize": (False,),
    "ns_method": ("gram", "standard"),  # two ways to the same matrix
}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear"}


@dataclass
class _JsonSettings:
    """The YAML settings that a DeepSpeed JSON holds, with the place of each."""

    source: str
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def add(self, key: str, value: Any, *, place: str) -> None:
        """Note a value; "auto" and null leave it to the YAML, and two places of one JSON must agree."""
        if value is None or value == "auto":
            return
        if key in self.values and self.values[key][0] != value:
            other, other_place = self.values[key]
            raise ConfigError(
                f"{other_place}={show(other)} and {place}={show(value)} in {self.source} contradict each other",
                why=f"both mean {key}",
                fix='Give them the same value, or set one to "auto".',
            )
        self.values[key] = (value, place)


def merge_deepspeed_json(config: RunConfig, *, base: Path | None = None) -> RunConfig:
    """Move what a user's DeepSpeed JSON says into the YAML's own keys; what has no key there stays
    in zero.deepspeed.

    The JSON fills keys the user left unset; a value that contradicts one the user set raises
    ConfigError naming both. "auto" stands for the YAML's value. base: the folder zero.config may be
    relative to, besides the working folder.
    """
    zero = config.zero
    if zero.config is None and zero.deepspeed is None:
        return config
    inline = copied(zero.deepspeed or {}, source="zero.deepspeed")
    if zero.config is not None:
        path = base / zero.config if base is not None and (base / zero.config).exists() else zero.config
        data, source = _merged(copied(read_deepspeed_json(path), source=str(zero.config)), inline), str(zero.config)
    else:
        data, source = inline, "zero.deepspeed"
    check_keys(data, source=source)
    settings = _JsonSettings(source)
    _take_precision(data, settings, config)
    for dotted, key in SAME.items():
        settings.add(key, _pop(data, dotted), place=dotted)
    _take_optimizer(data, settings)
    _take_scheduler(data, settings, config)
    _take_checkpointing(data, settings, config)
    _check_accumulation(data, settings, config)
    raw = config.model_dump(exclude_unset=True)
    _reconcile(config, settings, raw)
    raw.setdefault("zero", {}).update(config=None, deepspeed=_pruned(data) or None)
    return validate(raw, origins={key: f"{place} in {source}" for key, (_, place) in settings.values.items()})


def accumulation(config: RunConfig) -> int | None:
    """The number of micro-batches a user's DeepSpeed JSON asks for, or None where it leaves that open."""
    value = (config.zero.deepspeed or {}).get("gradient_accumulation_steps")
    return None if value == "auto" else value


def zero_key(config: RunConfig, name: str, default: Any = None) -> Any:
    """A zero_optimization key of the user's DeepSpeed JSON that the YAML has no key for; "auto"
    counts as unset.
    """
    section: dict[str, Any] = (config.zero.deepspeed or {}).get("zero_optimization") or {}
    value = section.get(name, default)
    return default if value in ("auto", None) else value


def partition(split: int, whole: int, *, tp: int, dp: int) -> int:
    """Elements of the largest weight that one rank keeps under ZeRO-3.

    split, whole: elements of the largest weight that TP cuts, and of the largest that it does not.
    """
    return -(-max(-(-split // tp), whole) // max(1, dp))


def hpz_group(*, tp: int, cp: int, dp: int) -> int:
    """hpZ's group size for "auto": the largest divisor of dp within a node; 1 (off) where
    data-parallel ranks are no neighbours.
    """
    return 1 if tp * cp > 1 else max(d for d in range(1, GPUS_PER_NODE + 1) if dp % d == 0)


def _take_precision(data: dict[str, Any], settings: _JsonSettings, config: RunConfig) -> None:
    if "bfloat16" in data:  # DeepSpeed's old name
        if "bf16" in data:
            raise ConfigError(f"{settings.source} has both bf16 and bfloat16", fix="Keep bf16.")
        data["bf16"] = data.pop("bfloat16")
    states = {name: _pop(data, f"{name}.enabled") for name in ("bf16", "fp16")}
    for name, state in states.items():
        if state not in (True, False, "auto", None):
            raise ConfigError(f"{name}.enabled={show(state)} in {settings.source} is not accepted", fix='Set it to true, false or "auto".')
    on = [name for name, state in states.items() if state is True]
    off = [name for name, state in states.items() if state is False]
    if len(on) == 2:
        raise ConfigError(f"bf16.enabled=true and fp16.enabled=true in {settings.source} exclude each other", fix="Keep one.")
    if on:
        settings.add("train.precision", on[0], place=f"{on[0]}.enabled=true, that is precision")
    elif off and "auto" not in states.values():
        settings.add("train.precision", "fp32", place=" and ".join(f"{name}.enabled=false" for name in off) + ", that is precision")
    elif config.train.precision in off:
        raise ConfigError(
            f"{config.train.precision}.enabled=false in {settings.source} contradicts train.precision={config.train.precision}",
            fix='Set one of the two, or the JSON\'s to "auto".',
        )


def _take_optimizer(data: dict[str, Any], settings: _JsonSettings) -> None:
    section = data.pop("optimizer", None)
    if section is None:
        return
    kind, params = _type_and_params(section, "optimizer", settings.source)
    known = {name.lower(): (name, spec) for spec in OPTIMIZERS.values() for name in spec.json}
    if kind.lower() not in known:
        *most, last = (name for name, _ in known.values())
        raise ConfigError(
            f"optimizer.type={show(kind)} in {settings.source} cannot be used",
            why=f"the toolkit trains with {', '.join(most)} and {last}",
            fix='Set it to "AdamW", or leave the section out and set optimizer.name: adamw in the YAML.',
        )
    name, place = known[kind.lower()][1].name, f"optimizer.type={show(kind)}"
    if kind.lower() == "adam":  # DeepSpeed's Adam is AdamW unless told otherwise
        decoupled = params.pop("adam_w_mode", True)
        name, place = "adamw" if decoupled else "adam", f"{place} with adam_w_mode={show(decoupled)}"
    params.pop("adam_w_mode", None)
    settings.add("optimizer.name", name, place=f"{place}, that is name")
    for key, value in OPTIMIZERS[name].json_settings:
        settings.add(f"optimizer.{key}", value, place=f"{place} (what DeepSpeed's does), that is {key}")
    keys = OPTIMIZERS[name].keys
    for key, value in params.items():
        if key in keys:
            settings.add(f"optimizer.{key}", tuple(value) if isinstance(value, list) else value, place=f"optimizer.params.{key}")
        elif value not in ("auto", None) and value not in _OPTIMIZER_DEFAULTS.get(key, ()):
            raise ConfigError(
                f"optimizer.params.{show(key)[1:-1]}={show(value)} in {settings.source} cannot be used",
                why=f"the toolkit's {name} has {', '.join(keys[:-1])} and {keys[-1]}",
                fix="Set train.grad_clip instead." if key == "max_grad_norm" else "Leave it out.",
            )


def _take_scheduler(data: dict[str, Any], settings: _JsonSettings, config: RunConfig) -> None:
    section = data.pop("scheduler", None)
    if section is None:
        return
    kind, params = _type_and_params(section, "scheduler", settings.source)
    if kind not in _SCHEDULES:
        raise ConfigError(
            f"scheduler.type={show(kind)} in {settings.source} cannot be used",
            why="only WarmupLR (constant) and WarmupDecayLR (linear) mean the same here",
            fix="Leave the section out and set optimizer.schedule to constant, linear, cosine or wsd.",
        )
    settings.add("optimizer.schedule", _SCHEDULES[kind], place=f"scheduler.type={show(kind)}, that is schedule")
    steps, shape, start = params.pop("warmup_num_steps", None), params.pop("warmup_type", None), params.pop("warmup_min_lr", None)
    settings.add("optimizer.warmup_steps", steps, place="scheduler.params.warmup_num_steps")
    settings.add("optimizer.lr", params.pop("warmup_max_lr", None), place="scheduler.params.warmup_max_lr")
    if kind == "WarmupDecayLR":
        settings.add("optimizer.decay_steps", params.pop("total_num_steps", None), place="scheduler.params.total_num_steps")
        settings.add("optimizer.min_lr", 0.0, place="scheduler.type (it decays to 0), that is min_lr")
    warms = (config.optimizer.warmup_steps if steps in (None, "auto") else steps) != 0
    if warms and (shape not in ("linear", "auto", None) or (shape is None and isinstance(steps, int))):
        raise ConfigError(
            f"scheduler.params.warmup_type={show(shape or 'log')} in {settings.source} cannot be used",
            why="the warm-up here is linear, DeepSpeed's own default is logarithmic",
            fix='Set warmup_type to "linear".',
        )
    if start not in (None, "auto", 0):
        raise ConfigError(
            f"scheduler.params.warmup_min_lr={show(start)} in {settings.source} cannot be used",
            why="the warm-up here starts from 0",
            fix="Set it to 0.",
        )
    for name, value in params.items():
        if value not in ("auto", None, -1):
            raise ConfigError(f"scheduler.params.{show(name)[1:-1]}={show(value)} in {settings.source} is not known", fix="Leave it out.")


def _type_and_params(section: Any, name: str, source: str) -> tuple[str, dict[str, Any]]:
    kind = section.get("type") if isinstance(section, dict) else None
    params = (section.get("params") or {}) if isinstance(section, dict) else None
    if not isinstance(kind, str) or not isinstance(params, dict):
        raise ConfigError(f"{name}={show(section)} in {source} is not accepted", fix='Write {"type": "...", "params": {...}}.')
    return kind, dict(params)


def _take_checkpointing(data: dict[str, Any], settings: _JsonSettings, config: RunConfig) -> None:
    """DeepSpeed's own recomputation is not used: a checkpoint at every layer is train.recompute: full."""
    section = data.pop("activation_checkpointing", None) or {}
    count = section.get("number_checkpoints")
    if count in (None, 0, "auto"):
        return
    if count != config.model.num_layers:
        raise ConfigError(
            f"activation_checkpointing.number_checkpoints={show(count)} in {settings.source} cannot be used",
            why=f"every one of the {config.model.num_layers} layers is recomputed, or none",
            fix=f"Set it to {config.model.num_layers}, or leave it out and set train.recompute to selective or full.",
        )
    settings.add("train.recompute", "full", place=f"activation_checkpointing.number_checkpoints={count}, that is recompute")


def _check_accumulation(data: dict[str, Any], settings: _JsonSettings, config: RunConfig) -> None:
    """Keep an explicit accumulation for the check against the layout; it cannot stand in for a
    global batch.
    """
    steps = data.get("gradient_accumulation_steps")
    if steps in ("auto", None):
        data.pop("gradient_accumulation_steps", None)
        return
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(
            f"gradient_accumulation_steps={show(steps)} in {settings.source} is not accepted", fix='Set it to an integer >= 1 or "auto".'
        )
    if "train.global_batch_size" not in settings.values and "global_batch_size" not in config.train.model_fields_set:
        raise ConfigError(
            f"gradient_accumulation_steps={steps} in {settings.source} fixes no global batch",
            why="the batch would grow with the number of processes, and the result with it",
            fix="Set train.global_batch_size (or train_batch_size in the JSON).",
        )


def _reconcile(config: RunConfig, settings: _JsonSettings, raw: dict[str, Any]) -> None:
    """Write the JSON's values into raw, or name every one that contradicts what the user set."""
    conflicts = []
    for key, (value, place) in settings.values.items():
        section, name = key.split(".")
        holder = getattr(config, section)
        mine = getattr(holder, name)
        if section in config.model_fields_set and name in holder.model_fields_set:
            if mine != (Path(value) if isinstance(mine, Path) and isinstance(value, str) else value):
                conflicts.append(f"{key}={show(mine)} in the YAML contradicts {place}={show(value)} in {settings.source}")
        else:
            raw.setdefault(section, {})[name] = value
    if conflicts:
        what = conflicts[0] if len(conflicts) == 1 else f"{len(conflicts)} settings contradict:\n  " + "\n  ".join(conflicts)
        raise ConfigError(what, fix='Give both the same value, remove the YAML key, or set the JSON\'s to "auto".')


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Keys of zero.deepspeed win over those of the file."""
    both = {key: _merged(below[key], above[key]) for key in above if isinstance(below.get(key), dict) and isinstance(above[key], dict)}
    return {**below, **above, **both}


def _pop(data: dict[str, Any], dotted: str) -> Any:
    *parents, name = dotted.split(".")
    at: Any = data
    for parent in parents:
        at = at.get(parent) if isinstance(at, dict) else None
    return at.pop(name, None) if isinstance(at, dict) else None


def _pruned(data: dict[str, Any]) -> dict[str, Any]:
    """Drop the sections that merging has emptied."""
    cleaned = {key: _pruned(value) if isinstance(value, dict) else value for key, value in data.items() if value is not None}
    return {key: value for key, value in cleaned.items() if value != {}}
