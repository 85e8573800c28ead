"""The 80 % intervals of an estimate's figures, under the names that every JSON of this project gives them."""

from __future__ import annotations

from toolkit.cost.memory import GIB, MemoryEstimate
from toolkit.cost.step import TimeEstimate


def ranges(memory: MemoryEstimate, time: TimeEstimate) -> dict[str, list[float]]:
    """The ends of each interval: seconds a step, tokens a second, GiB of the worst rank."""
    rates = time.spread.interval(time.tokens / time.step)
    alone = time.spread.interval(time.tokens_per_s_per_gpu)
    worst = memory.worst
    sizes = {"peak_allocated_gib": worst.allocated, "peak_reserved_gib": worst.reserved, "peak_device_gib": worst.device}
    return {
        "step_s": list(time.step_range),
        "tokens_per_s": list(rates),
        "tokens_per_s_per_gpu": list(alone),
        **{name: [round(end / GIB, 3) for end in memory.spread.interval(nbytes)] for name, nbytes in sizes.items()},
    }
