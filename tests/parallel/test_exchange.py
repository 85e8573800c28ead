"""Who holds what of a sequence, and what an exchange moves."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.model.attention import Span
from toolkit.model.context import by_rank, in_order, local_spans, ring_blocks
from toolkit.parallel.exchange import choose, chunks_of, holders, numbers_moved, sent_heads

CP = st.integers(1, 5)


def causal_pairs(bounds: list[int]) -> Counter[tuple[int, int]]:
    return Counter((q, k) for a, b in pairwise(bounds) for q in range(a, b) for k in range(a, q + 1))


def place(local: int, rank: int, cp: int, size: int) -> int:
    """Where in the sequence a rank's token lies."""
    half, within = divmod(local, size)
    return chunks_of(rank, cp)[half] * size + within


def pairs_of(span: Span) -> list[tuple[int, int]]:
    later = span.keys.stop - len(span.queries)
    return [(q, k) for i, q in enumerate(span.queries) for k in range(span.keys.start, later + i + 1)]


@st.composite
def shared_sequences(draw: st.DrawFn) -> tuple[int, int, list[int] | None]:
    cp, size = draw(CP), draw(st.integers(1, 4))
    s = 2 * cp * size
    inner = draw(st.sets(st.integers(1, s - 1)))
    return cp, size, draw(st.sampled_from([None, sorted({0, s, *inner})]))


@given(shared_sequences())
def test_each_query_sees_each_key_once(shared: tuple[int, int, list[int] | None]) -> None:
    """Over all ranks, with gathered keys and in the ring, and nothing that comes after or lies in
    another document.
    """
    cp, size, bounds = shared
    s = 2 * cp * size
    expected = causal_pairs(bounds or [0, s])
    gathered: Counter[tuple[int, int]] = Counter()
    ring: Counter[tuple[int, int]] = Counter()
    for rank in range(cp):
        for span in local_spans(rank, cp, seq_length=s, bounds=bounds):
            gathered.update((place(q, rank, cp, size), k) for q, k in pairs_of(span))
        for source in range(cp):
            for _, queries, keys, causal in ring_blocks(rank, source, cp, size=size, bounds=bounds):
                for i, q in enumerate(range(queries.start, queries.stop)):
                    last = keys.start + i + 1 if causal else keys.stop
                    ring.update((place(q, rank, cp, size), place(k, source, cp, size)) for k in range(keys.start, last))
    assert gathered == ring == expected


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_zig_zag_balances_the_work(cp: int) -> None:
    """Without it the last rank of eight would have fifteen times the first one's."""
    size = 64
    work = [sum(len(pairs_of(s)) for s in local_spans(rank, cp, seq_length=2 * cp * size, bounds=None)) for rank in range(cp)]
    assert max(work) / min(work) < 1.05
    steps = [
        [
            sum(
                (q.stop - q.start) * (k.stop - k.start) / (2 if causal else 1)
                for _, q, k, causal in ring_blocks(r, (r - i) % cp, cp, size=size, bounds=None)
            )
            for r in range(cp)
        ]
        for i in range(cp)
    ]
    assert all(max(step) / min(step) < 1.05 for step in steps), "in each step of the ring, too"


@given(CP)
def test_the_order_has_an_inverse(cp: int) -> None:
    sequence = torch.arange(2 * cp * 3).unsqueeze(1)
    parts = by_rank(sequence, cp)
    assert torch.equal(in_order(parts), sequence)
    for chunk, (rank, half) in enumerate(holders(cp)):
        assert chunks_of(rank, cp)[half] == chunk
        assert torch.equal(parts[rank][half * 3 : half * 3 + 3], sequence[chunk * 3 : chunk * 3 + 3])


@given(st.integers(1, 4), st.integers(1, 6), CP)
def test_ulysses_sends_the_heads_that_are_read(groups: int, shared: int, cp: int) -> None:
    heads = groups * shared
    if heads % cp:
        return
    sent, each = sent_heads(heads=heads, groups=groups, cp=cp), heads // cp
    assert len({len(own) for own in sent}) == 1
    for rank, own in enumerate(sent):
        per_key = each // len(own)  # how PyTorch's grouped attention pairs them
        for i in range(each):
            assert own[i // per_key] == (rank * each + i) // shared


CHOICES = [
    ({"heads": 32, "groups": 8, "cp": 2, "tp": 1, "seq": 8192, "dropout": False}, "allgather"),
    ({"heads": 32, "groups": 8, "cp": 8, "tp": 1, "seq": 8192, "dropout": False}, "ulysses"),
    ({"heads": 32, "groups": 32, "cp": 4, "tp": 1, "seq": 8192, "dropout": False}, "ulysses"),
    ({"heads": 6, "groups": 6, "cp": 4, "tp": 1, "seq": 8192, "dropout": False}, "allgather"),
    ({"heads": 8, "groups": 1, "cp": 16, "tp": 8, "seq": 131072, "dropout": False}, "ring"),
    ({"heads": 8, "groups": 1, "cp": 16, "tp": 8, "seq": 131072, "dropout": True}, "allgather"),
    ({"heads": 8, "groups": 1, "cp": 16, "tp": 8, "seq": 131072, "dropout": False, "fp32": True}, "allgather"),
]


@pytest.mark.parametrize(("shape", "name"), CHOICES)
def test_auto_chooses_by_shape_and_link(shape: dict[str, int], name: str) -> None:
    chosen = choose("auto", **shape)  # type: ignore[arg-type]
    assert chosen.name == name and chosen.reason
    assert choose("ring", **shape).name == "ring"  # type: ignore[arg-type]


def test_auto_moves_the_least_within_a_host() -> None:
    for heads, groups, cp in ((32, 8, 2), (32, 8, 4), (32, 8, 8), (16, 16, 2), (16, 2, 8)):
        moved = {n: numbers_moved(n, heads=heads, groups=groups, cp=cp, tokens=64)[0] for n in ("allgather", "ulysses")}
        name = choose("auto", heads=heads, groups=groups, cp=cp, tp=1, seq=64 * cp, dropout=False).name
        assert moved[name] == min(moved.values())
