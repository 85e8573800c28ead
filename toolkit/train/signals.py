"""SIGTERM and SIGINT ask for an end; the loop ends at the next step boundary, on all ranks at once."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Becomes true once a signal has arrived; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None
