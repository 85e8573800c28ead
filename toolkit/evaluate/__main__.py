"""`python -m toolkit.evaluate FOLDER`: one rank of an evaluation, as the deepspeed launcher starts it."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from toolkit.cluster.rank import run_as_rank
from toolkit.data.given import GivenData
from toolkit.errors import ToolkitError
from toolkit.evaluate.resolve import RESULT, read
from toolkit.evaluate.windows import Windows
from toolkit.files import write_durably
from toolkit.train.program import quiet, say, set_cuda_defaults
from toolkit.train.resolve import resolve


def main(arguments: list[str]) -> int:
    """Evaluate; rank 0 writes the result into the folder. Returns the exit code."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    quiet()
    # how a training starts and resumes is of no interest here
    logging.getLogger("toolkit").setLevel(logging.WARNING)
    logging.getLogger("toolkit.evaluate").setLevel(logging.INFO)
    folder = Path(arguments[0]).parent
    try:
        found = measure(folder)
    except ToolkitError as error:
        say(error, rank=rank, local_rank=local_rank)
        return error.exit_code
    if rank == 0:
        write_durably(folder / RESULT, json.dumps(found))
    return 0


def measure(folder: Path) -> dict[str, Any]:
    """This rank's part of what the command has written into a folder; returns what session.evaluate
    does, alike on all ranks.
    """
    config, task = read(folder)
    t = config.train
    windows = Windows(task.span, seq_length=t.seq_length, windows=task.batches * t.global_batch_size)
    resolved = resolve(config, int(os.environ.get("WORLD_SIZE", 1)), given=GivenData(train=windows, shuffle=False))
    set_cuda_defaults(resolved.config)
    from toolkit.evaluate.session import evaluate  # torch comes with it

    return evaluate(resolved, windows, task)


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
