"""The loss in pieces is the loss, and its logits never exist at once."""

from __future__ import annotations

import pytest
import torch

from tests.pool import Pool
from toolkit.parallel.loss_chunks import loss_chunk

TOKENS = 8 * 30  # of a micro-batch; no other size is that of the logits


@pytest.mark.parametrize("tp", [1, 2])
def test_pieces_are_the_whole(pool: Pool, tp: int) -> None:
    """The vocabulary of 250 is padded to 256, which no label and no probability may notice."""
    sp = {
        "parallel": {"tp": tp, "sequence_parallel": tp > 1},
        "train": {"micro_batch_size": 8, "seq_length": 30},
        "model": {"hidden_size": 32, "ffn_hidden_size": 96},
    }
    for rank in pool.run("tests.model.in_pieces:run", tp, sp, deadline_s=120):
        whole, pieces = rank["never"], rank["always"]
        assert float(pieces["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
        assert whole["gradients"].keys() == pieces["gradients"].keys() and len(whole["gradients"]) > 10
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(pieces["gradients"][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
        assert whole["elements"] == TOKENS * 256 // tp
        assert 0 < pieces["elements"] <= TOKENS * 256 // tp / 4


def test_when_it_pays() -> None:
    assert loss_chunk("never", tokens=2**20, columns=2**17) == 0
    assert loss_chunk("auto", tokens=1024, columns=2**15) == 0
    assert loss_chunk("auto", tokens=2**17, columns=2**17) == 2**9  # 256 MiB of fp32 logits, where the whole are 64 GiB
    assert loss_chunk("always", tokens=10, columns=8) == 3
