"""Validation: each check at its boundary, which issues count, and that fixes are complete."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from jobd.core.job_validation import NO_MESSAGE, counts, safe_fixes, validate
from jobd.model.clocks import LockMs
from jobd.model.commands import Moment
from jobd.model.job import STATUSES, Failure, Grant, Job, Options, Policy, PreviousGrant, Result
from jobd.model.responses import Issue, Validation
from tests.support.factories import deadlines_at
from tests.support.rule_harness import NOW

AT = Moment(NOW, LockMs(1_000), NOW - 1_000)
GRANT = Grant("l", 1, "w-1", NOW, 1_000, 500, 0)
LIVE_LOCK = deadlines_at(2_000, 1_500)


def row(status: str = "queued", **fields: Any) -> Job:
    """Return a valid row with these `fields`."""
    good: dict[str, Any] = {}
    if status == "processing":
        good = {"grant": GRANT, "deadlines": LIVE_LOCK, "started_at": NOW}
    elif status in STATUSES and status != "queued":
        good = {"finished_at": NOW, "expires_at": NOW + 1}
    if status == "completed":
        good |= {"progress": 100, "result": Result("u")}
    if status == "failed":
        good |= {"error": Failure("e")}
    return replace(Job(1, "a", Options(), status, NOW, NOW, NOW), **(good | fields))


@pytest.mark.parametrize("status", STATUSES)
def test_valid_rows(status: str) -> None:
    found = validate(row(status), AT, Policy(require_download_url=True))
    assert (found.is_valid, found.issues, found.can_proceed) == (True, [], True)
    assert safe_fixes(row(status)) == {}


CORRECT = "Correct the row, then run: jobd doctor --accept ID"
CREATE_AGAIN = "Delete the job and create it again."
RANGE = "outside -1000 to 1000."
NO_RESULT = "The job is completed without download_url, file_path, storage_key or metadata."
TIMES = "Times are out of order: created, started, finished, updated must follow each other."
ORDER = "A cleanup run puts them in order."
UNHELD = Issue(
    "critical", "lock", "The job is processing, but no worker holds it.", "A cleanup run treats it as stalled."
)
STALLED = Issue(
    "error",
    "lock",
    "The job is stalled: worker w-1 did not report in time.",
    "Recovery puts it back into its queue or fails it, within cleanup.recover_every.",
)
CLEARED = "It is cleared when the job completes."
NO_ERROR = Issue(
    "error", "error_message", "The job failed without an error message.", "A cleanup run fills in a default message."
)


def progress(message: str, right: int) -> Issue:
    return Issue("error", "progress", message, f"A cleanup run sets it to {right}.")


def orphan(status: str) -> Issue:
    return Issue("error", "lock", f"The job is {status}, but has a lock.", "A cleanup run removes the orphan lock.")


BAD: list[tuple[str, Job, Issue, dict[str, Any]]] = [
    ("no id", replace(row(), id=""), Issue("critical", "id", "id is missing.", CREATE_AGAIN), {}),
    ("no queue", row(options=Options(queue="")), Issue("critical", "queue", "queue is missing.", CREATE_AGAIN), {}),
    ("unknown status", row("paused"),
     Issue("critical", "status",
           "Status 'paused' is not one of queued, processing, completed, failed, cancelled.", CORRECT), {}),
    ("progress below", row("failed", progress=-0.5), progress("Progress is -0.5, outside 0 to 100.", 0),
     {"progress": 0}),
    ("progress above", row("processing", progress=100.5), progress("Progress is 100.5, outside 0 to 100.", 100),
     {"progress": 100}),
    ("progress of a queued job", row(progress=40), progress("The job is queued, but its progress is 40.", 0),
     {"progress": 0}),
    ("progress below of a queued job", row(progress=-0.5),
     progress("The job is queued, but its progress is -0.5.", 0), {"progress": 0}),
    ("progress above of a queued job", row(progress=100.5),
     progress("The job is queued, but its progress is 100.5.", 0), {"progress": 0}),
    ("priority below", row(options=Options(priority=-1001)),
     Issue("error", "priority", f"Priority is -1001, {RANGE}", "Set a valid one: jobctl update a --priority N"), {}),
    ("priority above", row("failed", options=Options(priority=1001)),
     Issue("error", "priority", f"Priority is 1001, {RANGE}", CORRECT), {}),
    ("an error without an attempt", row(error=Failure("old")),
     Issue("warning", "error_message", "The job is queued and had no attempt, but it has an error.", CLEARED), {}),
    ("completed at 99", row("completed", progress=99),
     progress("The job is completed, but its progress is 99.", 100), {"progress": 100}),
    ("completed above", row("completed", progress=101),
     progress("The job is completed, but its progress is 101.", 100), {"progress": 100}),
    ("no message", row("failed", error=None), NO_ERROR, {"error": Failure("No error message was recorded.")}),
    ("empty", row("failed", error=Failure("", "E")), NO_ERROR, {"error": Failure(NO_MESSAGE, "E")}),
    ("nothing made", row("completed", result=None),
     Issue("warning", "download_url", NO_RESULT, "Pass the result of the work to complete."), {}),
    ("empty result", row("completed", result=Result("")),
     Issue("warning", "download_url", NO_RESULT, "Pass the result of the work to complete."), {}),
    ("orphan grant", row(grant=GRANT), orphan("queued"), {"grant": None, "deadlines": None}),
    ("orphan lease", row("failed", deadlines=LIVE_LOCK), orphan("failed"), {"grant": None, "deadlines": None}),
    ("no grant", row("processing", grant=None), UNHELD, {}),
    ("a key that leads out", row("completed", result=Result(storage_key="a/../../k")),
     Issue("error", "storage_key", "The storage_key must not contain a '..' segment.", CORRECT), {}),
    ("no lease", row("processing", deadlines=None), UNHELD, {}),
    ("stalled", row("processing", deadlines=deadlines_at(900, 1_000)), STALLED, {}),
    ("past progress timeout", row("processing", deadlines=deadlines_at(2_000, 2_000, 1_000)), STALLED, {}),
    ("started early", row("processing", started_at=NOW - 1), Issue("error", "started_at", TIMES, ORDER),
     {"started_at": NOW}),
    ("finished early", row("failed", finished_at=NOW - 1), Issue("error", "finished_at", TIMES, ORDER),
     {"finished_at": NOW}),
    ("no finish", row("failed", finished_at=None), Issue("error", "finished_at", TIMES, ORDER), {"finished_at": NOW}),
    ("updated early", row(updated_at=NOW - 1), Issue("error", "updated_at", TIMES, ORDER), {"updated_at": NOW}),
    ("queued too long", row(expires_at=NOW),
     Issue("warning", "expires_at", f"The job expired at {NOW} (Unix ms).", "It fails with error_code expired."), {}),
    ("kept too long", row("failed", expires_at=NOW),
     Issue("warning", "expires_at", f"The job expired at {NOW} (Unix ms).", "The next cleanup run deletes it."), {}),
]  # fmt: skip


@pytest.mark.parametrize(("job", "issue", "fixes"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_invalid_rows(job: Job, issue: Issue, fixes: dict[str, Any]) -> None:
    found = validate(job, AT, Policy())
    assert found == Validation(is_valid=issue.type == "warning", issues=[issue], can_proceed=issue.type != "critical")
    assert safe_fixes(job) == fixes
    assert counts(issue) == (issue.type != "warning")


def test_valid_boundaries() -> None:
    good = [
        row(progress=0),
        row("processing", progress=100),
        row(options=Options(priority=-1000)),
        row(options=Options(priority=1000)),
        row(error=Failure("old"), attempt=1),
        row(error=Failure("old"), ended=PreviousGrant("l", 1, "w", NOW, "release", "release")),
        row("processing", deadlines=deadlines_at(900, 1_001)),
        row("processing", deadlines=deadlines_at(1_500, 1_500, 1_001)),
        row("processing", expires_at=NOW - 5),  # a running job does not expire
        row(expires_at=NOW + 1),
        row("completed", result=Result(metadata=Raw(b"1"))),
        row("completed", result=Result(file_path="/f")),
        row("completed", result=Result(storage_key="k")),
    ]
    for job in good:
        assert validate(job, AT, Policy()).issues == []


def test_a_download_url_can_be_required() -> None:
    policy = Policy(require_download_url=True)
    for result in (None, Result(file_path="/f")):
        found = validate(row("completed", result=result), AT, policy)
        message = "The job is completed without a download_url, which [validation] require_download_url requires."
        assert found.issues == [Issue("error", "download_url", message, CREATE_AGAIN)]
        assert not found.is_valid


def test_times_are_ordered_and_never_move_back() -> None:
    job = row("completed", created_at=NOW + 10, started_at=NOW + 5, finished_at=NOW + 7, updated_at=NOW)
    assert safe_fixes(job) == {"started_at": NOW + 10, "finished_at": NOW + 10, "updated_at": NOW + 10}
    job = row("failed", finished_at=None, updated_at=NOW + 3)
    assert safe_fixes(job) == {"finished_at": NOW + 3}
    job = row("failed", started_at=NOW + 4, finished_at=NOW + 2, updated_at=NOW + 9)
    assert safe_fixes(job) == {"finished_at": NOW + 4}
    job = row("failed", finished_at=NOW + 5, updated_at=NOW + 1)
    assert safe_fixes(job) == {"updated_at": NOW + 5}


@pytest.mark.parametrize("status", ["queued", "failed"])
def test_an_expired_job_stays_while_the_clock_is_suspect(status: str) -> None:
    found = validate(row(status, expires_at=NOW), replace(AT, trusted=NOW - 1), Policy())
    fix = "None while the clock is suspect. Check the clock; if it is correct: jobctl clock accept"
    assert [issue.fix for issue in found.issues] == [fix]


def test_every_kind_of_issue_at_once() -> None:
    job = replace(row("failed", error=None, grant=GRANT, progress=-1, started_at=NOW - 1), id="", updated_at=NOW - 1)
    fields = [issue.field for issue in validate(job, AT, Policy()).issues]
    assert fields == ["id", "progress", "error_message", "lock", "started_at", "updated_at"]


near = st.integers(NOW - 3, NOW + 3)
rows = st.builds(
    Job,
    seq=st.just(1),
    id=st.sampled_from(["a", ""]),
    options=st.just(Options()),
    status=st.sampled_from([*STATUSES, "odd"]),
    created_at=near,
    updated_at=near,
    run_at=near,
    progress=st.one_of(st.integers(-5, 105), st.floats(-5, 105)),
    started_at=st.none() | near,
    finished_at=st.none() | near,
    expires_at=st.none() | near,
    grant=st.none() | st.just(GRANT),
    deadlines=st.none() | st.just(LIVE_LOCK),
    error=st.none() | st.just(Failure("e")) | st.just(Failure("")),
    result=st.none() | st.just(Result("u")),
)
NO_SAFE_FIX = {"id", "status"}


@given(rows)
def test_safe_fixes_leave_nothing_that_can_be_fixed(job: Job) -> None:
    fixed = replace(job, **safe_fixes(job))
    assert safe_fixes(fixed) == {}
    left = [issue for issue in validate(fixed, AT, Policy()).issues if counts(issue)]
    assert all(issue.field in NO_SAFE_FIX or is_unheld(issue, fixed) for issue in left), left


def is_unheld(issue: Issue, job: Job) -> bool:
    """A processing job without a grant is stalled by the rule, not fixed by a field."""
    return issue.field == "lock" and job.status == "processing" and (job.grant is None or job.deadlines is None)
