"""The layer spec: megatron-core's tensor-parallel linears with norms and attention of our own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from toolkit.arch.spec import ModelSpec
from toolkit.model.attention import attend as attend_spans
from toolkit.model.attention import document_spans
from toolkit.model.context import EXCHANGES
from toolkit.model.init import named_weights

SUM_OVER_TP = "sum_grad_over_tp"
"""Attribute of a parameter whose gradient every tensor-parallel rank holds a part of."""

SHARED_OUT = "tensor_model_parallel"
"""Attribute of a parameter of which each tensor-parallel rank holds its own part; megatron-core's
and DeepSpeed's name for it.
"""

TIED_COPY = "ds_pipe_replicated"
"""Attribute of the last stage's copy of a tied embedding; DeepSpeed's own name for it."""


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm as megatron-core makes one, which it refuses to do from PyTorch's own under
    sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps, bias=getattr(config, "norm_bias", True), dtype=config.params_dtype)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm as megatron-core makes one, which it refuses to do from PyTorch's own under sequence
    parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)


class BiasedMLP(MLP):
    """megatron-core's MLP with a switch of its own for biases, which share one with the attention's there."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.add_bias_linear = getattr(config, "mlp_bias", config.add_bias_linear)
        super().__init__(config, *args, **kwargs)


class SdpaAttention(torch.nn.Module):
    """Causal attention through PyTorch's scaled_dot_product_attention; memory does not grow with s².

    query [s, b, heads, d]; key, value [s, b, groups, d]; result [s, b, heads * d]. With context
    parallelism s is this rank's part of
    the sequence. attention_mask is no mask: None, or
    toolkit.engine.batch's "bounds" of the documents, which attend to themselves alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        self.context = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None
        self.exchange = EXCHANGES.get(getattr(config, "cp_exchange", ""))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        s, b, heads, d = query.shape
        if self.context is not None:
            return self._over_ranks(query, key, value, None if attention_mask is None else attention_mask.tolist())
        if attention_mask is not None:
            return self._within_documents(query, key, value, attention_mask)
        # one query against a cache of keys attends to all of them; equal lengths are causal
        causal = s == key.shape[0]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d]
        grouped = heads != k.shape[1]
        if grouped and q.dtype == torch.float32 and q.is_cuda:
            # no fused CUDA kernel takes grouped queries in fp32: PyTorch would keep scores of [heads, s, s]
            k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
            grouped = False

        def attend(dropout: float) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=self.scale, enable_gqa=grouped)

        return self._with_dropout(attend).permute(2, 0, 1, 3).reshape(s, b, heads * d)

    def _with_dropout(self, attend: Callable[[float], Tensor]) -> Tensor:
        if self.training and self.dropout > 0.0:
            # heads differ between TP ranks, so their masks must: draw from the TP rank's own generator
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return attend(self.dropout)
        return attend(0.0)

    def _over_ranks(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[int] | None) -> Tensor:
        assert self.exchange is not None and self.context is not None
        exchange, group = self.exchange, self.context
        out = self._with_dropout(lambda dropout: exchange(query, key, value, bounds, group=group, dropout=dropout, scale=self.scale))
        return out.reshape(*out.shape[:2], -1)

    def _within_documents(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        s, b, heads, d = query.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d]
        spans = document_spans(bounds.tolist(), s)
        out = self._with_dropout(lambda dropout: attend_spans(q, k, v, spans, dropout=dropout, scale=self.scale))
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


class _WithoutPadding(torch.autograd.Function):
    """Logits with -inf in columns first.. in place; softmax gives them a gradient of exactly 0, so
    backward passes it on as it is.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, first: int) -> Tensor:
        logits[..., first:] = -torch.inf
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def mask_padding(output_layer: torch.nn.Module, *, vocab_size: int, rows: int) -> None:
    """Let ids that only pad the vocabulary (vocab_size .. rows) have no probability, whatever their
    weights are.
    """
    if rows == vocab_size:
        return

    def hook(_module: torch.nn.Module, _inputs: Any, outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = outputs  # [s, b, rows of this rank, or of all where they are gathered]
        if logits.dim() == 2:
            return outputs  # losses [s, b] of a Head, which has masked them
        here = logits.shape[-1]
        first = vocab_size - (0 if here == rows else here * parallel_state.get_tensor_model_parallel_rank())
        return (_WithoutPadding.apply(logits, max(0, first)) if first < here else logits), bias

    output_layer.register_forward_hook(hook)


def local_spec(config: TransformerConfig, *, num_layers: int) -> TransformerBlockSubmodules:
    """Spec of a stage chunk of `num_layers` layers from PyTorch modules, right under sequence parallelism."""
    rms = config.normalization == "RMSNorm"
    norm = RMSNorm if rms else LayerNorm
    layer = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if getattr(config, "mlp_bias", config.add_bias_linear) != config.add_bias_linear:
        if isinstance(parts.mlp, ModuleSpec):
            parts.mlp.module = BiasedMLP
        else:  # from megatron-core 0.19 on, the class's own maker with its submodules
            parts.mlp = functools.partial(BiasedMLP.as_mlp_submodule, **parts.mlp.keywords)  # type: ignore[attr-defined]
    attention = parts.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def te_spec(config: TransformerConfig) -> ModuleSpec:
    """Transformer Engine's spec; the rules have checked that the package and CUDA are there."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)


def mark_tensor_parallel(model: torch.nn.Module, spec: ModelSpec, *, sequence_parallel: bool) -> None:
    """Mark the weights that tensor-parallel ranks share out, and those whose gradients every rank
    holds a part of.

    The first enter the gradient norm on every rank, the others on one. The second are norms and
    biases that see a part of the sequence, and norms of heads, of which each rank sees its own. The
    modules' own marks are not to be had from every module: Transformer Engine sets none on
    parameters that are made on the meta device.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    for weight, parameter in named_weights(model, spec):
        whole = weight.cut.dim is None
        part_of_sequence = sequence_parallel and whole and weight.group == "vector"
        setattr(parameter, SUM_OVER_TP, tp > 1 and (part_of_sequence or weight.per_head))
        setattr(parameter, SHARED_OUT, not whole)
