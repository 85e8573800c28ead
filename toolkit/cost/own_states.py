"""What this project's own engine holds of a rank's states, weight by weight: parameters, gradients, optimizer, ZeRO's buffers."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from toolkit.cost.rank_weights import RankWeight, edge_weights, layer_weights
from toolkit.cost.workload import Workload

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
