"""What the engine promises beyond parity: loss scaling, skipped steps, and what ZeRO keeps in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.parity.cells import Cell
from tests.pool import Pool
from tests.rank import Rank


def fp16_steps(raw: dict[str, Any]) -> list[tuple[float, float]]:
    """(loss scale before the step, gradient norm) of eight steps, in a worker."""
    rank = Rank(raw)
    found = []
    for step in range(8):
        rank.forward_backward(rank.micro(step))
        scale = rank.engine.loss_scale
        found.append((scale, float(rank.engine.finish())))
    return found


def test_fp16_scale_falls_until_steps_succeed_on_all_ranks_alike(pool: Pool) -> None:
    for stage in (0, 1, 2, 3):
        keys = {"train.precision": "fp16", "zero.stage": stage, "parallel.pp": 2}
        cell = Cell(2, keys | {"zero.deepspeed": {"fp16": {"initial_scale_power": 24, "hysteresis": 1}}})
        ranks = pool.run("tests.engine.test_zero:fp16_steps", 2, cell.raw(), deadline_s=120)
        assert ranks[0] == ranks[1], f"stage {stage}"
        scales, norms = zip(*ranks[0], strict=True)
        assert norms[0] == -1.0 and norms[-1] > 0, f"stage {stage}: {norms}"
        for i in range(7):
            assert scales[i + 1] == (scales[i] / 2 if norms[i] < 0 else scales[i]), f"stage {stage}"


def parameter_bytes(raw: dict[str, Any]) -> tuple[int, int]:
    """(elements this rank holds of ZeRO-3 parameters, elements of the whole stage), in a worker."""
    engine = Rank(raw).engine
    held = sum(p.numel() + p.ds_tensor.numel() for p in engine.module.parameters() if not p.ds_persist)
    whole = sum(p.ds_numel for p in engine.module.parameters() if not p.ds_persist)
    return held, whole


def test_zero3_holds_only_its_part(pool: Pool) -> None:
    cell = Cell(2, {"zero.stage": 3, "zero.deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}})
    for held, whole in pool.run("tests.engine.test_zero:parameter_bytes", 2, cell.raw(), deadline_s=120):
        assert whole / 2 <= held <= whole / 2 * 1.02


def broken_loss(raw: dict[str, Any]) -> tuple[float, list[bool]]:
    """Norm after a step whose loss is not finite on one rank, and whether each parameter stayed, in
    a worker.
    """
    here = Rank(raw)
    engine, rank = here.engine, here.world.rank
    before = [p.detach().clone() for p in engine.module.parameters()]
    if rank == 1:
        handle = engine.chunks[0].decoder.layers[0].register_forward_hook(lambda m, i, o: (o[0] * float("nan"), *o[1:]))
    here.forward_backward(here.micro(0))
    if rank == 1:
        handle.remove()
    norm = float(engine.finish())
    same = [torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True)]
    return norm, same


def test_no_rank_applies_a_step_that_is_not_finite_on_one(pool: Pool) -> None:
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2):
            for keys in ({"parallel.pp": 2}, {"parallel.tp": 2}, {}):
                cell = Cell(2, {**keys, "zero.stage": stage, "train.precision": precision})
                for norm, same in pool.run("tests.engine.test_zero:broken_loss", 2, cell.raw(), deadline_s=120):
                    assert norm == -1.0 and all(same), cell.id


def norms_of(square_sums: list[float]) -> list[float]:
    """Global norms of this rank's sums of squares, each rank with one more of it, in a worker."""
    from toolkit.engine.grads import global_norm

    return [float(global_norm(torch.tensor(s * (1 + torch.distributed.get_rank())))) for s in square_sums]


def test_a_norm_that_is_not_finite_is_marked_on_all_ranks(pool: Pool) -> None:
    expected = [3.0**0.5, 0.0, -1.0, -1.0]
    assert pool.run("tests.engine.test_zero:norms_of", 2, [1.0, 0.0, math.inf, math.nan], deadline_s=60) == [pytest.approx(expected)] * 2
