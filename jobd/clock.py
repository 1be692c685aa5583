"""One clock: wall time for people, lease time for locks, which no step of the wall clock moves.

Reads clocks and nothing else; what a time means is decided in the rules.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from jobd.commands import Moment
from jobd.job import DAY_MS

SUSPECT_AHEAD_MS: Final = 30 * DAY_MS
_FLICKER_MS: Final = 1  # two clocks read one after the other, each cut to a millisecond, differ by that much


# Both clocks turn to their next millisecond at the same instant, so that a time of one is exactly one of the other.
_PHASE_NS: Final = (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) % 1_000_000


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


def boot_clock_ms() -> int:
    """Milliseconds since boot; it counts suspend and no step of the wall clock reaches it."""
    return (time.clock_gettime_ns(time.CLOCK_BOOTTIME) + _PHASE_NS) // 1_000_000


class Clock:
    """Lease time goes on from `lease_ms`, the last value that was persisted: the daemon's absence does not age locks.

    `wall_ms` is the wall time persisted with it, 0 in a new store. `suspect`: wall time has jumped more than 30 days
    ahead of it, so nothing may be deleted by age until an operator accepts the clock.
    """

    def __init__(
        self,
        lease_ms: int = 0,
        wall_ms: int = 0,
        *,
        wall: Callable[[], int] = wall_clock_ms,
        boot: Callable[[], int] = boot_clock_ms,
    ) -> None:
        self._wall = wall
        self._boot = boot
        self._lease = lease_ms
        self._seen = boot()  # the boot time at which lease time was `_lease`
        self._offset = wall() - lease_ms
        self._held = False
        self._stopped = False
        self.suspect = wall_ms > 0 and wall() - wall_ms > SUSPECT_AHEAD_MS
        self._last_wall = wall_ms

    def moment(self) -> Moment:
        """The time now. `offset` changes only when the wall clock has moved against lease time."""
        now, lease = self._wall(), self._advance()
        if abs(now - lease - self._offset) > _FLICKER_MS:
            self._offset = now - lease
        trusted = self._last_wall if self.suspect else None  # or a restart would take the jump for granted
        return Moment(now=now, lease=lease, offset=self._offset, trusted=trusted)

    def hold(self) -> None:
        """Stop lease time: the disk refuses writes, so no sign of life can be taken. Again is no harm."""
        self._advance()
        self._held = True

    def resume(self) -> None:
        """Let lease time go on from where it was held."""
        self._advance()
        self._held = False

    def stop(self) -> None:
        """Stop lease time for good: the doors close, and from then on the daemon is as good as away."""
        self._advance()
        self._stopped = True

    @property
    def held(self) -> bool:
        return self._held

    def accept(self) -> None:
        """The operator says that the wall clock is right."""
        self.suspect = False

    def _advance(self) -> int:
        seen = self._boot()
        if seen > self._seen and not (self._held or self._stopped):
            self._lease += seen - self._seen
        self._seen = seen  # a clock that went back adds nothing, and counts on from where it is
        return self._lease
