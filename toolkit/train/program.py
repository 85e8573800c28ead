"""What the programs that the launcher starts share: how a rank speaks, and how it says what a user
got wrong.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from toolkit.cluster.environment import PLANNED, cuda_defaults, gpu_count
from toolkit.config.schema import RunConfig
from toolkit.errors import ToolkitError
from toolkit.train.console import ConsoleLog


def say(error: ToolkitError, *, rank: int, local_rank: int) -> None:
    """Write a user error once a host; its other ranks give the one that writes time to do so."""
    if local_rank == 0:
        sys.stderr.write(f"{'error' if rank == 0 else f'error on rank {rank}'}: {error}\n")
        sys.stderr.flush()
    elif signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(3.0)  # the launcher ends all ranks at the first exit that it sees


@contextmanager
def mute_if_already_reported() -> Iterator[None]:
    """Leave out on the screen what the process that started the ranks has already shown there;
    console.log gets it.
    """
    handlers = [*logging.getLogger().handlers, *logging.getLogger("toolkit").handlers]
    muted = [h for h in handlers if PLANNED in os.environ and not isinstance(h, ConsoleLog)]
    for handler in muted:
        handler.addFilter(_is_news)
    try:
        yield
    finally:
        for handler in muted:
            handler.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not record.name.startswith("toolkit")


def set_cuda_defaults(config: RunConfig) -> None:
    """Set the variables that CUDA and PyTorch's allocator read when they start; call it before torch is imported."""
    if gpu_count() > 0:
        os.environ.update(cuda_defaults(tp=config.parallel.tp, zero_stage=config.zero.stage))


def quiet() -> None:
    """Leave the step lines alone on the screen: imports that warn of absent options, DeepSpeed's
    start-up log.
    """
    warnings.filterwarnings("ignore")
    quiet_libraries()


def quiet_libraries() -> None:
    """The same for the libraries alone: other warnings in a script are the user's own."""
    for name in ("deepspeed", "megatron", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=name)
    for name in ("DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def speak(*, rank: int) -> None:
    """Show the step lines of a script that has set up no logging of its own; ranks other than 0
    only warn.
    """
    log = logging.getLogger("toolkit")
    if logging.getLogger().handlers or log.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def say_uncaught_errors() -> None:
    """Let a script that does not catch a ToolkitError end with its message and exit code, as a
    command does.
    """
    if isinstance(sys.excepthook, _SayErrors):
        return
    sys.excepthook = _SayErrors(sys.excepthook)


class _SayErrors:
    """A sys.excepthook: any other error keeps its traceback."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, kind: Any, error: BaseException, traceback: Any) -> None:
        if not isinstance(error, ToolkitError):
            self.before(kind, error, traceback)
            return
        with redirect_stderr(sys.__stderr__):  # torch.distributed calls this hook with stderr put away, to add the rank to each line
            say(error, rank=int(os.environ.get("RANK", 0)), local_rank=int(os.environ.get("LOCAL_RANK", 0)))
        raise SystemExit(error.exit_code)  # Python takes the exit code from it
