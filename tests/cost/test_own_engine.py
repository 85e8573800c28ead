"""What our engine holds, counted: the published sizes of models, and laws that any layout keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from tests.cost.strategies import workloads
from toolkit.config.load import parse_config
from toolkit.config.presets import PRESETS
from toolkit.cost import own_saved, own_states
from toolkit.cost.gathers import foreseen
from toolkit.cost.rank_weights import edge_weights, layer_weights
from toolkit.cost.stack import TOOLKIT
from toolkit.cost.workload import Workload
from toolkit.engine.partitions import partitions
from toolkit.parallel.layout import Layout


def _held(w: Workload, stage: int) -> int:
    return w.layers_on(stage) * sum(x.count for x in layer_weights(w)) + sum(x.count for side in edge_weights(w, stage) for x in side)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_every_weight_of_a_model_is_counted(preset: str, qk_layernorm: bool) -> None:
    model = {"preset": preset, "qk_layernorm": qk_layernorm, "mlp_bias": qk_layernorm}
    config = parse_config({"model": model, "train": {"seq_length": 1024}})
    assert _held(Workload.of(config, 1), 0) == config.model.spec.parameters


@settings(max_examples=100, deadline=None)
@given(w=workloads(stack=TOOLKIT))
def test_stages_hold_the_whole_model_between_them(w: Workload) -> None:
    one = replace(w, tp=1)
    tied_copy = w.model.rows * w.model.hidden if w.model.tied and w.pp > 1 else 0
    assert sum(_held(one, s) for s in range(w.pp)) == _held(replace(one, pp=1, vpp=1), 0) + tied_copy


@settings(max_examples=100, deadline=None)
@given(w=workloads(stack=TOOLKIT))
def test_recompute_keeps_less_and_every_part_is_counted(w: Workload) -> None:
    for cpu in (False, True):
        kept = [sum(own_saved.stage_saved(replace(w, recompute=mode), 0, cpu=cpu).values()) for mode in ("none", "selective", "full")]
        assert kept == sorted(kept, reverse=True)
    assert set(own_states.states(w, 0)) == {"parameters", "gradients", "optimizer", "zero buffers"}
    assert all(value >= 0 for value in own_states.states(w, w.pp - 1).values())


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_groups_are_padded_as_deepspeed_pads_them(world: int, zero: int) -> None:
    """Odd numbers of weights: what is counted is what toolkit.engine.partitions cuts, which a test holds to real engines."""
    model = {"num_layers": 1, "hidden_size": 15, "num_attention_heads": 3, "head_dim": 6, "ffn_hidden_size": 7, "vocab_multiple": 5}
    raw = {"model": model, "train": {"seq_length": 8, "precision": "fp32", "global_batch_size": 6}, "zero": {"stage": zero}}
    config = parse_config(raw)
    spec, layout = config.model.spec, Layout.of(config, world)
    shapes = {w.name: w.shape for w in spec.weights()}
    groups = [[w.name for w in group] for group in config.optimizer.spec.split(spec.weights(), tied=None)]
    cuts = [partitions(groups, shapes, layout, rank=rank, zero_stage=zero, sub_group_size=10**9) for rank in range(world)]
    each = 8 if zero < 2 else 12  # bytes a weight: two moments, and from ZeRO-2 on a copy of the weights
    for rank in range(world):
        counted = own_states.states(Workload.of(config, world), 0, dp_rank=rank)["optimizer"]
        assert counted == each * sum(cut.numel for cut in cuts[rank]) + 4 * len(cuts[rank])
    if world > 1 and zero:
        assert sum(cut.numel for rank in cuts for cut in rank) > spec.parameters, "something must be padded"


@settings(max_examples=100, deadline=None)
@given(w=workloads(stack=TOOLKIT))
def test_what_is_offloaded_lies_in_host_memory_or_on_the_device(w: Workload) -> None:
    for stage in {0, w.pp - 1}:
        whole, host, device = own_states.states(w, stage), own_states.on_host(w, stage), own_states.on_device(w, stage, cpu=False)
        assert all(host[part] >= 0 and device[part] >= 0 for part in whole)
        assert {part: host[part] + device[part] for part in whole} == pytest.approx(whole)
        assert own_states.on_device(w, stage, cpu=True) == whole
        if w.offload_optimizer == "none" and w.offload_param == "none":
            assert not any(host.values())
        else:
            assert w.offload_optimizer == "none" or device["optimizer"] == 0


@pytest.mark.parametrize(("stage", "forwards"), [(7, [(0, 0)] * 8), (4, [(0, -1)] * 3 + [(0, 0)] * 3)])
def test_deepspeed_foresees_a_forward_that_it_has_written_down(stage: int, forwards: list[tuple[int, int]]) -> None:
    """Eight stages and micro-batches: the last stage repeats one forward and one backward; stage 4 warms up with three forwards, of which
    the first is written, then writes its second pair, whose backward it did not expect; the third pair's forward, the sixth, it knows.
    """
    config = parse_config(
        {
            "model": {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4},
            "parallel": {"pp": 8},
            "zero": {"stage": 3},
            "train": {"global_batch_size": 8},
        }
    )
    assert foreseen(Workload.of(config, 8), stage) == forwards
