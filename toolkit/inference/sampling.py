"""The next token from logits: the most probable, or drawn in a way that every layout repeats."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from toolkit.inference.request import Sampling


def choose(logits: Tensor, sampling: Sampling, *, prompts: list[int], places: list[int]) -> Tensor:
    """Tokens [b] from logits [b, vocab] in fp32.

    prompts: the number of each row's prompt; places: of the token in its answer, counted from 0.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    return torch.tensor(
        [_draw(row, sampling, number=_number(sampling.seed, p, at)) for row, p, at in zip(logits.cpu(), prompts, places, strict=True)],
        device=logits.device,
    )


def _draw(logits: Tensor, sampling: Sampling, *, number: float) -> int:
    """The token at which the sum of probabilities, largest first, passes a number in [0, 1)."""
    scaled = logits.double() / sampling.temperature
    count = min(sampling.top_k or len(scaled), len(scaled))
    values, ids = scaled.topk(count)
    if count == len(scaled) or sampling.top_k == 0:
        values, ids = scaled.sort(descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    total = probabilities.cumsum(dim=-1)
    if sampling.top_p < 1.0:
        # the fewest tokens whose probabilities reach top_p
        keep = int((total < sampling.top_p).sum()) + 1
        total = total[:keep]
    at = int(torch.searchsorted(total, number * total[-1], right=True))
    return int(ids[min(at, len(total) - 1)])


def _number(seed: int, prompt: int, place: int) -> float:
    """A number in [0, 1) that depends on its arguments alone, not on what was drawn before."""
    digest = hashlib.sha256(f"{seed}:{prompt}:{place}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64
