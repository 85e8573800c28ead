"""Which checkpoints stay: the newest good ones; anything else that was finished goes, name first."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from toolkit.checkpoint.manifest import NAME, discover
from toolkit.files import remove_tree, sync_folder

log = logging.getLogger(__name__)


def prune(folder: Path, *, keep: int, token: str, distrusted: Collection[str] = ()) -> list[Path]:
    """Delete complete checkpoints older than the newest `keep`; returns them.

    Damaged and unfinished ones neither count nor go. distrusted: names of folders whose files are known to be damaged.
    """
    good = [f for f in discover(folder) if f.manifest is not None and f.path.name not in distrusted]
    doomed = [f.path for f in good[keep:]]
    for path in doomed:
        remove_tree(path, token=token)
    return doomed


def set_aside(path: Path, *, token: str) -> None:
    """Free a checkpoint's name for a new one: an unfinished folder goes, a finished (hence damaged) one is kept under another name."""
    if not (path / NAME).exists():
        remove_tree(path, token=token)
        return
    kept = path.with_name(f"replaced-{path.name}-{token}")
    path.rename(kept)
    sync_folder(path.parent)
    log.warning("%s was damaged; it is now %s and may be deleted", path, kept.name)
