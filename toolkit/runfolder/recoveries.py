"""RUN/recoveries.jsonl: each time a supervisor started a run again, why, and how long each phase took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

RECOVERIES = "recoveries.jsonl"
PHASES = ("detect", "tear down", "plan", "start", "load", "first step")


@dataclass
class Recovery:
    """One start of the ranks after the first. reason: in a few words; lost: hosts that left;
    joined: hosts that came.

    last_step: the last one taken before; resumed_step: that of the checkpoint gone on from. seconds,
    by phase: detect (from the last step, or sign of life, to knowing), tear down, plan, start
    (processes start and import), load (the model is built and the checkpoint read), first step.
    """

    at: str
    reason: str
    hosts: int
    layout: str
    lost: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    last_step: int = 0
    resumed_step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def steps_lost(self) -> int:
        """Steps that are taken a second time."""
        return max(0, self.last_step - self.resumed_step)

    def line(self) -> str:
        """What a person reads of it."""
        took = ", ".join(f"{phase} {self.seconds[phase]:.1f}" for phase in PHASES if phase in self.seconds)
        repeated = f"{self.steps_lost} step{'' if self.steps_lost == 1 else 's'} taken again"
        return f"recovered on {self.hosts} hosts ({self.layout}) after step {self.resumed_step}, {repeated} | seconds: {took}"


def add_recovery(run: Path, recovery: Recovery) -> None:
    """Add a line to the run's folder."""
    with (run / RECOVERIES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(recovery)) + "\n")


def read_recoveries(run: Path) -> Sequence[Recovery]:
    """All recoveries of a run; lines that were cut off are passed over."""
    found: list[Recovery] = []
    names = {f.name for f in fields(Recovery)}
    with suppress(OSError):
        for line in (run / RECOVERIES).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError, AttributeError):
                found.append(Recovery(**{k: v for k, v in json.loads(line).items() if k in names}))
    return found
