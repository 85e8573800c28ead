"""Their tensors to ours and back: rows are moved, never computed with, so both ways together change no bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.config.schema import ModelSection
from toolkit.convert.table import Entry, our_shape, part_shape
from toolkit.tensors import Rows


def join(entry: Entry, parts: Sequence[Tensor], model: ModelSection) -> Rows:
    """Our tensor, whole, from theirs in the table's order: views of them where rows alone are moved; rows that pad the vocabulary are 0."""
    parts = [t.t().contiguous() if p.turned else t for p, t in zip(entry.parts, parts, strict=True)]
    if entry.join == "rows":
        padding = our_shape(entry, model)[0] - len(parts[0])
        return Rows([parts[0], torch.zeros(padding, *parts[0].shape[1:], dtype=parts[0].dtype)] if padding else parts)
    if entry.join == "qkv":
        if len(parts) == 1:
            parts = parts[0].split(_heads(model))
        groups = [p.chunk(model.num_query_groups or 1) for p in parts]
        return Rows([p[g] for g in range(len(groups[0])) for p in groups])
    return Rows(parts)


def part(entry: Entry, ours: Tensor, model: ModelSection) -> list[Rows]:
    """The inverse of join(): their tensors as they are stored."""
    if entry.join == "rows":
        parts = [Rows([ours[: model.vocab_size]])]
    elif entry.join == "stack":
        parts = [Rows([half]) for half in ours.chunk(len(entry.parts))]
    elif entry.join == "qkv":
        d = model.head_dim or 1
        per = model.num_attention_heads // (model.num_query_groups or 1)
        groups = [g.split([per * d, d, d]) for g in ours.chunk(model.num_query_groups or 1)]
        parts = [Rows([g[i] for g in groups]) for i in range(3)]
        if len(entry.parts) == 1:
            parts = [Rows([piece for p in parts for piece in p.pieces])]
    else:
        parts = [Rows([ours])]
    return [Rows([r.whole().t().contiguous()]) if p.turned else r for p, r in zip(entry.parts, parts, strict=True)]


def zeros(entry: Entry, model: ModelSection, dtype: torch.dtype) -> list[Rows]:
    """Their tensors of an entry that the model does not have: biases of 0 change nothing."""
    return [Rows([torch.zeros(part_shape(p, model), dtype=dtype)]) for p in entry.parts]


def _heads(model: ModelSection) -> list[int]:
    assert model.head_dim is not None and model.num_query_groups is not None
    key = model.num_query_groups * model.head_dim
    return [model.num_attention_heads * model.head_dim, key, key]
