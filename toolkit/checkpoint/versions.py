"""The versions of the libraries that a checkpoint's manifest names."""

from __future__ import annotations

from importlib.metadata import version


def versions() -> dict[str, str]:
    """Name -> version of what computes with the weights."""
    return {name: version(name) for name in ("torch", "megatron-core", "deepspeed")}
