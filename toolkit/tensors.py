"""Tensors to a safetensors file in one pass: hashed while they are written, synced at the end."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from toolkit.files import FileRecord

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_CHUNK = 1 << 19  # hashed and written at a time: small enough to stay in the processor's cache; 4 MiB takes twice the time


class Rows:
    """A lazy concatenation of tensors along dimension 0: they are written one after the other and
    never copied together.
    """

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces = list(pieces)
        self.dtype = pieces[0].dtype
        self.shape = torch.Size([sum(len(p) for p in pieces), *pieces[0].shape[1:]])
        self.nbytes = sum(p.nbytes for p in pieces)

    def whole(self) -> Tensor:
        """The concatenated tensor."""
        return torch.cat(self.pieces) if len(self.pieces) > 1 else self.pieces[0]


def mapped(path: Path, *, dtype: torch.dtype, shape: Sequence[int], offset: int) -> Tensor:
    """A tensor of a file through a memory map of its own: nothing is copied, and the pages are
    released with the tensor.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if not size:
        return torch.empty(tuple(shape), dtype=dtype)
    first = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as f:
        pages = mmap.mmap(f.fileno(), offset - first + size, offset=first, access=mmap.ACCESS_COPY)
    pages.madvise(mmap.MADV_SEQUENTIAL)
    flat = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=offset - first)
    return (flat if offset % dtype.itemsize == 0 else flat.clone()).view(dtype).view(tuple(shape))


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Rows], *, metadata: Mapping[str, str]) -> FileRecord:
    """Write a new safetensors file and sync it. The library's own writer neither syncs nor returns
    a checksum.
    """
    entries = {n: (t.dtype, list(t.shape), iter(t.pieces if isinstance(t, Rows) else (t,))) for n, t in tensors.items()}
    return write_stream(path, entries, metadata=metadata)


def write_stream(
    path: Path, entries: Mapping[str, tuple[torch.dtype, list[int], Iterator[Tensor]]], *, metadata: Mapping[str, str]
) -> FileRecord:
    """Like write_tensors, with each tensor given as dtype, shape and its pieces in order; only one
    piece need exist at a time.

    Raises ValueError where the pieces do not add up to the shape.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, _) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, total = hashlib.sha256(), 0
    try:
        with path.open("xb", buffering=0) as f:
            for data in chain((len(text).to_bytes(8, "little") + text,), (_bytes(t) for _, _, pieces in entries.values() for t in pieces)):
                view = memoryview(data)
                for start in range(0, len(view), _CHUNK):
                    piece = view[start : start + _CHUNK]
                    digest.update(piece)
                    total += len(piece)
                    while len(piece):  # an unbuffered file may write less than it is given
                        piece = piece[f.write(piece) :]
            os.fsync(f.fileno())
    except OSError as e:
        e.filename = e.filename or str(path)  # a failed write does not say of which file
        raise
    if total != 8 + len(text) + offset:
        raise ValueError(f"{path} got {total} bytes, and its header tells of {8 + len(text) + offset}")
    return FileRecord(name=path.name, bytes=total, sha256=digest.hexdigest())


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; the tensors are read from disk when they are used."""
    with safe_open(path, framework="pt", device="cpu") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118  not a dict


def read_metadata(path: Path) -> dict[str, str]:
    """A file's metadata alone."""
    with safe_open(path, framework="pt", device="cpu") as f:
        return f.metadata() or {}
