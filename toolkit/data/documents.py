"""Samples whose documents stay apart: positions that begin again, labels that end with the document.

A sample is [s] positions. `positions` counts from 0 within each document, and so says where each
begins. `loss_mask` is 1 where the label is the document's next token, and 0 at its last token and
on padding. What pads a sample is a document of its own without a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Sample = dict[str, np.ndarray]


def positions_of(starts: np.ndarray) -> np.ndarray:
    """Places counted from each document's beginning. starts: bool [s], true at the first token of
    each; the first is one.
    """
    places = np.arange(len(starts), dtype=np.int32)
    return places - np.maximum.accumulate(np.where(starts, places, 0))


def bounds_of(positions: np.ndarray) -> np.ndarray:
    """Where documents begin in the rows of a batch laid end to end, and their end: int32 [documents
    + 1]. positions: [b, s].
    """
    return np.append(np.flatnonzero(positions == 0), positions.size).astype(np.int32)


def cut_at_ends(text: np.ndarray, *, eod: int) -> Sample:
    """A joined text of s + 1 tokens as a sample of s. eod: the token that ends each document."""
    tokens, labels = text[:-1], text[1:]
    ends = tokens == eod
    starts = np.concatenate([[True], ends[:-1]])
    return {"tokens": tokens, "labels": labels, "positions": positions_of(starts), "loss_mask": (~ends).astype(np.uint8)}


def laid_end_to_end(pieces: Sequence[np.ndarray], whole: Sequence[bool], *, seq_length: int) -> Sample:
    """Documents one after the other, filled up with padding.

    pieces: tokens of each. whole: whether a piece is used to its end; else its last token is only
    the label of the one before it, since the document goes on in another sample.
    """
    tokens, labels = np.zeros(seq_length, np.int64), np.zeros(seq_length, np.int64)
    mask, starts = np.zeros(seq_length, np.uint8), np.zeros(seq_length, bool)
    starts[0] = True
    at = 0
    for piece, ends in zip(pieces, whole, strict=True):
        length = len(piece) if ends else len(piece) - 1
        tokens[at : at + length] = piece[:length]
        labels[at : at + len(piece) - 1] = piece[1:]
        mask[at : at + len(piece) - 1] = 1
        starts[at] = True
        at += length
    if at < seq_length:
        starts[at] = True
    return {"tokens": tokens, "labels": labels, "positions": positions_of(starts), "loss_mask": mask}
