"""The training program itself on the ranks of a pool: what `python -m toolkit.train` does, without
starting a process a rank.

config_of() writes the YAML of a run as a mapping, train() is what the pool calls on every rank, metrics() and tensors() read what
the run left on the disk.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 32,
    },
    "train": {"global_batch_size": 8, "micro_batch_size": 1, "seq_length": 32, "precision": "fp32"},
    "optimizer": {"lr": 1.0e-3, "schedule": "cosine"},
}


def config_of(text: Path, run: Path, keys: Mapping[str, Any], *, base: Mapping[str, Any] = BASE) -> dict[str, Any]:
    """A run's YAML as a mapping: base, with `section.key` values set, trained on a text in the folder run."""
    raw = copy.deepcopy(dict(base)) | {"run": {"dir": str(run)}}
    raw["data"] = {"source": str(text), "split": [80, 20, 0], "workers": 0, "cache_dir": str(text.parent / "data")}
    for dotted, value in keys.items():
        section, key = dotted.split(".")
        raw.setdefault(section, {})[key] = value
    if "nvme" in keys.values():
        raw["zero"]["nvme_path"] = str(run.parent / "nvme")
    return raw


def train(raw: dict[str, Any]) -> None:
    """Check, plan and train a run to its end on this rank."""
    from toolkit.config.load import parse_config
    from toolkit.train import loop
    from toolkit.train.resolve import resolve
    from toolkit.train.world import World

    loop.train(resolve(parse_config(raw), World.from_environment().size))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines that the run wrote, one a step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(checkpoint: Path) -> dict[str, str]:
    """Digest of every tensor that a checkpoint folder holds, by file and name: weights, moments,
    random generators.
    """
    import torch
    from safetensors import safe_open

    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118  not a mapping
                bits = f.get_tensor(name).contiguous().reshape(-1).view(torch.uint8)
                found[f"{path.name}:{name}"] = hashlib.sha256(bits.numpy()).hexdigest()
    return found
