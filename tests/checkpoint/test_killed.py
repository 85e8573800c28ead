"""kill -9 at any point of saving, publishing and pruning costs nothing that was saved before."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.checkpoint.runs import Run, metrics, running, write_config
from toolkit.checkpoint.manifest import discover, verify_files

STEPS = 60


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(write_config(folder, text, steps=STEPS), ranks=2)
    assert run.wait() == 0, run.text()
    return metrics(folder / "run")


def newest(checkpoints: Path) -> int:
    """Step of the newest complete checkpoint; every complete one is read through."""
    complete = [f for f in discover(checkpoints) if f.finished]
    for f in complete:
        assert f.manifest is not None, f.problem
        assert not verify_files(f.path, f.manifest.files)
    return max((f.step for f in complete), default=0)


# A chain of runs: each goes on from what the one before left and is killed a few changes later than that one.
# One save with its pruning is about 30 changes on rank 0 and 9 on rank 1, so each chain goes
# through two of them. Every test run takes every sixth change, the two ways of saving in turn;
# `make test-all` takes every third of each.
@pytest.mark.parametrize(
    ("rank", "points", "async_save"),
    [
        (0, range(1, 63, 6), False),
        (1, range(1, 22, 4), False),
        (0, range(4, 63, 6), True),
        *(
            pytest.param(*chain, marks=pytest.mark.all_cells)
            for chain in ((0, range(1, 63, 3), False), (1, range(1, 22, 2), False), (0, range(2, 63, 3), True))
        ),
    ],
)
def test_killed_while_saving(
    rank: int, points: range, async_save: bool, text: Path, tmp_path: Path, undisturbed: list[tuple[int, float, float]]
) -> None:
    config = write_config(tmp_path, text, steps=STEPS, every=1, keep=1, async_save=async_save)
    checkpoints, before = tmp_path / "run/checkpoints", 0
    for point in points:
        run = Run(config, ranks=2, killer=(rank, point))
        code = run.wait()
        assert code == -signal.SIGKILL, run.text()
        now = newest(checkpoints)
        assert now >= before, f"killed at change {point}: step {before} was complete before\n{run.text()}"
        before = now
    run = Run(config, ranks=2)
    assert run.wait() == 0, run.text()
    assert newest(checkpoints) == STEPS
    assert metrics(tmp_path / "run") == undisturbed
    assert not [p.name for p in checkpoints.iterdir() if p.name.startswith((".partial", ".deleted"))]
    assert len([f for f in discover(checkpoints) if f.finished]) == 1


def test_sigterm_saves_and_the_next_run_goes_on(text: Path, tmp_path: Path, undisturbed: list[tuple[int, float, float]]) -> None:
    config = write_config(tmp_path, text, steps=STEPS, every=100)
    log = tmp_path / "run/metrics.jsonl"
    with running(lambda: Run(config, "train.steps=100000", ranks=2)) as run:
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert all(p.is_alive() for p in run.processes), run.text()
            time.sleep(0.01)
        run.signal(signal.SIGTERM)
        assert run.wait() == 143, run.text()
    step = newest(tmp_path / "run/checkpoints")
    assert step == metrics(tmp_path / "run")[-1][0] > 0
