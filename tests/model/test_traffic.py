"""An exchange takes as many messages and bytes as it must, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.cells import _context
from tests.pool import Pool
from toolkit.parallel.exchange import numbers_moved

# messages of a layer's forward and backward, for cp ranks
MESSAGES: dict[str, Any] = {
    "allgather": lambda cp: {"all-gather": 1, "reduce-scatter": 1},
    "ulysses": lambda cp: {"all-to-all": 4},
    "ring": lambda cp: {"round": 2 * (cp - 1) + cp},
}


@pytest.mark.parametrize("exchange", MESSAGES)
@pytest.mark.parametrize("groups", [pytest.param(4, marks=pytest.mark.all_cells), 2])
def test_a_step_moves_the_least(pool: Pool, exchange: str, groups: int) -> None:
    cp = 4
    raw = _context(cp, cp, exchange, 0, model__num_query_groups=groups).raw()
    m, t = raw["model"], raw["train"]
    layers = m["num_layers"] * t["global_batch_size"] // t["micro_batch_size"]
    tokens = t["micro_batch_size"] * t["seq_length"] // cp
    forward, backward = numbers_moved(exchange, heads=m["num_attention_heads"], groups=groups, cp=cp, tokens=tokens)
    width = m["hidden_size"] // m["num_attention_heads"]
    for rank in pool.run("tests.model.traffic:step", cp, raw, deadline_s=120):
        assert rank["calls"] == {name: layers * count for name, count in MESSAGES[exchange](cp).items()}
        assert rank["elements"] == layers * width * (forward + backward)
