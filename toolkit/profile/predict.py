"""What the estimate says of a run that is about to be profiled, in the parts that a rank can
measure: no torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.cost import own_saved, own_states
from toolkit.cost.memory import estimate
from toolkit.cost.ranges import ranges
from toolkit.cost.spread import memory_spread
from toolkit.cost.step import TimeEstimate, step_time
from toolkit.cost.workload import Workload
from toolkit.errors import ConfigError
from toolkit.hardware.calibration import measured, scale_for
from toolkit.hardware.catalogue import Hardware, find_gpu, parse_hardware

MEMORY_PARTS = ("parameters", "gradients", "optimizer", "zero buffers", "activations", "logits", "working set")
UNKNOWN = "a GPU that the catalogue lacks"
# the planner's parts of a step, and the measured part that each belongs to
TIME_OF = {
    "matmul": "compute",
    "attention": "compute",
    "memory-bound kernels": "compute",
    "recompute": "compute",
    "optimizer": "optimizer",
    "offload": "optimizer",
    "tensor parallel": "communication",
    "context parallel": "communication",
    "pipeline sends": "communication",
    "pipeline bubble": "communication",
    "launches": "compute",
    "zero gathers": "communication",
    "data parallel": "communication",
    "stragglers": "communication",
    "shared cores": "communication",
}


def memory(w: Workload, hardware: Hardware, stage: int, *, dp_rank: int = 0) -> dict[str, float]:
    """Bytes of one rank by part, each at its largest, and the peak; offloaded states count only
    where they share the rank's memory.
    """
    cpu = not hardware.gpu.accelerator
    parts = own_states.on_device(w, stage, cpu=cpu, dp_rank=dp_rank)
    parts |= own_saved.stage_saved(w, stage, cpu=cpu)
    peak = next((s.allocated for s in estimate(w, hardware).stages if s.stage == stage), 0.0)
    parts["working set"] = max(0.0, peak - sum(parts.values()))
    return parts | {"peak": peak}


def seconds(hardware: Hardware, estimated: TimeEstimate) -> dict[str, float]:
    """Seconds of a step as the planner's cost model gives them, in the parts of TIME_OF, and the
    step; empty for an unknown GPU.
    """
    if hardware.gpu.name == UNKNOWN:
        return {}
    parts: dict[str, float] = {"compute": 0.0, "optimizer": 0.0, "communication": 0.0}
    for name, value in estimated.parts.items():
        parts[TIME_OF[name]] += value
    return parts | {"step": estimated.step}


def hardware_here(*, gpu: str | None, ranks: int, memory_gib: float | None = None) -> Hardware:
    """This machine as the planner sees it. gpu: the device's own name, None on a CPU.

    A GPU that the catalogue lacks stands in under UNKNOWN: memory needs none of its figures, and
    seconds() says nothing of it.
    """
    try:
        hardware = parse_hardware(f"{'cpu' if gpu is None else find_gpu(gpu).name}:{ranks}")
    except ConfigError:
        hardware = parse_hardware(f"a100-80gb:{ranks}")
        hardware = replace(hardware, gpu=replace(hardware.gpu, name=UNKNOWN))
    return hardware if memory_gib is None else replace(hardware, gpu=replace(hardware.gpu, memory_gib=memory_gib))


def as_json(w: Workload, hardware: Hardware, *, users_file: Path | None = None) -> dict[str, Any]:
    """The part "predicted" of profile.json; its range holds 80 % intervals: bytes of each stage's
    peak, seconds a step, tokens a second. users_file: of toolkit calibrate.
    """
    hardware = measured(hardware, users_file)
    time = step_time(w, hardware, scale=scale_for(hardware.gpu, w.precision, users_file=users_file))
    by_stage = {str(s): {k: round(v) for k, v in memory(w, hardware, s).items()} for s in range(w.pp)}
    ends = ranges(estimate(w, hardware), time)
    told = seconds(hardware, time)
    found: dict[str, Any] = {"peak": {s: [round(end) for end in memory_spread(w).interval(parts["peak"])] for s, parts in by_stage.items()}}
    if told:
        found |= {name: ends[name] for name in ("step_s", "tokens_per_s")}
    return {"memory": by_stage, "seconds": told, "range": found}
