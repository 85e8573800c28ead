"""What was expected of a run beside what came of it: the likely value, the 80 % interval, and the measured one.

`toolkit profile` and the last words of `toolkit train` print it, `toolkit report` shows and writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.config.schema import RunConfig
from toolkit.cost.memory import GIB, estimate
from toolkit.cost.ranges import ranges
from toolkit.cost.step import step_time
from toolkit.cost.workload import Workload
from toolkit.errors import ToolkitError
from toolkit.evidence.runs import read_run
from toolkit.hardware.catalogue import Hardware
from toolkit.runfolder.metrics import after_warm_up, read_metrics

RATE, STEP, PEAK = "tokens/s", "step", "peak memory of the worst rank"
UNITS = {RATE: "tokens/s", STEP: "s", PEAK: "GiB"}
_SHOW: dict[str, Callable[[float], str]] = {
    RATE: lambda v: f"{v:,.0f}",
    STEP: lambda v: f"{v:.3g} s" if v >= 1 else f"{1e3 * v:.3g} ms",
    PEAK: lambda v: f"{v:.2f} GiB" if v >= 0.5 else f"{1024 * v:.2f} MiB",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a run in its unit of UNITS; low and high: the ends of the interval that should hold four of five."""

    name: str
    likely: float
    low: float
    high: float
    measured: float

    @property
    def verdict(self) -> str:
        """Where the measured value lies: inside the interval, below or above it."""
        return "below" if self.measured < self.low else "above" if self.measured > self.high else "inside"

    @property
    def difference(self) -> float:
        """Likely over measured, less one, as in the other tables."""
        return self.likely / self.measured - 1 if self.measured else 0.0

    @property
    def words(self) -> tuple[str, str, str]:
        """Likely value, interval and measured value, each as people read it."""
        show = _SHOW[self.name]
        return show(self.likely), f"{show(self.low)} to {show(self.high)}", show(self.measured)

    def as_json(self) -> dict[str, Any]:
        """For a program: the unit is named, the interval is a pair."""
        return {
            "figure": self.name,
            "unit": UNITS[self.name],
            "likely": self.likely,
            "range": [self.low, self.high],
            "measured": self.measured,
            "verdict": self.verdict,
        }


def of_profile(profile: Mapping[str, Any]) -> list[Figure]:
    """From profile.json alone: the slowest rank's step, its tokens a second, and the fullest rank's live bytes.

    Empty for a profile that an earlier version wrote; without times for a GPU that the catalogue lacks.
    """
    told = profile["predicted"]
    found = told.get("range") or {}
    step = max(rank["seconds"]["step"] for rank in profile["ranks"])
    figures = []
    if "step_s" in found:
        train, likely = profile["config"]["train"], told["seconds"]["step"]
        tokens = train["global_batch_size"] * train["seq_length"]
        figures.append(_figure(RATE, tokens / likely, found["tokens_per_s"], tokens / step))
        figures.append(_figure(STEP, likely, found["step_s"], step))
    if "peak" in found:
        stage = max(found["peak"], key=lambda s: found["peak"][s][1])
        peak = max(rank["memory"]["peak"] for rank in profile["ranks"]) / GIB
        figures.append(_figure(PEAK, told["memory"][stage]["peak"] / GIB, [end / GIB for end in found["peak"][stage]], peak))
    return figures


def of_folder(folder: Path) -> tuple[list[Figure], str]:
    """From the steps of a run folder, its warm-up left out; where nothing can be expected of it, no figure and the reason."""
    records = read_metrics(folder)
    if not records:
        return [], ""
    try:
        run = read_run(folder, profiled=False)
    except ToolkitError as error:
        return [], str(error)
    steady = after_warm_up(records)
    peak = max((float(r["memory_gib"]) for r in steady if r.get("memory_gib")), default=None)
    return _figures(run.workload, run.hardware, rate=run.tokens_per_s_per_gpu * run.workload.world, peak_gib=peak), ""


def of_run(config: RunConfig, hardware: Hardware, *, rate: float, peak_gib: float | None) -> list[Figure]:
    """Of a run that has just ended, from its tokens a second and its worst rank's peak in GiB."""
    return _figures(Workload.of(config, hardware.count), hardware, rate=rate, peak_gib=peak_gib)


def _figures(w: Workload, hardware: Hardware, *, rate: float, peak_gib: float | None) -> list[Figure]:
    memory, time = estimate(w, hardware), step_time(w, hardware)
    found = ranges(memory, time)
    figures = [
        _figure(RATE, time.tokens / time.step, found["tokens_per_s"], rate),
        _figure(STEP, time.step, found["step_s"], time.tokens / rate),
    ]
    # on a CPU a run records its resident set, in which the libraries count; the estimate is of tensors
    if hardware.gpu.accelerator and peak_gib is not None:
        figures.append(_figure(PEAK, memory.worst.allocated / GIB, found["peak_allocated_gib"], peak_gib))
    return figures


def _figure(name: str, likely: float, ends: list[float], measured: float) -> Figure:
    return Figure(name=name, likely=likely, low=ends[0], high=ends[1], measured=measured)
