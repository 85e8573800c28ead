"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.run import config_of
from tests.pool import Pool

STEPS, SAVED = 5, 3
TRAIN = "tests.checkpoint.run:train"


def cell(world: int, stage: int, **keys: Any) -> tuple[int, dict[str, Any]]:
    return world, {"zero.stage": stage, "model.dropout": 0.1} | {k.replace("__", "."): v for k, v in keys.items()}


def name(c: tuple[int, dict[str, Any]]) -> str:
    return "-".join([f"{c[0]}ranks", *(f"{k.split('.')[1]}={v}" for k, v in c[1].items() if k != "model.dropout")])


CELLS = [
    cell(1, 0),
    cell(2, 0, train__precision="bf16"),
    cell(1, 1, model__tie_embeddings=True),
    cell(2, 1, train__precision="bf16"),
    cell(4, 1, parallel__tp=2, parallel__pp=2, parallel__sequence_parallel=True, model__tie_embeddings=True),
    cell(4, 1, parallel__pp=2, parallel__vpp=2),
    cell(2, 2, train__precision="bf16"),
    cell(4, 2, parallel__pp=2, parallel__vpp=2, train__precision="bf16", model__tie_embeddings=True),
    cell(2, 3, train__precision="bf16"),
    cell(4, 3, parallel__tp=2, parallel__pp=2, train__recompute="full"),
    cell(4, 3, parallel__pp=2, parallel__vpp=2, train__precision="fp16", model__tie_embeddings=True),
    cell(2, 1, zero__offload_optimizer="cpu", train__precision="bf16"),
    cell(4, 2, parallel__pp=2, zero__offload_optimizer="cpu"),
    cell(2, 3, zero__offload_optimizer="cpu", zero__offload_param="cpu", train__precision="bf16"),
    cell(2, 1, optimizer__name="muon", train__precision="bf16", model__num_layers=3),
    cell(4, 1, optimizer__name="muon", parallel__tp=2, parallel__pp=2, model__tie_embeddings=True),
    cell(2, 3, optimizer__name="sgd", train__precision="fp16"),
    cell(2, 3, zero__offload_optimizer="nvme", zero__offload_param="nvme"),
]


def _parameter(c: tuple[int, dict[str, Any]]) -> Any:
    return pytest.param(c, id=name(c), marks=[pytest.mark.all_cells] if "nvme" in c[1].values() else [])


@pytest.mark.parametrize("c", [_parameter(c) for c in CELLS])
def test_resumed_equals_uninterrupted(
    c: tuple[int, dict[str, Any]], pool: Pool, tmp_path: Path, compiled: Callable[[dict[str, Any]], None]
) -> None:
    world, keys = c
    compiled(keys)
    saving = config_of(tmp_path, keys, steps=STEPS, checkpoint={"every": SAVED})
    whole = pool.run(TRAIN, world, saving, deadline_s=300)
    resumed = pool.run(TRAIN, world, config_of(tmp_path, keys, steps=STEPS, checkpoint={"resume": "must"}), deadline_s=300)
    for rank, (one, two) in enumerate(zip(whole, resumed, strict=True)):
        assert two["first"] == SAVED + 1
        for what in ("losses", "norms"):
            assert two[what] == one[what][SAVED:], f"{what} on rank {rank}"
        assert two["digests"] == one["digests"] and two["scale"] == one["scale"], f"rank {rank}"


def test_another_micro_batch_goes_on_with_the_same_samples(pool: Pool, tmp_path: Path) -> None:
    keys = {"zero.stage": 1, "train.micro_batch_size": 2}
    whole = pool.run(TRAIN, 2, config_of(tmp_path, keys, steps=STEPS, checkpoint={"every": SAVED}), deadline_s=300)[0]
    keys["train.micro_batch_size"] = 4
    resumed = pool.run(TRAIN, 2, config_of(tmp_path, keys, steps=STEPS, checkpoint={}), deadline_s=300)[0]
    assert resumed["first"] == SAVED + 1
    assert resumed["losses"] == pytest.approx(whole["losses"][SAVED:], rel=1e-5)


def test_saving_changes_nothing(pool: Pool, tmp_path: Path) -> None:
    keys = {"zero.stage": 3, "train.precision": "bf16", "model.dropout": 0.1}
    runs = [
        pool.run(TRAIN, 2, config_of(tmp_path / str(i), keys, steps=3, checkpoint=checkpoint), deadline_s=300)
        for i, checkpoint in enumerate(({}, {"every": 1, "async_save": True}, {"every": 1, "async_save": False}))
    ]
    assert runs[1] == runs[0] and runs[2] == runs[0]
