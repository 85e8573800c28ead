"""The random generators that megatron-core's tracker of CUDA generators derives from."""

from __future__ import annotations

from typing import Any


class CudaRNGStatesTracker:
    """megatron-core makes one only where a config asks for Transformer Engine's own generators, and
    none here does.
    """

    def __init__(self) -> None:
        raise NotImplementedError("the stand-in of Transformer Engine has no generators of its own")


def checkpoint(*_: Any, **__: Any) -> Any:
    """Recompute under FP8."""
    raise NotImplementedError("the stand-in of Transformer Engine has no FP8")


def activation_recompute_forward(*_: Any, **__: Any) -> Any:
    """A part of recompute under FP8."""
    raise NotImplementedError("the stand-in of Transformer Engine has no FP8")
