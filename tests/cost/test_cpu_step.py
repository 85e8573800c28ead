"""Time of a step on a CPU: what follows from the measured rates, whatever they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cost.machines import FLOP, made_up
from toolkit.arch.spec import ModelSpec
from toolkit.cost.cpu_step import SHARED, cpu_step_time, host_seconds
from toolkit.cost.step import TimeEstimate, step_time
from toolkit.cost.workload import Workload
from toolkit.errors import ConfigError
from toolkit.hardware.catalogue import parse_hardware
from toolkit.hardware.cpu import CpuRates

MACHINE = made_up()


def _model(*, layers: int = 4, hidden: int = 128, ffn: int = 256, rows: int = 512, gpt: bool = False) -> ModelSpec:
    more: dict[str, Any] = {"norm": "layer", "gated": False, "qkv_bias": True, "proj_bias": True, "mlp_bias": True} if gpt else {}
    return ModelSpec(
        layers=layers, hidden=hidden, heads=hidden // 32, groups=hidden // 32, head_dim=32, ffn=ffn, vocab=rows, rows=rows, **more
    )


def _time(w: Workload, machine: CpuRates = MACHINE, *, ranks: int | None = None, threads: int = 0) -> TimeEstimate:
    return cpu_step_time(w, replace(parse_hardware(f"cpu:{ranks or w.world}"), cpu=machine, threads=threads))


def _workload(**keys: Any) -> Workload:
    model = _model(**{k: keys.pop(k) for k in ("layers", "hidden", "ffn", "rows", "gpt") if k in keys})
    return Workload(model=model, **{"seq": 64, "precision": "fp32", "micro": 2, "batch": 8 * keys.get("dp", 1), **keys})


layouts = st.fixed_dictionaries(
    {
        "layers": st.sampled_from((2, 4, 8)),
        "hidden": st.sampled_from((64, 128, 256)),
        "rows": st.sampled_from((256, 1024)),
        "gpt": st.booleans(),
        "seq": st.sampled_from((32, 128)),
        "zero": st.integers(0, 3),
        "recompute": st.sampled_from(("none", "selective", "full")),
        "tp": st.sampled_from((1, 2)),
        "pp": st.sampled_from((1, 2)),
        "dp": st.sampled_from((1, 2)),
    }
)


@given(layouts, st.sampled_from(("layers", "hidden", "seq", "rows", "micro", "ffn")))
def test_more_work_takes_longer(keys: dict[str, Any], axis: str) -> None:
    less = {"micro": 1, "ffn": 256, **keys}
    assert _time(_workload(**less)).step < _time(_workload(**less | {axis: 2 * less[axis]} | {"batch": 16 * less["dp"]})).step


@given(layouts)
def test_a_step_is_the_sum_of_its_parts_none_of_them_below_zero(keys: dict[str, Any]) -> None:
    time = _time(_workload(**keys))
    assert min(time.parts.values()) >= 0
    assert time.step == pytest.approx(sum(time.parts.values()))


@given(layouts, st.floats(1.1, 10))
def test_a_machine_that_takes_longer_for_everything_takes_as_much_longer_for_a_step(keys: dict[str, Any], slower: float) -> None:
    w = _workload(**keys)
    assert _time(w, made_up(slower=slower)).step == pytest.approx(slower * _time(w).step)


@given(layouts, st.sampled_from((2, 4)))
def test_ranks_beyond_the_cores_wait_for_them(keys: dict[str, Any], times: int) -> None:
    """Copies that each do the same work as before: twice as many on the same cores take at least twice their compute."""
    one = _workload(**keys | {"dp": 2})
    more = replace(one, dp=2 * times, batch=one.batch * times)
    compute = sum(_time(one).parts[p] for p in ("matmul", "attention", "memory-bound kernels", "recompute"))
    shared = one.world / MACHINE.cores  # of which the cores had part of a rank to spare
    assert _time(more).step >= max(1.0, shared) * times * compute * 0.999
    assert _time(more).parts[SHARED] >= 0


def test_two_ranks_on_two_cores_wait_for_none() -> None:
    assert _time(_workload(dp=2)).parts[SHARED] == 0
    assert _time(_workload(dp=4)).parts[SHARED] > 0


def test_a_pipeline_on_one_core_has_no_idle_core_to_gain_from() -> None:
    """All stages' work on a core that both share takes as long as on one rank, and longer than on a core each."""
    w, alone = _workload(pp=2), made_up(cores=1)
    both = sum(_time(_workload(), alone).parts[p] for p in ("matmul", "attention"))
    assert _time(w, alone).step > both > 0
    assert _time(w, alone).step > _time(w, made_up(cores=2)).step


def test_multiplies_run_at_the_measured_rate() -> None:
    """One layer of one micro-batch: 6 FLOPs a weight and token, of all four weights and the output layer's."""
    w = _workload(layers=1, batch=2)
    weights = 128 * 3 * 128 + 128 * 128 + 128 * 512 + 256 * 128 + 512 * 128
    assert _time(w, threads=1).parts["matmul"] == pytest.approx(6 * weights * 2 * 64 * FLOP)
    assert _time(w, threads=2).parts["matmul"] == pytest.approx(3 * weights * 2 * 64 * FLOP)


def test_a_thread_more_speeds_up_arithmetic_alone() -> None:
    one, two = (_time(_workload(), threads=n).parts for n in (1, 2))
    assert two["matmul"] < one["matmul"] and two["launches"] == one["launches"]


def test_what_parallelism_adds_to_the_hosts_time_counts_once_for_each_neighbour() -> None:
    alone = host_seconds(_workload(), MACHINE.host)
    two, four = (host_seconds(_workload(tp=n), MACHINE.host) for n in (2, 4))
    assert four["layer"] - alone["layer"] == pytest.approx(3 * (two["layer"] - alone["layer"]))
    assert host_seconds(_workload(gpt=True), MACHINE.host)["layer"] < alone["layer"]


def test_a_step_on_a_gpu_does_not_look_at_the_hosts_processor() -> None:
    w, gpu = _workload(), parse_hardware("h100-80gb:1")
    assert step_time(w, replace(gpu, cpu=MACHINE)).step == step_time(w, gpu).step
    cpu = replace(parse_hardware("cpu:1"), cpu=MACHINE)
    assert step_time(w, cpu).step == cpu_step_time(w, cpu).step != step_time(w, parse_hardware("cpu:1")).step


def test_the_step_of_a_cpu_that_nobody_measured_may_be_three_times_as_long_or_short() -> None:
    """And that of one which was measured may not."""
    w = _workload()
    unknown, known = (step_time(w, replace(parse_hardware("cpu:1"), cpu=machine)) for machine in (None, MACHINE))
    assert unknown.step_range[0] * 3 < unknown.step < unknown.step_range[1] / 3
    assert known.step_range[1] / known.step_range[0] < 1.5


def test_a_precision_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no figures in bf16.*measured in fp32.*--precision bf16"):
        _time(_workload(precision="bf16"))
