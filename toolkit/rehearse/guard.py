"""The small C++ library without which a CPU build of torch refuses tensors of device cuda: compiled
once, found without torch.

python -m toolkit.rehearse.guard        compiles it and prints where it lies
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from toolkit.cluster.locks import check_extension_locks, extension_folders
from toolkit.errors import MachineError

SOURCE = Path(__file__).with_name("cuda_guard.cpp")


def name() -> str:
    """The library's name, which changes with what it is built from: its source, this file and
    torch's headers.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:8]
    return f"toolkit_guard_{re.sub(r'[^0-9a-zA-Z]', '_', version('torch'))}_{digest}"


def find() -> Path | None:
    """The compiled library, None where it has not been compiled yet."""
    for folder in extension_folders():
        path = folder / name() / f"{name()}.so"
        if path.is_file():
            return path
    return None


def ensure() -> Path:
    """The compiled library, compiling it where it is missing; MachineError where that cannot be done."""
    found = find()
    if found is not None:
        return found
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise MachineError(
            f"a rehearsal needs a C++ compiler once, and {compiler} is not found",
            why="a CPU build of torch accepts tensors of a GPU only with a small library",
            fix="Install g++ (Debian and Ubuntu: apt install g++), or set CXX to a compiler.",
        )
    check_extension_locks({name()})
    # beside the interpreter lies the ninja that was installed with it
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.rehearse.guard"], capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    found = find()
    if done.returncode != 0 or found is None:
        raise MachineError(
            f"the library a rehearsal needs does not compile against torch {version('torch')}",
            why=" ".join((done.stderr or done.stdout).strip().splitlines()[-3:])[:600],
            fix="Use a version of torch that the project is tested with (constraints.txt).",
        )
    return found


def _build() -> None:
    import torch
    from torch.utils.cpp_extension import load

    # it is loaded when torch is not there yet, so it must find torch's libraries by itself
    where = f"-Wl,-rpath,{Path(torch.__file__).parent / 'lib'}"
    load(name=name(), sources=[str(SOURCE)], extra_cflags=["-O1"], extra_ldflags=[where, "-Wl,--no-as-needed"], is_python_module=False)


if __name__ == "__main__":
    _build()
    sys.stdout.write(f"{find()}\n")
