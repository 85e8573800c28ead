"""`toolkit estimate`: one config on one cluster as a terminal table or as JSON."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from toolkit.config.schema import RunConfig
from toolkit.cost.memory import GIB, MemoryEstimate, estimate
from toolkit.cost.ranges import ranges
from toolkit.cost.step import TimeEstimate, step_time
from toolkit.cost.workload import Workload
from toolkit.hardware import calibration
from toolkit.hardware.catalogue import Hardware
from toolkit.parallel import rules
from toolkit.parallel.exchange import chosen_exchange
from toolkit.plan.reasons import duration
from toolkit.plan.remedy import nearest_fit


def estimate_json(config: RunConfig, hardware: Hardware, *, calibrated: Path | None = None) -> dict[str, Any]:
    """Memory by part of every stage (GiB) and step time by part (seconds) of a config on a cluster.

    calibrated: a file of `toolkit calibrate`. Raises LayoutError for a layout that `toolkit train` would refuse there.
    """
    hardware = calibration.measured(hardware, calibrated)
    remark = "; ".join(filter(None, (_checked(config, hardware), calibration.remark(hardware))))
    workload = Workload.of(config, hardware.count)
    scale = calibration.scale_for(hardware.gpu, workload.precision, users_file=calibrated)
    memory, time = estimate(workload, hardware), step_time(workload, hardware, scale=scale)
    worst = memory.worst
    return {
        "hardware": str(hardware),
        "gpus": workload.world,
        "parameters": workload.model.parameters,
        "layout": {name: getattr(workload, name) for name in ("tp", "pp", "vpp", "cp", "dp", "zero", "micro", "microbatches")},
        "remark": remark,
        "fits": memory.fits and memory.host_fits,
        "p_fits": round(memory.chance, 4) if memory.host_fits else 0.0,
        "range": ranges(memory, time),
        "limits": [name for name, enough in (("device", memory.fits), ("host", memory.host_fits)) if not enough],
        "remedy": _remedy(config, memory, hardware),
        "capacity_gib": round(memory.capacity / GIB, 3),
        "worst_rank": _first_rank(workload, worst.stage),
        "worst_stage": worst.stage,
        "peak_allocated_gib": round(worst.allocated / GIB, 3),
        "peak_reserved_gib": round(worst.reserved / GIB, 3),
        "peak_device_gib": round(worst.device / GIB, 3),
        "host_gib_per_node": round(memory.host / GIB, 3),
        "nvme_gib_per_node": round(memory.nvme / GIB, 3),
        "stages": [
            {
                "stage": s.stage,
                "peak_at": s.moment,
                "parts_gib": {name: round(value / GIB, 4) for name, value in s.parts.items()},
                "fragmentation_gib": round(s.fragmentation / GIB, 4),
                "context_gib": round(s.context / GIB, 4),
                "device_gib": round(s.device / GIB, 3),
            }
            for s in memory.stages
        ],
        "step_s": time.step,
        "time_parts_s": dict(time.parts),
        "tokens_per_s": time.tokens / time.step,
        "tokens_per_s_per_gpu": time.tokens_per_s_per_gpu,
        "model_tflops_per_gpu": _model_flops(workload) / time.step / workload.world / 1e12,
        "calibration": scale,
    }


def estimate_text(config: RunConfig, hardware: Hardware, *, calibrated: Path | None = None, width: int = 100) -> str:
    """The same as two tables and a verdict, for a terminal."""
    from rich.console import Console

    hardware = calibration.measured(hardware, calibrated)
    remark = "; ".join(filter(None, (_checked(config, hardware), calibration.remark(hardware))))
    workload = Workload.of(config, hardware.count)
    scale = calibration.scale_for(hardware.gpu, workload.precision, users_file=calibrated)
    memory, time = estimate(workload, hardware), step_time(workload, hardware, scale=scale)
    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    w = workload
    out.print(
        f"{count(w.model.parameters)} parameters on {hardware} ({w.world} {hardware.units}): tp {w.tp} · pp {w.pp} · vpp {w.vpp} · cp {w.cp} · dp {w.dp}"
        f" · ZeRO-{w.zero} · {w.microbatches} micro-batches of {w.micro} × {w.seq} · {w.precision}, recompute {w.recompute}",
        highlight=False,
    )
    if remark:
        out.print(f"note: {remark}", highlight=False)
    unit, size = _unit(memory.worst.device)
    out.print(f"peak memory of one rank, {unit}", style="italic")
    out.print(_memory_table(memory, size))
    out.print(_verdict(memory, workload, hardware), highlight=False)
    if remedy := _remedy(config, memory, hardware):
        out.print(remedy, highlight=False)
    out.print("one optimizer step", style="italic")
    out.print(_time_table(time))
    low, high = time.step_range
    out.print(
        f"step {duration(time.step)} ({duration(low)} to {duration(high)}) · {time.tokens / time.step:,.0f} tokens/s · {time.tokens_per_s_per_gpu:,.0f} tokens/s per {'GPU' if hardware.gpu.accelerator else 'process'} · MFU {mfu(w, time, hardware):.1%}",
        highlight=False,
    )
    steps = config.train.steps
    out.print(
        f"the whole run of {steps:,} steps: {duration(time.step * steps)} ({duration(low * steps)} to {duration(high * steps)})",
        highlight=False,
    )
    if hardware.gpu.accelerator:
        source = "by the errors of docs/planner.md"
    elif hardware.cpu is not None:
        source = "by the errors of docs/planner.md, of the step by those of docs/cpu-time.md"
    else:
        source = "of the step for any CPU: toolkit calibrate --out FILE measures this one, for --calibration FILE"
    out.print(f"in brackets: what holds in four of five cases, {source}", highlight=False, style="italic")
    text = out.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def fits(config: RunConfig, hardware: Hardware) -> bool:
    """Whether the estimate fits into the devices and, where states are offloaded, into the RAM of a node."""
    memory = estimate(Workload.of(config, hardware.count), hardware)
    return memory.fits and memory.host_fits


def _checked(config: RunConfig, hardware: Hardware) -> str:
    """Refuse what `toolkit train` refuses; a remark on the layout, "" where there is nothing to say."""
    rules.refuse(rules.violations(config, hardware.count, machine=hardware.machine))
    if config.parallel.cp == 1:
        return ""
    exchange = chosen_exchange(config)
    return f"context parallel by {exchange.name}: {exchange.reason}"


def _remedy(config: RunConfig, memory: MemoryEstimate, hardware: Hardware) -> str:
    """What to set where the estimate does not fit."""
    if memory.fits and memory.host_fits:
        return ""
    return nearest_fit(config, hardware.count, hardware, machine=hardware.machine) + " `toolkit tune` looks at other degrees too."


def _first_rank(w: Workload, stage: int) -> int:
    return stage * w.tp * w.cp * w.dp


def mfu(w: Workload, time: TimeEstimate, hardware: Hardware) -> float:
    """Model FLOPs utilisation: _model_flops() of a step over what the GPUs could do at peak in that time."""
    return _model_flops(w) / time.step / w.world / hardware.gpu.peak(w.precision)


def _model_flops(w: Workload) -> float:
    """FLOPs of forward and backward of one step, without recompute."""
    return w.model.flops_per_token(w.seq) * w.batch * w.seq


def count(number: int) -> str:
    """A number of parameters as people say it: 70.6 B."""
    return next((f"{number / size:.3g} {name}" for name, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if number >= size), str(number))


def _unit(nbytes: float) -> tuple[str, float]:
    """The binary unit in which a size reads best, and its bytes."""
    return next(((name, size) for name, size in (("GiB", GIB), ("MiB", 2**20)) if nbytes >= 0.5 * size), ("KiB", 2**10))


def _memory_table(memory: MemoryEstimate, size: float) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("part")
    for s in memory.stages:
        table.add_column(f"stage {s.stage}", justify="right")
    for name in memory.stages[0].parts:
        if any(s.parts[name] >= 0.005 * size for s in memory.stages):
            table.add_row(name, *(f"{s.parts[name] / size:.2f}" for s in memory.stages))
    table.add_row("allocated", *(f"{s.allocated / size:.2f}" for s in memory.stages), style="bold")
    table.add_row("fragmentation", *(f"{s.fragmentation / size:.2f}" for s in memory.stages))
    table.add_row("context", *(f"{s.context / size:.2f}" for s in memory.stages))
    table.add_row("on the device", *(f"{s.device / size:.2f}" for s in memory.stages), style="bold")
    table.add_row("worst moment", *(s.moment for s in memory.stages))
    return table


def _verdict(memory: MemoryEstimate, w: Workload, hardware: Hardware) -> str:
    worst = memory.worst
    where = f"stage {worst.stage} (from rank {_first_rank(w, worst.stage)})"
    unit, size = _unit(worst.device)
    device = "GPU memory" if hardware.gpu.accelerator else "memory"
    limits = [name for name, enough in ((device, memory.fits), ("the RAM of a node", memory.host_fits)) if not enough]
    verdict = "fits" if not limits else f"does not fit into {' and '.join(limits)}"
    low, high = memory.spread.interval(worst.device)
    text = f"{verdict}: {where} needs {worst.device / size:.1f} {unit} ({low / size:.1f} to {high / size:.1f}) of {memory.capacity / GIB:.1f} GiB"
    text += f"; fits with probability {memory.chance:.2f}"
    if not memory.fits:
        room = memory.headroom()
        text += f", {(worst.device + room - memory.capacity) / GIB:.1f} GiB too much with {room / GIB:.1f} GiB of headroom"
    if memory.host or memory.nvme:
        text += f"; offloading takes {memory.host / GIB:.1f} GiB of RAM and {memory.nvme / GIB:.1f} GiB of NVMe a node"
        if not memory.host_fits:
            text += f", which has {memory.room / GIB:.0f} GiB of RAM to spare"
    return text


def _time_table(time: TimeEstimate) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        if seconds >= 0.0005 * time.step:
            table.add_row(name, f"{seconds:.4g}", f"{seconds / time.step:.1%}")
    return table
