"""Memory and time of a generation: weights and keys and values of every stage's ranks, and seconds a token from bandwidth.

way = Generation(model=spec, tp=2, batch=8, context=4096, weights="int8")
memory, time = generation_memory(way, hardware), token_time(way, hardware)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolkit.arch.spec import ModelSpec, WeightSpec
from toolkit.cost.constants import VALUES
from toolkit.cost.kernels import stream_time
from toolkit.cost.memory import GIB, HOST_SHARE
from toolkit.cost.network import gather_time, group, reduce_time, send_time
from toolkit.hardware.catalogue import GB, Hardware
from toolkit.parallel.generation import int4_group, linear_columns
from toolkit.parallel.layout import Layout

OPERATORS = 26  # that PyTorch dispatches for one layer of Llama and one new token in toolkit/model/forward.py, views left out
LIBRARIES = 0.3 * GIB  # resident memory of a CPU rank that has imported PyTorch and megatron-core, before its model
SLOTS = 2  # layers that a streaming rank holds: the one it computes, and the one that is coming


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A model, how it is cut, and what it is asked. batch: texts that each copy computes at once; context: tokens of prompt and
    answer together; prompt: those of the prompt. weights, kv, offload: as the options of toolkit generate. layers_per_stage: of each
    stage, () for an even cut.
    """

    model: ModelSpec
    tp: int = 1
    pp: int = 1
    dp: int = 1
    precision: str = "bf16"
    batch: int = 1
    context: int = 2048
    prompt: int = 1024
    weights: str = "none"
    kv: str = "none"
    offload: str = "none"
    layers_per_stage: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 4 if self.precision == "fp32" else 2

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def layers_on(self, stage: int) -> int:
        return len(Layout(tp=self.tp, pp=self.pp, layers_per_stage=self.layers_per_stage).layers_of(self.model.layers, stage=stage))

    def ends_on(self, stage: int) -> list[WeightSpec]:
        """Weights of a stage outside its layers; the last stage has a copy of a tied embedding that the first one holds too."""
        m, last = self.model, self.pp - 1
        found = list(m.before) if stage == 0 else []
        if stage == last:
            found += [*m.after, *([m.before[0]] if m.tied and last else [])]
        return found


def weight_bytes(weight: WeightSpec, way: Generation) -> float:
    """Bytes that a rank keeps a weight in.

    torchao's int8 has an fp32 scale and a zero point of a byte for each row; its int4 has a scale and a zero for each group of columns.
    """
    count = weight.count_on(way.tp)
    rows = weight.cut.part(weight.shape, way.tp)[0]
    table = weight.group == "embedding" and "position" not in weight.name
    if way.weights == "none" or (weight.group != "matrix" and not table):
        return count * way.width
    if way.weights == "int4" and not table:
        width = int4_group(linear_columns(way.model, tp=way.tp))
        assert width is not None, "the rules refuse it"
        return count / 2 + count / width * 2 * way.width
    return count + 5.0 * rows


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """What a rank of a stage holds, in bytes. model: all its weights; weights: those in memory at once; cache: keys and values;
    buffers: activations of the prompt, logits, and a weight on its way to other bits; process: driver or libraries; elsewhere: what
    is in the node's RAM beside it.
    """

    stage: int
    layers: int
    model: float
    weights: float
    cache: float
    buffers: float
    process: float
    elsewhere: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.buffers + self.process


@dataclass(frozen=True, kw_only=True)
class GenerationMemory:
    """Every stage's rank; capacity: bytes of a device; room: of a node's RAM for what is kept there, and host: what is."""

    stages: tuple[StageBytes, ...]
    capacity: float
    host: float
    room: float

    @property
    def worst(self) -> StageBytes:
        return max(self.stages, key=lambda s: s.total)

    @property
    def fits(self) -> bool:
        return self.worst.total <= self.capacity and self.host <= self.room


def cache_bytes(way: Generation, *, layers: int) -> float:
    """Bytes of keys and values of so many layers on a rank: one scale for each token of a head beside int8."""
    m = way.model
    numbers = layers * way.batch * way.context * m.key_value / way.tp
    if way.kv == "int8":
        return numbers * (1 + way.width / m.head_dim)
    return numbers * way.width


def capacity_of(hardware: Hardware) -> float:
    """Bytes of one rank; CPU ranks share a node's RAM."""
    gpu = hardware.gpu
    return gpu.memory_gib * GIB if gpu.accelerator else min(gpu.memory_gib, HOST_SHARE * gpu.host_gib / hardware.gpus_per_node) * GIB


def generation_memory(way: Generation, hardware: Hardware) -> GenerationMemory:
    """Memory of a rank of each stage; the layout must be legal."""
    m, accelerator = way.model, hardware.gpu.accelerator
    one_layer = sum(weight_bytes(w, way) for w in m.layer)
    stages = []
    for stage in range(way.pp):
        layers = way.layers_on(stage)
        ends = sum(weight_bytes(w, way) for w in way.ends_on(stage))
        whole = ends + layers * one_layer
        streamed = way.offload != "none"
        cache = cache_bytes(way, layers=layers)
        stages.append(
            StageBytes(
                stage=stage,
                layers=layers,
                model=whole,
                weights=ends + min(SLOTS, layers) * one_layer if streamed else whole,
                cache=cache if way.kv != "cpu" else cache / max(1, layers) * SLOTS,
                buffers=_buffers(way, last=stage == way.pp - 1),
                process=VALUES.context + VALUES.communicator * ((way.tp > 1) + (way.pp > 1)) if accelerator else LIBRARIES,
                elsewhere=(layers * one_layer if way.offload == "cpu" else 0.0) + (cache if way.kv == "cpu" else 0.0),
            )
        )
    on_a_node = min(way.world, hardware.gpus_per_node)
    host = max(s.elsewhere for s in stages) * on_a_node
    return GenerationMemory(stages=tuple(stages), capacity=capacity_of(hardware), host=host, room=HOST_SHARE * hardware.gpu.host_gib * GIB)


def layers_held(way: Generation, *, stage: int, room: float) -> int:
    """Layers that fit into so many bytes of a stage's rank, beside its embedding or output, keys and values, and what comes and goes.

    While it is read, the model is as large as it is without int8 or int4, and one weight is there twice.
    """
    plain = replace(way, weights="none")
    m = way.model
    one = sum(weight_bytes(w, plain) for w in m.layer) + cache_bytes(way, layers=1)
    largest = max(w.count_on(way.tp) for w in (*m.layer, *way.ends_on(stage))) * way.width
    left = room - sum(weight_bytes(w, plain) for w in way.ends_on(stage)) - _buffers(plain, last=stage == way.pp - 1) - largest
    return max(0, int(left // one))


def _buffers(way: Generation, *, last: bool) -> float:
    """The most that comes and goes: the prompt's activations inside an MLP or an attention, then logits; and one weight made larger again."""
    m, w = way.model, way.width
    tokens = way.batch * way.prompt
    inner = max((3 if m.gated else 2) * m.ffn, 3 * m.query + 2 * m.key_value) / way.tp
    activations = tokens * w * (3 * m.hidden + inner)
    logits = way.batch * m.rows * (w + 4.0) if last else 0.0
    largest = max(x.count_on(way.tp) for x in (*m.layer, *m.before)) * w if way.weights != "none" else 0.0
    return max(activations, logits) + largest


@dataclass(frozen=True, kw_only=True)
class TokenTime:
    """Seconds of one token for every text of a batch, by part; first: seconds of a prompt. Tokens a second are of all copies."""

    parts: dict[str, float]
    first: float
    batch: int
    copies: int

    @property
    def token(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        return self.batch * self.copies / self.token


def token_time(way: Generation, hardware: Hardware) -> TokenTime:
    """Seconds of a token when the context is full: each weight is read once, and so are all keys and values.

    Stages work one after the other. Where PyTorch cannot start a layer's operators as fast as the device would end them, starting
    them is what takes the time.
    """
    m = way.model
    if not hardware.gpu.accelerator:  # ranks on one node share its memory's bandwidth
        shared = hardware.gpu.host_gb_s / min(way.world, hardware.gpus_per_node)
        hardware = replace(hardware, gpu=replace(hardware.gpu, memory_gb_s=shared))
    gpu = hardware.gpu
    parts = dict.fromkeys(("weights", "keys and values", "starting operators", "offload", "tensor parallel", "pipeline"), 0.0)
    tensor = group(hardware, size=way.tp, stride=1)
    one_layer = sum(weight_bytes(w, way) for w in m.layer)
    message = way.batch * m.hidden * way.width
    first = 0.0
    for stage in range(way.pp):
        layers, last = way.layers_on(stage), stage == way.pp - 1
        output = weight_bytes(m.before[0], way) if last else 0.0
        weights = stream_time(layers * one_layer + output, gpu=gpu)
        cached = cache_bytes(way, layers=layers)
        keys = stream_time(cached, gpu=gpu)
        starting = max(0.0, (layers * OPERATORS + 4) * VALUES.operator_host - weights - keys)
        moved = _move_time(layers * one_layer, way.offload, hardware) + (_move_time(cached, "cpu", hardware) if way.kv == "cpu" else 0.0)
        parts["weights"] += weights
        parts["keys and values"] += keys
        parts["starting operators"] += starting
        hidden = weights + keys + starting  # transfers run beside it
        parts["offload"] += max(0.0, moved - hidden)
        passes = 2 * layers + (stage == 0)
        parts["tensor parallel"] += passes * reduce_time(message, over=tensor)
        if last:
            parts["tensor parallel"] += gather_time(way.batch * m.rows * way.width, over=tensor)
        else:
            parts["pipeline"] += send_time(message, hardware=hardware, distance=way.tp)
        matrices = layers * sum(w.count_on(way.tp) for w in m.layer if w.group == "matrix")
        tokens = way.batch * way.prompt
        compute = 2 * tokens * (matrices + layers * way.prompt * m.query / way.tp) / (gpu.peak(way.precision) * gpu.matmul)
        first += max(compute, weights, moved) + passes * reduce_time(message * way.prompt, over=tensor)
        first += send_time(message * way.prompt, hardware=hardware, distance=way.tp) if not last else 0.0
    return TokenTime(parts=parts, first=first, batch=way.batch, copies=way.dp)


def _move_time(nbytes: float, place: str, hardware: Hardware) -> float:
    """Seconds in which a rank's bytes come from the CPU's memory or from disk; all ranks of a node share the disk."""
    if place == "cpu":
        return nbytes / (hardware.gpu.pcie_gb_s * VALUES.pcie_share * GB)
    if place == "disk":
        return nbytes * hardware.gpus_per_node / VALUES.nvme
    return 0.0
