"""What PyTorch's caching allocator reserves for a sequence of allocations and frees: its rules, in
integers, without a GPU.

Rules as in c10/cuda/CUDACachingAllocator.cpp with default settings: sizes are multiples of 512
bytes; up to 1 MiB they come from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, and above
from a segment of their own; the smallest free block of the same stream that fits is taken, and
split where enough of it would be left.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

ROUND = 512
SMALL = 2**20
SMALL_SEGMENT = 2 * 2**20
LARGE_FROM = 10 * 2**20
LARGE_SEGMENT = 20 * 2**20
LARGE_ROUND = 2 * 2**20


@dataclass(eq=False)
class Block:
    """A piece of a segment; neighbours of the same segment are linked."""

    address: int
    size: int
    pool: tuple[int, bool]  # stream, and whether it holds small blocks
    free: bool = False
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """allocated, reserved and their peaks, in bytes. capacity: what the driver gives at most; None:
    without end.

    retries: how often a new segment did not fit and cached ones had to be given back, which waits
    for the device.
    """

    def __init__(self, *, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        self.overdrawn = False
        self._top = 0
        self._live: dict[int, Block] = {}
        self._free: dict[tuple[int, bool], list[tuple[int, int]]] = {}  # by pool: (size, address), sorted
        self._blocks: dict[int, Block] = {}

    def allocate(self, key: int, nbytes: int, *, stream: int = 0) -> None:
        """Serve one tensor's storage. key: the caller's name for it, given back to free()."""
        size = max(ROUND, -(-nbytes // ROUND) * ROUND)
        block = self._take((stream, size <= SMALL), size)
        self._live[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, key: int) -> None:
        """Give one storage's block back to its pool, joined with free neighbours."""
        block = self._live.pop(key)
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._forget(other)
                block = self._join(block, other)
        self._keep(block)

    def empty_cache(self) -> None:
        """Give segments that are wholly free back to the driver."""
        for pool in self._free.values():
            for _, address in list(pool):
                block = self._blocks[address]
                if block.before is None and block.after is None:
                    self._forget(block)
                    del self._blocks[block.address]
                    self.reserved -= block.size

    def reset_peaks(self) -> None:
        """Peaks from now on."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _take(self, pool: tuple[int, bool], size: int) -> Block:
        free = self._free.setdefault(pool, [])
        at = bisect_left(free, (size, -1))
        if at < len(free):
            block = self._blocks[free[at][1]]
            self._forget(block)
        else:
            block = self._segment(pool, size)
        left = block.size - size
        if left >= ROUND if pool[1] else left > SMALL:
            rest = Block(block.address + size, left, pool, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = size, rest
            self._blocks[rest.address] = rest
            self._keep(rest)
        block.free = False
        return block

    def _segment(self, pool: tuple[int, bool], size: int) -> Block:
        whole = SMALL_SEGMENT if pool[1] else LARGE_SEGMENT if size < LARGE_FROM else -(-size // LARGE_ROUND) * LARGE_ROUND
        if self.capacity is not None and self.reserved + whole > self.capacity:
            self.retries += 1
            self.empty_cache()
            self.overdrawn |= self.reserved + whole > self.capacity
        block = Block(self._top, whole, pool)
        self._top += whole + LARGE_ROUND  # segments never touch
        self._blocks[block.address] = block
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _keep(self, block: Block) -> None:
        block.free = True
        insort(self._free.setdefault(block.pool, []), (block.size, block.address))

    def _forget(self, block: Block) -> None:
        pool = self._free[block.pool]
        del pool[bisect_left(pool, (block.size, block.address))]
        block.free = False

    def _join(self, one: Block, other: Block) -> Block:
        first, second = (one, other) if one.address < other.address else (other, one)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        del self._blocks[second.address]
        return first
