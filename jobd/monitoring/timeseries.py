"""What happened in the last hour and the last day, for charts and for each queue.

Counts committed changes and nothing else; no promise depends on it. The charts outlive a restart as they were saved
last, what is said of queues does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from jobd.model.events import Change
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS

# Which of the three lines an event counts for. An attempt that failed is a failure, whether or not it is tried again;
# a job that fails without one (it expired, or an operator failed it as it waited) is none.
LINES: Final = {
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
MAX_QUEUES: Final = 1_000  # of the others nothing is said
_NOTHING: Final = (0, 0, 0)


class ChartSeries(Struct, frozen=True):
    """`at` are the beginnings of the steps in Unix seconds, the others how often it happened in each."""

    at: list[int]
    created: list[int]
    completed: list[int]
    failed: list[int]


class Chart(Struct, frozen=True):
    """The last hour in steps of 10 s, the last day in steps of 10 min. `since`: nothing was counted before, Unix ms."""

    hour: ChartSeries
    day: ChartSeries
    since: int


class Rates(Struct, frozen=True):
    """How often it happened in the last minute, in the last hour and in the last day (or since the start)."""

    created: tuple[int, int, int]
    completed: tuple[int, int, int]
    failed: tuple[int, int, int]


class QueueRate(Struct, frozen=True):
    """What happened in a queue in the last hour (or since the start). `per_minute`: completed, on the average."""

    created: int
    completed: int
    failed: int
    per_minute: float

    @property
    def failed_share(self) -> float | None:
        """Of the attempts that ended, in percent; None where none did."""
        ended = self.completed + self.failed
        return 100 * self.failed / ended if ended else None


class SavedTimeseries(Struct, frozen=True):
    """What is saved: how often, by line, in each step of the hour and of the day. Times in Unix ms."""

    since: int
    hour: dict[int, list[int]]
    day: dict[int, list[int]]


class StepCounts:
    """How often it happened in each of the last `most` steps of `step_ms`, of which `known` are some."""

    __slots__ = ("_counts", "_most", "_step_ms")

    def __init__(self, step_ms: int, most: int, known: dict[int, list[int]] | None = None) -> None:
        self._step_ms = step_ms
        self._most = most
        self._counts = known or {}  # number of the step since 1970 -> how often, by line

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def known(self) -> dict[int, list[int]]:
        return self._counts

    def counts(self, at: int) -> list[int]:
        """Those of the step of that time, by line, to be counted up."""
        step = at // self._step_ms
        counts = self._counts.get(step)
        if counts is None:
            # What lies ahead is of a clock that was set back: it would push out the present, and come up as news later.
            for ahead in [each for each in self._counts if each > step + 1]:
                del self._counts[ahead]
            counts = self._counts[step] = [*_NOTHING]
            while len(self._counts) > self._most + 1:
                del self._counts[min(self._counts)]
        return counts

    def lines(self, now: int) -> ChartSeries:
        """The last `most` steps, the running one left out."""
        first = now // self._step_ms - self._most
        steps = range(first, first + self._most)
        counts = [self._counts.get(step, _NOTHING) for step in steps]
        columns = ([count[line] for count in counts] for line in range(3))
        return ChartSeries([step * self._step_ms // SECOND_MS for step in steps], *columns)

    def sums(self, now: int, back: int) -> list[int]:
        """Up to now, over the last `back` steps and the running one."""
        last = now // self._step_ms
        chosen = [count for step, count in self._counts.items() if last - back < step <= last]
        return [sum(count[line] for count in chosen) for line in range(3)]


class Timeseries:
    """`since`: when it began to count, `started`: when this process did, Unix ms."""

    def __init__(self, started: int, kept: SavedTimeseries | None = None) -> None:
        kept = kept or SavedTimeseries(started, {}, {})
        self.since = kept.since
        self.started = started
        self._hour = StepCounts(STEP_MS, STEPS, kept.hour)
        self._day = StepCounts(SLOT_MS, SLOTS, kept.day)
        self._queues: dict[str, StepCounts] = {}  # the one that was heard of latest comes last

    @classmethod
    def opened(cls, body: bytes, now: int) -> Timeseries:
        """From what `kept` gave to the run before. Begins anew where that is no use, or of another version."""
        try:
            kept = msgspec.json.decode(body, type=SavedTimeseries)
        except msgspec.MsgspecError:
            return cls(now)
        rows = [*kept.hour.values(), *kept.day.values()]
        return cls(now, kept if kept.since <= now and all(len(row) == len(_NOTHING) for row in rows) else None)

    def saved(self) -> bytes:
        """What the next run goes on from, as JSON."""
        return msgspec.json.encode(SavedTimeseries(self.since, self._hour.known, self._day.known))

    def record(self, changes: Sequence[Change]) -> None:
        """Count what was committed. The changes of one batch are of the same moment, or almost."""
        at = -1
        hour: list[int] = []
        day: list[int] = []
        queues: dict[str, list[int]] = {}
        for change in changes:
            event = change.event
            line = LINES.get(event.type)
            if line is None or (line == ATTEMPTS and event.before != "processing"):
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
        tally = self._queues.pop(name, None)
        if tally is None:
            tally = StepCounts(MINUTE_MS, MINUTES)
            if len(self._queues) >= MAX_QUEUES:
                del self._queues[next(iter(self._queues))]
        self._queues[name] = tally
        return tally

    def chart(self, now: int) -> Chart:
        return Chart(self._hour.lines(now), self._day.lines(now), self.since)

    def rates(self, now: int) -> Rates:
        minute, hour, day = (
            self._hour.sums(now, MINUTE_MS // STEP_MS),
            self._hour.sums(now, STEPS),
            self._day.sums(now, SLOTS),
        )
        return Rates(*zip(minute, hour, day, strict=True))

    def queue(self, name: str, now: int) -> QueueRate | None:
        """None where nothing has been heard of it."""
        tally = self._queues.get(name)
        if tally is None:
            return None
        created, completed, failed = tally.sums(now, MINUTES)
        minutes = max(min(now - self.started, HOUR_MS) / MINUTE_MS, 1)
        return QueueRate(created, completed, failed, completed / minutes)
