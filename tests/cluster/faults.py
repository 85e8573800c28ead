"""The faults that an elastic run outlives, as data: what is done to it, and what must come of it.

Each is a test (test_faults.py) and a row of docs/reliability.md (reliability.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from tests.cluster.elastic import EVERY, Elastic
from tests.cluster.two_hosts import MORE_ADDRESSES, REPOSITORY, TwoHosts

AT = 25  # the step at which a fault strikes: half-way between two checkpoints


@dataclass(frozen=True, kw_only=True)
class Fault:
    """id: of the test; title: the row's first cell; strike: does it to a run; says: a pattern of
    what the user then sees.

    words: options of the run beside the usual ones; before: done to the hosts before the start,
    returns what undoes it; code: the exit code;
    lost_steps: most that may be taken again; recoveries: starts after the first, at least; default:
    whether `make test` has it.
    """

    id: str
    title: str
    strike: Callable[[Elastic], None]
    says: str
    words: tuple[str, ...] = ()
    before: Callable[[TwoHosts], Callable[[], None]] | None = None
    code: int = 0
    lost_steps: int = EVERY
    recoveries: int = 1
    default: bool = False


def kill_rank(run: Elastic) -> None:
    run.wait_for_step(AT)
    run.ranks("host-b")[0].kill()


def kill_host(run: Elastic) -> None:
    run.wait_for_step(AT)
    run.power_off("host-c")


def kill_second_host(run: Elastic) -> None:
    run.wait_for_step(AT)
    run.power_off("host-b")
    run.wait_for(lambda: "start 2: 2 hosts (host-a, host-c)" in run.output, "the spare's start")


def kill_master(run: Elastic) -> None:
    """All that runs on the first host, where the ranks meet; the supervisor, which is there too, stays."""
    run.wait_for_step(AT)
    for word in ("toolkit.supervise.host", "toolkit.supervise.rank"):
        for process in run.processes("host-a", word):
            with suppress(psutil.Error):
                process.kill()


def cut_link(run: Elastic) -> None:
    run.wait_for_step(AT)
    run.hosts.link("host-b", up=False)


def cut_while_saving(run: Elastic) -> None:
    """As soon as a checkpoint that is not complete yet can be seen."""
    run.wait_for_step(EVERY)
    folder = run.run / "checkpoints"
    run.wait_for(lambda: list(folder.glob(".partial-*")), "a save", look_every_s=0.001)
    run.hosts.link("host-b", up=False)


def freeze_rank(run: Elastic) -> None:
    run.wait_for_step(AT)
    run.ranks("host-b")[0].send_signal(signal.SIGSTOP)


def freeze_the_last_rank(run: Elastic) -> None:
    """No other rank is left that could notice."""
    run.wait_for_step(AT)
    for host in ("host-b", "host-c"):
        run.hosts.link(host, up=False)
    run.wait_for(lambda: any(recovery.hosts == 1 for recovery in run.recoveries), "a start on one host")
    run.ranks("host-a")[0].send_signal(signal.SIGSTOP)


def freeze_host(run: Elastic) -> None:
    """Its kernel still answers pings; nothing else does."""
    run.wait_for_step(AT)
    run.signal_all("host-b", signal.SIGSTOP)


def kill_supervisor(run: Elastic) -> None:
    run.wait_for_step(AT)
    pid = run.processes("host-a", "launch")[0]
    pid.kill()
    run.process.wait(60)
    run.start()


def two_at_once(run: Elastic) -> None:
    run.wait_for_step(AT)
    run.power_off("host-c")
    run.wait_for(lambda: len(run.recoveries) == 1 and run.step > AT + EVERY, "the first recovery")
    run.ranks("host-b")[0].kill()


def while_recovering(run: Elastic) -> None:
    """The second one strikes while the ranks that are to go on are still starting."""
    run.wait_for_step(AT)
    first = run.ranks("host-a")[0].pid
    run.ranks("host-c")[0].kill()
    run.wait_for(lambda: any(rank.pid != first for rank in run.ranks("host-a")), "a new rank")
    run.power_off("host-c")


def come_back(run: Elastic) -> None:
    run.wait_for_step(AT)
    run.power_off("host-c")
    run.wait_for(lambda: "start 2" in run.output, "the start without it")
    run.hosts.link("host-c", up=True)
    run.wait_for(lambda: len(run.recoveries) == 2, "the host's return")
    assert [r.hosts for r in run.recoveries] == [2, 3] and run.recoveries[-1].steps_lost == 0, run.output


def slow_host(run: Elastic) -> None:
    """It is frozen for most of the time, and never long enough to be lost."""
    run.wait_for_step(AT)
    ranks = run.ranks("host-c")

    def hold() -> None:
        with suppress(psutil.Error):
            while run.process.poll() is None:
                ranks[0].suspend()
                time.sleep(0.15)
                ranks[0].resume()
                time.sleep(0.02)

    threading.Thread(target=hold, daemon=True).start()


def nothing(run: Elastic) -> None:
    """The fault was there before the start."""


def refuse_ssh(hosts: TwoHosts) -> Callable[[], None]:
    """host-c no longer takes the key."""
    path = hosts.folder / "sshd_config"
    text = path.read_text()

    def configure(words: str) -> None:
        path.write_text(words)
        os.kill(hosts.pids["host-c"], signal.SIGHUP)

    configure(text + f"Match LocalAddress {MORE_ADDRESSES['host-c']}\n  AuthorizedKeysFile none\n")
    return lambda: configure(text)


def another_version(hosts: TwoHosts) -> Callable[[], None]:
    """On host-c the toolkit says that it is another one."""
    place, other = REPOSITORY / "toolkit" / "__init__.py", hosts.folder / "other.py"
    other.write_text(place.read_text() + '\n__version__ = "0.0.1"\n')
    # umount reads /proc/self, which in that host names the host's own processes
    inside = ["nsenter", "--target", str(hosts.pids["host-c"]), "--mount", "--pid"]
    subprocess.run([*inside, "mount", "--bind", str(other), str(place)], check=True)
    return lambda: subprocess.run([*inside, "umount", str(place)], check=True) and None


def fill_disk(run: Elastic) -> None:
    """What a rank other than 0 writes fails after 4 KB, as it does where a disk or a quota is full:
    its part of a checkpoint.
    """
    run.wait_for_step(AT)
    (rank,) = [one for host in ("host-a", "host-b") for one in run.ranks(host) if one.environ().get("RANK") == "1"][:1] or run.ranks(
        "host-c"
    )
    rank.rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))


PIPELINE = ("parallel.pp=3",)
SPARE = ("--spares", "1", "train.micro_batch_size=2")  # 12 sequences a step on two ranks
REFUSED = r"host host-c is left out: ssh does not reach it \(.*Permission denied"
FAULTS = (
    Fault(id="rank", title="kill -9 of one rank", strike=kill_rank, says=r"rank \d ended with SIGKILL; going on", default=True),
    Fault(id="host", title="a whole host dies", strike=kill_host, says=r"lost host-c"),
    Fault(id="spare", title="a host dies, and a spare waits", strike=kill_second_host, says="lost host-b", words=SPARE),
    Fault(id="returns", title="a lost host comes back", strike=come_back, says="host host-c answers again", recoveries=2),
    Fault(id="cut", title="link cut in an all-reduce", strike=cut_link, says="lost host-b"),
    Fault(id="cut-pipeline", title="link cut in a pipeline send", strike=cut_link, says="lost host-b", words=PIPELINE),
    Fault(id="cut-save", title="link cut during a checkpoint save", strike=cut_while_saving, says="lost host-b"),
    Fault(
        id="frozen-rank",
        title="one rank hangs (SIGSTOP)",
        strike=freeze_rank,
        words=("train.watchdog_s=3",),
        says=r"no progress for 3 s in step \d+: .*rank \d does not answer",
    ),
    Fault(
        id="frozen-last",
        title="the only rank that is left hangs (SIGSTOP)",
        strike=freeze_the_last_rank,
        words=("train.watchdog_s=3",),
        says="on host-a rank 0 ended with SIGKILL",
        recoveries=2,
    ),
    Fault(id="frozen-host", title="a host hangs but answers pings (SIGSTOP)", strike=freeze_host, says="lost host-b"),
    Fault(id="slow", title="a slow host", strike=slow_host, says=r"slowest: rank \d on node-host-c", recoveries=0, lost_steps=0),
    Fault(id="ssh", title="ssh refused on one of three", strike=nothing, before=refuse_ssh, says=REFUSED, recoveries=0, lost_steps=0),
    Fault(
        id="version",
        title="another toolkit version on one host",
        strike=nothing,
        before=another_version,
        says=r"host host-c is left out: it has toolkit 0.0.1 instead of",
        recoveries=0,
        lost_steps=0,
    ),
    Fault(id="disk", title="full disk on one host", strike=fill_disk, says=r"error.*", code=2, recoveries=0),
    Fault(
        id="master", title="the host where the ranks meet loses all its processes", strike=kill_master, says="its agent is gone|lost|ended"
    ),
    Fault(
        id="supervisor",
        title="the supervisor dies and is started again",
        strike=kill_supervisor,
        says="the supervisor was started again",
    ),
    Fault(id="two", title="two faults within a minute", strike=two_at_once, says=r"rank \d ended with SIGKILL; going on", recoveries=2),
    Fault(id="recovering", title="a fault during recovery", strike=while_recovering, says="lost host-c"),
)
