"""The class that megatron-core knows an FP8 tensor by; no tensor here is one."""

from __future__ import annotations


class QuantizedTensor:
    """A tensor in FP8."""
