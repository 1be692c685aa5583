"""Late calls: recorded in the journal, or stored or adopted as a late result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import decide
from jobd.core.rules import late_result_rules
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS, MINUTE_MS, LatePolicy, Policy, Result
from jobd.model.responses import HistoryRead, JobView, LateResultList, Response, WhyView
from tests.support.rule_harness import NOW, RuleHarness

LONG = 60 * MINUTE_MS


def taking(**fields: Any) -> RuleHarness:
    return RuleHarness(Policy(late_results="adopt_if_unclaimed", **fields))


def stalled(rules: RuleHarness, *, worker: str = "w-1", **fields: Any) -> str:
    """Create a job that stalled; return its former lock."""
    lock_id = rules.held(worker=worker, **fields)
    rules.recover(LONG)
    return lock_id


def completing(lock_id: str, **fields: Any) -> cmd.Complete:
    return cmd.Complete(id="a", lock_id=lock_id, **({"file_path": "/out"} | fields))


def late(
    rules: RuleHarness, command: late_result_rules.Calls, *, is_stored: bool = True, is_recorded: bool = False
) -> ApiError:
    """Decide a late call; return its error. Check whether it left a result, or else was recorded."""
    row, before = rules.job(), len(rules.events)
    rejection = rules.reject(command, "lock_lost")
    assert rules.job() == row, "a late call changed the job"
    assert [event.type for event in rules.events[before:]] == ["late_result"] * is_stored + ["late_call"] * is_recorded
    return rejection


def advice(rules: RuleHarness) -> list[str]:
    view: WhyView = rules.accept(cmd.Why(id="a"))
    return view.do


# -- kept -------------------------------------------------------------------------------------------------------------


def test_the_result_of_a_late_complete_is_stored(rules: RuleHarness) -> None:
    lock_id = stalled(rules)
    command = completing(
        lock_id, download_url="u", storage_key="k/1", metadata=Raw(b'{"a":1}'), expires_at=rules.now + DAY_MS
    )
    rejection = late(rules, command)
    event, (stored,) = rules.last(), rules.late()
    assert rejection.details["late_result"] == event.seq == stored.seq
    assert rejection.message == (
        "This lock of job a is lost: it was ended by recovery; the job is queued. Stop working on the job. "
        f"Its result is stored as late result {stored.seq}; an operator can adopt it: jobctl adopt a"
    )
    assert (event.type, event.by, event.from_status, event.to_status) == (
        "late_result",
        "worker:w-1",
        "queued",
        "queued",
    )
    assert event.reason == (
        "Worker w-1 completed the job after its lock was lost; the job is queued. Its result is stored."
    )
    token = rules.tokens[-1]
    assert event.details == {"worker": "w-1", "fencing_token": token}
    assert (event.at, event.job_seq, event.job_id, event.queue) == (rules.now, 1, "a", "default")
    assert (stored.at, stored.worker, stored.fencing_token, stored.expires_at) == (
        rules.now,
        "w-1",
        token,
        command.expires_at,
    )
    assert stored.result == Result("u", "/out", "k/1", Raw(b'{"a":1}'))


def test_a_repeat_adds_nothing_and_gets_the_same_error(rules: RuleHarness) -> None:
    lock_id = stalled(rules)
    first = late(rules, completing(lock_id))
    assert late(rules, completing(lock_id), is_stored=False) == first
    assert len(rules.late()) == 1


def test_only_the_first_late_complete_of_a_grant_counts(rules: RuleHarness) -> None:
    lock_id = stalled(rules)
    late(rules, completing(lock_id))
    rejection = late(rules, completing(lock_id, file_path="/other"), is_stored=False, is_recorded=True)
    assert "late_result" not in rejection.details
    late(rules, completing(lock_id, file_path="/third"), is_stored=False)
    assert [stored.result.file_path for stored in rules.late()] == ["/out"]


def test_an_unknown_lock_leaves_nothing(rules: RuleHarness) -> None:
    stalled(rules)
    others = rules.held("b")
    for lock_id in ("never-one", others):
        assert "late_result" not in late(rules, completing(lock_id), is_stored=False).details
    rules.create("c")
    rules.reject(cmd.Complete(id="c", lock_id="never-one"), "lock_lost")
    assert rules.last().type == "created"


def test_an_older_grant_is_found_in_the_journal(rules: RuleHarness) -> None:
    old = stalled(rules, worker="w-old")
    rules.start(worker="w-new")
    latest = rules.grant()
    rules.accept(cmd.ForceReset(id="a"), admin=True)
    assert rules.job().ended is not None
    rejection = late(rules, completing(old))
    assert rules.last().by == "worker:w-old"
    assert rejection.details["reason"] == "not_current"
    late(rules, completing(latest.lock_id, file_path="/new"))
    assert [stored.worker for stored in rules.late()] == ["w-old", "w-new"]


def test_the_error_names_the_current_holder(rules: RuleHarness) -> None:
    old = stalled(rules)
    rules.start(worker="w-2")
    late(rules, completing(old))
    assert rules.last().reason == (
        "Worker w-1 completed the job after its lock was lost; worker w-2 holds the job. Its result is stored."
    )


def test_a_completed_job_can_get_late_results(rules: RuleHarness) -> None:
    old = stalled(rules)
    lock_id = rules.start(worker="w-2")
    rules.accept(completing(lock_id, file_path="/first"))
    rejection = late(rules, completing(old))
    assert rejection.message.endswith(f"Its result is stored as late result {rules.last().seq}.")
    assert advice(rules) == []


@pytest.mark.parametrize(
    ("order", "kept"),
    [((1, 0), (0, 1)), ((0, 1, 2, 3, 4, 5), (1, 2, 3, 4, 5)), ((0, 1, 3, 4, 5, 2), (1, 2, 3, 4, 5))],
    ids=["all while there is space", "not the oldest", "one between the others"],
)
def test_the_results_of_the_latest_grants_are_stored_and_a_replaced_one_does_not_return(
    rules: RuleHarness, order: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    locks = [stalled(rules, max_stalls=20)]
    while len(locks) < len(order):
        locks.append(rules.start())
        rules.recover(LONG)
    for number in order:
        late(rules, completing(locks[number]))
    for number in set(order) - set(kept):
        assert "late_result" not in late(rules, completing(locks[number]), is_stored=False).details
    assert [stored.fencing_token for stored in rules.late()] == [rules.tokens[number] for number in kept]


@pytest.mark.parametrize(("size", "is_stored"), [(100, True), (101, False)])
def test_late_metadata_is_limited(size: int, is_stored: bool) -> None:
    rules = RuleHarness(Policy(late_bytes=100))
    lock_id = stalled(rules)
    metadata = Raw(b'"' + b"x" * (size - 2) + b'"')
    rejection = late(rules, completing(lock_id, metadata=metadata), is_stored=is_stored, is_recorded=not is_stored)
    assert ("late_result" in rejection.details) == is_stored


def test_a_result_with_an_invalid_storage_key_is_not_stored(rules: RuleHarness) -> None:
    lock_id = stalled(rules)
    late(rules, completing(lock_id, storage_key="../up"), is_stored=False, is_recorded=True)


def test_an_empty_late_result_is_stored(rules: RuleHarness) -> None:
    lock_id = stalled(rules)
    late(rules, cmd.Complete(id="a", lock_id=lock_id, metadata=Raw(b"null")))
    assert rules.late()[0].result == Result()
    assert rules.accept(cmd.Adopt(id="a"), admin=True).status == "completed"


def test_a_row_without_a_grant_leaves_nothing(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.row(replace(rules.job(), deadlines=None))
    late(rules, completing(lock_id), is_stored=False)


def test_a_lock_that_ends_in_the_same_batch_leaves_its_result(rules: RuleHarness) -> None:
    """Before the batch it was not late, so nothing was read from disk."""
    lock_id = rules.held()
    rules.accept(cmd.ForceReset(id="a"), admin=True)
    tx = Transaction(rules.state, rules.moment, rules.policy)
    rejection = decide.decide(tx, cmd.IssuedCommand(completing(lock_id)))
    assert isinstance(rejection, ApiError)
    assert rejection.details["late_result"] == tx.changes[0].seq


@pytest.mark.parametrize(
    ("policy", "queues", "is_stored"),
    [
        ("keep", {}, True),
        ("drop", {}, False),
        ("drop", {"default": "keep"}, True),
        ("keep", {"default": "drop"}, False),
        ("keep", {"other": "drop"}, True),
    ],
)
def test_a_queue_can_have_its_own_policy(policy: LatePolicy, queues: dict[str, LatePolicy], is_stored: bool) -> None:
    rules = RuleHarness(Policy(late_results=policy, late_queues=queues))
    late(rules, completing(stalled(rules)), is_stored=is_stored, is_recorded=not is_stored)


def test_a_worker_can_complete_after_an_operator_released_its_lock(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.accept(cmd.ReleaseLock(id="a", lock_id=lock_id), admin=True)
    late(rules, completing(lock_id))


def test_a_grant_ended_by_its_holder_has_no_late_result(rules: RuleHarness) -> None:
    lock_id = rules.held(max_attempts=2)
    rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="e"))
    rules.reject(completing(lock_id), "invalid_transition")
    assert rules.late() == []


def test_late_results_are_deleted_with_the_job(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.accept(cmd.ForceFail(id="a"), admin=True)
    late(rules, completing(lock_id))
    rules.accept(cmd.Delete(id="a"), admin=True)
    rules.reject(cmd.LateResults(id="a"), "job_not_found", admin=True)
    assert not any(rules.late_results.values())


# -- taken at once ----------------------------------------------------------------------------------------------------


def test_the_result_for_an_unclaimed_job_is_adopted() -> None:
    rules = taking()
    lock_id = stalled(rules)
    view: JobView = rules.accept(completing(lock_id, expires_at=rules.now + 7))
    job, event = rules.job(), rules.last()
    assert (view.status, view.progress, view.file_path, view.expires_at) == ("completed", 100, "/out", rules.now + 7)
    assert (event.type, event.by, event.from_status, event.to_status) == (
        "adopted",
        "worker:w-1",
        "queued",
        "completed",
    )
    assert event.details == {"worker": "w-1", "fencing_token": rules.tokens[-1]}
    assert event.reason == (
        "Worker w-1 had lost its lock, but the job had not been granted again: its result was accepted."
    )
    assert job.finished_at == rules.now
    assert rules.late() == []
    assert rules.accept(completing(lock_id, expires_at=rules.now + 7)).repeated is True
    rules.reject(completing(lock_id, file_path="/other"), "invalid_transition")


def test_an_adopted_result_is_like_a_complete_in_time() -> None:
    """So that the next call with that lock gets the same error."""
    in_time, rules = taking(), taking()
    command = completing(in_time.held())
    in_time.advance(LONG)
    in_time.accept(command)
    assert stalled(rules) == command.lock_id
    rules.advance(5)
    rules.accept(command)
    ended = in_time.job().ended
    assert ended is not None
    assert rules.job().ended == replace(ended, at=rules.now)
    error = rules.reject(completing(command.lock_id, file_path="/other"), "invalid_transition")
    assert error.details == {"status": "completed", "ended_by": "complete", "ended_at": rules.now}


def test_a_job_that_failed_by_the_stall_is_adopted_too() -> None:
    rules = taking()
    lock_id = stalled(rules, on_stall="fail")
    assert rules.job().status == "failed"
    assert rules.accept(completing(lock_id)).status == "completed"
    assert rules.job().error is None


def cancel(rules: RuleHarness) -> None:
    rules.accept(cmd.Cancel(id="a"))


def grant_to_another(rules: RuleHarness) -> None:
    rules.accept(cmd.Claim(worker="w-2"))


def update(rules: RuleHarness) -> None:
    rules.advance(1)
    rules.accept(cmd.Update(id="a", priority=1), admin=True)


def release_another(rules: RuleHarness) -> None:
    rules.accept(cmd.ReleaseLock(id="a", lock_id=rules.start(worker="w-2")), admin=True)


def stall_of_another(rules: RuleHarness) -> None:
    rules.start(worker="w-2")
    rules.recover(LONG)


def move(rules: RuleHarness) -> None:
    rules.advance(1)
    rules.accept(cmd.Transition(id="a", from_="queued", to="failed"), admin=True)
    rules.accept(cmd.Transition(id="a", from_="failed", to="queued"), admin=True)


def expire(rules: RuleHarness) -> None:
    rules.advance(rules.job().expires_at - rules.now)  # type: ignore[operator]


CHANGES: dict[str, tuple[dict[str, Any], Callable[[RuleHarness], object]]] = {
    "updated": ({}, update),
    "granted": ({}, grant_to_another),
    "released by another": ({}, release_another),
    "stalled with another": ({}, stall_of_another),
    "cancelled": ({}, cancel),
    "force-failed": ({}, lambda rules: rules.accept_admin(cmd.ForceFail(id="a"))),
    "moved": ({}, move),
    "reset within the same millisecond": (
        {"on_stall": "fail"},
        lambda rules: rules.accept_admin(cmd.ForceReset(id="a")),
    ),
    "overdue": ({"expires_at": NOW + LONG + 5}, expire),
}


@pytest.mark.parametrize(("options", "change"), CHANGES.values(), ids=CHANGES)
def test_the_result_for_a_changed_job_is_stored(
    options: dict[str, Any], change: Callable[[RuleHarness], object]
) -> None:
    rules = taking()
    lock_id = stalled(rules, **options)
    change(rules)
    late(rules, completing(lock_id))


@pytest.mark.parametrize("touch", [grant_to_another, cancel])
def test_the_result_for_a_job_that_failed_by_an_earlier_stall_is_stored(touch: Any) -> None:
    """Its last error remains and looks like that of an unclaimed job."""
    rules = taking()
    stalled(rules, on_stall="fail")
    rules.accept(cmd.Transition(id="a", from_="failed", to="queued"), admin=True)
    rules.row(replace(rules.job(), options=replace(rules.job().options, on_stall="requeue")))
    lock_id = rules.start()
    rules.recover(LONG)
    touch(rules)
    late(rules, completing(lock_id))


def test_the_result_for_a_row_without_error_or_last_grant_is_stored() -> None:
    """Manual edits leave such rows, and the worker must not get an internal error."""
    rules = taking()
    lock_id = stalled(rules, on_stall="fail")
    whole = rules.row(replace(rules.job(), error=None))
    late(rules, completing(lock_id))
    rules.row(replace(whole, ended=None))
    rules.late_results.clear()
    late(rules, completing(lock_id))


def test_the_result_of_a_grant_that_an_operator_ended_is_stored() -> None:
    rules = taking()
    lock_id = rules.held()
    rules.accept(cmd.ForceReset(id="a"), admin=True)
    late(rules, completing(lock_id))


def test_the_result_for_a_job_that_stalled_before_is_stored() -> None:
    rules = taking()
    stalled(rules)
    lock_id = rules.start(worker="w-2")
    rules.accept(cmd.ReleaseLock(id="a", lock_id=lock_id), admin=True)
    late(rules, completing(lock_id))


def test_a_result_that_may_not_complete_the_job_is_stored() -> None:
    rules = taking(require_download_url=True)
    rejection = late(rules, completing(stalled(rules)))
    assert [stored.result.file_path for stored in rules.late()] == ["/out"]
    assert rejection.message.endswith(
        f"as late result {rules.last().seq}, but cannot be adopted: it has no download_url, which [validation] "
        "require_download_url requires."
    )
    lock_id = rules.start()
    rules.recover(LONG)
    assert rules.accept(completing(lock_id, download_url="u")).status == "completed"


# -- adopted ----------------------------------------------------------------------------------------------------------


def test_an_operator_adopts_a_late_result(rules: RuleHarness) -> None:
    command = completing(stalled(rules), metadata=Raw(b"[1]"))
    late(rules, command)
    (result,), ended = rules.late(), rules.job().ended
    view: JobView = rules.accept(cmd.Adopt(id="a", reason="it is whole"), admin=True, by="admin")
    job, event = rules.job(), rules.last()
    assert (view.status, view.progress, view.file_path, view.metadata) == ("completed", 100, "/out", Raw(b"[1]"))
    assert (event.type, event.by, event.reason) == ("adopted", "admin", "it is whole")
    assert event.details == {"late_result": result.seq, "worker": "w-1", "fencing_token": result.fencing_token}
    assert (job.expires_at, job.ended) == (rules.now + 7 * DAY_MS, ended)
    assert late(rules, command, is_stored=False).details["late_result"] == result.seq


@pytest.mark.parametrize("status", ["queued", "failed", "cancelled"])
def test_adoption_from_every_allowed_status(rules: RuleHarness, status: str) -> None:
    late(rules, completing(stalled(rules)))
    if status == "failed":
        rules.accept(cmd.ForceFail(id="a"), admin=True)
    if status == "cancelled":
        rules.accept(cmd.Cancel(id="a"))
    assert rules.job().status == status
    assert rules.accept(cmd.Adopt(id="a"), admin=True).status == "completed"
    assert rules.job().error is None


@pytest.mark.parametrize("named", ["the older", "the newer", "none"])
def test_the_named_result_or_that_of_the_latest_grant_is_adopted(rules: RuleHarness, named: str) -> None:
    old = stalled(rules)
    new = rules.start(worker="w-2")
    rules.recover(LONG)
    late(rules, completing(new, file_path="/new"))
    late(rules, completing(old, file_path="/old"))
    older, newer = rules.late()
    rejection = rules.reject(cmd.Adopt(id="a", result=1), "late_result_not_found", admin=True)
    assert rejection.message == "Job a has no late result 1. List its late results: jobctl late a"
    result = {"the older": older.seq, "the newer": newer.seq, "none": None}[named]
    rules.accept(cmd.Adopt(id="a", result=result), admin=True)
    assert rules.job().result == Result(file_path="/old" if named == "the older" else "/new")


def test_a_processing_job_cannot_adopt_and_the_error_names_its_holder(rules: RuleHarness) -> None:
    late(rules, completing(stalled(rules)))
    rules.start(worker="w-2")
    rejection = rules.reject(cmd.Adopt(id="a"), "invalid_transition", admin=True)
    assert rejection.message == (
        "Job a is processing. Worker w-2 holds it. Wait until its grant ends, or end it "
        "(jobctl force-fail a); then adopt."
    )
    rules.row(replace(rules.job(), grant=None, deadlines=None))
    rejection = rules.reject(cmd.Adopt(id="a"), "invalid_transition", admin=True)
    assert rejection.message == (
        "Job a is processing. Wait until its grant ends, or end it (jobctl force-fail a); then adopt."
    )


def test_a_job_created_in_the_same_batch_has_no_late_results(rules: RuleHarness) -> None:
    """Before the batch it did not exist, so nothing was read from disk."""
    rules.create()
    tx = Transaction(rules.state, rules.moment, rules.policy)
    rejection = decide.decide(tx, cmd.IssuedCommand(cmd.Adopt(id="a"), admin=True))
    assert isinstance(rejection, ApiError)
    assert rejection.code == "late_result_not_found"


def test_adoption_needs_a_late_result(rules: RuleHarness) -> None:
    rules.create()
    rejection = rules.reject(cmd.Adopt(id="a"), "late_result_not_found", admin=True)
    assert (rejection.status, rejection.details) == (404, {"job_id": "a"})
    assert rejection.message == "Job a has no late result. List its late results: jobctl late a"
    rules.reject(cmd.Adopt(id="b"), "job_not_found", admin=True)


def test_adoption_checks_the_required_download_url(rules: RuleHarness) -> None:
    late(rules, completing(stalled(rules)))
    rules.policy = Policy(require_download_url=True)
    for dry_run in (False, True):
        rejection = rules.reject(cmd.Adopt(id="a", dry_run=dry_run), "invalid_request", admin=True)
        assert rejection.details == {"field": "$.download_url"}
        assert rejection.message == (
            f"Late result {rules.late()[0].seq} cannot be adopted: it has no download_url, which [validation] "
            "require_download_url requires. If the work is complete, set a URL yourself: "
            "jobctl transition ID STATUS completed --set download_url=URL (also set the other fields that you want to "
            "keep)"
        )
    rules.policy = Policy()
    assert rules.accept(cmd.Adopt(id="a"), admin=True).status == "completed"


def test_a_late_result_that_may_complete_the_job_can_be_chosen() -> None:
    rules = RuleHarness(Policy(require_download_url=True))
    locks = [stalled(rules), rules.start()]
    rules.accept(cmd.ForceReset(id="a"), admin=True)
    late(rules, completing(locks[0], download_url="u"))
    late(rules, completing(locks[1]))
    good, newer = rules.late()
    assert late_result_rules.not_adoptable(good, rules.policy) is None
    assert rules.reject(cmd.Adopt(id="a"), "invalid_request", admin=True).message.startswith(
        f"Late result {newer.seq} "
    )
    assert rules.accept(cmd.Adopt(id="a", result=good.seq), admin=True).download_url == "u"


def test_a_dry_run_of_an_adoption_changes_nothing(rules: RuleHarness) -> None:
    rules.reject(cmd.Adopt(id="a", dry_run=True), "job_not_found", admin=True)
    late(rules, completing(stalled(rules)))
    before = rules.job()
    decision = rules.decide(cmd.Adopt(id="a", dry_run=True), admin=True)
    assert (decision.changes, rules.job()) == ([], before)
    assert isinstance(decision.answer, Response)
    assert decision.answer.data == rules.accept(cmd.Adopt(id="a"), admin=True)
    rejection = rules.reject(cmd.Adopt(id="a", dry_run=True), "invalid_transition", admin=True)
    assert "of a completed job" in rejection.message


@pytest.mark.parametrize(("ahead", "used"), [(1, True), (0, False), (-1, False)])
def test_the_requested_deletion_time_counts_if_it_is_in_the_future(rules: RuleHarness, ahead: int, used: bool) -> None:
    command = completing(stalled(rules), expires_at=rules.now + 10)
    late(rules, command)
    rules.advance(10 - ahead)
    rules.accept(cmd.Adopt(id="a"), admin=True)
    assert rules.job().expires_at == (command.expires_at if used else rules.now + 7 * DAY_MS)


# -- reads ------------------------------------------------------------------------------------------------------------


def test_late_results_are_read_from_the_storage(rules: RuleHarness) -> None:
    rules.create()
    answer = rules.respond(cmd.LateResults(id="a"), admin=True)
    assert answer.read == HistoryRead(late=rules.job().seq)
    assert answer.data == LateResultList([])


def test_why_suggests_to_adopt_a_late_result(rules: RuleHarness) -> None:
    late(rules, completing(stalled(rules, worker="w-7")))
    assert advice(rules)[0] == "Worker w-7 submitted a late result. To adopt it: jobctl adopt a"
    rules.start(worker="w-2")
    assert advice(rules)[0].endswith("To adopt it: jobctl force-fail a, then jobctl adopt a")


def test_why_does_not_suggest_an_adoption_that_would_be_rejected(rules: RuleHarness) -> None:
    late(rules, completing(stalled(rules, worker="w-7")))
    rules.policy = Policy(require_download_url=True)
    lacks = (
        "Worker w-7 submitted a late result, but it cannot be adopted: it has no download_url, which [validation] "
        "require_download_url requires. Inspect it: jobctl late a. If the work is complete: "
    )
    too = " (also set the other fields that you want to keep)"
    assert advice(rules)[0] == f"{lacks}jobctl transition a queued completed --set download_url=URL{too}"
    lock_id = rules.start(worker="w-8")
    by_hand = f"jobctl force-fail a, then jobctl transition a failed completed --set download_url=URL{too}"
    assert advice(rules)[0] == lacks + by_hand
    rules.policy = Policy()
    assert "jobctl adopt a" in advice(rules)[0], "the policy is that of now"
    rules.policy = Policy(require_download_url=True)
    rules.accept(cmd.ForceFail(id="a"), admin=True)
    rejected = late(rules, completing(lock_id, download_url="u"))
    assert rejected.message.endswith("an operator can adopt it: jobctl adopt a")
    assert advice(rules)[0] == "Worker w-8 submitted a late result. To adopt it: jobctl adopt a"


def test_why_names_the_late_result_that_can_be_adopted_even_if_it_is_not_the_latest() -> None:
    rules = RuleHarness(Policy(require_download_url=True))
    locks = [stalled(rules, worker="w-7"), rules.start(worker="w-8")]
    rules.accept(cmd.ForceReset(id="a"), admin=True)
    late(rules, completing(locks[0], download_url="u"))
    late(rules, completing(locks[1]))
    named = f"jobctl adopt a --result {rules.late()[0].seq}"
    assert advice(rules)[0] == f"Worker w-7 submitted a late result. To adopt it: {named}"


def test_why_first_names_the_late_result_of_the_latest_grant(rules: RuleHarness) -> None:
    locks = [stalled(rules, worker="w-7"), rules.start(worker="w-8")]
    held = advice(rules)
    rules.recover(LONG)
    queued = advice(rules)
    for lock_id in reversed(locks):
        late(rules, completing(lock_id))
    assert advice(rules) == ["Worker w-8 submitted a late result. To adopt it: jobctl adopt a", *queued]
    rules.start(worker="w-8")
    assert advice(rules)[1:] == held


def test_the_late_results_to_read_before_a_decision(rules: RuleHarness) -> None:
    def asks(command: Any) -> Any:
        return late_result_rules.late_results_needed(rules.state, command, rules.policy)

    lock_id = rules.held()
    seq = rules.job().seq
    assert asks(cmd.Get(id="a")) is None
    assert asks(completing(lock_id)) is None, "its holder is who holds it"
    assert asks(cmd.Complete(id="b", lock_id="x")) is None
    assert asks(cmd.Adopt(id="b")) is None
    found = asks(completing("x"))
    assert (found.job_seq, found.lock_id, found.with_results) == (seq, "x", False)
    found = asks(cmd.Adopt(id="a"))
    assert (found.job_seq, found.lock_id, found.with_results) == (seq, None, True)
    found = asks(cmd.Why(id="a"))
    assert (found.job_seq, found.lock_id, found.with_results) == (seq, None, False)
    rules.accept(cmd.ForceReset(id="a"), admin=True)
    assert asks(completing(lock_id)).lock_id is None, "the job knows its last grant"
    rules.policy = Policy(late_results="drop")
    assert asks(completing(lock_id)) is None
    other = rules.held("c")
    rules.policy = Policy()
    rules.accept(cmd.Complete(id="c", lock_id=other))
    assert asks(cmd.Complete(id="c", lock_id=other)) is None, "it repeats what its holder said"


def test_a_transaction_numbers_late_results(rules: RuleHarness) -> None:
    """Two events of one command have two numbers."""
    late(rules, completing(stalled(rules)))
    expected = rules.state.next_event
    tx = Transaction(rules.state, rules.moment, rules.policy)
    tx.begin(cmd.IssuedCommand(cmd.Get(id="a")))
    first = tx.keep_late(rules.job(), rules.late()[0], "r", {})
    second = tx.keep_late(rules.job(), first, "r", {})
    assert (first.seq, second.seq) == (expected, expected + 1)
    assert all(change.before is change.after for change in tx.changes)


# -- recorded calls ---------------------------------------------------------------------------------------------------


CALLS: dict[str, Any] = {
    "progress": (cmd.Progress, {"progress": 42.0, "message": "half"}, {"progress": 42, "message": "half"}),
    "extend": (cmd.Extend, {"additional_ms": 5_000}, {}),
    "fail": (
        cmd.Fail,
        {"error_message": "disk on fire", "error_code": "E1"},
        {"error_message": "disk on fire", "error_code": "E1"},
    ),
    "release": (cmd.Release, {"delay_ms": 5}, {}),
    "complete": (cmd.Complete, {"file_path": "/out"}, {}),
}
WORDS = {
    "progress": "report progress",
    "extend": "extend the lock",
    "fail": "fail the job",
    "release": "release the job",
    "complete": "complete the job",
}


def call(verb: str, lock_id: str, job_id: str = "a", **fields: Any) -> Any:
    kind, given, _ = CALLS[verb]
    return kind(id=job_id, lock_id=lock_id, **(given | fields))


@pytest.fixture
def dropping() -> RuleHarness:
    """Also if a complete leaves only its event."""
    return RuleHarness(Policy(late_results="drop"))


@pytest.mark.parametrize("verb", CALLS)
def test_the_first_rejected_call_of_an_ended_grant_is_recorded_with_its_content(
    dropping: RuleHarness, verb: str
) -> None:
    rules = dropping
    lock_id = rules.held()
    rules.accept(cmd.ForceFail(id="a"), admin=True)
    plain = RuleHarness(Policy(late_results="drop", late_calls=False))
    old = plain.held()
    plain.accept(cmd.ForceFail(id="a"), admin=True)
    assert late(rules, call(verb, lock_id), is_stored=False, is_recorded=True) == late(
        plain, call(verb, old), is_stored=False
    )
    event = rules.last()
    assert (event.type, event.by, event.from_status, event.to_status) == ("late_call", "worker:w-1", "failed", "failed")
    assert event.reason == (
        f"Worker w-1 tried to {WORDS[verb]} after its lock was lost (force-fail); the job is failed. "
        "The call was rejected."
    )
    details = {"verb": verb, "worker": "w-1", "fencing_token": rules.tokens[-1], **CALLS[verb][2]}
    assert event.details == details
    assert event.changes is None


def test_absent_fields_of_a_rejected_call_are_not_recorded(dropping: RuleHarness) -> None:
    lock_id = dropping.held()
    dropping.accept(cmd.ForceFail(id="a"), admin=True)
    late(dropping, call("progress", lock_id, message=None), is_stored=False, is_recorded=True)
    expected = {"verb": "progress", "worker": "w-1", "fencing_token": dropping.tokens[-1], "progress": 42}
    assert dropping.last().details == expected


def test_one_rejected_call_of_each_verb_is_recorded(dropping: RuleHarness) -> None:
    rules = dropping
    lock_id = stalled(rules)
    for number in range(3):
        for verb in CALLS:
            rules.advance(1_000)
            late(rules, call(verb, lock_id), is_stored=False, is_recorded=number == 0)
    late(rules, call("progress", lock_id, progress=99, message="other"), is_stored=False)
    late(rules, call("fail", lock_id, error_message="other"), is_stored=False)
    assert [event.type for event in rules.events].count("late_call") == len(CALLS)


def test_rejected_calls_are_recorded_per_grant_and_name_the_holder(rules: RuleHarness) -> None:
    first = stalled(rules)
    late(rules, call("extend", first), is_stored=False, is_recorded=True)
    second = rules.start(worker="w-2")
    late(rules, call("progress", first), is_stored=False, is_recorded=True)
    assert (rules.last().reason or "").endswith("(recovery); worker w-2 holds the job. The call was rejected.")
    rules.accept(call("progress", second))
    rules.accept(cmd.ForceReset(id="a"), admin=True)
    late(rules, call("progress", second), is_stored=False, is_recorded=True)
    assert (rules.last().details or {})["fencing_token"] == rules.tokens[-1]
    late(rules, call("extend", first), is_stored=False)  # no longer in memory


def test_calls_with_unknown_locks_are_not_recorded(rules: RuleHarness) -> None:
    stalled(rules)
    others = rules.held("b")
    rules.accept(cmd.ForceFail(id="b"), admin=True)
    for verb in CALLS:
        for lock_id in ("never-one", others):
            late(rules, call(verb, lock_id), is_stored=False)
    rules.create("c")
    rules.reject(call("progress", "never-one", "c"), "lock_lost")
    assert rules.last().type == "created"


def test_calls_of_a_grant_that_its_holder_ended_are_not_recorded(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.accept(call("fail", lock_id))
    before = len(rules.events)
    for verb in ("progress", "extend", "complete"):
        rules.reject(call(verb, lock_id), "invalid_transition")
    rules.accept(call("fail", lock_id))
    rules.accept(call("release", lock_id))
    assert len(rules.events) == before


def test_calls_of_operators_with_an_old_lock_are_not_recorded(rules: RuleHarness) -> None:
    lock_id = stalled(rules)
    before = len(rules.events)
    rules.reject(cmd.ExtendLock(id="a", lock_id=lock_id), "lock_lost", admin=True)
    rules.reject(cmd.ReleaseLock(id="a", lock_id=lock_id), "lock_lost", admin=True)
    rules.reject(cmd.Undelivered(id="a", lock_id=lock_id), "lock_lost")
    assert len(rules.events) == before


def test_a_stored_or_adopted_complete_is_not_recorded_as_a_late_call(rules: RuleHarness) -> None:
    late(rules, completing(stalled(rules)))
    rules = taking()
    rules.accept(completing(stalled(rules)))
    assert [event.type for event in rules.events][-1] == "adopted"


def test_a_recorded_late_call_does_not_prevent_an_adoption() -> None:
    """The job is unclaimed: the recorded calls of its worker changed nothing."""
    rules = taking()
    lock_id = stalled(rules)
    late(rules, call("progress", lock_id), is_stored=False, is_recorded=True)
    assert rules.accept(completing(lock_id)).status == "completed"


def test_the_number_of_remembered_calls_is_bounded(rules: RuleHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.core.state.LATE_KEPT", 2)
    lock_id = stalled(rules)
    for verb in ("progress", "extend", "release"):
        late(rules, call(verb, lock_id), is_stored=False, is_recorded=True)
    for verb in ("extend", "release"):
        late(rules, call(verb, lock_id), is_stored=False)
    late(rules, call("progress", lock_id), is_stored=False, is_recorded=True)
