"""A rank for the launch tests: meets the others over gloo, adds up their ranks, then does what its
arguments say.

Usage: -m tests.cluster.smoke CONFIG [exit=CODE] [meet=SECONDS] [wait=FOLDER [deaf=1]] [kill=RANK].
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path


def main(argv: list[str]) -> int:
    options = dict(word.split("=", 1) for word in argv[1:])
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # waits for all ranks, so that `meet` counts from when all have started
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=float(options.get("meet", 120))))
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    network = os.readlink("/proc/self/ns/net")
    sys.stdout.write(f"rank {rank} of {world} host={socket.gethostname()} net={network} sum={total.item():.0f} argument={argv[0]}\n")
    sys.stdout.flush()
    if folder := options.get("wait"):
        Path(folder, f"ready-{rank}").touch()
        deadline = time.monotonic() + 300
        while (not stop or options.get("deaf")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # the rest of a step
        if stop:
            Path(folder, f"stopped-{rank}").touch()
    if options.get("kill") == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0 and "exit" in options:
        sys.stdout.write("the one message\n")
    return int(options.get("exit", 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
