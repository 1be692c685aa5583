"""The orders in which jobs are looked for: heaps whose entries go stale instead of being removed.

Pure structures. What makes an entry valid is the book's business, handed in as a predicate.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Entry = TypeVar("Entry", bound=tuple[object, ...])

DueEntry = tuple[int, int, int, str]  # priority, run_at, job seq, job id: the order of claims
TimeEntry = tuple[int, int, str]  # time, job seq, job id

SLACK = 64  # stale entries that a heap may always hold; beyond, at most as many as it has valid ones


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
        """The smallest valid entry; stale ones above it are dropped."""
        entries = self.entries
        while entries:
            if valid(entries[0]):
                return entries[0]
            heapq.heappop(entries)
        return None

    def ordered(self, valid: Callable[[Entry], bool]) -> Iterator[Entry]:
        """Valid entries in order, each once, cost by the number taken. The heap must not change meanwhile."""
        last = self.first(valid)
        if last is None:
            return
        yield last
        entries = self.entries
        frontier = [(entries[child], child) for child in (1, 2) if child < len(entries)]
        heapq.heapify(frontier)
        while frontier:
            entry, place = heapq.heappop(frontier)
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(entries):
                    heapq.heappush(frontier, (entries[child], child))
            # A job that went and came back has equal entries, next to each other: give it once.
            if entry != last and valid(entry):
                last = entry
                yield entry

    def pop_until(self, time: int) -> Iterator[Entry]:
        """Take out every entry whose first part is at or before `time`, valid or not."""
        entries = self.entries
        while entries and entries[0][0] <= time:  # type: ignore[operator]  # the first part of every entry is an int
            yield heapq.heappop(entries)

    def trim(self, live: int, valid: Callable[[Entry], bool]) -> None:
        """Drop the stale entries where they outnumber the `live` ones; amortised, a constant cost per removal."""
        if len(self.entries) > 2 * live + SLACK:
            self.entries = sorted({entry for entry in self.entries if valid(entry)})


class Lane:
    """The due jobs of one queue, kind and priority. `live` counts them; the heap may hold stale ones beside."""

    __slots__ = ("heap", "live")

    def __init__(self) -> None:
        self.heap: LazyHeap[DueEntry] = LazyHeap()
        self.live = 0


class DueJobs:
    """The due jobs of one queue, in exact order over all kinds or over some of them.

    One lane for each kind and priority; `heads` orders the lanes by their first job, so that the cost of a claim does
    not grow with their number.
    """

    __slots__ = ("_valid", "heads", "lanes")

    def __init__(self, valid: Callable[[str, DueEntry], bool]) -> None:
        self.lanes: dict[str, dict[int, Lane]] = {}  # kind -> priority -> lane
        self.heads: LazyHeap[tuple[int, int, int, str, str]] = LazyHeap()  # a due entry and its kind
        self._valid = valid

    @property
    def live(self) -> int:
        """How many jobs are due here."""
        return sum(lane.live for lanes in self.lanes.values() for lane in lanes.values())

    def add(self, kind: str, entry: DueEntry) -> None:
        lane = self.lanes.setdefault(kind, {}).setdefault(entry[0], Lane())
        lane.live += 1
        lane.heap.push(entry)
        if lane.heap.entries[0] is entry:
            self.heads.push((*entry, kind))
            self._trim_heads()

    def remove(self, kind: str, priority: int) -> None:
        """One job of this lane is no longer due; its entry is stale already."""
        lane = self.lanes[kind][priority]
        lane.live -= 1
        if lane.live == 0:
            del self.lanes[kind][priority]
            if not self.lanes[kind]:
                del self.lanes[kind]
        else:
            lane.heap.trim(lane.live, lambda entry: self._valid(kind, entry))
            self._offer_head(kind, lane)

    def due(self, kinds: Iterable[str] | None) -> Iterator[DueEntry]:
        """Entries of due jobs of `kinds` (None: of all), in order. Nothing may change while it is read."""
        heads = self._all_heads() if kinds is None else self._heads_of(kinds)
        upcoming = next(heads, None)
        frontier: list[tuple[DueEntry, Iterator[DueEntry]]] = []
        while upcoming is not None or frontier:
            if upcoming is not None and (not frontier or upcoming[:4] <= frontier[0][0]):
                lane, kind = self.lanes[upcoming[4]][upcoming[0]], upcoming[4]
                following = lane.heap.ordered(lambda entry, kind=kind: self._valid(kind, entry))  # type: ignore[misc]
                upcoming = next(heads, None)
            else:
                entry, following = heapq.heappop(frontier)
                yield entry
            if (next_entry := next(following, None)) is not None:
                heapq.heappush(frontier, (next_entry, following))

    def oldest_run_at(self) -> int | None:
        """When the job that has been due longest became due; the first of each lane is its oldest."""
        firsts = (self._first(kind, lane) for kind, lanes in self.lanes.items() for lane in lanes.values())
        return min((entry[1] for entry in firsts if entry is not None), default=None)

    def entries(self) -> Iterator[tuple[str, DueEntry]]:
        """Every valid entry with its kind, in no order."""
        for kind, lanes in self.lanes.items():
            for lane in lanes.values():
                yield from ((kind, entry) for entry in dict.fromkeys(lane.heap.entries) if self._valid(kind, entry))

    def _first(self, kind: str, lane: Lane) -> DueEntry | None:
        return lane.heap.first(lambda entry: self._valid(kind, entry))

    def _offer_head(self, kind: str, lane: Lane) -> None:
        first = self._first(kind, lane)
        assert first is not None  # the lane has a job that is due
        self.heads.push((*first, kind))
        self._trim_heads()

    def _is_head(self, head: tuple[int, int, int, str, str]) -> bool:
        lane = self.lanes.get(head[4], {}).get(head[0])
        return lane is not None and self._first(head[4], lane) == head[:4]

    def _trim_heads(self) -> None:
        self.heads.trim(sum(map(len, self.lanes.values())), self._is_head)

    def _all_heads(self) -> Iterator[tuple[int, int, int, str, str]]:
        return self.heads.ordered(self._is_head)

    def _heads_of(self, kinds: Iterable[str]) -> Iterator[tuple[int, int, int, str, str]]:
        lanes = ((kind, lane) for kind in set(kinds) for lane in self.lanes.get(kind, {}).values())
        firsts = ((self._first(kind, lane), kind) for kind, lane in lanes)
        return iter(sorted((*first, kind) for first, kind in firsts if first is not None))
