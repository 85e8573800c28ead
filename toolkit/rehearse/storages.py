"""The memory of a played device: which storages live, what part each counts for, and what the
caching allocator reserves for them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from toolkit.rehearse.allocator import CachingAllocator
from toolkit.rehearse.place import device_of


class Storages:
    """Bytes alive by part. kind: the device type that counts; capacity: of the device in bytes,
    None without a limit.
    """

    def __init__(self, kind: str, *, capacity: int | None = None) -> None:
        self.kind = kind
        self.allocator = CachingAllocator(capacity=capacity)
        self.sizes: dict[int, int] = {}
        self.part: dict[int, str] = {}
        self.by_part: Counter[str] = Counter()
        self.now = 0

    def see(self, tensor: Tensor, *, stream: int) -> bool:
        """Count a tensor's storage for the working set; whether it is a new one of this device."""
        if device_of(tensor) != self.kind or tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        if not nbytes or address in self.sizes:
            return False
        self.sizes[address] = nbytes
        self.part[address] = "working set"
        self.by_part["working set"] += nbytes
        self.now += nbytes
        self.allocator.allocate(address, nbytes, stream=stream)
        weakref.finalize(storage, self._end, address).atexit = False
        return True

    def _end(self, address: int) -> None:
        nbytes = self.sizes.pop(address, 0)
        if nbytes:
            self.now -= nbytes
            self.by_part[self.part.pop(address)] -= nbytes
            self.allocator.free(address)

    def assign(self, part: str, tensors: Any) -> None:
        """Count the storages of tensors for a part from now on."""
        for tensor in tensors:
            if tensor.device.type == self.kind and tensor.layout == torch.strided:
                self.move(tensor.untyped_storage()._cdata, part)

    def move(self, address: int, part: str) -> None:
        """Count one storage for a part."""
        before = self.part.get(address)
        if before is not None and before != part:
            self.by_part[before] -= self.sizes[address]
            self.by_part[part] += self.sizes[address]
            self.part[address] = part

    def answer(self, what: str) -> int:
        """What torch.cuda would answer: allocated, reserved, peak allocated, peak reserved; or do
        empty_cache, reset….
        """
        a = self.allocator
        if what == "empty_cache":
            a.empty_cache()
        elif what.startswith("reset"):
            a.reset_peaks()
        answers = {
            "allocated": a.allocated,
            "reserved": a.reserved,
            "peak allocated": a.peak_allocated,
            "peak reserved": a.peak_reserved,
        }
        return answers.get(what, 0)
