"""What the tests of the Python API run on every rank of a pool's world."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def script(argument: dict[str, Any]) -> str:
    """Run an example as a program in argument["folder"] with argument["overrides"]; what it printed on this rank."""
    out, before = io.StringIO(), (os.getcwd(), sys.argv, list(logging.getLogger("toolkit").handlers), sys.excepthook)
    os.chdir(argument["folder"])
    sys.argv = [argument["script"], *argument["overrides"]]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(ROOT / "examples" / argument["script"]), run_name="__main__")
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        logging.getLogger("toolkit").handlers = before[2]  # the one of this run writes to its own output
        sys.excepthook = before[3]
    return out.getvalue()
