"""The tiny runs that `toolkit calibrate` takes: their configs, by what they switch on. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.config.load import as_config
from toolkit.config.schema import RunConfig

SHAPES = ((2, 1), (2, 4), (6, 4))  # layers and micro-batches, which tell step, micro-batch and layer apart
WARM_UP, STEPS = 3, 9
SEQUENCE, VOCABULARY = 16, 64

Modes = dict[str, tuple[dict[str, Any], Sequence[tuple[int, int]]]]
ALONE: Modes = {
    "zero1": ({"zero.stage": 1}, SHAPES),
    "zero2": ({"zero.stage": 2}, SHAPES),
    "zero3": ({"zero.stage": 3}, SHAPES),
    "gpt": ({"zero.stage": 1, "model.family": "gpt"}, SHAPES),
    "recompute": ({"zero.stage": 1, "train.recompute": "full"}, SHAPES[2:]),
}
TWO: Modes = {
    "tp": ({"zero.stage": 1, "parallel.tp": 2}, SHAPES),
    "sp": ({"zero.stage": 1, "parallel.tp": 2, "parallel.sequence_parallel": True}, SHAPES[2:]),
    "pp": ({"zero.stage": 1, "parallel.pp": 2}, SHAPES[:2]),
    "dp1": ({"zero.stage": 1}, SHAPES[:1]),
    "dp2": ({"zero.stage": 2}, SHAPES),
    "dp3": ({"zero.stage": 3}, SHAPES),
}


def ranks_of(mode: str) -> int:
    """Ranks on which a mode's runs are taken."""
    return 1 if mode in ALONE else 2


def keys_of(mode: str) -> dict[str, Any]:
    """The keys that a mode sets."""
    return (ALONE | TWO)[mode][0]


# family and width of runs whose steps are mostly arithmetic, which tell what a step takes beyond its operators one by one
WIDER = (("llama", 128), ("gpt", 192), ("llama", 320))


def wider(family: str, width: int, *, folder: Path) -> RunConfig:
    """The config of one of WIDER: two layers, two micro-batches of 256 tokens."""
    keys = {"zero.stage": 1, "model.family": family}
    return program(keys, layers=2, microbatches=2, ranks=1, folder=folder, width=width, sequence=128, micro=2)


def program(
    keys: Mapping[str, Any],
    *,
    layers: int,
    microbatches: int,
    ranks: int,
    folder: Path,
    width: int = 64,
    sequence: int = SEQUENCE,
    micro: int = 1,
) -> RunConfig:
    """The config of a small run; without more, of a tiny one: widths of 64, 16 tokens a micro-batch."""
    shared = keys.get("parallel.tp", 1) * keys.get("parallel.pp", 1)
    model = {
        "family": "llama",
        "num_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 32,
        "num_query_groups": width // 32,
        "ffn_hidden_size": width if width == 64 else 2 * width,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": sequence,
    }
    train = {
        "steps": WARM_UP + STEPS,
        "global_batch_size": micro * microbatches * ranks // shared,
        "micro_batch_size": micro,
        "seq_length": sequence,
        "precision": "fp32",
        "watchdog_s": 0,
    }
    sections = {"run": {"dir": str(folder)}, "model": model, "train": train, "data": {"workers": 0}, "log": {"every": 100_000}}
    return as_config(sections, keys)
