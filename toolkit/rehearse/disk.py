"""The disk of a rehearsal: what DeepSpeed's compiled reader and writer of files offers, with
tensors that hold nothing.

Files are neither made nor read; bytes and page-locked buffers are reported.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

_LOCKED: set[int] = set()


class Reports(Protocol):
    """Who is told: of bytes that go to or come from the disk, and of buffers that are page-locked."""

    def disk(self, way: str, nbytes: int) -> None: ...

    def locked(self, tensor: Tensor) -> None: ...


class Handle:
    """DeepSpeed's handle of asynchronous reads and writes: it takes requests, and wait() says how
    many have ended.
    """

    def __init__(self, reports: Reports) -> None:
        self.reports, self.pending = reports, 0

    def new_cpu_locked_tensor(self, elements: int, like: Tensor) -> Tensor:
        """A page-locked buffer of host memory; the system rounds it up to pages only."""
        buffer = torch.empty(int(elements), dtype=like.dtype, device="cpu")
        storage = buffer.untyped_storage()
        _LOCKED.add(storage._cdata)
        weakref.finalize(storage, _LOCKED.discard, storage._cdata).atexit = False
        self.reports.locked(buffer)
        return buffer

    def free_cpu_locked_tensor(self, buffer: Tensor) -> bool:
        return self.is_pinned(buffer)  # its memory goes with its last reference

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in _LOCKED

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        return self._asked("read", buffer)

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        return self._asked("written", buffer)

    def wait(self) -> int:
        ended, self.pending = self.pending, 0
        return ended

    def _asked(self, way: str, buffer: Tensor) -> int:
        self.pending += 1
        self.reports.disk(way, buffer.numel() * buffer.element_size())
        return 0  # no error


def install(deepspeed: Any, reports: Callable[[], Reports]) -> None:
    """In the place of what DeepSpeed compiles for offload to files; reports: asked for whenever a
    handle is made.
    """
    operators = SimpleNamespace(aio_handle=lambda *_, **__: Handle(reports()))
    deepspeed.ops.op_builder.AsyncIOBuilder.load = lambda self, *_, **__: operators
