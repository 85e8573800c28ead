"""This process's place in the run: ranks from the launcher's environment, device, process groups, seeds."""

from __future__ import annotations

import atexit
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from toolkit.cluster.environment import take_place_from_mpi
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
        take_place_from_mpi()
        rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        return cls(rank, size, local)

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        own = "CUDA_VISIBLE_DEVICES" in os.environ
        return torch.device("cuda", device_index(self.local_rank, visible=torch.cuda.device_count(), restricted=own))


def device_index(local_rank: int, *, visible: int, restricted: bool) -> int:
    """The GPU of a local rank, of those that its process sees; MachineError where there is none for it.

    restricted: whether CUDA_VISIBLE_DEVICES is set. A scheduler may show each task its own GPU alone (Slurm's
    --gpus-per-task=1), which is then number 0 for every rank.
    """
    if visible == 1 and restricted:
        return 0
    if local_rank >= visible:
        raise MachineError(
            f"local rank {local_rank} has no GPU: this host shows {visible}", fix="Start as many processes per host as it has GPUs."
        )
    return local_rank


def connect(world: World, layout: Layout, *, seed: int, timeout_s: float = 1800.0, meeting: str | None = None) -> None:
    """Open the process groups and seed the generators; every rank must call it.

    meeting: a new file by which ranks of one host find each other, instead of a port that another
    program may have taken.

    The world of all ranks is opened once in a process and stays for the runs that follow; the
    groups of a layout are each run's own.
    """
    from toolkit.model import cpu
    from toolkit.parallel import groups

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    for key, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(key, str(value))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        os.environ["LOCAL_RANK"] = str(world.device.index)  # DeepSpeed takes its device from there
    else:
        cpu.install()
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if world.device.type == "cuda" else "gloo",
            store=dist.FileStore(meeting, world.size) if meeting and world.size > 1 else _store(world, timedelta(seconds=timeout_s)),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_s),
        )
        atexit.register(disconnect)
    groups.initialise(layout)
    groups.seed_generators(layout.coordinates(world.rank), seed=seed)


def _store(world: World, timeout: timedelta) -> dist.Store | None:
    """Where the ranks meet, listening on one address alone where it is known which; None:
    torchrun's own, which torch finds.

    Left to itself, torch's store listens on every interface of the first host. A world of one needs no port.
    """
    if world.size == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = None
    if world.rank == 0:
        listening = listen(host, port, interface=os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME"))
    descriptor = listening.detach() if listening is not None else None
    return dist.TCPStore(host, port, world.size, world.rank == 0, timeout, multi_tenant=True, master_listen_fd=descriptor)


def listen(host: str, port: int, *, interface: str | None) -> socket.socket | None:
    """A socket that listens for the ranks on the address `host`; None where it is not certain that
    all ranks come to that address.

    An address is what it says. A name may mean another address on other hosts, so it counts only
    where it means one of `interface`.
    """
    try:
        address = str(ipaddress.ip_address(host))
    except ValueError:
        try:
            address = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError:
            return None
        if interface is None or address not in {a.address for a in psutil.net_if_addrs().get(interface, [])}:
            return None
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=2048)
    except OSError:  # taken, or no address of this host (a forwarded one): torch says what is wrong, or listens everywhere
        return None


def disconnect() -> None:
    """Close the world of all ranks, if it is still open; after an error of this rank alone, without
    waiting for the others.
    """
    if not dist.is_initialized():
        return
    if getattr(sys, "last_value", None) is not None and dist.get_backend() == "nccl":
        # the traceback is out; others may be in a collective that this rank never joins, and
        # destroying the groups waits for it
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
