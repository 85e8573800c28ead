"""One rank of a run, driven by hand: for tests that look into the engine between steps.

rank = Rank(raw)
for number in range(3):
    loss, norm = rank.step(number)

A test that needs no look inside runs the training program itself: tests/loop.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Batch = dict[str, Tensor]


def micro_batches(config: Any, layout: Any, dp: int, step: int) -> Iterator[Batch]:
    """This rank's micro-batches of a global batch of random tokens that depends on the step alone."""
    t = config.train
    generator = torch.Generator().manual_seed(1000 + step)
    batch = torch.randint(0, config.model.vocab_size, (t.global_batch_size, t.seq_length + 1), generator=generator)
    eod = 7  # as likely as any id: with documents kept apart, a sequence has a few, of which micro-batches have more and less
    if config.data.document_mask:
        batch = torch.where(torch.rand(batch.shape, generator=generator) < 0.1, eod, batch)
    for micro in batch.chunk(layout.dp)[dp].split(t.micro_batch_size):
        if config.data.document_mask:
            from toolkit.data.documents import cut_at_ends
            from toolkit.engine.batch import with_documents

            rows = [cut_at_ends(row.numpy(), eod=eod) for row in micro]
            yield with_documents({key: torch.stack([torch.from_numpy(row[key]).long() for row in rows]) for key in rows[0]})
        else:
            yield {"tokens": micro[:, :-1], "labels": micro[:, 1:]}


class Rank:
    """Config, layout, model chunks, engine and schedule of this rank, made as the training loop makes them.

    data: (prepared data, training set) of a run that resumes, saves, or starts from weights; None:
    of one that does none of it.
    optimizer: as the engine's argument. loss: a function to train with instead of the mean.
    machine: what the rules are told of this machine; None: a CPU.
    """

    def __init__(
        self, raw: dict[str, Any], *, data: tuple[Any, Any] | None = None, optimizer: Any = None, loss: Any = None, machine: Any = None
    ) -> None:
        from toolkit.checkpoint.session import Checkpoints
        from toolkit.checkpoint.start import starting_weights
        from toolkit.config.load import parse_config
        from toolkit.engine.loss import Loss
        from toolkit.engine.schedule import Schedule
        from toolkit.engine.zero import Engine, partitioner
        from toolkit.model.build import build_chunks
        from toolkit.parallel.deepspeed_json import deepspeed_config
        from toolkit.parallel.rules import NO_GPU, check
        from toolkit.train.world import World, connect

        self.config = parse_config(raw)
        self.world = World.from_environment()
        self.layout = check(self.config, self.world.size, machine=machine or NO_GPU)
        self.at = self.layout.coordinates(self.world.rank)
        connect(self.world, self.layout, seed=self.config.run.seed)
        if data is not None:
            self.checkpoints = Checkpoints(self.config, self.layout, data[0], weights=starting_weights(self.config))
        ds_config = deepspeed_config(self.config, self.layout)
        blank = data is not None and self.checkpoints.weights is not None
        partition = partitioner(self.config, ds_config)
        self.chunks = build_chunks(self.config, self.layout, device=self.world.device, partition=partition, blank=blank)
        self.engine = Engine(self.chunks, self.config, self.layout, ds_config, optimizer=optimizer)
        if data is not None:
            self.checkpoints.attach(self.engine, data[1])
        t = self.config.train
        self.loss = Loss(loss)
        self.schedule = Schedule(
            self.engine.views, self.layout, seq_length=t.seq_length, micro_batch_size=t.micro_batch_size, loss=self.loss
        )

    def micro(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        from megatron.core import parallel_state

        from toolkit.engine.batch import weigh

        micro = list(micro_batches(self.config, self.layout, self.at.dp, step))
        weigh(micro, self.layout, group=parallel_state.get_data_parallel_group())
        return micro

    def step(self, number: int) -> tuple[float, float]:
        """Train one step at the learning rate that is set: its loss, the mean over all ranks, and
        the global gradient norm.
        """
        loss, norm = self.forward_backward(self.micro(number)), float(self.engine.finish())
        total = torch.zeros(()) if loss is None or self.at.tp else loss / self.layout.copies
        dist.all_reduce(total)
        return float(total), norm

    def forward_backward(self, micro: list[Batch]) -> Tensor | None:
        """The schedule over some micro-batches; the update is left to engine.finish()."""
        self.engine.begin()
        loss = self.schedule(lambda: iter(micro), num_microbatches=self.layout.num_microbatches)
        assert self.loss.error is None, self.loss.error
        return loss
