"""Memory of every pipeline stage's ranks by part, and what goes to the host: pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from toolkit.cost import activations, own_engine, own_saved, own_states
from toolkit.cost import host as own_host
from toolkit.cost.constants import VALUES
from toolkit.cost.gathers import MAX_LIVE, gathered
from toolkit.cost.spread import RISK, Spread, memory_spread
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import Hardware

GIB = 2**30
PARTS = ("parameters", "gradients", "optimizer", "zero buffers", "activations", "working set", "logits", "communication", "workspace")
HOST_SHARE = 0.9  # of a node's RAM that offloaded states may take beside the system and the data loaders


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """One rank of a pipeline stage at its worst moment; bytes by part, which sum to allocated.

    fragmentation: what the caching allocator holds beyond it; unmerged: flat buffers of another moment that found no room in
    the blocks freed until then; context: driver, kernels and NCCL.
    """

    stage: int
    moment: str
    parts: dict[str, float]
    fragmentation: float
    context: float
    unmerged: float = 0.0

    @property
    def allocated(self) -> float:
        """Peak bytes of the framework's allocator."""
        return sum(self.parts.values())

    @property
    def reserved(self) -> float:
        """Peak bytes the allocator takes from the driver."""
        return self.allocated + self.fragmentation + self.unmerged

    @property
    def device(self) -> float:
        """Peak bytes nvidia-smi shows."""
        return self.reserved + self.context


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """All stages, and the host bytes of one node (CPU RAM, NVMe) that offloading needs.

    capacity: bytes of a device; room: of RAM for host; spread: how far off the stages' bytes may be.
    """

    stages: tuple[StageMemory, ...]
    host: float
    nvme: float
    capacity: float
    room: float
    spread: Spread

    @property
    def worst(self) -> StageMemory:
        """The stage whose ranks need most."""
        return max(self.stages, key=lambda s: s.device)

    @property
    def chance(self) -> float:
        """Probability that the worst stage fits into its device."""
        return self.spread.chance(self.worst.device, self.capacity)

    def headroom(self, risk: float = RISK) -> float:
        """Bytes that the worst stage must leave free, so that the risk of running out of memory is no higher."""
        return max(0.0, self.worst.device * (self.spread.factor(risk) - 1))

    @property
    def fits(self) -> bool:
        """Whether the worst stage fits but for RISK."""
        return self.worst.device * self.spread.factor(RISK) <= self.capacity

    @property
    def host_fits(self) -> bool:
        """Whether a node's RAM holds what is offloaded to it."""
        return self.host <= self.room


def estimate(
    w: Workload, hardware: Hardware, *, only: int | None = None, known: tuple[StageMemory, ...] = (), unknown: int = 0
) -> MemoryEstimate:
    """Memory of a workload on a cluster, per rank of every stage; bytes.

    only: one stage, for a search that can stop there; known: stages of the same workload that need not be sized again; unknown: settings that had to be guessed, which widen the interval.
    """
    seen = {only} if only is not None else {0, 1, w.pp // 2, w.pp - 2, w.pp - 1} if w.pp > 8 else set(range(w.pp))
    there = {stage.stage: stage for stage in known}
    stages = tuple(there.get(stage) or _stage(w, stage, hardware) for stage in sorted(s for s in seen if 0 <= s < w.pp))
    host, nvme = host_bytes(w, hardware)
    room = HOST_SHARE * hardware.gpu.host_gib * GIB if hardware.gpu.accelerator else inf  # a CPU's ranks count it among their own
    capacity = hardware.gpu.memory_gib * GIB
    return MemoryEstimate(stages=stages, host=host, nvme=nvme, capacity=capacity, room=room, spread=memory_spread(w, unknown=unknown))


def states_at_least(w: Workload, hardware: Hardware) -> float:
    """A lower bound of the bytes of the first stage's states, which neither the micro-batch nor the recomputation changes.

    0 where no bound is known: for software that is not our own, and where gradients come late (ZeRO-1 with its optimizer offloaded).
    """
    if w.stack.sharding != "toolkit" or not own_engine.known(w) or (w.zero < 2 and w.offload_optimizer != "none"):
        return 0.0
    return sum(own_states.on_device(w, 0, cpu=not hardware.gpu.accelerator).values())


def kept_at_least(w: Workload, hardware: Hardware) -> float:
    """A lower bound of what the first stage keeps beside its states, where that one is known; the sharding doesn't change it."""
    return own_saved.kept_by_first(w, cpu=not hardware.gpu.accelerator)


def states(w: Workload, params: float) -> dict[str, float]:
    """Bytes of parameters, gradients and optimizer states on the device for a rank whose share of the model is `params` weights.

    Adam in mixed precision keeps an fp32 master copy and two fp32 moments, 12 bytes a weight (arXiv 1910.02054, section 3.1;
    in fp32 the weights are their own master: 8). ZeRO-1 divides them by the ranks that hold the same weights,
    ZeRO-2 the gradients too, ZeRO-3 the weights too. FSDP's shards are fp32 weights, gradients and moments (16 bytes).
    Below ZeRO-2 a stack holds all gradients in its main_grads bytes; without them mixed precision at ZeRO-0 copies them to fp32.
    """
    n, b = w.shards, w.width
    sharded = params / n
    if w.stack.sharding == "fsdp" and w.zero >= 2:
        parts = {"parameters": 4 * sharded, "gradients": 4 * sharded, "optimizer": 8 * sharded}
        if w.zero == 2:
            parts["parameters"] += b * params
    else:
        # whole buffers beside what autograd leaves, all of which is alive when a micro-batch's backward ends
        grads = (w.stack.main_grads or float(b)) + (float(b) if w.stack.main_grads and not w.stack.gemm_accumulates else 0.0)
        if b == 4:
            # DeepSpeed clones fp32 weights as their own master; the toolkit's flat path (ZeRO-0/1) does not
            cloned = w.zero >= {"deepspeed": 1, "toolkit": 2}.get(w.stack.sharding, 4)
            grads, moments = 4.0, 12.0 if cloned else 8.0
        else:
            moments = w.stack.master_bytes + (4.0 if not w.stack.main_grads and w.zero == 0 else 0.0)
        parts = {
            "parameters": b * (sharded + (params / w.hpz if w.hpz > 1 else 0.0) if w.zero >= 3 else params),
            "gradients": (
                float(b) * sharded if w.zero >= 2 and w.stack.sharding != "megatron" else grads * (sharded if w.zero >= 2 else params)
            ),
            "optimizer": moments * (sharded if w.zero >= 1 else params),
        }
    if w.offload_optimizer != "none":
        parts["optimizer"] = 0.0
        if w.zero >= 2:
            parts["gradients"] = 0.0
    if w.offload_param != "none":
        parts["parameters"] = 0.0
    return parts


def zero_buffers(w: Workload, params: float) -> float:
    """Bytes of buckets and gathered layers that ZeRO-2/3 and FSDP hold for a moment.

    DeepSpeed: a reduce bucket of at most 5e8 elements (at stage 2, overlapped, also the one filling), and at stage 3 up to 1e9
    live weights (DeepSpeed's configuration reference) beside the largest one. FSDP: the running and the prefetched layer, and the gradient of one.
    """
    s, b = w.model, w.width
    layer = s.layer_parameters / w.tp
    if w.zero == 1 and w.stack.sharding == "deepspeed" and not w.stack.main_grads:
        return b * min(VALUES.bucket, params)
    if w.zero < 2:
        return 0.0
    if w.stack.sharding == "fsdp":
        if w.zero == 2:
            return layer * (b + w.stack.reduce_bytes)
        unit = max(layer, s.rows * s.hidden / w.tp if w.pp == 1 else 0)
        return 2 * layer * b + unit * (b + w.stack.reduce_bytes)
    if w.zero == 2:
        return 2 * b * min(VALUES.bucket, layer)
    largest = s.rows * s.hidden / w.tp  # the embedding or the output matrix, gathered, and its gradient
    return b * (min(VALUES.bucket, params) + min(MAX_LIVE, params) + 2 * largest)


def host_bytes(w: Workload, hardware: Hardware) -> tuple[float, float]:
    """CPU RAM and NVMe bytes of one node for offloaded states: 12 bytes a weight of optimizer states and 4 of gradients, 2 of
    parameters; and for activations that wait there, the first stage having most of them.

    Our own engine's RAM is counted tensor by tensor, with the buffers through which it reads and writes files.
    """
    ranks = min(hardware.gpus_per_node, w.world)
    each = max(w.parameters_on(s) for s in (0, w.pp - 1)) / (w.shards if w.zero else 1) * ranks
    host = nvme = 0.0
    for place, nbytes in ((w.offload_optimizer, 16.0 * each), (w.offload_param, w.width * each)):
        host += nbytes if place == "cpu" else 0.0
        nvme += nbytes if place == "nvme" else 0.0
    if w.stack.sharding == "toolkit" and hardware.gpu.accelerator:
        host = ranks * max(own_host.rank_bytes(w, stage) for stage in {0, w.pp // 2, w.pp - 1})
    return host + own_saved.host_saved(w, 0) * ranks, nvme


def _stage(w: Workload, stage: int, hardware: Hardware) -> StageMemory:
    params = w.parameters_on(stage)
    if w.stack.sharding == "toolkit":  # our own engine's weights are counted, not approximated
        base = dict.fromkeys(PARTS, 0.0) | own_states.on_device(w, stage, cpu=not hardware.gpu.accelerator)
        base["working set"] = gathered(w, stage)
    else:
        base = dict.fromkeys(PARTS, 0.0) | states(w, params)
        base["zero buffers"] = zero_buffers(w, params)
    base["gradients"] += _placeholders(w, stage)
    copies = w.stack.step_copies - (2.0 if w.stack.step_copies and w.zero >= 2 else 0.0)  # FSDP's gradient shards are flat already
    base["working set"] += copies * params / (w.shards if w.zero else 1)
    base["workspace"] = VALUES.workspace if hardware.gpu.accelerator else 0.0
    base["communication"] = 2 * activations.boundary_bytes(w) if w.pp > 1 else 0.0
    moments = {"backward": _backward(w, stage), "optimizer step": _step(w, params)}
    if stage == w.pp - 1:
        moments["loss"] = _loss(w, stage)
    if own_engine.known(w):
        moments = own_engine.moments(w, stage, cpu=not hardware.gpu.accelerator)
    moment, extra = max(moments.items(), key=lambda item: sum(item[1].values()))
    parts = {name: value + extra.get(name, 0.0) for name, value in base.items()}
    dynamic = sum(extra.values()) + base["zero buffers"]
    flat = 0.0
    if w.stack.sharding != "toolkit" and moment != "optimizer step":
        flat = VALUES.unmerged * sum(moments["optimizer step"].values())
    return StageMemory(
        stage=stage,
        moment=moment,
        parts=parts,
        fragmentation=_spare(w) * dynamic,
        context=_context(w) if hardware.gpu.accelerator else 0.0,
        unmerged=flat,
    )


def _spare(w: Workload) -> float:
    """Share of what comes and goes in a step that the caching allocator holds beyond it."""
    if w.stack.sharding == "toolkit":
        return {2: VALUES.own_spare_2, 3: VALUES.own_spare_3}.get(w.zero, VALUES.own_spare)
    if w.pp == 1 or w.recompute == "full":  # kept layer inputs are all of one size, so freed blocks are used again
        return VALUES.spare
    return VALUES.pipeline_spare


def _context(w: Workload) -> float:
    """Bytes of driver context, kernels and NCCL: before lazy loading and lazy connections both held far more, and every
    neighbour in the pipeline had a communicator of its own (PyTorch's send and receive of that time)."""
    groups = sum(size > 1 for size in (w.tp, w.cp, w.dp, w.pp)) + (w.world > 1)
    if not w.stack.old_driver:
        return VALUES.context + VALUES.communicator * groups
    return VALUES.old_context + VALUES.old_communicator * (groups + 2 * (w.pp > 1))


def _placeholders(w: Workload, stage: int) -> float:
    """Transformer Engine's dummy weight gradients, one per shape, where the real ones are added in place."""
    if not (w.stack.placeholders and w.stack.main_grads and w.stack.gemm_accumulates and w.fused_accumulation and w.zero < 2):
        return 0.0
    head = w.model.rows * w.model.hidden if stage in (0, w.pp - 1) else 0
    return w.width * (w.model.layer_parameters + head) / w.tp


def _held(w: Workload, stage: int) -> float:
    layers = w.layers_on(stage) * activations.saved_per_layer(w)
    edges = activations.boundary_bytes(w) if stage in (0, w.pp - 1) else 0.0
    return activations.in_flight(w, stage) * (layers + edges)


def _backward(w: Workload, stage: int) -> dict[str, float]:
    return {"activations": _held(w, stage), "working set": activations.working_bytes(w)}


def _loss(w: Workload, stage: int) -> dict[str, float]:
    return {"activations": _held(w, stage), "logits": activations.logits_bytes(w)}


def _step(w: Workload, params: float) -> dict[str, float]:
    """DeepSpeed copies a rank's gradient shard to fp32 before stepping; others step in place."""
    if (
        ((w.stack.sharding == "deepspeed" and w.zero >= 1) or (w.stack.sharding == "toolkit" and w.zero >= 2))
        and w.width == 2
        and (not w.stack.main_grads or w.stack.sharding == "toolkit")
        and w.offload_optimizer == "none"
    ):
        return {"working set": 4 * min(params / w.shards, MAX_LIVE if w.zero == 3 else params)}
    return {}
