"""The scripts of examples/ run over two ranks, do what they say, and are short."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = "tests.trainer.run:script"


class Ran:
    """Runs a script on two ranks of the pool, on the tests' own text."""

    def __init__(self, pool: Pool, folder: Path, text: Path) -> None:
        self.pool, self.folder = pool, folder
        self.data = [f"data.source={text}", f"data.cache_dir={text.parent / 'data'}", "data.workers=0", "optimizer.warmup_steps=0"]

    def __call__(self, script: str, *overrides: str, data: bool = True) -> list[str]:
        """What each rank printed."""
        argument = {"script": script, "folder": str(self.folder), "overrides": [*(self.data if data else ()), *overrides]}
        return self.pool.run(RUN, 2, argument, deadline_s=180)

    def metrics(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def ran(pool: Pool, tmp_path: Path, text: Path) -> Ran:
    return Ran(pool, tmp_path, text)


def test_every_example_is_short_and_tested() -> None:
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert f'"{path.name}"' in tests, path.name


def test_z_loss(ran: Ran) -> None:
    first, second = ran("z_loss.py", "train.steps=2", "train.eval_every=0")
    assert "step   2/2" in first or "step 2/2" in first
    assert second == ""
    assert len(ran.metrics("z-loss")) == 2


def test_research_optimizer(ran: Ran) -> None:
    """It goes on from a checkpoint on another layout, with the momentum that it had."""
    same = ("train.steps=4", "train.eval_every=0", "train.precision=fp32", "optimizer.schedule=constant")
    ran("research_optimizer.py", *same, "checkpoint.every=2", "zero.stage=3", "parallel.tp=1", "parallel.pp=1")
    whole = [r["loss"] for r in ran.metrics("lion")]
    shutil.rmtree(ran.folder / "runs/lion/checkpoints/step-00000004")
    first, _ = ran("research_optimizer.py", *same, "checkpoint.every=2", "zero.stage=1", "parallel.tp=2", "parallel.pp=1")
    assert "resharding on the fly" in first
    assert [r["step"] for r in ran.metrics("lion")] == [1, 2, 3, 4]
    assert [r["loss"] for r in ran.metrics("lion")] == pytest.approx(whole, rel=1e-4)


def test_own_dataset(ran: Ran) -> None:
    first, _ = ran("own_dataset.py", "data.workers=0", data=False)
    assert "data: counting, version 1, shuffled" in first
    records = ran.metrics("own-dataset")
    assert len(records) == 30 and records[-1]["loss"] < records[0]["loss"] - 1.0


def test_early_stop(ran: Ran) -> None:
    """A learning rate of 0 improves nothing: evaluations after steps 2, 4 and 6, and the end is
    agreed on in step 7.
    """
    first, _ = ran("early_stop.py", "optimizer.lr=0", "optimizer.min_lr=0", "train.eval_every=2", "train.eval_steps=1")
    assert re.search(r"stopped after step 7, as the hook EarlyStop: no evaluation below .* for 2 times asked", first), first
    records = ran.metrics("early-stop")
    assert len(records) == 7
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"])) for r in records)
    assert "| perplexity " in first


def test_sweep(ran: Ran) -> None:
    first, second = ran("sweep.py", "train.steps=3")
    table = first[first.index("learning rate") :].splitlines()[1:]
    assert len(table) == 4 and "learning rate" not in second
    losses = [float(line.split()[1]) for line in table]
    assert losses == sorted(losses)
    alone, _ = ran("sweep.py", "train.steps=3", "run.seed=1234")  # again, in new runs' place: nothing is left of the first time
    assert alone[alone.index("learning rate") :].splitlines()[1:] == table
