"""The one fitted number per GPU and precision: how much of the modelled compute speed training reaches, with its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from toolkit.plan.hardware import Gpu

FILE = Path(__file__).with_name("calibration.yaml")
UNKNOWN = 0.85  # where nothing was measured: the middle of the fitted ones


def scale_for(gpu: Gpu, precision: str) -> float:
    """The stored scalar of a GPU in a precision, or the nearest that lookup() finds."""
    return lookup(stored(), gpu, precision)


def lookup(entries: Mapping[tuple[str, str], float], gpu: Gpu, precision: str) -> float:
    """The scalar of a table: the GPU's own, of either half precision; of its generation (h100 for h100-pcie); else UNKNOWN."""
    twins = {"fp16": ("fp16", "bf16"), "bf16": ("bf16", "fp16")}.get(precision, (precision,))
    for name in (gpu.scale, gpu.scale.partition("-")[0]):
        for twin in twins:
            if (name, twin) in entries:
                return entries[name, twin]
    return UNKNOWN


@lru_cache(maxsize=1)
def stored() -> dict[tuple[str, str], float]:
    """The data file's scalars by (GPU scale, precision)."""
    return {(e["gpu"], e["precision"]): float(e["scale"]) for e in read()}


def read() -> list[dict[str, Any]]:
    """The data file's entries: gpu, precision, scale, rows, sources, spread."""
    if not FILE.exists():
        return []
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["scales"] or []
