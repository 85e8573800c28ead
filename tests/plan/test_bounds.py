"""What lets the search skip candidates: bounds that never exceed the truth, and a known plan that changes no answer."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from tests.plan.questions import candidates, identity, question, smaller_memory
from toolkit.cost.memory import estimate
from toolkit.cost.step import step_time
from toolkit.cost.workload import Workload
from toolkit.hardware import calibration
from toolkit.parallel import rules
from toolkit.plan.bounds import Bounds
from toolkit.plan.space import Structure, sharding_of, structure_of


def _candidates(count: int) -> list[Workload]:
    every = candidates(question(batch=8, fixed={"cp": (1, 2)}).space())
    return every[:: max(1, len(every) // count)]


@pytest.mark.parametrize(
    ("spec", "model"),
    [("h100-80gb:4", {}), ("h100-80gb:8x4", {"num_layers": 7}), ("rtx4090-24gb:2x2", {"num_layers": 6, "tie_embeddings": True})],
)
def test_no_bound_of_time_exceeds_the_step(spec: str, model: dict[str, Any]) -> None:
    """Neither a node's nor that of all its micro-batches; stages that differ and uneven splits included."""
    space = question(spec, model=model, batch=8, fixed={"cp": (1, 2)}).space()
    scale = calibration.scale_for(space.hardware.gpu, space.base.precision)
    bounds = Bounds(space, scale=scale)
    every = candidates(space)
    close = 0
    for w in every[:: max(1, len(every) // 600)]:
        cut, step = structure_of(w), step_time(w, space.hardware, scale=scale).step
        bound = bounds.steps_s(cut, w.dp, w.micro)[space.recomputes.index(w.recompute)]
        assert bounds.copies_s(cut, w.dp, space.micros(w.dp)) <= bound * (1 + 1e-9)
        assert bound <= step * (1 + 1e-9), f"{w}"
        close += bound > 0.7 * step
    assert close > 20, "a bound far below the truth rules nothing out"


def test_the_rules_that_a_space_asks_are_the_whole_table() -> None:
    space = question(batch=8, fixed={"cp": (1, 2)}, model={"num_layers": 6}).space()
    cuts = [
        Structure(tp=tp, pp=pp, vpp=vpp, cp=cp, sp=sp)
        for tp, pp, vpp, cp, sp in product((1, 2, 3), (1, 2, 4), (1, 3), (1, 2), (False, True))
    ]
    answers = set()
    for cut, dp, micro, recompute, sharding in product(cuts, (1, 2), (1, 3), ("none", "full"), space.shardings()):
        asked = space.legal(cut, dp, micro, recompute, sharding)  # it leaves the case as that of this candidate
        if asked:
            assert rules.legal(space.case)
        else:
            case = space.case
            case.world, case.micro, case.recompute = cut.ranks * dp, micro, recompute
            case.tp, case.pp, case.vpp, case.cp, case.sp = cut.tp, cut.pp, cut.vpp, cut.cp, cut.sp
            case.stage, case.opt_offload, case.param_offload = sharding
            assert not rules.legal(case)
        answers.add(asked)
    assert answers == {True, False}


def test_the_quick_bound_of_memory_never_exceeds_the_estimate() -> None:
    space = question(batch=8, fixed={"cp": (1, 2)}).space()
    hardware, quick, bounds = space.hardware, Bounds(space, scale=1.0), []
    for w in _candidates(400):
        first = estimate(w, hardware).stages[0]
        least = quick.nbytes(structure_of(w), w.dp, w.micro, w.recompute, sharding_of(w))
        bounds.append((least, first.allocated - first.parts["workspace"]))
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
