"""The rules for commands of creators and workers, and for operators who act in place of a worker.

A rule checks its guards in the documented order, then makes its transitions.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final

import msgspec

from jobd.core import transitions, views
from jobd.core.rules import late_results as late_result_rules
from jobd.core.rules import operator as operator_rules
from jobd.core.transaction import Transaction
from jobd.model.commands import (
    AnyCommand,
    Bulk,
    Cancel,
    Claim,
    Complete,
    Create,
    Extend,
    ExtendLock,
    Fail,
    Progress,
    Release,
    ReleaseLock,
    Start,
    Undelivered,
)
from jobd.model.errors import ApiError
from jobd.model.job import DELAYED_FROM, Failure, Job, PreviousGrant, Result, release_delay_ms
from jobd.model.responses import Grants, JobList, JobView, Response

_encode: Final = msgspec.json.Encoder().encode

# -- create -----------------------------------------------------------------------------------------------------------


def create(tx: Transaction, command: Create) -> Response | ApiError:
    made = _create(tx, command)
    if not isinstance(made, tuple):
        return made
    job, view, is_new = made
    return Response(view, status=201) if is_new else Response(view, unread_payloads=[(job.seq, view)])


def bulk(tx: Transaction, command: Bulk) -> Response | ApiError:
    """Create all jobs or none, in the order given. Jobs that the same request created before are returned."""
    ids = [item.id for item in command.jobs if item.id is not None]
    if len(ids) != len(set(ids)):
        twice = next(job_id for job_id in ids if ids.count(job_id) > 1)
        return transitions.invalid("jobs", f"The id {twice} is in the list twice; give each job its own id.")
    response = Response(JobList([]), status=201)
    for index, item in enumerate(command.jobs):
        made = _create(tx, item)
        if not isinstance(made, tuple):
            tx.undo()
            message = f"jobs[{index}]: {made.message} No job was created."
            details = made.details | {"index": index}
            if "field" in made.details:
                details["field"] = f"$.jobs[{index}]{made.details['field'].removeprefix('$')}"
            return ApiError(made.code, message, details)
        job, view, is_new = made
        response.data.jobs.append(view)
        if not is_new:
            response.unread_payloads.append((job.seq, view))
    return response


def _create(tx: Transaction, command: Create) -> tuple[Job, JobView, bool] | ApiError:
    """Return the new job or the one that the same request created before, its view, and whether it is new."""
    # A request without an id cannot be repeated, so it needs no hash.
    request_hash = "" if command.id is None else digest(command)
    if command.id is not None and (existing := _existing(tx, command.id, request_hash)) is not None:
        if isinstance(existing, ApiError):
            return existing
        return existing, views.job_view(existing, tx.at, tx.policy, admin=tx.call.admin), False
    refusal = _refuse_options(tx, command) or transitions.refuse_above_limit(tx)
    refusal = refusal or transitions.refuse_queue(tx, command.queue)
    if refusal is not None:
        return refusal
    now, number, options = tx.now, tx.job_number(), transitions.requested_options(tx, command)
    run_at = command.run_at or now + (command.delay_ms or 0)
    job_id = command.id or tx.job_id(number)
    job = Job(number, job_id, options, "queued", now, now, run_at, expires_at=command.expires_at)
    tx.create(job, "created", bytes(command.payload), request_hash)
    return job, views.job_view(job, tx.at, tx.policy, admin=tx.call.admin, payload=command.payload), True


def _existing(tx: Transaction, job_id: str, request_hash: str) -> Job | ApiError | None:
    if job_id in tx.state.quarantined:
        return transitions.find(tx, job_id)
    job = tx.state.get(job_id)
    if job is None or tx.state.request_hashes.get(job_id) == request_hash:
        return job
    message = f"Job {job_id} exists and was created by another request. Use another id, or omit it."
    return ApiError("job_exists", message, {"job_id": job_id, "status": job.status})


def _refuse_options(tx: Transaction, command: Create) -> ApiError | None:
    if command.run_at is not None and command.delay_ms is not None:
        return transitions.invalid("run_at", "Give run_at or delay_ms, not both.")
    return transitions.refuse_backoff(command.backoff) or transitions.refuse_expiry(tx, command.expires_at)


# -- grants -----------------------------------------------------------------------------------------------------------


def start(tx: Transaction, command: Start) -> Response | ApiError:
    """Grant the named job: queued, due, and its queue not paused. A stalled job is recovered first."""
    job = transitions.find(tx, command.id)
    if not isinstance(job, Job):
        return job
    if transitions.is_stuck(job, tx.at.lease):
        job = transitions.stall(tx, job, transitions.stall_reason(tx, job))
    job = transitions.expire_if_overdue(tx, job)
    refusal = _refuse_start(tx, job)
    if refusal is not None:
        return refusal
    job = transitions.grant(tx, job, command)
    response = _granted(tx, [job])
    response.data = response.data.grants[0]
    return response


def _refuse_start(tx: Transaction, job: Job) -> ApiError | None:
    at = tx.at
    if job.status == "processing":
        return _already_locked(tx, job)
    if job.status != "queued":
        why = f" ({job.error.message})" if job.error and job.error.message else ""
        return transitions.refuse_transition(job, "processing", f"Only a queued job can be started{why}.")
    if transitions.is_overdue(job, at.now):  # it has not failed, because the clock is suspect
        what = f"It is not granted, because its expires_at has passed. {transitions.CLOCK_SUSPECT}"
        return transitions.refuse_transition(job, "processing", what)
    if job.run_at > at.now:
        wait_ms = job.run_at - at.now
        message = f"Job {job.id} is not due for another {transitions.in_words(wait_ms)}."
        return ApiError("not_due", message, {"run_at": job.run_at, "retry_after_ms": wait_ms})
    queue = job.options.queue
    if (pause := tx.state.paused.get(queue)) is not None:
        message = f"Queue {queue} was paused {pause.describe()}. An operator can resume it: jobctl resume {queue}"
        details = msgspec.to_builtins(views.paused_view(queue, pause))
        return ApiError("queue_paused", message, details)
    return None


def _already_locked(tx: Transaction, job: Job) -> ApiError:
    at = tx.at
    assert job.grant is not None and job.lease is not None  # otherwise the job is stalled
    free_at = job.lease.expires if job.lease.is_live(at.lease) else job.lease.stuck
    wait_ms = free_at - at.lease
    details = {
        "locked_by": job.grant.worker,
        "lock_expires_at": at.wall(job.lease.expires),
        "retry_after_ms": wait_ms,
    }
    message = f"Job {job.id} is held by worker {job.grant.worker}. Try again in {transitions.in_words(wait_ms)}."
    return ApiError("already_locked", message, details)


def claim(tx: Transaction, command: Claim) -> Response:
    """Grant the first due jobs of the queues, by priority, run_at and creation."""
    due = tx.state.first_due(command.queues, command.kinds, command.limit)
    return _granted(tx, [transitions.grant(tx, job, command) for job in due])


def _granted(tx: Transaction, jobs: list[Job]) -> Response:
    shown, unread_payloads, grants = [], [], []
    for job in jobs:
        view = views.job_view(job, tx.at, tx.policy, admin=tx.call.admin)
        granted = views.grant_view(job, tx.at, view)
        shown.append(granted)
        unread_payloads.append((job.seq, view))
        grants.append((job.id, granted.lock_id))
    return Response(Grants(shown), 200, unread_payloads, grants)


def undelivered(tx: Transaction, command: Undelivered) -> Response | ApiError:
    """Put a job back whose grant was not delivered. It keeps its place, and the attempt does not count."""
    job = transitions.find(tx, command.id)
    if isinstance(job, ApiError):
        return job
    if job.status != "processing" or job.grant is None or job.grant.lock_id != command.lock_id:
        return _lock_lost(job, command.lock_id)
    ended = transitions.ended_by(job, tx.at.now, "undelivered", "undelivered")
    reason = "The connection closed before the grant was sent."
    fields = {"attempt": transitions.refunded_attempts(job), "releases": job.releases}
    return transitions.job_response(tx, transitions.requeue(tx, job, "undelivered", ended, fields, reason=reason))


# -- the holder's commands: the latest grant wins ---------------------------------------------------------------------


def progress(tx: Transaction, command: Progress) -> Response | ApiError:
    """Record progress, renew the lock and move the ceiling."""
    job = _held(tx, command, "progress")
    if not isinstance(job, Job):
        return job
    assert job.grant is not None and job.lease is not None
    if job.lease.is_past_ceiling(tx.at.lease):
        return _past_ceiling(tx, job)
    lease = transitions.keep_alive(job.grant, job.lease, tx.at.lease, job.grant.ttl_ms, progressed=True)
    value = transitions.normalize_number(command.progress)
    details: dict[str, Any] = {"progress": value}
    if command.message is not None:
        details["message"] = command.message
    fields: dict[str, Any] = {"progress": value, "progress_message": command.message, "lease": lease}
    if value > 0 and job.releases:
        fields["releases"] = 0
    tx.update(job, "progress", fields, worker=job.grant.worker, details=details)
    return Response(views.lock_state(job.grant, lease, tx.at))


def extend(tx: Transaction, command: Extend) -> Response | ApiError:
    return _extend(tx, command, command.additional_ms)


def extend_lock(tx: Transaction, command: ExtendLock) -> Response | ApiError:
    """Extend the lock in place of its holder."""
    response = _extend(tx, command, command.additional_ms, command.reason)
    if isinstance(response, ApiError):
        return response
    return operator_rules.lock_response(tx, _latest(tx), response.data)


def _extend(
    tx: Transaction, command: Extend | ExtendLock, additional_ms: int | None, reason: str | None = None
) -> Response | ApiError:
    """Extend the lock to at least `additional_ms` from now, never shortening it, up to the ceiling."""
    job = _held(tx, command, "extend")
    if not isinstance(job, Job):
        return job
    assert job.grant is not None and job.lease is not None
    if job.lease.is_past_ceiling(tx.at.lease):
        return _past_ceiling(tx, job)
    lease = transitions.keep_alive(
        job.grant, job.lease, tx.at.lease, additional_ms or job.grant.ttl_ms, progressed=False
    )
    extended = lease.expires > job.lease.expires
    worker = None if tx.call.admin else job.grant.worker
    details = {"lock_expires_at": tx.at.wall(lease.expires)}
    tx.update(job, "extended", {"lease": lease}, worker=worker, reason=reason, details=details)
    return Response(views.lock_state(job.grant, lease, tx.at, extended))


def complete(tx: Transaction, command: Complete) -> Response | ApiError:
    """Complete the job. The result of an ended grant is late: it may still be stored or adopted."""
    job = _held(tx, command, "complete")
    if not isinstance(job, Job):
        if isinstance(job, ApiError) and job.code == "lock_lost":
            return late_result_rules.complete(tx, command, job, digest(command))
        return job
    refusal = transitions.refuse_result(tx, command)
    if refusal is not None:
        return refusal
    ended = _ended_by_holder(tx, job, command, "complete")
    result = Result(command.download_url, command.file_path, command.storage_key, command.metadata)
    fields = transitions.completion(result, command.expires_at)
    job = transitions.finish(tx, job, "completed", "completed", ended, fields, worker=ended.worker)
    return transitions.job_response(tx, job)


def fail(tx: Transaction, command: Fail) -> Response | ApiError:
    """Put the job back into its queue after a delay if attempts are left; otherwise fail it."""
    job = _held(tx, command, "fail")
    if not isinstance(job, Job):
        return job
    ended = _ended_by_holder(tx, job, command, "fail")
    error = Failure(command.error_message, command.error_code)
    worker, reason = ended.worker, error.message
    if not command.retry or job.attempt >= job.options.max_attempts:
        job = transitions.finish(tx, job, "failed", "failed", ended, {"error": error}, worker=worker, reason=reason)
        return transitions.job_response(tx, job)
    wait_ms = command.retry_after_ms
    if wait_ms is None:
        wait_ms = job.options.backoff.wait_ms(job.attempt, tx.fraction(job.attempt))
    run_at = tx.at.now + wait_ms
    details = {"attempt": job.attempt, "run_at": run_at}
    fields = {"run_at": run_at, "error": error}
    job = transitions.requeue(tx, job, "retried", ended, fields, worker=worker, reason=reason, details=details)
    return transitions.job_response(tx, job)


def release(tx: Transaction, command: Release) -> Response | ApiError:
    return _release(tx, command, command.delay_ms)


def release_lock(tx: Transaction, command: ReleaseLock) -> Response | ApiError:
    """Release the job in place of its holder."""
    response = _release(tx, command, None)
    if isinstance(response, ApiError):
        return response
    job = _latest(tx) if tx.has_changed else transitions.find(tx, command.id)
    assert isinstance(job, Job)
    return operator_rules.lock_response(tx, job, None)


def _release(tx: Transaction, command: Release | ReleaseLock, delay_ms: int | None) -> Response | ApiError:
    """Put the job back into its place in the queue. The attempt does not count.

    The job is due later if the holder asks for a delay, or after DELAYED_FROM releases in a row without progress.
    """
    job = _held(tx, command, "release")
    if not isinstance(job, Job):
        return job
    if isinstance(command, ReleaseLock):
        # The holder did not end it: its next call gets lock_lost.
        ended, worker, reason = transitions.ended_by(job, tx.at.now, "release-lock", "released"), None, command.reason
    else:
        ended, reason = _ended_by_holder(tx, job, command, "release"), None
        worker = ended.worker
    releases = job.releases + 1
    fields: dict[str, Any] = {"releases": releases, "attempt": transitions.refunded_attempts(job)}
    if delay_ms is None:
        delay_ms = release_delay_ms(releases)
    if delay_ms is not None:
        fields["run_at"] = tx.at.now + delay_ms
    details = {"releases": releases, "delay_ms": delay_ms} if releases >= DELAYED_FROM else None
    job = transitions.requeue(tx, job, "released", ended, fields, worker=worker, reason=reason, details=details)
    return transitions.job_response(tx, job)


def cancel(tx: Transaction, command: Cancel) -> Response | ApiError:
    """Cancel the job at once. The next call of a holder gets lock_lost."""
    job = transitions.find(tx, command.id)
    if isinstance(job, ApiError):
        return job
    if job.status not in Cancel.allowed_from:
        return transitions.refuse_transition(job, "cancelled", "Only a queued or processing job can be cancelled.")
    ended = transitions.ended_by(job, tx.at.now, "cancel", "cancelled")
    return transitions.job_response(
        tx, transitions.finish(tx, job, "cancelled", "cancelled", ended, {}, reason=command.reason)
    )


# -- the holder of a job ----------------------------------------------------------------------------------------------

Holders = Progress | Extend | Complete | Fail | Release | ExtendLock | ReleaseLock


def _held(tx: Transaction, command: Holders, verb: str) -> Job | Response | ApiError:
    """Return the job if `command` names its latest grant; else the response to a repeated ending, or an error."""
    job = tx.state.get(command.id) or transitions.find(tx, command.id)
    if not isinstance(job, Job):
        return job
    if job.status == "processing" and job.grant is not None and job.grant.lock_id == command.lock_id:
        # A row without a lease is invalid until a cleanup run repairs it; the job has no holder.
        return job if job.lease is not None else _lock_lost(job, command.lock_id)
    ended = job.ended
    if ended is None or ended.lock_id != command.lock_id or ended.verb is None:
        if isinstance(command, (Progress, Extend, Fail, Release)):
            late_result_rules.note_call(tx, job, command)
        return _lock_lost(job, command.lock_id)
    if verb == ended.verb and digest(command) == ended.body_hash:
        return transitions.job_response(tx, job, repeated=True)
    if verb == "release" and ended.verb in ("complete", "fail"):
        return transitions.job_response(tx, job, repeated=True)
    message = f"This grant of job {job.id} was already ended by {ended.verb}; {verb} changes nothing."
    return ApiError("invalid_transition", message, {"status": job.status, "ended_by": ended.verb, "ended_at": ended.at})


def _lock_lost(job: Job, lock_id: str) -> ApiError:
    """Return a lock_lost that says what happened to the grant, so that its worker can log it and stop."""
    holder = job.grant.worker if job.grant else None
    details: dict[str, Any] = {"status": job.status, "held_by": holder}
    ended = job.ended
    if ended is not None and ended.lock_id == lock_id:
        details |= {"reason": ended.reason, "at": ended.at, "rule": ended.rule}
        if ended.reason == "cancelled":
            details["cancel_requested"] = True
        what = f"it was ended by {ended.rule}"
    else:
        details |= {"reason": "not_current", "at": job.updated_at, "rule": "the latest grant wins"}
        what = "there is a later grant, or it never was a lock of this job"
    now = f"worker {holder} holds the job now" if holder else f"the job is {job.status}"
    return ApiError("lock_lost", f"This lock of job {job.id} is lost: {what}; {now}. Stop working on the job.", details)


def _past_ceiling(tx: Transaction, job: Job) -> ApiError:
    assert job.grant is not None and job.lease is not None and job.lease.ceiling is not None
    limit = job.grant.max_processing_ms
    message = (
        f"Job {job.id} had no progress report for {transitions.in_words(limit)} (max_processing_ms {limit}). "
        "Complete, fail or release it now. Next time report progress in time, or raise max_processing_ms of the "
        "job, of the start or claim, or max_processing under [locks]; 0 means no timeout."
    )
    details = {"max_processing_ms": limit, "ceiling_at": tx.at.wall(job.lease.ceiling)}
    return ApiError("max_processing_time_exceeded", message, details)


def _ended_by_holder(tx: Transaction, job: Job, command: Holders, verb: str) -> PreviousGrant:
    grant = job.grant
    assert grant is not None  # the job is held
    lock_id, token, worker = grant.lock_id, grant.fencing_token, grant.worker
    return PreviousGrant(lock_id, token, worker, tx.now, verb, verb, verb, digest(command))


def _latest(tx: Transaction) -> Job:
    after = tx.changes[-1].after
    assert after is not None
    return after


def digest(command: AnyCommand) -> str:
    """Return a hash of a command, the same for equal commands however their JSON was written."""
    return blake2b(_encode(command), digest_size=16).hexdigest()
