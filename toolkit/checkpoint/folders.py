"""Folders of checkpoints: which checkpoint a path means, and which ones are deleted. No torch."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from toolkit.checkpoint.manifest import NAME, discover, read_manifest
from toolkit.errors import CheckpointError
from toolkit.files import remove_tree, sync_folder

log = logging.getLogger(__name__)

_NAME_ONE = "Name a run folder, a step-… folder, or what `toolkit convert import` wrote."


def checkpoint_in(path: Path) -> Path:
    """The checkpoint itself, or the newest complete one of a run or a folder of checkpoints.

    Its manifest is checked; where a folder was searched, its files' sizes are too. Raises
    CheckpointError with what is wrong.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} {'is no folder' if path.exists() else 'does not exist'}", fix=_NAME_ONE)
    if (path / NAME).exists():
        try:
            read_manifest(path)
        except ValueError as e:
            raise CheckpointError(str(e), fix="Use another checkpoint.") from None
        return path
    inside = path / "checkpoints"
    checkpoints = discover(inside if inside.is_dir() else path)
    for one in checkpoints:
        if one.manifest is not None:
            return one.path
        if one.finished:
            # an older one may be good, but it is not what was asked for
            raise CheckpointError(
                f"the newest checkpoint cannot be used: {one.problem}", fix=f"Restore the file, or name an older step-… folder of {path}."
            )
    if checkpoints:
        raise CheckpointError(f"{path} holds no complete checkpoint", why="saving was cut off", fix=_NAME_ONE)
    raise CheckpointError(f"{path} holds no checkpoint", fix=_NAME_ONE)


def prune(folder: Path, *, keep: int, token: str, distrusted: Collection[str] = ()) -> list[Path]:
    """Delete complete checkpoints older than the newest `keep`; returns them.

    Damaged and unfinished ones neither count nor go. distrusted: names of folders whose files are
    known to be damaged.
    """
    good = [f for f in discover(folder) if f.manifest is not None and f.path.name not in distrusted]
    doomed = [f.path for f in good[keep:]]
    for path in doomed:
        remove_tree(path, token=token)
    return doomed


def set_aside(path: Path, *, token: str) -> None:
    """Free a checkpoint's name for a new one. An unfinished folder is deleted; a finished one,
    which is damaged, is renamed.
    """
    if not (path / NAME).exists():
        remove_tree(path, token=token)
        return
    kept = path.with_name(f"replaced-{path.name}-{token}")
    path.rename(kept)
    sync_folder(path.parent)
    log.warning("%s was damaged; it is now %s and may be deleted", path, kept.name)
