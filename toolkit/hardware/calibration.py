"""The one fitted number per GPU and precision: how much of the modelled compute speed training reaches, with its provenance.

Of a CPU a user's file holds measured rates instead (toolkit/hardware/cpu.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import ConfigError
from toolkit.hardware.catalogue import Gpu, Hardware
from toolkit.hardware.cpu import load_cpu, processor_here

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


def measured(hardware: Hardware, users_file: Path | None, *, environ: Mapping[str, str] | None = None) -> Hardware:
    """The same cluster with what a calibration file says of its processors, where ranks run on those; as it is elsewhere.

    Ranks have OMP_NUM_THREADS threads where the environment says so, as they would in training. Raises ConfigError for a file
    that says nothing of a CPU.
    """
    if users_file is None or hardware.gpu.accelerator:
        return hardware
    cpu = load_cpu(users_file)
    if cpu is None:
        scales = load(users_file)
        if any(gpu == hardware.gpu.scale for gpu, _ in scales):  # fitted to runs on a CPU
            return hardware
        raise ConfigError(
            f"calibration file {str(users_file)!r} has no figures of a CPU",
            why=f"it is of {', '.join(sorted({gpu for gpu, _ in scales})) or 'nothing'}",
            fix="Measure this machine with toolkit calibrate --out FILE.",
        )
    asked = (os.environ if environ is None else environ).get("OMP_NUM_THREADS", "")
    return replace(hardware, cpu=cpu, threads=int(asked) if asked.isdigit() else 0)


def remark(hardware: Hardware) -> str:
    """What a reader should know of the measured processors that an estimate stands on; "" where none were measured."""
    cpu = hardware.cpu
    if cpu is None:
        return ""
    here = processor_here()
    other = f"; this machine has {here}, so the times are that machine's" if here != cpu.processor else ""
    return f"step times from figures of {cpu.processor}, {cpu.cores} cores, measured {cpu.measured}{other}"


@lru_cache(maxsize=1)
def stored() -> dict[tuple[str, str], float]:
    """The data file's scalars by (GPU scale, precision)."""
    return {(e["gpu"], e["precision"]): float(e["scale"]) for e in read()}


def read() -> list[dict[str, Any]]:
    """The data file's entries: gpu, precision, scale, rows, sources, spread."""
    if not FILE.exists():
        return []
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["scales"] or []
