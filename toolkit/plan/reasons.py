"""Why a plan is as fast as it is, and why another is slower, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.cost.memory import GIB
from toolkit.cost.workload import Workload
from toolkit.plan.search import Limits, Objective, Plan

SMALL = 0.004  # share of the best plan's step; smaller differences are not mentioned

# words for a part of the step that has grown
_MORE: Mapping[str, str] = {
    "matmul": "matrix multiplies (smaller ones, or a fuller last stage)",
    "attention": "attention",
    "memory-bound kernels": "memory-bound kernels",
    "recompute": "recomputation",
    "tensor parallel": "tensor-parallel traffic",
    "context parallel": "context-parallel traffic",
    "launches": "waiting for kernels to be launched",
    "pipeline sends": "pipeline sends",
    "pipeline bubble": "pipeline bubble",
    "zero gathers": "ZeRO traffic in every micro-batch",
    "data parallel": "gradient reduction",
    "optimizer": "optimizer",
    "offload": "offload traffic",
    "stragglers": "waiting for the slowest node",
    "shared cores": "waiting for a core",
}
# what a large part of the step says of the hardware or the layout
_LIMIT: Mapping[str, str] = {
    "matmul": "how fast matrices are multiplied",
    "attention": "the attention kernel (long sequences)",
    "memory-bound kernels": "device memory bandwidth",
    "recompute": "device memory: recomputation stands in for it",
    "tensor parallel": "links between tensor-parallel ranks",
    "context parallel": "links between context-parallel ranks",
    "launches": "the host, which launches small kernels one by one",
    "pipeline sends": "links between pipeline stages",
    "pipeline bubble": "too few micro-batches for the pipeline",
    "zero gathers": "links between data-parallel ranks",
    "data parallel": "links between data-parallel ranks, once a step",
    "optimizer": "device memory bandwidth, in the optimizer",
    "offload": "PCIe and the host's optimizer",
    "stragglers": "the spread between nodes",
    "shared cores": "too few cores for the ranks",
}


def layout_words(w: Workload) -> str:
    """A layout as one phrase: degrees, ZeRO, offload, recompute, micro-batch."""
    return f"{degree_words(w)} · {state_words(w)} · recompute {w.recompute} · micro-batch {w.micro}"


def degree_words(w: Workload) -> str:
    """The degrees above 1, dp always."""
    parts = [f"{name} {getattr(w, name)}" for name in ("tp", "pp", "vpp", "cp") if getattr(w, name) > 1]
    return " ".join([*parts, f"dp {w.dp}", *(["sp"] if w.sp else [])])


def state_words(w: Workload) -> str:
    """The ZeRO stage with its offloads."""
    places = [(name, place) for name, place in (("optimizer", w.offload_optimizer), ("parameters", w.offload_param)) if place != "none"]
    return f"ZeRO-{w.zero}" + "".join(f", {name} on {place}" for name, place in places)


def differences(before: Workload, after: Workload) -> str:
    """What changed between two layouts, as `tp 4 instead of 8`; empty where nothing did."""
    changes = []
    for name, word in (
        ("tp", "tp"),
        ("pp", "pp"),
        ("vpp", "vpp"),
        ("cp", "cp"),
        ("dp", "dp"),
        ("micro", "micro-batch"),
        ("recompute", "recompute"),
    ):
        if getattr(before, name) != getattr(after, name):
            changes.append(f"{word} {getattr(after, name)} instead of {getattr(before, name)}")
    if state_words(before) != state_words(after):
        changes.append(f"{state_words(after)} instead of {state_words(before)}")
    if before.sp != after.sp:
        changes.append("with sp" if after.sp else "without sp")
    return ", ".join(changes)


def why_not(plan: Plan, best: Plan, *, objective: Objective, units: str = "GPUs") -> str:
    """Why a plan is listed below the best one: which parts of its step are longer, in percent of the best one's step. units: what ranks
    run on."""
    reasons, work = [], 1.0
    if plan.gpus < best.gpus:
        work = best.gpus / plan.gpus  # with fewer GPUs each does more work: only what goes beyond that is a reason
        reasons.append(f"uses {plan.gpus} of {best.gpus} {units}")
    elif plan.gpus > best.gpus and objective != "tokens/s":
        reasons.append(f"needs {plan.gpus - best.gpus} {units} more")
    step = best.time.step
    change = {name: (plan.time.parts[name] - best.time.parts[name] * work) / step for name in best.time.parts}
    longer = sorted((name for name in change if change[name] >= SMALL), key=lambda name: -change[name])[:3]
    shorter = sorted((name for name in change if change[name] <= -SMALL), key=lambda name: change[name])[:1]
    reasons += [f"{_MORE[name]} +{change[name]:.1%}" for name in longer]
    if longer and shorter:
        reasons.append(f"not made up for by {_MORE[shorter[0]]} {change[shorter[0]]:+.1%}".replace(" -", " −"))
    return ", ".join(reasons) or "practically equal"


def limits(best: Plan) -> list[str]:
    """What the best plan's step consists of, the largest parts first, and what limits each."""
    parts = sorted(best.time.parts.items(), key=lambda item: -item[1])[:3]
    return [
        f"{name} {seconds / best.time.step:.0%} of the step: {_LIMIT[name]}" for name, seconds in parts if seconds > 0.02 * best.time.step
    ]


def memory_words(plan: Plan, *, limits: Limits) -> str:
    """The worst stage's memory: how much, at which moment, of what, what is left, and how likely it fits."""
    worst, capacity = plan.worst, plan.memory.capacity
    largest = sorted(worst.parts.items(), key=lambda item: -item[1])[:3]
    text = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in largest if nbytes > 0)
    left = capacity - worst.device
    stage = f"stage {worst.stage} of {plan.workload.pp}" if plan.workload.pp > 1 else "every rank"
    low, high = plan.memory.spread.interval(worst.device)
    words = f"{stage} needs {size(worst.device)} ({size(low)} to {size(high)}) of {size(capacity)} at the {worst.moment} ({text}); "
    words += f"{size(left)} left, {size(limits.room(plan.memory))} of it headroom; fits with probability {plan.chance:.2f}"
    for nbytes, place in ((plan.memory.host, "RAM"), (plan.memory.nvme, "NVMe")):
        words += f"; offloading takes {size(nbytes)} of {place} a node" if nbytes else ""
    return words


def safer(plans: Sequence[Plan]) -> str:
    """The listed plan that is hardly slower than the best and leaves much more memory free, in words; empty where there is none."""
    best = plans[0]
    near = [plan for plan in plans if plan.time.step <= 1.05 * best.time.step and plan.gpus <= best.gpus]
    leanest = min(near, key=lambda plan: plan.worst.device)
    spared = best.worst.device - leanest.worst.device
    if spared < 0.1 * best.memory.capacity:
        return ""
    slower = leanest.time.step / best.time.step - 1
    return f"plan {list(plans).index(leanest) + 1} is {slower:.1%} slower and needs {size(spared)} less: take it if memory turns out tight"


def size(nbytes: float) -> str:
    """Bytes in the binary unit that reads best."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if abs(nbytes) >= 0.5 * scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """A time in the unit that people use for one so long."""
    for unit, scale, least in (("days", 86400.0, 2 * 86400.0), ("hours", 3600.0, 2 * 3600.0), ("min", 60.0, 120.0)):
        if seconds >= least:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.3g} s"


def share(after: float, before: float) -> str:
    """A ratio as people say it: +12 %, −3 %, 1.9×."""
    ratio: Any = after / before
    if ratio >= 1.5:
        return f"{ratio:.2f}×"
    return f"{ratio - 1:+.0%}".replace("-", "−") if abs(ratio - 1) >= 0.005 else "±0 %"
