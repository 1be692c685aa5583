"""Statistics of recent changes, counted from commits: counters, duration baselines, double grants.

After a restart, histories continue from their last save, and totals start at 0. No guarantee depends on them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

from msgspec import Struct, field

from jobd.model.clocks import LockMs
from jobd.model.events import Event
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS, Grant, LockDeadlines

T = TypeVar("T")

# -- double grants: a job granted twice within the life of one lock, so that two workers may have worked on it ---------

ENDED_GRANTS_KEPT: Final = 1_000  # grants to watch; the oldest are forgotten
TAKE_BACK: Final = "take-back"  # the rule that ended such a grant


class EndedGrant(Struct, frozen=True):
    """A grant that ended without its worker. `until` is the lock time until which its lock would have been live."""

    until: LockMs
    fencing_token: int
    worker: str


class DoubleGrant(Struct, frozen=True):
    """A job that was granted while the lock of its previous grant would have been live. Previous and new grant."""

    job_id: str
    tokens: tuple[int, int]
    workers: tuple[str, str]


class DoubleGrants(Struct):
    """Double grants, and the grants that could become one.

    After an ordinary stall there is none, because the lock expires before the next grant. A grant that ended by its
    progress timeout or by a restored backup counts: its worker may still be at work. A grant that an operator ended
    does not, nor one whose worker has received `lock_lost`.
    """

    ended_grants: dict[int, EndedGrant] = field(name="taken", default_factory=dict)  # job seq -> its last grant
    minutes: dict[int, int] = field(default_factory=dict)  # minute -> jobs
    total: int = 0
    last: DoubleGrant | None = None

    def ended(self, event: Event) -> None:
        """Record that a job stalled or was taken back."""
        before, after = event.before, event.after
        assert before is not None and after is not None  # a stall does not delete the job
        if before.grant is None or before.deadlines is None:
            return
        if after.ended is not None and after.ended.rule == TAKE_BACK:
            return
        made = before.grant
        self.ended_grants[before.seq] = EndedGrant(lock_end(made, before.deadlines), made.fencing_token, made.worker)
        if len(self.ended_grants) > ENDED_GRANTS_KEPT:
            del self.ended_grants[next(iter(self.ended_grants))]

    def rejected(self, event: Event) -> None:
        """Record that a worker received `lock_lost` for its ended grant."""
        ended = self.ended_grants.get(event.job_seq)
        if ended is not None and (event.details or {}).get("fencing_token") == ended.fencing_token:
            del self.ended_grants[event.job_seq]

    def granted(self, event: Event) -> None:
        """Record a grant. Most jobs have no watched grant."""
        ended = self.ended_grants.pop(event.job_seq, None)
        if ended is None:
            return
        after = event.after
        assert after is not None and after.grant is not None and after.deadlines is not None  # it was granted
        made = after.grant
        if after.deadlines.stall_due - made.stall_after_ms >= ended.until:  # the lock time of the grant
            return
        self.minutes = counted(self.minutes, event.at // MINUTE_MS, 60)
        self.total += 1
        self.last = DoubleGrant(after.id, (ended.fencing_token, made.fencing_token), (ended.worker, made.worker))

    def last_hour(self, now: int) -> int:
        """Return the number in the last 60 minutes of wall time."""
        return sum(latest(self.minutes, now // MINUTE_MS, 60).values())


def lock_end(made: Grant, deadlines: LockDeadlines) -> LockMs:
    """Return the lock time until which the lock would have been live without its progress timeout.

    For a lock that was cut to its progress timeout, that is one TTL after the last report.
    """
    if deadlines.progress_due is None or deadlines.expires < deadlines.progress_due:
        return deadlines.expires
    return max(deadlines.expires, deadlines.stall_due - made.stall_after_ms + made.ttl_ms)


# -- duration baseline: the 95th percentile of the last hour of each kind of job, and its usual value ------------------

KINDS_KEPT: Final = 100  # those with the latest completions
SLOT_MS: Final = 10 * MINUTE_MS
SLOTS: Final = HOUR_MS // SLOT_MS
SAMPLES_NEEDED: Final = 20  # completions of an hour that counts
SLOW_JOBS: Final = 5  # in an hour, so that a kind is slow: of few jobs, the longest ones differ by chance
HOURS_NEEDED: Final = 3  # hours that count, before there is a usual value
# The usual value is the median of the hours, not a percentile over all of them, which an hour of slow jobs would soon
# move. Hours with too few jobs do not count, so that nightly work is compared with previous nights.
HOURS_KEPT: Final = 48
STEP_BITS: Final = 3  # eight buckets for each doubling: durations have an error of one eighth


class KindDurations(Struct, frozen=True):
    """One kind: completions of the last hour, and 95th percentiles in ms; None if there are too few jobs.

    `slow_ms` is the shortest duration of its SLOW_JOBS longest ones in the last hour.
    """

    kind: str
    completed: int
    last_hour_ms: int | None
    usual_ms: int | None
    slow_ms: int | None = None


class DurationBaseline(Struct):
    """Completions of one kind by wall time: `slots` of ten minutes, and the percentile of each earlier hour."""

    last: int = 0  # time of the last one
    hour: int = 0  # the clock hour of the latest slot
    slots: dict[int, dict[int, int]] = field(default_factory=dict)  # slot -> bucket -> completions
    hours: list[int] = field(default_factory=list)  # 95th percentiles in ms, the oldest first

    def add(self, at: int, ms: int) -> None:
        self.last, slot = at, at // SLOT_MS
        if slot not in self.slots:
            self._begin(slot)
        counts, place = self.slots[slot], bucket(ms)
        counts[place] = counts.get(place, 0) + 1

    def last_hour(self, now: int) -> dict[int, int]:
        """Return the completions by bucket, of this slot and the five before it: 50 to 60 minutes."""
        return _sum(latest(self.slots, now // SLOT_MS, SLOTS).values())

    def usual(self) -> int | None:
        if len(self.hours) < HOURS_NEEDED:
            return None
        return sorted(self.hours)[len(self.hours) // 2]

    def _begin(self, slot: int) -> None:
        """End a slot. If an hour has ended too, keep its percentile if it counts."""
        if slot // SLOTS != self.hour:
            self._close_hour()
            self.hour = slot // SLOTS
        self.slots = {key: kept for key, kept in self.slots.items() if slot - SLOTS < key < slot}
        self.slots[slot] = {}

    def _close_hour(self) -> None:
        counts = _sum(counts for slot, counts in self.slots.items() if slot // SLOTS == self.hour)
        if sum(counts.values()) >= SAMPLES_NEEDED:
            self.hours = [*self.hours, percentile_95(counts)][-HOURS_KEPT:]


class DurationBaselines(Struct):
    """The kinds with the latest completions, in that order.

    If there are KINDS_KEPT, a new kind replaces the first one, if that had no completion for a slot; otherwise it is
    ignored. So many alternating kinds do not displace each other before any of them has a baseline.
    """

    kinds: dict[str, DurationBaseline] = field(default_factory=dict)

    def add(self, kind: str, at: int, ms: int) -> None:
        """Add a job of `kind` that completed at wall time `at`, `ms` after its grant."""
        baseline = self.kinds.pop(kind, None)
        if baseline is None:
            if len(self.kinds) >= KINDS_KEPT:
                oldest = next(iter(self.kinds))
                if abs(at - self.kinds[oldest].last) < SLOT_MS:
                    return
                del self.kinds[oldest]
            baseline = DurationBaseline()
        self.kinds[kind] = baseline
        baseline.add(at, ms)

    def view(self, now: int) -> list[KindDurations]:
        """Return every kind with completions in the last hour."""
        counted = ((kind, baseline, baseline.last_hour(now)) for kind, baseline in self.kinds.items())
        return [_seen(kind, baseline, counts) for kind, baseline, counts in counted if counts]


def bucket(ms: int) -> int:
    """Return the bucket of a duration: exact below 16 ms, then eight for each doubling."""
    shift = ms.bit_length() - STEP_BITS - 1
    return ms if shift <= 0 else (shift << STEP_BITS) + (ms >> shift)


def top(place: int) -> int:
    """Return the longest duration of the bucket `place`, in ms."""
    shift = max((place >> STEP_BITS) - 1, 0)
    return ((place - (shift << STEP_BITS) + 1) << shift) - 1


def percentile_95(counts: dict[int, int]) -> int:
    """Return the 95th percentile in ms. For fewer than 20 durations it is the longest."""
    return _longest(counts, (95 * sum(counts.values()) + 99) // 100)


def _longest(counts: dict[int, int], needed: int) -> int:
    """Return the longest of the `needed` shortest durations, in ms; 0 if there are none."""
    for place in sorted(counts):
        needed -= counts[place]
        if needed <= 0:
            return top(place)
    return 0


def _seen(kind: str, baseline: DurationBaseline, counts: dict[int, int]) -> KindDurations:
    completed = sum(counts.values())
    usual_ms = baseline.usual()
    if completed < SAMPLES_NEEDED:
        return KindDurations(kind, completed, None, usual_ms)
    slow_ms = _longest(counts, completed - SLOW_JOBS + 1)
    return KindDurations(kind, completed, percentile_95(counts), usual_ms, slow_ms)


def latest(table: dict[int, T], last: int, count: int) -> dict[int, T]:
    """Return the entries of the latest `count` keys up to `last`."""
    return {key: value for key, value in table.items() if last - count < key <= last}


def counted(table: dict[int, int], last: int, count: int) -> dict[int, int]:
    """Return the entries of the latest `count` keys up to `last`, whose value is one higher."""
    return latest(table | {last: table.get(last, 0) + 1}, last, count)


def _sum(parts: Iterable[dict[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for counts in parts:
        total.update(counts)
    return total


# -- counters ---------------------------------------------------------------------------------------------------------

# Upper bounds of the processing-time histogram, in seconds.
PROCESSING_BUCKETS_S: Final = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 1800, 3600, 14400)
STEP_MS: Final = 10 * SECOND_MS
LATELY: Final = 60  # steps: ten minutes
HISTOGRAM_QUEUES: Final = 200  # label values are capped; further queues share one


class Histogram(Struct):
    """Counts by upper bound (the last is above all bounds), with the sum."""

    counts: list[int]
    total: float = 0.0

    @classmethod
    def empty(cls, bounds: tuple[float, ...]) -> Histogram:
        return cls([0] * (len(bounds) + 1))

    def add(self, value: float, bounds: tuple[float, ...]) -> None:
        self.counts[bisect_left(bounds, value)] += 1
        self.total += value


class SinceReport(Struct):
    """What was done since the last cleanup report."""

    recovered: int = 0
    deleted: int = 0
    locks_cleared: int = 0
    fixed: int = 0


_COUNTED_ONLY: Final = frozenset({"progress", "extended"})  # frequent events that only `events` counts


class Counters(Struct):
    """Counters and short histories by wall time. After a backward step of the clock, later entries do not count."""

    completions: dict[int, tuple[int, int]] = field(default_factory=dict)  # minute -> jobs, ms of processing
    recoveries: dict[int, int] = field(default_factory=dict)  # hour -> jobs
    recovered: dict[int, int] = field(default_factory=dict)  # step -> jobs
    since_report: SinceReport = field(default_factory=SinceReport)
    grants: dict[str, int] = field(default_factory=dict)  # queue -> grants
    stalls: int = 0
    reset: int = 0  # recovered, back to queued
    failed: int = 0  # recovered, failed
    late_kept: int = 0
    late_adopted: int = 0
    processing: dict[str, Histogram] = field(default_factory=dict)  # queue -> seconds
    baselines: DurationBaselines = field(name="paces", default_factory=DurationBaselines)
    double_grants: DoubleGrants = field(name="overlaps", default_factory=DoubleGrants)
    events: dict[str, int] = field(default_factory=dict)  # type -> events
    scheduled: dict[str, int] = field(default_factory=dict)  # outcome -> times of schedules

    def note(self, changes: Sequence[Event]) -> None:
        """Count the changes of a committed batch."""
        events, grants, ended_grants = self.events, self.grants, self.double_grants.ended_grants
        for event in changes:
            kind = event.type
            events[kind] = events.get(kind, 0) + 1
            if kind == "granted":
                queue = event.queue if event.queue in grants else _label(event.queue, grants)
                grants[queue] = grants.get(queue, 0) + 1
                if ended_grants:
                    self.double_grants.granted(event)
            elif kind == "completed":
                before = event.before
                if before is not None and before.started_at is not None:
                    ms = max(event.at - before.started_at, 0)
                    self._completed(event.queue, event.at, ms)
                    self.baselines.add(before.options.kind, event.at, ms)
            elif kind == "created":
                if event.details is not None and "missed" in event.details:
                    self._scheduled("fired", event)
            elif kind not in _COUNTED_ONLY:
                self._note_other(event)

    def _scheduled(self, outcome: str, event: Event) -> None:
        """Count a time of a schedule, and the missed times before it."""
        details: Any = event.details
        for name, count in ((outcome, outcome != "missed"), ("missed", details["missed"])):
            self.scheduled[name] = self.scheduled.get(name, 0) + count

    def _note_other(self, event: Event) -> None:
        match event.type:
            case "stalled":
                self._recovered(event.at, requeued=event.to_status == "queued")
                self.double_grants.ended(event)
            case "late_result":
                self.late_kept += 1
                self.double_grants.rejected(event)
            case "late_call":
                self.double_grants.rejected(event)
            case "adopted":
                self.late_adopted += 1
            case "schedule_skipped":
                self._scheduled("skipped", event)
            case "schedule_missed":
                self._scheduled("missed", event)
            case "lock_expired":
                self.since_report.locks_cleared += 1
            case "deleted" if event.by == "cleanup":
                self.since_report.deleted += 1
            case _:
                pass

    def completed_last_hour(self, now: int) -> tuple[int, int]:
        """Return the number of jobs completed in the last 60 minutes, and their processing time in ms."""
        recent = latest(self.completions, now // MINUTE_MS, 60).values()
        return sum(count for count, _ in recent), sum(total_ms for _, total_ms in recent)

    def recovered_last_day(self, now: int) -> int:
        """Return the number of jobs recovered in the last 24 hours."""
        return sum(latest(self.recoveries, now // HOUR_MS, 24).values())

    def recovered_lately(self, now: int) -> int:
        """Return the number of jobs recovered in the last 10 minutes, by any command."""
        return sum(latest(self.recovered, now // STEP_MS, LATELY).values())

    def _completed(self, queue: str, at: int, processing_ms: int) -> None:
        minute = at // MINUTE_MS
        count, total_ms = self.completions.get(minute, (0, 0))
        self.completions[minute] = (count + 1, total_ms + processing_ms)
        if len(self.completions) > 61:
            self.completions = latest(self.completions, minute, 60)
        histogram = self.processing.get(queue)
        if histogram is None:
            empty = Histogram.empty(PROCESSING_BUCKETS_S)
            histogram = self.processing.setdefault(_label(queue, self.processing), empty)
        histogram.add(processing_ms / 1000, PROCESSING_BUCKETS_S)

    def _recovered(self, at: int, *, requeued: bool) -> None:
        self.recoveries = counted(self.recoveries, at // HOUR_MS, 24)
        self.recovered = counted(self.recovered, at // STEP_MS, LATELY)
        self.stalls += 1
        self.since_report.recovered += 1
        if requeued:
            self.reset += 1
        else:
            self.failed += 1


OTHER_QUEUES: Final = "(other)"


def _label(queue: str, known: dict[str, int] | dict[str, Histogram]) -> str:
    return queue if queue in known or len(known) < HISTOGRAM_QUEUES else OTHER_QUEUES
