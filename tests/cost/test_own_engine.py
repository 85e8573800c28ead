"""What our engine holds, counted: the published sizes of models, and laws that any layout keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from tests.cost.strategies import workloads
from toolkit.config.load import parse_config
from toolkit.config.presets import PRESETS
from toolkit.cost import own_engine as own
from toolkit.cost.stack import TOOLKIT
from toolkit.cost.workload import Workload


def _held(w: Workload, stage: int) -> int:
    return w.layers_on(stage) * sum(x.count for x in own.layer_weights(w)) + sum(
        x.count for side in own.edge_weights(w, stage) for x in side
    )


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
        kept = [sum(own.stage_saved(replace(w, recompute=mode), 0, cpu=cpu).values()) for mode in ("none", "selective", "full")]
        assert kept == sorted(kept, reverse=True)
    assert set(own.states(w, 0)) == {"parameters", "gradients", "optimizer", "zero buffers"}
    assert all(value >= 0 for value in own.states(w, w.pp - 1).values())
