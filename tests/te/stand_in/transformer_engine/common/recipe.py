"""Recipes of FP8, which megatron-core derives from and the stand-in refuses."""

from __future__ import annotations

from typing import Any


class DelayedScaling:
    """A recipe; there is no FP8 here to follow it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("the stand-in of Transformer Engine has no FP8")
