"""The calls of the worker API: one function each, which builds the request.

The methods of the clients get their signatures and docstrings from here. Durations are in milliseconds, times in Unix
milliseconds, as in the API.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from msgspec import Struct

from jobd.client.protocol import ApiRequest, GrantInfo, GrantList, JobInfo, JobInfoPage, get, job_path, post, uuid7
from jobd.model.commands import About, WorkerState
from jobd.model.events import EventView
from jobd.model.job import Backoff, OnStall, Status
from jobd.model.responses import (
    ClusterView,
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

Build = TypeVar("Build", bound=Callable[..., ApiRequest[Any]])


class _CreatedJobs(Struct):
    jobs: list[JobInfo]


def _named(build: Build) -> Build:
    """Reject positional arguments after `job_id` with a TypeError that shows the correct call.

    The job manager that jobd replaces has them in another order (`failJob(jobId, message, lockId)`).
    """
    needed = [p.name for p in inspect.signature(build).parameters.values() if p.default is p.empty]
    call = f"{build.__name__}({', '.join([needed[0], *(f'{name}=...' for name in needed[1:])])})"

    @functools.wraps(build)
    def checked(*positional: Any, **named: Any) -> ApiRequest[Any]:
        if len(positional) > 1:
            raise TypeError(f"only job_id can be positional; write {call}")
        return build(*positional, **named)

    return cast(Build, checked)


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
    """Create a job and return it. The daemon has defaults for all options.

    `payload` is any value that JSON can express (msgspec.Raw is sent unchanged). A smaller `priority` runs first.
    `backoff` is a mapping such as `{"kind": "fixed", "base_ms": 5000}`. Times are Unix ms. Without `id`, the client
    generates one (UUIDv7), so a retry after a lost response does not create a second job. Raises JobExists if a
    different job with this `id` exists, TooLarge if the payload is above the limit, TooManyJobs, TooManyQueues,
    StorageFull.
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
    return post(JOBS, JobInfo, body, key=idempotency_key)


def create_jobs(jobs: Iterable[Mapping[str, Any]], *, idempotency_key: str | None = None) -> ApiRequest[list[JobInfo]]:
    """Create up to 1000 jobs, all or none, in the given order.

    Each is a mapping with the arguments of `create_job`; those without an `id` get a UUIDv7. Raises the same errors.
    """
    with_ids = [{"id": job.get("id") or uuid7()} | {name: job[name] for name in job if name != "id"} for job in jobs]
    created = post(f"{JOBS}/bulk", _CreatedJobs, {"jobs": with_ids}, key=idempotency_key or uuid7())
    return created.then(lambda found: found.jobs)


def get_job(job_id: str) -> ApiRequest[JobInfo]:
    """Get the current state of the job. Raises JobNotFound."""
    return get(job_path(JOBS, job_id), JobInfo)


def list_jobs(
    *,
    status: Status | None = None,
    queue: str | None = None,
    kind: str | None = None,
    worker: str | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[JobInfoPage]:
    """Get a page of the jobs that match, newest first. `limit` is at most 200, by default 50.

    `worker` selects jobs that this worker holds or was the last to hold. `cursor` is the `next_cursor` of the previous
    page. A page may be short; the last page has no `next_cursor`.
    """
    return get(JOBS, JobInfoPage, status=status, queue=queue, kind=kind, worker=worker, limit=limit, cursor=cursor)


def timeline(job_id: str) -> ApiRequest[list[EventView]]:
    """Get the job's history, oldest event first. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "timeline"), TimelineView).then(lambda found: found.events)


def why(job_id: str) -> ApiRequest[WhyView]:
    """Explain in plain words why the job is in its state, and what happens next. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "why"), WhyView)


def validate_job_state(job_id: str) -> ApiRequest[Validation]:
    """Check the job's record: the problems found, and their fixes. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "validate"), Validation)


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
    """Lock this job for `worker`. The lock expires after `lock_ttl_ms` (1 s to 24 h) unless it is extended.

    `max_processing_ms` is the progress timeout: the lock expires at most that long after the latest progress report (0:
    no timeout). A progress timeout of the job itself takes precedence. `jobctl workers` shows `about`.

    Raises AlreadyLocked, NotDue, QueuePaused, InvalidTransition, JobNotFound.
    """
    body = {
        "worker": worker,
        "lock_ttl_ms": lock_ttl_ms,
        "stuck_after_ms": stuck_after_ms,
        "max_processing_ms": max_processing_ms,
        "about": about,
    }
    return post(job_path(JOBS, job_id, "start"), GrantInfo, body, key=idempotency_key or uuid7())


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
    """Lock the first due jobs for `worker`, at most `limit` (1 by default, up to 100). The list may be empty.

    `queues` is `["default"]` by default. Without `kinds`, all kinds match. With `wait_ms` (up to 60 000), the call
    waits up to that long for a job. The other options are those of `start_processing`.
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
    granted = post("/v1/claim", GrantList, body, key=idempotency_key or uuid7(), wait_ms=wait_ms)
    return granted.then(lambda found: found.grants)


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)


@_named
def update_progress(job_id: str, *, lock_id: str, progress: float, message: str | None = None) -> ApiRequest[LockState]:
    """Report progress (0 to 100). This also renews the lock.

    Raises LockLost if the job is no longer yours, MaxProcessingTimeExceeded if the latest report is too old.
    """
    body = {"lock_id": lock_id, "progress": progress, "message": message}
    return post(job_path(JOBS, job_id, "progress"), LockState, body)


@_named
def extend_job_lock(job_id: str, *, lock_id: str, additional_ms: int | None = None) -> ApiRequest[LockState]:
    """Extend the lock to at least `additional_ms` from now (the grant's TTL by default). Never shortens it.

    Raises LockLost, MaxProcessingTimeExceeded.
    """
    return post(job_path(JOBS, job_id, "extend"), LockState, {"lock_id": lock_id, "additional_ms": additional_ms})


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
    """Complete the job with its result. It is deleted at `expires_at`, by default after the daemon's retention.

    Repeating the call returns the same result. Raises LockLost, and InvalidTransition if you ended the job differently.
    """
    body = {
        "lock_id": lock_id,
        "download_url": download_url,
        "file_path": file_path,
        "storage_key": storage_key,
        "metadata": metadata,
        "expires_at": expires_at,
    }
    return post(job_path(JOBS, job_id, "complete"), JobInfo, body)


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
    """Fail this attempt. The job returns to its queue if attempts are left and `retry` is not False.

    `error_message` has 1 to 4096 characters. Raises LockLost, and InvalidTransition if you ended the job differently.
    """
    body = {
        "lock_id": lock_id,
        "error_message": error_message,
        "error_code": error_code,
        "retry": None if retry else False,
        "retry_after_ms": retry_after_ms,
    }
    return post(job_path(JOBS, job_id, "fail"), JobInfo, body)


@_named
def release_job(job_id: str, *, lock_id: str, delay_ms: int | None = None) -> ApiRequest[JobInfo]:
    """Return the job to its queue without using an attempt. It is due again after `delay_ms`.

    Without `delay_ms`, it keeps its position. From the 5th release in a row without progress, it is delayed by 1 s to
    1 min. After your own complete or fail, the call changes nothing, so it can be in a `finally`. Raises LockLost.
    """
    return post(job_path(JOBS, job_id, "release"), JobInfo, {"lock_id": lock_id, "delay_ms": delay_ms})


def cancel_job(job_id: str, reason: str | None = None, *, idempotency_key: str | None = None) -> ApiRequest[JobInfo]:
    """Cancel an unfinished job. The next call of the worker that holds it raises LockLost.

    Raises JobNotFound, InvalidTransition.
    """
    return post(job_path(JOBS, job_id, "cancel"), JobInfo, {"reason": reason}, key=idempotency_key or uuid7())


def cluster() -> ApiRequest[ClusterView]:
    """Get the nodes of the cluster and its leader, as the node that responds sees them. It may be a standby."""
    return get("/v1/cluster", ClusterView)


def queues(*, limit: int | None = None, cursor: str | None = None) -> ApiRequest[list[QueueView]]:
    """Get a page of queues by name: counts by status, the oldest due job, and the pause if there is one.

    `limit` is at most 200, the default. `cursor` is the name of the last queue of the previous page.
    """
    return queue_page(limit=limit, cursor=cursor).then(lambda page: page.queues)


def queue_page(*, limit: int | None = None, cursor: str | None = None) -> ApiRequest[QueueList]:
    """Get a page of queues with its `next_cursor`."""
    return get("/v1/queues", QueueList, limit=limit, cursor=cursor)


def workers() -> ApiRequest[list[WorkerView]]:
    """List up to 200 workers that are not gone, most recently seen first: state, latest claim, jobs."""
    return worker_page().then(lambda page: page.workers)


def worker_page(
    *, state: WorkerState | None = None, limit: int | None = None, cursor: str | None = None
) -> ApiRequest[WorkerList]:
    """Get a page of workers, most recently seen first. `limit` is at most 200, the default.

    `state` selects workers in that state, by default all that are not gone. `cursor` is the `next_cursor` of the
    previous page.
    """
    return get("/v1/workers", WorkerList, state=state, limit=limit, cursor=cursor)
