"""`toolkit tune`'s answer as a terminal table or as JSON."""

from __future__ import annotations

import io
from typing import Any

from toolkit.cost.memory import GIB
from toolkit.cost.ranges import ranges
from toolkit.plan.reasons import degree_words, duration, layout_words, limits, memory_words, safer, state_words, why_not
from toolkit.plan.rehearsals import Rehearsed
from toolkit.plan.search import Plan
from toolkit.plan.show import count, mfu
from toolkit.plan.space import AXES, spec
from toolkit.plan.trials import Trial
from toolkit.plan.tune import Answer

FORMAT = 1  # of the JSON


def tune_json(answer: Answer, *, trials: list[Trial] | None = None, rehearsed: list[Rehearsed] | None = None) -> dict[str, Any]:
    """The ranked plans with time (seconds) and memory (GiB) by part, the limits of the best, and the what-ifs."""
    question, result = answer.question, answer.result
    best = answer.best
    return {
        "format": FORMAT,
        "hardware": str(question.hardware),
        "objective": question.objective,
        "risk": question.limits.risk,
        "headroom_gib": question.limits.room(best.memory) / GIB,
        "candidates": result.candidates,
        "sized": result.sized,
        "timed": result.timed,
        "best": plan_json(answer, best),
        "limits": limits(best),
        "memory": memory_words(best, limits=question.limits),
        "close_call": [result.plans.index(plan) + 1 for plan in answer.close],
        "plans": [plan_json(answer, plan) | {"why_not": _why(answer, plan)} for plan in result.plans],
        "what_if": [{"change": w.change, "answer": w.text, "plan": plan_json(answer, w.plan) if w.plan else None} for w in answer.what_if],
        **({"trials": [{"plan": result.plans.index(t.plan) + 1} | t.as_json() for t in trials]} if trials is not None else {}),
        **({"rehearsals": [r.as_json() for r in rehearsed]} if rehearsed is not None else {}),
    }


def plan_json(answer: Answer, plan: Plan) -> dict[str, Any]:
    """One plan: its layout by axis, the settings that make it, and what is predicted."""
    w, question = plan.workload, answer.question
    return {
        "layout": {axis: getattr(w, axis) for axis in AXES} | {"microbatches": w.microbatches},
        "settings": {key: getattr(w, axis) for axis, (key, _) in AXES.items() if key},
        "hardware": spec(question.hardware, plan.gpus),
        "gpus": plan.gpus,
        "step_s": plan.time.step,
        "tokens_per_s": plan.tokens_per_s,
        "mfu": mfu(w, plan.time, question.hardware),
        "time_parts_s": dict(plan.time.parts),
        "peak_device_gib": plan.worst.device / GIB,
        "p_fits": plan.chance,
        "range": ranges(plan.memory, plan.time),
        "capacity_gib": plan.memory.capacity / GIB,
        "worst_stage": plan.worst.stage,
        "memory_parts_gib": {name: value / GIB for name, value in plan.worst.parts.items()},
        "host_gib_per_node": plan.memory.host / GIB,
        "nvme_gib_per_node": plan.memory.nvme / GIB,
        "gpu_hours": plan.time.step * question.limits.steps * plan.gpus / 3600,
        "cost": question.limits.cost(plan.time.step, plan.gpus) if question.limits.price is not None else None,
    }


def tune_text(answer: Answer, *, rehearsed: list[Rehearsed] | None = None, width: int = 150) -> str:
    """The best plans as a table, then why the others lose, what limits the best one, and the what-ifs."""
    from rich.console import Console

    question, result, best = answer.question, answer.result, answer.best
    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    shape, t = best.workload.model, question.config.train
    out.print(
        f"{count(shape.parameters)} parameters, {t.global_batch_size} × {t.seq_length} tokens a step in {t.precision}, on up to "
        f"{question.space().max_gpus} of {question.hardware}: {result.candidates:,} candidates, {result.sized:,} sized, {result.timed:,} timed, "
        f"the rest ruled out by bounds; best {question.objective} first",
        highlight=False,
        soft_wrap=True,
    )
    out.print(_table(answer, rehearsed))
    for r in rehearsed or ():
        if r.reason:
            out.print(f"{r.status}: {layout_words(r.plan.workload)}: {r.reason}", highlight=False, soft_wrap=True)
    if question.config.model.vocab_size is None:
        out.print(
            "model.vocab_size is null: sizes count the padding alone; set it to the tokenizer's for exact ones",
            highlight=False,
            soft_wrap=True,
        )
    out.print(f"best: {layout_words(best.workload)}", highlight=False, soft_wrap=True)
    for line in limits(best):
        out.print(f"  {line}", highlight=False, soft_wrap=True)
    out.print(f"  memory: {memory_words(best, limits=question.limits)}", highlight=False, soft_wrap=True)
    steps = question.limits.steps
    whole = f"  the whole run of {steps:,} steps: {duration(best.time.step * steps)}"
    whole += f", {best.time.step * steps * best.gpus / 3600:,.0f} GPU hours" if question.hardware.gpu.accelerator else ""
    out.print(whole, highlight=False, soft_wrap=True)
    if len(answer.close) > 1:
        numbers = " and ".join(
            filter(
                None, (", ".join(str(result.plans.index(p) + 1) for p in answer.close[:-1]), str(result.plans.index(answer.close[-1]) + 1))
            )
        )
        out.print(
            f"  close call: these {len(answer.close)} plans can't be told apart ({numbers}); try them with --trials {len(answer.close)}",
            highlight=False,
            soft_wrap=True,
        )
    if line := safer(result.plans):
        out.print(f"  {line}", highlight=False, soft_wrap=True)
    if len(result.plans) > 1:
        out.print("why the others lose", highlight=False, soft_wrap=True)
        for number, plan in enumerate(result.plans[1:], start=2):
            out.print(f"  {number}: {_why(answer, plan)}", highlight=False, soft_wrap=True)
    if answer.what_if:
        out.print("what if", highlight=False, soft_wrap=True)
        for item in answer.what_if:
            out.print(f"  {item.change}: {item.text}", highlight=False, soft_wrap=True)
    return _plain(out)


def trials_text(answer: Answer, trials: list[Trial], *, width: int = 150) -> str:
    """What the trials measured, best first, beside what was predicted."""
    from rich.console import Console
    from rich.table import Table

    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    table = Table(title="measured", title_justify="left")
    for name in ("plan", "layout", "sharding", "result", "step", "predicted", "tokens/s", "GiB"):
        table.add_column(name, justify="left" if name in ("layout", "sharding", "result") else "right")
    for t in trials:
        w = t.plan.workload
        tokens = f"{w.batch * w.seq / t.step_s:,.0f}" if t.step_s else ""
        table.add_row(
            str(answer.result.plans.index(t.plan) + 1),
            f"{degree_words(w)} · micro {w.micro}",
            f"{state_words(w)} · recompute {w.recompute}",
            t.status,
            duration(t.step_s) if t.step_s else "",
            duration(t.plan.time.step),
            tokens,
            f"{t.memory_gib:.2f}" if t.memory_gib else "",
        )
    out.print(table)
    for t in trials:
        if t.reason:
            out.print(f"  plan {answer.result.plans.index(t.plan) + 1}: {t.reason}", highlight=False, soft_wrap=True)
    return _plain(out)


def _table(answer: Answer, rehearsed: list[Rehearsed] | None) -> Any:
    from rich.table import Table

    question, best = answer.question, answer.best
    table = Table(title="plans", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("layout")
    table.add_column("sharding")
    table.add_column("recompute")
    for name in ("micro", question.hardware.units, "step", "80 %", "tokens/s", "MFU", "GiB", "fits"):
        table.add_column(name, justify="right")
    if question.limits.price is not None or question.objective == "cost":
        table.add_column("GPU hours" if question.limits.price is None else "cost", justify="right")
    played = {id(r.plan): r for r in rehearsed or ()}
    if played:
        table.add_column("rehearsed GiB", justify="right")
    for number, plan in enumerate(answer.result.plans, start=1):
        w = plan.workload
        row = [str(number), degree_words(w), state_words(w), w.recompute, str(w.micro), str(plan.gpus), duration(plan.time.step)]
        low, high = plan.time.step_range
        row += [f"{low:.3g}–{high:.3g}", f"{plan.tokens_per_s:,.0f}", f"{mfu(w, plan.time, question.hardware):.1%}"]
        row += [f"{plan.worst.device / GIB:.1f}", f"{plan.chance:.2f}"]
        if question.limits.price is not None or question.objective == "cost":
            row.append(f"{question.limits.cost(plan.time.step, plan.gpus):,.0f}")
        if played:
            r = played.get(id(plan))
            row.append("" if r is None else r.status if r.gib is None else f"{r.gib:.1f}")
        table.add_row(*row, style="bold" if plan is best else None)
    return table


def _why(answer: Answer, plan: Plan) -> str:
    return (
        "" if plan is answer.best else why_not(plan, answer.best, objective=answer.question.objective, units=answer.question.hardware.units)
    )


def _plain(console: Any) -> str:
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
