"""The files of a run folder: their names, and how `toolkit train` writes those that say what ran
and on what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.config.load import saved_config
from toolkit.config.schema import RunConfig
from toolkit.config.yaml_text import write_yaml
from toolkit.files import write_durably
from toolkit.redact import redact_values

CONFIG = "config.yaml"  # the resolved config: a run of this file alone is the same run
DS_CONFIG = "ds_config.json"  # the configuration as it was given to DeepSpeed
MACHINE = "machine.json"  # device name, processes, hosts
LOGS = "logs"  # what each rank has said, one file a rank
CONSOLE = "console.log"  # what the run has said, each line with its time
RANKS = "ranks.json"  # seconds a step that each rank worked itself, and its host
METRICS = "metrics.jsonl"  # one record per optimizer step


def write_run(config: RunConfig, ds_config: Mapping[str, Any]) -> Path:
    """Make the run folder and write what runs in it; returns the folder."""
    folder = config.run.dir
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / CONFIG, write_yaml(saved_config(config)).encode())
    write_durably(folder / DS_CONFIG, (json.dumps(redact_values(ds_config), indent=2) + "\n").encode())
    return folder


def write_machine(folder: Path, *, device: str, processes: int, hosts: int) -> None:
    """Note what the run is measured on, for `toolkit calibrate`."""
    write_durably(folder / MACHINE, (json.dumps({"device": device, "processes": processes, "hosts": hosts}) + "\n").encode())


def write_ranks(folder: Path, *, own_s: Sequence[float], hosts: Sequence[str]) -> None:
    """Note how long each rank worked a step, without the seconds it waited for others."""
    ranks = [{"rank": rank, "host": host, "own_s": round(own, 6)} for rank, (own, host) in enumerate(zip(own_s, hosts, strict=True))]
    write_durably(folder / RANKS, (json.dumps({"ranks": ranks}) + "\n").encode())


def read_ranks(folder: Path) -> tuple[dict[str, Any], ...]:
    """What write_ranks() has noted; empty where it has not, or the file is damaged."""
    try:
        ranks = json.loads((folder / RANKS).read_text(encoding="utf-8"))["ranks"]
        return tuple({"rank": int(r["rank"]), "host": str(r["host"]), "own_s": float(r["own_s"])} for r in ranks)
    except (OSError, ValueError, KeyError, TypeError):
        return ()
