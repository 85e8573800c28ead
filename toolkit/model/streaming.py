"""Layers whose weights come when they are needed: two at once are in a device's memory, whatever
the model's size.

stream = LayerStream(model.decoder.layers, weights_of, read=read, device=device, dtype=dtype)
for number, layer in enumerate(layers):
    stream.enter(number)     # its weights are there, and the next layer's are on their way
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from toolkit.arch.spec import WeightSpec

Place = Literal["cpu", "disk"]
Read = Callable[[WeightSpec], Tensor]
Weights = dict[str, Tensor]
M_MMAP_THRESHOLD = -3  # malloc.h


class LayerStream:
    """Weights of a stage's layers, read ahead by one layer in a thread of its own.

    modules: the layers, with parameters on the meta device. weights: of each layer, what each of
    its parameters is. read: gives this rank's part of a weight. place "disk" reads a layer from its
    file every time; "cpu" reads all once into the CPU's memory, from where they are copied to the
    device beside its computation. After the last layer comes the first one of the next token.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        weights: Sequence[dict[str, WeightSpec]],
        *,
        read: Read,
        place: Place,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.modules, self.weights, self.read, self.place = modules, weights, read, place
        self.device, self.dtype = device, dtype
        _give_freed_memory_back()
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.kept: list[Weights] = [self._from_file(n) for n in range(len(modules))] if place == "cpu" else []
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="layers")
        self.coming: tuple[int, Future[Weights]] | None = None
        self.here: int | None = None
        self.held = 0
        """Most bytes of layers that were in the device's memory at once."""
        self.moved = 0
        """Bytes that have come so far."""
        self.sizes = [0] * len(modules)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers; known after a first pass."""
        return sum(self.sizes)

    def enter(self, number: int) -> None:
        """Wait for a layer's weights, let the last one's go, and send for the next one's. What
        reading them raised is raised here.
        """
        if self.here == number:
            return
        if self.coming is None or self.coming[0] != number:
            self.coming = number, self.thread.submit(self._fetch, number)
        weights = self.coming[1].result()
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
            for tensor in weights.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        if self.here is not None:
            self._install(self.here, None)
        self._install(number, weights)
        self.here = number
        self.sizes[number] = sum(t.nbytes for t in weights.values())
        self.moved += self.sizes[number]
        following = (number + 1) % len(self.modules)
        ahead = 0
        if following != number:
            self.coming = following, self.thread.submit(self._fetch, following)
            ahead = self.sizes[following] or self.sizes[number]  # layers are of one size
        self.held = max(self.held, self.sizes[number] + ahead)

    def close(self) -> None:
        """End the thread, once it has read what it is reading."""
        self.thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, number: int) -> Weights:
        if self.place == "disk":
            weights = self._from_file(number)
            return weights if self.side is None else self._to_device(weights)
        return self._to_device(self.kept[number])

    def _from_file(self, number: int) -> Weights:
        with torch.no_grad():
            found = {name: self.read(weight).to(self.dtype) for name, weight in self.weights[number].items()}
        return {name: t.pin_memory() for name, t in found.items()} if self.side is not None else found

    def _to_device(self, weights: Weights) -> Weights:
        if self.side is None:
            return {name: t.to(self.device, copy=True) for name, t in weights.items()}
        with torch.cuda.stream(self.side):
            return {name: t.to(self.device, non_blocking=True) for name, t in weights.items()}

    def _install(self, number: int, weights: Weights | None) -> None:
        """Give a layer its weights; None: leave it without memory again."""
        for name in self.weights[number]:
            owner, _, leaf = name.rpartition(".")
            module = self.modules[number].get_submodule(owner)
            now = module._parameters[leaf]
            value = torch.empty(now.shape, dtype=self.dtype, device="meta") if weights is None else weights[name]
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def _give_freed_memory_back() -> None:
    """Have glibc map each block of 128 KiB and more by itself, as it does at first.

    Once it has freed such a block, it takes others of that size from its heaps, which weights that
    come and go leave full of holes: a model of 95 MB, of which two layers have 8 MB, then took 70
    MB.
    """
    with suppress(AttributeError, OSError):  # another C library has no such switch
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
