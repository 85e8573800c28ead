"""A global batch's micro-batches, made ready for the model: where documents lie, and what each
token weighs in the loss, and which part of the sequence a rank takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.data.documents import bounds_of
from toolkit.parallel.exchange import chunks_of
from toolkit.parallel.layout import Layout

Batch = dict[str, Tensor]


def with_documents(batch: Batch) -> Batch:
    """A micro-batch on the CPU with "bounds": int32 [documents + 1], where documents begin in its
    rows laid end to end, and their end.

    positions [b, s]: 0 at each document's first token, and at each row's.
    """
    return batch | {"bounds": torch.from_numpy(bounds_of(batch["positions"].numpy()))}


def part_of(batch: Batch, layout: Layout, *, rank: int) -> Batch:
    """A context-parallel rank's part of a micro-batch: of every entry [b, s, …] its two chunks, of
    any other all.

    "positions" are those of the tokens in the whole sequence, or in their documents where those are
    kept apart.
    """
    tokens = batch["tokens"]
    s = tokens.shape[1]
    chunks = chunks_of(rank, layout.cp)
    if "bounds" not in batch:
        batch = batch | {"positions": torch.arange(s, device=tokens.device).expand_as(tokens)}

    def part(entry: Tensor) -> Tensor:
        if entry.dim() < 2 or entry.shape[1] != s:
            return entry
        pieces = entry.chunk(2 * layout.cp, dim=1)
        return torch.cat([pieces[c] for c in chunks], dim=1)

    return {key: part(entry) for key, entry in batch.items()}


def weigh(micro: Sequence[Batch], layout: Layout, *, group: dist.ProcessGroup | None, known: bool = False) -> None:
    """Give each micro-batch of a rank "weights" [b, s] in fp32, if any token of the global batch is
    left out by a "loss_mask" [b, s].

    The sum over tokens of loss times weight is then this rank's and micro-batch's estimate of the
    mean over all tokens of the global batch that count: averaged over micro-batches and ranks, as
    every loss is, it is that mean. group: the data-parallel ranks, without context parallelism; all
    of them call it. known: that some token is left out, so that nobody waits for the answer.
    """
    masks = [batch.get("loss_mask", torch.ones_like(batch["tokens"])) for batch in micro]
    real = torch.stack([mask.sum(dtype=torch.float64) for mask in masks]).sum()
    count = torch.stack([real, torch.tensor(float(sum(m.numel() for m in masks)), dtype=torch.float64, device=real.device)])
    if layout.dp > 1:
        dist.all_reduce(count, group=group)
    real, every = count
    if not known and bool(real == every):
        return
    factor = len(micro) * layout.dp * layout.cp / real.clamp(min=1.0)
    for batch, mask in zip(micro, masks, strict=True):
        batch["weights"] = (mask * factor).float()
