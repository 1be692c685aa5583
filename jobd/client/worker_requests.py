"""The calls of the worker API as requests: one function each, its signature and text are those of the clients' methods.

Sends nothing. Durations are in milliseconds, times in Unix milliseconds, as on the wire.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, ParamSpec, Protocol, TypeVar, cast

from msgspec import Struct

from jobd.client.protocol import ApiRequest, GrantInfo, JobInfo, JobInfoPage, get, job_path, post, reader, uuid7
from jobd.model.commands import About, WorkerState
from jobd.model.events import EventView
from jobd.model.job import Backoff, OnStall, Status
from jobd.model.responses import (
    LockState,
    QueueList,
    QueueView,
    TimelineView,
    Validation,
    WhyView,
    WorkerList,
    WorkerView,
)

JOBS: Final = "/v1/jobs"

P = ParamSpec("P")
T = TypeVar("T")


class _Jobs(Struct):
    jobs: list[JobInfo]


class _Grants(Struct):
    grants: list[GrantInfo]


read_job = reader(JobInfo)
read_page = reader(JobInfoPage)
read_why = reader(WhyView)
_read_jobs = reader(_Jobs)
_read_grant = reader(GrantInfo)
_read_grants = reader(_Grants)
_read_lock = reader(LockState)
_read_timeline = reader(TimelineView)
_read_validation = reader(Validation)
_read_queues = reader(QueueList)
read_workers = reader(WorkerList)


def read_timeline(body: bytes) -> list[EventView]:
    return _read_timeline(body).events


def read_queues(body: bytes) -> list[QueueView]:
    return _read_queues(body).queues


class QueuePage(Protocol):
    """A call that gets a page of queues."""

    def __call__(self, *, cursor: str | None = None) -> ApiRequest[list[QueueView]]: ...


def _named(build: Callable[P, ApiRequest[T]]) -> Callable[P, ApiRequest[T]]:
    """Reject positional arguments after `job_id` with a TypeError that shows the correct call.

    The manager that jobd replaces orders them differently (`failJob(jobId, message, lockId)`).
    """
    needed = [p.name for p in inspect.signature(build).parameters.values() if p.default is p.empty]
    call = f"{build.__name__}({', '.join([needed[0], *(f'{name}=...' for name in needed[1:])])})"

    @functools.wraps(build)
    def checked(*positional: Any, **named: Any) -> ApiRequest[T]:
        if len(positional) > 1:
            raise TypeError(f"only job_id may be positional; write {call}")
        return cast(Callable[..., ApiRequest[T]], build)(*positional, **named)

    return cast(Callable[P, ApiRequest[T]], checked)


def create_job(
    payload: Any = None,
    *,
    queue: str | None = None,
    kind: str | None = None,
    id: str | None = None,
    priority: int | None = None,
    max_attempts: int | None = None,
    backoff: Backoff | Mapping[str, Any] | None = None,
    max_stalls: int | None = None,
    on_stall: OnStall | None = None,
    stuck_after_ms: int | None = None,
    max_processing_ms: int | None = None,
    run_at: int | None = None,
    delay_ms: int | None = None,
    expires_at: int | None = None,
    idempotency_key: str | None = None,
) -> ApiRequest[JobInfo]:
    """Create a job and give it back. What is not given has the daemon's default.

    `payload` is anything that JSON can say (msgspec.Raw is sent as it is). Without an `id` the client makes one
    (UUIDv7), so that a lost answer is asked for again and makes no second job. Raises JobExists where another request
    created a job with this `id`, TooLarge for a payload above the limit, TooManyJobs,
    TooManyQueues, StorageFull.
    """
    body = {
        "id": id or uuid7(),
        "payload": payload,
        "queue": queue,
        "kind": kind,
        "priority": priority,
        "max_attempts": max_attempts,
        "backoff": backoff,
        "max_stalls": max_stalls,
        "on_stall": on_stall,
        "stuck_after_ms": stuck_after_ms,
        "max_processing_ms": max_processing_ms,
        "run_at": run_at,
        "delay_ms": delay_ms,
        "expires_at": expires_at,
    }
    return post(JOBS, read_job, body, key=idempotency_key)


def create_jobs(jobs: Iterable[Mapping[str, Any]], *, idempotency_key: str | None = None) -> ApiRequest[list[JobInfo]]:
    """Create up to 1000 jobs, all or none, in the order given.

    Each is a mapping with the names of `create_job`; one without an `id` gets a UUIDv7. Raises as `create_job`.
    """
    named = [{"id": job.get("id") or uuid7()} | {name: job[name] for name in job if name != "id"} for job in jobs]
    return post(f"{JOBS}/bulk", _bulk, {"jobs": named}, key=idempotency_key or uuid7())


def _bulk(body: bytes) -> list[JobInfo]:
    return _read_jobs(body).jobs


def get_job(job_id: str) -> ApiRequest[JobInfo]:
    """The job as it is now. Raises JobNotFound."""
    return get(job_path(JOBS, job_id), read_job)


def list_jobs(
    *,
    status: Status | None = None,
    queue: str | None = None,
    kind: str | None = None,
    worker: str | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[JobInfoPage]:
    """A page of the jobs that match, newest first: `limit` of them at most (50 by default, up to 200).

    `worker` holds the job or was the last to hold it. A page may be short; the last one has no `next_cursor`. `cursor`
    is the `next_cursor` of the page before.
    """
    return get(JOBS, read_page, status=status, queue=queue, kind=kind, worker=worker, limit=limit, cursor=cursor)


def timeline(job_id: str) -> ApiRequest[list[EventView]]:
    """What happened to the job, oldest first. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "timeline"), read_timeline)


def why(job_id: str) -> ApiRequest[WhyView]:
    """Why the job is in its state, and what happens next, in plain words. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "why"), read_why)


def validate_job_state(job_id: str) -> ApiRequest[Validation]:
    """What is wrong with the job's record, if anything, and what fixes it. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "validate"), _read_validation)


def start_processing(
    job_id: str,
    worker: str,
    *,
    lock_ttl_ms: int | None = None,
    stuck_after_ms: int | None = None,
    max_processing_ms: int | None = None,
    about: About | None = None,
    idempotency_key: str | None = None,
) -> ApiRequest[GrantInfo]:
    """Take this job for `worker`. The lock lives `lock_ttl_ms` (1 s to 24 h) unless it is extended.

    The lock never outlives the latest progress report by more than `max_processing_ms`; 0 means no ceiling. The ceiling
    of the job itself takes precedence. `jobctl workers` shows `about`.

    Raises AlreadyLocked, NotDue, QueuePaused, InvalidTransition, JobNotFound.
    """
    body = {
        "worker": worker,
        "lock_ttl_ms": lock_ttl_ms,
        "stuck_after_ms": stuck_after_ms,
        "max_processing_ms": max_processing_ms,
        "about": about,
    }
    return post(job_path(JOBS, job_id, "start"), _read_grant, body, key=idempotency_key or uuid7())


def claim(
    worker: str,
    *,
    queues: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    limit: int | None = None,
    wait_ms: int = 0,
    lock_ttl_ms: int | None = None,
    stuck_after_ms: int | None = None,
    max_processing_ms: int | None = None,
    about: About | None = None,
    idempotency_key: str | None = None,
) -> ApiRequest[list[GrantInfo]]:
    """Take the first due jobs for `worker`: 1 by default, `limit` (up to 100) at most, none if there is none.

    `queues` are `["default"]` and `kinds` all if they are not given. With `wait_ms` (up to 60 000) the call waits
    for a job as long as that. `max_processing_ms` and `about` are as in
    `start_processing`.
    """
    body = {
        "worker": worker,
        "queues": _listed(queues),
        "kinds": _listed(kinds),
        "limit": limit,
        "wait_ms": wait_ms or None,
        "lock_ttl_ms": lock_ttl_ms,
        "stuck_after_ms": stuck_after_ms,
        "max_processing_ms": max_processing_ms,
        "about": about,
    }
    return post("/v1/claim", _granted, body, key=idempotency_key or uuid7(), wait_ms=wait_ms)


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)


def _granted(body: bytes) -> list[GrantInfo]:
    return _read_grants(body).grants


@_named
def update_progress(job_id: str, *, lock_id: str, progress: float, message: str | None = None) -> ApiRequest[LockState]:
    """Report progress (0 to 100); this renews the lock too.

    Raises LockLost where the job is no longer yours, MaxProcessingTimeExceeded where the last report is too old.
    """
    body = {"lock_id": lock_id, "progress": progress, "message": message}
    return post(job_path(JOBS, job_id, "progress"), _read_lock, body)


@_named
def extend_job_lock(job_id: str, *, lock_id: str, additional_ms: int | None = None) -> ApiRequest[LockState]:
    """Keep the lock for at least `additional_ms` from now (the grant's TTL by default); never shortens it.

    Raises LockLost, MaxProcessingTimeExceeded.
    """
    return post(job_path(JOBS, job_id, "extend"), _read_lock, {"lock_id": lock_id, "additional_ms": additional_ms})


@_named
def complete_job(
    job_id: str,
    *,
    lock_id: str,
    download_url: str | None = None,
    file_path: str | None = None,
    storage_key: str | None = None,
    metadata: Any = None,
    expires_at: int | None = None,
) -> ApiRequest[JobInfo]:
    """End the job as completed, with what it made. It is deleted at `expires_at` (default: the daemon's retention).

    Asked again with the same values it answers the same. Raises LockLost, InvalidTransition (ended otherwise by you).
    """
    body = {
        "lock_id": lock_id,
        "download_url": download_url,
        "file_path": file_path,
        "storage_key": storage_key,
        "metadata": metadata,
        "expires_at": expires_at,
    }
    return post(job_path(JOBS, job_id, "complete"), read_job, body)


@_named
def fail_job(
    job_id: str,
    *,
    lock_id: str,
    error_message: str,
    error_code: str | None = None,
    retry: bool = True,
    retry_after_ms: int | None = None,
) -> ApiRequest[JobInfo]:
    """End this attempt as failed. With attempts left the job goes back to its queue, unless `retry` is False.

    `error_message` has 1 to 4096 characters. Raises LockLost, InvalidTransition (ended otherwise by you).
    """
    body = {
        "lock_id": lock_id,
        "error_message": error_message,
        "error_code": error_code,
        "retry": None if retry else False,
        "retry_after_ms": retry_after_ms,
    }
    return post(job_path(JOBS, job_id, "fail"), read_job, body)


@_named
def release_job(job_id: str, *, lock_id: str, delay_ms: int | None = None) -> ApiRequest[JobInfo]:
    """Give the job back to its queue, unworked: the attempt does not count. Due again after `delay_ms`.

    Without `delay_ms` it keeps its place. From the 5th release in a row without progress, it waits 1 s to 1 min.
    After your own complete or fail it changes nothing, so it may stand in a `finally`. Raises LockLost.
    """
    return post(job_path(JOBS, job_id, "release"), read_job, {"lock_id": lock_id, "delay_ms": delay_ms})


def cancel_job(job_id: str, reason: str | None = None, *, idempotency_key: str | None = None) -> ApiRequest[JobInfo]:
    """Cancel a job that is not finished; its holder, if any, hears of it with its next call.

    Raises JobNotFound, InvalidTransition.
    """
    return post(job_path(JOBS, job_id, "cancel"), read_job, {"reason": reason}, key=idempotency_key or uuid7())


def queues(*, limit: int | None = None, cursor: str | None = None) -> ApiRequest[list[QueueView]]:
    """Get a page of queues by name: counts by status, the oldest due job, and the pause if there is one.

    `limit` is at most 200, the default. `cursor` is the name of the last queue of the page before.
    """
    return get("/v1/queues", read_queues, limit=limit, cursor=cursor)


def workers() -> ApiRequest[list[WorkerView]]:
    """List up to 200 workers that are not gone, most recently seen first: state, latest claim, jobs."""
    return get("/v1/workers", lambda body: read_workers(body).workers)


def worker_page(
    *, state: WorkerState | None = None, limit: int | None = None, cursor: str | None = None
) -> ApiRequest[WorkerList]:
    """Get a page of workers, most recently seen first. `limit` is at most 200, the default.

    `state` selects workers in that state; without it, all that are not gone. `cursor` is the `next_cursor` of the page
    before.
    """
    return get("/v1/workers", read_workers, state=state, limit=limit, cursor=cursor)
