"""Attention over spans against one softmax over a whole mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.model.attention import Span, attend, document_spans

B, HEADS, S, D = 2, 4, 24, 8


def dense(query: Tensor, key: Tensor, value: Tensor, spans: list[Span]) -> Tensor:
    """The same in one softmax with an explicit mask, in the inputs' precision."""
    allowed = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool)
    for span in spans:
        for place, q in enumerate(span.queries):
            last = span.keys.stop - len(span.queries) + place
            allowed[span.rows, :, q, span.keys.start : last + 1] = True
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


def drawn(groups: int, *, keys: int = S, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(B, HEADS, S, D), (B, groups, keys, D), (B, groups, keys, D)]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


SPANS: dict[str, list[Span]] = {
    "one document": document_spans([0, S, 2 * S], S),
    "documents": document_spans([0, 3, 4, 20, S, S + 11, 2 * S], S),
    "the later half of all rows": [Span(None, range(S), range(0, 2 * S))],
    "two parts": [Span(None, range(0, 8), range(0, 8)), Span(None, range(8, S), range(16, 2 * S))],
    "by rows": [Span(0, range(S), range(5, 40)), Span(1, range(0, 10), range(0, 12)), Span(1, range(10, S), range(30, 44))],
}


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", SPANS)
def test_equals_one_softmax(name: str, groups: int) -> None:
    spans = SPANS[name]
    inputs = drawn(groups, keys=S if "document" in name else 2 * S)
    weight = torch.randn(B, HEADS, S, D)
    expected = dense(*inputs, spans)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    found = attend(*inputs, spans)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_sixteen_bits_are_near() -> None:
    spans, inputs = SPANS["two parts"], drawn(2, keys=2 * S, dtype=torch.bfloat16)
    expected = dense(*(t.float() for t in inputs), spans)
    assert (attend(*inputs, spans).float() - expected).abs().max() < 0.02


def test_dropout_keeps_the_mean_and_the_spans() -> None:
    """What is dropped differs from call to call; on the average nothing changes, and no document
    hears of another.
    """
    spans = SPANS["documents"]
    q, k, v = (t.detach() for t in drawn(2))
    draws = torch.stack([attend(q, k, v, spans, dropout=0.3) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - attend(q, k, v, spans)).abs().mean() < 0.03
    v[0, :, 3] = 1e6  # a document of one token
    apart = torch.stack([attend(q, k, v, spans, dropout=0.3) for _ in range(3)])
    assert apart[:, 0, :, [0, 1, 2, *range(4, S)]].abs().max() < 1e3


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_mask_of_the_sequence_squared() -> None:
    s = 1024
    q, k, v = (torch.randn(1, 1, s, 8, requires_grad=True) for _ in range(3))
    for spans in (document_spans([0, 100, s], s), [Span(None, range(512, s), range(0, s)), Span(None, range(512), range(512))]):
        with _Largest() as largest:
            attend(q, k, v, spans).sum().backward()
        assert 0 < largest.elements <= s * 8
