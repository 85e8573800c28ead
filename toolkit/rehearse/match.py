"""Ranks' messages laid side by side: every member of a group must send the same, in the same order,
or a cluster waits for ever.

Only some ranks are rehearsed. Another rank of the same stage does the same in its own groups, so
its messages are those of a rehearsed one with the groups moved to its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit.parallel.layout import Coordinates, Layout

AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class Sent:
    """One message as a rank issues it. group, peer: global ranks; number: its place among the
    rank's messages.
    """

    number: int
    operation: str
    group: tuple[int, ...]
    nbytes: int
    dtype: str
    peer: int | None
    batch: int | None
    seconds: float
    place: str

    @property
    def alike(self) -> tuple[Any, ...]:
        """What all members of a collective must agree on."""
        return self.operation, self.nbytes, self.dtype, self.peer

    def __str__(self) -> str:
        peer = f" rank {self.peer}" if self.peer is not None else ""
        return f"{self.operation}{peer} of {self.nbytes:,} bytes {self.dtype} ({self.place})"


@dataclass(frozen=True)
class Finding:
    """Two ranks that do not agree, in a sentence; kind: order, size, dtype, missing or waiting."""

    kind: str
    text: str


def messages_of(answer: dict[str, Any], part: str = "step") -> list[Sent]:
    """The messages of one rehearsed rank; part: step, or evaluation."""
    groups = [expand(g) for g in answer["groups"]]
    return [
        Sent(i, operation, groups[group], nbytes, dtype, peer, batch, seconds, place)
        for i, (operation, group, nbytes, dtype, peer, batch, _, seconds, place) in enumerate(answer[part]["messages"])
    ]


def expand(ranks: Any) -> tuple[int, ...]:
    """A group's ranks, as rank.compressed() wrote them."""
    if isinstance(ranks, dict):
        return tuple(range(ranks["first"], ranks["first"] + ranks["step"] * ranks["count"], ranks["step"]))
    return tuple(ranks)


def cast(layout: Layout, answers: Sequence[dict[str, Any]], *, part: str = "step") -> dict[int, tuple[dict[str, Any], list[Sent]]]:
    """The ranks that are matched, with the answer each plays and its messages: all rehearsed
    places, on every rehearsed stage.

    part: whose messages, a step's or an evaluation's.
    """
    own = {a["rank"]: a for a in answers}
    by_stage: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for a in answers:
        by_stage[a["pp"]].append(a)
    places = sorted({(a["tp"], a["cp"], a["dp"]) for a in answers})
    found = {}
    for stage, candidates in sorted(by_stage.items()):
        for tp, cp, dp in places:
            at = Coordinates(tp=tp, cp=cp, dp=dp, pp=stage)
            rank = layout.rank(at)
            answer = own.get(rank) or candidates[0]
            sent = messages_of(answer, part)
            if rank not in own:
                before = layout.coordinates(answer["rank"])
                moved = {g: _moved(layout, g, before, at) for g in {m.group for m in sent}}
                peers = {m.peer: _moved(layout, (m.peer,), before, at)[0] for m in sent if m.peer is not None}
                sent = [replace(m, group=moved[m.group], peer=peers[m.peer] if m.peer is not None else None) for m in sent]
            found[rank] = (answer, sent)
    return found


def _moved(layout: Layout, group: tuple[int, ...], before: Coordinates, at: Coordinates) -> tuple[int, ...]:
    """A group seen from another place: axes along which it does not reach take that place's coordinate."""
    places = [layout.coordinates(r) for r in group]
    fixed = {a: getattr(at, a) for a in AXES if all(getattr(p, a) == getattr(before, a) for p in places)}
    return tuple(layout.rank(replace(p, **fixed)) for p in places)


def compare(ranks: dict[int, list[Sent]]) -> list[Finding]:
    """What does not agree: collectives group by group, sends with their receives."""
    findings: list[Finding] = []
    by_group: dict[tuple[int, ...], dict[int, list[Sent]]] = defaultdict(dict)
    sends: dict[tuple[int, int], list[Sent]] = defaultdict(list)
    receives: dict[tuple[int, int], list[Sent]] = defaultdict(list)
    for rank, sent in ranks.items():
        for m in sent:
            if m.operation == "send":
                sends[rank, m.peer].append(m)  # type: ignore[index]
            elif m.operation == "recv":
                receives[m.peer, rank].append(m)  # type: ignore[index]
            else:
                by_group[m.group].setdefault(rank, []).append(m)
    for group, members in by_group.items():
        present = [r for r in group if r in ranks]
        first = present[0]
        for other in present[1:]:
            findings += _collectives(group, first, members.get(first, []), other, members.get(other, []), ranks)
    for source, target in sorted(sends.keys() | receives.keys()):
        if source in ranks and target in ranks:
            findings += _pair(source, target, sends[source, target], receives[source, target])
    return findings


def _collectives(
    group: tuple[int, ...], first: int, here: list[Sent], other: int, there: list[Sent], ranks: dict[int, list[Sent]]
) -> list[Finding]:
    where = f"the group of {len(group)} ranks from {group[0]} on"
    for i, (a, b) in enumerate(zip(here, there, strict=False)):
        if a.alike != b.alike:
            kind = "order" if a.operation != b.operation or a.peer != b.peer else "dtype" if a.dtype != b.dtype else "size"
            return [Finding(kind, f"message {i + 1} of {where}: rank {first} has {a}, rank {other} has {b}")]
    if len(here) == len(there):
        return []
    (more, rank), (fewer, short) = ((here, first), (there, other)) if len(here) > len(there) else ((there, other), (here, first))
    last = f", whose last one there is {fewer[-1]}" if fewer else ", which has none there"
    if not fewer and ranks[short]:
        last += f"; its last anywhere is {ranks[short][-1]}"
    return [Finding("missing", f"{where}: rank {rank} has {more[len(fewer)]}, and it has no partner on rank {short}{last}")]


def _pair(source: int, target: int, sends: list[Sent], receives: list[Sent]) -> list[Finding]:
    for i, (a, b) in enumerate(zip(sends, receives, strict=False)):
        if (a.nbytes, a.dtype) != (b.nbytes, b.dtype):
            kind = "dtype" if a.dtype != b.dtype else "size"
            return [Finding(kind, f"message {i + 1} from rank {source} to rank {target}: sent is {a}, received {b}")]
    if len(sends) > len(receives):
        return [Finding("missing", f"rank {source} has {sends[len(receives)]}, and rank {target} never receives it")]
    if len(receives) > len(sends):
        return [Finding("missing", f"rank {target} has {receives[len(sends)]}, and rank {source} never sends it")]
    return []
