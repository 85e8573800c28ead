"""A program on a terminal: what it wrote, and what a person then sees."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

COLUMNS = 200  # wide enough for a step line


def on_terminal(command: list[str], *, cwd: Path, timeout_s: float) -> tuple[int, str]:
    """Run a command with a terminal as its stdout and stderr; its exit code and all that it wrote."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    path = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": path, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        env.pop(name, None)
    process = subprocess.Popen(command, env=env, cwd=cwd, stdout=slave, stderr=slave, stdin=subprocess.DEVNULL, start_new_session=True)
    os.close(slave)
    written, end = b"", time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            if not select.select([master], [], [], 1.0)[0]:
                continue
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # all who had the terminal are gone
                break
            if not piece:
                break
            written += piece
        return process.wait(timeout=max(1.0, end - time.monotonic())), written.decode(errors="replace")
    finally:
        process.kill()
        os.close(master)


def screen(written: str) -> list[str]:
    """The lines on the screen after all of it, oldest first, nothing scrolled away."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.startswith("\x1b"):
            if piece.endswith("A"):
                row = max(0, row - int(piece[2:-1] or 1))
            elif piece == "\x1b[2K":
                lines[row] = ""
        else:
            before = lines[row].ljust(column)
            lines[row] = before[:column] + piece + before[column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines]
