"""SIGTERM and SIGINT ask for an end; the loop ends at the next step boundary, on all ranks at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Becomes true once a signal has arrived; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self) -> None:
        """Signals mean again what they meant before the run."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None
