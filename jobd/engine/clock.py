"""One clock: wall time for people, lease time for locks, which no step of the wall clock moves.

It also keeps the expected wall time. The wall clock is suspect while it is too far ahead of that time; the rules decide
what follows.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Literal

import structlog

from jobd.model.commands import Moment
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS

AHEAD_AT_MOST_MS: Final = DAY_MS  # ahead of boot time, while running
SYNCHRONISED_FOR_MS: Final = 10 * MINUTE_MS
CHECK_EVERY_MS: Final = SECOND_MS  # between two reads of the kernel's synchronisation, while the clock is suspect
MAX_GAP_MS: Final = MINUTE_MS  # a longer gap between two reads restarts the 10 min
_NOISE_MS: Final = SECOND_MS  # a smaller difference is never a step, even with a short retention
_FLICKER_MS: Final = 1  # two clocks read one after the other, each rounded down to a millisecond, differ by this
_READS: Final = 10

TrustReason = Literal["accepted", "agrees", "synchronised"]

log = structlog.get_logger("jobd.clock")

# Added to the boot clock, so that both clocks begin a millisecond at the same instant and differ by whole milliseconds.
_PHASE_NS: Final = (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) % 1_000_000


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


def boot_clock_ms() -> int:
    """Return milliseconds since boot, with the time in suspend. Steps of the wall clock do not affect it."""
    return (time.clock_gettime_ns(time.CLOCK_BOOTTIME) + _PHASE_NS) // 1_000_000


class _Timex(ctypes.Structure):
    """The head of `struct timex`; `rest` is larger than its other fields."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


_STA_UNSYNC: Final = 0x0040
_adjtimex: Final = getattr(ctypes.CDLL(None), "adjtimex", None)


def is_synchronised() -> bool:
    """Return whether the kernel reports its clock as synchronised. False if adjtimex is not available."""
    timex = _Timex()  # modes 0: nothing is set
    return _adjtimex is not None and _adjtimex(ctypes.byref(timex)) >= 0 and not timex.status & _STA_UNSYNC


class Clock:
    """Lease time continues from `lease_ms`, the last value that was persisted: downtime does not age locks.

    `wall_ms` and `suspect` were persisted with it (0: a new store). `keep_ms` is the shortest retention in force. The
    clock is suspect if wall time is ahead of its expected value: at the start by more than half of `keep_ms` against
    `wall_ms`, while running by more than a day (or half of `keep_ms`, if that is less) against boot time. Steps add up:
    the expected value follows a step back at once, and a step ahead only when the clock is accepted or synchronised.
    """

    def __init__(
        self,
        lease_ms: int = 0,
        wall_ms: int = 0,
        *,
        suspect: bool = False,
        keep_ms: int = 7 * DAY_MS,
        wall: Callable[[], int] = wall_clock_ms,
        boot: Callable[[], int] = boot_clock_ms,
        synchronised: Callable[[], bool] = is_synchronised,
    ) -> None:
        self.keep_ms = keep_ms
        self._wall = wall
        self._boot = boot
        self._synchronised = synchronised
        self._lease = lease_ms
        self._seen = boot()  # the boot time at which lease time was `_lease`
        now = wall()
        self._offset = now - lease_ms
        self._held = False
        self._stopped = False
        self._suspect = wall_ms > 0 and (suspect or now - wall_ms > max(keep_ms // 2, _NOISE_MS))
        self._expected = wall_ms if self._suspect else now
        self._ahead = now - self._expected
        self._checked_at = self._seen  # boot time of the latest read of the kernel's synchronisation
        self._checked_ahead = self._ahead
        self._synchronised_since: int | None = None  # boot time
        if self._suspect:
            self._warn()

    def moment(self) -> Moment:
        """Return the time now, with a suspect clock already detected, so that a batch decides nothing by a wrong time.

        `offset` changes only when the wall clock has moved against lease time.
        """
        now, lease = self._wall(), self._advance()
        if abs(now - lease - self._offset) > _FLICKER_MS:
            now, lease = self._read_together()
            if abs(now - lease - self._offset) > _FLICKER_MS:
                self._offset = now - lease
        self._judge(now)
        return Moment(now=now, lease=lease, offset=self._offset, trusted=self._expected if self._suspect else None)

    @property
    def suspect(self) -> bool:
        """Whether wall time is too far ahead of its expected value."""
        return self.moment().suspect

    def suspect_reason(self) -> str | None:
        """Return what is wrong and what an operator should do, or None while the clock is trusted."""
        return self._warning() if self.suspect else None

    def accept(self) -> None:
        """Trust the wall clock, because an operator says that it is right."""
        if self.suspect:
            self._trust("accepted")
        self._expected = self._wall()

    def hold(self) -> None:
        """Stop lease time, because workers cannot report while the disk rejects writes. Repeating it is harmless."""
        self._advance()
        self._held = True

    def resume(self) -> None:
        """Continue lease time from where it was held."""
        self._advance()
        self._held = False

    def stop(self) -> None:
        """Stop lease time permanently, because the listeners close and workers can no longer report."""
        self._advance()
        self._stopped = True

    def boot_ms(self) -> int:
        """Return the boot time, which never stands still, unlike lease time."""
        return self._boot()

    @property
    def held(self) -> bool:
        return self._held

    def _advance(self) -> int:
        seen = self._boot()
        if seen > self._seen:
            self._expected += seen - self._seen
            if not (self._held or self._stopped):
                self._lease += seen - self._seen
        self._seen = seen  # a clock that went back adds nothing, and continues from its new value
        return self._lease

    def _read_together(self) -> tuple[int, int]:
        """Return wall and lease time of the same millisecond, if the process is not paused each time between them."""
        for _ in range(_READS):
            seen = self._seen
            now, lease = self._wall(), self._advance()
            if self._seen == seen:
                break
        return now, lease

    def _judge(self, now: int) -> None:
        self._ahead = now - self._expected
        is_ahead = self._ahead > max(min(AHEAD_AT_MOST_MS, self.keep_ms // 2), _NOISE_MS)
        if self._ahead < 0:
            self._expected = now
        if is_ahead and not self._suspect:
            self._suspect, self._synchronised_since = True, None
            self._warn()
        elif self._suspect and not is_ahead:
            self._trust("agrees")
        elif self._suspect and self._has_been_synchronised():
            self._trust("synchronised")
            self._expected = now

    def _has_been_synchronised(self) -> bool:
        """Return whether every read for long enough found the clock synchronised, with no step of the wall clock."""
        gap_ms, step_ms = self._seen - self._checked_at, abs(self._ahead - self._checked_ahead)
        if gap_ms >= CHECK_EVERY_MS or step_ms > _NOISE_MS:
            self._checked_at, self._checked_ahead = self._seen, self._ahead
            if not self._synchronised():
                self._synchronised_since = None
            elif self._synchronised_since is None or gap_ms > MAX_GAP_MS or step_ms > _NOISE_MS:
                self._synchronised_since = self._seen
        since = self._synchronised_since
        return since is not None and self._seen - since >= SYNCHRONISED_FOR_MS

    def _warning(self) -> str:
        return (
            f"The wall clock is {_in_words(self._ahead)} ahead of its expected value ({_shown(self._expected)}), so "
            "nothing is deleted or failed by age. Check the date of this machine; if it is right: jobctl clock accept"
        )

    def _warn(self) -> None:
        log.warning("clock_suspect", ahead_ms=self._ahead, message=self._warning())

    def _trust(self, reason: TrustReason) -> None:
        self._suspect = False
        log.info("clock_trusted", reason=_REASONS[reason])


_REASONS: Final[dict[TrustReason, str]] = {
    "accepted": "an operator accepted the clock",
    "agrees": "wall time agrees with its expected value again",
    "synchronised": "the kernel has reported the clock as synchronised for 10 min",
}


def _in_words(ms: int) -> str:
    """Format a duration: `40 days`, `26 h`, `31 min`, `5 s`."""
    for unit_ms, unit in ((DAY_MS, "days"), (HOUR_MS, "h"), (MINUTE_MS, "min")):
        if ms >= 2 * unit_ms:
            return f"{ms // unit_ms} {unit}"
    return f"{ms / SECOND_MS:.0f} s"


def _shown(wall_ms: int) -> str:
    return datetime.fromtimestamp(wall_ms // SECOND_MS, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
