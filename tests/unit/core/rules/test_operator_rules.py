"""The rules of operators: force-fail, force-reset, transition, update, delete, pause, import."""

from __future__ import annotations

from typing import Any, Final

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import (
    DAY_MS,
    FINISHED,
    HOUR_MS,
    LATEST_MS,
    MINUTE_MS,
    STATUSES,
    TRANSITIONS,
    BackoffOptions,
    Extra,
    Failure,
    LockDeadlines,
    Policy,
    Result,
    Status,
)
from jobd.model.responses import Imported, MaintenanceResult, PausedView, Response, TransitionView
from tests.support.rule_harness import NOW, RuleHarness, holder_commands

TTL = 15 * MINUTE_MS
STALL_AFTER = 10 * MINUTE_MS
PROGRESS_TIMEOUT = 30 * MINUTE_MS
ALLOWED: Final = {
    "queued": ["cancelled", "completed", "failed"],
    "processing": ["cancelled", "completed", "failed", "queued"],
    "completed": [],
    "failed": ["completed", "queued"],
    "cancelled": ["completed", "queued"],
}


# -- operators --------------------------------------------------------------------------------------------------------


def test_force_fail(rules: RuleHarness) -> None:
    lock_id = rules.held()
    forced = rules.accept_admin(cmd.ForceFail(id="a", reason="broken input"))
    assert (forced.job_id, forced.previous_status, forced.status) == ("a", "processing", "failed")
    assert (forced.reason, forced.timestamp) == ("broken input", NOW)
    assert rules.job().error == Failure("broken input", "force_failed")
    rules.reject(cmd.Complete(id="a", lock_id=lock_id), "lock_lost")
    rules.create("b")
    assert rules.accept_admin(cmd.ForceFail(id="b")).reason == "Failed by an operator."
    rules.reject(cmd.ForceFail(id="b"), "invalid_transition")


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize(
    "action", [cmd.Cancel, cmd.ForceFail, cmd.ForceReset, cmd.RunNow, cmd.Update, cmd.Adopt, cmd.Delete]
)
def test_an_action_is_accepted_in_the_statuses_that_its_class_declares(
    rules: RuleHarness,
    action: type[cmd.Cancel | cmd.ForceFail | cmd.ForceReset | cmd.RunNow | cmd.Update | cmd.Adopt | cmd.Delete],
    status: str,
) -> None:
    at_status(rules, status)
    response = rules.ask(action(id="a"), admin=True)
    is_rejected = isinstance(response, ApiError) and response.code == "invalid_transition"
    assert is_rejected == (status not in action.allowed_from)
    if isinstance(response, Response):
        job = rules.state.get("a")
        assert ("deleted" if job is None else job.status) == (action.leads_to or status)


def test_force_reset_makes_the_job_as_new(rules: RuleHarness) -> None:
    lock_id = rules.held(delay_ms=0, max_attempts=2)
    rules.progress(lock_id, 45)
    rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="e", retry=False))
    rules.row(replace(rules.job(), stalls=2))
    rules.advance(9)
    forced = rules.accept_admin(cmd.ForceReset(id="a", reason="again"))
    job = rules.job()
    assert (forced.previous_status, forced.status, forced.reason) == ("failed", "queued", "again")
    assert rules.events[-1].type == "retried_by_operator"
    assert (job.progress, job.attempt, job.stalls, job.error, job.run_at) == (0, 0, 0, None, rules.now)
    assert (job.expires_at, job.finished_at, job.started_at) == (None, None, None)
    lock_id = rules.start()
    rules.accept_admin(cmd.ForceReset(id="a"))
    rules.reject(cmd.Complete(id="a", lock_id=lock_id), "lock_lost")
    rules.reject(cmd.ForceReset(id="a"), "invalid_transition")


@pytest.mark.parametrize(
    ("status", "command", "to", "words"),
    [
        ("completed", cmd.ForceFail(id="a"), "failed", "Only a queued or processing job can be failed."),
        ("queued", cmd.ForceReset(id="a"), "queued", "It needs no retry."),
        ("completed", cmd.ForceReset(id="a"), "queued", "A completed job is final; create a new job instead."),
        ("processing", cmd.RetryJob(id="a"), "queued", "Only failed and cancelled jobs can be retried."),
        ("processing", cmd.RunNow(id="a"), "queued", "Only a queued job can be run now."),
        ("completed", cmd.Update(id="a", priority=1), "completed", "A completed job cannot be changed."),
        ("queued", cmd.Delete(id="a"), "deleted", "Only a finished job can be deleted: cancel it first."),
        ("failed", cmd.Cancel(id="a"), "cancelled", "Only a queued or processing job can be cancelled."),
        (
            "queued",
            cmd.Transition(id="a", from_="failed", to="completed"),
            "completed",
            "The transition expected failed. Check the job again before you decide.",
        ),
        (
            "queued",
            cmd.Transition(id="a", from_="queued", to="processing"),
            "processing",
            "Only start and claim can make a job processing.",
        ),
        (
            "failed",
            cmd.Transition(id="a", from_="failed", to="cancelled"),
            "cancelled",
            "It cannot go from failed to cancelled.",
        ),
    ],
)
def test_rejected_actions_of_operators_say_why(
    rules: RuleHarness, status: str, command: Any, to: str, words: str
) -> None:
    at_status(rules, status)
    rejection = rules.reject(command, "invalid_transition")
    assert rejection.details == {"status": status, "to": to, "allowed": ALLOWED[status]}
    assert rejection.message == f"Job a is {status}. {words}"


def at_status(rules: RuleHarness, status: str) -> None:
    rules.create()
    match status:
        case "processing":
            rules.start()
        case "completed":
            rules.accept(cmd.Complete(id="a", lock_id=rules.start()))
        case "failed":
            rules.accept(cmd.Fail(id="a", lock_id=rules.start(), error_message="e"))
        case "cancelled":
            rules.accept(cmd.Cancel(id="a"))


@pytest.mark.parametrize("to", STATUSES)
@pytest.mark.parametrize("from_", STATUSES)
def test_transition_allows_every_listed_change_except_into_processing(rules: RuleHarness, from_: Any, to: Any) -> None:
    at_status(rules, from_)
    command = cmd.Transition(id="a", from_=from_, to=to, reason="r")
    if (from_, to) not in TRANSITIONS or to == "processing":
        details = rules.reject(command, "invalid_transition", admin=True).details
        assert details == {"status": from_, "to": to, "allowed": ALLOWED[from_]}
        return
    forced = rules.accept_admin(command)
    assert forced == TransitionView("a", from_, to, "r", NOW)
    job = rules.job()
    assert job.status == to
    assert (job.finished_at is not None) == (to in FINISHED)
    assert (job.expires_at is not None) == (to in FINISHED)
    assert job.grant is None
    if to == "failed":
        assert job.error == Failure("r", "transitioned")
    if to == "completed":
        assert (job.progress, job.error) == (100, None)
    if to == "queued":
        assert job.attempt == 0


@pytest.mark.parametrize("to", ["queued", "completed", "failed", "cancelled"])
def test_a_transition_records_the_grant_that_it_ends(rules: RuleHarness, to: Any) -> None:
    lock_id = rules.held()
    rules.accept_admin(cmd.Transition(id="a", from_="processing", to=to))
    ended = rules.ended()
    assert (ended.lock_id, ended.at, ended.rule, ended.reason) == (lock_id, NOW, "transition", "transitioned")


def test_a_transition_can_have_updates(rules: RuleHarness) -> None:
    rules.create()
    updates = cmd.Updates(
        error_message="late", priority=5, run_at=NOW + 7, max_attempts=4, download_url="u", metadata=Raw(b"[1]")
    )
    rules.accept_admin(cmd.Transition(id="a", from_="queued", to="failed", updates=updates))
    job = rules.job()
    assert job.error == Failure("late", "transitioned")
    assert (job.options.priority, job.options.max_attempts, job.run_at) == (5, 4, NOW + 7)
    assert job.result == Result("u", metadata=Raw(b"[1]"))
    rules.accept_admin(cmd.Transition(id="a", from_="failed", to="queued", updates=cmd.Updates(run_at=NOW)))
    assert (rules.job().run_at, rules.job().error) == (NOW, Failure("late", "transitioned"))


def test_a_job_that_finished_by_a_clock_that_was_ahead_is_due_when_it_is_requeued(rules: RuleHarness) -> None:
    for name in ("ran", "later", "given"):
        rules.create(name, delay_ms=HOUR_MS if name == "later" else 0)
        rules.accept(cmd.Cancel(id=name))
    rules.now -= 2 * HOUR_MS
    for name in ("ran", "later", "given"):
        updates = cmd.Updates(run_at=NOW) if name == "given" else cmd.Updates()
        rules.accept_admin(cmd.Transition(id=name, from_="cancelled", to="queued", updates=updates))
    assert rules.job("ran").run_at == rules.now
    assert rules.job("later").run_at == NOW + HOUR_MS, "it was not due"
    assert rules.job("given").run_at == NOW, "the operator set it"


def test_a_requeued_job_is_due_if_the_clock_was_set_back_twice(rules: RuleHarness) -> None:
    """Its `run_at` is before its creation, as the first step back made it due again."""
    rules.create()
    rules.now -= HOUR_MS
    rules.accept_admin(cmd.RunNow(id="a"))
    rules.accept(cmd.Cancel(id="a"))
    rules.now -= HOUR_MS
    rules.accept_admin(cmd.Transition(id="a", from_="cancelled", to="queued"))
    assert rules.job().run_at == rules.now


def test_a_transition_sets_only_the_given_parts_of_the_result(rules: RuleHarness) -> None:
    rules.create()
    rules.row(replace(rules.job(), result=Result(None, "/f", "k", Raw(b"[1]"))))
    rules.accept_admin(cmd.Transition(id="a", from_="queued", to="failed", updates=cmd.Updates(download_url="u")))
    assert rules.job().result == Result("u", "/f", "k", Raw(b"[1]"))
    rules.accept_admin(
        cmd.Transition(id="a", from_="failed", to="queued", updates=cmd.Updates(metadata=Raw(b"null"), priority=2))
    )
    assert rules.job().result == Result("u", "/f", "k")
    rules.accept_admin(cmd.Transition(id="a", from_="queued", to="completed", updates=cmd.Updates(file_path="/g")))
    assert rules.job().result == Result("u", "/g", "k")


def test_a_late_result_is_adopted(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.progress(lock_id, 45)
    rules.recover(TTL)
    adopted = cmd.Transition(id="a", from_="failed", to="completed", updates=cmd.Updates(storage_key="k", priority=3))
    assert rules.accept_admin(adopted).status == "completed"
    assert rules.job().result == Result(storage_key="k")
    assert rules.job().options.priority == 3
    rules.create("b")
    rules.row(replace(rules.job("b"), result=Result("kept")))
    rules.accept_admin(cmd.Transition(id="b", from_="queued", to="completed"))
    assert rules.job("b").result == Result("kept")


def test_a_transition_to_completed_needs_a_required_download_url() -> None:
    rules = RuleHarness(Policy(require_download_url=True))
    rules.create()
    rejected = cmd.Transition(id="a", from_="queued", to="completed", updates=cmd.Updates(file_path="/f"))
    assert rules.reject(rejected, "invalid_request", admin=True).details == {"field": "$.updates.download_url"}
    rules.row(replace(rules.job(), result=Result("kept")))
    dry_run = rules.accept_admin(cmd.Transition(id="a", from_="queued", to="completed", dry_run=True))
    assert (dry_run.previous_status, dry_run.status, rules.job().status) == ("queued", "completed", "queued")
    rules.accept_admin(cmd.Transition(id="a", from_="queued", to="failed"))
    rules.accept_admin(cmd.Transition(id="a", from_="failed", to="completed"))
    assert rules.job().result == Result("kept")
    rules.create("b")
    rules.accept_admin(cmd.Transition(id="b", from_="queued", to="completed", updates=cmd.Updates(download_url="u")))


def test_a_dry_run_changes_nothing(rules: RuleHarness) -> None:
    rules.create(delay_ms=1_000)
    commands: list[Any] = [
        cmd.RunNow(id="a", reason="r"),
        cmd.Update(id="a", priority=7, run_at=NOW + 5, max_attempts=3),
        cmd.Transition(id="a", from_="queued", to="completed", reason="r"),
    ]
    for command in commands:
        before = rules.job()
        dry_run = rules.decide(replace(command, dry_run=True), admin=True)
        assert (dry_run.changes, rules.job()) == ([], before)
        assert isinstance(dry_run.answer, Response)
        assert dry_run.answer.data == rules.accept_admin(command)
        assert rules.job() != before
    for command in commands:
        rejection = rules.reject(replace(command, dry_run=True), "invalid_transition", admin=True)
        assert rejection == rules.reject(command, "invalid_transition", admin=True)


def test_a_transition_to_failed_needs_no_message(rules: RuleHarness) -> None:
    rules.create()
    rules.accept_admin(cmd.Transition(id="a", from_="queued", to="failed"))
    assert rules.job().error == Failure("Failed by an operator.", "transitioned")


def test_extend_lock(rules: RuleHarness) -> None:
    lock_id = rules.held()
    state = rules.accept_admin(cmd.ExtendLock(id="a", lock_id=lock_id, additional_ms=20 * MINUTE_MS))
    assert (state.job_id, state.status, state.extended) == ("a", "processing", True)
    assert state.lock_expires_at == state.lock.expires_at == NOW + 20 * MINUTE_MS
    assert (state.progress_due_at, state.lock.lock_id, state.timestamp) == (NOW + PROGRESS_TIMEOUT, lock_id, NOW)
    assert rules.last().by == "admin"
    assert rules.accept_admin(cmd.ExtendLock(id="a", lock_id=lock_id)).extended is False


def test_release_lock_revokes_the_grant(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.progress(lock_id, 10)
    state = rules.accept_admin(cmd.ReleaseLock(id="a", lock_id=lock_id))
    assert (state.status, state.lock, state.lock_expires_at, state.extended) == ("queued", None, None, False)
    assert (rules.job().attempt, rules.last().by) == (0, "admin")
    # An operator ended the grant, so its holder has to stop: lock_lost, never "you ended it yourself".
    for command in holder_commands(lock_id):
        details = rules.reject(command, "lock_lost").details
        assert (details["reason"], details["rule"], details["at"]) == ("released", "release-lock", NOW)


def test_release_lock_after_the_holders_own_end(rules: RuleHarness) -> None:
    lock_id = rules.completed().ended.lock_id  # type: ignore[union-attr]
    state = rules.accept_admin(cmd.ReleaseLock(id="a", lock_id=lock_id))
    assert (state.status, state.lock) == ("completed", None)


def test_run_now(rules: RuleHarness) -> None:
    rules.create(delay_ms=DAY_MS)
    assert rules.accept_admin(cmd.RunNow(id="a")).run_at == NOW
    assert not rules.decide(cmd.RunNow(id="a")).changes
    assert rules.claim() == ["a"]
    rules.reject(cmd.RunNow(id="a"), "invalid_transition")


def test_update(rules: RuleHarness) -> None:
    rules.create("a")
    rules.create("b")
    view = rules.accept_admin(cmd.Update(id="b", priority=-1, run_at=NOW - 5, max_attempts=9, reason="urgent"))
    assert rules.last().reason == "urgent"
    assert (view.priority, view.run_at, view.max_attempts) == (-1, NOW - 5, 9)
    assert rules.last().details == {"priority": -1, "run_at": NOW - 5, "max_attempts": 9}
    assert rules.claim(limit=2) == ["b", "a"]
    assert not rules.decide(cmd.Update(id="a")).changes
    assert not rules.decide(cmd.Update(id="a", priority=0)).changes
    rules.accept(cmd.Cancel(id="a"))
    assert rules.accept_admin(cmd.Update(id="a", priority=3)).priority == 3


def test_delete_takes_finished_jobs_only(rules: RuleHarness) -> None:
    rules.completed()
    rules.create("b")
    assert rules.accept_admin(cmd.Delete(id="a")).status == "completed"
    assert "a" not in rules.rows
    rules.reject(cmd.Delete(id="a"), "job_not_found")
    rules.reject(cmd.Delete(id="b"), "invalid_transition")
    assert rules.create("a").seq == 3


def test_pause_and_resume_are_events_of_the_queue(rules: RuleHarness) -> None:
    assert rules.accept_admin(cmd.Pause(name="q")).paused is True
    assert (rules.last().type, rules.last().job_seq, rules.last().queue) == ("queue_paused", 0, "q")
    assert not rules.decide(cmd.Pause(name="q")).changes
    assert rules.accept_admin(cmd.Resume(name="q")).paused is False
    assert not rules.decide(cmd.Resume(name="q")).changes


def test_a_pause_shows_its_operator_start_reason_and_end(rules: RuleHarness) -> None:
    view = rules.accept(cmd.Pause(name="q", reason="deploy", until=NOW + 9), by="admin:ana")
    expected = PausedView("q", True, NOW, "admin:ana", "deploy", NOW + 9)
    assert view == expected
    rules.advance(1)
    assert rules.accept(cmd.Pause(name="q"), by="admin:bob") == expected, "a plain pause changes nothing"
    assert not rules.decide(cmd.Pause(name="q", reason="deploy", until=NOW + 9), by="admin:bob").changes
    [shown] = rules.accept(cmd.Queues()).queues
    assert (shown.paused_at, shown.paused_by, shown.pause_reason, shown.paused_until) == (
        NOW, "admin:ana", "deploy", NOW + 9,
    )  # fmt: skip
    replaced = rules.accept(cmd.Pause(name="q", reason="disk"), by="admin:bob")
    assert replaced == PausedView("q", True, NOW, "admin:bob", "disk", None), "the time of the first one stays"
    [listed] = rules.accept(cmd.Queues()).queues
    assert listed.pause == replaced.pause == rules.state.queue_row("q").pause
    assert rules.accept(cmd.Resume(name="q")) == PausedView("q", False)


def test_a_pause_cannot_end_in_the_past(rules: RuleHarness) -> None:
    rejection = rules.reject(cmd.Pause(name="q", until=NOW), "invalid_request")
    assert rejection.details == {"field": "$.until"}
    assert rejection.message == (
        f"until {NOW} is not in the future; it is in Unix milliseconds. "
        "Leave it out to pause until an operator resumes the queue."
    )
    assert rules.state.paused == {}


def test_a_pause_that_is_over_ends(rules: RuleHarness) -> None:
    rules.create()
    rules.accept(cmd.Pause(name="default", until=NOW + 10), by="admin")
    rules.accept(cmd.Pause(name="other"), by="admin")
    rules.advance(9)
    assert rules.accept(cmd.EndPauses()).done == 0
    rules.advance(1)
    assert rules.accept(cmd.EndPauses(), by="daemon").done == 1
    last = rules.last()
    assert (last.type, last.queue, last.by, last.reason) == (
        "queue_resumed", "default", "daemon", "The pause ended as scheduled.",
    )  # fmt: skip
    assert list(rules.state.paused) == ["other"]
    rules.start()


# -- import -----------------------------------------------------------------------------------------------------------


def test_an_import_keeps_all_given_fields(rules: RuleHarness) -> None:
    command = cmd.Import(
        id="a",
        queue="q",
        kind="k",
        status="failed",
        progress=33.0,
        progress_message="m",
        attempt=2,
        max_attempts=3,
        stalls=1,
        created_at=NOW - 9,
        updated_at=NOW - 1,
        run_at=NOW - 8,
        started_at=NOW - 7,
        finished_at=NOW - 2,
        expires_at=NOW + 9,
        download_url="u",
        file_path="f",
        storage_key="s",
        metadata=Raw(b"1"),
        error_message="e",
        error_code="E",
        payload=Raw(b"1" * 9_000),
        schedule_id="nightly",
        scheduled_at=NOW - 8,
    )
    decision = rules.decide(command, by="admin")
    assert not isinstance(decision.answer, ApiError)
    assert (decision.answer.status, decision.answer.data) == (
        201,
        Imported("a", False, "failed", None, rules.policy.live_jobs),
    )
    assert [change.request_hash for change in decision.changes] == [""]
    job = rules.job()
    assert (job.status, job.progress, job.progress_message, job.attempt, job.stalls) == ("failed", 33, "m", 2, 1)
    assert (job.created_at, job.updated_at, job.run_at) == (NOW - 9, NOW - 1, NOW - 8)
    assert (job.started_at, job.finished_at, job.expires_at) == (NOW - 7, NOW - 2, NOW + 9)
    assert (job.result, job.error) == (Result("u", "f", "s", Raw(b"1")), Failure("e", "E"))
    assert (job.payload_bytes, job.extra) == (9_000, Extra("nightly", NOW - 8))
    assert rules.state.unvalidated == {1: "a"}
    assert rules.accept(command).skipped


@pytest.mark.parametrize("status", STATUSES)
def test_only_an_imported_job_that_is_finished_has_finished_at(rules: RuleHarness, status: Status) -> None:
    rules.accept(cmd.Import(id="a", status=status, finished_at=NOW - 5))
    assert (rules.job().finished_at is not None) == (rules.job().status in FINISHED)


def test_an_import_checks_the_backoff_as_a_create_does(rules: RuleHarness) -> None:
    rejection = rules.reject(cmd.Import(id="a", backoff=BackoffOptions(max_ms=999)), "invalid_request")
    assert rejection.details == {"field": "$.backoff.max_ms"}


def test_missing_times_of_an_import_become_now(rules: RuleHarness) -> None:
    rules.accept(cmd.Import(id="a", status="completed"))
    job = rules.job()
    assert (job.created_at, job.updated_at, job.run_at, job.finished_at) == (NOW, NOW, NOW, NOW)
    assert (job.progress, job.expires_at, job.error) == (100, NOW + 7 * DAY_MS, None)
    rules.accept(cmd.Import(id="b", error_code="E"))
    job = rules.job("b")
    assert job.error == Failure(None, "E")
    assert (job.progress, job.started_at, job.finished_at, job.expires_at) == (0, None, None, None)
    rules.accept(cmd.Import(id="c", status="failed", error_code="E"))
    assert rules.job("c").expires_at == NOW + 30 * DAY_MS


def test_a_claim_leaves_overdue_jobs_to_recovery(rules: RuleHarness) -> None:
    for number in range(5):
        rules.create(f"late-{number}", expires_at=NOW + 1)
    rules.create("good")
    rules.advance(1)
    decision = rules.decide(cmd.Claim(worker="w"))
    assert [change.job_id for change in decision.changes] == ["good"]
    assert rules.accept(cmd.Expire(limit=3)) == MaintenanceResult(3, more=True)
    assert rules.accept(cmd.Expire(limit=3)) == MaintenanceResult(2)


def test_a_job_from_the_end_of_time_is_kept_no_longer(rules: RuleHarness) -> None:
    rules.accept(cmd.Import(id="a", created_at=LATEST_MS))
    rules.accept(cmd.Cancel(id="a"))
    assert rules.job().finished_at == rules.job().expires_at == LATEST_MS  # the latest time that an import accepts


def test_an_import_without_created_at_gets_the_earliest_given_time(rules: RuleHarness) -> None:
    rules.accept(cmd.Import(id="a", status="completed", started_at=NOW - 5_000, finished_at=NOW - 1_000))
    job = rules.job("a")
    assert (job.created_at, job.finished_at, job.updated_at) == (NOW - 5_000, NOW - 1_000, NOW - 1_000)
    assert rules.accept(cmd.RepairJobs(ids=["a"])).found == 0


@pytest.mark.parametrize(("progress", "status"), [(0, "queued"), (45, "failed")])
def test_an_import_check_shows_the_result_and_changes_nothing(rules: RuleHarness, progress: float, status: str) -> None:
    command = cmd.ImportCheck(id="a", status="processing", progress=progress, worker="there", started_at=NOW - 5)
    before = rules.state.next_job, rules.state.next_token, rules.state.next_event
    decision = rules.decide(command, by="admin")
    assert isinstance(decision.answer, Response)
    preview = decision.answer.data
    assert (preview.job_id, preview.skipped, preview.status) == ("a", False, status)
    advice = (
        ""
        if status == "queued"
        else " No attempts are left (1 of 1). The work may be half done; check it, then retry the job to run it again."
    )
    assert preview.reason == f"The job was processing when it was imported; its worker is unknown here.{advice}"
    assert preview.room == rules.policy.live_jobs
    assert decision.changes == []
    assert (rules.state.next_job, rules.state.next_token, rules.state.next_event) == before
    rules.create("a")
    preview = rules.accept(command)
    room = rules.policy.live_jobs - 1
    assert preview == Imported("a", True, "queued", "A job with this id exists: it is queued.", room)
    rules.state.quarantined["b"] = "its checksum is wrong"
    preview = rules.accept(cmd.ImportCheck(id="b"))
    assert preview == Imported("b", True, None, "A job with this id exists, but its row is damaged.", room)


@pytest.mark.parametrize(("bound", "remaining"), [(9, 5), (4, 0), (3, 0)])
def test_an_import_check_shows_how_many_more_live_jobs_are_allowed(
    rules: RuleHarness, bound: int, remaining: int
) -> None:
    for name in "abc":
        rules.create(name)
    rules.held("d")
    rules.policy = Policy(live_jobs=bound)
    assert rules.accept(cmd.ImportCheck(id="e", status="completed")).room == remaining


@pytest.mark.parametrize(("progress", "status"), [(0, "queued"), (45, "failed")])
def test_an_imported_grant_ends_by_its_stall_rule(rules: RuleHarness, progress: float, status: str) -> None:
    rules.accept(cmd.Import(id="a", status="processing", progress=progress, worker="there", started_at=NOW - 5))
    job = rules.job()
    assert (job.status, job.stalls, job.grant) == (status, 1, None)
    assert job.attempt == (0 if progress == 0 else 1)
    assert rules.types() == ["imported", "stalled"]
    assert job.ended is not None
    assert job.ended.worker == "there"
    assert rules.create("b")
    assert rules.accept(cmd.Start(id="b", worker="w")).fencing_token & 0xFF == 2


@pytest.mark.parametrize(
    ("started_at", "updated_at", "began"),
    [(NOW - 5, NOW - 3, NOW - 5), (None, NOW - 3, NOW - 3), (NOW + 5, NOW + 5, NOW)],
)
def test_an_imported_processing_job_gets_a_grant_from_its_fields(
    rules: RuleHarness, started_at: int | None, updated_at: int, began: int
) -> None:
    rules.accept(cmd.Import(id="a", status="processing", started_at=started_at, updated_at=updated_at))
    changes, grant = rules.events[0].changes, rules.events[0].grant
    assert changes is not None
    assert grant is not None
    assert len(bytes.fromhex(grant.lock_id)) == 16
    assert changes.started_at == began
    assert changes.deadlines == LockDeadlines(rules.lock_ms, rules.lock_ms, None)
    assert (grant.worker, grant.acquired_at) == ("unknown", started_at or updated_at)
    assert (grant.ttl_ms, grant.stall_after_ms, grant.progress_timeout_ms) == (
        TTL,
        STALL_AFTER,
        0,
    )
