"""Losses of a user's own, to be trained with on any layout; COEFFICIENT is large, so that an error
in the z-loss shows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine.loss import cross_entropy, log_sum_exp

Batch = dict[str, Tensor]

COEFFICIENT = 0.1


def z_loss(logits: Tensor, batch: Batch) -> Tensor:
    return (cross_entropy(logits, batch["labels"]) + COEFFICIENT * log_sum_exp(logits).square()).mean()


def plain_z_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The same in plain torch, for a single process, which has all logits."""
    labels = batch["labels"].t()  # [s, b]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    return losses + COEFFICIENT * torch.logsumexp(logits.float(), dim=-1).square().mean()


def own_part_only(logits: Tensor, batch: Batch) -> Tensor:
    """z-loss with a fault: each tensor parallel rank takes its own part of the vocabulary for the whole."""
    own = torch.logsumexp(logits.float(), dim=-1).t()
    return (cross_entropy(logits, batch["labels"]) + COEFFICIENT * own.square()).mean()


def weighted(losses: Tensor, batch: Batch) -> Tensor:
    """Per-token losses [b, s], weighted by the token that they follow."""
    return (losses * (1.0 + batch["tokens"] % 3)).mean()


for _function in (z_loss, plain_z_loss, own_part_only):
    _function.needs = "logits"  # type: ignore[attr-defined]
