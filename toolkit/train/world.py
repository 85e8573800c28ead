"""This process's place in the run: ranks from the launcher's environment, device, process groups, seeds."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from toolkit.errors import MachineError
from toolkit.parallel.layout import Layout


@dataclass(frozen=True)
class World:
    """What the launcher told this process; known before any socket is opened."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; a process started by hand is a world of one."""
        rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        return cls(rank, size, local)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def connect(world: World, layout: Layout, *, seed: int, timeout_s: float = 1800.0) -> None:
    """Open the process groups and seed the generators; every rank must call it.

    The world of all ranks is opened once in a process and stays for the runs that follow; the groups of a layout are each run's own.
    """
    from toolkit.model import cpu
    from toolkit.parallel import groups

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    for key, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(key, str(value))
    if world.device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise MachineError(
                f"local rank {world.local_rank} has no GPU: this host shows {torch.cuda.device_count()}",
                fix="Start as many processes per host as it has GPUs.",
            )
        torch.cuda.set_device(world.device)
    else:
        cpu.install()
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if world.device.type == "cuda" else "gloo",
            store=dist.HashStore() if world.size == 1 else None,  # a world of one needs no port
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_s),
        )
        atexit.register(disconnect)
    groups.initialise(layout)
    groups.seed_generators(layout.coordinates(world.rank), seed=seed)


def disconnect() -> None:
    """Close the world of all ranks, if it is still open."""
    if dist.is_initialized():
        dist.destroy_process_group()
