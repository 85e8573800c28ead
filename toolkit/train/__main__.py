"""`python -m toolkit.train CONFIG [key=value…]`: one rank of a run, as the deepspeed launcher starts it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.train.program import mute_if_already_reported, quiet, say


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
        from toolkit.train.resolve import resolve

        with mute_if_already_reported():
            run = resolve(config, int(os.environ.get("WORLD_SIZE", 1)))
        from toolkit.train.loop import train  # torch comes with it, once there is something to train

        train(run)
    except ToolkitError as error:
        say(error, rank=rank, local_rank=local_rank)
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.exit(code)
