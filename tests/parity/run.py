"""One cell, run on every rank of its world: what it returns must not depend on the layout."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
import torch.distributed as dist

from tests.rank import Rank
from toolkit.arch.spec import ModelSpec


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train cell["config"] for its steps; losses and norms, and this rank's digest of every parameter.

    cell["mutation"]: name of a function of tests.parity.mutations that breaks the engine first.
    cell["loss"]: name of a function of tests.parity.losses to train with.
    """
    from tests.parity import losses as own_losses

    rank = Rank(cell["config"], loss=getattr(own_losses, cell["loss"]) if cell.get("loss") else None)
    if cell.get("mutation"):
        from tests.parity import mutations

        getattr(mutations, cell["mutation"])(rank.engine)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[rank.config.train.precision]
    assert {p.dtype for chunk in rank.chunks for p in chunk.parameters()} == {dtype}, "a layout must not change the precision"
    losses, norms = zip(*(rank.step(number) for number in range(rank.config.train.steps)), strict=True)
    found = digests(rank.engine, rank.chunks, rank.config.model.spec, tp=rank.at.tp)
    return {"losses": list(losses), "norms": list(norms), "digests": found}


def digests(engine: Any, chunks: list[Any], spec: ModelSpec, *, tp: int) -> dict[str, str]:
    """Digest of each parameter's bits under its global name, and its TP rank where it is cut: equal
    keys, equal bits.
    """
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


def sleep_on_rank_1(_: Any) -> None:
    """Rank 1 does not end, for the test of what then happens."""
    if dist.get_rank() == 1:
        time.sleep(60)
