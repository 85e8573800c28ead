"""`python -m toolkit.train CONFIG [key=value…]`: one rank of a run, as the deepspeed launcher starts it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.cluster.environment import PLANNED
from toolkit.errors import ToolkitError


def main(arguments: list[str]) -> int:
    """Train; returns the exit code. A user error is one message from each host, never a traceback."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    quiet()
    if not arguments:
        sys.stderr.write("usage: python -m toolkit.train CONFIG [section.key=value …]\n")
        return 2
    try:
        from toolkit.config.load import load_config

        config = load_config(Path(arguments[0]), arguments[1:])
        from toolkit.train.resolve import plan

        with said_before():
            layout, data = plan(config, int(os.environ.get("WORLD_SIZE", 1)))
        from toolkit.train.loop import train  # torch comes with it, once there is something to train

        train(config, layout, data)
    except ToolkitError as error:
        say(error, rank=rank, local_rank=local_rank)
        return error.exit_code
    return 0


def say(error: ToolkitError, *, rank: int, local_rank: int) -> None:
    """Write a user error once a host; its other ranks give the one that writes time to do so."""
    if local_rank == 0:
        sys.stderr.write(f"{'error' if rank == 0 else f'error on rank {rank}'}: {error}\n")
        sys.stderr.flush()
    elif signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(3.0)  # the launcher ends all ranks at the first exit that it sees


@contextmanager
def said_before() -> Iterator[None]:
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


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.exit(code)
