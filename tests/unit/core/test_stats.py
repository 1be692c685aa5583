"""Statistics of commits: which events count, for how long, and under which label."""

from __future__ import annotations

import msgspec
import pytest

from jobd.core import stats
from jobd.core.stats import OTHER_QUEUES, PROCESSING_BUCKETS_S, Counters, Histogram
from jobd.model import commands as cmd
from jobd.model.events import Event
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Job, Options
from tests.support.rule_harness import NOW, Decision, RuleHarness


class CountingHarness(RuleHarness):
    """A harness whose statistics see every committed change, like the actor's."""

    def decide(
        self, command: cmd.AnyCommand, *, admin: bool = False, by: str = "client", expected: str | None = None
    ) -> Decision:
        decision = super().decide(command, admin=admin, by=by, expected=expected)
        self.state.counters.note(decision.changes)
        return decision


@pytest.fixture
def rules() -> CountingHarness:
    return CountingHarness()


def work(rules: RuleHarness, job_id: str, ms: int) -> None:
    lock_id = rules.held(job_id)
    rules.advance(ms)
    rules.accept(cmd.Complete(id=job_id, lock_id=lock_id))


def test_completions_of_the_last_hour(rules: RuleHarness) -> None:
    counters = rules.state.counters
    work(rules, "a", 2_000)
    work(rules, "b", 4_000)
    assert counters.completed_last_hour(rules.now) == (2, 6_000)
    assert counters.processing["default"].total == 6
    rules.advance(59 * MINUTE_MS)
    work(rules, "c", 0)
    assert counters.completed_last_hour(rules.now) == (3, 6_000)
    assert counters.completed_last_hour(rules.now + MINUTE_MS)[0] == 1
    assert counters.completed_last_hour(rules.now + HOUR_MS) == (0, 0)


def test_late_results_are_counted_one_by_one(rules: RuleHarness) -> None:
    for job_id in ("a", "b"):
        lock_id = rules.held(job_id)
        rules.accept(cmd.ForceReset(id=job_id))
        rules.reject(cmd.Complete(id=job_id, lock_id=lock_id, file_path="/late"), "lock_lost")
        rules.accept(cmd.Adopt(id=job_id))
    assert (rules.state.counters.late_kept, rules.state.counters.late_adopted) == (2, 2)


def test_old_minutes_and_hours_are_dropped() -> None:
    counters = Counters()
    for minute in range(200):
        counters._completed("q", NOW + minute * MINUTE_MS, 1)
        assert len(counters.completions) <= 61
        assert counters.completed_last_hour(NOW + minute * MINUTE_MS) == (min(minute + 1, 60),) * 2
    for hour in range(100):
        counters._recovered(NOW + hour * HOUR_MS, requeued=hour < 70)
        assert len(counters.recoveries) <= 25
        assert counters.recovered_last_day(NOW + hour * HOUR_MS) == min(hour + 1, 24)
    assert (counters.stalls, counters.reset, counters.failed) == (100, 70, 30)


def test_entries_after_a_backward_step_of_the_clock_do_not_count() -> None:
    """A clock that was a year ahead must not mean a year of alerts."""
    counters, ahead = Counters(), NOW + 365 * DAY_MS
    for number in range(61):
        counters._completed("q", ahead + number * MINUTE_MS, 1)
        counters._recovered(ahead + number * HOUR_MS, requeued=True)
    assert (counters.completed_last_hour(NOW), counters.recovered_last_day(NOW)) == ((0, 0), 0)
    counters._completed("q", NOW, 1)
    counters._recovered(NOW, requeued=True)
    assert (counters.completed_last_hour(NOW), counters.recovered_last_day(NOW)) == ((1, 1), 1)
    assert (list(counters.completions), list(counters.recoveries)) == ([NOW // MINUTE_MS], [NOW // HOUR_MS])


def test_recoveries_of_the_last_day(rules: RuleHarness) -> None:
    lock_id = rules.held("a")
    rules.progress(lock_id, 10)
    rules.held("b")
    rules.held("c")
    rules.recover(HOUR_MS + 1)
    counters = rules.state.counters
    assert counters.recovered_lately(rules.now) == 3
    assert counters.recovered_last_day(rules.now) == 3
    assert counters.recovered_last_day(rules.now + DAY_MS) == 0
    assert (counters.stalls, counters.reset, counters.failed, counters.since_report.recovered) == (3, 2, 1, 3)


def test_the_counts_since_the_last_report(rules: RuleHarness) -> None:
    rules.held("a", stall_after_ms=HOUR_MS, progress_timeout_ms=0)
    rules.held("d", stall_after_ms=HOUR_MS, progress_timeout_ms=0)
    rules.recover(15 * MINUTE_MS)
    for name in ("b", "e"):
        rules.completed(name, expires_at=rules.now + 1)
    rules.completed("c")
    rules.advance(1)
    rules.accept(cmd.DeleteExpired(ids=["b", "e"]), by="cleanup")
    rules.accept(cmd.Delete(id="c"), by="admin")  # a deletion by an operator does not count for cleanup
    since = rules.state.counters.since_report
    assert (since.locks_cleared, since.deleted, since.recovered, since.fixed) == (2, 2, 0, 0)


def test_other_endings_are_not_counted(rules: RuleHarness) -> None:
    rules.accept(cmd.Fail(id="a", lock_id=rules.held("a"), error_message="e"))
    rules.create("b")
    rules.accept(cmd.Cancel(id="b"))
    counters = rules.state.counters
    assert counters.completed_last_hour(rules.now) == (0, 0)
    assert counters.grants == {"default": 1}
    assert counters.processing == {}


def test_a_completion_without_or_before_a_start_has_no_negative_time() -> None:
    counters = Counters()
    job = Job(1, "a", Options(), "processing", NOW, NOW, NOW)
    done = Event(1, NOW, "completed", 1, "a", "q", "processing", "completed", "worker:w")
    counters.note([msgspec.structs.replace(done, before=job)])
    assert counters.completed_last_hour(NOW) == (0, 0)
    started = msgspec.structs.replace(job, started_at=NOW + 5_000)  # the wall clock stepped
    counters.note([msgspec.structs.replace(done, before=started)])
    assert counters.completed_last_hour(NOW) == (1, 0)
    assert counters.processing["q"].total == 0


def test_the_bounds_of_histograms_do_not_change() -> None:
    assert PROCESSING_BUCKETS_S == (0.1, 0.5, 1, 5, 15, 60, 300, 900, 1_800, 3_600, 14_400)


def test_a_histogram_bucket_includes_its_bound() -> None:
    histogram = Histogram.empty(PROCESSING_BUCKETS_S)
    for value in (0.1, 0.11, 14_400, 14_401):
        histogram.add(value, PROCESSING_BUCKETS_S)
    assert histogram.counts[:2] == [1, 1]
    assert histogram.counts[-2:] == [1, 1]
    assert histogram.total == pytest.approx(28_801.21)


def test_the_number_of_labels_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "HISTOGRAM_QUEUES", 2)
    counters = Counters()
    for queue in ("a", "b", "c", "d", "a"):
        counters.note([Event(1, NOW, "granted", 1, "a", queue, "queued", "processing", "worker:w")])
        counters._completed(queue, NOW, 1_000)
    assert counters.grants == {"a": 2, "b": 1, "(other)": 2}  # a name that no queue can have
    assert {name: sum(found.counts) for name, found in counters.processing.items()} == {
        "a": 2,
        "b": 1,
        OTHER_QUEUES: 2,
    }


def test_completions_feed_the_baseline_and_stalls_the_double_grants(rules: CountingHarness) -> None:
    counters = rules.state.counters
    lock_id = rules.held("a", kind="thumbnail")
    rules.advance(2_000)
    rules.accept(cmd.Complete(id="a", lock_id=lock_id))
    rules.held("b", kind="film")
    rules.accept(cmd.EndGrants(ids=["b"], last=True))
    assert counters.double_grants.total == 0
    rules.start("b")
    assert counters.double_grants.total == 1
    assert [(found.kind, found.completed) for found in counters.baselines.view(rules.now)] == [("thumbnail", 1)]


def test_stored_statistics_are_read_again_even_if_older_ones_lack_fields(rules: CountingHarness) -> None:
    lock_id = rules.held("a", kind="thumbnail")
    rules.accept(cmd.Complete(id="a", lock_id=lock_id))
    rules.held("b")
    rules.accept(cmd.ForceReset(id="b"))
    rules.start("b")
    rules.held("c")
    rules.accept(cmd.Cancel(id="c"))
    body = msgspec.json.encode(rules.state.counters)
    assert msgspec.json.decode(body, type=Counters) == rules.state.counters
    older = msgspec.json.decode(body)
    assert older["overlaps"].keys() == {"taken", "minutes", "total", "last"}
    del older["paces"], older["overlaps"]
    assert msgspec.json.decode(msgspec.json.encode(older), type=Counters).stalls == 0


def test_every_event_is_counted_by_its_type(rules: RuleHarness) -> None:
    work(rules, "a", 1_000)
    work(rules, "b", 1_000)
    assert rules.state.counters.events == {"created": 2, "granted": 2, "completed": 2}


def test_recoveries_count_for_ten_minutes_and_are_bounded() -> None:
    counters = Counters()
    for number in range(200):
        counters._recovered(NOW + number * 10_000, requeued=True)
        assert len(counters.recovered) <= 60
        assert counters.recovered_lately(NOW + number * 10_000) == min(number + 1, 60)
    assert counters.recovered_lately(NOW + 199 * 10_000 + 10 * MINUTE_MS - 1) == 1
    assert counters.recovered_lately(NOW + 199 * 10_000 + 10 * MINUTE_MS) == 0
    assert counters.recovered_lately(NOW - HOUR_MS) == 0, "a clock that was set back"


def test_times_of_schedules_are_counted(rules: RuleHarness) -> None:
    counters = Counters()
    for type_, missed in (("created", 4), ("schedule_skipped", 2), ("schedule_missed", 3)):
        details = {"schedule": "s", "scheduled_at": NOW, "missed": missed}
        counters.note([Event(1, NOW, type_, 0, "", "q", None, None, "schedule:s", "busy", details)])  # type: ignore[arg-type]
    assert counters.scheduled == {"fired": 1, "skipped": 1, "missed": 9}
