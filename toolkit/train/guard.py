"""A small process beside each rank, which kills it when even its threads have stopped.

A rank that is frozen (SIGSTOP, a driver that never returns while it holds Python's lock) cannot end
itself, and its launcher waits for it. The guard waits for a byte of the rank's watchdog; the end of
the pipe is the rank's own end, and the guard's.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

# nothing but the standard library: it starts in milliseconds and stays small
PROGRAM = """
import os, select, signal, sys
rank, limit = int(sys.argv[1]), float(sys.argv[2])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
while select.select([0], [], [], limit)[0]:
    if not os.read(0, 4096):
        sys.exit()
os.kill(rank, signal.SIGKILL)
"""


def start(*, limit_s: float) -> subprocess.Popen[bytes] | None:
    """Guard this process: it is killed once touch() has not been called for limit_s seconds. None
    where no process can be started.
    """
    import os

    with suppress(OSError):
        return subprocess.Popen([sys.executable, "-I", "-S", "-c", PROGRAM, str(os.getpid()), str(limit_s)], stdin=subprocess.PIPE)
    return None


def touch(guard: subprocess.Popen[bytes] | None) -> None:
    """Show that this process still runs."""
    if guard is not None and guard.stdin is not None:
        with suppress(OSError):  # someone has ended the guard: the run goes on without
            guard.stdin.write(b".")
            guard.stdin.flush()


def stop(guard: subprocess.Popen[bytes] | None) -> None:
    """End the guard."""
    if guard is not None and guard.stdin is not None:
        with suppress(OSError):
            guard.stdin.close()
        guard.wait()
