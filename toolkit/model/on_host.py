"""Activations that wait for their backward in host memory, by PyTorch's own save_on_cpu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class OnHost(torch.autograd.graph.save_on_cpu):
    """Within this context what autograd keeps waits in page-locked host memory, but for tensors
    that share storage with `stay`.

    Neither way waits for the device.
    """

    def __init__(self, stay: Iterable[Tensor]) -> None:
        super().__init__(pin_memory=True)
        pack, unpack = self.pack_hook, self.unpack_hook
        storages = {tensor.untyped_storage()._cdata for tensor in stay}
        self.pack_hook = lambda tensor: tensor if tensor.untyped_storage()._cdata in storages else pack(tensor)
        self.unpack_hook = lambda kept: kept if isinstance(kept, Tensor) else unpack(kept)


def keep_on_host(layers: Any) -> None:
    """Let the inputs that the layers of a chunk are recomputed from wait in host memory; what all
    layers share stays.
    """
    forward = layers.forward

    def offloaded(*, hidden_states: Tensor, **kwargs: Any) -> Any:
        with OnHost(value for value in kwargs.values() if isinstance(value, Tensor)):
            return forward(hidden_states=hidden_states, **kwargs)

    layers.forward = offloaded
