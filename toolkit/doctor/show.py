"""Doctor's answer: one table for people, red first with the fix, or JSON."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from toolkit.doctor.checks import GREEN, RED, YELLOW, Finding, Look

SHOWN_HOSTS = 3


def doctor_text(look: Look, findings: Sequence[Finding], *, width: int, color: bool = False) -> str:
    """The table and one line that sums it up."""
    from rich.console import Console
    from rich.table import Table

    out = Console(file=io.StringIO(), width=width, force_terminal=color, highlight=False)
    table = Table(show_edge=False, pad_edge=False)
    for name in ("", "check", "host", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for row in findings:
        style = {RED: "bold red", YELLOW: "yellow", GREEN: "green"}[row.status]
        table.add_row(f"[{style}]{row.status}[/]", row.check, _hosts(row.hosts, look), _plain(row.found), _plain(row.fix))
    out.print(table)
    count = {status: sum(f.status == status for f in findings) for status in (RED, YELLOW)}
    hosts = f"{len(look.slots)} host{'s' * (len(look.slots) > 1)}"
    verdict = f"{count[RED]} red, {count[YELLOW]} yellow" if count[RED] or count[YELLOW] else "all green"
    out.print(f"{hosts} in {look.seconds:.1f} s: {verdict}")
    text = out.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def doctor_json(look: Look, findings: Sequence[Finding]) -> dict[str, Any]:
    """All rows, facts and measurements."""
    return {
        "ok": all(f.status != RED for f in findings),
        "seconds": round(look.seconds, 2),
        "findings": [asdict(f) for f in findings],
        "hosts": {
            name: {
                "slots": slots,
                "problem": look.problems[name][0] if name in look.problems else None,
                "facts": look.facts.get(name),
                "clock": look.clocks.get(name),
                "torch": look.torch.get(name),
            }
            for name, slots in look.slots.items()
        },
        "links": look.links,
        "all_reduce": look.all_reduce,
    }


def _hosts(hosts: Sequence[str], look: Look) -> str:
    if len(hosts) == len(look.slots) and len(hosts) > 1:
        return "all"
    more = f" and {len(hosts) - SHOWN_HOSTS} more" if len(hosts) > SHOWN_HOSTS else ""
    return _plain(", ".join(hosts[:SHOWN_HOSTS]) + more)


def _plain(text: str) -> str:
    """Text from other hosts, in which brackets are not markup."""
    from rich.markup import escape

    return escape(text)
