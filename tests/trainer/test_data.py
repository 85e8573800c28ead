"""Data sets of the user's own: checked before training and while reading, in an order that resume
and layouts keep.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer.conftest import Fitted

BAD = {
    "too short": (["Numbers", 15], "the data set Numbers has 15 samples, and the run takes 16: train.steps=4 global batches of train.global_batch_size=4, each sample once. Set train.steps to at most 3, or give more samples."),
    "not one batch": (["Numbers", 3], "the data set Numbers has 3 samples, and the run takes 16: train.steps=4 global batches of train.global_batch_size=4, each sample once. Give more samples."),
    "too long": (["TooLong"], "sample 0 of the data set TooLong has text of shape [18] and type int64: with train.seq_length=16 it takes whole numbers of shape [17]."),
    "an id too large": (["BadIds"], "sample 0 of the data set BadIds has ids from 40 to 40 in text: with model.vocab_size=40 they go from 0 to 39."),
    "labels that mean nothing": (["IgnoredLabels"], "sample 0 of the data set IgnoredLabels has ids from -1 to -1 in labels: with model.vocab_size=40 they go from 0 to 39. Leave tokens out of the loss by a loss_mask, or by the label -100."),
    "a mask of another shape": (["WideMask"], "sample 0 of the data set WideMask has loss_mask of shape [16, 16] and type uint8: with train.seq_length=16 it takes 0 and 1 of shape [16], one for each label."),
    "half a mask": (["HalfMask"], "has loss_mask of shape [16] and type float64 with values from 0.5 to 0.5"),
    "floats": (["Floats"], "has text of shape [17] and type float64"),
    "no dict": (["NoDict"], "sample 0 of the data set NoDict is ndarray: a sample is a dict."),
    "a length that raises": (["NoLength"], "the data set NoLength raised RuntimeError: I never counted them. Look at "),
    "no length": (["Stream"], "the data set Stream has no length or no samples by number"),
    "not the same everywhere": (["EachRankItsOwn"], "rank 1 has another data set than rank 0: EachRankItsOwn of 65 samples, shuffled with 65 samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_message_on_all_ranks(fitted: Fitted, case: str) -> None:
    dataset, message = BAD[case]
    error = fitted.error(dataset=dataset)
    assert error.startswith("DataError: ") and message in error, error
    assert not (fitted.folder / "run").exists(), "a run that cannot start leaves nothing behind"


@pytest.mark.parametrize("workers", [0])
def test_a_sample_that_cannot_be_read(fitted: Fitted, workers: int) -> None:
    """On one rank, in the last step: the others hear of it in that step."""
    error = fitted.error(dataset=["BreaksLate"], shuffle=False, config=fitted.config(data={"workers": workers}))
    assert error.startswith("DataError: reading sample 15 of the data set BreaksLate raised OSError: [Errno 5] the disk is gone."), error
    assert "tests/trainer/parts.py, line" in error and len(fitted.losses()) == 3


def test_evaluation_needs_data_of_its_own(fitted: Fitted) -> None:
    error = fitted.error(config=fitted.config(train={"eval_every": 2, "eval_steps": 2}))
    assert error.startswith("DataError: train.eval_every=2 has no data")
    error = fitted.error(config=fitted.config(train={"eval_every": 2, "eval_steps": 2}), eval_dataset=["Numbers", 7])
    assert "the evaluation data set Numbers has 7 samples, and the run takes 8: train.eval_steps=2" in error


def test_the_vocabulary_must_be_named(fitted: Fitted) -> None:
    error = fitted.error(config=fitted.config(model={"vocab_size": None}))
    assert error.startswith("ConfigError: model.vocab_size is null")


LAYOUTS = ({"parallel": {"tp": 2}}, {"parallel": {"pp": 2}, "zero": {"stage": 3}}, {"zero": {"stage": 2}})


def test_every_layout_takes_the_same_samples(fitted: Fitted) -> None:
    """And each run of several in one process group is what it is by itself."""
    runs = [{"config": fitted.config(str(i), **layout), "dataset": ["Pairs"], "loss": "masked"} for i, layout in enumerate(LAYOUTS)]
    assert fitted(*runs)[0]["errors"] == [None] * len(runs)
    fitted({"config": fitted.config("alone"), "dataset": ["Numbers"], "loss": "every_second"}, ranks=1)
    for i in range(len(runs)):
        assert fitted.losses(str(i)) == pytest.approx(fitted.losses("alone"), rel=1e-5), LAYOUTS[i]
    fitted({"config": fitted.config("again", **LAYOUTS[2]), "dataset": ["Pairs"], "loss": "masked"})
    assert fitted.losses("again") == fitted.losses("2"), "two runs before it left something behind"


def test_masked_labels_weigh_alike_over_the_global_batch(fitted: Fitted) -> None:
    """Micro-batches and ranks have different numbers of labels; the loss and norm do not depend on
    who has which.
    """
    layouts = ({}, {"parallel": {"pp": 2}}, {"train": {"micro_batch_size": 2}}, {"zero": {"stage": 3}})
    runs = [{"config": fitted.config(str(i), **layout), "dataset": ["Masked"]} for i, layout in enumerate(layouts)]
    runs.append({"config": fitted.config("by hand"), "dataset": ["Masked"], "loss": "by_weight"})
    assert fitted(*runs)[0]["errors"] == [None] * len(runs)
    alone = fitted.config("alone", train={"micro_batch_size": 4})
    fitted({"config": alone, "dataset": ["Masked"]}, ranks=1)
    for run in ("0", "1", "2", "3", "by hand"):
        for key in ("loss", "grad_norm"):
            found, expected = ([record[key] for record in fitted.metrics(name)] for name in (run, "alone"))
            assert found == pytest.approx(expected, rel=1e-5), (run, key)


def test_documents_of_a_data_set_of_ones_own(fitted: Fitted) -> None:
    apart = {"data": {"document_mask": True}}
    fitted({"config": fitted.config("apart", **apart), "dataset": ["Halves"]}, {"config": fitted.config("joined"), "dataset": ["Halves"]})
    assert fitted.losses("apart") != fitted.losses("joined")
    config = fitted.config(**apart)
    assert "sample 0 of the data set Numbers has no positions: with data.document_mask=true" in fitted.error(config=config)
    assert "has positions [1, 2, 3, 4, 5, 6] …: they must begin with 0" in fitted.error(config=config, dataset=["Shifted"])


def test_order(fitted: Fitted) -> None:
    """Its own, or run.seed's."""
    runs = [
        {"config": fitted.config("seed 1", run={"seed": 1}), "dataset": ["Numbers"]},
        {"config": fitted.config("own order", run={"seed": 1}), "dataset": ["Numbers"], "shuffle": False},
        {"config": fitted.config("larger", run={"seed": 1}), "dataset": ["Numbers", 65], "shuffle": False},
    ]
    fitted(*runs, ranks=1)
    assert fitted.losses("own order") == fitted.losses("larger") != fitted.losses("seed 1")


def test_resume_on_another_layout_takes_the_next_samples(fitted: Fitted) -> None:
    data: dict[str, Any] = {"dataset": ["Named"]}
    fitted({"config": fitted.config("whole", train={"steps": 6}), **data}, ranks=1)
    saving = {"checkpoint": {"every": 3}}
    fitted({"config": fitted.config(train={"steps": 3}, **saving), **data})
    ranks = fitted({"config": fitted.config(train={"steps": 6}, parallel={"tp": 2}, **saving), **data})
    assert ranks[0]["errors"] == [None]
    assert fitted.losses() == pytest.approx(fitted.losses("whole"), rel=1e-5)


def test_resume_with_other_data(fitted: Fitted) -> None:
    config = fitted.config(train={"steps": 2}, checkpoint={"every": 2})
    fitted({"config": config, "dataset": ["Numbers"]})
    config["train"]["steps"] = 4
    said = "belongs to another run: it has data.source=Numbers of 64 samples, shuffled, and this run has data.source="
    assert said + "Numbers of 65 samples, shuffled" in fitted.error(config=config, dataset=["Numbers", 65])
    assert said + "Numbers of 64 samples, in its own order" in fitted.error(config=config, shuffle=False)
    assert "the samples are not those that" in fitted.error(config=config, dataset=["Numbers", 64, 1])
