"""What comes too late: calls that are told in the journal; a complete that is kept or taken, and how one is adopted."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import decide, late_result_rules, state
from jobd.core.changeset import Draft
from jobd.model.commands import (
    Adopt,
    Call,
    Cancel,
    Claim,
    Complete,
    Delete,
    Extend,
    ExtendLock,
    Fail,
    ForceFail,
    ForceReset,
    Get,
    LateResults,
    Progress,
    Recover,
    Release,
    ReleaseLock,
    Transition,
    Undelivered,
    Update,
    Why,
)
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS, MAX_LATE_RESULTS, MINUTE_MS, LatePolicy, Policy, Result
from jobd.model.responses import HistoryRead, JobView, LateResultList, Response, WhyView
from jobd.model.storage import LateResultRows
from tests.support.rule_harness import NOW, RuleHarness

LONG = 60 * MINUTE_MS


@pytest.fixture
def desk() -> RuleHarness:
    return RuleHarness()


def taking(**fields: Any) -> RuleHarness:
    return RuleHarness(Policy(late_results="adopt_if_unclaimed", **fields))


def stalled(desk: RuleHarness, *, worker: str = "w-1", **fields: Any) -> str:
    """A job whose worker went silent, and the lock that it had."""
    lock_id = desk.held(worker=worker, **fields)
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    return lock_id


def completing(lock_id: str, **fields: Any) -> Complete:
    return Complete(id="a", lock_id=lock_id, **({"file_path": "/out"} | fields))


def late(desk: RuleHarness, command: late_result_rules.Calls, *, kept: bool = True, told: bool = False) -> ApiError:
    """The refusal of a call that comes late; whether it left its result, or else was told of."""
    row, before = desk.job(), len(desk.events)
    refusal = desk.reject(command, "lock_lost")
    assert desk.job() == row, "a late call changed the job"
    assert [event.type for event in desk.events[before:]] == ["late_result"] * kept + ["late_call"] * told
    return refusal


def advice(desk: RuleHarness) -> list[str]:
    view: WhyView = desk.accept(Why(id="a"))
    return view.do


# -- kept -------------------------------------------------------------------------------------------------------------


def test_what_a_late_complete_brings_is_kept(desk: RuleHarness) -> None:
    lock_id = stalled(desk)
    asked = completing(
        lock_id, download_url="u", storage_key="k/1", metadata=Raw(b'{"a":1}'), expires_at=desk.now + DAY_MS
    )
    refusal = late(desk, asked)
    event, (kept,) = desk.last(), desk.late()
    assert refusal.details["late_result"] == event.seq == kept.seq
    assert refusal.message.endswith(f"as late result {kept.seq}; an operator can adopt it: jobctl adopt a")
    assert (event.type, event.by, event.before, event.after) == ("late_result", "worker:w-1", "queued", "queued")
    assert event.reason == (
        "Worker w-1 completed the job after its lock was lost; the job is queued. Its result is stored."
    )
    token = desk.tokens[-1]
    assert event.details == {"worker": "w-1", "fencing_token": token}
    assert (kept.at, kept.worker, kept.fencing_token, kept.expires_at) == (desk.now, "w-1", token, asked.expires_at)
    assert kept.result == Result("u", "/out", "k/1", Raw(b'{"a":1}'))


def test_a_repeat_adds_nothing_and_is_told_the_same(desk: RuleHarness) -> None:
    lock_id = stalled(desk)
    first = late(desk, completing(lock_id))
    assert late(desk, completing(lock_id), kept=False) == first
    assert len(desk.late()) == 1


def test_of_each_grant_the_first_word_counts(desk: RuleHarness) -> None:
    lock_id = stalled(desk)
    late(desk, completing(lock_id))
    refusal = late(desk, completing(lock_id, file_path="/other"), kept=False, told=True)
    assert "late_result" not in refusal.details
    late(desk, completing(lock_id, file_path="/third"), kept=False)
    assert [kept.result.file_path for kept in desk.late()] == ["/out"]


def test_a_lock_that_was_no_grant_of_this_job_leaves_nothing(desk: RuleHarness) -> None:
    stalled(desk)
    others = desk.held("b")
    for lock_id in ("never-one", others):
        assert "late_result" not in late(desk, completing(lock_id), kept=False).details
    desk.create("c")
    desk.reject(Complete(id="c", lock_id="never-one"), "lock_lost")
    assert desk.last().type == "created"


def test_an_older_grant_is_known_by_the_journal(desk: RuleHarness) -> None:
    old = stalled(desk, worker="w-old")
    desk.start(worker="w-new")
    latest = desk.job().grant
    assert latest is not None
    desk.accept(ForceReset(id="a"), admin=True)
    assert desk.job().ended is not None
    refusal = late(desk, completing(old))
    assert desk.last().by == "worker:w-old"
    assert refusal.details["reason"] == "not_current"
    late(desk, completing(latest.lock_id, file_path="/new"))
    assert [kept.worker for kept in desk.late()] == ["w-old", "w-new"]


def test_while_another_holds_the_job_that_is_said(desk: RuleHarness) -> None:
    old = stalled(desk)
    desk.start(worker="w-2")
    late(desk, completing(old))
    assert "worker w-2 holds the job" in (desk.last().reason or "")


def test_also_beside_a_completed_job(desk: RuleHarness) -> None:
    old = stalled(desk)
    lock_id = desk.start(worker="w-2")
    desk.accept(completing(lock_id, file_path="/first"))
    refusal = late(desk, completing(old))
    assert refusal.message.endswith(f"Its result is stored as late result {desk.last().seq}.")
    assert advice(desk) == []


def test_of_a_job_only_the_latest_grants_are_kept_and_none_comes_back(desk: RuleHarness) -> None:
    locks = [stalled(desk, max_stalls=20)]
    for _ in range(MAX_LATE_RESULTS):
        locks.append(desk.start())
        desk.advance(LONG)
        desk.accept(Recover(limit=1))
    for lock_id in locks:
        late(desk, completing(lock_id))
    assert [kept.fencing_token for kept in desk.late()] == desk.tokens[1:]
    assert "late_result" not in late(desk, completing(locks[0]), kept=False).details
    assert [kept.fencing_token for kept in desk.late()] == desk.tokens[1:]


def test_one_between_those_that_are_kept_takes_the_place_of_the_oldest(desk: RuleHarness) -> None:
    locks = [stalled(desk, max_stalls=20)]
    for _ in range(MAX_LATE_RESULTS):
        locks.append(desk.start())
        desk.advance(LONG)
        desk.accept(Recover(limit=1))
    for lock_id in locks[:2] + locks[3:]:
        late(desk, completing(lock_id))
    late(desk, completing(locks[2]))
    assert [kept.fencing_token for kept in desk.late()] == desk.tokens[1:]


def test_a_grant_before_all_that_are_kept_is_kept_while_there_is_room(desk: RuleHarness) -> None:
    locks = [stalled(desk)]
    locks.append(desk.start())
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    for lock_id in reversed(locks):
        late(desk, completing(lock_id))
    assert [kept.fencing_token for kept in desk.late()] == desk.tokens


@pytest.mark.parametrize(("size", "kept"), [(100, True), (101, False)])
def test_metadata_has_its_limit(size: int, kept: bool) -> None:
    desk = RuleHarness(Policy(late_bytes=100))
    lock_id = stalled(desk)
    metadata = Raw(b'"' + b"x" * (size - 2) + b'"')
    refusal = late(desk, completing(lock_id, metadata=metadata), kept=kept, told=not kept)
    assert ("late_result" in refusal.details) == kept


def test_a_key_that_may_name_nothing_is_not_kept(desk: RuleHarness) -> None:
    lock_id = stalled(desk)
    late(desk, completing(lock_id, storage_key="../up"), kept=False, told=True)


def test_an_empty_result_says_that_the_work_is_done(desk: RuleHarness) -> None:
    lock_id = stalled(desk)
    late(desk, Complete(id="a", lock_id=lock_id, metadata=Raw(b"null")))
    assert desk.late()[0].result == Result()
    assert desk.accept(Adopt(id="a"), admin=True).status == "completed"


def test_a_row_in_nobodys_hands_leaves_nothing(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.row(replace(desk.job(), lease=None))
    late(desk, completing(lock_id), kept=False)


def test_a_lock_that_ends_in_the_batch_of_its_complete_leaves_its_result(desk: RuleHarness) -> None:
    """Before the batch it was not late: nobody looked what the disk has of the job."""
    lock_id = desk.held()
    desk.accept(ForceReset(id="a"), admin=True)
    desk.book.late = LateResultRows()
    decision = decide.decide(desk.book, Call(completing(lock_id)), desk.moment, desk.policy)
    assert isinstance(decision.answer, ApiError)
    assert decision.answer.details["late_result"] == decision.changes[0].event.seq


@pytest.mark.parametrize(
    ("policy", "queues", "kept"),
    [
        ("keep", {}, True),
        ("drop", {}, False),
        ("drop", {"default": "keep"}, True),
        ("keep", {"default": "drop"}, False),
        ("keep", {"other": "drop"}, True),
    ],
)
def test_a_queue_may_have_its_own_policy(policy: LatePolicy, queues: dict[str, LatePolicy], kept: bool) -> None:
    desk = RuleHarness(Policy(late_results=policy, late_queues=queues))
    late(desk, completing(stalled(desk)), kept=kept, told=not kept)


def test_a_release_of_an_operator_leaves_the_worker_its_word(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.accept(ReleaseLock(id="a", lock_id=lock_id), admin=True)
    late(desk, completing(lock_id))


def test_what_a_holder_has_ended_itself_is_no_late_result(desk: RuleHarness) -> None:
    lock_id = desk.held(max_attempts=2)
    desk.accept(Fail(id="a", lock_id=lock_id, error_message="e"))
    desk.reject(completing(lock_id), "invalid_transition")
    assert desk.late() == []


def test_a_deleted_job_takes_them_along(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.accept(ForceFail(id="a"), admin=True)
    late(desk, completing(lock_id))
    desk.accept(Delete(id="a"), admin=True)
    desk.reject(LateResults(id="a"), "job_not_found", admin=True)
    assert not any(desk.lates.values())


# -- taken at once ----------------------------------------------------------------------------------------------------


def test_left_alone_since_it_is_taken() -> None:
    desk = taking()
    lock_id = stalled(desk)
    view: JobView = desk.accept(completing(lock_id, expires_at=desk.now + 7))
    job, event = desk.job(), desk.last()
    assert (view.status, view.progress, view.file_path, view.expires_at) == ("completed", 100, "/out", desk.now + 7)
    assert (event.type, event.by, event.before, event.after) == ("adopted", "worker:w-1", "queued", "completed")
    assert event.details == {"worker": "w-1", "fencing_token": desk.tokens[-1]}
    assert "no other worker got the job since" in (event.reason or "")
    assert job.finished_at == desk.now
    assert desk.late() == []
    assert desk.accept(completing(lock_id, expires_at=desk.now + 7)).repeated is True
    desk.reject(completing(lock_id, file_path="/other"), "invalid_transition")


def test_what_it_leaves_is_what_a_complete_in_time_leaves() -> None:
    """So that whatever is called next with that lock hears the same."""
    in_time, desk = taking(), taking()
    asked = completing(in_time.held())
    in_time.advance(LONG)
    in_time.accept(asked)
    assert stalled(desk) == asked.lock_id
    desk.advance(5)
    desk.accept(asked)
    ended = in_time.job().ended
    assert ended is not None
    assert desk.job().ended == replace(ended, at=desk.now)
    told = desk.reject(completing(asked.lock_id, file_path="/other"), "invalid_transition")
    assert told.details == {"status": "completed", "ended_by": "complete", "ended_at": desk.now}


def test_also_where_the_stall_has_failed_it() -> None:
    desk = taking()
    lock_id = desk.held(on_stall="fail")
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    assert desk.job().status == "failed"
    assert desk.accept(completing(lock_id)).status == "completed"
    assert desk.job().error is None


def touched_update(desk: RuleHarness) -> None:
    desk.advance(1)
    desk.accept(Update(id="a", priority=1), admin=True)


def touched_given(desk: RuleHarness) -> None:
    desk.accept(Claim(worker="w-2"))


def touched_given_back(desk: RuleHarness) -> None:
    lock_id = desk.start(worker="w-2")
    desk.accept(ReleaseLock(id="a", lock_id=lock_id), admin=True)


def touched_cancelled(desk: RuleHarness) -> None:
    desk.accept(Cancel(id="a"))


def touched_force_failed(desk: RuleHarness) -> None:
    desk.accept(ForceFail(id="a"), admin=True)


def touched_moved(desk: RuleHarness) -> None:
    desk.advance(1)
    desk.accept(Transition(id="a", from_="queued", to="failed"), admin=True)
    desk.accept(Transition(id="a", from_="failed", to="queued"), admin=True)


TOUCHES = [
    touched_update,
    touched_given,
    touched_given_back,
    touched_cancelled,
    touched_force_failed,
    touched_moved,
]


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
def test_a_job_that_was_not_left_alone_keeps_it_for_an_operator(touch: Any) -> None:
    desk = taking()
    lock_id = stalled(desk)
    touch(desk)
    late(desk, completing(lock_id))


@pytest.mark.parametrize("touch", [touched_given, touched_cancelled], ids=lambda touch: touch.__name__)
def test_nor_is_one_taken_that_has_failed_by_a_stall_before(touch: Any) -> None:
    """Its last error stays and looks like that of a job that nobody has touched since."""
    desk = taking()
    desk.held(on_stall="fail")
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    desk.accept(Transition(id="a", from_="failed", to="queued"), admin=True)
    desk.row(replace(desk.job(), options=replace(desk.job().options, on_stall="requeue")))
    lock_id = desk.start()
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    touch(desk)
    late(desk, completing(lock_id))


def test_a_row_that_has_lost_its_error_or_its_last_grant_is_left_to_an_operator() -> None:
    """Hands leave such rows, and a worker must not be told that jobd is broken."""
    desk = taking()
    lock_id = desk.held(on_stall="fail")
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    whole = desk.row(replace(desk.job(), error=None))
    late(desk, completing(lock_id))
    desk.row(replace(whole, ended=None))
    desk.lates.clear()
    late(desk, completing(lock_id))


def test_a_reset_within_the_same_millisecond_is_noticed() -> None:
    desk = taking()
    lock_id = desk.held(on_stall="fail")
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    desk.accept(ForceReset(id="a"), admin=True)
    late(desk, completing(lock_id))


def test_an_older_grant_is_not_taken() -> None:
    desk = taking()
    old = stalled(desk)
    desk.start(worker="w-2")
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    late(desk, completing(old))


def test_a_job_that_nobody_wants_any_more_is_not_taken() -> None:
    desk = taking()
    lock_id = stalled(desk, expires_at=NOW + LONG + 5)
    desk.advance(5)
    late(desk, completing(lock_id))


def test_a_grant_that_an_operator_ended_is_not_taken() -> None:
    desk = taking()
    lock_id = desk.held()
    desk.accept(ForceReset(id="a"), admin=True)
    late(desk, completing(lock_id))


def test_nor_where_the_job_has_stalled_before() -> None:
    desk = taking()
    stalled(desk)
    lock_id = desk.start(worker="w-2")
    desk.accept(ReleaseLock(id="a", lock_id=lock_id), admin=True)
    late(desk, completing(lock_id))


def test_what_may_not_complete_a_job_is_kept() -> None:
    desk = taking(require_download_url=True)
    refusal = late(desk, completing(stalled(desk)))
    assert [kept.result.file_path for kept in desk.late()] == ["/out"]
    assert refusal.message.endswith(
        f"as late result {desk.last().seq}, but cannot be adopted: it has no download_url, which [validation] "
        "require_download_url requires."
    )
    lock_id = desk.start()
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    assert desk.accept(completing(lock_id, download_url="u")).status == "completed"


# -- adopted ----------------------------------------------------------------------------------------------------------


def test_an_operator_adopts_it(desk: RuleHarness) -> None:
    asked = completing(stalled(desk), metadata=Raw(b"[1]"))
    late(desk, asked)
    (result,) = desk.late()
    view: JobView = desk.accept(Adopt(id="a", reason="it is whole"), admin=True, by="admin")
    job, event = desk.job(), desk.last()
    assert (view.status, view.progress, view.file_path, view.metadata) == ("completed", 100, "/out", Raw(b"[1]"))
    assert (event.type, event.by, event.reason) == ("adopted", "admin", "it is whole")
    assert event.details == {"late_result": result.seq, "worker": "w-1", "fencing_token": result.fencing_token}
    assert job.expires_at == desk.now + 7 * DAY_MS
    assert late(desk, asked, kept=False).details["late_result"] == result.seq


@pytest.mark.parametrize("status", ["queued", "failed", "cancelled"])
def test_from_every_status_that_may_lead_there(desk: RuleHarness, status: str) -> None:
    late(desk, completing(stalled(desk)))
    if status == "failed":
        desk.accept(ForceFail(id="a"), admin=True)
    if status == "cancelled":
        desk.accept(Cancel(id="a"))
    assert desk.job().status == status
    assert desk.accept(Adopt(id="a"), admin=True).status == "completed"
    assert desk.job().error is None


@pytest.mark.parametrize("named", ["the older", "the newer", "none"])
def test_the_one_that_is_named_or_that_of_the_latest_grant(desk: RuleHarness, named: str) -> None:
    old = stalled(desk)
    new = desk.start(worker="w-2")
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    late(desk, completing(new, file_path="/new"))
    late(desk, completing(old, file_path="/old"))
    older, newer = desk.late()
    refusal = desk.reject(Adopt(id="a", result=1), "late_result_not_found", admin=True)
    assert refusal.message == "Job a has no late result 1. List its late results: jobctl late a"
    result = {"the older": older.seq, "the newer": newer.seq, "none": None}[named]
    desk.accept(Adopt(id="a", result=result), admin=True)
    assert desk.job().result == Result(file_path="/old" if named == "the older" else "/new")


def test_where_somebody_holds_it_that_is_said(desk: RuleHarness) -> None:
    late(desk, completing(stalled(desk)))
    desk.start(worker="w-2")
    refusal = desk.reject(Adopt(id="a"), "invalid_transition", admin=True)
    assert refusal.message == (
        "Job a is processing. Worker w-2 holds it. Wait until it ends, or end its grant first "
        "(jobctl force-fail a), then adopt."
    )
    desk.row(replace(desk.job(), grant=None, lease=None))
    assert "processing. Wait until it ends" in desk.reject(Adopt(id="a"), "invalid_transition", admin=True).message


def test_completed_is_final(desk: RuleHarness) -> None:
    desk.completed()
    refusal = desk.reject(Adopt(id="a"), "invalid_transition", admin=True)
    assert "completed is final" in refusal.message
    assert refusal.details == {"status": "completed", "to": "completed", "allowed": []}


def test_a_job_that_is_created_in_the_same_batch_has_none(desk: RuleHarness) -> None:
    """Before the batch it was not there: nobody looked what the disk has of it."""
    desk.create()
    desk.book.late = LateResultRows()
    refusal = decide.decide(desk.book, Call(Adopt(id="a"), admin=True), desk.moment, desk.policy).answer
    assert isinstance(refusal, ApiError)
    assert refusal.code == "late_result_not_found"


def test_there_has_to_be_one(desk: RuleHarness) -> None:
    desk.create()
    refusal = desk.reject(Adopt(id="a"), "late_result_not_found", admin=True)
    assert (refusal.status, refusal.details) == (404, {"job_id": "a"})
    assert "has no late result" in refusal.message
    desk.reject(Adopt(id="b"), "job_not_found", admin=True)


def test_what_every_completed_job_must_have_it_must_have() -> None:
    desk = RuleHarness()
    late(desk, completing(stalled(desk)))
    desk.policy = Policy(require_download_url=True)
    for dry_run in (False, True):
        refusal = desk.reject(Adopt(id="a", dry_run=dry_run), "invalid_request", admin=True)
        assert refusal.details == {"field": "$.download_url"}
        assert refusal.message == (
            f"Late result {desk.late()[0].seq} cannot be adopted: it has no download_url, which [validation] "
            "require_download_url requires. If the work is complete, set a URL yourself: "
            "jobctl transition ID STATUS completed --set download_url=URL (also set the other fields that you want to "
            "keep)"
        )
    desk.policy = Policy()
    assert desk.accept(Adopt(id="a"), admin=True).status == "completed"


def test_of_several_one_that_may_complete_the_job_is_adopted() -> None:
    desk = RuleHarness(Policy(require_download_url=True))
    locks = [stalled(desk), desk.start()]
    desk.accept(ForceReset(id="a"), admin=True)
    late(desk, completing(locks[0], download_url="u"))
    late(desk, completing(locks[1]))
    good, newer = desk.late()
    assert late_result_rules.refuse_adoption(good, desk.policy) is None
    assert desk.reject(Adopt(id="a"), "invalid_request", admin=True).message.startswith(f"Late result {newer.seq} ")
    assert desk.accept(Adopt(id="a", result=good.seq), admin=True).download_url == "u"


def test_a_dry_run_is_answered_as_if_it_were_done_and_nothing_is(desk: RuleHarness) -> None:
    desk.reject(Adopt(id="a", dry_run=True), "job_not_found", admin=True)
    late(desk, completing(stalled(desk)))
    before = desk.job()
    decision = desk.decide(Adopt(id="a", dry_run=True), admin=True)
    assert (decision.changes, desk.job()) == ([], before)
    assert isinstance(decision.answer, Response)
    assert decision.answer.data == desk.accept(Adopt(id="a"), admin=True)
    desk.reject(Adopt(id="a", dry_run=True), "invalid_transition", admin=True)


@pytest.mark.parametrize(("ahead", "used"), [(1, True), (0, False), (-1, False)])
def test_the_time_of_deletion_that_was_asked_for_counts_if_it_is_ahead(
    desk: RuleHarness, ahead: int, used: bool
) -> None:
    asked = completing(stalled(desk), expires_at=desk.now + 10)
    late(desk, asked)
    desk.advance(10 - ahead)
    desk.accept(Adopt(id="a"), admin=True)
    assert desk.job().expires_at == (asked.expires_at if used else desk.now + 7 * DAY_MS)


# -- looked at --------------------------------------------------------------------------------------------------------


def test_they_are_listed_from_the_disk(desk: RuleHarness) -> None:
    desk.create()
    answer = desk.ask(LateResults(id="a"), admin=True)
    assert isinstance(answer, Response)
    assert answer.read == HistoryRead(late=desk.job().seq)
    assert answer.data == LateResultList([])


def test_why_says_what_to_do_with_one(desk: RuleHarness) -> None:
    late(desk, completing(stalled(desk, worker="w-7")))
    assert advice(desk)[0] == "Worker w-7 submitted a late result. To adopt it: jobctl adopt a"
    desk.start(worker="w-2")
    assert advice(desk)[0].endswith("To adopt it: jobctl force-fail a, then jobctl adopt a")


def test_why_promises_no_adoption_that_would_be_refused(desk: RuleHarness) -> None:
    late(desk, completing(stalled(desk, worker="w-7")))
    desk.policy = Policy(require_download_url=True)
    lacks = (
        "Worker w-7 submitted a late result, but it cannot be adopted: it has no download_url, which [validation] "
        "require_download_url requires. Inspect it: jobctl late a. If the work is complete: "
    )
    too = " (also set the other fields that you want to keep)"
    assert advice(desk)[0] == f"{lacks}jobctl transition a queued completed --set download_url=URL{too}"
    lock_id = desk.start(worker="w-8")
    by_hand = f"jobctl force-fail a, then jobctl transition a failed completed --set download_url=URL{too}"
    assert advice(desk)[0] == lacks + by_hand
    desk.policy = Policy()
    assert "jobctl adopt a" in advice(desk)[0], "the policy is that of now"
    desk.policy = Policy(require_download_url=True)
    desk.accept(ForceFail(id="a"), admin=True)
    refused = late(desk, completing(lock_id, download_url="u"))
    assert refused.message.endswith("an operator can adopt it: jobctl adopt a")
    assert advice(desk)[0] == "Worker w-8 submitted a late result. To adopt it: jobctl adopt a"


def test_why_names_the_late_result_that_can_be_adopted_where_it_is_not_the_latest() -> None:
    desk = RuleHarness(Policy(require_download_url=True))
    locks = [stalled(desk, worker="w-7"), desk.start(worker="w-8")]
    desk.accept(ForceReset(id="a"), admin=True)
    late(desk, completing(locks[0], download_url="u"))
    late(desk, completing(locks[1]))
    named = f"jobctl adopt a --result {desk.late()[0].seq}"
    assert advice(desk)[0] == f"Worker w-7 submitted a late result. To adopt it: {named}"


def test_of_several_the_one_of_the_latest_grant_is_named_before_all_other_advice(desk: RuleHarness) -> None:
    locks = [stalled(desk, worker="w-7"), desk.start(worker="w-8")]
    held = advice(desk)
    desk.advance(LONG)
    desk.accept(Recover(limit=1))
    queued = advice(desk)
    for lock_id in reversed(locks):
        late(desk, completing(lock_id))
    assert advice(desk) == ["Worker w-8 submitted a late result. To adopt it: jobctl adopt a", *queued]
    desk.start(worker="w-8")
    assert advice(desk)[1:] == held


def test_what_has_to_be_read_before_a_decision(desk: RuleHarness) -> None:
    def asks(command: Any) -> Any:
        return late_result_rules.asks(desk.book, command, desk.policy)

    lock_id = desk.held()
    seq = desk.job().seq
    assert asks(Get(id="a")) is None
    assert asks(completing(lock_id)) is None, "its holder is who holds it"
    assert asks(Complete(id="b", lock_id="x")) is None
    assert asks(Adopt(id="b")) is None
    found = asks(completing("x"))
    assert (found.job_seq, found.lock_id, found.with_results) == (seq, "x", False)
    found = asks(Adopt(id="a"))
    assert (found.job_seq, found.lock_id, found.with_results) == (seq, None, True)
    found = asks(Why(id="a"))
    assert (found.job_seq, found.lock_id, found.with_results) == (seq, None, False)
    desk.accept(ForceReset(id="a"), admin=True)
    assert asks(completing(lock_id)).lock_id is None, "the job knows its last grant"
    desk.policy = Policy(late_results="drop")
    assert asks(completing(lock_id)) is None
    other = desk.held("c")
    desk.policy = Policy()
    desk.accept(Complete(id="c", lock_id=other))
    assert asks(Complete(id="c", lock_id=other)) is None, "it repeats what its holder said"


def test_a_draft_numbers_what_it_keeps(desk: RuleHarness) -> None:
    """Two notes of one decision would have two numbers."""
    late(desk, completing(stalled(desk)))
    draft = Draft(desk.book, Call(Get(id="a")), desk.moment, desk.policy)
    first = draft.keep_late(desk.job(), desk.late()[0], "r", {})
    second = draft.keep_late(desk.job(), first, "r", {})
    assert (first.seq, second.seq) == (desk.book.next_event, desk.book.next_event + 1)
    assert all(change.before is change.after for change in draft.changes)


# -- told -------------------------------------------------------------------------------------------------------------


CALLS: dict[str, Any] = {
    "progress": (Progress, {"progress": 42.0, "message": "half"}, {"progress": 42, "message": "half"}),
    "extend": (Extend, {"additional_ms": 5_000}, {}),
    "fail": (
        Fail,
        {"error_message": "disk on fire", "error_code": "E1"},
        {"error_message": "disk on fire", "error_code": "E1"},
    ),
    "release": (Release, {"delay_ms": 5}, {}),
    "complete": (Complete, {"file_path": "/out"}, {}),
}
WORDS = {
    "progress": "reported progress",
    "extend": "requested an extension",
    "fail": "failed the job",
    "release": "released the job",
    "complete": "completed the job",
}


def call(verb: str, lock_id: str, job_id: str = "a", **fields: Any) -> Any:
    kind, given, _ = CALLS[verb]
    return kind(id=job_id, lock_id=lock_id, **(given | fields))


@pytest.fixture
def dropping() -> RuleHarness:
    """Where also a complete leaves nothing but word of it."""
    return RuleHarness(Policy(late_results="drop"))


@pytest.mark.parametrize("verb", CALLS)
def test_the_first_refused_call_of_an_ended_grant_is_told_with_what_it_said(dropping: RuleHarness, verb: str) -> None:
    desk = dropping
    lock_id = desk.held()
    desk.accept(ForceFail(id="a"), admin=True)
    plain = RuleHarness(Policy(late_results="drop", late_calls=False))
    old = plain.held()
    plain.accept(ForceFail(id="a"), admin=True)
    assert late(desk, call(verb, lock_id), kept=False, told=True) == late(plain, call(verb, old), kept=False)
    event = desk.last()
    assert (event.type, event.by, event.before, event.after) == ("late_call", "worker:w-1", "failed", "failed")
    assert event.reason == (
        f"Worker w-1 {WORDS[verb]} after its lock was lost (force-fail); the job is failed. The call was rejected."
    )
    said = {"verb": verb, "worker": "w-1", "fencing_token": desk.tokens[-1], **CALLS[verb][2]}
    assert event.details == said
    assert event.changes is None


def test_what_a_refused_call_has_not_said_is_not_told(dropping: RuleHarness) -> None:
    lock_id = dropping.held()
    dropping.accept(ForceFail(id="a"), admin=True)
    late(dropping, call("progress", lock_id, message=None), kept=False, told=True)
    told = {"verb": "progress", "worker": "w-1", "fencing_token": dropping.tokens[-1], "progress": 42}
    assert dropping.last().details == told


def test_of_each_verb_one_is_told_however_often_it_is_said(dropping: RuleHarness) -> None:
    desk = dropping
    lock_id = stalled(desk)
    for number in range(3):
        for verb in CALLS:
            desk.advance(1_000)
            late(desk, call(verb, lock_id), kept=False, told=number == 0)
    late(desk, call("progress", lock_id, progress=99, message="other"), kept=False)
    late(desk, call("fail", lock_id, error_message="other"), kept=False)
    assert [event.type for event in desk.events].count("late_call") == len(CALLS)


def test_each_grant_is_told_of_by_itself_and_a_holder_beside_it_is_named(desk: RuleHarness) -> None:
    first = stalled(desk)
    late(desk, call("extend", first), kept=False, told=True)
    second = desk.start(worker="w-2")
    late(desk, call("progress", first), kept=False, told=True)
    assert (desk.last().reason or "").endswith("(recovery); worker w-2 holds the job. The call was rejected.")
    desk.accept(call("progress", second))
    desk.accept(ForceReset(id="a"), admin=True)
    late(desk, call("progress", second), kept=False, told=True)
    assert (desk.last().details or {})["fencing_token"] == desk.tokens[-1]
    late(desk, call("extend", first), kept=False)  # memory does not know it any more


def test_nobody_who_never_held_the_job_writes_into_its_journal(desk: RuleHarness) -> None:
    stalled(desk)
    others = desk.held("b")
    desk.accept(ForceFail(id="b"), admin=True)
    for verb in CALLS:
        for lock_id in ("never-one", others):
            late(desk, call(verb, lock_id), kept=False)
    desk.create("c")
    desk.reject(call("progress", "never-one", "c"), "lock_lost")
    assert desk.last().type == "created"


def test_what_a_holder_has_ended_itself_is_told_already(desk: RuleHarness) -> None:
    lock_id = desk.held()
    desk.accept(call("fail", lock_id))
    before = len(desk.events)
    for verb in ("progress", "extend", "complete"):
        desk.reject(call(verb, lock_id), "invalid_transition")
    desk.accept(call("fail", lock_id))
    desk.accept(call("release", lock_id))
    assert len(desk.events) == before


def test_what_operators_ask_with_an_old_lock_is_no_call_of_its_worker(desk: RuleHarness) -> None:
    lock_id = stalled(desk)
    before = len(desk.events)
    desk.reject(ExtendLock(id="a", lock_id=lock_id), "lock_lost", admin=True)
    desk.reject(ReleaseLock(id="a", lock_id=lock_id), "lock_lost", admin=True)
    desk.reject(Undelivered(id="a", lock_id=lock_id), "lock_lost")
    assert len(desk.events) == before


def test_a_complete_that_is_kept_or_taken_is_told_as_that(desk: RuleHarness) -> None:
    late(desk, completing(stalled(desk)))
    desk = taking()
    desk.accept(completing(stalled(desk)))
    assert [event.type for event in desk.events][-1] == "adopted"


def test_word_of_a_late_call_keeps_no_result_from_being_taken() -> None:
    """The job was left alone: what its worker said meanwhile changed nothing."""
    desk = taking()
    lock_id = stalled(desk)
    late(desk, call("progress", lock_id), kept=False, told=True)
    assert desk.accept(completing(lock_id)).status == "completed"


def test_how_many_told_calls_are_remembered_has_a_limit(desk: RuleHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "LATE_CALLS_KEPT", 2)
    lock_id = stalled(desk)
    for verb in ("progress", "extend", "release"):
        late(desk, call(verb, lock_id), kept=False, told=True)
    for verb in ("extend", "release"):
        late(desk, call(verb, lock_id), kept=False)
    late(desk, call("progress", lock_id), kept=False, told=True)
