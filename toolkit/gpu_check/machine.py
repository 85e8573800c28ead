"""What the machine is: versions, tools that compile, and a first word with the GPU and with NCCL."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from toolkit.gpu_check.rows import Row, held
from toolkit.gpu_check.runs import Say
from toolkit.gpu_check.setting import Setting
from toolkit.parallel.layout import Layout
from toolkit.train.world import World, connect

GIB = 2**30
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "triton", "transformer-engine", "flash-attn")
# what compiles with them, where it is missing
TOOLS = {
    "ninja": "DeepSpeed compiles its extensions with it: offload",
    "c++": "DeepSpeed's extensions and torch.compile need it: offload, fusions",
    "nvcc": "DeepSpeed's async_io needs the CUDA toolkit's headers: offload to NVMe",
    "nvidia-smi": "it names the driver",
}


def versions(setting: Setting, say: Say) -> None:
    """What is installed, what is missing for which check, and whether the device multiplies two matrices."""
    found: dict[str, Any] = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    found |= {"cuda": torch.version.cuda, "driver": _driver(), "cores": len(os.sched_getaffinity(0))}
    found["memory, GiB"] = round(psutil.virtual_memory().total / GIB, 1)
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "gpu": properties.name, "gpus": torch.cuda.device_count()}
        found |= {"gpu memory, GiB": round(properties.total_memory / GIB, 2), "capability": f"{properties.major}.{properties.minor}"}
    for name, value in found.items():
        say(Row(name=name, verdict="note", measured=value if isinstance(value, (int, float)) else value or "none"))
    for tool, what in TOOLS.items():
        path = shutil.which(tool)
        if path is None and (setting.device == "cuda" or not tool.startswith("nv")):
            say(Row(name=tool, verdict="note", measured="missing", note=what))
    device = torch.device(setting.device)
    # whole numbers below 2**24: their sums have no rounding on any device, whatever the order
    a = torch.arange(256 * 256, dtype=torch.float32).reshape(256, 256) % 7
    b = (a.to(device) @ a.to(device).T).cpu()
    say(held("a product of matrices is that of the CPU", bool(torch.equal(b, a @ a.T)), measured=str(device)))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0:
            return done.stdout.split("\n")[0]
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else None


def collectives(setting: Setting, say: Say) -> None:
    """Each collective that training uses, in a group of this process alone: their values, and that
    they end.
    """
    connect(World(0, 1, 0), Layout(), seed=1)
    device = torch.device(setting.device)
    say(Row(name="backend", verdict="note", measured=dist.get_backend()))
    group = dist.new_group([0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = torch.arange(1024, device=device).to(dtype)
        for name, result in _each(wanted, group).items():
            say(held(f"{name}, {str(dtype).removeprefix('torch.')}", bool(torch.equal(result, wanted))))
    dist.barrier(group=group)


def _each(values: torch.Tensor, group: Any) -> dict[str, torch.Tensor]:
    results = {name: torch.zeros_like(values) for name in ("all_gather_into_tensor", "reduce_scatter_tensor")}
    dist.all_gather_into_tensor(results["all_gather_into_tensor"], values, group=group)
    dist.reduce_scatter_tensor(results["reduce_scatter_tensor"], values.clone(), group=group)
    results["all_reduce"], results["broadcast"] = values.clone(), values.clone()
    dist.all_reduce(results["all_reduce"], group=group)
    dist.broadcast(results["broadcast"], src=0, group=group)
    work = dist.all_reduce(later := values.clone(), group=group, async_op=True)
    work.wait()
    return results | {"all_reduce, asynchronous": later}
