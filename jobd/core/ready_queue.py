"""The queued jobs of one queue, in the order of claims.

`QueuedJobs` has the queued jobs of one queue. A claim takes the first job by priority, `run_at` and seq that is due
and not overdue, over all kinds or over some. A bucket has the jobs of one kind and priority.

    QueuedJobs "render"
      buckets   kind "pdf"   priority 0 ── PriorityBucket ──┬ fifo    · · J J J J J     packed, by created_at and seq
                             priority 5 ── PriorityBucket   │         (· has left, and is dropped at the front)
                kind "mail"  priority 0 ── PriorityBucket   └ others  [E E E] [E E E E] entries of all other jobs
      heads     first job of each bucket with a due job, as a heap; only with two buckets or more

Invariants:

- Each queued job is in one bucket, once: a packed job in `fifo`, or in `others` if a job that belongs after it is
  already in `fifo`; every other job in `others`.
- `live` counts the jobs of a bucket. A bucket without jobs does not exist, nor a kind without buckets.
- `fifo` and `others` are both in the order of `run_at` and seq. The `run_at` of a packed job is its `created_at`. So
  the jobs of a bucket that are not due come last, and its oldest job is first.
- `fifo` keeps jobs that no longer wait. `waits` tells them apart by identity: a job still waits if `LiveJobs` has the
  same packed object under its id. After a removal it has at most 2 * live + SLACK jobs.
- `others` has exactly the entries of its jobs. A removal finds them by bisection.
- With two buckets or more, each bucket whose first job is due has an entry of that job in `heads`. The head is offered
  when it changes (`add`, `join`, a removal), and when it becomes due (State._wake). A first job may be overdue; the
  bucket then goes on to the next one.
- With one bucket `heads` is empty, and the order of the bucket (`_only`) is that of the queue.
- In `BucketEntries`, `_expiry[i]` is at or above each `expires_at` in block i, so a block whose value has passed is
  skipped in one step.
- While an iterator is in use, nothing may be added or removed.

Cost: the first job of a queue is found without a search, however many jobs or buckets there are. A claim of some kinds
looks at up to FEW_HEADS heads before it sorts those of its kinds.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import chain, takewhile
from operator import attrgetter, itemgetter
from typing import Final

from jobd.core.orders import SLACK, LazyHeap, Sorted
from jobd.model.job import Job, PackedJob

# priority, run_at, job seq, job id, expires_at: the order of claims
DueEntry = tuple[int, int, int, str, int]
Head = tuple[int, int, int, str, str]  # the first four of a DueEntry, and the kind: the first due job of a bucket
TimeEntry = tuple[int, int, str]  # wall time, job seq, job id
BucketName = tuple[str, str, int]  # queue, kind, priority

NEVER: Final = 1 << 63  # the expires_at of a job that has none
FEW_HEADS: Final = 64  # that a claim of some kinds tries before it sorts those of its kinds
_LONG_AGO: Final = -1
_GONE_AT_ONCE: Final = 4096  # removed jobs at the front of a Fifo at which they are dropped

_run_at: Callable[[DueEntry], int] = itemgetter(1)
_created_at: Callable[[PackedJob], int] = attrgetter("created_at")
_expires_at: Callable[[DueEntry], int] = itemgetter(4)
_due_since: Callable[[DueEntry | Head], tuple[int, int]] = itemgetter(1, 2)


def entry_of(job: Job) -> DueEntry:
    """Return the position of `job` in its queue."""
    return (job.options.priority, job.run_at, job.seq, job.id, NEVER if job.expires_at is None else job.expires_at)


def packed_entry(job: PackedJob) -> DueEntry:
    """Return the position of a packed job, which is due since its creation."""
    return (job.options.priority, job.created_at, job.seq, job.id, NEVER)


class BucketEntries(Sorted[DueEntry]):
    """The entries of one bucket. `_expiry` holds an upper bound of the `expires_at` in each block.

    With it a claim skips a block of overdue jobs in one step.
    """

    __slots__ = ("_expiry",)

    def __init__(self) -> None:
        super().__init__()
        self._expiry: list[int] = []

    def add(self, entry: DueEntry) -> int:
        place = super().add(entry)
        if entry[4] > self._expiry[place]:
            self._expiry[place] = entry[4]
        return place

    def eligible(self, now: int) -> Iterator[DueEntry]:
        """Iterate over jobs that are due and not overdue, in order. Nothing may be added or removed meanwhile."""
        for place, expiry in enumerate(self._expiry):
            if expiry <= now:
                continue
            is_passed = True
            for entry in self.blocks[place]:
                if entry[1] > now:
                    return
                if entry[4] > now:
                    is_passed = False
                    yield entry
            if is_passed:  # the job with the latest expires_at was removed
                self._expiry[place] = _latest(self.blocks[place])

    def not_due_count(self, now: int) -> int:
        """Return how many entries have a `run_at` after `now`. It costs one step per block."""
        place = bisect_right(self._last, now, key=_run_at)
        if place == len(self._last):
            return 0
        block = self.blocks[place]
        return len(block) - bisect_right(block, now, key=_run_at) + sum(map(len, self.blocks[place + 1 :]))

    def not_due(self, now: int) -> Iterator[DueEntry]:
        """Iterate over the entries whose `run_at` is after `now`. Nothing may be added or removed meanwhile."""
        return self.after(now, _run_at)

    def _insert(self, place: int, block: list[DueEntry]) -> None:
        super()._insert(place, block)
        self._expiry.insert(place, _latest(block))

    def _drop(self, place: int) -> None:
        super()._drop(place)
        del self._expiry[place]


def _latest(block: list[DueEntry]) -> int:
    return max(map(_expires_at, block))


class Fifo:
    """Packed jobs in order of creation, with 8 bytes each; an entry takes 100.

    Jobs are appended in order. Removed jobs stay until they reach the front or `trim` finds too many of them. The jobs
    begin at `_first`; the places before it are dropped together. It is a list, because a deque has slow random access.
    """

    __slots__ = ("_first", "_jobs")

    def __init__(self) -> None:
        self._jobs: list[PackedJob] = []
        self._first = 0

    def __len__(self) -> int:
        return len(self._jobs) - self._first

    def __iter__(self) -> Iterator[PackedJob]:
        return self._from(self._first)

    def append(self, job: PackedJob) -> bool:
        """Add `job` if it belongs after all others. Return whether it does."""
        jobs = self._jobs
        if self._first < len(jobs) and (jobs[-1].created_at > job.created_at or jobs[-1].seq >= job.seq):
            return False
        jobs.append(job)
        return True

    def extend(self, jobs: Iterable[PackedJob]) -> None:
        self._jobs.extend(jobs)

    def first(self, waits: Callable[[PackedJob], bool]) -> PackedJob | None:
        """Return the first job that is still waiting. Drops those before it."""
        jobs, first = self._jobs, self._first
        while first < len(jobs) and not waits(jobs[first]):
            first += 1
        if first > SLACK and (2 * first > len(jobs) or first >= _GONE_AT_ONCE):
            del jobs[:first]
            first = 0
        self._first = first
        return jobs[first] if first < len(jobs) else None

    def ends_by(self, now: int) -> bool:
        """Return whether all jobs were created at or before `now`."""
        return self._first >= len(self._jobs) or self._jobs[-1].created_at <= now

    def not_due(self, now: int, waits: Callable[[PackedJob], bool]) -> Iterator[PackedJob]:
        """Iterate over the jobs that were created after `now` and still wait."""
        if self.ends_by(now):
            return iter(())
        return filter(waits, self._from(bisect_right(self._jobs, now, self._first, key=_created_at)))

    def trim(self, live: int, waits: Callable[[PackedJob], bool]) -> None:
        """Drop removed jobs if they outnumber the `live` ones."""
        if len(self._jobs) - self._first > 2 * live + SLACK:
            self._jobs, self._first = list(filter(waits, self)), 0

    def _from(self, place: int) -> Iterator[PackedJob]:
        return map(self._jobs.__getitem__, range(place, len(self._jobs)))


class PriorityBucket:
    """The queued jobs of one queue, kind and priority: packed ones in a Fifo, others sorted. `live` counts them.

    Both are ordered by `run_at`, so jobs that are not due yet come last. `wakes_at` is the time at which
    the next of them becomes due, or earlier. `due_at` is when a job of the bucket last became due.
    """

    __slots__ = ("due_at", "fifo", "live", "name", "others", "waits", "wakes_at")

    def __init__(self, name: BucketName, waits: Callable[[PackedJob], bool]) -> None:
        self.name = name
        self.fifo = Fifo()
        self.others = BucketEntries()
        self.live = 0
        self.waits = waits
        self.wakes_at: int | None = None
        self.due_at = _LONG_AGO

    def head(self) -> DueEntry | None:
        """Return the first entry, even if its job may not be granted."""
        oldest, other = self.fifo.first(self.waits), self.others.first()
        if oldest is None:
            return other
        entry = packed_entry(oldest)
        return entry if other is None or entry <= other else other

    def eligible(self, now: int) -> Iterator[DueEntry]:
        """Iterate over jobs that are due and not overdue, in order. Nothing may change meanwhile."""
        waiting: Iterator[PackedJob] = filter(self.waits, self.fifo)
        if not self.fifo.ends_by(now):
            waiting = takewhile(lambda job: job.created_at <= now, waiting)
        entries = map(packed_entry, waiting)
        return merge(entries, self.others.eligible(now)) if self.others else entries

    def due(self, now: int) -> int:
        """Return how many of its jobs are due, overdue ones too."""
        return self.live - self.others.not_due_count(now) - sum(1 for _ in self.fifo.not_due(now, self.waits))

    def next_run_at(self, now: int) -> int | None:
        """Return the first `run_at` after `now`."""
        first = next(self.not_due(now), None)
        return None if first is None else first[1]

    def not_due(self, now: int) -> Iterator[DueEntry]:
        """Iterate over the jobs whose `run_at` is after `now`, in order. Nothing may change meanwhile."""
        entries = map(packed_entry, self.fifo.not_due(now, self.waits))
        return merge(entries, self.others.not_due(now)) if self.others else entries


class QueuedJobs:
    """The queued jobs of one queue, in exact order over all kinds or over some of them.

    There is one bucket for each kind and priority. `heads` orders the buckets with due jobs by their first job, so that
    the cost of a claim does not grow with their number. It is empty if there is only one bucket. `waits` says which
    packed jobs are still waiting.
    """

    __slots__ = ("_count", "_name", "_only", "_waits", "buckets", "heads")

    def __init__(self, name: str, waits: Callable[[PackedJob], bool]) -> None:
        self.buckets: dict[str, dict[int, PriorityBucket]] = {}  # kind -> priority -> bucket
        self.heads: LazyHeap[Head] = LazyHeap()
        self._count = 0  # of buckets
        self._only: PriorityBucket | None = None  # the bucket, if there is only one; its order is that of the queue
        self._name = name
        self._waits = waits

    def add(self, kind: str, entry: DueEntry, now: int) -> PriorityBucket:
        """Add a job of this kind, packed or not."""
        bucket = self._bucket(kind, entry[0], now)
        bucket.live += 1
        bucket.others.add(entry)
        if bucket.others.first() is entry:
            self.offer(bucket, now)
        return bucket

    def join(self, job: PackedJob, now: int) -> PriorityBucket:
        """Add a packed job."""
        kind = job.options.kind
        bucket = self._bucket(kind, job.options.priority, now)
        if not bucket.fifo.append(job):
            return self.add(kind, packed_entry(job), now)
        bucket.live += 1
        if self._only is None and bucket.fifo.first(self._waits) is job:
            self.offer(bucket, now)
        return bucket

    def join_all(self, kind: str, priority: int, jobs: Iterable[PackedJob], now: int) -> PriorityBucket:
        """Add the first jobs of a bucket, all at once, in any order."""
        bucket = self._bucket(kind, priority, now)
        assert not bucket.live, "only the first jobs of a bucket come all at once"
        bucket.fifo.extend(sorted(jobs, key=attrgetter("created_at", "seq")))
        bucket.live = len(bucket.fifo)
        self.offer(bucket, now)
        return bucket

    def remove(self, kind: str, entry: DueEntry, now: int) -> PriorityBucket | None:
        """Remove a job that is not packed. Return its bucket if that is now empty."""
        bucket = self.buckets[kind][entry[0]]
        bucket.others.remove(entry)
        return self._removed(bucket, now)

    def remove_packed(self, job: Job | PackedJob, now: int) -> PriorityBucket | None:
        """Remove a job that was packed and no longer waits. Return its bucket if that is now empty."""
        bucket = self.buckets[job.options.kind][job.options.priority]
        if bucket.others.blocks:
            bucket.others.remove((job.options.priority, job.created_at, job.seq, job.id, NEVER))
        return self._removed(bucket, now)

    def _removed(self, bucket: PriorityBucket, now: int) -> PriorityBucket | None:
        bucket.live -= 1
        if bucket.live == 0:
            self._end_bucket(bucket.name[1], bucket.name[2])
            return bucket
        bucket.fifo.trim(bucket.live, self._waits)
        if self._only is None:
            self.offer(bucket, now)
        return None

    def not_due(self, now: int) -> Iterator[DueEntry]:
        """Iterate over the jobs whose `run_at` is after `now`, bucket by bucket. Nothing may change meanwhile."""
        return chain.from_iterable(
            bucket.not_due(now) for buckets in self.buckets.values() for bucket in buckets.values()
        )

    def eligible(self, kinds: Iterable[str] | None, now: int) -> Iterator[DueEntry]:
        """Iterate over jobs of `kinds` (None: all) that are due and not overdue, in order. Nothing may change."""
        if kinds is not None and self.buckets.keys() <= set(kinds):
            kinds = None  # the heads of all kinds are in order already
        if kinds is None and self._only is not None:
            yield from self._only.eligible(now)
            return
        heads = self._all_heads(now) if kinds is None else self._heads_of(kinds, now)
        upcoming = next(heads, None)
        frontier: list[tuple[DueEntry, Iterator[DueEntry]]] = []
        entry: DueEntry | None
        while upcoming is not None or frontier:
            if upcoming is not None and (not frontier or upcoming[:4] <= frontier[0][0]):
                following = self.buckets[upcoming[4]][upcoming[0]].eligible(now)
                entry = next(following, None)
                if entry is not None and entry[:4] == upcoming[:4]:  # yield it before the next head is searched
                    yield entry
                    entry = next(following, None)
                upcoming = next(heads, None)
            else:
                entry, following = heapq.heappop(frontier)
                yield entry
                entry = next(following, None)
            if entry is not None:
                heapq.heappush(frontier, (entry, following))

    def first_in_fifo(self, now: int) -> PackedJob | None:
        """Return the first due job if all jobs are in one Fifo; None if orders must be merged or no job is due."""
        only = self._only
        if only is None or only.others.blocks:
            return None
        first = only.fifo.first(self._waits)
        return first if first is not None and first.created_at <= now else None

    def due_in_fifo(self, now: int) -> Iterator[PackedJob] | None:
        """Return the due jobs in order if all are in one Fifo; None if orders must be merged."""
        only = self._only
        if only is None or only.others or not only.fifo.ends_by(now):
            return None
        return filter(self._waits, only.fifo)

    def oldest(self, now: int) -> DueEntry | None:
        """Return the job that has been due longest and is not overdue. The first job of each bucket is its oldest."""
        if self._only is not None:
            return next(self._only.eligible(now), None)
        oldest: DueEntry | None = None
        for head in sorted(self.heads.entries, key=_due_since):
            if oldest is not None and _due_since(head) > _due_since(oldest):
                break  # a bucket has no job that is older than its head
            if self._is_head(head):
                first = next(self.buckets[head[4]][head[0]].eligible(now), None)
                oldest = min((each for each in (oldest, first) if each is not None), key=_due_since, default=None)
        return oldest

    def offer(self, bucket: PriorityBucket, now: int) -> None:
        """Update `heads` after a change of this bucket. A bucket whose first job is not due is offered when it is."""
        first = bucket.head()
        assert first is not None  # the bucket has a job
        if self._only is None and first[1] <= now:
            self.heads.push((*first[:4], bucket.name[1]))
            self.heads.trim(self._count, self._is_head)

    def _bucket(self, kind: str, priority: int, now: int) -> PriorityBucket:
        buckets = self.buckets.get(kind)
        bucket = None if buckets is None else buckets.get(priority)
        if bucket is None:
            buckets = self.buckets.setdefault(kind, {})
            self._count += 1
            self._only = None
            if self._count == 2:
                self._begin_heads(now)
            bucket = buckets[priority] = PriorityBucket((self._name, kind, priority), self._waits)
            if self._count == 1:
                self._only = bucket
        return bucket

    def _end_bucket(self, kind: str, priority: int) -> None:
        del self.buckets[kind][priority]
        if not self.buckets[kind]:
            del self.buckets[kind]
        self._count -= 1
        self._only = None
        if self._count == 1:
            self.heads.entries.clear()
            (buckets,) = self.buckets.values()
            (self._only,) = buckets.values()

    def _begin_heads(self, now: int) -> None:
        """Offer all buckets, because a second one is about to be added."""
        for buckets in self.buckets.values():
            for bucket in buckets.values():
                self.offer(bucket, now)

    def _is_head(self, head: Head) -> bool:
        bucket = self.buckets.get(head[4], {}).get(head[0])
        if bucket is None:
            return False
        first = bucket.head()
        return first is not None and first[:4] == head[:4]

    def _all_heads(self, now: int, most: int | None = None) -> Iterator[Head]:
        """Iterate over the heads of buckets with due jobs. A head that is no longer due is offered again when it is."""
        return self.heads.ordered(lambda head: head[1] <= now and self._is_head(head), most)

    def _heads_of(self, kinds: Iterable[str], now: int) -> Iterator[Head]:
        """Iterate over the heads of `kinds`. Most claims find theirs among the first heads of all kinds."""
        wanted = set(kinds)
        buckets = [bucket for kind in wanted for bucket in self.buckets.get(kind, {}).values()]
        passed: tuple[object, ...] = ()
        for head in self._all_heads(now, min(len(buckets), FEW_HEADS)):
            passed = head
            if head[4] in wanted:
                yield head
        firsts = ((bucket.head(), bucket.name[1]) for bucket in buckets)
        heads = ((*first[:4], kind) for first, kind in firsts if first is not None and first[1] <= now)
        yield from sorted(head for head in heads if head > passed)
