"""One run per folder: a lock that ends with its process, and the folders made ready under it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from toolkit.cluster.environment import SUPERVISED
from toolkit.config.schema import RunConfig
from toolkit.errors import CheckpointError
from toolkit.files import LOCK, FolderLock, remove_leftovers

log = logging.getLogger(__name__)


def checkpoint_folder(config: RunConfig) -> Path:
    """Where a run's checkpoints lie: checkpoint.dir, or checkpoints/ in the run folder."""
    return (config.checkpoint.dir or config.run.dir / "checkpoints").expanduser()


@dataclass(frozen=True)
class Claim:
    """What rank 0 holds while it runs. token: names this run's half-written folders."""

    checkpoints: Path
    token: str
    locks: tuple[FolderLock, ...]

    @property
    def proof(self) -> tuple[Path, bytes]:
        """A file under checkpoints and what is in it, for other hosts to see whether they share the
        folder.
        """
        path = self.checkpoints / LOCK
        return path, path.read_bytes() if not self.locks else self.locks[-1].note

    def release(self) -> None:
        for lock in self.locks:
            lock.release()


def claim(config: RunConfig, *, will_save: bool) -> Claim:
    """Make and lock the run's folders (rank 0 only), and clear what killed runs left half-written.

    Raises CheckpointError where a folder cannot be written or another run has it.
    """
    run, checkpoints = config.run.dir.expanduser(), checkpoint_folder(config)
    if SUPERVISED in os.environ:
        # the supervisor holds the locks: a frozen rank of a lost host would keep them
        remove_leftovers(checkpoints)
        return Claim(checkpoints, secrets.token_hex(4), ())
    locks = [_claimed(run, key="run.dir")]
    try:
        if will_save or checkpoints.is_dir():
            locks.append(_claimed(checkpoints, key="checkpoint.dir"))
            if left := remove_leftovers(checkpoints):
                log.info("removed what a killed run left half-written: %s", ", ".join(left))
    except BaseException:
        locks[0].release()
        raise
    return Claim(checkpoints, secrets.token_hex(4), tuple(locks))


def check_shared(proof: tuple[Path, bytes]) -> None:
    """On any other rank: CheckpointError where this host does not see the folder that rank 0 saves to."""
    path, note = proof
    try:
        seen = path.read_bytes()
    except OSError:
        seen = b""
    if seen != note:
        raise CheckpointError(
            f"host {socket.gethostname()} does not see {path.parent} as rank 0 does",
            why="a checkpoint is one folder that all ranks write to",
            fix="Set checkpoint.dir to a folder that all hosts share.",
        )


def _claimed(folder: Path, *, key: str) -> FolderLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FolderLock(folder)
    except OSError as e:
        raise CheckpointError(
            f"{key}={folder} cannot be written",
            why=(e.strerror or str(e)).lower(),
            fix=f"Set {key} to a folder that you may write to.",
        ) from None
