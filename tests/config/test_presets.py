"""Each preset holds the published number of parameters, and the user's keys win."""

from __future__ import annotations

import pytest

from toolkit.config.count import padded_vocab, parameter_count
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
}
NOMINAL = {"gpt3-1.3b": 1.3e9, "gpt3-6.7b": 6.7e9, "gpt3-13b": 13e9, "gpt3-175b": 175e9}  # the paper gives round numbers only


def test_every_preset_is_held_to_a_published_count() -> None:
    assert PUBLISHED.keys() | NOMINAL.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_count(name: str) -> None:
    assert parameter_count(parse_config({"model": {"preset": name}}).model) == PUBLISHED[name]


@pytest.mark.parametrize("name", NOMINAL)
def test_nominal_count(name: str) -> None:
    assert parameter_count(parse_config({"model": {"preset": name}}).model) == pytest.approx(NOMINAL[name], rel=0.025)


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
    assert [parameter_count(config.model) for config in ours] == expected


def test_padding_depends_on_the_multiple_alone() -> None:
    assert [padded_vocab(size, 128) for size in (1, 128, 129, 50257)] == [128, 128, 256, 50304]
    model = parse_config({"model": {"preset": "gpt2-124m"}}).model
    assert parameter_count(model, padded=True) - parameter_count(model) == (50304 - 50257) * 768


def test_keys_beside_the_preset_win() -> None:
    model = parse_config({"model": {"num_layers": 2, "preset": "llama3.1-8b", "rope_scaling": None}}).model
    assert (model.num_layers, model.rope_scaling, model.hidden_size, model.num_query_groups) == (2, None, 4096, 8)


@pytest.mark.parametrize(("name", "near"), [("llama3-8", "llama3-8b"), ("GPT2-124M", "gpt2-124m"), ("smollm-135m", "smollm2-135m")])
def test_unknown_preset_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*Did you mean {near}"):
        parse_config({"model": {"preset": name}})


def test_count_needs_a_vocabulary() -> None:
    config = parse_config({"model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}})
    with pytest.raises(ConfigError, match=r"Set model\.vocab_size"):
        parameter_count(config.model)
