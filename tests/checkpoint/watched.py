"""A command with its wall time and the most memory that one of its processes had."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil


def watched(*arguments: object) -> tuple[float, int]:
    """Run `python ARGUMENTS`: seconds, and peak resident bytes of its largest process (the kernel's
    high-water mark, looked at often).
    """
    started = time.perf_counter()
    process = psutil.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        for pid in (process.pid, *_children(process)):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # it has just ended
                continue
            peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read().decode()
    return time.perf_counter() - started, peak


def _children(process: psutil.Process) -> list[int]:
    try:
        return [p.pid for p in process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
