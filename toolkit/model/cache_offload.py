"""Keys and values in the CPU's memory: a device holds those of the layer that it computes, and of
the one that comes next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolkit.model.cache import KeyValueCache

Pair = tuple[Tensor, Tensor]


class OffloadedCache(KeyValueCache):
    """A KeyValueCache whose key_value_memory_dict lies on the CPU, pinned beside a GPU.

    A layer's keys and values are sent for while the layer before it is computed, on a stream of their own.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.coming: dict[int, Pair] = {}
        self.sent = 0
        """Bytes of keys and values that have gone to the device."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """As KeyValueCache.append(); what it returns lies on the device."""
        start, end = self.used, self.used + key.shape[1]
        new = key.transpose(1, 2), value.transpose(1, 2)
        if layer not in self.key_value_memory_dict:
            self._allocate(layer, new[0], end)
        before = (self.coming.pop(layer, None) or self._send(layer, start)) if start else None
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
            for tensor in before or ():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        if start and (following := self._after(layer)) is not None:
            self.coming[following] = self._send(following, start)
        for memory, x in zip(self.key_value_memory_dict[layer], new, strict=True):
            memory[:, :, start:end] = x
        if before is None:
            return new[0].contiguous(), new[1].contiguous()
        return torch.cat((before[0], new[0]), dim=2), torch.cat((before[1], new[1]), dim=2)

    def _after(self, layer: int) -> int | None:
        """The layer behind one, that has keys and values already."""
        return layer + 1 if layer + 1 in self.key_value_memory_dict else None

    def _send(self, layer: int, columns: int) -> Pair:
        """A layer's first columns on their way to the device."""
        keys, values = (m[:, :, :columns] for m in self.key_value_memory_dict[layer])
        self.sent += keys.nbytes + values.nbytes
        if self.side is None:
            return keys, values
        with torch.cuda.stream(self.side):
            return keys.to(self.device, non_blocking=True), values.to(self.device, non_blocking=True)

    def _allocate(self, layer: int, like: Tensor, end: int) -> None:
        shape = (like.shape[0], like.shape[1], self.max_sequence_length, like.shape[3])
        pinned = self.side is not None
        self.key_value_memory_dict[layer] = (
            torch.empty(shape, dtype=like.dtype, pin_memory=pinned),
            torch.empty(shape, dtype=like.dtype, pin_memory=pinned),
        )
