"""Messages between ranks, and how long each kind of them took where somebody measures it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Kind = Literal["tensor", "pipeline", "waiting"]
"""tensor: sums and gathers among tensor-parallel ranks; pipeline: activations sent on; waiting: for
another stage's activations, or for the token that the last stage chooses.
"""


class Messages:
    """Runs messages; seconds is None where nobody measures, which then costs nothing.

    A measured message is waited for, and so is what was computed before it: on a GPU measuring
    takes longer than not to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[Kind, float] | None = None

    def run(self, kind: Kind, message: Callable[[], Any]) -> None:
        """Send or receive."""
        if self.seconds is None:
            message()
            return
        self.wait()
        started = time.perf_counter()
        message()
        self.wait()
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started

    @contextmanager
    def measured(self) -> Iterator[dict[Kind, float]]:
        """Seconds by kind of what is sent inside the block."""
        self.seconds = {}
        try:
            yield self.seconds
        finally:
            self.seconds = None

    def wait(self) -> None:
        """Until the device has computed what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
