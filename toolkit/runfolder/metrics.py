"""One record per step: the line a person reads, metrics.jsonl, and DeepSpeed's monitor."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from toolkit.errors import MachineError, ToolkitError
from toolkit.files import write_durably
from toolkit.runfolder.files import METRICS
from toolkit.runfolder.pace import Pace, hours

log = logging.getLogger("toolkit.train")


@dataclass
class StepRecord:
    """What is known of one optimizer step. tokens: consumed since the start of the run;
    memory_gib: peak device memory of the worst rank (resident memory on a CPU); mfu: null where the
    device's peak is not known; a skipped step has a null grad_norm. data_wait_s: seconds the worst
    rank's host waited for micro-batches within the step, mostly the next one's: on a GPU this
    step's kernels hide them as long as they last. save_pause_s: seconds this step's checkpoint held
    up training; save_write_s: seconds from its start until a checkpoint counted, at the step where
    that was seen; own: numbers that hooks add, null for one that is not finite, beside the others
    in metrics.jsonl.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float
    tokens: int
    tokens_per_s: float
    tflops_per_gpu: float
    mfu: float | None
    step_s: float
    data_wait_s: float
    memory_gib: float
    loss_scale: float | None = None
    skipped: bool | None = None
    eval_loss: float | None = None
    save_pause_s: float | None = None
    save_write_s: float | None = None
    own: dict[str, float | None] = field(default_factory=dict)


_ALWAYS = frozenset(list(StepRecord.__dataclass_fields__)[:11])


class Metrics:
    """Writes records on the rank that has a folder; does nothing on the others.

    resumed: the step a run goes on from; records up to it are kept, later ones (of a run that was
    cut off) go.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        steps: int,
        every: int,
        monitor: Callable[[list[tuple[str, Any, int]]], None] | None,
        resumed: int = 0,
    ) -> None:
        self.steps, self.every, self.monitor = steps, every, monitor
        self.pace = Pace()
        self.file: IO[str] | None = None
        self.error: ToolkitError | None = None  # the disk's, for all ranks to end on
        if folder is not None:
            path = folder / METRICS
            _keep_up_to(path, resumed)
            self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: StepRecord, *, durable: bool = False) -> None:
        """Add one step; a null is left out unless every record has the key. durable: return once it
        is on disk.
        """
        if self.file is None:
            return
        self.pace.add(step_s=record.step_s, tokens_per_s=record.tokens_per_s)
        values = {k: v for k, v in asdict(record).items() if v is not None or k in _ALWAYS}
        values |= values.pop("own")
        self._store(json.dumps(values, allow_nan=False), durable=durable)
        if record.step % self.every == 0 or record.step == self.steps or record.eval_loss is not None:
            log.info(step_line(record, steps=self.steps, left_s=self.left_s(record)))
        if self.monitor is not None:
            events = [(f"Train/{k}", v, record.step) for k, v in values.items() if k not in ("step", "skipped") and v is not None]
            self.monitor(events)

    def _store(self, line: str, *, durable: bool) -> None:
        if self.file is None or self.error is not None:
            return
        try:
            self.file.write(line + "\n")
            if durable:
                os.fsync(self.file.fileno())
        except OSError as error:
            self.error = MachineError(
                f"{self.file.name} cannot be written: {error.strerror}",
                why="a step that is not recorded is lost",
                fix="Make room there and start the run again: it goes on from its newest checkpoint.",
            )

    def left_s(self, record: StepRecord) -> float | None:
        """Seconds from this step, which has been written, to the end of the run; None where that is
        not known, or it is the last.
        """
        return self.pace.left_s(self.steps - record.step) if record.step < self.steps else None

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # what could not be written is tried once more
                self.file.close()


def _keep_up_to(path: Path, step: int) -> None:
    """Leave the whole lines of steps up to `step`, each once; a killed run may have left half a line."""
    kept: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if step and path.exists() else ():
        try:
            number = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if number <= step:
            kept[number] = line
    write_durably(path, "".join(f"{line}\n" for line in kept.values()).encode())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The step records of a run folder; lines that a killed run left half written are passed over."""
    records = []
    with suppress(OSError):
        for line in (run / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("step_s") and record.get("tokens_per_s"):
                    records.append(record)
    return records


def after_warm_up(records: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Records that count for speed: without the first fifth (kernels load and compile, allocators
    fill), one at least.
    """
    return records[min(len(records) - 1, max(1, len(records) // 5)) :]


def step_line(record: StepRecord, *, steps: int, left_s: float | None = None) -> str:
    """The step in one line of fixed columns; left_s: what the run still takes."""
    r = record
    width = len(str(steps))
    loss = f"{r.loss:.4f}" if r.loss is not None else "not finite"
    norm = f"{r.grad_norm:.3f}" if r.grad_norm is not None else "skipped"
    parts = [
        f"step {r.step:>{width}}/{steps}",
        f"loss {loss}",
        f"norm {norm}",
        f"lr {r.lr:.2e}",
        f"{thousands(r.tokens_per_s)} tok/s",
        f"{r.tflops_per_gpu:.2f} TFLOP/s" + (f" ({100 * r.mfu:.1f}% MFU)" if r.mfu is not None else ""),
        f"{r.step_s:.2f} s (data {r.data_wait_s:.2f})",
        f"{r.memory_gib:.2f} GiB",
    ]
    if left_s is not None:
        parts.append(f"ETA {hours(left_s)}")
    if r.loss_scale is not None:
        parts.append(f"scale {r.loss_scale:g}")
    if r.eval_loss is not None:
        parts.append(f"eval loss {r.eval_loss:.4f}")
    if r.save_pause_s is not None:
        parts.append(f"saved (pause {r.save_pause_s:.2f} s)")
    parts += [f"{name} {value:.4g}" if value is not None else f"{name} not finite" for name, value in r.own.items()]
    return " | ".join(parts)


def thousands(value: float) -> str:
    """A number in the unit that keeps it short: 950, 5.8k, 1.2M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"
