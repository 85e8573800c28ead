"""A user's own run folders as measurements: what ran, on what, how fast; and `toolkit calibrate`, which fits the scalars to them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from toolkit import __version__
from toolkit.config.load import load_config, parse_config
from toolkit.config.schema import RunConfig
from toolkit.cost.workload import Workload
from toolkit.errors import ConfigError
from toolkit.evidence import fit
from toolkit.hardware.catalogue import Hardware, find_gpu, parse_hardware
from toolkit.runfolder.files import CONFIG, DS_CONFIG, MACHINE
from toolkit.runfolder.metrics import after_warm_up, read_metrics
from toolkit.runfolder.profile import read_profile

LOWEST, HIGHEST = 1e-4, 4.0  # of a scalar fitted to own runs: small models on slow machines reach little


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One run folder: workload, hardware, tokens a second on one GPU (median of the counted steps), and how many steps counted."""

    folder: Path
    workload: Workload
    hardware: Hardware
    tokens_per_s_per_gpu: float
    steps: int


def read_run(folder: Path, *, hardware: str | None = None, hardware_file: Path | None = None, profiled: bool = True) -> MeasuredRun:
    """What `toolkit profile` left in a run folder (profile.json), else `toolkit train` (metrics.jsonl, config.yaml, ds_config.json).

    hardware: `GPU:PER_NODExNODES`; null: what the folder records; profiled: whether a profile counts before the training. Raises ConfigError naming the folder and what it lacks,
    DataError for a damaged profile.json.
    """
    config, gpus, rate, steps = (_profiled(folder) if profiled else None) or _trained(folder)
    cluster = parse_hardware(hardware, extra=hardware_file) if hardware else _recorded(folder, gpus, hardware_file)
    if cluster.count < gpus:
        raise ConfigError(f"run folder {str(folder)!r} is of {gpus} ranks, and {cluster} has {cluster.count}", fix="Name what it ran on.")
    return MeasuredRun(folder=folder, workload=Workload.of(config, gpus), hardware=cluster, tokens_per_s_per_gpu=rate / gpus, steps=steps)


def _profiled(folder: Path) -> tuple[RunConfig, int, float, int] | None:
    """Config, ranks, tokens a second and counted steps of a profile: the slowest rank's step; None without one."""
    profile = read_profile(folder)
    if profile is None:
        return None
    config, layout = parse_config(profile["config"]), profile["layout"]
    slowest = max(rank["seconds"]["step"] for rank in profile["ranks"])
    tokens = config.train.global_batch_size * config.train.seq_length
    return config, layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"], tokens / slowest, profile["steps"]


def _trained(folder: Path) -> tuple[RunConfig, int, float, int]:
    """The same of a training run, its warm-up not counted."""
    records = read_metrics(folder)
    if not records:
        raise ConfigError(
            f"run folder {str(folder)!r} has neither a profile.json nor steps in metrics.jsonl",
            fix="Name the folder of a run that trained.",
        )
    config = load_config(folder / CONFIG)
    try:
        given = json.loads((folder / DS_CONFIG).read_text(encoding="utf-8"))
        dp = given["train_batch_size"] // given["train_micro_batch_size_per_gpu"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise ConfigError(
            f"run folder {str(folder)!r} has no readable ds_config.json",
            why="its batch tells the number of ranks",
            fix="Name a run folder.",
        ) from None
    records_counted = after_warm_up(records)
    p = config.parallel
    return config, dp * p.tp * p.pp * p.cp, median(r["tokens_per_s"] for r in records_counted), len(records_counted)


def _recorded(folder: Path, gpus: int, extra: Path | None) -> Hardware:
    """What profile.json or machine.json say the run ran on."""
    try:
        if profile := read_profile(folder):
            return parse_hardware(str(profile["hardware"]), extra=extra)
        machine = json.loads((folder / MACHINE).read_text(encoding="utf-8"))
        hosts = max(1, int(machine["hosts"]))
        gpu = find_gpu(str(machine["device"]), extra=extra)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"run folder {str(folder)!r} does not record its hardware", fix="Give it as --hardware GPU:PER_NODExNODES."
        ) from None
    return Hardware(gpu=gpu, gpus_per_node=-(-gpus // hosts), nodes=hosts, nic_gb_s=gpu.nic_gb_s)


def calibrate(runs: Sequence[MeasuredRun]) -> list[dict[str, Any]]:
    """One entry per (GPU, precision): the scalar at which the median run is met, with its provenance; each run counts once."""
    groups: dict[fit.Key, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        key = run.hardware.gpu.scale, "bf16" if run.workload.precision == "fp16" else run.workload.precision
        groups[key][str(run.folder)].append((run.workload, run.hardware, run.tokens_per_s_per_gpu))
    entries = []
    for key, sources in sorted(groups.items()):
        entry = fit.entry(key, sources, low=LOWEST, high=HIGHEST)
        steps = sum(run.steps for run in runs if str(run.folder) in sources)
        entries.append(entry | {"steps": steps, "fitted": date.today().isoformat(), "toolkit": __version__})
    return entries


def remarks(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What a person should know before using entries: scalars at the edge of what is searched, runs that contradict each other."""
    lines = []
    for entry in entries:
        name = f"{entry['gpu']} in {entry['precision']}"
        if not 1.05 * LOWEST < entry["scale"] < 0.95 * HIGHEST:
            lines.append(f"{name}: {entry['scale']:g} is at the edge of what a scalar can say; the hardware is probably another")
        left = max(abs(bias) for bias in entry["bias_left"].values())
        if left > 0.2:
            lines.append(f"{name}: the runs disagree, one is still {left:.0%} off; their shapes or machines differ in more than one number")
    return lines
