"""The processes that generate: started here, without a launcher, so that whoever waits for them
knows which one died. No torch.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from toolkit.cluster.environment import device_ids, gpu_count, rank_environment
from toolkit.cluster.launch import end_with_parent, free_port
from toolkit.errors import MachineError

MODULE = "toolkit.inference"
POLL_S = 0.05
GRACE_S = 5.0  # for the rank that writes the message, where another one that has the same error has already ended


class RankDied(Exception):
    """A rank has ended that nobody asked to; code: its exit code, as Popen gives it."""

    def __init__(self, rank: int, code: int) -> None:
        self.rank, self.code = rank, code
        super().__init__(f"rank {rank} has ended" + (f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"))


def start_rank(request: Path, *, rank: int, size: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """One rank of so many, which reads what to do in a file."""
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, str(request)],
        env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal is this process's to handle
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def run_ranks(request: Path, *, processes: int) -> int:
    """Generate over so many ranks of this machine and return their exit code: 0, a ToolkitError's,
    or 128 + n after signal n.

    SIGINT and SIGTERM end all ranks, a second one kills them. Raises MachineError, which names the
    rank, where one was ended by a
    signal that did not come from here: the others wait for it, and are killed. Raises MachineError
    for more ranks than GPUs.
    """
    env = rank_environment(processes)
    devices = device_ids(processes, environ=env)
    if gpu_count(env):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    received: list[int] = []

    def note(signum: int, _: FrameType | None) -> None:
        received.append(signum)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            ranks.append(start_rank(request, rank=rank, size=processes, env=env))
        _wait(ranks, received)
    except RankDied as death:
        if death.code > 0:
            _give_time(ranks)
            return death.code
        raise _lost(death, processes) from None
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for s, handler in previous.items():
            signal.signal(s, handler)
    return 128 + received[0] if received else 0


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> None:
    """Until all ranks have ended, by themselves or by the signals that are received. Raises
    RankDied for the one that is the cause.

    A rank that has lost another one may end with an error of its own before this process looks, but
    never by a signal.
    """
    handled = 0
    while True:
        running = [process for process in ranks if process.poll() is None]
        failed = [(process.returncode, rank) for rank, process in enumerate(ranks) if process.returncode]
        if failed and not received:
            code, rank = min(failed)  # signals first, whose codes are negative
            raise RankDied(rank, code)
        if not running:
            return
        if len(received) > handled:
            handled = len(received)
            for process in running:
                process.kill() if handled > 1 else process.terminate()
        time.sleep(POLL_S)


def _give_time(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + GRACE_S
    for process in ranks:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _lost(death: RankDied, processes: int) -> MachineError:
    """What to say of a rank that a signal has ended; its exit code is a shell's."""
    killed = death.code == -signal.SIGKILL
    error = MachineError(
        f"{death}, one of {processes}",
        why="the others have waited for its part of the model and were ended too",
        fix="The system kills a process where memory ends: try --weights int8, --offload disk or a smaller --batch-size."
        if killed
        else "Look at what it says above.",
    )
    error.exit_code = 128 - death.code
    return error
