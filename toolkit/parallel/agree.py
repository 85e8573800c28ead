"""What one rank finds out, all ranks know: actions whose errors are raised on every rank, so that
none waits for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from toolkit.errors import MachineError, ToolkitError

log = logging.getLogger(__name__)

T = TypeVar("T")


def everywhere(action: Callable[[], T]) -> list[T]:
    """Run an action on all ranks and return all results in rank order; all ranks call it.

    If it fails on any rank, every rank raises the lowest failing rank's ToolkitError. An OSError
    becomes a MachineError that names the file; any other exception is logged with its traceback on
    its rank, and becomes a ToolkitError. Without process groups this process is the only rank.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine: tuple[T | None, ToolkitError | None]
    try:
        mine = action(), None
    except ToolkitError as e:
        mine = None, e
    except OSError as e:
        mine = None, MachineError(f"{e.filename or 'a file'}: {e.strerror or e}", fix="Check the disk and the folder's permissions.")
    except Exception as e:  # whatever it is, the other ranks wait for this one's answer
        log.exception("rank %d failed", rank)
        mine = None, ToolkitError(f"rank {rank} failed", why=f"{type(e).__name__}: {e}", fix="Its log has the traceback.")
    everyone: list[tuple[T, ToolkitError | None]] = [mine] * ranks  # type: ignore[list-item]
    if ranks > 1:
        dist.all_gather_object(everyone, mine)
    for _, error in everyone:
        if error is not None:
            raise error
    return [value for value, _ in everyone]


def on_rank_0(action: Callable[[], T]) -> T | None:
    """Run an action on rank 0 alone while the others wait; its result there, None elsewhere; its
    error on every rank.
    """
    results: list[T] = []
    first = not dist.is_initialized() or dist.get_rank() == 0
    everywhere(lambda: results.append(action()) if first else None)
    return results[0] if results else None
