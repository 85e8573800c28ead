"""The report's pictures of time: where a step goes, what goes over the wire, when each stage runs."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from toolkit.parallel.order import Timed, timeline
from toolkit.profile.show import percent, time_rows
from toolkit.report import svg
from toolkit.report.memory import MOST_RANKS
from toolkit.report.svg import Frame, chart, label, legend, table, tag

PARTS = ("forward", "backward", "communication", "optimizer", "data wait", "other")
MOST_MICRO_BATCHES = 32


def breakdown(profile: Mapping[str, Any]) -> str:
    """One bar a rank: seconds of a step by part."""
    ranks = sorted(profile["ranks"], key=lambda r: r["rank"])[:MOST_RANKS]
    longest = max(sum(rank["seconds"].get(p, 0.0) for p in PARTS) for rank in ranks)
    scale, unit = (1.0, "s") if longest >= 1 else (1e-3, "ms")
    row, left, top = 30.0, 96.0, 6.0
    frame = Frame(x=(0.0, longest / scale * 1.04), y=(0.0, 1.0), width=520, height=top + row * len(ranks) + 44, left=left, top=top)
    content = []
    for value in svg.ticks(*frame.x, most=7):
        x, _ = frame.at(value, 0)
        content.append(tag("line", x1=x, x2=x, y1=top, y2=frame.height - 42, class_="grid"))
        content.append(label(x, frame.height - 26, svg.number(value), class_="tick", text_anchor="middle"))
    content.append(
        label((left + frame.width) / 2, frame.height - 6, f"one optimizer step, {unit}", class_="axis-label", text_anchor="middle")
    )
    for i, rank in enumerate(ranks):
        y = top + row * i + 4
        content.append(label(left - 8, y + 15, f"rank {rank['rank']}", class_="tick strong", text_anchor="end"))
        at = 0.0
        for p, part in enumerate(PARTS):
            seconds = rank["seconds"].get(part, 0.0)
            x0, x1 = frame.at(at / scale, 0)[0], frame.at((at + seconds) / scale, 0)[0]
            if seconds > 0:
                tip = f"rank {rank['rank']}, stage {rank['stage']} · {part}: {svg.duration(seconds)}"
                shape = {"x": x0, "y": y, "width": max(0.4, x1 - x0 - 0.6), "height": 20.0}
                content.append(tag("rect", class_=f"mark s{p}", data_series=p, data_tip=tip, **shape))
            at += seconds
    return legend(PARTS) + chart(frame.width, frame.height, "".join(content), name="step-time", title="time of a step by part")


def against(profile: Mapping[str, Any]) -> str:
    """Predicted and measured seconds of the slowest rank."""
    rows = []
    for name, told, mine in time_rows(profile):
        shown = svg.duration(told) if told is not None else ""
        rows.append((name, shown, svg.duration(mine), percent(told, mine) if told is not None else ""))
    return table(("part of a step", "predicted", "measured", "difference"), rows)


def traffic(profile: Mapping[str, Any]) -> str:
    """Bytes and calls by process group and operation: of the rank that sends most into it."""
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    for rank in profile["ranks"]:
        for row in rank["traffic"]:
            key = row["group"], row["operation"]
            if key not in rows or row["nbytes"] > rows[key]["nbytes"]:
                rows[key] = row
    if not rows:
        return tag("p", "One rank: nothing goes over the wire.", class_="note")
    ordered = sorted(rows.values(), key=lambda r: -r["nbytes"])
    body = [
        (r["group"], r["operation"], str(r["size"]), f"{r['calls']:g}", svg.size(r["nbytes"]), svg.duration(r["seconds"])) for r in ordered
    ]
    return table(("group", "operation", "ranks", "calls a step", "sent by a rank", "time in it"), body, text_columns=2)


def pipeline(profile: Mapping[str, Any]) -> str:
    """When each stage runs which micro-batch, from the measured time of a forward and a backward."""
    layout = profile["layout"]
    pp, vpp, count = int(layout["pp"]), int(layout["vpp"]), int(layout["num_microbatches"])
    shown = min(count, MOST_MICRO_BATCHES)
    shown = max(pp, shown // pp * pp) if vpp > 1 else shown
    forward, backward = ({s: _mean(profile, s, kind) * vpp for s in range(pp)} for kind in ("forward", "backward"))
    passes = timeline(pp=pp, vpp=vpp, microbatches=shown, forward=forward, backward=backward)
    return _picture(passes, pp=pp, vpp=vpp) + tag("p", _words(passes, pp=pp, vpp=vpp, shown=shown, count=count), class_="note")


def _mean(profile: Mapping[str, Any], stage: int, kind: str) -> float:
    return max(1e-9, mean(rank["micro_batch_seconds"][kind] for rank in profile["ranks"] if rank["stage"] == stage))


def _picture(passes: list[Timed], *, pp: int, vpp: int) -> str:
    end = max(p.end for p in passes)
    scale, unit = (1.0, "s") if end >= 1 else (1e-3, "ms")
    row, left, top = 34.0, 72.0, 6.0
    frame = Frame(x=(0.0, end / scale), y=(0.0, 1.0), width=960, height=top + row * pp + 44, left=left, top=top)
    content = []
    for value in svg.ticks(*frame.x, most=10):
        x, _ = frame.at(value, 0)
        content.append(tag("line", x1=x, x2=x, y1=top, y2=frame.height - 42, class_="grid"))
        content.append(label(x, frame.height - 26, svg.number(value), class_="tick", text_anchor="middle"))
    content.append(label((left + frame.width) / 2, frame.height - 6, unit, class_="axis-label", text_anchor="middle"))
    for s in range(pp):
        content.append(label(left - 8, top + row * s + 21, f"stage {s}", class_="tick strong", text_anchor="end"))
    for p in passes:
        x0, x1 = frame.at(p.start / scale, 0)[0], frame.at(p.end / scale, 0)[0]
        series = 0 if p.work.kind == "forward" else 1
        chunk = f", chunk {p.work.chunk}" if vpp > 1 else ""
        tip = f"stage {p.stage}: {p.work.kind} of micro-batch {p.work.microbatch}{chunk}, {svg.duration(p.end - p.start)}"
        y = top + row * p.stage + 3
        look = f"mark s{series}" + (" later" if p.work.chunk % 2 else "")
        shape = {"x": x0, "y": y, "width": max(0.4, x1 - x0 - 0.8), "height": row - 6}
        content.append(tag("rect", class_=look, data_series=series, data_tip=tip, rx=1.5, **shape))
        if x1 - x0 > 15:
            content.append(label((x0 + x1) / 2, y + 18, str(p.work.microbatch), class_="in-mark", text_anchor="middle"))
    return legend(("forward", "backward")) + chart(frame.width, frame.height, "".join(content), name="pipeline", title="pipeline schedule")


def _words(passes: list[Timed], *, pp: int, vpp: int, shown: int, count: int) -> str:
    end = max(p.end for p in passes)
    busy = sum(p.end - p.start for p in passes)
    kind = "interleaved 1F1B" if vpp > 1 else "1F1B" if pp > 1 else "one stage"
    text = f"{kind}, {shown} micro-batches; drawn from each stage's measured forward and backward, with free sends. "
    text += f"Stages idle {1 - busy / (pp * end):.1%} of the time"
    text += f"; equal stages would idle {(pp - 1) / (shown * vpp + pp - 1):.1%}." if pp > 1 else "."
    return text + (f" Only {shown} of {count} micro-batches are drawn." if shown < count else "")
