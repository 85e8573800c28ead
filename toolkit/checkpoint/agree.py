"""What one rank finds out, all ranks know: actions whose errors are raised everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from toolkit.errors import CheckpointError, ToolkitError

T = TypeVar("T")


def everywhere(action: Callable[[], T]) -> list[T]:
    """Run an action on all ranks; returns all results in rank order, or raises the lowest failing rank's error on every rank."""
    mine: tuple[T | None, ToolkitError | None]
    try:
        mine = action(), None
    except ToolkitError as e:
        mine = None, e
    except OSError as e:
        mine = None, CheckpointError(f"{e.filename or 'a file'}: {e.strerror or e}", fix="Check the disk and the folder's permissions.")
    everyone: list[tuple[T, ToolkitError | None]] = [mine] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(everyone, mine)
    for _, error in everyone:
        if error is not None:
            raise error
    return [value for value, _ in everyone]


def on_rank_0(action: Callable[[], T]) -> T | None:
    """Run an action on rank 0 alone and wait for it; its result there, None elsewhere; its error everywhere."""
    kept: list[T] = []
    everywhere(lambda: kept.append(action()) if dist.get_rank() == 0 else None)
    return kept[0] if kept else None
