"""Counts of jobs over time, for the charts."""

from __future__ import annotations

from typing import Any

from jobd.model.events import Event
from jobd.monitoring.timeseries import MAX_QUEUES, SLOT_MS, SLOTS, STEP_MS, STEPS, QueueRate, Timeseries


def change(kind: Any, at: int, queue: str = "q", before: str | None = "processing") -> Event:
    return Event(1, at, kind, 1, "a", queue, before, None, "client")


NOW = 1_700_000_000_000 // SLOT_MS * SLOT_MS


def test_counts_are_kept_for_an_hour_and_a_day() -> None:
    recorder = Timeseries(NOW - 86_400_000)
    recorder.record([change("completed", NOW - 30 * 60_000)])
    kinds = ("created", "imported", "completed", "failed", "retried", "stalled", "expired", "force_failed", "progress")
    recorder.record([change(kind, NOW - STEP_MS) for kind in kinds])
    recorder.record([change("force_failed", NOW - STEP_MS, before="queued")])  # not an attempt
    recorder.record([change("adopted", NOW)])
    chart = recorder.chart(NOW)
    assert chart.since == NOW - 86_400_000
    assert (chart.hour.created[-1], chart.hour.completed[-1], chart.hour.failed[-1]) == (2, 1, 4)
    assert (chart.day.created[-1], chart.day.completed[-4:], chart.day.failed[-1]) == (2, [0, 1, 0, 1], 4)
    assert sum(chart.hour.completed) == 2, "the current step is excluded"
    rates = recorder.rates(NOW)
    assert (rates.created, rates.completed, rates.failed) == ((2, 2, 2), (2, 3, 3), (4, 4, 4))
    recorder.record([change("created", NOW + step * STEP_MS) for step in range(1, 2 * STEPS)])
    assert len(recorder._hour.known) == STEPS + 1
    later = NOW + 2 * STEPS * STEP_MS
    assert recorder.rates(later).completed == (0, 0, 3)
    recorder.record([change("created", NOW + slot * SLOT_MS) for slot in range(1, 2 * SLOTS)])
    assert len(recorder._day.known) == SLOTS + 1


def test_counting_continues_after_the_clock_was_set_back() -> None:
    """Counts of two hours in the future are dropped."""
    ahead = NOW + 2 * 3_600_000
    recorder = Timeseries(NOW - 60_000)
    recorder.record([change("completed", ahead + step * STEP_MS) for step in range(STEPS + 1)])
    for later in (recorder, Timeseries.opened(recorder.saved(), NOW)):
        later.record([change("completed", NOW) for _ in range(100)])
        assert later.rates(NOW).completed == (100, 100, 100)
        assert later.chart(NOW + STEP_MS).hour.completed[-1] == 100
        found = later.queue("q", NOW)
        assert found is not None
        assert found.completed == 100
        assert sum(later.chart(ahead + SLOT_MS).hour.completed) == 0, "they do not reappear later"


def test_counts_are_restored_after_a_restart() -> None:
    recorder = Timeseries(NOW - 3_600_000)
    recorder.record([change("completed", NOW - STEP_MS)])
    restored = Timeseries.opened(recorder.saved(), NOW)
    assert restored.chart(NOW) == recorder.chart(NOW)
    assert (restored.since, restored.started) == (NOW - 3_600_000, NOW)
    restored.record([change("completed", NOW - STEP_MS)])
    assert restored.rates(NOW).completed == (2, 2, 2)
    assert restored.queue("q", NOW) == QueueRate(0, 1, 0, 1.0), "queues are counted since the start"
    ahead = Timeseries(NOW + 1).saved()
    odd = b'{"since":1,"hour":{"1":[1,2]},"day":{}}'
    for useless in (b"null", b"{", ahead, odd):
        fresh = Timeseries.opened(useless, NOW)
        assert (fresh.since, fresh.chart(NOW)) == (NOW, Timeseries(NOW).chart(NOW))


def test_the_last_hour_of_each_queue_is_counted() -> None:
    recorder = Timeseries(NOW - 30 * 60_000)
    assert recorder.queue("q", NOW) is None
    recorder.record([change("completed", NOW - minute * 60_000) for minute in reversed(range(30))])
    recorder.record([change("failed", NOW) for _ in range(10)])
    recorder.record([change("created", NOW, "other")])
    found, other = recorder.queue("q", NOW), recorder.queue("other", NOW)
    assert found is not None
    assert other is not None
    assert (found.created, found.completed, found.failed, found.per_minute) == (0, 30, 10, 1.0)
    assert (found.failed_share, other.failed_share) == (25.0, None)
    later = recorder.queue("q", NOW + 61 * 60_000)
    assert later is not None
    assert (later.completed, later.failed, later.per_minute) == (0, 0, 0.0)
    recorder.record([change("created", NOW, f"queue-{number}") for number in range(MAX_QUEUES)])
    assert recorder.queue("q", NOW) is None, "the least recent queue is forgotten"
