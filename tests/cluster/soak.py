"""A run over three hosts under random faults, every step compared with an uncut run: `python -m tests.cluster.soak --minutes N`.

A fault strikes, the run recovers, the host is mended, the next fault follows. It ends with an error
at the first wrong loss, lost step beyond the promise, or hang; the seed makes the order of faults again.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.cluster.elastic import EVERY, Elastic, losses, uncut, write_config
from tests.cluster.two_hosts import MORE_ADDRESSES, missing, two_hosts

STEPS_A_MINUTE = 150  # more than a run takes that is struck again and again


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
    run.processes("host-a", "launch")[0].kill()
    run.process.wait(60)
    run.start()


KINDS: tuple[Callable[[Elastic, str], None], ...] = (kill_rank, kill_agent, cut, freeze_rank, freeze_host, power_off, kill_supervisor)
ON_FIRST_HOST = (kill_rank, kill_agent, freeze_rank, kill_supervisor)  # the supervisor is there, and it cannot lose its own host


def mend(run: Elastic, host: str) -> None:
    """The host as it was; what was frozen on it goes on, and must do no harm."""
    run.signal_all(host, signal.SIGCONT)
    run.hosts.link(host, up=True)


def main() -> int:
    """Soak for so many minutes; the exit code is 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if reason := missing():
        sys.stderr.write(f"{reason}\n")
        return 2
    draw = random.Random(args.seed)
    struck: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        config = write_config(Path(folder), steps=max(100, round(STEPS_A_MINUTE * args.minutes)))
        expected = uncut(config)
        (Path(folder) / "hosts").mkdir()
        with two_hosts(Path(folder) / "hosts", MORE_ADDRESSES) as hosts:
            run = Elastic(hosts, config, "soak", "--min-nodes", "1", lost_after_s=5)
            end = time.monotonic() + 60 * args.minutes
            while time.monotonic() < end:
                run.wait_for_step(run.step + draw.randint(1, 2 * EVERY))
                host = draw.choice(list(MORE_ADDRESSES))
                kind = draw.choice(ON_FIRST_HOST if host == "host-a" else KINDS)
                seen = len(run.recoveries)
                sys.stdout.write(f"step {run.step}: {kind.__name__} on {host}\n")
                sys.stdout.flush()
                with suppress(psutil.NoSuchProcess):
                    kind(run, host)
                struck[kind.__name__] += 1
                run.wait_for(lambda: len(run.recoveries) > seen, f"recovery from {kind.__name__}")  # noqa: B023
                mend(run, host)
                last = run.recoveries[-1]
                assert last.steps_lost <= EVERY, f"{last}\n{run.output}"
                sys.stdout.write(f"  {last.line()}\n")
                for step, loss in losses(run.run).items():
                    assert abs(loss - expected[step]) <= 2e-5 * expected[step], f"step {step}: {loss}, not {expected[step]}\n{run.output}"
            hosts.kill_all()
            run.process.wait(60)
            sys.stdout.write(f"{sum(struck.values())} faults outlived ({dict(struck)}), {run.step} steps compared\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
