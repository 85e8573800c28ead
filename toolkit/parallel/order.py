"""The order in which a pipeline stage runs its forwards and backwards, and when: 1F1B and its
interleaved form, as integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class ScheduledPass:
    """One chunk's forward or backward of one micro-batch."""

    kind: Kind
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True)
class Timed:
    """A pass with its start and end in seconds."""

    stage: int
    work: ScheduledPass
    start: float
    end: float


def warmup(*, stage: int, pp: int, vpp: int, microbatches: int) -> int:
    """Warm-up forwards of a stage: those before forwards and backwards alternate (arXiv 2104.04473,
    section 2.2).
    """
    if vpp == 1:
        return min(pp - stage - 1, microbatches)
    return min(2 * (pp - stage - 1) + (vpp - 1) * pp, microbatches * vpp)


def order(*, stage: int, pp: int, vpp: int = 1, microbatches: int) -> list[ScheduledPass]:
    """A stage's passes in one optimizer step: warm-up forwards, then forward and backward in turn,
    then the remaining backwards.

    Interleaved chunks take turns every pp micro-batches, backward from the last chunk; microbatches
    is then a multiple of pp.
    """
    count = microbatches * vpp

    def nth(number: int, kind: Kind) -> ScheduledPass:
        if vpp == 1:
            return ScheduledPass(kind, number)
        round_, within = divmod(number, pp * vpp)
        chunk, micro = divmod(within, pp)
        return ScheduledPass(kind, round_ * pp + micro, chunk if kind == "forward" else vpp - 1 - chunk)

    ahead = warmup(stage=stage, pp=pp, vpp=vpp, microbatches=microbatches)
    passes = [nth(i, "forward") for i in range(ahead)]
    for i in range(count - ahead):
        passes += (nth(ahead + i, "forward"), nth(i, "backward"))
    return passes + [nth(i, "backward") for i in range(count - ahead, count)]


def timeline(
    *, pp: int, vpp: int = 1, microbatches: int, forward: Mapping[int, float], backward: Mapping[int, float], send: float = 0.0
) -> list[Timed]:
    """When every pass of every stage starts and ends, each as soon as its stage is free and its
    input has arrived.

    forward, backward: seconds of one micro-batch through all of a stage's chunks; send: seconds
    from stage to stage.
    """
    orders = [order(stage=s, pp=pp, vpp=vpp, microbatches=microbatches) for s in range(pp)]
    done: dict[tuple[int, ScheduledPass], float] = {}
    free = [0.0] * pp
    at = [0] * pp
    timed: list[Timed] = []
    progressed = True
    while progressed:
        progressed = False
        for s in range(pp):
            while at[s] < len(orders[s]):
                work = orders[s][at[s]]
                ready = _arrival(work, s, done, pp=pp, vpp=vpp, send=send)
                if ready is None:
                    break
                start = max(free[s], ready)
                end = start + (forward if work.kind == "forward" else backward)[s] / vpp
                timed.append(Timed(s, work, start, end))
                done[s, work] = free[s] = end
                at[s] += 1
                progressed = True
    return timed


def _arrival(
    work: ScheduledPass, stage: int, done: Mapping[tuple[int, ScheduledPass], float], *, pp: int, vpp: int, send: float
) -> float | None:
    """Second at which a pass's input arrives; None while the pass that makes it has not run."""
    virtual = work.chunk * pp + stage
    if work.kind == "forward":
        if virtual == 0:
            return 0.0
        producer, forward_end = virtual - 1, None
    else:
        forward_end = done.get((stage, ScheduledPass("forward", work.microbatch, work.chunk)))
        if forward_end is None:
            return None
        if virtual == pp * vpp - 1:
            return forward_end
        producer = virtual + 1
    chunk, source = divmod(producer, pp)
    produced_at = done.get((source, ScheduledPass(work.kind, work.microbatch, chunk)))
    if produced_at is None:
        return None
    return max(produced_at + (send if source != stage else 0.0), forward_end or 0.0)
