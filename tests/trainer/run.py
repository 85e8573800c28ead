"""What the tests of the Python API run on every rank of a pool's world."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def program(folder: str = ".", *arguments: str) -> Iterator[io.StringIO]:
    """Be a program of its own for a while, started in a folder: what it prints is kept, and what it
    sets up is undone.
    """
    log, out = logging.getLogger("toolkit"), io.StringIO()
    before = os.getcwd(), sys.argv, sys.excepthook, list(log.handlers), log.level
    log.handlers = []
    os.chdir(folder)
    sys.argv = list(arguments)
    try:
        with contextlib.redirect_stdout(out):
            yield out
    finally:
        folder, sys.argv, sys.excepthook, log.handlers, level = before
        os.chdir(folder)
        log.setLevel(level)


def script(argument: dict[str, Any]) -> str:
    """Run an example as a program in argument["folder"] with argument["overrides"]; what it printed
    on this rank.
    """
    with program(argument["folder"], argument["script"], *argument["overrides"]) as out:
        runpy.run_path(str(ROOT / "examples" / argument["script"]), run_name="__main__")
    return out.getvalue()


def code(argument: dict[str, Any]) -> str:
    """Run argument["blocks"] of Python one after the other in one namespace, in argument["folder"];
    what they printed.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    with program(argument["folder"]) as out:
        for block in argument["blocks"]:
            exec(compile(block, "api.md", "exec"), names)
    return out.getvalue()


def attempt(argument: dict[str, Any]) -> dict[str, Any]:
    """Fit Trainers one after the other and say how each ended on this rank.

    argument["runs"]: for each, "config" (a mapping) and names of tests.trainer.parts for the
    Trainer's arguments; "dataset" and "eval_dataset" as [name, size]. Returns "last" (the records
    of the last steps), "errors" (None where there was none) and "reductions".
    """
    import torch.distributed as dist

    from tests.trainer import parts
    from toolkit import ToolkitError, Trainer

    parts.raises_late_on_one_rank.calls = 0  # type: ignore[attr-defined]
    all_reduce, count = dist.all_reduce, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return all_reduce(*args, **kwargs)

    def part(name: str, given: Any) -> Any:
        if name.endswith("dataset"):
            return getattr(parts, given[0])(*given[1:])
        return [getattr(parts, one) for one in given] if isinstance(given, list) else getattr(parts, given)

    found: dict[str, Any] = {"last": [], "errors": [], "reductions": []}
    for run in argument["runs"]:
        given = dict(run)
        config, shuffle = given.pop("config"), given.pop("shuffle", True)
        count[0] = 0
        record, error = None, None
        dist.all_reduce = counted  # a step's messages are counted, and sent as ever
        try:
            with program():
                record = Trainer(config, shuffle=shuffle, **{name: part(name, one) for name, one in given.items()}).fit()
        except ToolkitError as e:
            error = f"{type(e).__name__}: {e}"
        finally:
            dist.all_reduce = all_reduce
        found["last"].append(record and {"step": record.step, "loss": record.loss, "grad_norm": record.grad_norm, **record.own})
        found["errors"].append(error)
        found["reductions"].append(count[0])
    return found
