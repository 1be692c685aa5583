"""Compute the times of a schedule from its cron expression or interval. The only module that knows time zones.

In a time zone with daylight saving time, an expression follows Debian's cron: if neither minute nor hour begins with
`*`, a time that does not exist fires once at the first instant after the gap, and one that exists twice fires the first
time only. Other expressions follow elapsed time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice
from typing import Final
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from jobd.model.schedules import Timing
from jobd.model.times import duration

SHORTHANDS: Final = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *"}
MAX_COUNTED: Final = 1_000
_FIELDS: Final = "minute hour day-of-month month day-of-week"
_ZONES: Final[dict[str, tzinfo]] = {"UTC": UTC}  # those that were loaded
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class InvalidTiming(ValueError):
    """A timing that never fires or cannot be read. `field` names the field of the request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def next_times(timing: Timing, after_ms: int, count: int) -> list[int]:
    """Return the first `count` times later than `after_ms`, in Unix milliseconds. Raises InvalidTiming.

    A cron expression ends when it has no time within 50 years.
    """
    return list(islice(_times(timing, after_ms), count))


def latest_time(timing: Timing, after_ms: int, until_ms: int) -> tuple[int, int]:
    """Return the latest time after `after_ms` up to `until_ms`, and the number of earlier ones. There must be one.

    The number of times of a cron expression is counted up to MAX_COUNTED.
    """
    if (every_ms := timing.every_ms) is not None:
        first = next(_times(timing, after_ms))
        earlier = (until_ms - first) // every_ms
        return first + earlier * every_ms, earlier
    latest, count = after_ms, 0
    for at in islice(_times(timing, after_ms), MAX_COUNTED):
        if at > until_ms:
            break
        latest, count = at, count + 1
    else:
        backwards = _cron(timing, _local(timing, until_ms + 1), reverse=True)
        latest = max(latest, next(at for at in map(_unix_ms, backwards) if at <= until_ms))
    return latest, count - 1


def explanation(timing: Timing) -> str:
    """Return the timing in words. Raises InvalidTiming."""
    if timing.every_ms is not None:
        shift = f", {duration(timing.offset_ms)} after the full interval" if timing.offset_ms else ""
        return f"Every {duration(timing.every_ms)}{shift}"
    cron = _cron(timing, datetime.now(UTC))
    words = cron.explain()
    if not cron.day_and:
        words += " (days that match either of the two)"
    return words if timing.timezone == "UTC" else f"{words}, {timing.timezone}"


def _times(timing: Timing, after_ms: int) -> Iterator[int]:
    if (every_ms := timing.every_ms) is not None:
        at = (after_ms - timing.offset_ms) // every_ms * every_ms + timing.offset_ms
        while True:
            at += every_ms
            yield at
    last = after_ms
    for at in map(_unix_ms, _cron(timing, _local(timing, after_ms))):
        if at > last:  # several times in a gap fire once, and the second of two equal hours repeats none
            last = at
            yield at


def _local(timing: Timing, at_ms: int) -> datetime:
    return (_EPOCH + timedelta(milliseconds=at_ms)).astimezone(_zone(timing.timezone))


def _unix_ms(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def _cron(timing: Timing, start: datetime, *, reverse: bool = False) -> CronSim:
    text = SHORTHANDS.get(timing.cron or "", timing.cron or "")
    if text.startswith("@"):
        raise InvalidTiming("cron", f'"{text}" is unknown: use {", ".join(SHORTHANDS)} or five fields')
    if (found := len(text.split())) != 5:
        raise InvalidTiming("cron", f'"{text}" has {found} fields: it needs five, {_FIELDS}')
    try:
        cron = CronSim(text, start, reverse=reverse)
    except CronSimError as error:
        raise InvalidTiming("cron", f'"{text}": {str(error).replace("Bad", "invalid")}') from None
    return cron


async def load_zone(name: str) -> None:
    """Read a time zone in a thread, so that the functions above do not read files. Raises InvalidTiming."""
    if name != "UTC" and name not in _ZONES:
        _ZONES[name] = await asyncio.to_thread(_read_zone, name)


def _zone(name: str) -> tzinfo:
    return _ZONES.get(name) or _read_zone(name)


def _read_zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: a directory of zones
        raise InvalidTiming("timezone", f'"{name}" is unknown: use an IANA name such as Europe/Berlin') from None
