"""Start a rehearsal and collect its ranks' answers: pure, since the interpreter that rehearses is a
process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.cluster.environment import usable_cores
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError, LayoutError, ToolkitError
from toolkit.hardware.catalogue import Hardware
from toolkit.parallel.layout import Coordinates, Layout
from toolkit.parallel.rules import check
from toolkit.rehearse import guard

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of all that is done."""


class RehearsalError(ToolkitError):
    """The program failed in a rehearsal as it would on the cluster, or the rehearsal cannot play
    what it asks for.
    """

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank of one run. whole: with an evaluation and a save after its steps."""

    config: RunConfig
    world: int
    rank: int
    steps: int = 2
    hardware: str | None = None
    hardware_file: Path | None = None
    whole: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "config": json.loads(self.config.model_dump_json()),
            "world": self.world,
            "rank": self.rank,
            "steps": self.steps,
            "hardware": self.hardware,
            "whole": self.whole,
            "hardware_file": str(self.hardware_file) if self.hardware_file else None,
        }


def prepare(config: RunConfig, hardware: Hardware) -> tuple[RunConfig, Layout]:
    """The config as it is rehearsed: nothing is read, saved, logged or compiled; LayoutError where
    the rules or a rehearsal refuse it.
    """
    changed = config.model_copy(deep=True)
    layout = check(changed, hardware.count, machine=hardware.machine)
    if changed.model.impl == "te":
        raise LayoutError(
            "model.impl=te cannot be rehearsed", why="Transformer Engine's kernels exist only on a GPU", fix="Set model.impl=local."
        )
    if changed.model.vocab_size is None:
        changed.model.vocab_size = changed.model.spec.rows  # only the tokenizer knows it: the multiple it is padded to
    changed.model.compile = False
    changed.log.tensorboard = changed.log.wandb = changed.log.csv = False
    changed.checkpoint.every, changed.checkpoint.resume, changed.checkpoint.init_from = 0, "never", None
    return changed, layout


def choose_ranks(text: str, layout: Layout, *, worst: Callable[[], int]) -> list[int]:
    """Ranks that `--ranks` names: stages (one of each stage), worst (of the stage that needs most
    memory), all, or their numbers.
    """
    if text == "stages":
        return [layout.rank(Coordinates(tp=0, cp=0, dp=0, pp=stage)) for stage in range(layout.pp)]
    if text == "worst":
        return [layout.rank(Coordinates(tp=0, cp=0, dp=0, pp=worst()))]
    if text == "all":
        return list(range(layout.world_size))
    try:
        ranks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--ranks {text!r} names no ranks", fix="Use stages, worst, all, or numbers such as 0,17.") from None
    beyond = [r for r in ranks if not 0 <= r < layout.world_size]
    if beyond:
        raise ConfigError(
            f"--ranks names rank {beyond[0]}", why=f"the run has {layout.world_size}", fix="Use numbers from 0 on below that."
        )
    return ranks


def run(
    jobs: Sequence[Job],
    *,
    device: str = "cuda",
    processes: int | None = None,
    progress: Progress = lambda phase, share: None,
    answered: Callable[[int, dict[str, Any]], None] = lambda number, answer: None,
) -> list[dict[str, Any]]:
    """The answers of all jobs in their order, each as toolkit.rehearse.rank.rehearse gives it, or
    with "error" and "trace".

    answered: called with a job's number and its answer as soon as it is there.
    """
    if device == "cuda":
        progress("compiling the stand-in for a GPU, once", 0.0)
        guard.ensure()
    with tempfile.TemporaryDirectory(prefix="toolkit-rehearse-") as name:
        folder = Path(name)
        order = {"device": device, "processes": processes or usable_cores(), "jobs": [job.as_json() for job in jobs]}
        (folder / "jobs.json").write_text(json.dumps(order))
        shares = [0.0] * len(jobs)
        progress("starting", 0.0)
        with (folder / "log").open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "toolkit.rehearse", name], stdout=subprocess.PIPE, stderr=log, text=True, cwd=name
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if not line.startswith('{"job"'):
                        continue  # a library's own words
                    said = json.loads(line)
                    shares[said["job"]] = 1.0 if said.get("done") else said["share"]
                    what = "done" if said.get("done") else said["phase"]
                    if said.get("done"):
                        answered(said["job"], json.loads((folder / f"{said['job']}.json").read_text()))
                    progress(f"rank {jobs[said['job']].rank}: {what}", sum(shares) / len(jobs))
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            log.seek(0)
            text = log.read()
        if code != 0:
            raise RehearsalError(
                "the rehearsal could not start",
                why=" ".join(text.strip().splitlines()[-1:])[:400],
                fix="Where torch or DeepSpeed have changed within, use the versions of constraints.txt.",
            )
        return [json.loads((folder / f"{i}.json").read_text()) for i in range(len(jobs))]


def refuse_errors(answers: Sequence[dict[str, Any]]) -> None:
    """Raise RehearsalError for the first rank that failed, with the line of the program where it did."""
    for answer in answers:
        if "error" not in answer:
            continue
        lines = [line.strip() for line in answer.get("trace", "").splitlines() if line.strip().startswith("File")]
        own = [line for line in lines if "/rehearse/" not in line and "/torch/" not in line] or lines
        raise RehearsalError(
            f"rank {answer['rank']} failed in the rehearsal",
            why=f"{answer['error'].splitlines()[0][:400]}" + (f" ({own[-1]})" if own else ""),
            fix="An error of the program would also end the run on GPUs; otherwise the stand-ins lack something: docs/rehearsal.md.",
        )
