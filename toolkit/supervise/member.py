"""The supervisor's connection to one host: an ssh that runs toolkit.supervise.host there."""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from toolkit.cluster.hosts import ssh, unreachable
from toolkit.supervise.host import BEAT_S

Event = tuple["Member", dict[str, Any]]


class Member:
    """One host of one start. Events of all members come together in one queue. timeout_s: for ssh
    to connect.
    """

    def __init__(self, host: str, events: queue.Queue[Event], *, python_path: str, timeout_s: int) -> None:
        self.host, self.events = host, events
        self.heard = time.monotonic()
        self.facts: dict[str, Any] | None = None
        self.result: dict[str, Any] | None = None  # its last message, once its ranks have ended
        self.gone = False  # the connection has ended
        self.answering = False
        self.begun = False
        remote = ["env", f"PYTHONPATH={python_path}", sys.executable, "-u", "-m", "toolkit.supervise.host"]
        command = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(remote)}"
        self.process = subprocess.Popen(
            [*ssh(timeout_s=timeout_s), self.host, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
            start_new_session=True,
        )
        self.writing = threading.Lock()
        self.ended = threading.Event()
        for work in (self._read, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def begin(self, spec: Mapping[str, Any]) -> None:
        """Tell the host what to start."""
        self.tell(spec)
        self.begun = True

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a line; a host that cannot be written to is found out by its silence."""
        with suppress(OSError, ValueError), self.writing:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def end(self, *, lost: bool) -> None:
        """Cut the connection; the host's ranks end with it, as soon as the host notices."""
        self.tell({"do": "stop"})
        self.ended.set()
        with suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.0 if lost else 3.0)
        self.process.kill()
        self.process.wait()

    def silent_s(self) -> float:
        """Seconds since the host's last sign of life."""
        return time.monotonic() - self.heard

    def _beat(self) -> None:
        """A sign of life every second, whatever the supervisor is busy with."""
        while not self.ended.wait(BEAT_S) and not self.gone:
            if self.begun:
                self.tell({"beat": True})

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard = time.monotonic()
            self.answering = True
            with suppress(ValueError):
                message = json.loads(line)
                if "facts" in message:
                    self.facts = message["facts"]
                if "ended" in message:
                    self.result = message
                if "beat" not in message:
                    self.events.put((self, message))
        self.gone = True
        self.events.put((self, {"gone": self.process.wait()}))


class Prober:
    """Asks lost hosts, in a thread of its own, whether ssh works again."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self.back: set[str] = set()
        self.asked: set[str] = set()
        self.ended = threading.Event()
        threading.Thread(target=self._ask, daemon=True).start()

    def close(self) -> None:
        self.ended.set()

    def _ask(self) -> None:
        while not self.ended.wait(self.every_s):
            asked = sorted(self.asked)
            failed = unreachable(asked)
            self.back |= set(asked) - failed.keys()
