"""One rank's part of an evaluation: the loop's model and its evaluation, on windows of the data."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.data.given import Samples
from toolkit.evaluate.resolve import Task
from toolkit.evaluate.windows import Windows
from toolkit.train.hooks import Extensions
from toolkit.train.loop import Run
from toolkit.train.resolve import ResolvedRun
from toolkit.train.world import World, connect

log = logging.getLogger("toolkit.evaluate")

_SAID_EVERY_S = 10.0


def evaluate(resolved: ResolvedRun, windows: Windows, task: Task) -> dict[str, Any]:
    """Mean loss in nats over every label that counts, the number of these, and the seconds it took;
    alike on all ranks.
    """
    config, world = resolved.config, World.from_environment()
    connect(world, resolved.layout, seed=config.run.seed)
    offloaded = config.zero.offload_optimizer != "none"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of an optimizer that it does not know, and none is used
    run = Run(resolved, world, Extensions(loss=masked_sum, optimizer=None if offloaded else _no_optimizer))
    run.stop.close()  # nothing is to be finished or saved: a signal ends it at once
    tokens = windows.counted(task.batches * config.train.global_batch_size)
    started = said = time.perf_counter()

    def told(batch: int) -> None:
        nonlocal said
        if world.rank == 0 and time.perf_counter() - said > _SAID_EVERY_S:
            said = time.perf_counter()
            log.info("evaluated %d of %d batches in %.0f s", batch, task.batches, said - started)

    try:
        # a mean over micro-batches of the sum over each one's tokens
        mean = run.evaluate(Samples(windows, config), batches=task.batches, told=told)
        total = mean * task.batches * resolved.layout.copies * resolved.layout.num_microbatches
        return {"loss": total / tokens, "tokens": tokens, "seconds": time.perf_counter() - started}
    finally:
        run.close()


def masked_sum(losses: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The sum over labels that count. losses, batch["mask"]: [b, s]."""
    return torch.where(batch["mask"] > 0, losses, 0.0).sum()


def _no_optimizer(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer that takes no memory, as nothing is trained."""
    return torch.optim.SGD(groups, lr=0.0)
