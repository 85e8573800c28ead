"""Which layers a chunk holds, against megatron-core, which builds and numbers them."""

from __future__ import annotations

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
    model = {"num_layers": layers, "hidden_size": 64, "num_attention_heads": 4}
    settings = transformer_config(parse_config({"model": model, "parallel": {"pp": pp, "vpp": vpp}}), layout)
    for stage in range(pp):
        for chunk in range(vpp):
            at = {"vp_stage": chunk if vpp > 1 else None, "pp_rank": stage}
            first = get_transformer_layer_offset(settings, **at)
            built = range(first, first + get_num_layers_to_build(settings, **at))
            assert built == layout.layers_of(layers, stage=stage, chunk=chunk)
