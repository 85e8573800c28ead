"""What a run and a checkpoint must share, and the words for where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.checkpoint.manifest import Manifest
from toolkit.config.load import saved_config
from toolkit.config.schema import OptimizerSection, RunConfig
from toolkit.data.dataset import PreparedData
from toolkit.data.given import GivenData
from toolkit.errors import CheckpointError
from toolkit.parallel.layout import Layout

_FREE_MODEL_KEYS = frozenset(
    {"preset", "impl", "dropout", "init_std", "compile"}
)  # of the model section, what leaves its weights as they are
_ADDED = {"data.packing": "concat"}  # of the identity, what older checkpoints lack, as it was for them
_QUIET = ("run.dir", "checkpoint.", "log.", "data.workers", "data.cache_dir", "zero.config", "zero.nvme_path")


def identity_of(config: RunConfig, data: PreparedData | GivenData) -> dict[str, Any]:
    """What decides the meaning of the weights and the order of the samples: equal, or the run is
    another one.
    """
    return model_identity(config) | {
        "run.seed": config.run.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "train.seq_length": config.train.seq_length,
        "data.split": list(config.data.split),
        "data.tokenizer": data.tokenizer_hash,
        "data.source": data.identity,
        "data.blend": list(data.weights),
        "data.packing": config.data.packing,
    }


def model_identity(config: RunConfig) -> dict[str, Any]:
    """What decides the meaning of the weights alone."""
    return {f"model.{k}": v for k, v in config.model.model_dump(mode="json").items() if k not in _FREE_MODEL_KEYS}


def _known_now(manifest: Manifest) -> dict[str, Any]:
    """A checkpoint's config, completed with keys that its version lacked, set as that version behaved."""
    try:
        return RunConfig.model_validate(manifest.config).model_dump(mode="json")
    except ValueError:  # another version's keys: compare the config as it is
        return manifest.config


def layout_of(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """What the saved state is cut by. Micro-batch and sequence parallelism are not among it."""
    return {
        "parallel.tp": layout.tp,
        "parallel.pp": layout.pp,
        "parallel.vpp": layout.vpp,
        "parallel.cp": layout.cp,
        "dp": layout.dp,
        "zero.stage": config.zero.stage,
        "zero.offload_optimizer": config.zero.offload_optimizer,
        "zero.offload_param": config.zero.offload_param,
        "train.precision": config.train.precision,
    }


def check_same_run(manifest: Manifest, identity: Mapping[str, Any], *, path: Path) -> None:
    """Raise CheckpointError naming every key in which this run is another one than the checkpoint's."""
    model = {f"model.{k}": v for k, v in _known_now(manifest).get("model", {}).items()}
    here, there = _differences(identity, _ADDED | model | manifest.identity)
    if here:
        raise CheckpointError(
            f"{path} belongs to another run: it has {there}, and this run has {here}",
            why="its weights or its place in the data would mean something else",
            fix="Set these keys as they were, or give this run another run.dir.",
        )


def check_same_states(manifest: Manifest, config: RunConfig, *, path: Path) -> None:
    """Raise CheckpointError where the run's optimizer keeps other states than the checkpoint's,
    which would mean nothing to it.
    """
    there = OptimizerSection.model_validate(_known_now(manifest)["optimizer"])
    if _states(there) != _states(config.optimizer):
        raise CheckpointError(
            f"{path} holds the states of optimizer.name={there.name} ({_states_shown(there)}), "
            f"and this run's {config.optimizer.name} keeps {_states_shown(config.optimizer)}",
            why="states of another optimizer mean nothing to it",
            fix=f"Set optimizer.name={there.name} as it was, or start from the weights alone with checkpoint.init_from and another run.dir.",
        )


def _states(section: OptimizerSection) -> list[Any]:
    return [(group.weights, group.rule.states, group.rule.counts) for group in section.spec.groups]


def _states_shown(section: OptimizerSection) -> str:
    return ", ".join(dict.fromkeys(state for group in section.spec.groups for state in group.rule.states)) or "none"


def same_degrees(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether every rank has the same place in both layouts, whatever the ZeRO stage, offload and
    precision.
    """
    return all(one[k] == other[k] for k in one if k.startswith("parallel.") or k == "dp")


def moved(manifest: Manifest, layout: Mapping[str, Any]) -> str:
    """How a checkpoint's layout differs from this run's, in words; "" where it does not."""
    here, there = _differences(layout, manifest.layout)
    processes = f"{manifest.processes} process{'' if manifest.processes == 1 else 'es'}"
    return f"it was saved by {processes} with {there}, and this run has {here}" if here else ""


def changed_keys(manifest: Manifest, config: RunConfig) -> list[str]:
    """`key: old -> new` for every other key that changed since the checkpoint; those a run may change."""
    old, new = _flat(_known_now(manifest)), _flat(saved_config(config))
    quiet = (*_QUIET, *manifest.layout)
    return [f"{k}: {_show(old.get(k))} -> {_show(v)}" for k, v in new.items() if old.get(k) != v and not k.startswith(quiet)]


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> tuple[str, str]:
    keys = [k for k in here if here[k] != there.get(k)]
    return ", ".join(f"{k}={_show(here[k])}" for k in keys), ", ".join(f"{k}={_show(there.get(k))}" for k in keys)


def _show(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value[:12]}…"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
