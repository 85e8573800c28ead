"""A folder that is written beside the name it gets when it is whole."""

from __future__ import annotations

import fcntl
import glob
import secrets
from pathlib import Path

from toolkit.checkpoint.claim import LOCK, FolderLock
from toolkit.checkpoint.files import remove_tree, sync_folder


class Partial:
    """`with Partial(final) as p: write into p.folder …; p.publish()`: after the block `final` is whole, or nothing is there.

    What killed processes left of the same `final` is removed first: a lock in each folder tells whether its writer still lives.
    Raises OSError where the parent cannot be written.
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
        """Give the folder its name."""
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
    """Whether a folder has the lock of a process that has ended; one without a lock is just being made or published."""
    try:
        with (folder / LOCK).open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or not to be had on this file system
        return False
    return True
