"""Weights that ZeRO-3 makes whole: which of them at once, from what DeepSpeed foresees."""

from __future__ import annotations

from functools import lru_cache

from toolkit.cost.rank_weights import RankWeight, edge_weights, layer_weights
from toolkit.cost.workload import Workload
from toolkit.parallel.order import order

MAX_LIVE = 1e9  # DeepSpeed's default stage3_max_live_parameters


@lru_cache(maxsize=256)
def gathered(w: Workload, stage: int) -> float:
    """Bytes of weights that ZeRO-3 holds whole at the end of a forward, and the gradient of the largest one.

    Where every forward is followed by its backward, DeepSpeed sees that weights are needed again soon and keeps up to
    stage3_max_live_parameters of them: without a pipeline, on its last stage, and where a stage goes on long enough with one forward and
    one backward of the same chunk (see foreseen). Elsewhere each is freed after its use.
    """
    if not gathers(w):
        return 0.0
    largest = largest_cut(w, stage)
    if w.vpp == 1 and stage == w.pp - 1:
        return w.width * (min(MAX_LIVE, _cut_weights(w, stage, 0)) + largest)
    kept = [_cut_weights(w, stage, f) for f, back in _followed(stage, w.pp, w.vpp, w.microbatches) if back == f]
    # two layers' uses must not be further apart than stage3_max_reuse_distance, which is as large
    near = max((n for n in kept if 2 * n <= MAX_LIVE), default=0)
    return w.width * max(2.0 * largest, near + largest)


def freed_behind(w: Workload, stage: int, chunk: int, layer: int) -> float:
    """Bytes of gathered() that are not there when a chunk's backward is at a layer: weights behind it, and a larger one's gradient."""
    if not gathers(w) or gathered(w, stage) <= 2.0 * w.width * largest_cut(w, stage):
        return 0.0
    before, after = edge_weights(w, stage)
    inside = layer < w.layers_in(stage, chunk)
    ahead = _cut(w, layer_weights(w)) * (layer + inside)
    ahead += (_cut(w, before) if chunk == 0 else 0) + (0 if inside else _cut(w, after))
    gradient = max(x.count for x in (layer_weights(w) if inside else after))
    wait = min(MAX_LIVE, ahead) + gradient
    return max(0.0, gathered(w, stage) - w.width * wait)


def prefetched(w: Workload, stage: int) -> dict[int, float]:
    """Bytes of weights beyond gathered() that ZeRO-3 holds early in a forward whose modules it foresees, by model chunk.

    Each module's fetch begins at least one more gather, so that soon all weights of the chunk are there, or
    stage3_max_live_parameters and the one that went beyond (partitioned_param_coordinator.py, fetch_sub_module).
    """
    if not gathers(w):
        return {}
    there, largest = gathered(w, stage), largest_cut(w, stage)
    live = {f: w.width * min(MAX_LIVE + largest, _cut_weights(w, stage, f)) for f, _ in _followed(stage, w.pp, w.vpp, w.microbatches)}
    return {f: nbytes - there for f, nbytes in live.items() if nbytes > there}


def foreseen(w: Workload, stage: int) -> list[tuple[int, int]]:
    """Forwards whose order of modules DeepSpeed knows when they begin: their chunk, and that of the backward it expects next (-1: none).

    It writes down what runs from one forward to the next. What it has written it foresees from then on, until something else runs: that
    passage is lost, and the next one is written (partitioned_param_coordinator.py, trace_prologue and reset_step).
    """
    return _foreseen(stage, w.pp, w.vpp, w.microbatches)


@lru_cache(maxsize=16)
def _foreseen(stage: int, pp: int, vpp: int, microbatches: int) -> list[tuple[int, int]]:
    passages: list[list[tuple[str, int]]] = []
    for work in order(stage=stage, pp=pp, vpp=vpp, microbatches=microbatches) * 2:  # the second step knows the first
        if work.kind == "forward":
            passages.append([])
        passages[-1].append((work.kind, work.chunk))
    written: list[tuple[str, int]] | None = None
    known, found = False, []
    for i, passage in enumerate(passages):
        if not known and written is not None:
            known = True
        elif not known:
            written = passage  # this one is being written
            continue
        assert written is not None
        if passage[0] == written[0] and i >= len(passages) // 2:
            found.append((passage[0][1], next((chunk for kind, chunk in written[1:] if kind == "backward"), -1)))
        if passage != written[: len(passage)]:
            known, written = False, None
    return found


@lru_cache(maxsize=1024)
def _followed(stage: int, pp: int, vpp: int, microbatches: int) -> tuple[tuple[int, int], ...]:
    """Each pair of foreseen() once, in their order."""
    return tuple(dict.fromkeys(_foreseen(stage, pp, vpp, microbatches)))


def gathers(w: Workload) -> bool:
    """Whether ZeRO-3's weights have to be made whole: they are cut, or lie in host memory."""
    return w.zero == 3 and (w.shards > 1 or w.offload_param != "none")


def _cut_weights(w: Workload, stage: int, chunk: int) -> int:
    """Elements of the weights of a chunk that ZeRO-3 does not keep whole anyway."""
    before, after = edge_weights(w, stage)
    ends = (_cut(w, before) if chunk == 0 else 0) + (_cut(w, after) if chunk == w.vpp - 1 else 0)
    return _cut(w, layer_weights(w)) * w.layers_in(stage, chunk) + ends


def _cut(w: Workload, weights: list[RankWeight]) -> int:
    """Elements of those of some weights that ZeRO-3 does not keep whole anyway."""
    persist = w.persist
    return sum(x.count for x in weights if x.count > persist)


def largest_cut(w: Workload, stage: int) -> int:
    """Elements of the largest weight of a stage that ZeRO-3 does not keep whole anyway."""
    before, after = edge_weights(w, stage)
    persist = w.persist
    return max((x.count for side in (layer_weights(w), before, after) for x in side if x.count > persist), default=0)
