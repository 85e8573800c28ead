"""The host memory of a played device: tensors of the CPU that a rank holds while it rehearses a
GPU, and what pinning them adds.
"""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch import Tensor

from toolkit.rehearse.place import device_of


class HostMemory:
    """Bytes of one rank's tensors in host memory. now: alive; peak: the most so far; pinned:
    page-locked blocks, used or kept.

    PyTorch's allocator of page-locked memory rounds each block up to a power of two and never gives
    one back to the system, only to another tensor of the same size
    (ATen/core/CachingHostAllocator.h).
    """

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.now = self.peak = self.pinned = 0
        self._locked: dict[int, int] = {}
        self._idle: Counter[int] = Counter()

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage if it is a new one in host memory."""
        if device_of(tensor) != "cpu" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        if nbytes and address not in self.sizes:
            self.sizes[address] = nbytes
            self._change(nbytes)
            weakref.finalize(storage, self._end, address).atexit = False

    def pin(self, tensor: Tensor) -> None:
        """A tensor that has been counted lies in page-locked memory."""
        address = tensor.untyped_storage()._cdata
        nbytes = self.sizes.get(address, 0)
        if not nbytes or address in self._locked:
            return
        block = 1 << (nbytes - 1).bit_length()
        self._locked[address] = block
        self.sizes[address] = 0
        if self._idle[block]:
            self._idle[block] -= 1
            self._change(-nbytes)
        else:
            self.pinned += block
            self._change(block - nbytes)

    def lock(self, tensor: Tensor) -> None:
        """A tensor that has been counted is page-locked as it is."""
        self.pinned += self.sizes.get(tensor.untyped_storage()._cdata, 0)

    def _end(self, address: int) -> None:
        self._change(-self.sizes.pop(address, 0))
        block = self._locked.pop(address, None)
        if block is not None:
            self._idle[block] += 1

    def _change(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)
