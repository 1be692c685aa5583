"""The rules of time: stalls, recovery, expiry, deletion by age, repairs, and steps of the wall clock."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import decide, guards
from jobd.core.rules import maintenance_rules
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Failure, Job, LockDeadlines, Options
from jobd.model.responses import MaintenanceResult, Recovered, Response
from tests.support.rule_harness import NOW, SEED, RuleHarness

TTL = 15 * MINUTE_MS
STALL_AFTER = 10 * MINUTE_MS


def no_progress_timeout(**fields: Any) -> dict[str, Any]:
    return {"progress_timeout_ms": 0} | fields


# -- time: stalls, expiry, deletion, repair ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_stall", "max_attempts", "progress", "status", "attempt"),
    [
        ("auto", 1, 0, "queued", 0),
        ("auto", 2, 0, "queued", 0),
        ("auto", 1, 45, "failed", 1),
        ("auto", 2, 45, "queued", 1),
        ("requeue", 1, 45, "queued", 1),
        ("requeue", 1, 0, "queued", 0),
        ("fail", 2, 0, "failed", 0),
        ("fail", 2, 45, "failed", 1),
    ],
)
def test_how_a_stall_ends(
    rules: RuleHarness, on_stall: Any, max_attempts: int, progress: float, status: str, attempt: int
) -> None:
    lock_id = rules.held(on_stall=on_stall, max_attempts=max_attempts)
    if progress:
        rules.progress(lock_id, progress)
    rules.advance(TTL - 1)
    assert rules.accept(cmd.Recover(limit=9)) == Recovered([], 0, False)
    rules.advance(1)
    recovered = rules.accept(cmd.Recover(limit=9), by="recovery")
    job = rules.job()
    assert (job.status, job.attempt, job.stalls) == (status, attempt, 1)
    assert recovered.details[0].action == ("reset" if status == "queued" else "failed")
    assert recovered.details[0].job_id == "a"
    reason = (
        f"No update from worker w-1 for 15 min at {progress:g} % (attempt 1 of {max_attempts}). The lock had expired."
    )
    if status == "failed" and on_stall == "fail":
        reason += " Its on_stall is fail; retry the job to run it again."
    elif status == "failed":
        reason += (
            " No attempts are left (1 of 1). The work may be half done; check it, then retry the job to run it again."
        )
    assert recovered.details[0].reason == reason
    event = rules.last()
    assert (event.by, event.reason) == ("recovery", reason)
    assert event.details == {"worker": "w-1", "progress": progress, "stalls": 1}
    assert job.error == (Failure(reason, "stalled") if status == "failed" else None)


@pytest.mark.parametrize("missing", ["deadlines", "grant"])
def test_without_a_grant_or_its_lease_a_job_is_stalled_at_once(rules: RuleHarness, missing: str) -> None:
    rules.held()
    rules.row(replace(rules.job(), **{missing: None}))
    assert guards.is_stalled(rules.job(), rules.lock_ms)
    rules.start(worker="w-2")
    stalled = rules.events[-2]
    assert (stalled.type, stalled.reason) == ("stalled", "The job was processing, but no worker held it.")
    assert stalled.details == {"worker": None if missing == "grant" else "w-1", "progress": 0, "stalls": 1}


def test_a_poison_job_fails_in_the_end(rules: RuleHarness) -> None:
    rules.create(on_stall="requeue")
    for stalls in range(1, 4):
        rules.start()
        rules.recover(TTL)
        assert (rules.job().status, rules.job().stalls) == ("queued", stalls)
    rules.start()
    rules.recover(TTL)
    error = rules.job().error
    assert rules.job().status == "failed"
    assert error is not None
    assert error.message == (
        "No update from worker w-1 for 15 min at 0 % (attempt 1 of 1). The lock had expired. It stalled 4 times "
        "(max_stalls 3); find out what kills its workers."
    )


@pytest.mark.parametrize(
    ("on_stall", "max_stalls", "expected"),
    [
        ("fail", 1, "Its on_stall is fail"),  # the last allowed stall is not one too many
        ("requeue", 0, "It stalled once (max_stalls 0);"),
    ],
)
def test_why_a_first_stall_fails_a_job(rules: RuleHarness, on_stall: Any, max_stalls: int, expected: str) -> None:
    rules.create(on_stall=on_stall, max_stalls=max_stalls)
    rules.start()
    rules.recover(TTL)
    error = rules.error()
    assert expected in (error.message or "")


def test_past_the_progress_timeout_a_job_is_stalled_at_once(rules: RuleHarness) -> None:
    lock_id = rules.held(progress_timeout_ms=60_000, stall_after_ms=HOUR_MS)
    rules.accept(cmd.Extend(id="a", lock_id=lock_id))
    rules.advance(60_000)
    assert rules.accept(cmd.Recover(limit=1)).details[0].reason == (
        "Worker w-1 reported no progress for 1 min (progress_timeout_ms) at 0 % (attempt 1 of 1)."
    )


def test_with_stalled_after_0_a_job_is_stalled_when_its_lock_expires(rules: RuleHarness) -> None:
    rules.create()
    rules.start(lock_ttl_ms=60_000, stall_after_ms=0)
    rules.advance(59_999)
    assert not rules.state.processing.stalled
    rules.advance(1)
    assert [found.action for found in rules.accept(cmd.Recover(limit=1)).details] == ["reset"]


def test_recovery_works_in_slices(rules: RuleHarness) -> None:
    for name in "abcd":
        rules.held(name, worker=f"w-{name}")
    for name in "uvwxyz":
        rules.held(name, stall_after_ms=HOUR_MS, **no_progress_timeout())
    rules.advance(TTL)
    found = rules.accept(cmd.Recover(limit=2))
    assert (len(found.details), found.locks_cleared, found.more) == (2, 2, True)
    assert [(each.job_id, each.action) for each in found.details] == [("a", "reset"), ("b", "reset")]
    for each in found.details:
        assert each.reason.startswith(f"No update from worker w-{each.job_id} for 15 min")
    assert (rules.last().type, rules.last().details) == ("lock_expired", {"worker": "w-1"})
    found = rules.accept(cmd.Recover(limit=2))
    assert (len(found.details), found.locks_cleared, found.more) == (2, 2, True)  # locks, not jobs
    found = rules.accept(cmd.Recover(limit=2))
    assert (len(found.details), found.locks_cleared, found.more) == (0, 2, False)
    assert rules.accept(cmd.Recover(limit=2)) == Recovered([], 0, False)
    assert rules.state.processing.live_locks() == 0
    rules.start("a")
    rules.advance(TTL)
    assert rules.accept(cmd.Recover(limit=1)).more is False  # one was allowed, and there was one


def test_time_is_judged_when_a_command_is_applied(rules: RuleHarness) -> None:
    """The state was advanced beyond the time of the command: nothing that is not due yet happens."""
    rules.held("a")
    rules.held("b", stall_after_ms=HOUR_MS, **no_progress_timeout())
    rules.create("d", queue="other", expires_at=NOW + 5)
    rules.state.advance(NOW + 5, rules.lock_ms + TTL)
    before = cmd.Moment(NOW + 4, rules.lock_ms + TTL - 1, NOW - int(rules.lock_ms))
    nothings: list[tuple[cmd.AnyCommand, Any]] = [
        (cmd.Recover(limit=9), Recovered([], 0, False)),
        (cmd.Expire(limit=9), MaintenanceResult(0)),
    ]
    for command, nothing in nothings:
        tx = Transaction(rules.state, before, rules.policy)
        response = decide.decide(tx, cmd.IssuedCommand(command, seed=SEED))
        assert not isinstance(response, ApiError)
        assert response.data == nothing
        assert not tx.changes


def test_the_lock_of_a_stalled_job_is_not_cleared(rules: RuleHarness) -> None:
    rules.held(stall_after_ms=HOUR_MS, **no_progress_timeout())
    rules.advance(TTL)
    later = cmd.Moment(rules.now + HOUR_MS, rules.lock_ms + HOUR_MS, NOW - int(rules.lock_ms))
    tx = Transaction(rules.state, later, rules.policy)
    assert decide.decide(tx, cmd.IssuedCommand(cmd.Recover(limit=9), seed=SEED)) == Response(Recovered([], 0, False))


def test_a_live_lock_is_never_stalled(rules: RuleHarness) -> None:
    lock_id = rules.held(stall_after_ms=0)
    rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=20 * MINUTE_MS))
    rules.advance(20 * MINUTE_MS - 1)
    assert rules.accept(cmd.Recover(limit=1)).details == []


def test_deadlines_are_postponed_after_a_pause_of_the_daemon(rules: RuleHarness) -> None:
    rules.create("live", progress_timeout_ms=1_000)
    rules.start("live")
    rules.create("dead", **no_progress_timeout())
    rules.start("dead", lock_ttl_ms=1_000, stall_after_ms=900)
    rules.held("calm")
    rules.create("queued")
    rules.advance(999)
    rules.row(replace(rules.job("dead"), deadlines=LockDeadlines(rules.lock_ms, rules.lock_ms + 1, None)))
    assert (
        rules.accept(cmd.ExtendAfterPause(ids=["gone", "queued", "live", "live", "dead", "calm"], grace_ms=30_000)).done
        == 2
    )
    until = rules.lock_ms + 30_000
    assert rules.job("live").deadlines == LockDeadlines(until, rules.lock_ms - 999 + STALL_AFTER, until)
    assert rules.job("dead").deadlines == LockDeadlines(rules.lock_ms, until, None)  # an expired lock stays expired
    assert rules.types("live")[-1] == "resumed"
    assert rules.last().details == {"grace_ms": 30_000}
    assert rules.types("calm")[-1] == "granted"
    grant = rules.grant("live")
    rules.progress(grant.lock_id, 1, "live")
    assert rules.deadlines("live").progress_due == until  # no report takes it back
    rules.row(replace(rules.job("calm"), deadlines=None))
    assert rules.accept(cmd.ExtendAfterPause(ids=["calm"], grace_ms=30_000)).done == 0


def test_a_report_does_not_shorten_the_time_that_a_pause_added(rules: RuleHarness) -> None:
    lock_id = rules.held(stall_after_ms=1_000)
    rules.accept(cmd.ExtendAfterPause(ids=["a"], grace_ms=30_000))
    silent = rules.lock_ms + 30_000
    rules.progress(lock_id, 1)
    deadlines = rules.deadlines()
    assert deadlines.stall_due == silent


def due_before(rules: RuleHarness, until: int) -> dict[str, int]:
    found = maintenance_rules.due_before(rules.state.not_due(rules.now), rules.now, until)
    assert all(job.seq == rules.job(job.id).seq for job in found)
    return {job.id: job.run_at for job in sorted(found)}


def test_a_job_that_was_due_by_a_clock_that_was_ahead_is_due_again(rules: RuleHarness) -> None:
    rules.create("first")
    rules.create("held")
    rules.start("held")
    rules.create("later", delay_ms=MINUTE_MS)
    rules.advance(1)
    rules.create("second")
    rules.create("ended")
    rules.accept(cmd.Cancel(id="ended"))
    rules.now -= HOUR_MS
    rules.create("new")
    assert not guards.was_due(rules.job("first"), rules.job("first").run_at), "it is due"
    found = due_before(rules, 0)
    assert found == {name: rules.job(name).run_at for name in ("first", "held", "second")}
    assert list(found) == ["first", "held", "second"]
    assert rules.accept(cmd.KeepDue(jobs=found | {"ended": NOW, "new": rules.now, "gone": NOW})).done == 3
    assert [rules.job(name).run_at for name in found] == 3 * [rules.now]
    assert rules.job("later").run_at > rules.now
    assert (rules.types("first")[-1], rules.last().details) == ("updated", {"run_at": rules.now})
    assert rules.last().reason == "It was due before the wall clock was set back."
    assert rules.accept(cmd.Claim(worker="w", limit=9)).grants[0].job.id == "first", "its place in the queue"
    assert due_before(rules, 0) == {}
    assert rules.accept(cmd.KeepDue(jobs=found)).done == 0


def test_a_job_whose_delay_was_over_before_the_clock_was_set_back_stays_due(rules: RuleHarness) -> None:
    rules.create("plain")
    rules.create("delayed", delay_ms=10)
    lock_id = rules.held("retried", max_attempts=2)
    rules.accept(cmd.Fail(id="retried", lock_id=lock_id, error_message="e", retry_after_ms=5))
    rules.create("later", delay_ms=11)
    rules.advance(10)
    until = rules.now
    rules.now -= HOUR_MS
    found = due_before(rules, until)
    assert list(found) == ["retried", "delayed", "plain"], "a start finds the last one by its row alone"
    assert rules.accept(cmd.KeepDue(jobs=found)).done == 3
    assert rules.job("later").run_at == until + 1
    assert sorted(rules.claim(limit=9)) == ["delayed", "plain", "retried"]


def test_a_job_that_was_postponed_after_the_clock_was_set_back_is_not_kept_due(rules: RuleHarness) -> None:
    lock_id = rules.held("retried", max_attempts=3)
    rules.create("postponed")
    rules.advance(10)
    until = rules.now
    rules.now -= HOUR_MS
    found = due_before(rules, until)
    assert found.keys() == {"retried", "postponed"}
    rules.accept(cmd.Fail(id="retried", lock_id=lock_id, error_message="e", retry_after_ms=MINUTE_MS))
    rules.accept_admin(cmd.Update(id="postponed", run_at=rules.now + MINUTE_MS))
    assert rules.accept(cmd.KeepDue(jobs=found)).done == 0
    assert rules.job("retried").updated_at > rules.job("retried").run_at, "it is not before created_at"
    assert due_before(rules, 0) == {}
    assert rules.claim(limit=9) == []


def test_a_lock_that_was_live_at_the_start_is_extended_even_on_a_slow_disk(rules: RuleHarness) -> None:
    rules.held("a")
    rules.row(replace(rules.job("a"), deadlines=LockDeadlines(rules.lock_ms + 5, rules.lock_ms, None)))
    started = rules.lock_ms
    rules.advance(2_000)
    assert rules.accept(cmd.ExtendAfterPause(ids=["a"], grace_ms=30_000, since=started)).done == 1
    assert rules.job("a").deadlines == LockDeadlines(rules.lock_ms + 30_000, rules.lock_ms + 30_000, None)
    assert rules.state.processing.live_locks() == 1


def test_a_restored_backup_ends_its_grants(rules: RuleHarness) -> None:
    lock_id = rules.held("a")
    rules.progress(lock_id, 10)
    rules.create("b")
    rules.held("d")
    assert rules.accept(cmd.EndGrants(ids=["a", "b", "c", "a", "d"], last=True)).done == 2
    assert rules.job("a").status == "failed"
    error = rules.error("a")
    assert (error.message or "").startswith(cmd.EndGrants(ids=[], last=True).cause)
    assert rules.job("b").status == "queued"


def test_queued_jobs_expire(rules: RuleHarness) -> None:
    for number in range(3):
        rules.create(f"{number}", expires_at=NOW + 10)
    rules.create("later", expires_at=NOW + 11)
    rules.advance(9)
    assert rules.accept(cmd.Expire(limit=2)).done == 0
    rules.advance(1)
    worked = rules.accept(cmd.Expire(limit=2), by="cleanup")
    assert (worked.done, worked.more) == (2, True)
    worked = rules.accept(cmd.Expire(limit=1))
    assert (worked.done, worked.more) == (1, False)
    assert rules.last().type == "expired"
    assert rules.job("later").status == "queued"


def test_expires_at_survives_a_release(rules: RuleHarness) -> None:
    rules.create(expires_at=NOW + 10)
    lock_id = rules.start()
    rules.advance(10)
    assert rules.accept(cmd.Expire(limit=9)).done == 0  # a running job does not expire
    rules.accept(cmd.Release(id="a", lock_id=lock_id))
    assert rules.accept(cmd.Expire(limit=9)).done == 1


def test_deletion_by_age_is_judged_when_it_is_applied(rules: RuleHarness) -> None:
    rules.completed("old", storage_key="k/1", expires_at=NOW + 10)
    rules.completed("plain", expires_at=NOW + 10, file_path="/f")
    rules.completed("young", expires_at=NOW + 11)
    rules.create("queued", expires_at=NOW + 10)
    rules.advance(10)
    ids = ["gone", "queued", "young", "old", "plain", "old"]
    worked = rules.accept(cmd.DeleteExpired(ids=ids), by="cleanup")
    assert worked.done == 2
    assert set(rules.rows) == {"young", "queued"}
    assert rules.last().type == "deleted"
    rules.row(replace(rules.job("young"), expires_at=None))
    assert rules.accept(cmd.DeleteExpired(ids=["young"])).done == 0


def test_repair_applies_the_safe_fixes(rules: RuleHarness) -> None:
    bad = rules.completed("bad")
    rules.row(replace(bad, progress=40, finished_at=NOW - 5))
    rules.row(Job(90, "dead", replace(bad.options), "processing", NOW, NOW, NOW, progress=5, attempt=1))
    rules.row(Job(91, "odd", replace(bad.options), "paused", NOW, NOW, NOW))
    rules.create("good")
    worked = rules.accept(cmd.RepairJobs(ids=["gone", "bad", "dead", "odd", "good", "bad"]), by="cleanup")
    assert (worked.done, worked.found) == (3, 4)
    assert {job_id for job_id, _ in worked.issues} == {"bad", "dead", "odd"}
    assert sorted(rules.checked) == [1, 2, 90], "what has no fix is looked at again by the next pass"
    assert (rules.job("bad").progress, rules.job("bad").finished_at) == (100, NOW)
    assert rules.types("bad")[-1] == "fixed"
    assert (rules.job("dead").status, rules.types("dead")) == ("failed", ["stalled"])
    assert rules.job("odd").status == "paused"
    assert rules.accept(cmd.RepairJobs(ids=["bad", "good"])).found == 0
    assert rules.accept(cmd.RepairJobs(ids=["odd"])).found == 1
    assert 91 not in rules.checked


def test_repair_does_not_count_remaining_issues_as_fixed(rules: RuleHarness) -> None:
    rules.row(Job(91, "odd", Options(), "paused", NOW, NOW, NOW, progress=101))
    worked = rules.accept(cmd.RepairJobs(ids=["odd"]), by="cleanup")
    assert (worked.found, worked.done) == (2, 1)
    event = rules.last()
    assert (event.type, event.by, event.reason, event.details) == (
        "fixed", "cleanup", "validation", {"fields": ["progress"]},
    )  # fmt: skip


@pytest.mark.parametrize("missing", [None, "grant", "deadlines"])
def test_repair_stalls_only_jobs_with_an_incomplete_lock(rules: RuleHarness, missing: str | None) -> None:
    rules.held()
    rules.row(replace(rules.job(), progress=101, **({missing: None} if missing else {})))
    assert rules.accept(cmd.RepairJobs(ids=["a"])).done == 1 + bool(missing)
    assert rules.types() == ["created", "granted", "fixed", *(["stalled"] if missing else [])]


# -- the wall clock ---------------------------------------------------------------------------------------------------


def test_a_backward_step_of_the_clock_does_not_change_locks_and_keeps_rows_valid(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.now -= HOUR_MS
    rules.lock_ms += 5
    state = rules.progress(lock_id, 50)
    assert state.lock_expires_at == rules.now + TTL
    rules.accept(cmd.Complete(id="a", lock_id=lock_id, metadata=Raw(b"1")))
    assert rules.accept(cmd.Validate(id="a")).issues == []
    rules.create("b")
    rules.now -= HOUR_MS
    assert rules.claim() == []  # not due by wall time
    rules.accept(cmd.RunNow(id="b"))
    lock_id = rules.start("b")
    assert rules.accept(cmd.Validate(id="b")).issues == []
    rules.accept(cmd.Fail(id="b", lock_id=lock_id, error_message="e"))
    assert rules.accept(cmd.Validate(id="b")).issues == []


def test_a_step_of_the_clock_neither_expires_nor_extends_locks(rules: RuleHarness) -> None:
    rules.held()
    rules.now += DAY_MS
    rules.reject(cmd.Start(id="a", worker="w"), "already_locked")
    rules.now -= DAY_MS
    rules.lock_ms += TTL
    rules.start(worker="w")
