"""`python -m toolkit.train CONFIG [key=value…]`: one rank of a run, as the deepspeed launcher starts it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from toolkit.cluster.environment import take_place_from_mpi
from toolkit.cluster.launch import clear_line
from toolkit.cluster.rank import run_as_rank
from toolkit.errors import Stopped, ToolkitError
from toolkit.train.program import quiet, say


def main(arguments: list[str]) -> int:
    """Train; returns the exit code. A user error is one message from each host, never a traceback."""
    take_place_from_mpi()
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    if rank:
        logging.getLogger().handlers[0].addFilter(_on_a_line_of_its_own)
    quiet()
    if not arguments:
        sys.stderr.write("usage: python -m toolkit.train CONFIG [section.key=value …]\n")
        return 2
    try:
        from toolkit.trainer import Trainer

        Trainer(Path(arguments[0]), overrides=arguments[1:]).fit()
    except Stopped as stopped:  # said already, in the line after its last step
        return stopped.exit_code
    except ToolkitError as error:
        say(error, rank=rank, local_rank=local_rank)
        return error.exit_code
    return 0


def _on_a_line_of_its_own(record: logging.LogRecord) -> bool:
    clear_line()  # rank 0's progress bar may stand there
    return True


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
