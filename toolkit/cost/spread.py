"""How sure an estimate is: the interval that holds four of five truths, and the probability to fit.

Widths are errors that were seen, by kind of software and layout, always on sources (for this project's own engine: rehearsals) that
the estimate had not been fitted to. toolkit/cost/spreads.py holds them; `python -m tests.bench.planner --fit` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import erf, exp, inf, log, sqrt
from typing import TYPE_CHECKING

from toolkit.cost.spreads import SPREADS

if TYPE_CHECKING:
    from toolkit.cost.workload import Workload

RISK = 0.1  # a plan may fail to fit in one of ten cases: what the upper end of an 80 % interval means
NINETIETH = 1.2815515655446004  # standard deviations from the middle of a normal distribution to its 90th percentile
_table: Mapping[str, Mapping[str, tuple[float, float]]] = SPREADS
UNKNOWN = 0.15  # by which each setting that nobody printed widens an interval


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Logarithms of truth over estimate at the 10th and 90th percentile; between and beyond, two halves of normal distributions."""

    low: float
    high: float

    def interval(self, likely: float) -> tuple[float, float]:
        """The ends of the 80 % interval around an estimate."""
        return likely * exp(self.low), likely * exp(self.high)

    def inverse(self) -> Spread:
        """That of one over the quantity: of seconds for a rate."""
        return Spread(low=-self.high, high=-self.low)

    def chance(self, likely: float, limit: float) -> float:
        """Probability that the truth stays below a limit."""
        if likely <= 0 or limit == inf:
            return 1.0
        if limit <= 0:
            return 0.0
        way = log(limit / likely)
        deviation = max(1e-9, self.high if way > 0 else -self.low) / NINETIETH
        return 0.5 * (1 + erf(way / deviation / sqrt(2)))

    def factor(self, risk: float) -> float:
        """What the truth stays below, over the estimate, but for the risk."""
        z = _normal_quantile(1 - risk)
        return exp(z * (self.high if z > 0 else -self.low) / NINETIETH)

    def wider(self, unknown: int) -> Spread:
        """For a run of which so many settings are not known."""
        times = 1 + UNKNOWN * min(unknown, 6)
        return Spread(low=self.low * times, high=self.high * times)


# of tokens a second on processors that nobody measured. The catalogue's entry stands for a core of any kind: on the one machine where
# steps were measured, the thirty of docs/cpu-time.md took 0.28 to 1.6 times what it says. Other machines: our reading
UNMEASURED_CPU = Spread(low=-1.2, high=1.2)


def traits(w: Workload) -> tuple[str, ...]:
    """The classes a workload's errors are looked up under, narrowest first."""
    kind = "toolkit" if w.stack.sharding == "toolkit" else w.stack.name
    offloaded = ("offload",) if w.offload_optimizer != "none" or w.offload_param != "none" else ()
    if kind == "toolkit":
        return f"toolkit, ZeRO-{w.zero}{', offload' if offloaded else ''}", "toolkit", "all"
    return *(f"{kind}, offload" for _ in offloaded), *offloaded, kind, "all"


def memory_spread(w: Workload, *, unknown: int = 0) -> Spread:
    """Of the peak memory of a rank."""
    return _of("memory", w, unknown)


def rate_spread(w: Workload, *, unknown: int = 0) -> Spread:
    """Of tokens a second."""
    return _of("time", w, unknown)


@contextmanager
def using(table: Mapping[str, Mapping[str, tuple[float, float]]]) -> Iterator[None]:
    """Other widths inside a with block, for scores of sources that the stored ones were fitted to."""
    global _table
    before, _table = _table, table
    try:
        yield
    finally:
        _table = before


def _of(part: str, w: Workload, unknown: int) -> Spread:
    table = _table[part]
    low, high = next(table[name] for name in traits(w) if name in table)
    return Spread(low=low, high=high).wider(unknown)


@lru_cache(maxsize=16)
def _normal_quantile(share: float) -> float:
    """Standard deviations from the middle below which a share of a normal distribution lies."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(min(1 - 1e-9, max(1e-9, share)))
