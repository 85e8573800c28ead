"""What each stage's device takes for a layer and how many it can hold: measured on one layer before
the model is read, or on answers.

Every rank looks at itself; all ranks then know all stages, so that all of them choose the same cut.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.arch.spec import WeightSpec
from toolkit.config.schema import RunConfig
from toolkit.cost.generation import Generation, layers_held
from toolkit.model.savings import Savings
from toolkit.model.stage import Stage
from toolkit.parallel.agree import everywhere
from toolkit.parallel.layout import Layout
from toolkit.plan.cut import StagePace

REPEATS = 9
WARM_UP = 2
PAST = 32  # tokens in the cache of the measured layer
FLUSH = 64 * 2**20  # bytes: more than the processor's cache, from which a model's weights do not come either


@dataclass(frozen=True, kw_only=True)
class Pace:
    """One rank: seconds of a layer and of its stage's embedding or output, for one new token of a
    micro-batch; room: bytes that its part of the model may take.
    """

    layer: float
    ends: float
    room: float


def one_layer(config: RunConfig, layout: Layout, *, rank: int, device: torch.device, savings: Savings) -> Stage:
    """This rank's stage with one layer of the model's shape, and drawn weights."""
    model = config.model.model_copy(update={"num_layers": layout.pp})
    one_each = replace(layout, layers_per_stage=(1,) * layout.pp)
    changed = config.model_copy(update={"model": model})
    return Stage(changed, one_each, rank=rank, device=device, read=_drawn(layout.tp), savings=savings)


def time_layer(stage: Stage, *, texts: int, room: float) -> Pace:
    """What the layer takes for one new token of so many texts, and the stage's embedding or output;
    a stage's ranks call it together.
    """
    model, device = stage.config.model, stage.device
    flush = torch.zeros(max(1, int(min(FLUSH, room / 8))), dtype=torch.uint8, device=device)
    past = max(1, min(PAST, model.max_position_embeddings - REPEATS - WARM_UP))
    with torch.no_grad():
        cache = stage.cache(batch=texts, length=past + REPEATS + WARM_UP)
        for step in range(1 + WARM_UP + REPEATS):
            new = 1 if step else past
            given = torch.zeros((texts, new), dtype=torch.int64, device=device)
            if not stage.first:
                given = torch.randn((texts, new, model.hidden_size), device=device).to(stage.dtype)
            flush.add_(1)
            stage.compute(given, cache.begin(new), cache)
            if step == WARM_UP:
                stage.spans = {}
    assert stage.spans is not None
    return pace_of(stage.spans, layers=1, room=room)


def pace_of(spans: Mapping[str, Sequence[float]], *, layers: int, room: float) -> Pace:
    """From the seconds of each pass through a stage of so many layers; 0 where there was none."""
    passes, ends = spans.get("layers"), spans.get("ends")
    return Pace(
        layer=statistics.median(passes) / layers if passes else 0.0,
        ends=statistics.median(ends) if ends else 0.0,
        room=room,
    )


def all_stages(mine: Callable[[], Pace], *, layout: Layout, way: Generation) -> list[StagePace]:
    """Every stage by its slowest and its fullest rank; all ranks call it, and all know the same."""
    everyone = everywhere(mine)
    stages = []
    for number in range(layout.pp):
        ranks = [pace for rank, pace in enumerate(everyone) if layout.coordinates(rank).pp == number]
        most = layers_held(way, stage=number, room=min(r.room for r in ranks))
        stages.append(StagePace(layer=max(r.layer for r in ranks), ends=max(r.ends for r in ranks), most=min(most, way.model.layers)))
    return stages


def _drawn(tp: int) -> Callable[[WeightSpec], Tensor]:
    """Weights of this rank's shapes: one small block of drawn numbers over and over, which is as
    good to time and quick to make.
    """
    block = 0.02 * torch.randn(65521, generator=torch.Generator().manual_seed(0))

    def read(weight: WeightSpec) -> Tensor:
        shape = weight.cut.part(weight.shape, tp)
        count = math.prod(shape)
        return block.repeat(-(-count // len(block)))[:count].view(shape)

    return read
