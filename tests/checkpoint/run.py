"""A small training run on every rank of a pool's world, with checkpoints as the training loop makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.run import digests
from tests.rank import Rank

TOKENS = 250


class Sequences:
    """A data set of random tokens: enough for the probe."""

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"text": np.random.default_rng(i).integers(0, TOKENS, 33)}


def prepared(folder: Any) -> Any:
    from toolkit.data.dataset import PreparedData

    return PreparedData(
        prefixes=("p",),
        weights=(1.0,),
        vocab_size=TOKENS,
        eod=0,
        tokenizer="bytes",
        tokenizer_hash="t",
        entropy=5.0,
        tokens=1000,
        documents=10,
        identity="d",
        cache_dir=folder,
    )


BASE: dict[str, Any] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "vocab_size": TOKENS,
        "max_position_embeddings": 32,
    },
    "train": {"global_batch_size": 8, "micro_batch_size": 1, "seq_length": 32, "precision": "fp32"},
    "optimizer": {"lr": 1.0e-3, "schedule": "cosine"},
}


def config_of(folder: Path, keys: dict[str, Any], *, steps: int, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A run's YAML as a mapping: BASE with `section.key` values set."""
    config = copy.deepcopy(BASE) | {"run": {"dir": str(folder)}, "checkpoint": checkpoint}
    config["train"]["steps"] = steps
    for dotted, value in keys.items():
        section, key = dotted.split(".")
        config.setdefault(section, {})[key] = value
    if "nvme" in keys.values():
        config["zero"]["nvme_path"] = str(folder / "nvme")
    return config


def train(raw: dict[str, Any], *, machine: Any = None) -> dict[str, Any]:
    """Losses and norms of the steps taken, and the digests of all parameters at the end. machine:
    as tests.rank's.
    """
    from toolkit.runfolder.metrics import StepRecord
    from toolkit.train.lr import learning_rate

    rank = Rank(raw, data=(prepared(Path(raw["run"]["dir"])), Sequences()), machine=machine)
    config, engine, checkpoints = rank.config, rank.engine, rank.checkpoints
    losses, norms = [], []
    for step in range(checkpoints.step + 1, config.train.steps + 1):
        engine.set_lr(learning_rate(config.optimizer, step=step - 1, total_steps=config.train.steps))
        loss, norm = rank.step(step)
        losses.append(loss)
        norms.append(norm)
        checkpoints.save(StepRecord(step, 0.0, 0.0, 0.0, 0, 0.0, 0.0, None, 0.0, 0.0, 0.0), last=False)
        checkpoints.commit()
    checkpoints.settle()
    checkpoints.release()
    return {
        "first": checkpoints.step + 1,
        "losses": losses,
        "norms": norms,
        "digests": digests(engine, rank.chunks, config.model.spec, tp=rank.at.tp),
        "scale": engine.loss_scale,
    }
