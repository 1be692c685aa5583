"""The orders in which jobs are looked for: heaps whose entries go stale instead of being removed.

Pure structures. What makes an entry valid is the book's business, handed in as a predicate.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from heapq import merge
from itertools import groupby
from operator import attrgetter
from typing import Generic, TypeVar

from jobd.job import Untouched

Entry = TypeVar("Entry", bound=tuple[object, ...])

DueEntry = tuple[int, int, int, str]  # priority, run_at, job seq, job id: the order of claims
TimeEntry = tuple[int, int, str]  # time, job seq, job id

SLACK = 64  # stale entries that a heap may always hold; beyond, at most as many as it has valid ones


def _due_since(entry: DueEntry) -> tuple[int, int]:
    return entry[1], entry[2]


def entry_of(job: Untouched) -> DueEntry:
    """The place of an untouched job: due since its creation."""
    return (job.options.priority, job.created_at, job.seq, job.id)


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


class Line:
    """Jobs to which nothing has happened, in order of creation: 8 bytes for each, where an entry of a heap takes 90.

    One joins at the end, and only where it belongs there. As in a heap, those that are gone stay until they come to
    the front or `trim` finds too many of them.
    """

    __slots__ = ("jobs",)

    def __init__(self) -> None:
        self.jobs: deque[Untouched] = deque()

    def takes(self, job: Untouched) -> bool:
        """Whether `job` comes after all that are in line."""
        if not self.jobs:
            return True
        last = self.jobs[-1]
        return last.created_at <= job.created_at and last.seq < job.seq

    def first(self, waits: Callable[[Untouched], bool]) -> Untouched | None:
        """The first that still waits; those before it are dropped."""
        jobs = self.jobs
        while jobs:
            if waits(jobs[0]):
                return jobs[0]
            jobs.popleft()
        return None

    def trim(self, live: int, waits: Callable[[Untouched], bool]) -> None:
        """Drop those that are gone where they outnumber the `live` ones."""
        if len(self.jobs) > 2 * live + SLACK:
            self.jobs = deque(filter(waits, self.jobs))


class Lane:
    """The due jobs of one queue, kind and priority: new ones in line, all others in a heap.

    `live` counts them; beside them either may hold what is stale.
    """

    __slots__ = ("heap", "line", "live", "valid", "waits")

    def __init__(self, valid: Callable[[DueEntry], bool], waits: Callable[[Untouched], bool]) -> None:
        self.heap: LazyHeap[DueEntry] = LazyHeap()
        self.line = Line()
        self.live = 0
        self.valid = valid
        self.waits = waits

    def first(self) -> DueEntry | None:
        """The entry of the job that comes first."""
        in_line, in_heap = self.line.first(self.waits), self.heap.first(self.valid)
        if in_line is None:
            return in_heap
        entry = entry_of(in_line)
        return entry if in_heap is None or entry <= in_heap else in_heap

    def entries(self) -> Iterator[DueEntry]:
        """Every valid entry once, in order, cost by the number taken. Nothing may change while it is read."""
        in_line = map(entry_of, filter(self.waits, self.line.jobs))
        if not self.heap.entries:
            return in_line
        # A job that left and came back in another way may be in both, with equal entries: give it once.
        return (entry for entry, _ in groupby(merge(in_line, self.heap.ordered(self.valid))))

    def trim(self) -> None:
        self.heap.trim(self.live, self.valid)
        self.line.trim(self.live, self.waits)


class DueJobs:
    """The due jobs of one queue, in exact order over all kinds or over some of them.

    One lane for each kind and priority; `heads` orders the lanes by their first job, so that the cost of a claim does
    not grow with their number (one lane alone needs no order: then it is empty). `valid` knows stale entries of a kind,
    `waits` untouched jobs that are gone.
    """

    __slots__ = ("_count", "_valid", "_waits", "heads", "lanes")

    def __init__(self, valid: Callable[[str, DueEntry], bool], waits: Callable[[Untouched], bool]) -> None:
        self.lanes: dict[str, dict[int, Lane]] = {}  # kind -> priority -> lane
        self.heads: LazyHeap[tuple[int, int, int, str, str]] = LazyHeap()  # a due entry and its kind
        self._count = 0  # of lanes
        self._valid = valid
        self._waits = waits

    @property
    def live(self) -> int:
        """How many jobs are due here."""
        return sum(lane.live for lanes in self.lanes.values() for lane in lanes.values())

    def add(self, kind: str, entry: DueEntry) -> None:
        """One more due job of this kind, whatever has happened to it."""
        lane = self._lane(kind, entry[0])
        lane.live += 1
        lane.heap.push(entry)
        if lane.heap.entries[0] is entry:
            self._offer_head(kind, entry)

    def join(self, job: Untouched) -> None:
        """One more due job, which `waits` knows already."""
        kind, lane = job.options.kind, self._lane(job.options.kind, job.options.priority)
        if not lane.line.takes(job):
            self.add(kind, entry_of(job))
            return
        lane.live += 1
        lane.line.jobs.append(job)
        if lane.line.first(self._waits) is job:
            self._offer_head(kind, entry_of(job))

    def join_all(self, kind: str, priority: int, jobs: Iterable[Untouched]) -> None:
        """The first jobs of a lane, all at once, in any order."""
        lane = self._lane(kind, priority)
        assert not lane.live, "only the first jobs of a lane come all at once"
        lane.line.jobs.extend(sorted(jobs, key=attrgetter("created_at", "seq")))
        lane.live = len(lane.line.jobs)
        self._offer_head(kind, lane.first())

    def remove(self, kind: str, priority: int) -> None:
        """One job of this lane is no longer due; its entry is stale already."""
        lane = self.lanes[kind][priority]
        lane.live -= 1
        if lane.live == 0:
            self._end_lane(kind, priority)
        else:
            lane.trim()
            self._offer_head(kind, lane.first())

    def due(self, kinds: Iterable[str] | None) -> Iterator[DueEntry]:
        """Entries of due jobs of `kinds` (None: of all), in order. Nothing may change while it is read."""
        if kinds is None and (only := self._only_lane()) is not None:
            yield from only.entries()
            return
        heads = self._all_heads() if kinds is None else self._heads_of(kinds)
        upcoming = next(heads, None)
        frontier: list[tuple[DueEntry, Iterator[DueEntry]]] = []
        while upcoming is not None or frontier:
            if upcoming is not None and (not frontier or upcoming[:4] <= frontier[0][0]):
                following = self.lanes[upcoming[4]][upcoming[0]].entries()
                upcoming = next(heads, None)
            else:
                entry, following = heapq.heappop(frontier)
                yield entry
            if (next_entry := next(following, None)) is not None:
                heapq.heappush(frontier, (next_entry, following))

    def in_line(self, kinds: Iterable[str] | None) -> Iterator[Untouched] | None:
        """Due jobs in order, where all of them stand in one line; None where orders have to be merged."""
        only = self._only_lane() if kinds is None else None
        return None if only is None or only.heap.entries else filter(self._waits, only.line.jobs)

    def oldest(self) -> DueEntry | None:
        """The job that has been due longest; the first of each lane is its oldest."""
        firsts = (lane.first() for lanes in self.lanes.values() for lane in lanes.values())
        return min((entry for entry in firsts if entry is not None), key=_due_since, default=None)

    def entries(self) -> Iterator[tuple[str, DueEntry]]:
        """Every valid entry with its kind, in no order."""
        for kind, lanes in self.lanes.items():
            for lane in lanes.values():
                yield from ((kind, entry) for entry in lane.entries())

    def _only_lane(self) -> Lane | None:
        """The lane of a queue that has but one: its order is the order of the queue."""
        if self._count != 1:
            return None
        (lanes,) = self.lanes.values()
        (lane,) = lanes.values()
        return lane

    def _lane(self, kind: str, priority: int) -> Lane:
        lanes = self.lanes.setdefault(kind, {})
        lane = lanes.get(priority)
        if lane is None:
            self._count += 1
            if self._count == 2:
                self._begin_heads()
            lane = lanes[priority] = Lane(partial(self._valid, kind), self._waits)
        return lane

    def _end_lane(self, kind: str, priority: int) -> None:
        del self.lanes[kind][priority]
        if not self.lanes[kind]:
            del self.lanes[kind]
        self._count -= 1
        if self._count == 1:
            self.heads.entries.clear()

    def _begin_heads(self) -> None:
        """A second lane comes: from now on there is something to order."""
        for kind, lanes in self.lanes.items():
            for lane in lanes.values():
                self._offer_head(kind, lane.first())

    def _offer_head(self, kind: str, first: DueEntry | None) -> None:
        """`first` of a lane of this kind has come to its head."""
        assert first is not None  # the lane has a job that is due
        if self._count > 1:
            self.heads.push((*first, kind))
            self.heads.trim(self._count, self._is_head)

    def _is_head(self, head: tuple[int, int, int, str, str]) -> bool:
        lane = self.lanes.get(head[4], {}).get(head[0])
        return lane is not None and lane.first() == head[:4]

    def _all_heads(self) -> Iterator[tuple[int, int, int, str, str]]:
        return self.heads.ordered(self._is_head)

    def _heads_of(self, kinds: Iterable[str]) -> Iterator[tuple[int, int, int, str, str]]:
        lanes = ((kind, lane) for kind in set(kinds) for lane in self.lanes.get(kind, {}).values())
        firsts = ((lane.first(), kind) for kind, lane in lanes)
        return iter(sorted((*first, kind) for first, kind in firsts if first is not None))
