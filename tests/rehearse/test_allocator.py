"""The model of PyTorch's caching allocator, on sequences whose outcome follows from its rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toolkit.rehearse.allocator import CachingAllocator

MIB = 2**20


def test_small_tensors_share_a_segment_of_two_mebibytes() -> None:
    a = CachingAllocator()
    a.allocate(1, 1)
    a.allocate(2, 513)
    assert (a.allocated, a.reserved) == (512 + 1024, 2 * MIB)


def test_middle_sizes_share_a_segment_of_twenty() -> None:
    a = CachingAllocator()
    for key in range(3):
        a.allocate(key, 6 * MIB)
    assert a.reserved == 20 * MIB
    a.allocate(3, 6 * MIB)
    assert a.reserved == 40 * MIB


def test_large_ones_have_their_own_and_are_rounded() -> None:
    a = CachingAllocator()
    a.allocate(1, 21 * MIB + 1)
    assert (a.allocated, a.reserved) == (22 * MIB, 22 * MIB)  # too little is left to split off


def test_a_free_block_is_used_again_and_split() -> None:
    a = CachingAllocator()
    a.allocate(1, 40 * MIB)
    a.free(1)
    a.allocate(2, 16 * MIB)
    a.allocate(3, 24 * MIB)
    assert a.reserved == a.allocated == 40 * MIB


def test_a_remainder_of_up_to_one_mebibyte_stays_with_its_block() -> None:
    a = CachingAllocator()
    a.allocate(1, 40 * MIB)
    a.free(1)
    a.allocate(2, 39 * MIB)
    assert a.allocated == 40 * MIB


def test_neighbours_join_when_freed() -> None:
    a = CachingAllocator()
    a.allocate(1, 40 * MIB)
    a.free(1)
    a.allocate(2, 20 * MIB)
    a.allocate(3, 20 * MIB)
    a.free(2)
    a.free(3)
    a.allocate(4, 40 * MIB)
    assert a.reserved == 40 * MIB


def test_streams_do_not_share() -> None:
    a = CachingAllocator()
    a.allocate(1, 40 * MIB)
    a.free(1)
    a.allocate(2, 40 * MIB, stream=1)
    assert a.reserved == 80 * MIB


def test_cached_segments_go_back_before_memory_ends() -> None:
    a = CachingAllocator(capacity=60 * MIB)
    a.allocate(1, 40 * MIB)
    a.free(1)
    a.allocate(2, 50 * MIB)
    assert (a.retries, a.reserved, a.overdrawn) == (1, 50 * MIB, False)
    a.allocate(3, 20 * MIB)
    assert a.overdrawn


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 64 * MIB), st.integers(0, 1)), max_size=60))
def test_what_is_reserved_holds_what_is_allocated(moves: list[tuple[int, int, int]]) -> None:
    a, live = CachingAllocator(), {}
    for key, nbytes, stream in moves:
        if key in live:
            a.free(key)
            del live[key]
        else:
            a.allocate(key, nbytes, stream=stream)
            live[key] = nbytes
        assert sum(live.values()) <= a.allocated <= a.reserved <= a.peak_reserved
    for key in live:
        a.free(key)
    a.empty_cache()
    assert a.allocated == a.reserved == 0
