"""The weights that one rank of our own engine holds, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from toolkit.arch.spec import Group, ModelSpec, WeightSpec
from toolkit.cost.workload import Workload


@dataclass(frozen=True)
class RankWeight:
    """One weight of a rank: its elements, and the index of its optimizer group in the engine."""

    count: int
    group: int


def _on_rank(weight: WeightSpec, tp: int, group_of: tuple[tuple[Group, int], ...]) -> RankWeight:
    return RankWeight(weight.count_on(tp), dict(group_of)[weight.group])


@lru_cache(maxsize=1024)
def _layer_weights(model: ModelSpec, tp: int, group_of: tuple[tuple[Group, int], ...]) -> list[RankWeight]:
    return [_on_rank(weight, tp, group_of) for weight in model.layer]


def layer_weights(w: Workload) -> list[RankWeight]:
    """A layer's weights on one rank, in the order of megatron-core's modules."""
    return _layer_weights(w.model, w.tp, w.optimizer.indices)


def edge_weights(w: Workload, stage: int) -> tuple[list[RankWeight], list[RankWeight]]:
    """What a rank of a stage holds before its layers (embeddings) and after them (final norm, output layer)."""
    model, tp, group_of = w.model, w.tp, w.optimizer.indices
    first = [_on_rank(weight, tp, group_of) for weight in model.before] if stage == 0 else []
    last = [_on_rank(weight, tp, group_of) for weight in model.after] if stage == w.pp - 1 else []
    if model.tied and w.pp > 1:
        copy = RankWeight(model.before[0].count_on(tp), w.optimizer.tied_index)
        first[:1] = [copy] if stage == 0 else []
        last += [copy] if stage == w.pp - 1 else []
    return first, last
