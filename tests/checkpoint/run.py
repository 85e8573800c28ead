"""A small training run on every rank of a pool's world, with checkpoints as the training loop makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.parity.run import digests, micro_batches

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


def train(raw: dict[str, Any]) -> dict[str, Any]:
    """Losses and norms of the steps taken, and the digests of all parameters at the end."""
    from toolkit.checkpoint.session import Checkpoints
    from toolkit.checkpoint.start import starting_weights
    from toolkit.config.load import parse_config
    from toolkit.engine.schedule import Schedule
    from toolkit.engine.zero import Engine, partitioner
    from toolkit.model.build import build_chunks
    from toolkit.parallel.deepspeed_json import deepspeed_config
    from toolkit.parallel.rules import check
    from toolkit.runfolder.metrics import StepRecord
    from toolkit.train.lr import learning_rate
    from toolkit.train.world import World, connect

    config = parse_config(raw)
    world = World.from_environment()
    layout = check(config, world.size)
    connect(world, layout, seed=config.run.seed)
    checkpoints = Checkpoints(config, layout, prepared(config.run.dir), weights=starting_weights(config))
    ds_config = deepspeed_config(config, layout)
    chunks = build_chunks(config, layout, device=world.device, partition=partitioner(config, ds_config))
    engine = Engine(chunks, config, layout, ds_config)
    checkpoints.attach(engine, Sequences())
    t = config.train
    schedule = Schedule(engine.views, layout, seq_length=t.seq_length, micro_batch_size=t.micro_batch_size)
    at = layout.coordinates(world.rank)
    losses, norms = [], []
    for step in range(checkpoints.step + 1, t.steps + 1):
        micro = list(micro_batches(config, layout, at.dp, step))
        engine.set_lr(learning_rate(config.optimizer, step=step - 1, total_steps=t.steps))
        engine.begin()
        loss = schedule(lambda: iter(micro), num_microbatches=layout.num_microbatches)  # noqa: B023
        norms.append(float(engine.finish()))
        total = torch.zeros(()) if loss is None or at.tp else loss / layout.dp
        dist.all_reduce(total)
        losses.append(float(total))
        checkpoints.save(StepRecord(step, 0.0, 0.0, 0.0, 0, 0.0, 0.0, None, 0.0, 0.0, 0.0), last=False)
        checkpoints.commit()
    checkpoints.settle()
    checkpoints.release()
    return {
        "first": checkpoints.step + 1,
        "losses": losses,
        "norms": norms,
        "digests": digests(engine, chunks, config.model.spec, tp=at.tp),
        "scale": engine.loss_scale,
    }
