"""One rank of `toolkit profile`: the real training loop, run a few steps under instruments."""

from __future__ import annotations

import importlib
import json
import logging
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from toolkit.config.schema import RunConfig
from toolkit.cost.workload import Workload
from toolkit.data.dataset import cache_dir_of
from toolkit.engine.schedule import observed
from toolkit.files import replacing
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.layout import Layout
from toolkit.profile import predict
from toolkit.profile.clock import PARTS, Clock, Wire
from toolkit.profile.live_tensors import StepMeter
from toolkit.profile.oom import Place, fences
from toolkit.runfolder.profile import FORMAT, PROFILE, write_profile
from toolkit.train.loop import Run
from toolkit.train.memory import limit_memory
from toolkit.train.resolve import ResolvedRun
from toolkit.train.world import World, connect

log = logging.getLogger("toolkit.profile")

WARM_UP = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """steps: how many are timed; memory_limit: GiB a rank may take beyond what it holds before the
    model, None: all there is; calibration: a file of toolkit calibrate, None: what is shipped.
    """

    steps: int = 3
    memory_limit: float | None = None
    calibration: Path | None = None


def profile(resolved: ResolvedRun, options: Options) -> None:
    """Run and measure on this rank; rank 0 writes RUN/profile.json. Raises OutOfMemory with the
    place where memory ended.
    """
    world = World.from_environment()
    run_dir = resolved.config.run.dir
    resolved = own_folder(resolved, steps=WARM_UP + options.steps + 2)
    config, layout = resolved.config, resolved.layout
    connect(world, layout, seed=config.run.seed)
    place = Place(config, layout, world.rank, limit_gib=options.memory_limit)
    try:
        with fences(place):
            # the libraries themselves do not count
            importlib.import_module("toolkit.engine.zero"), importlib.import_module("toolkit.model.build")
            limit_memory(options.memory_limit, world.device)
            run = Run(resolved, world)
            place.follow(run.engine)
            mine = Session(run, world, layout, run_dir, place).measure(options.steps)
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, mine)
        if world.rank == 0:
            profile = {**header(config, layout, world, options), "ranks": everyone}
            path = write_profile(run_dir, profile)
            from toolkit.profile.show import profile_text

            log.info(profile_text(profile).rstrip())
            log.info("wrote %s and a Chrome trace per rank in %s", path, run_dir / "profile")
        run.checkpoints.release()
        run.metrics.close()
        if run.train_batches is not None:
            run.train_batches.close()
    finally:
        dist.destroy_process_group()


def own_folder(resolved: ResolvedRun, *, steps: int) -> ResolvedRun:
    """The run as it is profiled: it writes below RUN/profile alone, saves and resumes nothing, and
    computes uncompiled.
    """
    config, changed = resolved.config, resolved.config.model_copy(deep=True)
    changed.data.cache_dir = cache_dir_of(config)
    changed.run.dir = config.run.dir / "profile"
    changed.checkpoint.dir = None
    changed.checkpoint.every, changed.checkpoint.resume, changed.checkpoint.init_from = 0, "never", None
    changed.train.steps, changed.train.eval_every = max(steps, config.train.steps), 0
    changed.log.tensorboard = changed.log.wandb = changed.log.csv = False
    if changed.model.compile:
        log.warning("model.compile is off while profiling: compiled code hides which tensors it keeps")
        changed.model.compile = False
    return replace(resolved, config=changed, ds_config=deepspeed_config(changed, resolved.layout), weights=None)


class Session:
    """Warm-up, timed steps, one step with every tensor followed, one step with PyTorch's profiler."""

    def __init__(self, run: Run, world: World, layout: Layout, run_dir: Path, place: Place) -> None:
        self.run, self.world, self.layout, self.run_dir, self.place = run, world, layout, run_dir, place
        self.at = layout.coordinates(world.rank)
        self.step = 0

    def measure(self, steps: int) -> dict[str, Any]:
        """Everything one rank measures: its entry in profile.json."""
        for _ in range(WARM_UP):
            self._one()
        timed = self._timed(steps)
        memory = self._memory()
        trace = self._trace()
        return {
            "rank": self.world.rank,
            "stage": self.at.pp,
            "tp": self.at.tp,
            "dp": self.at.dp,
            "host": socket.gethostname(),
            **timed,
            **memory,
            "trace": trace,
        }

    def _one(self) -> None:
        self.step += 1
        record, _ = self.run._step(self.step)
        self.run.metrics.write(record)

    def _timed(self, steps: int) -> dict[str, Any]:
        clock = Clock(self.world.device)
        wire = Wire(self.layout, self.world.rank, clock)
        engine: Any = self.run.engine
        run: Any = self.run
        finish = clock.timed("optimizer", engine.finish)
        load = clock.timed("data wait", run.feed.fetch)
        with observed(clock.part), wire.counting(), replaced(run.feed, "fetch", load), replaced(engine, "finish", finish):
            dist.barrier()
            clock.take()
            wire.forget()
            for _ in range(steps):
                self._one()
            seconds, counts = clock.take()
        wire.settle()
        passes = {kind: seconds.get(kind, 0.0) / max(1, counts.get(kind, 0)) for kind in ("forward", "backward")}
        return {
            "seconds": {part: seconds.get(part, 0.0) / steps for part in PARTS} | {"step": sum(seconds.values()) / steps},
            "micro_batch_seconds": passes,
            "traffic": [
                {**asdict(row), "calls": row.calls / steps, "nbytes": row.nbytes / steps, "seconds": row.seconds / steps}
                for row in sorted(wire.rows.values(), key=lambda r: -r.nbytes)
            ],
        }

    def _memory(self) -> dict[str, Any]:
        cuda = self.world.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        with StepMeter(self.run.engine) as meter, observed(meter.around):
            self._one()
        step = meter.measured
        result: dict[str, Any] = {
            "memory": {**step.parts, "peak": step.peak},
            "predicted": self._predicted(),
            "memory_over_time": [[round(t, 6), n] for t, n in step.samples],
            "rss": psutil.Process().memory_info().rss,
        }
        if cuda:
            snapshot = f"profile/snapshot-rank{self.world.rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(self._target(snapshot)))
            torch.cuda.memory._record_memory_history(enabled=None)
            result |= {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                "snapshot": snapshot,
            }
        return result

    def _predicted(self) -> dict[str, int]:
        w = Workload.of(self.run.config, self.world.size)
        hardware = predict.hardware_here(gpu=gpu_name(self.world.device), ranks=self.world.size)
        return {k: round(v) for k, v in predict.memory(w, hardware, self.at.pp, dp_rank=self.layout.copy_of(self.at)).items()}

    def _trace(self) -> str:
        from torch.profiler import ProfilerActivity, record_function

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.world.device.type == "cuda" else [])
        with torch.profiler.profile(activities=kinds) as profiler, observed(record_function):
            self._one()
        name = f"profile/trace-rank{self.world.rank}.json.gz"
        with replacing(self._target(name)) as part:
            profiler.export_chrome_trace(str(part))
        return name

    def _target(self, name: str) -> Path:
        """A file of the run folder, in a folder made on this host too: only rank 0's has one yet
        where hosts share no disk.
        """
        target = self.run_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def header(config: RunConfig, layout: Layout, world: World, options: Options) -> dict[str, Any]:
    """profile.json without its ranks: what ran, where, and what the planner says of it."""
    w = Workload.of(config, world.size)
    gpu = gpu_name(world.device)
    hardware = predict.hardware_here(gpu=gpu, ranks=world.size)
    return {
        "format": FORMAT,
        "device": gpu or platform.processor() or "cpu",
        "hardware": str(hardware),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "megatron-core", "deepspeed")},
        "config": json.loads(config.model_dump_json()),
        "layout": asdict(layout),
        "steps": options.steps,
        "predicted": predict.as_json(w, hardware, users_file=options.calibration),
    }


def gpu_name(device: torch.device) -> str | None:
    """The GPU's own name, None on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object set for a while."""
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


__all__ = ["PROFILE", "Options", "Session", "own_folder", "profile"]
