"""`python -m toolkit.profile CONFIG [key=value…] [--steps K] [--memory-limit GIB]`: one rank, as
the deepspeed launcher starts it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from toolkit.cluster.rank import run_as_rank
from toolkit.errors import ToolkitError
from toolkit.train.program import alone, mute_if_already_reported, quiet, say, set_cuda_defaults


def main(arguments: list[str]) -> int:
    """Profile; returns the exit code. A user error is one message from each host; where memory
    ends, the rank itself says so.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    quiet()
    parser = argparse.ArgumentParser(prog="python -m toolkit.profile", description=main.__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory-limit", type=float)
    parser.add_argument("--calibration", type=Path)
    options = parser.parse_intermixed_args(arguments)
    try:
        from toolkit.config.load import load_config
        from toolkit.train.resolve import resolve

        config = load_config(options.config, options.overrides)
        with mute_if_already_reported():
            run = resolve(config, int(os.environ.get("WORLD_SIZE", 1)))
        set_cuda_defaults(run.config)
        from toolkit.profile.session import Options, profile

        with alone(rank=rank):
            profile(run, Options(steps=options.steps, memory_limit=options.memory_limit, calibration=options.calibration))
    except ToolkitError as error:
        say(error, rank=rank, local_rank=local_rank)
        return error.exit_code
    return 0


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
