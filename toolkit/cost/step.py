"""Seconds of one optimizer step by part: compute, communication that compute does not hide, bubble, optimizer, offload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, sqrt

from toolkit.cost import kernels, network
from toolkit.cost.constants import VALUES, cached
from toolkit.cost.layer import Pass, embedding_passes, head_passes, host_time, layer_passes
from toolkit.cost.spread import UNMEASURED_CPU, Spread, rate_spread
from toolkit.cost.workload import Workload
from toolkit.hardware import calibration
from toolkit.hardware.catalogue import GB, Hardware

PARTS = (
    "matmul",
    "attention",
    "memory-bound kernels",
    "recompute",
    "tensor parallel",
    "context parallel",
    "launches",
    "pipeline sends",
    "pipeline bubble",
    "zero gathers",
    "data parallel",
    "optimizer",
    "offload",
    "stragglers",
)


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """One optimizer step; seconds by part, which sum to step. spread: of tokens a second, how far off they may be."""

    parts: dict[str, float]
    tokens: float
    world: int
    spread: Spread

    @property
    def step(self) -> float:
        return sum(self.parts.values())

    @property
    def step_range(self) -> tuple[float, float]:
        """The 80 % interval of a step's seconds."""
        return self.spread.inverse().interval(self.step)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.step / self.world


def step_time(w: Workload, hardware: Hardware, *, scale: float | None = None, unknown: int = 0) -> TimeEstimate:
    """Time of one optimizer step of a workload on a cluster.

    1F1B: the slowest stage's micro-batches in a row, and the fill and drain of the others' (arXiv 2104.04473, section 2.2),
    divided by vpp when interleaved. scale: calibrated compute speed; null: the stored one of this GPU and precision.
    unknown: settings that had to be guessed, which widen the interval. A CPU that was measured has formulas of its own.
    """
    if hardware.cpu is not None and not hardware.gpu.accelerator:
        from toolkit.cost.cpu_step import cpu_step_time

        return cpu_step_time(w, hardware)
    if scale is None:
        scale = calibration.scale_for(hardware.gpu, w.precision)
    # layouts that differ in how states are cut and where they lie compute alike
    alike = w.laid_out(zero=1 if w.zero < 2 else 2, offload_optimizer="none", offload_param="none")
    stages, waits, micro, every = _micro_batch(alike, hardware, scale)
    slowest = max(micro, key=lambda stage: micro[stage])
    f, b, r = stages[slowest]
    m = w.microbatches
    parts = dict.fromkeys(PARTS, 0.0)
    both = f + b
    parts["matmul"] = m * both.matmul
    parts["attention"] = m * both.attention
    parts["memory-bound kernels"] = m * both.memory
    parts["recompute"] = m * r.total
    parts["tensor parallel"] = m * both.tp
    parts["context parallel"] = m * both.cp
    parts["launches"] = m * waits[slowest]
    gathers = _zero_gathers(w, hardware, slowest, f, b, r)
    parts["zero gathers"] = m * gathers
    if w.pp > 1:
        others = every - micro[slowest] + (w.pp - 1) * gathers
        parts["pipeline bubble"] = others / w.vpp
        parts["pipeline sends"] = pipeline_sends(w, hardware)
    parts["data parallel"] = _data_parallel(w, hardware, f, b + r)
    parts["optimizer"], parts["offload"] = _optimizer(w, hardware, micro[slowest] * m)
    parts["stragglers"] = straggling(w.world, hardware) * sum(parts.values())
    spread = rate_spread(w, unknown=unknown) if hardware.gpu.accelerator else UNMEASURED_CPU
    return TimeEstimate(parts=parts, tokens=float(w.batch * w.seq), world=w.world, spread=spread)


Stages = dict[int, tuple[Pass, Pass, Pass]]


@cached(maxsize=256)
def _micro_batch(w: Workload, hardware: Hardware, scale: float) -> tuple[Stages, dict[int, float], dict[int, float], float]:
    """Of each distinct stage: its passes for one micro-batch, the GPU's waits for the host, and all seconds of one; of all stages, their sum."""
    forward, backward, again = layer_passes(w, hardware, scale=scale)
    stages = {stage: _stage(w, hardware, scale, stage, forward, backward, again) for stage in _distinct_stages(w)}
    launches = launch_seconds(w, hardware)
    waits = {  # of the GPU for the host: for each launch, or where it runs its kernels faster than they are launched
        stage: w.layers_on(stage) * launches - (0.0 if w.stack.blocking_launches else f.total + b.total + r.total)
        for stage, (f, b, r) in stages.items()
    }
    waits = {stage: max(0.0, seconds) for stage, seconds in waits.items()}
    micro = {stage: f.total + b.total + r.total + waits[stage] for stage, (f, b, r) in stages.items()}
    return stages, waits, micro, sum(micro[_stands_for(stage, w)] for stage in range(w.pp))


def launch_seconds(w: Workload, hardware: Hardware) -> float:
    """Seconds of the host for launching one layer's passes of a micro-batch; 0 where there is no GPU to launch on."""
    return (2 if w.recompute in ("none", "selective") else 3) * host_time(w) if hardware.gpu.accelerator else 0.0


def straggling(gpus: int, hardware: Hardware) -> float:
    """Share by which the slowest of the nodes lengthens a step: the expected largest of so many normal deviations."""
    nodes = gpus / hardware.gpus_per_node
    return VALUES.node_spread * sqrt(2 * log(nodes)) if nodes > 1 else 0.0


def _distinct_stages(w: Workload) -> set[int]:
    """Stages that can differ: the first, the last, and one of each layer count between."""
    rest = w.model.layers % w.pp
    return {s for s in (0, 1, rest, w.pp - 2, w.pp - 1) if 0 <= s < w.pp}


def _stands_for(stage: int, w: Workload) -> int:
    if stage in (0, w.pp - 1):
        return stage
    for other in _distinct_stages(w) - {0, w.pp - 1}:
        if w.layers_on(other) == w.layers_on(stage):
            return other
    return 0


def _stage(
    w: Workload, hardware: Hardware, scale: float, stage: int, forward: Pass, backward: Pass, again: Pass
) -> tuple[Pass, Pass, Pass]:
    layers = w.layers_on(stage)
    f, b, r = forward * layers, backward * layers, again * layers
    if stage == 0:
        ef, eb = embedding_passes(w, hardware)
        f, b = f + ef, b + eb
    if stage == w.pp - 1:
        hf, hb = head_passes(w, hardware, scale=scale)
        f, b = f + hf, b + hb
    return f, b, r


def pipeline_sends(w: Workload, hardware: Hardware) -> float:
    """Activations to the next stage and gradients back, per micro-batch and chunk, where they are not overlapped; seconds a step."""
    nbytes = w.tokens * w.model.hidden * w.width / w.sequence_shards
    if not w.sp and w.stack.split_sends:
        nbytes /= w.tp
    each = network.send_time(nbytes, hardware=hardware, distance=w.tp * w.cp * w.dp)
    hidden = w.stack.p2p_hidden if w.overlap and w.vpp > 1 else 0.0
    turns = 4 if w.stack.single_sends else 2
    return turns * each * w.vpp * (w.microbatches * (1 - hidden) + (w.pp - 1) / w.vpp)


def _zero_gathers(w: Workload, hardware: Hardware, stage: int, f: Pass, b: Pass, r: Pass) -> float:
    """Exposed parameter traffic of one micro-batch under ZeRO-3 (gather for forward and backward, scatter of gradients) and of
    ZeRO-2's gradient scatter where it happens every micro-batch (DeepSpeed); seconds (arXiv 1910.02054, section 7)."""
    if w.zero < 2:
        return 0.0
    if w.shards == 1:  # nothing to send, yet DeepSpeed's buckets are filled all the same
        return 0.0 if w.stack.sharding == "fsdp" else kernels.stream_time(_copies(w) * w.parameters_on(stage), gpu=hardware.gpu)
    layers = w.layers_on(stage)
    over = network.group(hardware, size=w.shards, stride=w.tp)
    if w.stack.single_ring and over.across > 1:
        over = replace(over, gb_s=network.port(hardware))
    per_layer = w.model.layer_parameters / w.tp
    rest = max(0.0, w.parameters_on(stage) - layers * per_layer)
    prefetched = w.zero == 3 or w.stack.sharding == "fsdp"
    hidden = (w.stack.zero3_hidden if prefetched else w.stack.dp_hidden) if w.overlap else 0.0
    reduced = max(w.stack.reduce_bytes, w.width)
    # ZeRO++ (arXiv 2306.10209, section 3): weights travel in 8 bits, the backward gathers inside a second partition, gradients travel in 4
    width, reduced = (1.0 if w.qwz else w.width), (0.5 if w.qgz else reduced)
    near = network.group(hardware, size=w.hpz, stride=w.tp) if w.hpz > 1 else over

    def moved(each: float, through: network.Group) -> float:
        return layers * network.gather_time(per_layer * each, over=through) + network.gather_time(rest * each, over=through)

    gather, scatter = moved(width, over), moved(reduced, over)
    front, back = gather, moved(width, near) + scatter
    if w.zero == 2:  # weights stay whole between forward and backward
        front, back = (gather / w.microbatches if w.stack.sharding == "fsdp" else 0.0), scatter
    exposed = _uncovered(front, f.compute, hidden) + _uncovered(back, b.compute + r.compute, hidden)
    # in and out of the flat buffers; quantising reads 2 bytes a weight and writes 1, and back, for each gather; gradients twice
    passes = _copies(w) + (12.0 if w.qwz else 0.0) + (10.0 if w.qgz else 0.0)
    exposed += kernels.stream_time(passes * w.parameters_on(stage), gpu=hardware.gpu)
    if w.zero == 3:  # nothing runs before the first layer is there
        exposed += gather / max(1, layers)
    return exposed


def _copies(w: Workload) -> float:
    """Bytes a weight and micro-batch in and out of ZeRO's flat buffers."""
    return VALUES.copies_3 if w.zero == 3 else VALUES.copies_2


def _uncovered(traffic: float, compute: float, hidden: float) -> float:
    covered = min(traffic, compute * hidden)
    return traffic - covered + VALUES.contention * covered


def _data_parallel(w: Workload, hardware: Hardware, f: Pass, b: Pass) -> float:
    """Exposed gradient reduction and, with sharded optimizer states, parameter gather, once a step; seconds.

    An all-reduce of gradients, or their reduce-scatter and the gather of 2-byte weights (arXiv 1910.02054, section 7.1);
    overlapping stacks hide them behind the last backward and the first forward.
    """
    if w.shards == 1 or w.zero == 3:
        return 0.0
    params = max(w.parameters_on(stage) for stage in (0, w.pp - 1))
    over = network.group(hardware, size=w.shards, stride=w.tp)
    hidden = w.stack.dp_hidden if w.overlap else 0.0
    reduced = max(w.stack.reduce_bytes, w.width)
    if w.zero == 0:
        return _uncovered(network.reduce_time(params * reduced, over=over), b.compute, hidden)
    gather = network.gather_time(params * w.width, over=over)
    if w.zero == 2:
        return 0.0 if w.stack.sharding == "fsdp" else gather
    scatter = (network.reduce_time if w.stack.whole_reduce else network.gather_time)(params * reduced, over=over)
    if w.stack.sharding == "deepspeed":
        return gather + _uncovered(scatter, b.compute, hidden)
    return _uncovered(gather, f.compute, hidden) + _uncovered(scatter, b.compute, hidden)


def _optimizer(w: Workload, hardware: Hardware, compute: float) -> tuple[float, float]:
    """Adam's pass over states (read and write 12 bytes a weight, read the gradient, write the weight: 30 bytes) on the device,
    or on the host with gradients and weights crossing PCIe (arXiv 2101.06840, section 4); seconds (device, offload)."""
    shards = w.shards if w.zero else 1
    params = max(w.parameters_on(stage) for stage in (0, w.pp - 1)) / shards
    gpu = hardware.gpu
    zeroing = kernels.stream_time(8.0 * w.parameters_on(0) / (shards if w.zero >= 2 else 1), gpu=gpu)
    step, offload = zeroing, 0.0
    if w.offload_optimizer == "none":
        step += kernels.stream_time(30.0 * params, gpu=gpu, kernels=4)
    else:
        ranks = min(hardware.gpus_per_node, w.world)
        offload += 2 * w.width * params / (gpu.pcie_gb_s * GB * VALUES.pcie_share)
        offload += ranks * params / VALUES.host_adam
        if w.zero < 3:  # gradients summed over micro-batches live on the host: fetched, added to and sent back in fp32
            offload += (w.microbatches - 1) * 8.0 * params / (gpu.pcie_gb_s * GB * VALUES.pcie_share)
        if w.offload_optimizer == "nvme":
            offload += ranks * params * 24.0 / VALUES.nvme
    if w.offload_param != "none":
        traffic = 2 * w.microbatches * w.width * params / (gpu.pcie_gb_s * GB * VALUES.pcie_share)
        offload += max(0.0, traffic - 0.5 * compute)
    return step, offload
