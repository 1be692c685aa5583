"""Count events in steps of the last hour and the last day, for charts, and per queue.

The counts of charts survive a restart; those of queues do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from jobd.model.events import Event
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS

# The series that an event type counts for. Every failed attempt counts as a failure, whether or not it is retried. A
# job that fails without an attempt (it expired, or an operator failed it while it was queued) does not.
SERIES: Final = {
    "created": 0,
    "imported": 0,
    "completed": 1,
    "adopted": 1,
    "failed": 2,
    "retried": 2,
    "stalled": 2,
    "force_failed": 2,
}
ATTEMPTS: Final = 2
STEP_MS: Final = 10 * SECOND_MS
STEPS: Final = 360  # an hour
SLOT_MS: Final = 10 * MINUTE_MS
SLOTS: Final = 144  # a day
MINUTES: Final = 60
MAX_QUEUES: Final = 1_000  # further queues have no counts
_NOTHING: Final = (0, 0, 0)


class ChartSeries(Struct, frozen=True):
    """Counts by step. `at` has the start of each step, in Unix seconds."""

    at: list[int]
    created: list[int]
    completed: list[int]
    failed: list[int]


class Chart(Struct, frozen=True):
    """The last hour in steps of 10 s and the last day in steps of 10 min. Counting began at `since` (Unix ms)."""

    hour: ChartSeries
    day: ChartSeries
    since: int


class Rates(Struct, frozen=True):
    """Counts in the last minute, hour and day (or since the start)."""

    created: tuple[int, int, int]
    completed: tuple[int, int, int]
    failed: tuple[int, int, int]


class QueueRate(Struct, frozen=True):
    """Counts of a queue in the last hour (or since the start), and completed jobs `per_minute` on average."""

    created: int
    completed: int
    failed: int
    per_minute: float

    @property
    def failed_share(self) -> float | None:
        """The percentage of failed attempts; None without attempts."""
        ended = self.completed + self.failed
        return 100 * self.failed / ended if ended else None


class SavedTimeseries(Struct, frozen=True):
    """The saved form: step number to counts by series, for the hour and the day. `since` is in Unix ms."""

    since: int
    hour: dict[int, list[int]]
    day: dict[int, list[int]]


class StepCounts:
    """Counts in the last `max_steps` steps of `step_ms`. Begins with the counts `known`."""

    __slots__ = ("_counts", "_max_steps", "_step_ms")

    def __init__(self, step_ms: int, max_steps: int, known: dict[int, list[int]] | None = None) -> None:
        self._step_ms = step_ms
        self._max_steps = max_steps
        self._counts = known or {}  # number of the step since 1970 -> counts by series

    @property
    def known(self) -> dict[int, list[int]]:
        return self._counts

    def counts(self, at: int) -> list[int]:
        """Return the counts of the step at this time. The caller increments them."""
        step = at // self._step_ms
        counts = self._counts.get(step)
        if counts is None:
            # Steps in the future come from a clock that was set back. They would displace current steps.
            for ahead in [each for each in self._counts if each > step + 1]:
                del self._counts[ahead]
            counts = self._counts[step] = [*_NOTHING]
            while len(self._counts) > self._max_steps + 1:
                del self._counts[min(self._counts)]
        return counts

    def series(self, now: int) -> ChartSeries:
        """Return the counts of the last complete steps."""
        first = now // self._step_ms - self._max_steps
        steps = range(first, first + self._max_steps)
        counts = [self._counts.get(step, _NOTHING) for step in steps]
        columns = ([count[line] for count in counts] for line in range(3))
        return ChartSeries([step * self._step_ms // SECOND_MS for step in steps], *columns)

    def sums(self, now: int, back: int) -> list[int]:
        """Return the sums over the last `back` steps, including the current one."""
        last = now // self._step_ms
        chosen = [count for step, count in self._counts.items() if last - back < step <= last]
        return [sum(count[line] for count in chosen) for line in range(3)]


class Timeseries:
    """Counts events. `since` is the start of counting, `started` that of the process, in Unix ms."""

    def __init__(self, started: int, saved: SavedTimeseries | None = None) -> None:
        saved = saved or SavedTimeseries(started, {}, {})
        self.since = saved.since
        self.started = started
        self._hour = StepCounts(STEP_MS, STEPS, saved.hour)
        self._day = StepCounts(SLOT_MS, SLOTS, saved.day)
        self._queues: dict[str, StepCounts] = {}  # most recently used last

    @classmethod
    def opened(cls, body: bytes, now: int) -> Timeseries:
        """Restore the result of `saved`. Begin without counts if it is unusable or from another version."""
        try:
            saved = msgspec.json.decode(body, type=SavedTimeseries)
        except msgspec.MsgspecError:
            return cls(now)
        rows = [*saved.hour.values(), *saved.day.values()]
        return cls(now, saved if saved.since <= now and all(len(row) == len(_NOTHING) for row in rows) else None)

    def saved(self) -> bytes:
        """Return the counts for the next start, as JSON."""
        return msgspec.json.encode(SavedTimeseries(self.since, self._hour.known, self._day.known))

    def record(self, changes: Sequence[Event]) -> None:
        """Count committed changes. The changes of a batch have nearly the same time."""
        at = -1
        hour: list[int] = []
        day: list[int] = []
        queues: dict[str, list[int]] = {}
        for event in changes:
            line = SERIES.get(event.type)
            if line is None or (line == ATTEMPTS and event.from_status != "processing"):
                continue
            if event.at != at:
                at = event.at
                hour, day = self._hour.counts(at), self._day.counts(at)
                queues.clear()
            queue = queues.get(event.queue)
            if queue is None:
                queue = queues[event.queue] = self._of_queue(event.queue).counts(at)
            hour[line] += 1
            day[line] += 1
            queue[line] += 1

    def _of_queue(self, name: str) -> StepCounts:
        counts = self._queues.pop(name, None)
        if counts is None:
            counts = StepCounts(MINUTE_MS, MINUTES)
            if len(self._queues) >= MAX_QUEUES:
                del self._queues[next(iter(self._queues))]
        self._queues[name] = counts
        return counts

    def chart(self, now: int) -> Chart:
        return Chart(self._hour.series(now), self._day.series(now), self.since)

    def rates(self, now: int) -> Rates:
        minute, hour = self._hour.sums(now, MINUTE_MS // STEP_MS), self._hour.sums(now, STEPS)
        return Rates(*zip(minute, hour, self._day.sums(now, SLOTS), strict=True))

    def queue(self, name: str, now: int) -> QueueRate | None:
        """Return the counts of a queue, or None if there are none."""
        counts = self._queues.get(name)
        if counts is None:
            return None
        created, completed, failed = counts.sums(now, MINUTES)
        minutes = max(min(now - self.started, HOUR_MS) / MINUTE_MS, 1)
        return QueueRate(created, completed, failed, completed / minutes)
