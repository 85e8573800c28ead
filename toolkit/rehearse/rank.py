"""One rank of a rehearsal: the program's own connect, model, engine, schedule and step, on tensors
without data.

Imported only where toolkit.rehearse.device has put its stand-ins in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from toolkit.config.load import parse_config
from toolkit.engine import zero
from toolkit.hardware.catalogue import Hardware
from toolkit.parallel.layout import Layout
from toolkit.profile.live_tensors import STATIC
from toolkit.rehearse import device as stand_ins
from toolkit.rehearse import disk
from toolkit.rehearse.price import Price
from toolkit.rehearse.program import Play, known_values
from toolkit.rehearse.record import Recorder
from toolkit.train.world import World, connect

Progress = Callable[[str, float], None]


def rehearse(
    raw: dict[str, Any],
    *,
    world: int,
    rank: int,
    steps: int,
    device: stand_ins.Device,
    told: Any,
    hardware: Hardware | None,
    folder: Path,
    whole: bool = True,
    progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:
    """Run steps optimizer steps as one rank; the last of them is described. raw: the run's YAML as a mapping.

    folder: what the run writes goes there; whole: an evaluation and a save follow the steps.
    """
    started = time.perf_counter()
    config = parse_config(raw)
    layout = Layout.of(config, world)
    price = Price(hardware) if hardware is not None else None
    capacity = int(hardware.gpu.memory_gib * 2**30) if hardware is not None and device.kind == "cuda" else None
    recorder = Recorder(device.kind, price=price, capacity=capacity, rank=rank)
    recorder.device = device
    device.known = known_values(config)
    told.recorder = recorder
    stand_ins.install_optimizer(zero.deepspeed)
    disk.install(zero.deepspeed, lambda: recorder)
    progress("process groups", 0.0)
    stand_ins.open_world(rank, world)
    connect(World(rank, world, 0), layout, seed=config.run.seed)
    play = Play(config, layout, rank, recorder, folder=folder, steps=steps)
    # one thread: the backward then has the caller's stack, and no two threads take turns
    with device.tensors(), recorder, recorder.wire.written(), torch.autograd.set_multithreading_enabled(False):
        progress("model and engine", 0.1)
        play.build()
        built = {"seconds": time.perf_counter() - started, "reserved": recorder.storages.allocator.peak_reserved}
        for number in range(steps):
            progress(f"step {number + 1}", (number + 0.5) / (steps + 0.5))
            meter = play.step()
        step = recorder.step
        answer: dict[str, Any] = {
            "allocated": step.peak.nbytes,
            "peak_reserved": recorder.storages.allocator.peak_reserved,
            "host": {**meter.measured.host, "peak": recorder.host.peak, "pinned": recorder.host.pinned},
        }
        if whole:
            progress("evaluation and save", (steps + 0.25) / (steps + 0.5))
            answer |= {"evaluation": play.evaluate().as_json(), "save": play.save().as_json()}
    at = layout.coordinates(rank)
    return {
        "rank": rank,
        "stage": at.pp,
        **asdict(at),
        "parts": {part: meter.measured.parts.get(part, 0) for part in (*STATIC, "activations", "logits")},
        **answer,
        "retries": recorder.storages.allocator.retries,
        "overdrawn": recorder.storages.allocator.overdrawn,
        "microbatches": layout.num_microbatches,
        "step": step.as_json(),
        "groups": [compressed(ranks) for ranks in recorder.wire.groups],
        "built": built,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
    }


def compressed(ranks: tuple[int, ...]) -> list[int] | dict[str, int]:
    """Ranks at equal distances as {first, step, count}, others as they are: a group may hold ten thousand."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if len(ranks) > 8 and all(b - a == step for a, b in pairwise(ranks)):
        return {"first": ranks[0], "step": step, "count": len(ranks)}
    return list(ranks)
