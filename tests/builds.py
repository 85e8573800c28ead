"""Builds beside the tests, which end with the session that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Nobody writes to the build's standard input. It ends when the session is gone, and the group then holds all compilers.
_WATCH = """
import os, signal, threading

def end_with_session():
    os.read(0, 1)  # not through a buffer, whose lock Python wants at its end
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_session, daemon=True).start()
"""


def start_build(code: str, *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Run Python code that compiles, in a process group of its own; what it prints goes to the log."""
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", _WATCH + code],
            env=dict(env) if env is not None else None,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def end_build(build: subprocess.Popen[bytes]) -> bool:
    """Kill a build that still runs, with all that it has started; whether it did."""
    if build.poll() is not None:
        return False
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    return True
