"""Double grants: a job granted again during the life of the previous lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from jobd.core import stats
from jobd.core.stats import DoubleGrant, DoubleGrants, lock_end
from jobd.model import commands as cmd
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Grant, LockDeadlines
from tests.support.factories import deadlines_at
from tests.support.rule_harness import RuleHarness
from tests.unit.core.test_stats import CountingHarness

TTL: dict[str, Any] = {"lock_ttl_ms": MINUTE_MS, "stall_after_ms": 0}


@pytest.fixture
def rules() -> CountingHarness:
    return CountingHarness()


def held(rules: RuleHarness, job_id: str = "a", **fields: Any) -> str:
    """Create a job and start it for w-1 with a lock of a minute."""
    rules.create(job_id, max_stalls=1_000, **fields)
    return rules.start(job_id, **TTL)


def double_grants(rules: RuleHarness) -> DoubleGrants:
    return rules.state.counters.double_grants


def restored(job_id: str = "a") -> cmd.EndGrants:
    """Restore a backup: the worker does not know that its grant has ended."""
    return cmd.EndGrants(ids=[job_id], last=True)


# A time that passes, or a command with the lock of the job.
Step = int | Callable[[str], cmd.AnyCommand]


def restore(_: str) -> cmd.AnyCommand:
    return restored()


def recover(_: str) -> cmd.AnyCommand:
    return cmd.Recover(limit=9)


def reset(_: str) -> cmd.AnyCommand:
    return cmd.ForceReset(id="a")


def extend(lock: str) -> cmd.AnyCommand:
    return cmd.Extend(id="a", lock_id=lock)


def fail(lock: str) -> cmd.AnyCommand:
    return cmd.Fail(id="a", lock_id=lock, error_message="e", retry_after_ms=0)


# Options of the job, what happens between its two grants, and the number of double grants.
HISTORIES: dict[str, tuple[dict[str, Any], tuple[Step, ...], int]] = {
    "restored backup": ({}, (MINUTE_MS - 1, restore), 1),
    # A lock has expired exactly at its end.
    "restored backup, until the lock has ended": ({}, (1_000, restore, MINUTE_MS - 1_000), 0),
    "force-reset": ({}, (reset,), 0),
    "transition": ({}, (lambda _: cmd.Transition(id="a", from_="processing", to="queued"),), 0),
    "cancel and reset": ({}, (lambda _: cmd.Cancel(id="a"), reset), 0),
    "force-fail and reset": ({}, (lambda _: cmd.ForceFail(id="a"), reset), 0),
    "release-lock": ({}, (lambda lock: cmd.ReleaseLock(id="a", lock_id=lock),), 0),
    "release": ({}, (lambda lock: cmd.Release(id="a", lock_id=lock),), 0),
    "fail and retry": ({"max_attempts": 2}, (fail,), 0),
    "fail and reset": ({}, (fail, reset), 0),
    "undelivered": ({}, (lambda lock: cmd.Undelivered(id="a", lock_id=lock),), 0),
    "stall": ({}, (MINUTE_MS, recover), 0),
    # At its progress timeout a grant can end although its worker reported within the time of its lock.
    "take back": (
        {"progress_timeout_ms": 90_000}, (50_000, extend, 40_000, lambda _: cmd.TakeBack(name="w-1")), 0
    ),
    # The worker extended its lock until then, so it is probably still working.
    "stall at the progress timeout": (
        {"progress_timeout_ms": 90_000}, (50_000, extend, 40_000, recover, 19_999), 1
    ),
    # The lock is cut to the progress timeout.
    "silent at the progress timeout": ({"progress_timeout_ms": 30_000}, (MINUTE_MS, recover), 0),
    "extended": ({}, (50_000, extend, restore, 59_999), 1),
    # A short extension counts as requested.
    "extended by less": (
        {}, (50_000, lambda lock: cmd.Extend(id="a", lock_id=lock, additional_ms=20_000), restore, 20_000), 0
    ),
    "postponed": ({}, (lambda _: cmd.ExtendAfterPause(ids=["a"], grace_ms=HOUR_MS), restore, HOUR_MS - 1), 1),
}  # fmt: skip


@pytest.mark.parametrize(("options", "steps", "total"), HISTORIES.values(), ids=HISTORIES)
def test_a_grant_is_double_if_the_previous_worker_may_still_work(
    rules: CountingHarness, options: dict[str, Any], steps: tuple[Step, ...], total: int
) -> None:
    lock = held(rules, **options)
    for step in steps:
        if isinstance(step, int):
            rules.advance(step)
        else:
            rules.accept(step(lock), admin=True)
    assert double_grants(rules).total == 0
    rules.start(worker="w-2")
    assert (double_grants(rules).total, double_grants(rules).last_hour(rules.now)) == (total, total)
    expected = DoubleGrant("a", (rules.tokens[0], rules.tokens[1]), ("w-1", "w-2")) if total else None
    assert (double_grants(rules).last, double_grants(rules).ended_grants) == (expected, {})


CALLS: dict[str, Callable[[str], cmd.AnyCommand]] = {
    "extend": lambda lock: cmd.Extend(id="a", lock_id=lock),
    "progress": lambda lock: cmd.Progress(id="a", lock_id=lock, progress=5),
    "complete": lambda lock: cmd.Complete(id="a", lock_id=lock, file_path="/late"),
    "fail": lambda lock: cmd.Fail(id="a", lock_id=lock, error_message="e"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_worker_that_received_lock_lost_does_not_count(
    rules: CountingHarness, call: Callable[[str], cmd.AnyCommand]
) -> None:
    lock = held(rules)
    rules.accept(restored())
    rules.reject(call(lock), "lock_lost")
    rules.start(worker="w-2")
    assert (double_grants(rules).total, double_grants(rules).ended_grants) == (0, {})


def test_lock_lost_for_an_older_grant_does_not_affect_the_latest(rules: CountingHarness) -> None:
    lock = held(rules)
    rules.accept(restored())
    ended = double_grants(rules).ended_grants[rules.job().seq]
    event = rules.decide(cmd.Extend(id="a", lock_id=lock)).changes[0]
    assert event.type == "late_call"
    double_grants(rules).ended_grants[rules.job().seq] = ended
    double_grants(rules).rejected(replace(event, details={"fencing_token": ended.fencing_token - 1}))
    double_grants(rules).rejected(replace(event, details=None))
    assert list(double_grants(rules).ended_grants) == [rules.job().seq]


def test_an_imported_job_has_no_known_worker(rules: CountingHarness) -> None:
    rules.accept(cmd.Import(id="a", status="processing", max_attempts=2), admin=True)
    rules.start(worker="w-2")
    assert double_grants(rules).total == 0


def test_only_the_last_grant_of_a_job_is_watched(rules: CountingHarness) -> None:
    held(rules)
    rules.accept(restored("a"))
    lock = rules.start(worker="w-2", **TTL)
    rules.accept(restored("a"))
    rules.start(worker="w-3", **TTL)
    assert double_grants(rules).total == 2
    assert double_grants(rules).last == DoubleGrant("a", (rules.tokens[1], rules.tokens[2]), ("w-2", "w-3"))
    assert lock
    rules.accept(cmd.Complete(id="a", lock_id=rules.grant().lock_id))
    assert double_grants(rules).ended_grants == {}


def test_a_cancelled_queued_job_had_no_worker(rules: CountingHarness) -> None:
    rules.create()
    rules.accept(cmd.Cancel(id="a"))
    assert double_grants(rules).ended_grants == {}


def test_a_double_grant_is_counted_for_an_hour(rules: CountingHarness) -> None:
    held(rules)
    rules.accept(restored("a"))
    rules.start()
    assert double_grants(rules).last_hour(rules.now + 59 * MINUTE_MS) == 1
    assert double_grants(rules).last_hour(rules.now + HOUR_MS) == 0
    assert double_grants(rules).total == 1


def granted_twice(rules: CountingHarness, job_id: str = "a") -> None:
    """Grant the job, end the grant, and grant it again at once. In the end it has no holder."""
    for _ in range(2):
        rules.start(job_id, **TTL)
        rules.accept(restored(job_id))


def test_a_later_double_grant_does_not_shorten_the_hour(rules: CountingHarness) -> None:
    for job_id in "abc":
        rules.create(job_id)
    granted_twice(rules, "a")
    rules.advance(59 * MINUTE_MS)
    for job_id in "bc":
        granted_twice(rules, job_id)
    assert double_grants(rules).last_hour(rules.now) == 3
    rules.advance(MINUTE_MS)
    assert double_grants(rules).last_hour(rules.now) == 2


def test_after_a_backward_step_of_the_clock_later_entries_do_not_count(rules: CountingHarness) -> None:
    """Otherwise a clock that was a year ahead would mean a year of alerts."""
    rules.create()
    granted_twice(rules)
    rules.now -= 365 * DAY_MS
    assert double_grants(rules).last_hour(rules.now) == 0
    rules.create("b")
    granted_twice(rules, "b")
    assert (double_grants(rules).last_hour(rules.now), double_grants(rules).total) == (1, 2)


def test_memory_is_bounded(rules: CountingHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "ENDED_GRANTS_KEPT", 2)
    for job_id in "abc":
        held(rules, job_id)
        rules.accept(restored(job_id))
    assert list(double_grants(rules).ended_grants) == [rules.job("b").seq, rules.job("c").seq]
    for _ in range(100):
        rules.advance(MINUTE_MS)
        granted_twice(rules, "c")
        assert len(double_grants(rules).minutes) <= 60
    assert (double_grants(rules).total, double_grants(rules).last_hour(rules.now)) == (100, 60)


@pytest.mark.parametrize("half", [{"grant": None}, {"deadlines": None}], ids=str)
def test_a_row_without_a_grant_is_ignored(rules: CountingHarness, half: dict[str, None]) -> None:
    """Manually edited rows can have a grant without lock deadlines, or the reverse."""
    held(rules)
    rules.row(replace(rules.job(), **half))
    rules.accept(restored("a"))
    assert double_grants(rules).ended_grants == {}


def test_a_grant_of_an_unwatched_job_is_not_counted(rules: CountingHarness) -> None:
    """The previous grant may have been forgotten."""
    held(rules, "a")
    held(rules, "b")
    rules.accept(restored("a"))
    rules.accept(restored("b"))
    del double_grants(rules).ended_grants[rules.job("a").seq]
    rules.start("a")
    assert (double_grants(rules).total, list(double_grants(rules).ended_grants)) == (0, [rules.job("b").seq])


MADE = Grant("l", 1, "w", acquired_at=0, ttl_ms=60, stall_after_ms=10, progress_timeout_ms=0)


@pytest.mark.parametrize(
    ("deadlines", "until"),
    [
        (deadlines_at(100, 50), 100),
        (deadlines_at(100, 50, 101), 100),
        (
            deadlines_at(100, 51, 101),
            100,
        ),  # below its progress timeout a lock ends when its worker expects it to
        (
            deadlines_at(100, 50, 100),
            100,
        ),  # last report at 40, so its minute ends at 100
        (deadlines_at(100, 51, 100), 101),
        (
            deadlines_at(100, 20, 90),
            100,
        ),  # a progress timeout never shortens a lock that was granted
    ],
)
def test_the_end_of_a_lock_without_its_progress_timeout(deadlines: LockDeadlines, until: int) -> None:
    assert lock_end(MADE, deadlines) == until
