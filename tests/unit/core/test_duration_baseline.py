"""The duration baseline: the 95th percentile of the last hour, the usual value, and the bounds of memory."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.core import stats
from jobd.core.stats import (
    HOURS_KEPT,
    HOURS_NEEDED,
    KINDS_KEPT,
    SAMPLES_NEEDED,
    SLOT_MS,
    SLOTS,
    DurationBaselines,
    KindDurations,
    bucket,
    percentile_95,
    top,
)
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, YEAR_MS

HOUR = 1_700_002_800_000  # the beginning of one
assert HOUR % HOUR_MS == 0


def work(baselines: DurationBaselines, at: int, ms: int, *, kind: str = "film", count: int = SAMPLES_NEEDED) -> None:
    for _ in range(count):
        baselines.add(kind, at, ms)


def one(baselines: DurationBaselines, now: int) -> KindDurations:
    (found,) = baselines.view(now)
    return found


@pytest.fixture
def baselines() -> DurationBaselines:
    return DurationBaselines()


@given(st.integers(0, 100 * YEAR_MS))
def test_a_bucket_has_an_error_of_at_most_an_eighth(ms: int) -> None:
    assert ms <= top(bucket(ms)) <= ms + ms // 8
    assert bucket(top(bucket(ms))) == bucket(ms)
    assert bucket(top(bucket(ms)) + 1) == bucket(ms) + 1


def test_there_are_few_buckets() -> None:
    assert [bucket(ms) for ms in range(20)] == [*range(16), 16, 16, 17, 17]
    assert bucket(100 * YEAR_MS) < 320


@pytest.mark.parametrize(
    ("counts", "ms"),
    [
        ({}, 0),
        ({5: 1}, 5),
        ({1: 19, 9: 1}, 1),
        ({1: 18, 9: 2}, 9),
        ({9: 2, 1: 18}, 9),
        ({1: 95, 9: 5}, 1),
        ({1: 94, 9: 6}, 9),
        ({1: 1, 9: 18}, 9),
        ({1: 190, 9: 10}, 1),
        ({1: 189, 9: 11}, 9),
    ],
)
def test_percentile(counts: dict[int, int], ms: int) -> None:
    assert percentile_95(counts) == ms


@given(st.lists(st.integers(0, 15), min_size=1))
def test_the_percentile_is_the_smallest_value_that_covers_95_of_100(values: list[int]) -> None:
    counts = {value: values.count(value) for value in values}
    least = min(ms for ms in range(16) if 100 * sum(value <= ms for value in values) >= 95 * len(values))
    assert percentile_95(counts) == least


def test_an_hour_with_too_few_jobs_has_no_percentile(baselines: DurationBaselines) -> None:
    work(baselines, HOUR, 10, count=SAMPLES_NEEDED - 1)
    assert one(baselines, HOUR) == KindDurations("film", SAMPLES_NEEDED - 1, None, None)
    work(baselines, HOUR, 12, count=1)
    assert one(baselines, HOUR) == KindDurations("film", SAMPLES_NEEDED, 10, None, 10)


def test_the_last_hour_advances_in_slots(baselines: DurationBaselines) -> None:
    work(baselines, HOUR, 10)
    work(baselines, HOUR + SLOT_MS, 14)
    assert one(baselines, HOUR + HOUR_MS - 1).completed == 2 * SAMPLES_NEEDED
    assert one(baselines, HOUR + HOUR_MS) == KindDurations("film", SAMPLES_NEEDED, 14, None, 14)
    assert baselines.view(HOUR + SLOT_MS + HOUR_MS) == []
    work(baselines, HOUR + 3 * DAY_MS, 9)
    assert one(baselines, HOUR + 3 * DAY_MS).last_hour_ms == 9


def test_the_usual_value_is_the_median_of_the_previous_hours(baselines: DurationBaselines) -> None:
    for hour, ms in enumerate([10, 12, 14]):
        assert one(baselines, HOUR + (hour - 1) * HOUR_MS).usual_ms is None if hour else True
        work(baselines, HOUR + hour * HOUR_MS, ms)
    assert one(baselines, HOUR + 2 * HOUR_MS).usual_ms is None, "the hour that runs is not before itself"
    work(baselines, HOUR + 3 * HOUR_MS, 15)
    assert one(baselines, HOUR + 3 * HOUR_MS) == KindDurations("film", SAMPLES_NEEDED, 15, 12, 15)
    assert len(baselines.kinds["film"].hours) == HOURS_NEEDED


def test_an_hour_with_many_slots_counts_once(baselines: DurationBaselines) -> None:
    for slot in range(SLOTS):
        work(baselines, HOUR + slot * SLOT_MS, 10 if slot else 15, count=10)
    work(baselines, HOUR + HOUR_MS, 1, count=1)
    assert baselines.kinds["film"].hours == [15]


def test_an_hour_counts_by_its_own_jobs(baselines: DurationBaselines) -> None:
    work(baselines, HOUR - SLOT_MS, 15)
    work(baselines, HOUR, 10)
    work(baselines, HOUR + HOUR_MS, 1, count=1)
    assert baselines.kinds["film"].hours == [15, 10]


def test_hours_with_few_jobs_do_not_count(baselines: DurationBaselines) -> None:
    work(baselines, HOUR, 10, count=SAMPLES_NEEDED - 1)
    work(baselines, HOUR + HOUR_MS, 12, count=SAMPLES_NEEDED)
    work(baselines, HOUR + 3 * HOUR_MS, 14, count=1)
    assert baselines.kinds["film"].hours == [12]


def test_nightly_work_is_compared_with_previous_nights(baselines: DurationBaselines) -> None:
    for night in range(4):
        work(baselines, HOUR + night * DAY_MS, 10)
    work(baselines, HOUR + 4 * DAY_MS, 15)
    assert one(baselines, HOUR + 4 * DAY_MS) == KindDurations("film", SAMPLES_NEEDED, 15, 10, 15)


def test_a_few_slow_hours_do_not_change_the_usual_value_but_a_day_does() -> None:
    baselines, hour = DurationBaselines(), HOUR
    for _ in range(HOURS_KEPT + 9):
        work(baselines, hour, 10)
        hour += HOUR_MS
    for slow in range(HOURS_KEPT):
        work(baselines, hour, 15)
        assert one(baselines, hour).usual_ms == (10 if slow <= HOURS_KEPT // 2 - 1 else 15), slow
        hour += HOUR_MS
    assert len(baselines.kinds["film"].hours) == HOURS_KEPT


def test_slots_are_bounded_even_if_the_clock_steps_back(baselines: DurationBaselines) -> None:
    for minute in [*range(0, 600, 5), *range(300, 0, -5)]:
        baselines.add("film", HOUR + minute * MINUTE_MS, 10)
        slots = baselines.kinds["film"].slots
        assert len(slots) <= SLOTS
    assert one(baselines, HOUR).completed == 1, "what lies ahead of the clock is not of the last hour"


def test_kinds_are_bounded_and_active_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KINDS_KEPT == 100
    monkeypatch.setattr(stats, "KINDS_KEPT", 2)
    baselines = DurationBaselines()
    for slot, kind in enumerate(("film", "mail", "film", "once", "film", "once more")):
        baselines.add(kind, HOUR + slot * SLOT_MS // 2, 10)
    assert list(baselines.kinds) == ["film", "once more"]
    assert {found.kind: found.completed for found in baselines.view(HOUR + 5 * SLOT_MS // 2)} == {
        "film": 3,
        "once more": 1,
    }


@pytest.mark.parametrize(("silent_ms", "expected"), [(SLOT_MS - 1, "film"), (SLOT_MS, "mail")])
def test_a_kind_is_replaced_after_a_slot_without_completions(
    monkeypatch: pytest.MonkeyPatch, silent_ms: int, expected: str
) -> None:
    monkeypatch.setattr(stats, "KINDS_KEPT", 1)
    baselines = DurationBaselines()
    baselines.add("film", HOUR, 10)
    baselines.add("mail", HOUR + silent_ms, 10)
    assert list(baselines.kinds) == [expected]


def test_many_alternating_kinds_do_not_displace_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more active kinds than are kept, the first ones get a baseline."""
    monkeypatch.setattr(stats, "KINDS_KEPT", 4)
    baselines = DurationBaselines()
    hours = HOURS_NEEDED + 1
    for step in range(hours * 6 * SAMPLES_NEEDED):
        baselines.add(f"kind {step % 6}", HOUR + step * (HOUR_MS // (6 * SAMPLES_NEEDED)), 100)
    now = HOUR + hours * HOUR_MS - 1
    seen = baselines.view(now)
    assert sorted(found.kind for found in seen) == ["kind 0", "kind 1", "kind 2", "kind 3"]
    assert all(found.usual_ms is not None for found in seen)
    baselines.add("new", now + SLOT_MS + 1, 100)
    assert list(baselines.kinds)[-1] == "new"
    baselines.add("of before a step back of the clock", HOUR - DAY_MS, 100)
    assert len(baselines.kinds) == 4
    assert "of before a step back of the clock" in baselines.kinds


def test_baselines_are_stored_as_json(baselines: DurationBaselines) -> None:
    for hour in range(5):
        work(baselines, HOUR + hour * HOUR_MS, 100 + hour)
    assert msgspec.json.decode(msgspec.json.encode(baselines), type=DurationBaselines) == baselines
