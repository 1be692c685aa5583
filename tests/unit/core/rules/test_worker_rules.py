"""The rules of creating and granting jobs."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec
import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import decide
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS, MINUTE_MS, BackoffOptions, Failure, Job, LockDeadlines, Options, Policy
from jobd.model.responses import Imported, JobView, QueueList, Response
from tests.support.calls import JOB_COMMANDS, aimed
from tests.support.rule_harness import NOW, RuleHarness
from tests.unit.core.rules.test_operator_rules import ALLOWED

TTL = 15 * MINUTE_MS
STALL_AFTER = 10 * MINUTE_MS
PROGRESS_TIMEOUT = 30 * MINUTE_MS


def no_progress_timeout(**fields: Any) -> dict[str, Any]:
    return {"progress_timeout_ms": 0} | fields


# -- create -----------------------------------------------------------------------------------------------------------


def test_a_created_job_has_the_defaults(rules: RuleHarness) -> None:
    view: JobView = rules.accept(cmd.Create(id="a", payload=Raw(b'{"x":1}')))
    assert (view.id, view.status, view.queue, view.kind, view.priority) == ("a", "queued", "default", "", 0)
    assert (view.attempt, view.max_attempts, view.stalls, view.max_stalls, view.on_stall) == (0, 1, 0, 3, "auto")
    assert (view.stall_after_ms, view.progress_timeout_ms) == (STALL_AFTER, PROGRESS_TIMEOUT)
    assert view.created_at == view.updated_at == view.run_at == NOW
    assert (view.started_at, view.finished_at, view.expires_at, view.lock) == (None, None, None, None)
    assert view.payload == Raw(b'{"x":1}')
    assert rules.types() == ["created"]


def test_the_options_of_the_creator_are_stored(rules: RuleHarness) -> None:
    requested_ms = cmd.Create(
        id="a",
        queue="video",
        kind="cut",
        priority=-1000,
        max_attempts=7,
        backoff=BackoffOptions("fixed", 5, 10, False),
        max_stalls=0,
        on_stall="fail",
        stall_after_ms=0,
        progress_timeout_ms=0,
        run_at=NOW + 5,
        expires_at=NOW + 6,
    )
    view: JobView = rules.accept(requested_ms)
    assert (view.queue, view.kind, view.priority, view.max_attempts) == ("video", "cut", -1000, 7)
    assert (view.backoff, view.max_stalls, view.on_stall) == (BackoffOptions("fixed", 5, 10, False), 0, "fail")
    assert (view.stall_after_ms, view.progress_timeout_ms, view.run_at, view.expires_at) == (0, 0, NOW + 5, NOW + 6)


def test_max_stalls_and_on_stall_come_from_the_policy() -> None:
    rules = RuleHarness(Policy(max_stalls=9, on_stall="requeue"))
    options = rules.create().options
    assert (options.max_stalls, options.on_stall) == (9, "requeue")


def test_a_job_without_an_id_gets_one(rules: RuleHarness) -> None:
    decision = rules.decide(cmd.Create())
    assert isinstance(decision.answer, Response)
    assert (decision.answer.status, decision.answer.unread_payloads) == (201, [])
    assert [change.request_hash for change in decision.changes] == [""], "it cannot be repeated"
    first, second = decision.answer.data.id, rules.accept(cmd.Create()).id
    assert first != second
    made = UUID(first)
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert made.int >> 80 == NOW


def test_a_delay_moves_run_at(rules: RuleHarness) -> None:
    assert rules.create(delay_ms=0).run_at == NOW
    assert rules.create("b", delay_ms=1_500).run_at == NOW + 1_500
    rejection = rules.reject(cmd.Create(run_at=NOW, delay_ms=1), "invalid_request")
    assert rejection.details == {"field": "$.run_at"}
    assert rejection.message == "Give run_at or delay_ms, not both."


def test_the_longest_wait_is_at_least_the_first(rules: RuleHarness) -> None:
    rejection = rules.reject(cmd.Create(backoff=BackoffOptions(base_ms=5_000, max_ms=10)), "invalid_request")
    assert rejection.details == {"field": "$.backoff.max_ms"}
    assert rejection.message == "max_ms 10 is less than base_ms 5000. Raise max_ms, or lower base_ms."
    assert rules.create(backoff=BackoffOptions(base_ms=10, max_ms=10)).options.backoff.max_ms == 10


def test_expires_at_must_be_in_the_future(rules: RuleHarness) -> None:
    rejection = rules.reject(cmd.Create(expires_at=NOW), "invalid_request")
    assert rejection.details == {"field": "$.expires_at"}
    assert rejection.message == f"expires_at {NOW} is not in the future; it is in Unix milliseconds."
    assert rules.create(expires_at=NOW + 1).expires_at == NOW + 1


def test_a_repeated_request_returns_the_current_job(rules: RuleHarness) -> None:
    rules.held("a", payload=Raw(b"1"))
    decision = rules.decide(cmd.Create(id="a", payload=Raw(b"1")))
    assert not isinstance(decision.answer, ApiError)
    assert (decision.answer.status, decision.answer.data.status) == (200, "processing")
    assert decision.answer.unread_payloads == [(1, decision.answer.data)]
    assert not decision.changes
    rejection = rules.reject(cmd.Create(id="a", payload=Raw(b"2")), "job_exists")
    assert rejection.details == {"job_id": "a", "status": "processing", "differs_in": ["payload"]}
    assert rejection.message == (
        "Job a exists, created by a request that differs in payload. Use another id, or omit it."
    )


def test_a_repeated_request_with_durations_returns_the_current_job(rules: RuleHarness) -> None:
    request = cmd.Create(id="a", delay_ms=5, expires_in_ms=3_600_000)
    assert rules.accept(request).expires_at == NOW + 3_600_000
    rules.advance(60_000)
    assert rules.accept(request).run_at == NOW + 5
    assert len(rules.rows) == 1
    rejection = rules.reject(cmd.Create(expires_at=NOW * 2, expires_in_ms=1), "invalid_request")
    assert rejection.details == {"field": "$.expires_at"}
    assert rejection.message == "Give expires_at or expires_in_ms, not both."


def test_a_job_does_not_expire_because_a_clock_that_was_behind_is_put_right(rules: RuleHarness) -> None:
    rules.behind_ms = DAY_MS
    assert rules.create(expires_in_ms=5).expires_at == NOW + DAY_MS + 5
    rejection = rules.reject(cmd.Create(id="a", expires_in_ms=5, payload=Raw(b"1")), "job_exists")
    assert rejection.details["differs_in"] == ["payload"]
    rules.now, rules.behind_ms = NOW + DAY_MS + 4, 0
    rules.accept(cmd.Expire(limit=9))
    rules.start()


@pytest.mark.parametrize(
    ("first", "second", "differs_in"),
    [
        ({}, {"queue": "q", "kind": "k", "payload": Raw(b"1")}, ["payload", "queue", "kind"]),
        ({}, {"backoff": BackoffOptions("fixed"), "stall_after_ms": 1}, ["backoff", "stall_after_ms"]),
        ({"progress_timeout_ms": 0}, {}, ["progress_timeout_ms"]),
        ({}, {"max_stalls": 1, "on_stall": "fail"}, ["max_stalls", "on_stall"]),
        ({"max_stalls": 1}, {}, []),  # perhaps the configuration has changed
        ({}, {"priority": 1, "max_attempts": 2}, ["priority", "max_attempts"]),
        ({"run_at": NOW + 5}, {"run_at": NOW + 6}, ["run_at"]),
        ({"run_at": NOW + 5}, {}, ["run_at"]),
        ({"run_at": NOW + 5}, {"delay_ms": 5}, []),
        ({"delay_ms": 5}, {"delay_ms": 6}, ["delay_ms"]),
        ({"expires_at": NOW + 5}, {"expires_at": NOW + 6}, ["expires_at"]),
        ({"expires_at": NOW + 5}, {}, ["expires_at"]),
        ({"expires_at": NOW + 5}, {"expires_in_ms": 6}, ["expires_in_ms"]),
        ({"expires_in_ms": 5}, {"expires_at": NOW + 5}, []),
    ],
)
def test_job_exists_names_the_fields_that_differ(
    rules: RuleHarness, first: dict[str, Any], second: dict[str, Any], differs_in: list[str]
) -> None:
    rules.create("a", **first)
    rejection = rules.reject(cmd.Create(id="a", **second), "job_exists")
    assert rejection.details["differs_in"] == differs_in
    assert ("use delay_ms and expires_in_ms" in rejection.message) == bool({"run_at", "expires_at"} & set(differs_in))


def test_job_exists_does_not_name_what_an_operator_may_have_changed(rules: RuleHarness) -> None:
    rules.create("a", kind="k", payload=Raw(b"1"), run_at=NOW + 5)
    rules.advance(1)
    rules.accept_admin(cmd.Update(id="a", priority=5, max_attempts=3, run_at=NOW + 9))
    rejection = rules.reject(cmd.Create(id="a", kind="k", payload=Raw(b"1"), expires_at=NOW * 2), "job_exists")
    assert rejection.details["differs_in"] == []
    assert rejection.message == (
        "Job a exists, created by another request. The job does not show in which field: priority, max_attempts, "
        "run_at and expires_at may have changed since. Use another id, or omit it."
    )
    rejection = rules.reject(cmd.Create(id="a", payload=Raw(b"1"), priority=5), "job_exists")
    assert rejection.details["differs_in"] == ["kind"]


def test_job_exists_names_no_payload_of_a_job_that_this_batch_imports(rules: RuleHarness) -> None:
    rules.accept(cmd.Import(id="a", payload=Raw(b"1")))
    assert rules.reject(cmd.Create(id="a", kind="k"), "job_exists").details["differs_in"] == ["kind"]


def test_every_command_rejects_a_quarantined_id(rules: RuleHarness) -> None:
    rules.create()
    rules.state.quarantine("a", "bad checksum")
    del rules.rows["a"]
    for command in (
        cmd.Create(id="a"),
        cmd.Start(id="a", worker="w"),
        cmd.Get(id="a"),
        cmd.Cancel(id="a"),
        cmd.Delete(id="a"),
    ):
        rejection = rules.reject(command, "job_quarantined")
        assert rejection.details == {"job_id": "a", "reason": "bad checksum"}
        assert rejection.message == (
            "Job a is in quarantine: bad checksum. An operator can repair it: jobd doctor shows how."
        )
        assert rejection.status == 409
    assert rules.accept(cmd.Import(id="a")).skipped


def test_the_number_of_queues_with_jobs_is_bounded() -> None:
    rules = RuleHarness(Policy(queues=2))
    rules.create("a", queue="p")
    rules.create("b", queue="q")
    for command in (
        cmd.Create(queue="r"),
        cmd.Import(id="c", queue="r", status="completed"),
        cmd.ImportCheck(id="c", queue="r"),
    ):
        rejection = rules.reject(command, "too_many_queues")
        assert (rejection.status, rejection.details) == (507, {"queue": "r", "limit": 2})
        assert rejection.message == (
            "Queue r would be new, and 2 queues have jobs (limits.queues 2). Use a queue that has jobs, raise the "
            "limit, or wait until a queue has none. Finished jobs count too, until they are deleted."
        )
    rules.create("c", queue="q")
    rules.accept(cmd.Cancel(id="a"))
    rules.reject(cmd.Create(queue="r"), "too_many_queues")
    rules.accept_admin(cmd.Delete(id="a"))  # its queue is empty now
    rules.create("d", queue="r")


def test_a_bulk_create_counts_its_new_queues() -> None:
    rules = RuleHarness(Policy(queues=2))
    rules.create("a", queue="p")
    rejection = rules.reject(
        cmd.Bulk(jobs=[cmd.Create(queue="q"), cmd.Create(queue="q"), cmd.Create(queue="r")]), "too_many_queues"
    )
    assert (rejection.details["index"], rules.state.total()) == (2, 1)
    rules.accept(cmd.Bulk(jobs=[cmd.Create(queue="q"), cmd.Create(queue="q"), cmd.Create(queue="p")]))
    assert rules.state.total() == 4


def test_above_a_lowered_limit_existing_queues_accept_jobs() -> None:
    rules = RuleHarness(Policy(queues=9))
    for name in "pqr":
        rules.create(name, queue=name)
    rules.policy = Policy(queues=1)
    rules.create("a", queue="r")
    rules.reject(cmd.Create(queue="s"), "too_many_queues")


def test_a_queue_without_jobs_is_listed_only_while_it_is_paused(rules: RuleHarness) -> None:
    rules.create("a", queue="q")
    rules.accept_admin(cmd.Pause(name="q"))
    rules.accept(cmd.Cancel(id="a"))
    rules.accept_admin(cmd.Delete(id="a"))
    assert [(each.name, each.cancelled) for each in rules.accept(cmd.Queues()).queues] == [("q", 0)]
    rules.accept_admin(cmd.Resume(name="q"))
    assert rules.accept(cmd.Queues()) == QueueList([])
    rules.accept_admin(cmd.Pause(name="q"))
    rules.accept_admin(cmd.Pause(name="q", reason="again"))
    rules.create("b", queue="q")
    rules.accept_admin(cmd.Resume(name="q"))
    assert [each.name for each in rules.accept(cmd.Queues()).queues] == ["q"]


def test_a_page_of_queues_reads_no_other_queue(rules: RuleHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1_000):
        rules.state.reindex(None, Job(number, f"j-{number}", Options(f"q-{number:03}"), "queued", NOW, NOW, NOW))
    scanned: list[str] = []
    monkeypatch.setattr(State, "oldest_due_at", lambda state, queue: scanned.append(queue))
    found = decide.decide(
        Transaction(rules.state, rules.moment, rules.policy), cmd.IssuedCommand(cmd.Queues(cursor="q-499"))
    )
    assert isinstance(found, Response)
    assert [each.name for each in found.data.queues] == [f"q-{number}" for number in range(500, 700)]
    assert (found.data.next_cursor, len(scanned)) == ("q-699", 200)


def test_the_number_of_live_jobs_is_bounded() -> None:
    rules = RuleHarness(Policy(live_jobs=2))
    rules.create("a")
    rules.held("b")
    rejection = rules.reject(cmd.Create(), "too_many_jobs")
    assert (rejection.status, rejection.details) == (507, {"limit": 2})
    assert rejection.message == (
        "There are 2 unfinished jobs (limits.live_jobs). Wait until some are finished, or raise the limit."
    )
    rules.reject(cmd.Import(id="c"), "too_many_jobs")
    rules.reject(cmd.ImportCheck(id="c"), "too_many_jobs")
    assert rules.accept(cmd.ImportCheck(id="c", status="cancelled")) == Imported("c", False, "cancelled")
    rules.accept(cmd.Release(id="b", lock_id=rules.grant("b").lock_id))
    for command in (cmd.Import(id="c"), cmd.Create()):
        rules.reject(command, "too_many_jobs")  # both jobs wait, and both count
    rules.accept(cmd.Import(id="c", status="failed", error_message="x"))
    rules.accept(cmd.Cancel(id="a"))
    rules.create("d")


def test_a_bulk_creates_all_jobs_in_order_or_none(rules: RuleHarness) -> None:
    answer = rules.respond(cmd.Bulk(jobs=[cmd.Create(id="a"), cmd.Create(), cmd.Create(id="c")]))
    assert answer.status == 201
    assert [job.id for job in answer.data.jobs][::2] == ["a", "c"]
    assert [job.seq for job in rules.rows.values()] == [1, 2, 3]
    rejection = rules.reject(cmd.Bulk(jobs=[cmd.Create(id="d"), cmd.Create(id="a", queue="other")]), "job_exists")
    assert rejection.details == {"job_id": "a", "status": "queued", "differs_in": ["queue"], "index": 1}
    assert rejection.message == (
        "jobs[1]: Job a exists, created by a request that differs in queue. Use another id, or omit it. "
        "No job was created."
    )
    assert "d" not in rules.rows
    rejection = rules.reject(
        cmd.Bulk(jobs=[cmd.Create(id="d"), cmd.Create(), cmd.Create(id="e"), cmd.Create(id="e")]), "invalid_request"
    )
    assert rejection.details == {"field": "$.jobs"}
    assert rejection.message == "The id e is in the list twice; give each job its own id."


def test_a_repeated_bulk_returns_its_jobs(rules: RuleHarness) -> None:
    bulk = cmd.Bulk(jobs=[cmd.Create(id="a"), cmd.Create(id="b")])
    rules.accept(bulk)
    decision = rules.decide(cmd.Bulk(jobs=[cmd.Create(id="c"), cmd.Create(id="b")]))
    assert not isinstance(decision.answer, ApiError)
    assert [job.id for job in decision.answer.data.jobs] == ["c", "b"]
    assert [seq for seq, _ in decision.answer.unread_payloads] == [2]
    assert not rules.decide(bulk).changes


def test_a_bulk_counts_its_own_jobs_towards_the_limit() -> None:
    rules = RuleHarness(Policy(live_jobs=2))
    assert rules.reject(cmd.Bulk(jobs=[cmd.Create(), cmd.Create(), cmd.Create()]), "too_many_jobs").details == {
        "limit": 2,
        "index": 2,
    }


def test_the_error_of_a_bulk_names_the_path_of_the_field(rules: RuleHarness) -> None:
    rejection = rules.reject(cmd.Bulk(jobs=[cmd.Create(), cmd.Create(expires_at=NOW)]), "invalid_request")
    assert rejection.details == {"field": "$.jobs[1].expires_at", "index": 1}
    assert len(rules.accept(cmd.Bulk(jobs=[cmd.Create(), cmd.Create()])).jobs) == 2


# -- start ------------------------------------------------------------------------------------------------------------


def test_a_grant_sets_every_field(rules: RuleHarness) -> None:
    rules.create()
    rules.advance(5)
    answer = rules.respond(cmd.Start(id="a", worker="w-1"))
    granted, job = answer.data, rules.job()
    assert answer == Response(granted, 200, [(1, granted.job)], [("a", granted.lock_id)])
    assert (job.status, job.progress, job.attempt) == ("processing", 0, 1)
    assert job.started_at == job.updated_at == NOW + 5
    assert job.deadlines == LockDeadlines(
        rules.lock_ms + TTL, rules.lock_ms + STALL_AFTER, rules.lock_ms + PROGRESS_TIMEOUT
    )
    assert job.grant is not None
    assert job.grant.fencing_token == granted.fencing_token == (1 << 24) | 1  # as in stores and workers
    assert (granted.lock_id, granted.ttl_ms) == (job.grant.lock_id, TTL)
    assert (granted.lock_expires_at, granted.progress_due_at) == (NOW + 5 + TTL, NOW + 5 + PROGRESS_TIMEOUT)
    assert granted.job.lock.lock_id is msgspec.UNSET
    assert rules.last().by == "worker:w-1"
    assert "lock_id" not in str(rules.last().details)


def test_an_admin_sees_the_lock_id_in_every_response_with_the_job(rules: RuleHarness) -> None:
    lock_id = rules.accept(cmd.Bulk(jobs=[cmd.Create(id="a")])) and rules.start()
    assert rules.accept(cmd.Get(id="a")).lock.lock_id is msgspec.UNSET
    assert rules.accept(cmd.Get(id="a"), admin=True).lock.lock_id == lock_id
    assert rules.accept(cmd.Create(id="a"), admin=True).lock.lock_id == lock_id
    assert rules.accept(cmd.Bulk(jobs=[cmd.Create(id="a")]), admin=True).jobs[0].lock.lock_id == lock_id
    rules.accept(cmd.Release(id="a", lock_id=lock_id))
    (granted,) = rules.accept(cmd.Claim(worker="w"), admin=True).grants
    assert granted.job.lock.lock_id == granted.lock_id


def test_times_of_a_grant_take_precedence_over_job_and_policy(rules: RuleHarness) -> None:
    rules.create(stall_after_ms=7, progress_timeout_ms=2_000)
    rules.start(lock_ttl_ms=1_000, stall_after_ms=0)
    grant, deadlines = rules.job().grant, rules.job().deadlines
    assert grant is not None
    assert (grant.ttl_ms, grant.stall_after_ms, grant.progress_timeout_ms) == (1_000, 0, 2_000)
    assert deadlines == LockDeadlines(rules.lock_ms + 1_000, rules.lock_ms, rules.lock_ms + 2_000)
    rules.create("b", stall_after_ms=7)
    rules.start("b")
    grant = rules.grant("b")
    assert grant.stall_after_ms == 7
    rules.create("c")
    rules.claim(lock_ttl_ms=1_000, stall_after_ms=2)
    grant = rules.grant("c")
    assert (grant.ttl_ms, grant.stall_after_ms) == (1_000, 2)


def test_a_lock_is_cut_to_its_progress_timeout(rules: RuleHarness) -> None:
    rules.create(progress_timeout_ms=500)
    granted = rules.accept(cmd.Start(id="a", worker="w", lock_ttl_ms=1_000))
    assert granted.lock_expires_at == granted.progress_due_at == NOW + 500


@pytest.mark.parametrize("by", ["start", "claim"])
@pytest.mark.parametrize(
    ("creator", "requested_ms", "holds"),
    [
        (None, None, PROGRESS_TIMEOUT),
        (None, 0, 0),
        (None, 3_000, 3_000),
        (2_000, None, 2_000),
        (2_000, 0, 2_000),
        (2_000, 3_000, 2_000),
        (2_000, 1_000, 2_000),
        (0, None, 0),
        (0, 3_000, 0),
    ],
)
def test_the_progress_timeout_of_the_job_takes_precedence_over_grant_and_configuration(
    rules: RuleHarness, by: str, creator: int | None, requested_ms: int | None, holds: int
) -> None:
    rules.create(progress_timeout_ms=creator)
    if by == "start":
        granted = rules.accept(cmd.Start(id="a", worker="w", progress_timeout_ms=requested_ms))
    else:
        (granted,) = rules.accept(cmd.Claim(worker="w", progress_timeout_ms=requested_ms)).grants
    assert granted.progress_due_at == (rules.now + holds if holds else None)
    assert granted.job.progress_timeout_ms == holds
    assert granted.lock_expires_at == rules.now + (min(TTL, holds) if holds else TTL)
    view = rules.progress(granted.lock_id)
    assert view.progress_due_at == granted.progress_due_at
    rules.accept(cmd.Release(id="a", lock_id=granted.lock_id))
    assert rules.accept(cmd.Get(id="a")).progress_timeout_ms == (PROGRESS_TIMEOUT if creator is None else creator), (
        "it was of that grant"
    )


def test_without_a_progress_timeout_a_lock_can_be_extended_without_limit(rules: RuleHarness) -> None:
    rules.create()
    lock_id = rules.start(lock_ttl_ms=MINUTE_MS, stall_after_ms=0, progress_timeout_ms=0)
    for _ in range(3 * 60):
        rules.advance(MINUTE_MS - 1)
        assert rules.accept(cmd.Extend(id="a", lock_id=lock_id)).lock_expires_at == rules.now + MINUTE_MS
    rules.recover(MINUTE_MS)
    assert rules.job().status == "queued", "it counts as stuck only when nothing is heard"


def test_start_checks_the_due_time_before_the_pause(rules: RuleHarness) -> None:
    rules.create(delay_ms=10)
    rules.accept(cmd.Pause(name="default"))
    rejection = rules.reject(cmd.Start(id="a", worker="w"), "not_due")
    assert rejection.details == {"run_at": NOW + 10, "retry_after_ms": 10}
    assert rejection.message == "Job a is not due for another 10 ms."
    rules.advance(9)
    rules.reject(cmd.Start(id="a", worker="w"), "not_due")
    rules.advance(1)
    rejection = rules.reject(cmd.Start(id="a", worker="w"), "queue_paused")
    assert rejection.message == (
        "Queue default was paused by a client at 2023-11-14 22:13:20 UTC, until resumed: no reason given. An operator "
        "can resume it: jobctl resume default"
    )
    assert rejection.details == {
        "queue": "default",
        "paused": True,
        "paused_at": NOW,
        "paused_by": "client",
        "pause_reason": None,
        "paused_until": None,
    }
    rules.accept(cmd.Resume(name="default"))
    rules.start()


def test_a_held_job_is_already_locked(rules: RuleHarness) -> None:
    rules.held(worker="w-7", stall_after_ms=20 * MINUTE_MS)
    rejection = rules.reject(cmd.Start(id="a", worker="w"), "already_locked")
    assert rejection.details == {"locked_by": "w-7", "lock_expires_at": NOW + TTL, "retry_after_ms": TTL}
    assert rejection.message == "Job a is held by worker w-7. Try again in 15 min."
    rules.advance(TTL)  # the lock has expired, so the time until recovery counts
    rejection = rules.reject(cmd.Start(id="a", worker="w"), "already_locked")
    assert rejection.details["retry_after_ms"] == 5 * MINUTE_MS
    rules.advance(5 * MINUTE_MS - 1)
    assert rules.reject(cmd.Start(id="a", worker="w"), "already_locked").details["retry_after_ms"] == 1


def test_a_held_job_is_locked_for_a_worker_of_the_same_name_too(rules: RuleHarness) -> None:
    rules.held(worker="w-1")
    assert rules.reject(cmd.Start(id="a", worker="w-1"), "already_locked").details["locked_by"] == "w-1"


def test_a_stalled_job_is_recovered_first_then_started(rules: RuleHarness) -> None:
    old = rules.held()
    rules.advance(TTL)
    assert rules.start(worker="w-2") != old
    assert rules.types() == ["created", "granted", "stalled", "granted"]
    reason = "No update from worker w-1 for 15 min at 0 % (attempt 1 of 1). The lock had expired."
    assert rules.events[-2].reason == reason
    assert (rules.job().attempt, rules.job().stalls) == (1, 1)


def test_a_stalled_job_that_fails_by_recovery_is_not_started(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.progress(lock_id, 45)
    rules.advance(TTL)
    decision = rules.decide(cmd.Start(id="a", worker="w-2"))
    assert isinstance(decision.answer, ApiError)
    assert decision.answer.code == "invalid_transition"
    assert decision.answer.message == (
        "Job a is failed. Only a queued job can be started (No update from worker w-1 for 15 min at 45 % (attempt 1 of "
        "1). The lock had expired. No attempts are left (1 of 1). The work may be half done; check it, then retry the "
        "job to run it again.)."
    )
    assert [change.type for change in decision.changes] == ["stalled"]
    assert rules.job().status == "failed"


def test_an_overdue_job_fails_with_the_next_command_on_it(rules: RuleHarness) -> None:
    rules.create("a", expires_at=NOW + 10)
    rules.create("b", expires_at=NOW + 10, priority=-1)
    rules.create("c")
    rules.advance(10)
    decision = rules.decide(cmd.Start(id="a", worker="w"))
    assert isinstance(decision.answer, ApiError)
    assert decision.answer.code == "invalid_transition"
    job = rules.job("a")
    assert job.error is not None
    assert (job.status, job.error.code, job.expires_at) == ("failed", "expired", rules.now + 30 * DAY_MS)
    assert (rules.last().type, rules.last().reason) == ("expired", job.error.message)
    assert rules.claim(limit=5) == ["c"]
    assert rules.job("b").status == "queued"


def test_the_message_of_an_expired_job_without_an_attempt(rules: RuleHarness) -> None:
    rules.create(expires_at=NOW + 10)
    rules.row(replace(rules.job(), error=Failure(None, "odd")))
    rules.advance(10)
    assert rules.accept(cmd.Expire(limit=1)).done == 1
    error = rules.error()
    assert error.message == (
        "Its expires_at passed before a worker took the job. Create it again if it is still needed."
    )


def test_the_message_of_an_expired_retry_has_the_last_error(rules: RuleHarness) -> None:
    lock_id = rules.held(expires_at=NOW + 10, max_attempts=3)
    rules.advance(10)
    rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="the disk exploded" + "!" * 600))
    ended = rules.job().ended
    assert rules.accept(cmd.Expire(limit=1)).done == 1
    message = "Its expires_at passed while it waited for a retry. Create it again if it is still needed. "
    message += "Its last error: the disk exploded" + "!" * (500 - 17)
    assert rules.job().error == Failure(message, "expired")
    assert rules.last().reason == message
    assert rules.job().ended == ended


def test_operators_see_an_overdue_job_as_failed(rules: RuleHarness) -> None:
    for job_id in "abcd":
        rules.create(job_id, expires_at=NOW + 10)
    rules.advance(10)
    for command in (cmd.RunNow(id="a"), cmd.Transition(id="b", from_="queued", to="completed")):
        rejection = rules.ask(command, admin=True)
        assert isinstance(rejection, ApiError)
        assert (rejection.code, rejection.details["status"]) == ("invalid_transition", "failed")
    rules.accept_admin(cmd.Update(id="c", priority=3))
    assert [rules.job(job_id).status for job_id in "abc"] == ["failed"] * 3
    assert rules.accept_admin(cmd.ForceReset(id="d", reason="still wanted")).previous_status == "failed"
    assert (rules.job("d").status, rules.job("d").expires_at, rules.job("d").error) == ("queued", None, None)


def test_any_command_ends_an_overdue_job(rules: RuleHarness) -> None:
    for job_id in "ab":
        rules.create(job_id, expires_at=NOW + 10)
    rules.advance(10)
    changes = rules.decide(cmd.Start(id="a", worker="w"), by="worker:w").changes
    assert [(change.type, change.by) for change in changes] == [("expired", "daemon")]
    assert not rules.decide(cmd.Claim(worker="w"), by="worker:w").changes


def test_resetting_a_processing_job_past_its_expiry_clears_the_expiry(rules: RuleHarness) -> None:
    rules.held("a", expires_at=NOW + 10)
    rules.held("b", expires_at=NOW + 11)
    rules.advance(10)
    for job_id in "ab":
        rules.accept_admin(cmd.ForceReset(id=job_id, reason="hangs"))
    assert (rules.job("a").expires_at, rules.job("b").expires_at) == (None, NOW + 11)
    rules.held("c", expires_at=NOW + 20)
    rules.advance(10)
    rules.accept_admin(cmd.Transition(id="c", from_="processing", to="queued"))
    assert (rules.job("c").status, rules.job("c").expires_at) == ("queued", None)


def test_an_overdue_job_is_neither_started_nor_failed_while_the_clock_is_suspect(rules: RuleHarness) -> None:
    rules.create(expires_at=NOW + 10)
    rules.advance(10)
    rules.trusted = NOW
    rejection = rules.reject(cmd.Start(id="a", worker="w"), "invalid_transition")
    assert rejection.details == {"status": "queued", "to": "processing", "allowed": ALLOWED["queued"]}
    assert rejection.message == (
        "Job a is queued. It is not granted, because its expires_at has passed. The wall clock is suspect, so nothing "
        "is deleted or failed by age. Check it. If it is correct: jobctl clock accept"
    )


@pytest.mark.parametrize(
    ("status", "message", "why"),
    [("completed", None, ""), ("failed", "out", " (out)"), ("failed", None, ""), ("cancelled", None, "")],
)
def test_a_finished_job_is_not_started(rules: RuleHarness, status: Any, message: str | None, why: str) -> None:
    rules.accept(cmd.Import(id="a", status=status, error_message=message, error_code="E"))
    rejection = rules.reject(cmd.Start(id="a", worker="w"), "invalid_transition")
    assert rejection.details == {"status": status, "to": "processing", "allowed": ALLOWED[status]}
    assert rejection.message == f"Job a is {status}. Only a queued job can be started{why}."


def test_an_unknown_job_is_not_found(rules: RuleHarness) -> None:
    named = [aimed(each.command, id="x") for each in JOB_COMMANDS if not isinstance(each.command, cmd.Import)]
    for command in [*named, cmd.GetVersion(id="x"), cmd.Undelivered(id="x", lock_id="l")]:
        rejection = rules.reject(command, "job_not_found")
        assert (rejection.status, rejection.details) == (404, {"job_id": "x"})
        assert rejection.message == (
            "There is no job x: it was never created, or it was deleted. "
            "Search the list of jobs: GET /v1/jobs or jobctl jobs."
        )


# -- claim ------------------------------------------------------------------------------------------------------------


def test_claims_are_ordered_by_priority_run_at_and_creation(rules: RuleHarness) -> None:
    rules.create("late", delay_ms=2)
    rules.create("second")
    rules.create("third")
    rules.create("first", priority=-1)
    rules.create("last", priority=1)
    rules.create("elsewhere", queue="other", priority=-9)
    rules.advance(2)
    assert rules.claim(limit=4) == ["first", "second", "third", "late"]
    assert rules.claim(limit=100) == ["last"]
    assert rules.claim() == []


def test_claims_merge_queues_and_filter_kinds(rules: RuleHarness) -> None:
    rules.create("a", queue="x", kind="k")
    rules.create("b", queue="y", kind="l")
    rules.create("c", queue="x", kind="l")
    rules.create("d", queue="y", kind="k", priority=-1)
    assert rules.claim(queues=["x", "y", "x", "z"], kinds=["k"], limit=1) == ["d"]
    assert rules.claim(queues=["x", "y"], kinds=["l", "l"], limit=9) == ["b", "c"]
    assert rules.claim(queues=["x", "y"], kinds=["none"]) == []
    assert rules.claim(queues=["y", "x"], limit=9) == ["a"]


def test_claims_skip_paused_queues(rules: RuleHarness) -> None:
    rules.create("a")
    rules.create("b", queue="y")
    rules.accept(cmd.Pause(name="default"))
    assert rules.claim(queues=["default", "y"], limit=9) == ["b"]
    rules.accept(cmd.Resume(name="default"))
    assert rules.claim(queues=["default", "y"], limit=9) == ["a"]


@pytest.mark.parametrize(
    ("sizes", "granted"),
    [
        ([1 << 20] * 9, 8),
        ([(8 << 20) + 1, 1], 1),
        ([7 << 20, 2 << 20, 1], 1),  # the last job does not overtake the second
        ([(8 << 20) - (8 << 10), 1, 1], 2),  # a small payload counts as 8 KiB
        ([8 << 10] * 100, 100),
    ],
)
def test_a_claim_grants_at_most_8_mib_of_payloads_and_at_least_one_job(
    rules: RuleHarness, sizes: list[int], granted: int
) -> None:
    ids = [rules.create(f"job-{number}", payload=Raw(b"1" * size)).id for number, size in enumerate(sizes)]
    assert rules.claim(limit=100) == ids[:granted]
    assert rules.claim() == ids[granted : granted + 1]


def test_every_token_is_greater_than_the_one_before(rules: RuleHarness) -> None:
    for name in "abc":
        rules.create(name)
    answer = rules.respond(cmd.Claim(worker="w", limit=3))
    granted = answer.data.grants
    assert answer.grants == [(grant.job.id, grant.lock_id) for grant in granted]
    assert answer.unread_payloads == [(seq, grant.job) for seq, grant in enumerate(granted, 1)]
    assert [grant.fencing_token & 0xFF for grant in granted] == [1, 2, 3]
    assert len({grant.lock_id for grant in granted}) == 3
    rules.accept(cmd.ForceReset(id="a"))
    assert rules.accept(cmd.Start(id="a", worker="w")).fencing_token & 0xFF == 4
