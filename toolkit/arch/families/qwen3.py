"""Qwen3 (dense): Llama's layers with heads of 128, and a norm on each head's queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from toolkit.arch.families.llama import HEADS, LLAMA, NAMES, SILU, TIED, shape, sizes
from toolkit.arch.families.qwen2 import NO_WINDOW
from toolkit.arch.family import Format, Key

QWEN3_HF = Format(
    name="qwen3",
    title="Qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    inner="model.",
    names=NAMES,
    keys=(
        *sizes(ffn=22016, vocab=151936, positions=32768),
        replace(HEADS, default=32),
        TIED,
        Key("head_dim", "head_dim", 128),
        Key("attention_bias", ("qkv_bias", "attention_bias"), False, kind=bool),
    ),
    fixed=(SILU, NO_WINDOW),
    constants={"attention_dropout": 0.0},
)


def _shape(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    usual = {"head_dim": 128, "norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936, "tie_embeddings": hidden < 4096}
    return shape(layers, hidden, heads, 8, ffn, **usual, max_position_embeddings=40960)


QWEN3 = replace(
    LLAMA,
    name="qwen3",
    title="as llama, with a norm on each head's queries and keys",
    qk_layernorm=True,
    formats=(QWEN3_HF,),
    presets={
        "qwen3-0.6b": _shape(28, 1024, 16, 3072),
        "qwen3-1.7b": _shape(28, 2048, 16, 6144),
        "qwen3-4b": _shape(36, 2560, 32, 9728),
        "qwen3-8b": _shape(36, 4096, 32, 12288),
        "qwen3-14b": _shape(40, 5120, 40, 17408),
        "qwen3-32b": _shape(64, 5120, 64, 25600),
    },
)
