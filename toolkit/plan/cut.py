"""How many layers each pipeline stage gets where devices are unequal, from what one layer takes on each. No torch.

stages = [StagePace(layer=0.8e-3, ends=0.1e-3, most=30), StagePace(layer=1.6e-3, ends=2e-3, most=8)]
best_cut(32, stages, in_flight=2)  # (24, 8)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import ConfigError
from toolkit.parallel.layout import Layout, split_layers


@dataclass(frozen=True, kw_only=True)
class StagePace:
    """What a stage's slowest rank takes for one new token of a micro-batch, and what its fullest one can hold.

    layer: seconds of one layer; ends: of embedding or output, where the stage has them; most: layers that fit into memory.
    """

    layer: float
    ends: float
    most: int

    def seconds(self, layers: int) -> float:
        return self.ends + layers * self.layer


def round_time(counts: Sequence[int], stages: Sequence[StagePace], *, in_flight: int) -> float:
    """Seconds until each of the micro-batches in flight has one token more.

    A micro-batch goes through all stages one after the other, and a stage computes one micro-batch at a time: the round is as long as
    the way through all stages, or as the slowest stage is busy with all micro-batches.
    """
    times = [stage.seconds(layers) for layers, stage in zip(counts, stages, strict=True)]
    return max(sum(times), in_flight * max(times))


def best_cut(layers: int, stages: Sequence[StagePace], *, in_flight: int) -> tuple[int, ...] | None:
    """Layers of each stage, 1 at least, with the shortest round; None where they do not fit.

    For every time that the slowest stage might take, the layers go to the stages that compute one fastest, as many as each ends by then.
    """
    most = [min(stage.most, layers) for stage in stages]
    bounds = sorted({stage.seconds(n) for stage, m in zip(stages, most, strict=True) for n in range(1, m + 1)})
    fastest = sorted(range(len(stages)), key=lambda i: stages[i].layer)
    best: tuple[float, float, tuple[int, ...]] | None = None
    for bound in bounds:
        room = [bisect_right(range(m + 1), bound, key=stage.seconds) - 1 for stage, m in zip(stages, most, strict=True)]
        if min(room) < 1 or sum(room) < layers:
            continue
        counts, left = [1] * len(stages), layers - len(stages)
        if left < 0:
            return None
        for i in fastest:
            more = min(left, room[i] - 1)
            counts[i], left = counts[i] + more, left - more
        time = round_time(counts, stages, in_flight=in_flight)
        if best is None or time < best[0]:
            best = time, bound, tuple(counts)
    return best[2] if best else None


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the layers are cut, and why: one sentence each."""

    counts: tuple[int, ...]
    reasons: list[str]


def choose_cut(layers: int, stages: Sequence[StagePace], *, in_flight: int, now: tuple[int, ...] = (), worth: float) -> Cut:
    """The best cut, or the present one where the best is not at least `worth` (a share) faster; ConfigError where the layers do not fit.

    now: layers of each stage as they are; (): the even cut, if there is one.
    """
    best = best_cut(layers, stages, in_flight=in_flight)
    measured = [f"stage {i}: {_ms(s.layer)} a layer, {_ms(s.ends)} at its ends, {s.most} layers fit" for i, s in enumerate(stages)]
    if best is None:
        raise ConfigError(
            f"the model's {layers} layers fit in no cut over {len(stages)} stages",
            why="; ".join(measured),
            fix="Start more processes, or set --weights int8, --offload disk, a smaller --batch-size or a shorter --max-new-tokens.",
        )
    before = now or even_cut(layers, len(stages))
    name = "the present cut" if now else "the even cut"
    if before and all(n <= s.most for n, s in zip(before, stages, strict=True)):
        times = [round_time(c, stages, in_flight=in_flight) for c in (best, before)]
        if times[1] < (1 + worth) * times[0]:
            return Cut(counts=before, reasons=[*measured, f"{name} {_words(before)} stays: no other one is {100 * worth:.0f} % faster"])
        compared = f"{_ms(times[0])} a token and {_ms(times[1])} with {name} {_words(before)}"
    else:
        compared = f"{_ms(round_time(best, stages, in_flight=in_flight))} a token" + (
            f"; {name} {_words(before)} does not fit" if before else ""
        )
    flying = f"{in_flight} micro-batch{'es' * (in_flight > 1)} in flight"
    return Cut(counts=best, reasons=[*measured, f"layers are cut {_words(best)}: with {flying} {compared}"])


def even_cut(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage as megatron-core cuts them by itself; () where it cannot."""
    if split_layers(layers, stages) is None:
        return ()
    return tuple(len(Layout(pp=stages).layers_of(layers, stage=s)) for s in range(stages))


def nearly_even_cut(layers: int, stages: int) -> tuple[int, ...]:
    """The even cut, or one in which stages differ by one layer."""
    return even_cut(layers, stages) or tuple(layers // stages + (s < layers % stages) for s in range(stages))


def _words(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
