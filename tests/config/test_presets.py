"""Each preset holds the published number of parameters, and the user's keys win."""

from __future__ import annotations

import pytest

from toolkit.config.load import parse_config
from toolkit.config.presets import PRESETS
from toolkit.errors import ConfigError

# parameters of the released checkpoints; tied embeddings counted once
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
NOMINAL = {"gpt3-1.3b": 1.3e9, "gpt3-6.7b": 6.7e9, "gpt3-13b": 13e9, "gpt3-175b": 175e9}  # the paper gives round numbers only


def test_every_preset_is_held_to_a_published_count() -> None:
    assert PUBLISHED.keys() | NOMINAL.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_count(name: str) -> None:
    assert parse_config({"model": {"preset": name}}).model.spec.unpadded_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", NOMINAL)
def test_nominal_count(name: str) -> None:
    assert parse_config({"model": {"preset": name}}).model.spec.unpadded_parameters == pytest.approx(NOMINAL[name], rel=0.025)


@pytest.mark.parametrize("tied", [True, False])
def test_count_equals_transformers_on_shapes_no_preset_has(tied: bool) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = {
        "num_layers": 3,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "vocab_size": 301,
        "max_position_embeddings": 64,
        "tie_embeddings": tied,
    }
    llama = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=200,
        vocab_size=301,
        tie_word_embeddings=tied,
    )
    gpt = transformers.GPT2Config(n_layer=3, n_embd=96, n_head=6, vocab_size=301, n_positions=64, tie_word_embeddings=tied)
    with torch.device("meta"):
        expected = [
            sum(p.numel() for p in model.parameters())
            for model in (transformers.LlamaForCausalLM(llama), transformers.GPT2LMHeadModel(gpt))
        ]
    ours = [
        parse_config({"model": {"family": "llama", "num_query_groups": 2, "head_dim": 32, "ffn_hidden_size": 200, **shape}}),
        parse_config({"model": {"family": "gpt", **shape}}),
    ]
    assert [config.model.spec.unpadded_parameters for config in ours] == expected


def test_padding_depends_on_the_multiple_alone() -> None:
    sizes = (1, 128, 129, 50257)
    specs = [parse_config({"model": {"preset": "gpt2-124m", "vocab_size": size}}).model.spec for size in sizes]
    assert [spec.rows for spec in specs] == [128, 128, 256, 50304]
    assert specs[-1].parameters - specs[-1].unpadded_parameters == (50304 - 50257) * 768


def test_keys_beside_the_preset_win() -> None:
    model = parse_config({"model": {"num_layers": 2, "preset": "llama3.1-8b", "rope_scaling": None}}).model
    assert (model.num_layers, model.rope_scaling, model.hidden_size, model.num_query_groups) == (2, None, 4096, 8)


@pytest.mark.parametrize(("name", "near"), [("llama3-8", "llama3-8b"), ("GPT2-124M", "gpt2-124m"), ("smollm-135m", "smollm2-135m")])
def test_unknown_preset_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*Did you mean {near}"):
        parse_config({"model": {"preset": name}})
