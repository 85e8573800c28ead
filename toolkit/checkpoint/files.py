"""Files that survive a power cut: written to the end, synced, and only then given their name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Put a whole small file in place or none: temporary name, fsync, rename."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with part.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def sync_folder(folder: Path) -> None:
    """Make names created, renamed and removed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path, *, token: str) -> None:
    """Delete a folder so that a crash half-way leaves nothing that looks like one: it loses its name first."""
    doomed = folder if folder.name.startswith(".") else folder.with_name(f".deleted-{folder.name}-{token}")
    if doomed != folder:
        folder.rename(doomed)
        sync_folder(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what killed runs left half-written or half-deleted; nothing else may use the folder meanwhile. Returns the names."""
    left = [p for p in folder.iterdir() if p.name.startswith((".partial-", ".deleted-")) and p.is_dir()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(p.name for p in left)
