"""FLOPs per token against what PyTorch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.pool import Pool
from toolkit.arch.families import FAMILIES
from toolkit.config.load import parse_config

MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 160,
    "vocab_size": 256,
    "max_position_embeddings": 32,
}


def count_forward(family: str) -> int:
    """Matrix-multiply FLOPs of one forward pass of [1, 32] tokens, in a worker."""
    from toolkit.model.build import build_chunks
    from toolkit.parallel.layout import Layout
    from toolkit.train.world import World, connect

    config = parse_config({"model": {**MODEL, "family": family}, "train": {"seq_length": 32, "precision": "fp32"}})
    connect(World(0, 1, 0), Layout(), seed=1)
    (model,) = build_chunks(config, Layout(), device=torch.device("cpu"))
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens, torch.arange(32)[None], None, labels=tokens)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_what_pytorch_counts(pool: Pool, family: str) -> None:
    counted = pool.run("tests.arch.test_flops:count_forward", 1, family, deadline_s=120)[0]
    config = parse_config({"model": {**MODEL, "family": family}, "train": {"seq_length": 32}})
    assert config.model.spec.flops_per_token(32) * 32 / 3 == pytest.approx(counted, rel=1e-6)
