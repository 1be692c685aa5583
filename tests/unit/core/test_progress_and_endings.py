"""The rules for the holder of a job: progress, extend, complete, fail, release, cancel."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import pytest
from msgspec import UNSET, Raw
from msgspec.structs import asdict, replace

from jobd.core import guards, transitions
from jobd.core.state import State
from jobd.model import commands as cmd
from jobd.model.job import (
    DAY_MS,
    HOUR_MS,
    LOOP_FROM,
    MINUTE_MS,
    BackoffOptions,
    Failure,
    LockDeadlines,
    Policy,
    PreviousGrant,
    release_delay_ms,
    storage_key_error,
)
from jobd.model.responses import JobView
from jobd.model.storage import OpenedStore
from tests.support.rule_harness import NOW, RuleHarness

TTL = 15 * MINUTE_MS
STALL_AFTER = 10 * MINUTE_MS
PROGRESS_TIMEOUT = 30 * MINUTE_MS


def no_progress_timeout(**fields: Any) -> dict[str, Any]:
    return {"progress_timeout_ms": 0} | fields


# -- progress and extend ----------------------------------------------------------------------------------------------


def test_progress_renews_lock_silence_and_progress_timeout(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.advance(MINUTE_MS)
    state = rules.accept(cmd.Progress(id="a", lock_id=lock_id, progress=12.5, message="half"))
    assert (state.lock_expires_at, state.ttl_ms, state.progress_due_at) == (
        rules.now + TTL,
        TTL,
        rules.now + PROGRESS_TIMEOUT,
    )
    assert state.cancel_requested is False
    assert state.extended is msgspec.UNSET
    job = rules.job()
    assert (job.progress, job.progress_message, job.updated_at) == (12.5, "half", rules.now)
    assert job.deadlines == LockDeadlines(
        rules.lock_ms + TTL, rules.lock_ms + STALL_AFTER, rules.lock_ms + PROGRESS_TIMEOUT
    )
    assert rules.last().details == {"progress": 12.5, "message": "half"}
    rules.progress(lock_id, 42.0)
    assert repr(rules.job().progress) == "42"
    assert rules.job().progress_message is None


def test_progress_gives_a_progress_timeout_to_a_row_that_lacks_it(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.row(replace(rules.job(), deadlines=LockDeadlines(rules.lock_ms + 5, rules.lock_ms + 5, None)))
    assert rules.progress(lock_id).progress_due_at == NOW + PROGRESS_TIMEOUT


def test_progress_never_shortens_a_lock(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=20 * MINUTE_MS))
    assert rules.progress(lock_id).lock_expires_at == NOW + 20 * MINUTE_MS


def test_extend_means_at_least_this_long_from_now(rules: RuleHarness) -> None:
    lock_id = rules.held()
    assert rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=1)).extended is False
    assert rules.job().updated_at == rules.now
    state = rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=TTL + 1))
    assert (state.extended, state.lock_expires_at) == (True, NOW + TTL + 1)
    rules.advance(2)
    assert rules.accept(cmd.Extend(id="a", lock_id=lock_id)).lock_expires_at == rules.now + TTL
    assert rules.job().deadlines == LockDeadlines(
        rules.lock_ms + TTL, rules.lock_ms + STALL_AFTER, rules.lock_ms - 2 + PROGRESS_TIMEOUT
    )


def test_an_extension_is_cut_to_the_progress_timeout_which_only_progress_moves(rules: RuleHarness) -> None:
    lock_id = rules.held()
    state = rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=DAY_MS))
    assert state.lock_expires_at == state.progress_due_at == NOW + PROGRESS_TIMEOUT
    assert rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=DAY_MS)).extended is False
    rules.advance(PROGRESS_TIMEOUT - 1)
    rules.progress(lock_id)
    state = rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=DAY_MS))
    assert state.lock_expires_at == state.progress_due_at == rules.now + PROGRESS_TIMEOUT


def test_at_the_progress_timeout_only_endings_are_accepted(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=DAY_MS))
    rules.advance(PROGRESS_TIMEOUT)
    assert "a" in rules.state.processing.stalled
    for command in (cmd.Extend(id="a", lock_id=lock_id), cmd.Progress(id="a", lock_id=lock_id, progress=1)):
        rejection = rules.reject(command, "progress_timeout")
        assert rejection.details == {"progress_timeout_ms": PROGRESS_TIMEOUT, "progress_due_at": rules.now}
        assert rejection.message == (
            "Job a had no progress report for 30 min (progress_timeout_ms 1800000). Complete, fail or release it now. "
            "Next time report progress in time, or raise progress_timeout_ms of the job, of the start or claim, or "
            "progress_timeout under [locks]; 0 means no timeout."
        )
    rules.accept(cmd.Complete(id="a", lock_id=lock_id))


def test_an_expired_lock_still_belongs_to_its_holder(rules: RuleHarness) -> None:
    lock_id = rules.held(stall_after_ms=HOUR_MS, **no_progress_timeout())
    rules.advance(TTL)
    assert not rules.deadlines().is_live(rules.lock_ms)
    rules.accept(cmd.Recover(limit=9))
    assert rules.types()[-1] == "lock_expired"
    assert rules.accept(cmd.Get(id="a")).lock is None
    rules.accept(cmd.Extend(id="a", lock_id=lock_id))
    assert rules.accept(cmd.Get(id="a")).lock.expires_at == rules.now + TTL
    rules.recover(TTL)
    rules.progress(lock_id)
    assert rules.state.processing.live_locks() == 1


# -- endings ----------------------------------------------------------------------------------------------------------


def test_complete(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.advance(7)
    metadata = Raw(b'{"frames":3}')
    done = cmd.Complete(
        id="a", lock_id=lock_id, download_url="https://x/y", file_path="/f", storage_key="k/1", metadata=metadata
    )
    grant = rules.job().grant
    answer = rules.respond(done)
    view = answer.data
    assert (answer.status, answer.unread_payloads, answer.grants) == (200, [(1, view)], [])
    assert (view.status, view.progress, view.download_url, view.file_path) == ("completed", 100, "https://x/y", "/f")
    assert (view.storage_key, view.metadata, view.lock, view.error_message) == ("k/1", metadata, None, None)
    assert (view.finished_at, view.expires_at) == (rules.now, rules.now + 7 * DAY_MS)
    assert rules.last().by == "worker:w-1"
    assert grant is not None
    assert rules.job().ended == PreviousGrant(
        lock_id, grant.fencing_token, "w-1", rules.now, "complete", "complete", "complete", guards.digest(done)
    )


def test_retention_begins_at_the_finish_time_if_the_clock_stepped_back(rules: RuleHarness) -> None:
    lock_id = rules.held()
    created_at, rules.now = rules.now, rules.now - 30 * DAY_MS
    view = rules.accept(cmd.Complete(id="a", lock_id=lock_id))
    assert (view.finished_at, view.expires_at) == (created_at, created_at + 7 * DAY_MS)


def test_complete_clears_the_error_and_treats_null_as_absent(rules: RuleHarness) -> None:
    lock_id = rules.held(max_attempts=2)
    rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="once", retry_after_ms=0))
    assert rules.job().error == Failure("once")
    rules.accept(cmd.Complete(id="a", lock_id=rules.start(), metadata=Raw(b"null")))
    assert rules.job().error is None
    assert rules.job().result is None


def test_complete_can_set_the_deletion_time(rules: RuleHarness) -> None:
    lock_id = rules.held()
    bad = cmd.Complete(id="a", lock_id=lock_id, expires_at=NOW)
    assert rules.reject(bad, "invalid_request").details == {"field": "$.expires_at"}
    assert rules.accept(cmd.Complete(id="a", lock_id=lock_id, expires_at=NOW + 1)).expires_at == NOW + 1


@pytest.mark.parametrize("key", ["/etc/x", "\\x", "a/../b", "..", "a\\..\\b", "a\x00b"])
def test_a_storage_key_is_relative(rules: RuleHarness, key: str) -> None:
    lock_id = rules.held()
    rejection = rules.reject(cmd.Complete(id="a", lock_id=lock_id, storage_key=key), "invalid_request")
    assert rejection.details == {"field": "$.storage_key"}
    assert rejection.message == f"storage_key {storage_key_error(key)}."


def test_a_download_url_can_be_required() -> None:
    rules = RuleHarness(Policy(require_download_url=True))
    lock_id = rules.held()
    rejection = rules.reject(cmd.Complete(id="a", lock_id=lock_id, file_path="/f"), "invalid_request")
    assert (rejection.status, rejection.details) == (400, {"field": "$.download_url"})
    assert rejection.message == "download_url is missing; [validation] require_download_url requires it."
    rules.accept(cmd.Complete(id="a", lock_id=lock_id, download_url="u"))


def test_fail_without_attempts_left(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.progress(lock_id, 30)
    view = rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="boom", error_code="E"))
    assert (view.status, view.error_message, view.error_code, view.progress) == ("failed", "boom", "E", 30)
    assert (view.attempt, view.expires_at) == (1, NOW + 30 * DAY_MS)


def test_fail_with_attempts_left_requeues_the_job_with_a_delay(rules: RuleHarness) -> None:
    lock_id = rules.held(max_attempts=3, backoff=BackoffOptions("exponential", 1_000, 1_500, False))
    rules.progress(lock_id, 30)
    view = rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="boom"))
    assert (view.status, view.run_at, view.attempt, view.progress) == ("queued", NOW + 1_000, 1, 0)
    assert (view.started_at, view.finished_at, view.error_message) == (None, None, "boom")
    rules.advance(1_000)
    lock_id = rules.start()
    assert rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="boom")).run_at == rules.now + 1_500
    rules.advance(1_500)
    lock_id = rules.start()
    assert rules.job().attempt == 3
    assert rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="boom")).status == "failed"


def test_the_worker_can_set_the_retry_delay_or_prevent_the_retry(rules: RuleHarness) -> None:
    lock_id = rules.held(max_attempts=3)
    assert rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="e", retry_after_ms=5)).run_at == NOW + 5
    rules.advance(5)
    assert rules.accept(cmd.Fail(id="a", lock_id=rules.start(), error_message="e", retry=False)).status == "failed"


@pytest.mark.parametrize(
    ("backoff", "attempt", "fraction", "expected"),
    [
        (BackoffOptions("fixed", 10, 100, False), 1, 0.5, 10),
        (BackoffOptions("fixed", 10, 100, False), 9, 0.5, 10),
        (BackoffOptions("fixed", 500, 100, False), 1, 0.5, 100),
        (BackoffOptions("exponential", 10, 1_000, False), 1, 0.5, 10),
        (BackoffOptions("exponential", 10, 1_000, False), 2, 0.5, 20),
        (BackoffOptions("exponential", 10, 1_000, False), 7, 0.5, 640),
        (BackoffOptions("exponential", 10, 1_000, False), 8, 0.5, 1_000),
        (BackoffOptions("exponential", 10, 1_000, False), 1_000, 0.5, 1_000),
        (BackoffOptions("exponential", 10, 1_000, False), 0, 0.5, 10),  # a row made by hand
        (BackoffOptions("exponential", 10, 1_000, True), 2, 0.0, 20),
        (BackoffOptions("exponential", 10, 1_000, True), 2, 0.5, 15),
        (BackoffOptions("exponential", 10, 1_000, True), 2, 0.999, 11),
        (BackoffOptions(), 1, 0.999, 5_005),
        (BackoffOptions(), 4, 0.0, 80_000),
        (BackoffOptions(), 20, 0.0, 3_600_000),
        (BackoffOptions("exponential", 0, 0, True), 2, 0.9, 0),
    ],
)
def test_backoff(backoff: BackoffOptions, attempt: int, fraction: float, expected: int) -> None:
    assert backoff.wait_ms(attempt, fraction) == expected


def test_jitter_comes_from_the_seed() -> None:
    """The same command on the same state at the same time has the same result."""
    waits = set()
    for _ in range(2):
        rules = RuleHarness()
        lock_id = rules.held(max_attempts=2, backoff=BackoffOptions("fixed", DAY_MS, DAY_MS, True))
        waits.add(rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="e")).run_at - NOW)
    assert len(waits) == 1
    assert DAY_MS // 2 < waits.pop() <= DAY_MS


def test_release_restores_place_and_attempt(rules: RuleHarness) -> None:
    rules.create("a")
    rules.create("b")
    rules.advance(5)
    lock_id = rules.start("a")
    rules.progress(lock_id, 50)
    view = rules.accept(cmd.Release(id="a", lock_id=lock_id))
    assert (view.status, view.run_at, view.attempt, view.progress) == ("queued", NOW, 0, 0)
    assert rules.claim() == ["a"]


def test_only_the_attempt_of_the_current_grant_is_refunded(rules: RuleHarness) -> None:
    lock_id = rules.held(max_attempts=3)
    rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="e", retry_after_ms=0))
    assert rules.accept(cmd.Release(id="a", lock_id=rules.start())).attempt == 1


def test_progress_is_cleared_with_its_grant(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.accept(cmd.Progress(id="a", lock_id=lock_id, progress=50, message="half"))
    view = rules.accept(cmd.Release(id="a", lock_id=lock_id))
    assert (view.progress, view.progress_message) == (0, None)
    rules.accept(cmd.Import(id="b", progress=50, progress_message="half"))
    rules.start("b")
    assert (rules.job("b").progress, rules.job("b").progress_message) == (0, None)


def test_the_last_ended_grant_is_kept_until_another_ends(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.accept(cmd.Release(id="a", lock_id=lock_id))
    rules.accept(cmd.Cancel(id="a"))
    assert rules.accept(cmd.Release(id="a", lock_id=lock_id)).repeated is True


def test_an_event_has_only_changed_fields(rules: RuleHarness) -> None:
    rules.create()
    rules.advance(1)
    rules.accept(cmd.Cancel(id="a"))
    changes = rules.last().changes
    assert changes is not None
    changed = {name for name, value in asdict(changes).items() if value is not UNSET}
    assert changed == {"status", "finished_at", "expires_at", "updated_at"}


@pytest.mark.parametrize("left", [{"deadlines": None}, {"grant": None}])
def test_an_incomplete_lock_is_removed_with_the_job(rules: RuleHarness, left: dict[str, Any]) -> None:
    rules.held()
    rules.row(replace(rules.job(), **left))
    rules.accept(cmd.Cancel(id="a"))
    assert (rules.job().grant, rules.job().deadlines) == (None, None)


def test_a_job_finishes_after_its_start_whatever_the_clock(rules: RuleHarness) -> None:
    rules.create()
    rules.advance(10)
    lock_id = rules.start()
    rules.now -= 5
    assert rules.accept(cmd.Complete(id="a", lock_id=lock_id)).finished_at == NOW + 10


@pytest.mark.parametrize("end", ["recovery", "undelivered"])
def test_ending_a_grant_without_its_holder_keeps_the_place(rules: RuleHarness, end: str) -> None:
    rules.create("a")
    rules.create("b")
    rules.advance(5)
    lock_id = rules.start("a")
    rules.advance(TTL)
    rules.accept(cmd.Recover(limit=1) if end == "recovery" else cmd.Undelivered(id="a", lock_id=lock_id))
    assert (rules.job("a").status, rules.job("a").run_at) == ("queued", NOW)
    assert rules.claim() == ["a"]


def test_release_can_have_a_delay(rules: RuleHarness) -> None:
    lock_id = rules.held()
    assert rules.accept(cmd.Release(id="a", lock_id=lock_id, delay_ms=9)).run_at == NOW + 9
    rules.advance(9)
    rules.advance(1)
    assert rules.accept(cmd.Release(id="a", lock_id=rules.start(), delay_ms=0)).run_at == NOW + 10


DELAYS: Final = [0, 0, 0, 0, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000]


def released(rules: RuleHarness, times: int, job_id: str = "a", **fields: Any) -> JobView:
    """Return the job after more rounds of start and release."""
    view: JobView
    for _ in range(times):
        rules.advance(max(rules.job(job_id).run_at - rules.now, 0))
        view = rules.accept(cmd.Release(id=job_id, lock_id=rules.start(job_id), **fields))
    return view


def test_from_the_fifth_release_in_a_row_the_delay_doubles(rules: RuleHarness) -> None:
    rules.create()
    rules.advance(10)
    for number, delay_ms in enumerate(DELAYS, 1):
        view = released(rules, 1)
        assert (view.status, view.attempt) == ("queued", 0)
        assert view.run_at == (rules.now + delay_ms if delay_ms else NOW), number
        assert rules.job().releases == number
    assert release_delay_ms(1_000_000) == MINUTE_MS


def test_the_event_of_a_delayed_release_has_count_and_delay(rules: RuleHarness) -> None:
    rules.create()
    released(rules, 4)
    assert rules.events[-1].details is None
    released(rules, 1)
    assert rules.events[-1].details == {"releases": 5, "delay_ms": 1_000}


@pytest.mark.parametrize("delay_ms", [0, 999, 1_000, 5_000])
def test_an_explicit_release_delay_is_kept(rules: RuleHarness, delay_ms: int) -> None:
    rules.create()
    released(rules, 7, delay_ms=delay_ms)
    counted = 7 if delay_ms < 1_000 else 0
    assert (rules.job().run_at, rules.job().releases) == (rules.now + delay_ms, counted)
    released(rules, 7 - counted + 1)
    assert rules.job().run_at == rules.now + 8_000, "the next one without a delay counts those before"


def test_a_repeated_release_counts_once(rules: RuleHarness) -> None:
    rules.create()
    released(rules, 4)
    lock_id = rules.start()
    first = rules.accept(cmd.Release(id="a", lock_id=lock_id))
    repeated = rules.accept(cmd.Release(id="a", lock_id=lock_id))
    assert (repeated.repeated, repeated.run_at, rules.job().releases) == (True, first.run_at, 5)


def test_a_release_by_an_operator_counts_too(rules: RuleHarness) -> None:
    rules.create()
    released(rules, 4)
    rules.accept_admin(cmd.ReleaseLock(id="a", lock_id=rules.start()))
    assert (rules.job().releases, rules.job().run_at) == (5, rules.now + 1_000)


@pytest.mark.parametrize(
    ("between", "count"),
    [
        (lambda lock: [cmd.Progress(id="a", lock_id=lock, progress=0.1)], 0),
        (lambda lock: [cmd.Progress(id="a", lock_id=lock, progress=0, message="getting ready")], 6),
        (lambda lock: [cmd.Extend(id="a", lock_id=lock)], 6),
        (lambda lock: [cmd.Undelivered(id="a", lock_id=lock)], 6),
        (lambda lock: [cmd.Fail(id="a", lock_id=lock, error_message="e", retry_after_ms=0)], 0),
        (lambda lock: [cmd.Fail(id="a", lock_id=lock, error_message="e", retry=False)], 0),
        (lambda lock: [cmd.Complete(id="a", lock_id=lock)], 0),
        (lambda lock: [cmd.Cancel(id="a")], 0),
        (lambda lock: [cmd.ForceFail(id="a")], 0),
        (lambda lock: [cmd.ForceReset(id="a")], 0),
        (lambda lock: [cmd.Transition(id="a", from_="processing", to="queued")], 0),
        (lambda lock: [cmd.EndGrants(ids=["a"], last=True)], 0),
        (lambda lock: [cmd.Undelivered(id="a", lock_id=lock), cmd.Update(id="a", priority=1)], 6),
        (lambda lock: [cmd.Undelivered(id="a", lock_id=lock), cmd.Cancel(id="a"), cmd.ForceReset(id="a")], 0),
    ],
    ids=[
        "progress",
        "a report of 0 %",
        "extend",
        "undelivered",
        "fail and retry",
        "fail",
        "complete",
        "cancel",
        "force-fail",
        "force-reset",
        "transition",
        "end of grants",
        "update",
        "reset of a cancelled job",
    ],
)
def test_events_that_reset_the_count_of_releases(rules: RuleHarness, between: Any, count: int) -> None:
    rules.create(max_attempts=9)
    released(rules, 6)
    rules.advance(2_000)
    for command in between(rules.start()):
        rules.accept_admin(command)
    assert rules.job().releases == count


def test_a_stall_resets_the_count_of_releases(rules: RuleHarness) -> None:
    rules.create()
    released(rules, 6)
    rules.advance(2_000)
    rules.start(lock_ttl_ms=1_000, stall_after_ms=0)
    rules.recover(1_000)
    assert (rules.job().status, rules.job().releases) == ("queued", 0)
    assert rules.job().run_at <= rules.now, "recovery keeps the place"


def test_release_loops_are_detected(rules: RuleHarness) -> None:
    """The state lists them without reading other jobs, through grants, restarts and every end of the loop."""
    for job_id in "abc":
        rules.create(job_id)
    loops = rules.state.release_loops
    released(rules, LOOP_FROM - 1, "a", delay_ms=999)
    assert loops == {}
    released(rules, 1, "a", delay_ms=999)
    assert loops == {"a": 10}
    rules.advance(999)
    lock_id = rules.start("a")
    assert loops == {"a": 10}, "also while a worker holds it"
    rules.accept(cmd.Undelivered(id="a", lock_id=lock_id))
    assert loops == {}, "the delay before it is not known any more"
    released(rules, 1, "a", delay_ms=0)
    assert loops == {"a": 11}
    released(rules, LOOP_FROM + 5, "b")
    assert loops == {"a": 11, "b": 15}, "the delays that jobd adds end no loop"
    rules.accept_admin(cmd.ReleaseLock(id="a", lock_id=rules.start("a")))
    assert loops == {"a": 12, "b": 15}
    rules.advance(32_000)
    released(rules, 1, "a", delay_ms=1_000)
    assert loops == {"b": 15}, "a snooze is not a loop"
    released(rules, LOOP_FROM, "c", delay_ms=0)
    assert loops == {"b": 15, "c": 10}
    numbers = rules.state.numbers(rules.lock_ms, rules.now, rules.state.clock)
    opened = OpenedStore(numbers, [rules.job(job_id) for job_id in "abc"])
    assert State.opened(opened).release_loops == {"b": 15, "c": 10}
    rules.accept(cmd.Progress(id="c", lock_id=rules.start("c"), progress=1))
    assert loops == {"b": 15}


@pytest.mark.parametrize(
    "command",
    [cmd.Cancel(id="a"), cmd.ForceFail(id="a"), cmd.Transition(id="a", from_="queued", to="completed")],
    ids=str,
)
def test_a_finished_job_is_in_no_release_loop(rules: RuleHarness, command: Any) -> None:
    rules.create()
    released(rules, LOOP_FROM, delay_ms=0)
    assert rules.state.release_loops
    rules.accept_admin(command)
    assert rules.state.release_loops == {}


def test_each_finished_status_has_its_retention() -> None:
    rules = RuleHarness(Policy(keep_completed_ms=1_000, keep_failed_ms=2_000, keep_cancelled_ms=3_000))
    rules.completed("completed")
    rules.accept(cmd.Fail(id="failed", lock_id=rules.held("failed"), error_message="e", retry=False))
    rules.create("cancelled")
    rules.accept(cmd.Cancel(id="cancelled"))
    expiry = {name: rules.job(name).expires_at for name in ("completed", "failed", "cancelled")}
    assert expiry == {"completed": rules.now + 1_000, "failed": rules.now + 2_000, "cancelled": rules.now + 3_000}


def test_the_outcomes_of_the_next_stalls_are_counted(rules: RuleHarness) -> None:
    for job_id, fields in (("a", {}), ("b", {"max_attempts": 2}), ("c", {"on_stall": "fail"}), ("d", {})):
        lock_id = rules.held(job_id, **fields)
        if job_id == "d":
            rules.progress(lock_id, 50, "d")
    outcomes = transitions.stall_outcomes([rules.job(job_id) for job_id in "abcd"])
    assert outcomes == "2 are queued again, 1 fails (on_stall), 1 fails (no attempts left)"
    assert transitions.stall_outcomes([rules.job("a")]) == "1 is queued again"
