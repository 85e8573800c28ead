"""A loss of the user's own gives one result in every layout, and what plain torch gives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.cells import BOUNDS, Cell, batches, layers
from tests.pool import Pool
from tests.trainer.conftest import Fitted

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


def test_a_number_that_its_backward_needs(fitted: Fitted) -> None:
    """The schedule divides a loss in place."""
    assert fitted({"config": fitted.config(), "dataset": ["Numbers"], "loss": "root_mean_square"})[0]["errors"] == [None]


BAD = {
    "per_sequence": "the loss per_sequence returned a tensor of shape [1]: a loss is one number for each micro-batch, a tensor of shape []. Return the mean over the tokens.",
    "a_float": "the loss a_float returned 3.",
    "detached": "the loss detached returned a number without a gradient: nothing would be learned from it.",
    "wants_a_mask": "the loss wants_a_mask raised KeyError on rank 0: 'mask'. Look at ",
    "raises_late_on_one_rank": "the loss raises_late_on_one_rank raised ZeroDivisionError on rank 1: no tokens left. Look at ",
}  # fmt: skip


@pytest.mark.parametrize("loss", BAD)
@pytest.mark.parametrize("layout", [{}, {"pp": 2}, {"tp": 2}], ids=str)
def test_one_message_for_a_loss_that_does_not_work(fitted: Fitted, loss: str, layout: dict[str, int]) -> None:
    error = fitted.error(loss=loss, config=fitted.config(parallel=layout))
    expected = BAD[loss].replace("on rank 0", "on rank 1") if layout.get("pp") else BAD[loss]  # the last stage computes it
    assert error.startswith(f"TrainingError: {expected}"), error


def test_an_evaluation_notices_it_as_well(fitted: Fitted) -> None:
    config = fitted.config(train={"steps": 1, "eval_every": 1, "eval_steps": 2})
    error = fitted.error(loss="raises_late_on_one_rank", config=config, eval_dataset=["Numbers", 8])
    assert "raised ZeroDivisionError on rank 1" in error
