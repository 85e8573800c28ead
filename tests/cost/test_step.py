"""The time estimate: laws of work and links, and parts that sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cost.strategies import DEEPSPEED, FSDP, MEGATRON, NEMO, PLAIN, workloads
from tests.cost.test_memory import LLAMA3_8B
from toolkit.cost import kernels, network
from toolkit.cost.constants import VALUES
from toolkit.cost.memory import estimate
from toolkit.cost.step import step_time
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware, with_network

H100 = parse_hardware("h100-80gb:8x4")


@settings(max_examples=150, deadline=None)
@given(w=workloads())
def test_no_step_beats_the_peak_of_its_gpus(w: Workload) -> None:
    time = step_time(w, H100)
    tokens, gpus = w.microbatches * w.micro * w.dp * w.seq, w.tp * w.pp * w.cp * w.dp
    assert time.tokens_per_s_per_gpu == pytest.approx(tokens / time.step / gpus)
    assert time.step >= tokens * w.model.flops_per_token(0) / (gpus * H100.gpu.peak(w.precision))
    if w.pp == 1:  # all weights' multiplies, forward and two gradients, of all micro-batches
        multiplies = step_time(w, H100, scale=1.0).parts["matmul"]
        assert multiplies >= tokens * w.model.flops_per_token(0) / (gpus * H100.gpu.peak(w.precision) * H100.gpu.matmul)
    assert all(value >= 0 for value in time.parts.values())


@settings(max_examples=100, deadline=None)
@given(w=workloads())
def test_more_micro_batches_take_longer_and_less_than_in_proportion(w: Workload) -> None:
    once, twice = step_time(w, H100).step, step_time(replace(w, batch=2 * w.batch), H100).step
    assert once < twice <= 2 * once * 1.1  # gradients are added to kept ones only from the second micro-batch on


@settings(max_examples=100, deadline=None)
@given(w=workloads())
def test_a_faster_network_is_never_slower(w: Workload) -> None:
    assert step_time(w, with_network(H100, nic_gb_s=400.0)).step <= step_time(w, with_network(H100, nic_gb_s=12.5)).step * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(w=workloads(), param=st.sampled_from(("none", "cpu")))
def test_offload_is_never_faster(w: Workload, param: str) -> None:
    """What the search relies on when it tries an offload only where the layout does not fit without."""
    here = replace(w, offload_optimizer="none", offload_param="none", zero=max(1, w.zero))
    away = replace(here, offload_optimizer=w.offload_optimizer, offload_param=param if here.zero == 3 else "none")
    assert step_time(away, H100).step >= step_time(here, H100).step * (1 - 1e-9)
    assert step_time(replace(away, offload_optimizer="nvme"), H100).step >= step_time(replace(away, offload_optimizer="cpu"), H100).step


def test_recompute_costs_at_most_another_forward() -> None:
    w = Workload(model=LLAMA3_8B, seq=8192, dp=32, batch=64, zero=3, stack=FSDP)
    none, half, full = (step_time(replace(w, recompute=mode), H100).step for mode in ("none", "half", "full"))
    assert none < half < full < none * 1.36


def test_interleaving_shrinks_the_bubble() -> None:
    w = Workload(model=LLAMA3_8B, seq=8192, pp=4, dp=8, batch=64, stack=NEMO)
    plain, interleaved = step_time(w, H100).parts, step_time(replace(w, vpp=4), H100).parts
    assert interleaved["pipeline bubble"] == pytest.approx(plain["pipeline bubble"] / 4)


def test_tensor_parallelism_across_nodes_is_dear() -> None:
    w = Workload(model=LLAMA3_8B, seq=8192, tp=8, sp=True, batch=8, stack=MEGATRON)
    inside, across = parse_hardware("h100-80gb:8x1"), parse_hardware("h100-80gb:2x4")
    assert step_time(w, across).parts["tensor parallel"] > 3 * step_time(w, inside).parts["tensor parallel"]


@pytest.mark.parametrize(("m", "n", "k"), [(8192, 8192, 8192), (4096, 28672, 8192), (256, 256, 256), (1, 4096, 4096), (128, 128, 65536)])
def test_no_multiply_beats_the_ceiling_or_the_memory(m: int, n: int, k: int) -> None:
    gpu = H100.gpu
    seconds = kernels.matmul_time(m, n, k, gpu=gpu, precision="bf16")
    assert seconds >= 2 * m * n * k / (gpu.peak("bf16") * gpu.matmul)
    assert seconds >= 2 * (m * k + k * n + m * n) / (gpu.memory_gb_s * 1e9)


def test_large_multiplies_come_near_the_ceiling_and_small_ones_do_not() -> None:
    gpu = H100.gpu

    def share(size: int) -> float:
        return 2 * size**3 / kernels.matmul_time(size, size, size, gpu=gpu, precision="bf16") / (gpu.peak("bf16") * gpu.matmul)

    assert share(16384) > 0.9
    assert share(512) < 0.3


def test_a_ring_sends_what_the_ring_algorithm_sends() -> None:
    """8 H100 of one node, 1 GB gathered: 7/8 of it at 0.72 of 450 GB/s, and a few tens of microseconds."""
    over = network.group(H100, size=8, stride=1)
    assert network.gather_time(1e9, over=over) == pytest.approx(7 / 8 / (450 * VALUES.fabric_share), abs=1e-4)
    assert network.reduce_time(1e9, over=over) == pytest.approx(2 * 7 / 8 / (450 * VALUES.fabric_share), abs=1e-4)
    assert network.gather_time(1e9, over=network.group(H100, size=1, stride=1)) == 0.0


def test_ranks_of_a_node_share_its_network() -> None:
    """Data-parallel groups of TP 8 hold one rank a node each, so each sends through one port; without TP eight rings use all."""
    alone, together = network.group(H100, size=4, stride=8), network.group(H100, size=32, stride=1)
    assert alone.gb_s == pytest.approx(H100.nic_gb_s * VALUES.network_share)
    assert together.gb_s == pytest.approx(min(8 * alone.gb_s, 450 * VALUES.fabric_share))


def test_gathered_logits_cost_memory_and_time_under_tensor_parallelism_alone() -> None:
    """An output layer that hands every rank the whole vocabulary: 16 bytes a logit instead of 16 over tp."""
    w = Workload(model=LLAMA3_8B, seq=2048, micro=2, tp=4, batch=8, zero=1, stack=replace(PLAIN, whole_logits=False))
    gathered = replace(w, stack=PLAIN)
    logits = 2 * 2048 * LLAMA3_8B.vocab * 16.0
    assert estimate(gathered, H100).worst.parts["logits"] == pytest.approx(logits)
    assert estimate(w, H100).worst.parts["logits"] == pytest.approx(logits / 4)
    assert step_time(gathered, H100).step > step_time(w, H100).step
    alone = replace(w, tp=1)
    assert estimate(replace(alone, stack=PLAIN), H100) == estimate(alone, H100)
    assert step_time(replace(alone, stack=PLAIN), H100).step == pytest.approx(step_time(alone, H100).step)


def test_offloaded_adam_runs_at_the_published_rate() -> None:
    """arXiv 2101.06840, table 4: DeepSpeed's CPU Adam takes 0.25 s for 1e9 weights. Each of a node's ranks updates a share of them."""
    instant = replace(H100, gpu=replace(H100.gpu, pcie_gb_s=1e9))  # weights and gradients cross in no time
    for ranks in (1, 8):
        w = Workload(model=LLAMA3_8B, seq=4096, dp=ranks, batch=ranks, zero=1, offload_optimizer="cpu", stack=DEEPSPEED)
        assert step_time(w, instant).parts["offload"] == pytest.approx(0.25e-9 * LLAMA3_8B.parameters, rel=1e-3)
        assert step_time(replace(w, offload_optimizer="nvme"), instant).parts["offload"] > 2 * 0.25e-9 * LLAMA3_8B.parameters


def test_zero_plus_plus_moves_less_and_pays_in_kernels() -> None:
    """arXiv 2306.10209: over a slow network each of its three parts shortens the gathers; on one node quantising costs more than it saves."""
    w = Workload(model=LLAMA3_8B, seq=2048, dp=64, batch=64, zero=3, stack=DEEPSPEED)
    slow, node = with_network(parse_hardware("h100-80gb:8x8"), nic_gb_s=3.0), parse_hardware("h100-80gb:8")
    plain = step_time(w, slow).parts["zero gathers"]
    parts = {
        name: step_time(replace(w, **{name: value}), slow).parts["zero gathers"]
        for name, value in (("hpz", 8), ("qwz", True), ("qgz", True))
    }
    assert all(seconds < 0.9 * plain for seconds in parts.values())
    assert step_time(replace(w, hpz=8, qwz=True, qgz=True), slow).parts["zero gathers"] < 0.5 * plain
    one = replace(w, dp=8, batch=8)
    assert step_time(replace(one, hpz=8), node).step == pytest.approx(step_time(one, node).step)


def test_the_second_partition_is_counted_under_a_pipeline() -> None:
    w = Workload(model=LLAMA3_8B, seq=2048, pp=2, dp=32, batch=64, zero=3)
    plain, second = (estimate(replace(w, hpz=hpz), H100).stages for hpz in (1, 8))
    for before, after in zip(plain, second, strict=True):
        weights = w.parameters_on(before.stage)
        assert after.allocated - before.allocated == pytest.approx(2 * weights / 8, rel=0.05)
