"""Qwen2 and Qwen2.5 (dense): Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from toolkit.arch.families.llama import HEADS, LLAMA, NAMES, SILU, TIED, shape, sizes
from toolkit.arch.family import Fixed, Format

NO_WINDOW = Fixed("use_sliding_window", (False,), "some of its layers attend within a sliding window, others to all")
QWEN2_HF = Format(
    name="qwen2",
    title="Qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    inner="model.",
    names=NAMES,
    keys=(*sizes(ffn=22016, vocab=151936, positions=32768), replace(HEADS, default=32), TIED),
    fixed=(SILU, NO_WINDOW),
    constants={"attention_dropout": 0.0},
)


def _shape(layers: int, hidden: int, heads: int, groups: int, ffn: int, **more: Any) -> dict[str, Any]:
    small = hidden <= 2048
    usual = {"norm_eps": 1e-6, "rope_theta": 1e6, "tie_embeddings": small, "vocab_size": 151936 if small else 152064}
    return shape(layers, hidden, heads, groups, ffn, **usual | {"max_position_embeddings": 131072} | more)


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    title="as llama, with biases on queries, keys and values; Qwen2 and 2.5",
    qkv_bias=True,
    formats=(QWEN2_HF,),
    presets={
        "qwen2-7b": _shape(28, 3584, 28, 4, 18944),
        "qwen2.5-0.5b": _shape(24, 896, 14, 2, 4864, max_position_embeddings=32768),
        "qwen2.5-1.5b": _shape(28, 1536, 12, 2, 8960),
        "qwen2.5-3b": _shape(36, 2048, 16, 2, 11008, max_position_embeddings=32768),
        "qwen2.5-7b": _shape(28, 3584, 28, 4, 18944),
        "qwen2.5-14b": _shape(48, 5120, 40, 8, 13824, norm_eps=1e-5),
        "qwen2.5-32b": _shape(64, 5120, 40, 8, 27648, norm_eps=1e-5),
        "qwen2.5-72b": _shape(80, 8192, 64, 8, 29568, norm_eps=1e-5),
    },
)
