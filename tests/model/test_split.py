"""Which layers a chunk holds, against megatron-core, which builds and numbers them."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from toolkit.config.load import parse_config
from toolkit.model.build import transformer_config
from toolkit.parallel.layout import Layout, split_layers

CASES = [(layers, pp, vpp) for layers in range(1, 19) for pp in (2, 3, 4) for vpp in (1, 2, 3) if split_layers(layers, pp * vpp)]


@pytest.mark.parametrize(("layers", "pp", "vpp"), [*CASES, (126, 16, 4)])
def test_megatron_core_builds_the_layers_that_the_layout_names(layers: int, pp: int, vpp: int) -> None:
    layout = Layout(pp=pp, vpp=vpp)
    settings = _settings(layers, layout)
    for stage in range(pp):
        for chunk in range(vpp):
            at = {"vp_stage": chunk if vpp > 1 else None, "pp_rank": stage}
            first = get_transformer_layer_offset(settings, **at)
            built = range(first, first + get_num_layers_to_build(settings, **at))
            assert built == layout.layers_of(layers, stage=stage, chunk=chunk)


@pytest.mark.parametrize("counts", [(5, 1), (1, 5), (2, 1, 3), (1, 1, 1, 7)])
def test_stages_of_unequal_length(counts: tuple[int, ...]) -> None:
    layers, layout = sum(counts), Layout(pp=len(counts), layers_per_stage=counts)
    plan = _settings(layers, layout).pipeline_model_parallel_layout
    for stage in range(layout.pp):
        first = plan.get_layer_offset(pp_rank=stage)
        built = range(first, first + plan.get_num_layers_to_build(pp_rank=stage))
        assert built == layout.layers_of(layers, stage=stage)


def _settings(layers: int, layout: Layout) -> Any:
    model = {"num_layers": layers, "hidden_size": 64, "num_attention_heads": 4}
    return transformer_config(parse_config({"model": model, "parallel": {"pp": layout.pp, "vpp": layout.vpp}}), layout)
