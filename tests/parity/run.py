"""One cell, run on every rank of its world: what it returns must not depend on the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.arch.spec import ModelSpec


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train cell["config"] for its steps; losses and norms, and this rank's digest of every parameter.

    cell["mutation"]: name of a function of tests.parity.mutations that breaks the engine first. cell["loss"]: name of a function of
    tests.parity.losses to train with.
    """
    from tests.parity import losses as own_losses
    from toolkit.config.load import parse_config
    from toolkit.engine.loss import Loss
    from toolkit.engine.schedule import Schedule
    from toolkit.engine.zero import Engine, partitioner
    from toolkit.model.build import build_chunks
    from toolkit.parallel.deepspeed_json import deepspeed_config
    from toolkit.parallel.rules import check
    from toolkit.train.world import World, connect

    config = parse_config(cell["config"])
    world = World.from_environment()
    layout = check(config, world.size)
    connect(world, layout, seed=config.run.seed)
    ds_config = deepspeed_config(config, layout)
    chunks = build_chunks(config, layout, device=world.device, partition=partitioner(config, ds_config))
    engine = Engine(chunks, config, layout, ds_config)
    if cell.get("mutation"):
        from tests.parity import mutations

        getattr(mutations, cell["mutation"])(engine)
    t = config.train
    loss_of = Loss(getattr(own_losses, cell["loss"])) if cell.get("loss") else None
    schedule = Schedule(engine.views, layout, seq_length=t.seq_length, micro_batch_size=t.micro_batch_size, loss=loss_of)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    assert {p.dtype for chunk in chunks for p in chunk.parameters()} == {dtype}, "a layout must not change the precision"
    at = layout.coordinates(world.rank)
    losses, norms = [], []
    for step in range(t.steps):
        micro = list(micro_batches(config, layout, at.dp, step))
        engine.begin()
        loss = schedule(lambda: iter(micro), num_microbatches=layout.num_microbatches)  # noqa: B023
        norms.append(float(engine.finish()))
        total = torch.zeros(()) if loss is None or at.tp else loss / layout.dp
        dist.all_reduce(total)
        losses.append(float(total))
        assert loss_of is None or loss_of.error is None, loss_of.error
    return {"losses": losses, "norms": norms, "digests": digests(engine, chunks, config.model.spec, tp=at.tp)}


def micro_batches(config: Any, layout: Any, dp: int, step: int) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of a global batch of random tokens that depends on the step alone."""
    t = config.train
    generator = torch.Generator().manual_seed(1000 + step)
    batch = torch.randint(0, config.model.vocab_size, (t.global_batch_size, t.seq_length + 1), generator=generator)
    for micro in batch.chunk(layout.dp)[dp].split(t.micro_batch_size):
        yield {"tokens": micro[:, :-1], "labels": micro[:, 1:]}


def digests(engine: Any, chunks: list[Any], spec: ModelSpec, *, tp: int) -> dict[str, str]:
    """Digest of each parameter's bits under its global name, and its TP rank where it is cut: equal keys, equal bits."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    from toolkit.model.init import named_weights

    found = {}
    for chunk in chunks:
        with GatheredParameters(list(chunk.parameters()), enabled=engine.stage == 3):
            for weight, parameter in named_weights(chunk, spec):
                key = f"{weight.name}@{tp}" if weight.cut.dim is not None else weight.name
                bits = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
                found[key] = hashlib.sha256(bits).hexdigest()
    return found
