"""How long jobs of each kind take: the 95th percentile of the last hour, and what is usual for the kind.

Pure. It is told of completions (figures.py) and decides nothing. Memory is bounded: so many kinds, so many hours of
each, and counts by duration in buckets that grow with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec import Struct, field

from jobd.model.job import HOUR_MS, MINUTE_MS

KINDS_KEPT: Final = 100  # those that completed jobs last
SLOT_MS: Final = 10 * MINUTE_MS
SLOTS: Final = HOUR_MS // SLOT_MS
SAMPLES_NEEDED: Final = 20  # completions, before an hour is judged
HOURS_NEEDED: Final = 3  # judged hours, before anything is usual
# The usual is the middle of the hours, not one percentile over all of them: an hour of slow jobs would soon be a
# twentieth of a day's, and with that usual. Hours in which the kind had too few jobs are passed over, so that work
# of the night is compared with the nights before.
HOURS_KEPT: Final = 48
STEP_BITS: Final = 3  # eight buckets for each doubling: a duration is known to an eighth


class KindPace(Struct, frozen=True):
    """One kind: completions of the last hour, and 95th percentiles in ms; None where too little is known."""

    kind: str
    completed: int
    last_hour_ms: int | None
    usual_ms: int | None


class Pace(Struct):
    """Completions of one kind by wall time: `slots` of ten minutes, and what each hour before came to."""

    last: int = 0  # when the last one was
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
        """Completions by bucket, of this slot and the five before: 50 to 60 minutes."""
        slot = now // SLOT_MS
        return _sum(counts for key, counts in self.slots.items() if slot - SLOTS < key <= slot)

    def usual(self) -> int | None:
        if len(self.hours) < HOURS_NEEDED:
            return None
        return sorted(self.hours)[len(self.hours) // 2]

    def _begin(self, slot: int) -> None:
        """A slot, and perhaps an hour, is over: keep what the hour came to, if that says anything."""
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
    """The kinds that completed jobs last, in that order.

    Where there are enough, one that is new takes the place of the first, if that has been silent for a slot; else it is
    passed over. So many kinds in turn do not push each other out before anything is known of any.
    """

    kinds: dict[str, Pace] = field(default_factory=dict)

    def add(self, kind: str, at: int, ms: int) -> None:
        """One job of `kind` completed at wall time `at`, `ms` after its grant."""
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
        """Every kind that completed jobs in the last hour."""
        counted = ((kind, pace, pace.last_hour(now)) for kind, pace in self.kinds.items())
        return [_seen(kind, pace, counts) for kind, pace, counts in counted if counts]


def bucket(ms: int) -> int:
    """Where a duration is counted: exact below 16 ms, then eight places for each doubling."""
    shift = ms.bit_length() - STEP_BITS - 1
    return ms if shift <= 0 else (shift << STEP_BITS) + (ms >> shift)


def top(place: int) -> int:
    """The longest duration that is counted at `place`, in ms."""
    shift = max((place >> STEP_BITS) - 1, 0)
    return ((place - (shift << STEP_BITS) + 1) << shift) - 1


def percentile_95(counts: dict[int, int]) -> int:
    """So many ms or less took 95 of 100; of less than 20 it is the longest."""
    needed = (95 * sum(counts.values()) + 99) // 100
    for place in sorted(counts):
        needed -= counts[place]
        if needed <= 0:
            return top(place)
    return 0  # of nothing


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
