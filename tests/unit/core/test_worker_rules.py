"""The state machine, branch by branch: what each command does, at which boundary, and how it is refused."""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

import msgspec
import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import decide, transitions, views, worker_rules
from jobd.core.state import Book
from jobd.model.commands import (
    AnyCommand,
    Bulk,
    Call,
    Cancel,
    Claim,
    Complete,
    Create,
    Delete,
    DeleteExpired,
    EndGrants,
    EndPauses,
    Expire,
    Export,
    Extend,
    ExtendAfterPause,
    ExtendLock,
    Fail,
    ForceFail,
    ForceReset,
    Get,
    GetVersion,
    Import,
    ImportCheck,
    ListJobs,
    Locks,
    Moment,
    Pause,
    Ping,
    Progress,
    Queues,
    Recover,
    Release,
    ReleaseLock,
    RepairJobs,
    Report,
    Resume,
    RunNow,
    Start,
    Stats,
    Tick,
    Timeline,
    Transition,
    Undelivered,
    Update,
    Updates,
    Validate,
    Why,
    Workers,
)
from jobd.model.errors import ApiError
from jobd.model.job import (
    DAY_MS,
    FINISHED,
    HOUR_MS,
    LOOP_FROM,
    MINUTE_MS,
    STATUSES,
    TOKEN_COUNTER_BITS,
    TRANSITIONS,
    Backoff,
    Failure,
    Grant,
    Job,
    Lease,
    Options,
    Policy,
    Result,
    release_delay_ms,
)
from jobd.model.responses import (
    EmptyResponse,
    HistoryRead,
    ImportCheckResult,
    Imported,
    JobView,
    MaintenanceResult,
    OldestDue,
    PausedView,
    QueueList,
    Recovered,
    Response,
)
from jobd.model.storage import OpenedStore
from tests.support.rule_harness import NOW, SEED, RuleHarness

TTL = 15 * MINUTE_MS
STUCK = 10 * MINUTE_MS
CEILING = 30 * MINUTE_MS


@pytest.fixture
def desk() -> RuleHarness:
    return RuleHarness()


# Where an operator may move a job of each status.
ALLOWED: Final = {
    "queued": ["cancelled", "completed", "failed"],
    "processing": ["cancelled", "completed", "failed", "queued"],
    "completed": [],
    "failed": ["completed", "queued"],
    "cancelled": ["completed", "queued"],
}


def no_ceiling(**fields: Any) -> dict[str, Any]:
    return {"max_processing_ms": 0} | fields


# -- create -----------------------------------------------------------------------------------------------------------


def test_a_created_job_has_the_defaults(desk: RuleHarness) -> None:
    view: JobView = desk.accept(Create(id="a", payload=Raw(b'{"x":1}')))
    assert (view.id, view.status, view.queue, view.kind, view.priority) == ("a", "queued", "default", "", 0)
    assert (view.attempt, view.max_attempts, view.stalls, view.max_stalls, view.on_stall) == (0, 1, 0, 3, "auto")
    assert (view.stuck_after_ms, view.max_processing_ms) == (STUCK, CEILING)
    assert view.created_at == view.updated_at == view.run_at == NOW
    assert (view.started_at, view.finished_at, view.expires_at, view.lock) == (None, None, None, None)
    assert view.payload == Raw(b'{"x":1}')
    assert desk.types() == ["created"]


def test_what_the_creator_asks_for_is_kept(desk: RuleHarness) -> None:
    asked = Create(
        id="a",
        queue="video",
        kind="cut",
        priority=-1000,
        max_attempts=7,
        backoff=Backoff("fixed", 5, 10, False),
        max_stalls=0,
        on_stall="fail",
        stuck_after_ms=0,
        max_processing_ms=0,
        run_at=NOW + 5,
        expires_at=NOW + 6,
    )
    view: JobView = desk.accept(asked)
    assert (view.queue, view.kind, view.priority, view.max_attempts) == ("video", "cut", -1000, 7)
    assert (view.backoff, view.max_stalls, view.on_stall) == (Backoff("fixed", 5, 10, False), 0, "fail")
    assert (view.stuck_after_ms, view.max_processing_ms, view.run_at, view.expires_at) == (0, 0, NOW + 5, NOW + 6)


def test_max_stalls_and_on_stall_come_from_the_policy() -> None:
    desk = RuleHarness(Policy(max_stalls=9, on_stall="requeue"))
    options = desk.create().options
    assert (options.max_stalls, options.on_stall) == (9, "requeue")


def test_an_id_is_made_where_none_is_given(desk: RuleHarness) -> None:
    first, second = desk.accept(Create()).id, desk.accept(Create()).id
    assert first != second
    made = UUID(first)
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert made.int >> 80 == NOW


def test_a_delay_moves_run_at(desk: RuleHarness) -> None:
    assert desk.create(delay_ms=0).run_at == NOW
    assert desk.create("b", delay_ms=1_500).run_at == NOW + 1_500
    refusal = desk.reject(Create(run_at=NOW, delay_ms=1), "invalid_request")
    assert refusal.details == {"field": "$.run_at"}


def test_expires_at_has_to_be_in_the_future(desk: RuleHarness) -> None:
    assert desk.reject(Create(expires_at=NOW), "invalid_request").details == {"field": "$.expires_at"}
    assert desk.create(expires_at=NOW + 1).expires_at == NOW + 1


def test_the_same_request_again_gives_the_job_as_it_is(desk: RuleHarness) -> None:
    desk.held("a", payload=Raw(b"1"))
    decision = desk.decide(Create(id="a", payload=Raw(b"1")))
    assert not isinstance(decision.answer, ApiError)
    assert (decision.answer.status, decision.answer.data.status) == (200, "processing")
    assert decision.answer.unread_payloads == [(1, decision.answer.data)]
    assert not decision.changes
    refusal = desk.reject(Create(id="a", payload=Raw(b"2")), "job_exists")
    assert refusal.details == {"job_id": "a", "status": "processing"}


def test_a_quarantined_id_is_refused_by_every_command_that_names_it(desk: RuleHarness) -> None:
    desk.create()
    desk.book.quarantine("a", "bad checksum")
    del desk.rows["a"]
    for command in (Create(id="a"), Start(id="a", worker="w"), Get(id="a"), Cancel(id="a"), Delete(id="a")):
        refusal = desk.reject(command, "job_quarantined")
        assert refusal.details == {"job_id": "a", "reason": "bad checksum"}
        assert refusal.status == 409
    assert desk.accept(Import(id="a")) == Imported("a", skipped=True)


def test_the_number_of_queues_with_jobs_is_bounded() -> None:
    desk = RuleHarness(Policy(queues=2))
    desk.create("a", queue="p")
    desk.create("b", queue="q")
    for command in (Create(queue="r"), Import(id="c", queue="r", status="completed"), ImportCheck(id="c", queue="r")):
        refusal = desk.reject(command, "too_many_queues")
        assert (refusal.status, refusal.details) == (507, {"queue": "r", "limit": 2})
        assert refusal.message.startswith("Queue r would be new, and 2 queues have jobs (limits.queues 2). ")
    desk.create("c", queue="q")
    desk.accept(Cancel(id="a"))
    desk.reject(Create(queue="r"), "too_many_queues")
    admin(desk, Delete(id="a"))  # its queue has no jobs any more
    desk.create("d", queue="r")


def test_a_bulk_create_counts_the_queues_that_it_would_make() -> None:
    desk = RuleHarness(Policy(queues=2))
    desk.create("a", queue="p")
    refusal = desk.reject(Bulk(jobs=[Create(queue="q"), Create(queue="q"), Create(queue="r")]), "too_many_queues")
    assert (refusal.details["index"], desk.book.total()) == (2, 1)
    desk.accept(Bulk(jobs=[Create(queue="q"), Create(queue="q"), Create(queue="p")]))
    assert desk.book.total() == 4


def test_a_store_with_more_queues_than_the_limit_takes_jobs_of_those_that_it_has() -> None:
    desk = RuleHarness(Policy(queues=9))
    for name in "pqr":
        desk.create(name, queue=name)
    desk.policy = Policy(queues=1)
    desk.create("a", queue="r")
    desk.reject(Create(queue="s"), "too_many_queues")


def test_a_queue_without_jobs_is_listed_only_while_it_is_paused(desk: RuleHarness) -> None:
    desk.create("a", queue="q")
    admin(desk, Pause(name="q"))
    desk.accept(Cancel(id="a"))
    admin(desk, Delete(id="a"))
    assert [(each.name, each.cancelled) for each in desk.accept(Queues()).queues] == [("q", 0)]
    admin(desk, Resume(name="q"))
    assert desk.accept(Queues()) == QueueList([])
    admin(desk, Pause(name="q"))
    admin(desk, Pause(name="q", reason="again"))
    desk.create("b", queue="q")
    admin(desk, Resume(name="q"))
    assert [each.name for each in desk.accept(Queues()).queues] == ["q"]


def test_a_page_of_queues_reads_no_other_queue(desk: RuleHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1_000):
        desk.book.swap(None, Job(number, f"j-{number}", Options(f"q-{number:03}"), "queued", NOW, NOW, NOW))
    looked: list[str] = []
    monkeypatch.setattr(Book, "oldest_due_at", lambda book, queue: looked.append(queue))
    found = decide.decide(desk.book, Call(Queues(cursor="q-499")), desk.moment, desk.policy).answer
    assert isinstance(found, Response)
    assert [each.name for each in found.data.queues] == [f"q-{number}" for number in range(500, 700)]
    assert (found.data.next_cursor, len(looked)) == ("q-699", 200)


def test_the_number_of_live_jobs_is_bounded() -> None:
    desk = RuleHarness(Policy(live_jobs=2))
    desk.create("a")
    desk.held("b")
    assert desk.reject(Create(), "too_many_jobs").status == 507
    desk.reject(Import(id="c"), "too_many_jobs")
    desk.reject(ImportCheck(id="c"), "too_many_jobs")
    assert desk.accept(ImportCheck(id="c", status="cancelled")) == ImportCheckResult(
        "c", "create", "cancelled", None, 0
    )
    desk.accept(Release(id="b", lock_id=desk.job("b").grant.lock_id))  # type: ignore[union-attr]
    for command in (Import(id="c"), Create()):
        desk.reject(command, "too_many_jobs")  # both wait, and count all the same
    desk.accept(Import(id="c", status="failed", error_message="x"))
    desk.accept(Cancel(id="a"))
    desk.create("d")


def test_bulk_creates_in_order_all_or_nothing(desk: RuleHarness) -> None:
    answer = desk.ask(Bulk(jobs=[Create(id="a"), Create(), Create(id="c")]))
    assert isinstance(answer, Response)
    assert answer.status == 201
    assert [job.id for job in answer.data.jobs][::2] == ["a", "c"]
    assert [job.seq for job in desk.rows.values()] == [1, 2, 3]
    refusal = desk.reject(Bulk(jobs=[Create(id="d"), Create(id="a", queue="other")]), "job_exists")
    assert refusal.details["index"] == 1
    assert refusal.message.startswith("jobs[1]: ")
    assert "d" not in desk.rows
    refusal = desk.reject(Bulk(jobs=[Create(id="d"), Create(), Create(id="e"), Create(id="e")]), "invalid_request")
    assert refusal.details == {"field": "$.jobs"}
    assert refusal.message.startswith("The id e is in the list twice")


def test_a_repeated_bulk_shows_what_it_made(desk: RuleHarness) -> None:
    bulk = Bulk(jobs=[Create(id="a"), Create(id="b")])
    desk.accept(bulk)
    decision = desk.decide(Bulk(jobs=[Create(id="c"), Create(id="b")]))
    assert not isinstance(decision.answer, ApiError)
    assert [job.id for job in decision.answer.data.jobs] == ["c", "b"]
    assert [seq for seq, _ in decision.answer.unread_payloads] == [2]
    assert not desk.decide(bulk).changes


def test_a_bulk_counts_its_own_jobs_towards_the_limit() -> None:
    desk = RuleHarness(Policy(live_jobs=2))
    assert desk.reject(Bulk(jobs=[Create(), Create(), Create()]), "too_many_jobs").details == {"limit": 2, "index": 2}


def test_a_refused_bulk_names_the_field_by_its_path(desk: RuleHarness) -> None:
    refusal = desk.reject(Bulk(jobs=[Create(), Create(expires_at=NOW)]), "invalid_request")
    assert refusal.details == {"field": "$.jobs[1].expires_at", "index": 1}
    assert len(desk.accept(Bulk(jobs=[Create(), Create()])).jobs) == 2


# -- start ------------------------------------------------------------------------------------------------------------


def test_a_grant_sets_all_that_it_has_to(desk: RuleHarness) -> None:
    desk.create()
    desk.advance(5)
    granted = desk.accept(Start(id="a", worker="w-1"))
    job = desk.job()
    assert (job.status, job.progress, job.attempt) == ("processing", 0, 1)
    assert job.started_at == job.updated_at == NOW + 5
    assert job.lease == Lease(desk.lease + TTL, desk.lease + STUCK, desk.lease + CEILING)
    assert job.grant is not None
    assert job.grant.fencing_token == granted.fencing_token == (1 << 24) | 1  # as stores and workers have them
    assert (granted.lock_id, granted.ttl_ms) == (job.grant.lock_id, TTL)
    assert (granted.lock_expires_at, granted.ceiling_at) == (NOW + 5 + TTL, NOW + 5 + CEILING)
    assert granted.job.lock.lock_id is msgspec.UNSET
    assert desk.last().by == "worker:w-1"
    assert "lock_id" not in str(desk.last().details)


def test_an_admin_sees_the_lock_id(desk: RuleHarness) -> None:
    lock_id = desk.held()
    assert desk.accept(Get(id="a"), admin=True).lock.lock_id == lock_id
    assert desk.accept(Get(id="a")).lock.lock_id is msgspec.UNSET


def test_an_admin_sees_it_in_every_answer_with_the_job(desk: RuleHarness) -> None:
    lock_id = desk.accept(Bulk(jobs=[Create(id="a")])) and desk.start()
    assert desk.accept(Create(id="a"), admin=True).lock.lock_id == lock_id
    assert desk.accept(Bulk(jobs=[Create(id="a")]), admin=True).jobs[0].lock.lock_id == lock_id
    desk.accept(Release(id="a", lock_id=lock_id))
    (granted,) = desk.accept(Claim(worker="w"), admin=True).grants
    assert granted.job.lock.lock_id == granted.lock_id


def test_a_grant_takes_its_own_times_before_those_of_job_and_policy(desk: RuleHarness) -> None:
    desk.create(stuck_after_ms=7, max_processing_ms=2_000)
    desk.start(lock_ttl_ms=1_000, stuck_after_ms=0)
    grant, lease = desk.job().grant, desk.job().lease
    assert grant is not None
    assert (grant.ttl_ms, grant.stuck_after_ms, grant.max_processing_ms) == (1_000, 0, 2_000)
    assert lease == Lease(desk.lease + 1_000, desk.lease, desk.lease + 2_000)
    desk.create("b", stuck_after_ms=7)
    desk.start("b")
    grant = desk.job("b").grant
    assert grant is not None
    assert grant.stuck_after_ms == 7
    desk.create("c")
    desk.claim(lock_ttl_ms=1_000, stuck_after_ms=2)
    grant = desk.job("c").grant
    assert grant is not None
    assert (grant.ttl_ms, grant.stuck_after_ms) == (1_000, 2)


def test_a_lock_is_cut_to_its_ceiling(desk: RuleHarness) -> None:
    desk.create(max_processing_ms=500)
    granted = desk.accept(Start(id="a", worker="w", lock_ttl_ms=1_000))
    assert granted.lock_expires_at == granted.ceiling_at == NOW + 500


@pytest.mark.parametrize("by", ["start", "claim"])
@pytest.mark.parametrize(
    ("creator", "asked", "holds"),
    [
        (None, None, CEILING),
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
def test_the_ceiling_is_that_of_the_creator_else_of_the_grant_else_of_the_configuration(
    desk: RuleHarness, by: str, creator: int | None, asked: int | None, holds: int
) -> None:
    desk.create(max_processing_ms=creator)
    if by == "start":
        granted = desk.accept(Start(id="a", worker="w", max_processing_ms=asked))
    else:
        (granted,) = desk.accept(Claim(worker="w", max_processing_ms=asked)).grants
    assert granted.ceiling_at == (desk.now + holds if holds else None)
    assert granted.job.max_processing_ms == holds
    assert granted.lock_expires_at == desk.now + (min(TTL, holds) if holds else TTL)
    view = desk.progress(granted.lock_id)
    assert view.ceiling_at == granted.ceiling_at
    desk.accept(Release(id="a", lock_id=granted.lock_id))
    assert desk.accept(Get(id="a")).max_processing_ms == (CEILING if creator is None else creator), (
        "it was of that grant"
    )


def test_without_a_ceiling_a_lock_lives_as_long_as_it_is_extended(desk: RuleHarness) -> None:
    desk.create()
    lock_id = desk.start(lock_ttl_ms=MINUTE_MS, stuck_after_ms=0, max_processing_ms=0)
    for _ in range(3 * 60):
        desk.advance(MINUTE_MS - 1)
        assert desk.accept(Extend(id="a", lock_id=lock_id)).lock_expires_at == desk.now + MINUTE_MS
    desk.advance(MINUTE_MS)
    desk.accept(Recover(limit=1))
    assert desk.job().status == "queued", "it counts as stuck only when nothing is heard"


def test_without_a_ceiling_there_is_none(desk: RuleHarness) -> None:
    desk.create(**no_ceiling())
    assert desk.accept(Start(id="a", worker="w")).ceiling_at is None


def test_start_judges_due_before_paused(desk: RuleHarness) -> None:
    desk.create(delay_ms=10)
    desk.accept(Pause(name="default"))
    assert desk.reject(Start(id="a", worker="w"), "not_due").details == {"run_at": NOW + 10, "retry_after_ms": 10}
    desk.advance(9)
    desk.reject(Start(id="a", worker="w"), "not_due")
    desk.advance(1)
    assert desk.reject(Start(id="a", worker="w"), "queue_paused").details == {
        "queue": "default",
        "paused": True,
        "paused_at": NOW,
        "paused_by": "client",
        "pause_reason": None,
        "paused_until": None,
    }
    desk.accept(Resume(name="default"))
    desk.start()


def test_a_held_job_is_already_locked(desk: RuleHarness) -> None:
    desk.held(worker="w-7", stuck_after_ms=20 * MINUTE_MS)
    refusal = desk.reject(Start(id="a", worker="w"), "already_locked")
    assert refusal.details == {"locked_by": "w-7", "lock_expires_at": NOW + TTL, "retry_after_ms": TTL}
    desk.advance(TTL)  # the lock has expired; now it is the time to recovery that counts
    refusal = desk.reject(Start(id="a", worker="w"), "already_locked")
    assert refusal.details["retry_after_ms"] == 5 * MINUTE_MS
    desk.advance(5 * MINUTE_MS - 1)
    assert desk.reject(Start(id="a", worker="w"), "already_locked").details["retry_after_ms"] == 1


def test_a_held_job_is_locked_for_a_worker_of_the_same_name_too(desk: RuleHarness) -> None:
    desk.held(worker="w-1")
    assert desk.reject(Start(id="a", worker="w-1"), "already_locked").details["locked_by"] == "w-1"


def test_a_stuck_job_is_recovered_first_then_started(desk: RuleHarness) -> None:
    old = desk.held()
    desk.advance(TTL)
    assert desk.start(worker="w-2") != old
    assert desk.types() == ["created", "granted", "stalled", "granted"]
    assert (desk.job().attempt, desk.job().stalls) == (1, 1)


def test_a_stuck_job_that_fails_by_recovery_is_not_started(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.progress(lock_id, 45)
    desk.advance(TTL)
    decision = desk.decide(Start(id="a", worker="w-2"))
    assert isinstance(decision.answer, ApiError)
    assert decision.answer.code == "invalid_transition"
    assert "No update from worker w-1" in decision.answer.message
    assert [change.event.type for change in decision.changes] == ["stalled"]
    assert desk.job().status == "failed"


def test_an_overdue_job_fails_by_the_command_that_meets_it(desk: RuleHarness) -> None:
    desk.create("a", expires_at=NOW + 10)
    desk.create("b", expires_at=NOW + 10, priority=-1)
    desk.create("c")
    desk.advance(10)
    decision = desk.decide(Start(id="a", worker="w"))
    assert isinstance(decision.answer, ApiError)
    assert decision.answer.code == "invalid_transition"
    job = desk.job("a")
    assert job.error is not None
    assert (job.status, job.error.code, job.expires_at) == ("failed", "expired", desk.now + 30 * DAY_MS)
    assert (desk.last().type, desk.last().reason) == ("expired", job.error.message)
    assert desk.claim(limit=5) == ["c"]
    assert desk.job("b").status == "queued"


def test_a_job_that_nobody_took_says_so_and_nothing_of_an_error_without_words(desk: RuleHarness) -> None:
    desk.create(expires_at=NOW + 10)
    desk.row(replace(desk.job(), error=Failure(None, "odd")))
    desk.advance(10)
    assert desk.accept(Expire(limit=1)).done == 1
    error = desk.job().error
    assert error is not None
    assert error.message == (
        "Its expires_at passed before a worker took the job. Create it again if it is still needed."
    )


def test_a_job_that_expires_while_it_waits_for_another_try_says_what_the_last_one_failed_of(desk: RuleHarness) -> None:
    lock_id = desk.held(expires_at=NOW + 10, max_attempts=3)
    desk.advance(10)
    desk.accept(Fail(id="a", lock_id=lock_id, error_message="the disk exploded" + "!" * 600))
    assert desk.accept(Expire(limit=1)).done == 1
    error = desk.job().error
    assert error is not None
    assert error.message is not None
    assert error.message.startswith("Its expires_at passed while it waited for a retry.")
    assert error.message.endswith("Its last attempt failed: the disk exploded" + "!" * (500 - 17))
    assert error.code == "expired"


def test_operators_meet_an_overdue_job_as_one_that_has_failed(desk: RuleHarness) -> None:
    for job_id in "abcd":
        desk.create(job_id, expires_at=NOW + 10)
    desk.advance(10)
    for command in (RunNow(id="a"), Transition(id="b", from_="queued", to="completed")):
        refusal = desk.ask(command, admin=True)
        assert isinstance(refusal, ApiError)
        assert (refusal.code, refusal.details["status"]) == ("invalid_transition", "failed")
    admin(desk, Update(id="c", priority=3))
    assert [desk.job(job_id).status for job_id in "abc"] == ["failed"] * 3
    assert admin(desk, ForceReset(id="d", reason="still wanted")).previous_status == "failed"
    assert (desk.job("d").status, desk.job("d").expires_at, desk.job("d").error) == ("queued", None, None)


def test_time_ends_an_overdue_job_whoever_comes_by(desk: RuleHarness) -> None:
    for job_id in "ab":
        desk.create(job_id, expires_at=NOW + 10)
    desk.advance(10)
    changes = desk.decide(Start(id="a", worker="w"), by="worker:w").changes
    assert [(change.event.type, change.event.by) for change in changes] == [("expired", "daemon")]
    assert not desk.decide(Claim(worker="w"), by="worker:w").changes


def test_who_resets_a_job_at_work_past_its_expiry_wants_it_all_the_same(desk: RuleHarness) -> None:
    desk.held("a", expires_at=NOW + 10)
    desk.held("b", expires_at=NOW + 11)
    desk.advance(10)
    for job_id in "ab":
        admin(desk, ForceReset(id=job_id, reason="hangs"))
    assert (desk.job("a").expires_at, desk.job("b").expires_at) == (None, NOW + 11)
    desk.held("c", expires_at=NOW + 20)
    desk.advance(10)
    admin(desk, Transition(id="c", from_="processing", to="queued"))
    assert (desk.job("c").status, desk.job("c").expires_at) == ("queued", None)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_finished_job_is_not_started(desk: RuleHarness, status: Any) -> None:
    desk.accept(Import(id="a", status=status, error_message="why" if status == "failed" else None))
    refusal = desk.reject(Start(id="a", worker="w"), "invalid_transition")
    assert refusal.details == {"status": status, "to": "processing", "allowed": ALLOWED[status]}
    why = " (why)" if status == "failed" else ""
    assert refusal.message == f"Job a is {status}. Only a queued job can be started{why}."


def test_a_job_that_failed_without_words_is_not_started_either(desk: RuleHarness) -> None:
    desk.accept(Import(id="a", status="failed", error_code="E"))
    assert desk.reject(Start(id="a", worker="w"), "invalid_transition").message.endswith("can be started.")


def test_an_unknown_job_is_not_found(desk: RuleHarness) -> None:
    named: list[AnyCommand] = [
        Get(id="x"), GetVersion(id="x"), Timeline(id="x"), Why(id="x"), Validate(id="x"), Start(id="x", worker="w"),
        Cancel(id="x"), Progress(id="x", lock_id="l", progress=1), Extend(id="x", lock_id="l"),
        Complete(id="x", lock_id="l"),
        Fail(id="x", lock_id="l", error_message="e"), Release(id="x", lock_id="l"), Undelivered(id="x", lock_id="l"),
        ForceFail(id="x"), ForceReset(id="x"), Transition(id="x", from_="queued", to="failed"),
        ExtendLock(id="x", lock_id="l"), ReleaseLock(id="x", lock_id="l"), RunNow(id="x"), Update(id="x"),
        Delete(id="x"),
    ]  # fmt: skip
    for command in named:
        refusal = desk.reject(command, "job_not_found")
        assert (refusal.status, refusal.details) == (404, {"job_id": "x"})


# -- claim ------------------------------------------------------------------------------------------------------------


def test_claims_take_by_priority_then_run_at_then_creation(desk: RuleHarness) -> None:
    desk.create("late", delay_ms=2)
    desk.create("second")
    desk.create("third")
    desk.create("first", priority=-1)
    desk.create("last", priority=1)
    desk.create("elsewhere", queue="other", priority=-9)
    desk.advance(2)
    assert desk.claim(limit=4) == ["first", "second", "third", "late"]
    assert desk.claim(limit=100) == ["last"]
    assert desk.claim() == []


def test_claims_merge_queues_and_filter_kinds(desk: RuleHarness) -> None:
    desk.create("a", queue="x", kind="k")
    desk.create("b", queue="y", kind="l")
    desk.create("c", queue="x", kind="l")
    desk.create("d", queue="y", kind="k", priority=-1)
    assert desk.claim(queues=["x", "y", "x", "z"], kinds=["k"], limit=1) == ["d"]
    assert desk.claim(queues=["x", "y"], kinds=["l", "l"], limit=9) == ["b", "c"]
    assert desk.claim(queues=["x", "y"], kinds=["none"]) == []
    assert desk.claim(queues=["y", "x"], limit=9) == ["a"]


def test_claims_leave_paused_queues_alone(desk: RuleHarness) -> None:
    desk.create("a")
    desk.create("b", queue="y")
    desk.accept(Pause(name="default"))
    assert desk.claim(queues=["default", "y"], limit=9) == ["b"]
    desk.accept(Resume(name="default"))
    assert desk.claim(queues=["default", "y"], limit=9) == ["a"]


def test_every_token_is_greater_than_the_one_before(desk: RuleHarness) -> None:
    for name in "abc":
        desk.create(name)
    granted = desk.accept(Claim(worker="w", limit=3)).grants
    assert [grant.fencing_token & 0xFF for grant in granted] == [1, 2, 3]
    assert len({grant.lock_id for grant in granted}) == 3
    desk.accept(ForceReset(id="a"))
    assert desk.accept(Start(id="a", worker="w")).fencing_token & 0xFF == 4


# -- progress and extend ----------------------------------------------------------------------------------------------


def test_progress_renews_lock_silence_and_ceiling(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.advance(MINUTE_MS)
    state = desk.accept(Progress(id="a", lock_id=lock_id, progress=12.5, message="half"))
    assert (state.lock_expires_at, state.ttl_ms, state.ceiling_at) == (desk.now + TTL, TTL, desk.now + CEILING)
    assert state.cancel_requested is False
    assert state.extended is msgspec.UNSET
    job = desk.job()
    assert (job.progress, job.progress_message, job.updated_at) == (12.5, "half", desk.now)
    assert job.lease == Lease(desk.lease + TTL, desk.lease + STUCK, desk.lease + CEILING)
    assert desk.last().details == {"progress": 12.5, "message": "half"}
    desk.progress(lock_id, 42.0)
    assert repr(desk.job().progress) == "42"
    assert desk.job().progress_message is None


def test_progress_gives_a_ceiling_to_a_row_that_lacks_it(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.row(replace(desk.job(), lease=Lease(desk.lease + 5, desk.lease + 5, None)))
    assert desk.progress(lock_id).ceiling_at == NOW + CEILING


def test_progress_never_shortens_a_lock(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.accept(Extend(id="a", lock_id=lock_id, additional_ms=20 * MINUTE_MS))
    assert desk.progress(lock_id).lock_expires_at == NOW + 20 * MINUTE_MS


def test_extend_means_at_least_this_long_from_now(desk: RuleHarness) -> None:
    lock_id = desk.held()
    assert desk.accept(Extend(id="a", lock_id=lock_id, additional_ms=1)).extended is False
    assert desk.job().updated_at == desk.now
    state = desk.accept(Extend(id="a", lock_id=lock_id, additional_ms=TTL + 1))
    assert (state.extended, state.lock_expires_at) == (True, NOW + TTL + 1)
    desk.advance(2)
    assert desk.accept(Extend(id="a", lock_id=lock_id)).lock_expires_at == desk.now + TTL
    assert desk.job().lease == Lease(desk.lease + TTL, desk.lease + STUCK, desk.lease - 2 + CEILING)


def test_an_extension_is_cut_to_the_ceiling_which_only_progress_moves(desk: RuleHarness) -> None:
    lock_id = desk.held()
    state = desk.accept(Extend(id="a", lock_id=lock_id, additional_ms=DAY_MS))
    assert state.lock_expires_at == state.ceiling_at == NOW + CEILING
    assert desk.accept(Extend(id="a", lock_id=lock_id, additional_ms=DAY_MS)).extended is False
    desk.advance(CEILING - 1)
    desk.progress(lock_id)
    state = desk.accept(Extend(id="a", lock_id=lock_id, additional_ms=DAY_MS))
    assert state.lock_expires_at == state.ceiling_at == desk.now + CEILING


def test_at_the_ceiling_only_endings_are_taken(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.accept(Extend(id="a", lock_id=lock_id, additional_ms=DAY_MS))
    desk.advance(CEILING)
    assert "a" in desk.book.stuck
    for command in (Extend(id="a", lock_id=lock_id), Progress(id="a", lock_id=lock_id, progress=1)):
        refusal = desk.reject(command, "max_processing_time_exceeded")
        assert refusal.details == {"max_processing_ms": CEILING, "ceiling_at": desk.now}
        assert "max_processing" in refusal.message
    desk.accept(Complete(id="a", lock_id=lock_id))


def test_an_expired_lock_still_belongs_to_its_holder(desk: RuleHarness) -> None:
    lock_id = desk.held(stuck_after_ms=HOUR_MS, **no_ceiling())
    desk.advance(TTL)
    assert desk.job().lease is not None
    assert not desk.job().lease.is_live(desk.lease)  # type: ignore[union-attr]
    desk.accept(Recover(limit=9))
    assert desk.types()[-1] == "lock_expired"
    assert desk.accept(Get(id="a")).lock is None
    desk.accept(Extend(id="a", lock_id=lock_id))
    assert desk.accept(Get(id="a")).lock.expires_at == desk.now + TTL
    desk.advance(TTL)
    desk.accept(Recover(limit=9))
    desk.progress(lock_id)
    assert desk.book.live_locks() == 1


# -- endings ----------------------------------------------------------------------------------------------------------


def test_complete(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.advance(7)
    metadata = Raw(b'{"frames":3}')
    done = Complete(
        id="a", lock_id=lock_id, download_url="https://x/y", file_path="/f", storage_key="k/1", metadata=metadata
    )
    view = desk.accept(done)
    assert (view.status, view.progress, view.download_url, view.file_path) == ("completed", 100, "https://x/y", "/f")
    assert (view.storage_key, view.metadata, view.lock, view.error_message) == ("k/1", metadata, None, None)
    assert (view.finished_at, view.expires_at) == (desk.now, desk.now + 7 * DAY_MS)
    assert desk.last().by == "worker:w-1"


def test_complete_clears_the_error_and_takes_null_as_nothing(desk: RuleHarness) -> None:
    lock_id = desk.held(max_attempts=2)
    desk.accept(Fail(id="a", lock_id=lock_id, error_message="once", retry_after_ms=0))
    assert desk.job().error == Failure("once")
    desk.accept(Complete(id="a", lock_id=desk.start(), metadata=Raw(b"null")))
    assert desk.job().error is None
    assert desk.job().result is None


def test_complete_may_say_when_it_is_deleted(desk: RuleHarness) -> None:
    lock_id = desk.held()
    bad = Complete(id="a", lock_id=lock_id, expires_at=NOW)
    assert desk.reject(bad, "invalid_request").details == {"field": "$.expires_at"}
    assert desk.accept(Complete(id="a", lock_id=lock_id, expires_at=NOW + 1)).expires_at == NOW + 1


@pytest.mark.parametrize("key", ["/etc/x", "\\x", "a/../b", "..", "a\\..\\b", "a\x00b"])
def test_a_storage_key_is_relative(desk: RuleHarness, key: str) -> None:
    lock_id = desk.held()
    refusal = desk.reject(Complete(id="a", lock_id=lock_id, storage_key=key), "invalid_request")
    assert refusal.details == {"field": "$.storage_key"}


def test_a_download_url_may_be_required() -> None:
    desk = RuleHarness(Policy(require_download_url=True))
    lock_id = desk.held()
    refusal = desk.reject(Complete(id="a", lock_id=lock_id, file_path="/f"), "invalid_request")
    assert (refusal.status, refusal.details) == (400, {"field": "$.download_url"})
    desk.accept(Complete(id="a", lock_id=lock_id, download_url="u"))


def test_fail_without_attempts_left(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.progress(lock_id, 30)
    view = desk.accept(Fail(id="a", lock_id=lock_id, error_message="boom", error_code="E"))
    assert (view.status, view.error_message, view.error_code, view.progress) == ("failed", "boom", "E", 30)
    assert (view.attempt, view.expires_at) == (1, NOW + 30 * DAY_MS)


def test_fail_with_attempts_left_goes_back_later(desk: RuleHarness) -> None:
    lock_id = desk.held(max_attempts=3, backoff=Backoff("exponential", 1_000, 1_500, False))
    desk.progress(lock_id, 30)
    view = desk.accept(Fail(id="a", lock_id=lock_id, error_message="boom"))
    assert (view.status, view.run_at, view.attempt, view.progress) == ("queued", NOW + 1_000, 1, 0)
    assert (view.started_at, view.finished_at, view.error_message) == (None, None, "boom")
    desk.advance(1_000)
    lock_id = desk.start()
    assert desk.accept(Fail(id="a", lock_id=lock_id, error_message="boom")).run_at == desk.now + 1_500
    desk.advance(1_500)
    lock_id = desk.start()
    assert desk.job().attempt == 3
    assert desk.accept(Fail(id="a", lock_id=lock_id, error_message="boom")).status == "failed"


def test_the_worker_may_say_when_or_never(desk: RuleHarness) -> None:
    lock_id = desk.held(max_attempts=3)
    assert desk.accept(Fail(id="a", lock_id=lock_id, error_message="e", retry_after_ms=5)).run_at == NOW + 5
    desk.advance(5)
    assert desk.accept(Fail(id="a", lock_id=desk.start(), error_message="e", retry=False)).status == "failed"


@pytest.mark.parametrize(
    ("backoff", "attempt", "fraction", "expected"),
    [
        (Backoff("fixed", 10, 100, False), 1, 0.5, 10),
        (Backoff("fixed", 10, 100, False), 9, 0.5, 10),
        (Backoff("fixed", 500, 100, False), 1, 0.5, 100),
        (Backoff("exponential", 10, 1_000, False), 1, 0.5, 10),
        (Backoff("exponential", 10, 1_000, False), 2, 0.5, 20),
        (Backoff("exponential", 10, 1_000, False), 7, 0.5, 640),
        (Backoff("exponential", 10, 1_000, False), 8, 0.5, 1_000),
        (Backoff("exponential", 10, 1_000, False), 1_000, 0.5, 1_000),
        (Backoff("exponential", 10, 1_000, False), 0, 0.5, 10),  # a row made by hand
        (Backoff("exponential", 10, 1_000, True), 2, 0.5, 10),
        (Backoff("exponential", 10, 1_000, True), 2, 0.0, 0),
        (Backoff("exponential", 0, 0, True), 2, 0.9, 0),
    ],
)
def test_backoff(backoff: Backoff, attempt: int, fraction: float, expected: int) -> None:
    assert worker_rules.backoff_ms(backoff, attempt, fraction) == expected


def test_jitter_comes_from_the_seed() -> None:
    """The same command on the same book at the same time gives the same outcome."""
    waits = set()
    for _ in range(2):
        desk = RuleHarness()
        lock_id = desk.held(max_attempts=2, backoff=Backoff("fixed", DAY_MS, DAY_MS, True))
        waits.add(desk.accept(Fail(id="a", lock_id=lock_id, error_message="e")).run_at - NOW)
    assert len(waits) == 1
    assert 0 <= waits.pop() <= DAY_MS


def test_release_gives_the_place_and_the_attempt_back(desk: RuleHarness) -> None:
    desk.create("a")
    desk.create("b")
    desk.advance(5)
    lock_id = desk.start("a")
    desk.progress(lock_id, 50)
    view = desk.accept(Release(id="a", lock_id=lock_id))
    assert (view.status, view.run_at, view.attempt, view.progress) == ("queued", NOW, 0, 0)
    assert desk.claim() == ["a"]


def test_only_the_attempt_of_the_current_grant_is_given_back(desk: RuleHarness) -> None:
    lock_id = desk.held(max_attempts=3)
    desk.accept(Fail(id="a", lock_id=lock_id, error_message="e", retry_after_ms=0))
    assert desk.accept(Release(id="a", lock_id=desk.start())).attempt == 1


def test_what_was_reported_goes_with_its_grant(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.accept(Progress(id="a", lock_id=lock_id, progress=50, message="half"))
    view = desk.accept(Release(id="a", lock_id=lock_id))
    assert (view.progress, view.progress_message) == (0, None)
    desk.accept(Import(id="b", progress=50, progress_message="half"))
    desk.start("b")
    assert (desk.job("b").progress, desk.job("b").progress_message) == (0, None)


def test_the_last_ended_grant_is_known_until_another_ends(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.accept(Release(id="a", lock_id=lock_id))
    desk.accept(Cancel(id="a"))
    assert desk.accept(Release(id="a", lock_id=lock_id)).repeated is True


def test_an_event_names_only_what_changes(desk: RuleHarness) -> None:
    desk.create()
    desk.accept(Cancel(id="a"))
    changes = desk.last().changes
    assert changes is not None
    named = {name for name in changes.__struct_fields__ if getattr(changes, name) is not msgspec.UNSET}
    assert named == {"status", "finished_at", "expires_at", "updated_at"}


@pytest.mark.parametrize("left", [{"lease": None}, {"grant": None}])
def test_half_a_lock_goes_with_the_job_that_it_is_on(desk: RuleHarness, left: dict[str, Any]) -> None:
    desk.held()
    desk.row(replace(desk.job(), **left))
    desk.accept(Cancel(id="a"))
    assert (desk.job().grant, desk.job().lease) == (None, None)


def test_a_job_ends_after_it_began_whatever_the_wall_clock_says(desk: RuleHarness) -> None:
    desk.create()
    desk.advance(10)
    lock_id = desk.start()
    desk.now -= 5
    assert desk.accept(Complete(id="a", lock_id=lock_id)).finished_at == NOW + 10


@pytest.mark.parametrize("end", ["recovery", "undelivered"])
def test_what_ends_a_grant_without_the_holder_keeps_the_place(desk: RuleHarness, end: str) -> None:
    desk.create("a")
    desk.create("b")
    desk.advance(5)
    lock_id = desk.start("a")
    desk.advance(TTL)
    desk.accept(Recover(limit=1) if end == "recovery" else Undelivered(id="a", lock_id=lock_id))
    assert (desk.job("a").status, desk.job("a").run_at) == ("queued", NOW)
    assert desk.claim() == ["a"]


def test_release_may_ask_for_a_delay(desk: RuleHarness) -> None:
    lock_id = desk.held()
    assert desk.accept(Release(id="a", lock_id=lock_id, delay_ms=9)).run_at == NOW + 9
    desk.advance(9)
    desk.advance(1)
    assert desk.accept(Release(id="a", lock_id=desk.start(), delay_ms=0)).run_at == NOW + 10


DELAYS: Final = [0, 0, 0, 0, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000]


def released(desk: RuleHarness, times: int, job_id: str = "a", **fields: Any) -> JobView:
    """The job after so many more rounds of start and release."""
    view: JobView
    for _ in range(times):
        desk.advance(max(desk.job(job_id).run_at - desk.now, 0))
        view = desk.accept(Release(id=job_id, lock_id=desk.start(job_id), **fields))
    return view


def test_from_the_fifth_release_in_a_row_without_progress_on_the_job_waits_longer_each_time(desk: RuleHarness) -> None:
    desk.create()
    desk.advance(10)
    for number, delay_ms in enumerate(DELAYS, 1):
        view = released(desk, 1)
        assert (view.status, view.attempt) == ("queued", 0)
        assert view.run_at == (desk.now + delay_ms if delay_ms else NOW), number
        assert desk.job().releases == number
    assert release_delay_ms(1_000_000) == MINUTE_MS


def test_the_event_of_a_delayed_release_says_why_the_job_waits(desk: RuleHarness) -> None:
    desk.create()
    released(desk, 4)
    assert desk.events[-1].details is None
    released(desk, 1)
    assert desk.events[-1].details == {"releases": 5, "delay_ms": 1_000}


@pytest.mark.parametrize("delay_ms", [0, 1, 999, 5_000])
def test_a_release_with_a_delay_of_its_own_keeps_it(desk: RuleHarness, delay_ms: int) -> None:
    desk.create()
    released(desk, 7, delay_ms=delay_ms)
    assert (desk.job().run_at, desk.job().releases) == (desk.now + delay_ms, 7)
    released(desk, 1)
    assert desk.job().run_at == desk.now + 8_000, "the next one without a delay counts those before"


def test_a_repeated_release_is_answered_and_counts_once(desk: RuleHarness) -> None:
    desk.create()
    released(desk, 4)
    lock_id = desk.start()
    first = desk.accept(Release(id="a", lock_id=lock_id))
    again = desk.accept(Release(id="a", lock_id=lock_id))
    assert (again.repeated, again.run_at, desk.job().releases) == (True, first.run_at, 5)


def test_an_operators_release_counts_as_the_holders(desk: RuleHarness) -> None:
    desk.create()
    released(desk, 4)
    admin(desk, ReleaseLock(id="a", lock_id=desk.start()))
    assert (desk.job().releases, desk.job().run_at) == (5, desk.now + 1_000)


@pytest.mark.parametrize(
    ("between", "count"),
    [
        (lambda lock: [Progress(id="a", lock_id=lock, progress=0.1)], 0),
        (lambda lock: [Progress(id="a", lock_id=lock, progress=0, message="getting ready")], 6),
        (lambda lock: [Extend(id="a", lock_id=lock)], 6),
        (lambda lock: [Undelivered(id="a", lock_id=lock)], 6),
        (lambda lock: [Fail(id="a", lock_id=lock, error_message="e", retry_after_ms=0)], 0),
        (lambda lock: [Fail(id="a", lock_id=lock, error_message="e", retry=False)], 0),
        (lambda lock: [Complete(id="a", lock_id=lock)], 0),
        (lambda lock: [Cancel(id="a")], 0),
        (lambda lock: [ForceFail(id="a")], 0),
        (lambda lock: [ForceReset(id="a")], 0),
        (lambda lock: [Transition(id="a", from_="processing", to="queued")], 0),
        (lambda lock: [EndGrants(ids=["a"], last=True)], 0),
        (lambda lock: [Undelivered(id="a", lock_id=lock), Update(id="a", priority=1)], 6),
        (lambda lock: [Undelivered(id="a", lock_id=lock), Cancel(id="a"), ForceReset(id="a")], 0),
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
def test_the_events_that_end_a_row_of_releases(desk: RuleHarness, between: Any, count: int) -> None:
    desk.create(max_attempts=9)
    released(desk, 6)
    desk.advance(2_000)
    for command in between(desk.start()):
        admin(desk, command)
    assert desk.job().releases == count


def test_a_stall_ends_a_row_of_releases(desk: RuleHarness) -> None:
    desk.create()
    released(desk, 6)
    desk.advance(2_000)
    desk.start(lock_ttl_ms=1_000, stuck_after_ms=0)
    desk.advance(1_000)
    desk.accept(Recover(limit=1))
    assert (desk.job().status, desk.job().releases) == ("queued", 0)
    assert desk.job().run_at <= desk.now, "recovery keeps the place"


def test_jobs_that_are_released_in_a_loop_are_known(desk: RuleHarness) -> None:
    """The book names them without looking at the others, through grants, restarts and whatever ends the loop."""
    for job_id in "abc":
        desk.create(job_id)
    loops = desk.book.release_loops
    released(desk, LOOP_FROM - 1, "a", delay_ms=999)
    assert loops == {}
    released(desk, 1, "a", delay_ms=999)
    assert loops == {"a": 20}
    desk.advance(999)
    lock_id = desk.start("a")
    assert loops == {"a": 20}, "also while a worker holds it"
    desk.accept(Undelivered(id="a", lock_id=lock_id))
    assert loops == {}, "the delay before it is not known any more"
    released(desk, 1, "a", delay_ms=0)
    assert loops == {"a": 21}
    released(desk, LOOP_FROM + 5, "b")
    assert loops == {"a": 21}, "this one waits a minute each time"
    admin(desk, ReleaseLock(id="a", lock_id=desk.start("a")))
    assert loops == {}, "so does this one now"
    released(desk, 1, "a", delay_ms=0)
    released(desk, 1, "a", delay_ms=1_000)
    assert loops == {}
    released(desk, LOOP_FROM, "c", delay_ms=0)
    assert loops == {"c": 20}
    opened = OpenedStore(desk.book.numbers(desk.lease, desk.now, False), [desk.job(job_id) for job_id in "abc"])
    assert Book.opened(opened).release_loops == {"c": 20}
    desk.accept(Progress(id="c", lock_id=desk.start("c"), progress=1))
    assert loops == {}


@pytest.mark.parametrize(
    "command", [Cancel(id="a"), ForceFail(id="a"), Transition(id="a", from_="queued", to="completed")], ids=str
)
def test_a_finished_job_is_in_no_loop(desk: RuleHarness, command: Any) -> None:
    desk.create()
    released(desk, LOOP_FROM, delay_ms=0)
    assert desk.book.release_loops
    admin(desk, command)
    assert desk.book.release_loops == {}


def test_cancel_ends_a_grant_at_once(desk: RuleHarness) -> None:
    lock_id = desk.held()
    view = desk.accept(Cancel(id="a", reason="not wanted"))
    assert (view.status, view.expires_at, view.lock) == ("cancelled", NOW + 7 * DAY_MS, None)
    assert desk.last().reason == "not wanted"
    refusal = desk.reject(Progress(id="a", lock_id=lock_id, progress=1), "lock_lost")
    assert refusal.details["reason"] == "cancelled"
    assert refusal.details["cancel_requested"] is True
    desk.create("b")
    assert desk.accept(Cancel(id="b")).status == "cancelled"
    for name in "ab":
        assert desk.reject(Cancel(id=name), "invalid_transition").details["to"] == "cancelled"


# -- what the journal says --------------------------------------------------------------------------------------------

LOCKED_UNTIL = {"lock_expires_at": NOW + TTL}
UNSENT = "The connection closed before the grant was sent."

# What is done with a job that worker w-1 holds in its first of two attempts, by whom, and what the journal says of it.
WRITTEN: list[tuple[Any, str, tuple[Any, ...]]] = [
    (
        Progress(id="a", lock_id="L", progress=1),
        "client",
        ("progress", "processing", "worker:w-1", None, {"progress": 1}),
    ),
    (Extend(id="a", lock_id="L"), "client", ("extended", "processing", "worker:w-1", None, LOCKED_UNTIL)),
    (ExtendLock(id="a", lock_id="L"), "admin", ("extended", "processing", "admin", None, LOCKED_UNTIL)),
    (Complete(id="a", lock_id="L"), "client", ("completed", "completed", "worker:w-1", None, None)),
    (
        Fail(id="a", lock_id="L", error_message="e", retry_after_ms=5),
        "client",
        ("retried", "queued", "worker:w-1", "e", {"attempt": 1, "run_at": NOW + 5}),
    ),
    (
        Fail(id="a", lock_id="L", error_message="e", retry=False),
        "client",
        ("failed", "failed", "worker:w-1", "e", None),
    ),
    (Release(id="a", lock_id="L"), "client", ("released", "queued", "worker:w-1", None, None)),
    (ReleaseLock(id="a", lock_id="L"), "admin", ("released", "queued", "admin", None, None)),
    (Undelivered(id="a", lock_id="L"), "daemon", ("undelivered", "queued", "daemon", UNSENT, None)),
    (Cancel(id="a", reason="r"), "client", ("cancelled", "cancelled", "client", "r", None)),
    (ForceFail(id="a", reason="r"), "admin", ("force_failed", "failed", "admin", "r", None)),
    (ForceReset(id="a", reason="r"), "admin", ("force_reset", "queued", "admin", "r", None)),
    (
        Transition(id="a", from_="processing", to="queued", reason="r"),
        "admin",
        ("transitioned", "queued", "admin", "r", None),
    ),
    (
        Transition(id="a", from_="processing", to="failed", reason="r"),
        "admin",
        ("transitioned", "failed", "admin", "r", None),
    ),
    (
        Transition(id="a", from_="processing", to="completed", reason="r"),
        "admin",
        ("transitioned", "completed", "admin", "r", None),
    ),
    (
        Update(id="a", priority=3, run_at=9),
        "admin",
        ("updated", "processing", "admin", None, {"priority": 3, "run_at": 9}),
    ),
]


@pytest.mark.parametrize(("command", "by", "written"), WRITTEN, ids=lambda part: type(part).__name__)
def test_the_journal_says_what_was_done_by_whom_and_why(desk: RuleHarness, command: Any, by: str, written: Any) -> None:
    lock_id = desk.held(max_attempts=2)
    if hasattr(command, "lock_id"):
        command = replace(command, lock_id=lock_id)
    event = desk.decide(command, admin=by == "admin", by=by).changes[-1].event
    assert (event.type, event.after, event.by, event.reason, event.details) == written
    assert (event.at, event.job_seq, event.job_id, event.queue, event.before) == (NOW, 1, "a", "default", "processing")


def test_the_journal_says_how_a_job_began_waited_and_went(desk: RuleHarness) -> None:
    desk.accept(Create(id="a", queue="q", delay_ms=5), by="client")
    desk.accept(RunNow(id="a"), by="admin")
    desk.accept(Start(id="a", worker="w-1", lock_ttl_ms=3_000))
    desk.accept(Cancel(id="a"))
    desk.accept(Delete(id="a"), by="admin")
    desk.accept(Pause(name="q"), by="admin")
    desk.accept(Resume(name="q"), by="admin")
    granted = {"worker": "w-1", "fencing_token": 1 << TOKEN_COUNTER_BITS | 1, "attempt": 1, "ttl_ms": 3_000}
    told = [(e.type, e.before, e.after, e.by, e.reason, e.details, e.queue) for e in desk.events]
    assert told == [
        ("created", None, "queued", "client", None, None, "q"),
        ("updated", "queued", "queued", "admin", "run now", {"run_at": NOW}, "q"),
        ("granted", "queued", "processing", "worker:w-1", None, granted, "q"),
        ("cancelled", "processing", "cancelled", "client", None, None, "q"),
        ("deleted", "cancelled", None, "admin", None, None, "q"),
        ("queue_paused", None, None, "admin", None, {"since": NOW, "until": None}, "q"),
        ("queue_resumed", None, None, "admin", None, None, "q"),
    ]


# -- who may speak ----------------------------------------------------------------------------------------------------


def holder_commands(lock_id: str) -> list[Any]:
    return [
        Progress(id="a", lock_id=lock_id, progress=1),
        Extend(id="a", lock_id=lock_id),
        Complete(id="a", lock_id=lock_id),
        Fail(id="a", lock_id=lock_id, error_message="e"),
        Release(id="a", lock_id=lock_id),
        ExtendLock(id="a", lock_id=lock_id),
        ReleaseLock(id="a", lock_id=lock_id),
    ]


def test_an_older_grant_is_refused(desk: RuleHarness) -> None:
    old = desk.held()
    desk.advance(TTL)
    desk.start(worker="w-2")
    for command in holder_commands(old):
        refusal = desk.reject(command, "lock_lost")
        kept = {"late_result": desk.late()[0].seq} if isinstance(command, Complete) else {}
        assert refusal.details == kept | {
            "status": "processing",
            "held_by": "w-2",
            "reason": "stalled",
            "at": desk.now,
            "rule": "recovery",
        }
    for command in holder_commands("never-one"):
        refusal = desk.reject(command, "lock_lost")
        assert refusal.details == {
            "status": "processing",
            "held_by": "w-2",
            "reason": "not_current",
            "at": desk.job().updated_at,
            "rule": "the latest grant wins",
        }
        assert "worker w-2 holds the job now" in refusal.message


def test_a_queued_job_has_no_holder(desk: RuleHarness) -> None:
    desk.create()
    for command in holder_commands("x"):
        refusal = desk.reject(command, "lock_lost")
        assert refusal.details["held_by"] is None
        assert "the job is queued" in refusal.message


@pytest.mark.parametrize(
    ("end", "reason", "rule"),
    [
        (ForceFail(id="a"), "force_failed", "force-fail"),
        (ForceReset(id="a"), "force_reset", "force-reset"),
        (Transition(id="a", from_="processing", to="queued"), "transitioned", "transition"),
        (Cancel(id="a"), "cancelled", "cancel"),
        (EndGrants(ids=["a"], last=True), "restored", "restore"),
    ],
)
def test_a_grant_that_others_ended_is_lost(desk: RuleHarness, end: Any, reason: str, rule: str) -> None:
    lock_id = desk.held()
    desk.accept(end, admin=True, by="admin")
    for command in holder_commands(lock_id):
        details = desk.reject(command, "lock_lost").details
        assert (details["reason"], details["rule"], details["at"]) == (reason, rule, NOW)


ENDINGS: dict[str, Any] = {
    "complete": Complete(id="a", lock_id="L", download_url="u"),
    "fail": Fail(id="a", lock_id="L", error_message="e"),
    "release": Release(id="a", lock_id="L"),
}


@pytest.mark.parametrize("verb", ENDINGS)
def test_a_repeated_ending_is_answered_with_the_job_as_it_is(desk: RuleHarness, verb: str) -> None:
    lock_id = desk.held(max_attempts=2)
    ending = replace(ENDINGS[verb], lock_id=lock_id)
    assert desk.accept(ending).repeated is msgspec.UNSET
    decision = desk.decide(ending)
    assert not isinstance(decision.answer, ApiError)
    assert decision.answer.data.repeated is True
    assert not decision.changes
    if verb == "release":  # and still so while somebody else holds the job
        desk.start(worker="w-2")
        again = desk.accept(ending)
        assert (again.repeated, again.lock.worker) == (True, "w-2")


@pytest.mark.parametrize("verb", ENDINGS)
@pytest.mark.parametrize("second", [*ENDINGS, "progress", "extend"])
def test_another_ending_after_the_first_changes_nothing(desk: RuleHarness, verb: str, second: str) -> None:
    lock_id = desk.held(max_attempts=2)
    desk.accept(replace(ENDINGS[verb], lock_id=lock_id))
    others: dict[str, Any] = {
        "complete": Complete(id="a", lock_id=lock_id, download_url="another"),
        "fail": Fail(id="a", lock_id=lock_id, error_message="another"),
        "release": Release(id="a", lock_id=lock_id, delay_ms=1),
        "progress": Progress(id="a", lock_id=lock_id, progress=1),
        "extend": Extend(id="a", lock_id=lock_id),
    }
    if second == "release" and verb != "release":  # a `finally` block
        assert desk.accept(others[second]).repeated is True
        assert desk.job().status == ("completed" if verb == "complete" else "queued")
        return
    refusal = desk.reject(others[second], "invalid_transition")
    assert refusal.details == {"status": desk.job().status, "ended_by": verb, "ended_at": NOW}
    assert refusal.message == f"This grant of job a already ended by {verb}; {second} changes nothing."


def test_the_next_ended_grant_takes_the_place_of_the_last(desk: RuleHarness) -> None:
    first = desk.held()
    desk.accept(Release(id="a", lock_id=first))
    desk.accept(Release(id="a", lock_id=desk.start()))
    assert desk.reject(Release(id="a", lock_id=first), "lock_lost").details["reason"] == "not_current"


def test_completed_is_final(desk: RuleHarness) -> None:
    desk.completed()
    refused: list[AnyCommand] = [
        ForceFail(id="a"),
        ForceReset(id="a"),
        Cancel(id="a"),
        Update(id="a", priority=1),
        RunNow(id="a"),
        Start(id="a", worker="w"),
        *(Transition(id="a", from_="completed", to=to) for to in STATUSES),
    ]
    for command in refused:
        desk.reject(command, "invalid_transition")


@pytest.mark.parametrize("missing", [{"lease": None}, {"grant": None}, {"grant": None, "lease": None}])
def test_a_processing_row_without_all_of_its_lock_is_held_by_nobody(desk: RuleHarness, missing: dict[str, Any]) -> None:
    lock_id = desk.held()
    desk.row(replace(desk.job(), **missing))
    for command in holder_commands(lock_id):
        desk.reject(command, "lock_lost")
    if "grant" in missing:
        desk.reject(Undelivered(id="a", lock_id=lock_id), "lock_lost")


def test_a_lock_on_a_job_that_nobody_processes_lets_nobody_speak(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.book.suspects[1] = "a"
    desk.row(replace(desk.job(), status="queued"))
    for command in [*holder_commands(lock_id), Undelivered(id="a", lock_id=lock_id)]:
        desk.reject(command, "lock_lost")


def test_a_request_is_told_from_others_by_a_hash_of_all_that_it_says() -> None:
    hashes = {worker_rules.digest(Create(**fields)) for fields in ({}, {"id": "a"}, {"id": "b"}, {"priority": 1})}
    assert len(hashes) == 4
    assert worker_rules.digest(Create(id="a")) == worker_rules.digest(Create(id="a", queue="default"))
    assert {len(each) for each in hashes} == {32}  # as in the store


@pytest.mark.parametrize(
    ("command", "digest"),
    [
        (Create(id="a"), "7fedd51c171dd1953fa559844c9cad15"),
        (Create(id="a", queue="q", payload=Raw(b'{"x":1}'), priority=3), "13e33596d43e6150cd1d851531f63b35"),
        (Complete(id="a", lock_id="l"), "93fb111300f6de1128947d984fb8ba84"),
        (Fail(id="a", lock_id="l", error_message="m"), "62cd7eef3b63902a413d5942929126e9"),
        (Release(id="a", lock_id="l"), "5d6df6a6a3d543f07a07dc2ef429c2a2"),
    ],
)
def test_a_request_that_is_repeated_after_an_upgrade_has_the_hash_that_is_stored(command: Any, digest: str) -> None:
    """The hashes are on the disk: a new field that a request does not give must not change them."""
    assert worker_rules.digest(command) == digest


def test_undelivered_puts_the_job_back(desk: RuleHarness) -> None:
    lock_id = desk.held()
    view = desk.accept(Undelivered(id="a", lock_id=lock_id), by="daemon")
    assert (view.status, view.attempt, view.run_at) == ("queued", 0, NOW)
    assert desk.last().type == "undelivered"
    assert desk.reject(Undelivered(id="a", lock_id=lock_id), "lock_lost").details["reason"] == "undelivered"
    assert desk.reject(Complete(id="a", lock_id=lock_id), "lock_lost").details["rule"] == "undelivered"


# -- time: stalls, expiry, deletion, mending --------------------------------------------------------------------------


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
    desk: RuleHarness, on_stall: Any, max_attempts: int, progress: float, status: str, attempt: int
) -> None:
    lock_id = desk.held(on_stall=on_stall, max_attempts=max_attempts)
    if progress:
        desk.progress(lock_id, progress)
    desk.advance(TTL - 1)
    assert desk.accept(Recover(limit=9)) == Recovered([], 0, False)
    desk.advance(1)
    recovered = desk.accept(Recover(limit=9), by="recovery")
    job = desk.job()
    assert (job.status, job.attempt, job.stalls) == (status, attempt, 1)
    assert recovered.details[0].action == ("reset" if status == "queued" else "failed")
    assert recovered.details[0].job_id == "a"
    assert recovered.details[0].reason.startswith("No update from worker w-1 for 15 min at ")
    assert desk.last().by == "recovery"
    if status == "failed":
        assert job.error is not None
        assert job.error.code == "stalled"
        assert job.error.message == recovered.details[0].reason


def test_the_words_of_a_stall() -> None:
    desk = RuleHarness(lease=DAY_MS)
    desk.create()
    lock_id = desk.start(worker="w-7", lock_ttl_ms=1_000)
    desk.progress(lock_id, 45)
    desk.advance(12 * MINUTE_MS)
    desk.accept(Recover(limit=1))
    assert desk.job().error == Failure(
        "No update from worker w-7 for 12 min at 45 % (attempt 1 of 1). The lock had expired. The work may be half "
        "done; check it, then force-reset the job to run it again.",
        "stalled",
    )
    assert (desk.last().by, desk.last().reason) == ("client", desk.job().error.message)  # type: ignore[union-attr]
    assert desk.last().details == {"worker": "w-7", "progress": 45, "stalls": 1}


def test_a_stall_that_goes_back_says_why_too(desk: RuleHarness) -> None:
    desk.held(max_attempts=2)
    desk.advance(TTL)
    desk.accept(Recover(limit=1))
    assert desk.last().reason == "No update from worker w-1 for 15 min at 0 % (attempt 1 of 2). The lock had expired."
    assert desk.last().details == {"worker": "w-1", "progress": 0, "stalls": 1}


def test_a_stall_that_has_to_fail_says_so(desk: RuleHarness) -> None:
    desk.held(on_stall="fail")
    desk.advance(TTL)
    desk.accept(Recover(limit=1))
    error = desk.job().error
    assert error is not None
    assert error.message is not None
    assert error.message.endswith("Its on_stall is fail; force-reset the job to run it again.")


@pytest.mark.parametrize("missing", ["lease", "grant"])
def test_without_a_grant_or_its_lease_a_job_is_stuck_at_once(desk: RuleHarness, missing: str) -> None:
    desk.held()
    desk.row(replace(desk.job(), **{missing: None}))
    assert transitions.is_stuck(desk.job(), desk.lease)
    desk.start(worker="w-2")
    stalled = desk.events[-2]
    assert (stalled.type, stalled.reason) == ("stalled", "The job was processing, but no worker held it.")
    assert stalled.details == {"worker": None if missing == "grant" else "w-1", "progress": 0, "stalls": 1}


def test_a_poison_job_cannot_loop_for_ever(desk: RuleHarness) -> None:
    desk.create(on_stall="requeue")
    for stalls in range(1, 4):
        desk.start()
        desk.advance(TTL)
        desk.accept(Recover(limit=1))
        assert (desk.job().status, desk.job().stalls) == ("queued", stalls)
    desk.start()
    desk.advance(TTL)
    desk.accept(Recover(limit=1))
    error = desk.job().error
    assert desk.job().status == "failed"
    assert error is not None
    assert "It stalled 4 times (max_stalls 3);" in (error.message or "")


@pytest.mark.parametrize(
    ("on_stall", "max_stalls", "said"),
    [
        ("fail", 1, "Its on_stall is fail"),  # the last that it may have is not one too many
        ("requeue", 0, "It stalled once (max_stalls 0);"),
    ],
)
def test_why_a_first_stall_fails_a_job(desk: RuleHarness, on_stall: Any, max_stalls: int, said: str) -> None:
    desk.create(on_stall=on_stall, max_stalls=max_stalls)
    desk.start()
    desk.advance(TTL)
    desk.accept(Recover(limit=1))
    error = desk.job().error
    assert error is not None
    assert said in (error.message or "")


def test_past_the_ceiling_a_job_is_stuck_at_once_and_says_so(desk: RuleHarness) -> None:
    lock_id = desk.held(max_processing_ms=60_000, stuck_after_ms=HOUR_MS)
    desk.accept(Extend(id="a", lock_id=lock_id))
    desk.advance(60_000)
    assert (
        desk.accept(Recover(limit=1))
        .details[0]
        .reason.startswith("Worker w-1 reported no progress for 60 s (max_processing_ms)")
    )


def test_stuck_after_0_means_an_expired_lock_is_death(desk: RuleHarness) -> None:
    desk.create()
    desk.start(lock_ttl_ms=60_000, stuck_after_ms=0)
    desk.advance(59_999)
    assert not desk.book.stuck
    desk.advance(1)
    assert [found.action for found in desk.accept(Recover(limit=1)).details] == ["reset"]


def test_recovery_works_in_slices(desk: RuleHarness) -> None:
    for name in "abcd":
        desk.held(name, worker=f"w-{name}")
    for name in "uvwxyz":
        desk.held(name, stuck_after_ms=HOUR_MS, **no_ceiling())
    desk.advance(TTL)
    found = desk.accept(Recover(limit=2))
    assert (len(found.details), found.locks_cleared, found.more) == (2, 2, True)
    assert [(each.job_id, each.action) for each in found.details] == [("a", "reset"), ("b", "reset")]
    for each in found.details:
        assert each.reason.startswith(f"No update from worker w-{each.job_id} for 15 min")
    assert (desk.last().type, desk.last().details) == ("lock_expired", {"worker": "w-1"})
    found = desk.accept(Recover(limit=2))
    assert (len(found.details), found.locks_cleared, found.more) == (2, 2, True)  # of locks, not of jobs
    found = desk.accept(Recover(limit=2))
    assert (len(found.details), found.locks_cleared, found.more) == (0, 2, False)
    assert desk.accept(Recover(limit=2)) == Recovered([], 0, False)
    assert desk.book.live_locks() == 0
    desk.start("a")
    desk.advance(TTL)
    assert desk.accept(Recover(limit=1)).more is False  # one was allowed, one there was


def test_time_is_judged_when_a_command_is_applied(desk: RuleHarness) -> None:
    """The book was advanced further than the moment of the command: nothing that is not so yet is acted upon."""
    desk.held("a")
    desk.held("b", stuck_after_ms=HOUR_MS, **no_ceiling())
    desk.create("d", queue="other", expires_at=NOW + 5)
    desk.book.advance(NOW + 5, desk.lease + TTL)
    before = Moment(NOW + 4, desk.lease + TTL - 1, NOW - desk.lease)
    nothings: list[tuple[AnyCommand, Any]] = [
        (Recover(limit=9), Recovered([], 0, False)),
        (Expire(limit=9), MaintenanceResult(0)),
    ]
    for command, nothing in nothings:
        decision = decide.decide(desk.book, Call(command, seed=SEED), before, desk.policy)
        assert not isinstance(decision.answer, ApiError)
        assert decision.answer.data == nothing
        assert not decision.changes


def test_a_lock_is_not_cleared_any_more_where_its_job_has_become_stuck(desk: RuleHarness) -> None:
    desk.held(stuck_after_ms=HOUR_MS, **no_ceiling())
    desk.advance(TTL)
    later = Moment(desk.now + HOUR_MS, desk.lease + HOUR_MS, NOW - desk.lease)
    decision = decide.decide(desk.book, Call(Recover(limit=9), seed=SEED), later, desk.policy)
    assert decision.answer == Response(Recovered([], 0, False))


def test_a_live_lock_is_never_stuck(desk: RuleHarness) -> None:
    lock_id = desk.held(stuck_after_ms=0)
    desk.accept(Extend(id="a", lock_id=lock_id, additional_ms=20 * MINUTE_MS))
    desk.advance(20 * MINUTE_MS - 1)
    assert desk.accept(Recover(limit=1)).details == []


def test_the_daemons_absence_is_credited(desk: RuleHarness) -> None:
    desk.create("live", max_processing_ms=1_000)
    desk.start("live")
    desk.create("dead", **no_ceiling())
    desk.start("dead", lock_ttl_ms=1_000, stuck_after_ms=900)
    desk.held("calm")
    desk.create("queued")
    desk.advance(999)
    desk.row(replace(desk.job("dead"), lease=Lease(desk.lease, desk.lease + 1, None)))
    assert (
        desk.accept(ExtendAfterPause(ids=["live", "live", "dead", "calm", "queued", "gone"], grace_ms=30_000)).done == 2
    )
    until = desk.lease + 30_000
    assert desk.job("live").lease == Lease(until, desk.lease - 999 + STUCK, until)
    assert desk.job("dead").lease == Lease(desk.lease, until, None)  # an expired lock does not come back to life
    assert desk.types("live")[-1] == "resumed"
    assert desk.last().details == {"grace_ms": 30_000}
    assert desk.types("calm")[-1] == "granted"
    grant = desk.job("live").grant
    assert grant is not None
    desk.progress(grant.lock_id, 1, "live")
    assert desk.job("live").lease.ceiling == until  # type: ignore[union-attr]  # no report takes it back
    desk.row(replace(desk.job("calm"), lease=None))
    assert desk.accept(ExtendAfterPause(ids=["calm"], grace_ms=30_000)).done == 0


def test_a_lock_that_was_live_at_the_start_is_credited_however_long_the_disk_takes(desk: RuleHarness) -> None:
    desk.held("a")
    desk.row(replace(desk.job("a"), lease=Lease(desk.lease + 5, desk.lease, None)))
    started = desk.lease
    desk.advance(2_000)
    assert desk.accept(ExtendAfterPause(ids=["a"], grace_ms=30_000, since=started)).done == 1
    assert desk.job("a").lease == Lease(desk.lease + 30_000, desk.lease + 30_000, None)
    assert desk.book.live_locks() == 1


def test_a_restored_backup_ends_its_grants(desk: RuleHarness) -> None:
    lock_id = desk.held("a")
    desk.progress(lock_id, 10)
    desk.create("b")
    desk.held("d")
    assert desk.accept(EndGrants(ids=["a", "b", "c", "a", "d"], last=True)).done == 2
    assert desk.job("a").status == "failed"
    assert desk.job("b").status == "queued"


def test_queued_jobs_expire(desk: RuleHarness) -> None:
    for number in range(3):
        desk.create(f"{number}", expires_at=NOW + 10)
    desk.create("later", expires_at=NOW + 11)
    desk.advance(9)
    assert desk.accept(Expire(limit=2)).done == 0
    desk.advance(1)
    worked = desk.accept(Expire(limit=2), by="cleanup")
    assert (worked.done, worked.more) == (2, True)
    worked = desk.accept(Expire(limit=1))
    assert (worked.done, worked.more) == (1, False)
    assert desk.last().type == "expired"
    assert desk.job("later").status == "queued"


def test_the_creators_expiry_survives_a_release(desk: RuleHarness) -> None:
    desk.create(expires_at=NOW + 10)
    lock_id = desk.start()
    desk.advance(10)
    assert desk.accept(Expire(limit=9)).done == 0  # a running job does not expire
    desk.accept(Release(id="a", lock_id=lock_id))
    assert desk.accept(Expire(limit=9)).done == 1


def test_deletion_by_age_is_judged_when_it_is_applied(desk: RuleHarness) -> None:
    desk.completed("old", storage_key="k/1", expires_at=NOW + 10)
    desk.completed("plain", expires_at=NOW + 10, file_path="/f")
    desk.completed("young", expires_at=NOW + 11)
    desk.create("queued", expires_at=NOW + 10)
    desk.advance(10)
    ids = ["old", "plain", "young", "queued", "gone", "old"]
    worked = desk.accept(DeleteExpired(ids=ids), by="cleanup")
    assert worked.done == 2
    assert set(desk.rows) == {"young", "queued"}
    assert desk.last().type == "deleted"
    desk.row(replace(desk.job("young"), expires_at=None))
    assert desk.accept(DeleteExpired(ids=["young"])).done == 0


def test_mending_applies_the_safe_fixes(desk: RuleHarness) -> None:
    bad = desk.completed("bad")
    desk.row(replace(bad, progress=40, finished_at=NOW - 5))
    desk.row(Job(90, "dead", replace(bad.options), "processing", NOW, NOW, NOW, progress=5, attempt=1))
    desk.row(Job(91, "odd", replace(bad.options), "paused", NOW, NOW, NOW))
    desk.create("good")
    worked = desk.accept(RepairJobs(ids=["bad", "dead", "odd", "good", "gone", "bad"]), by="cleanup")
    assert (worked.done, worked.found) == (3, 4)
    assert {job_id for job_id, _ in worked.issues} == {"bad", "dead", "odd"}
    assert sorted(desk.checked) == [1, 2, 90], "what has no fix is looked at again by the next pass"
    assert (desk.job("bad").progress, desk.job("bad").finished_at) == (100, NOW)
    assert desk.types("bad")[-1] == "fixed"
    assert (desk.job("dead").status, desk.types("dead")) == ("failed", ["stalled"])
    assert desk.job("odd").status == "paused"
    assert desk.accept(RepairJobs(ids=["bad", "good"])).found == 0
    assert desk.accept(RepairJobs(ids=["odd"])).found == 1
    assert 91 not in desk.checked


def test_mending_counts_what_is_left_as_not_fixed(desk: RuleHarness) -> None:
    desk.row(Job(91, "odd", Options(), "paused", NOW, NOW, NOW, progress=101))
    worked = desk.accept(RepairJobs(ids=["odd"]), by="cleanup")
    assert (worked.found, worked.done) == (2, 1)
    event = desk.last()
    assert (event.type, event.by, event.reason, event.details) == (
        "fixed", "cleanup", "validation", {"fields": ["progress"]},
    )  # fmt: skip


@pytest.mark.parametrize("missing", [None, "grant", "lease"])
def test_mending_stalls_a_job_that_lacks_a_part_of_its_lock_and_no_other(
    desk: RuleHarness, missing: str | None
) -> None:
    desk.held()
    desk.row(replace(desk.job(), progress=101, **({missing: None} if missing else {})))
    desk.accept(RepairJobs(ids=["a"]))
    assert desk.types() == ["created", "granted", "fixed", *(["stalled"] if missing else [])]


def test_mending_counts_what_it_fixed_and_stalls_in_one_go(desk: RuleHarness) -> None:
    desk.held()
    desk.row(replace(desk.job(), grant=None, lease=None, progress=-3))
    worked = desk.accept(RepairJobs(ids=["a"]))
    assert (worked.done, worked.found) == (2, 2)
    assert desk.types() == ["created", "granted", "fixed", "stalled"]
    assert desk.job().status == "queued"


def test_a_processing_row_without_a_grant_is_recovered_by_start(desk: RuleHarness) -> None:
    desk.held()
    desk.row(replace(desk.job(), grant=None, lease=None))
    desk.start(worker="w-2")
    assert desk.types() == ["created", "granted", "stalled", "granted"]


# -- operators --------------------------------------------------------------------------------------------------------


def admin(desk: RuleHarness, command: Any) -> Any:
    return desk.accept(command, admin=True, by="admin")


def test_force_fail(desk: RuleHarness) -> None:
    lock_id = desk.held()
    forced = admin(desk, ForceFail(id="a", reason="broken input"))
    assert (forced.job_id, forced.previous_status, forced.status) == ("a", "processing", "failed")
    assert (forced.reason, forced.timestamp) == ("broken input", NOW)
    assert desk.job().error == Failure("broken input", "force_failed")
    desk.reject(Complete(id="a", lock_id=lock_id), "lock_lost")
    desk.create("b")
    assert admin(desk, ForceFail(id="b")).reason == "Failed by an operator."
    desk.reject(ForceFail(id="b"), "invalid_transition")


def test_force_reset_starts_anew(desk: RuleHarness) -> None:
    lock_id = desk.held(delay_ms=0, max_attempts=2)
    desk.progress(lock_id, 45)
    desk.accept(Fail(id="a", lock_id=lock_id, error_message="e", retry=False))
    desk.row(replace(desk.job(), stalls=2))
    desk.advance(9)
    forced = admin(desk, ForceReset(id="a", reason="again"))
    job = desk.job()
    assert (forced.previous_status, forced.status, forced.reason) == ("failed", "queued", "again")
    assert (job.progress, job.attempt, job.stalls, job.error, job.run_at) == (0, 0, 0, None, desk.now)
    assert (job.expires_at, job.finished_at, job.started_at) == (None, None, None)
    lock_id = desk.start()
    admin(desk, ForceReset(id="a"))
    desk.reject(Complete(id="a", lock_id=lock_id), "lock_lost")
    desk.reject(ForceReset(id="a"), "invalid_transition")


@pytest.mark.parametrize(
    ("status", "command", "to", "words"),
    [
        ("completed", ForceFail(id="a"), "failed", "Only a queued or processing job can be failed."),
        ("queued", ForceReset(id="a"), "queued", "It is already waiting."),
        ("completed", ForceReset(id="a"), "queued", "completed is final; create a new job instead."),
        ("processing", RunNow(id="a"), "queued", "Only a queued job can be run now."),
        ("completed", Update(id="a", priority=1), "completed", "completed is final: it cannot be changed."),
        ("queued", Delete(id="a"), "deleted", "Only a finished job can be deleted: cancel it first."),
        ("failed", Cancel(id="a"), "cancelled", "Only a queued or processing job can be cancelled."),
    ],
)
def test_what_an_operator_is_refused_and_why(desk: RuleHarness, status: str, command: Any, to: str, words: str) -> None:
    at_status(desk, status)
    refusal = desk.reject(command, "invalid_transition")
    assert refusal.details == {"status": status, "to": to, "allowed": ALLOWED[status]}
    assert refusal.message == f"Job a is {status}. {words}"


def at_status(desk: RuleHarness, status: str) -> None:
    desk.create()
    match status:
        case "processing":
            desk.start()
        case "completed":
            desk.accept(Complete(id="a", lock_id=desk.start()))
        case "failed":
            desk.accept(Fail(id="a", lock_id=desk.start(), error_message="e"))
        case "cancelled":
            desk.accept(Cancel(id="a"))


@pytest.mark.parametrize("to", STATUSES)
@pytest.mark.parametrize("from_", STATUSES)
def test_transition_takes_any_pair_of_the_table_but_into_processing(desk: RuleHarness, from_: Any, to: Any) -> None:
    at_status(desk, from_)
    command = Transition(id="a", from_=from_, to=to, reason="r")
    if (from_, to) not in TRANSITIONS or to == "processing":
        details = desk.reject(command, "invalid_transition", admin=True).details
        assert details == {"status": from_, "to": to, "allowed": ALLOWED[from_]}
        return
    forced = admin(desk, command)
    assert (forced.previous_status, forced.status) == (from_, to)
    job = desk.job()
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


def test_transition_compares_before_it_sets(desk: RuleHarness) -> None:
    desk.create()
    refusal = desk.reject(Transition(id="a", from_="processing", to="failed"), "invalid_transition", admin=True)
    assert refusal.details == {"status": "queued", "to": "failed", "allowed": ALLOWED["queued"]}


def test_a_transition_may_bring_updates(desk: RuleHarness) -> None:
    desk.create()
    updates = Updates(
        error_message="late", priority=5, run_at=NOW + 7, max_attempts=4, download_url="u", metadata=Raw(b"[1]")
    )
    admin(desk, Transition(id="a", from_="queued", to="failed", updates=updates))
    job = desk.job()
    assert job.error == Failure("late", "transitioned")
    assert (job.options.priority, job.options.max_attempts, job.run_at) == (5, 4, NOW + 7)
    assert job.result == Result("u", metadata=Raw(b"[1]"))
    admin(desk, Transition(id="a", from_="failed", to="queued", updates=Updates(run_at=NOW)))
    assert (desk.job().run_at, desk.job().error) == (NOW, Failure("late", "transitioned"))


def test_of_a_result_a_transition_sets_what_it_names_and_keeps_the_rest(desk: RuleHarness) -> None:
    desk.create()
    desk.row(replace(desk.job(), result=Result(None, "/f", "k", Raw(b"[1]"))))
    admin(desk, Transition(id="a", from_="queued", to="failed", updates=Updates(download_url="u")))
    assert desk.job().result == Result("u", "/f", "k", Raw(b"[1]"))
    admin(desk, Transition(id="a", from_="failed", to="queued", updates=Updates(metadata=Raw(b"null"), priority=2)))
    assert desk.job().result == Result("u", "/f", "k")
    admin(desk, Transition(id="a", from_="queued", to="completed", updates=Updates(file_path="/g")))
    assert desk.job().result == Result("u", "/g", "k")


def test_a_late_result_is_adopted(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.progress(lock_id, 45)
    desk.advance(TTL)
    desk.accept(Recover(limit=1))
    adopted = Transition(id="a", from_="failed", to="completed", updates=Updates(storage_key="k", priority=3))
    assert admin(desk, adopted).status == "completed"
    assert desk.job().result == Result(storage_key="k")
    assert desk.job().options.priority == 3
    desk.create("b")
    desk.row(replace(desk.job("b"), result=Result("kept")))
    admin(desk, Transition(id="b", from_="queued", to="completed"))
    assert desk.job("b").result == Result("kept")


def test_a_transition_to_completed_needs_a_download_url_where_one_is_required() -> None:
    desk = RuleHarness(Policy(require_download_url=True))
    desk.create()
    refused = Transition(id="a", from_="queued", to="completed", updates=Updates(file_path="/f"))
    assert desk.reject(refused, "invalid_request", admin=True).details == {"field": "$.updates.download_url"}
    desk.row(replace(desk.job(), result=Result("kept")))
    rehearsed = admin(desk, Transition(id="a", from_="queued", to="completed", dry_run=True))
    assert (rehearsed.previous_status, rehearsed.status, desk.job().status) == ("queued", "completed", "queued")
    admin(desk, Transition(id="a", from_="queued", to="failed"))
    admin(desk, Transition(id="a", from_="failed", to="completed"))
    assert desk.job().result == Result("kept")
    desk.create("b")
    admin(desk, Transition(id="b", from_="queued", to="completed", updates=Updates(download_url="u")))


def test_a_dry_run_changes_nothing(desk: RuleHarness) -> None:
    desk.create(delay_ms=1_000)
    deeds: list[Any] = [
        RunNow(id="a", reason="r"),
        Update(id="a", priority=7, run_at=NOW + 5, max_attempts=3),
        Transition(id="a", from_="queued", to="completed", reason="r"),
    ]
    for asked in deeds:
        before = desk.job()
        rehearsed = desk.decide(replace(asked, dry_run=True), admin=True)
        assert (rehearsed.changes, desk.job()) == ([], before)
        assert isinstance(rehearsed.answer, Response)
        assert rehearsed.answer.data == admin(desk, asked)
        assert desk.job() != before
    for asked in deeds:
        refusal = desk.reject(replace(asked, dry_run=True), "invalid_transition", admin=True)
        assert refusal == desk.reject(asked, "invalid_transition", admin=True)


def test_a_transition_to_failed_needs_no_words(desk: RuleHarness) -> None:
    desk.create()
    admin(desk, Transition(id="a", from_="queued", to="failed"))
    assert desk.job().error == Failure("Failed by an operator.", "transitioned")


def test_extend_lock(desk: RuleHarness) -> None:
    lock_id = desk.held()
    state = admin(desk, ExtendLock(id="a", lock_id=lock_id, additional_ms=20 * MINUTE_MS))
    assert (state.job_id, state.status, state.extended) == ("a", "processing", True)
    assert state.lock_expires_at == state.lock.expires_at == NOW + 20 * MINUTE_MS
    assert (state.ceiling_at, state.lock.lock_id, state.timestamp) == (NOW + CEILING, lock_id, NOW)
    assert desk.last().by == "admin"
    assert admin(desk, ExtendLock(id="a", lock_id=lock_id)).extended is False


def test_release_lock_revokes_the_grant(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.progress(lock_id, 10)
    state = admin(desk, ReleaseLock(id="a", lock_id=lock_id))
    assert (state.status, state.lock, state.lock_expires_at, state.extended) == ("queued", None, None, False)
    assert (desk.job().attempt, desk.last().by) == (0, "admin")
    # An operator ended the grant, so its holder has to stop: lock_lost, never "you ended it yourself".
    for command in holder_commands(lock_id):
        details = desk.reject(command, "lock_lost").details
        assert (details["reason"], details["rule"]) == ("released", "release-lock")


def test_release_lock_after_the_holders_own_end(desk: RuleHarness) -> None:
    lock_id = desk.completed().ended.lock_id  # type: ignore[union-attr]
    state = admin(desk, ReleaseLock(id="a", lock_id=lock_id))
    assert (state.status, state.lock) == ("completed", None)


def test_run_now(desk: RuleHarness) -> None:
    desk.create(delay_ms=DAY_MS)
    assert admin(desk, RunNow(id="a")).run_at == NOW
    assert not desk.decide(RunNow(id="a")).changes
    assert desk.claim() == ["a"]
    desk.reject(RunNow(id="a"), "invalid_transition")


def test_update(desk: RuleHarness) -> None:
    desk.create("a")
    desk.create("b")
    view = admin(desk, Update(id="b", priority=-1, run_at=NOW - 5, max_attempts=9, reason="urgent"))
    assert desk.last().reason == "urgent"
    assert (view.priority, view.run_at, view.max_attempts) == (-1, NOW - 5, 9)
    assert desk.last().details == {"priority": -1, "run_at": NOW - 5, "max_attempts": 9}
    assert desk.claim(limit=2) == ["b", "a"]
    assert not desk.decide(Update(id="a")).changes
    assert not desk.decide(Update(id="a", priority=0)).changes
    desk.accept(Cancel(id="a"))
    assert admin(desk, Update(id="a", priority=3)).priority == 3


def test_delete_takes_finished_jobs_only(desk: RuleHarness) -> None:
    desk.completed()
    desk.create("b")
    assert admin(desk, Delete(id="a")).status == "completed"
    assert "a" not in desk.rows
    desk.reject(Delete(id="a"), "job_not_found")
    desk.reject(Delete(id="b"), "invalid_transition")
    assert desk.create("a").seq == 3


def test_pause_and_resume_are_steps_of_the_queue(desk: RuleHarness) -> None:
    assert admin(desk, Pause(name="q")).paused is True
    assert (desk.last().type, desk.last().job_seq, desk.last().queue) == ("queue_paused", 0, "q")
    assert not desk.decide(Pause(name="q")).changes
    assert admin(desk, Resume(name="q")).paused is False
    assert not desk.decide(Resume(name="q")).changes


def test_a_pause_shows_its_operator_start_reason_and_end(desk: RuleHarness) -> None:
    view = desk.accept(Pause(name="q", reason="deploy", until=NOW + 9), by="admin:ana")
    said = PausedView("q", True, NOW, "admin:ana", "deploy", NOW + 9)
    assert view == said
    desk.advance(1)
    assert desk.accept(Pause(name="q"), by="admin:bob") == said, "a plain pause changes nothing"
    assert not desk.decide(Pause(name="q", reason="deploy", until=NOW + 9), by="admin:bob").changes
    replaced = desk.accept(Pause(name="q", reason="disk"), by="admin:bob")
    assert replaced == PausedView("q", True, NOW, "admin:bob", "disk", None), "the time of the first one stays"
    [listed] = desk.accept(Queues()).queues
    assert listed.pause == replaced.pause == desk.book.queue_row("q").pause
    assert desk.accept(Resume(name="q")) == PausedView("q", False)


def test_a_pause_cannot_end_in_the_past(desk: RuleHarness) -> None:
    refusal = desk.reject(Pause(name="q", until=NOW), "invalid_request")
    assert (refusal.details, "Unix milliseconds" in refusal.message) == ({"field": "$.until"}, True)
    assert desk.book.paused == {}


def test_a_pause_that_is_over_ends(desk: RuleHarness) -> None:
    desk.create()
    desk.accept(Pause(name="default", until=NOW + 10), by="admin")
    desk.accept(Pause(name="other"), by="admin")
    desk.advance(9)
    assert desk.accept(EndPauses()).done == 0
    desk.advance(1)
    assert desk.accept(EndPauses(), by="daemon").done == 1
    last = desk.last()
    assert (last.type, last.queue, last.by, last.reason) == (
        "queue_resumed", "default", "daemon", "The pause ended at its set time.",
    )  # fmt: skip
    assert list(desk.book.paused) == ["other"]
    desk.start()


# -- import -----------------------------------------------------------------------------------------------------------


def test_an_import_keeps_what_it_is_given(desk: RuleHarness) -> None:
    asked = Import(
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
    )
    decision = desk.decide(asked, by="admin")
    assert not isinstance(decision.answer, ApiError)
    assert (decision.answer.status, decision.answer.data) == (201, Imported("a", skipped=False))
    job = desk.job()
    assert (job.status, job.progress, job.progress_message, job.attempt, job.stalls) == ("failed", 33, "m", 2, 1)
    assert (job.created_at, job.updated_at, job.run_at) == (NOW - 9, NOW - 1, NOW - 8)
    assert (job.started_at, job.finished_at, job.expires_at) == (NOW - 7, NOW - 2, NOW + 9)
    assert (job.result, job.error) == (Result("u", "f", "s", Raw(b"1")), Failure("e", "E"))
    assert desk.book.suspects == {1: "a"}
    assert desk.accept(asked) == Imported("a", skipped=True)


def test_missing_times_of_an_import_become_now(desk: RuleHarness) -> None:
    desk.accept(Import(id="a", status="completed"))
    job = desk.job()
    assert (job.created_at, job.updated_at, job.run_at, job.finished_at) == (NOW, NOW, NOW, NOW)
    assert (job.progress, job.expires_at, job.error) == (100, NOW + 7 * DAY_MS, None)
    desk.accept(Import(id="b", error_code="E"))
    job = desk.job("b")
    assert job.error == Failure(None, "E")
    assert (job.progress, job.started_at, job.finished_at, job.expires_at) == (0, None, None, None)


def test_a_claim_leaves_overdue_jobs_to_recovery(desk: RuleHarness) -> None:
    for number in range(5):
        desk.create(f"late-{number}", expires_at=NOW + 1)
    desk.create("good")
    desk.advance(1)
    decision = desk.decide(Claim(worker="w"))
    assert [change.event.job_id for change in decision.changes] == ["good"]
    assert desk.accept(Expire(limit=3)) == MaintenanceResult(3, more=True)
    assert desk.accept(Expire(limit=3)) == MaintenanceResult(2)


def test_an_import_without_a_creation_was_created_before_all_that_is_given(desk: RuleHarness) -> None:
    desk.accept(Import(id="a", status="completed", started_at=NOW - 5_000, finished_at=NOW - 1_000))
    job = desk.job("a")
    assert (job.created_at, job.finished_at, job.updated_at) == (NOW - 5_000, NOW - 1_000, NOW - 1_000)
    assert desk.accept(RepairJobs(ids=["a"])).found == 0


@pytest.mark.parametrize(("progress", "status"), [(0, "queued"), (45, "failed")])
def test_what_an_import_would_do_is_told_and_not_done(desk: RuleHarness, progress: float, status: str) -> None:
    asked = ImportCheck(id="a", status="processing", progress=progress, worker="there", started_at=NOW - 5)
    before = desk.book.next_job, desk.book.next_token, desk.book.next_event
    decision = desk.decide(asked, by="admin")
    assert isinstance(decision.answer, Response)
    told = decision.answer.data
    assert (told.job_id, told.what, told.status) == ("a", "create", status)
    assert "was processing when it was imported" in told.reason
    assert told.room == desk.policy.live_jobs
    assert decision.changes == []
    assert (desk.book.next_job, desk.book.next_token, desk.book.next_event) == before
    desk.create("a")
    told = desk.accept(asked)
    assert (told.what, told.status, told.reason) == ("skip", "queued", "A job with this id exists: it is queued.")
    desk.book.quarantined["b"] = "its checksum is wrong"
    told = desk.accept(ImportCheck(id="b"))
    assert (told.what, told.status) == ("skip", None)
    assert "damaged" in told.reason


@pytest.mark.parametrize(("bound", "room"), [(9, 5), (4, 0), (3, 0)])
def test_a_look_at_an_import_says_how_many_more_live_jobs_there_may_be(
    desk: RuleHarness, bound: int, room: int
) -> None:
    for name in "abc":
        desk.create(name)
    desk.held("d")
    desk.policy = Policy(live_jobs=bound)
    assert desk.accept(ImportCheck(id="e", status="completed")).room == room


@pytest.mark.parametrize(("progress", "status"), [(0, "queued"), (45, "failed")])
def test_an_imported_grant_ends_by_its_stall_rule(desk: RuleHarness, progress: float, status: str) -> None:
    desk.accept(Import(id="a", status="processing", progress=progress, worker="there", started_at=NOW - 5))
    job = desk.job()
    assert (job.status, job.stalls, job.grant) == (status, 1, None)
    assert job.attempt == (0 if progress == 0 else 1)
    assert desk.types() == ["imported", "stalled"]
    assert job.ended is not None
    assert job.ended.worker == "there"
    assert desk.create("b")
    assert desk.accept(Start(id="b", worker="w")).fencing_token & 0xFF == 2


@pytest.mark.parametrize(
    ("started_at", "updated_at", "began"),
    [(NOW - 5, NOW - 3, NOW - 5), (None, NOW - 3, NOW - 3), (NOW + 5, NOW + 5, NOW)],
)
def test_an_imported_grant_is_made_up_as_far_as_it_can_be_known(
    desk: RuleHarness, started_at: int | None, updated_at: int, began: int
) -> None:
    desk.accept(Import(id="a", status="processing", started_at=started_at, updated_at=updated_at))
    changes = desk.events[0].changes
    assert changes is not None
    assert isinstance(changes.grant, Grant)
    assert changes.started_at == began
    assert changes.lease == Lease(desk.lease, desk.lease, None)
    assert (changes.grant.worker, changes.grant.acquired_at) == ("unknown", started_at or updated_at)
    assert (changes.grant.ttl_ms, changes.grant.stuck_after_ms, changes.grant.max_processing_ms) == (TTL, STUCK, 0)


# -- reads and the daemon's own ---------------------------------------------------------------------------------------


def test_reads_change_nothing(desk: RuleHarness) -> None:
    lock_id = desk.held()
    for command in (Get(id="a"), GetVersion(id="a"), Timeline(id="a"), Why(id="a"), Validate(id="a"), ListJobs(),
                    Queues(), Workers(), Stats(), Locks(), Export(), Ping(), Tick()):  # fmt: skip
        decision = desk.decide(command)
        assert not isinstance(decision.answer, ApiError)
        assert not decision.changes
        assert lock_id not in str(decision.answer)


def test_what_an_operator_does_says_why(desk: RuleHarness) -> None:
    lock_id = desk.held("a")
    desk.create("b", delay_ms=1_000)
    desk.accept(ExtendLock(id="a", lock_id=lock_id, reason="r1"), admin=True)
    desk.accept(ReleaseLock(id="a", lock_id=lock_id, reason="r2"), admin=True)
    desk.accept(RunNow(id="b", reason="r3"), admin=True)
    desk.accept(Cancel(id="b"), admin=True)
    desk.accept(Delete(id="b", reason="r4"), admin=True)
    desk.accept(Pause(name="q", reason="r5"), admin=True)
    desk.accept(Resume(name="q", reason="r6"), admin=True)
    said = [event.reason for event in desk.events if event.reason is not None]
    assert said == ["r1", "r2", "r3", "r4", "r5", "r6"]


def test_what_lies_on_the_disk_is_looked_at_later(desk: RuleHarness) -> None:
    desk.create()
    answer = desk.ask(Timeline(id="a"))
    assert not isinstance(answer, ApiError)
    assert answer.read == HistoryRead(timeline=1)
    answer = desk.ask(Timeline(id="a", limit=7))
    assert not isinstance(answer, ApiError)
    assert answer.read == HistoryRead(timeline=1, events=7)
    asked = ListJobs(status="failed")
    answer = desk.ask(asked)
    assert not isinstance(answer, ApiError)
    assert answer.read == HistoryRead(page=asked)
    moving = Export(status="failed")
    answer = desk.ask(moving)
    assert not isinstance(answer, ApiError)
    assert answer.read == HistoryRead(export=moving)


def test_validate_shows_the_job_to_admins(desk: RuleHarness) -> None:
    desk.create()
    assert desk.accept(Validate(id="a")).is_valid
    shown = desk.ask(Validate(id="a"), admin=True)
    assert not isinstance(shown, ApiError)
    assert (shown.data.job_id, shown.data.job.id, shown.data.validation.is_valid) == ("a", "a", True)
    assert shown.unread_payloads == [(1, shown.data.job)]


def test_the_lists_of_operators(desk: RuleHarness) -> None:
    lock_id = desk.held("a", queue="q")
    desk.create("b", queue="q")
    desk.completed("c")
    desk.accept(Pause(name="empty"))
    desk.advance(1_500)
    names = [(queue.name, queue.paused, queue.queued, queue.processing, queue.completed, queue.oldest_due_at)
             for queue in desk.accept(Queues()).queues]  # fmt: skip
    assert names == [
        ("default", False, 0, 0, 1, None),
        ("empty", True, 0, 0, 0, None),
        ("q", False, 1, 1, 0, NOW),
    ]
    assert [(worker.worker, worker.jobs, worker.held) for worker in desk.accept(Workers()).workers] == [
        ("w-1", ["a"], 1)
    ]
    (lock,) = desk.accept(Locks(), admin=True).locks
    assert (lock.id, lock.worker, lock.lock_id, lock.live) == ("a", "w-1", lock_id, True)
    assert (lock.expires_at, lock.ceiling_at, lock.stuck_at) == (NOW + TTL, NOW + CEILING, NOW + TTL)
    stats = desk.accept(Stats())
    assert (stats.total_jobs, stats.by_status["processing"], stats.by_status["completed"]) == (3, 1, 1)
    assert (stats.stuck_jobs, stats.locked_jobs, stats.average_processing_time) == (0, 1, 1.5)
    assert (stats.oldest_processing_job.id, stats.oldest_processing_job.age) == ("a", 1.5)
    assert views.oldest_due(desk.book) == OldestDue("b", "q", NOW)


def test_the_job_that_has_been_due_longest_is_found_over_all_queues(desk: RuleHarness) -> None:
    desk.create("later", queue="a", delay_ms=5_000, priority=-1)
    desk.create("b-1", queue="b")
    desk.create("c-1", queue="c")
    assert views.oldest_due(desk.book) == OldestDue("b-1", "b", NOW), "of the same moment the first"
    desk.advance(5_000)
    desk.held("b-1", queue="b")
    desk.accept(Pause(name="c"))
    assert views.oldest_due(desk.book) == OldestDue("c-1", "c", NOW), "it waits, though its queue is paused"
    desk.accept(Start(id="later", worker="w"))
    desk.accept(Cancel(id="c-1"))
    assert views.oldest_due(desk.book) is None


def test_queues_are_given_page_by_page_in_the_order_of_their_names(desk: RuleHarness) -> None:
    for name in "dbeca":
        desk.create(f"job-{name}", queue=name)
    for name in "bdz":
        desk.accept(Pause(name=name))
    asked = {None: "abcdez", True: "bdz", False: "ace"}
    for paused, names in asked.items():
        assert "".join(queue.name for queue in desk.accept(Queues(paused=paused)).queues) == names
        for limit in (1, 2, 3, 6):
            seen, cursor = [], None
            while True:
                page = desk.accept(Queues(paused=paused, limit=limit, cursor=cursor))
                seen.append("".join(queue.name for queue in page.queues))
                cursor = page.next_cursor
                if cursor is None:
                    break
            assert seen == [names[at : at + limit] for at in range(0, len(names), limit)]
    assert [queue.name for queue in desk.accept(Queues(cursor="d")).queues] == ["e", "z"]
    assert desk.accept(Queues(cursor="z", limit=1)) == QueueList([])


def test_the_busiest_queues_come_first_where_they_are_asked_for(desk: RuleHarness) -> None:
    for name, waiting, done in (("a", 0, 9), ("b", 1, 0), ("c", 3, 0), ("d", 2, 0), ("e", 1, 0)):
        for number in range(waiting):
            desk.create(f"{name}-{number}", queue=name)
        for number in range(done):
            desk.create(f"{name}-done-{number}", queue=name)
            desk.accept(Cancel(id=f"{name}-done-{number}"))
    desk.accept(Pause(name="A"))
    desk.accept(Start(id="d-0", worker="w"))

    def found(**asked: Any) -> tuple[str, str | None]:
        page = desk.accept(Queues(busiest=True, **asked))
        return " ".join(queue.name for queue in page.queues), page.next_cursor

    assert found() == ("c d b e A a", None), "nobody waits in either of the last"
    assert found(limit=2) == ("c d", None)
    assert found(limit=6) == ("c d b e A a", None)
    assert found(limit=3, cursor="b") == ("c d e", None)
    assert found(paused=False, limit=4) == ("c d b e", None)


def test_workers_are_given_page_by_page_the_latest_first(desk: RuleHarness) -> None:
    for number in range(6):
        desk.advance(number % 2)  # some spoke at the same moment
        desk.held(f"job-{number}", worker=f"w {number}")
    everybody = [worker.worker for worker in desk.accept(Workers()).workers]
    assert everybody == ["w 5", "w 3", "w 4", "w 1", "w 2", "w 0"]
    for limit in (1, 2, 4, 6):
        seen, cursor = [], None
        while True:
            page = desk.accept(Workers(limit=limit, cursor=cursor))
            seen.append([worker.worker for worker in page.workers])
            cursor = page.next_cursor
            if cursor is None:
                break
        assert seen == [everybody[at : at + limit] for at in range(0, 6, limit)]


def test_of_a_worker_with_many_jobs_the_first_are_named_and_all_are_counted(desk: RuleHarness) -> None:
    desk.accept(Bulk(jobs=[Create(id=f"job-{number:03}") for number in range(130)]))
    desk.accept(Claim(worker="w", limit=100))
    desk.accept(Claim(worker="w", limit=30))
    [worker] = desk.accept(Workers()).workers
    assert worker.jobs == [f"job-{number:03}" for number in range(100)]
    assert worker.held == 130


def test_locks_are_given_page_by_page_the_oldest_first(desk: RuleHarness) -> None:
    for number in range(5):
        desk.held(f"job-{number}")
    seen, cursor = [], None
    while True:
        page = desk.accept(Locks(limit=2, cursor=cursor))
        seen.append([lock.id for lock in page.locks])
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == [["job-0", "job-1"], ["job-2", "job-3"], ["job-4"]]
    last = desk.accept(Locks(limit=5))
    assert (len(last.locks), last.next_cursor) == (5, None)
    assert desk.accept(Locks(cursor=str(last.locks[2].fencing_token))).locks == last.locks[3:]
    assert desk.accept(Locks(limit=3)).next_cursor == str(last.locks[2].fencing_token)
    assert desk.accept(Locks(limit=1, cursor=str(last.locks[4].fencing_token))).locks == []


def test_stats_of_nothing(desk: RuleHarness) -> None:
    stats = desk.accept(Stats())
    assert (stats.total_jobs, stats.average_processing_time, stats.oldest_processing_job) == (0, 0.0, None)
    assert stats.by_status == dict.fromkeys(STATUSES, 0)


def test_rows_without_a_start_do_not_spoil_the_average(desk: RuleHarness) -> None:
    desk.create()
    desk.advance(2_000)
    desk.row(replace(desk.job(), status="processing"))
    stats = desk.accept(Stats())
    assert (stats.average_processing_time, stats.oldest_processing_job.age) == (2.0, 2.0)
    assert (stats.locked_jobs, stats.stuck_jobs) == (0, 0)
    assert desk.accept(Locks()).locks == []


def test_a_report_is_kept_and_time_may_tick(desk: RuleHarness) -> None:
    assert desk.accept(Report(body=b"{}")) == EmptyResponse()
    assert desk.reports == [b"{}"]
    assert desk.accept(Tick()) == desk.accept(Ping()) == EmptyResponse()


# -- the wall clock ---------------------------------------------------------------------------------------------------


def test_a_step_back_of_the_wall_clock_leaves_locks_alone_and_rows_valid(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.now -= HOUR_MS
    desk.lease += 5
    state = desk.progress(lock_id, 50)
    assert state.lock_expires_at == desk.now + TTL
    desk.accept(Complete(id="a", lock_id=lock_id, metadata=Raw(b"1")))
    assert desk.accept(Validate(id="a")).issues == []
    desk.create("b")
    desk.now -= HOUR_MS
    assert desk.claim() == []  # not due by the clock on the wall
    desk.accept(RunNow(id="b"))
    lock_id = desk.start("b")
    assert desk.accept(Validate(id="b")).issues == []
    desk.accept(Fail(id="b", lock_id=lock_id, error_message="e"))
    assert desk.accept(Validate(id="b")).issues == []


def test_a_step_of_the_wall_clock_frees_and_prolongs_no_lock(desk: RuleHarness) -> None:
    desk.held()
    desk.now += DAY_MS
    desk.reject(Start(id="a", worker="w"), "already_locked")
    desk.now -= DAY_MS
    desk.lease += TTL
    desk.start(worker="w")


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (-5, "0 ms"),
        (999, "999 ms"),
        (1_000, "1 s"),
        (119_999, "119 s"),
        (120_000, "2 min"),
        (2 * HOUR_MS - 1, "119 min"),
        (2 * HOUR_MS, "2 h"),
        (2 * HOUR_MS + 5 * MINUTE_MS, "2 h 5 min"),
    ],
)
def test_durations_in_words(ms: int, words: str) -> None:
    assert transitions.in_words(ms) == words
