"""A global batch's micro-batches, made ready for the model: where documents lie, and what each token weighs in the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.parallel.layout import Layout

Batch = dict[str, Tensor]


def with_documents(batch: Batch) -> Batch:
    """A micro-batch on the CPU with "bounds": int32 [documents + 1], where documents begin in its rows laid end to end, and their end.

    positions [b, s]: 0 at each document's first token, and at each row's.
    """
    positions = batch["positions"]
    starts = (positions == 0).flatten().nonzero().flatten()
    return batch | {"bounds": torch.cat([starts, starts.new_tensor([positions.numel()])]).int()}


def weigh(micro: Sequence[Batch], layout: Layout, *, group: dist.ProcessGroup | None) -> None:
    """Give each micro-batch of a rank "weights" [b, s] in fp32, if any token of the global batch is left out by a "loss_mask" [b, s].

    The sum over tokens of loss times weight is then this rank's and micro-batch's estimate of the
    mean over all tokens of the global batch that count: averaged over micro-batches and ranks, as
    every loss is, it is that mean. group: the data-parallel ranks, without context parallelism; all
    of them call it.
    """
    masks = [batch.get("loss_mask", torch.ones_like(batch["tokens"])) for batch in micro]
    real = torch.stack([mask.sum(dtype=torch.float64) for mask in masks]).sum()
    count = torch.stack([real, torch.tensor(float(sum(m.numel() for m in masks)), dtype=torch.float64, device=real.device)])
    if layout.dp > 1:
        dist.all_reduce(count, group=group)
    real, every = count
    if real == every:
        return
    factor = len(micro) * layout.dp * layout.cp / real.clamp(min=1.0)
    for batch, mask in zip(micro, masks, strict=True):
        batch["weights"] = (mask * factor).float()
