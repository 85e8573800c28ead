"""The attention of the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DotProductAttention(torch.nn.Module):
    """Causal attention. query [s, b, heads, d]; key, value [s, b, groups, d]; result [s, b, heads * d]."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.dropout, self.tracker, self.scale = attention_dropout, get_rng_state_tracker, softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, attn_mask_type: str = "causal"
    ) -> Tensor:
        assert attn_mask_type == "causal" and len(query) == len(key)
        s, b, heads, d = query.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d]
        grouped, dropout = heads != k.shape[1], self.dropout if self.training else 0.0

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale, enable_gqa=grouped)

        if dropout > 0.0 and self.tracker is not None:
            with self.tracker().fork():
                out = attend()
        else:
            out = attend()
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)
