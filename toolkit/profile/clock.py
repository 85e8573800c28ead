"""Where a rank's step time goes: every second counts for one part, the innermost that is running."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.parallel.group_names import group_names
from toolkit.parallel.layout import Layout

PARTS = ("data wait", "forward", "backward", "optimizer", "communication", "other")
# methods of torch's ProcessGroup, where every library's collectives end, and the index of the
# argument whose bytes count
COLLECTIVES = {
    "allreduce": 0,
    "allreduce_coalesced": 0,
    "broadcast": 0,
    "reduce": 0,
    "allgather": 1,
    "_allgather_base": 1,
    "all_gather_single": 1,  # what torch 2.13 calls the same
    "allgather_into_tensor_coalesced": 1,
    "reduce_scatter": 1,
    "_reduce_scatter_base": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor_coalesced": 1,
    "gather": 1,
    "scatter": 0,
    "alltoall": 1,
    "alltoall_base": 1,
    "all_to_all_single": 1,  # what torch 2.13 calls the same
    "send": 0,
    "recv": 0,
    "barrier": 0,
}


class Moments:
    """Moments of a step, and the seconds between two of them: on a CPU by the host's clock, on CUDA
    by events.

    An event is queued behind the kernels of a stream and waits for none of them, so kernels and
    messages overlap as they do without a profiler. Its time is known once settle() has returned.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        # parts are those of the stream that computes: what another one does meanwhile takes no time from it
        self.compute = torch.cuda.current_stream(device) if self.cuda else None

    def mark(self, *, here: bool = False) -> Any:
        """This moment on the stream that computes; here: on the stream that is current, which may
        be another.
        """
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream() if here else self.compute)
        return event

    def settle(self) -> None:
        """Return once all moments are past."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """From one moment to another."""
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


class Clock:
    """Adds up seconds by part. On CUDA they are those of the stream that computes, idle ones included."""

    def __init__(self, device: torch.device) -> None:
        self.moments = Moments(device)
        self.counts: dict[str, int] = defaultdict(int)
        self.running = ["other"]
        self.turns: list[tuple[str, Any]] = [("other", self.moments.mark())]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Seconds spent within count for name, except those of parts entered inside."""
        self.running.append(name)
        self._turn()
        self.counts[name] += 1
        try:
            yield
        finally:
            self.running.pop()
            self._turn()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls count for a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and calls since the last take; waits until the device has done them."""
        self._turn()
        self.moments.settle()
        seconds: dict[str, float] = defaultdict(float)
        for (name, start), (_, end) in pairwise(self.turns):
            seconds[name] += self.moments.seconds(start, end)
        taken = dict(seconds), dict(self.counts)
        del self.turns[:-1]
        self.counts.clear()
        return taken

    def _turn(self) -> None:
        self.turns.append((self.running[-1], self.moments.mark()))


@dataclass
class Traffic:
    """One operation on one process group. nbytes: of what this rank put in; seconds: it spent in
    the calls and waiting for them, known once Wire.settle() has returned.
    """

    group: str
    size: int
    operation: str
    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class Wire:
    """Counts what a rank puts on every process group, at the class all of torch.distributed's calls end in.

    Groups of one rank count nothing. With gloo a call or its wait lasts as long as the message.
    NCCL returns at once, and the seconds are those in which the stream that asked stood still for
    the message: what overlaps with kernels takes none.
    """

    def __init__(self, layout: Layout, rank: int, clock: Clock | None = None) -> None:
        self.names = group_names(layout, rank)
        self.clock = clock
        self.calls: list[tuple[Traffic, Any, Any]] = []
        self.rows: dict[tuple[str, str], Traffic] = {}
        self.inside = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count within this context."""
        group_class: Any = dist.ProcessGroup
        work_class: Any = dist.Work
        # keep the raw descriptors: restoring bound methods would bind them twice
        before = {name: vars(group_class)[name] for name in COLLECTIVES if name in vars(group_class)}
        originals = {name: getattr(group_class, name) for name in before}
        wait_before, wait = vars(work_class)["wait"], work_class.wait
        pending: dict[int, Traffic] = {}

        def counting_call(name: str) -> Callable[..., Any]:
            call, place = originals[name], COLLECTIVES[name]

            def method(group: Any, *args: Any, **kwargs: Any) -> Any:
                if self.inside or group.size() == 1:
                    return call(group, *args, **kwargs)
                row = self._row(group, name)
                row.calls += 1
                row.nbytes += _bytes(args[place] if len(args) > place else None)
                work = self._timed(row, lambda: call(group, *args, **kwargs))
                if work is not None:
                    pending[id(work)] = row
                return work

            return method

        def waited(work: Any, *args: Any, **kwargs: Any) -> Any:
            row = pending.pop(id(work), None)
            return self._timed(row, lambda: wait(work, *args, **kwargs)) if row is not None else wait(work, *args, **kwargs)

        try:
            for name in originals:
                setattr(group_class, name, counting_call(name))
            work_class.wait = waited
            yield
        finally:
            for name, method in before.items():
                setattr(group_class, name, method)
            work_class.wait = wait_before

    def _row(self, group: Any, operation: str) -> Traffic:
        ranks = tuple(dist.get_process_group_ranks(group))
        name = self.names.get(ranks) or f"ranks {', '.join(map(str, ranks))}"
        plain = plain_name(operation)
        return self.rows.setdefault((name, plain), Traffic(name, len(ranks), plain))

    def forget(self) -> None:
        """Count anew from here."""
        self.rows.clear()
        self.calls.clear()

    def settle(self) -> None:
        """Add up the rows' seconds; the clock must have been taken after the last message."""
        assert self.clock is not None
        for row, start, end in self.calls:
            row.seconds += self.clock.moments.seconds(start, end)
        self.calls.clear()

    def _timed(self, row: Traffic, call: Callable[[], Any]) -> Any:
        self.inside = True
        try:
            if self.clock is None:
                return call()
            started = self.clock.moments.mark(here=True)
            try:
                with self.clock.part("communication"):
                    return call()
            finally:
                self.calls.append((row, started, self.clock.moments.mark(here=True)))
        finally:
            self.inside = False


def plain_name(operation: str) -> str:
    """One name for an operation whose method in torch's ProcessGroup is called differently by its
    versions and forms.
    """
    return (
        operation.strip("_")
        .replace("_base", "")
        .replace("_single", "")
        .replace("all_gather", "allgather")
        .replace("all_to_all", "alltoall")
    )


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
