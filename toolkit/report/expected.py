"""What was expected of each run beside what came of it, as a table, a picture and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from toolkit.evidence.expected import Figure, of_folder, of_profile
from toolkit.report import svg
from toolkit.report.svg import Frame, chart, label, table, tag
from toolkit.runfolder.read import RunFolder

NOTE = (
    "The interval should hold four of five cases, by the errors of docs/planner.md; bar: the interval, line: the likely value, "
    "dot: measured, all as shares of the likely value."
)


def section(runs: Sequence[RunFolder]) -> str:
    """Every figure of every run that has one; empty where there is none and nothing to explain."""
    rows, shown, notes = [], [], []
    for run in runs:
        for what, figures, why in figures_of(run):
            if why:
                notes.append(f"{run.name}: nothing to expect of its steps: {why}")
            for figure in figures:
                rows.append((run.name, what, figure.name, *figure.words, f"{figure.difference:+.1%}", figure.verdict))
                shown.append((f"{run.name}, {what}" if len(runs) > 1 else what, figure))
    said = tag("ul", "".join(tag("li", escape(note)) for note in notes), class_="notes") if notes else ""
    if not rows:
        return said
    head = ("run", "of", "figure", "expected", "80 % interval", "measured", "difference", "measured lies")
    return _picture(shown) + tag("p", NOTE, class_="note") + table(head, rows, text_columns=3) + said


def as_json(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The same for a program: by run the figures of its profile and of its steps, and why there are none."""
    found: dict[str, Any] = {}
    for run in runs:
        parts = figures_of(run)
        found[run.name] = {
            "expected": [{"of": what, **figure.as_json()} for what, figures, _ in parts for figure in figures],
            "unknown": [why for _, _, why in parts if why],
        }
    return {"runs": found}


def figures_of(run: RunFolder) -> list[tuple[str, list[Figure], str]]:
    """Of the profile and of the steps: what was measured, its figures, and why there are none."""
    parts = []
    if run.profile:
        parts.append(("profile", of_profile(run.profile), ""))
    if run.metrics:
        parts.append(("training", *_trained(run.path)))
    return parts


@cache
def _trained(folder: Path) -> tuple[list[Figure], str]:
    return of_folder(folder)


def _picture(shown: Sequence[tuple[str, Figure]]) -> str:
    """One row a figure, each over its own likely value."""
    edges = [end / f.likely for _, f in shown for end in (f.low, f.high, f.measured) if f.likely]
    row, left, top = 26.0, 260.0, 6.0
    frame = Frame(x=(0.0, 1.05 * max([*edges, 1.0])), y=(0.0, 1.0), width=760, height=top + row * len(shown) + 44, left=left, top=top)
    content = []
    for value in svg.ticks(*frame.x, most=7):
        x, _ = frame.at(value, 0)
        content.append(tag("line", x1=x, x2=x, y1=top, y2=frame.height - 42, class_="grid"))
        content.append(label(x, frame.height - 26, svg.number(value), class_="tick", text_anchor="middle"))
    middle = (left + frame.width) / 2
    content.append(label(middle, frame.height - 6, "over the likely value", class_="axis-label", text_anchor="middle"))
    for i, (name, figure) in enumerate(shown):
        y = top + row * i + row / 2
        low, one, high, dot = (frame.at(v / figure.likely, 0)[0] for v in (figure.low, figure.likely, figure.high, figure.measured))
        likely, interval, measured = figure.words
        tip = f"{name}, {figure.name}: expected {likely} ({interval}), measured {measured}"
        content.append(label(left - 8, y + 4, f"{name}: {figure.name}", class_="tick", text_anchor="end"))
        content.append(tag("rect", x=low, y=y - 5, width=max(0.5, high - low), height=10.0, class_="mark s0 predicted", data_tip=tip))
        content.append(tag("line", x1=one, x2=one, y1=y - 8, y2=y + 8, class_="limit"))
        content.append(tag("circle", cx=dot, cy=y, r=4.0, class_="mark s1", data_tip=tip))
    return chart(frame.width, frame.height, "".join(content), name="expected", title="expected against measured")
