"""Durations and times have one format. The time until an event is rounded up, so it never ends before the event."""

from __future__ import annotations

import pytest

from jobd.model.times import DAY_MS, HOUR_MS, MINUTE_MS, duration, time_left, utc


@pytest.mark.parametrize(
    ("ms", "passed", "left"),
    [
        (-5, "0 ms", "0 ms"),
        (999.5, "999 ms", "1 s"),
        (1_000, "1 s", "1 s"),
        (3_401, "3.4 s", "3.5 s"),
        (9_999, "9.9 s", "10 s"),
        (12_001, "12 s", "13 s"),
        (59_001, "59 s", "1 min"),
        (185_001, "3 min 5 s", "3 min 6 s"),
        (HOUR_MS - 1, "59 min 59 s", "1 h"),
        (2 * HOUR_MS + 10 * MINUTE_MS + 1, "2 h 10 min", "2 h 11 min"),
        (DAY_MS - 1, "23 h 59 min", "1 d"),
        (4 * DAY_MS + 3 * HOUR_MS + 1, "4 d 3 h", "4 d 4 h"),
    ],
)
def test_durations(ms: float, passed: str, left: str) -> None:
    assert (duration(ms), time_left(ms)) == (passed, left)


def test_a_time_is_in_utc_and_a_later_one_is_rounded_up() -> None:
    assert utc(1_700_000_000_123) == utc(1_700_000_000_123, 1_700_000_000_123) == "2023-11-14 22:13:20 UTC"
    assert utc(1_700_000_000_123, 1_700_000_000_122) == "2023-11-14 22:13:21 UTC"
    assert utc(10**18) == f"{10**18} ms"
