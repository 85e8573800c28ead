"""Builds beside the tests, which end with the session that started them, however that ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Nobody writes to the build's standard input. It ends when the session is gone, and the group then
# holds all compilers.
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
            cwd=Path(__file__).parents[1],
        )


def end_build(build: subprocess.Popen[bytes]) -> None:
    """Kill a build that still runs, with all that it has started."""
    if build.poll() is None:
        os.killpg(build.pid, signal.SIGKILL)
        build.wait()


def compile_extension(name: str) -> None:
    """Compile one of DeepSpeed's extensions into TORCH_EXTENSIONS_DIR, one process of the tests at a time.

    The kernel takes the turn from a process that is killed. Torch's own lock file stays where that was
    while it compiled, and whoever has the turn next takes it away.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    from toolkit.cluster.locks import check_extension_locks
    from toolkit.errors import MachineError

    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        parts = {name, "pin_memory"} if name == "async_io" else {name}
        try:
            check_extension_locks(parts)
        except MachineError:
            for part in parts:
                (folder / part / "lock").unlink(missing_ok=True)
        os.nice(5)
        {"cpu_adam": CPUAdamBuilder, "async_io": AsyncIOBuilder}[name]().load(verbose=False)
