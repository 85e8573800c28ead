"""`toolkit tune --trials`: run the best plans for a few steps here, each a process group of its own, and keep every result."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil

from toolkit.cluster.environment import gpu_count
from toolkit.cluster.launch import end_with_parent
from toolkit.config.explain import validate
from toolkit.config.load import dump_config
from toolkit.config.schema import RunConfig
from toolkit.errors import MachineError
from toolkit.files import write_durably
from toolkit.hardware.catalogue import Hardware
from toolkit.plan.reasons import layout_words
from toolkit.plan.search import Plan
from toolkit.plan.tune import Question, planned
from toolkit.runfolder.metrics import after_warm_up, read_metrics

log = logging.getLogger("toolkit.tune")

Status = Literal["ran", "out of memory", "failed", "timed out"]

OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "Cannot allocate memory", "DefaultCPUAllocator: can't allocate")
GRACE_S = 15.0  # after SIGTERM, before SIGKILL
QUIET: dict[str, dict[str, Any]] = {
    "checkpoint": {"every": 0, "resume": "never", "init_from": None},
    "optimizer": {"warmup_steps": 0, "decay_steps": None},
    "log": {"every": 1, "tensorboard": False, "wandb": False, "csv": False},
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a plan went: median seconds a step after warm-up and peak memory (GiB, as metrics.jsonl counts it), or why there are none."""

    plan: Plan
    status: Status
    folder: Path
    step_s: float | None = None
    memory_gib: float | None = None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """What result.json holds."""
        return {
            "status": self.status,
            "step_s": self.step_s,
            "memory_gib": self.memory_gib,
            "reason": self.reason,
            "folder": str(self.folder),
            "predicted_step_s": self.plan.time.step,
        }


def check_machine(hardware: Hardware, plans: Sequence[Plan]) -> None:
    """Refuse trials that this machine cannot run: MachineError for more GPUs than it has, or for CPU trials beside GPUs."""
    here, most = gpu_count(), max(plan.gpus for plan in plans)
    if hardware.gpu.accelerator and most > here:
        raise MachineError(
            f"--trials needs {most} GPUs on this machine, which has {here}",
            why="a trial runs here",
            fix="Start it on a machine of that size, or name this one with --hardware.",
        )
    if not hardware.gpu.accelerator and here:
        raise MachineError(
            f"--trials on {hardware.gpu.name} would run on this machine's {here} GPUs",
            fix='Name them with --hardware, or hide them with CUDA_VISIBLE_DEVICES="".',
        )


def run_trials(question: Question, plans: Sequence[Plan], folder: Path, *, steps: int = 5, deadline_s: float = 600.0) -> list[Trial]:
    """Run each plan for a few steps and return them by measured step time, those that did not run last.

    A trial is a folder named by its config: run.yaml, log.txt, the run folder and, written last, result.json. One with a result is
    not run again. deadline_s: seconds after which a trial is ended. An interrupt ends the running trial and keeps the results so far.
    """
    check_machine(question.hardware, plans)
    trials = []
    for number, plan in enumerate(plans, start=1):
        config, place = trial_config(question.config, plan, folder, steps=steps)
        trial = read_trial(plan, place)
        if trial is None:
            log.info("trial %d of %d: %s", number, len(plans), layout_words(plan.workload))
            trial = _run(plan, config, place, deadline_s=deadline_s)
            write_durably(place / "result.json", json.dumps(trial.as_json(), indent=1) + "\n")
        said = f"{trial.step_s:.3g} s a step, {plan.time.step:.3g} s predicted" if trial.step_s else trial.reason
        log.info("trial %d of %d: %s, %s", number, len(plans), trial.status, said)
        trials.append(trial)
    return sorted(trials, key=lambda t: (t.step_s is None, t.step_s))


def trial_config(config: RunConfig, plan: Plan, folder: Path, *, steps: int) -> tuple[RunConfig, Path]:
    """A plan's config cut down to a few steps without evaluation, checkpoints and monitors, and the folder of its trial."""
    tuned = planned(config, plan)
    raw = tuned.model_dump() | {"data": tuned.data.model_dump(exclude_unset=True)}
    raw["train"] |= {"steps": steps, "eval_every": 0, "eval_steps": 0}
    for section, settings in QUIET.items():
        raw[section] |= settings
    name = hashlib.sha256(f"{plan.gpus} {json.dumps(raw | {'run': raw['run']['seed']}, sort_keys=True, default=str)}".encode()).hexdigest()[
        :12
    ]
    place = folder / name
    raw["data"]["cache_dir"] = config.data.cache_dir or config.run.dir.parent / "data"  # one for all trials
    raw["run"]["dir"] = place / "run"
    return validate(raw), place


def read_trial(plan: Plan, place: Path) -> Trial | None:
    """A trial's stored result; None where there is none that can be read."""
    try:
        stored = json.loads((place / "result.json").read_text(encoding="utf-8"))
        return Trial(
            plan=plan,
            folder=place,
            status=stored["status"],
            step_s=stored["step_s"],
            memory_gib=stored["memory_gib"],
            reason=stored["reason"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _run(plan: Plan, config: RunConfig, place: Path, *, deadline_s: float) -> Trial:
    place.mkdir(parents=True, exist_ok=True)
    (place / "run" / "metrics.jsonl").unlink(missing_ok=True)  # of a trial that was cut off
    write_durably(place / "run.yaml", dump_config(config, open_data=True))
    command = [sys.executable, "-m", "toolkit.cli", "train", str(place / "run.yaml"), "--num-procs", str(plan.gpus)]
    with (place / "log.txt").open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        try:
            code: int | None = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also where tune itself is interrupted
            _end(process)
    return judge(plan, place, code, deadline_s=deadline_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a trial's whole tree of processes: asked first, then killed."""
    if process.poll() is not None:
        return
    tree = [process]
    with suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]  # type: ignore[list-item]
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def judge(plan: Plan, place: Path, code: int | None, *, deadline_s: float) -> Trial:
    """A finished trial's result from its exit code (null: ended at the deadline), its log and its metrics."""
    records = read_metrics(place / "run")
    if code == 0 and records:
        timed_records = after_warm_up(records)
        return Trial(
            plan=plan,
            folder=place,
            status="ran",
            step_s=median(r["step_s"] for r in timed_records),
            memory_gib=max(r["memory_gib"] for r in records),
        )
    text = (place / "log.txt").read_text(encoding="utf-8", errors="replace") if (place / "log.txt").exists() else ""
    if code is None:
        return Trial(plan=plan, folder=place, status="timed out", reason=f"ended after {deadline_s:g} s in step {len(records) + 1}")
    status: Status = "out of memory" if any(words in text for words in OUT_OF_MEMORY) else "failed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("error")), None)
    told = told or next((line for line in lines if any(words in line for words in OUT_OF_MEMORY)), lines[-1] if lines else "no output")
    return Trial(plan=plan, folder=place, status=status, reason=f"exit code {code}: {told[:300]} ({place / 'log.txt'})")
