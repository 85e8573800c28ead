"""Host memory of one rank of our own engine that offloads: its states, DeepSpeed's buffers, and what page-locking adds to them.

PyTorch's allocator of page-locked memory rounds each block up to a power of two, and gives none back to the system: a block that is free
again serves only another tensor of its size (ATen/core/CachingHostAllocator.h). A rehearsal counts the same from what the program does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from math import ceil

from toolkit.cost import own_states
from toolkit.cost.rank_weights import RankWeight, edge_weights, layer_weights
from toolkit.cost.workload import Workload

MIN_SWAPPED = 2**20  # bytes of the smallest tensor that DeepSpeed keeps in a file (swap_tensor/utils.py)
OPTIMIZER_BUFFERS, PARAMETER_BUFFERS = 4, 5  # DeepSpeed's default buffer_count of offload_optimizer and offload_param


class Locked:
    """Page-locked blocks, and tensors beside them that pin_memory: false leaves as they are. nbytes: of all, used or free."""

    def __init__(self) -> None:
        self.nbytes = 0.0
        self._free: Counter[int] = Counter()

    def add(self, tensors: Iterable[float], *, lock: bool = True) -> list[int]:
        """Blocks for tensors of so many bytes each; none where they are not page-locked."""
        if not lock:
            self.nbytes += sum(tensors)
            return []
        blocks = [1 << (ceil(t) - 1).bit_length() for t in tensors if t > 0]
        for block in blocks:
            if self._free[block]:
                self._free[block] -= 1
            else:
                self.nbytes += block
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Let other tensors have these blocks."""
        self._free.update(blocks)


def rank_bytes(w: Workload, stage: int) -> float:
    """The most bytes that one rank of a stage holds in host memory beside a GPU; 0 where nothing is offloaded."""
    if "none" == w.offload_optimizer == w.offload_param:
        return 0.0
    return _rank_bytes(w.laid_out(micro=1, batch=w.dp, recompute="none", sp=False), stage)  # states do not depend on these


@lru_cache(maxsize=512)
def _rank_bytes(w: Workload, stage: int) -> float:
    return _sharded(w, stage) if w.zero == 3 else _flat(w, stage)


def _flat(w: Workload, stage: int) -> float:
    """ZeRO-1 and 2: of each optimizer group master weights, gradients and the weights that come back; a buffer of the largest gradient."""
    every, b = _weights(w, stage), w.width
    shares = own_states.shares(w, stage)
    largest = float(b * max(x.count for x, _ in every))
    locked = Locked()
    lock = w.lock_optimizer
    locked.add([4.0 * n for n in shares] + [float(b * n) for n in shares] + [largest], lock=lock)
    # while it is page-locked it is there twice; gradients and moments come later
    first = locked.nbytes + largest * lock
    locked.add((4.0 * n for n in shares), lock=lock)
    moments = own_states.kept(w, shares, master=0)
    if w.zero == 2 and b == 4:
        # gradients of the first backward, which are copied to page-locked memory one by one; the moments come later
        touched = [4.0 * n for n in own_states.touched(w, stage, shares, 0)]
        locked.add(touched, lock=lock)
        moments = max(moments, max(touched, default=0.0) * lock)
    return max(first, locked.nbytes + moments)


def _sharded(w: Workload, stage: int) -> float:
    """ZeRO-3: master weights, moments and gradients by sub-group, gradients once more for all together; weights, cut one by one.

    Sub-groups are stepped one after the other. Those whose states are in files take turns in buffers, and their moments are made beside
    them in the first step (swap_tensor/partitioned_optimizer_swapper.py).
    """
    every, b, dp = _weights(w, stage), w.width, w.shards
    shares = [sum(copies * ceil(x.count / dp) for x, copies in every if x.group == g) for g in range(len(w.optimizer.groups))]
    locked = Locked()
    plain = first = 0.0
    if w.offload_param != "none":
        cut = [float(b * ceil(x.count / dp)) for x, copies in every for _ in range(copies)]
        if w.offload_param == "nvme":
            plain += PARAMETER_BUFFERS * max(cut)
            cut = [n for n in cut if n < MIN_SWAPPED]
        alone = locked.add(cut) if w.lock_param else []
        # the groups' own, into which they are copied; they are page-locked whatever pin_memory says
        locked.add(float(b * n) for n in shares)
        locked.free(alone)
        first = locked.nbytes + plain + (0.0 if w.lock_param else sum(cut))  # those that are not page-locked end here
    if w.offload_optimizer == "none":
        return max(first, locked.nbytes + plain)
    groups = [(g, n) for g, share in enumerate(shares) for n in _sub_groups(w, stage, g, share)]
    away = [(g, n) for g, n in groups if w.offload_optimizer == "nvme" and 4 * n >= MIN_SWAPPED]
    here = [one for one in groups if one not in away]
    locked.add((4.0 * n for _, n in here), lock=w.lock_optimizer)
    locked.add([4.0 * sum(shares)], lock=w.lock_optimizer)
    plain += sum(_states(w, g, n) for g, n in here)
    if away:
        largest = max(away, key=lambda one: one[1])
        plain += OPTIMIZER_BUFFERS * 4.0 * largest[1] + _states(w, *largest) - 4.0 * largest[1]
    return max(first, locked.nbytes + plain)


def _states(w: Workload, group: int, elements: int) -> float:
    """Bytes of an fp32 master and the moments of so many elements of an optimizer group."""
    return own_states.kept(w, [elements if g == group else 0 for g in range(len(w.optimizer.groups))], master=4)


def _sub_groups(w: Workload, stage: int, group: int, share: int) -> list[int]:
    """Elements of each part of a group that ZeRO-3 steps at a time: weights in model order until there are sub_group_size or more."""
    if share <= w.sub_group:
        return [share] if share else []
    first, last = edge_weights(w, stage)
    found, now = [], 0
    for weight in first + layer_weights(w) * w.layers_on(stage) + last:
        if weight.group == group:
            now += ceil(weight.count / w.shards)
            if now >= w.sub_group:
                found.append(now)
                now = 0
    return [*found, now] if now else found


def _weights(w: Workload, stage: int) -> list[tuple[RankWeight, int]]:
    """Weights of a rank, and how often each is there."""
    ends = [(x, 1) for side in edge_weights(w, stage) for x in side]
    return [(x, w.layers_on(stage)) for x in layer_weights(w)] + ends
