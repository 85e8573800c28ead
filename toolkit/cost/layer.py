"""Time of one transformer layer and of the output head, forward and backward, by part."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.cost import kernels, network
from toolkit.cost.constants import VALUES, cached
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import GB, Hardware


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Seconds of one forward or backward pass by what takes them; tp and cp are what compute does not hide."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tp: float = 0.0
    cp: float = 0.0

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.cp

    def __mul__(self, times: float) -> Pass:
        return Pass(
            matmul=self.matmul * times, attention=self.attention * times, memory=self.memory * times, tp=self.tp * times, cp=self.cp * times
        )

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            matmul=self.matmul + other.matmul,
            attention=self.attention + other.attention,
            memory=self.memory + other.memory,
            tp=self.tp + other.tp,
            cp=self.cp + other.cp,
        )


def layer_passes(w: Workload, hardware: Hardware, *, scale: float) -> tuple[Pass, Pass, Pass]:
    """Forward, backward and recomputation of one layer for one micro-batch on one rank; seconds.

    scale: the calibrated share of the GPU's matmul ceiling.
    """
    forward, backward = _layer(_key(w), hardware, scale)
    again = _again(w, forward)
    if w.offload_activations:
        # the layer's input to the host and back, on the stream that computes
        copy = Pass(memory=w.tokens / w.sequence_shards * w.width * w.model.hidden / (hardware.gpu.host_gb_s * GB))
        return forward + copy, backward, again + copy
    return forward, backward, again


@dataclass(frozen=True)
class _Key:
    """What a layer's time depends on; layouts that share it share the answer."""

    w: Workload

    def _facts(self) -> tuple[object, ...]:
        w = self.w
        return (
            w.model,
            w.seq,
            w.micro,
            w.tp,
            w.cp,
            w.sp,
            w.precision,
            w.flash,
            w.kernel,
            w.cp > 1 and w.exchange,
            w.overlap,
            w.stack,
            w.zero < 2,
            w.microbatches == 1,
            w.deterministic,
            w.fused_accumulation,
        )

    def __hash__(self) -> int:
        return hash(self._facts())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._facts() == other._facts()


def _key(w: Workload) -> _Key:
    return _Key(w)


@cached(maxsize=16384)
def _layer(key: _Key, hardware: Hardware, scale: float) -> tuple[Pass, Pass]:
    w = key.w
    forward = Pass(
        matmul=_matmuls(w, hardware, scale, backward=False),
        attention=_attention(w, hardware, scale, backward=False),
        memory=_passes(w, hardware, backward=False),
        tp=_tensor_parallel(w, hardware, backward=False),
        cp=0.0,
    )
    backward = Pass(
        matmul=_matmuls(w, hardware, scale, backward=True),
        attention=_attention(w, hardware, scale, backward=True),
        memory=_passes(w, hardware, backward=True),
        tp=_tensor_parallel(w, hardware, backward=True),
        cp=0.0,
    )
    forward += Pass(cp=_context_parallel(w, hardware, forward.attention, backward=False))
    backward += Pass(cp=_context_parallel(w, hardware, backward.attention, backward=True))
    return forward, backward


def _again(w: Workload, forward: Pass) -> Pass:
    """What the backward computes a second time (arXiv 2205.05198; torchtitan's selective modes keep every second multiply or layer)."""
    if w.recompute == "full":
        return forward
    if w.recompute == "alternate":
        return forward * 0.5
    if w.recompute == "selective":
        return Pass(attention=forward.attention, cp=forward.cp)
    if w.recompute == "half":
        return Pass(matmul=forward.matmul * 0.5, memory=forward.memory, tp=forward.tp * 0.5)
    return Pass()


def _matmuls(w: Workload, hardware: Hardware, scale: float, *, backward: bool) -> float:
    """The four weight multiplies of a layer; backward: input and weight gradient of each."""
    s, t = w.model, w.tokens
    seconds = 0.0
    for out, inner in (
        ((s.query + s.key_value) // w.tp, s.hidden),
        (s.hidden, s.query // w.tp),
        ((2 if s.gated else 1) * s.ffn // w.tp, s.hidden),
        (s.hidden, s.ffn // w.tp),
    ):
        seconds += weight_multiply(w, hardware, t, out, inner, scale, backward=backward)
    return seconds


# operators of a layer that Python launches one by one, forward: multiplies, attention, norms, residuals and views as autograd sees
# them in megatron-core with fused kernels; chains add those of _passes. The backward is launched from C++, two for each at half the cost
OPERATORS = 40


def host_time(w: Workload) -> float:
    """Seconds the host needs to launch one layer's forward; its backward takes about as long. A GPU that is faster waits for it.

    Where launches block, each has a wait for its kernel's end too, in which the GPU does nothing.
    """
    if w.stack.graphed:
        return 0.0
    s, operators = w.model, OPERATORS
    operators += 10 if s.gated and not w.stack.gate_fused else 0
    operators += 10 if s.norm == "rms" and not w.stack.norm_fused else 0
    operators += 0 if w.stack.elementwise_fused else 8
    operators += 12 if w.tp > 1 else 0  # each collective: its autograd function, buffers and waits
    return operators * (VALUES.operator_host + (VALUES.launch_wait if w.stack.blocking_launches else 0.0))


def weight_multiply(w: Workload, hardware: Hardware, tokens: int, out: int, inner: int, scale: float, *, backward: bool) -> float:
    """Seconds of Y[tokens, out] = X[tokens, inner] W, or of both of its gradients."""
    gpu, p = hardware.gpu, w.precision
    if not backward:
        return kernels.matmul_time(tokens, out, inner, gpu=gpu, precision=p, scale=scale)
    data = kernels.matmul_time(tokens, inner, out, gpu=gpu, precision=p, scale=scale)
    fused = w.stack.main_grads > 0 and w.stack.gemm_accumulates and w.zero < 2 and w.fused_accumulation
    weight = kernels.matmul_time(out, inner, tokens, gpu=gpu, precision=p, scale=scale, kept=w.stack.main_grads if fused else 0.0)
    added = 0.0 if fused or w.microbatches == 1 or w.zero >= 2 else 6.0 * out * inner  # read both, write the sum
    if w.stack.main_grads and w.zero < 2 and not fused:
        added = 10.0 * out * inner  # read autograd's 16-bit one, read and write the fp32 sum
    return data + weight + kernels.stream_time(added, gpu=gpu, kernels=1 if added else 0)


def _attention(w: Workload, hardware: Hardware, scale: float, *, backward: bool) -> float:
    s = w.model
    if w.flash:
        kernel = w.kernel or w.stack.kernel
        if w.deterministic and kernel == "cudnn":  # its deterministic backward is missing or slow on most GPUs: flash-attn runs instead
            kernel = "flash2"
        slower = 1.5 if w.deterministic and backward else 1.0  # a second pass sums what atomics would
        return slower * kernels.flash_time(
            gpu=hardware.gpu,
            precision=w.precision,
            kernel=kernel,
            batch=w.micro,
            seq=w.seq,
            heads=s.heads / w.tp,
            head_dim=s.head_dim,
            backward=backward,
            parts=w.cp,
        )
    return kernels.unfused_time(
        gpu=hardware.gpu,
        precision=w.precision,
        batch=w.micro,
        seq=w.seq,
        heads=max(1, s.heads // w.tp),
        head_dim=s.head_dim,
        backward=backward,
        scale=scale,
        fused_softmax=w.stack.softmax_fused,
    )


def _passes(w: Workload, hardware: Hardware, *, backward: bool) -> float:
    """Memory-bound kernels of a layer: bytes each reads and writes, fused or as the chain of operators PyTorch runs.

    Fused, in units of 2-byte elements a token: each norm 2h, each residual add 3h, rotation 2(q + kv/2), the activation
    3f (gated) or 2f; the backward reads about half as much again. Chains: an RMSNorm in fp32 is six kernels of 17h, rotation
    four, a gated activation 5f.
    """
    s, b = w.model, w.width
    whole, split = w.tokens / w.sequence_shards, w.tokens / w.tp
    rotated = s.query + s.key_value / 2
    chain = s.gated and not w.stack.gate_fused
    per_whole: float = 6 * s.hidden + (2 * 17 if s.norm == "rms" and not w.stack.norm_fused else 4) * s.hidden
    per_split = (0 if not s.rotary else (8 if chain else 2) * rotated) + ((5 if chain else 3) if s.gated else 2) * s.ffn
    count = 8 + (10 if chain else 0) + (10 if s.norm == "rms" and not w.stack.norm_fused else 0)
    if s.dropout:
        per_whole += 2 * 1.5 * s.hidden
    factor = w.stack.passes * (1.5 if backward else 1.0)
    return kernels.stream_time(factor * b * (whole * per_whole + split * per_split), gpu=hardware.gpu, kernels=count)


def _tensor_parallel(w: Workload, hardware: Hardware, *, backward: bool) -> float:
    """Exposed tensor-parallel traffic: two all-reduces of the residual stream a pass (arXiv 1909.08053, section 3), with
    sequence parallelism two pairs of gather and reduce-scatter (arXiv 2205.05198, section 4.2.2) and two gathers more in
    the backward, for the inputs of weight gradients, which run beside the data gradients."""
    if w.tp == 1:
        return 0.0
    over = network.group(hardware, size=w.tp, stride=1)
    nbytes = float(w.tokens * w.model.hidden * w.width)
    hidden = w.stack.tp_hidden if w.overlap else 0.0
    if w.sp:
        seconds = (2 if w.stack.parallel_block else 4) * network.gather_time(nbytes, over=over)
        if backward and not w.overlap:
            seconds += 2 * network.gather_time(nbytes, over=over)
    else:
        reductions = 1 if w.stack.parallel_block else 3 if backward and w.model.gated and w.stack.gate_reduces else 2
        seconds = reductions * network.reduce_time(nbytes, over=over)
    return seconds * (1 - hidden)


def _context_parallel(w: Workload, hardware: Hardware, attention: float, *, backward: bool) -> float:
    """Exposed context-parallel traffic: cp - 1 exchanges of a key/value block beside the attention of the block before
    (arXiv 2310.01889), four all-to-alls of queries, keys, values and outputs (arXiv 2309.14509), or all keys and values gathered,
    and their gradients reduced (arXiv 2407.21783, section 3.3.2)."""
    if w.cp == 1:
        return 0.0
    s = w.model
    over = network.group(hardware, size=w.cp, stride=w.tp)
    rows = w.tokens * w.width / w.tp
    if w.exchange == "allgather":
        return network.gather_time(rows * w.cp * s.key_value, over=over)
    if w.exchange == "ulysses":
        seconds = network.exchange_time(rows * (s.query + s.key_value), over=over) + network.exchange_time(rows * s.query, over=over)
        return seconds
    step = network.send_time(rows * s.key_value * (2 if backward else 1), hardware=hardware, distance=w.tp * (w.cp - 1))
    each = attention / w.cp
    return (w.cp - 1) * max(0.0, step - (each if w.overlap else 0.0)) + step * 0.1


def head_passes(w: Workload, hardware: Hardware, *, scale: float) -> tuple[Pass, Pass]:
    """Output multiply and cross-entropy over the (padded, TP-split) vocabulary; seconds forward and backward."""
    s = w.model
    rows = s.rows // w.tp
    matmul = [weight_multiply(w, hardware, w.tokens, rows, s.hidden, scale, backward=b) for b in (False, True)]
    if w.loss_chunk:
        matmul[1] += matmul[0]  # the logits of each piece once more
    bytes_each = w.tokens * (s.rows if w.stack.whole_logits else rows) * w.stack.loss_passes
    loss = [kernels.stream_time(bytes_each * part, gpu=hardware.gpu, kernels=6) for part in (0.6, 0.4)]
    tp = logits = 0.0
    if w.tp > 1:
        over = network.group(hardware, size=w.tp, stride=1)
        reduce = network.gather_time if w.sp else network.reduce_time
        tp = reduce(float(w.tokens * s.hidden * w.width), over=over)
        if w.stack.whole_logits:
            logits = network.gather_time(float(w.tokens * s.rows * w.width), over=over)
    return Pass(matmul=matmul[0], memory=loss[0], tp=(tp if w.sp else 0.0) + logits), Pass(matmul=matmul[1], memory=loss[1], tp=tp)


def embedding_passes(w: Workload, hardware: Hardware) -> tuple[Pass, Pass]:
    """Reading embedding rows, and adding their gradients; seconds forward and backward."""
    nbytes = w.tokens * w.model.hidden * w.width
    return Pass(memory=kernels.stream_time(2 * nbytes, gpu=hardware.gpu)), Pass(
        memory=kernels.stream_time(4 * nbytes, gpu=hardware.gpu, kernels=2)
    )
