"""Where and how large a GPU check is, the text it trains on, and the YAML of its runs: pure.

Two models: one that a CPU trains in a second, for results, and one that keeps a GPU busy, for times
and memory. `--quick` makes the second as small as the first.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 10
QUICK: dict[str, Any] = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 32, "precision": "fp32"}
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 256,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
MEDIUM = SMALL | {
    "num_layers": 8,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "ffn_hidden_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
# DeepSpeed's own defaults take gigabytes for a model of any size, and keep weights as small as
# these whole in ZeRO-3
DEEPSPEED: dict[str, Any] = {
    "fp16": {"initial_scale_power": 8},  # a scale that overflows does so at another step on another processor
    "zero_optimization": {"reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 0},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """folder: where runs and logs go; device: cuda or cpu; rehearsed: a file of what a rehearsal
    has said already.
    """

    folder: Path
    device: str = "cuda"
    quick: bool = False
    rehearsed: Path | None = None

    @property
    def text(self) -> Path:
        return self.folder / "text"

    @property
    def weights(self) -> Path:
        """Checkpoints of the run that a CPU has drawn the common weights in."""
        return self.folder / "runs" / "weights" / "checkpoints"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def small(self, name: str, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The YAML, as a mapping, of a run of the small model in the folder runs/NAME; keys:
        `section.key` values of its own.
        """
        train = {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 64, "precision": "fp32"}
        train |= QUICK if self.quick else {}
        return self._raw(name, SMALL, train, keys or {})

    def medium(self, name: str, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The same of the model that keeps a GPU busy; with --quick it is the small one."""
        if self.quick:
            return self.small(name, {"train.precision": "bf16"} | dict(keys or {}))
        train = {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "seq_length": 2048, "precision": "bf16"}
        return self._raw(name, MEDIUM, train, keys or {})

    def llama_1b(self, name: str, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Llama 3.2 1B at 4,096 tokens; with --quick the small model."""
        if self.quick:
            return self.medium(name, keys)
        train = {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 4096, "precision": "bf16"}
        return self._raw(name, {"preset": "llama3.2-1b"}, train, {"zero.stage": 1} | dict(keys or {}))

    def _raw(self, name: str, model: Mapping[str, Any], train: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "run": {"dir": str(self.run(name))},
            "model": dict(model),
            "zero": {"stage": 0, "deepspeed": copy.deepcopy(DEEPSPEED)},
            "train": dict(train),
            # gentle: a training that is itself unstable turns a difference of rounding into one of the result
            "optimizer": {"lr": 3.0e-4, "schedule": "constant"},
            "data": {"source": str(self.text), "split": [90, 10, 0], "workers": 0, "cache_dir": str(self.folder / "data")},
            "checkpoint": {"resume": "never"},
        }
        for dotted, value in keys.items():
            *sections, key = dotted.split(".")
            where = raw
            for section in sections:
                where = where.setdefault(section, {})
            where[key] = value
        return raw


def write_text(folder: Path) -> None:
    """The same documents each time, of words that repeat, so that a model learns something of them."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=400)))
