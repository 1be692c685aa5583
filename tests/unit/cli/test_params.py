"""Durations and times on the command line."""

from __future__ import annotations

from datetime import timedelta

import pytest

from jobd.cli.params import duration_ms, moment_ms, moment_or_delay, past_ms
from jobd.dashboard import filters

NOW = 1_772_366_400_000


@pytest.mark.parametrize(
    ("text", "ms"),
    [("0", 0), ("500ms", 500), ("10s", 10_000), ("1.5h", 5_400_000), ("1h30m", 5_400_000), ("7d", 604_800_000)],
)
def test_durations(text: str, ms: int) -> None:
    assert duration_ms(text) == ms


@pytest.mark.parametrize("text", ["", "10", "s", "10 s", "-1s", "1w", "10sx", "x10s", "99999999999d"])
def test_invalid_durations(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration_ms(text)


def test_points_in_the_past() -> None:
    assert past_ms("2h", NOW) == NOW - 7_200_000
    assert past_ms("0", NOW) == NOW
    assert past_ms(str(NOW - 5), NOW) == NOW - 5
    with pytest.raises(ValueError, match="an age such as 2h"):
        past_ms("yesterday", NOW)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-03-01T12:00", 1_772_366_400_000),
        ("2026-03-01 12:00", 1_772_366_400_000),
        ("2026-03-01 12:00:00 UTC", 1_772_366_400_000),  # as printed
        ("2026-03-01T12:00Z", 1_772_366_400_000),
        ("2026-03-01T13:00+01:00", 1_772_366_400_000),
        ("2026-03-01", 1_772_323_200_000),
        ("2h", NOW - 7_200_000),
    ],
)
def test_jobctl_and_the_dashboard_parse_times_alike(text: str, at: int, zone: str) -> None:
    assert (past_ms(text, NOW), filters.parse_time(text, NOW)) == (at, at)


def test_points_in_time() -> None:
    assert moment_ms("1772366400000", 5) == 1_772_366_400_000
    assert moment_ms("2h", NOW) == NOW + 7_200_000
    assert moment_ms("2026-03-01T12:00:00+00:00", 5) == 1_772_366_400_000
    assert moment_ms("2026-03-01T12:00", 5) == 1_772_366_400_000
    with pytest.raises(ValueError, match="Unix milliseconds"):
        moment_ms("1772366400", 5)  # seconds
    with pytest.raises(ValueError, match="Unix milliseconds"):
        moment_ms("tomorrow", 5)


def test_a_duration_stays_a_duration() -> None:
    assert moment_or_delay("90s") == timedelta(seconds=90)
    assert moment_or_delay("2026-03-01T12:00") == 1_772_366_400_000
    with pytest.raises(ValueError, match="at most 365d: give a date"):
        moment_or_delay("366d")
    with pytest.raises(ValueError, match="Unix milliseconds"):
        moment_or_delay("tomorrow")
