"""The rules that create jobs. A repeated request returns the job that the first one created."""

from __future__ import annotations

from typing import Any, Final

from msgspec import UNSET
from msgspec.structs import replace

from jobd.core import guards, transitions, views
from jobd.core.transaction import Transaction
from jobd.model.commands import Bulk, Create, Moment
from jobd.model.errors import ApiError, ApiException, api_error
from jobd.model.job import Extra, Job, headers_key, recorded_bytes
from jobd.model.responses import JobList, JobView, Response

# Options of a job that no command changes.
_FIXED: Final = ("queue", "kind", "backoff", "stall_after_ms", "progress_timeout_ms")
_TIMES: Final = frozenset({"run_at", "expires_at"})


def create(tx: Transaction, command: Create) -> Response:
    job, view, is_new = _create(tx, command)
    return Response(view, status=201) if is_new else Response(view, unread_payloads=views.unread(job, view))


def bulk(tx: Transaction, command: Bulk) -> Response:
    """Create all jobs or none, in the order given. Jobs that the same request created before are returned."""
    ids = [item.id for item in command.jobs if item.id is not None]
    if len(ids) != len(set(ids)):
        twice = next(job_id for job_id in ids if ids.count(job_id) > 1)
        raise guards.invalid("jobs", f"The id {twice} is in the list twice; give each job its own id.")
    response = Response(JobList([]), status=201)
    for index, item in enumerate(command.jobs):
        try:
            job, view, is_new = _create(tx, item)
        except ApiException as rejected:
            tx.undo()
            raise _rejected_item(index, rejected.error) from None
        response.data.jobs.append(view)
        if not is_new:
            response.unread_payloads += views.unread(job, view)
    return response


def _rejected_item(index: int, error: ApiError) -> ApiException:
    details = error.details | {"index": index}
    if "field" in error.details:
        details["field"] = f"$.jobs[{index}]{error.details['field'].removeprefix('$')}"
    return api_error(error.code, f"jobs[{index}]: {error.message} No job was created.", **details)


def _create(tx: Transaction, command: Create) -> tuple[Job, JobView, bool]:
    """Return the new job or the one that the same request created before, its view, and whether it is new."""
    # A request without an id cannot be repeated, so it needs no hash.
    request_hash = "" if command.id is None else guards.digest(command)
    if command.id is not None and (existing := _existing(tx, command, command.id, request_hash)) is not None:
        return existing, views.job_view(existing, tx.at, tx.policy, admin=tx.call.admin), False
    _check_options(tx, command)
    run_at = command.run_at or tx.now + (command.delay_ms or 0)
    return *add_job(tx, command, command.id, run_at, request_hash), True


def add_job(
    tx: Transaction,
    command: Create,
    job_id: str | None,
    run_at: int,
    request_hash: str,
    extra: Extra | None = None,
    schedule: dict[str, Any] | None = None,
) -> tuple[Job, JobView]:
    """Create a job, and return it with its view. `schedule` are the details of a firing."""
    guards.check_live_jobs(tx)
    guards.check_queue(tx, command.queue)
    headers = guards.headers_body(tx, command.headers) if command.headers else None
    now, number, options = tx.now, tx.job_number(), transitions.requested_options(tx, command)
    expires_at = command.expires_at if command.expires_in_ms is UNSET else tx.at.latest + command.expires_in_ms
    if headers:
        extra = replace(extra or Extra(), headers_bytes=len(headers))
    job = Job(
        number,
        job_id or tx.job_id(number),
        options,
        "queued",
        now,
        now,
        run_at,
        expires_at=expires_at,
        payload_bytes=recorded_bytes(command.payload),
        extra=extra,
    )
    tx.create(job, "created", bytes(command.payload), request_hash, schedule)
    view = views.job_view(job, tx.at, tx.policy, payload=command.payload)
    if headers:
        tx.attach(headers_key(number), headers)
        view.headers = command.headers
    return job, view


def _existing(tx: Transaction, command: Create, job_id: str, request_hash: str) -> Job | None:
    if job_id in tx.state.quarantined:
        raise guards.no_such_job(tx, job_id)
    job = tx.state.get(job_id)
    request = tx.requests.get(job_id)
    if job is None or (request is not None and request.request_hash == request_hash):
        return job
    differs_in = _differences(job, command, tx.at)
    if request is not None and request.body != bytes(command.payload):
        differs_in.insert(0, "payload")
    if not differs_in:
        message = (
            f"Job {job_id} exists, created by another request. The job does not show in which field: priority, "
            "max_attempts, run_at and expires_at may have changed since."
        )
    else:
        message = f"Job {job_id} exists, created by a request that differs in {', '.join(differs_in)}."
    if not _TIMES.isdisjoint(differs_in):
        message += " A time that is computed from now differs in each request: use delay_ms and expires_in_ms."
    message += " Use another id, or omit it."
    raise api_error("job_exists", message, job_id=job_id, status=job.status, differs_in=differs_in)


def _differences(job: Job, command: Create, at: Moment) -> list[str]:
    """Return the fields, except payload, in which `command` certainly differs from the request that created `job`.

    `expires_in_ms` also if the clock was behind then, and was put right since.
    """
    options = job.options
    found = [name for name in _FIXED if getattr(command, name) != getattr(options, name)]
    for name in ("max_stalls", "on_stall"):  # without a value, the job has that of the configuration at its creation
        if getattr(command, name) not in (None, getattr(options, name)):
            found.append(name)
    if job.updated_at != job.created_at:  # the other fields may have changed since
        return found
    found += [name for name in ("priority", "max_attempts") if getattr(command, name) != getattr(options, name)]
    delay_ms, expires_in_ms = command.delay_ms, command.expires_in_ms
    if (command.run_at or job.created_at + (delay_ms or 0)) != job.run_at:
        found.append("run_at" if delay_ms is None else "delay_ms")
    if expires_in_ms is UNSET:
        if command.expires_at != job.expires_at:
            found.append("expires_at")
    elif not 0 <= (job.expires_at or 0) - job.created_at - expires_in_ms <= at.latest - at.now:
        found.append("expires_in_ms")
    return found


def _check_options(tx: Transaction, command: Create) -> None:
    if command.run_at is not None and command.delay_ms is not None:
        raise guards.invalid("run_at", "Give run_at or delay_ms, not both.")
    if command.expires_at is not None and command.expires_in_ms is not UNSET:
        raise guards.invalid("expires_at", "Give expires_at or expires_in_ms, not both.")
    guards.check_backoff(command.backoff)
    guards.check_expiry(tx, command.expires_at)
