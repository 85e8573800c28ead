"""The rehearsal held to reality: on device cpu it must give what a real run on CPU shows, byte for
byte and message for message.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.cost.test_own_engine_runs import grid
from tests.parity.cells import Cell
from tests.pool import Pool
from toolkit.config.load import parse_config
from toolkit.rehearse.match import expand
from toolkit.rehearse.session import Job, run

ALWAYS = ("llama-tp2-sp-zero1", "llama-pp2-vpp2-zero2", "llama-dp2-zero3", "gpt-dp2-zero0-recompute-full-bf16")
PARTS = ("parameters", "gradients", "optimizer", "zero buffers", "activations", "logits")


def cells() -> list[Cell]:
    """Cells without offload: DeepSpeed's optimizer on the CPU reads the tensors' memory."""
    small = Cell(2, {"model.family": "gpt", "zero.stage": 0, "train.recompute": "full", "train.precision": "bf16"})
    return [small, *(c for c in grid() if not c.uses("cpu"))]


@functools.cache
def rehearsed(ids: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """All ranks of the cells of these names, in one interpreter."""
    jobs = [(c, Job(config=parse_config(c.raw()), world=c.world, rank=r)) for c in cells() if c.id in ids for r in range(c.world)]
    answers = run([job for _, job in jobs], device="cpu")
    found: dict[str, list[dict[str, Any]]] = {}
    for (cell, _), answer in zip(jobs, answers, strict=True):
        found.setdefault(cell.id, []).append(answer)
    return found


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    """Rehearsals of the cells that this session was asked for, by their names."""
    here = [item.callspec for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return rehearsed(tuple(sorted({ALWAYS[0], *(spec.params["cell"].id for spec in here)})))


def _parameter(cell: Cell) -> Any:
    return pytest.param(cell, id=cell.id, marks=[] if cell.id in ALWAYS else [pytest.mark.all_cells])


@pytest.mark.parametrize("cell", [_parameter(c) for c in cells()])
def test_a_rehearsal_is_a_real_run_without_its_data(cell: Cell, pool: Pool, answers: dict[str, list[dict[str, Any]]]) -> None:
    real = pool.run("tests.rehearse.real:measure", cell.world, {"config": cell.raw()}, deadline_s=180.0)
    for seen, said in zip(real, answers[cell.id], strict=True):
        assert "error" not in said, said.get("trace")
        assert {p: said["parts"][p] for p in PARTS} == {p: seen["parts"][p] for p in PARTS}
        # gloo's thread lets go of a message's tensors a moment after the rank has waited for it,
        # now before and now after the peak
        held = max((nbytes for _, _, nbytes, *_ in seen["messages"]), default=0)
        assert said["allocated"] <= seen["peak"] <= said["allocated"] + held
        assert seen["peak"] == said["allocated"] or cell.world > 1
        groups = [list(expand(g)) for g in said["groups"]]
        messages = [[op, groups[group], nbytes, dtype, peer] for op, group, nbytes, dtype, peer, *_ in said["step"]["messages"]]
        assert messages == seen["messages"]
        assert messages or cell.world == 1


def test_always_run_cells_exist() -> None:
    assert set(ALWAYS) <= {c.id for c in cells()}


def test_a_difference_would_show(pool: Pool, answers: dict[str, list[dict[str, Any]]]) -> None:
    """Another micro-batch has other bytes."""
    cell = next(c for c in cells() if c.id == ALWAYS[0])
    raw = cell.raw()
    raw["train"]["micro_batch_size"] = 2
    real = pool.run("tests.rehearse.real:measure", cell.world, {"config": raw}, deadline_s=180.0)
    assert real[0]["peak"] != answers[cell.id][0]["allocated"]
