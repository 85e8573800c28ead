"""What lets the search skip candidates: bounds that never exceed the truth, and a known plan that changes no answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.questions import identity, question, smaller_memory
from toolkit.cost.memory import at_least, estimate
from toolkit.cost.workload import Workload


def _candidates(count: int) -> list[Workload]:
    space = question(batch=8, fixed={"cp": (1, 2)}).space()
    every = [
        space.workload(cut, dp, micro, recompute, sharding)
        for cut, shardings in space.structures()
        for dp in space.copies(cut)
        for micro in space.micros(dp)
        for recompute in space.recomputes
        for sharding in shardings
        if space.legal(cut, dp, micro, recompute, sharding)
    ]
    return every[:: max(1, len(every) // count)]


def test_the_quick_bound_of_memory_never_exceeds_the_estimate() -> None:
    hardware = question(batch=8).hardware
    bounds = []
    for w in _candidates(400):
        first = estimate(w, hardware).stages[0]
        bounds.append((at_least(w, hardware), first.allocated - first.parts["workspace"]))
    assert all(bound <= tensors * (1 + 1e-9) for bound, tensors in bounds)
    assert sum(bound > 0.5 * tensors for bound, tensors in bounds) > len(bounds) / 2, "a bound far below the truth rules nothing out"


def test_a_workload_laid_out_anew_is_another_one() -> None:
    w = _candidates(2)[0]
    assert hash(w) == hash(replace(w))  # kept with it from now on
    other = w.laid_out(micro=w.micro + 1)
    assert other == replace(w, micro=w.micro + 1) and hash(other) == hash(replace(w, micro=w.micro + 1)) != hash(w)


@pytest.mark.parametrize("gib", [79.0, 5.5])
def test_a_known_plan_changes_no_answer(gib: float) -> None:
    """Neither a good one nor one that does not fit, or is of another space."""
    asked = smaller_memory(question(batch=8), gib)
    (best,) = asked.ask(top=1).plans
    fitting = asked.ask(top=10).plans
    too_large = best.workload.laid_out(micro=8, dp=1, tp=1, pp=1, recompute="none", zero=0)
    for known in (best.workload, fitting[-1].workload, too_large, best.workload.laid_out(dp=7)):
        (found,) = asked.ask(top=1, known=[known]).plans
        assert identity(found.workload) == identity(best.workload)
