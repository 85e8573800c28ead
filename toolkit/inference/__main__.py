"""`python -m toolkit.inference REQUEST`: one rank of a generation, as the command starts it."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from toolkit.cluster.rank import run_as_rank
from toolkit.errors import MachineError, ToolkitError
from toolkit.inference.request import Request
from toolkit.train.program import quiet, say

COMMAND_S = 20.0  # the command ends all ranks within a second when one has died


def main(arguments: list[str]) -> int:
    """Generate; returns the exit code. A user error is one message, never a traceback."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    quiet()
    try:
        request = Request.load(Path(arguments[0]))
        if request.socket is not None:
            from toolkit.inference.resident import serve as run
        elif request.bench is None:
            from toolkit.inference.run import run
        else:
            from toolkit.inference.bench import run
        run(request)
    except ToolkitError as error:
        say(error, rank=rank, local_rank=local_rank)
        return error.exit_code
    except RuntimeError as error:
        if not _lost_a_rank(error):
            raise
        # the command names the rank and the signal that ended it; where another program started the ranks, it is said here
        time.sleep(COMMAND_S)
        lost = MachineError("another rank has ended", why="its messages stopped coming", fix="Look for its own message above.")
        say(lost, rank=rank, local_rank=local_rank)
        return lost.exit_code
    return 0


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether a message to or from another rank failed because that rank is gone."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in ("connection closed", "connection reset", "gloo"))


def _main_or_leave_at_once(arguments: list[str]) -> int:
    if code := main(arguments):
        sys.stdout.flush()
        os._exit(code)  # leaving the world in good order would wait for a rank that may be gone
    return 0


if __name__ == "__main__":
    run_as_rank(_main_or_leave_at_once, sys.argv[1:])
