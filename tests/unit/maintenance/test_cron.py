"""The times of schedules: intervals, cron expressions, daylight saving time, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.maintenance.cron import MAX_COUNTED, InvalidTiming, explanation, latest_time, next_times
from jobd.model.job import DAY_MS, MINUTE_MS
from jobd.model.schedules import Timing

ZONES = {"Berlin": "Europe/Berlin", "New York": "America/New_York", "Lord Howe": "Australia/Lord_Howe"}


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def local(timing: Timing, after: str, count: int) -> list[str]:
    zone = ZoneInfo(timing.timezone)
    times = next_times(timing, ms(after), count)
    return [f"{datetime.fromtimestamp(at / 1000, zone):%d %H:%M %z}" for at in times]


@pytest.mark.parametrize(
    ("cron", "zone", "after", "expected"),
    [
        # Fixed times: once after a gap, and the first of two.
        ("30 2 * * *", "Berlin", "2026-03-28T12:00", ["29 03:00 +0200", "30 02:30 +0200"]),
        ("15,45 2 * * *", "Berlin", "2026-03-28T12:00", ["29 03:00 +0200", "30 02:15 +0200"]),
        ("30 2 * * *", "Berlin", "2026-10-24T12:00", ["25 02:30 +0200", "26 02:30 +0100"]),
        ("30 2 * * *", "Berlin", "2026-10-25T01:10", ["26 02:30 +0100"]),  # between the two
        ("30 2 * * *", "New York", "2026-03-07T12:00", ["08 03:00 -0400", "09 02:30 -0400"]),
        ("30 1 * * *", "New York", "2026-10-31T12:00", ["01 01:30 -0400", "02 01:30 -0500"]),
        ("15 2 * * *", "Lord Howe", "2026-10-03T00:00", ["04 02:30 +1100", "05 02:15 +1100"]),
        ("45 1 * * *", "Lord Howe", "2026-04-04T00:00", ["05 01:45 +1100", "06 01:45 +1030"]),
        # Elapsed time.
        ("*/30 * * * *", "Berlin", "2026-03-29T00:29", ["29 01:30 +0100", "29 03:00 +0200"]),
        ("*/30 2 * * *", "Berlin", "2026-10-24T23:59", ["25 02:00 +0200", "25 02:30 +0200", "25 02:00 +0100"]),
        ("0 * * * *", "Lord Howe", "2026-04-04T14:30", ["05 02:00 +1030", "05 03:00 +1030"]),
    ],
)
def test_changes_of_daylight_saving_time(cron: str, zone: str, after: str, expected: list[str]) -> None:
    assert local(Timing(cron, timezone=ZONES[zone]), after, len(expected)) == expected


@pytest.mark.parametrize(
    ("zone", "change"),
    [
        *[("Europe/Berlin", "2026-03-29"), ("Europe/Berlin", "2026-10-25")],
        *[("America/New_York", "2026-03-08"), ("America/New_York", "2026-11-01")],
        *[("Australia/Lord_Howe", "2026-04-05"), ("Australia/Lord_Howe", "2026-10-04")],
        *[("Pacific/Chatham", "2026-04-05"), ("Pacific/Chatham", "2026-09-27")],
    ],
)
@pytest.mark.parametrize(
    ("cron", "minutes", "hours"),
    [
        ("* 2 * * *", range(60), [2]),
        ("*/30 2 * * *", [0, 30], [2]),
        ("0 */2 * * *", [0], range(0, 24, 2)),
        ("7 */3 * * *", [7], range(0, 24, 3)),
        ("45 * * * *", [45], range(24)),
    ],
)
def test_elapsed_time_has_every_minute_that_matches(
    zone: str, change: str, cron: str, minutes: Sequence[int], hours: Sequence[int]
) -> None:
    begin, end = ms(change) - DAY_MS, ms(change) + DAY_MS
    clock = [(at, datetime.fromtimestamp(at / 1000, ZoneInfo(zone))) for at in range(begin, end, MINUTE_MS)]
    expected = [at for at, wall in clock if wall.minute in minutes and wall.hour in hours]
    assert next_times(Timing(cron, timezone=zone), begin - 1, len(expected)) == expected


@given(
    st.sampled_from(["30 2 * * *", "*/30 1-3 * * *", "15,45 1,2 * * *", "0 * * * *", "0 3 L * 1#2"]),
    st.sampled_from(sorted(ZONES.values())),
    st.integers(ms("2026-01-01"), ms("2027-01-01")),
)
def test_times_rise_and_do_not_depend_on_the_start(cron: str, zone: str, after: int) -> None:
    timing = Timing(cron, timezone=zone)
    times = next_times(timing, after, 6)
    assert times == sorted(set(times))
    assert times[0] > after
    assert next_times(timing, times[0] - 1, 6) == times
    assert [next_times(timing, at, 1)[0] for at in [after, *times[:-1]]] == times


@given(st.integers(1_000, 10**9), st.integers(0, 10**9), st.integers(0, 10**13))
def test_an_interval_keeps_its_rhythm(every_ms: int, offset_ms: int, after: int) -> None:
    first, second = next_times(Timing(every_ms=every_ms, offset_ms=offset_ms), after, 2)
    assert after < first <= after + every_ms
    assert (first - offset_ms) % every_ms == 0
    assert second == first + every_ms


@given(
    st.sampled_from([Timing("* * * * *"), Timing("30 2 * * *", timezone=ZONES["Berlin"]), Timing(every_ms=90_000)]),
    st.integers(ms("2026-01-01"), ms("2027-01-01")),
    st.integers(0, 70_000_000),
)
def test_the_latest_time_is_the_last_of_those_that_have_passed(timing: Timing, after: int, length_ms: int) -> None:
    passed = [at for at in next_times(timing, after, 1_200) if at <= after + length_ms]
    if passed:
        latest, missed = latest_time(timing, after, after + length_ms)
        assert latest == passed[-1]
        assert missed == (len(passed) - 1 if timing.every_ms else min(len(passed), MAX_COUNTED) - 1)


@pytest.mark.parametrize(
    ("timing", "message"),
    [
        (Timing("61 * * * *"), 'cron: "61 * * * *" has the minute 61: use 0-59'),
        (Timing("0 0 30 2 *"), 'cron: "0 0 30 2 *" has the day-of-month 30: use 1-31, L or'),
        (Timing("* * * * * *"), 'cron: "* * * * * *" has 6 fields: it needs five, minute hour day-of-month month day'),
        (Timing("@yearly"), 'cron: "@yearly" is unknown: use @hourly, @daily, @weekly, @monthly or five fields'),
        (
            Timing("0 0 * * *", timezone="Berlin"),
            'timezone: "Berlin" is unknown: use an IANA name such as Europe/Berlin',
        ),
        (Timing("0 0 * * *", timezone="Europe"), 'timezone: "Europe" is unknown'),
        (Timing("0 0 * * *", timezone="../zone"), 'timezone: "../zone" is unknown'),
    ],
)
def test_errors_name_the_field_and_say_what_to_write(timing: Timing, message: str) -> None:
    with pytest.raises(InvalidTiming) as raised:
        next_times(timing, 0, 1)
    assert f"{raised.value.field}: {raised.value}".startswith(message)


@pytest.mark.parametrize(
    ("timing", "words"),
    [
        (Timing("@daily"), "At 00:00 every day"),
        (Timing("0 3 * * *", timezone="Europe/Berlin"), "At 03:00 every day, Europe/Berlin"),
        (
            Timing("0 0 1 * 1"),
            "At 00:00 on the first day of month and on Monday (days that match either of the two)",
        ),
        (Timing(every_ms=90_000), "Every 1 min 30 s"),
        (Timing(every_ms=3_600_000, offset_ms=60_000), "Every 1 h, 1 min after the full interval"),
    ],
)
def test_explanations(timing: Timing, words: str) -> None:
    assert explanation(timing) == words
