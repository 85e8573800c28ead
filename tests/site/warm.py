"""A reader's commands without their start-up: processes forked from the server that has torch and
the toolkit loaded.

Each is a process of its own, with its own folder, arguments, output and exit code. Where a command
starts others, such as the ranks of a run, they start as ever.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tests.train.conftest import Done


def run_toolkit(words: list[str], folder: Path, *, timeout_s: float = 600.0) -> Done:
    """`toolkit WORDS` in a folder."""
    return _forked(_toolkit, words, folder, timeout_s)


def run_python(code: str, folder: Path, *, timeout_s: float = 600.0) -> Done:
    """`python -` with code on its standard input, in a folder."""
    return _forked(_python, code, folder, timeout_s)


def _forked(function: Any, argument: Any, folder: Path, timeout_s: float) -> Done:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with tempfile.NamedTemporaryFile() as output:
        process = context.Process(target=_work, args=(function, argument, str(folder), output.name))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            return Done(-1, f"did not end within {timeout_s} s:\n{Path(output.name).read_text()}")
        return Done(process.exitcode, Path(output.name).read_text())


def _work(function: Any, argument: Any, folder: str, output: str) -> NoReturn:
    """Be that program: its output to a file, and its exit code to who started it."""
    os.chdir(folder)
    to = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    code = 0
    try:
        function(argument)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _toolkit(words: list[str]) -> None:
    from toolkit.cli import main

    sys.argv = ["toolkit", *words]
    main()


def _python(code: str) -> None:
    exec(compile(code, "<stdin>", "exec"), {"__name__": "__main__"})
