"""Fused operators, which megatron-core names in a class that a config must ask for."""

from __future__ import annotations

from typing import Any


class FusibleOperation:
    """An operator that can be fused with others."""

    def __init__(self, *_: Any) -> None:
        raise NotImplementedError("the stand-in of Transformer Engine fuses nothing")


class Sequential(FusibleOperation):
    """A chain of them."""
