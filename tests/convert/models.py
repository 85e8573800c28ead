"""Models of transformers with randomly drawn shapes and weights, saved as their own library saves them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

TOKENS = 24


def draw(seed: int, *, even: bool) -> dict[str, Any]:
    """A Llama's shape: odd head counts, 1 to n query heads a group, heads of any width. even: heads
    and MLP that two ranks can share.
    """
    r = random.Random(seed)
    groups = r.choice((2, 4) if even else (1, 3, 5))
    heads = groups * r.choice((1, 2, 3))
    rope: dict[str, Any] = r.choice(
        (
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": 3.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
        )
    )
    return {
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": r.choice((6, 8, 14)),
        "hidden_size": heads * r.choice((5, 7, 8)),
        "intermediate_size": r.choice((34, 50)) if even else r.choice((33, 47)),
        "vocab_size": r.choice((131, 257, 301)),
        "max_position_embeddings": 32,
        "tie_word_embeddings": r.random() < 0.5,
        "attention_bias": r.random() < 0.4,
        "mlp_bias": r.random() < 0.4,
        "rms_norm_eps": r.choice((1e-5, 1e-6)),
        "rope_parameters": rope | {"rope_theta": r.choice((10000.0, 500000.0))},
    }


def llama(**shape: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _filled(LlamaForCausalLM(LlamaConfig(**shape)))


def like_llama(family: str, **shape: Any) -> Any:
    """A model of a family whose config.json has Llama's keys, and some of its own."""
    import transformers

    name = family.capitalize()
    has_biases = family == "qwen3"
    shape = {k: v for k, v in shape.items() if k not in ("attention_bias", "mlp_bias") or (has_biases and k == "attention_bias")}
    own = {"mistral": {"sliding_window": TOKENS + 8}}.get(family, {})
    if family == "qwen2":  # its heads share out the hidden size
        del shape["head_dim"]
        shape["hidden_size"] = shape["num_attention_heads"] * 8
    config = getattr(transformers, f"{name}Config")(**shape, **own)
    return _filled(getattr(transformers, f"{name}ForCausalLM")(config))


def gpt2(**shape: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    base = {"n_layer": 2, "n_embd": 30, "n_head": 3, "n_positions": 32, "vocab_size": 131}
    return _filled(GPT2LMHeadModel(GPT2Config(**(base | shape))))


def _filled(model: Any) -> Any:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.15)
    return model.eval()


def saved(model: Any, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "40KB") -> Path:
    """The model in a dtype as several safetensors files."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tokens(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (2, TOKENS), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """What transformers computes with a folder's model: [b, s, vocab] in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens(model.config.vocab_size)).logits
