"""The report's pictures of memory: by part per rank, predicted against measured, over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.profile.predict import MEMORY_PARTS
from toolkit.profile.show import FLAGS, percent, worst_of_stage
from toolkit.report import svg
from toolkit.report.svg import Frame, chart, label, legend, path, table, tag

MOST_RANKS = 32


def shown_ranks(profile: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All ranks, or of very many the ones whose memory peaked highest, in rank order."""
    ranks = sorted(profile["ranks"], key=lambda r: -r["memory"]["peak"])[:MOST_RANKS]
    return sorted(ranks, key=lambda r: r["rank"])


def by_part(profile: Mapping[str, Any]) -> str:
    """Two bars for every rank, predicted above measured, cut into parts."""
    ranks = shown_ranks(profile)
    parts = [p for p in MEMORY_PARTS if any(_visible(rank, p) for rank in ranks)]
    totals = [sum(rank[kind].get(p, 0) for p in parts) for rank in ranks for kind in ("predicted", "memory")]
    unit, scale = svg.unit_of(max([*totals, 1]))
    row, left, top = 44.0, 96.0, 6.0
    frame = Frame(
        x=(0.0, max([*totals, 1]) / scale * 1.04), y=(0.0, 1.0), width=520, height=top + row * len(ranks) + 44, left=left, top=top
    )
    content = []
    for value in svg.ticks(*frame.x, most=7):
        x, _ = frame.at(value, 0)
        content.append(tag("line", x1=x, x2=x, y1=top, y2=frame.height - 42, class_="grid"))
        content.append(label(x, frame.height - 26, svg.number(value), class_="tick", text_anchor="middle"))
    content.append(label((left + frame.width) / 2, frame.height - 6, unit, class_="axis-label", text_anchor="middle"))
    for i, rank in enumerate(ranks):
        y = top + row * i + 4
        content.append(label(left - 8, y + 21, f"rank {rank['rank']}", class_="tick strong", text_anchor="end"))
        for kind, dy, name in (("predicted", 0, "predicted"), ("memory", 19, "measured")):
            at = 0.0
            for p, part in enumerate(MEMORY_PARTS):
                nbytes = rank[kind].get(part, 0)
                if part not in parts or not nbytes:
                    continue
                x0, x1 = frame.at(at / scale, 0)[0], frame.at((at + nbytes) / scale, 0)[0]
                tip = f"rank {rank['rank']}, stage {rank['stage']} · {part} {name}: {svg.size(nbytes)}"
                shape = {"x": x0, "y": y + dy, "width": max(0.5, x1 - x0 - 0.6), "height": 16.0}
                content.append(tag("rect", class_=f"mark s{p} {kind}", data_series=p, data_tip=tip, **shape))
                at += nbytes
    # a part has the same colour in every chart, so the legend lists all parts up to the last one shown
    names = [p for p in MEMORY_PARTS if p in parts]
    keys = "".join(_key(MEMORY_PARTS.index(n), n) for n in names)
    note = tag("p", "Upper bar: predicted. Lower bar: measured.", class_="note")
    return (
        tag("div", keys, class_="legend")
        + chart(frame.width, frame.height, "".join(content), name="memory-parts", title="memory by part")
        + note
    )


def _key(series: int, name: str) -> str:
    return tag("button", tag("i", class_=f"key s{series}") + name, type="button", class_="legend-key", data_series=series)


def _visible(rank: Mapping[str, Any], part: str) -> bool:
    return any(rank[kind].get(part, 0) > 0 for kind in ("memory", "predicted"))


def against(profile: Mapping[str, Any]) -> str:
    """Predicted and measured figures of the fullest rank of every stage."""
    rows = []
    for rank in worst_of_stage(profile):
        for part in (*MEMORY_PARTS, "peak"):
            told, mine = rank["predicted"].get(part, 0), rank["memory"].get(part, 0)
            if told or mine:
                shown = percent(told, mine) if max(told, mine) > FLAGS else ""
                rows.append((f"stage {rank['stage']}, rank {rank['rank']}", part, svg.size(told), svg.size(mine), shown))
        rows.append((f"stage {rank['stage']}, rank {rank['rank']}", "resident set (RSS)", "", svg.size(rank["rss"]), ""))
        rows += [
            (f"stage {rank['stage']}, rank {rank['rank']}", f"allocator, {name}", "", svg.size(rank[name]), "")
            for name in ("allocated", "reserved")
            if name in rank
        ]
    return table(("rank", "part", "predicted", "measured", "difference"), rows, text_columns=2)


def over_time(profile: Mapping[str, Any]) -> str:
    """Live bytes of the fullest rank of every stage during one optimizer step, and the predicted
    peaks as broken lines.
    """
    ranks = [rank for rank in worst_of_stage(profile) if rank["memory_over_time"]]
    if not ranks:
        return tag("p", "Memory over time was not followed.", class_="note")
    longest = max(rank["memory_over_time"][-1][0] for rank in ranks)
    highest = max(max(n for _, n in rank["memory_over_time"]) for rank in ranks)
    highest = max(highest, *(rank["predicted"].get("peak", 0) for rank in ranks))
    lowest = min(min(n for _, n in rank["memory_over_time"]) for rank in ranks)
    lowest = min(lowest, *(rank["predicted"].get("peak") or lowest for rank in ranks), lowest)
    unit, scale = svg.unit_of(highest)
    floor = 0.0 if lowest < 0.5 * highest else 0.9 * lowest / scale
    slow, clock = (1.0, "s") if longest >= 5 else (1000.0, "ms")
    frame = Frame(x=(0.0, longest * slow), y=(floor, highest / scale * 1.05), width=520, height=280)
    content = [frame.axes(x_label=f"time in the step, {clock} (slowed by following every tensor)", y_label=f"live, {unit}")]
    for i, rank in enumerate(ranks):
        points = [frame.at(t * slow, n / scale) for t, n in rank["memory_over_time"]]
        tip = f"rank {rank['rank']}, stage {rank['stage']}: peak {svg.size(rank['memory']['peak'])}"
        content.append(path(points, series=i % 8, tip=tip, steps=True))
        if told := rank["predicted"].get("peak"):
            (x0, y), (x1, _) = frame.at(0, told / scale), frame.at(longest * slow, told / scale)
            tip = f"stage {rank['stage']}: predicted peak {svg.size(told)}"
            content.append(tag("line", x1=x0, x2=x1, y1=y, y2=y, class_=f"line broken s{i % 8}", data_series=i % 8, data_tip=tip))
    names = [f"stage {rank['stage']} (rank {rank['rank']})" for rank in ranks[:8]]
    return legend(names) + chart(frame.width, frame.height, "".join(content), name="memory-time", title="memory over time")


def peak_of(profile: Mapping[str, Any]) -> float:
    """The highest peak of any rank, bytes."""
    return float(max(rank["memory"]["peak"] for rank in profile["ranks"]))


def stages(profile: Mapping[str, Any]) -> Sequence[int]:
    return sorted({rank["stage"] for rank in profile["ranks"]})
