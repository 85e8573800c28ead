"""One rank of a rehearsal: the program's own connect, model, engine, schedule and step, on tensors without data.

Imported only where toolkit.rehearse.device has put its stand-ins in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from toolkit.config.load import parse_config
from toolkit.config.schema import RunConfig
from toolkit.engine import zero
from toolkit.engine.deepspeed_state import held_tensors
from toolkit.engine.schedule import Schedule, observed
from toolkit.hardware.catalogue import Hardware
from toolkit.model.build import build_chunks
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.layout import Layout
from toolkit.profile.live_tensors import RECOMPUTED, STATIC, Saved, StepMeter
from toolkit.rehearse import device as stand_ins
from toolkit.rehearse.price import Price
from toolkit.rehearse.record import Recorder
from toolkit.rehearse.step import Step
from toolkit.train.world import World, connect

Progress = Callable[[str, float], None]


class SavedByPart(Saved):
    """Also tells the recorder which storages wait for a backward."""

    recorder: Recorder

    def _pack(self, tensor: Tensor) -> Any:
        held = super()._pack(tensor)
        address = tensor.untyped_storage()._cdata
        if self.part != RECOMPUTED and self.recorder.storages.part.get(address) == "working set" and address in self.holders:
            self.recorder.storages.move(address, self.part)
        return held

    def _freed(self, address: int, nbytes: int, part: str) -> None:
        super()._freed(address, nbytes, part)
        if address not in self.holders and self.recorder.storages.part.get(address) in ("activations", "logits"):
            self.recorder.storages.move(address, "working set")


def rehearse(
    raw: dict[str, Any],
    *,
    world: int,
    rank: int,
    steps: int,
    device: stand_ins.Device,
    told: Any,
    hardware: Hardware | None,
    progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:
    """Run steps optimizer steps as one rank; the last of them is described. raw: the run's YAML as a mapping."""
    started = time.perf_counter()
    config = parse_config(raw)
    layout = Layout.of(config, world)
    price = Price(hardware) if hardware is not None else None
    capacity = int(hardware.gpu.memory_gib * 2**30) if hardware is not None and device.kind == "cuda" else None
    recorder = Recorder(device.kind, price=price, capacity=capacity, rank=rank)
    recorder.device = device
    told.recorder = recorder
    stand_ins.install_optimizer(zero.deepspeed)
    progress("process groups", 0.0)
    stand_ins.open_world(rank, world)
    connect(World(rank, world, 0), layout, seed=config.run.seed)
    play = Play(config, layout, rank, recorder, device)
    # one thread: the backward then has the caller's stack, and no two threads take turns
    with device.tensors(), recorder, recorder.wire.written(), torch.autograd.set_multithreading_enabled(False):
        progress("model and engine", 0.1)
        play.build()
        built = {"seconds": time.perf_counter() - started, "reserved": recorder.storages.allocator.peak_reserved}
        for number in range(steps):
            progress(f"step {number + 1}", (number + 0.5) / (steps + 0.5))
            meter = play.step()
    at = layout.coordinates(rank)
    return {
        "rank": rank,
        "stage": at.pp,
        **asdict(at),
        "parts": {part: meter.measured.parts.get(part, 0) for part in (*STATIC, "activations", "logits")},
        "host": {**meter.measured.host, "peak": recorder.host.peak, "pinned": recorder.host.pinned},
        "allocated": recorder.step.peak.nbytes,
        "peak_reserved": recorder.storages.allocator.peak_reserved,
        "retries": recorder.storages.allocator.retries,
        "overdrawn": recorder.storages.allocator.overdrawn,
        "microbatches": layout.num_microbatches,
        "step": recorder.step.as_json(),
        "groups": [compressed(ranks) for ranks in recorder.wire.groups],
        "built": built,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
    }


class Play:
    """The program's parts for one rank, and one step of them under the recorder; also what a real run on CPU is measured with."""

    def __init__(self, config: RunConfig, layout: Layout, rank: int, recorder: Recorder, device: Any = None) -> None:
        self.config, self.layout, self.rank, self.recorder, self.played = config, layout, rank, recorder, device
        self.device = torch.device("cuda", 0) if recorder.kind == "cuda" else torch.device("cpu")

    def build(self) -> None:
        """Model and engine as train.loop makes them."""
        config, layout = self.config, self.layout
        ds_config = deepspeed_config(config, layout)
        chunks = build_chunks(config, layout, device=self.device, partition=zero.partitioner(config, ds_config), blank=False)
        self.engine = zero.Engine(chunks, config, layout, ds_config)
        t = config.train
        self.schedule = Schedule(self.engine.views, layout, seq_length=t.seq_length, micro_batch_size=t.micro_batch_size)

    def step(self) -> StepMeter:
        """One optimizer step, described in recorder.step and in the meter returned."""
        recorder, engine = self.recorder, self.engine
        recorder.step = Step()
        recorder.phase = "start"
        for part, tensors in reversed(held_tensors(engine).items()):
            recorder.storages.assign(part, tensors)
        recorder.step.peak.nbytes = 0
        meter = StepMeter(engine, follow=False)
        saved = SavedByPart(tensor for tensors in held_tensors(engine).values() for tensor in tensors)
        saved.recorder = recorder
        meter.saved = saved
        counts = {"forward": 0, "backward": 0}

        @contextmanager
        def around(kind: str) -> Iterator[None]:
            counts[kind] += 1
            recorder.phase = f"{kind} {counts[kind]}"
            with meter.around(kind):
                yield
            recorder.phase = "between"

        with ExitStack() as stack:
            for context in (recorder.running.followed(engine.chunks), meter, observed(around)):
                stack.enter_context(context)
            micro = [self._batch() for _ in range(self.layout.num_microbatches)]
            engine.begin()
            self.schedule(lambda: iter(micro), num_microbatches=self.layout.num_microbatches)
            recorder.phase = "optimizer step"
            engine.finish()
        return meter

    def _batch(self) -> dict[str, Tensor]:
        """As the loop hands it on: on stages that read data a copy from pinned memory, zeros elsewhere."""
        t = self.config.train
        shape = (t.micro_batch_size, t.seq_length)
        if self.layout.coordinates(self.rank).pp not in (0, self.layout.pp - 1):
            nothing = torch.zeros(shape, dtype=torch.int64, device=self.device)
            return {"tokens": nothing, "labels": nothing}
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "labels")}
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()} if self.device.type == "cuda" else batch


def compressed(ranks: tuple[int, ...]) -> list[int] | dict[str, int]:
    """Ranks at equal distances as {first, step, count}, others as they are: a group may hold ten thousand."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if len(ranks) > 8 and all(b - a == step for a, b in pairwise(ranks)):
        return {"first": ranks[0], "step": step, "count": len(ranks)}
    return list(ranks)
