"""The state in memory: live jobs, and their orders by due time and deadline, with counters.

    queued ─────────── grant ───> processing ────────────────────── end ───> finished
    _queued (ready_queue.py)      processing (processing_jobs.py)            finished: those used last;
    run_at after now: _wakes                                                 all others are on the disk only
    expires_at: _expiries

`reindex(before, after)` moves a job between these orders and counts it. Rules never call it; the transaction does. The
time is that of the last `advance`: wall time for `run_at` and `expires_at`, lock time for deadlines. Wall time may go
back, lock time does not.

Invariants, between two calls of the methods:

- A job id is in at most one of `jobs` (queued or processing), `finished` and `quarantined`.
- A row (`Job`) is immutable. A change replaces it, so a row that was read stays as it was.
- `jobs` has a queued job packed as long as it has not changed since it was created, and full afterwards, never both.
- `counts` has the jobs of each queue by status, including finished ones that only the disk has, and quarantined ones
  whose rows could not be moved. `totals` is its sum over the queues. A queue without jobs has no entry. Rows with an
  unknown status, from manual edits, are not counted.
- `queue_names` has exactly the queues that have jobs or are paused.
- `processing` has exactly the processing jobs.
- A bucket that has jobs is in `_buckets`, ordered by the time at which a job in it last became due. A step back of the
  wall clock needs only the buckets after that time.
- A bucket with a job that is not due has a `wakes_at` at or before the first such `run_at`, and an entry of that time
  in `_wakes`.
- `on_due` is called for a queue and kind whenever a claim could find a job there that it could not find before: a job
  enters or becomes due, the queue is resumed, the wall clock goes back. It may be called without reason.
- `reindex(a, b)` and then `reindex(b, a)` restore jobs, orders and counts. Exceptions: the order of `processing` and
  of `finished`, a packed job that is full afterwards, and what is known of workers (`presence`).
- `_wakes` may have stale entries, which `trim` bounds. Sorted orders have none.
- Overdue queued jobs are not moved when their `expires_at` passes. Every order skips them by time.

Memory: a packed job takes about a quarter of a full one (docs/decisions/packed-jobs.md).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import islice, takewhile
from operator import itemgetter
from typing import Final, NamedTuple, TypeVar

from msgspec.structs import astuple

from jobd.core.jobs_by_id import FinishedJobs, LiveJobs
from jobd.core.orders import LazyHeap, Sorted
from jobd.core.processing_jobs import ProcessingJobs
from jobd.core.ready_queue import BucketName, DueEntry, PriorityBucket, QueuedJobs, TimeEntry, entry_of
from jobd.core.stats import Counters
from jobd.core.worker_presence import WorkerPresence
from jobd.model.clocks import LockMs
from jobd.model.commands import ClockTrust
from jobd.model.events import QueuePause, QuietRule
from jobd.model.job import (
    FINISHED,
    LOOP_FROM,
    MINUTE_MS,
    SECOND_MS,
    STATUSES,
    Job,
    Options,
    PackedJob,
    is_release_loop,
    is_retried,
    packed,
)
from jobd.model.schedules import Schedule
from jobd.model.storage import Numbers, OpenedStore, QueueRow

K = TypeVar("K")
V = TypeVar("V")

OPTIONS_KEPT: Final = 10_000
LATE_KEPT: Final = 10_000  # remembered calls, which may be recorded again once they are forgotten, and results


PAUSES_READ_MS: Final = 10 * SECOND_MS  # after which the maintainer knows at the latest when a new pause ends


class RecoverySchedule(NamedTuple):
    """How often recovery and cleanup run. `recover_every_ms` 0: only cleanup runs recover jobs."""

    recover_every_ms: int = 10 * SECOND_MS
    cleanup_every_ms: int = 5 * MINUTE_MS
    next_cleanup_at: int = 0  # wall time


class State:
    """All live jobs. `reindex` is the only way to change a row, so that every order and counter stays consistent."""

    __slots__ = (
        "_buckets", "_expiries", "_now", "_options", "_queued", "_wakes", "clock", "counters", "counts", "epoch",
        "finished", "jobs", "late_calls", "late_results", "next_event", "next_job", "next_token", "on_due",
        "on_quiet", "on_schedule", "paused", "presence", "processing", "quarantined", "queue_names", "quiet",
        "recovery", "release_loops", "retrying", "schedules", "too_old_for", "totals", "unmoved", "unvalidated",
    )  # fmt: skip

    def __init__(self, numbers: Numbers | None = None) -> None:
        numbers = numbers or Numbers()
        self.epoch = numbers.epoch
        self.next_token = numbers.next_token
        self.next_job = numbers.next_job
        self.next_event = numbers.next_event
        self.clock = numbers.clock  # as persisted
        self.finished = FinishedJobs()
        self.quarantined: dict[str, str] = {}
        # Quarantined jobs whose rows could not be moved. A finished one has its queue and status here, because it stays
        # in the counts until its row is moved.
        self.unmoved: dict[str, tuple[str, str] | None] = {}
        # Rejected calls that the journal has, since the start: job seq, fencing token, verb.
        self.late_calls: dict[tuple[int, int, str], None] = {}
        self.late_results: dict[int, int] = {}  # job seq -> seq of the latest late result since the start
        self.paused: dict[str, QueuePause] = {}
        self.quiet: Mapping[str, QuietRule] = {}  # by id; replaced as a whole
        self.on_quiet: Callable[[], None] = lambda: None  # called when `quiet` has changed
        self.schedules: dict[str, Schedule] = {}
        self.on_schedule: Callable[[str], None] = lambda name: None  # called with each schedule that has changed
        self.counts: dict[str, dict[str, int]] = {}  # queue -> status -> jobs, of the queues that have jobs
        self.queue_names: Sorted[str] = Sorted()  # of queues that have jobs or are paused
        self.totals: dict[str, int] = dict.fromkeys(STATUSES, 0)
        self.counters = Counters()  # updated by the actor after commits
        self.presence = WorkerPresence(numbers.wall_ms, numbers.lock_ms)
        self.processing = ProcessingJobs(self.presence, LockMs(0))
        self.jobs = LiveJobs(self.processing)
        self.recovery = RecoverySchedule()
        self.unvalidated: dict[int, str] = {}  # seq -> id of imported or accepted rows that were not validated yet
        self.retrying: dict[str, int] = {}  # queue -> queued jobs for which is_retried is true
        self.release_loops: dict[str, int] = {}  # id -> releases of live jobs for which is_release_loop is true
        self.too_old_for: Callable[[int], str | None] = lambda format: None  # see JobStorage
        self.on_due: Callable[[str, str], None] = lambda queue, kind: None  # called for each job that becomes due
        self._queued: dict[str, QueuedJobs] = {}
        self._buckets: OrderedDict[PriorityBucket, None] = OrderedDict()  # ordered by when a job in it last became due
        self._wakes: LazyHeap[tuple[int, BucketName]] = LazyHeap()  # run_at of the next delayed job of each bucket
        self._expiries: Sorted[TimeEntry] = Sorted()  # expires_at of queued jobs
        self._now = 0
        self._options: dict[Options, Options] = {}

    @classmethod
    def opened(cls, found: OpenedStore) -> State:
        """Return the state at start: live jobs, and the stored counts of finished ones."""
        state = cls(found.numbers)
        state._now, state.processing.lock_ms = found.numbers.wall_ms, found.numbers.lock_ms
        for name, row in found.queues.items():
            kept = {"completed": row.completed, "failed": row.failed, "cancelled": row.cancelled}
            for status, count in kept.items():
                if count:
                    state._counts_of(name)[status] = count
                    state.totals[status] += count
            if row.pause is not None:
                state.set_paused(name, row.pause)
        state.quiet = found.quiet
        state.schedules = found.schedules
        state._enter_all(found.packed_jobs)
        for job in found.jobs:
            state.reindex(None, job)
        state.processing.order()
        return state

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job | None:
        """Return the job if it is live, or finished and kept."""
        job = self.jobs.find(job_id)
        return self.finished.get(job_id) if job is None else job

    def holds(self, job_id: str, lock_id: str) -> bool:
        """Return whether `lock_id` is that of the current grant of the job."""
        job = self.processing.get(job_id)
        return job is not None and job.grant is not None and job.grant.lock_id == lock_id

    def due(self, queues: Sequence[str], kinds: Iterable[str] | None) -> Iterator[Job]:
        """Iterate over due jobs of unpaused `queues` that are not overdue, by priority, run_at and creation.

        Due and overdue are as of the last `advance`. The state must not change meanwhile.
        """
        now = self._now
        named = [
            self._queued[queue] for queue in dict.fromkeys(queues) if queue in self._queued and queue not in self.paused
        ]
        if len(named) == 1 and kinds is None and (line := named[0].due_in_fifo(now)) is not None:
            return map(PackedJob.expand, line)  # the common case
        orders = [queued.eligible(kinds, now) for queued in named]
        entries = orders[0] if len(orders) == 1 else merge(*orders)
        return (self.jobs[entry[3]] for entry in entries)

    def first_due(self, queues: Sequence[str], kinds: Iterable[str] | None, limit: int) -> list[Job]:
        """Return the first `limit` jobs of `due`."""
        if limit == 1 and kinds is None and len(queues) == 1 and (queued := self._queued.get(queues[0])) is not None:
            first = queued.first_in_fifo(self._now)
            if first is not None and queues[0] not in self.paused:
                return [first.expand()]  # the common case
        return list(islice(self.due(queues, kinds), limit))

    def oldest_due_at(self, queue: str) -> int | None:
        """Return the `run_at` of the job of `queue` that has been due longest (Unix ms)."""
        oldest = self._queued[queue].oldest(self._now) if queue in self._queued else None
        return None if oldest is None else oldest[1]

    def queued_kinds(self, queue: str) -> list[str]:
        """Return the kinds of the queued jobs of `queue`."""
        return list(self._queued[queue].buckets) if queue in self._queued else []

    def oldest_of_kind(self, queue: str, kind: str, now: int) -> tuple[int, DueEntry | None]:
        """Return the number of buckets of the kind, and the entry of its job that has been due longest at `now`."""
        buckets = self._queued[queue].buckets.get(kind, {}) if queue in self._queued else {}
        firsts = [next(bucket.eligible(now), None) for bucket in buckets.values()]
        return len(firsts), min((entry for entry in firsts if entry), key=itemgetter(1, 2), default=None)

    def due_of_kind(self, queue: str, kind: str, now: int) -> tuple[int, int]:
        """Return how many jobs of the kind are due, and their best priority. The kind has a due job."""
        counted = [(bucket.due(now), bucket.name[2]) for bucket in self._queued[queue].buckets[kind].values()]
        return sum(count for count, _ in counted), min(priority for count, priority in counted if count)

    def oldest_due(self) -> tuple[str, DueEntry] | None:
        """Return queue and entry of the job that has been due longest. The cost grows with the number of queues."""
        firsts = ((queue, queued.oldest(self._now)) for queue, queued in self._queued.items())
        found = ((queue, entry) for queue, entry in firsts if entry is not None)
        return min(found, key=lambda each: (each[1][1], each[1][2]), default=None)

    def due_buckets(self, queue: str) -> int:
        """Return the number of buckets that `oldest_due_at` reads: one for each kind and priority of queued jobs."""
        return sum(map(len, self._queued[queue].buckets.values())) if queue in self._queued else 0

    def overdue(self) -> Iterator[str]:
        """Iterate over ids of queued jobs whose expires_at has passed as of the last `advance`, in that order.

        The state must not change meanwhile.
        """
        return (entry[2] for entry in takewhile(lambda entry: entry[0] <= self._now, self._expiries))

    def not_due(self, now: int) -> Iterator[Job]:
        """Iterate over the live jobs whose `run_at` is after `now`. The state must not change meanwhile."""
        for queued in self._queued.values():
            yield from (self.jobs[entry[3]] for entry in queued.not_due(now))
        yield from (job for job in self.processing.values() if job.run_at > now)

    def next_run_at(self) -> int | None:
        """Return when the next job becomes due (Unix ms)."""
        while (wake := self._wakes.first(self._is_wake)) is not None:
            bucket = self._bucket(wake[1])
            if (run_at := bucket.next_run_at(self._now)) == wake[0]:
                return run_at
            self._wake_at(bucket, run_at)  # the first job is no longer queued
        return None

    def next_expiry(self) -> int | None:
        """Return the first expires_at of all queued jobs (Unix ms), which may have passed."""
        entry = self._expiries.first()
        return None if entry is None else entry[0]

    @property
    def live_count(self) -> int:
        """The number of queued and processing jobs."""
        return self.totals["queued"] + self.totals["processing"]

    def total(self) -> int:
        return sum(self.totals.values())

    def queue_row(self, queue: str) -> QueueRow:
        """Return the row of `queue` to store."""
        counts = self.counts.get(queue, {})
        completed, failed, cancelled = (counts.get(status, 0) for status in ("completed", "failed", "cancelled"))
        pause = self.paused.get(queue)
        described = (None,) * 4 if pause is None else astuple(pause)
        return QueueRow(pause is not None, completed, failed, cancelled, *described)

    def numbers(self, lock_ms: LockMs, wall_ms: int, clock: ClockTrust) -> Numbers:
        """Return the numbers to persist with a commit."""
        marks = (self.epoch, self.next_token, self.next_job, self.next_event)
        return Numbers(*marks, lock_ms, wall_ms, *astuple(clock))

    def shared(self, options: Options) -> Options:
        """Return one shared value for equal options, to save memory."""
        if len(self._options) >= OPTIONS_KEPT:
            self._options.clear()
        return self._options.setdefault(options, options)

    # -- changing -----------------------------------------------------------------------------------------------------

    def reindex(self, before: Job | None, after: Job | None) -> None:
        """Replace the row of a job in every order and counter. None: no such job. Exchange both to undo it."""
        if before is not None and after is not None and before.status == after.status and _is_same_grant(before, after):
            self.processing.renew(before, after)
        else:
            self._move(before, after)
        if (before is not None and before.releases >= LOOP_FROM) or (after is not None and after.releases >= LOOP_FROM):
            self._note_releases(before, after)

    def forget_workers(self) -> None:
        """Know no worker, as at a start."""
        known = self.presence
        self.presence = self.processing.presence = WorkerPresence(known.now, known.lock_ms)

    def quarantine(
        self, job_id: str, reason: str, uncounted: tuple[str, str] | None = None, *, is_moved: bool = True
    ) -> None:
        """Remove a damaged job from every order and count, and remember its id.

        `uncounted` is the queue and status of a finished job that is not in memory. A finished job whose row could not
        be moved stays in the counts, as on disk.
        """
        self.quarantined[job_id] = reason
        job = self.get(job_id)
        if job is not None:
            self.unvalidated.pop(job.seq, None)
        if is_moved:
            counted = self.unmoved.pop(job_id, None) or uncounted
            if job is not None:
                self.reindex(job, None)
            else:
                self.count_as(counted, -1)
        elif job is not None and job.status in FINISHED:
            self.finished.drop(job_id)
            self.unmoved[job_id] = job.options.queue, job.status
        else:
            if job is not None:
                self.reindex(job, None)
            self.unmoved.setdefault(job_id, None)

    def recount_unmoved(self, job_id: str, before: Job | None) -> None:
        """Restore the count of a quarantined job whose row was not moved, according to its row `before` the batch."""
        if job_id in self.unmoved:
            self.count_as(self.unmoved[job_id], -1)
            is_counted = before is not None and before.status in FINISHED
            self.unmoved[job_id] = (before.options.queue, before.status) if before is not None and is_counted else None
            self.count_as(self.unmoved[job_id], +1)

    def advance(self, now: int, lock_ms: LockMs) -> None:
        """Apply the time: delayed jobs become due, locks expire, jobs stall.

        Overdue queued jobs need no work here, because every order skips them by time.
        """
        before, self._now = self._now, now
        if now < before:
            self._rewind(now, before)
        self.presence.set_time(now, lock_ms)
        for wake in self._wakes.pop_until(now):
            if self._is_wake(wake):
                self._wake(self._bucket(wake[1]))
        self.processing.advance(lock_ms)

    # -- moving jobs between the orders --------------------------------------------------------------------------------

    def _move(self, before: Job | None, after: Job | None) -> None:
        self._count(before, after)
        if before is not None:
            status = before.status
            if status == "queued":
                self._leave_queue(before)
            elif status == "processing":
                self.processing.end(before)
            else:
                self.finished.drop(before.id)
        if after is not None:
            status = after.status
            if status == "queued":
                self._enter_queue(after, packed(after) if before is None else None)
            elif status == "processing":
                self.processing.begin(after)
            else:
                self.finished.keep(after)

    def _note_releases(self, before: Job | None, after: Job | None) -> None:
        if before is not None:
            self.release_loops.pop(before.id, None)
        if after is not None and after.id in self.jobs and is_release_loop(after):
            self.release_loops[after.id] = after.releases

    def _enter_all(self, jobs: Iterable[PackedJob]) -> None:
        """Add packed jobs to an empty state, at a quarter of the cost of single ones."""
        groups: defaultdict[int, list[PackedJob]] = defaultdict(list)
        buckets: defaultdict[tuple[str, str, int], list[PackedJob]] = defaultdict(list)
        for job in jobs:
            groups[id(job.options)].append(job)  # by identity, because comparing values is slower
        for group in groups.values():
            options = group[0].options
            buckets[(options.queue, options.kind, options.priority)] += group
            self._counts_of(options.queue)["queued"] += len(group)
            self.totals["queued"] += len(group)
            self.jobs.keep_all_packed(group)
        for (queue, kind, priority), group in buckets.items():
            bucket = self._queued_of(queue).join_all(kind, priority, group, self._now)
            self._became_due(bucket)
            self._wake_at(bucket, bucket.next_run_at(self._now))  # the clock can have been set back

    def _enter_queue(self, job: Job, short: PackedJob | None) -> None:
        options, now = job.options, self._now
        queued = self._queued.get(options.queue) or self._queued_of(options.queue)
        if short is None:
            if is_retried(job):
                self._count_retrying(options.queue, 1)
            self.jobs.keep(job)
            bucket = queued.add(options.kind, entry_of(job), now)
        else:
            self.jobs.keep_packed(short)
            bucket = queued.join(short, now)
        if job.run_at <= now:
            self._became_due(bucket)
            self.on_due(options.queue, options.kind)
        else:
            if bucket not in self._buckets:
                self._buckets[bucket] = None
                self._buckets.move_to_end(bucket, last=False)
            if bucket.wakes_at is None or job.run_at < bucket.wakes_at:
                self._wake_at(bucket, job.run_at)
        if job.expires_at is not None:
            self._expiries.add((job.expires_at, job.seq, job.id))

    def _queued_of(self, queue: str) -> QueuedJobs:
        queued = self._queued.get(queue)
        if queued is None:
            queued = self._queued[queue] = QueuedJobs(queue, self.jobs.waits)
        return queued

    def _became_due(self, bucket: PriorityBucket) -> None:
        if bucket.due_at != self._now:
            bucket.due_at = self._now
            self._buckets[bucket] = None
            self._buckets.move_to_end(bucket)

    def _leave_queue(self, job: Job) -> None:
        options, now = job.options, self._now
        queued = self._queued[options.queue]
        if self.jobs.drop(job.id):
            ended = queued.remove_packed(job, now)
        else:
            if is_retried(job):
                self._count_retrying(options.queue, -1)
            ended = queued.remove(options.kind, entry_of(job), now)
        if ended is not None:
            del self._buckets[ended]
            if not queued.buckets:
                del self._queued[options.queue]
        if job.expires_at is not None:
            self._expiries.remove((job.expires_at, job.seq, job.id))

    def _count_retrying(self, queue: str, step: int) -> None:
        count = self.retrying.get(queue, 0) + step
        if count:
            self.retrying[queue] = count
        else:
            del self.retrying[queue]

    def _bucket(self, name: BucketName) -> PriorityBucket:
        queue, kind, priority = name
        return self._queued[queue].buckets[kind][priority]

    def _wake(self, bucket: PriorityBucket) -> None:
        """Handle that the next job of `bucket` has become due."""
        queue, kind, _ = bucket.name
        self._became_due(bucket)
        self._queued[queue].offer(bucket, self._now)
        self._wake_at(bucket, bucket.next_run_at(self._now))
        self.on_due(queue, kind)

    def _wake_at(self, bucket: PriorityBucket, run_at: int | None) -> None:
        bucket.wakes_at = run_at
        if run_at is not None:
            self._wakes.push((run_at, bucket.name))
            self._wakes.trim(len(self._buckets), self._is_wake)

    def _rewind(self, now: int, before: int) -> None:
        """Apply a step back of the wall clock: due jobs may have to wait again, and overdue ones may be eligible again.

        No job moves. Only buckets in which a job has become due since then get a new wake time.
        """
        expiry = self.next_expiry()
        was_overdue = expiry is not None and expiry <= before
        for bucket in reversed(self._buckets):
            if bucket.due_at <= now:
                break
            bucket.due_at = now
            self._wake_at(bucket, bucket.next_run_at(now))
        if was_overdue:
            for queue, queued in self._queued.items():
                for kind in queued.buckets:
                    self.on_due(queue, kind)

    # -- counters and validity ----------------------------------------------------------------------------------------

    def _count(self, before: Job | None, after: Job | None) -> None:
        # A job never changes its queue, but undo can replace it by another job of the same id. Rows with an unknown
        # status, from manual edits, are not counted.
        totals, queue = self.totals, None
        if after is not None and (status := after.status) in totals:
            queue = after.options.queue
            counts = self.counts.get(queue) or self._counts_of(queue)
            counts[status] += 1
            totals[status] += 1
        if before is not None and (status := before.status) in totals:
            former = before.options.queue
            (self.counts.get(former) or self._counts_of(former))[status] -= 1
            totals[status] -= 1
            if former != queue:
                self._end_if_empty(former)

    def count_as(self, place: tuple[str, str] | None, step: int) -> None:
        """Add `step` to the finished jobs of a queue and status."""
        if place is not None:
            queue, status = place
            self._counts_of(queue)[status] += step
            self.totals[status] += step
            self._end_if_empty(queue)

    def _counts_of(self, queue: str) -> dict[str, int]:
        counts = self.counts.get(queue)
        if counts is None:
            if queue not in self.paused:
                self.queue_names.add(queue)
            counts = self.counts[queue] = dict.fromkeys(STATUSES, 0)
        return counts

    def _end_if_empty(self, queue: str) -> None:
        """Forget a queue that has no jobs left, unless it is paused."""
        if queue in self.counts and not any(self.counts[queue].values()):
            del self.counts[queue]
            if queue not in self.paused:
                self.queue_names.remove(queue)

    def set_quiet(self, rules: Mapping[str, QuietRule]) -> None:
        self.quiet = rules
        self.on_quiet()

    def set_schedule(self, name: str, schedule: Schedule | None) -> None:
        if schedule is None:
            self.schedules.pop(name, None)
        else:
            self.schedules[name] = schedule
        self.on_schedule(name)

    def set_paused(self, queue: str, pause: QueuePause | None) -> None:
        if pause is not None:
            if queue not in self.counts and queue not in self.paused:
                self.queue_names.add(queue)
            self.paused[queue] = pause
            return
        if self.paused.pop(queue, None) is not None and queue not in self.counts:
            self.queue_names.remove(queue)
        for kind in self.queued_kinds(queue):
            self.on_due(queue, kind)

    def _is_wake(self, wake: tuple[int, BucketName]) -> bool:
        queue, kind, priority = wake[1]
        queued = self._queued.get(queue)
        bucket = None if queued is None else queued.buckets.get(kind, {}).get(priority)
        return bucket is not None and bucket.wakes_at == wake[0]


def remember(late: dict[K, V], key: K, value: V) -> None:
    """Set a value of `State.late_calls` or `late_results`. Forget the one that was set longest ago above LATE_KEPT."""
    late.pop(key, None)
    late[key] = value
    if len(late) > LATE_KEPT:
        del late[next(iter(late))]


def _is_same_grant(before: Job, after: Job) -> bool:
    if before.status != "processing" or before.deadlines is None or after.deadlines is None:
        return False
    return before.grant is not None and after.grant is not None and before.grant.lock_id == after.grant.lock_id
