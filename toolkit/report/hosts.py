"""The report's tables of hosts: how evenly the ranks worked, and how often a supervisor had to
start them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from toolkit.report.svg import table
from toolkit.runfolder.recoveries import PHASES, Recovery

MOST_RANKS = 16


def recoveries(found: Sequence[Recovery]) -> str:
    """One row a recovery: why, on what it went on, what was taken again, and the seconds of each phase."""
    rows = []
    for one in found:
        seconds = [f"{one.seconds[phase]:.1f}" if phase in one.seconds else "" for phase in PHASES]
        rows.append(
            (one.at[:19].replace("T", " "), one.reason, one.layout, str(one.hosts), str(one.resumed_step), str(one.steps_lost), *seconds)
        )
    head = ("at (UTC)", "reason", "went on with", "hosts", "from step", "steps taken again", *(f"{phase}, s" for phase in PHASES))
    return table(head, rows, text_columns=3)


def own_work(ranks: Sequence[Mapping[str, Any]]) -> str:
    """The ranks that worked longest a step, without the seconds in which they waited for others."""
    middle = median(rank["own_s"] for rank in ranks)
    slowest = sorted(ranks, key=lambda rank: -rank["own_s"])[:MOST_RANKS]
    rows = [(f"rank {r['rank']}", str(r["host"]), f"{r['own_s']:.3f}", f"{r['own_s'] / middle:.2f}" if middle else "") for r in slowest]
    return table(("rank", "host", "own work, s a step", "times the median"), rows, text_columns=2)
