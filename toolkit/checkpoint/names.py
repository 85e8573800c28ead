"""What a checkpoint's files are called, and whose state is in them."""

from __future__ import annotations

import re

from toolkit.parallel.layout import Coordinates, Layout

GROUP_FILE = re.compile(r"rank-(\d{5,})\.group-(\d{3,})\.safetensors")
WEIGHTS_FILE = re.compile(r"weights-(\d{5,})\.safetensors")


def group_file(rank: int, index: int) -> str:
    """File of one of a rank's flat partitions."""
    return f"rank-{rank:05d}.group-{index:03d}.safetensors"


def rank_file(rank: int) -> str:
    """File of what a rank holds beside partitions: random generators and counters."""
    return f"rank-{rank:05d}.state.safetensors"


def weights_file(index: int) -> str:
    """File of some of the whole tensors of a weights-only checkpoint."""
    return f"weights-{index:05d}.safetensors"


def holder(layout: Layout, rank: int, *, stage: int) -> int:
    """The rank whose file has a rank's partitions. Under ZeRO-0 replicas are equal, and the first
    one writes for all.
    """
    if stage > 0:
        return rank
    at = layout.coordinates(rank)
    return layout.rank(Coordinates(tp=at.tp, cp=0, dp=0, pp=at.pp))
