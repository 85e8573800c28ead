"""Best-fit packing: whole documents into samples of a fixed length, with little room left over.

Documents go in by falling length, each into the sample with the least room that still takes it
(best-fit decreasing; arXiv 2404.10830 trains with it). A document longer than a sample is cut into
pieces of a sample's length and a rest. No other is cut.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Which pieces lie in which sample.

    bounds: int64 [samples + 1]; sample i holds pieces bounds[i] .. bounds[i + 1] - 1. pieces: int64
    [pieces, 3]: document, first token, tokens.
    """

    bounds: np.ndarray
    pieces: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1


def cut_long(lengths: np.ndarray, size: int) -> np.ndarray:
    """Pieces [n, 3] (document, first token, tokens) of at most `size` tokens. lengths: of the
    documents; empty ones have none.
    """
    counts = -(-lengths // size)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * size
    return np.stack([documents, first, np.minimum(size, lengths[documents] - first)], axis=1).astype(np.int64)


def best_fit(lengths: np.ndarray, size: int, *, random: np.random.RandomState) -> Packs:
    """Pack documents of these lengths (int [documents]) into samples of `size` tokens.

    random: shuffles documents of equal length among each other, and the samples. The time grows
    with the number of different lengths, and hardly with that of documents.
    """
    pieces = cut_long(np.asarray(lengths, np.int64), size)
    pieces = pieces[random.permutation(len(pieces))]
    pieces = pieces[np.argsort(-pieces[:, 2], kind="stable")]
    sample_of = np.empty(len(pieces), np.int64)
    # samples by the room they have left: all of a room are alike, so they are filled together
    open_samples: dict[int, list[np.ndarray]] = {}
    rooms: list[int] = []
    samples = 0

    def keep(numbers: np.ndarray, room: int) -> None:
        if room and len(numbers):
            if room not in open_samples:
                insort(rooms, room)
            open_samples.setdefault(room, []).append(numbers)

    edges = np.flatnonzero(np.diff(pieces[:, 2])) + 1
    for start, end in zip([0, *edges], [*edges, len(pieces)], strict=True):
        at, length = int(start), int(pieces[start, 2]) if len(pieces) else 0
        while at < end:
            fitting = bisect_left(rooms, length)
            if fitting < len(rooms):
                room = rooms.pop(fitting)
                numbers = np.concatenate(open_samples.pop(room))
            else:
                room = size
                numbers = np.arange(samples, samples - (-(end - at) // (size // length)))
                samples += len(numbers)
            each = room // length  # a sample takes as many as it can before the next one is begun
            full = min(len(numbers), (end - at) // each)
            sample_of[at : at + full * each] = np.repeat(numbers[:full], each)
            at += full * each
            keep(numbers[:full], room - each * length)
            rest = min(end - at, each) if full < len(numbers) else 0
            if rest:
                sample_of[at : at + rest] = numbers[full]
                at += rest
                keep(numbers[full : full + 1], room - rest * length)
            keep(numbers[full + bool(rest) :], room)
    place = random.permutation(samples)[sample_of] if samples else sample_of
    order = np.argsort(place, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=samples))])
    return Packs(bounds.astype(np.int64), pieces[order])
