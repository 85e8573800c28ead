"""The norms of the stand-in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.module import Module


class RMSNorm(Module):
    """RMSNorm over the last dimension."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma, "the stand-in has scales around 1 only"
        self.eps, self.sequence_parallel = eps, sequence_parallel
        self.own("weight", (hidden_size,), value=1.0, device=device, dtype=params_dtype, whole=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """LayerNorm over the last dimension, which has a bias always."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, *, device: Any = "cuda", **arguments: Any) -> None:
        super().__init__(hidden_size, eps, device=device, **arguments)
        self.own("bias", (hidden_size,), value=0.0, device=device, dtype=self.weight.dtype, whole=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
