"""A worker of a GPU check in which something is wrong on purpose, named by FAULT: what tests of the check start in its place."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from toolkit.gpu_check import machine, training, worker


def break_something(fault: str) -> None:
    if fault == "loss":
        from toolkit.engine.loss import Loss

        right = Loss.__call__

        def call(self: Loss, output, batch):  # type: ignore[no-untyped-def]
            return right(self, output * 1.001, batch)

        def zero(setting, say):  # type: ignore[no-untyped-def]
            Loss.__call__ = call  # type: ignore[method-assign]
            run(setting, say)

        run, training.zero = training.zero, zero
    elif fault == "hang":
        machine.versions = lambda setting, say: wait_for_ever()
    elif fault == "gone":
        machine.versions = lambda setting, say: os._exit(7)


def wait_for_ever() -> None:
    threading.Event().wait()


if __name__ == "__main__":
    break_something(os.environ["FAULT"])
    sys.exit(worker.main(Path(sys.argv[1])))
