"""The estimate of our own runs against live engines, part by part, over the parity grid."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parity import cells
from tests.parity.cells import Cell
from tests.pool import Pool

BOUND = 0.002  # of every part, and of the peak
PARTS = ("parameters", "gradients", "optimizer", "zero buffers", "activations", "logits")
SMALL = 64  # bytes of scalars and flags that no estimate counts
RESULTS = Path("build/memory.json")
# what differs between engines: each stage of ZeRO, pipelines and interleaving, both families, recompute, 16 bits, offload
ALWAYS = (
    "llama-tp2-sp-zero1",
    "llama-pp2-vpp2-zero2",
    "llama-pp2-dp2-zero3",
    "llama-dp4-zero2",
    "llama-tp2-dp2-sp-zero0-qknorm-recompute-full-fp16",
    "gpt-tp2-pp2-vpp2-sp-zero0-tied-recompute-full",
    "gpt-dp4-zero0-tied-recompute-selective-bf16",
    "llama-dp2-zero3-opt-cpu-param-cpu",
    "llama-pp2-vpp2-zero3-6-layers",
    "llama-dp2-zero2-overlap",
    "llama-muon-tp2-dp2-sp-zero1-qknorm",
    "llama-sgd-tp2-dp2-zero2",
    "llama-cp2-allgather-dp2-zero2-qknorm",
)


def bound(cell: Cell, part: str) -> float:
    """How far an estimate may be off. The exceptions are those that are known, and why."""
    if part == "activations" and cell.keys.get("train.recompute") == "full" and cell.keys.get("parallel.vpp", 1) > 1:
        return 0.015  # 1.1% and 1.3% too little with two stages of two chunks; nobody has found the tensor yet
    if part == "peak" and cell.keys.get("zero.stage", 1) < 2:
        # nothing as large as ZeRO-2's bucket stands beside what comes and goes within single operations, which is only estimated;
        # and on a busy machine a pipeline's messages arrive at other moments: -13.5% was seen once where -11% is usual
        return 0.2
    return BOUND


def grid() -> list[Cell]:
    """The parity cells whose tensors can be told apart: NVMe keeps states in files, and compiled code hides what it saves.

    hpZ under a pipeline is left out too: its first stages hold the second partition of weights that are kept whole anyway.
    """
    every = [*cells.llama(), *cells.cover(), *cells.extras(), *cells.context_cover(), *cells.long_context()]
    return [
        c
        for c in every
        if not c.uses("nvme") and not c.keys.get("model.compile") and not _hpz_pipeline(c) and not c.keys.get("train.offload_activations")
    ]


def _hpz_pipeline(cell: Cell) -> bool:
    return "zero.deepspeed" in cell.keys and cell.keys.get("parallel.pp", 1) > 1


def off(predicted: float, measured: float) -> float:
    """Relative difference, 0 where both are next to nothing."""
    return 0.0 if abs(predicted - measured) <= SMALL else predicted / measured - 1 if measured else float("inf")


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    yield found
    if found:
        RESULTS.parent.mkdir(exist_ok=True)
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(before | found, indent=1))


def _parameter(cell: Cell) -> Any:
    return pytest.param(cell, id=cell.id, marks=[] if cell.id in ALWAYS else [pytest.mark.all_cells])


@pytest.mark.parametrize("cell", [_parameter(c) for c in grid()])
def test_every_part_is_as_estimated(cell: Cell, pool: Pool, results: dict[str, Any], extension: Callable[[str], None]) -> None:
    if cell.uses("cpu"):
        extension("cpu_adam")
    ranks = pool.run("tests.cost.run:measure_cell", cell.world, {"config": cell.raw(), "follow": True}, deadline_s=180.0)
    found = {part: max((off(r["predicted"][part], r["measured"][part]) for r in ranks), key=abs) for part in (*PARTS, "peak")}
    results[cell.id] = {"ranks": cell.world, **found}
    assert all(r["measured"][part] > 0 for r in ranks for part in ("parameters", "gradients", "optimizer", "activations"))
    wrong = {part: f"{off_by:+.2%}" for part, off_by in found.items() if abs(off_by) > bound(cell, part)}
    assert not wrong, wrong


def test_always_run_cells_exist() -> None:
    assert set(ALWAYS) <= {cell.id for cell in grid()}


def test_a_forgotten_part_would_show(pool: Pool) -> None:
    """A second fp32 copy of the weights, as DeepSpeed keeps it behind its fragments, is outside the bound."""
    cell = next(c for c in grid() if c.id == "llama-tp2-sp-zero1")
    ranks = pool.run("tests.cost.run:measure_cell", cell.world, {"config": cell.raw(), "follow": True, "hoard": True}, deadline_s=180.0)
    assert all(r["measured"]["zero buffers"] > BOUND * r["measured"]["parameters"] for r in ranks)
    assert all(abs(off(r["predicted"]["zero buffers"], r["measured"]["zero buffers"])) > BOUND for r in ranks)
