"""A run that moves from layout to layout goes on as one that never moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.run import config_of
from tests.pool import CellFailed, Pool

TRAIN = "tests.checkpoint.run:train"
LEG = 2  # steps in each layout: the second one's loss has seen the optimizer states, too
LOSS, NORM = 1e-5, 1e-4  # the parity suite's bounds in fp32


def leg(world: int, stage: int, **keys: Any) -> tuple[int, dict[str, Any]]:
    return world, {"zero.stage": stage} | {k.replace("__", "."): v for k, v in keys.items()}


TP, PP = {"parallel__tp": 2}, {"parallel__pp": 2}
CPU = {"zero__offload_optimizer": "cpu"}
CHAINS: dict[str, tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]] = {
    "llama": (
        {},
        [
            leg(2, 1, **TP),
            leg(2, 2, **PP),
            leg(2, 3),
            leg(2, 1, **TP, parallel__sequence_parallel=True),
            leg(4, 1, **PP, parallel__vpp=2),
            leg(4, 2, **TP),
            leg(1, 0),
            leg(2, 3, **CPU, zero__offload_param="cpu"),
            leg(4, 3, **TP, **PP),
            leg(2, 0),
        ],
    ),
    "tied": ({"model.tie_embeddings": True}, [leg(2, 2, **PP), leg(2, 3, **TP), leg(4, 1, **PP), leg(2, 1, **CPU)]),
    "gpt": (
        {"model.family": "gpt", "model.num_query_groups": 4, "model.qk_layernorm": True, "model.vocab_multiple": 6},
        [leg(2, 3), leg(4, 1, **TP, **PP), leg(2, 2)],
    ),
    "nvme": ({}, [leg(2, 1, **TP), leg(2, 3, zero__offload_optimizer="nvme", zero__offload_param="nvme"), leg(1, 1)]),
}


def run(pool: Pool, folder: Path, base: dict[str, Any], one: tuple[int, dict[str, Any]], *, steps: int) -> dict[str, Any]:
    world, keys = one
    keys = {"optimizer.decay_steps": 40, **base, **keys}
    return pool.run(TRAIN, world, config_of(folder, keys, steps=steps, checkpoint={"every": LEG, "keep": 99}), deadline_s=300)[0]


@pytest.mark.parametrize("chain", [pytest.param(c, marks=[pytest.mark.all_cells] if c == "nvme" else []) for c in CHAINS])
def test_a_run_that_moves(chain: str, pool: Pool, tmp_path: Path, compiled: Callable[[dict[str, Any]], None]) -> None:
    base, legs = CHAINS[chain]
    for _, keys in legs:
        compiled(keys)
    unmoved = run(pool, tmp_path / "unmoved", base, leg(1, 1), steps=LEG * len(legs))
    for i, one in enumerate(legs):
        moved = run(pool, tmp_path / "moved", base, one, steps=LEG * (i + 1))
        assert moved["first"] == LEG * i + 1
        part = slice(LEG * i, LEG * (i + 1))
        assert moved["losses"] == pytest.approx(unmoved["losses"][part], rel=LOSS), one
        assert moved["norms"] == pytest.approx(unmoved["norms"][part], rel=NORM), one
