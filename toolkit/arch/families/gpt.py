"""GPT-2, GPT-3 and nanoGPT: learned positions, LayerNorm, GELU, biases everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from toolkit.arch.family import Family, Fixed, Format, Key

_BLOCK = "transformer.h.{i}."
_SIZES = (
    Key("n_layer", "num_layers", 12),
    Key("n_embd", "hidden_size", 768),
    Key("n_head", "num_attention_heads", 12),
    Key("vocab_size", "vocab_size", 50257),
)
GPT2 = Format(
    name="gpt2",
    title="GPT-2",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    inner="transformer.",
    transposed=True,  # its Conv1D keeps [in, out]
    biased=True,
    names={
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "input_layernorm": _BLOCK + "ln_1",
        "self_attention.linear_qkv": _BLOCK + "attn.c_attn",
        "self_attention.linear_proj": _BLOCK + "attn.c_proj",
        "pre_mlp_layernorm": _BLOCK + "ln_2",
        "mlp.linear_fc1": _BLOCK + "mlp.c_fc",
        "mlp.linear_fc2": _BLOCK + "mlp.c_proj",
        "decoder.final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
    },
    keys=(
        *_SIZES,
        Key("n_inner", "ffn_hidden_size", lambda theirs: 4 * theirs.get("n_embd", 768)),
        Key("n_positions", "max_position_embeddings", 1024),
        Key("tie_word_embeddings", "tie_embeddings", True, kind=bool),
        Key("layer_norm_epsilon", "norm_eps", 1e-5, kind=float),
        Key("initializer_range", "init_std", 0.02, kind=float),
        Key(
            "activation_function",
            "activation",
            "gelu_new",
            kind=str,
            choices={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        ),
        # one probability here: three different ones are left to the user
        Key(("resid_pdrop", "embd_pdrop", "attn_pdrop"), "dropout", 0.1, kind=float),
    ),
    fixed=(
        Fixed("scale_attn_weights", (True,), "its attention is not scaled by 1/sqrt(head width)", written=False),
        Fixed("scale_attn_by_inverse_layer_idx", (False,), "its attention is scaled by the layer's number", written=False),
        Fixed("add_cross_attention", (False,), "it has cross-attention", written=False),
    ),
)
NANOGPT = replace(
    GPT2,
    name="nanogpt",
    title="nanoGPT",
    architecture="",
    model_type="",
    transposed=False,
    biased=False,
    keys=(
        *(replace(key, default=None) for key in _SIZES),
        Key("block_size", "max_position_embeddings"),
        Key("bias", ("qkv_bias", "attention_bias", "mlp_bias", "norm_bias"), True, kind=bool),
        Key("dropout", "dropout", 0.0, kind=float),
    ),
    fixed=(),
    # nanoGPT has no option for these
    says={"activation": "gelu", "tie_embeddings": True, "norm_eps": 1e-5},
)


def _shape(layers: int, hidden: int, heads: int, positions: int, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": 50257,
        "max_position_embeddings": positions,
        "tie_embeddings": True,
        "norm_eps": 1e-5,
    } | more


GPT = Family(
    name="gpt",
    title="learned positions, LayerNorm, GELU, biases",
    norm="layer",
    positions="learned",
    activations=("gelu_tanh", "gelu"),
    ffn=lambda hidden: 4 * hidden,
    attention_bias=True,
    mlp_bias=True,
    norm_bias=True,
    formats=(GPT2, NANOGPT),
    presets={
        # Radford et al. 2019; sizes as of the released weights
        "gpt2-124m": _shape(12, 768, 12, 1024),
        "gpt2-355m": _shape(24, 1024, 16, 1024),
        "gpt2-774m": _shape(36, 1280, 20, 1024),
        "gpt2-1.5b": _shape(48, 1600, 25, 1024),
        # Brown et al. 2020, table 2.1, with dense attention in every layer. It prints 24 heads of 128 for
        # the 1.3B model, which would make 1.5 B parameters: 16 heads fill the printed width of 2048.
        "gpt3-1.3b": _shape(24, 2048, 16, 2048),
        "gpt3-6.7b": _shape(32, 4096, 32, 2048),
        # 5140 is no multiple of 40 heads: the table's head width of 128 is kept
        "gpt3-13b": _shape(40, 5140, 40, 2048, head_dim=128),
        "gpt3-175b": _shape(96, 12288, 96, 2048),
    },
)
