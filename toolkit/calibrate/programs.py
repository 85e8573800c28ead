"""Tiny training runs, whose steps hold next to no arithmetic: what Python, PyTorch's dispatcher, DeepSpeed and the start of
messages take by step, micro-batch and layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from toolkit.calibrate.modes import ALONE, TWO, VOCABULARY, WARM_UP, WIDER, program, wider
from toolkit.calibrate.pieces import quarter
from toolkit.config.schema import RunConfig
from toolkit.trainer import Trainer


class Tokens:
    """A map-style data set of a few random samples, over and over."""

    identity = "tokens of toolkit calibrate"

    def __init__(self, *, samples: int, length: int, ids: int) -> None:
        self.text = torch.randint(ids, (16, length + 1), generator=torch.Generator().manual_seed(1))
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"text": self.text[i % len(self.text)]}


def programs(ranks: int, folder: Path, *, between: Callable[[], None] = lambda: None) -> dict[str, list[list[float]]]:
    """Layers, micro-batches and seconds a step of each mode's runs on so many ranks; all of them call it.

    between: what is done after each run.
    """
    found: dict[str, list[list[float]]] = {}
    for mode, (keys, shapes) in (ALONE if ranks == 1 else TWO).items():
        for layers, microbatches in shapes:
            at = folder / f"{mode}-{layers}-{microbatches}"
            config = program(keys, layers=layers, microbatches=microbatches, ranks=ranks, folder=at)
            found.setdefault(mode, []).append([layers, microbatches, step_seconds(config)])
            between()
    return found


def wider_steps(folder: Path) -> list[float]:
    """Seconds a step of each of modes.WIDER."""
    return [step_seconds(wider(family, width, folder=Path(tempfile.mkdtemp(dir=folder)))) for family, width in WIDER]


def step_seconds(config: RunConfig) -> float:
    """Seconds of a run's steps without the first ones."""
    times: list[float] = []
    data = Tokens(samples=4096, length=config.train.seq_length, ids=VOCABULARY)
    Trainer(config, dataset=data, on_step=lambda step: times.append(step.record.step_s)).fit()
    return quarter(times[WARM_UP:])
