"""Published model shapes, by name; a key set beside `model.preset` wins over the preset's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.config.describe import show
from toolkit.config.explain import nearest
from toolkit.errors import ConfigError


def _gpt2(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """Radford et al. 2019; sizes as of the released weights."""
    return _gpt(layers, hidden, heads, positions=1024)


def _gpt(layers: int, hidden: int, heads: int, *, positions: int, head_dim: int | None = None) -> dict[str, Any]:
    return {
        "family": "gpt",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": 50257,
        "max_position_embeddings": positions,
        "tie_embeddings": True,
        "norm_eps": 1e-5,
    } | ({"head_dim": head_dim} if head_dim else {})


def _llama(layers: int, hidden: int, heads: int, groups: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "family": "llama",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
        "norm_eps": 1e-5,
    } | more


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
    return _llama(layers, hidden, heads, 8, ffn, **more)


_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_embeddings": False}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    # Brown et al. 2020, table 2.1, with dense attention in every layer. It prints 24 heads of 128 for
    # the 1.3B model, which would make 1.5 B parameters: 16 heads fill the printed width of 2048.
    "gpt3-1.3b": _gpt(24, 2048, 16, positions=2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, positions=2048),
    # 5140 is no multiple of 40 heads: the table's head width of 128 is kept
    "gpt3-13b": _gpt(40, 5140, 40, positions=2048, head_dim=128),
    "gpt3-175b": _gpt(96, 12288, 96, positions=2048),
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, **_LLAMA2),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, **_LLAMA2),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, **_LLAMA2),
    "llama3-8b": _llama3(32, 4096, 32, 14336),
    "llama3-70b": _llama3(80, 8192, 64, 28672),
    # released as 3.1 only; this is its shape as pre-trained, at 8k context and without RoPE scaling
    "llama3-405b": _llama3(126, 16384, 128, 53248),
    "llama3.1-8b": _llama3(32, 4096, 32, 14336, scaling=8.0),
    "llama3.1-70b": _llama3(80, 8192, 64, 28672, scaling=8.0),
    "llama3.1-405b": _llama3(126, 16384, 128, 53248, scaling=8.0),
    "llama3.2-1b": _llama3(16, 2048, 32, 8192, scaling=32.0, tie=True),
    "llama3.2-3b": _llama3(28, 3072, 24, 8192, scaling=32.0, tie=True),
    "smollm2-135m": _llama(
        30,
        576,
        9,
        3,
        1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_embeddings=True,
        init_std=0.041666666666666664,
    ),
}


def with_preset(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model section with its preset's keys below the user's; raises ConfigError for an unknown preset."""
    name = model.get("preset")
    if name is None:
        return dict(model)
    if not isinstance(name, str) or name not in PRESETS:
        near = nearest(str(name).lower(), PRESETS, cutoff=0.5) if isinstance(name, str) else None
        hint = f"Did you mean {near}?" if near else ""
        raise ConfigError(f"model.preset={show(name)} is not a known preset", fix=f"{hint} Presets are {', '.join(PRESETS)}.".strip())
    return {**PRESETS[name], **model}
