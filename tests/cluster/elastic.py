"""An elastic run over three hosts: started, watched from outside, and compared with a run that
nothing has disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

from tests.cluster.two_hosts import TwoHosts
from toolkit.cluster.launch import run_local
from toolkit.runfolder.recoveries import Recovery, read_recoveries

SEED = 7
EVERY = 10  # steps between checkpoints
LOST_AFTER_S = 20  # a busy machine must not lose a host that is there
CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "family": "llama",
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 32,
    },
    "zero": {"stage": 1},
    "train": {"global_batch_size": 12, "micro_batch_size": 4, "seq_length": 32, "precision": "fp32", "watchdog_s": 10},
    "data": {"tokenizer": "bytes", "workers": 0},
    "checkpoint": {"every": EVERY},
}


def write_config(folder: Path, *, steps: int, lr: float = 1.0e-3) -> Path:
    """The run's YAML and its text, in a folder that all hosts see."""
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}, and a line follows a line.\n" for i in range(20000)))
    data = {**CONFIG["data"], "source": str(folder / "text.txt"), "cache_dir": str(folder / "data")}
    train = {**CONFIG["train"], "steps": steps}
    path = folder / "run.yaml"
    optimizer = {"lr": lr, "schedule": "constant"}
    path.write_text(
        yaml.safe_dump(
            {**CONFIG, "train": train, "optimizer": optimizer, "data": data, "run": {"dir": str(folder / "uncut"), "seed": SEED}}
        )
    )
    return path


def uncut(config: Path) -> dict[int, Taken]:
    """Every step of the run in one process."""
    words = ["checkpoint.every=0", "train.watchdog_s=0", "log.every=1000"]
    assert run_local(config, words, num_procs=1, environ={**os.environ, "OMP_NUM_THREADS": "1"}) == 0
    return steps_of(config.parent / "uncut")


def steps_of(run: Path) -> dict[int, Taken]:
    """What a run has written of each step."""
    found = {}
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):  # a line that is being written
                record = json.loads(line)
                found[record["step"]] = Taken(record["loss"], record["grad_norm"])
    return found


class Taken(NamedTuple):
    """A step as the run's metrics have it."""

    loss: float
    grad_norm: float

    def is_that_of(self, other: Taken) -> bool:
        """Whether it is the same step, computed by other ranks: sums in another order differ in
        their last bits.
        """
        return self.loss == pytest.approx(other.loss, rel=2e-5) and self.grad_norm == pytest.approx(other.grad_norm, rel=2e-4)


class Elastic:
    """One run under a supervisor on host-a."""

    def __init__(self, hosts: TwoHosts, config: Path, name: str, *words: str, lost_after_s: float = LOST_AFTER_S) -> None:
        self.hosts, self.config, self.run = hosts, config, config.parent / name
        self.words, self.lost_after_s = words, lost_after_s
        self.log = config.parent / f"{name}.log"
        self.start()

    def start(self, host: str = "host-a") -> None:
        """Start the supervisor, or start it again."""
        command = [
            sys.executable,
            "-m",
            "toolkit.cli",
            "launch",
            str(self.config),
            f"run.dir={self.run}",
            "--hostfile",
            str(self.hosts.hostfile),
        ]
        command += ["--elastic", "--lost-after", str(self.lost_after_s), *self.words]
        inside = ["nsenter", "--target", str(self.hosts.pids[host]), "--mount", "--uts", "--net", "--pid", "--wd=/", *command]
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                inside, env=self.hosts.environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def step(self) -> int:
        return max(steps_of(self.run), default=0)

    def wait_for(self, happened: Callable[[], Any], what: str, *, deadline_s: float = 240, look_every_s: float = 0.02) -> None:
        """Return once something has happened; fail where the run ends before it, or the deadline passes."""
        end = time.monotonic() + deadline_s
        while not happened():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output}"
            assert time.monotonic() < end, f"no {what} within {deadline_s} s:\n{self.output}"
            time.sleep(look_every_s)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step >= step, f"step {step}")

    def finish(self, *, deadline_s: float = 300) -> int:
        """The exit code."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.hosts.kill_all()
            self.process.kill()
            raise AssertionError(f"the run did not end within {deadline_s} s:\n{self.output}") from None

    @property
    def recoveries(self) -> Sequence[Recovery]:
        return read_recoveries(self.run)

    def assert_equal(self, expected: Mapping[int, Taken], *, through: int | None = None) -> None:
        """Every step of the run, or those up to one, once, with loss and gradient norm of an uncut run."""
        found = {step: taken for step, taken in steps_of(self.run).items() if through is None or step <= through}
        assert sorted(found) == sorted(expected)[:through], self.output
        for step, taken in found.items():
            assert taken.is_that_of(expected[step]), f"step {step}: {taken}, not {expected[step]}\n{self.output}"

    # what can be done to it

    def processes(self, host: str, word: str) -> list[psutil.Process]:
        found = []
        for process in self.hosts.processes(host):
            with suppress(psutil.Error):
                if word in process.cmdline():
                    found.append(process)
        return found

    def ranks(self, host: str) -> list[psutil.Process]:
        return self.processes(host, "toolkit.supervise.rank")

    def signal_all(self, host: str, number: int) -> None:
        """To everything on a host, its sshd too."""
        for process in [*self.hosts.processes(host), psutil.Process(self.hosts.pids[host])]:
            with suppress(psutil.Error):
                os.kill(process.pid, number)

    def power_off(self, host: str) -> None:
        """A host is gone: its cable first, since a dead host says no goodbye, then all that runs on it."""
        self.hosts.link(host, up=False)
        for process in self.hosts.processes(host):
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
