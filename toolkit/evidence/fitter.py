"""Fitting the constants and scalars to published rows, with any source left out.

A fit chooses each fitted constant of toolkit.cost.constants from a grid in its range, and one scalar per GPU and precision. All
rows are predicted once per value of each constant, the others at their priors; logarithms of predictions are then taken to
add up. So leaving out each source in turn costs no more predictions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import median
from typing import Any

import numpy as np

from toolkit.cost import constants
from toolkit.cost.memory import estimate
from toolkit.cost.step import step_time
from toolkit.cost.workload import Workload
from toolkit.errors import ToolkitError
from toolkit.evidence.fit import HIGHEST, LOWEST, Key, as_scales
from toolkit.evidence.published import Unsupported, read_row
from toolkit.hardware.catalogue import Hardware

SCALES = (0.35, 0.5, 0.65, 0.8, 0.95, 1.1)  # at which rows are predicted; between them predictions are interpolated
MIDDLE = 0.85  # the scalar at which the effect of a constant is taken
STEPS = 7  # values of a constant that a fit tries, evenly spaced in its range
WORST = 0.5  # an error counts no more than this: a wrong row must not move a constant
HOLD = 0.004  # of error that a constant must win to move by its whole range from its prior: sources that say nothing leave it
INFERRED = 0.5  # weight of a row whose configuration is printed in part and inferred for the rest (tier B), against one printed whole


@dataclass(kw_only=True)
class Measured:
    """A row that a fit can use: what ran, and what was measured of it; memory in bytes."""

    source: str
    weight: float
    workload: Workload
    hardware: Hardware
    rate: float | None
    peak: float | None
    reserved: bool
    ran: bool | None

    @property
    def key(self) -> Key:
        """The GPU and precision whose scalar this row's time depends on; fp16 counts as bf16: the tensor cores run both alike."""
        return self.hardware.gpu.scale, "bf16" if self.workload.precision == "fp16" else self.workload.precision


def usable(rows: Iterable[Mapping[str, Any]]) -> list[Measured]:
    """The rows that have a formula; what the scorer doesn't score (noisy times, memory of unknown options) isn't used either."""
    found = []
    for row in rows:
        try:
            workload, hardware = read_row(row)
        except (Unsupported, ToolkitError):
            continue
        measured = row.get("measured") or {}
        flags = " ".join(map(str, row.get("flags") or ())).lower()
        kind = str(measured.get("memory_kind") or "")
        peak = measured.get("peak_memory_gib")
        unknown = any(words in flags for words in ("cumulative options", "not printed", "gpu not named")) or "last rank" in kind.lower()
        found.append(
            Measured(
                source=str(row.get("source_id")),
                weight=1.0 if row.get("tier") == "A" else INFERRED,
                workload=workload,
                hardware=hardware,
                rate=None if "noisy" in flags else measured.get("tokens_per_s_per_gpu") or None,
                peak=peak * constants.GIB if peak and not unknown and row.get("precision") in ("bf16", "fp16") else None,
                reserved=kind.startswith(("reserved", "nvidia-smi")),
                ran=measured.get("fits") if row.get("precision") in ("bf16", "fp16") else None,
            )
        )
    return found


@dataclass(kw_only=True)
class Fit:
    """Fitted constants by name, and scalars by GPU and precision with their provenance."""

    constants: dict[str, float]
    entries: list[dict[str, Any]]

    @property
    def scales(self) -> dict[Key, float]:
        return as_scales(self.entries)


@dataclass
class Fitter:
    """All rows predicted on the grid of every fitted constant: what fits with and without sources are made from."""

    rows: list[Measured]
    names: dict[str, list[str]] = field(init=False)
    grids: dict[str, np.ndarray] = field(init=False)
    time: dict[str, np.ndarray] = field(init=False)  # by constant: [value, row, 1] of log(predicted), less that at the prior
    memory: dict[str, np.ndarray] = field(init=False)  # the same of memory: [value, row]

    def __post_init__(self) -> None:
        self.names = {part: constants.fitted_names(part) for part in ("time", "memory")}
        self.timed = [row for row in self.rows if row.rate]
        self.sized = [row for row in self.rows if row.peak or row.ran is not None]
        self.grids, self.time, self.memory = {}, {}, {}
        priors = {name: float(constants.about(name)["prior"]) for names in self.names.values() for name in names}
        with constants.changed(**priors):
            self._predict()

    def _predict(self) -> None:
        """Predict all rows with every constant at its prior, and each one's values in turn."""
        for names in self.names.values():
            for name in names:
                meta = constants.about(name)
                self.grids[name] = np.unique(np.append(np.linspace(meta["low"], meta["high"], STEPS), meta["prior"]))
        self.time_now, self.memory_now = self._times(), self._sizes()
        middle = self._times((MIDDLE,))
        for name in self.names["time"]:
            self.time[name] = np.stack([self._with(name, value, lambda: self._times((MIDDLE,))) for value in self.grids[name]]) - middle
        for name in self.names["memory"]:
            self.memory[name] = np.stack([self._with(name, value, self._sizes) for value in self.grids[name]]) - self.memory_now

    @staticmethod
    def _with(name: str, value: float, predict: Any) -> np.ndarray:
        with constants.changed(**{name: float(value)}):
            return np.asarray(predict())

    def _times(self, scales: Sequence[float] = SCALES) -> np.ndarray:
        return np.array(
            [[log(step_time(r.workload, r.hardware, scale=s).tokens_per_s_per_gpu / r.rate) for s in scales] for r in self.timed if r.rate]
        ).reshape(-1, len(scales))

    def _sizes(self) -> np.ndarray:
        """log of predicted over measured; where only the verdict is known, over what the device holds."""
        found = []
        for r in self.sized:
            worst = estimate(r.workload, r.hardware).worst
            if r.peak:
                found.append(log((worst.device if r.reserved else worst.allocated) / r.peak))
            else:
                found.append(log(worst.device / (r.hardware.gpu.memory_gib * constants.GIB)))
        return np.array(found)

    def fit(self, *, without: str | None = None) -> Fit:
        """The constants and scalars that suit all sources but one best; each source counts once, whatever its number of rows."""
        chosen = self._fit_memory(without)
        picked, scales = self._fit_time(without)
        values = {name: float(self.grids[name][index]) for name, index in (chosen | picked).items()}
        errors = self._errors(picked, scales, self.timed)
        entries = []
        for key, scale in sorted(scales.items()):
            biases = defaultdict(list)
            for row, error in zip(self.timed, errors, strict=True):
                if row.key == key and row.source != without:
                    biases[row.source].append(error)
            entries.append(
                {
                    "gpu": key[0],
                    "precision": key[1],
                    "scale": float(f"{scale:.3g}"),
                    "rows": sum(map(len, biases.values())),
                    "sources": sorted(biases),
                    "bias_left": {source: round(exp(median(found)) - 1, 3) for source, found in sorted(biases.items())},
                }
            )
        return Fit(constants=values, entries=entries)

    def _priors(self, part: str) -> dict[str, int]:
        return {name: int(np.argmin(abs(self.grids[name] - constants.about(name)["prior"]))) for name in self.names[part]}

    def _errors(self, picked: Mapping[str, int], scales: Mapping[Key, float], rows: Sequence[Measured]) -> np.ndarray:
        table = self.time_now + sum(self.time[name][index] for name, index in picked.items())
        return np.array([np.interp(log(scales.get(row.key, 0.85)), np.log(SCALES), line) for row, line in zip(rows, table, strict=True)])

    def _fit_time(self, without: str | None) -> tuple[dict[str, int], dict[Key, float]]:
        weights = _weights(self.timed, without)
        picked = self._priors("time")
        scales = self._scales(picked, weights)
        for _ in range(3):
            before = dict(picked)
            for name in picked:
                costs = []
                for index in range(len(self.grids[name])):
                    trial = picked | {name: index}
                    trial_scales = self._scales(trial, weights)
                    cost = float(weights @ np.minimum(abs(self._errors(trial, trial_scales, self.timed)), WORST))
                    costs.append(cost + self._hold(name, index))
                picked[name] = int(np.argmin(costs))
            scales = self._scales(picked, weights)
            if picked == before:
                break
        return picked, scales

    def _hold(self, name: str, index: int) -> float:
        meta, grid = constants.about(name), self.grids[name]
        return float(HOLD * abs(grid[index] - meta["prior"]) / (meta["high"] - meta["low"]))

    def _scales(self, picked: Mapping[str, int], weights: np.ndarray) -> dict[Key, float]:
        """By GPU and precision the scalar at which errors of its rows, each source counted once, have the median 0."""
        table = self.time_now + sum(self.time[name][index] for name, index in picked.items())
        needed: dict[Key, list[tuple[float, float]]] = defaultdict(list)
        logs = np.log(SCALES)
        for row, line, weight in zip(self.timed, table, weights, strict=True):
            if weight > 0:  # throughput grows with the scalar: where it crosses what was measured
                needed[row.key].append((float(np.interp(0.0, line, logs)), float(weight)))
        return {key: min(HIGHEST, max(LOWEST, exp(_weighted_median(pairs)))) for key, pairs in needed.items()}

    def _fit_memory(self, without: str | None) -> dict[str, int]:
        weights = _weights(self.sized, without)
        picked = self._priors("memory")
        known = np.array([row.peak is not None for row in self.sized])
        ran = np.array([bool(row.ran) for row in self.sized])

        def cost(trial: Mapping[str, int]) -> float:
            errors = self.memory_now + sum(self.memory[n][i] for n, i in trial.items())
            wrong = np.where(ran, np.maximum(errors, 0.0), np.maximum(-errors, 0.0))  # only a wrong verdict is an error
            return float(weights @ np.minimum(np.where(known, abs(errors), wrong), WORST))

        for _ in range(3):
            for name in picked:
                picked[name] = int(
                    np.argmin([cost(picked | {name: index}) + self._hold(name, index) for index in range(len(self.grids[name]))])
                )
        return picked


def _weights(rows: Sequence[Measured], without: str | None) -> np.ndarray:
    """A weight per row: each source counts once, less if its rows are inferred, the left one not at all; they sum to 1."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.source] += 1
    weights = np.array([0.0 if row.source == without else row.weight / counts[row.source] for row in rows])
    return weights / max(1e-12, float(weights.sum()))


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    ordered = sorted(pairs)
    half, seen = sum(weight for _, weight in ordered) / 2, 0.0
    for value, weight in ordered:
        seen += weight
        if seen >= half:
            return value
    return ordered[-1][0]
