"""Many small rehearsals in few processes: each takes one after the other, so that importing and
warming up is paid once.

answers = rehearse_many([Task(cell, rank) …])       # in the order of the tasks
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.parity.cells import Cell
from tests.rehearse.inside import PLAYED, run_inside
from toolkit.cluster.environment import usable_cores

HARDWARE = "h100-80gb:8x1"


@dataclass(frozen=True)
class Task:
    """One rank of a cell. whole: with an evaluation and a save."""

    cell: Cell
    rank: int
    steps: int = 1
    whole: bool = True


def rehearse_many(tasks: Sequence[Task], *, timeout_s: float = 900.0) -> list[dict[str, Any]]:
    """Each task's answer, as toolkit.rehearse.rank.rehearse gives it, or with "error" and "trace"."""
    jobs = [{"config": config_of(t.cell), "world": t.cell.world, "rank": t.rank, "steps": t.steps, "whole": t.whole} for t in tasks]
    with tempfile.TemporaryDirectory(prefix="rehearse-many-") as folder:
        run_inside("tests.rehearse.many:share", {"jobs": jobs, "folder": folder}, timeout_s=timeout_s)
        return [json.loads((Path(folder) / f"{i}.json").read_text()) for i in range(len(jobs))]


def config_of(cell: Cell) -> dict[str, Any]:
    """The run's YAML; a rehearsal leaves model.compile out."""
    raw = cell.raw()
    raw["model"]["compile"] = False
    return raw


def share(argument: dict[str, Any]) -> None:
    """Within the stand-ins: the jobs by turns in as many forks as there are cores."""
    import toolkit.rehearse.rank  # noqa: F401  imported once for all, and before tests.pool tells DeepSpeed of the CPU

    gc.collect()
    gc.freeze()  # else each rehearsal's end walks through what the libraries hold
    count = min(usable_cores(), len(argument["jobs"]))
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            try:
                for i in range(number, len(argument["jobs"]), count):
                    answer = one(argument["jobs"][i], Path(argument["folder"]) / f"run-{i}")
                    (Path(argument["folder"]) / f"{i}.json").write_text(json.dumps(answer))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def one(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One rank, in a process that has rehearsed others before."""
    from tests.pool import _forget_world
    from toolkit.hardware.catalogue import parse_hardware
    from toolkit.rehearse.rank import rehearse

    os.environ.update(RANK=str(job["rank"]), WORLD_SIZE=str(job["world"]), LOCAL_RANK="0")
    try:
        return rehearse(
            job["config"],
            world=job["world"],
            rank=job["rank"],
            steps=job["steps"],
            device=PLAYED["device"],
            told=PLAYED["told"],
            hardware=parse_hardware(HARDWARE),
            folder=folder,
            whole=job["whole"],
        )
    except BaseException as error:
        return {"rank": job["rank"], "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    finally:
        PLAYED["told"].recorder = None
        _forget_world()
