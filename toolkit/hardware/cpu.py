"""What `toolkit calibrate` has measured of this machine's processors: the figures from which a step's time on a CPU follows.

They live in the user's calibration file, under `cpu`, beside the scalars of GPUs.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import ConfigError

FORMAT = 1
WAYS = ("forward", "data", "weight")  # multiplies of a weight: Y = X Wᵀ, dX = dY W, dW += dYᵀ X
PIECES = (
    *("rms_norm", "layer_norm", "rotary", "swiglu", "gelu", "residual", "bias", "copy"),
    *("loss", "embedding", "adam", "add", "fresh"),
)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send")


@dataclass(frozen=True)
class Curve:
    """Seconds by size, measured at some sizes that grow."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """Seconds of a size: along straight lines in logarithms between the points, the first point's below it, and in
        proportion to the size beyond the last."""
        points = self.points
        if size <= points[0][0]:
            return points[0][1]
        if size >= points[-1][0]:
            return points[-1][1] * size / points[-1][0]
        i = bisect_left(points, (size, 0.0))
        (low, low_s), (high, high_s) = points[i - 1], points[i]
        share = log(size / low) / log(high / low)
        return exp(log(low_s) + share * log(high_s / low_s))

    def beyond_start(self, size: float) -> float:
        """Seconds that the size itself takes: without those of the smallest, which are the launch of the operators."""
        return max(0.0, self.at(size) - self.points[0][1])


@dataclass(frozen=True)
class Grid:
    """Seconds a unit of work on a grid of sizes."""

    axes: tuple[tuple[float, ...], ...]
    values: Mapping[tuple[float, ...], float]

    def at(self, *sizes: float) -> float:
        """The value between grid points, along straight lines in logarithms; that of the edge beyond it."""
        corners: list[tuple[tuple[float, float], ...]] = []
        for axis, size in zip(self.axes, sizes, strict=True):
            x = min(max(size, axis[0]), axis[-1])
            i = min(max(1, bisect_left(axis, x)), len(axis) - 1) if len(axis) > 1 else 0
            if len(axis) == 1:
                corners.append(((axis[0], 1.0),))
                continue
            low, high = axis[i - 1], axis[i]
            share = log(x / low) / log(high / low)
            corners.append(((low, 1 - share), (high, share)))
        total = 0.0
        for corner in product(*corners):
            weight = 1.0
            for _, part in corner:
                weight *= part
            if weight:
                total += weight * log(self.values[tuple(place for place, _ in corner)])
        return exp(total)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one rank reaches with so many threads while so many ranks work. precision: "fp32" or "bf16".

    multiplies: seconds a FLOP by tokens, outputs and inputs, for each of WAYS. attention: seconds of one query head's s² d by
    sequence and head width, forward and backward. pieces: forward and backward seconds by elements. handover_s: seconds until one of
    the cores sees what another has written, meanwhile; 0.0: not known. handed_s: seconds by which an
    element of what a layer's multiplies read and write makes a step longer than the operators alone, since half of it lies with
    another core.
    """

    threads: int
    ranks: int
    precision: str
    multiplies: Mapping[str, Grid]
    attention: Mapping[str, Grid]
    pieces: Mapping[str, tuple[Curve, Curve]]
    handover_s: float = 0.0
    handed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CpuRates:
    """A machine's figures. hosts: seconds of the host alone by mode ("zero1", "tp2" …), each with step, micro and layer.

    collectives: seconds by bytes between `ranks` processes of gloo, for each of COLLECTIVES.
    """

    processor: str
    cores: int
    torch: str
    measured: str
    settings: tuple[Setting, ...]
    host: Mapping[str, Mapping[str, float]]
    collectives: Mapping[str, Curve]
    collective_ranks: int = 2

    def settings_for(self, *, threads: int, ranks: int, precision: str) -> tuple[Setting, ...]:
        """The measured settings nearest to so many threads of so many ranks, one for each distance of the cores that was met.

        More ranks than cores take turns on them: each then works as it does when the cores are full. ConfigError for a precision that
        was not measured.
        """
        known = [s for s in self.settings if s.precision == precision]
        if not known:
            have = sorted({s.precision for s in self.settings})
            raise ConfigError(
                f"the calibration of this CPU has no figures in {precision}",
                why=f"it was measured in {', '.join(have)}",
                fix=f"Write it anew with toolkit calibrate --precision {precision}.",
            )
        threads, ranks = min(threads, self.cores), min(ranks, self.cores)
        far = {(abs(s.ranks - ranks), abs(s.threads - threads)): s for s in known}
        nearest = far[min(far)]
        return tuple(s for s in known if (s.ranks, s.threads) == (nearest.ranks, nearest.threads))


def to_yaml(rates: CpuRates) -> dict[str, Any]:
    """The `cpu` entry of a calibration file."""
    return {
        "format": FORMAT,
        **{name: getattr(rates, name) for name in ("processor", "cores", "torch", "measured", "collective_ranks")},
        "host": {mode: {k: _short(v) for k, v in parts.items()} for mode, parts in rates.host.items()},
        "collectives": {name: _points(curve) for name, curve in rates.collectives.items()},
        "settings": [
            {
                **{name: getattr(s, name) for name in ("threads", "ranks", "precision")},
                **{name: _short(getattr(s, name)) for name in ("handover_s", "handed_s")},
                "multiplies": {way: _grid(grid) for way, grid in s.multiplies.items()},
                "attention": {way: _grid(grid) for way, grid in s.attention.items()},
                "pieces": {name: [_points(forward), _points(backward)] for name, (forward, backward) in s.pieces.items()},
            }
            for s in rates.settings
        ],
    }


def from_yaml(raw: Any, *, path: Path) -> CpuRates:
    """What to_yaml() has written; ConfigError naming the file and what is wrong with it."""
    try:
        if raw["format"] != FORMAT:
            raise ValueError(f"its format is {raw['format']!r}, and this toolkit reads {FORMAT}")
        settings = tuple(
            Setting(
                threads=int(s["threads"]),
                ranks=int(s["ranks"]),
                precision=str(s["precision"]),
                handover_s=float(s.get("handover_s", 0.0)),
                handed_s=float(s.get("handed_s", 0.0)),
                multiplies={way: _read_grid(s["multiplies"][way]) for way in WAYS},
                attention={way: _read_grid(s["attention"][way]) for way in ("forward", "backward")},
                pieces={name: (_read_points(s["pieces"][name][0]), _read_points(s["pieces"][name][1])) for name in PIECES},
            )
            for s in raw["settings"]
        )
        if not settings:
            raise ValueError("it has no settings")
        return CpuRates(
            processor=str(raw["processor"]),
            cores=int(raw["cores"]),
            torch=str(raw["torch"]),
            measured=str(raw["measured"]),
            collective_ranks=int(raw["collective_ranks"]),
            settings=settings,
            host={str(mode): {str(k): float(v) for k, v in parts.items()} for mode, parts in raw["host"].items()},
            collectives={name: _read_points(raw["collectives"][name]) for name in COLLECTIVES if name in raw["collectives"]},
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        lacks = f"its cpu entry lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"calibration file {str(path)!r} has no usable figures of a CPU", why=lacks, fix="Write it anew with toolkit calibrate."
        ) from None


def load_cpu(path: Path) -> CpuRates | None:
    """The figures of a CPU in a calibration file; None where it holds scalars of GPUs alone.

    Raises ConfigError for a file that cannot be read.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"calibration file {str(path)!r} cannot be read", why=why, fix="Write it with toolkit calibrate.") from None
    raw = loaded.get("cpu") if isinstance(loaded, dict) else None
    return None if raw is None else from_yaml(raw, path=path)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _points(curve: Curve) -> list[list[float]]:
    return [[_short(size), _short(seconds)] for size, seconds in curve.points]


def _read_points(raw: Any) -> Curve:
    points = tuple((float(size), float(seconds)) for size, seconds in raw)
    if not points or any(s <= 0 or x <= 0 for x, s in points) or sorted(points) != list(points):
        raise ValueError("it has a curve whose sizes do not grow, or whose times are not above 0")
    return Curve(points)


def _grid(grid: Grid) -> list[list[float]]:
    return [[*map(_short, place), _short(value)] for place, value in sorted(grid.values.items())]


def _read_grid(raw: Any) -> Grid:
    values = {tuple(float(x) for x in row[:-1]): float(row[-1]) for row in raw}
    axes = tuple(tuple(sorted({place[i] for place in values})) for i in range(len(next(iter(values)))))
    if any(place not in values for place in product(*axes)) or min(values.values()) <= 0:
        raise ValueError("it has a grid with holes, or values that are not above 0")
    return Grid(axes, values)


def processor_here() -> str:
    """This machine's processor by its own name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
