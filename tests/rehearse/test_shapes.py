"""Remembered answers are those that PyTorch's own FakeTensorMode gives: shapes, strides, types,
devices, and which storages are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from toolkit.rehearse.shapes import ShapeMode

aten: Any = torch.ops.aten


def _layer(x: Tensor) -> list[Tensor]:
    """Views, in-place operators, several outputs, a list of views, a named tuple, a reduction, a scalar."""
    w = torch.empty(6, 4, dtype=torch.float32)
    normed, mean, deviation = aten.native_layer_norm(x, [4], None, None, 1e-5)
    y = (normed @ w.t()).view(2, 3, 6)
    first, second = y.chunk(2, dim=-1)
    y.mul_(2.0).add_(first.new_ones(()))
    largest, at = y.max(dim=-1)
    flat = torch.cat([first.reshape(-1), second.reshape(-1)])
    flat.narrow(0, 3, 5).copy_(flat.narrow(0, 8, 5))
    half = flat.to(torch.bfloat16)
    return [
        normed,
        mean,
        deviation,
        y,
        first,
        second,
        largest,
        at,
        flat,
        flat[2:],
        half,
        half.float().sum(),
        half.detach(),
        y.transpose(0, 1),
    ]


def _types(x: Tensor) -> list[Tensor]:
    """Arguments that are equal to Python and different to an operator."""
    ints = torch.zeros(4, dtype=torch.int64)
    return [ints.add(1), ints.add(1.0), ints.add(True), x.sum(0), x.sum(0, keepdim=True), torch.zeros(3), torch.zeros(3, dtype=torch.bool)]


def _learn(x: Tensor) -> list[Tensor]:
    """A backward and a step."""
    w = torch.nn.Parameter(torch.empty(4, 4))
    optimizer = torch.optim.AdamW([w], foreach=False)
    torch.nn.functional.gelu(x @ w).sum().backward()
    assert w.grad is not None
    optimizer.step()
    return [w, w.grad, *(s for s in optimizer.state[w].values() if isinstance(s, Tensor))]


def described(tensors: list[Tensor]) -> list[Any]:
    """What a tensor without data is, and the first of the list whose storage it has."""
    storages = [t.untyped_storage()._cdata for t in tensors]
    return [
        (type(t).__name__, t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t.untyped_storage().nbytes(), storages.index(s))
        for t, s in zip(tensors, storages, strict=True)
    ]


@pytest.mark.parametrize("program", [_layer, _types, _learn])
def test_answers_are_those_of_torch(program: Callable[[Tensor], list[Tensor]]) -> None:
    with FakeTensorMode():
        expected = [described(program(torch.empty(2, 3, 4))) for _ in range(2)]
    quick = ShapeMode()
    with quick:
        seen = [described(program(torch.empty(2, 3, 4))) for _ in range(2)]
    assert seen == expected
    assert seen[0] == seen[1] and quick._answers, "the second time is answered from memory"


def test_shapes_that_do_not_fit_are_refused_each_time() -> None:
    with ShapeMode():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                torch.empty(2, 3) @ torch.empty(4, 5)


def test_a_known_value_is_still_known() -> None:
    """torch.tensor(5) keeps its value, so that a program may branch on it."""
    with ShapeMode():
        for _ in range(2):
            five = torch.tensor(5)
            assert int(five) == 5 and isinstance(five, FakeTensor)
            assert int(five.add_(1)) == 6
