"""Causal attention over spans: parts of a sequence that attend to nothing outside themselves.

A span lets queries first .. last attend to keys, of which the last query sees all, the one before
it all but one, and so on. A document is one span, and so is a part of a document whose earlier
keys lie elsewhere (context parallelism). No mask of [s, s] exists at any time.

On a CPU, a span runs through PyTorch's flash kernel in one or two blocks whose results are merged
by their log-sum-exp. On CUDA all spans run through PyTorch's variable-length flash attention at
once; that path has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ATEN: Any = torch.ops.aten


@dataclass(frozen=True)
class Span:
    """Queries queries.start .. queries.stop - 1 attend to keys.start .. keys.stop - 1, aligned at the end.

    row: of the batch; None: all rows alike. There are at least as many keys as queries.
    """

    row: int | None
    queries: range
    keys: range

    @property
    def rows(self) -> slice:
        """As an index into the batch dimension."""
        return slice(None) if self.row is None else slice(self.row, self.row + 1)

    def blocks(self) -> Iterator[tuple[slice, bool]]:
        """The keys in one or two runs: those before all queries, then as many as there are queries,
        causally.
        """
        middle = self.keys.stop - len(self.queries)
        if middle > self.keys.start:
            yield slice(self.keys.start, middle), False
        yield slice(middle, self.keys.stop), True


def document_spans(bounds: Sequence[int], seq_length: int) -> list[Span]:
    """A span for each document. bounds: where documents begin in the rows laid end to end, and their end."""
    spans = []
    for start, end in pairwise(bounds):
        row, first = divmod(start, seq_length)
        spans.append(Span(row, range(first, first + end - start), range(first, first + end - start)))
    return spans


def attend(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], *, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """Attention of the given spans, which cover each query once.

    query [b, heads, s, d]; key, value [b, groups, t, d]; result [b, heads, s, d].
    """
    if dropout > 0.0:
        return _attend_by_span(query, key, value, spans, dropout=dropout, scale=scale)
    if not query.is_cuda:
        found: Tensor = _Spans.apply(query, key, value, tuple(spans), scale)
        return found
    if query.dtype == torch.float32:
        return _attend_by_span(query, key, value, spans, dropout=0.0, scale=scale)
    return _attend_varlen(query, key, value, spans, scale=scale)


class _Spans(torch.autograd.Function):
    """Spans on a CPU, block by block; the backward of a block needs only the merged result and its
    log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[Span, ...], scale: float | None) -> Tensor:
        b, heads, s, d = query.shape
        out = query.new_empty(b, s, heads, d).transpose(1, 2)
        lse = query.new_empty(b, heads, s, dtype=torch.float32)
        for span in spans:
            q = query[span.rows, :, span.queries.start : span.queries.stop]
            merged = None
            for keys, causal in span.blocks():
                part = block_forward(q, key[span.rows, :, keys], value[span.rows, :, keys], causal, scale)
                merged = part if merged is None else merge(*merged, *part)
            assert merged is not None
            out[span.rows, :, span.queries.start : span.queries.stop] = merged[0]
            lse[span.rows, :, span.queries.start : span.queries.stop] = merged[1]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        d_query = torch.empty_like(query)
        # keys that several spans see add up, in fp32: 16 bits would lose what one span adds to another
        shared = sum(len(s.keys) for s in ctx.spans) > sum(len(s.queries) for s in ctx.spans)
        kept = torch.float32 if shared else key.dtype
        d_key, d_value = (torch.zeros(t.shape, dtype=kept, device=t.device) for t in (key, value))
        for span in ctx.spans:
            at = slice(span.queries.start, span.queries.stop)
            q, g, o, log = (t[span.rows, :, at] for t in (query, gradients[0], out, lse))
            total: Any = None
            for keys, causal in span.blocks():
                k, v = key[span.rows, :, keys], value[span.rows, :, keys]
                d_q, d_k, d_v = block_backward(g, q, k, v, o, log, causal, ctx.scale)
                d_key[span.rows, :, keys] += d_k
                d_value[span.rows, :, keys] += d_v
                total = d_q if total is None else total.add_(d_q)
            d_query[span.rows, :, at] = total
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def block_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention to one run of keys: the result [b, heads, s, d] and the log-sum-exp of its scores
    [b, heads, s].
    """
    if not query.is_cuda:
        found = ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    else:
        found = ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    return found[0], found[1]


def block_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through one run of keys. out, lse: of all runs together."""
    if not query.is_cuda:
        found = ATEN._scaled_dot_product_flash_attention_for_cpu_backward(gradient, query, key, value, out, lse, 0.0, causal, scale=scale)
    else:
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
        lengths = query.shape[2], key.shape[2]
        found = ATEN._scaled_dot_product_flash_attention_backward(
            gradient, query, key, value, out, lse, None, None, *lengths, 0.0, causal, seed, seed[:0], scale=scale
        )
    return found[0], found[1], found[2]


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each: results [b, heads, s, d] and
    log-sum-exp [b, heads, s].
    """
    total = torch.logaddexp(lse, other_lse)
    first, second = ((part - total).exp().unsqueeze(-1) for part in (lse, other_lse))
    return (out.float() * first + other.float() * second).to(out.dtype), total


def _attend_by_span(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], *, dropout: float, scale: float | None) -> Tensor:
    """Span by span through scaled_dot_product_attention, whose kernels know dropout and fp32.

    On a CPU, PyTorch's kernel for dropout keeps the scores of one span, as it does without spans.
    """
    from torch.nn.attention.bias import causal_lower_right

    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and query.dtype == torch.float32:  # no fused CUDA kernel takes grouped queries in fp32
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        grouped = False
    rows: dict[int | None, list[Tensor]] = {}
    for span in spans:
        q = query[span.rows, :, span.queries.start : span.queries.stop]
        k, v = (t[span.rows, :, span.keys.start : span.keys.stop] for t in (key, value))
        square = len(span.queries) == len(span.keys)
        mask: Any = None if square else causal_lower_right(len(span.queries), len(span.keys))
        if not query.is_cuda and mask is not None:
            # math on a CPU holds the scores anyway
            mask = torch.ones(len(span.queries), len(span.keys), dtype=torch.bool).tril(len(span.keys) - len(span.queries))
        part = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=square, scale=scale, enable_gqa=grouped)
        rows.setdefault(span.row, []).append(part)
    return torch.cat([torch.cat(parts, dim=2) for parts in rows.values()], dim=0)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], *, scale: float | None) -> Tensor:
    """All spans in one call of PyTorch's variable-length flash attention (CUDA, 16 bits)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # an older PyTorch
        return _attend_by_span(query, key, value, spans, dropout=0.0, scale=scale)

    b, heads, s, d = query.shape
    every = [span for span in spans if span.row is not None] or [Span(r, n.queries, n.keys) for r in range(b) for n in spans]
    q, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], d) for t in (query, key, value))
    t = key.shape[2]
    if [(n.row, n.keys.start) for n in every] != [(n.row, n.queries.start) for n in every] or t != s:
        places = torch.cat([torch.arange((n.row or 0) * t + n.keys.start, (n.row or 0) * t + n.keys.stop, device=q.device) for n in every])
        k, v = k[places], v[places]
    counts = [[0, *(len(n.queries) for n in every)], [0, *(len(n.keys) for n in every)]]
    ends = torch.tensor(counts).cumsum(1).int().pin_memory().to(q.device, non_blocking=True)  # from other memory the host would wait
    longest = [max(c) for c in counts]
    out = varlen_attn(q, k, v, ends[0], ends[1], longest[0], longest[1], scale=scale, window_size=(-1, 0), enable_gqa=heads != key.shape[1])
    return out.view(b, s, heads, d).transpose(1, 2)  # type: ignore[union-attr]
