"""Every dropout mask is drawn from a state of the generator of its own, with and without sequence
parallelism.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Pool

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 16, "dropout": 0.2}


def states_drawn_from(sequence_parallel: bool) -> list[str]:
    """In a worker: digests of the generator's state at each dropout of two forward passes."""
    import hashlib

    import torch
    import torch.nn.functional as F

    from toolkit.config.load import parse_config
    from toolkit.model.build import build_chunks
    from toolkit.parallel.layout import Layout
    from toolkit.train.world import World, connect

    layout = Layout(tp=2, sequence_parallel=sequence_parallel)
    config = parse_config({"model": MODEL, "train": {"seq_length": 16, "precision": "fp32"}})
    connect(World.from_environment(), layout, seed=1)
    (model,) = build_chunks(config, layout, device=torch.device("cpu"))
    states: list[str] = []

    def noting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            states.append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
            return function(*args, **kwargs)

        return call

    originals = F.dropout, F.scaled_dot_product_attention
    F.dropout, F.scaled_dot_product_attention = map(noting, originals)
    try:
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        for _ in range(2):
            model(tokens, torch.arange(16)[None], None, labels=tokens)
    finally:
        F.dropout, F.scaled_dot_product_attention = originals
    return states


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_no_two_masks_are_alike(sequence_parallel: bool, pool: Pool) -> None:
    ranks = pool.run("tests.model.test_dropout:states_drawn_from", 2, sequence_parallel, deadline_s=120)
    assert all(len(states) >= 2 * 2 * 3 for states in ranks)  # two passes, two layers: attention, and two residual branches
    assert all(len(set(states)) == len(states) for states in ranks)
