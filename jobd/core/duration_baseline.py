"""The duration baseline of each kind of job: the 95th percentile of the last hour, and its usual value.

Memory is bounded: a number of kinds, a number of hours of each, and counts in buckets of exponential size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec import Struct, field

from jobd.model.job import HOUR_MS, MINUTE_MS

KINDS_KEPT: Final = 100  # those with the latest completions
SLOT_MS: Final = 10 * MINUTE_MS
SLOTS: Final = HOUR_MS // SLOT_MS
SAMPLES_NEEDED: Final = 20  # completions of an hour that counts
HOURS_NEEDED: Final = 3  # hours that count, before there is a usual value
# The usual value is the median of the hours, not a percentile over all of them, which an hour of slow jobs would soon
# move. Hours with too few jobs do not count, so that nightly work is compared with previous nights.
HOURS_KEPT: Final = 48
STEP_BITS: Final = 3  # eight buckets for each doubling: durations have an error of one eighth


class KindPace(Struct, frozen=True):
    """One kind: completions of the last hour, and 95th percentiles in ms; None if there are too few jobs."""

    kind: str
    completed: int
    last_hour_ms: int | None
    usual_ms: int | None


class Pace(Struct):
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
        slot = now // SLOT_MS
        return _sum(counts for key, counts in self.slots.items() if slot - SLOTS < key <= slot)

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


class Paces(Struct):
    """The kinds with the latest completions, in that order.

    If there are KINDS_KEPT, a new kind replaces the first one, if that had no completion for a slot; otherwise it is
    ignored. So many alternating kinds do not displace each other before any of them has a baseline.
    """

    kinds: dict[str, Pace] = field(default_factory=dict)

    def add(self, kind: str, at: int, ms: int) -> None:
        """Add a job of `kind` that completed at wall time `at`, `ms` after its grant."""
        pace = self.kinds.pop(kind, None)
        if pace is None:
            if len(self.kinds) >= KINDS_KEPT:
                oldest = next(iter(self.kinds))
                if abs(at - self.kinds[oldest].last) < SLOT_MS:
                    return
                del self.kinds[oldest]
            pace = Pace()
        self.kinds[kind] = pace
        pace.add(at, ms)

    def view(self, now: int) -> list[KindPace]:
        """Return every kind with completions in the last hour."""
        counted = ((kind, pace, pace.last_hour(now)) for kind, pace in self.kinds.items())
        return [_seen(kind, pace, counts) for kind, pace, counts in counted if counts]


def bucket(ms: int) -> int:
    """Return the bucket of a duration: exact below 16 ms, then eight for each doubling."""
    shift = ms.bit_length() - STEP_BITS - 1
    return ms if shift <= 0 else (shift << STEP_BITS) + (ms >> shift)


def top(place: int) -> int:
    """Return the longest duration of the bucket `place`, in ms."""
    shift = max((place >> STEP_BITS) - 1, 0)
    return ((place - (shift << STEP_BITS) + 1) << shift) - 1


def percentile_95(counts: dict[int, int]) -> int:
    """Return the 95th percentile in ms. Of fewer than 20 durations it is the longest."""
    needed = (95 * sum(counts.values()) + 99) // 100
    for place in sorted(counts):
        needed -= counts[place]
        if needed <= 0:
            return top(place)
    return 0  # empty


def _seen(kind: str, pace: Pace, counts: dict[int, int]) -> KindPace:
    completed = sum(counts.values())
    last_hour_ms = percentile_95(counts) if completed >= SAMPLES_NEEDED else None
    return KindPace(kind, completed, last_hour_ms, pace.usual())


def _sum(parts: Iterable[dict[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for counts in parts:
        for place, count in counts.items():
            total[place] = total.get(place, 0) + count
    return total
