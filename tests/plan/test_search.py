"""The search finds what trying everything finds, and every plan it returns is legal, fits and is estimated as it is estimated alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.questions import GPUS, candidates, identity, one_by_one, question, smaller_memory
from toolkit.cost.memory import GIB
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel import rules
from toolkit.parallel.options import divisors
from toolkit.plan.search import Limits, Objective, Plan
from toolkit.plan.show import estimate_json
from toolkit.plan.space import spec
from toolkit.plan.tune import Question, planned, tune


def _key(objective: Objective, step: float, gpus: int) -> tuple[float, float]:
    return {"tokens/s": (step, gpus), "cost": (step * gpus, step), "fewest-gpus": (gpus, step)}[objective]


@pytest.mark.parametrize(
    ("gib", "model", "batch"),
    [(79.0, {}, 4), (5.5, {"num_query_groups": 8}, 8), (6.0, {"tie_embeddings": True, "num_layers": 6}, 12)],
)
def test_the_best_plan_is_that_of_trying_everything(gib: float, model: dict[str, Any], batch: int) -> None:
    asked = smaller_memory(question(model=model, batch=batch, fixed={"micro": (1, 2, 3, 4), "vpp": (1, 2, 3), "cp": (1, 2)}), gib)
    tried = list(one_by_one(asked))
    for objective in ("tokens/s", "cost", "fewest-gpus"):
        best = min(_key(objective, step, w.world) for w, step in tried)
        found = replace(asked, objective=objective).ask(top=5).plans
        assert _key(objective, found[0].expected_s, found[0].gpus) == pytest.approx(best), objective
        known = {identity(w): step for w, step in tried}
        assert all(known[identity(plan.workload)] == pytest.approx(plan.expected_s) for plan in found)
        listed = {plan.kind for plan in found}
        last = _key(objective, found[-1].expected_s, found[-1].gpus)
        missed = [w for w, step in tried if (w.tp, w.pp, w.cp, w.dp) not in listed and _key(objective, step * (1 + 1e-9), w.world) < last]
        assert not missed, "a kind of layout that beats the last one listed is listed too"


def test_the_space_holds_every_legal_candidate_and_counts_them() -> None:
    asked = question(batch=4, fixed={"cp": (1, 2)})
    space = asked.space()
    ours = {identity(w) for w in candidates(space)}
    tried = {identity(w) for w, _ in one_by_one(asked)}
    assert tried and tried <= ours
    assert len(ours) <= asked.ask(top=1).candidates


@st.composite
def questions(draw: st.DrawFn) -> Question:
    heads = draw(st.sampled_from((6, 8, 12)))
    model = {
        "num_layers": draw(st.integers(1, 24)),
        "num_attention_heads": heads,
        "hidden_size": 64 * heads,
        "num_query_groups": draw(st.sampled_from(divisors(heads))),
        "tie_embeddings": draw(st.booleans()),
        "family": draw(st.sampled_from(("llama", "gpt"))),
    }
    hardware = (
        f"{draw(st.sampled_from(('h100-80gb', 'rtx4090-24gb', 'v100-16gb', 'cpu')))}:{draw(st.integers(1, 8))}x{draw(st.integers(1, 9))}"
    )
    asked = question(hardware, model=model, batch=draw(st.integers(1, 48)), seq=512 * draw(st.integers(1, 16)))
    return replace(asked, objective=draw(st.sampled_from(("tokens/s", "cost", "fewest-gpus"))))


@settings(max_examples=20, deadline=None)
@given(asked=questions())
def test_every_plan_is_legal_fits_and_is_estimated_alike(asked: Question) -> None:
    plans = asked.ask(top=4).plans
    keys = [_key(asked.objective, plan.expected_s, plan.gpus) for plan in plans]
    assert keys == sorted(keys)
    for plan in plans:
        w, config = plan.workload, planned(asked.config, plan)
        assert w.tp * w.pp * w.cp * w.dp == plan.gpus <= asked.hardware.count
        assert w.micro * w.dp * w.microbatches == config.train.global_batch_size
        machine = GPUS if asked.hardware.gpu.accelerator else rules.Machine()
        layout = rules.check(config, plan.gpus, machine=machine)
        assert layout.num_microbatches == w.microbatches
        alone = estimate_json(config, parse_hardware(spec(asked.hardware, plan.gpus)))
        assert alone["fits"] and alone["step_s"] == pytest.approx(plan.time.step)
        assert alone["peak_device_gib"] == pytest.approx(plan.worst.device / GIB, abs=0.001)
        assert sum(plan.time.parts.values()) == pytest.approx(plan.time.step)


def test_memory_and_time_and_price_limits_hold() -> None:
    asked = question("h100-80gb:8x2")
    best = asked.ask(top=1).plans[0]
    spared = best.memory.capacity - 0.9 * best.worst.device
    roomy = replace(asked, limits=Limits(headroom=spared)).ask(top=3).plans
    assert roomy and all(plan.worst.device + spared <= plan.memory.capacity for plan in roomy)
    tight = smaller_memory(asked, 1.01 * best.worst.device / GIB).ask(top=3).plans
    assert tight and all(plan.chance >= 0.9 for plan in tight)
    bold, careful = (
        smaller_memory(replace(asked, limits=Limits(risk=risk)), 1.01 * best.worst.device / GIB).ask(top=1).plans[0] for risk in (0.5, 0.01)
    )
    assert careful.chance >= 0.99 and bold.time.step <= careful.time.step
    slow = replace(asked, objective="fewest-gpus", limits=Limits(max_step_s=2 * best.time.step)).ask(top=1).plans[0]
    assert slow.gpus < best.gpus and slow.time.step <= 2 * best.time.step
    budget = Limits(price=2.0, max_cost=1.0, steps=100)
    cheap = replace(asked, limits=budget).ask(top=3).plans
    assert all(plan.time.step * plan.gpus * 100 / 3600 * 2.0 <= 1.0 for plan in cheap)


def test_fewer_gpus_than_there_are() -> None:
    assert all(plan.gpus <= 3 for plan in question("h100-80gb:8", max_gpus=3).ask(top=5).plans)
    for plan in question("h100-80gb:4x4").ask(top=10).plans:
        assert plan.gpus < 4 or plan.gpus % 4 == 0, "nodes are used whole"


@pytest.mark.parametrize(
    ("axis", "values"),
    [("tp", (2,)), ("pp", (3,)), ("dp", (4,)), ("zero", (2, 3)), ("recompute", ("full",)), ("sp", (True,)), ("micro", (2,))],
)
def test_what_is_fixed_stays(axis: str, values: tuple[Any, ...]) -> None:
    plans = question("h100-80gb:8x3", fixed={axis: values}, batch=24).ask(top=5).plans
    assert plans and all(getattr(plan.workload, axis) in values for plan in plans)


def test_context_parallel_ranks_keep_a_part_worth_sharing_out() -> None:
    short, long = (question(seq=seq).space() for seq in (4096, 8192))
    assert {cut.cp for cut, _ in short.structures()} == {1}
    assert {cut.cp for cut, _ in long.structures()} == {1, 2}


def test_the_list_shows_different_layouts() -> None:
    plans: list[Plan] = question("h100-80gb:8").ask(top=8).plans
    kinds = [plan.kind for plan in plans]
    assert len(plans) == 8 and max(kinds.count(kind) for kind in kinds) <= 2


def test_offload_is_taken_only_where_it_is_needed() -> None:
    model = {"num_layers": 24, "hidden_size": 2048}
    roomy, tight = question("h100-80gb:1", model=model), smaller_memory(question("h100-80gb:1", model=model), 11.5)
    assert roomy.ask(top=1).plans[0].workload.offload_optimizer == "none"
    assert tight.ask(top=1).plans[0].workload.offload_optimizer == "cpu"
    poor = replace(tight, hardware=replace(tight.hardware, gpu=replace(tight.hardware.gpu, host_gib=8)))
    assert not poor.ask(top=1).plans, "16 bytes a weight do not fit into 8 GiB"


def test_the_work_does_not_grow_with_the_gpus() -> None:
    """A batch of 256 sequences bounds the copies, so that past some size more GPUs add no candidates."""
    model = {"num_layers": 48, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8}
    few, many = (tune(question(f"h100-80gb:8x{nodes}", model=model, batch=256), what_if=False).result for nodes in (2**10, 2**17))
    assert many.candidates <= 1.5 * few.candidates
    assert many.sized + many.timed <= 3 * (few.sized + few.timed)
