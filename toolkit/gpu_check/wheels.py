"""The packages that a GPU check needs beside PyTorch, for a machine without a registry: standard
library only.

    python -m toolkit.gpu_check.wheels collect FOLDER        where there is a registry: download and build them, for this Python
    python -m toolkit.gpu_check.wheels install FOLDER INTO   where there is none: put what is missing into INTO, for PYTHONPATH

Nothing that is installed is touched, PyTorch least of all: what this Python already has is left
out, whatever its version.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

BUILT = "deepspeed"  # a source distribution; its extensions compile where they are used
ALONE = "megatron-core"  # as deepspeed, it asks for torch, which must not come along
# what these two and the toolkit import in a training run; pip adds what they need in turn
OTHERS = (
    *("numpy", "packaging", "einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo", "tqdm"),
    *("pydantic", "typer", "rich", "pyyaml", "safetensors", "setuptools"),
)
TOGETHER = {"pydantic", "pydantic-core"}  # versions that were made for each other alone
MOST_MIB = 64


def collect(folder: Path, *, constraints: Path) -> int:
    """Fill a folder with wheels for this interpreter and platform; the exit code of pip."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    download = [*pip, "download", "-q", "-c", str(constraints), "--only-binary=:all:", "-d", str(folder)]
    commands = [
        [*pip, "wheel", "-q", "-c", str(constraints), "--no-deps", "-w", str(folder), BUILT],
        [*download, "--no-deps", ALONE],
        [*download, *OTHERS],
    ]
    for command in commands:
        done = subprocess.run(command, env={**os.environ, "DS_BUILD_OPS": "0"}, check=False)
        if done.returncode != 0:
            return done.returncode
    size = sum(path.stat().st_size for path in folder.glob("*.whl")) / 2**20
    sys.stdout.write(
        f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size:.0f} MiB, for Python {sys.version_info.major}.{sys.version_info.minor}\n"
    )
    return 0 if size < MOST_MIB else 1


def install(folder: Path, into: Path) -> int:
    """Put the wheels of packages that this Python lacks into a folder of its own; 2 where the
    wheels do not do.
    """
    wheels = {re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower(): path for path in sorted(folder.glob("*.whl"))}
    lacking = [name for name in (BUILT, ALONE, *OTHERS) if name not in wheels and not _installed(name)]
    if not _installed("torch"):
        sys.stderr.write(f"error: {sys.executable} has no torch, and the wheels bring none. Set PYTHON to a Python that has it.\n")
        return 2
    if lacking:
        sys.stderr.write(
            f"error: {folder} has no wheel of {', '.join(lacking)}. Make it where there is a registry: make gpu-wheels WHEELS={folder}.\n"
        )
        return 2
    missing = {name for name in wheels if not _installed(name)}
    missing |= TOGETHER if missing & TOGETHER else set()
    if not missing:
        return 0
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
    command += ["--target", str(into), "--find-links", str(folder), *sorted(missing)]
    environ = {k: v for k, v in os.environ.items() if k not in ("PIP_FIND_LINKS", "PIP_CONSTRAINT")}
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        reason = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["pip says nothing"]
        sys.stderr.write(f"error: {folder} does not fit {sys.executable}: {reason[0].removeprefix('ERROR: ')}\n")
        return 2
    return 0


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """The exit code; 2 for wrong arguments."""
    if len(arguments) == 2 and arguments[0] == "collect":
        return collect(Path(arguments[1]), constraints=Path(__file__).parents[2] / "constraints.txt")
    if len(arguments) == 3 and arguments[0] == "install":
        return install(Path(arguments[1]), Path(arguments[2]))
    sys.stderr.write("usage: python -m toolkit.gpu_check.wheels collect FOLDER | install FOLDER INTO\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
