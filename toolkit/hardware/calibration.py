"""The one fitted number per GPU and precision: how much of the modelled compute speed training reaches, with its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import ConfigError
from toolkit.hardware.catalogue import Gpu

FILE = Path(__file__).with_name("calibration.yaml")
UNKNOWN = 0.85  # where nothing was measured: the middle of the fitted ones


def scale_for(gpu: Gpu, precision: str, *, users_file: Path | None = None) -> float:
    """The scalar of a GPU in a precision: of the user's own calibration file where it has one, else the stored or nearest one."""
    return (
        lookup(stored(), gpu, precision)
        if users_file is None
        else lookup(load(users_file), gpu, precision, default=scale_for(gpu, precision))
    )


def load(path: Path) -> dict[tuple[str, str], float]:
    """A calibration file's scalars by (GPU scale, precision); raises ConfigError naming what is wrong with it."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        entries = {(str(e["gpu"]), str(e["precision"])): float(e["scale"]) for e in loaded["scales"]}
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        why = (
            " ".join(str(error).split())
            if isinstance(error, (OSError, UnicodeError, yaml.YAMLError))
            else "it has no scales with gpu, precision and scale"
        )
        raise ConfigError(
            f"calibration file {str(path)!r} cannot be read", why=why, fix="Write it with toolkit calibrate RUN… --out FILE."
        ) from None
    for (gpu, precision), scale in entries.items():
        if not 0 < scale < float("inf"):
            raise ConfigError(f"calibration file {str(path)!r} has scale {scale:g} for {gpu} in {precision}", fix="Scales are above 0.")
    return entries


def lookup(entries: Mapping[tuple[str, str], float], gpu: Gpu, precision: str, *, default: float = UNKNOWN) -> float:
    """A GPU's scalar in a table: its own, in either half precision; else its generation's (h100 for h100-pcie); else the default."""
    twins = {"fp16": ("fp16", "bf16"), "bf16": ("bf16", "fp16")}.get(precision, (precision,))
    for name in (gpu.scale, gpu.scale.partition("-")[0]):
        for twin in twins:
            if (name, twin) in entries:
                return entries[name, twin]
    return default


@lru_cache(maxsize=1)
def stored() -> dict[tuple[str, str], float]:
    """The data file's scalars by (GPU scale, precision)."""
    return {(e["gpu"], e["precision"]): float(e["scale"]) for e in read()}


def read() -> list[dict[str, Any]]:
    """The data file's entries: gpu, precision, scale, rows, sources, spread."""
    if not FILE.exists():
        return []
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["scales"] or []
