"""A loss of the user's own gives one result in every layout, and what plain torch gives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.cells import BOUNDS, Cell, batches, layers
from tests.pool import Pool

RUN = "tests.parity.run:run_cell"
TRAIN = {"train.steps": 5, "train.global_batch_size": 8}
TP, PP = {"parallel.tp": 2}, {"parallel.pp": 2}
LAYOUTS = {
    "tp2": (2, TP | {"zero.stage": 1}),
    "tp2-sp-zero3": (2, TP | {"zero.stage": 3, "parallel.sequence_parallel": True}),
    "pp2": (2, PP | {"zero.stage": 1}),
    "dp2-zero2": (2, {"zero.stage": 2}),
    "tp2-pp2-zero3": (4, TP | PP | {"zero.stage": 3}),
    "pp2-vpp2-dp2-zero2": (4, PP | {"zero.stage": 2, "parallel.vpp": 2} | layers(4)),
}


class Runs:
    """Cells trained with a named loss; the single-process runs are kept."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.kept = pool, dict[str, Any]()

    def __call__(self, world: int, keys: dict[str, Any], loss: str) -> dict[str, Any]:
        raw = Cell(world, TRAIN | keys).raw()
        return self.pool.run(RUN, world, {"config": raw, "loss": loss}, deadline_s=180)[0]

    def alone(self, keys: dict[str, Any], loss: str) -> dict[str, Any]:
        same = {k: v for k, v in keys.items() if k.startswith("model.")}
        key = f"{same} {loss}"
        if key not in self.kept:
            self.kept[key] = self(1, same | {"zero.stage": 0}, loss)
        return self.kept[key]


@pytest.fixture(scope="module")
def runs(pool: Pool) -> Runs:
    return Runs(pool)


def worst(found: dict[str, Any], expected: dict[str, Any], what: str) -> float:
    """Largest relative difference of losses or norms over all steps."""
    assert len(found[what]) == len(expected[what]) == TRAIN["train.steps"]
    return max(abs(f - e) / abs(e) for f, e in zip(found[what], expected[what], strict=True))


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    loss, norm = BOUNDS["fp32"]
    return worst(found, expected, "losses") <= loss and worst(found, expected, "norms") <= norm


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_the_helpers_are_plain_torch(runs: Runs, tied: bool) -> None:
    keys = {"model.tie_embeddings": tied}
    assert same(runs.alone(keys, "z_loss"), runs.alone(keys, "plain_z_loss"))
    assert not same(runs.alone(keys, "z_loss"), runs.alone(keys, ""))


@pytest.mark.parametrize("loss", ["z_loss", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_one_process(runs: Runs, layout: str, loss: str) -> None:
    world, keys = LAYOUTS[layout]
    keys = keys | batches(world // (keys.get("parallel.tp", 1) * keys.get("parallel.pp", 1)), keys.get("parallel.pp", 1), world)
    found = runs(world, keys | {"train.global_batch_size": 8}, loss)
    assert same(found, runs.alone(keys, loss))


def test_a_fault_turns_it_red(runs: Runs) -> None:
    """A log-sum-exp over this rank's part of the vocabulary alone."""
    assert not same(runs(2, TP | {"zero.stage": 1}, "own_part_only"), runs.alone({}, "z_loss"))


def test_half_precision(runs: Runs) -> None:
    """bf16 logits: the helpers compute in fp32, as the default loss does."""
    keys = {"train.precision": "bf16", "zero.stage": 1}
    alone, shared = runs(1, keys, "plain_z_loss"), runs(2, TP | keys, "z_loss")
    loss, norm = BOUNDS["bf16"]
    assert worst(shared, alone, "losses") <= loss and worst(shared, alone, "norms") <= norm
