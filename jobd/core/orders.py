"""Two orders: sorted blocks, and heaps with stale entries.

Invariants:

- In `Sorted`, blocks are in order, have 1 to BLOCK entries, and `_last[i]` is the last entry of block i. Bisection
  finds an entry, and an insertion moves at most BLOCK entries.
- An entry in a `LazyHeap` is valid if its owner still says the same: the first job of a bucket, a wake time that of its
  bucket, a deadline that of its job. A stale entry is harmless, and `ordered` returns equal entries once. After `trim`
  a heap has at most 2 * live + SLACK entries.
- While an iterator is in use, nothing may be added or removed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, Final, Generic, TypeVar

from jobd.model.clocks import LockMs

Entry = TypeVar("Entry", bound=tuple[object, ...])
Item = TypeVar("Item", tuple[int, int, int, str, int], tuple[int, int, str], str)  # a DueEntry, a TimeEntry, a name

SLACK: Final = 64  # stale entries that a heap may always have; beyond, at most as many as valid ones
BLOCK: Final = 512  # entries


class LazyHeap(Generic[Entry]):
    """A heap that finds its smallest valid entries without removing them.

    Removal would cost a search, so a removed entry stays until it reaches the top or `trim` finds too many of them.
    """

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def push(self, entry: Entry) -> None:
        heapq.heappush(self.entries, entry)

    def first(self, valid: Callable[[Entry], bool]) -> Entry | None:
        """Return the smallest valid entry. Drops the stale ones before it."""
        entries = self.entries
        while entries:
            if valid(entries[0]):
                return entries[0]
            heapq.heappop(entries)
        return None

    def ordered(self, valid: Callable[[Entry], bool], most: int | None = None) -> Iterator[Entry]:
        """Iterate over valid entries in order, each once, and end after `most` entries. The heap must not change."""
        last = self.first(valid)
        if last is None:
            return
        yield last
        entries = self.entries
        frontier = [(entries[child], child) for child in (1, 2) if child < len(entries)]
        heapq.heapify(frontier)
        for _ in range(len(entries) - 1 if most is None else most):
            if not frontier:
                return
            entry, place = heapq.heappop(frontier)
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(entries):
                    heapq.heappush(frontier, (entries[child], child))
            # A job that left and came back has equal entries, next to each other.
            if entry != last and valid(entry):
                last = entry
                yield entry

    def pop_until(self, time: int | LockMs) -> Iterator[Entry]:
        """Remove and return every entry whose first part is at or before `time`, valid or not."""
        entries = self.entries
        while entries and entries[0][0] <= time:  # type: ignore[operator]  # the first part of every entry is an int
            yield heapq.heappop(entries)

    def trim(self, live: int, valid: Callable[[Entry], bool]) -> None:
        """Drop stale entries if they outnumber the `live` ones. The amortized cost per removal is constant."""
        if len(self.entries) > 2 * live + SLACK:
            self.entries = sorted({entry for entry in self.entries if valid(entry)})


class Sorted(Generic[Item]):
    """Entries in order, in blocks of at most BLOCK entries. Bisection finds, adds and removes an entry.

    `_last` holds the last entry of each block.
    """

    __slots__ = ("_last", "blocks")

    def __init__(self) -> None:
        self.blocks: list[list[Item]] = []
        self._last: list[Item] = []

    def __bool__(self) -> bool:
        return bool(self.blocks)

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(self.blocks)

    def first(self) -> Item | None:
        return self.blocks[0][0] if self.blocks else None

    def add(self, entry: Item) -> int:
        """Add `entry`. Return the number of its block."""
        place = bisect_left(self._last, entry)
        if place == len(self._last):  # after all others
            if not place or len(self.blocks[-1]) >= BLOCK:
                self._insert(place, [entry])
                return place
            place -= 1
        elif len(self.blocks[place]) >= BLOCK:
            place += entry > self._split(place)
        block = self.blocks[place]
        insort(block, entry)
        self._last[place] = block[-1]
        return place

    def remove(self, entry: Item) -> bool:
        """Remove `entry`. Return whether it was present."""
        place = bisect_left(self._last, entry)
        if place == len(self._last):
            return False
        block = self.blocks[place]
        at = bisect_left(block, entry)
        if block[at] != entry:
            return False
        del block[at]
        if not block:
            self._drop(place)
        elif at == len(block):
            self._last[place] = block[-1]
        return True

    def after(self, limit: Any, key: Callable[[Item], Any] | None = None) -> Iterator[Item]:
        """Iterate over the entries after `limit`, by `key` if given. Nothing may be added or removed meanwhile."""
        place = bisect_right(self._last, limit, key=key)
        if place < len(self._last):
            block = self.blocks[place]
            yield from islice(block, bisect_right(block, limit, key=key), None)
            yield from chain.from_iterable(islice(self.blocks, place + 1, None))

    def _split(self, place: int) -> Item:
        """Move the upper half of a block into a new one. Return the last entry of the lower half."""
        block = self.blocks[place]
        upper = block[BLOCK // 2 :]
        del block[BLOCK // 2 :]
        self._last[place] = block[-1]
        self._insert(place + 1, upper)
        return block[-1]

    def _insert(self, place: int, block: list[Item]) -> None:
        self.blocks.insert(place, block)
        self._last.insert(place, block[-1])

    def _drop(self, place: int) -> None:
        del self.blocks[place], self._last[place]
