"""The files of a run folder: their names, and how `toolkit train` writes those that say what ran
and on what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.config.load import dump_config
from toolkit.config.schema import RunConfig
from toolkit.files import write_durably

CONFIG = "config.yaml"  # the resolved config: a run of this file alone is the same run
DS_CONFIG = "ds_config.json"  # the configuration as it was given to DeepSpeed
MACHINE = "machine.json"  # device name, processes, hosts
CONSOLE = "console.log"  # what the run has said, each line with its time
METRICS = "metrics.jsonl"  # one record per optimizer step


def write_run(config: RunConfig, ds_config: Mapping[str, Any]) -> Path:
    """Make the run folder and write what runs in it; returns the folder."""
    folder = config.run.dir
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / CONFIG, dump_config(config).encode())
    write_durably(folder / DS_CONFIG, (json.dumps(ds_config, indent=2) + "\n").encode())
    return folder


def write_machine(folder: Path, *, device: str, processes: int, hosts: int) -> None:
    """Note what the run is measured on, for `toolkit calibrate`."""
    write_durably(folder / MACHINE, (json.dumps({"device": device, "processes": processes, "hosts": hosts}) + "\n").encode())
