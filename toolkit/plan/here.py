"""This machine as the planner takes it: its GPUs by the driver's name, or so many CPU processes."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

from toolkit.cluster.environment import gpu_count
from toolkit.hardware.catalogue import Hardware, gpu_of_device, parse_hardware


def hardware_here(processes: int) -> Hardware | None:
    """So many ranks on this machine; None where it has a GPU that the catalogue lacks."""
    if gpu_count() == 0:
        return parse_hardware(f"cpu:{processes}")
    gpu = gpu_of_device(_driver_name())
    if gpu is None:
        return None
    return replace(parse_hardware(gpu.name), gpus_per_node=processes, nodes=1)


def _driver_name() -> str:
    """The first GPU's name, as the driver gives it; "" where its tool is missing."""
    if shutil.which("nvidia-smi") is None:
        return ""
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[0].strip()
