"""What this project's own engine holds on one rank, counted weight by weight: it is ours, so nothing need be approximated.

Other frameworks are estimated per weight in toolkit.cost.memory; here padding, replicated norms, tied copies and DeepSpeed's
buffers are counted too. tests/cost/test_own_engine_runs.py holds the figures to what live engines hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil, log2

from toolkit.cost.gathers import gathered, gathers, largest_cut, prefetched
from toolkit.cost.rank_weights import RankWeight, edge_weights, layer_weights
from toolkit.cost.reductions import LAST_BUCKET, reductions
from toolkit.cost.workload import Workload
from toolkit.parallel.exchange import sent_heads
from toolkit.parallel.order import order, warmup

ALIGN = 2  # DeepSpeed pads each optimizer group of ZeRO-0/1/2 to this many elements per data-parallel rank


def states(w: Workload, stage: int, *, dp_rank: int = 0) -> dict[str, float]:
    """Bytes of parameters, gradients, optimizer states and ZeRO buffers of a rank of a stage, wherever they live.

    ZeRO-0/1: flat weights, flat fp32 gradients, the optimizer's states, and in 16 bits an fp32 master (in fp32 the weights are it).
    ZeRO-2 and 3 clone the master also in fp32. ZeRO-3 pads every weight to its data-parallel ranks, and keeps whole those of at most
    stage3_param_persistence_threshold elements (DeepSpeed's configuration reference).
    """
    layers, each = w.layers_on(stage), layer_weights(w)
    edges = [x for side in edge_weights(w, stage) for x in side]
    if w.zero == 3:
        return _sharded(w, [(x, layers) for x in each] + [(x, 1) for x in edges])
    buckets = w.bucket * w.width * (2 if w.zero == 2 and w.overlap_comm else 1)
    b, cut, offloaded = w.width, w.shards if w.zero else 1, w.offload_optimizer != "none"
    parts_of = shares(w, stage)
    flat = cut * sum(parts_of)
    cloned = b < 4 or w.zero == 2 or offloaded
    parts = {
        "parameters": b * flat,
        "gradients": 4 * flat if w.zero < 2 else 4 * flat / cut,
        "optimizer": kept(w, parts_of, master=4 if cloned else 0),
        "zero buffers": buckets if w.zero == 2 else 0.0,
    }
    if offloaded:  # the optimizer's own gradients, beside those that backwards add to
        added = b * flat if w.zero < 2 else 4 * (flat / cut if b < 4 else sum(touched(w, stage, parts_of, dp_rank)))
        parts["gradients"] = 4 * flat / cut + added
        parts["zero buffers"] = buckets + 2 * b * max(x.count for x in each + edges) + b * flat / cut
    elif w.zero == 2 and b == 4:
        by_chunk = _touched(w, stage, parts_of, dp_rank)
        # with VPP the last chunk allocates gradient buffers for all chunks, plus zeros for the others
        parts["gradients"] = 4 * (sum(by_chunk) + (sum(by_chunk[:-1]) if by_chunk[-1] else 0))
    return {name: float(value) for name, value in parts.items()}


def shares(w: Workload, stage: int) -> list[int]:
    """Elements that one data-parallel rank has of each optimizer group, below ZeRO-3: equal parts of the padded whole."""
    every = [(x, w.layers_on(stage)) for x in layer_weights(w)] + [(x, 1) for side in edge_weights(w, stage) for x in side]
    cut = w.shards if w.zero else 1
    sizes = [sum(x.count * copies for x, copies in every if x.group == g) for g in range(len(w.optimizer.groups))]
    return [ceil(n / (ALIGN * cut)) * ALIGN for n in sizes]


def kept(w: Workload, sizes: Sequence[float], *, master: int) -> float:
    """Bytes of what the optimizer keeps for so many elements of each of its groups; master: of an fp32 copy of the weights, each.

    DeepSpeed's Adam for the CPU counts its steps in Python, torch's in a tensor for each group.
    """
    total = 0.0
    for group, size in zip(w.optimizer.groups, sizes, strict=True):
        counts = group.rule.counts and w.offload_optimizer == "none" and size > 0
        total += (master + group.rule.state_bytes) * size + (4 if counts else 0)
    return total


def on_host(w: Workload, stage: int, *, dp_rank: int = 0) -> dict[str, float]:
    """What of states() lies in host memory beside a GPU, by part: what DeepSpeed allocates on "cpu" when it offloads.

    ZeRO-1 and 2: master weights with their gradients and moments, the weights as they come back from the step, and a buffer of the
    largest gradient. What backwards add up stays on the GPU: ZeRO-1 keeps all gradients as computed, ZeRO-2 in 16 bits its own share
    in fp32 (stage_1_and_2.py, _use_compact_grad_partition_buffer); in fp32 ZeRO-2 adds in host memory. ZeRO-3: masters, moments and
    both gradients; offloaded parameters leave those on the GPU that are small enough to be kept whole.
    """
    whole = states(w, stage, dp_rank=dp_rank)
    gone = dict.fromkeys(whole, 0.0)
    if w.offload_optimizer != "none":
        gone["optimizer"], gone["gradients"] = whole["optimizer"], whole["gradients"]
        if w.zero < 3:
            each = layer_weights(w) + [x for side in edge_weights(w, stage) for x in side]
            flat, b = whole["parameters"] / w.width, w.width
            gone["gradients"] -= b * flat if w.zero < 2 else 4 * flat / w.shards if b < 4 else 0.0
            gone["zero buffers"] = b * max(x.count for x in each) + b * flat / w.shards
    if w.offload_param != "none":
        gone["parameters"] = whole["parameters"] - w.width * _kept_whole(w, stage)
    return gone


def on_device(w: Workload, stage: int, *, cpu: bool, dp_rank: int = 0) -> dict[str, float]:
    """What of states() counts for the device; cpu: the device is one, so that nothing leaves it."""
    found = states(w, stage, dp_rank=dp_rank)
    gone = {} if cpu else on_host(w, stage, dp_rank=dp_rank)
    return {part: nbytes - gone.get(part, 0.0) for part, nbytes in found.items()}


def _kept_whole(w: Workload, stage: int) -> int:
    """Elements of the weights that ZeRO-3 does not cut, each counted whole; without data-parallel ranks nothing is cut off."""
    layers, every = w.layers_on(stage), [x for side in edge_weights(w, stage) for x in side]
    return sum(x.count * layers for x in layer_weights(w) if x.count <= w.persist) + sum(x.count for x in every if x.count <= w.persist)


def touched(w: Workload, stage: int, sizes: list[int], dp_rank: int) -> list[int]:
    """Elements of each weight that reaches into a rank's partitions: DeepSpeed's ZeRO-2 keeps their gradients whole in fp32.

    sizes: elements of a partition, by optimizer group.
    """
    return [count for chunk in _touched_weights(w, stage, sizes, dp_rank) for count in chunk]


def _touched(w: Workload, stage: int, sizes: list[int], dp_rank: int) -> list[int]:
    """The same, summed by model chunk."""
    return [sum(chunk) for chunk in _touched_weights(w, stage, sizes, dp_rank)]


def _touched_weights(w: Workload, stage: int, sizes: list[int], dp_rank: int) -> list[list[int]]:
    first, last = edge_weights(w, stage)
    ordered = [(x, 0) for x in first]
    ordered += [(x, chunk) for chunk in range(w.vpp) for _ in range(w.layers_in(stage, chunk)) for x in layer_weights(w)]
    ordered += [(x, w.vpp - 1) for x in last]
    at = [0] * len(w.optimizer.groups)
    by_chunk: list[list[int]] = [[] for _ in range(w.vpp)]
    for weight, chunk in ordered:
        start, size = at[weight.group], sizes[weight.group]
        if start < (dp_rank + 1) * size and start + weight.count > dp_rank * size:
            by_chunk[chunk].append(weight.count)
        at[weight.group] += weight.count
    return by_chunk


def _sharded(w: Workload, counted: list[tuple[RankWeight, int]]) -> dict[str, float]:
    b, dp = w.width, w.shards
    by_group = [sum(ceil(x.count / dp) * copies for x, copies in counted if x.group == g) for g in range(len(w.optimizer.groups))]
    part = sum(by_group)
    whole = sum(x.count * copies for x, copies in counted if x.count <= w.persist) if dp > 1 else 0
    second = ceil(sum(x.count * copies for x, copies in counted if x.count > w.persist) / w.hpz) if w.hpz > 1 else 0
    parts = {
        "parameters": b * (part + whole + second),
        "gradients": (8 if w.offload_optimizer != "none" else 4) * part,
        "optimizer": kept(w, by_group, master=4),
        "zero buffers": w.bucket * b,
    }
    return {name: float(value) for name, value in parts.items()}


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


def _saved_by_chunk(w: Workload, stage: int, *, cpu: bool) -> list[float]:
    """Bytes that each model chunk of a stage keeps of one micro-batch."""
    layer = layer_saved(w, cpu=cpu)
    each = [w.layers_in(stage, chunk) * layer for chunk in range(w.vpp)]
    if stage == 0:
        each[0] += w.tokens * (8 + (1 if w.tp > 1 else 0))  # token ids, and which of them are this rank's
        each[0] += 8 * w.tokens if w.model.positions and _own_positions(w) else 0
    if stage == w.pp - 1:
        each[-1] += _final_norm(w, cpu=cpu)
    if w.recompute == "full" and w.model.rotary and _own_positions(w):
        angles = 4 * w.seq / w.cp * w.model.head_dim * (w.micro if w.documents else 1)
        each = [e + angles for e in each]
    return each


def _final_norm(w: Workload, *, cpu: bool) -> float:
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
    each = _saved_by_chunk(w, stage, cpu=cpu)
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
    return kept - _final_norm(w, cpu=cpu) if w.pp == 1 else kept


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
    for forward, chunk in _turns(stage, w.pp, w.vpp, min(w.microbatches, 3 * w.pp)):
        now += each[chunk] if forward else -each[chunk]
        there = logits if stage == w.pp - 1 and forward and chunk == w.vpp - 1 else 0.0
        if now + there > best[0] + best[1]:
            best = now, there
    return best


def known(w: Workload) -> bool:
    """Whether the tensors that a layer keeps are those listed here: our layers, PyTorch's fused attention, a mode we offer."""
    return w.stack.name == "toolkit" and w.flash and w.recompute in ("none", "selective", "full")


def moments(w: Workload, stage: int, *, cpu: bool) -> dict[str, dict[str, float]]:
    """Bytes beyond the states at each moment that can be a stage's worst, by part.

    In the backward of the last layer everything kept is still there, with what was recomputed and the gradients of the widest tensors;
    at the loss, the logits, their fp32 copy and their gradient.
    """
    s, b, t = w.model, w.width, w.tokens
    kept = stage_saved(w, stage, cpu=cpu)
    redone = 0.0
    if w.recompute == "full":
        redone = layer_saved(replace(w, recompute="none"), cpu=cpu) - (0 if w.offload_activations else t / w.sequence_shards * b * s.hidden)
    stream = t / w.sequence_shards * b * s.hidden
    # the gate's product is already freed when the gradients of its two halves come: two of three buffers remain
    widest = t * b * max((2 if s.gated else 1) * s.ffn / w.tp, (s.query + s.key_value) / w.tp)
    held = kept["activations"]
    if stage == w.pp - 1:
        held -= _final_norm(w, cpu=cpu)  # the final norm's backward is over
    found = {
        "backward": {"activations": held, "working set": redone + widest + 2 * stream},
        # no weight is whole any more, which base counts, and no bucket is there
        "optimizer step": {"working set": _step_copies(w, stage) - gathered(w, stage)},
    }
    if w.zero == 2 and w.offload_optimizer == "none":
        found["optimizer step"]["zero buffers"] = -states(w, stage)["zero buffers"]
    if w.zero < 3 and (b < 4 or w.zero == 2 or w.offload_optimizer != "none"):
        # a product's gradients: those of its output, its input (gathered from sequence parallel ranks) and its weight, before it is added
        inputs = t * b * s.hidden if w.sequence_shards > 1 else 0.0
        weight = b * max(x.count for x in layer_weights(w))
        wide = t * b * (2 if s.gated else 1) * s.ffn / w.tp
        found["weight gradient"] = {"activations": held, "working set": redone + wide + inputs + weight + stream}
    if stage == 0 and w.zero < 2:  # its last gradient is the embedding's, whole
        found["embedding"] = {
            "activations": held - held / min(warmup(stage=0, pp=w.pp, vpp=w.vpp, microbatches=w.microbatches) + 1, w.microbatches * w.vpp),
            "working set": b * s.rows * s.hidden / w.tp + stream,
        }
    if w.zero < 2 and w.offload_optimizer != "none":
        _grow(w, stage, found, cpu=cpu)
    for chunk, more in prefetched(w, stage).items():
        # early in a forward: what it keeps itself is not there yet
        running = _saved_by_chunk(w, stage, cpu=cpu)[chunk]
        found[f"forward of chunk {chunk}"] = {"activations": max(0.0, held - running), "working set": more + widest / 2 + 4 * stream}
    buckets = w.zero == 2 and w.offload_optimizer == "none"
    if w.zero == 3 or (w.zero == 2 and w.shards > 1):
        found |= reductions(w, stage, held, redone=redone)
    if s.tied and w.pp == 1 and not (b == 4 and w.zero < 2):
        # a tied weight's gradient from the output layer waits for the embedding's, which comes last
        for moment in found.keys() - ({"optimizer step", f"{LAST_BUCKET} 0"} if w.zero == 3 else {"optimizer step"}):
            found[moment]["working set"] += b * s.rows * s.hidden / w.tp
    if stage == w.pp - 1:
        # the loss overwrites its fp32 logits with the softmax and that with the gradient; in 16 bits the logits as multiplied stay too
        found["loss"] = {**kept, "working set": stream + (t * s.rows / w.tp * b if b < 4 else 0.0)}
        if w.loss_chunk:
            # a piece's fp32 logits and what is multiplied of them, the gradient of the whole input, and the weight's in fp32
            piece = w.loss_chunk * s.rows / w.tp * (4 + (b if b < 4 else 0))
            summed = 4 * s.rows * s.hidden / w.tp if b < 4 or w.zero > 1 else 0.0
            found["loss"]["working set"] = t * b * s.hidden * (2 if w.sp else 1) + piece + summed
        if w.zero < 2 and w.offload_optimizer != "none" and not w.loss_chunk:
            # the output layer's gradient is whole before it is added
            whole = (t * s.rows + s.rows * s.hidden) / w.tp * b
            found["output layer"] = {"activations": kept["activations"], "working set": whole + stream}
        if w.zero == 3:
            found["loss"]["working set"] -= w.width * largest_cut(w, stage) if gathers(w) else 0  # its gradient is not there yet
        if w.zero == 3 and not w.loss_chunk:  # base counts the weight and its gradient
            found["output layer"] = {"activations": kept["activations"], "working set": t * s.rows / w.tp * b + 2 * stream}
        if buckets:
            # they are made when the first gradient comes, which is the output layer's
            found["loss"]["zero buffers"] = -states(w, stage)["zero buffers"]
            first = max(t * s.rows, s.rows * s.hidden) / w.tp * b
            found["output layer"] = {"activations": kept["activations"], "working set": first + 2 * stream}
    return found


def _grow(w: Workload, stage: int, found: dict[str, dict[str, float]], *, cpu: bool) -> None:
    """Correct a backward's moment where gradients are not there from the start: ZeRO-1 with its optimizer offloaded.

    Autograd makes each chunk's gradients in its first backward, when what earlier forwards have kept begins to go. The worst backward is
    found by following the schedule, a chunk at a time.
    """
    each, layers = _saved_by_chunk(w, stage, cpu=cpu), sum(x.count for x in layer_weights(w))
    before, after = edge_weights(w, stage)
    gradients = [w.width * layers * w.layers_in(stage, chunk) for chunk in range(w.vpp)]
    gradients[0] += w.width * sum(x.count for x in before)
    gradients[-1] += w.width * sum(x.count for x in after)
    total, absent, now, best = sum(gradients), float(sum(gradients)), 0.0, (0.0, float(sum(gradients)))
    first = best  # of the first chunk's backwards, at their ends
    made: set[int] = set()
    for forward, chunk in _turns(stage, w.pp, w.vpp, w.microbatches):
        now += each[chunk] if forward else 0.0
        if now - absent > best[0] - best[1]:
            best = now, absent
        if not forward:
            now -= each[chunk]
            if chunk not in made:
                made.add(chunk)
                absent = float(total - sum(gradients[other] for other in made))
            if chunk == 0 and now - absent > first[0] - first[1]:
                first = now, absent
    fullest = stage_saved(w, stage, cpu=cpu)["activations"]
    for name in ("backward", "weight gradient"):
        found[name]["activations"] = max(0.0, found[name]["activations"] - max(0.0, fullest - best[0]))
        found[name]["gradients"] = -best[1]
    if "embedding" in found:
        found["embedding"] |= {"activations": first[0], "gradients": -first[1]}


@lru_cache(maxsize=32)
def _turns(stage: int, pp: int, vpp: int, microbatches: int) -> tuple[tuple[bool, int], ...]:
    """Whether each pass of a step is a forward, and its chunk."""
    turns = {(forward, chunk): (forward, chunk) for forward in (False, True) for chunk in range(vpp)}  # each kept once
    passes = order(stage=stage, pp=pp, vpp=vpp, microbatches=microbatches)
    return tuple(turns[work.kind == "forward", work.chunk] for work in passes)


def _step_copies(w: Workload, stage: int) -> float:
    """DeepSpeed's ZeRO-2 and 3 flatten a rank's gradients once more for the step, in fp32; Muon computes on whole matrices."""
    if w.optimizer.whole:
        # in bf16 as gathered, three iterates and their product at most; in fp32 the update, scaled and cut
        matrices = [weight.count for weight in w.model.layer if weight.group == "matrix"]
        return 20.0 * max(matrices)
    if w.zero < 2 or w.offload_optimizer != "none":
        return 0.0
    part = w.parameters_on(stage) / w.shards
    return 4 * (min(part, w.sub_group) if w.zero == 3 else part)
