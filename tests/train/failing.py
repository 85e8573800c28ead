"""A rank of two that fails as its first argument says, while the other waits for it in an
all-reduce; started by the launcher.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from toolkit.parallel.layout import Layout
from toolkit.train.console import ConsoleLog
from toolkit.train.program import quiet, say_failure
from toolkit.train.world import World, connect


def run(how: str, folder: Path, rank: int) -> None:
    folder.mkdir(exist_ok=True)
    with ConsoleLog(rank=rank) as console:
        connect(World.from_environment(), Layout(dp=2), seed=1)
        console.open(folder, step=0, processes=2)
        dist.barrier()
        listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
        logging.getLogger("toolkit.train").info("listens at %s", " ".join(sorted(listening)))
        logging.getLogger("toolkit.train").info("rank %d knows %s", rank, os.environ["HUB_TOKEN"])
        if rank == 1 and how == "raise":
            raise ValueError(f"the 7th shard is odd ({os.environ['HUB_TOKEN']})")
        if rank == 1 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "all":
            raise ValueError("every rank finds the same")
        dist.all_reduce(torch.zeros(1))


if __name__ == "__main__":
    number = int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    quiet()
    try:
        run(sys.argv[1], Path(sys.argv[2]), number)
    except Exception as error:
        say_failure(error, rank=number)
        sys.stdout.flush()
        os._exit(1)
