"""The most memory that this process has taken, counted by the system, on a GPU by PyTorch's
allocator; and what is said when it ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from toolkit.cost.memory import GIB, HOST_SHARE
from toolkit.errors import OutOfMemory
from toolkit.inference.auto import cgroup_room


def forget_peak() -> None:
    """Count the peak from here on; where the system does not allow it, it is the process's so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes at the most; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0


def fragmented(device: torch.device) -> int:
    """Bytes that were freed and are still this process's: in PyTorch's allocator, or in the C
    library's heaps; 0 where it does not say.
    """
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        info = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0
    info.restype = _MallocInfo
    return int(info().fordblks)


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def free(device: torch.device) -> int:
    """Bytes that this rank could still take; on a CPU all ranks of the machine could."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def room(device: torch.device, *, limit_gib: float | None, ranks: int) -> float:
    """Bytes that this rank may still take for its part of a model. ranks: on this host; on a CPU
    they share what is free.
    """
    if device.type == "cuda":
        here = float(torch.cuda.mem_get_info(device)[0])
        return here if limit_gib is None else min(here, limit_gib * GIB)
    import resource

    shared = HOST_SHARE * min(psutil.virtual_memory().available, cgroup_room()) / ranks
    most = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if most == resource.RLIM_INFINITY:
        return shared
    return min(shared, most - psutil.Process().memory_info().data + fragmented(device))


@contextmanager
def said_when_memory_ends(what: str, *, rank: int, offload: str, limit_gib: float | None) -> Iterator[None]:
    """Turn every way in which PyTorch says that memory has ended into OutOfMemory. what: it was
    wanted for.
    """
    from toolkit.train.memory import is_out_of_memory

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        thread = "can't start new thread" in str(error)  # there is no room for its stack
        if not (isinstance(error, MemoryError) or is_out_of_memory(error) or thread):
            raise
        where = f"--memory-limit {limit_gib:g} GiB" if limit_gib else "this rank's memory"
        streamed = "" if offload != "none" else " --offload disk (or cpu, beside a GPU) holds two layers at once;"
        raise OutOfMemory(
            f"rank {rank} ran out of memory for {what}",
            why=f"{where} is full",
            fix=f"Let --auto choose, or set what takes less:{streamed} --weights int8, --kv int8, a higher parallel.tp or parallel.pp, "
            "a smaller --batch-size or --max-new-tokens.",
        ) from None
