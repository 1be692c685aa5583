"""Only the latest grant of a job counts, and the journal records what was done."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import guards
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import MINUTE_MS, STATUSES, TOKEN_COUNTER_BITS
from tests.support.calls import COMMANDS, JOB_COMMANDS, EventOf, Example, aimed
from tests.support.rule_harness import NOW, RuleHarness, holder_commands

TTL = 15 * MINUTE_MS


# -- what the journal says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", COMMANDS, ids=lambda example: type(example.command).__name__)
def test_a_call_leads_to_its_event_or_error(rules: RuleHarness, example: Example) -> None:
    command = aimed(example.command, lock_id=rules.held(max_attempts=2))
    decision = rules.decide(command, admin=example.is_admin, by="admin" if example.is_admin else "client")
    if not isinstance(example.leads_to, EventOf):
        assert (decision.answer.code if isinstance(decision.answer, ApiError) else None) == example.leads_to
        assert decision.changes == []
        return
    event = decision.changes[-1]
    assert (event.type, event.to_status, event.details) == example.leads_to
    assert (event.by, event.reason, event.at) == (example.by, example.reason, NOW)
    if event.job_id == "a":
        assert (event.job_seq, event.queue, event.from_status) == (1, "default", "processing")


def test_the_events_of_creation_wait_and_deletion(rules: RuleHarness) -> None:
    rules.accept(cmd.Create(id="a", queue="q", delay_ms=5), by="client")
    rules.accept(cmd.RunNow(id="a"), by="admin")
    rules.accept(cmd.Start(id="a", worker="w-1", lock_ttl_ms=3_000))
    rules.accept(cmd.Cancel(id="a"))
    rules.accept(cmd.Delete(id="a", reason="old"), by="admin")
    rules.accept(cmd.Pause(name="q", reason="deploy", until=NOW + 9), by="admin")
    rules.accept(cmd.Resume(name="q", reason="deployed"), by="admin")
    granted = {"worker": "w-1", "fencing_token": 1 << TOKEN_COUNTER_BITS | 1, "attempt": 1, "ttl_ms": 3_000}
    actual = [(e.type, e.from_status, e.to_status, e.by, e.reason, e.details, e.queue) for e in rules.events]
    assert actual == [
        ("created", None, "queued", "client", None, None, "q"),
        ("updated", "queued", "queued", "admin", "run now", {"run_at": NOW}, "q"),
        ("granted", "queued", "processing", "worker:w-1", None, granted, "q"),
        ("cancelled", "processing", "cancelled", "client", None, None, "q"),
        ("deleted", "cancelled", None, "admin", "old", None, "q"),
        ("queue_paused", None, None, "admin", "deploy", {"since": NOW, "until": NOW + 9}, "q"),
        ("queue_resumed", None, None, "admin", "deployed", None, "q"),
    ]
    assert [(e.at, e.job_seq, e.job_id) for e in rules.events] == 5 * [(NOW, 1, "a")] + 2 * [(NOW, 0, "")]


# -- who may speak ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["w-1", "w-2"])
def test_an_older_grant_is_rejected(rules: RuleHarness, holder: str) -> None:
    """Also if it was one of the same worker."""
    old = rules.held(worker="w-1")
    rules.advance(TTL)
    rules.start(worker=holder)
    for command in [*holder_commands(old), cmd.Undelivered(id="a", lock_id=old)]:
        rejection = rules.reject(command, "lock_lost")
        kept = {"late_result": rules.late()[0].seq} if isinstance(command, cmd.Complete) else {}
        assert rejection.details == kept | {
            "status": "processing",
            "locked_by": holder,
            "reason": "stalled",
            "at": rules.now,
            "rule": "recovery",
        }
    for command in holder_commands("never-one"):
        rejection = rules.reject(command, "lock_lost")
        assert rejection.details == {
            "status": "processing",
            "locked_by": holder,
            "reason": "not_current",
            "at": rules.job().updated_at,
            "rule": "the latest grant wins",
        }
        assert rejection.message == (
            "This lock of job a is lost: there is a later grant, or it never was a lock of this job; "
            f"worker {holder} holds the job now. Stop working on the job."
        )


def test_a_queued_job_has_no_holder(rules: RuleHarness) -> None:
    rules.create()
    for command in holder_commands("x"):
        rejection = rules.reject(command, "lock_lost")
        assert rejection.details == {
            "status": "queued",
            "locked_by": None,
            "reason": "not_current",
            "at": NOW,
            "rule": "the latest grant wins",
        }
        assert rejection.message == (
            "This lock of job a is lost: there is a later grant, or it never was a lock of this job; "
            "the job is queued. Stop working on the job."
        )


@pytest.mark.parametrize(
    ("end", "reason", "rule"),
    [
        (cmd.ForceFail(id="a"), "force_failed", "force-fail"),
        (cmd.ForceReset(id="a"), "force_reset", "force-reset"),
        (cmd.Transition(id="a", from_="processing", to="queued"), "transitioned", "transition"),
        (cmd.Cancel(id="a"), "cancelled", "cancel"),
        (cmd.EndGrants(ids=["a"], last=True), "restored", "restore"),
    ],
)
def test_a_grant_ended_by_others_is_lost(rules: RuleHarness, end: Any, reason: str, rule: str) -> None:
    lock_id = rules.held()
    rules.accept(end, admin=True, by="admin")
    for command in holder_commands(lock_id):
        rejection = rules.reject(command, "lock_lost")
        status = rules.job().status
        details = {"status": status, "locked_by": None, "reason": reason, "at": NOW, "rule": rule}
        message = f"This lock of job a is lost: it was ended by {rule}; the job is {status}. Stop working on the job."
        if rule == "cancel":
            details["cancel_requested"] = True
        if isinstance(command, cmd.Complete):
            details["late_result"] = seq = rules.last().seq
            message += f" Its result is stored as late result {seq}; an operator can adopt it: jobctl adopt a"
        assert (rejection.details, rejection.message) == (details, message)


ENDINGS: dict[str, Any] = {
    "complete": cmd.Complete(id="a", lock_id="L", download_url="u"),
    "fail": cmd.Fail(id="a", lock_id="L", error_message="e"),
    "release": cmd.Release(id="a", lock_id="L"),
}


@pytest.mark.parametrize("verb", ENDINGS)
def test_a_repeated_ending_returns_the_current_job(rules: RuleHarness, verb: str) -> None:
    lock_id = rules.held(max_attempts=2)
    ending = replace(ENDINGS[verb], lock_id=lock_id)
    assert rules.accept(ending).repeated is msgspec.UNSET
    decision = rules.decide(ending)
    assert not isinstance(decision.answer, ApiError)
    assert decision.answer.data.repeated is True
    assert not decision.changes
    if verb == "release":  # also while another worker holds the job
        rules.start(worker="w-2")
        repeated = rules.accept(ending)
        assert (repeated.repeated, repeated.lock.worker) == (True, "w-2")


@pytest.mark.parametrize("verb", ENDINGS)
@pytest.mark.parametrize("second", [*ENDINGS, "progress", "extend"])
def test_another_ending_after_the_first_changes_nothing(rules: RuleHarness, verb: str, second: str) -> None:
    lock_id = rules.held(max_attempts=2)
    rules.accept(replace(ENDINGS[verb], lock_id=lock_id))
    others: dict[str, Any] = {
        "complete": cmd.Complete(id="a", lock_id=lock_id, download_url="another"),
        "fail": cmd.Fail(id="a", lock_id=lock_id, error_message="another"),
        "release": cmd.Release(id="a", lock_id=lock_id, delay_ms=1),
        "progress": cmd.Progress(id="a", lock_id=lock_id, progress=1),
        "extend": cmd.Extend(id="a", lock_id=lock_id),
    }
    if second == "release" and verb != "release":  # a `finally` block
        assert rules.accept(others[second]).repeated is True
        assert rules.job().status == ("completed" if verb == "complete" else "queued")
        return
    rejection = rules.reject(others[second], "invalid_transition")
    assert rejection.details == {"status": rules.job().status, "ended_by": verb, "ended_at": NOW}
    assert (
        rejection.message
        == f"This grant of job a was already ended by {verb}; {second} changes nothing. Stop working on it."
    )


def test_the_next_ended_grant_replaces_the_previous_one(rules: RuleHarness) -> None:
    first = rules.held()
    rules.accept(cmd.Release(id="a", lock_id=first))
    rules.accept(cmd.Release(id="a", lock_id=rules.start()))
    rules.start()
    assert rules.reject(cmd.Release(id="a", lock_id=first), "lock_lost").details["reason"] == "not_current"


def test_completed_is_final(rules: RuleHarness) -> None:
    rules.completed()
    changes = [
        each.command
        for each in JOB_COMMANDS
        if each.command.admission not in ("read", "create") and not isinstance(each.command, cmd.Delete)
    ]
    for command in [*changes, *(cmd.Transition(id="a", from_="completed", to=to) for to in STATUSES)]:
        rules.reject(command, "lock_lost" if hasattr(command, "lock_id") else "invalid_transition")


@pytest.mark.parametrize("missing", [{"deadlines": None}, {"grant": None}, {"grant": None, "deadlines": None}])
def test_a_processing_row_without_a_complete_lock_has_no_holder(rules: RuleHarness, missing: dict[str, Any]) -> None:
    lock_id = rules.held()
    rules.row(replace(rules.job(), **missing))
    for command in holder_commands(lock_id):
        rules.reject(command, "lock_lost")
    if "grant" in missing:
        rules.reject(cmd.Undelivered(id="a", lock_id=lock_id), "lock_lost")


def test_a_lock_on_a_job_that_is_not_processing_is_not_accepted(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.state.unvalidated[1] = "a"
    rules.row(replace(rules.job(), status="queued"))
    for command in [*holder_commands(lock_id), cmd.Undelivered(id="a", lock_id=lock_id)]:
        rules.reject(command, "lock_lost")


def test_requests_are_distinguished_by_a_hash_of_all_fields() -> None:
    hashes = {guards.digest(cmd.Create(**fields)) for fields in ({}, {"id": "a"}, {"id": "b"}, {"priority": 1})}
    assert len(hashes) == 4
    assert guards.digest(cmd.Create(id="a")) == guards.digest(cmd.Create(id="a", queue="default"))
    assert {len(each) for each in hashes} == {32}  # as in the store


@pytest.mark.parametrize(
    ("command", "digest"),
    [
        (cmd.Create(id="a"), "921226c1656518a38168a64e486372da"),
        (cmd.Create(id="a", queue="q", payload=Raw(b'{"x":1}'), priority=3), "18a9bbb234fe39e01c6a172933b5b944"),
        (cmd.Complete(id="a", lock_id="l"), "93fb111300f6de1128947d984fb8ba84"),
        (cmd.Fail(id="a", lock_id="l", error_message="m"), "62cd7eef3b63902a413d5942929126e9"),
        (cmd.Release(id="a", lock_id="l"), "5d6df6a6a3d543f07a07dc2ef429c2a2"),
    ],
)
def test_the_hash_of_a_request_does_not_change_with_an_upgrade(command: Any, digest: str) -> None:
    """The hashes are on disk. A new field that a request does not have must not change them."""
    assert guards.digest(command) == digest


def test_an_undelivered_grant_requeues_the_job(rules: RuleHarness) -> None:
    lock_id = rules.held()
    view = rules.accept(cmd.Undelivered(id="a", lock_id=lock_id), by="daemon")
    assert (view.status, view.attempt, view.run_at) == ("queued", 0, NOW)
    event = rules.last()
    assert (event.type, event.by) == ("undelivered", "daemon")
    assert event.reason == "The connection closed before the grant was sent."
    details = rules.reject(cmd.Undelivered(id="a", lock_id=lock_id), "lock_lost").details
    assert (details["reason"], details["at"]) == ("undelivered", NOW)
    assert rules.reject(cmd.Complete(id="a", lock_id=lock_id), "lock_lost").details["rule"] == "undelivered"
