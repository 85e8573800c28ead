"""When a start has opened its run, has loaded it and has taken a step, by what appears in the run folder."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from toolkit.runfolder.files import CONFIG, MACHINE, METRICS
from toolkit.runfolder.metrics import read_metrics
from toolkit.runfolder.recoveries import Recovery, add_recovery

log = logging.getLogger("toolkit.supervise")


class Phases:
    """The phases of one start, which began at `began` (seconds since the epoch).

    recovery: what they are part of, recorded once the first step has been taken; None for the first start.
    """

    def __init__(self, run: Path, recovery: Recovery | None, *, began: float, resumed_step: int) -> None:
        self.run, self.recovery, self.began, self.resumed_step = run, recovery, began, resumed_step
        self.opened = self.loaded = self.stepped = 0.0

    def look(self) -> None:
        """Notice what has appeared since the last look."""
        if self.stepped:
            return
        run = self.run
        self.opened = self.opened or self._written(run / CONFIG)
        self.loaded = self.loaded or (self._written(run / MACHINE) if self.opened else 0.0)
        records = read_metrics(run) if self.loaded and self._written(run / METRICS) else []
        if not records or self._written(run / METRICS) <= self.loaded:
            return
        self.stepped = self._written(run / METRICS)
        if self.recovery is not None:
            self.recovery.seconds |= {
                "start": self.opened - self.began,
                "load": self.loaded - self.opened,
                "first step": self.stepped - self.loaded,
            }
            self.recovery.resumed_step = self.resumed_step
            add_recovery(run, self.recovery)
            log.info(self.recovery.line())

    def _written(self, path: Path) -> float:
        with suppress(OSError):
            changed = path.stat().st_mtime
            return changed if changed > self.began else 0.0
        return 0.0
