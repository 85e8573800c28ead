"""The linear layers of the stand-in, whose tensor-parallel messages are those of megatron-core's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.module import Module


class Linear(Module):
    """y = x W^T + b. Columns: x is whole, or cut along the sequence and gathered; rows: y is
    summed, or summed and cut.

    x [s, b, in]; y [s, b, out]. The bias is returned beside y, not added, where return_bias is set.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not fuse_wgrad_accumulation and parallel_mode in (None, "row", "column")
        assert out_features % tp_size == 0 or parallel_mode != "column"
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias, self.return_bias = bias, return_bias
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self._own_norm(device, params_dtype)
        shape = (self.out_features, self.in_features)
        self.own("weight", shape, value=init_method, device=device, dtype=params_dtype, whole=False)
        if bias:
            whole = parallel_mode == "row"
            self.own("bias", (self.out_features,), value=0.0, device=device, dtype=params_dtype, whole=whole)
        else:
            self.bias = torch.empty(0, device=device, dtype=params_dtype)  # there always, and no parameter

    def _own_norm(self, device: Any, dtype: torch.dtype | None) -> None:
        """Register what comes before the weight."""

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column" and self.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        elif self.parallel_mode == "column" and self.tp_size > 1:
            x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        y = F.linear(x, self.weight)
        if self.parallel_mode == "row" and self.sequence_parallel:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        elif self.parallel_mode == "row" and self.tp_size > 1:
            y = mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)
        if self.return_bias:
            return y, self.bias
        return y + self.bias if self.use_bias else y


class LayerNormLinear(Linear):
    """A norm and the linear layer behind it: the norm's parameters are this module's, and come first."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        **arguments: Any,
    ) -> None:
        assert not zero_centered_gamma and not return_layernorm_output and arguments.get("parallel_mode") == "column"
        torch.nn.Module.__init__(self)
        self.eps, self.normalization = eps, normalization
        super().__init__(in_features, out_features, **arguments)

    def _own_norm(self, device: Any, dtype: torch.dtype | None) -> None:
        self.own("layer_norm_weight", (self.in_features,), value=1.0, device=device, dtype=dtype, whole=True)
        if self.normalization == "RMSNorm":
            self.layer_norm_bias = None
        else:
            self.own("layer_norm_bias", (self.in_features,), value=0.0, device=device, dtype=dtype, whole=True)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        scale, shape = self.layer_norm_weight, self.layer_norm_weight.shape
        if self.normalization == "RMSNorm":
            x = F.rms_norm(x, shape, scale, self.eps)
        else:
            x = F.layer_norm(x, shape, scale, self.layer_norm_bias, self.eps)
        return super().forward(x, is_first_microbatch)


class GroupedLinear(torch.nn.Module):
    """Linear layers of many experts, which no model of this project has."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("the stand-in of Transformer Engine has no experts")
