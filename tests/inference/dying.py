"""`python -m tests.inference.dying …`: the command line, of whose ranks one is killed while several
micro-batches are in flight.

$DYING is "RANK FILE": that rank writes how many micro-batches wait for their token, and how many
tokens have come, into the file, and is gone at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = 6  # that have come before the kill


def dies(stage_type: Any, file: Path) -> None:
    """Have this process killed once several micro-batches have had tokens and wait for the next ones."""
    share_later = stage_type.share_later
    waiting: set[int] = set()
    came = 0

    def counted(self: Any, tokens: Any) -> Callable[[], None]:
        arrive = share_later(self, tokens)
        waiting.add(id(tokens))

        def arrived() -> None:
            nonlocal came
            arrive()
            came += 1
            waiting.discard(id(tokens))

        if len(waiting) > 1 and came >= TOKENS:
            file.write_text(f"{len(waiting)} {came}")
            os.kill(os.getpid(), signal.SIGKILL)
        return arrived

    stage_type.share_later = counted


def rank(arguments: list[str]) -> int:
    from toolkit.inference.__main__ import _main_or_leave_at_once
    from toolkit.inference.run import _without_compiler
    from toolkit.train.program import quiet

    victim, _, file = os.environ["DYING"].partition(" ")
    if os.environ["RANK"] == victim:
        quiet()
        with _without_compiler():
            from toolkit.model.stage import Stage
        dies(Stage, Path(file))
    return _main_or_leave_at_once(arguments)


if __name__ == "__main__":
    if "RANK" in os.environ:
        from toolkit.cluster.rank import run_as_rank

        run_as_rank(rank, sys.argv[1:])
    from toolkit.cli import main
    from toolkit.inference import ranks

    ranks.MODULE = "tests.inference.dying"
    main()
