"""The pictures of docs/planner.md: SVG files with the marks of toolkit.report.svg and colours of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

from toolkit.evidence import measures
from toolkit.report.svg import Frame, chart, label, number, tag

_STYLE = (
    "text{font:12px sans-serif;fill:#444}.grid{stroke:#ddd}.axis{stroke:#888}.even{stroke:#888;stroke-dasharray:4 3}"
    ".range{stroke:#3572b0;stroke-opacity:.25}.dot{fill:#3572b0;fill-opacity:.7}.bar{fill:#3572b0}.mark{fill:#c0392b}.goal{fill:#2e8b57;fill-opacity:.15}"
)
Answers = Sequence[Mapping[str, Any]]


def pictures(rows: Sequence[Mapping[str, Any]], answers: Answers, scores: Mapping[str, Any]) -> dict[str, str]:
    """File names and their SVG text."""
    return {
        "planner-throughput.svg": _against(rows, answers, "throughput"),
        "planner-memory.svg": _against(rows, answers, "memory"),
        "planner-errors.svg": _by_source(
            {s: v["throughput_mdape"] for s, v in scores["per_source"].items() if v["throughput_mdape"] is not None},
            goal=(0.0, 0.06),
            title="median error of throughput by source, left out",
        ),
        "planner-intervals.svg": _by_source(
            scores["intervals"]["throughput"]["by_source"],
            goal=(0.75, 0.88),
            title="share of a source's throughputs inside the 80 % interval",
        ),
        "planner-fits.svg": _sureness(rows, answers),
        "planner-ranking.svg": _ranking(rows, answers),
    }


def _svg(frame: Frame, content: str, *, name: str, title: str) -> str:
    whole = chart(frame.width, frame.height, tag("style", _STYLE) + content, name=name, title=title)
    return whole.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + "\n"


def _against(rows: Sequence[Mapping[str, Any]], answers: Answers, figure: str) -> str:
    """Predicted over measured values with their intervals, both on logarithmic axes."""
    points = []
    for row, answer in zip(rows, answers, strict=True):
        if not measures.scored(row) or answer.get("unsupported"):
            continue
        rate, peak = measures.true_rate(row), measures.true_peak(row)
        truth, field = (rate, "tokens_per_s_per_gpu") if figure == "throughput" else peak or (None, "")
        if truth:
            low, high = answer["range"][field]
            points.append((log10(truth), log10(answer[field]), log10(low), log10(high)))
    unit = "tokens/s on a GPU" if figure == "throughput" else "GiB of a rank"
    ends = (min(min(p) for p in points), max(max(p) for p in points)) if points else (0.0, 1.0)
    frame = Frame(x=ends, y=ends, width=520, height=420)
    content = frame.axes(x_label=f"log10 of measured {unit}", y_label="log10 of predicted")
    (x0, y0), (x1, y1) = frame.at(ends[0], ends[0]), frame.at(ends[1], ends[1])
    content += tag("line", x1=x0, y1=y0, x2=x1, y2=y1, class_="even")
    for true, guess, low, high in points:
        x, y = frame.at(true, guess)
        content += tag("line", x1=x, x2=x, y1=frame.at(true, low)[1], y2=frame.at(true, high)[1], class_="range")
        content += tag("circle", cx=x, cy=y, r=2.5, class_="dot")
    return _svg(frame, content, name=figure, title=f"predicted against measured {figure}, sources left out")


def _by_source(values: Mapping[str, float], *, goal: tuple[float, float], title: str) -> str:
    """A bar for each source, and the band that is aimed at."""
    height, left, width = 22.0, 150.0, 560.0
    most = max([*values.values(), goal[1]], default=1.0) * 1.08
    frame = Frame(x=(0.0, most), y=(0.0, 1.0), width=width, height=height * len(values) + 54, left=left)
    bottom = frame.height - frame.bottom
    (near, _), (far, _) = frame.at(goal[0], 0), frame.at(goal[1], 0)
    content = tag("rect", x=near, y=frame.top, width=far - near, height=bottom - frame.top, class_="goal")
    for index, (source, value) in enumerate(sorted(values.items(), key=lambda item: -item[1])):
        y = frame.top + height * index
        content += tag("rect", x=left, y=y + 3, width=frame.at(value, 0)[0] - left, height=height - 8, class_="bar")
        content += label(left - 6, y + 14, source, text_anchor="end") + label(frame.at(value, 0)[0] + 4, y + 14, number(value))
    content += label((left + width) / 2, frame.height - 8, f"{title}; green: what is aimed at", text_anchor="middle")
    return _svg(frame, content, name="sources", title=title)


def _sureness(rows: Sequence[Mapping[str, Any]], answers: Answers) -> str:
    """Of runs said to fit with a probability, the share that ran; the size of a dot tells how many they are."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        ran = row["measured"].get("fits")
        if measures.scored(row) and ran is not None and not answer.get("unsupported"):
            bins.setdefault(min(4, int(answer["p_fits"] * 5)), []).append((answer["p_fits"], bool(ran)))
    frame = Frame(x=(0.0, 1.0), y=(0.0, 1.0), width=460, height=360)
    content = frame.axes(x_label="probability to fit, as predicted", y_label="share that ran")
    (x0, y0), (x1, y1) = frame.at(0, 0), frame.at(1, 1)
    content += tag("line", x1=x0, y1=y0, x2=x1, y2=y1, class_="even")
    for found in bins.values():
        x, y = frame.at(sum(p for p, _ in found) / len(found), sum(ran for _, ran in found) / len(found))
        content += tag("circle", cx=x, cy=y, r=4 + 2 * log10(len(found)), class_="dot") + label(x + 10, y + 4, str(len(found)))
    return _svg(frame, content, name="fits", title="probability to fit against the share that ran")


def _ranking(rows: Sequence[Mapping[str, Any]], answers: Answers) -> str:
    """Spearman's ρ of each group of plans of one model on one machine."""
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        rate = measures.true_rate(row) if measures.scored(row) else None
        if rate:
            guess = answer["tokens_per_s_per_gpu"] if not answer.get("unsupported") and answer["fits"] else 0.0
            groups.setdefault(measures.group_of(row), []).append((rate, guess))
    values: dict[str, float] = {}
    for group, items in groups.items():
        if len(items) >= measures.GROUP_MIN:
            rho = measures.spearman([t for t, _ in items], [g for _, g in items])
            values[f"{group[0]} {len(values) + 1} ({len(items)} rows)"] = max(0.0, rho)
    return _by_source(values, goal=(0.85, 1.0), title="rank correlation of predicted and measured throughput")
