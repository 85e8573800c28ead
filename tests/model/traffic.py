"""What context-parallel ranks send each other in one step, counted at PyTorch's own calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist

from toolkit.model import context


class Counted:
    """torch.distributed as toolkit.model.context sees it; counts messages, and the elements that
    come from other ranks.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.elements = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def _count(self, name: str, elements: int) -> None:
        self.calls[name] += 1
        self.elements += elements

    def all_gather_into_tensor(self, out: Any, part: Any, group: Any) -> None:
        self._count("all-gather", out.numel() - part.numel())
        dist.all_gather_into_tensor(out, part, group=group)

    def reduce_scatter_tensor(self, out: Any, parts: Any, group: Any) -> None:
        self._count("reduce-scatter", parts.numel() - out.numel())
        dist.reduce_scatter_tensor(out, parts, group=group)

    def all_to_all_single(self, out: Any, parts: Any, group: Any) -> None:
        self._count("all-to-all", out.numel() - out.numel() // group.size())
        dist.all_to_all_single(out, parts, group=group)

    def batch_isend_irecv(self, operations: list[Any]) -> Any:
        for operation in operations:
            if operation.op is dist.irecv:
                self._count("round", operation.tensor.numel())
        return dist.batch_isend_irecv(operations)


def step(raw: dict[str, Any]) -> dict[str, Any]:
    """Train a step on this rank: calls by kind, and elements received."""
    from tests.rank import Rank

    rank = Rank(raw)
    counted = Counted()
    context.dist = counted  # type: ignore[assignment]
    try:
        rank.step(0)
    finally:
        context.dist = dist
    return {"calls": dict(counted.calls), "elements": counted.elements}
