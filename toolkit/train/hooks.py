"""What a program adds to a run: its own loss, and functions that are called at each step. Needs no
torch.

A hook is a function of one Step. It is called on every rank, at the same steps, with the same loss
and norm; each rank's own are the times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, ToolkitError, name_of, raised_by
from toolkit.runfolder.metrics import StepRecord

Hook = Callable[["Step"], None]


@dataclass(frozen=True, kw_only=True)
class Extensions:
    """Code of the user's own that the loop runs. loss: toolkit.engine.loss says what it is given
    and returns. optimizer: toolkit.engine.optimizers.plugged_in says the same of it.

    on_step: after each optimizer step, and its evaluation where one was due; on_eval: after an
    evaluation; on_save: once a checkpoint of the step has been taken, which with
    checkpoint.async_save is still being written.
    """

    loss: Callable[..., Any] | None = None
    optimizer: Callable[..., Any] | None = None
    on_step: tuple[Hook, ...] = ()
    on_eval: tuple[Hook, ...] = ()
    on_save: tuple[Hook, ...] = ()

    @classmethod
    def of(cls, *, loss: Any = None, optimizer: Any = None, **hooks: Any) -> Extensions:
        """From what a user writes, one hook or several; raises ConfigError for what cannot be
        called.
        """
        several = {name: tuple(given) if isinstance(given, Sequence) else (given,) for name, given in hooks.items() if given is not None}
        for name, given in [("loss", loss), ("optimizer", optimizer), *((name, one) for name, these in several.items() for one in these)]:
            if given is not None and not callable(given):
                raise ConfigError(f"{name}={given!r} cannot be called", fix="Give a function.")
        return cls(loss=loss, optimizer=optimizer, **several)


@dataclass
class Step:
    """One optimizer step as a hook sees it.

    record: its loss, norm, learning rate and times; a skipped step has no norm. model: this rank's
    chunks, whose parameters ZeRO-3 holds in parts. checkpoint: in on_save, the folder that the
    checkpoint gets.
    """

    record: StepRecord
    rank: int
    model: Sequence[Any]
    checkpoint: Path | None = None
    stop_reason: str | None = field(default=None, init=False)

    def add(self, name: str, value: float) -> None:
        """Put a number of your own into the step's record; rank 0's goes to metrics.jsonl, the step
        line and the monitor.
        """
        if not isinstance(name, str) or name in StepRecord.__dataclass_fields__:
            raise ValueError(f"{name!r} is not free to name a number: every record has {', '.join(StepRecord.__dataclass_fields__)}")
        number = float(value)
        self.record.own[name] = number if math.isfinite(number) else None

    def stop(self, reason: str = "") -> None:
        """End the run after the next step, on all ranks: they agree on it there, with a checkpoint
        where checkpoint.every is set.
        """
        self.stop_reason = reason


class Hooks:
    """Calls a rank's hooks; keeps an error, and a wish to stop, until all ranks can hear of it."""

    def __init__(self, extensions: Extensions, *, rank: int, model: Sequence[Any]) -> None:
        self.extensions, self.rank, self.model = extensions, rank, model
        self.error: ToolkitError | None = None
        self.stop_asked: str | None = None

    def call(self, kind: str, record: StepRecord, *, checkpoint: Path | None = None) -> None:
        """Run the hooks of a kind (on_step, on_eval, on_save) one after the other."""
        for hook in getattr(self.extensions, kind):
            if self.error is not None:
                return
            step = Step(record, self.rank, self.model, checkpoint)
            try:
                hook(step)
            except (Exception, SystemExit) as error:
                self.error = raised_by(f"step {record.step}: the {kind} hook {name_of(hook)}", error, rank=self.rank)
            if step.stop_reason is not None and self.stop_asked is None:
                self.stop_asked = name_of(hook) + (f": {step.stop_reason}" if step.stop_reason else "")
