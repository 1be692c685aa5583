"""Overlaps: a job granted again while the worker before had time left and had not said that it stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from jobd.core import double_grants
from jobd.core.double_grants import Overlap, Overlaps, lock_end
from jobd.model.commands import (
    AnyCommand,
    Cancel,
    Complete,
    EndGrants,
    Extend,
    ExtendAfterPause,
    Fail,
    ForceFail,
    ForceReset,
    Import,
    Progress,
    Recover,
    Release,
    ReleaseLock,
    TakeBack,
    Transition,
    Undelivered,
)
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Grant, Lease
from tests.support.rule_harness import RuleHarness
from tests.unit.core.test_stats import CountingDesk

TTL: dict[str, Any] = {"lock_ttl_ms": MINUTE_MS, "stuck_after_ms": 0}


@pytest.fixture
def desk() -> CountingDesk:
    return CountingDesk()


def held(desk: RuleHarness, job_id: str = "a", **fields: Any) -> str:
    """A new job in the hands of w-1 with a lock of a minute."""
    desk.create(job_id, max_stalls=1_000, **fields)
    return desk.start(job_id, **TTL)


def overlaps(desk: RuleHarness) -> Overlaps:
    return desk.book.figures.overlaps


Deed = Callable[[str], list[AnyCommand]]


def restored(job_id: str = "a") -> EndGrants:
    """A backup was put back: the worker does not know that its grant has ended."""
    return EndGrants(ids=[job_id], last=True)


TAKEN_AWAY: dict[str, Deed] = {"restored backup": lambda lock: [restored()]}

ENDED_BY_AN_OPERATOR: dict[str, Deed] = {
    "force-reset": lambda lock: [ForceReset(id="a")],
    "transition": lambda lock: [Transition(id="a", from_="processing", to="queued")],
    "cancel and reset": lambda lock: [Cancel(id="a"), ForceReset(id="a")],
    "force-fail and reset": lambda lock: [ForceFail(id="a"), ForceReset(id="a")],
    "release-lock": lambda lock: [ReleaseLock(id="a", lock_id=lock)],
}


@pytest.mark.parametrize("deed", TAKEN_AWAY.values(), ids=TAKEN_AWAY)
def test_granted_again_while_the_time_of_the_worker_before_ran_on(desk: CountingDesk, deed: Deed) -> None:
    lock = held(desk)
    desk.advance(MINUTE_MS - 1)
    for command in deed(lock):
        desk.accept(command, admin=True)
    assert overlaps(desk).total == 0
    desk.start(worker="w-2")
    assert (overlaps(desk).total, overlaps(desk).last_hour(desk.now)) == (1, 1)
    assert overlaps(desk).last == Overlap("a", (desk.tokens[0], desk.tokens[1]), ("w-1", "w-2"))
    assert overlaps(desk).taken == {}


@pytest.mark.parametrize("deed", ENDED_BY_AN_OPERATOR.values(), ids=ENDED_BY_AN_OPERATOR)
def test_a_grant_that_an_operator_ended_is_no_overlap(desk: CountingDesk, deed: Deed) -> None:
    lock = held(desk)
    for command in deed(lock):
        desk.accept(command, admin=True)
    desk.start(worker="w-2")
    assert (overlaps(desk).total, overlaps(desk).taken) == (0, {})


def test_jobs_that_an_operator_takes_back_are_no_overlap(desk: CountingDesk) -> None:
    """At its ceiling a grant ends before its worker has been silent for the time of its lock."""
    lock = held(desk, max_processing_ms=90_000)
    desk.advance(50_000)
    desk.accept(Extend(id="a", lock_id=lock))
    desk.advance(40_000)
    desk.accept(TakeBack(name="w-1"), admin=True)
    desk.start(worker="w-2")
    assert (overlaps(desk).total, overlaps(desk).taken) == (0, {})


CALLS: dict[str, Callable[[str], AnyCommand]] = {
    "extend": lambda lock: Extend(id="a", lock_id=lock),
    "progress": lambda lock: Progress(id="a", lock_id=lock, progress=5),
    "complete": lambda lock: Complete(id="a", lock_id=lock, file_path="/late"),
    "fail": lambda lock: Fail(id="a", lock_id=lock, error_message="e"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_worker_that_received_lock_lost_is_no_second_one(
    desk: CountingDesk, call: Callable[[str], AnyCommand]
) -> None:
    lock = held(desk)
    desk.accept(restored())
    desk.reject(call(lock), "lock_lost")
    desk.start(worker="w-2")
    assert (overlaps(desk).total, overlaps(desk).taken) == (0, {})


def test_lock_lost_for_an_older_grant_says_nothing_of_the_latest(desk: CountingDesk) -> None:
    lock = held(desk)
    desk.accept(restored())
    taken = overlaps(desk).taken[desk.job().seq]
    told = desk.decide(Extend(id="a", lock_id=lock)).changes[0].event
    assert told.type == "late_call"
    overlaps(desk).taken[desk.job().seq] = taken
    overlaps(desk).refused(replace(told, details={"fencing_token": taken.fencing_token - 1}))
    overlaps(desk).refused(replace(told, details=None))
    assert list(overlaps(desk).taken) == [desk.job().seq]


@pytest.mark.parametrize("deed", TAKEN_AWAY.values(), ids=TAKEN_AWAY)
def test_once_its_time_has_run_out_nothing_overlaps(desk: CountingDesk, deed: Deed) -> None:
    lock = held(desk)
    desk.advance(1_000)
    for command in deed(lock):
        desk.accept(command, admin=True)
    desk.advance(MINUTE_MS - 1_000)  # exactly at its end a lock has expired
    desk.start(worker="w-2")
    assert (overlaps(desk).total, overlaps(desk).last, overlaps(desk).taken) == (0, None, {})


ENDED_BY_THE_HOLDER: dict[str, Deed] = {
    "release": lambda lock: [Release(id="a", lock_id=lock)],
    "fail and retry": lambda lock: [Fail(id="a", lock_id=lock, error_message="e", retry_after_ms=0)],
    "fail and reset": lambda lock: [Fail(id="a", lock_id=lock, error_message="e", retry=False), ForceReset(id="a")],
    "undelivered": lambda lock: [Undelivered(id="a", lock_id=lock)],
}


@pytest.mark.parametrize("deed", ENDED_BY_THE_HOLDER.values(), ids=ENDED_BY_THE_HOLDER)
def test_a_worker_that_stopped_or_never_began_is_no_second_one(desk: CountingDesk, deed: Deed) -> None:
    lock = held(desk, max_attempts=2)
    for command in deed(lock):
        desk.accept(command)
    assert overlaps(desk).taken == {}
    desk.start(worker="w-2")
    assert overlaps(desk).total == 0


def test_a_stall_is_silence_for_longer_than_the_lock(desk: CountingDesk) -> None:
    held(desk)
    desk.advance(MINUTE_MS)
    desk.accept(Recover(limit=9))
    assert desk.job().status == "queued"
    desk.start(worker="w-2")
    assert overlaps(desk).total == 0


def test_a_stall_at_the_ceiling_is_not(desk: CountingDesk) -> None:
    """The worker extended its lock until then: most likely it is at work."""
    lock = held(desk, max_processing_ms=90_000)
    desk.advance(50_000)
    desk.accept(Extend(id="a", lock_id=lock))
    desk.advance(40_000)
    desk.accept(Recover(limit=9))
    assert desk.job().status == "queued"
    desk.advance(19_999)
    desk.start(worker="w-2")
    assert overlaps(desk).total == 1


def test_silence_before_the_ceiling_is_a_stall_like_any_other(desk: CountingDesk) -> None:
    held(desk, max_processing_ms=30_000)  # the lock is cut to it
    desk.advance(MINUTE_MS)
    desk.accept(Recover(limit=9))
    desk.start(worker="w-2")
    assert overlaps(desk).total == 0


def test_an_extended_lock_counts_from_there(desk: CountingDesk) -> None:
    lock = held(desk)
    desk.advance(50_000)
    desk.accept(Extend(id="a", lock_id=lock))
    desk.accept(restored("a"))
    desk.advance(59_999)
    desk.start(worker="w-2")
    assert overlaps(desk).total == 1


def test_a_short_extension_counts_as_it_was_asked_for(desk: CountingDesk) -> None:
    lock = held(desk)
    desk.advance(50_000)
    desk.accept(Extend(id="a", lock_id=lock, additional_ms=20_000))
    desk.accept(restored("a"))
    desk.advance(20_000)
    desk.start(worker="w-2")
    assert overlaps(desk).total == 0


def test_time_that_was_credited_counts(desk: CountingDesk) -> None:
    held(desk)
    desk.accept(ExtendAfterPause(ids=["a"], grace_ms=HOUR_MS))
    desk.accept(restored("a"))
    desk.advance(HOUR_MS - 1)
    desk.start(worker="w-2")
    assert overlaps(desk).total == 1


def test_an_imported_job_has_no_holder_here(desk: CountingDesk) -> None:
    desk.accept(Import(id="a", status="processing", max_attempts=2), admin=True)
    desk.start(worker="w-2")
    assert overlaps(desk).total == 0


def test_the_last_grant_is_the_one_that_is_watched(desk: CountingDesk) -> None:
    held(desk)
    desk.accept(restored("a"))
    lock = desk.start(worker="w-2", **TTL)
    desk.accept(restored("a"))
    desk.start(worker="w-3", **TTL)
    assert overlaps(desk).total == 2
    assert overlaps(desk).last == Overlap("a", (desk.tokens[1], desk.tokens[2]), ("w-2", "w-3"))
    assert lock
    desk.accept(Complete(id="a", lock_id=desk.job().grant.lock_id))  # type: ignore[union-attr]
    assert overlaps(desk).taken == {}


def test_a_queued_job_that_is_cancelled_had_no_holder(desk: CountingDesk) -> None:
    desk.create()
    desk.accept(Cancel(id="a"))
    assert overlaps(desk).taken == {}


def test_the_hour_passes(desk: CountingDesk) -> None:
    held(desk)
    desk.accept(restored("a"))
    desk.start()
    assert overlaps(desk).last_hour(desk.now + 59 * MINUTE_MS) == 1
    assert overlaps(desk).last_hour(desk.now + HOUR_MS) == 0
    assert overlaps(desk).total == 1


def granted_twice(desk: CountingDesk, job_id: str = "a") -> None:
    """The job is given to a worker, taken from it, and given to the next at once. Nobody has it in the end."""
    for _ in range(2):
        desk.start(job_id, **TTL)
        desk.accept(restored(job_id))


def test_a_later_one_does_not_make_the_hour_shorter(desk: CountingDesk) -> None:
    desk.create()
    granted_twice(desk)
    desk.advance(59 * MINUTE_MS)
    granted_twice(desk)
    assert overlaps(desk).last_hour(desk.now) == 2
    desk.advance(MINUTE_MS)
    assert overlaps(desk).last_hour(desk.now) == 1


def test_after_a_step_back_of_the_wall_clock_nothing_counts_that_is_still_to_come(desk: CountingDesk) -> None:
    """A year that a machine was ahead would otherwise be a year of an alert."""
    desk.create()
    granted_twice(desk)
    desk.now -= 365 * DAY_MS
    assert overlaps(desk).last_hour(desk.now) == 0
    desk.create("b")
    granted_twice(desk, "b")
    assert (overlaps(desk).last_hour(desk.now), overlaps(desk).total) == (1, 2)


def test_memory_is_bounded(desk: CountingDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double_grants, "TAKEN_KEPT", 2)
    for job_id in "abc":
        held(desk, job_id)
        desk.accept(restored(job_id))
    assert list(overlaps(desk).taken) == [desk.job("b").seq, desk.job("c").seq]
    for _ in range(100):
        desk.advance(MINUTE_MS)
        granted_twice(desk, "c")
        assert len(overlaps(desk).minutes) <= 60
    assert (overlaps(desk).total, overlaps(desk).last_hour(desk.now)) == (100, 60)


@pytest.mark.parametrize("half", [{"grant": None}, {"lease": None}], ids=str)
def test_a_row_without_a_holder_is_passed_over(desk: CountingDesk, half: dict[str, None]) -> None:
    """Rows that hands have left behind have a grant without a lease, or the other way round."""
    held(desk)
    desk.row(replace(desk.job(), **half))
    desk.accept(restored("a"))
    assert overlaps(desk).taken == {}


def test_a_job_that_was_given_out_unwatched_is_not_counted(desk: CountingDesk) -> None:
    """The grant before may be one that was forgotten."""
    held(desk, "a")
    held(desk, "b")
    desk.accept(restored("a"))
    desk.accept(restored("b"))
    del overlaps(desk).taken[desk.job("a").seq]
    desk.start("a")
    assert (overlaps(desk).total, list(overlaps(desk).taken)) == (0, [desk.job("b").seq])


MADE = Grant("l", 1, "w", acquired_at=0, ttl_ms=60, stuck_after_ms=10, max_processing_ms=0)


@pytest.mark.parametrize(
    ("lease", "until"),
    [
        (Lease(expires=100, silent=50, ceiling=None), 100),
        (Lease(expires=100, silent=50, ceiling=101), 100),
        (Lease(expires=100, silent=51, ceiling=101), 100),  # below its ceiling a lock ends where its worker was told
        (Lease(expires=100, silent=50, ceiling=100), 100),  # the last word at 40: its minute ends at 100
        (Lease(expires=100, silent=51, ceiling=100), 101),
        (Lease(expires=100, silent=20, ceiling=90), 100),  # a ceiling never shortens what was promised
    ],
)
def test_the_end_of_what_a_worker_was_promised(lease: Lease, until: int) -> None:
    assert lock_end(MADE, lease) == until
