"""Safetensors files whose tensors are made and written by several threads at once, at places known
beforehand.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from toolkit.tensors import DTYPES, Rows

IN_FLIGHT = 512 << 20  # bytes of tensors being made or written at a time; a larger one is alone
_CHUNK = 1 << 24
_FLUSH_S = 0.2


@dataclass
class Slot:
    """A tensor's place: file, dtype, shape."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    file: int = 0
    offset: int = 0

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Job:
    """Slots whose tensors make() gives, in order; needs: bytes of memory it takes meanwhile."""

    slots: list[Slot]
    make: Callable[[], list[Rows]]
    needs: int
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(s.bytes for s in self.slots)


def shards(jobs: Iterable[Job], *, limit: int) -> int:
    """Give every slot its file, none larger than limit bytes unless one tensor is; returns the
    number of files.
    """
    file, used = 0, 0
    for slot in (s for job in jobs for s in job.slots):
        if used and used + slot.bytes > limit:
            file, used = file + 1, 0
        slot.file = file
        used += slot.bytes
    return file + 1


def write_all(paths: list[Path], jobs: list[Job], *, threads: int = 2, progress: Callable[[int], None] = lambda _: None) -> None:
    """Write new files and sync them; progress is called with bytes written since its last call.
    OSError where a file cannot be written.
    """
    descriptors = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644) for path in paths]
    room = _Room(IN_FLIGHT)
    stop = threading.Event()

    def run(job: Job) -> None:
        with room.of(job.needs):
            if stop.is_set():
                return
            for slot, rows in zip(job.slots, job.make(), strict=True):
                if list(rows.shape) != slot.shape or rows.dtype != slot.dtype:
                    raise ValueError(f"{slot.name} was to be {slot.shape} of {slot.dtype}, and is {list(rows.shape)} of {rows.dtype}")
                _write(descriptors[slot.file], rows.pieces, slot.offset)
            progress(job.total)

    failed: list[OSError] = []

    def flush() -> None:
        # what is written goes to the disk while the rest is still being made
        try:
            while not stop.wait(_FLUSH_S):
                for descriptor in descriptors:
                    os.fdatasync(descriptor)
        except OSError as e:  # the system tells of a write that failed only once
            failed.append(e)

    try:
        for i, descriptor in enumerate(descriptors):
            header, end = _header([s for job in jobs for s in job.slots if s.file == i])
            os.pwrite(descriptor, header, 0)
            os.truncate(descriptor, end)
        flusher = threading.Thread(target=flush, daemon=True)
        flusher.start()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="convert")
        try:
            futures = [pool.submit(run, job) for job in jobs]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            flusher.join()
        for error in failed:
            raise error
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _header(slots: list[Slot]) -> tuple[bytes, int]:
    """A file's header, and the file's length; the slots' offsets are set to count from its start."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for slot in slots:
        header[slot.name] = {"dtype": DTYPES[slot.dtype], "shape": slot.shape, "data_offsets": [at, at + slot.bytes]}
        slot.offset, at = at, at + slot.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for slot in slots:
        slot.offset += 8 + len(text)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def _write(descriptor: int, pieces: list[Tensor], offset: int) -> None:
    for piece in pieces:
        view = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        while len(view):
            n = os.pwrite(descriptor, view[:_CHUNK], offset)
            view, offset = view[n:], offset + n


class _Room:
    """Lets jobs in as long as their bytes together stay below a limit; one alone may be larger."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.changed = threading.Condition()

    def of(self, size: int) -> _Place:
        return _Place(self, size)


class _Place:
    def __init__(self, room: _Room, size: int) -> None:
        self.room, self.size = room, size

    def __enter__(self) -> None:
        with self.room.changed:
            self.room.changed.wait_for(lambda: not self.room.used or self.room.used + self.size <= self.room.limit)
            self.room.used += self.size

    def __exit__(self, *_: object) -> None:
        with self.room.changed:
            self.room.used -= self.size
            self.room.changed.notify_all()
