"""Best-first search over a space of layouts. It is exact: what is never looked at has a lower bound that is already too slow."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from toolkit.cost.memory import GIB, MemoryEstimate, StageMemory, estimate, states
from toolkit.cost.spread import RISK, Spread, memory_spread
from toolkit.cost.step import TimeEstimate, step_time
from toolkit.cost.workload import Workload
from toolkit.hardware import calibration
from toolkit.hardware.catalogue import Hardware
from toolkit.plan.bounds import Bounds
from toolkit.plan.space import Sharding, Space, Structure, sharding_of, structure_of

Objective = Literal["tokens/s", "cost", "fewest-gpus"]
Key = tuple[float, float]
Kind = tuple[int, int, int, int]

PER_KIND = 2  # plans listed of the same tp, pp, cp and dp, so that the list shows different ones


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One candidate with what the estimator says of it."""

    workload: Workload
    memory: MemoryEstimate
    time: TimeEstimate

    @property
    def gpus(self) -> int:
        return self.workload.world

    @property
    def kind(self) -> Kind:
        w = self.workload
        return w.tp, w.pp, w.cp, w.dp

    @property
    def tokens_per_s(self) -> float:
        return self.time.tokens / self.time.step

    @property
    def worst(self) -> StageMemory:
        return self.memory.worst

    @property
    def chance(self) -> float:
        """Probability that it fits."""
        return self.memory.chance

    @property
    def expected_s(self) -> float:
        """Seconds a step over the probability to fit: a run that doesn't fit makes no step."""
        return self.time.step / max(1e-6, self.chance)


@dataclass(kw_only=True)
class Limits:
    """What a plan must keep to; null: anything. price: of one GPU hour; steps: of the whole run, for max_cost.

    risk: probability of running out of memory that is taken; headroom: bytes to leave free instead, whatever the risk.
    """

    risk: float = RISK
    headroom: float | None = None
    max_step_s: float | None = None
    max_cost: float | None = None
    price: float | None = None
    steps: int = 1

    def cost(self, step_s: float, gpus: int) -> float:
        """Price of the whole run; in GPU hours where no price is given."""
        return step_s * self.steps * gpus / 3600 * (1.0 if self.price is None else self.price)

    def room(self, memory: MemoryEstimate) -> float:
        """Bytes that a plan must leave free: the headroom asked for, else what the interval of its estimate asks for."""
        return memory.headroom(self.risk) if self.headroom is None else self.headroom

    def fit(self, memory: MemoryEstimate) -> bool:
        """Whether every rank leaves that much free, and the node's RAM holds what is offloaded to it."""
        return memory.worst.device + self.room(memory) <= memory.capacity and memory.host_fits

    def fit_bytes(self, nbytes: float, spread: Spread, capacity: float) -> bool:
        """Whether so many bytes of a device leave that much free."""
        return nbytes * max(1.0, spread.factor(self.risk)) <= capacity if self.headroom is None else nbytes + self.headroom <= capacity

    def allow(self, step_s: float, gpus: int) -> bool:
        """Whether a step time meets the targets."""
        return (self.max_step_s is None or step_s <= self.max_step_s) and (
            self.max_cost is None or self.cost(step_s, gpus) <= self.max_cost
        )


@dataclass(kw_only=True)
class SearchResult:
    """Plans, best first, and how much was looked at: candidates of the space, those whose memory and whose time were computed."""

    plans: list[Plan] = field(default_factory=list)
    candidates: int = 0
    sized: int = 0
    timed: int = 0
    too_large: int = 0


def key(objective: Objective, *, step_s: float, gpus: int) -> Key:
    """What the search minimises: the step (the batch is the same for all), GPU seconds, or GPUs and then the step.

    Of a plan the step is the expected one; of a bound it is a lower bound of the step, and so of the expected one.
    """
    if objective == "cost":
        return step_s * gpus, step_s
    return (float(gpus), step_s) if objective == "fewest-gpus" else (step_s, float(gpus))


def plan_of(w: Workload, space: Space, limits: Limits, *, scale: float | None = None) -> Plan | None:
    """A candidate as a plan; None where it is not legal in the space, does not fit, or does not meet the targets."""
    cut, sharding = structure_of(w), sharding_of(w)
    if w.world > space.max_gpus or not space.legal(cut, w.dp, w.micro, w.recompute, sharding):
        return None
    here = space.workload(cut, w.dp, w.micro, w.recompute, sharding)
    plan = Plan(workload=here, memory=estimate(here, space.hardware), time=step_time(here, space.hardware, scale=scale))
    return plan if limits.fit(plan.memory) and limits.allow(plan.time.step, plan.gpus) else None


def search(
    space: Space,
    *,
    objective: Objective = "tokens/s",
    limits: Limits | None = None,
    top: int = 10,
    scale: float | None = None,
    known: Iterable[Workload] = (),
) -> SearchResult:
    """The best plans of a space that fit; at most PER_KIND with the same tp, pp, cp and dp.

    Nodes of growing detail wait in a heap by a lower bound of their key: a structure with its data-parallel degree, then with
    micro-batch and recompute (see toolkit.plan.bounds). The search ends when no bound is below the last plan it would list.

    known: with top=1 candidates that are probably good: nothing slower than the best of them that fits is looked at.
    """
    return _Search(space, objective, limits or Limits(), top, scale, known).run()


class _Search:
    def __init__(
        self, space: Space, objective: Objective, limits: Limits, top: int, scale: float | None, known: Iterable[Workload]
    ) -> None:
        self.space, self.objective, self.limits, self.top = space, objective, limits, top
        self.hardware: Hardware = space.hardware
        self.scale = calibration.scale_for(self.hardware.gpu, space.base.precision) if scale is None else scale
        self.capacity = self.hardware.gpu.memory_gib * GIB
        self.result = SearchResult()
        self.best: list[tuple[Key, int, Plan]] = []
        self.heap: list[tuple[Key, int, Callable[[], None]]] = []
        self.counter = 0
        self.bounds = Bounds(space, scale=self.scale)
        self.sizes: dict[Any, tuple[int, float]] = {}
        self.spreads: dict[Sharding, Spread] = {}
        self.reached: Key = inf, inf
        for workload in known if top == 1 else ():
            self._reach(workload)

    def run(self) -> SearchResult:
        recomputes = self.space.recomputes
        batches: dict[int, list[tuple[int, list[int]]]] = {}  # by the GPUs of one copy, of which its number and micro-batches follow
        for cut, shardings in self.space.structures():
            if cut.ranks not in batches:
                batches[cut.ranks] = [(dp, self.space.micros(dp)) for dp in self.space.copies(cut)]
            for dp, micros in batches[cut.ranks]:
                self.result.candidates += len(micros) * len(recomputes) * len(shardings)
                if micros:
                    self._add_copies(cut, dp, micros, shardings)
        while self.heap and self.heap[0][0] < self._threshold():
            heapq.heappop(self.heap)[2]()
        self.result.plans = [plan for _, _, plan in self.best[: self.top]]
        return self.result

    def _reach(self, w: Workload) -> None:
        """Lower the key that is certainly reached to a trifle above that of a candidate; nothing where it is none, or does not fit."""
        if not self.space.holds(w):
            return
        bound = self.bounds.steps_s(structure_of(w), w.dp, w.micro)[self.space.recomputes.index(w.recompute)]
        if key(self.objective, step_s=bound, gpus=w.world) >= self.reached:
            return
        plan = plan_of(w, self.space, self.limits, scale=self.scale)
        if plan is not None:
            first, second = key(self.objective, step_s=plan.expected_s, gpus=plan.gpus)
            self.reached = min(self.reached, (first * (1 + 1e-9), second * (1 + 1e-9)))

    def _threshold(self, kind: Kind | None = None) -> Key:
        """The key that a candidate must stay below to be listed."""
        worst = self.best[self.top - 1][0] if len(self.best) >= self.top else self.reached
        same = [k for k, _, plan in self.best if plan.kind == kind]
        return min(worst, same[-1]) if len(same) >= PER_KIND else worst

    def _push(self, bound_s: float, gpus: int, work: Callable[[], None]) -> None:
        bound = key(self.objective, step_s=bound_s, gpus=gpus)
        if bound < self.reached and self.limits.allow(bound_s, gpus):
            self.counter += 1
            heapq.heappush(self.heap, (bound, self.counter, work))

    def _add_copies(self, cut: Structure, dp: int, micros: list[int], shardings: list[Sharding]) -> None:
        """Queue a structure with dp copies, by the bound of its best micro-batch and least recompute."""
        self._push(self.bounds.copies_s(cut, dp, micros), cut.ranks * dp, lambda: self._expand(cut, dp, micros, shardings))

    def _expand(self, cut: Structure, dp: int, micros: list[int], shardings: list[Sharding]) -> None:
        fitting = [s for s in shardings if self._states_fit(cut, dp, s)]
        if not fitting:
            self.result.too_large += 1
            return
        for micro in micros:
            if not self.space.batch_legal(cut, dp, micro):
                continue
            for recompute, bound in zip(self.space.recomputes, self.bounds.steps_s(cut, dp, micro), strict=True):
                self._push(bound, cut.ranks * dp, lambda m=micro, r=recompute: self._evaluate(cut, dp, m, r, fitting))  # type: ignore[misc]

    def _evaluate(self, cut: Structure, dp: int, micro: int, recompute: str, shardings: list[Sharding]) -> None:
        """Compute time and memory of a node's shardings. Offload never makes a step faster: it is tried only where less does not fit.

        What takes least to compute comes first: a bound of the memory, then the time, by which most are ruled out, then the memory.
        """
        space, gpus, kind = self.space, cut.ranks * dp, (cut.tp, cut.pp, cut.cp, dp)
        legal = space.legal_shardings(cut, dp, micro, recompute, shardings)
        for sharding in legal:
            if not self._may_fit(cut, dp, micro, recompute, sharding):
                continue
            w = space.workload(cut, dp, micro, recompute, sharding)
            time = step_time(w, self.hardware, scale=self.scale)
            self.result.timed += 1
            threshold = self._threshold(kind)
            if not self.limits.allow(time.step, gpus) or key(self.objective, step_s=time.step, gpus=gpus) >= threshold:
                continue
            less = [other for other in legal[: legal.index(sharding)] if _within(other, sharding)]
            if any(self._fits(cut, dp, micro, recompute, s) for s in less) or not self._fits(cut, dp, micro, recompute, sharding):
                continue
            plan = Plan(workload=w, memory=estimate(w, self.hardware), time=time)
            value = key(self.objective, step_s=plan.expected_s, gpus=gpus)
            if value < threshold:
                self._insert(value, plan)

    def _insert(self, value: Key, plan: Plan) -> None:
        if any(k == value and other.kind == plan.kind and other.worst.device <= plan.worst.device for k, _, other in self.best):
            return  # another plan is as fast in no more memory, as with ZeRO-3 on one rank
        self.counter += 1
        insort(self.best, (value, self.counter, plan), key=lambda entry: entry[:2])
        same = [entry for entry in self.best if entry[2].kind == plan.kind]
        if len(same) > PER_KIND:
            self.best.remove(same[-1])
        del self.best[self.top :]

    def _states_fit(self, cut: Structure, dp: int, sharding: Sharding) -> bool:
        """Whether the first and last stage's parameters, gradients and optimizer states alone leave the headroom."""
        w = self.space.workload(cut, dp, 1, "full", sharding)
        state_bytes = max(sum(states(w, w.parameters_on(stage)).values()) for stage in (0, w.pp - 1))
        least = 0.99 * state_bytes  # the 1 %: the estimate counts weights one by one, this does not
        return self.limits.fit_bytes(least, self._spread(sharding), self.capacity)

    def _may_fit(self, cut: Structure, dp: int, micro: int, recompute: str, sharding: Sharding) -> bool:
        """Whether neither what is known of other micro-batches nor the bound of the memory rules a candidate out."""
        name = (cut, dp, recompute, sharding)
        low, high = self.sizes.get(name, (0, inf))
        if low < micro < high:
            spread = self._spread(sharding)
            if self.limits.fit_bytes(0.999 * self.bounds.nbytes(cut, dp, micro, recompute, sharding), spread, self.capacity):
                return True
            self.sizes[name] = low, micro
        return micro <= low

    def _fits(self, cut: Structure, dp: int, micro: int, recompute: str, sharding: Sharding) -> bool:
        """Whether a candidate fits; memory never falls with the micro-batch, so one that fits or not answers for smaller or larger ones."""
        if not self._may_fit(cut, dp, micro, recompute, sharding):
            return False
        name = (cut, dp, recompute, sharding)
        low, high = self.sizes.get(name, (0, inf))  # up to low they fit, from high on they do not
        if low < micro:
            self.result.sized += 1
            w = self.space.workload(cut, dp, micro, recompute, sharding)
            alone, fits = None, True
            if w.pp > 1:  # the first stage keeps most micro-batches in flight, so it often decides
                alone = estimate(w, self.hardware, only=0)
                fits = self.limits.fit(alone)
            if fits and self.limits.fit(estimate(w, self.hardware, known=alone.stages if alone else ())):
                low = micro
            else:
                high = micro
            self.sizes[name] = low, high
        return micro <= low

    def _spread(self, sharding: Sharding) -> Spread:
        """How far off the memory of a sharding may be, which the layout doesn't change."""
        if sharding not in self.spreads:
            zero, optimizer, param = sharding
            w = self.space.base.laid_out(zero=zero, offload_optimizer=optimizer, offload_param=param)
            self.spreads[sharding] = memory_spread(w)
        return self.spreads[sharding]


_FAR = {"none": 0, "cpu": 1, "nvme": 2}


def _within(less: Sharding, more: Sharding) -> bool:
    """Whether a sharding of the same ZeRO stage moves no state further away than another does."""
    return less[0] == more[0] and all(_FAR[a] <= _FAR[b] for a, b in zip(less[1:], more[1:], strict=True))
