"""What the programs that the launcher starts share: how a rank speaks, and how it says what a user got wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from toolkit.cluster.environment import PLANNED
from toolkit.errors import ToolkitError


def say(error: ToolkitError, *, rank: int, local_rank: int) -> None:
    """Write a user error once a host; its other ranks give the one that writes time to do so."""
    if local_rank == 0:
        sys.stderr.write(f"{'error' if rank == 0 else f'error on rank {rank}'}: {error}\n")
        sys.stderr.flush()
    elif signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(3.0)  # the launcher ends all ranks at the first exit that it sees


@contextmanager
def mute_if_already_reported() -> Iterator[None]:
    """Leave out what the process that started the ranks has already shown."""
    log = logging.getLogger("toolkit")
    if PLANNED in os.environ:
        log.setLevel(logging.WARNING)
    yield
    log.setLevel(logging.NOTSET)


def quiet() -> None:
    """Leave the step lines alone on the screen: imports that warn of absent options, DeepSpeed's start-up log."""
    warnings.filterwarnings("ignore")
    for name in ("DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
