"""Seconds of one operator or message by the shapes it was called with, from the planner's own cost model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.cost import kernels, network
from toolkit.cost.constants import VALUES
from toolkit.hardware.catalogue import GB, Hardware

PRECISION = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float64": "fp64"}
Shape = Sequence[int]


class Price:
    """The times of one rank's kernels on a cluster. scale: the calibrated share of the GPU's matmul
    ceiling.
    """

    def __init__(self, hardware: Hardware, *, scale: float = 1.0) -> None:
        self.hardware, self.gpu, self.scale = hardware, hardware.gpu, scale

    def matmul(self, left: Shape, right: Shape, dtype: str) -> float:
        """[m, k] x [k, n], both with a leading batch dimension for a batched product."""
        batch = left[0] if len(left) == 3 else 1
        precision = PRECISION.get(dtype, "fp32")
        return kernels.matmul_time(left[-2], right[-1], left[-1], gpu=self.gpu, precision=precision, scale=self.scale, batch=batch)

    def attention(self, query: Shape, dtype: str, *, backward: bool) -> float:
        """query [b, heads, s, d]; causal."""
        b, heads, s, d = query
        precision = PRECISION.get(dtype, "fp32")
        kernel = "efficient" if precision == "fp32" else "flash2"
        return kernels.flash_time(
            gpu=self.gpu, precision=precision, kernel=kernel, batch=b, seq=s, heads=heads, head_dim=d, backward=backward
        )

    def stream(self, nbytes: float) -> float:
        """A kernel that moves nbytes through the device's memory."""
        return kernels.stream_time(nbytes, gpu=self.gpu, kernels=1)

    def host_copy(self, nbytes: float) -> float:
        """A copy between host and device."""
        return VALUES.kernel_launch + nbytes / (self.gpu.host_gb_s * GB)

    def message(self, operation: str, ranks: Sequence[int], nbytes: float, *, peer: int | None, rank: int) -> float:
        """A collective over ranks, or a send or receive. nbytes: of what this rank puts in (a
        gather) or of the whole (else).
        """
        if peer is not None:
            return network.send_time(nbytes, hardware=self.hardware, distance=abs(peer - rank))
        if len(ranks) < 2:
            return 0.0
        over = network.group(self.hardware, size=len(ranks), stride=max(1, ranks[1] - ranks[0]))
        if "allgather" in operation:
            return network.gather_time(nbytes * len(ranks), over=over)
        if "reduce_scatter" in operation or operation in ("broadcast", "reduce", "gather", "scatter"):
            return network.gather_time(nbytes, over=over)
        if "alltoall" in operation:
            return network.exchange_time(nbytes, over=over)
        return network.reduce_time(nbytes, over=over)


def names_of(value: Any) -> str:
    """A dtype as "bf16", "fp32", or torch's own word."""
    text = str(value)
    return PRECISION.get(text, text.replace("torch.", ""))
