"""The hosts of a run: those that a hostfile names, and whether ssh reaches them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from toolkit.cluster.words import check_host
from toolkit.errors import ConfigError, MachineError

LOCAL = {"localhost", "127.0.0.1"}  # in a hostfile: no ssh is needed
SSH_TIMEOUT_S = 10


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots (ranks) of each host, in the order of the ranks; raises ConfigError naming the line
    that is wrong.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no hostfile {path}", fix="Copy launch/hostfile.example and name your hosts in it, one `HOST slots=RANKS` a line."
        )
    hosts: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"the hostfile {path} cannot be read", why=why or str(error), fix="Check the path and its permissions.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)\s*", line.strip())
        if not match:
            raise ConfigError(
                f"{path}:{number} is {line.strip()!r}", why="a line names a host and its ranks", fix="Write it as `HOST slots=RANKS`."
            )
        check_host(match[1], where=f"{path}:{number} names")
        if match[1] in hosts:
            raise ConfigError(f"{path}:{number} names {match[1]} a second time", fix="Give each host one line with all its slots.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"the hostfile {path} names no host", fix="Write one `HOST slots=RANKS` a line.")
    return hosts


def ssh(*, timeout_s: int = SSH_TIMEOUT_S) -> Sequence[str]:
    """The start of an ssh command that asks for nothing and does not wait for ever."""
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={timeout_s}", "-o", "ServerAliveInterval=5"]


def unreachable(hosts: Sequence[str]) -> dict[str, str]:
    """Which hosts ssh cannot run a command on, and why; all are asked at once."""
    tries = {host: subprocess.Popen([*ssh(), host, "true"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for host in hosts}
    failed = {}
    for host, process in tries.items():
        try:
            error = process.communicate(timeout=SSH_TIMEOUT_S + 5)[1]
        except subprocess.TimeoutExpired:  # it connects and then says nothing: the host hangs
            process.kill()
            process.communicate()
            failed[host] = "it accepts connections and does not answer"
            continue
        if process.returncode:
            failed[host] = (error.strip().splitlines() or ["it gave no reason"])[-1].strip().rstrip(".")
    return failed


def check_reachable(hosts: Iterable[str]) -> None:
    """Raise MachineError naming a host on which ssh cannot run a command without a password, as the
    launcher will have to.
    """
    if shutil.which("ssh") is None:
        raise MachineError("the command ssh is not on the PATH", why="other hosts are reached by it", fix="Install an ssh client.")
    for host, why in unreachable(list(hosts)).items():
        raise MachineError(
            f"host {host} of the hostfile is not reachable by ssh",
            why=why,
            fix=f"Make `ssh {host} true` work without a password, or correct the name. `toolkit doctor --hostfile H` looks at all hosts.",
        )
