"""The table of a model's weights, held to the megatron-core model of every family and to what each
layout makes of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.pool import Pool
from toolkit.arch.families import FAMILIES
from toolkit.arch.spec import LAYER, ModelSpec
from toolkit.config.load import parse_config

SHAPE: dict[str, Any] = {
    "num_layers": 5,  # with three stages, the output layer counts as one more
    "hidden_size": 48,
    "num_attention_heads": 12,
    "num_query_groups": 6,
    "ffn_hidden_size": 96,
    "vocab_size": 250,
    "vocab_multiple": 96,
    "max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in FAMILIES},
    "gpt-unbiased": {"family": "gpt", "attention_bias": False, "mlp_bias": False, "norm_bias": False, "tie_embeddings": True},
    "gpt-qk-norm": {"family": "gpt", "qk_layernorm": True},
    "llama-biased": {"family": "llama", "attention_bias": True, "mlp_bias": True, "qk_layernorm": True, "tie_embeddings": True},
    "qwen2-mlp-bias": {"family": "qwen2", "mlp_bias": True, "head_dim": 6},
}


def spec_of(variant: dict[str, Any]) -> ModelSpec:
    return parse_config({"model": SHAPE | variant}).model.spec


def compare(model: dict[str, Any]) -> list[str]:
    """In a worker: build every stage of a model for TP 1-3 and PP 1-3 on stand-in groups; what
    differs from the table.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from toolkit.engine.partitions import stage_parameters
    from toolkit.model import cpu
    from toolkit.model.build import build_chunks
    from toolkit.model.init import named_weights
    from toolkit.parallel import groups
    from toolkit.parallel.layout import Layout

    config = parse_config({"model": model, "train": {"seq_length": 32, "precision": "fp32"}})
    spec, wrong = config.model.spec, []
    cpu.install()
    dist.destroy_process_group()
    for tp, pp in [(tp, pp) for tp in (1, 2, 3) for pp in (1, 2, 3)]:
        if pp == 2:
            config.model.num_layers, layers = 6, 6
        else:
            config.model.num_layers, layers = 5, 5
        spec = replace(spec, layers=layers)
        layout = Layout(tp=tp, pp=pp)
        for stage in range(pp):
            for tp_rank in range(tp):
                dist.init_process_group("fake", store=FakeStore(), rank=stage * tp + tp_rank, world_size=tp * pp)
                groups.initialise(layout)
                groups.seed_generators(layout.coordinates(stage * tp + tp_rank), seed=1)
                (chunk,) = build_chunks(config, layout, device=torch.device("cpu"))
                where = f"tp {tp} pp {pp} stage {stage} rank {tp_rank}"
                found = list(named_weights(chunk, spec))
                if [w.name for w, _ in found] != stage_parameters(spec, layout, stage=stage):
                    wrong.append(f"{where}: {[w.name for w, _ in found]}")
                for weight, parameter in found:
                    cut = bool(getattr(parameter, "tensor_model_parallel", False))
                    dim = int(parameter.partition_dim) if cut else None
                    if tp > 1 and dim != weight.cut.dim:
                        wrong.append(f"{where}: {weight.name} is cut along {dim}, in the table along {weight.cut.dim}")
                    if list(parameter.shape) != weight.cut.part(weight.shape, tp):
                        wrong.append(f"{where}: {weight.name} is {list(parameter.shape)}, in the table {weight.shape}")
                    if (parameter.dim() > 1) != (weight.group != "vector"):
                        wrong.append(f"{where}: {weight.name} has {parameter.dim()} dimensions and is a {weight.group}")
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
    return wrong


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_core_builds_the_weights_of_the_table(pool: Pool, variant: str) -> None:
    assert pool.run("tests.arch.test_spec:compare", 1, SHAPE | VARIANTS[variant], deadline_s=240) == [[]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_counts_are_those_of_the_weights(variant: str) -> None:
    spec = spec_of(VARIANTS[variant])
    weights = list(spec.weights())
    assert spec.parameters == sum(w.count for w in weights) and len({w.name for w in weights}) == len(weights)
    assert spec.parameters - spec.unpadded_parameters == (288 - 250) * 48 * (1 if spec.tied else 2)
    assert all(spec.weight(w.name) == w and spec.weight(w.module_name) == w for w in weights)
    for w in weights:
        assert sum(s[0] for s in w.parts) == (250 if w.join == "padded" else w.shape[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_parts_make_the_whole(variant: str, tp: int) -> None:
    for w in spec_of(VARIANTS[variant]).weights():
        part = w.cut.part(w.shape, tp)
        assert w.cut.whole(part, tp) == list(w.shape)
        assert w.count_on(tp) * (tp if w.cut.dim is not None else 1) == w.count


def test_biases_count() -> None:
    """8,031,637,504 is what transformers counts for Llama-3 8B with all biases."""
    model = parse_config({"model": {"preset": "llama3-8b", "attention_bias": True, "mlp_bias": True}}).model
    assert model.spec.unpadded_parameters == 8_031_637_504


def test_transformer_engine_keeps_norms_in_the_linear_layer_behind_them() -> None:
    """Its modules' names lead to the same global names, groups and initial values as the local layers'."""
    spec = spec_of({"family": "gpt"})
    fused = replace(spec, fused_norms=True)
    for name, ours in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias"),
    ):
        weight = fused.weight(f"decoder.layers.3.{name}")
        assert weight.name == f"decoder.layers.3.{ours}" and weight.group == "vector"
        assert weight.initial == ("one" if ours.endswith("weight") else "zero")
    assert {w.name for w in fused.layer} == {w.name for w in spec.layer} and fused.parameters == spec.parameters
    order = [w.module_name.removeprefix(LAYER) for w in fused.layer]
    qkv = order.index("self_attention.linear_qkv.weight")
    assert order[qkv - 2] == "self_attention.linear_qkv.layer_norm_weight"  # within their module, norms come first


def test_a_name_the_model_lacks() -> None:
    spec = spec_of({"family": "llama"})
    for name in ("decoder.layers.5.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1.bias", "output_layer.bias"):
        assert not spec.has(name)
        with pytest.raises(KeyError):
            spec.weight(name)
