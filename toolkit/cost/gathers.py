"""Weights that ZeRO-3 makes whole: which of them at once, from what DeepSpeed foresees."""

from __future__ import annotations

from functools import lru_cache

from toolkit.cost.rank_weights import edge_weights, layer_weights
from toolkit.cost.workload import Workload
from toolkit.parallel.order import order

MAX_LIVE = 1e9  # DeepSpeed's default stage3_max_live_parameters


@lru_cache(maxsize=64)
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
    kept = [_cut_weights(w, stage, f) for f, back in foreseen(w, stage) if back == f]
    # two layers' uses must not be further apart than stage3_max_reuse_distance, which is as large
    near = max((n for n in kept if 2 * n <= MAX_LIVE), default=0)
    return w.width * max(2.0 * largest, near + largest)


def freed_behind(w: Workload, stage: int, chunk: int, layer: int) -> float:
    """Bytes of gathered() that are not there when a chunk's backward is at a layer: weights behind it, and a larger one's gradient."""
    if not gathers(w) or gathered(w, stage) <= 2.0 * w.width * largest_cut(w, stage):
        return 0.0
    before, after = edge_weights(w, stage)
    inside = layer < w.layers_in(stage, chunk)
    ahead = layer_weights(w) * (layer + inside) + (before if chunk == 0 else []) + ([] if inside else after)
    gradient = max(x.count for x in (layer_weights(w) if inside else after))
    wait = min(MAX_LIVE, sum(x.count for x in ahead if x.count > w.persist)) + gradient
    return max(0.0, gathered(w, stage) - w.width * wait)


def prefetched(w: Workload, stage: int) -> dict[int, float]:
    """Bytes of weights beyond gathered() that ZeRO-3 holds early in a forward whose modules it foresees, by model chunk.

    Each module's fetch begins at least one more gather, so that soon all weights of the chunk are there, or
    stage3_max_live_parameters and the one that went beyond (partitioned_param_coordinator.py, fetch_sub_module).
    """
    if not gathers(w):
        return {}
    there, largest = gathered(w, stage), largest_cut(w, stage)
    live = {f: w.width * min(MAX_LIVE + largest, _cut_weights(w, stage, f)) for f, _ in foreseen(w, stage)}
    return {f: nbytes - there for f, nbytes in live.items() if nbytes > there}


@lru_cache(maxsize=64)
def foreseen(w: Workload, stage: int) -> list[tuple[int, int]]:
    """Forwards whose order of modules DeepSpeed knows when they begin: their chunk, and that of the backward it expects next (-1: none).

    It writes down what runs from one forward to the next. What it has written it foresees from then on, until something else runs: that
    passage is lost, and the next one is written (partitioned_param_coordinator.py, trace_prologue and reset_step).
    """
    passages: list[list[tuple[str, int]]] = []
    for work in list(order(stage=stage, pp=w.pp, vpp=w.vpp, microbatches=w.microbatches)) * 2:  # the second step knows the first
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


def gathers(w: Workload) -> bool:
    """Whether ZeRO-3's weights have to be made whole: they are cut, or lie in host memory."""
    return w.zero == 3 and (w.shards > 1 or w.offload_param != "none")


def _cut_weights(w: Workload, stage: int, chunk: int) -> int:
    """Elements of the weights of a chunk that ZeRO-3 does not keep whole anyway."""
    before, after = edge_weights(w, stage)
    ends = (before if chunk == 0 else []) + (after if chunk == w.vpp - 1 else [])
    return sum(x.count for x in layer_weights(w) * w.layers_in(stage, chunk) + ends if x.count > w.persist)


def largest_cut(w: Workload, stage: int) -> int:
    """Elements of the largest weight of a stage that ZeRO-3 does not keep whole anyway."""
    every = layer_weights(w) + [x for side in edge_weights(w, stage) for x in side]
    return max((x.count for x in every if x.count > w.persist), default=0)
