"""A stage's forward pass with a key/value cache, over the weights of megatron-core's modules.

It computes what the modules compute, without what they do for training: for one new token that
would take as long as the arithmetic. Activations are [b, s, h].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from toolkit.model.cache import KeyValueCache
from toolkit.model.messages import Messages
from toolkit.model.sharded import ShardedLayers
from toolkit.model.streaming import LayerStream

Norm = Callable[[Tensor], Tensor]
FEW_TOKENS = 16


class Decoder:
    """Embedding, layers and output of a stage chunk; `modules` is a megatron-core GPTModel, whose
    weights are used where they lie.

    vocab: ids that the model knows; logits of rows that only pad the vocabulary are left out.
    """

    def __init__(self, modules: Any, *, vocab: int, messages: Messages) -> None:
        self.modules, self.vocab, self.messages = modules, vocab, messages
        self.tp = parallel_state.get_tensor_model_parallel_world_size()
        self.group = parallel_state.get_tensor_model_parallel_group()
        group = self.group if self.tp > 1 else None
        self.layers = [Layer(layer, group=group, messages=messages) for layer in modules.decoder.layers]
        self.norm = norm_of(modules.decoder.final_layernorm) if modules.post_process else None
        tied = modules.share_embeddings_and_output_weights and modules.pre_process
        self.output: Any = None
        if modules.post_process:
            self.output = modules.embedding.word_embeddings if tied else modules.output_layer
        self.stream: LayerStream | None = None
        """Brings each layer's weights where they are not all in memory."""
        self.sharded: ShardedLayers | None = None
        """The same layers, where the copies of the model share them out."""

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Activations [b, s, h] of tokens [b, s], on a first stage."""
        embedding = self.modules.embedding
        table = embedding.word_embeddings.weight
        if not hasattr(table, "qdata"):
            out: Tensor = embedding(tokens, positions)  # [s, b, h]
            return out.transpose(0, 1)
        # rows of int8, each with a scale
        rows = table.shape[0]
        local = tokens - rows * parallel_state.get_tensor_model_parallel_rank()
        mine = (local >= 0) & (local < rows)
        local = local.clamp(0, rows - 1)
        found = (table.qdata[local] * table.scale.reshape(rows, 1)[local]).to(table.dtype)
        if self.tp > 1:
            found = found * mine[..., None]
            self.messages.run("tensor", lambda: dist.all_reduce(found, group=self.group))
        return found + embedding.position_embeddings(positions) if embedding.add_position_embedding else found

    def hidden(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """Through the layers, [b, s, h] to [b, s, h]; cache.begin() has been called."""
        if self.sharded is not None:
            return self.sharded.run(x, cache)
        for number, layer in enumerate(self.layers):
            if self.stream is not None:
                self.stream.enter(number)
            x = layer(x, cache)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits [b, s, vocab] in fp32, of a last stage; on each of its tensor-parallel ranks."""
        assert self.norm is not None and self.output is not None
        out = linear(self.norm(x), self.output.weight, None)
        if self.tp > 1:
            parts = [torch.empty_like(out) for _ in range(self.tp)]
            self.messages.run("tensor", lambda: dist.all_gather(parts, out, group=self.group))
            out = torch.cat(parts, dim=-1)
        return out[..., : self.vocab].float()


class Layer:
    """One transformer layer. group: tensor-parallel ranks to sum over, None for one."""

    def __init__(self, layer: Any, *, group: dist.ProcessGroup | None, messages: Messages) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self.messages = messages
        self.number: int = layer.layer_number
        self.group = group
        self.groups: int = attention.num_query_groups_per_partition
        self.heads: int = attention.num_attention_heads_per_partition
        self.head_dim: int = attention.hidden_size_per_attention_head
        self.scale: float | None = attention.core_attention.scale  # None: the usual one
        self.input_norm, self.mlp_norm = norm_of(layer.input_layernorm), norm_of(layer.pre_mlp_layernorm)
        self.q_norm, self.k_norm = norm_of(attention.q_layernorm), norm_of(attention.k_layernorm)
        self.qkv, self.proj = attention.linear_qkv, attention.linear_proj
        self.fc1, self.fc2 = mlp.linear_fc1, mlp.linear_fc2
        self.gated: bool = mlp.config.gated_linear_unit
        self.activation: Callable[[Tensor], Tensor] = mlp.config.activation_func

    def __call__(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        assert self.input_norm is not None and self.mlp_norm is not None
        x = x + self._attend(self.input_norm(x), cache)
        inner = linear(self.mlp_norm(x), self.fc1.weight, self.fc1.bias)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        return x + self._sum(inner, self.fc2)

    def _attend(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        b, s, _ = x.shape
        d, groups, per_group = self.head_dim, self.groups, self.heads // self.groups
        # rows of the weight are, per group, [query heads, key, value]
        mixed = linear(x, self.qkv.weight, self.qkv.bias).view(b, s, groups, per_group + 2, d)
        if self.q_norm is None or self.k_norm is None:
            turned = cache.turn(mixed[:, :, :, : per_group + 1])
        else:
            query, key = self.q_norm(mixed[:, :, :, :per_group]), self.k_norm(mixed[:, :, :, per_group : per_group + 1])
            turned = cache.turn(torch.cat((query, key), dim=3))
        keys, values = cache.append(self.number, turned[:, :, :, per_group], mixed[:, :, :, per_group + 1])
        query = turned[:, :, :, :per_group]
        if s == 1:
            # query heads of a group are queries at the same place: as rows of one matrix they need
            # no copies of keys
            out = F.scaled_dot_product_attention(query[:, 0], keys, values, attn_mask=cache.mask, scale=self.scale).view(b, 1, -1)
        else:
            query = query.reshape(b, s, self.heads, d).transpose(1, 2)
            causal = cache.mask is None
            out = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=cache.mask, is_causal=causal, scale=self.scale, enable_gqa=per_group > 1
            )
            out = out.transpose(1, 2).reshape(b, s, -1)
        return self._sum(out, self.proj)

    def _sum(self, x: Tensor, layer: Any) -> Tensor:
        """A linear layer whose columns the tensor-parallel ranks share; its bias comes after the sum."""
        if self.group is None:
            return linear(x, layer.weight, layer.bias)
        out = linear(x, layer.weight, None)
        self.messages.run("tensor", lambda: dist.all_reduce(out, group=self.group))
        return out if layer.bias is None else out + layer.bias


def linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x [b, s, in] by a weight [out, in], which may be quantised.

    For a few tokens on a CPU, int8 goes through PyTorch's own kernel: torchao would first make the
    whole weight larger again.
    """
    tokens = x.shape[0] * x.shape[1]
    if tokens <= FEW_TOKENS and hasattr(weight, "qdata") and weight.qdata.dtype == torch.int8 and x.device.type == "cpu":
        scale = weight.scale.reshape(-1).to(x.dtype)
        out = torch._weight_int8pack_mm(x.reshape(tokens, -1), weight.qdata, scale).view(*x.shape[:2], -1)
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)


def norm_of(module: Any) -> Norm | None:
    """A norm as one call of PyTorch's function; None for none."""
    if isinstance(module, torch.nn.RMSNorm):
        return lambda x: F.rms_norm(x, module.normalized_shape, module.weight, module.eps)
    if isinstance(module, torch.nn.LayerNorm):
        return lambda x: F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    return None
