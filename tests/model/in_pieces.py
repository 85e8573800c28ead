"""A model's losses and gradients with the loss in pieces and whole, on the ranks of a pool."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parity.cells import BASE


class Logits(TorchDispatchMode):
    """Elements of the largest tensor with as many columns as a rank has words."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.elements = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() and out.shape[-1] == self.columns:
            self.elements = max(self.elements, out.numel())
        return out


def run(argument: dict[str, Any]) -> dict[str, Any]:
    """For each mode: the loss, every gradient, and the largest logits that existed."""
    from tests.rank import Rank

    found = {}
    for mode in ("never", "always"):
        raw = copy.deepcopy(BASE)
        for section, keys in argument.items():
            raw.setdefault(section, {}).update(keys)
        raw["train"]["chunked_loss"] = mode
        raw["zero"] = {"stage": 0}
        rank = Rank(raw)
        micro = rank.micro(0)
        with Logits(256 // rank.layout.tp) as seen:
            loss = rank.forward_backward(micro)
        gradients = {name: p.grad.clone() for name, p in rank.chunks[0].named_parameters() if p.grad is not None}
        found[mode] = {"loss": loss, "gradients": gradients, "elements": seen.elements}
    return found
