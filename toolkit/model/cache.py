"""Attention with a key/value cache, for generating: the layer spec of training with another self-attention in it.

cache = KeyValueCache(batch=2, length=64, inverse=chunk.rotary_pos_emb.inv_freq, dtype=dtype, device=device, context=2048)
positions = cache.begin(ids.shape[1])
logits = chunk(ids, positions, cache.mask(ids.shape[1]), inference_context=cache, runtime_gather_output=True)
cache.advance(ids.shape[1])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from toolkit.model.layers import SdpaAttention


class KeyValueCache(StaticInferenceContext):
    """megatron-core's inference context with keys kept as attention reads them: rotated, and one head's tokens in a row.

    megatron-core's own cache holds keys before rotation, [s, b, groups, d], and turns all of them again for every token.
    Here key_value_memory_dict maps a layer's number to (keys, values), each [b, groups, length, d].

    length: tokens of prompt and answer together; padding: how many columns each row is padded by on the left, [b], None for
    prompts of one length; inverse: RoPE's inverse wavelengths, None where positions are learned; context: places that the model knows; window: of sliding attention.
    """

    def __init__(
        self,
        *,
        batch: int,
        length: int,
        inverse: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
        padding: Tensor | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(batch, length)
        self.window = window if window is not None and window < length else None
        self.device, self.context = device, context
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.turns: tuple[Tensor, Tensor] | None = None
        if inverse is not None:
            angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)
            angles = torch.cat((angles, angles), dim=-1)
            self.turns = angles.cos().to(dtype), angles.sin().to(dtype)  # each [length, d]
        self.here: tuple[Tensor, Tensor] | None = None

    @property
    def used(self) -> int:
        """Columns that hold tokens or padding."""
        return int(self.sequence_len_offset)

    def begin(self, count: int) -> Tensor:
        """Place of each of the next `count` columns in its own text, [b, count]; padding counts as place 0.

        How queries and keys turn there is looked up here, once for all layers.
        """
        columns = torch.arange(self.used, self.used + count, device=self.device)
        if self.padding is None:
            if self.turns is not None:
                cos, sin = (t[self.used : self.used + count, None, None] for t in self.turns)  # [s, 1, 1, d]
                self.here = cos, sin
            return columns.expand(self.max_batch_size, count)
        # a row that has ended before others may be past the context: its tokens are computed, and nobody looks at them
        positions = (columns - self.padding[:, None]).clamp_(min=0, max=self.context - 1)
        if self.turns is not None:
            cos, sin = (t[positions.t()].unsqueeze(2) for t in self.turns)  # [s, b, 1, d]
            self.here = cos, sin
        return positions

    def mask(self, count: int) -> Tensor | None:
        """Which columns each of the next `count` attends to, [b or 1, 1, count, columns] (True: attends).

        None where that needs no mask: a first prompt without padding is causal, and a single token sees all before it.
        """
        used, end = self.used, self.used + count
        if self.padding is None and (self.window is None or end <= self.window) and (count == 1 or used == 0):
            return None
        columns = torch.arange(end, device=self.device)
        rows = torch.arange(used, end, device=self.device)[:, None]
        seen = columns <= rows
        if self.window is not None:
            seen &= columns > rows - self.window
        if self.padding is None:
            return seen[None, None]
        real = columns >= self.padding[:, None]  # [b, columns]
        # a column of padding attends to itself: softmax over nothing would give NaN
        return (seen & real[:, None, :] | (columns == rows))[:, None]

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys [s, b, heads, d] turned by their positions."""
        if self.here is None:
            return x
        cos, sin = self.here
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [s, b, groups, d]; all of its so far, [b, groups, columns, d]."""
        start, end = self.used, self.used + key.shape[0]
        if layer not in self.key_value_memory_dict:
            shape = (key.shape[1], key.shape[2], self.max_sequence_length, key.shape[3])
            self.key_value_memory_dict[layer] = key.new_empty(shape), value.new_empty(shape)
        keys, values = self.key_value_memory_dict[layer]
        keys[:, :, start:end] = key.permute(1, 2, 0, 3)
        values[:, :, start:end] = value.permute(1, 2, 0, 3)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """Count columns that every layer of this stage now holds."""
        self.increment_sequence_len_offset(count)
        self.enable_decode_mode()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, those of columns not yet used included."""
        return sum(t.nbytes for pair in self.key_value_memory_dict.values() for t in pair)


class CachedSelfAttention(SelfAttention):
    """Self-attention whose keys and values go through a KeyValueCache where it is given one."""

    def _adjust_key_value_for_inference(
        self, inference_context: Any, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(inference_context, KeyValueCache):
            return super()._adjust_key_value_for_inference(inference_context, query, key, value, rotary_pos_emb, *args, **kwargs)
        query, key = inference_context.turn(query), inference_context.turn(key)
        key, value = inference_context.append(self.layer_number, key, value)
        return query, key, value, None, AttnMaskType.no_mask, None


class CachedAttention(SdpaAttention):
    """Attention of new queries [s, b, heads, d] to cached keys and values [b, groups, columns, d].

    attention_mask is KeyValueCache.mask()'s; without one a prompt is causal, and a single token sees all columns.
    """

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
        if attn_mask_type is not AttnMaskType.no_mask:  # a forward without a cache
            return super().forward(query, key, value)
        s, b, heads, d = query.shape
        groups = key.shape[1]
        if s == 1:
            # query heads of a group are queries at the same place: as rows of one matrix they need no copies of keys
            q = query.view(b, groups, heads // groups, d)
            out = F.scaled_dot_product_attention(q, key, value, attn_mask=attention_mask, scale=self.scale)
            return out.reshape(1, b, heads * d)
        q = query.permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            q, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=self.scale, enable_gqa=heads != groups
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)
