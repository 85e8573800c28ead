"""What one step of a rank was: its messages, kernels, waits, host synchronisations and peak, as
plain values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Message:
    """One collective, send or receive as a rank issues it. group: its number in the record; nbytes:
    of what COLLECTIVES names.

    batch: number of the batch_isend_irecv it belongs to, None outside of one. peer: a send's or
    receive's other rank, a broadcast's root.
    """

    operation: str
    group: int
    nbytes: int
    dtype: str
    peer: int | None
    batch: int | None
    waits: bool
    seconds: float
    place: str


@dataclass
class Peak:
    """The largest moment of memory: bytes, what was running, and every part's bytes then."""

    nbytes: int = 0
    phase: str = ""
    module: str = ""
    operator: str = ""
    place: str = ""
    parts: dict[str, int] = field(default_factory=dict)


@dataclass
class Step:
    """What one optimizer step did. program: kernels by stream, messages, waits and synchronisations
    in the order issued.

    disk: bytes read from and written to files that states are offloaded to.
    """

    peak: Peak = field(default_factory=Peak)
    reserved: int = 0
    messages: list[Message] = field(default_factory=list)
    program: list[list[Any]] = field(default_factory=list)
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    elsewhere: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    over_time: list[tuple[int, int]] = field(default_factory=list)
    disk: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """Plain values; counters become rows of [what, place, count]."""
        return {
            "peak": asdict(self.peak),
            "reserved": self.reserved,
            "messages": [list(asdict(m).values()) for m in self.messages],
            "program": self.program,
            "syncs": [[*key, n] for key, n in self.syncs.most_common()],
            "elsewhere": [[*key, n] for key, n in self.elsewhere.most_common()],
            "kernels": dict(self.kernels),
            "over_time": thin(self.over_time),
            "disk": dict(self.disk),
        }


def thin(samples: list[tuple[int, int]], *, most: int = 400) -> list[tuple[int, int]]:
    """At most about `most` of (number of the operator, bytes): the largest of each stretch."""
    size = max(1, -(-len(samples) // most))
    return [max(samples[i : i + size], key=lambda s: s[1]) for i in range(0, len(samples), size)]
