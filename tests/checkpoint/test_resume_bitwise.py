"""A run of the training program that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import loop
from tests.pool import Pool

STEPS, SAVED = 5, 3
FIGURES = ("step", "loss", "grad_norm", "lr", "tokens", "eval_loss", "loss_scale", "skipped")
TRAIN = "tests.loop:train"


def cell(world: int, stage: int, **keys: Any) -> tuple[int, dict[str, Any]]:
    return world, {"zero.stage": stage, "model.dropout": 0.1} | {k.replace("__", "."): v for k, v in keys.items()}


def name(c: tuple[int, dict[str, Any]]) -> str:
    return "-".join([f"{c[0]}ranks", *(f"{k.split('.')[1]}={v}" for k, v in c[1].items() if k not in ("model.dropout", "zero.deepspeed"))])


# the loss scale doubles after every second step: a resumed run must know it, and where between two
# doublings it is
MOVING_SCALE = {"fp16": {"initial_scale_power": 6, "loss_scale_window": 2}}
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
    cell(4, 3, parallel__pp=2, parallel__vpp=2, train__precision="fp16", model__tie_embeddings=True, zero__deepspeed=MOVING_SCALE),
    cell(2, 1, zero__offload_optimizer="cpu", train__precision="bf16"),
    cell(4, 2, parallel__pp=2, zero__offload_optimizer="cpu"),
    cell(2, 3, zero__offload_optimizer="cpu", zero__offload_param="cpu", train__precision="bf16"),
    cell(2, 2, data__document_mask=True, data__packing="best_fit", parallel__cp=2),
    cell(4, 3, parallel__cp=2, parallel__tp=2, parallel__cp_exchange="ulysses"),
    cell(2, 1, optimizer__name="muon", train__precision="bf16", model__num_layers=3),
    cell(4, 1, optimizer__name="muon", parallel__tp=2, parallel__pp=2, model__tie_embeddings=True),
    cell(2, 3, optimizer__name="sgd", train__precision="fp16"),
    cell(2, 3, zero__offload_optimizer="nvme", zero__offload_param="nvme"),
]


# each value that these have, another cell has at the same stage of ZeRO
SEEN_ELSEWHERE = [
    cell(2, 0, train__precision="bf16"),
    cell(4, 1, parallel__pp=2, parallel__vpp=2),
    cell(2, 2, train__precision="bf16"),
    cell(2, 3, train__precision="bf16"),
]


def _parameter(c: tuple[int, dict[str, Any]]) -> Any:
    rare = {"nvme", "ulysses"} & set(map(str, c[1].values())) or c in SEEN_ELSEWHERE
    return pytest.param(c, id=name(c), marks=[pytest.mark.all_cells] if rare else [])


def test_what_is_left_out_is_seen_elsewhere() -> None:
    values = [(c, {(c[1]["zero.stage"], k, str(v)) for k, v in c[1].items()}) for c in CELLS]
    always = set().union(*(v for c, v in values if c not in SEEN_ELSEWHERE))
    left = {v for c, found in values if c in SEEN_ELSEWHERE for v in found - always}
    assert left == {(0, "train.precision", "bf16"), (1, "parallel.vpp", "2")}, (
        "at stage 0 nothing is cut, and a chunk is saved as at stage 2"
    )


def figures(run: Path) -> list[dict[str, Any]]:
    """What a run's metrics say of its steps, without times and memory."""
    return [{k: line.get(k) for k in FIGURES} for line in loop.metrics(run)]


@pytest.mark.parametrize("c", [_parameter(c) for c in CELLS])
def test_resumed_equals_uninterrupted(
    c: tuple[int, dict[str, Any]], pool: Pool, documents: Path, tmp_path: Path, compiled: Callable[[dict[str, Any]], None]
) -> None:
    world, keys = c
    compiled(keys)
    keys = keys | {"train.steps": STEPS, "train.eval_every": 2, "train.eval_steps": 1, "checkpoint.every": SAVED}
    saved, last = (f"checkpoints/step-{step:08d}" for step in (SAVED, STEPS))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pool.run(TRAIN, world, loop.config_of(documents, whole, keys), deadline_s=300)
    shutil.copytree(whole / saved, resumed / saved)
    pool.run(TRAIN, world, loop.config_of(documents, resumed, keys | {"checkpoint.resume": "must"}), deadline_s=300)
    assert [f["step"] for f in figures(resumed)] == list(range(SAVED + 1, STEPS + 1))
    assert figures(resumed) == figures(whole)[SAVED:]
    one, two = loop.tensors(whole / last), loop.tensors(resumed / last)
    assert one.keys() == two.keys() and len(one) > 3 * world - 2
    assert not [key for key in one if one[key] != two[key]], "weights, moments and random generators"


def test_another_micro_batch_goes_on_with_the_same_samples(pool: Pool, documents: Path, tmp_path: Path) -> None:
    keys = {"zero.stage": 1, "train.micro_batch_size": 2, "train.steps": STEPS, "checkpoint.every": SAVED}
    pool.run(TRAIN, 2, loop.config_of(documents, tmp_path / "whole", keys), deadline_s=300)
    saved = f"checkpoints/step-{SAVED:08d}"
    shutil.copytree(tmp_path / "whole" / saved, tmp_path / "resumed" / saved)
    pool.run(TRAIN, 2, loop.config_of(documents, tmp_path / "resumed", keys | {"train.micro_batch_size": 4}), deadline_s=300)
    whole, resumed = figures(tmp_path / "whole"), figures(tmp_path / "resumed")
    assert [f["step"] for f in resumed] == [SAVED + 1, STEPS]
    assert [f["loss"] for f in resumed] == pytest.approx([f["loss"] for f in whole[SAVED:]], rel=1e-5)


def test_saving_changes_nothing(pool: Pool, documents: Path, tmp_path: Path) -> None:
    base = {"zero.stage": 3, "train.precision": "bf16", "model.dropout": 0.1, "train.steps": 3}
    ways = ({}, {"checkpoint.every": 1, "checkpoint.async_save": True}, {"checkpoint.every": 1, "checkpoint.async_save": False})
    runs = [tmp_path / str(i) for i in range(len(ways))]
    for run, way in zip(runs, ways, strict=True):
        pool.run(TRAIN, 2, loop.config_of(documents, run, base | way), deadline_s=300)
    assert figures(runs[1]) == figures(runs[0]) and figures(runs[2]) == figures(runs[0])
    assert loop.tensors(runs[1] / "checkpoints/step-00000003") == loop.tensors(runs[2] / "checkpoints/step-00000003")
