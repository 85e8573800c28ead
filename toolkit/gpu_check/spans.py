"""Attention over documents and over parts of a sequence, on the device against fp32 on the CPU.

A CPU runs other kernels for it than a GPU, so only a GPU can show that variable-length flash
attention, and the blocks that a ring merges, give the same results and gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toolkit.gpu_check.rows import Row
from toolkit.gpu_check.runs import Say, attempt
from toolkit.gpu_check.setting import Setting
from toolkit.model.attention import Span, attend, block_backward, block_forward, document_spans, merge

B, HEADS, GROUPS, S, D = 2, 8, 2, 256, 64
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest difference, as a share of the largest value
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def spans(setting: Setting, say: Say) -> None:
    """Results and gradients of each way that attention runs in."""
    ways: dict[str, list[Span]] = {
        "documents": document_spans([0, 30, 31, 200, S, S + 128, 2 * S], S),
        "a part of the sequence": [Span(None, range(64), range(64)), Span(None, range(64, 128), range(S - 64))],
    }
    for dtype in BOUNDS:
        for name, those in ways.items():
            count = max(s.queries.stop for s in those)

            def measure(name: str = name, those: list[Span] = those, dtype: torch.dtype = dtype, count: int = count) -> Row:
                return _same(name, lambda q, k, v: attend(q, k, v, those), those, queries=count, dtype=dtype, device=setting.device)

            attempt(f"{name}, {dtype}", say, measure)
        if dtype != torch.float32 or setting.device == "cpu":  # flash kernels of a GPU take 16 bits alone, and the rules say so
            halves = [Span(None, range(S // 2), range(S))]

            def in_blocks(halves: list[Span] = halves, dtype: torch.dtype = dtype) -> Row:
                return _same("blocks of a ring", _Blocks.apply, halves, queries=S // 2, dtype=dtype, device=setting.device)

            attempt(f"blocks of a ring, {dtype}", say, in_blocks)


class _Blocks(torch.autograd.Function):
    """The later half of a sequence: its own keys causally, and all keys of the first half."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        half = query.shape[2]
        own = block_forward(query, key[:, :, half:], value[:, :, half:], True, None)
        out, lse = merge(*own, *block_forward(query, key[:, :, :half], value[:, :, :half], False, None))
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        half = query.shape[2]
        parts = [
            block_backward(gradient, query, key[:, :, keys], value[:, :, keys], out, lse, causal, None)
            for keys, causal in ((slice(0, half), False), (slice(half, None), True))
        ]
        d_key, d_value = (torch.cat([part[i] for part in parts], dim=2) for i in (1, 2))
        return parts[0][0] + parts[1][0], d_key, d_value


def _same(name: str, attention: Attention, those: list[Span], *, queries: int, dtype: torch.dtype, device: str) -> Row:
    draw = torch.Generator().manual_seed(0)
    shapes = ((B, HEADS, queries, D), (B, GROUPS, S, D), (B, GROUPS, S, D))
    drawn = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    weight = torch.randn(shapes[0], generator=draw)
    exact = _with_gradients(lambda q, k, v: attend(q, k, v, those), [t.float() for t in drawn], weight)
    found = _with_gradients(attention, [t.to(device) for t in drawn], weight.to(device, dtype))
    worst = max(float((a.cpu().float() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
    title = f"{name}, {str(dtype).removeprefix('torch.')}"
    return Row(name=title, verdict="pass" if worst <= BOUNDS[dtype] else "fail", measured=f"{worst:.1e}", bound=f"{BOUNDS[dtype]:.0e}")


def _with_gradients(attention: Attention, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    for tensor in inputs:
        tensor.requires_grad_()
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]
