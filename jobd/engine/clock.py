"""One clock: wall time for people, lock time for locks, which no step of the wall clock moves.

It also keeps the expected wall time: the latest trusted wall time, and the boot time since then. The wall clock is
suspect while it is too far ahead of it; the rules decide what follows. Invariants:

- A step of the wall clock while the daemon runs never moves the expected time, neither ahead nor back. So a clock that
  was behind and is put right agrees with it, and steps ahead add up.
- At a start, the time since the last commit is unknown. The expected time moves ahead by as much as the wall clock is
  ahead of both its last trusted value and the expected time, if that is at most half of the shortest retention. If the
  clock is behind at the start, this happens when it is put right.
- Otherwise the expected time moves to the wall clock only if an operator accepts the clock, or, while it is suspect or
  behind, if the kernel has reported it as synchronised for long enough. Steps ahead that stay trusted remain counted.
- All of this is persisted with each commit (`Moment.clock`), so a restart trusts no step that was suspect before it.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable
from typing import Final, Literal

import structlog

from jobd.model.clocks import BootMs, MonotonicS
from jobd.model.commands import ClockStep, Moment
from jobd.model.job import DAY_MS, MINUTE_MS, SECOND_MS
from jobd.model.storage import Numbers
from jobd.model.times import duration, utc

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


def boot_clock_ms() -> BootMs:
    """Return milliseconds since boot, with the time in suspend. Steps of the wall clock do not affect it."""
    return (time.clock_gettime_ns(time.CLOCK_BOOTTIME) + _PHASE_NS) // 1_000_000  # type: ignore[return-value]  # a BootMs


monotonic_s: Final[Callable[[], MonotonicS]] = time.monotonic  # type: ignore[assignment]


def loop_time() -> MonotonicS:
    return MonotonicS(asyncio.get_running_loop().time())


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
    """Lock time continues from the last value that was persisted: downtime does not age locks.

    `numbers` were persisted (`wall_ms` 0: a new store). `keep_ms` is the shortest retention in force. The clock is
    suspect if wall time is ahead of its expected value: at the start by more than half of `keep_ms`, while running by
    more than a day (or half of `keep_ms`, if that is less).
    """

    def __init__(
        self,
        numbers: Numbers | None = None,
        *,
        keep_ms: int = 7 * DAY_MS,
        wall: Callable[[], int] = wall_clock_ms,
        boot: Callable[[], BootMs] = boot_clock_ms,
        synchronised: Callable[[], bool] = is_synchronised,
    ) -> None:
        numbers = numbers or Numbers()
        self.keep_ms = keep_ms
        self._wall = wall
        self._boot = boot
        self._synchronised = synchronised
        self._lock_ms = int(numbers.lock_ms)
        self._seen = boot()  # the boot time at which lock time was `_lock_ms`
        now = wall()
        self._offset = now - self._lock_ms
        self._held = False
        self._stopped = False
        self._expected = numbers.expected_ms or numbers.wall_ms or now
        self._step: ClockStep | None = None  # not None: the clock is suspect
        self._is_behind_since_start = False
        if numbers.clock_suspect:
            since = numbers.step_since or self._expected
            self._step = ClockStep(since, numbers.step_ms or now - self._expected)
            self._is_behind_since_start = now < self._expected
        else:
            self._judge_start(now, max(numbers.wall_ms, self._expected))
        self._ahead = now - self._expected
        self._checked_at = self._seen  # boot time of the latest read of the kernel's synchronisation
        self._checked_ahead = self._ahead
        self._synchronised_since: BootMs | None = None
        if self._step is not None:
            self._warn()

    def moment(self) -> Moment:
        """Return the time now, with a suspect clock already detected, so that a batch decides nothing by a wrong time.

        `offset` changes only when the wall clock has moved against lock time.
        """
        now, lock_ms = self._wall(), self._advance()
        if abs(now - lock_ms - self._offset) > _FLICKER_MS:
            now, lock_ms = self._read_together()
            if abs(now - lock_ms - self._offset) > _FLICKER_MS:
                self._offset = now - lock_ms
        self._judge(now)
        trusted = None if self._step is None else self._expected
        ahead = self._ahead if abs(self._ahead) > _FLICKER_MS else 0
        return Moment(now, lock_ms, self._offset, trusted, ahead, self._step, self._held)  # type: ignore[arg-type]  # a LockMs

    @property
    def suspect(self) -> bool:
        """Whether wall time is too far ahead of its expected value."""
        return self.moment().suspect

    def suspect_reason(self) -> str | None:
        """Return what is wrong and what an operator should do, or None while the clock is trusted."""
        return self._warning() if self.suspect else None

    def behind_reason(self) -> str | None:
        """Return what a clock that is behind its expected value means, or None if it is not."""
        if (ahead := self.moment().ahead) >= -_NOISE_MS:
            return None
        return (
            f"The wall clock is {duration(-ahead)} behind its expected value ({utc(self._expected)}). Jobs that "
            "finish now are kept longer by that. If the clock is right: jobctl clock accept"
        )

    def accept(self) -> None:
        """Trust the wall clock, because an operator says that it is right."""
        if self.suspect:
            self._trust("accepted")
        self._follow(self._wall())

    def hold(self) -> None:
        """Stop lock time, because workers cannot report while the disk rejects writes. Repeating it is harmless."""
        self._advance()
        self._held = True

    def resume(self) -> None:
        """Continue lock time from where it was held."""
        self._advance()
        self._held = False

    def stop(self) -> None:
        """Stop lock time permanently, because the listeners close and workers can no longer report."""
        self._advance()
        self._stopped = True

    def boot_ms(self) -> BootMs:
        """Return the boot time, which never stands still, unlike lock time."""
        return self._boot()

    @property
    def held(self) -> bool:
        return self._held

    def _advance(self) -> int:
        seen = self._boot()
        if seen > self._seen:
            self._expected += seen - self._seen
            if not (self._held or self._stopped):
                self._lock_ms += seen - self._seen
        self._seen = seen  # a clock that went back adds nothing, and continues from its new value
        return self._lock_ms

    def _read_together(self) -> tuple[int, int]:
        """Return wall and lock time of the same millisecond, if the process is not paused each time between them."""
        for _ in range(_READS):
            seen = self._seen
            now, lock_ms = self._wall(), self._advance()
            if self._seen == seen:
                break
        return now, lock_ms

    def _judge_start(self, now: int, latest: int) -> None:
        """Judge a wall clock that was trusted when it showed `latest`, an unknown time ago."""
        self._is_behind_since_start = now < latest - _NOISE_MS
        if now - latest > max(self.keep_ms // 2, _NOISE_MS):
            self._step = ClockStep(latest, now - latest)
        elif now > latest:
            self._expected += now - latest

    def _judge(self, now: int) -> None:
        was_suspect = self._step is not None
        if self._is_behind_since_start and now >= self._expected - _NOISE_MS:
            self._judge_start(now, self._expected)
        self._ahead = now - self._expected
        is_ahead = self._ahead > max(min(AHEAD_AT_MOST_MS, self.keep_ms // 2), _NOISE_MS)
        if is_ahead and self._step is None:
            self._step = ClockStep(self._expected, self._ahead)
        if self._step is None and self._ahead >= -_NOISE_MS:
            return
        if not was_suspect and self._step is not None:
            self._synchronised_since = None
            self._warn()
        elif was_suspect and not is_ahead:
            self._trust("agrees")
        elif self._has_been_synchronised():
            if was_suspect:
                self._trust("synchronised")
            self._follow(now)

    def _follow(self, now: int) -> None:
        """Expect what the wall clock shows, because it is known to be right."""
        self._expected, self._ahead, self._is_behind_since_start = now, 0, False

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
        assert self._step is not None
        return (
            f"The wall clock is {duration(self._ahead)} ahead of its expected value ({utc(self._expected)}), so "
            f"nothing is deleted or failed by age. It was set ahead by {duration(self._step.ahead_ms)} after "
            f"{utc(self._step.since)}, or the daemon did not run meanwhile. Check the date of this machine; if it "
            "is right: jobctl clock accept"
        )

    def _warn(self) -> None:
        log.warning("clock_suspect", ahead_ms=self._ahead, message=self._warning())

    def _trust(self, reason: TrustReason) -> None:
        self._step = None
        log.info("clock_trusted", reason=_REASONS[reason])


_REASONS: Final[dict[TrustReason, str]] = {
    "accepted": "an operator accepted the clock",
    "agrees": "wall time agrees with its expected value again",
    "synchronised": "the kernel has reported the clock as synchronised for 10 min",
}
