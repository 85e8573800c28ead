"""Reading Megatron's .idx/.bin pairs with numpy alone: a check that needs no torch and reports
damage as DataError.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.errors import DataError

# The layout of megatron-core's indexed_dataset.py: magic, version, dtype code, two counts, then three arrays.
MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_PIECE = 1 << 24  # tokens scanned at a time


@dataclass(frozen=True)
class Index:
    """A whole .idx file. lengths: tokens of each document [documents], memory-mapped."""

    prefix: str
    dtype: np.dtype
    documents: int
    tokens: int
    lengths: np.ndarray


def read_index(prefix: str | Path) -> Index:
    """Check a prefix's pair of files against each other and return the index.

    Raises DataError naming the file when one is missing, is no Megatron index, is cut short, or
    does not belong to the other.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise DataError(f"{path} does not exist", why="a prepared prefix is a .idx and a .bin file", fix=_FIX)
    size = idx.stat().st_size
    with idx.open("rb") as f:
        head = f.read(_HEADER.size)
    if head[: len(MAGIC)] != MAGIC:
        raise DataError(f"{idx} is not a Megatron index", why=f"it starts with {head[: len(MAGIC)]!r} instead of {MAGIC!r}", fix=_FIX)
    if len(head) < _HEADER.size:
        raise DataError(f"{idx} has {size} bytes", why=f"the header alone takes {_HEADER.size}: the file is cut short", fix=_FIX)
    _, version, code, sequences, marks = _HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{idx} has version {version}", why="only version 1 is known", fix=_FIX)
    if code not in _DTYPES:
        raise DataError(f"{idx} has dtype code {code}", why=f"token ids have one of {sorted(_DTYPES)}", fix=_FIX)
    dtype = np.dtype(_DTYPES[code])
    need = _HEADER.size + 12 * sequences + 8 * marks
    if size < need:
        raise DataError(f"{idx} has {size} bytes", why=f"its header promises {need}: the file is cut short", fix=_FIX)
    if size > need:
        # One mode byte per sequence follows in multimodal sets, which these models cannot read.
        raise DataError(f"{idx} has {size} bytes", why=f"its header promises {need}: multimodal, or written by something else", fix=_FIX)
    if sequences == 0:
        raise DataError(f"{idx} lists no documents", why="there is nothing to train on", fix=_FIX)
    lengths = np.memmap(idx, dtype="<i4", mode="r", offset=_HEADER.size, shape=(sequences,))
    pointers = np.memmap(idx, dtype="<i8", mode="r", offset=_HEADER.size + 4 * sequences, shape=(sequences,))
    ends = np.memmap(idx, dtype="<i8", mode="r", offset=_HEADER.size + 12 * sequences, shape=(marks,)) if marks else np.zeros(1, "<i8")
    if marks < 1 or int(ends[-1]) != sequences:
        raise DataError(f"{idx} is damaged", why=f"its documents end at sequence {int(ends[-1])} of {sequences}", fix=_FIX)
    if int(lengths.min()) < 0 or int(pointers.min()) < 0:
        raise DataError(f"{idx} is damaged", why="it holds negative lengths or positions", fix=_FIX)
    have = data.stat().st_size
    # Clipped, since a damaged pointer near 2**63 would wrap around in the sum.
    reach = int((np.minimum(pointers, have + 1) + lengths.astype(np.int64) * dtype.itemsize).max())
    if have < reach:
        raise DataError(
            f"{data} has {have} bytes",
            why=f"{idx.name} points to byte {reach}: the file is cut short or belongs to another index",
            fix=_FIX,
        )
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(f"{idx} lists {sequences} documents of 0 tokens", why="there is nothing to train on", fix=_FIX)
    return Index(prefix=str(prefix), dtype=dtype, documents=sequences, tokens=tokens, lengths=lengths)


_FIX = "Prepare the data again with `toolkit data prepare`, or set data.source to another prefix."


def count_ids(index: Index) -> np.ndarray:
    """How often each token id occurs, by reading the whole .bin: int64 [largest id + 1]. Raises
    DataError on a negative id.
    """
    ids = np.memmap(f"{index.prefix}.bin", dtype=index.dtype, mode="r")
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(ids), _PIECE):
        piece = ids[start : start + _PIECE]
        if index.dtype.kind == "i" and int(piece.min()) < 0:
            raise DataError(f"{index.prefix}.bin holds negative token ids", why="it is damaged or not text", fix=_FIX)
        counts = add_counts(counts, np.bincount(piece.astype(np.int64, copy=False)))
    return counts


def add_counts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of two count arrays of different lengths."""
    total = np.zeros(max(len(a), len(b)), dtype=np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution with these counts: -sum p ln p."""
    p = counts[counts > 0] / counts.sum()
    return float(math.fsum(-p * np.log(p)))
