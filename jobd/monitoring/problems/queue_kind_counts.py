"""Count the events of each queue and kind in the last minutes, and find counts that rise from minute to minute."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from msgspec import Struct, field
from msgspec.structs import astuple

from jobd.core.stats import latest
from jobd.model.clocks import BootMs
from jobd.model.events import Event
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Failure
from jobd.model.problems import Subject

MINUTES: Final = 10
PAIRS_KEPT: Final = 10_000  # those with the latest events
FAR_MS: Final = 7 * DAY_MS
RISES: Final = 7  # of the last MINUTES
SETTLED: Final = 3  # minutes without a rise end a trend
_SAME: Final = {"adopted": "completed", "retried": "failed"}  # types of events that count as another one


class Pair(Struct, gc=False):
    """A queue and a kind."""

    queue: str
    kind: str

    @property
    def subject(self) -> Subject:
        return Subject(type="pair", queue=self.queue, kind=self.kind)

    def id(self, condition: str) -> str:
        """Return the id of its problem, at a fifth of the cost of `problem_id`."""
        return f"{condition}/{self.queue}/{self.kind}" if self.kind else f"{condition}/{self.queue}"


class Counts(Struct, gc=False):
    """Numbers of jobs. `far`: they were created, and are due in more than a week. Those that failed may be retried."""

    created: int = 0
    completed: int = 0
    failed: int = 0
    expired: int = 0
    far: int = 0

    @property
    def attempts(self) -> int:
        return self.completed + self.failed


_NONE: Final = Counts()


class PairCounts(Pair):
    """The counts of one queue and kind by minute, those of the last 10, and the error of its latest failed attempt."""

    minutes: dict[int, Counts] = field(default_factory=dict)
    lately: Counts = field(default_factory=Counts)
    error: Failure | None = None
    far_at: list[int] = field(default_factory=list)  # hours in which most of its jobs were created far ahead

    def sums(self, now: int) -> Counts:
        """Return the sums of the last 10 minutes, including the current one."""
        recent = latest(self.minutes, now // MINUTE_MS, MINUTES)
        return Counts(*map(sum, zip(*map(astuple, recent.values()), strict=True)))

    def is_usual(self, now: int) -> bool:
        """Note that most jobs are created far ahead now. Return whether that was so on the day before, too."""
        hour = now // HOUR_MS
        self.far_at = [each for each in self.far_at if hour - each <= 36 and each != hour] + [hour]
        return any(hour - each >= 12 for each in self.far_at)

    def first_failed(self, now: int) -> int:
        """Return when the first minute of the last 10 began in which an attempt failed."""
        last = now // MINUTE_MS
        recent = latest(self.minutes, last, MINUTES)
        return min((minute for minute, counts in recent.items() if counts.failed), default=last) * MINUTE_MS


class QueueKindCounts:
    """Follows commits with `note`. In memory only."""

    def __init__(self) -> None:
        self.pairs: OrderedDict[tuple[str, str], PairCounts] = OrderedDict()

    def recent(self, now: int) -> Iterator[PairCounts | None]:
        """Set `lately` of all pairs, and iterate over those with events in it. Yields once for each pair."""
        first = now // MINUTE_MS - MINUTES
        for key in list(dict.keys(self.pairs)):  # a tenth of the time of list(self.pairs)
            if (pair := self.pairs.get(key)) is not None:
                pair.lately = pair.sums(now) if next(reversed(pair.minutes), 0) > first else _NONE
            yield None if pair is None or pair.lately is _NONE else pair

    def note(self, changes: Sequence[Event]) -> None:
        for event in changes:
            before, after, end = event.before, event.after, _SAME.get(event.type, event.type)
            if end == "created" and after is not None:
                counts = self._minute(event, after.options.kind)[1]
                counts.created += 1
                counts.far += after.run_at - event.at > FAR_MS
            elif end in ("completed", "failed", "expired") and before is not None:
                pair, counts = self._minute(event, before.options.kind)
                setattr(counts, end, getattr(counts, end) + 1)
                if end == "failed" and after is not None:
                    pair.error = after.error

    def _minute(self, event: Event, kind: str) -> tuple[PairCounts, Counts]:
        """Return the counts of the pair, and those of the current minute."""
        key, minute = (event.queue, kind), event.at // MINUTE_MS
        pair = self.pairs.get(key)
        if pair is None:
            pair = self.pairs[key] = PairCounts(*key)
            if len(self.pairs) > PAIRS_KEPT:
                self.pairs.popitem(last=False)
        counts = pair.minutes.get(minute)
        if counts is None:
            self.pairs.move_to_end(key)
            # After a backward step of the clock, later minutes do not count.
            pair.minutes = latest(pair.minutes, minute, MINUTES + 1)
            counts = pair.minutes[minute] = Counts()
        return pair, counts


class Trends:
    """The counts of the last minutes by problem id; others are 0. The counts of a minute are noted once it is over.

    A minute is one dict of numbers, so that thousands of ids make no work for the garbage collector.
    """

    def __init__(self) -> None:
        self._minutes: deque[dict[str, int]] = deque(maxlen=MINUTES + 1)
        self._noted: BootMs | None = None

    def is_over(self, boot_ms: BootMs) -> bool:
        return self._noted is None or boot_ms - self._noted >= MINUTE_MS

    def note(self, counts: dict[str, int], boot_ms: BootMs) -> None:
        self._minutes.append(counts)
        self._noted = boot_ms

    def rise(self, id_: str, *, is_open: bool) -> tuple[int, int] | None:
        """Return the first and the last count if they rose in most minutes, or, of an open problem, lately."""
        counts = [minute.get(id_, 0) for minute in self._minutes]
        rises = [later > earlier for earlier, later in pairwise(counts)]
        if sum(rises) >= RISES or (is_open and any(rises[-SETTLED:])):
            return counts[0], counts[-1]
        return None
