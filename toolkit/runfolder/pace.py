"""How fast a run goes, and how long it still takes, from the steps that it has taken."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from statistics import median

_RECENT = 50  # steps whose median counts as the speed of now


class Pace:
    """Told of every step once it is over, with its evaluation and its save."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.rates = array("d")  # tokens a second, of every step
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._first_ended = 0.0
        self._in_steps = 0.0  # seconds, without the first step, which loads and compiles

    def add(self, *, step_s: float, tokens_per_s: float) -> None:
        """Note a step: the seconds it took, without its evaluation and save, and its rate."""
        self.rates.append(tokens_per_s)
        if len(self.rates) == 1:
            self._first_ended = self._clock()
            return
        self._recent.append(step_s)
        self._in_steps += step_s

    def left_s(self, steps_left: int) -> float | None:
        """Seconds that the steps still to be taken need; None before the second step, as the first
        one loads and compiles.

        A step counts with the median of the last 50, so that a slow one does not matter; what comes
        between steps (evaluation, saving) with its mean so far.
        """
        if not self._recent:
            return None
        between = max(0.0, self._clock() - self._first_ended - self._in_steps) / (len(self.rates) - 1)
        return steps_left * (median(self._recent) + between)

    def tokens_per_s(self) -> float | None:
        """The median rate without the first fifth of the steps, as a report shows it."""
        late = self.rates[min(len(self.rates) - 1, max(1, len(self.rates) // 5)) :]
        return median(late) if late else None


def hours(seconds: float) -> str:
    """A time as people say it: 3 h 05 min, 12 min, 8 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"
