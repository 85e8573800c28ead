"""The matched ranks played against each other in time: streams, messages that wait for their
partners, the pipeline's idle time.

A message runs on a stream of its own, as NCCL's do: one for each group, one for each pair of ranks
where sends are not batched. It starts when every partner that is played has reached it. Partners
that are not played are there at once.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from toolkit.rehearse.match import Finding, Sent

Span = tuple[str, str, float, float]
"""Stream, name, start and duration in seconds."""


@dataclass
class Played:
    """step_s: the longest rank's step. spans and idle_s: by rank; idle: its compute stream has
    nothing to run.
    """

    step_s: float = 0.0
    spans: dict[int, list[Span]] = field(default_factory=dict)
    idle_s: dict[int, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


class _Rank:
    def __init__(self, rank: int, program: list[Any], sent: list[Sent]) -> None:
        self.rank, self.program, self.sent = rank, program, sent
        self.at = 0
        self.ready: dict[int, float] = defaultdict(float)
        self.floor = 0.0
        self.ends: dict[int, float] = {}
        self.posted: dict[int, float] = {}
        self.queues: dict[Hashable, deque[list[int]]] = defaultdict(deque)
        self.free: dict[Hashable, float] = defaultdict(float)
        self.spans: list[Span] = []

    def advance(self) -> bool:
        """Go on until a message must end first; whether anything was done."""
        start = self.at
        while self.at < len(self.program):
            item = self.program[self.at]
            kind = item[0]
            if kind == "run":
                now = max(self.ready[item[1]], self.floor)
                for name, seconds in item[2]:
                    self.spans.append((f"stream {item[1]}", name, now, seconds))
                    now += seconds
                self.ready[item[1]] = now
            elif kind == "message":
                self._post(item[2], max(self.ready[item[1]], self.floor))
            elif kind == "wait":
                if item[2] not in self.ends:
                    break
                self.ready[item[1]] = max(self.ready[item[1]], self.ends[item[2]])
            elif kind == "after":
                self.ready[item[1]] = max(self.ready[item[1]], self.ready[item[2]])
            elif kind == "sync":
                if len(self.ends) < len(self.posted):
                    break
                self.floor = max([self.floor, *self.ready.values(), *self.ends.values()])
            self.at += 1
        return self.at > start

    def _post(self, number: int, when: float) -> None:
        m = self.sent[number]
        self.posted[number] = when
        queue = self.queues[key_of(m, self.rank)]
        if m.batch is not None and queue and self.sent[queue[-1][0]].batch == m.batch:
            queue[-1].append(number)
        else:
            queue.append([number])

    def heads(self) -> list[int]:
        """Messages that could start: the first of each queue, of a batch all."""
        return [n for queue in self.queues.values() if queue for n in queue[0]]

    def start(self, number: int) -> float:
        return max(self.posted[number], self.free[key_of(self.sent[number], self.rank)])

    def end(self, number: int, begun: float, seconds: float) -> None:
        m = self.sent[number]
        key = key_of(m, self.rank)
        self.ends[number] = begun + seconds
        self.spans.append((f"messages {m.operation}", str(m), begun, seconds))
        queue = self.queues[key]
        queue[0].remove(number)
        if not queue[0]:
            queue.popleft()
            self.free[key] = max(self.ends[number], self.free[key])


def key_of(m: Sent, rank: int) -> Hashable:
    """The stream a message runs on: its group's, or its pair's where it is not batched."""
    if m.operation in ("send", "recv") and m.batch is None:
        return (m.group, min(rank, m.peer or 0), max(rank, m.peer or 0))
    return m.group


def play(ranks: dict[int, tuple[dict[str, Any], list[Sent]]]) -> Played:
    """One step of all ranks; Played.findings names those that wait for ever."""
    all_ = {rank: _Rank(rank, answer["step"]["program"], sent) for rank, (answer, sent) in ranks.items()}
    moving = True
    while moving:
        moving = False
        for r in all_.values():
            moving |= r.advance()
        waiting = {(r.rank, n): r.sent[n] for r in all_.values() for n in r.heads()}
        for (rank, number), m in list(waiting.items()):
            if (rank, number) not in waiting:
                continue
            partners = _partners(rank, number, m, all_, waiting)
            if partners is None:
                continue
            begun = max(all_[partner].start(n) for partner, n in partners)
            for partner, n in partners:
                all_[partner].end(n, begun, m.seconds)
                del waiting[partner, n]
            moving = True
    played = Played()
    stuck = [r for r in all_.values() if r.at < len(r.program) or r.heads()]
    for r in stuck:
        what = "; ".join(str(r.sent[n]) for n in r.heads()[:2]) or "nothing of its own"
        played.findings.append(Finding("waiting", f"rank {r.rank} waits for ever for {what}"))
    for rank, r in all_.items():
        played.spans[rank] = r.spans
        end = max([r.floor, *r.ready.values(), *r.ends.values()], default=0.0)
        played.step_s = max(played.step_s, end)
        played.idle_s[rank] = -sum(d for stream, _, _, d in r.spans if stream == "stream 0")
    played.idle_s = {rank: played.step_s + busy for rank, busy in played.idle_s.items()}
    return played


def _partners(
    rank: int, number: int, m: Sent, ranks: dict[int, _Rank], waiting: dict[tuple[int, int], Sent]
) -> list[tuple[int, int]] | None:
    """All messages that must start together with this one; None while one is not there yet."""
    found = [(rank, number)]
    if m.operation in ("send", "recv"):
        if m.peer not in ranks:
            return found
        wanted = "recv" if m.operation == "send" else "send"
        there = [n for (r, n), o in waiting.items() if r == m.peer and o.operation == wanted and o.peer == rank]
        return [*found, (m.peer, min(there))] if there else None
    for other in m.group:
        if other == rank or other not in ranks:
            continue
        there = [n for (r, n), o in waiting.items() if r == other and o.group == m.group and o.operation not in ("send", "recv")]
        if not there:
            return None
        found.append((other, there[0]))
    return found


def chrome_trace(spans: list[Span]) -> dict[str, Any]:
    """A rank's spans for chrome://tracing or Perfetto; microseconds."""
    events = [
        {"ph": "X", "pid": 0, "tid": stream, "name": name, "ts": round(start * 1e6, 3), "dur": round(seconds * 1e6, 3)}
        for stream, name, start, seconds in spans
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
