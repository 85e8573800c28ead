"""Words that travel through a shell on another host: packed where a shell, or pdsh, could read
anything into them.

DeepSpeed's launcher joins a rank's arguments, its working folder and the names of hosts into one
line for ssh, without quotes. So an argument goes as it is only where it has no character with a
meaning; any other travels as base64, and the rank unpacks it.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Iterable, Mapping

from toolkit.errors import ConfigError

MARK = "base64:"
PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
HOST = re.compile(r"(?:[A-Za-z0-9_.-]+@)?[A-Za-z0-9_:][A-Za-z0-9_.:-]*")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# what a shell inside double quotes, or pdsh (%h, %n, %u), would replace
UNQUOTABLE = re.compile(r'["$`\\%\n\r\x00]')
DEEPSPEED_EXPORTS = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # variables that its launcher exports by itself


def packed(word: str) -> str:
    """A word without any character that a shell reads."""
    if PLAIN.fullmatch(word) and not word.startswith(MARK):
        return word
    return MARK + base64.urlsafe_b64encode(os.fsencode(word)).decode()


def unpacked(word: str) -> str:
    """The word that packed() was given."""
    return os.fsdecode(base64.urlsafe_b64decode(word.removeprefix(MARK))) if word.startswith(MARK) else word


def check_host(name: str, *, where: str) -> str:
    """The name of a host, if it is one; ConfigError otherwise: ssh and shells would read something
    else into it.
    """
    if not HOST.fullmatch(name) or name.startswith("-"):
        raise ConfigError(
            f"{where} {name!r} is not the name of a host",
            why="a name has letters, digits, dots and dashes, and does not begin with a dash",
            fix="Correct it.",
        )
    return name


def check_place(*, folder: str | None = None, python: str = sys.executable) -> None:
    """Raise ConfigError where the working folder or the interpreter has a path that the launcher's
    line would tear apart.
    """
    for what, path in (("the working folder", folder or os.getcwd()), ("the interpreter", python)):
        if not PLAIN.fullmatch(path):
            raise ConfigError(
                f"{what} {path!r} has a path with more than letters, digits and _@+=:,./-",
                why="DeepSpeed's launcher gives it to the other hosts' shells without quotes",
                fix="Use a path without such characters.",
            )


def check_exports(environ: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise ConfigError for a variable that would not arrive as it is, or whose name is none that a
    shell can export.
    """
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(f"the environment variable {name!r} has a name that no shell exports", fix="Unset it: env -u NAME command.")
        if found := UNQUOTABLE.search(environ[name]):
            raise ConfigError(
                f"the environment variable {name}={environ[name]!r} cannot be exported to the other hosts",
                why=f"the shells on the way would replace its {found[0]!r}",
                fix=f"Unset {name}, or set it on every host.",
            )


def exported_by_deepspeed(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that DeepSpeed's launcher exports by itself."""
    return [name for name in environ if name.startswith(DEEPSPEED_EXPORTS)]
