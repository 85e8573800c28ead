"""A test session that is killed leaves no compilers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

SESSION = """
import sys
from pathlib import Path
from tests.builds import start_build
compiler = "import os, subprocess, sys; " \\
    "child = subprocess.Popen([sys.executable, '-c', 'import sys; print(1, flush=True); sys.stdin.read()'], stdin=subprocess.PIPE); " \\
    "print(child.pid, flush=True); child.wait()"
print(start_build(compiler, log=Path(sys.argv[1])).pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_session_leaves_no_compiler(tmp_path: Path) -> None:
    log, end = tmp_path / "log", time.monotonic() + 60
    session = subprocess.Popen([sys.executable, "-c", SESSION, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert session.stdout is not None
    build = psutil.Process(int(session.stdout.readline()))
    while len(log.read_text().split()) < 2:
        assert time.monotonic() < end and build.is_running(), log.read_text()
        time.sleep(0.05)
    compiler = psutil.Process(next(int(word) for word in log.read_text().split() if word != "1"))
    session.kill()
    session.wait()
    gone, alive = psutil.wait_procs([build, compiler], timeout=60)
    assert len(gone) == 2 and not alive
