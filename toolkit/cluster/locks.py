"""Stale build locks of DeepSpeed's JIT-compiled extensions: found and named before a run would wait
for one for ever.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from toolkit.cluster.needs import compiled_with_deepspeed
from toolkit.errors import MachineError

logger = logging.getLogger(__name__)

BUILD_TIMES = {"cpu_adam": "about a minute", "async_io": "four or five minutes"}  # on two cores
GRACE_S = 20.0  # between the lock and ninja's start, and between ninja's end and the unlock, no compiler runs
SHARED_GRACE_S = 900.0  # the compiler may run on another host, unseen from here
SHARED_FILE_SYSTEMS = (
    "nfs",
    "lustre",
    "cifs",
    "smb",
    "beegfs",
    "gpfs",
    "ceph",
    "glusterfs",
    "fuse.",
    "9p",
    "virtiofs",
    "afs",
    "panfs",
    "weka",
)


def extension_folders() -> list[Path]:
    """Folders under which torch.utils.cpp_extension builds for this interpreter, found without
    importing torch.

    TORCH_EXTENSIONS_DIR as it is; otherwise torch_extensions/py<XY>_<cpu|cuNNN|rocmNNN> in the
    user's cache folder.
    """
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(root)]
    if sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    tag = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return sorted(p for p in (cache / "torch_extensions").glob(f"{tag}_*") if p.is_dir())


def check_extension_locks(names: Iterable[str] | None = None, *, grace_s: float | None = None, poll_s: float = 0.5) -> None:
    """Return once no extension's build is locked; wait while a compiler is at work, and refuse a
    lock that nobody holds.

    names: extensions to look at, e.g. {"cpu_adam"}; None: all. grace_s: seconds without a compiler
    or a new file in the folder after which a lock counts as left behind; None: 20, or 900 on a file
    system shared with other hosts. torch's lock file names no owner, hence the indirect proof.
    Raises MachineError naming the file to delete.
    """
    wanted = None if names is None else set(names)
    for folder in extension_folders():
        for lock in sorted(folder.glob("*/lock")):
            if wanted is None or lock.parent.name in wanted:
                _wait_or_refuse(lock, grace_s=grace_s, poll_s=poll_s)
    for name in sorted(wanted or ()):
        if name in BUILD_TIMES and not is_built(name):  # the rehearsal's own library is quick
            logger.info("compiling DeepSpeed's extension %s, once on this machine: %s", name, BUILD_TIMES[name])


@dataclass(frozen=True, kw_only=True)
class UnfinishedBuild:
    """A lock on an extension's build folder: seconds since anything changed there, and the
    processes that compile in it.
    """

    lock: Path
    idle_s: float
    builders: list[int]
    grace_s: float

    @property
    def stale(self) -> bool:
        """Nobody has compiled for so long that the build was killed."""
        return not self.builders and self.idle_s >= self.grace_s


def unfinished_builds() -> list[UnfinishedBuild]:
    """Every lock there is now, without waiting."""
    found = []
    for folder in extension_folders():
        for lock in sorted(folder.glob("*/lock")):
            newest = _newest_change(lock)
            if newest is not None:
                grace_s = SHARED_GRACE_S if is_shared(lock) else GRACE_S
                found.append(UnfinishedBuild(lock=lock, idle_s=time.time() - newest, builders=_builders(lock.parent), grace_s=grace_s))
    return found


def is_built(name: str) -> bool:
    """Whether an extension is compiled already, by an earlier run or with DeepSpeed itself."""
    by_a_run = any((folder / name / f"{name}.so").is_file() for folder in extension_folders())
    return by_a_run or any(compiled_with_deepspeed(name))


def _wait_or_refuse(lock: Path, *, grace_s: float | None, poll_s: float) -> None:
    if grace_s is None:
        grace_s = SHARED_GRACE_S if is_shared(lock) else GRACE_S
    busy_at, seen, announced = 0.0, None, False
    while (newest := _newest_change(lock)) is not None:
        now = time.time()
        builders = _builders(lock.parent)
        if builders or (seen is not None and newest != seen):
            busy_at = now
        elif seen is None:
            busy_at = min(newest, now)  # another host's clock may run ahead
        seen = newest
        idle_s = now - busy_at
        if idle_s >= grace_s:
            raise MachineError(
                f"the DeepSpeed extension {lock.parent.name} is locked by {lock}",
                why=f"nothing has compiled it for {idle_s:.0f} s, so the build was killed, and this run would wait for ever",
                fix=f"Delete {lock} and start again.",
            )
        if not announced:
            who = f"process {builders[0]} compiles it" if builders else "its build may be about to start or end"
            logger.warning("waiting for the DeepSpeed extension %s (%s; lock %s)", lock.parent.name, who, lock)
            announced = True
        time.sleep(poll_s)


def _newest_change(lock: Path) -> float | None:
    """Time of the last change in the build folder, in seconds since the epoch; None once the lock is gone."""
    try:
        changes = [lock.stat().st_mtime]
    except FileNotFoundError:
        return None
    for file in lock.parent.iterdir():
        try:
            changes.append(file.stat().st_mtime)
        except FileNotFoundError:  # compilers remove their temporary files
            continue
    return max(changes)


def _builders(folder: Path) -> list[int]:
    """Processes that work in a build folder: ninja and the compilers it starts run there."""
    at, processes = str(folder.resolve()), []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.cwd() == at:
                processes.append(process.pid)
        except psutil.Error:
            continue
    return processes


def is_shared(path: Path) -> bool:
    """Whether a file lies on a file system of a kind that hosts share, by the mount's type."""
    mounts = {p.mountpoint: p.fstype for p in psutil.disk_partitions(all=True)}
    for parent in path.resolve().parents:
        if str(parent) in mounts:
            return mounts[str(parent)].startswith(SHARED_FILE_SYSTEMS)
    return False
