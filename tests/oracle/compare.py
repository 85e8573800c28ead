"""How far two models are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference of any value, each over the largest value of its tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in theirs)


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two series of equal length."""
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))
