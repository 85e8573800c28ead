"""Which checkpoint a path on the command line or in a config names; needs no torch."""

from __future__ import annotations

from pathlib import Path

from toolkit.checkpoint.manifest import NAME, discover, read_manifest
from toolkit.errors import CheckpointError

_NAME_ONE = "Name a run folder, a step-… folder, or what `toolkit convert import` wrote."


def checkpoint_in(path: Path) -> Path:
    """The checkpoint itself, or the newest complete one of a run or a folder of checkpoints.

    Its manifest is checked, its files' sizes where it was looked for; CheckpointError says what is wrong with what was found.
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
    found = discover(inside if inside.is_dir() else path)
    for one in found:
        if one.manifest is not None:
            return one.path
        if one.finished:
            # an older one may be good, but it is not what was asked for
            raise CheckpointError(
                f"the newest checkpoint cannot be used: {one.problem}", fix=f"Restore the file, or name an older step-… folder of {path}."
            )
    if found:
        raise CheckpointError(f"{path} holds no complete checkpoint", why="saving was cut off", fix=_NAME_ONE)
    raise CheckpointError(f"{path} holds no checkpoint", fix=_NAME_ONE)
