"""`toolkit calibrate` without runs: ranks of this machine that measure it, and what their figures come to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from toolkit.calibrate.modes import WIDER, keys_of, program, ranks_of, wider
from toolkit.cluster.environment import rank_environment, usable_cores
from toolkit.cost.cpu_step import cpu_step_time, handed_elements
from toolkit.cost.workload import Workload
from toolkit.errors import ConfigError, MachineError
from toolkit.files import write_durably
from toolkit.hardware.catalogue import parse_hardware
from toolkit.hardware.cpu import CpuRates, from_yaml, processor_here, to_yaml

PRECISIONS = ("fp32", "bf16")
RANKS = (1, 2)
DEADLINE_S = 600.0
UNKNOWNS = ("step", "micro", "layer")
# the unknowns of modes that take fewer runs than there are unknowns: what the others add is next to nothing
FEW = {"recompute": ("layer",), "sp": ("layer",), "dp1": ("step",), "pp": ("step", "micro")}
BASES = {"gpt": "zero1", "recompute": "zero1", "tp": "zero1", "sp": "tp", "pp": "zero1", "dp1": "zero1", "dp2": "zero2", "dp3": "zero3"}


def measure(precisions: Sequence[str] = ("fp32",), *, say: Callable[[str], None] = lambda text: None) -> CpuRates:
    """The figures of this machine's processors, from processes that take under a minute on an idle machine.

    Raises MachineError with what a process has said where one fails.
    """
    with tempfile.TemporaryDirectory(prefix="toolkit-calibrate-") as folder:
        found = []
        for ranks in RANKS:
            started = time.perf_counter()
            found.append(_ranks(ranks, precisions, Path(folder)))
            say(f"{ranks} rank{'s' if ranks > 1 else ''} measured in {time.perf_counter() - started:.0f} s")
    return assemble(found, processor=processor_here(), cores=usable_cores(), measured=date.today().isoformat())


def _ranks(ranks: int, precisions: Sequence[str], folder: Path) -> dict[str, Any]:
    """Start so many ranks, wait for them, and return what rank 0 has written."""
    cores = usable_cores()
    threads = sorted({1, cores}) if ranks == 1 else [max(1, cores // ranks)]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads[-1]), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "toolkit.calibrate", str(folder), ",".join(map(str, threads)), *precisions]
    with (folder / f"log-{ranks}").open("w+", encoding="utf-8") as log:
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
        env = rank_environment(ranks, environ=environ)
        processes = [subprocess.Popen(command, env=env | place, stdout=log, stderr=subprocess.STDOUT) for place in places]
        failed = _wait(processes)
        if failed is not None:
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.strip()]
            raise MachineError(
                f"rank {failed} of {ranks} could not measure this machine",
                why=said[-1] if said else "it said nothing",
                fix="Look whether toolkit train launch/recipes/quickstart.yaml runs here.",
            )
    return dict(json.loads((folder / f"ranks-{ranks}.json").read_text(encoding="utf-8")))


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that failed, whose others are then ended; None where all are done."""
    end = time.monotonic() + DEADLINE_S
    try:
        while time.monotonic() < end:
            codes = [process.poll() for process in processes]
            bad = next((rank for rank, code in enumerate(codes) if code), None)
            if bad is not None:
                return bad
            if all(code == 0 for code in codes):
                return None
            time.sleep(0.05)
        return next(rank for rank, process in enumerate(processes) if process.poll() is None)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def assemble(found: Sequence[Mapping[str, Any]], *, processor: str, cores: int, measured: str) -> CpuRates:
    """The figures of a machine from what its ranks have measured: one entry for each number of ranks."""
    programs = {mode: runs for one in found for mode, runs in one["programs"].items()}
    raw = {
        "format": 1,
        "processor": processor,
        "cores": cores,
        "torch": found[0]["torch"],
        "measured": measured,
        "collective_ranks": 2,
        "settings": [setting for one in found for setting in one["settings"]],
        "collectives": {name: points for one in found for name, points in one.get("collectives", {}).items()},
        "host": {},
    }
    for setting in raw["settings"]:
        for curves in setting["pieces"].values():
            curves[:] = [sorted(curve) for curve in curves]
    steps = [setting.get("steps") for setting in raw["settings"]]
    return with_steps(with_host(from_yaml(raw, path=Path("what was measured")), programs), steps)


def with_steps(rates: CpuRates, steps: Sequence[Sequence[float] | None]) -> CpuRates:
    """The figures with each setting's handed_s, where it has seconds a step of modes.WIDER: the median of what these take beyond
    their operators, by elements that are handed on.
    """
    settings = []
    for setting, times in zip(rates.settings, steps, strict=True):
        if times is not None and setting.precision == "fp32":  # what the runs compute in
            hardware = replace(parse_hardware("cpu:1"), threads=setting.threads, cpu=replace(rates, settings=(setting,)))
            each = []
            for seconds, (family, width) in zip(times, WIDER, strict=True):
                w = Workload.of(wider(family, width, folder=Path("runs")), 1)
                elements = 3 * handed_elements(w) * w.model.layers * w.microbatches
                each.append((seconds - cpu_step_time(w, hardware).step) / elements)
            setting = replace(setting, handed_s=max(0.0, median(each)))
        settings.append(setting)
    return replace(rates, settings=tuple(settings))


def with_host(rates: CpuRates, programs: Mapping[str, Sequence[Sequence[float]]]) -> CpuRates:
    """The figures with the host's own seconds: what tiny runs take beyond their arithmetic and the bytes of their messages.

    programs: layers, micro-batches and seconds a step of each mode's runs. A mode of parallelism counts what it adds to its base.
    """
    for mode in (*(m for m in programs if m not in BASES), *(m for m in programs if m in BASES)):
        rates = replace(rates, host={**rates.host, mode: _solve(rates, mode, programs[mode])})
    return rates


def _solve(rates: CpuRates, mode: str, runs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Seconds a step, micro-batch and layer of a mode, with which the step's formula meets its runs (least squares)."""
    import numpy as np

    names, ranks = FEW.get(mode, UNKNOWNS), ranks_of(mode)
    threads = 1 if ranks == 1 else max(1, rates.cores // ranks)
    workloads = [
        Workload.of(program(keys_of(mode), layers=int(layers), microbatches=int(m), ranks=ranks, folder=Path("runs")), ranks)
        for layers, m, _ in runs
    ]

    def times(host: Mapping[str, float]) -> Any:
        hardware = replace(parse_hardware(f"cpu:{ranks}"), threads=threads, cpu=replace(rates, host={**rates.host, mode: host}))
        return np.array([cpu_step_time(w, hardware).step for w in workloads])

    base = times({})
    columns = [(times({name: 1e-3}) - base) / 1e-3 for name in names]
    left = np.array([seconds for _, _, seconds in runs]) - base
    solved = np.linalg.lstsq(np.array(columns).T, left, rcond=None)[0]
    return dict(zip(names, map(float, solved), strict=True))


def write(rates: CpuRates, path: Path) -> None:
    """Store the figures as a calibration file; raises ConfigError where it cannot be written."""
    head = "# Written by `toolkit calibrate`, which has measured this machine; docs/cpu-time.md says what the figures are.\n"
    body = {"scales": [], "cpu": to_yaml(rates)}
    try:
        write_durably(path, (head + yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=140)).encode())
    except OSError as error:
        raise ConfigError(f"--out {str(path)!r} cannot be written", why=error.strerror or str(error), fix="Name another file.") from None
