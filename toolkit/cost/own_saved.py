"""What this project's own engine keeps for backwards, tensor by tensor: of a layer, of a chunk, of a stage at its fullest."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log2

from toolkit.cost.workload import Workload
from toolkit.parallel.exchange import sent_heads
from toolkit.parallel.order import order, warmup


def layer_saved(w: Workload, *, cpu: bool) -> float:
    """Bytes one layer keeps for the backward of one micro-batch: the tensors that PyTorch's autograd saves, one by one.

    Norms keep their input and statistics (see norm_saved) and their output, the next multiply's input. Values are views of the whole
    query-key-value product, which therefore stays; queries are a copy of their part where several share a key. RoPE adds rotated queries
    and keys and four tables. Attention keeps its output and log-sum-exp; a gated MLP the gate's halves, their activation, the copy that
    megatron-core's `+ glu_linear_offset` makes, and the product. Selective recompute keeps attention's inputs and output only, full
    the layer's input.
    """
    s, b, t = w.model, w.width, w.tokens
    whole, split = t / w.sequence_shards, t / w.tp
    if w.recompute == "full":
        return 0.0 if w.offload_activations and not cpu else whole * b * s.hidden
    norms = 2 * whole * (norm_saved(w, s.hidden, cpu=cpu) + b * s.hidden)
    copied = b * s.query if s.groups < s.heads and s.groups > w.tp else 0.0  # one group's queries lie together: a view
    if not cpu and b == 4 and s.groups < s.heads:
        # in fp32 a GPU's attention keeps keys and values expanded to every head, and the product only where a norm needs it
        attention = 3.0 * b * s.query + (b * (s.query + s.key_value) if s.qk_norm else 0.0)
    else:
        attention = b * (s.query + s.key_value) + (0.0 if s.rotary or s.qk_norm else copied)
        if s.rotary or s.qk_norm:
            attention += b * (s.query + s.key_value / 2)
    if w.cp > 1 and w.recompute == "none":
        attention = b * _exchanged(w) + (b * (s.query + s.key_value) if s.qk_norm or w.exchange == "ring" else 0.0)
    if s.qk_norm:
        kept_in_16_bits = cpu and s.norm == "rms" and b < 4  # upcast copies instead of the input
        each = norm_saved(w, s.head_dim, cpu=cpu) - (0 if kept_in_16_bits else b * s.head_dim)
        attention += (s.heads + s.groups) * each + (0.0 if kept_in_16_bits else copied)
    attention += b * s.query + (0 if w.recompute == "selective" else 4 * s.heads)
    tables = 4 * w.seq / w.cp * s.head_dim * b * (w.micro if w.documents else 1) if s.rotary else 0
    mlp = b * s.ffn * (5 if s.gated else 2)
    dropout = 2 * whole * s.hidden if s.dropout else 0
    return norms + split * (attention + mlp) + tables + dropout


def _exchanged(w: Workload) -> float:
    """Elements for one token that attention keeps of queries, keys and values after an exchange between context-parallel ranks.

    Gathered keys and values are those of the whole sequence. Under Ulysses a rank has the whole sequence of its heads, keys and
    values once for each rank that shares them, and the result twice: before and after it goes back.
    """
    s = w.model
    if w.exchange == "ring":
        return 2 * s.query + s.key_value / 2  # and the result in two orders; values are views of the product
    if w.exchange == "allgather":
        return s.query + s.key_value * w.cp
    heads, groups = s.heads // w.tp, s.groups // w.tp
    copies = len(sent_heads(heads=heads, groups=groups, cp=w.cp)[0]) * w.cp / groups
    return 2 * s.query + s.key_value * copies


def norm_saved(w: Workload, width: int, *, cpu: bool) -> float:
    """Bytes a norm of so many values keeps for one row: its input and statistics.

    On a CPU, PyTorch's RMSNorm runs as single operations in fp32 and keeps the upcast input and the normalised one; LayerNorm keeps mean
    and deviation in the input's precision. On a GPU both are one kernel with fp32 statistics.
    """
    if w.model.norm == "rms":
        return 8 * width + 4 if cpu else w.width * width + 4
    return w.width * width + 2 * (w.width if cpu else 4)


def saved_by_chunk(w: Workload, stage: int, *, cpu: bool) -> list[float]:
    """Bytes that each model chunk of a stage keeps of one micro-batch."""
    layer = layer_saved(w, cpu=cpu)
    each = [w.layers_in(stage, chunk) * layer for chunk in range(w.vpp)]
    if stage == 0:
        each[0] += w.tokens * (8 + (1 if w.tp > 1 else 0))  # token ids, and which of them are this rank's
        each[0] += 8 * w.tokens if w.model.positions and _own_positions(w) else 0
    if stage == w.pp - 1:
        each[-1] += final_norm(w, cpu=cpu)
    if w.recompute == "full" and w.model.rotary and _own_positions(w):
        angles = 4 * w.seq / w.cp * w.model.head_dim * (w.micro if w.documents else 1)
        each = [e + angles for e in each]
    return each


def final_norm(w: Workload, *, cpu: bool) -> float:
    """Bytes that the norm after the last layer keeps on the device."""
    return 0.0 if w.offload_activations and not cpu else w.tokens / w.sequence_shards * norm_saved(w, w.model.hidden, cpu=cpu)


def host_saved(w: Workload, stage: int) -> float:
    """Bytes of page-locked memory that a rank of a stage keeps inputs of layers in, each a power of two (see toolkit.rehearse.host)."""
    if not w.offload_activations:
        return 0.0
    layer = 2.0 ** ceil(log2(w.tokens / w.sequence_shards * w.width * w.model.hidden))
    return _fullest(w, stage, [w.layers_in(stage, chunk) * layer for chunk in range(w.vpp)], 0.0)[0]


def _own_positions(w: Workload) -> bool:
    """Whether each micro-batch brings positions of its own; else all share the same tensor."""
    return w.documents or w.cp > 1


def stage_saved(w: Workload, stage: int, *, cpu: bool) -> dict[str, float]:
    """Bytes a stage keeps for backwards at its fullest moment: activations of all micro-batches in flight, and the logits of one."""
    s, b, t = w.model, w.width, w.tokens
    each = saved_by_chunk(w, stage, cpu=cpu)
    once = logits = 0.0
    if stage == 0:
        once += 8 * w.seq if s.positions and not _own_positions(w) else 0  # positions, the same tensor for every micro-batch
    if stage == w.pp - 1:
        whole = t / w.sequence_shards
        logits = whole * b * s.hidden + t * (4 * s.rows / w.tp + 9)  # the output layer's input, fp32 softmax, targets and their mask
        if w.loss_chunk:
            logits = whole * b * s.hidden + t * 12  # its input, targets, and the log-sum-exp
        logits += 4 * t if w.documents else 0  # what each token weighs
    if w.recompute == "full" and s.rotary and not _own_positions(w):
        once += 4 * w.seq * s.head_dim * w.vpp  # RoPE's angles, of which megatron-core makes one tensor for all of a chunk's layers
    held, logits = _fullest(w, stage, each, logits)
    return {"activations": held + once, "logits": logits}


def kept_by_first(w: Workload, *, cpu: bool) -> float:
    """Bytes of activations in the first stage's fullest backward."""
    kept = stage_saved(w, 0, cpu=cpu)["activations"]
    return kept - final_norm(w, cpu=cpu) if w.pp == 1 else kept


def _fullest(w: Workload, stage: int, each: list[float], logits: float) -> tuple[float, float]:
    """Activations and logits when their sum is largest; each: bytes a chunk keeps of one micro-batch."""
    if len({w.layers_in(stage, chunk) for chunk in range(w.vpp)}) == 1:
        # the end of the first forward that a backward follows: each chunk holds the micro-batches begun so far
        ahead = min(warmup(stage=stage, pp=w.pp, vpp=w.vpp, microbatches=w.microbatches) + 1, w.microbatches * w.vpp)
        rounds, within = divmod(ahead, w.pp * w.vpp)
        begun = [rounds * w.pp + min(max(within - chunk * w.pp, 0), w.pp) for chunk in range(w.vpp)] if w.vpp > 1 else [ahead]
        return sum(n * size for n, size in zip(begun, each, strict=True)), logits
    # chunks that differ take turns in being held: all moments until they recur
    now, best = 0.0, (0.0, 0.0)
    for forward, chunk in turns(stage, w.pp, w.vpp, min(w.microbatches, 3 * w.pp)):
        now += each[chunk] if forward else -each[chunk]
        there = logits if stage == w.pp - 1 and forward and chunk == w.vpp - 1 else 0.0
        if now + there > best[0] + best[1]:
            best = now, there
    return best


@lru_cache(maxsize=32)
def turns(stage: int, pp: int, vpp: int, microbatches: int) -> tuple[tuple[bool, int], ...]:
    """Whether each pass of a step is a forward, and its chunk."""
    turns = {(forward, chunk): (forward, chunk) for forward in (False, True) for chunk in range(vpp)}  # each kept once
    passes = order(stage=stage, pp=pp, vpp=vpp, microbatches=microbatches)
    return tuple(turns[work.kind == "forward", work.chunk] for work in passes)
