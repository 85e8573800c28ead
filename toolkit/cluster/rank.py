"""How the program of one rank begins and ends as a process of the operating system."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")


def run_as_rank(main: Callable[[T], int], argument: T) -> NoReturn:
    """Call main(argument) and end this process with the exit code that it returns.

    The process leaves once all that was to be done at exit is done, and without taking Python down
    piece by piece: gloo's threads outlive the groups' destruction, because megatron-core and
    DeepSpeed still name the groups, and one that enters Python while it is taken down ends the
    process by SIGABRT after a run that went well. A signal that ends the process writes every
    thread's stack.
    """
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    code = 1

    def leave() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to run
    try:
        code = main(argument)
    except SystemExit as ending:  # argparse's way to refuse
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        raise
    sys.exit(code)
