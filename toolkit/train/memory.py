"""A rank's memory: how it ends, and a lower limit for it than the machine's."""

from __future__ import annotations

import psutil
import torch

from toolkit.errors import ConfigError

GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Python and CUDA have classes for it; the CPU allocator says it in a RuntimeError."""
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in str(error)
        or "out of memory" in str(error).lower()
    )


def limit_memory(gib: float | None, device: torch.device) -> None:
    """Let this process take only so many GiB more: on a GPU by the allocator's share, on a CPU by
    the kernel's limit on data.
    """
    if gib is None:
        return
    if gib <= 0:
        raise ConfigError(f"--memory-limit {gib:g} leaves nothing", fix="Set it to the GiB a rank may take.")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), device)
        return
    import resource

    # limit writable private memory: the address space also counts what threads reserve and never touch
    most = psutil.Process().memory_info().data + int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
