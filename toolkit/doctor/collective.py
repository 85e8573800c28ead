"""`python -m toolkit.doctor.collective`: one rank of the all-reduce that doctor measures, a process
of its own beside the probe.

torch is imported while the probe still gathers facts. A backend that crashes or hangs takes only
this process with it.
It speaks JSON lines: the first says what torch is and sees; each task that comes in is answered by one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

TIMEOUT_S = 6.0
ROUNDS = 4
CPU_BYTES, GPU_BYTES = 8 << 20, 256 << 20


def main(local_rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    seen: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count() if cuda else 0}
    if cuda:
        torch.cuda.set_device(local_rank)
        properties = torch.cuda.get_device_properties(local_rank)
        seen |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "name": properties.name, "memory": properties.total_memory}
    _say(seen)
    store: Any = None
    for line in sys.stdin:
        task = json.loads(line)
        try:
            if task["do"] == "meet":  # the first rank opens the meeting point, at an address of its own and any free port
                listening = socket.create_server((task["address"], 0), backlog=1024)
                port = listening.getsockname()[1]
                store = dist.TCPStore(
                    task["address"], port, None, True, timedelta(seconds=TIMEOUT_S), wait_for_workers=False,
                    master_listen_fd=listening.detach(),
                )  # fmt: skip
                _say({"port": port})
            elif task["do"] == "all_reduce":
                if store is None:
                    store = dist.TCPStore(task["address"], task["port"], None, False, timedelta(seconds=TIMEOUT_S), wait_for_workers=False)
                _say(_all_reduce(dist, torch, store, rank=task["rank"], world=task["world"], cuda=cuda))
        except Exception as error:
            _say({"error": " ".join(str(error).split())[:300] or type(error).__name__})
    sys.stdout.flush()
    os._exit(0)  # a group that did not form would be waited for at the interpreter's end


def _all_reduce(dist: Any, torch: Any, store: Any, *, rank: int, world: int, cuda: bool) -> dict[str, Any]:
    """Bus bandwidth in GB/s, by the usual count: each rank sends and receives 2(n-1)/n of its bytes."""
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S))
    size = GPU_BYTES if cuda else CPU_BYTES
    values = torch.empty(size // 4, device="cuda" if cuda else "cpu")
    seconds = []
    for _ in range(ROUNDS):
        values.fill_(rank + 1)
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    right = bool((values == world * (world + 1) / 2).all())
    return {
        "backend": backend,
        "ranks": world,
        "bytes": size,
        "gb_s": 2 * (world - 1) / world * size / min(seconds[1:]) / 1e9,
        "right": right,
    }


def _say(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
