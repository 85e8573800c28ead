"""A rank's process ends with its exit code, after what was to be done at exit and without Python
being taken down.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading
from toolkit.cluster.rank import run_as_rank

class Late:
    def __del__(self):  # runs only while Python is taken down: at module level something refers to it to the end
        sys.__stdout__.write("taken down\\n")

late = Late()

def main(how):
    atexit.register(print, "tidied up", flush=True)
    if how == "refuse":
        sys.exit(2)
    if how == "fail":
        raise RuntimeError("the reason")
    if how == "abort":
        import os
        os.abort()
    return 5

run_as_rank(main, sys.argv[1])
"""


@pytest.mark.parametrize(("how", "code"), [("return", 5), ("refuse", 2), ("fail", 1)])
def test_the_process_ends_with_its_code_and_what_was_to_be_done(how: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (code, "tidied up\n"), done.stderr
    assert ("RuntimeError: the reason" in done.stderr) is (how == "fail")


def test_a_signal_that_ends_it_writes_the_stack() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, "abort"], capture_output=True, text=True, timeout=600)
    assert done.returncode < 0 and "Fatal Python error: Aborted" in done.stderr and "in main" in done.stderr
