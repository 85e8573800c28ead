"""Long-lived worker processes, one per loop, that take turns on the same cores."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tests.bench.loops import Shape


@dataclass(frozen=True)
class Turn:
    """Seconds on the clock and seconds of CPU time of each step of a turn, and the steps' losses."""

    wall_s: list[float]
    cpu_s: list[float]
    losses: list[float]


class Worker:
    """One loop in a process of its own; idle (asleep on a pipe) while others have their turn."""

    def __init__(self, kind: str, shape: Shape, *, threads: int) -> None:
        context = mp.get_context("spawn")
        self.kind = kind
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, kind, shape, threads, _free_port()), daemon=True)
        self.process.start()
        theirs.close()

    def turn(self, steps: int) -> Turn:
        """Run `steps` optimizer steps and wait for them."""
        self.connection.send(steps)
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the worker of loop {self.kind!r} died") from None
        if isinstance(answer, str):
            raise RuntimeError(f"loop {self.kind!r} failed:\n{answer}")
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class _Clock:
    """Answers turns: counts down the steps of the turn that was asked for, then sleeps until the next."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.left = 0
        self.turn = Turn([], [], [])
        self.started = (0.0, 0.0)

    def pause(self, loss: float | None) -> bool:
        """After each step with its loss (before the first: None); False when there is nothing more to do."""
        if loss is not None:
            self.turn.wall_s.append(time.perf_counter() - self.started[0])
            self.turn.cpu_s.append(time.process_time() - self.started[1])
            self.turn.losses.append(loss)
            self.left -= 1
            if self.left == 0:
                self.connection.send(self.turn)
        if self.left == 0:
            try:
                self.left = self.connection.recv()
            except (EOFError, OSError):
                return False
            self.turn = Turn([], [], [])
        self.started = (time.perf_counter(), time.process_time())
        return True


def _serve(connection: Connection, kind: str, shape: Shape, threads: int, port: int) -> None:
    os.environ.update(OMP_NUM_THREADS=str(threads), DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo", TOKENIZERS_PARALLELISM="false")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    from tests.bench import loops

    torch.set_num_threads(threads)
    clock = _Clock(connection)
    try:
        name, _, stage = kind.partition("-zero")
        if name == "hf":
            loops.hugging_face(shape, clock.pause, zero_stage=int(stage))
            return
        step = (
            loops.toolkit_loop(shape, zero_stage=int(stage)) if name == "toolkit" else loops.bare_loop(shape, own_layers=name == "megatron")
        )
        more = clock.pause(None)
        while more:
            more = clock.pause(step())
    except BaseException:
        connection.send(traceback.format_exc())
        sys.exit(1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def versions() -> dict[str, Any]:
    """Versions of what is measured."""
    from importlib.metadata import version

    names = ("torch", "megatron-core", "deepspeed", "transformers", "accelerate")
    return {name: version(name) for name in names}
