"""Which plan is taken when estimates can't tell: the simpler one, and never a tight one for its speed on paper."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.questions import question, smaller_memory
from toolkit.config.load import parse_config
from toolkit.cost.memory import GIB
from toolkit.cost.spreads import COMPARISON
from toolkit.hardware.catalogue import parse_hardware
from toolkit.plan.choice import close_call, prefer_simple
from toolkit.plan.search import Limits, Plan
from toolkit.plan.tune import Question, tune
from toolkit.plan.tune_show import tune_json, tune_text


def _plan(step: float, *, capacity: float = 1.0, **workload: object) -> Plan:
    """A real plan with another step time, and devices of so many times its memory."""
    found = question("h100-80gb:4").ask(top=1).plans[0]
    parts = {"matmul": step} | {name: 0.0 for name in found.time.parts if name != "matmul"}
    memory = replace(found.memory, capacity=capacity * 10 * found.worst.device)
    return replace(found, time=replace(found.time, parts=parts), memory=memory, workload=replace(found.workload, **workload))


@pytest.mark.parametrize("troublesome", [{"offload_optimizer": "cpu"}, {"recompute": "full"}, {"pp": 2}, {"zero": 3}])
def test_the_simpler_plan_is_taken_within_model_error_and_not_beyond(troublesome: dict[str, object]) -> None:
    plain = _plan(1.0, pp=1, tp=1, cp=1, vpp=1, zero=1, recompute="none")
    near, far = (replace(_plan(1.0 - gain), workload=replace(plain.workload, **troublesome)) for gain in (0.8 * COMPARISON, 3 * COMPARISON))
    assert prefer_simple([near, plain], "tokens/s")[0] is plain
    assert prefer_simple([far, plain], "tokens/s")[0] is far
    assert close_call(near, plain, "tokens/s") and not close_call(far, plain, "tokens/s")


def test_a_plan_that_hardly_fits_is_expected_to_make_fewer_steps() -> None:
    tight, roomy = _plan(1.0, capacity=0.1), _plan(1.5)
    assert tight.chance == pytest.approx(0.5) and roomy.chance > 0.99
    assert tight.expected_s == pytest.approx(2.0) and roomy.expected_s < 1.6


def test_tune_says_how_sure_it_is_and_when_it_cannot_tell() -> None:
    asked = question("h100-80gb:8", batch=64)
    answer = tune(asked, top=8, what_if=False)
    shown = tune_json(answer)
    assert shown["risk"] == 0.1 and shown["best"]["p_fits"] >= 0.9
    for plan in shown["plans"]:
        low, high = plan["range"]["step_s"]
        assert low < plan["step_s"] < high
        low, high = plan["range"]["peak_device_gib"]
        assert low < plan["peak_device_gib"] < high <= plan["capacity_gib"] * 1.001
    close = shown["close_call"]
    assert close[0] == 1
    text = tune_text(answer)
    assert (f"close call: these {len(close)} plans can't be told apart" in text) == (len(close) > 1)
    assert "fits with probability" in text


def test_an_explicit_headroom_stands_in_for_the_risk() -> None:
    asked = question("h100-80gb:4")
    need = asked.ask(top=1).plans[0].worst.device / GIB
    small = smaller_memory(asked, need + 1.0)
    free = replace(small, limits=Limits(headroom=0.0)).ask(top=20).plans
    kept = replace(small, limits=Limits(headroom=4 * GIB)).ask(top=20).plans
    assert max(plan.worst.device for plan in free) > small.hardware.gpu.memory_gib * GIB - 4 * GIB
    assert all(plan.worst.device + 4 * GIB <= plan.memory.capacity for plan in kept)


def test_a_pipeline_that_need_not_interleave_does_not() -> None:
    """The fastest layouts of the search interleave with 4 and 8 chunks; without it a step takes 1 % longer, which nobody can tell."""
    config = parse_config({"model": {"preset": "llama3-8b"}, "train": {"global_batch_size": 64, "seq_length": 8192}})
    asked = Question(config=config, hardware=parse_hardware("a100-40gb:8"))
    first, second, *_ = asked.ask(top=6).plans
    assert first.workload.vpp > 1 and second.workload.vpp > 1 and first.kind == second.kind
    answer = tune(asked, top=6, what_if=False)
    assert answer.best.workload == first.workload.laid_out(vpp=1, zero=answer.best.workload.zero)
    assert first.workload in [plan.workload for plan in answer.close]
    held = tune(replace(asked, fixed={"vpp": (first.workload.vpp,)}), top=6, what_if=False)
    assert held.best.workload.vpp == first.workload.vpp
