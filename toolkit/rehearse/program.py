"""The training loop itself for one rank, a step at a time under a recorder: its steps, one
evaluation, and what a save does to the device.

Also what a real run on CPU is measured with, so that a rehearsal is held to the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.checkpoint.save import Saver, SaveSettings
from toolkit.config.schema import RunConfig
from toolkit.data.given import GivenData
from toolkit.engine.deepspeed_state import held_tensors
from toolkit.engine.schedule import observed
from toolkit.engine.state import EngineState
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.layout import Layout
from toolkit.profile.live_tensors import RECOMPUTED, Saved, StepMeter
from toolkit.rehearse.record import Recorder
from toolkit.rehearse.step import Step
from toolkit.train.loop import Run
from toolkit.train.resolve import ResolvedRun
from toolkit.train.world import World


class Zeros:
    """Samples that are as long as the run's, and all the same."""

    def __init__(self, *, samples: int, seq_length: int, apart: bool) -> None:
        self.apart = apart
        self.samples, self.text = samples, np.zeros(seq_length + 1, dtype=np.int32)
        self.positions = np.arange(seq_length, dtype=np.int32)  # where documents are kept apart: one in each sample

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"text": self.text, **({"positions": self.positions} if self.apart else {})}


def known_values(config: RunConfig) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
    """Values in host memory that the program reads, by dtype and shape: where the documents of a
    micro-batch of Zeros begin.
    """
    t = config.train
    bounds = list(range(0, (t.micro_batch_size + 1) * t.seq_length, t.seq_length))
    return {(torch.int32, (len(bounds),)): bounds} if config.data.document_mask else {}


class PlayedRun(Run):
    """The loop, telling a recorder what it is at."""

    recorder: Recorder

    def _agree(self, *arguments: Any) -> Any:
        self.recorder.phase = "agreement"
        return super()._agree(*arguments)

    def _end_together(self) -> None:
        """Nobody has met an error: the flags that ranks agree on hold no values in a rehearsal."""


class SavedByPart(Saved):
    """Also tells the recorder which storages wait for a backward."""

    recorder: Recorder

    def _pack(self, tensor: Tensor) -> Any:
        held = super()._pack(tensor)
        storages, address = self.recorder.storages, tensor.untyped_storage()._cdata
        if self.part != RECOMPUTED and storages.part.get(address) == "working set" and address in self.holders:
            storages.move(address, self.part)
        return held

    def _freed(self, address: int, nbytes: int, part: str) -> None:
        super()._freed(address, nbytes, part)
        storages = self.recorder.storages
        if address not in self.holders and storages.part.get(address) in ("activations", "logits"):
            storages.move(address, "working set")


class Play:
    """One rank's run. folder: stands for the run's own, which is left alone; steps: the most that
    step() is called.
    """

    def __init__(self, config: RunConfig, layout: Layout, rank: int, recorder: Recorder, *, folder: Path, steps: int = 2) -> None:
        self.config, self.layout, self.rank, self.recorder = config.model_copy(deep=True), layout, rank, recorder
        self.config.run.dir, self.config.checkpoint.dir = folder, None
        self.config.zero.nvme_path = folder / "nvme" if self.config.zero.nvme_path else None
        # a last step would read no batch ahead, and the step that is described must be one of many
        self.config.train.steps, self.config.train.eval_steps = steps + 1, 1
        self.taken = 0

    def build(self) -> None:
        """Readers, model, engine and schedule."""
        t = self.config.train
        zeros = Zeros(samples=(t.steps + 1) * t.global_batch_size, seq_length=t.seq_length, apart=self.config.data.document_mask)
        resolved = ResolvedRun(
            config=self.config,
            layout=self.layout,
            data=GivenData(train=zeros, valid=zeros, shuffle=False, masked=self.config.data.document_mask),
            ds_config=deepspeed_config(self.config, self.layout),
            weights=None,
        )
        self.config.data.workers = 0
        self.run = PlayedRun(resolved, World(self.rank, self.layout.world_size, 0))
        self.run.recorder = self.recorder
        self.engine = self.run.engine
        self._announce("finish", "optimizer step")

    def _announce(self, method: str, phase: str) -> None:
        call: Callable[..., Any] = getattr(self.engine, method)

        def announced(*arguments: Any, **named: Any) -> Any:
            self.recorder.phase = phase
            return call(*arguments, **named)

        setattr(self.engine, method, announced)

    def step(self) -> StepMeter:
        """One optimizer step, described in recorder.step and in the meter returned."""
        recorder, engine = self.recorder, self.engine
        self.taken += 1
        self._fresh("start")
        meter = StepMeter(engine, follow=False)
        saved = SavedByPart(tensor for tensors in held_tensors(engine).values() for tensor in tensors)
        saved.recorder = recorder
        meter.saved = saved
        with ExitStack() as stack:
            for context in (recorder.running.followed(engine.chunks), meter, self._passes(meter)):
                stack.enter_context(context)
            self.run._step(self.taken)
        return meter

    def evaluate(self) -> Step:
        """One evaluation of one global batch."""
        self._fresh("evaluation")
        with self.recorder.running.followed(self.engine.chunks):
            self.run._evaluate()
        return self.recorder.step

    def save(self) -> Step:
        """What a save asks of the device: everything a rank holds copied into host memory. Nothing
        is written.
        """
        self._fresh("save")
        settings = SaveSettings(folder=self.config.run.dir, token="", keep=1, distrusted=frozenset(), facts={})
        Saver(self.config, self.layout, EngineState(self.engine), settings).copied()
        return self.recorder.step

    def close(self) -> None:
        """Let go of the run."""
        self.run.close()

    def _fresh(self, phase: str) -> None:
        self.recorder.step = Step()
        self.recorder.phase = phase
        for part, tensors in reversed(held_tensors(self.engine).items()):
            self.recorder.storages.assign(part, tensors)

    @contextmanager
    def _passes(self, meter: StepMeter) -> Iterator[None]:
        counts = {"forward": 0, "backward": 0}

        @contextmanager
        def around(kind: str) -> Iterator[None]:
            counts[kind] += 1
            self.recorder.phase = f"{kind} {counts[kind]}"
            with meter.around(kind):
                yield
            self.recorder.phase = "between"

        with observed(around):
            yield
