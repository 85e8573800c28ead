"""How far two cores are from each other. No torch.

The host of a virtual machine may move its cores while it runs: onto one chip's shared cache, or onto two. What threads hand to each
other then takes several times as long, with nothing to be seen of it inside but the time.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

ROUNDS, PATIENCE, ATTEMPTS = 2000, 200_000, 8
ALIKE = 1.6  # times between which two measurements are of the same distance


def handover_seconds() -> float:
    """Seconds until a core sees what another has written, Python's loop included: what a tenth of many stay below.

    0.0 where one core is usable, or where the cores had so much else to do that nothing came back.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return 0.0
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        child = os.fork()
        if child == 0:
            try:
                os.sched_setaffinity(0, {cores[1]})
                for turn in range(ROUNDS):
                    if not _seen(page, (2 * turn + 1) & 255):
                        break
                    page[0] = (2 * turn + 2) & 255
            finally:
                os._exit(0)
        times: list[int] = []
        try:
            os.sched_setaffinity(0, {cores[0]})
            for turn in range(ROUNDS):
                started = time.perf_counter_ns()
                page[0] = (2 * turn + 1) & 255
                if not _seen(page, (2 * turn + 2) & 255):
                    return 0.0
                times.append(time.perf_counter_ns() - started)
        finally:
            os.sched_setaffinity(0, cores)
            os.waitpid(child, 0)
    return sorted(times)[ROUNDS // 10] / 2e9


def _seen(page: mmap.mmap, value: int) -> bool:
    for _ in range(PATIENCE):  # noqa: SIM110 - a generator would take longer than what is measured
        if page[0] == value:
            return True
    return False


def alike(one: float, other: float) -> bool:
    """Whether two measurements are of the same distance; an unknown one is like every other."""
    return not one or not other or max(one, other) / min(one, other) < ALIKE


class Distances:
    """Named figures by the distance of the cores at which they were taken; what was taken while that changed does not count."""

    def __init__(self, names: Sequence[Hashable]) -> None:
        self.names = names
        self.found: list[tuple[float, dict[Hashable, Any]]] = []

    def take(self, name: Hashable, measure: Callable[[], Any]) -> None:
        """Measure one of the names, unless that was done at the present distance."""
        before = handover_seconds()
        known = next((taken for at, taken in self.found if alike(at, before)), None)
        if known is not None and name in known:
            return
        figures = measure()
        if alike(before, handover_seconds()):
            if known is None:
                self.found.append((before, known := {}))
            known[name] = figures

    def complete(self, again: Callable[[], None]) -> list[tuple[float, dict[Hashable, Any]]]:
        """The distances at which all was measured, and what; `again` takes what lacks where there is no such distance yet."""
        for _ in range(ATTEMPTS):
            done = [(at, taken) for at, taken in self.found if all(name in taken for name in self.names)]
            if done:
                return done
            again()
        raise TimeoutError("the host moved the cores during every measurement: measure again when it is quieter")
