"""Worker processes that are started once and run many distributed cells, each with a deadline."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo", TOKENIZERS_PARALLELISM="false")


class CellFailed(Exception):
    """A cell raised on some rank, or did not end in time; the message holds every rank's report."""


class Pool:
    """`size` processes; run(module:function, world_size, argument) calls function(argument) on
    ranks 0..world_size-1.

    Each call has its own torch.distributed world. After a failure the processes are started anew,
    so that a broken cell cannot spoil the next one.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[mp.process.BaseProcess, Connection, Path]] = []
        self.calls = 0
        self.folder = tempfile.TemporaryDirectory(prefix="cells-")

    def run(self, function: str, world_size: int, argument: Any, *, deadline_s: float) -> list[Any]:
        """Results in rank order; raises CellFailed with all stacks when a rank fails or hangs."""
        if not self.workers:
            self._start()
        self.calls += 1
        rendezvous = os.path.join(self.folder.name, f"store-{self.calls}")
        for rank in range(world_size):
            self.workers[rank][1].send((function, rank, world_size, rendezvous, argument))
        pending = {self.workers[r][1]: r for r in range(world_size)}
        results: dict[int, Any] = {}
        end = time.monotonic() + deadline_s
        while pending:
            ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise CellFailed(f"no answer within {deadline_s} s from ranks {sorted(pending.values())}\n" + self._stacks())
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[index]
                try:
                    good, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "the process died"
                if not good:
                    time.sleep(0.5)  # the others' reports, if they have any
                    others = [c.recv()[1] for c in pending if c.poll()]
                    self.close()
                    raise CellFailed(f"rank {rank}: {value}\n" + "\n".join(str(o) for o in others if isinstance(o, str)))
                results[rank] = value
        return [results[r] for r in range(world_size)]

    def _start(self) -> None:
        # torch, megatron-core and deepspeed are imported once for all: by a server, or by who runs
        # one test after the other
        context: Any = mp.get_context(os.environ.get("TESTS_POOL_START", "forkserver"))
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["tests.preload"])
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            stacks = Path(self.folder.name) / f"stacks-{rank}"
            process = context.Process(target=_work, args=(theirs, str(stacks)), daemon=True)
            process.start()
            self.workers.append((process, ours, stacks))

    def _stacks(self) -> str:
        for process, _, _ in self.workers:
            if process.is_alive() and process.pid:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, signal.SIGUSR1)
        end = time.monotonic() + 10
        while time.monotonic() < end and not all(p.exists() and p.stat().st_size for _, _, p in self.workers):
            time.sleep(0.1)
        time.sleep(0.5)  # a dump is several writes
        text = "\n".join(f"--- worker {i}\n{path.read_text()}" for i, (_, _, path) in enumerate(self.workers) if path.exists())
        self.close()
        return text

    def close(self) -> None:
        """End all processes; the next run starts new ones."""
        for process, connection, _ in self.workers:
            connection.close()
            process.kill()
            process.join()
        self.workers = []


def _work(connection: Connection, stacks: str) -> None:
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115  lives as long as the process
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    fresh = True
    while True:
        try:
            function, rank, world_size, rendezvous, argument = connection.recv()
        except EOFError:
            sys.exit(0)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
        try:
            store = dist.FileStore(rendezvous, world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            dist.barrier()  # a cell that fails at once would leave the world while others still connect to it
            module, name = function.split(":")
            answer = (True, getattr(importlib.import_module(module), name)(argument))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            _forget_world()
        except BaseException:
            answer = (False, f"{answer[1]}\nwhile leaving the world:\n{traceback.format_exc()}")
        if fresh:
            gc.freeze()  # what the first cell has imported stays for good
            fresh = False
        connection.send(answer)


def _release_engines() -> None:
    """Let go of engines' process groups, whose threads would outlive the cell."""
    from toolkit.engine.zero import Engine

    for engine in [o for o in gc.get_objects() if type(o) is Engine and vars(o)]:
        engine.close()


def _forget_world() -> None:
    """Back to a process that has never been part of a world."""
    import torch.distributed as dist

    if "toolkit.engine.zero" in sys.modules:
        _release_engines()
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random

        parallel_state.destroy_model_parallel()
        random.get_cuda_rng_tracker().reset()
    if "deepspeed" in sys.modules:
        import deepspeed.comm.comm as comm
        import deepspeed.utils.groups as groups

        comm.cdb = None
        for name in vars(groups):
            if name in ("mpu", "mesh_device") or name.endswith("_GROUP"):
                setattr(groups, name, None)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
