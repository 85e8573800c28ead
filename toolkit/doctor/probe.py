"""`python -m toolkit.doctor.probe`: what doctor starts on each host; it answers JSON lines on stdin
with JSON lines on stdout.

The first line of its own names the toolkit and the protocol. It ends with its stdin, and takes away
what it has made.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from toolkit import __version__
from toolkit.doctor import facts, links

PROTOCOL = 1
MARKER = ".toolkit-doctor-{}"  # in a folder that all hosts should see
# DeepSpeed's builder of each extension; a process of its own compiles it
BUILDERS = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}


class Probe:
    """One look at this host; handle() carries out one task after the other."""

    def __init__(self) -> None:
        self.request: dict[str, Any] = {}
        self.ranks: list[subprocess.Popen[str]] = []
        self.words: dict[int, IO[str]] = {}  # what a rank wrote to its standard error, by process
        self.listeners: list[links.Listener] = []
        self.markers: list[Path] = []

    def handle(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a task by its name; an error of any kind is an answer too."""
        try:
            return getattr(self, f"do_{task['do']}")(task)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def do_clock(self, task: Mapping[str, Any]) -> dict[str, Any]:
        return {"now": time.time()}

    def do_look(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """All facts, and a listener for the others' measurements. Ranks of the all-reduce start meanwhile."""
        self.request = dict(task)
        gpus = facts.gpu_count()
        for local_rank in range(max(1, min(task["slots"], gpus)) if task["network"] or gpus else 0):
            command = [sys.executable, "-m", "toolkit.doctor.collective", str(local_rank)]
            words = os.fdopen(os.memfd_create("words"), "w+", errors="replace")  # no disk: it may be full
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.ranks.append(subprocess.Popen(command, stderr=words, **pipes))
            self.words[self.ranks[-1].pid] = words
        found = facts.gather(task)
        network = links.interface(task["first"]) if task["network"] else None
        port = None
        if network and network["address"]:
            self.listeners.append(links.Listener(network["address"], self._token))
            port = self.listeners[0].port
        if task["mark"]:
            self._mark(task["shared"], task["token"])
        return {**found, "network": network, "port": port}

    def _mark(self, folders: list[str], token: str) -> None:
        for folder in folders:
            marker = facts.existing(Path(folder)) / MARKER.format(token)
            with contextlib.suppress(OSError):  # the write test has said so
                marker.touch(mode=0o600)
                self.markers.append(marker)

    def do_see(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Which of the first host's folders are seen here too."""
        return {
            "seen": {path: os.path.exists(Path(place) / MARKER.format(self.request["token"])) for path, place in task["places"].items()}
        }

    def do_open(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Listen at the port where the ranks will meet, which must be free for that."""
        address = self.listeners[0].socket.getsockname()[0]
        try:
            self.listeners.append(links.Listener(address, self._token, task["port"]))
        except OSError as error:
            return {"error": f"{(error.strerror or str(error)).lower()}: {links.holder(task['port'])} listens there"}
        return {"error": None}

    def do_connect(self, task: Mapping[str, Any]) -> dict[str, Any]:
        return {"error": links.can_connect(task["address"], task["port"], self._token)}

    def do_link(self, task: Mapping[str, Any]) -> dict[str, Any]:
        return links.measure(task["address"], task["port"], self._token)

    def do_torch(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """What torch is here, and sees."""
        return {"ranks": [self._answer(rank) for rank in self.ranks]}

    def do_meet(self, task: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask(self.ranks[0], task)

    def do_all_reduce(self, task: Mapping[str, Any]) -> dict[str, Any]:
        for i, rank in enumerate(self.ranks):
            self._tell(rank, {**task, "rank": task["rank"] + i})
        return {"ranks": [self._answer(rank) for rank in self.ranks]}

    def do_build(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Compile extensions that a run would compile at its first use; the last line of the
        compiler where one fails.
        """
        done = {}
        for name in task["names"]:
            code = f"from deepspeed.ops.op_builder import {BUILDERS[name]}\n{BUILDERS[name]}().load(verbose=False)"
            built = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            done[name] = None if built.returncode == 0 else (built.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        return {"built": done}

    @property
    def _token(self) -> bytes:
        return bytes.fromhex(self.request["token"])

    def _ask(self, rank: subprocess.Popen[str], task: Mapping[str, Any]) -> dict[str, Any]:
        self._tell(rank, task)
        return self._answer(rank)

    @staticmethod
    def _tell(rank: subprocess.Popen[str], task: Mapping[str, Any]) -> None:
        assert rank.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            rank.stdin.write(json.dumps(task) + "\n")
            rank.stdin.flush()

    def _answer(self, rank: subprocess.Popen[str]) -> dict[str, Any]:
        assert rank.stdout is not None
        if line := rank.stdout.readline():
            return dict(json.loads(line))
        code, words = rank.wait(), self.words[rank.pid]
        words.seek(0)
        said = [line.strip() for line in words.read()[-4000:].splitlines() if line.strip()]
        return {"error": said[-1] if said else f"the process ended with code {code}"}

    def close(self) -> None:
        """End what was started, and take away what was made."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()
        for listener in self.listeners:
            listener.close()
        for marker in self.markers:
            marker.unlink(missing_ok=True)


def main() -> None:
    """Serve stdin until it ends."""
    # answers alone go to stdout: a library that prints something there would spoil the protocol
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(values: Mapping[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    probe = Probe()
    try:
        say({"toolkit": __version__, "protocol": PROTOCOL})
        for line in sys.stdin:
            task = json.loads(line)
            say({**probe.handle(task), "id": task["id"]})
    finally:
        probe.close()


if __name__ == "__main__":
    main()
