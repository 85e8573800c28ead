"""The memory estimate: laws that hold for every workload, and figures that are known exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cost.strategies import DEEPSPEED, FSDP, MEGATRON, workloads
from toolkit.arch.spec import ModelSpec
from toolkit.cost import activations
from toolkit.cost.memory import GIB, estimate, states
from toolkit.cost.stack import TOOLKIT
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware

H100 = parse_hardware("h100-80gb:8x4")
LLAMA3_8B = ModelSpec(layers=32, hidden=4096, heads=32, groups=8, head_dim=128, ffn=14336, vocab=128256, rows=128256)


def _peak(w: Workload) -> float:
    return estimate(w, H100).worst.device


@settings(max_examples=150, deadline=None)
@given(w=workloads())
def test_more_work_never_takes_less_memory(w: Workload) -> None:
    grown = (
        replace(w, micro=w.micro + 1, batch=w.batch // w.micro * (w.micro + 1)),
        replace(w, seq=w.seq * 2),
        replace(w, model=replace(w.model, layers=w.model.layers + 8)),
        replace(w, model=replace(w.model, rows=w.model.rows * 2)),
    )
    for larger in grown:
        assert _peak(larger) >= _peak(w) * (1 - 1e-9), (w, larger)


@settings(max_examples=150, deadline=None)
@given(w=workloads(), times=st.sampled_from((2, 3, 4)))
def test_larger_micro_batches_of_the_same_batch_never_take_less_memory(w: Workload, times: int) -> None:
    """What the search relies on when it sizes only some micro-batches."""
    w = replace(w, batch=w.micro * w.dp * times * 4)
    assert _peak(replace(w, micro=w.micro * times)) >= _peak(w) * (1 - 1e-9)


@settings(max_examples=150, deadline=None)
@given(w=workloads())
def test_a_higher_zero_stage_never_holds_more_states(w: Workload) -> None:
    params = w.parameters_on(0)
    held = [sum(states(replace(w, zero=stage), params).values()) for stage in range(4)]
    if w.stack.sharding == "fsdp":  # its stages 2 and 3 keep fp32 weights, so they compare with each other only
        held = held[2:]
    if w.precision == "fp32" and w.shards == 1:  # nothing is cut, and DeepSpeed's clone of fp32 weights is all that ZeRO adds
        return
    assert held == sorted(held, reverse=True)


@settings(max_examples=150, deadline=None)
@given(w=workloads())
def test_stages_hold_the_whole_model_between_them(w: Workload) -> None:
    """Without ZeRO, the ranks of one model copy hold every weight once, and a tied matrix on both ends."""
    w = replace(w, zero=0, offload_optimizer="none", offload_param="none")
    stages = estimate(w, H100).stages
    assert len(stages) == w.pp
    weights = w.model.parameters + (w.model.rows * w.model.hidden if w.model.tied and w.pp > 1 else 0)
    held = sum(w.tp * stage.parts["parameters"] for stage in stages)
    # ours counts what every tensor-parallel rank holds whole, and padding
    assert held == pytest.approx(w.width * weights, rel=0.02 if w.stack.sharding == "toolkit" else 1e-9)
    assert all(value >= 0 for stage in stages for value in (*stage.parts.values(), stage.fragmentation, stage.context))


def test_states_per_weight_are_those_of_the_zero_paper() -> None:
    """arXiv 1910.02054, figure 1: 16 bytes a weight, 4 + 12/N, 2 + 14/N and 16/N; ours keeps gradients in fp32 below stage 2."""
    w = Workload(model=LLAMA3_8B, seq=8192, dp=64, batch=64, stack=DEEPSPEED)
    total = {z: sum(states(replace(w, zero=z), 1.0).values()) for z in (1, 2, 3)}
    assert total == pytest.approx({1: 4 + 12 / 64, 2: 2 + 14 / 64, 3: 16 / 64})
    assert sum(states(replace(w, zero=1, stack=TOOLKIT), 1.0).values()) == pytest.approx(2 + 4 + 12 / 64)
    assert sum(states(replace(w, zero=3, stack=FSDP), 1.0).values()) == pytest.approx(16 / 64)


def test_a_fused_layer_keeps_what_it_must() -> None:
    """Llama-3-8B, one layer, bf16, no TP: 2 bytes of 4 norm tensors, queries, keys, values, output, three MLP tensors; 4 of the log-sum-exp."""
    w = Workload(model=LLAMA3_8B, seq=8192, stack=MEGATRON)
    per_token = 2 * (4 * 4096 + 4096 + 2 * 1024 + 4096 + 3 * 14336) + 4 * 32
    assert activations.layer_bytes(w) == pytest.approx(per_token * 8192)


def test_interleaving_holds_more_in_flight_than_1f1b() -> None:
    w = Workload(model=LLAMA3_8B, seq=4096, pp=4, batch=64)
    assert activations.in_flight(w, 0) == 4 and activations.in_flight(w, 3) == 1
    # arXiv 2205.05198, section 4.2.3: 1 + (p - 1) / (p m) times the layers' activations
    assert activations.in_flight(replace(w, vpp=2), 0) == pytest.approx(4 * (1 + 3 / (4 * 2)) - 0.0)


def test_offload_moves_states_to_the_host() -> None:
    w = Workload(model=LLAMA3_8B, seq=2048, dp=32, batch=32, zero=3, stack=DEEPSPEED)
    here, there = estimate(w, H100), estimate(replace(w, offload_optimizer="cpu", offload_param="nvme"), H100)
    assert there.worst.parts["optimizer"] == 0 and there.worst.parts["parameters"] == 0
    assert there.worst.device < here.worst.device
    assert there.host == pytest.approx(16 * LLAMA3_8B.parameters / 4, rel=0.01)  # 8 of 32 ranks share a node
    assert there.nvme == pytest.approx(2 * LLAMA3_8B.parameters / 4, rel=0.01)


def test_llama3_8b_fits_one_node_only_when_sharded() -> None:
    node = parse_hardware("h100-80gb:8")
    w = Workload(model=LLAMA3_8B, seq=8192, dp=8, batch=8, recompute="full", stack=DEEPSPEED)
    assert not estimate(replace(w, zero=0), node).fits
    assert estimate(replace(w, zero=3), node).fits
    assert estimate(w, node).capacity == pytest.approx(79.1 * GIB)
