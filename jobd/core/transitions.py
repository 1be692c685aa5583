"""The transitions of a job: grant, requeue, finish, stall, expire.

Each transition adds one event and returns the new row. The rules check whether it is allowed.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import UNSET, Raw, UnsetType

from jobd.core import views
from jobd.core.transaction import Transaction
from jobd.model.clocks import LockMs
from jobd.model.commands import Claim, Complete, Create, Import, Moment, Start
from jobd.model.errors import ApiException, api_error
from jobd.model.events import EventType
from jobd.model.job import (
    LATEST_MS,
    MAX_PERCENT,
    TRANSITIONS,
    Backoff,
    Failure,
    Grant,
    Job,
    LockDeadlines,
    Options,
    Policy,
    PreviousGrant,
    Result,
    default_if_none,
    requeues_on_stall,
    shown_bytes,
    storage_key_error,
)
from jobd.model.responses import Response
from jobd.model.times import duration

STALLED: Final = "stalled"
EXPIRED: Final = "expired"
MAX_QUOTED_ERROR: Final = 500  # characters of the last error that the message of an expiry repeats
CLOCK_SUSPECT: Final = (
    "The wall clock is suspect, so nothing is deleted or failed by age. Check it. If it is correct: jobctl clock accept"
)
_NULL: Final = Raw(b"null")


def find(tx: Transaction, job_id: str) -> Job:
    """Return the job. Raises ApiException if it does not exist or is in quarantine."""
    job = tx.state.get(job_id)
    if job is None:
        raise no_such_job(tx, job_id)
    return job


def no_such_job(tx: Transaction, job_id: str) -> ApiException:
    """Return the error about a job that does not exist or is in quarantine."""
    reason = tx.state.quarantined.get(job_id)
    if reason is not None:
        message = f"Job {job_id} is in quarantine: {reason}. An operator can repair it: jobd doctor shows how."
        return api_error("job_quarantined", message, job_id=job_id, reason=reason)
    message = (
        f"There is no job {job_id}: it was never created, or it was deleted. "
        "Search the list of jobs: GET /v1/jobs or jobctl jobs."
    )
    return api_error("job_not_found", message, job_id=job_id)


def invalid_transition(job: Job, to: str, what: str) -> ApiException:
    """Return the error of a transition that the status does not allow. `what` says what to do instead.

    Its detail `allowed` has the statuses that an operator may set.
    """
    allowed = sorted(status for source, status in TRANSITIONS if source == job.status and status != "processing")
    message = f"Job {job.id} is {job.status}. {what}"
    return api_error("invalid_transition", message, status=job.status, to=to, allowed=allowed)


def job_response(tx: Transaction, job: Job, *, repeated: bool | UnsetType = UNSET) -> Response:
    """Return the current view of the job. The actor adds the payload before the response is sent."""
    view = views.job_view(job, tx.at, tx.policy, admin=tx.call.admin)
    view.repeated = repeated
    return Response(view, unread_payloads=[(job.seq, view)], large_bytes=shown_bytes(job))


def check_live_jobs(tx: Transaction) -> None:
    """Reject a new job if the limit of unfinished jobs is reached."""
    limit = tx.policy.live_jobs
    if tx.state.live_count < limit:
        return
    message = f"There are {limit} unfinished jobs (limits.live_jobs). Wait until some are finished, or raise the limit."
    raise api_error("too_many_jobs", message, limit=limit)


def check_queue(tx: Transaction, queue: str) -> None:
    """Reject the first job of a queue above the limit. Queues that exist above a lowered limit still get jobs."""
    known, limit = tx.state.counts, tx.policy.queues
    if queue in known or len(known) < limit:
        return
    message = (
        f"Queue {queue} would be new, and {len(known)} queues have jobs (limits.queues {limit}). "
        "Use a queue that has jobs, raise the limit, or wait until a queue has none. Finished jobs count too, until "
        "they are deleted."
    )
    raise api_error("too_many_queues", message, queue=queue, limit=limit)


def invalid(field: str, message: str) -> ApiException:
    return api_error("invalid_request", message, field=f"$.{field}")


def check_backoff(backoff: Backoff) -> None:
    if backoff.max_ms < backoff.base_ms:
        message = f"max_ms {backoff.max_ms} is less than base_ms {backoff.base_ms}. Raise max_ms, or lower base_ms."
        raise invalid("backoff.max_ms", message)


def check_expiry(tx: Transaction, expires_at: int | None) -> None:
    if expires_at is not None and expires_at <= tx.at.believed:
        raise invalid("expires_at", f"expires_at {expires_at} is not in the future; it is in Unix milliseconds.")


def check_result(tx: Transaction, command: Complete) -> None:
    """Reject a result that may not complete a job."""
    if command.storage_key is not None and (fault := storage_key_error(command.storage_key)) is not None:
        raise invalid("storage_key", f"storage_key {fault}.")
    check_expiry(tx, command.expires_at)
    check_url(tx.policy, command.download_url)


def check_url(policy: Policy, download_url: str | None, field: str = "download_url") -> None:
    """Reject a completion with this download_url, or without one, if the configuration requires one."""
    if lacks_url(policy, download_url):
        raise invalid(field, "download_url is missing; [validation] require_download_url requires it.")


def lacks_url(policy: Policy, download_url: str | None) -> bool:
    """Return whether the configuration requires a download_url and this one is missing."""
    return policy.require_download_url and not download_url


def requested_options(tx: Transaction, request: Create | Import) -> Options:
    """Return the options of a new job. max_stalls and on_stall get their defaults here, so that the job shows them."""
    policy = tx.policy
    options = Options(
        request.queue,
        request.kind,
        request.priority,
        request.max_attempts,
        request.backoff,
        policy.max_stalls if request.max_stalls is None else request.max_stalls,
        request.on_stall or policy.on_stall,
        request.stall_after_ms,
        request.progress_timeout_ms,
    )
    return tx.state.shared(options)


def normalize_number(progress: float) -> int | float:
    """Return 42 for 42.0."""
    return int(progress) if progress == int(progress) else progress


def grant(tx: Transaction, job: Job, request: Start | Claim) -> Job:
    """Grant a queued job to the worker of the request: a new lock, a new fencing token, one more attempt.

    The stall time of the request takes precedence over that of the job. The progress timeout of the job takes
    precedence over that of the request, so that a worker cannot raise it.
    """
    worker = request.worker
    policy, options, now, lock_ms = tx.policy, job.options, tx.now, tx.at.lock_ms
    token = tx.token()
    stall_after_ms = request.stall_after_ms
    if stall_after_ms is None:
        stall_after_ms = default_if_none(options.stall_after_ms, policy.stall_after_ms)
    progress_timeout_ms = options.progress_timeout_ms
    if progress_timeout_ms is None:
        progress_timeout_ms = default_if_none(request.progress_timeout_ms, policy.progress_timeout_ms)
    ttl_ms = request.lock_ttl_ms or policy.lock_ttl_ms
    expires, progress_due = lock_ms + ttl_ms, None
    if progress_timeout_ms:
        progress_due = lock_ms + progress_timeout_ms
        expires = expires if expires < progress_due else progress_due
    attempt = job.attempt + 1
    fields = {
        "status": "processing",
        "started_at": now if now > job.created_at else job.created_at,
        "progress": 0,
        "progress_message": None,
        "attempt": attempt,
        "grant": Grant(tx.secret(token), token, worker, now, ttl_ms, stall_after_ms, progress_timeout_ms),
        "deadlines": LockDeadlines(expires, lock_ms + stall_after_ms, progress_due),
    }
    details = {"worker": worker, "fencing_token": token, "attempt": attempt, "ttl_ms": ttl_ms}
    # `by` instead of `worker`, because `note_request` has already recorded the worker.
    return tx.update(job, "granted", fields, by=f"worker:{worker}", details=details)


def keep_alive(
    made: Grant, deadlines: LockDeadlines, now: LockMs, additional_ms: int, *, progressed: bool
) -> LockDeadlines:
    """Return the deadlines after a report at lock time `now`: at least `additional_ms` from now, never shorter.

    Only progress moves `progress_due`; an extension is cut to it. No deadline moves back: after a start of the daemon,
    a deadline can be later than the grant alone would allow, and a report must not lose that.
    """
    expires, stall_due, progress_due = now + additional_ms, now + made.stall_after_ms, deadlines.progress_due
    if progressed and made.progress_timeout_ms:
        limit = now + made.progress_timeout_ms
        progress_due = limit if progress_due is None or progress_due < limit else progress_due
    if progress_due is not None and progress_due < expires:
        expires = progress_due
    return LockDeadlines(
        expires if expires > deadlines.expires else deadlines.expires,
        stall_due if stall_due > deadlines.stall_due else deadlines.stall_due,
        progress_due,
    )


def requeue(
    tx: Transaction,
    job: Job,
    event_type: EventType,
    ended: PreviousGrant | None,
    fields: dict[str, Any],
    *,
    worker: str | None = None,
    reason: str | None = None,
    details: dict[str, Any] | None = None,
) -> Job:
    """Put the job back into its queue. It keeps its last error and, unless `fields` set run_at, its place."""
    fields["status"] = "queued"
    fields["progress"], fields["progress_message"] = 0, None
    fields["started_at"] = fields["finished_at"] = None
    if fields.setdefault("releases", 0) == job.releases:
        del fields["releases"]
    if job.status != "processing":
        fields.setdefault("expires_at", None)  # the deletion time of a finished job
        if tx.at.now < job.run_at <= job.updated_at:  # the wall clock was set back
            fields.setdefault("run_at", tx.at.now)
    _end_grant(fields, job, ended)
    return tx.update(job, event_type, fields, worker=worker, reason=reason, details=details)


def finish(
    tx: Transaction,
    job: Job,
    event_type: EventType,
    status: str,
    ended: PreviousGrant | None,
    fields: dict[str, Any],
    *,
    worker: str | None = None,
    by: str | None = None,
    reason: str | None = None,
    details: dict[str, Any] | None = None,
) -> Job:
    """Move the job to a finished status. It is deleted after its retention, or at `expires_at` in `fields`."""
    finished_at = tx.now
    if finished_at < job.created_at:  # the wall clock stepped back
        finished_at = job.created_at
    if job.started_at is not None and finished_at < job.started_at:
        finished_at = job.started_at
    if fields.get("expires_at") is None:
        fields["expires_at"] = min(max(finished_at, tx.at.latest) + keep_ms(tx.policy, status), LATEST_MS)
    fields["status"] = status
    fields["finished_at"] = finished_at
    if job.releases:
        fields["releases"] = 0
    _end_grant(fields, job, ended)
    return tx.update(job, event_type, fields, worker=worker, by=by, reason=reason, details=details)


def completion(result: Result, expires_at: int | None = None) -> dict[str, Any]:
    """Return the fields of a job that completes with `result`: progress 100, no error."""
    return {"progress": MAX_PERCENT, "result": normalize_result(result), "error": None, "expires_at": expires_at}


def keep_ms(policy: Policy, status: str) -> int:
    """Return the retention of a finished status."""
    if status == "completed":
        return policy.keep_completed_ms
    return policy.keep_failed_ms if status == "failed" else policy.keep_cancelled_ms


def normalize_result(result: Result) -> Result | None:
    """Return the result to store, None if it is empty. Copies the metadata out of the request; null counts as none."""
    if result.metadata is not None:
        metadata = None if result.metadata == _NULL else result.metadata.copy()
        result = Result(result.download_url, result.file_path, result.storage_key, metadata)
    return None if result == views.NO_RESULT else result


def ended_by(job: Job, now: int, rule: str, reason: str) -> PreviousGrant | None:
    """Return the record of the end of the current grant; the existing one if the job has no grant."""
    if job.grant is None:
        return job.ended
    return PreviousGrant(job.grant.lock_id, job.grant.fencing_token, job.grant.worker, now, rule, reason)


def refunded_attempts(job: Job) -> int:
    """Return the attempts of the job without the current one."""
    return max(job.attempt - 1, 0)


def stall(tx: Transaction, job: Job, cause: str, *, rule: str = "recovery", why: str = STALLED) -> Job:
    """End the grant of a stalled job by its `on_stall`. `cause` is a sentence.

    `rule` and `why` explain the lost lock to the holder if it returns.
    """
    options, stalls = job.options, job.stalls + 1
    attempt = refunded_attempts(job) if job.progress == 0 else job.attempt
    ended = ended_by(job, tx.at.now, rule, why)
    details = {"worker": job.grant.worker if job.grant else None, "progress": job.progress, "stalls": stalls}
    if requeues_on_stall(job):
        fields = {"attempt": attempt, "stalls": stalls}
        return requeue(tx, job, "stalled", ended, fields, reason=cause, details=details)
    if stalls > options.max_stalls:
        times = "once" if stalls == 1 else f"{stalls} times"
        advice = f"It stalled {times} (max_stalls {options.max_stalls}); find out what kills its workers."
    elif options.on_stall == "fail":
        advice = "Its on_stall is fail; retry the job to run it again."
    else:
        advice = "The work may be half done; check it, then retry the job to run it again."
    error = Failure(f"{cause} {advice}", STALLED)
    failed: dict[str, Any] = {"attempt": attempt, "stalls": stalls, "error": error}
    return finish(tx, job, "stalled", "failed", ended, failed, reason=error.message, details=details)


def stall_reason(tx: Transaction, job: Job) -> str:
    """Return a sentence for operators that says why the job is stalled."""
    made, deadlines = job.grant, job.deadlines
    if made is None or deadlines is None:
        return "The job was processing, but no worker held it."
    where = f"at {job.progress:g} % (attempt {job.attempt} of {job.options.max_attempts})"
    if deadlines.is_past_progress_due(tx.at.lock_ms):
        limit = duration(made.progress_timeout_ms)
        return f"Worker {made.worker} reported no progress for {limit} (progress_timeout_ms) {where}."
    unreported_ms = tx.at.lock_ms - (deadlines.stall_due - made.stall_after_ms)
    return f"No update from worker {made.worker} for {duration(unreported_ms)} {where}. The lock had expired."


def was_due(job: Job, now: int) -> bool:
    """Return whether the job was due when it last changed, and is not due `now`: the wall clock was set back.

    A `run_at` before `created_at` was set after that step: `updated_at` is never before `created_at`.
    """
    return now < job.run_at and job.created_at <= job.run_at <= job.updated_at


def expire(tx: Transaction, job: Job, by: str | None = None) -> Job:
    """Fail a queued job whose `expires_at` has passed. The message repeats its last error."""
    waited = "before a worker took the job" if job.ended is None else "while it waited for a retry"
    message = f"Its expires_at passed {waited}. Create it again if it is still needed."
    if job.error is not None and job.error.message:
        message += f" Its last error: {job.error.message[:MAX_QUOTED_ERROR]}"
    error = Failure(message, EXPIRED)
    return finish(tx, job, "expired", "failed", job.ended, {"error": error}, by=by, reason=message)


def expire_if_overdue(tx: Transaction, job: Job) -> Job:
    """Fail the job if it is queued and past its `expires_at`. Return its row. Commands that do not end it call this."""
    return expire(tx, job, by="daemon") if may_expire(job, tx.at) else job


def may_expire(job: Job, at: Moment) -> bool:
    """Return whether the job is overdue by a clock that is not suspect. Then it fails."""
    return not at.suspect and is_overdue(job, at.now)


def is_overdue(job: Job, now: int) -> bool:
    """Return whether the job is queued and past its `expires_at`."""
    return job.status == "queued" and job.expires_at is not None and job.expires_at <= now


def is_stalled(job: Job, lock_ms: LockMs) -> bool:
    """Return whether the job is processing and stalled at lock time `lock_ms`. Without a grant it always is."""
    return job.status == "processing" and (
        job.deadlines is None or job.grant is None or lock_ms >= job.deadlines.stalled_at
    )


def _end_grant(fields: dict[str, Any], job: Job, ended: PreviousGrant | None) -> None:
    if job.grant is not None or job.deadlines is not None:
        fields["grant"] = fields["deadlines"] = None
    if ended != job.ended:
        fields["ended"] = ended
