"""Count the events of each queue and kind in the last minutes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct, field

from jobd.core.stats import latest
from jobd.model.events import Event
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Failure
from jobd.model.problems import Subject

MINUTES: Final = 10
PAIRS_KEPT: Final = 10_000  # those with the latest events
FAR_MS: Final = 7 * DAY_MS
CREATED, ENDED, FAILED, EXPIRED, FAR = range(5)  # places in the counts of a minute
_ENDED: Final = {"completed": ENDED, "adopted": ENDED, "failed": FAILED, "retried": FAILED, "expired": EXPIRED}


def pair_id(condition: str, queue: str, kind: str = "") -> str:
    """Return the `problem_id` of a queue and a kind, at a fifth of the cost."""
    return f"{condition}/{queue}/{kind}" if kind else f"{condition}/{queue}"


class Pair(Struct, frozen=True, gc=False):
    """A queue and a kind."""

    queue: str
    kind: str

    @property
    def subject(self) -> Subject:
        return Subject(type="pair", queue=self.queue, kind=self.kind)

    def id(self, condition: str) -> str:
        return pair_id(condition, self.queue, self.kind)


class PairMinutes(Struct):
    """The counts of one queue and kind by minute, and the error of its latest failed attempt."""

    minutes: dict[int, list[int]] = field(default_factory=dict)
    error: Failure | None = None
    far_at: list[int] = field(default_factory=list)  # hours in which most of its jobs were created far ahead

    def sums(self, now: int) -> list[int]:
        """Return the sums of the last 10 minutes, including the current one."""
        recent = latest(self.minutes, now // MINUTE_MS, MINUTES)
        return [sum(column) for column in zip(*recent.values(), strict=True)] or [0] * 5

    def is_usual(self, now: int) -> bool:
        """Note that most jobs are created far ahead now. Return whether that was so on the day before, too."""
        hour = now // HOUR_MS
        self.far_at = [each for each in self.far_at if hour - each <= 36 and each != hour] + [hour]
        return any(hour - each >= 12 for each in self.far_at)

    def first(self, place: int, now: int) -> int:
        """Return when the first minute of the last 10 began that counts something at this place."""
        last = now // MINUTE_MS
        recent = latest(self.minutes, last, MINUTES)
        return min((minute for minute, counts in recent.items() if counts[place]), default=last) * MINUTE_MS


class Tally(Pair, frozen=True, gc=False):
    """The sums of the last 10 minutes of one queue and kind."""

    minutes: PairMinutes
    created: int
    completed: int
    failed: int
    expired: int
    far: int

    @property
    def attempts(self) -> int:
        return self.completed + self.failed


class PairCounts:
    """Follows commits with `note`. In memory only."""

    def __init__(self) -> None:
        self.pairs: OrderedDict[tuple[str, str], PairMinutes] = OrderedDict()

    def recent(self, now: int) -> Iterator[Tally | None]:
        """Iterate over the pairs with events in the last 10 minutes. Yields once for each pair."""
        first = now // MINUTE_MS - MINUTES
        for key in list(dict.keys(self.pairs)):  # a tenth of the time of list(self.pairs)
            pair = self.pairs.get(key)
            yield Tally(*key, pair, *pair.sums(now)) if pair and next(reversed(pair.minutes), 0) > first else None

    def note(self, changes: Sequence[Event]) -> None:
        for event in changes:
            if event.type == "created":
                assert event.after is not None
                counts = self._minute(event, event.after.options.kind)
                counts[CREATED] += 1
                counts[FAR] += event.after.run_at - event.at > FAR_MS
            elif (place := _ENDED.get(event.type)) is not None and (before := event.before) is not None:
                counts = self._minute(event, before.options.kind)
                counts[place] += 1
                if place == FAILED and event.after is not None:
                    self.pairs[event.queue, before.options.kind].error = event.after.error

    def _minute(self, event: Event, kind: str) -> list[int]:
        key, minute = (event.queue, kind), event.at // MINUTE_MS
        pair = self.pairs.get(key)
        if pair is None:
            pair = self.pairs[key] = PairMinutes()
            if len(self.pairs) > PAIRS_KEPT:
                self.pairs.popitem(last=False)
        counts = pair.minutes.get(minute)
        if counts is None:
            self.pairs.move_to_end(key)
            # After a backward step of the clock, later minutes do not count.
            pair.minutes = latest(pair.minutes, minute, MINUTES + 1)
            counts = pair.minutes[minute] = [0] * 5
        return counts
