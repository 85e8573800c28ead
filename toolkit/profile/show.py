"""`toolkit profile`'s tables: predicted against measured, with the 80 % intervals, where the step's
time goes, what goes over the wire. No torch.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.evidence.expected import Figure, of_profile
from toolkit.profile.predict import MEMORY_PARTS

MIB = 2**20
FLAGS = 64  # bytes: a smaller part holds only scalars, which no estimate counts


def difference(predicted: float, measured: float) -> float | None:
    """Predicted over measured less one; None where nothing was measured."""
    return predicted / measured - 1 if measured else None


def worst_of_stage(profile: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of every stage the rank whose memory peaked highest."""
    stages: dict[int, Mapping[str, Any]] = {}
    for rank in profile["ranks"]:
        best = stages.get(rank["stage"])
        if best is None or rank["memory"]["peak"] > best["memory"]["peak"]:
            stages[rank["stage"]] = rank
    return [stages[s] for s in sorted(stages)]


def profile_text(profile: Mapping[str, Any], *, width: int = 110) -> str:
    """A profile as three tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    for rank in worst_of_stage(profile):
        table = Table(title=f"memory of rank {rank['rank']} (stage {rank['stage']}), MiB", title_justify="left")
        for name in ("part", "predicted", "measured", "difference"):
            table.add_column(name, justify="left" if name == "part" else "right")
        for part in (*MEMORY_PARTS, "peak"):
            mine, told = rank["memory"].get(part, 0), rank["predicted"].get(part, 0)
            if mine or told:
                off = percent(told, mine) if max(told, mine) > FLAGS else ""
                table.add_row(part, f"{told / MIB:,.2f}", f"{mine / MIB:,.2f}", off, style="bold" if part == "peak" else "")
        extra = [("resident set (RSS)", rank["rss"])]
        extra += [(f"allocator, {name}", rank[name]) for name in ("allocated", "reserved") if name in rank]
        for name, value in extra:
            table.add_row(name, "", f"{value / MIB:,.2f}", "")
        out.print(table)
    out.print(_time_table(profile))
    if figures := of_profile(profile):
        out.print(_expected_table(figures))
    out.print(_traffic_table(profile))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def percent(predicted: float, measured: float) -> str:
    """The difference as it is printed."""
    off = difference(predicted, measured)
    return "" if off is None else f"{round(off, 3) + 0.0:+.1%}"


def time_rows(profile: Mapping[str, Any]) -> list[tuple[str, float | None, float]]:
    """(part, predicted, measured) seconds of one step of the slowest rank; forward and backward are
    predicted together, as compute.
    """
    slowest = max(profile["ranks"], key=lambda r: r["seconds"]["step"])["seconds"]
    told = profile["predicted"]["seconds"]
    compute = slowest["forward"] + slowest["backward"]
    rows: list[tuple[str, float | None, float]] = [("data wait", None, slowest["data wait"]), ("forward", None, slowest["forward"])]
    rows += [("backward", None, slowest["backward"]), ("forward + backward", told.get("compute"), compute)]
    rows += [(name, told.get(name), slowest[name]) for name in ("communication", "optimizer")]
    return [*rows, ("other", None, slowest["other"]), ("step", told.get("step"), slowest["step"])]


def _time_table(profile: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"one step of the slowest rank, seconds (mean of {profile['steps']})", title_justify="left")
    for name in ("part", "predicted", "measured", "difference"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, told, mine in time_rows(profile):
        shown = f"{told:.4f}" if told is not None else ""
        table.add_row(name, shown, f"{mine:.4f}", percent(told, mine) if told is not None else "", style="bold" if name == "step" else "")
    return table


def _expected_table(figures: Sequence[Figure]) -> Any:
    from rich.table import Table

    table = Table(title="expected, with the interval that holds four of five cases, against measured", title_justify="left")
    for name in ("figure", "expected", "80 %", "measured", "difference", "measured lies"):
        table.add_column(name, justify="left" if name in ("figure", "measured lies") else "right")
    for figure in figures:
        likely, interval, measured = figure.words
        table.add_row(figure.name, likely, interval, measured, f"{figure.difference:+.1%}", figure.verdict)
    return table


def _traffic_table(profile: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="what one rank sends into each group in a step", title_justify="left")
    for name in ("group", "ranks", "operation", "calls", "MiB", "seconds"):
        table.add_column(name, justify="left" if name in ("group", "operation") else "right")
    rank = max(profile["ranks"], key=lambda r: sum(row["nbytes"] for row in r["traffic"]))
    for row in rank["traffic"]:
        table.add_row(
            row["group"], str(row["size"]), row["operation"], f"{row['calls']:g}", f"{row['nbytes'] / MIB:,.3f}", f"{row['seconds']:.4f}"
        )
    return table
