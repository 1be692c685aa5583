"""Compute the times of a schedule from its cron expression or interval. The only module that knows time zones.

In a time zone with daylight saving time, an expression follows Debian's cron: if neither minute nor hour begins with
`*`, a time that does not exist fires once at the first instant after the gap, and one that exists twice fires the first
time only. Other expressions follow elapsed time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from copy import copy
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import islice
from typing import Final
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from jobd.model.job import DAY_MS
from jobd.model.schedules import Timing
from jobd.model.times import duration

SHORTHANDS: Final = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *"}
MAX_COUNTED: Final = 1_000
_FIELDS: Final = {
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31, L or LW, and a day that one of its months has",
    "month": "1-12 or JAN-DEC",
    "day-of-week": "0-7 or SUN-SAT",
}
_ZONES: Final[dict[str, tzinfo]] = {"UTC": UTC}  # those that were loaded
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MS: Final = timedelta(milliseconds=1)


class InvalidTiming(ValueError):
    """A timing that never fires or cannot be read. `field` names the field of the request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def next_times(timing: Timing, after_ms: int, count: int) -> list[int]:
    """Return the first `count` times later than `after_ms`, in Unix milliseconds. Raises InvalidTiming.

    A cron expression ends when it has no time within 50 years.
    """
    if timing.cron is None:
        return list(islice(_times(timing, after_ms), count))
    known = _known_times(timing, count)
    if len(known) < 2 or not known[0] <= after_ms < known[1]:
        known[:] = [after_ms, *islice(_times(timing, after_ms), count)]
    return known[1:]


@lru_cache(maxsize=10_000)
def _known_times(timing: Timing, count: int) -> list[int]:
    """Return the list in which a moment and the `count` times after it are kept. It is empty at first."""
    return []


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
        high = until_ms  # no time is after it and at or before `until_ms`
        while latest < high:
            middle = (latest + high) // 2
            at = next(_times(timing, middle))
            latest, high = (latest, middle) if at > until_ms else (at, high)
    return latest, count - 1


@lru_cache(maxsize=10_000)
def explanation(timing: Timing) -> str:
    """Return the timing in words. Raises InvalidTiming."""
    if timing.every_ms is not None:
        shift = f", {duration(timing.offset_ms)} after the full interval" if timing.offset_ms else ""
        return f"Every {duration(timing.every_ms)}{shift}"
    cron = _cron(timing.cron or "")
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
    cron, zone = _cron(timing.cron or ""), _ZONES.get(timing.timezone) or _read_zone(timing.timezone)
    minute, hour = cron.parts[1:3]
    elapsed = minute.startswith("*") or hour.startswith("*")
    yield from (_elapsed_times if elapsed else _fixed_times)(cron, zone, after_ms)


def _fixed_times(cron: CronSim, zone: tzinfo, after_ms: int) -> Iterator[int]:
    last = after_ms
    for wall_ms in _walls(cron, after_ms + _offset_ms(zone, after_ms)):
        before = (_EPOCH + timedelta(milliseconds=wall_ms)).replace(tzinfo=zone).utcoffset() or timedelta()
        at = wall_ms - before // _MS
        if _offset_ms(zone, at) != before // _MS:  # it does not exist
            at = _change(zone, at - DAY_MS, at)
        if at > last:  # several times in a gap fire once, and the second of two equal hours repeats none
            last = at
            yield at


def _elapsed_times(cron: CronSim, zone: tzinfo, after_ms: int) -> Iterator[int]:
    """Yield the times of one period without a change of the offset after the other."""
    while True:
        seen = after_ms + 1
        offset_ms = _offset_ms(zone, seen)
        for wall_ms in _walls(cron, after_ms + offset_ms):
            at = wall_ms - offset_ms
            while seen < at and _offset_ms(zone, ahead := min(seen + DAY_MS, at)) == offset_ms:
                seen = ahead
            if seen < at:
                after_ms = _change(zone, seen, ahead) - 1
                break
            yield at
        else:
            return


def _walls(cron: CronSim, after_ms: int) -> Iterator[int]:
    """Yield the wall times that match, later than `after_ms`, both as if they were UTC."""
    cron = copy(cron)
    cron.dt = (_EPOCH + timedelta(milliseconds=after_ms)).replace(microsecond=0)
    return ((moment - _EPOCH) // _MS for moment in cron)


def _change(zone: tzinfo, low_ms: int, high_ms: int) -> int:
    """Return when the offset of the zone changes, which it does once between the two."""
    offset_ms = _offset_ms(zone, low_ms)
    while high_ms - low_ms > 1:
        middle = (low_ms + high_ms) // 2
        low_ms, high_ms = (middle, high_ms) if _offset_ms(zone, middle) == offset_ms else (low_ms, middle)
    return high_ms


def _offset_ms(zone: tzinfo, at_ms: int) -> int:
    moment = (_EPOCH + timedelta(milliseconds=at_ms)).astimezone(zone)
    return (moment.utcoffset() or timedelta()) // _MS


@lru_cache(maxsize=1_000)
def _cron(given: str) -> CronSim:
    """Return the parsed expression, which is not changed: `_walls` iterates over a copy."""
    text = SHORTHANDS.get(given, given)
    if text.startswith("@"):
        raise InvalidTiming("cron", f'"{text}" is unknown: use {", ".join(SHORTHANDS)} or five fields')
    if (found := len(text.split())) != 5:
        raise InvalidTiming("cron", f'"{text}" has {found} fields: it needs five, {" ".join(_FIELDS)}')
    try:
        return CronSim(text, _EPOCH)
    except CronSimError as error:
        name = str(error).removeprefix("Bad ")
        value = text.split()[list(_FIELDS).index(name)]
        raise InvalidTiming("cron", f'"{text}" has the {name} {value}: use {_FIELDS[name]}') from None


async def load_zone(name: str) -> None:
    """Read a time zone in a thread, so that the functions above do not read files. Raises InvalidTiming."""
    if name != "UTC" and name not in _ZONES:
        _ZONES[name] = await asyncio.to_thread(_read_zone, name)


def _read_zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: a directory of zones
        raise InvalidTiming("timezone", f'"{name}" is unknown: use an IANA name such as Europe/Berlin') from None
