"""Fitting the calibration scalars on named sources, and holding sources out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from toolkit.cost.step import step_time
from toolkit.errors import ConfigError, ToolkitError
from toolkit.evidence.published import Unsupported, read_row
from toolkit.hardware import calibration

Key = tuple[str, str]
LOWEST, HIGHEST = 0.2, 1.2


def load_rows(source: Path) -> list[dict[str, Any]]:
    """Measured rows of a JSONL file; raises ConfigError where it cannot be read."""
    try:
        return [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError, ValueError) as error:
        raise ConfigError(f"{str(source)!r} cannot be read as rows", why=str(error), fix="Give a JSONL file of measurements.") from None


def fit(rows: Iterable[Mapping[str, Any]], *, without: str | None = None) -> list[dict[str, Any]]:
    """One entry per (GPU, precision) with measured throughput: the scalar at which the median source is met, and its provenance.

    Each source counts once, whatever its number of rows: its error is the median over its rows of log(predicted/measured).
    without: a source left out. fp16 rows count as bf16: the tensor cores run both alike.
    """
    groups: dict[Key, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        measured = (row.get("measured") or {}).get("tokens_per_s_per_gpu")
        source = str(row.get("source_id"))
        if not measured or source == without:
            continue
        try:
            workload, hardware = read_row(row)
        except (Unsupported, ToolkitError):
            continue
        precision = "bf16" if workload.precision == "fp16" else workload.precision
        groups[hardware.gpu.scale, precision][source].append((workload, hardware, float(measured)))
    return [entry(key, sources) for key, sources in sorted(groups.items())]


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
        "# Written by `python -m toolkit.evidence.score --fit`; do not edit. One scalar per (GPU, precision): the share of the catalogue's\n"
        "# matmul ceiling that training reaches, fitted on the named sources (each counts once); bias_left: what each one is off by then.\n"
    )
    path.write_text(head + yaml.safe_dump({"scales": list(entries)}, sort_keys=False, width=140), encoding="utf-8")
    calibration.stored.cache_clear()
