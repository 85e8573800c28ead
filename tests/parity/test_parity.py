"""Losses and gradient norms do not depend on how a run was sharded."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parity import cells
from tests.parity.cells import BOUNDS, Cell
from tests.pool import Pool

RUN = "tests.parity.run:run_cell"
DEADLINE_S = 180.0
RESULTS = Path("build/parity.json")
# A step costs most of a cell's time. What a layout gets wrong shows in the first ones, and 16 bits
# have taken an update after these; `make test-all` and `make parity` take cells.STEPS, which is
# what docs/parity.md shows.
FEW_STEPS = 8


class Suite:
    """Runs cells in the pool, keeps the single-process runs, and notes how far each cell was off."""

    def __init__(self, pool: Pool, nvme: str, *, steps: int) -> None:
        self.pool, self.nvme, self.steps = pool, nvme, steps
        self.references: dict[str, dict[str, Any]] = {}
        self.worst: dict[str, dict[str, Any]] = {}

    def run(self, cell: Cell, *, mutation: str = "") -> list[dict[str, Any]]:
        raw = cell.raw(nvme=self.nvme)
        raw["train"]["steps"] = self.steps
        return self.pool.run(RUN, cell.world, {"config": raw, "mutation": mutation}, deadline_s=DEADLINE_S)

    def reference(self, cell: Cell) -> dict[str, Any]:
        key = json.dumps(cell.reference.keys, sort_keys=True)
        if key not in self.references:
            self.references[key] = self.run(cell.reference)[0]
        return self.references[key]

    def difference(self, cell: Cell, ranks: list[dict[str, Any]]) -> tuple[float, float]:
        """Worst relative difference over all steps, of the loss and of the gradient norm."""
        one = self.reference(cell)
        assert len(one["losses"]) == self.steps and min(one["norms"]) > 0
        return _relative(ranks[0]["losses"], one["losses"]), _relative(ranks[0]["norms"], one["norms"])


def _relative(found: list[float], expected: list[float]) -> float:
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def differing_replicas(ranks: list[dict[str, Any]]) -> list[str]:
    """Names of values that two ranks hold with different bits."""
    seen: dict[str, set[str]] = defaultdict(set)
    for rank in ranks:
        for name, digest in rank["digests"].items():
            seen[name].add(digest)
    return [name for name, found in seen.items() if len(found) > 1]


@pytest.fixture(scope="module")
def suite(pool: Pool, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Suite]:
    whole = pytestconfig.option.all_cells
    s = Suite(pool, str(tmp_path_factory.mktemp("nvme")), steps=cells.STEPS if whole else FEW_STEPS)
    yield s
    if s.worst and whole:
        RESULTS.parent.mkdir(exist_ok=True)
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept = before["cells"] if before.get("versions") == _versions() else {}  # a run of some cells renews their rows
        RESULTS.write_text(json.dumps({"versions": _versions(), "cells": kept | s.worst}, indent=1))


@pytest.fixture(scope="module")
def long_suite(pool: Pool) -> Suite:
    """For faults that take more steps to show."""
    return Suite(pool, "", steps=cells.STEPS)


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version()} | {p: version(p) for p in ("torch", "megatron-core", "deepspeed")}


def _parameters() -> list[Any]:
    """Each cell of the grid once; what is not among those of every test run is left to `make parity`."""
    default = {c.id for c in cells.always()}
    every = {c.id: c for c in (*cells.llama(), *cells.extras(), *cells.context(), *cells.long_context(), *cells.always())}
    return [pytest.param(c, id=c.id, marks=[] if c.id in default else [pytest.mark.all_cells]) for c in every.values()]


def test_the_default_cells_cover() -> None:
    """Every value of every feature, and every pair of a ZeRO stage and a value, that the grid has
    runs in every test run.
    """
    grid = [c for c in (*cells.llama(), *cells.cover(), *cells.extras(), *cells.families()) if not c.uses("nvme")]
    covered = set().union(*(cells.pairs(c) for c in cells.always()))
    missing = set().union(*(cells.pairs(c) for c in grid)) - covered
    assert not missing, missing
    shared = [c for c in cells.context_cover() if c.keys["parallel.cp"] > 1]
    seen = set().union(*(c.features | {("exchange", c.keys["parallel.cp_exchange"])} for c in shared))
    grid = cells.context()
    wanted = set().union(*(c.features | {("exchange", c.keys["parallel.cp_exchange"])} for c in grid))
    assert not wanted - seen, "each value alone; with each other they are left to `make parity`"
    tied = {("stage", 3), ("pp", 2), ("tied", True), ("optimizer", "none"), ("param", "none"), ("vpp", 1)}
    assert any(tied <= c.features for c in cells.always()), "ZeRO-3 x PP x tied without offload"


@pytest.mark.parametrize("cell", _parameters())
def test_same_as_one_process(cell: Cell, suite: Suite, extension: Callable[[str], None]) -> None:
    if cell.uses("cpu") or cell.uses("nvme"):
        extension("cpu_adam")
    if cell.uses("nvme"):
        extension("async_io")
    started = time.perf_counter()
    ranks = suite.run(cell)
    seconds = time.perf_counter() - started
    loss, norm = suite.difference(cell, ranks)
    suite.worst[cell.id] = {"ranks": cell.world, "precision": cell.precision, "loss": loss, "norm": norm, "seconds": round(seconds, 1)}
    most_loss, most_norm = BOUNDS[cell.precision]
    assert loss <= most_loss and norm <= most_norm, f"loss off by {loss:.1e}, norm by {norm:.1e}"
    assert not differing_replicas(ranks)


MUTATIONS = [
    ("drop_sequence_parallel_sum", Cell(2, {"parallel.tp": 2, "parallel.sequence_parallel": True, "zero.stage": 1})),
    ("divide_twice", Cell(2, {"parallel.pp": 2, "zero.stage": 1})),
    ("count_replicas_twice", Cell(2, {"parallel.tp": 2, "zero.stage": 1})),
    ("count_replicas_twice", Cell(2, {"parallel.tp": 2, "zero.stage": 3})),
    ("adamw_for_muon", Cell(2, cells.MUON | {"parallel.tp": 2, "zero.stage": 1})),
    ("orthogonalise_pieces", Cell(2, cells.MUON | cells.CUT_MATRICES)),
    ("orthogonalise_shards", Cell(2, cells.MUON | {"parallel.tp": 2, "zero.stage": 1})),
    ("forget_tied_sum", Cell(2, {"parallel.pp": 2, "zero.stage": 1, "model.tie_embeddings": True})),
]


@pytest.mark.parametrize(("mutation", "cell"), [pytest.param(m, c, id=f"{m}-{c.id}") for m, c in MUTATIONS])
def test_a_fault_turns_it_red(mutation: str, cell: Cell, long_suite: Suite) -> None:
    loss, norm = long_suite.difference(cell, ranks := long_suite.run(cell, mutation=mutation))
    most_loss, most_norm = BOUNDS[cell.precision]
    assert loss > most_loss or norm > most_norm or differing_replicas(ranks)


def test_a_hang_is_a_failure_with_stacks(pool: Pool) -> None:
    from tests.pool import CellFailed

    pool.run("builtins:bool", 2, None, deadline_s=180.0)  # workers that still start would have another stack to show
    with pytest.raises(CellFailed, match=r"(?s)no answer within.*sleep_on_rank_1"):
        pool.run("tests.parity.run:sleep_on_rank_1", 2, None, deadline_s=15.0)
