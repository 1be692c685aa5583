"""Statistics of recent changes, counted from commits.

They survive a restart as of their last save. No promise depends on them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from msgspec import Struct, field

from jobd.core.double_grants import Overlaps
from jobd.core.duration_baseline import Paces
from jobd.model.events import Change
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS

# Upper bounds of the processing-time histogram, in seconds.
PROCESSING_BUCKETS_S: Final = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 1800, 3600, 14400)
STEP_MS: Final = 10 * SECOND_MS
LATELY: Final = 60  # steps: ten minutes
ATTEMPT_QUEUES: Final = 2_000  # with attempts in one step; further queues are not counted in it
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


class Figures(Struct):
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
    paces: Paces = field(default_factory=Paces)
    overlaps: Overlaps = field(default_factory=Overlaps)
    events: dict[str, int] = field(default_factory=dict)  # type -> events

    def note(self, change: Change) -> None:
        """Count one committed change."""
        event, before, after = change.event, change.before, change.after
        self.events[event.type] = self.events.get(event.type, 0) + 1
        match event.type:
            case "granted":
                self._grant(event.queue)
                if self.overlaps.taken:
                    self.overlaps.granted(change)
            case "completed":
                if before is not None and before.started_at is not None:
                    ms = max(event.at - before.started_at, 0)
                    self._completed(event.queue, event.at, ms)
                    self.paces.add(before.options.kind, event.at, ms)
            case "stalled":
                self._recovered(event.at, requeued=after is not None and after.status == "queued")
                self.overlaps.ended(change)
            case "late_result":
                self.late_kept += 1
                self.overlaps.refused(event)
            case "late_call":
                self.overlaps.refused(event)
            case "adopted":
                self.late_adopted += 1
            case "lock_expired":
                self.since_report.locks_cleared += 1
            case "deleted" if event.by == "cleanup":
                self.since_report.deleted += 1
            case _:
                pass

    def completed_last_hour(self, now: int) -> tuple[int, int]:
        """Return the number of jobs completed in the last 60 minutes, and their processing time in ms."""
        this = now // MINUTE_MS
        recent = [value for minute, value in self.completions.items() if this - 60 < minute <= this]
        return sum(count for count, _ in recent), sum(total_ms for _, total_ms in recent)

    def recovered_last_day(self, now: int) -> int:
        """Return the number of jobs recovered in the last 24 hours."""
        this = now // HOUR_MS
        return sum(count for hour, count in self.recoveries.items() if this - 24 < hour <= this)

    def recovered_lately(self, now: int) -> int:
        """Return the number of jobs recovered in the last 10 minutes, by any command."""
        this = now // STEP_MS
        return sum(count for step, count in self.recovered.items() if this - LATELY < step <= this)

    def _grant(self, queue: str) -> None:
        name = _label(queue, self.grants)
        self.grants[name] = self.grants.get(name, 0) + 1

    def _completed(self, queue: str, at: int, processing_ms: int) -> None:
        minute = at // MINUTE_MS
        count, total_ms = self.completions.get(minute, (0, 0))
        self.completions[minute] = (count + 1, total_ms + processing_ms)
        if len(self.completions) > 61:
            self.completions = {key: value for key, value in self.completions.items() if minute - 60 < key <= minute}
        name = _label(queue, self.processing)
        if name not in self.processing:
            self.processing[name] = Histogram.empty(PROCESSING_BUCKETS_S)
        self.processing[name].add(processing_ms / 1000, PROCESSING_BUCKETS_S)

    def _recovered(self, at: int, *, requeued: bool) -> None:
        hour = at // HOUR_MS
        self.recoveries[hour] = self.recoveries.get(hour, 0) + 1
        if len(self.recoveries) > 25:
            self.recoveries = {key: value for key, value in self.recoveries.items() if hour - 24 < key <= hour}
        step = at // STEP_MS
        self.recovered[step] = self.recovered.get(step, 0) + 1
        if len(self.recovered) > LATELY:
            self.recovered = {key: value for key, value in self.recovered.items() if step - LATELY < key <= step}
        self.stalls += 1
        self.since_report.recovered += 1
        if requeued:
            self.reset += 1
        else:
            self.failed += 1


OTHER_QUEUES: Final = "(other)"


def _label(queue: str, known: dict[str, int] | dict[str, Histogram]) -> str:
    return queue if queue in known or len(known) < HISTOGRAM_QUEUES else OTHER_QUEUES


# Events that end an attempt. A failed attempt counts whether or not there is a retry.
_SUCCESSES: Final = frozenset({"completed", "adopted"})
_FAILURES: Final = frozenset({"failed", "retried", "stalled", "force_failed"})


class Attempts:
    """The attempts of each queue that ended in the last 10 minutes. In memory only.

    Each step of 10 s has its own table. Sums are kept beside them, so the cost of a read grows only with the queues.
    """

    def __init__(self) -> None:
        self.by_queue: dict[str, tuple[int, int]] = {}  # queue -> attempts, failed ones
        self._steps: dict[int, dict[str, tuple[int, int]]] = {}

    def note(self, changes: Sequence[Change]) -> None:
        for change in changes:
            event = change.event
            failed = event.type in _FAILURES
            if event.type in _SUCCESSES or (failed and event.before == "processing"):
                self._add(event.queue, event.at, int(failed))

    def forget(self, now: int) -> None:
        """Drop the steps before the last 10 minutes, and later ones after a backward step of the clock."""
        this = now // STEP_MS
        for step in [step for step in self._steps if not this - LATELY < step <= this]:
            for queue, (ended, failed) in self._steps.pop(step).items():
                all_ended, all_failed = self.by_queue[queue]
                if all_ended == ended:
                    del self.by_queue[queue]
                else:
                    self.by_queue[queue] = all_ended - ended, all_failed - failed

    def _add(self, queue: str, at: int, failed: int) -> None:
        step = at // STEP_MS
        counts = self._steps.get(step)
        if counts is None:
            self.forget(at)
            counts = self._steps[step] = {}
        if queue not in counts and len(counts) >= ATTEMPT_QUEUES:
            return
        for table in (counts, self.by_queue):
            ended, failures = table.get(queue, (0, 0))
            table[queue] = ended + 1, failures + failed
