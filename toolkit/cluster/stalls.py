"""A run that makes no progress: what each rank waits in, on disk for all ranks to read, and in two lines.

The ranks meet in RUN/stalled, a folder that needs no process to answer: a rank that is frozen, or
whose host is gone, writes nothing there, and is named for it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

STALLED = "stalled"  # the folder's name within the run folder
CALL = "call"  # the file by which the first rank that notices asks all others to report
SUMMARY = "summary.txt"
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the run itself, start it again
MOST_NAMED = 4  # different waits that the line on the console spells out


@dataclass(frozen=True, kw_only=True)
class Wait:
    """What one rank was doing. kind: collective, data, checkpoint, hook, code; where: a few words.

    group, operation, number: of a collective, the number counting those of its group from 1.
    """

    rank: int
    host: str
    step: int
    kind: str
    where: str
    group: str = ""
    operation: str = ""
    number: int = 0

    def words(self) -> str:
        """As it follows a rank's number."""
        if self.kind != "collective":
            return self.where
        number = f" {self.number:,}" if self.number else ""
        group = f" of the {self.group} group" if self.group else ""
        return f"{self.operation}{number}{group}" + (f" ({self.where})" if self.where else "")


def write_report(folder: Path, wait: Wait) -> None:
    """Leave a rank's report, in one step; its stacks are to be there already."""
    part = folder / f".rank-{wait.rank:05}.part"
    part.write_text(json.dumps(asdict(wait)), encoding="utf-8")
    part.replace(folder / f"rank-{wait.rank:05}.json")


def read_reports(folder: Path) -> dict[int, Wait]:
    """The reports that are there, by rank."""
    found: dict[int, Wait] = {}
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            wait = Wait(**json.loads(path.read_text(encoding="utf-8")))
            found[wait.rank] = wait
    return found


def call_all(folder: Path) -> None:
    """Ask every rank for its report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CALL).touch()


def is_called(folder: Path) -> bool:
    """Whether some rank has asked for reports."""
    return (folder / CALL).exists()


def summary(waits: Mapping[int, Wait], hosts: Sequence[str], *, seconds: float, folder: Path) -> list[str]:
    """The two lines for the console: who waits in what, and what to do. hosts: of each rank."""
    silent = [rank for rank in range(len(hosts)) if rank not in waits]
    step = max((w.step for w in waits.values()), default=0)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank in sorted(waits):
        wait = waits[rank]
        groups[wait.kind, wait.words()].append(rank)
    # those that are not in a collective are what the others wait for: they come last, with their hosts
    order = sorted(groups.items(), key=lambda item: (item[0][0] != "collective", -len(item[1])))
    parts = []
    for (kind, words), ranks in order[:MOST_NAMED]:
        verb = "wait in" if len(ranks) > 1 else "waits in"
        if kind != "collective":
            verb = "are in" if len(ranks) > 1 else "is in"
        place = "" if kind == "collective" and len(ranks) > 1 else f" on {_hosts(ranks, hosts)}"
        parts.append(f"{_ranks(ranks)} {verb} {words}{place}")
    if len(order) > MOST_NAMED:
        rest = sorted(rank for _, ranks in order[MOST_NAMED:] for rank in ranks)
        parts.append(f"{_ranks(rest)} elsewhere")
    if silent:
        parts.append(f"{_ranks(silent)} {'do' if len(silent) > 1 else 'does'} not answer ({_hosts(silent, hosts)})")
    return [
        f"no progress for {seconds:g} s in step {step}: {', '.join(parts)}",
        f"stacks of all ranks: {folder} | exit code {REQUEUE}: start the run again, it goes on from its newest checkpoint",
    ]


def _ranks(ranks: Sequence[int]) -> str:
    """Numbers as a person writes them: rank 7; ranks 0–6, 9."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    shown = ", ".join(f"{span[0]}–{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (" …" if len(spans) > 8 else "")


def _hosts(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
