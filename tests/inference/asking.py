"""A small Llama with bytes for tokens, and what ranks of the pool answer with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.pool import Pool

DEADLINE_S = 300
IDS = [[5, 9, 77], [40], [8, 3, 60, 61, 62, 4, 7]]


def made(folder: Path, *, layers: int, width: int = 32, **more: Any) -> Path:
    """A Hugging Face folder of a model of drawn weights."""
    import torch

    from tests.convert import models

    shape = models.draw(2, even=True) | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "hidden_size": width}
    shape |= {"intermediate_size": 4 * width, "vocab_size": 257, "num_hidden_layers": layers}
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": True, "mlp_bias": False}
    shape |= {"max_position_embeddings": more.pop("max_position_embeddings", 64)}
    dtype = more.pop("dtype", torch.float32)
    return models.saved(models.llama(**shape, eos_token_id=None, **more), folder / "hf", dtype=dtype, shard="64MB")


def answers(pool: Pool, model: Path, *, ids: Any = IDS, new: int = 8, world: int = 1, **more: Any) -> Any:
    """(tokens, finish) of each prompt, which is ids or text, on so many ranks. more: the request's
    other values.
    """
    asked = {"model": str(model), "ids": ids, "max_new_tokens": new, **more}
    return pool.run("tests.inference.run:tokens", world, asked, deadline_s=DEADLINE_S)[0]
