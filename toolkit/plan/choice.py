"""Which of several plans to take, when their estimates differ by less than estimates of one machine's plans are off."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from toolkit.cost.spreads import COMPARISON
from toolkit.plan.search import Objective, Plan, key

_PLACES = {"none": 0, "cpu": 1, "nvme": 2}
_RECOMPUTES = {"none": 0, "selective": 1, "full": 2}


def close_call(one: Plan, other: Plan, objective: Objective) -> bool:
    """Whether the model error of a comparison is larger than the difference between two plans' objectives."""
    mine, yours = (key(objective, step_s=plan.expected_s, gpus=plan.gpus) for plan in (one, other))
    if objective == "fewest-gpus" and mine[0] != yours[0]:
        return False
    index = 1 if objective == "fewest-gpus" else 0
    return abs(log(mine[index] / yours[index])) < COMPARISON


def prefer_simple(plans: Sequence[Plan], objective: Objective) -> list[Plan]:
    """The plans, best expected first, with the simplest of those as good as the best one put before it."""
    if not plans:
        return []
    near = [plan for plan in plans if close_call(plan, plans[0], objective)]
    first = min(near, key=lambda plan: (_complexity(plan), near.index(plan)))
    return [first, *(plan for plan in plans if plan is not first)]


def _complexity(plan: Plan) -> tuple[int, ...]:
    """What a plan asks of its user, the most troublesome first: offload, recomputation, context and pipeline parallelism, interleaving."""
    w = plan.workload
    return (
        _PLACES[w.offload_param] + _PLACES[w.offload_optimizer],
        _RECOMPUTES.get(w.recompute, 1),
        int(w.cp > 1),
        int(w.pp > 1) + int(w.vpp > 1),
        int(w.tp > 1),
        int(w.zero > 1),
    )
