"""checkpoint.init_from: a new run that begins with the weights of another checkpoint, saved in any layout."""

from __future__ import annotations

import logging
from pathlib import Path

from toolkit.checkpoint.claim import checkpoint_folder
from toolkit.checkpoint.folders import checkpoint_in
from toolkit.checkpoint.manifest import Manifest, discover, read_manifest
from toolkit.config.schema import ModelSection, RunConfig
from toolkit.errors import CheckpointError

log = logging.getLogger("toolkit.train")

_SHAPE = (
    "family",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "ffn_hidden_size",
    "vocab_size",
    "vocab_multiple",
    "tie_embeddings",
    "qk_layernorm",
    "attention_bias",
    "qkv_bias",
    "mlp_bias",
    "norm_bias",
)
_FUNCTION = (
    "activation",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
)  # other values fit the weights, and compute something else with them


def starting_weights(config: RunConfig) -> tuple[Path, Manifest] | None:
    """The checkpoint that checkpoint.init_from names, fit for this run's model; None where it is
    null or the run has its own to resume from.

    Needs no torch, so it is asked before anything is started. Raises CheckpointError naming each
    model key that differs, with both values.
    """
    c = config.checkpoint
    if c.init_from is None or (c.resume != "never" and any(f.finished for f in discover(checkpoint_folder(config)))):
        return None
    path = checkpoint_in(c.init_from)
    try:
        manifest = read_manifest(path)
        theirs = ModelSection.model_validate(manifest.config["model"])
    except (ValueError, KeyError) as e:
        raise CheckpointError(f"checkpoint.init_from={c.init_from} cannot be used: {e}", fix="Name another checkpoint.") from None
    ours = config.model
    names = _SHAPE + (() if ours.spec.rotary else ("max_position_embeddings",))
    if differ := [n for n in names if getattr(ours, n) != getattr(theirs, n)]:
        raise CheckpointError(
            f"checkpoint.init_from={c.init_from} holds another model: it has {_listed(theirs, differ)}, and this run has {_listed(ours, differ)}",
            why="every tensor must have its place",
            fix=f"Set {_listed(theirs, differ)}.",
        )
    return path, manifest


def announce(path: Path, manifest: Manifest, config: RunConfig) -> None:
    """Say where the weights come from, and which keys make the model compute something else with them."""
    what = "imported weights" if manifest.weights_only and not manifest.step else f"weights after step {manifest.step}"
    log.info("starting at step 1 with the weights of %s (%s), with a fresh optimizer", path, what)
    theirs = ModelSection.model_validate(manifest.config["model"])
    for name in _FUNCTION:
        if getattr(theirs, name) != getattr(config.model, name):
            log.warning("other than where the weights come from: %s -> %s", _listed(theirs, [name]), _listed(config.model, [name]))


def _listed(model: ModelSection, names: list[str]) -> str:
    values = {n: getattr(model, n) for n in names}
    return ", ".join(f"model.{n}={'null' if v is None else str(v).lower() if isinstance(v, bool) else v}" for n, v in values.items())
