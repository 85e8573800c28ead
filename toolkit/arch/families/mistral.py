"""Mistral (dense): Llama's layers, heads of any width, and in its first release attention within a
sliding window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from toolkit.arch.families.llama import HEADS, LLAMA, NAMES, SILU, TIED, shape, sizes
from toolkit.arch.family import Format, Key

MISTRAL_HF = Format(
    name="mistral",
    title="Mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    inner="model.",
    names=NAMES,
    keys=(
        *sizes(ffn=14336, vocab=32000, positions=131072),
        replace(HEADS, default=8),
        TIED,
        Key("head_dim", "head_dim", null=True),
        Key("sliding_window", "sliding_window", 4096, null=True),
    ),
    fixed=(SILU,),
    constants={"attention_dropout": 0.0},
)


def _shape(layers: int, hidden: int, vocab: int, positions: int, theta: float, **more: Any) -> dict[str, Any]:
    more |= {"head_dim": 128, "vocab_size": vocab, "max_position_embeddings": positions, "rope_theta": theta}
    return shape(layers, hidden, 32, 8, 14336, **more)


MISTRAL = replace(
    LLAMA,
    name="mistral",
    title="as llama, with a sliding window where a release has one",
    formats=(MISTRAL_HF,),
    presets={
        "mistral-7b-v0.1": _shape(32, 4096, 32000, 32768, 1e4, sliding_window=4096),
        "mistral-7b-v0.3": _shape(32, 4096, 32768, 32768, 1e6),
        "mistral-nemo-12b": _shape(40, 5120, 131072, 131072, 1e6),
    },
)
