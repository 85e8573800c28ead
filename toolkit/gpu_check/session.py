"""Runs the list of checks within a budget: each has a deadline, one that hangs is ended with its
stacks, and the next ones go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import psutil

from toolkit.cluster.environment import cuda_defaults, rank_environment
from toolkit.gpu_check.checks import Check
from toolkit.gpu_check.setting import Setting
from toolkit.gpu_check.worker import EVENTS, write_setting

WORKER = "toolkit.gpu_check.worker"
LEAST_S = 20.0  # a check that has less than this left is not started: importing the libraries alone takes so long
STACKS_S = 5.0  # for a process that hangs to write its stacks
State = Literal["done", "skip", "error", "hang", "not started"]


@dataclass(kw_only=True)
class Outcome:
    """What became of one check. rows: as toolkit.gpu_check.rows.Row gives them; trace: of an error,
    or the stacks of a hang.
    """

    name: str
    title: str
    state: State
    seconds: float = 0.0
    note: str = ""
    trace: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """fail where a row or the check itself failed; skip where nothing was measured."""
        if self.state in ("error", "hang") or any(row["verdict"] == "fail" for row in self.rows):
            return "fail"
        return "skip" if self.state in ("skip", "not started") else "pass"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def run_checks(
    checks: Sequence[Check],
    setting: Setting,
    *,
    minutes: float,
    finished: Callable[[Outcome], None] = lambda outcome: None,
    started: Callable[[Check], None] = lambda check: None,
    worker: str = WORKER,
) -> list[Outcome]:
    """Run checks in their order for at most so many minutes; finished is called after each, so that
    nothing is lost when this ends.

    worker: the module whose main loop runs them, for tests of this one.
    """
    end = time.monotonic() + minutes * 60
    (setting.folder / "logs").mkdir(parents=True, exist_ok=True)
    write_setting(setting)
    outcomes, process = [], None
    try:
        for check in checks:
            left = end - time.monotonic()
            if left < LEAST_S:
                outcome = Outcome(name=check.name, title=check.title, state="not started", note=f"{minutes:g} minutes are over")
            else:
                started(check)
                if process is None or not process.suits(check):
                    if process is not None:
                        process.close()
                    process = Worker(setting, check, module=worker)
                outcome = process.run(check, seconds=min(check.seconds, left))
                if check.alone or process.process.poll() is not None:
                    process.close()
                    process = None
            outcomes.append(outcome)
            finished(outcome)
    finally:
        if process is not None:
            process.close()
    return outcomes


class Worker:
    """A process that runs checks which can share one."""

    def __init__(self, setting: Setting, check: Check, *, module: str) -> None:
        self.setting, self.environ, self.hidden = setting, check.environ, _hidden(setting, check)
        self.log = setting.folder / "logs" / f"{check.name}-worker.log"
        self.used = False
        environ = rank_environment(1) | cuda_defaults(tp=1, zero_stage=1) | {"PYTHONFAULTHANDLER": "1", "TOKENIZERS_PARALLELISM": "false"}
        environ |= {"CUDA_VISIBLE_DEVICES": "-1", "DS_ACCELERATOR": "cpu"} if self.hidden else {}
        environ |= check.environ
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", module, str(setting.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environ,
            )

    def suits(self, check: Check) -> bool:
        """Whether a check may run in this process."""
        return not check.alone and check.environ == self.environ and _hidden(self.setting, check) == self.hidden

    def run(self, check: Check, *, seconds: float) -> Outcome:
        """Run one check to its end or its deadline."""
        began, events = time.monotonic(), self.setting.folder / EVENTS
        events.touch()
        outcome = Outcome(name=check.name, title=check.title, state="error")
        with events.open() as file, contextlib.suppress(BrokenPipeError):
            file.seek(0, os.SEEK_END)
            assert self.process.stdin is not None
            self.process.stdin.write(f"{check.name}\n")
            self.process.stdin.flush()
            while not self._read(file.readline, outcome):
                if self.process.poll() is not None and not self._read(file.readline, outcome):
                    outcome.note = f"its process ended with exit code {self.process.returncode}"
                    outcome.trace = self._tail()
                    break
                if time.monotonic() - began > seconds:
                    outcome.state, outcome.note = "hang", f"not done after {seconds:.0f} s; its stacks are below"
                    self.abort()
                    outcome.trace = self._stacks()
                    break
                time.sleep(0.02)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _read(self, line_of: Callable[[], str], outcome: Outcome) -> bool:
        """Take in what the process has written; True once the check is over."""
        while (line := line_of()).endswith("\n"):
            event = json.loads(line)
            if event["check"] != outcome.name:
                continue
            if "row" in event:
                outcome.rows.append(event["row"])
            else:
                outcome.state, outcome.note, outcome.trace = event["end"], event["note"], event.get("trace", "")
                if outcome.state == "error":
                    self.process.wait()
                return True
        return False

    def abort(self) -> None:
        """End the process and all that it has started, each with its stacks in a log where it is Python."""
        everyone = _family(self.process.pid)
        for signum, seconds in ((signal.SIGABRT, STACKS_S), (signal.SIGKILL, STACKS_S)):
            for one in everyone:
                with contextlib.suppress(psutil.Error):
                    one.send_signal(signum)
            _, everyone = psutil.wait_procs(everyone, timeout=seconds)
        self.process.wait()

    def close(self) -> None:
        """Let it end by itself, as nothing more is asked of it; by force where it does not."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=STACKS_S)
        except subprocess.TimeoutExpired:
            self.abort()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def _stacks(self) -> str:
        """What the processes of this check have written when they were ended."""
        found = []
        for path in sorted(self.setting.folder.glob("logs/*.log")):
            text = path.read_text(errors="replace")
            at = text.find("Fatal Python error: Aborted")
            if at >= 0:
                found.append(f"{path.name}:\n{text[at : at + 3000]}")
        return "\n".join(found) or self._tail()


def _hidden(setting: Setting, check: Check) -> bool:
    """Whether the GPU is hidden from a check."""
    return setting.device == "cpu" or check.on_cpu


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, itself or through others."""
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.Error:
        return []
