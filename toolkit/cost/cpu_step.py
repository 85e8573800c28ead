"""Seconds of one optimizer step on processors, from what `toolkit calibrate` has measured of the machine.

A CPU runs one operator after the other: a step is the sum of its multiplies, attention, element-wise passes and messages, each at the
rate measured for its shape, and of the host's own time, in which Python and PyTorch's dispatcher launch them. Ranks of a host share
its cores: no schedule ends before all their work is done by so many cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf, log

from toolkit.cost.spread import Spread
from toolkit.cost.step import PARTS, TimeEstimate
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import Hardware
from toolkit.hardware.cpu import CpuRates, Setting

SHARED = "shared cores"  # the part in which ranks wait for a core
# of tokens a second: what four of five of the configurations of docs/cpu-time.md stay within, in two sessions
SPREAD = Spread(low=-0.16, high=0.08)
MODES = ("zero1", "zero2", "zero3", "gpt", "recompute", "tp", "sp", "pp", "dp1", "dp2", "dp3")


@dataclass
class Work:
    """Seconds of one rank by part; host: those of them in which one core works, whatever the number of threads."""

    parts: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, seconds: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def core_seconds(self, threads: int) -> float:
        """What it takes of all cores together: launches and messages run on one."""
        alone = ("launches", "tensor parallel", "pipeline sends", "data parallel", "zero gathers")
        return sum(s * (1 if part in alone else threads) for part, s in self.parts.items())


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """What one rank of a stage does: micro: forward and backward of a micro-batch; step: the rest, once a step."""

    forward: Work
    backward: Work
    step: Work

    @property
    def micro(self) -> float:
        return self.forward.total + self.backward.total


def cpu_step_time(w: Workload, hardware: Hardware, *, handover_s: float = 0.0) -> TimeEstimate:
    """Time of one optimizer step of a workload on a CPU whose figures hardware.cpu holds.

    handover_s: how far the cores are from each other while it runs; 0.0: as far as not, so the mean of the distances that were
    measured.
    """
    cpu, ranks = _rates(hardware), min(hardware.gpus_per_node, w.world)
    threads = threads_of(hardware, ranks)
    settings = cpu.settings_for(threads=threads, ranks=ranks, precision=w.precision)
    if handover_s:
        settings = (min(settings, key=lambda s: abs(log(s.handover_s / handover_s)) if s.handover_s else inf),)
    each = [_parts(w, cpu, setting, ranks, threads) for setting in settings]
    parts = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
    return TimeEstimate(parts=parts, tokens=float(w.batch * w.seq), world=w.world, spread=SPREAD)


def _parts(w: Workload, cpu: CpuRates, setting: Setting, ranks: int, threads: int) -> dict[str, float]:
    """Seconds of a step by part, at the rates of a setting."""
    stages = [stage_work(w, cpu, setting, stage) for stage in range(w.pp)]
    slowest = max(range(w.pp), key=lambda stage: stages[stage].micro)
    parts = dict.fromkeys((*PARTS, SHARED), 0.0)
    m = w.microbatches
    for work, times in ((stages[slowest].forward, m), (stages[slowest].backward, m), (stages[slowest].step, 1)):
        for name, seconds in work.parts.items():
            parts[name] += times * seconds
    if w.pp > 1:  # 1F1B: the fill and drain of the other stages (arXiv 2104.04473, section 2.2)
        parts["pipeline bubble"] = sum(stage.micro for i, stage in enumerate(stages) if i != slowest) / w.vpp
        parts["pipeline sends"] = (
            2 * w.vpp * (m + (w.pp - 1) / w.vpp) * message(cpu, "send", w.tokens * w.model.hidden * w.width / w.sequence_shards)
        )
    alike = w.tp * w.cp * w.dp * ranks / w.world  # ranks of one host that do the same
    needed = sum(alike * _core_seconds(stage, m, threads) for stage in stages) / cpu.cores
    parts[SHARED] = max(0.0, needed - sum(parts.values()))
    return parts


def _core_seconds(stage: StepParts, microbatches: int, threads: int) -> float:
    passes = stage.forward.core_seconds(threads) + stage.backward.core_seconds(threads)
    return microbatches * passes + stage.step.core_seconds(threads)


def _rates(hardware: Hardware) -> CpuRates:
    assert hardware.cpu is not None, "the caller has checked that the machine was measured"
    return hardware.cpu


def threads_of(hardware: Hardware, ranks: int) -> int:
    """Threads of a rank: those asked for, else as `toolkit train` shares the cores of a host."""
    return hardware.threads or max(1, _rates(hardware).cores // ranks)


def stage_work(w: Workload, cpu: CpuRates, setting: Setting, stage: int) -> StepParts:
    """The work of one rank of a pipeline stage."""
    layers, first, last = w.layers_on(stage), stage == 0, stage == w.pp - 1
    forward, backward = Work(), Work()
    for back, work in ((False, forward), (True, backward)):
        work.add("matmul", layers * _matmuls(w, setting, back))
        work.add("attention", layers * attention(w, setting, back))
        work.add("memory-bound kernels", layers * _passes(w, setting, back))
        work.add("memory-bound kernels", layers * (2 if back else 1) * handed_elements(w) * setting.handed_s)
        work.add("tensor parallel", layers * _tensor_parallel(w, cpu, back))
    if w.recompute == "full":
        backward.add("recompute", forward.total)
    elif w.recompute == "selective":
        backward.add("recompute", forward.parts["attention"])
    if first:
        _embedding(w, setting, forward, backward)
    if last:
        _head(w, cpu, setting, forward, backward)
    _sharding(w, cpu, setting, stage, forward, backward)
    host = host_seconds(w, cpu.host)
    # the forward's share of the host's time is not told apart: both passes belong to the same micro-batch
    forward.add("launches", 0.5 * (host["micro"] / w.pp + layers * host["layer"]))
    backward.add("launches", 0.5 * (host["micro"] / w.pp + layers * host["layer"]))
    return StepParts(forward=forward, backward=backward, step=_step(w, cpu, setting, stage, host["step"]))


def host_seconds(w: Workload, host: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The host's own seconds a step, a micro-batch and a layer of one: the base's, and what each kind of parallelism adds.

    Messages of more than two ranks take as many turns more.
    """
    stage = max(1, w.zero)
    weights = {f"zero{stage}": 1.0}
    weights["gpt"] = 0.0 if w.model.norm == "rms" else 1.0
    weights["recompute"] = 1.0 if w.recompute == "full" else 0.0
    weights["tp"] = 0.0 if w.tp == 1 else w.tp - 1.0
    weights["sp"] = weights["tp"] if w.sp else 0.0
    weights["pp"] = 0.0 if w.pp == 1 else 1.0
    weights[f"dp{stage}"] = 0.0 if w.shards == 1 else w.shards - 1.0
    found = {"step": 0.0, "micro": 0.0, "layer": 0.0}
    for mode, times in weights.items():
        for name, seconds in host.get(mode, {}).items():
            found[name] += times * seconds
    return {name: max(0.0, seconds) for name, seconds in found.items()}


def message(cpu: CpuRates, kind: str, nbytes: float, *, ranks: int = 2, crowd: float = 1.0) -> float:
    """Seconds that the bytes of a message take beside its start, between so many processes of a host.

    Ring: (n-1)/n of the bytes pass each process once or twice, half of them between two. crowd: ranks over cores, where above 1.
    """
    if ranks < 2 or nbytes <= 0 or kind not in cpu.collectives:
        return 0.0
    share = 1.0 if kind == "send" else 2 * (ranks - 1) / ranks
    return share * max(1.0, crowd) * cpu.collectives[kind].beyond_start(nbytes)


def multiply(setting: Setting, way: str, tokens: float, out: float, inner: float) -> float:
    """Seconds of one of the three multiplies of a weight [out, inner]."""
    return 2.0 * tokens * out * inner * setting.multiplies[way].at(tokens, out, inner)


def attention(w: Workload, setting: Setting, back: bool) -> float:
    """Seconds of causal attention of one layer and micro-batch."""
    s, heads = w.model, max(1, w.model.heads // w.tp)
    unit = setting.attention["backward" if back else "forward"].at(w.seq, s.head_dim)
    return unit * w.micro * heads * float(w.seq) ** 2 * s.head_dim / w.cp


def _both(setting: Setting, way: str, back: bool, tokens: float, out: float, inner: float) -> float:
    if not back:
        return multiply(setting, "forward", tokens, out, inner)
    return multiply(setting, "data", tokens, out, inner) + multiply(setting, way, tokens, out, inner)


def _matmuls(w: Workload, setting: Setting, back: bool) -> float:
    return sum(_both(setting, "weight", back, w.tokens, out, inner) for out, inner in _weight_shapes(w))


def handed_elements(w: Workload) -> float:
    """Elements that the multiplies of a layer read and write in the forward pass of a micro-batch, weights aside; backward: twice."""
    return float(w.tokens * sum(out + inner for out, inner in _weight_shapes(w)))


def _weight_shapes(w: Workload) -> tuple[tuple[int, int], ...]:
    s = w.model
    return (
        ((s.query + s.key_value) // w.tp, s.hidden),
        (s.hidden, s.query // w.tp),
        ((2 if s.gated else 1) * s.ffn // w.tp, s.hidden),
        (s.hidden, s.ffn // w.tp),
    )


def piece(setting: Setting, name: str, elements: float, back: bool) -> float:
    """Seconds that so many elements take in a piece of a layer, beside the launch of its operators."""
    return setting.pieces[name][1 if back else 0].beyond_start(elements) if elements > 0 else 0.0


def _passes(w: Workload, setting: Setting, back: bool) -> float:
    """Norms, rotation, activation, residuals and biases of a layer, and the copies between layouts of heads."""
    s, whole, split = w.model, w.tokens / w.sequence_shards, w.tokens / w.tp

    def of(name: str, elements: float, times: int = 1) -> float:
        return times * piece(setting, name, elements, back)

    seconds = of("rms_norm" if s.norm == "rms" else "layer_norm", whole * s.hidden, 2) + of("residual", whole * s.hidden, 2)
    seconds += of("swiglu" if s.gated else "gelu", split * s.ffn)
    if s.rotary:
        seconds += of("rotary", split * s.query) + of("rotary", split * s.key_value / 2)
    if s.qkv_bias:
        seconds += of("bias", split * (s.query + s.key_value))
    if s.proj_bias:
        seconds += of("bias", whole * s.hidden)
    if s.mlp_bias:
        seconds += of("bias", split * s.ffn) + of("bias", whole * s.hidden)
    # heads are laid out anew behind attention, and the gradients of queries, keys and values before it
    copied = split * (s.query + s.key_value) if back else split * s.query
    return seconds + (2 if back else 1) * piece(setting, "copy", copied, False)


def _tensor_parallel(w: Workload, cpu: CpuRates, back: bool) -> float:
    if w.tp == 1:
        return 0.0
    nbytes, crowd = float(w.tokens * w.model.hidden * w.width), _crowd(w, cpu)
    if w.sp:
        gathers = 2 * message(cpu, "all_gather", nbytes, ranks=w.tp, crowd=crowd)
        return gathers * (2 if back else 1) + 2 * message(cpu, "reduce_scatter", nbytes, ranks=w.tp, crowd=crowd)
    return 2 * message(cpu, "all_reduce", nbytes, ranks=w.tp, crowd=crowd)


def _crowd(w: Workload, cpu: CpuRates) -> float:
    return w.world / cpu.cores


def _embedding(w: Workload, setting: Setting, forward: Work, backward: Work) -> None:
    s = w.model
    forward.add("memory-bound kernels", piece(setting, "copy", w.tokens * s.hidden, False))
    # PyTorch's backward makes a whole gradient of zeros, adds the rows, and adds it to the one that is kept
    backward.add("memory-bound kernels", piece(setting, "embedding", s.rows * s.hidden / w.tp, True))


def _head(w: Workload, cpu: CpuRates, setting: Setting, forward: Work, backward: Work) -> None:
    s, rows = w.model, w.model.rows // w.tp
    forward.add("matmul", _both(setting, "weight", False, w.tokens, rows, s.hidden))
    backward.add("matmul", _both(setting, "weight", True, w.tokens, rows, s.hidden))
    norm = "rms_norm" if s.norm == "rms" else "layer_norm"
    for back, work in ((False, forward), (True, backward)):
        logits = piece(setting, "loss", float(w.tokens * rows), back)
        work.add("memory-bound kernels", logits + piece(setting, norm, w.tokens / w.sequence_shards * s.hidden, back))
    if w.loss_chunk:
        backward.add("matmul", multiply(setting, "forward", w.tokens, rows, s.hidden))
    if w.tp > 1:
        backward.add("tensor parallel", message(cpu, "all_reduce", float(w.tokens * s.hidden * w.width), ranks=w.tp, crowd=_crowd(w, cpu)))


@lru_cache(maxsize=4096)
def _weights(w: Workload, stage: int) -> tuple[tuple[float, int], ...]:
    """Elements of this rank's weights of a stage, and how often each is there."""
    s = w.model
    found = [(float(x.count_on(w.tp)), w.layers_on(stage)) for x in s.layer]
    if stage == 0:
        found += [(float(x.count_on(w.tp)), 1) for x in s.before]
    if stage == w.pp - 1 and not (s.tied and w.pp == 1):
        found.append((s.rows * s.hidden / w.tp, 1))
    return tuple(found)


def _sharding(w: Workload, cpu: CpuRates, setting: Setting, stage: int, forward: Work, backward: Work) -> None:
    """ZeRO-2 and 3 within a micro-batch: gradients through DeepSpeed's bucket, and gathered weights."""
    if w.zero < 2:
        return
    weights = _weights(w, stage)
    total = sum(count * times for count, times in weights)
    crowd, n = _crowd(w, cpu), w.shards
    if w.zero == 2:
        # stage_1_and_2.py: each gradient into the bucket, out of it, and added to what is there. The bucket is made anew for each
        # backward, so that the system gives each of its pages when it is first written
        again = (w.microbatches - 1) / w.microbatches
        copies = sum(times * (piece(setting, "copy", x, False) + again * piece(setting, "add", x, False)) for x, times in weights)
        copies += piece(setting, "fresh", total, False)
        backward.add("zero gathers", copies + message(cpu, "all_reduce", total * w.width, ranks=n, crowd=crowd))
        return
    # stage3.py: gradients are laid end to end, divided, reduced, and copied or added to this rank's part
    whole, part = piece(setting, "copy", total, False), piece(setting, "copy", total / n, False)
    laid = piece(setting, "fresh", total, False)  # end to end, in new memory
    backward.add("zero gathers", laid + 2 * whole + 2 * part + message(cpu, "reduce_scatter", total * w.width, ranks=n, crowd=crowd))
    large = sum(count * times for count, times in weights if count > w.persist)
    for work in (forward, backward):
        work.add("zero gathers", message(cpu, "all_gather", large * w.width, ranks=n, crowd=crowd))


def _step(w: Workload, cpu: CpuRates, setting: Setting, stage: int, host: float) -> Work:
    """Gradients to zero, reduced, their norm and clipping, the optimizer's pass, and weights gathered; with the host's own time."""
    work, total = Work(), sum(count * times for count, times in _weights(w, stage))
    mine = total / (w.shards if w.zero else 1)
    work.add("optimizer", piece(setting, "adam", mine, False) + 0.5 * piece(setting, "copy", total, False))
    if w.zero >= 2:
        work.add("optimizer", piece(setting, "copy", mine, False))
    if w.shards > 1 and w.zero < 3:
        crowd, n = _crowd(w, cpu), w.shards
        if w.zero < 2:
            work.add("data parallel", piece(setting, "copy", total, False))  # divided by the ranks
            work.add("data parallel", message(cpu, "all_reduce", 4.0 * total, ranks=n, crowd=crowd))
        if w.zero:
            work.add("data parallel", message(cpu, "all_gather", w.width * total, ranks=n, crowd=crowd))
    work.add("launches", host)
    return work
