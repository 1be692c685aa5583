"""Validation: each check at its boundary, which issues count, and that fixes are complete."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from jobd.core.validation import NO_MESSAGE, counts, safe_fixes, validate
from jobd.model.commands import Moment
from jobd.model.job import STATUSES, Failure, Grant, Job, Lease, Options, Policy, PreviousGrant, Result
from jobd.model.responses import Issue
from tests.support.rule_harness import NOW

AT = Moment(NOW, 1_000, NOW - 1_000)
GRANT = Grant("l", 1, "w-1", NOW, 1_000, 500, 0)
LIVE_LEASE = Lease(2_000, 1_500, None)


def row(status: str = "queued", **fields: Any) -> Job:
    """Return a valid row with these `fields`."""
    good: dict[str, Any] = {}
    if status == "processing":
        good = {"grant": GRANT, "lease": LIVE_LEASE, "started_at": NOW}
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


BAD: list[tuple[str, Job, str, str, dict[str, Any]]] = [
    ("no id", replace(row(), id=""), "critical", "id", {}),
    ("no queue", replace(row(), options=Options(queue="")), "critical", "queue", {}),
    ("unknown status", row("paused"), "critical", "status", {}),
    ("progress below", row(progress=-0.5), "error", "progress", {"progress": 0}),
    ("progress above", row("processing", progress=100.5), "error", "progress", {"progress": 100}),
    ("progress of a queued job", row(progress=40), "error", "progress", {"progress": 0}),
    ("progress above of a queued job", row(progress=100.5), "error", "progress", {"progress": 0}),
    ("priority below", row(options=Options(priority=-1001)), "error", "priority", {}),
    ("priority above", row("failed", options=Options(priority=1001)), "error", "priority", {}),
    ("an error without an attempt", row(error=Failure("old")), "warning", "error_message", {}),
    ("completed at 99", row("completed", progress=99), "error", "progress", {"progress": 100}),
    ("completed above", row("completed", progress=101), "error", "progress", {"progress": 100}),
    ("no message", row("failed", error=None), "error", "error_message", {"error": Failure(NO_MESSAGE)}),
    ("empty", row("failed", error=Failure("", "E")), "error", "error_message", {"error": Failure(NO_MESSAGE, "E")}),
    ("nothing made", row("completed", result=None), "warning", "download_url", {}),
    ("empty result", row("completed", result=Result("")), "warning", "download_url", {}),
    ("orphan grant", row(grant=GRANT), "error", "lock", {"grant": None, "lease": None}),
    ("orphan lease", row("failed", lease=LIVE_LEASE), "error", "lock", {"grant": None, "lease": None}),
    ("no grant", row("processing", grant=None), "critical", "lock", {}),
    ("a key that leads out", row("completed", result=Result(storage_key="a/../../k")), "error", "storage_key", {}),
    ("no lease", row("processing", lease=None), "critical", "lock", {}),
    ("stuck", row("processing", lease=Lease(900, 1_000, None)), "error", "lock", {}),
    ("past ceiling", row("processing", lease=Lease(2_000, 2_000, 1_000)), "error", "lock", {}),
    ("started early", row("processing", started_at=NOW - 1), "error", "started_at", {"started_at": NOW}),
    ("finished early", row("failed", finished_at=NOW - 1), "error", "finished_at", {"finished_at": NOW}),
    ("no finish", row("failed", finished_at=None), "error", "finished_at", {"finished_at": NOW}),
    ("updated early", row(updated_at=NOW - 1), "error", "updated_at", {"updated_at": NOW}),
    ("queued too long", row(expires_at=NOW), "warning", "expires_at", {}),
    ("kept too long", row("failed", expires_at=NOW), "warning", "expires_at", {}),
]


# The beginning of the sentence about the fix.
FIXES = (
    "A cleanup run",
    "The next cleanup run",
    "Recovery",
    "It fails",
    "Delete",
    "It is cleared",
    "Set",
    "Correct",
    "Pass",
    "Force-fail is not",
)


@pytest.mark.parametrize(("job", "kind", "field", "fixes"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_invalid_rows(job: Job, kind: str, field: str, fixes: dict[str, Any]) -> None:
    found = validate(job, AT, Policy())
    assert [(issue.type, issue.field) for issue in found.issues] == [(kind, field)]
    assert found.issues[0].fix.startswith(FIXES)
    assert found.issues[0].message.endswith(".")
    assert not found.issues[0].message.startswith(FIXES)
    assert found.is_valid == (kind == "warning")
    assert found.can_proceed == (kind != "critical")
    assert safe_fixes(job) == fixes
    assert counts(found.issues[0]) == (kind != "warning")


def test_valid_boundaries() -> None:
    good = [
        row(progress=0),
        row("processing", progress=100),
        row(options=Options(priority=-1000)),
        row(options=Options(priority=1000)),
        row(error=Failure("old"), attempt=1),
        row(error=Failure("old"), ended=PreviousGrant("l", 1, "w", NOW, "release", "release")),
        row("processing", lease=Lease(900, 1_001, None)),
        row("processing", lease=Lease(1_500, 1_500, 1_001)),
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
        assert [(issue.type, issue.field) for issue in found.issues] == [("error", "download_url")]
        assert found.issues[0].fix.startswith(FIXES)
        assert not found.issues[0].message.startswith(FIXES)
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


@pytest.mark.parametrize(
    ("status", "fix"),
    [("queued", "It fails with error_code expired."), ("failed", "The next cleanup run deletes it.")],
)
def test_an_expired_job_is_reported_with_its_fix(status: str, fix: str) -> None:
    assert [issue.fix for issue in validate(row(status, expires_at=NOW), AT, Policy()).issues] == [fix]


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
    lease=st.none() | st.just(LIVE_LEASE),
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
    return issue.field == "lock" and job.status == "processing" and (job.grant is None or job.lease is None)
