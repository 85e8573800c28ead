"""The report's pictures of whole runs: loss and throughput curves, the runs side by side, the
ranking of tune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from toolkit.report import svg
from toolkit.report.headline import late, numbers
from toolkit.report.memory import peak_of
from toolkit.report.svg import Frame, chart, legend, path, table, tag
from toolkit.runfolder.read import RunFolder

MOST_POINTS = 1000
CURVES = (  # name, key of metrics.jsonl, title, unit
    ("loss", "loss", "loss", "nats"),
    ("grad-norm", "grad_norm", "gradient norm", "norm"),
    ("throughput", "tokens_per_s", "throughput", "tokens a second"),
    ("lr", "lr", "learning rate", ""),
    ("step-s", "step_s", "time of a step", "seconds"),
    ("memory", "memory_gib", "peak memory of the worst rank", "GiB"),
)


def curves(runs: Sequence[RunFolder]) -> str:
    """Loss, gradient norm, throughput and the rest by step, one line a run."""
    trained = [run for run in runs if run.metrics]
    pictures = "".join(
        tag("figure", tag("figcaption", title) + picture) for title, picture in (_curve(trained, *c) for c in CURVES) if picture
    )
    keys = legend([run.name for run in trained[:8]])
    return keys + tag("div", pictures, class_="grid-2")


def _curve(runs: Sequence[RunFolder], name: str, key: str, title: str, unit: str) -> tuple[str, str]:
    lines = [(i % 8, run, _points(run.metrics, key)) for i, run in enumerate(runs)]
    values = [y for _, _, points in lines for _, y in points]
    if not values:
        return title, ""
    evals = [(i % 8, run, _points(run.metrics, "eval_loss")) for i, run in enumerate(runs)] if key == "loss" else []
    values += [y for _, _, points in evals for _, y in points]
    steps = [x for _, _, points in lines for x, _ in points]
    low, high = min(values), max(values)
    low = 0.0 if key in ("tokens_per_s", "step_s", "memory_gib") else low - 0.05 * (high - low)
    frame = Frame(x=(min(steps), max(steps)), y=(low, high + 0.05 * (high - low) or 1.0), width=480, height=230, left=70)
    content = [frame.axes(x_label="step", y_label=unit)]
    for series, run, points in lines:
        last = f"{run.name}: {title} {svg.number(points[-1][1])} at step {points[-1][0]:.0f}" if points else None
        content.append(path([frame.at(x, y) for x, y in points], series=series, tip=last))
        if len(points) <= 60:
            content += [_dot(frame, x, y, series, f"{run.name}, step {x:.0f}: {svg.number(y)}", 2.2) for x, y in points]
    for series, run, points in evals:
        content += [_dot(frame, x, y, series, f"{run.name}, step {x:.0f}: validation loss {svg.number(y)}", 4.0) for x, y in points]
    return title, chart(frame.width, frame.height, "".join(content), name=name, title=title)


def _dot(frame: Frame, x: float, y: float, series: int, tip: str, radius: float) -> str:
    cx, cy = frame.at(x, y)
    return tag("circle", cx=cx, cy=cy, r=radius, class_=f"mark s{series}", data_series=series, data_tip=tip)


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [
        (float(r["step"]), float(r[key])) for r in metrics if isinstance(r.get(key), (int, float)) and not isinstance(r.get(key), bool)
    ]
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::every] + (points[-1:] if points and (len(points) - 1) % every else [])


def side_by_side(runs: Sequence[RunFolder]) -> str:
    """What each run was and what came of it, a column a run, rows that differ marked."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = []
    for name in names:
        values = [fact.get(name, "") for fact in facts]
        rows.append((name + (" *" if len({v for v in values if v}) > 1 else ""), *values))
    note = tag("p", "* differs between the runs.", class_="note") if len(runs) > 1 else ""
    return table(("", *(run.name for run in runs)), rows) + note


def _facts(run: RunFolder) -> dict[str, str]:
    config = run.config or (run.profile or {}).get("config") or {}
    model, parallel, zero, train = (config.get(k) or {} for k in ("model", "parallel", "zero", "train"))
    summary: dict[str, str] = {}
    if model:
        summary["model"] = str(model.get("preset") or f"{model.get('family')} {model.get('num_layers')} × {model.get('hidden_size')}")
    for name, section, key in (
        ("tensor parallel (tp)", parallel, "tp"),
        ("pipeline stages (pp)", parallel, "pp"),
        ("chunks a stage (vpp)", parallel, "vpp"),
        ("sequence parallel", parallel, "sequence_parallel"),
        ("ZeRO stage", zero, "stage"),
        ("optimizer on", zero, "offload_optimizer"),
        ("parameters on", zero, "offload_param"),
        ("global batch", train, "global_batch_size"),
        ("micro-batch", train, "micro_batch_size"),
        ("sequence length", train, "seq_length"),
        ("precision", train, "precision"),
        ("recompute", train, "recompute"),
    ):
        if key in section:
            value = section[key]
            summary[name] = (
                {True: "yes", False: "no", "none": "device"}.get(value, str(value)) if key.startswith(("offload", "seq")) else str(value)
            )
    if run.metrics:
        last = run.metrics[-1]
        losses, evals = numbers(run.metrics, "loss"), numbers(run.metrics, "eval_loss")
        summary["steps"] = f"{last['step']:,}"
        summary["last loss"] = f"{losses[-1]:.4f}" if losses else ""
        summary["last validation loss"] = f"{evals[-1]:.4f}" if evals else ""
        summary |= _medians(run.metrics)
        summary["skipped steps"] = str(sum(1 for r in run.metrics if r.get("skipped")))
    if run.profile:
        summary["profiled on"] = f"{len(run.profile['ranks'])} × {run.profile.get('device', '?')}"
        summary["highest peak of a rank"] = svg.size(peak_of(run.profile))
        summary["profiled step"] = svg.duration(max(rank["seconds"]["step"] for rank in run.profile["ranks"]))
    if run.tune:
        summary["best plan of tune"] = _plan_name(run.tune["plans"][0]) if run.tune["plans"] else "none fits"
    return summary


def _medians(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    summary = {}
    for name, key, show in (
        ("tokens a second (median)", "tokens_per_s", svg.number),
        ("step (median)", "step_s", svg.duration),
        ("data wait (median)", "data_wait_s", svg.duration),
        ("memory of the worst rank", "memory_gib", lambda v: f"{v:.2f} GiB"),
    ):
        values = numbers(late(metrics), key)
        if values:
            summary[name] = show(max(values) if key == "memory_gib" else median(values))
    return summary


def _plan_name(plan: Mapping[str, Any]) -> str:
    at = plan["layout"]
    text = f"tp {at.get('tp')} pp {at.get('pp')}" + (f" vpp {at['vpp']}" if at.get("vpp", 1) > 1 else "")
    text += f" dp {at.get('dp')} ZeRO-{at.get('zero')}" + (" sp" if at.get("sp") else "")
    text += f" micro {at.get('micro')}" + (f" recompute {at['recompute']}" if at.get("recompute", "none") != "none" else "")
    for key, what in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        text += f" {what} on {at[key]}" if at.get(key, "none") != "none" else ""
    return text


def ranking(tune: Mapping[str, Any]) -> str:
    """Every plan of a ranking as a dot, memory against speed, and as a row; a click on one marks
    the other.
    """
    plans: list[Mapping[str, Any]] = tune["plans"]
    if not plans:
        return tag("p", "No plan fits.", class_="note")
    rates = [float(p["tokens_per_s"]) for p in plans]
    needs = [float(p["peak_device_gib"]) for p in plans]
    spread = (max(rates) - min(rates)) or max(rates)
    capacity = plans[0].get("capacity_gib")
    right = max([*needs, float(capacity)] if capacity else needs)
    frame = Frame(x=(0.0, right * 1.05), y=(min(rates) - 0.12 * spread, max(rates) + 0.12 * spread), width=640, height=320, left=72)
    content = [frame.axes(x_label="predicted peak of the worst rank, GiB", y_label="predicted tokens a second")]
    if capacity:
        (x, y0), (_, y1) = frame.at(float(capacity), frame.y[0]), frame.at(float(capacity), frame.y[1])
        content.append(tag("line", x1=x, x2=x, y1=y0, y2=y1, class_="limit", data_tip=f"the device holds {capacity:.1f} GiB"))
    kinds = sorted({int(p["layout"].get("zero", 0)) for p in plans})
    for i, plan in enumerate(plans):
        x, y = frame.at(needs[i], rates[i])
        series = kinds.index(int(plan["layout"].get("zero", 0)))
        tip = f"{i + 1}. {_plan_name(plan)} · {svg.number(rates[i])} tokens/s · {needs[i]:.1f} GiB"
        content.append(
            tag("circle", cx=x, cy=y, r=6.0 if i else 8.0, class_=f"mark plan s{series}", data_series=series, data_tip=tip, data_pick=i)
        )
    picture = legend([f"ZeRO-{kind}" for kind in kinds]) + chart(
        frame.width, frame.height, "".join(content), name="tune", title="plans of toolkit tune"
    )
    rows = [
        (
            str(i + 1),
            _plan_name(p),
            svg.number(rates[i]),
            _interval(p, "tokens_per_s"),
            svg.duration(float(p["step_s"])),
            f"{needs[i]:.1f}",
            _interval(p, "peak_device_gib"),
            str(p.get("why_not") or ""),
        )
        for i, p in enumerate(plans)
    ]
    head = ("", "plan", "tokens/s", "80 %", "step", "GiB", "80 %", "why it loses")
    limits = "".join(tag("li", svg.escape(str(text))) for text in tune.get("limits") or ())
    said = tag("p", f"What limits the best plan on {svg.escape(str(tune.get('hardware', '')))}:") + tag("ul", limits) if limits else ""
    return picture + table(head, rows, text_columns=2, row_ids=True) + said


def _interval(plan: Mapping[str, Any], name: str) -> str:
    """The ends of a figure's interval; empty in a ranking of an earlier version."""
    ends = (plan.get("range") or {}).get(name)
    return f"{svg.number(float(ends[0]))} to {svg.number(float(ends[1]))}" if ends else ""
