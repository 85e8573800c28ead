"""Whole trainings: transformers' models under torch's AdamW against the training program, from
imported weights to exported ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.oracle import reference
from tests.oracle.compare import relative, worst

TRAINING = {
    "train.steps": 20,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.seq_length": 32,
    "train.grad_clip": 1.0,
    "train.precision": "fp32",
    "model.dropout": 0.0,
    "optimizer.lr": 1.0e-3,
    "optimizer.min_lr": 1.0e-4,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 4,
    "optimizer.betas": [0.9, 0.95],
    # biases of keys have no gradient but rounding: the usual 1e-8 would let Adam make full steps of
    # it, another way on each side
    "optimizer.eps": 1.0e-5,
    "optimizer.weight_decay": 0.1,
}
WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"zero.stage": 1}),
    "tp2-pp2-zero3": (4, {"zero.stage": 3, "parallel.tp": 2, "parallel.pp": 2}),
}


@pytest.fixture(scope="module")
def truths() -> dict[str, reference.Truth]:
    return {}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen3", *(pytest.param(m, marks=pytest.mark.all_cells) for m in ("mistral", "qwen2"))])
def test_same_training(
    model: str,
    world: str,
    folders: Any,
    configured: Callable[..., Any],
    trained: Callable[..., Any],
    truths: dict[str, reference.Truth],
) -> None:
    ranks, keys = WORLDS[world]
    raw = configured(model, TRAINING | keys)
    if model not in truths:
        truths[model] = reference.train(folders(model)[0], raw)
    expected = truths[model]
    lines, ours = trained(ranks, raw)
    assert expected.losses[-1] < 0.9 * expected.losses[0], "it must learn"
    assert relative([line["loss"] for line in lines], expected.losses) <= 1e-5
    assert relative([line["grad_norm"] for line in lines], expected.norms) <= 1e-4
    assert [line["lr"] for line in lines] == pytest.approx(expected.lrs, rel=1e-9)
    assert worst(ours.state_dict(), expected.weights) <= 1e-5


EVALUATIONS = {"dp2-zero2": (2, {"zero.stage": 2}), "tp2-pp2-zero3": WORLDS["tp2-pp2-zero3"]}


@pytest.mark.parametrize(("model", "world"), [("llama", "tp2-pp2-zero3"), ("gpt2", "dp2-zero2")])
def test_evaluation_is_without_dropout(
    model: str, world: str, folders: Any, configured: Callable[..., Any], trained: Callable[..., Any]
) -> None:
    """With dropout configured, the evaluation's loss is transformers' on the same tokens, and the
    training's is not.
    """
    ranks, keys = EVALUATIONS[world]
    still = {"train.steps": 3, "optimizer.warmup_steps": 2, "optimizer.lr": 0.0, "optimizer.min_lr": 0.0, "optimizer.weight_decay": 0.0}
    raw = configured(model, TRAINING | keys | still | {"model.dropout": 0.2, "train.eval_every": 1, "train.eval_steps": 2})
    theirs = folders(model)[0]
    lines, _ = trained(ranks, raw)
    expected = reference.evaluate(theirs, raw)
    assert [line["eval_loss"] for line in lines] == pytest.approx([expected] * 3, rel=1e-5)
    trains = reference.train(theirs, raw).losses
    apart = [abs(line["loss"] - loss) / loss for line, loss in zip(lines, trains, strict=True)]
    assert min(apart) > 1e-5, "dropout must be on in training, and again after an evaluation"
