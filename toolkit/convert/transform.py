"""Their tensors to ours and back: rows are moved, never computed with, so both ways together change
no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.arch.family import Part
from toolkit.arch.spec import ModelSpec, WeightSpec
from toolkit.tensors import Rows

IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names of buffers that old files hold beside weights: constants that the model computes itself."""


def join(weight: WeightSpec, parts: Sequence[Part], tensors: Sequence[Tensor], model: ModelSpec) -> Rows:
    """Our tensor, whole, from theirs in the table's order: views of them where rows alone are
    moved; rows that pad the vocabulary are 0.
    """
    given = [t.t().contiguous() if p.transposed else t for p, t in zip(parts, tensors, strict=True)]
    if weight.join == "padded":
        padding = weight.shape[0] - len(given[0])
        return Rows([given[0], torch.zeros(padding, *given[0].shape[1:], dtype=given[0].dtype)] if padding else given)
    if weight.join == "grouped":
        if len(given) == 1:
            given = list(given[0].split([shape[0] for shape in weight.parts]))
        groups = [t.chunk(model.groups) for t in given]
        return Rows([t[g] for g in range(model.groups) for t in groups])
    return Rows(given)


def split(weight: WeightSpec, parts: Sequence[Part], ours: Tensor, model: ModelSpec) -> list[Rows]:
    """The inverse of join(): their tensors as they are stored."""
    if weight.join == "padded":
        pieces = [Rows([ours[: model.vocab]])]
    elif weight.join == "stacked":
        pieces = [Rows([half]) for half in ours.chunk(len(weight.parts))]
        if len(parts) == 1:
            pieces = [Rows([ours])]
    elif weight.join == "grouped":
        d, per_group = model.head_dim, model.heads // model.groups
        groups = [g.split([per_group * d, d, d]) for g in ours.chunk(model.groups)]
        pieces = [Rows([g[i] for g in groups]) for i in range(3)]
        if len(parts) == 1:
            pieces = [Rows([piece for p in pieces for piece in p.pieces])]
    else:
        pieces = [Rows([ours])]
    return [Rows([r.whole().t().contiguous()]) if p.transposed else r for p, r in zip(parts, pieces, strict=True)]


def zeros(parts: Sequence[Part], dtype: torch.dtype) -> list[Rows]:
    """Their tensors of a weight that the model does not have: biases of 0 change nothing."""
    return [Rows([torch.zeros(p.shape, dtype=dtype)]) for p in parts]
