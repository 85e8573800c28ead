"""Attention of a sequence that context-parallel ranks share: all-gather, all-to-all over heads, or a ring.

All take query [s/cp, b, heads, d] and key, value [s/cp, b, groups, d] of this rank's two chunks (see
toolkit.parallel.exchange), rotated already, and return [s/cp, b, heads, d]. bounds: as in
toolkit.engine.batch, of the whole sequence; None: one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.model.attention import Span, attend, block_backward, block_forward, document_spans, merge
from toolkit.parallel.exchange import chunks_of, sent_heads

Block = tuple[slice, slice, slice, bool]
"""Rows, queries and keys by place on their ranks, and whether they are one and the same chunk (causal)."""


def in_order(parts: Tensor) -> Tensor:
    """[cp, s/cp, …] of all ranks as the sequence [s, …]."""
    cp, held = parts.shape[:2]
    halves = parts.reshape(cp, 2, held // 2, *parts.shape[2:])
    return torch.cat([halves[:, 0], halves[:, 1].flip(0)]).reshape(cp * held, *parts.shape[2:])


def by_rank(sequence: Tensor, cp: int) -> Tensor:
    """A sequence [s, …] as the parts of all ranks [cp, s/cp, …]: the inverse of in_order()."""
    chunks = sequence.reshape(2 * cp, sequence.shape[0] // (2 * cp), *sequence.shape[1:])
    return torch.stack([chunks[:cp], chunks[cp:].flip(0)], dim=1).reshape(cp, sequence.shape[0] // cp, *sequence.shape[1:])


def local_spans(rank: int, cp: int, *, seq_length: int, bounds: Sequence[int] | None) -> list[Span]:
    """What a rank's queries attend to, when all keys are there in the sequence's order."""
    size = seq_length // (2 * cp)
    documents = [Span(None, range(seq_length), range(seq_length))] if bounds is None else document_spans(bounds, seq_length)
    spans = []
    for document in documents:
        for half, chunk in enumerate(chunks_of(rank, cp)):
            first, last = max(document.keys.start, chunk * size), min(document.keys.stop, (chunk + 1) * size)
            if first < last:
                shift = (half - chunk) * size
                spans.append(Span(document.row, range(first + shift, last + shift), range(document.keys.start, last)))
    return spans


def attend_gathered(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int] | None, *, group: dist.ProcessGroup, dropout: float, scale: float | None
) -> Tensor:
    """All keys and values gathered in one message; their gradients are summed in one."""
    keys, values = _Gathered.apply(torch.stack([key, value], dim=1), group).unbind(1)
    spans = local_spans(group.rank(), group.size(), seq_length=keys.shape[0], bounds=bounds)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, keys, values))
    return attend(q, k, v, spans, dropout=dropout, scale=scale).permute(2, 0, 1, 3)


class _Gathered(torch.autograd.Function):
    """[s/cp, …] of every rank as [s, …] in the sequence's order; the gradients of all ranks are summed."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = part.new_empty(group.size(), *part.shape)
        dist.all_gather_into_tensor(parts.view(-1), part.reshape(-1), group=group)
        return in_order(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = by_rank(gradients[0], ctx.group.size())
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine.view(-1), parts.reshape(-1), group=ctx.group)
        return mine, None


def attend_by_heads(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int] | None, *, group: dist.ProcessGroup, dropout: float, scale: float | None
) -> Tensor:
    """Ulysses: each rank gets the whole sequence for its share of the heads, in one message there
    and one back.
    """
    cp, heads, d = group.size(), query.shape[2], query.shape[3]
    wanted = sent_heads(heads=heads, groups=key.shape[2], cp=cp)
    each, shared = heads // cp, len(wanted[0])
    sent = torch.cat([query.unflatten(2, (cp, each)), *(_heads(t, wanted).unflatten(2, (cp, shared)) for t in (key, value))], dim=3)
    whole = in_order(_Swapped.apply(sent.movedim(2, 0), group))  # [s, b, each + 2 * shared, d]
    s, b = whole.shape[:2]
    q, k, v = (t.permute(1, 2, 0, 3) for t in whole.split([each, shared, shared], dim=2))
    spans = [Span(None, range(s), range(s))] if bounds is None else document_spans(bounds, s)
    out = attend(q, k, v, spans, dropout=dropout, scale=scale).permute(2, 0, 1, 3)
    back = _Swapped.apply(by_rank(out, cp), group)  # [cp, s/cp, b, each, d], by the rank whose heads they are
    return back.movedim(0, 2).reshape(s // cp, b, heads, d)


def _heads(tensor: Tensor, wanted: list[list[int]]) -> Tensor:
    """Heads [s, b, groups, d] in the order of the ranks that read them. No index on the device:
    copying it there would wait.
    """
    flat = [group for own in wanted for group in own]
    return tensor if flat == list(range(tensor.shape[2])) else torch.cat([tensor[:, :, g : g + 1] for g in flat], dim=2)


class _Swapped(torch.autograd.Function):
    """Part i of rank j becomes part j of rank i; so do the gradients."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _swap(parts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _swap(gradients[0], ctx.group), None


def _swap(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received.view(-1), sent.view(-1), group=group)
    return received


def attend_in_a_ring(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int] | None, *, group: dist.ProcessGroup, dropout: float, scale: float | None
) -> Tensor:
    """Keys and values go round, each step beside the attention to those that have come."""
    assert dropout == 0.0, "the rules refuse it"
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    found: Tensor = _Ring.apply(q, k, v, bounds, group, scale)
    return found.permute(2, 0, 1, 3)


def ring_blocks(rank: int, source: int, cp: int, *, size: int, bounds: Sequence[int] | None) -> list[Block]:
    """What a rank's queries do with the keys of another one. size: tokens of a chunk."""
    every, both = slice(None), slice(0, 2 * size)
    if bounds is None:
        if source == rank:
            return [(every, both, both, True)]
        return [(every, both, slice(0, size), False)] if source < rank else [(every, slice(size, 2 * size), both, False)]
    blocks: list[Block] = []
    for document in document_spans(bounds, 2 * cp * size):
        for half, mine in enumerate(chunks_of(rank, cp)):
            queries = _within(document.keys, mine, size=size, half=half)
            for other, theirs in enumerate(chunks_of(source, cp)):
                keys = _within(document.keys, theirs, size=size, half=other)
                if theirs <= mine and queries.start < queries.stop and keys.start < keys.stop:
                    blocks.append((document.rows, queries, keys, theirs == mine))
    return blocks


def _within(document: range, chunk: int, *, size: int, half: int) -> slice:
    shift = (half - chunk) * size
    return slice(max(document.start, chunk * size) + shift, min(document.stop, (chunk + 1) * size) + shift)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: list[int] | None, group: dist.ProcessGroup, scale: float | None
    ) -> Tensor:
        rank, cp = group.rank(), group.size()
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
        held = torch.stack([key, value])  # [2, b, groups, s/cp, d]
        for step in range(cp):
            coming = _Passed(held, group) if step < cp - 1 else None
            for rows, queries, keys, causal in ring_blocks(rank, (rank - step) % cp, cp, size=query.shape[2] // 2, bounds=bounds):
                k, v = held[:, rows, :, keys]
                part = block_forward(query[rows, :, queries], k, v, causal, scale)
                out[rows, :, queries], lse[rows, :, queries] = merge(out[rows, :, queries], lse[rows, :, queries], *part)
            held = coming.wait() if coming is not None else held
        ctx.save_for_backward(query, key, value, out.to(query.dtype), lse)
        ctx.bounds, ctx.group, ctx.scale = bounds, group, scale
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        group: dist.ProcessGroup = ctx.group
        rank, cp = group.rank(), group.size()
        d_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        held = torch.stack([key, value])
        d_held = torch.zeros(held.shape, dtype=torch.float32, device=query.device)
        moving: _Passed | None = None
        for step in range(cp):
            coming = _Passed(held, group) if step < cp - 1 else None
            d_here = torch.zeros_like(d_held)
            for rows, queries, keys, causal in ring_blocks(rank, (rank - step) % cp, cp, size=query.shape[2] // 2, bounds=ctx.bounds):
                k, v = held[:, rows, :, keys]
                q, g, o, log = (t[rows, :, queries] for t in (query, gradients[0], out, lse))
                d_q, d_k, d_v = block_backward(g, q, k, v, o, log, causal, ctx.scale)
                d_query[rows, :, queries] += d_q
                d_here[0, rows, :, keys] += d_k
                d_here[1, rows, :, keys] += d_v
            # the block's gradient so far has come from the rank before, while this rank added its own
            d_held = d_here if moving is None else moving.wait().add_(d_here)
            moving = _Passed(d_held, group)
            held = coming.wait() if coming is not None else held
        assert moving is not None
        d_key, d_value = moving.wait().to(key.dtype)  # home again
        return d_query.to(query.dtype), d_key, d_value, None, None, None


class _Passed:
    """A tensor on its way to the next rank of the ring, and the one that comes from the rank before."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        ranks = dist.get_process_group_ranks(group)
        here = group.rank()
        self.sent, self.received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self.work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, ranks[(here + 1) % len(ranks)], group),
                dist.P2POp(dist.irecv, self.received, ranks[(here - 1) % len(ranks)], group),
            ]
        )

    def wait(self) -> Tensor:
        for work in self.work:
            work.wait()
        return self.received


EXCHANGES = {"allgather": attend_gathered, "ulysses": attend_by_heads, "ring": attend_in_a_ring}
