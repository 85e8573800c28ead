"""A progress bar at the bottom of a terminal, with log lines above it; in a file or a pipe there is
none, only the lines.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from toolkit.runfolder.metrics import StepRecord
from toolkit.runfolder.pace import hours

_REDRAW_S = 0.25  # short steps redraw the bar no more often than this


class Bar:
    """Rank 0's bar while it takes steps. It draws when it is told of a step, without a thread that
    would take time from training.
    """

    def __init__(self, *, steps: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

        console = Console(file=sys.stdout)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[said]}"))
        self.steps = steps
        # `transient` takes the bar away at the end: the closing lines say the same
        self.progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self.progress.start()  # from here to close(), sys.stdout and sys.stderr write above the bar
        self.streams = _handlers_to(sys.stdout)
        self.task = self.progress.add_task("", total=steps, completed=done, said="")
        self.progress.refresh()
        self.drawn = time.monotonic()

    @classmethod
    def on_terminal(cls, *, steps: int, done: int) -> Bar | None:
        """A bar where a person watches: where both stdout and stderr are a terminal that can move
        its cursor. Piped through `tee`, lines would run into the bar.
        """
        if not (is_terminal(sys.stdout) and is_terminal(sys.stderr)) or done >= steps:
            return None
        from rich.console import Console

        return None if Console(file=sys.stdout).is_dumb_terminal else cls(steps=steps, done=done)

    def step(self, record: StepRecord, left_s: Callable[[], float | None]) -> None:
        """Show a step that is over; left_s: what the run still takes, asked for when the bar is drawn."""
        now = time.monotonic()
        if now - self.drawn < _REDRAW_S and record.step < self.steps:
            return
        self.drawn = now
        left = left_s()
        said = ([f"loss {record.loss:.4f}"] if record.loss is not None else []) + ([f"ETA {hours(left)}"] if left is not None else [])
        self.progress.update(self.task, completed=record.step, said=" · ".join(said))
        self.progress.refresh()

    def close(self) -> None:
        """Take the bar away and give the streams back."""
        self.progress.stop()
        for handler, stream in self.streams:
            handler.setStream(stream)
        self.streams = []


def is_terminal(stream: Any) -> bool:
    """Whether a stream leads to a terminal; a stream of a notebook or a closed one does not."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _handlers_to(stream: Any) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Point the logging handlers that write to the terminal to a stream; returns each with its own."""
    handlers = [*logging.getLogger().handlers, *logging.getLogger("toolkit").handlers]
    found = [h for h in handlers if isinstance(h, logging.StreamHandler) and is_terminal(h.stream)]
    return [(handler, handler.setStream(stream)) for handler in found if handler.stream is not stream]
