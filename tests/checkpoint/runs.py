"""Real training runs in processes of their own, forked from one that has already imported everything."""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import yaml

from toolkit.cluster.launch import free_port

PRELOADED = ["tests.checkpoint.runs", "torch", "numpy", "pydantic", "rich", "typer", "datasets", "tokenizers", "toolkit.train.loop", "toolkit.engine.zero", "toolkit.model.build", "toolkit.data.samples", "tests.preload"]  # fmt: skip
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


class Run:
    """`python -m toolkit.train CONFIG` on each rank.

    killer: (rank, n) kills that rank, and then all, before its n-th change to the checkpoints.
    limits: of the last rank (resource.setrlimit); that of its data is what it may take beyond what
    it holds at its start.
    """

    def __init__(
        self, config: Path, *overrides: str, ranks: int = 1, killer: tuple[int, int] | None = None, limits: dict[int, int] | None = None
    ) -> None:
        port = free_port()
        self.output = [config.parent / f"output-{port}-{r}.txt" for r in range(ranks)]
        self.processes: list[BaseProcess] = []
        for r in range(ranks):
            env = {"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
            at = killer[1] if killer is not None and killer[0] == r else None
            arguments = [str(config), *overrides]
            process = CONTEXT.Process(
                target=_rank, args=(env, arguments, str(self.output[r]), at, limits if r == ranks - 1 else None), daemon=True
            )
            process.start()
            self.processes.append(process)

    def wait(self, *, deadline_s: float = 600.0) -> int:
        """The first exit code that is not 0, or 0; once a rank is gone that way the others are
        killed, as a launcher does.
        """
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            codes = [p.exitcode for p in self.processes]
            bad = min((c for c in codes if c), default=None)  # a signal before an error that it caused on another rank
            if bad is not None or None not in codes:
                if bad is not None and bad > 0:  # the others are given time for the same error
                    self._join(20.0)
                    bad = min((p.exitcode for p in self.processes if p.exitcode), default=bad)
                self.kill()
                return bad or 0
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"no end within {deadline_s} s; exit codes so far {codes}\n{self.text()}")

    def signal(self, number: int) -> None:
        for p in self.processes:
            if p.is_alive() and p.pid:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(p.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._join(20.0)

    def _join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for p in self.processes:
            p.join(max(0.0, end - time.monotonic()))

    def text(self) -> str:
        return "\n".join(p.read_text() for p in self.output if p.exists())


def _rank(env: dict[str, Any], arguments: list[str], output: str, kill_at: int | None, limits: dict[int, int] | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update({k: str(v) for k, v in env.items()}, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    sys.stdout = os.fdopen(1, "w", buffering=1)
    if kill_at is not None:
        kill_before_change(kill_at)
    if limits:
        import resource

        held = {resource.RLIMIT_DATA: psutil.Process().memory_info().data}
        for kind, value in limits.items():
            resource.setrlimit(kind, (held.get(kind, 0) + value,) * 2)
    import torch

    torch.set_num_threads(1)
    from toolkit.train.__main__ import main

    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)  # without the interpreter's own clean-up, as the next run waits


def kill_before_change(n: int) -> None:
    """SIGKILL this process before its n-th change to a file or folder named like those of
    checkpoints; n = 0: never, but count.
    """
    count = 0

    def event(path: Any) -> None:
        nonlocal count
        if "/checkpoints" in os.fspath(path):
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and isinstance(args[0], (str, os.PathLike)):
            inside = name in ("os.remove", "os.rmdir") and args[1] >= 0  # shutil.rmtree names files relative to an open folder
            event(os.readlink(f"/proc/self/fd/{args[1]}") if inside else args[0])

    real = os.fsync

    def fsync(descriptor: int) -> None:
        event(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


MODEL = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32, "max_position_embeddings": 16, "dropout": 0.1}


def write_config(folder: Path, text: Path, *, steps: int, **checkpoint: object) -> Path:
    """A YAML for the run folder/run on the text file `text`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run": {"dir": str(folder / "run")},
        "model": MODEL,
        "zero": {"stage": 1},
        "train": {"steps": steps, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 16, "precision": "fp32"},
        "data": {"source": str(text), "cache_dir": str(text.parent / "data"), "workers": 0},
        "checkpoint": checkpoint,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def metrics(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each line of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(one["step"], one["loss"], one["grad_norm"]) for one in lines]


@contextlib.contextmanager
def running(make: Callable[[], Run]) -> Iterator[Run]:
    run = make()
    try:
        yield run
    finally:
        run.kill()
