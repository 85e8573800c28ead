"""What a candidate takes at least, in seconds and bytes, much quicker than its estimate: what a search rules candidates out by.

Candidates share most of what they take. A layer's seconds depend on the degrees within a stage and on the micro-batch, states on the
degrees and the sharding, kept activations on all but the sharding. Each is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

from toolkit.cost.layer import embedding_passes, head_passes, layer_passes
from toolkit.cost.memory import kept_at_least, states_at_least
from toolkit.cost.step import launch_seconds, pipeline_sends, straggling
from toolkit.cost.workload import Workload
from toolkit.parallel.layout import split_layers
from toolkit.plan.space import Sharding, Space, Structure


class _Passes(NamedTuple):
    """Seconds of one micro-batch: through a layer, the output head and the embedding, and of the host that launches a layer."""

    layer: float
    head: float
    embedding: float
    launch: float

    def least(self, other: _Passes) -> _Passes:
        return _Passes(*map(min, self, other))


_NEVER = _Passes(inf, inf, inf, inf)


class Bounds:
    """Lower bounds of the candidates of a space.

    Of time: what compute, tensor and context parallelism, the pipeline's bubble and its sends take, with the ZeRO stage that computes
    fastest; whatever else a step holds only adds to it. There is none for a measured CPU, whose few layouts are all timed.
    """

    def __init__(self, space: Space, *, scale: float) -> None:
        self._space, self._hardware, self._scale = space, space.hardware, scale
        self._timed = space.hardware.cpu is None
        self._batch = space.case.batch
        self._passes: dict[Any, _Passes] = {}
        self._of_ends: dict[Any, tuple[float, float]] = {}
        self._fastest: dict[Any, tuple[_Passes, _Passes]] = {}
        self._slower: dict[int, float] = {}
        self._states: dict[Any, float] = {}
        self._kept: dict[Any, float] = {}

    def copies_s(self, cut: Structure, dp: int, micros: Sequence[int]) -> float:
        """Of a step with so many copies, whichever the micro-batch and the recomputation."""
        if not self._timed:
            return 0.0
        name = cut.tp, cut.cp, cut.sp, dp
        if name not in self._fastest:
            whole = a_sequence = _NEVER
            for micro in micros:
                passes = self._pass(cut, micro, self._space.recomputes[0])
                whole = whole.least(passes)
                a_sequence = a_sequence.least(_Passes(*(seconds / micro for seconds in passes)))
            self._fastest[name] = whole, a_sequence
        whole, a_sequence = self._fastest[name]
        slowest, _ = _stages(self._space, cut, a_sequence)
        _, others = _stages(self._space, cut, whole)
        return self._with_stragglers(cut, dp, self._batch / dp * slowest + others / cut.vpp)

    def steps_s(self, cut: Structure, dp: int, micro: int) -> list[float]:
        """Of a step with each mode of recomputation."""
        if not self._timed:
            return [0.0] * len(self._space.recomputes)
        space, steps = self._space, []
        microbatches = max(1, self._batch // (micro * dp))
        sends = 0.0
        if cut.pp > 1:
            sends = pipeline_sends(space.workload(cut, dp, micro, "none", (1, "none", "none")), self._hardware)
        for recompute in space.recomputes:
            slowest, others = _stages(space, cut, self._pass(cut, micro, recompute))
            steps.append(self._with_stragglers(cut, dp, microbatches * slowest + others / cut.vpp + sends))
        return steps

    def nbytes(self, cut: Structure, dp: int, micro: int, recompute: str, sharding: Sharding) -> float:
        """Of the first stage's ranks: states and kept activations; 0 where none is known."""
        w = None
        state = self._states.get((cut, dp, sharding))
        if state is None:
            w = self._space.workload(cut, dp, micro, recompute, sharding)
            state = self._states[cut, dp, sharding] = states_at_least(w, self._hardware)
        if state == 0.0:
            return 0.0
        kept = self._kept.get((cut, dp, micro, recompute))
        if kept is None:
            w = w or self._space.workload(cut, dp, micro, recompute, sharding)
            kept = self._kept[cut, dp, micro, recompute] = kept_at_least(w, self._hardware)
        return state + kept

    def _with_stragglers(self, cut: Structure, dp: int, seconds: float) -> float:
        gpus = cut.ranks * dp
        if gpus not in self._slower:
            self._slower[gpus] = 1 + straggling(gpus, self._hardware)
        return seconds * self._slower[gpus]

    def _pass(self, cut: Structure, micro: int, recompute: str) -> _Passes:
        """By the ZeRO stage that takes least: from stage 2 on, gradients are not added inside the multiplies.

        A step of one micro-batch has none to add to and is then no faster than one of stage 2.
        """
        name = cut.tp, cut.cp, cut.sp, micro, recompute
        found = self._passes.get(name)
        if found is None:
            found = _NEVER
            for stage in (1, 2):
                w = self._space.workload(cut, 1, micro, recompute, (stage, "none", "none"))
                forward, backward, again = layer_passes(w, self._hardware, scale=self._scale)
                head, embedding = self._ends(w)
                layer = forward.total + backward.total + again.total
                found = found.least(_Passes(layer, head, embedding, launch_seconds(w, self._hardware)))
            self._passes[name] = found
        return found

    def _ends(self, w: Workload) -> tuple[float, float]:
        """Seconds of the output head and of the embedding, forward and backward."""
        name = w.tp, w.cp, w.sp, w.micro, w.zero
        if name not in self._of_ends:
            head, embedding = head_passes(w, self._hardware, scale=self._scale), embedding_passes(w, self._hardware)
            self._of_ends[name] = head[0].total + head[1].total, embedding[0].total + embedding[1].total
        return self._of_ends[name]


def _stages(space: Space, cut: Structure, passes: _Passes) -> tuple[float, float]:
    """Seconds of the slowest pipeline stage for one micro-batch, and of all others together."""
    layers, (layer, head, embedding, launch) = space.base.model.layers, passes
    if cut.pp == 1:
        return max(layers * launch, layers * layer + head + embedding), 0.0
    each, saved_at_ends = split_layers(layers, cut.pp * cut.vpp) or (layers // (cut.pp * cut.vpp), 2)
    between = each * cut.vpp
    first, last = between - (saved_at_ends > 1), between - (saved_at_ends > 0)
    at_first, at_last, middle = first * layer + embedding, last * layer + head, between * (launch if launch > layer else layer)
    if launch > 0.0:  # a stage is no faster than the host launches it
        at_first, at_last = max(first * launch, at_first), max(last * launch, at_last)
    slowest = at_first if at_first > at_last else at_last
    if cut.pp > 2 and middle > slowest:
        slowest = middle
    return slowest, at_first + at_last + (cut.pp - 2) * middle - slowest
