"""Format durations and times for people. All programs and pages use these formats.

This module imports no other, because jobctl starts with it.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Final

SECOND_MS: Final = 1_000
MINUTE_MS: Final = 60 * SECOND_MS
HOUR_MS: Final = 60 * MINUTE_MS
DAY_MS: Final = 24 * HOUR_MS
YEAR_MS: Final = 365 * DAY_MS

# From this duration on: the unit, and the smallest unit that is shown.
_UNITS: Final = (
    (DAY_MS, "d", HOUR_MS, "h"),
    (HOUR_MS, "h", MINUTE_MS, "min"),
    (MINUTE_MS, "min", SECOND_MS, "s"),
)
_TENTHS_BELOW_MS: Final = 10 * SECOND_MS


def duration(ms: float) -> str:
    """Format a duration, rounded down: `350 ms`, `3.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`, `4 d 3 h`."""
    ms = max(int(ms), 0)
    if ms < SECOND_MS:
        return f"{ms} ms"
    if ms < _TENTHS_BELOW_MS:
        return f"{ms // 100 / 10:g} s"
    for unit_ms, unit, smaller_ms, smaller in _UNITS:
        if ms >= unit_ms:
            rest = ms % unit_ms // smaller_ms
            return f"{ms // unit_ms} {unit} {rest} {smaller}" if rest else f"{ms // unit_ms} {unit}"
    return f"{ms // SECOND_MS} s"


def time_left(ms: float) -> str:
    """Format the time until an event like `duration`, but rounded up, so that it does not end before the event."""
    ms = math.ceil(ms)
    step_ms = next((smaller_ms for unit_ms, _, smaller_ms, _ in _UNITS if ms >= unit_ms), SECOND_MS)
    if ms < _TENTHS_BELOW_MS:
        step_ms = 100 if ms >= SECOND_MS else 1
    return duration(ms + step_ms - 1)


def utc(at_ms: int, now_ms: int | None = None) -> str:
    """Format a Unix time: `2026-03-01 14:05:09 UTC`. If it is after `now_ms`, it is rounded up to the second."""
    at_s = at_ms // SECOND_MS if now_ms is None or at_ms <= now_ms else math.ceil(at_ms / SECOND_MS)
    try:
        return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{at_ms} ms"


def clock_time(at_ms: int) -> str:
    """Return the time of the day, such as `02:40 UTC`."""
    return f"{utc(at_ms)[11:16]} UTC"
