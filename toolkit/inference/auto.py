"""`toolkit generate --auto`: the devices that are there, what each has free, and the plainest way
to cut the model over them. No torch of its own.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from toolkit.cluster.environment import gpu_count
from toolkit.cost.generation import LIBRARIES, Generation
from toolkit.cost.memory import GIB, HOST_SHARE
from toolkit.errors import ConfigError
from toolkit.hardware.catalogue import Hardware
from toolkit.inference.plan import check_keys
from toolkit.inference.request import Request
from toolkit.inference.source import Model, open_model
from toolkit.plan.generation import Choice, choose
from toolkit.plan.here import hardware_here


def devices_here(wanted: int | None) -> int:
    """Devices to use: as many as asked for, else all GPUs, else one process on the CPU, whose
    threads use all cores.
    """
    return wanted or gpu_count() or 1


def machine(devices: int, *, memory_limit: float | None = None) -> Hardware:
    """So many devices of this machine with the memory that each has free now, or is limited to (GiB
    beside its libraries).
    """
    hardware = hardware_here(devices)
    if hardware is None:
        raise ConfigError(
            "this machine's GPU is not in the catalogue", why="nothing says how fast it is", fix="Leave --auto out, and set parallel.tp=…."
        )
    gpu, host = hardware.gpu, psutil.virtual_memory()
    if memory_limit is not None:
        free = memory_limit * GIB + (0.0 if gpu.accelerator else LIBRARIES)
    elif gpu.accelerator:
        free = _free_on_gpus() or gpu.memory_gib * GIB
    else:
        free = HOST_SHARE * min(host.available, cgroup_room()) / devices
    # RAM that may be taken: of a CPU rank it is its own memory, so that the share is already out of it
    room = host.total / GIB if not gpu.accelerator else host.available / GIB
    return replace(hardware, gpu=replace(gpu, memory_gib=free / GIB, host_gib=room))


def choice_for(
    request: Request,
    *,
    devices: int,
    fixed: Sequence[str] = (),
    spread: bool = False,
    tokens: int | None = None,
    model: Model | None = None,
) -> Choice:
    """How to answer a request on so many devices; fixed: options that the user has set. tokens: of
    prompt and answer, else worked out from the prompts' bytes, which no tokenizer exceeds. spread:
    use as many of the devices as the model can be cut over.
    """
    model = model or open_model(Path(request.model))
    section = model.section
    check_keys(request.overrides)
    given = {key.strip().removeprefix("parallel."): value for key, _, value in (o.partition("=") for o in request.overrides)}
    degrees: dict[str, Any] = {name: int(value) for name, value in given.items() if value.strip().isdigit()}
    longest = max((len(p.encode()) for p in request.prompts), default=0)
    context = min(section.max_position_embeddings, tokens or longest + request.max_new_tokens)
    wish = Generation(
        model=section.spec,
        precision=request.dtype or model.precision,
        batch=request.batch if not spread else 1,
        context=context,
        prompt=min(context, max(1, longest)),
        weights=request.weights,
        kv=request.kv,
        offload=request.offload,
        **degrees,
    )
    return choose(
        wish,
        machine(devices, memory_limit=request.memory_limit),
        prompts=max(1, len(request.prompts)),
        fixed=[*fixed, *degrees, *(["offload"] if request.prune != "none" else [])],  # pruned layers cannot be streamed
        quantiser=importlib.util.find_spec("torchao") is not None,
        by_part=model.by_part,
        spread=spread,
    )


def with_choice(request: Request, choice: Choice) -> Request:
    """The request as it was chosen to be answered; the layers are shared out by what the ranks then
    measure.
    """
    way = choice.way
    measured = way.pp > 1 and way.offload == "none"
    return replace(
        request,
        overrides=choice.overrides,
        weights=way.weights,
        offload=way.offload,
        batch=way.batch,
        auto=choice.reasons,
        layers_per_stage="measured" if measured else "even",
        rebalance=request.rebalance and measured,
    )


def _free_on_gpus() -> float:
    """Bytes free on the fullest GPU, as the driver says; 0 where it does not."""
    if shutil.which("nvidia-smi") is None:
        return 0.0
    done = subprocess.run(["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(sizes, default=0) * 2**20


def cgroup_room() -> float:
    """Bytes that this process's container may still take; infinite where nothing limits it."""
    folder = Path("/sys/fs/cgroup")
    try:
        return float((folder / "memory.max").read_text()) - float((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
