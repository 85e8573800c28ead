"""A worker of a GPU check in which something is wrong on purpose, named by FAULT: what tests of the
check start in its place.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from toolkit.gpu_check import worker
from toolkit.gpu_check.checks import Check


def wrong_loss(self: Check, setting: Any, say: Any) -> None:
    """ZeRO-3 alone gets another loss than the CPU's reference."""
    from toolkit.engine.loss import Loss
    from toolkit.gpu_check import training

    right, train = Loss.__call__, training.train

    def train_wrongly(raw: dict[str, Any]) -> Any:
        factor = 1.01 if raw["zero"]["stage"] == 3 else 1.0
        Loss.__call__ = lambda self, output, batch: right(self, output * factor, batch)  # type: ignore[method-assign]
        return train(raw)

    training.train = train_wrongly
    run(self, setting, say)


def wait_for_ever(*_: Any) -> None:
    threading.Event().wait()


def vanish(*_: Any) -> None:
    os._exit(7)


if __name__ == "__main__":
    run = Check.run
    Check.run = {"loss": wrong_loss, "hang": wait_for_ever, "gone": vanish}[os.environ["FAULT"]]  # type: ignore[method-assign]
    sys.exit(worker.main(Path(sys.argv[1])))
