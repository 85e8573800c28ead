"""Prepared tokens as windows of seq_length, so that each token is predicted once and none is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from toolkit.data.dataset import SPLITS, Member, split_documents
from toolkit.data.documents import positions_of
from toolkit.data.indexed import read_index
from toolkit.errors import DataError


@dataclass(frozen=True)
class Span:
    """Tokens first … last - 1 of a prepared prefix, as they lie in its .bin, documents in a row.
    apart: each is read alone.
    """

    prefix: str
    dtype: str
    first: int
    last: int
    apart: bool = False

    @classmethod
    def of(cls, member: Member, *, split: str, weights: tuple[float, ...], apart: bool = False) -> Span:
        """The documents of a split (train, valid or test, cut as training cuts them), or all of
        them. Raises DataError.

        apart: data.document_mask of the run.
        """
        index = member.index
        ids = np.memmap(f"{index.prefix}.bin", dtype=index.dtype, mode="r")
        if len(ids) != index.tokens:
            raise DataError(
                f"{index.prefix}.bin holds {len(ids):,} tokens, and its .idx lists {index.tokens:,}",
                why="tokens that are listed twice or not at all have no place in a row",
                fix="Prepare the text again with `toolkit data prepare`.",
            )
        documents = range(index.documents) if split == "all" else split_documents(weights, index.documents)[SPLITS.index(split)]
        first = int(index.lengths[: documents.start].sum(dtype="int64"))
        last = first + int(index.lengths[documents.start : documents.stop].sum(dtype="int64"))
        if last - first < 2:
            part = "" if split == "all" else f"the {split} split of "
            raise DataError(
                f"{part}{index.prefix} has {last - first} tokens",
                why="a loss needs one token to predict and one before it",
                fix="Use more text." if split == "all" else "Leave --split out, use more documents, or set data.split.",
            )
        return cls(index.prefix, str(index.dtype), first, last, apart)

    @property
    def labels(self) -> int:
        """Places of a label: every token but the first. With documents apart, no document's first
        token counts as one.
        """
        return self.last - self.first - 1

    def windows(self, seq_length: int) -> int:
        """Windows of seq_length labels that hold them all; the last one may be shorter."""
        return -(-self.labels // seq_length)


class Windows:
    """The windows of a span as a data set: {"tokens", "labels", "mask"} of shape [s], and
    "positions" where documents are apart.

    The mask is 1 where a label counts; it is 0 after the last token, and in windows past the end,
    which fill the last global batch. With documents apart it is 0 at each one's last token, too.
    """

    def __init__(self, span: Span, *, seq_length: int, windows: int) -> None:
        self.span, self.seq_length, self.count = span, seq_length, windows

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.memmap(f"{self.span.prefix}.bin", dtype=self.span.dtype, mode="r")

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where documents begin, in the places of the .bin; ascending, int64."""
        lengths = read_index(self.span.prefix).lengths.astype(np.int64)
        return np.unique(np.cumsum(lengths) - lengths)

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        start = self.span.first + place * self.seq_length
        piece = self._ids[start : max(start, min(start + self.seq_length + 1, self.span.last))]
        count = max(0, len(piece) - 1)
        tokens, labels = np.zeros(self.seq_length, np.int64), np.zeros(self.seq_length, np.int64)
        mask = np.zeros(self.seq_length, np.float32)
        tokens[:count], labels[:count], mask[:count] = piece[:count], piece[1:], 1.0
        if not self.span.apart:
            return {"tokens": tokens, "labels": labels, "mask": mask}
        begins = np.isin(np.arange(start, start + self.seq_length + 1), self._starts)
        mask *= ~begins[1:]
        # a window may cut a document, and what fills the last one is a document without a label
        return {"tokens": tokens, "labels": labels, "mask": mask, "positions": positions_of(np.concatenate([[True], begins[1:-1]]))}

    def counted(self, windows: int) -> int:
        """Labels that count in the first windows."""
        labels = min(self.span.labels, windows * self.seq_length)
        if not self.span.apart:
            return labels
        first, last = np.searchsorted(self._starts, (self.span.first + 1, self.span.first + labels + 1))
        return int(labels - (last - first))
