"""What a reader of a report wants to know first: how each run ended, what holds it up, and its
figures as tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from toolkit.checkpoint.manifest import discover
from toolkit.profile.show import time_rows
from toolkit.report import svg
from toolkit.report.memory import peak_of
from toolkit.report.svg import tag
from toolkit.runfolder.pace import hours
from toolkit.runfolder.read import RunFolder

RISE = 0.05  # of the lowest loss: more above it at the end is no noise of single batches, as both are medians of a window
WAIT = 0.05  # of a step spent on waiting for data that is worth a word
SLOWER = 1.15  # times the predicted step, where no interval is known: within it the prediction counts as met


def headline(run: RunFolder) -> str:
    """Verdict and tiles of one run as HTML; empty for a folder that holds neither steps nor a profile."""
    said = verdict(run)
    if not said:
        return ""
    tiles = "".join(
        tag("div", tag("span", escape(value), class_="value") + tag("span", escape(name), class_="name"), class_="tile")
        for name, value in figures(run)
    )
    return tag("p", escape(" ".join(said)), class_="verdict") + tag("div", tiles, class_="tiles")


def verdict(run: RunFolder) -> list[str]:
    """Sentences: how the run ended, whether its loss fell, and what it waited for."""
    return [sentence for sentence in (_end(run), _loss(run.metrics), _skipped(run.metrics), _data(run.metrics), _step(run)) if sentence]


def figures(run: RunFolder) -> list[tuple[str, str]]:
    """(name, value) of each tile, those that are not known left out."""
    metrics, shown = run.metrics, []
    if metrics:
        shown.append(("steps", f"{metrics[-1]['step']:,}"))
        shown += [
            (name, f"{values[-1]:.4f}")
            for name, key in (("loss", "loss"), ("validation loss", "eval_loss"))
            if (values := numbers(metrics, key))
        ]
        settled = late(metrics)
        shown += [("tokens/s", svg.number(median(rates)))] if (rates := numbers(settled, "tokens_per_s")) else []
        shown += [("MFU", f"{median(shares):.1%}")] if (shares := numbers(settled, "mfu")) else []
        shown += [("memory of the worst rank", f"{max(held):.2f} GiB")] if (held := numbers(metrics, "memory_gib")) else []
        shown += [("time in steps", hours(sum(times)))] if (times := numbers(metrics, "step_s")) else []
    elif run.profile:
        shown.append(("peak of a rank", svg.size(peak_of(run.profile))))
        shown.append(("step", svg.duration(max(rank["seconds"]["step"] for rank in run.profile["ranks"]))))
    if (newest := next((c for c in discover(_checkpoints(run)) if c.manifest), None)) is not None:
        shown.append(("newest checkpoint", newest.path.name))
    return shown


def _end(run: RunFolder) -> str:
    if not run.metrics:
        return ""
    last, wanted = run.metrics[-1]["step"], ((run.config or {}).get("train") or {}).get("steps")
    if not isinstance(wanted, int):
        return f"{last:,} steps were taken."
    return (
        f"Finished: all {wanted:,} steps." if last >= wanted else f"Not finished: step {last:,} of {wanted:,}; starting it again goes on."
    )


def _loss(metrics: Sequence[Mapping[str, Any]]) -> str:
    losses = numbers(metrics, "loss")
    if len(losses) < 2:
        return ""
    width = max(1, len(losses) // 20)
    windows = [median(losses[i : i + width]) for i in range(0, len(losses) - width + 1, width)]
    lowest, end = min(windows), windows[-1]
    if all(later >= sooner for sooner, later in pairwise(windows)):
        return f"The loss did not fall: {losses[0]:.4f} at first, {losses[-1]:.4f} at the end."
    if end > lowest + RISE * abs(lowest):
        return f"The loss rose again: {lowest:.4f} at its lowest, {end:.4f} at the end."
    return f"The loss fell from {losses[0]:.4f} to {losses[-1]:.4f}."


def _skipped(metrics: Sequence[Mapping[str, Any]]) -> str:
    skipped = sum(1 for record in metrics if record.get("skipped"))
    return f"{skipped:,} of {len(metrics):,} steps were skipped, their loss or gradient not being finite." if skipped else ""


def _data(metrics: Sequence[Mapping[str, Any]]) -> str:
    shares = [r["data_wait_s"] / r["step_s"] for r in late(metrics) if r.get("data_wait_s") is not None and r.get("step_s")]
    share = median(shares) if shares else 0.0
    return f"A step waits for data {share:.0%} of its time: raise data.workers." if share > WAIT else ""


def _step(run: RunFolder) -> str:
    if not run.profile:
        return ""
    rows = {name: (told, mine) for name, told, mine in time_rows(run.profile)}
    told, mine = rows.pop("step")
    parts = {name: seconds for name, (_, seconds) in rows.items() if name not in ("forward", "backward") and mine}
    largest = max(parts, key=lambda name: parts[name])
    most = f"Most of a profiled step goes to {largest}: {parts[largest] / mine:.0%}."
    ends = (run.profile["predicted"].get("range") or {}).get("step_s")  # an earlier version's profile has none
    if told is None or mine <= (ends[1] if ends else SLOWER * told):
        return most
    return f"{most} It took {mine / told:.1f} times as long as predicted."


def late(metrics: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Without the first fifth, in which things load and compile."""
    return metrics[min(len(metrics) - 1, max(1, len(metrics) // 5)) :] if metrics else metrics


def numbers(metrics: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(r[key]) for r in metrics if isinstance(r.get(key), (int, float)) and not isinstance(r.get(key), bool)]


def _checkpoints(run: RunFolder) -> Path:
    """checkpoint.dir of the config, which is relative to where the run was started, or checkpoints/
    in the run's folder.
    """
    named = ((run.config or {}).get("checkpoint") or {}).get("dir")
    return Path(named).expanduser() if named else run.path / "checkpoints"
