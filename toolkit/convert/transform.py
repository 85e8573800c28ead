"""Their tensors to ours and back: rows are moved, never computed with, so both ways together change no bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.config.schema import ModelSection
from toolkit.convert.table import Entry, our_shape, part_shape


def join(entry: Entry, parts: Sequence[Tensor], model: ModelSection) -> Tensor:
    """Our tensor, whole, from theirs in the table's order; rows that pad the vocabulary are 0."""
    parts = [t.t() if p.turned else t for p, t in zip(entry.parts, parts, strict=True)]
    shape = our_shape(entry, model)
    if entry.join == "rows" and shape[0] != parts[0].shape[0]:
        out = torch.empty(shape, dtype=parts[0].dtype)
        out[: len(parts[0])] = parts[0]
        out[len(parts[0]) :] = 0
        return out
    if entry.join == "stack":
        return torch.cat(list(parts))
    if entry.join == "qkv":
        groups, rest = model.num_query_groups, parts[0].shape[1:]
        if len(parts) == 1:
            parts = parts[0].split(_heads(model))
        # [groups · x · d, …] -> [groups, x · d, …]
        return torch.cat([p.reshape(groups, -1, *rest) for p in parts], dim=1).view(shape)
    return parts[0].contiguous()


def part(entry: Entry, ours: Tensor, model: ModelSection) -> list[Tensor]:
    """The inverse of join(): their tensors, contiguous and as they are stored."""
    if entry.join == "rows":
        parts = [ours[: model.vocab_size]]
    elif entry.join == "stack":
        parts = list(ours.chunk(len(entry.parts)))
    elif entry.join == "qkv":
        d, rest = model.head_dim, ours.shape[1:]
        assert d is not None and model.num_query_groups is not None
        per = model.num_attention_heads // model.num_query_groups
        blocks = ours.view(model.num_query_groups, (per + 2) * d, *rest)
        parts = [b.reshape(-1, *rest) for b in blocks.split([per * d, d, d], dim=1)]
        if len(entry.parts) == 1:
            parts = [torch.cat(parts)]
    else:
        parts = [ours]
    return [(t.t() if p.turned else t).contiguous() for p, t in zip(entry.parts, parts, strict=True)]


def zeros(entry: Entry, model: ModelSection, dtype: torch.dtype) -> list[Tensor]:
    """Their tensors of an entry that the model does not have: biases of 0 change nothing."""
    return [torch.zeros(part_shape(p, model), dtype=dtype) for p in entry.parts]


def _heads(model: ModelSection) -> list[int]:
    assert model.head_dim is not None and model.num_query_groups is not None
    key = model.num_query_groups * model.head_dim
    return [model.num_attention_heads * model.head_dim, key, key]
