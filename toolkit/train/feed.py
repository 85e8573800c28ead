"""What a rank's steps read: its micro-batches of each global batch, on its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from toolkit.data.given import GivenData
from toolkit.data.loader import ON_HOST, batches
from toolkit.engine.batch import weigh, with_documents
from toolkit.errors import ToolkitError
from toolkit.train.resolve import ResolvedRun

Batch = dict[str, Tensor]
Fetched = tuple[list[Batch], ToolkitError | None]


class Feed:
    """Batches for one rank of a run. device: where its model is."""

    def __init__(self, resolved: ResolvedRun, *, rank: int, device: torch.device) -> None:
        self.config, self.layout, self.device = resolved.config, resolved.layout, device
        self.at = self.layout.coordinates(rank)
        # where documents lie matters to every stage, tokens and labels to the ends of the pipeline
        self.reads = self.config.data.document_mask or self.at.pp in (0, self.layout.pp - 1)
        given = resolved.data
        self.may_leave_out = self.config.data.document_mask or (isinstance(given, GivenData) and given.masked)

    def reader(self, dataset: Any, *, workers: int, consumed: int = 0) -> Any:
        """Micro-batches for this data-parallel rank; None on stages that neither embed nor compute a
        loss. consumed: samples of the data set that are behind it.
        """
        if not self.reads:
            return None
        return batches(
            dataset,
            layout=self.layout,
            dp_rank=self.at.dp,
            global_batch_size=self.config.train.global_batch_size,
            consumed_samples=consumed,
            workers=workers,
            seed=self.config.run.seed,
            apart=self.config.data.document_mask,
        )

    def fetch(self, reader: Iterator[Batch] | None) -> Fetched:
        """The micro-batches of a global batch on the device, and what went wrong reading them: the step
        is then taken with others waiting for it, and ends the run.
        """
        errors: list[ToolkitError] = []
        micro = [self._next(reader, errors) for _ in range(self.layout.num_microbatches)]
        return micro, errors[0] if errors else None

    def weigh(self, micro: list[Batch]) -> None:
        """Let every token that counts weigh the same, where some may not; all data-parallel ranks call it."""
        if self.may_leave_out and self.reads:
            some = self.config.data.document_mask  # known without a look at the masks
            weigh(micro, self.layout, group=parallel_state.get_data_parallel_group(), known=some)

    def _next(self, reader: Iterator[Batch] | None, errors: list[ToolkitError]) -> Batch:
        try:
            batch = next(reader) if reader is not None else None
        except ToolkitError as error:
            errors.append(error)
            batch = None
        t = self.config.train
        if batch is None:
            nothing = torch.zeros((t.micro_batch_size, t.seq_length), dtype=torch.int64, device=self.device)
            batch = {"tokens": nothing, "labels": nothing}
            if self.config.data.document_mask:  # this rank met an error, and others wait for it
                batch = with_documents(batch | {"positions": torch.arange(t.seq_length).expand_as(nothing)})
        if self.device.type == "cuda":
            batch = {k: v if k in ON_HOST else v.to(self.device, non_blocking=True) for k, v in batch.items()}
        return batch
