"""Files and folders that are whole or not there: durable writes, folders published under their
final name, folder locks.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict

from toolkit.errors import CheckpointError

log = logging.getLogger(__name__)

LOCK = ".lock"
_CHUNK = 1 << 19  # small enough to stay in the processor's cache between reading and hashing


class FileRecord(BaseModel):
    """One file that a manifest lists: name inside its folder, size in bytes, sha256 in hex."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int
    sha256: str


def keep_others_out() -> None:
    """Let no file that this process makes be writable by everybody, however loose the user's umask is."""
    os.umask(os.umask(0o077) | 0o002)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there takes the name when the block
    ends, after an fsync.

    If anything raises before that, the temporary file is removed and `path` stays as it was. The
    folder must exist.
    """
    part = path.with_name(f".{os.getpid()}.tmp.{path.name}")  # libraries choose a format by the suffix
    try:
        yield part
        sync_file(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_durably(path: Path, data: bytes | str) -> None:
    """Replace a small file in one step, once its new content is on disk; text is written as UTF-8.
    OSError leaves the old file.
    """
    with replacing(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_sha256(path: Path, *, progress: Callable[[int], None] = lambda _: None) -> str:
    """Return the sha256 of a file in hex; progress is called with the number of bytes read since
    its last call.
    """
    digest, piece = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(piece):
            digest.update(piece[:n])
            progress(n)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make names created, renamed and removed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path, *, token: str) -> None:
    """Delete a folder. It is renamed first, so that a crash half-way leaves nothing under its name."""
    doomed = folder if folder.name.startswith(".") else folder.with_name(f".deleted-{folder.name}-{token}")
    if doomed != folder:
        folder.rename(doomed)
        sync_folder(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what killed runs left half-written or half-deleted; nothing else may use the folder
    meanwhile. Returns the names.
    """
    left = [p for p in folder.iterdir() if p.name.startswith((".partial-", ".deleted-")) and p.is_dir()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(p.name for p in left)


class FolderLock:
    """Holds a folder until the process ends or release() is called; raises CheckpointError where
    another process has it.

    A POSIX record lock: the system drops it however the process ends, forked readers do not inherit
    it, and NFS knows it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.file: IO[bytes] | None = None
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = self._owner()
            self.file.close()
            raise CheckpointError(
                f"{folder} is in use{owner}",
                why="two runs in one folder would overwrite each other's files",
                fix="Wait for the other run, or set another run.dir and checkpoint.dir.",
            ) from None
        except OSError as e:
            log.warning("%s cannot be locked (%s): take care that no second run uses the folder", folder, e.strerror)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.note = json.dumps(note).encode()
        self.file.truncate(0)
        self.file.seek(0)
        self.file.write(self.note)

    def _owner(self) -> str:
        try:
            assert self.file is not None
            note = json.loads(self.file.read())
            return f" by process {note['pid']} on host {note['host']} since {note['since']}"
        except (ValueError, KeyError, TypeError):
            return " by another process"

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class Partial:
    """`with Partial(final) as p: write into p.folder …; p.publish()`: after the block `final` is
    whole, or nothing is there.

    What killed processes left of the same `final` is removed first: a lock in each folder tells
    whether its writer still lives. Raises OSError where the parent cannot be written.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.folder = final.with_name(f".partial-{final.name}-{secrets.token_hex(4)}")
        self.lock: FolderLock | None = None

    def __enter__(self) -> Partial:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        for left in self.final.parent.glob(f".partial-{glob.escape(self.final.name)}-*"):
            if _abandoned(left):
                remove_tree(left, token="")
        self.folder.mkdir()
        try:
            self.lock = FolderLock(self.folder)
        except OSError:
            self.__exit__()
            raise
        return self

    def publish(self) -> None:
        """Sync the folder and give it its final name."""
        (self.folder / LOCK).unlink(missing_ok=True)
        sync_folder(self.folder)
        self.folder.rename(self.final)
        sync_folder(self.final.parent)

    def __exit__(self, *_: object) -> None:
        if self.folder.exists():
            remove_tree(self.folder, token="")
        if self.lock is not None:
            self.lock.release()


def _abandoned(folder: Path) -> bool:
    """Whether a folder's writer has ended, so that its lock is free; a folder without a lock is
    just being made or published.
    """
    try:
        with (folder / LOCK).open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has the lock, or this file system has no locks
        return False
    return True
