"""Llama 1 to 3.2 and models built like it: RoPE, RMSNorm, SwiGLU, grouped queries."""

from __future__ import annotations

from typing import Any

from toolkit.arch.family import Family, Fixed, Format, Key

_BLOCK = "model.layers.{i}."
# most decoders on Hugging Face name their modules as Llama does
NAMES: dict[str, str | tuple[str, ...]] = {
    "embedding.word_embeddings": "model.embed_tokens",
    "input_layernorm": _BLOCK + "input_layernorm",
    "self_attention.linear_qkv": tuple(f"{_BLOCK}self_attn.{n}_proj" for n in "qkv"),
    "self_attention.linear_proj": _BLOCK + "self_attn.o_proj",
    "self_attention.q_layernorm": _BLOCK + "self_attn.q_norm",
    "self_attention.k_layernorm": _BLOCK + "self_attn.k_norm",
    "pre_mlp_layernorm": _BLOCK + "post_attention_layernorm",
    "mlp.linear_fc1": (_BLOCK + "mlp.gate_proj", _BLOCK + "mlp.up_proj"),
    "mlp.linear_fc2": _BLOCK + "mlp.down_proj",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
}
HEADS = Key("num_key_value_heads", "num_query_groups", lambda theirs: theirs.get("num_attention_heads", 32))
TIED = Key("tie_word_embeddings", "tie_embeddings", False, kind=bool)
SILU = Fixed("hidden_act", ("silu",), "its MLP has another activation than SwiGLU")


def sizes(*, ffn: int, vocab: int, positions: int) -> tuple[Key, ...]:
    """The keys that such models share; ffn, vocab, positions: what transformers takes where a
    config leaves them out.
    """
    return (
        Key("num_hidden_layers", "num_layers", 32),
        Key("hidden_size", "hidden_size", 4096),
        Key("num_attention_heads", "num_attention_heads", 32),
        Key("intermediate_size", "ffn_hidden_size", ffn),
        Key("vocab_size", "vocab_size", vocab),
        Key("max_position_embeddings", "max_position_embeddings", positions),
        Key("rms_norm_eps", "norm_eps", 1e-6, kind=float),
        Key("initializer_range", "init_std", 0.02, kind=float),
    )


def ffn_of(hidden: int) -> int:
    """8h/3, in whole units of 256."""
    return -(-8 * hidden // 3 // 256) * 256


LLAMA_HF = Format(
    name="llama",
    title="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    inner="model.",
    names=NAMES,
    keys=(
        *sizes(ffn=11008, vocab=32000, positions=2048),
        HEADS,
        TIED,
        Key("head_dim", "head_dim", null=True),
        Key("attention_bias", ("qkv_bias", "attention_bias"), False, kind=bool),
        Key("mlp_bias", "mlp_bias", False, kind=bool),
    ),
    fixed=(SILU,),
    constants={"attention_dropout": 0.0},
)


def shape(layers: int, hidden: int, heads: int, groups: int, ffn: int, **more: Any) -> dict[str, Any]:
    """Keys of the model section."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
        "norm_eps": 1e-5,
    } | more


def _llama2(layers: int, hidden: int, heads: int, groups: int, ffn: int) -> dict[str, Any]:
    more = {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_embeddings": False}
    return shape(layers, hidden, heads, groups, ffn, **more)


def _llama3(layers: int, hidden: int, heads: int, ffn: int, *, scaling: float | None = None, tie: bool = False) -> dict[str, Any]:
    """Llama 3 (8k context), or 3.1 and 3.2 (128k) where a RoPE scaling factor is given."""
    more: dict[str, Any] = {"vocab_size": 128256, "rope_theta": 500000.0, "tie_embeddings": tie, "max_position_embeddings": 8192}
    if scaling is not None:
        more["max_position_embeddings"] = 131072
        more["rope_scaling"] = {
            "type": "llama3",
            "factor": scaling,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return shape(layers, hidden, heads, 8, ffn, **more)


LLAMA = Family(
    name="llama",
    title="RoPE, RMSNorm, SwiGLU",
    norm="rms",
    positions="rotary",
    activations=("swiglu",),
    ffn=ffn_of,
    formats=(LLAMA_HF,),
    presets={
        "llama2-7b": _llama2(32, 4096, 32, 32, 11008),
        "llama2-13b": _llama2(40, 5120, 40, 40, 13824),
        "llama2-70b": _llama2(80, 8192, 64, 8, 28672),
        "llama3-8b": _llama3(32, 4096, 32, 14336),
        "llama3-70b": _llama3(80, 8192, 64, 28672),
        # released as 3.1 only; this is its shape as pre-trained, at 8k context and without RoPE scaling
        "llama3-405b": _llama3(126, 16384, 128, 53248),
        "llama3.1-8b": _llama3(32, 4096, 32, 14336, scaling=8.0),
        "llama3.1-70b": _llama3(80, 8192, 64, 28672, scaling=8.0),
        "llama3.1-405b": _llama3(126, 16384, 128, 53248, scaling=8.0),
        "llama3.2-1b": _llama3(16, 2048, 32, 8192, scaling=32.0, tie=True),
        "llama3.2-3b": _llama3(28, 3072, 24, 8192, scaling=32.0, tie=True),
        "smollm2-135m": shape(
            *(30, 576, 9, 3, 1536),
            vocab_size=49152,
            max_position_embeddings=8192,
            rope_theta=100000.0,
            tie_embeddings=True,
            init_std=0.041666666666666664,
        ),
    },
)
