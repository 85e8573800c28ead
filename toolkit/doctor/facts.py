"""What a host is: versions, GPUs, limits, memory, folders, build locks. Read by the probe on the
host itself; no torch.

Each function returns values as JSON has them. None judges: that is checks.py's, which sees all hosts.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from toolkit import __version__
from toolkit.cluster.environment import gpu_count, usable_cores
from toolkit.cluster.locks import extension_folders, is_built, is_shared, unfinished_builds

PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "triton", "transformer-engine", "safetensors", "pydantic")
LIMITS = {"nofile": "RLIMIT_NOFILE", "memlock": "RLIMIT_MEMLOCK", "nproc": "RLIMIT_NPROC", "fsize": "RLIMIT_FSIZE", "as": "RLIMIT_AS"}
WRITE_BYTES = 1 << 20
# asked of nvidia-smi; ECC counts are since the driver was loaded
GPU_FIELDS = ("name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")


def gather(request: Mapping[str, Any]) -> dict[str, Any]:
    """All facts of this host; one that cannot be found out is {"error": why}."""
    parts: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "gpus": gpus,
        "limits": limits,
        "memory": memory,
        "folders": lambda: {key: folder(Path(path)) for key, path in request["folders"].items()},
        "data": lambda: {path: data_size(path) for path in request["data"]},
        "names": lambda: {name: address_of(name) for name in request["hosts"]},
        "unmet": lambda: unmet_needs(request["config"]),
        "builds": builds,
        "built": lambda: {name: is_built(name) for name in request["extensions"]},
        "tools": lambda: {name: shutil.which(name) for name in ("c++", "ninja", "nvcc", "pdsh")},
        "open_to_all": lambda: sorted(open_to_all()),
        "ranks": lambda: running_ranks(os.getpid()),
        "host": host,
    }
    found: dict[str, Any] = {}
    for name, find in parts.items():
        try:
            found[name] = find()
        except Exception as error:  # a probe that falls over tells nothing of the other facts
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


def versions() -> dict[str, str | None]:
    """Versions by name; None where a package is absent. "code" is a digest of the toolkit's own files."""
    found: dict[str, str | None] = {"python": platform.python_version(), "toolkit": __version__, "code": code_digest()}
    for package in PACKAGES:
        found[package] = _version(package)
    found["nccl"] = next((v for v in map(_version, ("nvidia-nccl-cu13", "nvidia-nccl-cu12")) if v), None)
    found["driver"] = _driver()
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_digest() -> str:
    """Eight digits that tell two states of the toolkit's code apart, whatever version they claim."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _driver() -> str | None:
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.exists() else None


def gpus() -> list[dict[str, Any]]:
    """GPUs that ranks can use: name, memory in MiB, uncorrected memory errors. Without the driver's
    tool only their number is known.
    """
    count = gpu_count()
    if not count or shutil.which("nvidia-smi") is None:
        return [{"name": None}] * count
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """nvidia-smi's lines of GPU_FIELDS; a number it does not know ([N/A]) is None."""
    found = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(GPU_FIELDS):
            total, used, errors = (int(v) if v.isdigit() else None for v in values[2:])
            found.append({"name": values[0], "driver": values[1], "memory": total, "used": used, "ecc": errors})
    return found


def limits() -> dict[str, int | None]:
    """Soft limits of this process, which ranks started the same way will have; None: unlimited."""
    found = {name: resource.getrlimit(getattr(resource, constant))[0] for name, constant in LIMITS.items()}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in found.items()}


def memory() -> dict[str, Any]:
    """Bytes of RAM and of /dev/shm, cores that may be used, huge pages."""
    ram = psutil.virtual_memory()
    found: dict[str, Any] = {"total": ram.total, "available": ram.available, "cores": usable_cores(), "load": os.getloadavg()[0]}
    try:
        shm = os.statvfs("/dev/shm")
        found["shm"] = {"total": shm.f_blocks * shm.f_frsize, "free": shm.f_bavail * shm.f_frsize}
    except OSError:
        found["shm"] = None
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    kib = int(lines.get("Hugepagesize", "0 kB").split()[0])
    found["hugepages_free"] = int(lines.get("HugePages_Free", "0")) * kib * 1024
    return found


def host() -> dict[str, Any]:
    """Name, user, kernel, boot, InfiniBand devices, and whether MPI's or Slurm's place is set here."""
    infiniband = Path("/sys/class/infiniband")
    return {
        "name": socket.gethostname(),
        "own_address": address_of(socket.gethostname()),
        "user": os.geteuid(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "infiniband": sorted(p.name for p in infiniband.iterdir()) if infiniband.is_dir() else [],
        "python": sys.executable,
    }


def address_of(name: str) -> str | None:
    """The IPv4 or IPv6 address that this host has for a name; None where it knows none."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def existing(path: Path) -> Path:
    """The folder itself, or its nearest parent that is there."""
    path = Path(os.path.abspath(path.expanduser()))
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def folder(path: Path) -> dict[str, Any]:
    """Free bytes and files, file system, and a write test of a folder or, while it is not there, of
    its nearest parent.
    """
    place = existing(path)
    space = os.statvfs(place)
    found: dict[str, Any] = {"path": str(path), "place": str(place), "free": space.f_bavail * space.f_frsize}
    found["free_files"] = space.f_favail if space.f_files else None  # some file systems do not count files
    found["type"], found["shared"] = _file_system(place), is_shared(place / "file")
    found["error"] = None
    started = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(os.urandom(WRITE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found["error"] = (error.strerror or str(error)).lower()
    found["write_s"] = time.perf_counter() - started
    return found


def _file_system(place: Path) -> str | None:
    mounts = {p.mountpoint: p.fstype for p in psutil.disk_partitions(all=True)}
    return next((mounts[str(p)] for p in (place, *place.parents) if str(p) in mounts), None)


def data_size(path: str) -> int | None:
    """Bytes of a prepared data set's tokens, of a file, or the number of entries of a folder; None
    where there is nothing.
    """
    for candidate in (Path(f"{path}.bin"), Path(path)):
        if candidate.is_file():
            return candidate.stat().st_size
        if candidate.is_dir():
            return sum(1 for _ in candidate.iterdir())
    return None


def unmet_needs(config: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """What the config needs and this host lacks: the messages with which `toolkit train` would
    refuse it here.
    """
    if config is None:
        return []
    from toolkit.cluster.needs import unmet
    from toolkit.config.schema import RunConfig

    found = [{"what": e.what, "why": e.why, "fix": e.fix} for e in unmet(RunConfig.model_validate(config))]
    if config["model"]["impl"] == "te" and find_spec("transformer_engine") is None:
        found.append({"what": "model.impl=te needs transformer-engine", "why": "it is not installed", "fix": "Install it, or set local."})
    return found


def builds() -> list[dict[str, Any]]:
    """Extensions whose build is locked: the lock's path, seconds since anything changed, and
    processes that compile.
    """
    return [{"lock": str(b.lock), "idle_s": b.idle_s, "builders": b.builders, "stale": b.stale} for b in unfinished_builds()]


def open_to_all() -> Iterator[str]:
    """Files and folders that a run executes and that another user could change: writable by all, or
    owned by somebody else.

    The toolkit's own files, the interpreter, folders of PATH, and the extensions that DeepSpeed has compiled.
    """
    package = Path(__file__).parents[1]
    paths = [package, *package.rglob("*.py"), Path(sys.executable).parent]
    paths += [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    for place in extension_folders():
        paths += [place, *place.glob("*"), *place.glob("*/*.so"), *place.glob("*/build.ninja")]
    for path in dict.fromkeys(paths):
        try:
            status = path.stat()
        except OSError:
            continue
        sticky_folder = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & stat.S_IWOTH and not sticky_folder:
            yield f"{path} (writable by all)"
        elif status.st_uid not in (0, os.geteuid()) and path.suffix == ".so":
            yield f"{path} (owned by user {status.st_uid})"


def running_ranks(own: int) -> list[int]:
    """Processes of this host that are ranks of some run."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if process.pid != own and "-m" in words and "toolkit.train" in words and "deepspeed.launcher.launch" not in words:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
