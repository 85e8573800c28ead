"""The calibration scalar of a GPU and precision from measurements, and the files of fitted numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from toolkit.cost import constants
from toolkit.cost.step import step_time
from toolkit.errors import ConfigError
from toolkit.hardware import calibration

Key = tuple[str, str]
FITTED_FILE = Path(constants.__file__).with_name("fitted.py")
LOWEST, HIGHEST = 0.2, 1.2


def load_rows(source: Path) -> list[dict[str, Any]]:
    """Measured rows of a JSONL file; raises ConfigError where it cannot be read."""
    try:
        return [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError, ValueError) as error:
        raise ConfigError(f"{str(source)!r} cannot be read as rows", why=str(error), fix="Give a JSONL file of measurements.") from None


def entry(key: Key, sources: Mapping[str, Sequence[Any]], *, low: float = LOWEST, high: float = HIGHEST) -> dict[str, Any]:
    """The scalar between low and high at which the median source is met, with its provenance.

    sources: (workload, hardware, measured tokens a second on one GPU) of each row, by source.
    """
    for _ in range(12 if high / low < 10 else 20):  # throughput grows with the scalar
        middle = (low * high) ** 0.5
        if median(_bias(items, middle) for items in sources.values()) < 0:
            low = middle
        else:
            high = middle
    scale = float(f"{(low * high) ** 0.5:.3g}")
    biases = {source: round(exp(_bias(items, scale)) - 1, 3) for source, items in sorted(sources.items())}
    return {
        "gpu": key[0],
        "precision": key[1],
        "scale": scale,
        "rows": sum(len(items) for items in sources.values()),
        "sources": sorted(sources),
        "bias_left": biases,
    }


def _bias(items: Sequence[Any], scale: float) -> float:
    return median(log(step_time(w, h, scale=scale).tokens_per_s_per_gpu / measured) for w, h, measured in items)


def as_scales(entries: Iterable[Mapping[str, Any]]) -> dict[Key, float]:
    """Fitted entries as the mapping that predictions take; fp16 and bf16 stand for each other."""
    scales = {(e["gpu"], e["precision"]): float(e["scale"]) for e in entries}
    for (gpu, precision), scale in list(scales.items()):
        if precision == "bf16":
            scales.setdefault((gpu, "fp16"), scale)
    return scales


def write(entries: Sequence[Mapping[str, Any]], *, path: Path = calibration.FILE, head: str | None = None) -> None:
    """Store entries as the calibration file, or as a user's own with another first comment."""
    import yaml

    head = head or (
        "# Written by `python -m tests.bench.planner --fit`; do not edit. One scalar per (GPU, precision): the share of the catalogue's\n"
        "# matmul ceiling that training reaches, fitted on the named sources (each counts once); bias_left: what each one is off by then.\n"
    )
    path.write_text(head + yaml.safe_dump({"scales": list(entries)}, sort_keys=False, width=140), encoding="utf-8")
    calibration.stored.cache_clear()


def write_constants(values: Mapping[str, float], *, path: Path = FITTED_FILE) -> None:
    """Store fitted constants as the module that toolkit.cost.constants reads."""
    lines = "".join(f'    "{name}": {float(f"{value:.6g}")!r},\n' for name, value in values.items())
    head = '"""Written by `python -m tests.bench.planner --fit`; do not edit. What each means: toolkit/cost/constants.py."""\n\n'
    path.write_text(f"{head}FITTED = {{\n{lines}}}\n", encoding="utf-8")
