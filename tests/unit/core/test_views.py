"""Views: every field, secrets only for operators, averages and ages at their boundaries."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from msgspec import UNSET, Raw
from msgspec.structs import asdict, replace

from jobd.core import views
from jobd.core.state import State
from jobd.core.stats import Counters
from jobd.model.clocks import LockMs
from jobd.model.commands import Locks, Moment, Workers, WorkerState
from jobd.model.job import (
    HOUR_MS,
    MINUTE_MS,
    STATUSES,
    BackoffOptions,
    Extra,
    Failure,
    Grant,
    Job,
    LateResult,
    Options,
    Policy,
    Result,
)
from jobd.model.responses import ErrorView, LockView, OldestProcessing, WorkerList, public_lock
from tests.support.factories import deadlines_at
from tests.support.rule_harness import NOW

AT = Moment(NOW, LockMs(1_000), NOW - 1_000)
OPTIONS = Options("q", "k", 3, 4, BackoffOptions("fixed", 1, 2, False), 5, "fail", 6, 7)
GRANT = Grant("secret", 11, "w-1", NOW - 12, 13, 14, 15)
DEADLINES = deadlines_at(1_016, 1_017, 1_018)
JOB = Job(
    seq=1,
    id="a",
    options=OPTIONS,
    status="processing",
    created_at=NOW - 21,
    updated_at=NOW - 22,
    run_at=NOW - 23,
    progress=24,
    progress_message="m",
    attempt=25,
    stalls=26,
    started_at=NOW - 27,
    finished_at=NOW - 28,
    expires_at=NOW - 29,
    grant=GRANT,
    deadlines=DEADLINES,
    result=Result("url", "file", "key", Raw(b"1")),
    error=Failure("words", "code"),
    extra=Extra("nightly", NOW - 30),
)


def flat() -> dict[str, Any]:
    assert JOB.result is not None
    assert JOB.error is not None
    error = {f"error_{name}": value for name, value in asdict(JOB.error).items()}
    extra = {} if JOB.extra is None else asdict(JOB.extra)
    return asdict(JOB) | asdict(OPTIONS) | asdict(JOB.result) | error | extra | {"payload": Raw(b"[]")}


def test_the_view_of_a_job_has_every_field() -> None:
    shown = asdict(views.job_view(JOB, AT, Policy(), payload=Raw(b"[]")))
    lock = LockView("w-1", 11, NOW - 12, NOW + 16)
    assert shown == {name: flat().get(name, UNSET) for name in shown} | {
        "stall_after_ms": 14, "progress_timeout_ms": 15, "lock": lock, "copied_from": UNSET,
    }  # fmt: skip


def test_the_exported_job_has_every_field() -> None:
    exported = asdict(views.as_import(JOB, Raw(b"[]"), {}))
    assert (exported["schedule_id"], exported["scheduled_at"]) == ("nightly", NOW - 30)
    beside = {"worker": "w-1", "headers": UNSET, "checkpoint": UNSET, "copied_from": UNSET}
    assert exported == {name: flat().get(name) for name in exported} | beside
    bare = views.as_import(replace(JOB, grant=None, result=None, error=None), Raw(b"[]"), {})
    assert (bare.worker, bare.metadata, bare.error_message) == (None, None, None)


@pytest.mark.parametrize(
    ("grant", "options", "shown"),
    [
        (GRANT, OPTIONS, (14, 15)),  # as they were settled with the grant
        (None, OPTIONS, (6, 7)),
        (None, Options(), (8, 9)),
        (None, Options(stall_after_ms=0, progress_timeout_ms=0), (0, 0)),
    ],
)
def test_durations_are_shown_as_they_apply(grant: Grant | None, options: Options, shown: tuple[int, int]) -> None:
    view = views.job_view(
        replace(JOB, grant=grant, options=options), AT, Policy(stall_after_ms=8, progress_timeout_ms=9)
    )
    assert (view.stall_after_ms, view.progress_timeout_ms) == shown


def test_only_operators_see_the_lock_id() -> None:
    lock = views.lock_view(JOB, AT)
    assert lock is not None
    assert lock.lock_id is UNSET
    shown = views.job_view(JOB, AT, Policy()).lock
    assert shown == lock
    for shown in (views.lock_view(JOB, AT, admin=True), views.job_view(JOB, AT, Policy(), admin=True).lock):
        assert shown is not None
        assert shown.lock_id == "secret"


@pytest.mark.parametrize(
    "change", [{"grant": None}, {"deadlines": None}, {"deadlines": replace(DEADLINES, cleared=True)}]
)
def test_incomplete_and_cleared_locks_are_not_shown(change: dict[str, Any]) -> None:
    assert views.lock_view(replace(JOB, **change), AT) is None


def test_the_worker_of_a_cleared_lock_is_named() -> None:
    """An incomplete row has no holder."""
    changes: list[dict[str, Any]] = [
        {},
        {"grant": None},
        {"deadlines": None},
        {"deadlines": replace(DEADLINES, cleared=True)},
    ]
    shown = [views.job_view(replace(JOB, **change), AT, Policy()) for change in changes]
    assert [view.worker for view in shown] == [UNSET, UNSET, UNSET, "w-1"]


def state(*jobs: Job) -> State:
    filled = State()
    for job in jobs:
        filled.reindex(None, job)
    return filled


def test_an_incomplete_grant_is_not_a_lock() -> None:
    rows = [
        replace(JOB, seq=seq, id=f"{seq}", **half)
        for seq, half in enumerate(({"grant": None}, {"deadlines": None}, {}))
    ]
    assert [lock.id for lock in views.locks(state(*rows), AT, Locks(), admin=True).locks] == ["2"]


def test_the_list_of_locks_has_every_field() -> None:
    [lock] = views.locks(state(replace(JOB, grant=replace(GRANT, fencing_token=1))), AT, Locks(), admin=True).locks
    assert asdict(lock) == {
        "id": "a", "queue": "q", "kind": "k", "worker": "w-1", "lock_id": "secret", "fencing_token": 1,
        "acquired_at": NOW - 12, "expires_at": NOW + 16, "live": True, "progress_due_at": NOW + 18,
        "stalled_at": NOW + 17, "progress": 24,
    }  # fmt: skip


def test_the_list_of_workers_counts_every_state() -> None:
    none = dict.fromkeys(get_args(WorkerState), 0)
    assert views.workers(State(), AT, Workers()) == WorkerList([], None, none, [], NOW)


@pytest.mark.parametrize("admin", [True, False])
def test_lock_ids_are_for_admins(admin: bool) -> None:
    assert JOB.grant is not None
    [lock] = views.locks(state(JOB), AT, Locks(), admin=admin).locks
    assert lock.lock_id == (JOB.grant.lock_id if admin else UNSET)
    whole = views.lock_view(JOB, AT, admin=True)
    assert public_lock(whole) == views.lock_view(JOB, AT)
    assert public_lock(None) is None


def test_the_view_of_a_late_result_has_every_field() -> None:
    late = LateResult(31, NOW - 32, "w-2", 33, "hash", NOW + 34, Result("url", "file", "key", Raw(b"1")))
    assert asdict(views.late_view(late)) == {
        "seq": 31, "at": NOW - 32, "worker": "w-2", "fencing_token": 33, "download_url": "url", "file_path": "file",
        "storage_key": "key", "metadata": Raw(b"1"), "expires_at": NOW + 34, "rejection": None,
    }  # fmt: skip
    rejected = views.late_view(late, "It lacks something.")
    assert rejected.rejection == ErrorView("invalid_request", "It lacks something.")


def running(began: int, created: int = NOW - 99) -> State:
    return state(replace(JOB, started_at=began, created_at=created))


def counters(*completed_ms: int) -> Counters:
    return Counters(completions={NOW // MINUTE_MS: (len(completed_ms), sum(completed_ms))})


@pytest.mark.parametrize(
    ("filled", "counted", "average"),
    [
        (State(), Counters(), 0.0),
        (State(), counters(1_000, 2_000), 1.5),
        (running(NOW - 500), Counters(), 0.5),
        (running(NOW - 3_000), counters(1_000, 2_000), 2.0),
        (running(NOW - 3_000), counters(1_000), 2.0),
        (State(), counters(1_000, 0, 0), 0.333),
        (running(NOW + 5_000), counters(1_000), 0.0),  # the wall clock has stepped back
    ],
)
def test_the_average_covers_recent_completions_and_processing_jobs(
    filled: State, counted: Counters, average: float
) -> None:
    assert views.average_processing_s(filled, counted, AT) == average


def test_the_stats_have_every_field() -> None:
    counted = counters(1_000, 2_000)
    counted.recoveries[NOW // HOUR_MS] = 5
    assert asdict(views.stats(running(NOW - 3_000), counted, AT)) == {
        "total_jobs": 1, "by_status": dict.fromkeys(STATUSES, 0) | {"processing": 1}, "stuck_jobs": 0,
        "locked_jobs": 1, "average_processing_time": 2.0, "oldest_processing_job": OldestProcessing("a", 3.0, 24),
        "stuck_jobs_recovered": 5, "timestamp": NOW, "cleanup_running": False, "time_since_last_cleanup": None,
        "disk": None, "store": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("filled", "age"),
    [
        (running(NOW - 1_500, NOW - 9_000), 1.5),
        (running(NOW - 1_234, NOW - 9_000), 1.234),
        (state(replace(JOB, started_at=None, created_at=NOW - 9_000)), 9.0),
        (running(NOW + 5_000), 0.0),
    ],
)
def test_the_age_of_the_oldest(filled: State, age: float) -> None:
    oldest = views.stats(filled, Counters(), AT).oldest_processing_job
    assert oldest is not None
    assert (oldest.id, oldest.progress, oldest.age) == ("a", 24, age)
