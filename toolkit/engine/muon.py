"""Muon on cut matrices: every update is that of the whole matrix, however TP and ZeRO-1 cut it.

A matrix's gradient joins its momentum, and the sum is replaced by the nearest orthogonal matrix
(https://kellerjordan.github.io/posts/muon/), with the same operations in bf16 as torch.optim.Muon.
Momentum is added element by element, so each rank does that for its part. Orthogonalising needs the
whole matrix: data-parallel ranks first exchange matrices that their partitions cut, then
tensor-parallel ranks gather theirs, and each takes its own part of the result.

Queries, keys and values, and a gated MLP's two halves, are matrices of their own, as in the formats
that keep them apart (WeightSpec.parts), though one weight holds them here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.arch.spec import ModelSpec, WeightSpec
from toolkit.model.init import cut_out, put_together

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's quintic iteration
ITERATIONS = 5
_EPS = 1e-7


@dataclass(frozen=True)
class WeightPart:
    """Where this rank's part of a weight lies in a flat tensor: elements first … first + numel.

    first counts from the start of this data-parallel rank's partition, so it is negative for a weight
    that begins in an earlier rank's. shape: of the tensor-parallel part, [rows, columns] of a matrix.
    """

    weight: WeightSpec
    shape: tuple[int, ...]
    first: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def within(self, size: int) -> tuple[int, int]:
        """First and last + 1 element of a partition of `size` elements that are this weight's;
        equal where none is.
        """
        low = min(max(0, self.first), size)
        return low, max(low, min(size, self.first + self.numel))

    def is_cut(self, size: int) -> bool:
        """Whether several data-parallel ranks hold a piece of it."""
        return self.first // size != (self.first + self.numel - 1) // size


@dataclass(frozen=True)
class Ranks:
    """Who shares matrices: tensor-parallel ranks, and those over which flat tensors are cut (under
    ZeRO-0 only this one).
    """

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup


class Muon(torch.optim.Optimizer):
    """Updates flat tensors full of matrices. Each group holds one, and in "parts" the WeightParts
    that lie in it, alike on all ranks
    but for where they start. adjust_lr: as the argument of torch.optim.Muon.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, model: ModelSpec, ranks: Ranks, lr: float, momentum: float, nesterov: bool, adjust_lr: str
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov})
        self.model, self.ranks, self.adjust_lr = model, ranks, adjust_lr

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update each group's tensor by its gradient, which is used up."""
        for group in self.param_groups:
            (flat,) = group["params"]
            if "momentum_buffer" not in self.state[flat]:
                self.state[flat]["momentum_buffer"] = torch.zeros_like(flat)
            momentum: Tensor = self.state[flat]["momentum_buffer"]
            momentum.lerp_(flat.grad, 1 - group["momentum"])
            direction = flat.grad.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
            flat.mul_(1 - group["lr"] * group["weight_decay"])
            for part, whole in self._whole(direction, group["parts"]):
                update = self._update(part.weight, whole)
                tp, rank = dist.get_world_size(self.ranks.tensor), dist.get_rank(self.ranks.tensor)
                mine = cut_out(part.weight.cut, update, tp=tp, rank=rank).reshape(-1)
                low, high = part.within(flat.numel())
                flat[low:high].sub_(mine[low - part.first : high - part.first], alpha=group["lr"])

    def _update(self, weight: WeightSpec, whole: Tensor) -> Tensor:
        """A whole weight's update at lr 1, in fp32."""
        matrices = separate(weight, whole, self.model)
        return joined(weight, [orthogonal(m).float() * scale(m.shape, self.adjust_lr) for m in matrices], self.model)

    def _whole(self, flat: Tensor, parts: Sequence[WeightPart]) -> Iterator[tuple[WeightPart, Tensor]]:
        """Every weight of which this rank has a piece, whole and in bf16; in the same order on all
        tensor-parallel ranks.
        """
        size = flat.numel()
        cut = exchange(flat, [part for part in parts if part.is_cut(size)], self.ranks.data)
        for part in parts:
            low, high = part.within(size)
            if low == high:
                continue
            mine = cut[part.weight.name] if part.weight.name in cut else flat[low:high].bfloat16()
            yield part, gather(part.weight, mine.view(part.shape), self.ranks.tensor)


def exchange(flat: Tensor, parts: Sequence[WeightPart], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Weights that partitions cut, put together from all ranks' pieces, in bf16; by name.

    One message. Bytes are summed where all ranks but one have zeros, which every backend can do
    without changing a bit.
    """
    if not parts:
        return {}
    buffer = torch.zeros(sum(part.numel for part in parts), dtype=torch.bfloat16, device=flat.device)
    pieces = dict(zip([part.weight.name for part in parts], buffer.split([part.numel for part in parts]), strict=True))
    for part in parts:
        low, high = part.within(flat.numel())
        pieces[part.weight.name][low - part.first : high - part.first] = flat[low:high]
    dist.all_reduce(buffer.view(torch.uint8), group=group)
    return pieces


def gather(weight: WeightSpec, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A whole weight from tensor-parallel ranks' parts, in their dtype."""
    tp = dist.get_world_size(group)
    if tp == 1 or weight.cut.dim is None:
        return mine
    parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(tp)]
    dist.all_gather([p.view(torch.uint8) for p in parts], mine.contiguous().view(torch.uint8), group=group)
    return put_together(weight.cut, parts)


def separate(weight: WeightSpec, whole: Tensor, model: ModelSpec) -> list[Tensor]:
    """The matrices that one weight holds: queries, keys and values; gate and up; most hold one."""
    if weight.join == "grouped":
        groups = whole.view(model.groups, -1, whole.shape[1])  # [g, (heads of a group + key + value) d, h]
        rows = [model.query // model.groups, model.head_dim, model.head_dim]
        return [m.reshape(-1, whole.shape[1]) for m in groups.split(rows, 1)]
    return list(whole.chunk(len(weight.parts))) if weight.join == "stacked" else [whole]


def joined(weight: WeightSpec, matrices: Sequence[Tensor], model: ModelSpec) -> Tensor:
    """The inverse of separate()."""
    if weight.join == "grouped":
        return torch.cat([m.view(model.groups, -1, m.shape[1]) for m in matrices], 1).view(weight.shape)
    return torch.cat(list(matrices)) if len(matrices) > 1 else matrices[0]


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows (or columns, if there are fewer), in bf16;
    singular values end between 0.5 and 1.5.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_EPS)  # the spectral norm is then at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def scale(shape: Sequence[int], adjust_lr: str) -> float:
    """What lr is multiplied with for a matrix: match_rms_adamw (arXiv 2502.16982) or original
    (Keller Jordan).
    """
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
