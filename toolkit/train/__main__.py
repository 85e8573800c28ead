"""`python -m toolkit.train CONFIG [key=value…]`: one rank of a run, as the deepspeed launcher starts it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from toolkit.cluster.environment import take_place_from_mpi
from toolkit.cluster.launch import clear_line
from toolkit.cluster.rank import run_as_rank
from toolkit.cluster.words import unpacked
from toolkit.errors import Stopped, ToolkitError
from toolkit.train.console import rank_name
from toolkit.train.program import quiet, say, say_failure


def main(arguments: list[str]) -> int:
    """Train; returns the exit code. A user error is one message from each host, never a traceback."""
    take_place_from_mpi()
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if rank:
        screen = logging.getLogger().handlers[0]
        screen.setLevel(logging.WARNING)  # its own file gets all it says
        screen.setFormatter(logging.Formatter(f"{rank_name(rank).replace('%', '%%')}: %(message)s"))
        screen.addFilter(_on_a_line_of_its_own)
    quiet()
    arguments = [unpacked(word) for word in arguments]
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
    except Exception as error:
        say_failure(error, rank=rank)
        sys.last_value = error  # as where nobody catches it: disconnect() must not wait for the other ranks
        return 1
    return 0


def _on_a_line_of_its_own(record: logging.LogRecord) -> bool:
    clear_line()  # rank 0's progress bar may stand there
    return True


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
