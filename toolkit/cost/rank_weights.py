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
    optimizer = w.optimizer
    return _edge_weights(w.model, w.tp, optimizer.indices, optimizer.tied_index, stage == 0, stage == w.pp - 1)


@lru_cache(maxsize=1024)
def _edge_weights(
    model: ModelSpec, tp: int, group_of: tuple[tuple[Group, int], ...], tied_index: int, is_first: bool, is_last: bool
) -> tuple[list[RankWeight], list[RankWeight]]:
    first = [_on_rank(weight, tp, group_of) for weight in model.before] if is_first else []
    last = [_on_rank(weight, tp, group_of) for weight in model.after] if is_last else []
    if model.tied and not (is_first and is_last):  # two stages hold a copy of the embedding
        copy = RankWeight(model.before[0].count_on(tp), tied_index)
        first[:1] = [copy] if is_first else []
        last += [copy] if is_last else []
    return first, last
