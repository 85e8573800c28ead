"""How long gloo's messages between this machine's processes take, by size."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle

import torch
import torch.distributed as dist

from toolkit.calibrate.pieces import COLD, quarter

BYTES = (64, 4 << 10, 64 << 10, 512 << 10, 2 << 20, 8 << 20)
ROUNDS = 12


def messages() -> dict[str, list[list[float]]]:
    """Bytes and seconds of each of toolkit.hardware.cpu.COLLECTIVES; all ranks call it. Bytes are those of the whole tensor."""
    rank, world = dist.get_rank(), dist.get_world_size()
    curves: dict[str, list[list[float]]] = {}
    for nbytes in BYTES:
        turns = max(1, min(9, COLD // nbytes))  # tensors that take turns, so that memory is as cold as in a step
        wholes, parts = (cycle([torch.full((nbytes // 4 // n,), 1e-9) for _ in range(turns)]) for n in (1, world))
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda wholes=wholes: dist.all_reduce(next(wholes)),  # type: ignore[misc]
            "all_gather": lambda wholes=wholes, parts=parts: dist.all_gather_into_tensor(next(wholes), next(parts)),  # type: ignore[misc]
            "reduce_scatter": lambda wholes=wholes, parts=parts: dist.reduce_scatter_tensor(next(parts), next(wholes)),  # type: ignore[misc]
            "send": lambda wholes=wholes: _there_and_back(next(wholes), rank),  # type: ignore[misc]
        }
        for name, call in calls.items():
            taken = _seconds(call) / (2 if name == "send" else 1)
            curves.setdefault(name, []).append([nbytes, taken])
    return curves


def _there_and_back(tensor: torch.Tensor, rank: int) -> None:
    if rank == 0:
        dist.send(tensor, 1)
        dist.recv(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)
        dist.send(tensor, 0)


def _seconds(call: Callable[[], object]) -> float:
    dist.barrier()
    times = []
    for _ in range(2 + ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return quarter(times[2:])
