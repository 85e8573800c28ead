"""The hosts of one look: a probe on each, started over ssh with the environment that ranks would
have, and asked in parallel.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from toolkit import __version__
from toolkit.cluster.environment import exported_variables, users_variables
from toolkit.cluster.hosts import ssh
from toolkit.cluster.words import NAME
from toolkit.doctor.probe import PROTOCOL

PROBE = "toolkit.doctor.probe"
CONNECT_S = 5
START_S = 20.0  # from the start of ssh to the probe's first line
ANSWER_S = 30.0
NO_FOLDER, NO_PYTHON = 91, 92  # exit codes of the line that starts the probe

# what ssh says → what is wrong, and what to set; the first that fits
REFUSALS: tuple[tuple[str, str, str], ...] = (
    ("Permission denied", "ssh refuses user {user} with {keys}", "Append the public key to ~/.ssh/authorized_keys of {user} on {host}."),
    ("Host key verification failed", "ssh does not trust the host's key", "Log in once by hand (ssh {host}), or correct known_hosts."),
    ("Could not resolve hostname", "no address is known for its name", "Correct the name in the hostfile, or add it to /etc/hosts or DNS."),
    ("Connection refused", "nothing listens at port {port}", "Start sshd on {host}, or set its Port in ~/.ssh/config."),
    ("timed out", "it does not answer at port {port}", "Check that {host} is up, its address, cable and firewall."),
    ("No route to host", "no route leads to it", "Check that {host} is up, its address, cable and firewall."),
    ("unreachable", "no route leads to it", "Check that {host} is up, its address, cable and firewall."),
)


class Host:
    """A host and its probe. `problem` is (what is wrong, fix) where there is no probe to ask."""

    def __init__(self, name: str, *, local: bool) -> None:
        self.name, self.local = name, local
        self.problem: tuple[str, str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors = ""
        self.asked = 0
        command = probe_words() if local else [*ssh(timeout_s=CONNECT_S), name, probe_line()]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes, errors="replace")
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._read_answers, self._read_errors)]
        for reader in self.readers:
            reader.start()

    def _read_answers(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors = (self.errors + line)[-8000:]

    def greet(self) -> None:
        """Wait for the probe's first line, or find out why it does not come."""
        line = self._line(START_S)
        if line is None:
            self.problem = self._why()
            return
        try:
            hello = json.loads(line)
            if hello["protocol"] == PROTOCOL:
                return
            self.problem = (
                f"it has toolkit {hello['toolkit']}, this host has {__version__}",
                f"Install toolkit {__version__} on {self.name}.",
            )
        except (ValueError, KeyError, TypeError):
            self.problem = (
                f"its login prints {line.strip()[:60]!r} before the program starts",
                "Let shell start-up files print only in interactive shells.",
            )
        self.close()

    def ask(self, task: Mapping[str, Any], *, timeout: float = ANSWER_S) -> dict[str, Any]:
        """The probe's answer to one task; {"error": why} where none comes."""
        assert self.process.stdin is not None
        self.asked += 1
        try:
            self.process.stdin.write(json.dumps({**task, "id": self.asked}) + "\n")
            self.process.stdin.flush()
        except OSError:
            return {"error": "the probe has ended"}
        ends = time.monotonic() + timeout
        while (line := self._line(max(0.0, ends - time.monotonic()))) is not None:
            with contextlib.suppress(ValueError):  # something else that writes to its standard output
                answer = json.loads(line)
                if isinstance(answer, dict) and answer.pop("id", None) == self.asked:  # an earlier task's may come late
                    return answer
        return {"error": "the probe has ended" if self.process.poll() is not None else f"no answer within {timeout:.0f} s"}

    def _line(self, timeout: float) -> str | None:
        try:
            return self.lines.get(timeout=timeout)
        except queue.Empty:
            return None

    def _why(self) -> tuple[str, str]:
        """Why the probe's first line did not come, by exit code and by what ssh or python said."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.close()
            return f"its probe said nothing for {START_S:.0f} s", f"Look at `ssh {self.name} {shlex.join(probe_words()[:1])} --version`."
        self.readers[1].join(1.0)
        said = self.errors
        if code == NO_FOLDER:
            return f"it has no folder {os.getcwd()}", "Share the working folder, or copy it there under the same path."
        if code == NO_PYTHON:
            return f"it has no interpreter {sys.executable}", "Install the same environment there, under the same path."
        if "No module named" in said:
            missing = said.rsplit("No module named", 1)[1].splitlines()[0].strip(" '\".")
            if missing.startswith("toolkit."):
                return f"its toolkit is another one: it has no {missing}", f"Install toolkit {__version__} on {self.name}."
            return f"python there has no {missing}", "Install the same environment there, or export PYTHONPATH."
        last = (said.strip().splitlines() or [f"exit code {code}"])[-1].strip().rstrip(".")
        if code == 255 and not self.local:
            client = ssh_settings(self.name)
            for words, what, fix in REFUSALS:
                if words in said:
                    return what.format(**client), fix.format(**client)
        return f"the probe could not start: {last}", f"Look at `ssh {self.name} true`, and install the same environment there."

    def close(self) -> None:
        """End the probe: it takes away what it made when its stdin ends."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(3.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for reader in self.readers:
            reader.join(1.0)


def probe_words(python: str = sys.executable) -> list[str]:
    """The probe's command on this host."""
    return [python, "-u", "-m", PROBE]


def probe_line(environ: Mapping[str, str] | None = None, *, folder: str | None = None, python: str = sys.executable) -> str:
    """The line for another host's shell: the working folder, the exported environment, the
    interpreter by its path.
    """
    environ = os.environ if environ is None else environ
    variables = {k: v for k, v in environ.items() if k.startswith("PYTHON") and NAME.fullmatch(k)}
    variables |= users_variables(environ) or exported_variables(environ)
    words = ["env", *(f"{name}={value}" for name, value in sorted(variables.items())), *probe_words(python)]
    there, program = shlex.quote(folder or os.getcwd()), shlex.quote(python)
    return f"cd {there} 2>/dev/null || exit {NO_FOLDER}; test -x {program} || exit {NO_PYTHON}; exec {shlex.join(words)}"


def ssh_settings(host: str) -> dict[str, str]:
    """User, port and keys with which ssh goes to a host, by its configuration."""
    done = subprocess.run(["ssh", "-G", host], capture_output=True, text=True)
    pairs = [line.split(" ", 1) for line in done.stdout.splitlines() if " " in line]
    found = {name: value for name, value in pairs if name in ("user", "port")}
    keys = [value for name, value in pairs if name == "identityfile" and os.path.exists(os.path.expanduser(value))]
    return {"user": "", "port": "22", **found, "host": host, "keys": f"key {', '.join(keys)}" if keys else "no key: it finds none here"}


def each(hosts: Iterable[Host], action: Callable[[Host], Any]) -> list[Any]:
    """The action's results for all hosts, carried out in parallel, in their order."""
    chosen = list(hosts)
    if not chosen:
        return []
    with ThreadPoolExecutor(len(chosen)) as threads:
        return list(threads.map(action, chosen))


def clock_offset(host: Host, *, tries: int = 3) -> dict[str, float]:
    """Seconds by which a host's clock is ahead of this one's, and how far off that may be; of the
    try that took least time.
    """
    best: tuple[float, float] | None = None
    for _ in range(tries):
        sent = time.time()
        answer = host.ask({"do": "clock"})
        back = time.time()
        if "now" in answer and (best is None or back - sent < best[1]):
            best = answer["now"] - (sent + back) / 2, back - sent
    return {"ahead_s": best[0], "within_s": best[1] / 2} if best else {}


def rounds(names: Sequence[str], *, most: int) -> list[list[tuple[str, str]]]:
    """Pairs of hosts in rounds: each host is in one pair of a round, and no pair comes twice (the
    circle method).

    All pairs need one round fewer than there are hosts; `most` limits the rounds of a large cluster.
    """
    circle: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    result = []
    for _ in range(min(most, len(circle) - 1)):
        pairs = [(circle[i], circle[-1 - i]) for i in range(len(circle) // 2)]
        result.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return result
