"""What the programs that the launcher starts share: how a rank speaks, and how it says what a user
got wrong.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from toolkit.cluster.environment import PLANNED, cuda_defaults, gpu_count
from toolkit.cluster.launch import clear_line
from toolkit.config.schema import RunConfig
from toolkit.errors import OutOfMemory, ToolkitError
from toolkit.files import keep_others_out
from toolkit.redact import Redacted, hide_secrets, redact
from toolkit.train.console import ConsoleLog, rank_name, was_told
from toolkit.train.failures import is_echo


def say(error: ToolkitError, *, rank: int, local_rank: int) -> None:
    """Write a user error once a host; its other ranks give the one that writes time to do so. That
    memory has ended each rank says of itself.
    """
    if local_rank == 0 or isinstance(error, OutOfMemory):
        named = rank == 0 or isinstance(error, OutOfMemory)  # which says its rank itself
        sys.stderr.write(redact(f"{'error' if named else f'error on {rank_name(rank)}'}: {error}\n"))
        sys.stderr.flush()
    elif signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(3.0)  # the launcher ends all ranks at the first exit that it sees


def say_failure(error: BaseException, *, rank: int) -> None:
    """Write the traceback of an error that is no user's, after a line that names the rank; nothing
    where another rank has said the cause. A rank that only lost another one says so in a line:
    whoever has gone may have had no time to say why.
    """
    if was_told(error):
        return
    clear_line()
    if is_echo(error):
        first = " ".join(str(error).split())[:160]
        text = f"{rank_name(rank)} lost another rank, which has said nothing yet: {first}\n"
    else:
        text = f"{rank_name(rank)} failed:\n" + "".join(traceback.format_exception(error))
    sys.stderr.write(redact(text))
    sys.stderr.flush()


@contextmanager
def alone(*, rank: int) -> Iterator[None]:
    """End this process at once where memory has ended, or where another rank has gone: the others wait
    in a collective that this one will not join, and tidying up would wait for them.
    """
    try:
        yield
    except OutOfMemory as error:
        say(error, rank=rank, local_rank=0)
        sys.stdout.flush()
        os._exit(error.exit_code)
    except RuntimeError as error:
        if not is_echo(error):
            raise
        say_failure(error, rank=rank)
        time.sleep(3.0)  # the launcher reports the first exit code that it sees
        os._exit(1)


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
    """Set the variables that CUDA and PyTorch's allocator read when they start; call it before
    torch is imported.
    """
    if gpu_count() > 0:
        os.environ.update(cuda_defaults(tp=config.parallel.tp, zero_stage=config.zero.stage))


def quiet() -> None:
    """Leave the step lines alone on the screen: imports that warn of absent options, DeepSpeed's
    start-up log.
    """
    warnings.filterwarnings("ignore")
    quiet_libraries()
    hide_secrets()
    keep_others_out()


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
    if rank:
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter(f"{rank_name(rank).replace('%', '%%')}: %(message)s"))
    handler.setFormatter(Redacted(handler.formatter))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


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

    def __call__(self, kind: Any, error: BaseException, trace: Any) -> None:
        if was_told(error):
            return
        if not isinstance(error, ToolkitError):
            self.before(kind, error, trace)
            return
        with redirect_stderr(sys.__stderr__):  # torch.distributed calls this hook with stderr put away, to add the rank to each line
            say(error, rank=int(os.environ.get("RANK", 0)), local_rank=int(os.environ.get("LOCAL_RANK", 0)))
        raise SystemExit(error.exit_code)  # Python takes the exit code from it
