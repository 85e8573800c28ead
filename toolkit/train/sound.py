"""Checks that a run may ask for every N steps: that its machines still compute the same from the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import TrainingError
from toolkit.parallel.layout import Layout

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FIX = "Take the host out of the run and test its memory and GPU; start again from the last checkpoint before this step."


def digest(chunks: Sequence[torch.nn.Module]) -> Tensor:
    """One int64 on the device for the bits of all weights; a single flipped bit changes it."""
    total: Tensor | None = None
    for chunk in chunks:
        for weight in chunk.parameters():
            # a sum over bit patterns reads each weight once and makes no copy of it
            bits = weight.detach().view(BITS[weight.element_size()]).sum(dtype=torch.int64)
            total = bits if total is None else total * 1_000_003 + bits
    assert total is not None, "a stage has weights"
    return total


def check_replicas(chunks: Sequence[torch.nn.Module], layout: Layout, hosts: Sequence[str], *, step: int) -> None:
    """Raise TrainingError on all ranks where data-parallel replicas no longer hold the same bits;
    all ranks call it.
    """
    everyone = _gathered(digest(chunks))
    replicas: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        replicas[at.tp, at.pp].append(rank)
    for ranks in replicas.values():
        counts = Counter(everyone[rank] for rank in ranks)
        if len(counts) > 1:
            value, votes = counts.most_common(1)[0]
            # where no value has more votes than all others, nobody can say who is wrong
            odd = [rank for rank in ranks if everyone[rank] != value] if votes * 2 > len(ranks) else ranks
            raise TrainingError(
                f"step {step}: the weights of {_named(odd, hosts)} differ from {'the other replicas' if odd != ranks else 'each other'}",
                why="data-parallel replicas hold the same bits as long as all machines compute alike",
                fix=FIX,
            )


def check_repeat(forward: Callable[[], Tensor | None], layout: Layout, hosts: Sequence[str], *, rank: int, step: int) -> None:
    """Raise TrainingError on all ranks where the same micro-batches give another loss a second
    time; all ranks call it.

    forward: the mean loss on the last stage, None on the others. The replica is named, with all its hosts.
    """
    first, second = forward(), forward()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    differs = torch.zeros((), dtype=torch.int64, device=device)
    if first is not None and second is not None:
        # a loss that is not a number is another check's affair
        differs += ((first != second) & ~(first.isnan() & second.isnan())).any()
    everyone = _gathered(differs)
    replicas = sorted({layout.coordinates(rank).dp for rank, flag in enumerate(everyone) if flag})
    if replicas:
        ranks = [rank for rank in range(layout.world_size) if layout.coordinates(rank).dp in replicas]
        raise TrainingError(
            f"step {step}: the same micro-batches have given {_named(ranks, hosts)} two different losses",
            why="a forward pass without dropout is repeatable",
            fix=FIX,
        )


def slowest(own_s: Sequence[float], hosts: Sequence[str]) -> str:
    """A line that names the rank with the most work of its own a step; empty where all are within a
    quarter of the median.
    """
    middle = median(own_s)
    worst = max(range(len(own_s)), key=lambda rank: own_s[rank])
    if len(own_s) < 2 or own_s[worst] <= 1.25 * middle or own_s[worst] - middle < 0.005:
        return ""
    others = f"{min(own_s):.3f} to {sorted(own_s)[-2]:.3f} s"
    return f"slowest: rank {worst} on {hosts[worst]} works {own_s[worst]:.3f} s a step, the others {others}, and wait for it"


def _gathered(value: Tensor) -> list[int]:
    everyone = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, value)
    return [int(v) for v in torch.stack(everyone).tolist()]


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    shown: list[Any] = [f"rank {rank} ({hosts[rank]})" for rank in ranks[:8]]
    return ", ".join(shown) + (" …" if len(ranks) > 8 else "")
