"""Hooks see each step, add numbers, stop the run; one that raises ends all ranks with one message."""

from __future__ import annotations

import csv
from typing import Any

import pytest

from tests.trainer.conftest import Fitted


def test_numbers_reach_metrics_and_monitor(fitted: Fitted) -> None:
    config = fitted.config(log={"csv": True}, train={"eval_every": 2, "eval_steps": 1}, checkpoint={"every": 4})
    hooks = {"on_step": ["adds", "sees_the_model"], "on_eval": "adds_on_eval", "on_save": "adds_on_save"}
    ranks = fitted({"config": config, "dataset": ["Numbers"], "eval_dataset": ["Numbers", 4], **hooks})
    assert ranks[0]["errors"] == [None]
    records = fitted.metrics()
    assert all(r["double"] == 2 * r["loss"] and r["nothing"] is None and r["parameters"] > 1000 for r in records)
    assert [r.get("eval_double") for r in records] == [None, 2 * records[1]["eval_loss"], None, 2 * records[3]["eval_loss"]]
    assert [r.get("saved") for r in records] == [None, None, None, 4.0]
    (file,) = (fitted.folder / "run/logs").rglob("Train_double.csv")
    rows = list(csv.reader(file.open()))
    assert [float(row[1]) for row in rows[1:]] == pytest.approx([r["double"] for r in records])


def test_one_rank_stops_all(fitted: Fitted) -> None:
    """Asked for after step 2, agreed on in step 3, in the message that each step sends anyway."""
    plain = fitted({"config": fitted.config("plain", train={"steps": 3}), "dataset": ["Numbers"]})
    ranks = fitted({"config": fitted.config(), "dataset": ["Numbers"], "on_step": ["adds", "stops_on_rank_1"]})
    assert [rank["last"][0]["step"] for rank in ranks] == [3, 3]
    assert [rank["reductions"] for rank in ranks] == [rank["reductions"] for rank in plain]
    assert fitted.losses() == fitted.losses("plain")


def test_a_stopped_run_is_saved_and_goes_on(fitted: Fitted) -> None:
    saving = fitted.config(checkpoint={"every": 100})
    fitted({"config": saving, "dataset": ["Numbers"], "on_step": "stops_on_rank_1"})
    ranks = fitted({"config": saving, "dataset": ["Numbers"]}, {"config": fitted.config("whole"), "dataset": ["Numbers"]})
    assert ranks[0]["errors"] == [None, None]
    assert fitted.losses() == fitted.losses("whole") and len(fitted.losses()) == 4


RAISING = {
    "on_step, both ranks": ({"on_step": "raises_in_step_2"}, "step 2: the on_step hook raises_in_step_2 raised ValueError on rank 0: I do not like this loss. Look at"),
    "on_step, one rank": ({"on_step": ["adds", "raises_on_rank_1"]}, "step 2: the on_step hook raises_on_rank_1 raised KeyError on rank 1: 'perplexity'. Look at"),
    "sys.exit": ({"on_step": "exits_on_rank_1"}, "step 1: the on_step hook exits_on_rank_1 raised SystemExit on rank 1: 0."),
    "last step": ({"on_step": "raises_in_the_last_step"}, "step 4: the on_step hook raises_in_the_last_step raised RuntimeError on rank 1: too late."),
    "a name that is taken": ({"on_step": "takes_a_name"}, "step 1: the on_step hook takes_a_name raised ValueError on rank 0: 'loss' is not free"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAISING)
def test_one_message_for_a_hook_that_raises(fitted: Fitted, case: str) -> None:
    hooks, message = RAISING[case]
    error = fitted.error(**hooks)
    assert error.startswith(f"TrainingError: {message}"), error
    assert "tests/trainer/parts.py, line" in error
    assert len(fitted.losses()) == int(message.split()[1].strip(":")), "the others hear of it in the next step"


@pytest.mark.parametrize("kind", ["on_eval", "on_save"])
def test_other_hooks_too(fitted: Fitted, kind: str) -> None:
    config = fitted.config(train={"eval_every": 2, "eval_steps": 1}, checkpoint={"every": 2})
    error = fitted.error(config=config, eval_dataset=["Numbers", 4], **{kind: "raises_on_rank_1"})
    assert f"step 2: the {kind} hook raises_on_rank_1 raised KeyError on rank 1" in error


def test_the_checkpoint_before_the_error_counts(fitted: Fitted) -> None:
    config = fitted.config(checkpoint={"every": 2})
    fitted.error(config=config, on_step="raises_on_rank_1")
    assert (fitted.folder / "run/checkpoints").exists()
    ranks = fitted({"config": config, "dataset": ["Numbers"]}, {"config": fitted.config("whole"), "dataset": ["Numbers"]})
    assert ranks[0]["errors"] == [None, None]
    assert fitted.losses()[2:] == fitted.losses("whole")[2:]


def test_what_cannot_be_called(fitted: Fitted) -> None:
    from toolkit import ToolkitError, Trainer

    hooks: Any = ["early stop"]
    with pytest.raises(ToolkitError, match="on_step='early stop' cannot be called"):
        Trainer(fitted.config(), on_step=hooks)
    with pytest.raises(ToolkitError, match="loss=3 cannot be called"):
        Trainer(fitted.config(), loss=3)  # type: ignore[arg-type]
