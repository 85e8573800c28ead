"""A run over three hosts under random faults, every step compared with an uncut run:
`python -m tests.cluster.soak --minutes N`.

A fault strikes, the run recovers, the host is mended, the next fault follows. It ends with an error
at the first wrong loss or gradient norm, lost step beyond the promise, or hang; the seed makes the
order of faults again. `--write PAGE` puts what came of it between two marks of that page.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster.elastic import EVERY, Elastic, Taken, uncut, write_config
from tests.cluster.two_hosts import MORE_ADDRESSES, missing, two_hosts
from toolkit.runfolder.recoveries import Recovery

STEPS_A_MINUTE = 90  # about as many as a run takes that is struck again and again
LOST_AFTER_S = 5.0
WATCHDOG = "train.watchdog_s=3"
# most steps taken again, by how checkpoints are saved: beside a save that has not ended, steps go
# on until the next one is due
SAVES = {"checkpoint.async_save=false": EVERY, "checkpoint.async_save=true": 2 * EVERY - 1}
# at the learning rate of the other tests, sums in another order grow to more than the comparison
# allows within a thousand steps
LEARNING_RATE = 3.0e-5
BEYOND_START = ("detect", "tear down", "plan", "load", "first step")
BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"
HEAD = "| fault | times | detect, s | until the next step, without starting processes, s | steps lost, most |\n|---|---|---|---|---|\n"


def kill_rank(run: Elastic, host: str) -> None:
    for rank in run.ranks(host):
        rank.kill()


def kill_agent(run: Elastic, host: str) -> None:
    for process in run.processes(host, "toolkit.supervise.host"):
        process.kill()


def cut(run: Elastic, host: str) -> None:
    run.hosts.link(host, up=False)


def freeze_rank(run: Elastic, host: str) -> None:
    for rank in run.ranks(host):
        rank.send_signal(signal.SIGSTOP)


def freeze_host(run: Elastic, host: str) -> None:
    run.signal_all(host, signal.SIGSTOP)


def power_off(run: Elastic, host: str) -> None:
    run.power_off(host)


def kill_supervisor(run: Elastic, host: str) -> None:
    """The next one saves in the other way."""
    run.processes("host-a", "launch")[0].kill()
    run.process.wait(60)
    run.words = (next(way for way in SAVES if way not in run.words), *run.words[1:])
    run.start()


KINDS: tuple[Callable[[Elastic, str], None], ...] = (kill_rank, kill_agent, cut, freeze_rank, freeze_host, power_off, kill_supervisor)
ON_FIRST_HOST = (kill_rank, kill_agent, freeze_rank, kill_supervisor)  # the supervisor is there, and it cannot lose its own host


def mend(run: Elastic, host: str) -> None:
    """The host as it was; what was frozen on it goes on, and must do no harm."""
    run.signal_all(host, signal.SIGCONT)
    run.hosts.link(host, up=True)


@dataclass
class Outlived:
    """What came of the faults. recoveries: the first one after each fault, by its kind; steps:
    those compared with the uncut run.
    """

    recoveries: dict[str, list[Recovery]] = field(default_factory=lambda: defaultdict(list))
    starts: int = 0
    steps: int = 0

    @property
    def faults(self) -> int:
        return sum(map(len, self.recoveries.values()))

    def table(self, *, minutes: float, seed: int) -> str:
        """Markdown."""
        rows = [self._row(kind.replace("_", " "), found) for kind, found in sorted(self.recoveries.items())]
        said = f"{self.faults} faults (seed {seed}, {minutes:.0f} minutes), {self.starts} recoveries, {self.steps} steps compared"
        every = self._row("**all**", [r for found in self.recoveries.values() for r in found])
        return f"{said}: no wrong step, no hang, and\nnone lost beyond the promise.\n\n{HEAD}" + "\n".join([*rows, every])

    @staticmethod
    def _row(name: str, found: list[Recovery]) -> str:
        detect = [r.seconds["detect"] for r in found if "detect" in r.seconds]
        beyond = [sum(r.seconds.get(phase, 0.0) for phase in BEYOND_START) for r in found if "detect" in r.seconds]
        lost = max(r.steps_lost for r in found)
        return f"| {name} | {len(found)} | {_spread(detect)} | {_spread(beyond)} | {lost} |"


def _spread(seconds: list[float]) -> str:
    """Median, and the most; empty where nobody saw when it began."""
    return f"{statistics.median(seconds):.1f} (most {max(seconds):.1f})" if seconds else ""


def soak(run: Elastic, expected: dict[int, Taken], *, minutes: float, draw: random.Random) -> Outlived:
    """Strike the run again and again for so many minutes, or until it is almost done, and compare
    all its steps after every recovery.
    """
    outlived = Outlived()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and run.step < len(expected) - 6 * EVERY:
        run.wait_for_step(run.step + draw.randint(1, 2 * EVERY))
        host = draw.choice([host for host in MORE_ADDRESSES if run.ranks(host)] or ["host-a"])
        kind = draw.choice(ON_FIRST_HOST if host == "host-a" else KINDS)
        seen, most = len(run.recoveries), SAVES[run.words[0]]
        _say(f"step {run.step}: {kind.__name__} on {host}")
        with suppress(psutil.NoSuchProcess):
            kind(run, host)
        run.wait_for(lambda: len(run.recoveries) > seen, f"recovery from {kind.__name__}")  # noqa: B023
        mend(run, host)
        for recovery in run.recoveries[seen:]:
            assert recovery.steps_lost <= most, f"{recovery}\n{run.output}"
            _say(f"  {recovery.line()}")
        outlived.recoveries[kind.__name__].append(run.recoveries[seen])
        outlived.starts, outlived.steps = len(run.recoveries), run.step
        run.assert_equal(expected, through=outlived.steps)
    return outlived


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Soak for so many minutes; the exit code is 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if reason := missing():
        sys.stderr.write(f"{reason}\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        config = write_config(Path(folder), steps=max(100, round(STEPS_A_MINUTE * args.minutes)), lr=LEARNING_RATE)
        expected = uncut(config)
        (Path(folder) / "hosts").mkdir()
        with two_hosts(Path(folder) / "hosts", MORE_ADDRESSES) as hosts:
            run = Elastic(hosts, config, "soak", next(iter(SAVES)), WATCHDOG, "--min-nodes", "1", lost_after_s=LOST_AFTER_S)
            outlived = soak(run, expected, minutes=args.minutes, draw=random.Random(args.seed))
            hosts.kill_all()
            run.process.wait(60)
    table = outlived.table(minutes=args.minutes, seed=args.seed)
    _say(table)
    if args.write:
        before, rest = args.write.read_text(encoding="utf-8").split(BEGIN)
        args.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
