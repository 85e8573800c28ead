"""How DeepSpeed cuts optimizer states over ranks, in integers: known without an engine, and held
against real ones by a test.

Sources: deepspeed.runtime.zero.stage_1_and_2 (flat groups padded to a multiple of 2 x dp, cut in
equal parts) and stage3 (every parameter cut by itself in equal parts, laid end to end in
sub-groups).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.arch.spec import TIED_NAME, ModelSpec
from toolkit.parallel.layout import Layout

_START_ALIGNMENT = 2  # stage_1_and_2.nccl_start_alignment_factor


@dataclass(frozen=True)
class Fragment:
    """flat[at : at + count] of a partition is parameter.flatten()[start : start + count] of this
    rank's parameter.
    """

    name: str
    start: int
    at: int
    count: int


@dataclass(frozen=True)
class Cut:
    """One flat partition of one rank: its length in elements, padding included, and what lies in
    it. members: names of all weights that ranks share out here, of which this rank may have none.
    """

    numel: int
    fragments: list[Fragment]
    members: list[str]


def stage_parameters(spec: ModelSpec, layout: Layout, *, stage: int) -> list[str]:
    """Global names of a pipeline stage's parameters in its modules' order, chunk by chunk; the last
    stage has a tied embedding once more.
    """
    names: list[str] = []
    for chunk in range(layout.vpp):
        first, last = stage == chunk == 0, stage == layout.pp - 1 and chunk == layout.vpp - 1
        names += [w.name for w in spec.before if first]
        names += [w.in_layer(i).name for i in layout.layers_of(spec.layers, stage=stage, chunk=chunk) for w in spec.layer]
        names += [w.name for w in spec.after if last]
        names += [TIED_NAME] if last and spec.tied and layout.pp > 1 else []
    return names


def partitions(
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, Sequence[int]],
    layout: Layout,
    *,
    rank: int,
    zero_stage: int,
    sub_group_size: int,
) -> list[Cut]:
    """A rank's partitions in the optimizer's order.

    groups: names of its stage's parameters by optimizer group, in module order; shapes: of this
    rank's parts of them;
    sub_group_size: ZeRO-3's, in elements.
    """
    at = layout.coordinates(rank)
    # ZeRO-0 is ZeRO-1 over a group of one; gradients are averaged over context-parallel ranks too
    parts, mine = (layout.copies, layout.copy_of(at)) if zero_stage else (1, 0)
    numel = {n: math.prod(shape) for n, shape in shapes.items()}
    if zero_stage < 3:
        return [_cut_flat(group, numel, parts=parts, mine=mine) for group in groups if group]
    return [
        _cut_each(sub, numel, parts=parts, mine=mine)
        for group in groups
        if group
        for sub in _sub_groups(group, numel, parts, sub_group_size)
    ]


def _cut_flat(group: Sequence[str], numel: Mapping[str, int], *, parts: int, mine: int) -> Cut:
    alignment = _START_ALIGNMENT * parts
    size = -(-sum(numel[n] for n in group) // alignment) * alignment // parts
    fragments, first = [], -mine * size  # of the parameter, counted from this partition's start
    for n in group:
        low, high = max(0, first), min(size, first + numel[n])
        if low < high:
            fragments.append(Fragment(n, low - first, low, high - low))
        first += numel[n]
    return Cut(size, fragments, list(group))


def _cut_each(group: Sequence[str], numel: Mapping[str, int], *, parts: int, mine: int) -> Cut:
    fragments, at = [], 0
    for n in group:
        size = -(-numel[n] // parts)
        count = max(0, min(size, numel[n] - mine * size))
        if count:
            fragments.append(Fragment(n, mine * size, at, count))
        at += size
    return Cut(at, fragments, list(group))


def _sub_groups(group: Sequence[str], numel: Mapping[str, int], parts: int, sub_group_size: int) -> list[list[str]]:
    sizes = {n: -(-numel[n] // parts) for n in group}
    if sub_group_size >= sum(sizes.values()):
        return [list(group)]
    found: list[list[str]] = [[]]
    filled = 0
    for n in group:
        if filled >= sub_group_size:
            found.append([])
            filled = 0
        found[-1].append(n)
        filled += sizes[n]
    return found
