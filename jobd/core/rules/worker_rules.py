"""The rules for commands of creators and workers, and for operators who act in place of a worker.

A rule checks its guards in the documented order, then makes its transitions.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec.structs import replace

from jobd.core import guards, quiet, transitions, views
from jobd.core.rules import late_result_rules, operator_rules
from jobd.core.transaction import Transaction
from jobd.model import commands
from jobd.model.commands import AppendOutput, Complete, Extend, ExtendLock, Fail, Progress, Release, ReleaseLock
from jobd.model.errors import ApiException, api_error
from jobd.model.job import (
    DELAYED_FROM,
    SECOND_MS,
    SMALL_PAYLOAD_BYTES,
    Failure,
    Job,
    PreviousGrant,
    Result,
    checkpoint_key,
    granted_bytes,
    release_delay_ms,
    with_checkpoint,
)
from jobd.model.responses import GoodbyeView, Grants, OutputGrant, Response
from jobd.model.times import duration, time_left

CLAIM_BYTES: Final = 8 << 20  # of the payloads of one claim

# -- grants -----------------------------------------------------------------------------------------------------------


def start(tx: Transaction, command: commands.Start) -> Response:
    """Grant the named job: queued, due, and its queue not paused. A stalled job is recovered first."""
    job = guards.find(tx, command.id)
    if guards.is_stalled(job, tx.at.lock_ms):
        job = transitions.stall(tx, job, transitions.stall_reason(tx, job))
    job = transitions.expire_if_overdue(tx, job)
    _check_start(tx, job)
    response = views.granted([transitions.grant(tx, job, command)], tx.at, tx.policy, admin=tx.call.admin)
    response.data = response.data.grants[0]
    return response


def _check_start(tx: Transaction, job: Job) -> None:
    at = tx.at
    if job.status == "processing":
        raise _already_locked(tx, job)
    if job.status != "queued":
        why = f" ({job.error.message})" if job.error and job.error.message else ""
        raise guards.invalid_transition(job, "processing", f"Only a queued job can be started{why}.")
    if guards.is_overdue(job, at.now):  # it has not failed, because the clock is suspect
        what = f"It is not granted, because its expires_at has passed. {guards.CLOCK_SUSPECT}"
        raise guards.invalid_transition(job, "processing", what)
    if job.run_at > at.now:
        wait_ms = job.run_at - at.now
        message = f"Job {job.id} is not due for another {time_left(wait_ms)}."
        raise api_error("not_due", message, run_at=job.run_at, retry_after_ms=wait_ms)
    queue = job.options.queue
    if (pause := tx.state.paused.get(queue)) is not None:
        message = f"Queue {queue} was paused {pause.describe()}. An operator can resume it: jobctl resume {queue}"
        raise api_error("queue_paused", message, **msgspec.to_builtins(views.paused_view(queue, pause)))


def _already_locked(tx: Transaction, job: Job) -> ApiException:
    at = tx.at
    assert job.grant is not None and job.deadlines is not None  # otherwise the job is stalled
    free_at = job.deadlines.expires if job.deadlines.is_live(at.lock_ms) else job.deadlines.stalled_at
    wait_ms = free_at - at.lock_ms
    details = {
        "locked_by": job.grant.worker,
        "lock_expires_at": at.wall(job.deadlines.expires),
        "retry_after_ms": wait_ms,
    }
    message = f"Job {job.id} is held by worker {job.grant.worker}. Try again in {time_left(wait_ms)}."
    return api_error("already_locked", message, **details)


def claim(tx: Transaction, command: commands.Claim) -> Response:
    """Grant the first due jobs of the queues, by priority, run_at and creation, up to CLAIM_BYTES of payloads.

    A worker that is told something gets no job.
    """
    state, queues = tx.state, command.queues
    if state.quiet or state.presence.directed or not command.limit:
        if (directive := quiet.directive_for(state, command)) is not None:
            quiet.note_told(state, command.worker, directive)
            return Response(Grants([], directive))
        queues = list(quiet.open_queues(state, command))
    due = state.first_due(queues, command.kinds, command.limit)
    if len(due) > 1:
        del due[_fitting(due) :]
    jobs = [transitions.grant(tx, job, command) for job in due]
    return views.granted(jobs, tx.at, tx.policy, admin=tx.call.admin)


def _fitting(jobs: list[Job]) -> int:
    """Return how many of the first `jobs` have at most CLAIM_BYTES of payloads together, at least 1."""
    total = 0
    for index, job in enumerate(jobs):
        total += granted_bytes(job) or SMALL_PAYLOAD_BYTES
        if total > CLAIM_BYTES:
            return max(index, 1)
    return len(jobs)


def undelivered(tx: Transaction, command: commands.Undelivered) -> Response:
    """Put a job back whose grant was not delivered. It keeps its place, and the attempt does not count."""
    job = guards.find(tx, command.id)
    if job.status != "processing" or job.grant is None or job.grant.lock_id != command.lock_id:
        raise _lock_lost(job, command.lock_id)
    ended = transitions.ended_by(job, tx.at.now, "undelivered", "undelivered")
    reason = "The connection closed before the grant was sent."
    refunded = replace(job, attempt=transitions.refunded_attempts(job))
    tx.state.presence.note_left(job.grant.worker)
    return views.job_response(
        tx, transitions.requeue(tx, job, refunded, "undelivered", ended, releases=job.releases, reason=reason)
    )


def goodbye(tx: Transaction, command: commands.Goodbye) -> Response:
    """Record that a worker ends. Nothing is written."""
    if command.name not in tx.state.presence.workers:
        message = f"Worker {command.name} has not been seen since the start. Its goodbye changes nothing."
        raise api_error("worker_not_found", message, worker=command.name)
    state = tx.state.presence.say_goodbye(command.name, command.instance, command.reason)
    return Response(GoodbyeView(command.name, state))


# -- the holder's commands: the latest grant wins ---------------------------------------------------------------------


def progress(tx: Transaction, command: Progress) -> Response:
    """Record progress, renew the lock and restart the progress timeout."""
    job = _held(tx, command, "progress")
    assert isinstance(job, Job)  # only endings are repeated
    assert job.grant is not None and job.deadlines is not None
    if job.deadlines.is_past_progress_due(tx.at.lock_ms):
        raise _progress_timeout(tx, job)
    checkpoint = guards.checkpoint_body(tx, command.checkpoint)
    deadlines = transitions.keep_alive(job.grant, job.deadlines, tx.at.lock_ms, job.grant.ttl_ms, progressed=True)
    value = transitions.normalize_number(command.progress)
    details: dict[str, Any] = {"progress": value}
    if command.message is not None:
        details["message"] = command.message
    releases = 0 if value > 0 else job.releases
    after = replace(job, progress=value, progress_message=command.message, deadlines=deadlines, releases=releases)
    if checkpoint is not None:
        after = replace(after, extra=with_checkpoint(job.extra, len(checkpoint)))
    tx.update(job, after, "progress", worker=job.grant.worker, details=details)
    tx.attach(checkpoint_key(job.seq), checkpoint)
    tx.state.processing.progressed[job.id] = tx.at.lock_ms
    return Response(views.lock_state(job.grant, deadlines, tx.at))


def extend(tx: Transaction, command: Extend | ExtendLock) -> Response:
    """Extend the lock to at least `additional_ms` from now, never shortening it, up to the progress timeout."""
    job = _held(tx, command, "extend")
    assert isinstance(job, Job)  # only endings are repeated
    assert job.grant is not None and job.deadlines is not None
    if job.deadlines.is_past_progress_due(tx.at.lock_ms):
        raise _progress_timeout(tx, job)
    additional_ms = command.additional_ms or job.grant.ttl_ms
    deadlines = transitions.keep_alive(job.grant, job.deadlines, tx.at.lock_ms, additional_ms, progressed=False)
    extended = deadlines.expires > job.deadlines.expires
    worker = None if tx.call.admin else job.grant.worker
    reason = command.reason if isinstance(command, ExtendLock) else None
    details = {"lock_expires_at": tx.at.wall(deadlines.expires)}
    tx.update(job, replace(job, deadlines=deadlines), "extended", worker=worker, reason=reason, details=details)
    return Response(views.lock_state(job.grant, deadlines, tx.at, extended))


def extend_lock(tx: Transaction, command: ExtendLock) -> Response:
    """Extend the lock in place of its holder."""
    response = extend(tx, command)
    return operator_rules.lock_response(tx, _latest(tx), response.data)


def append_output(tx: Transaction, command: AppendOutput) -> Response:
    """Return the grant that the output belongs to. The output itself is no state."""
    job = _held(tx, command, "output")
    assert isinstance(job, Job)
    assert job.grant is not None
    grant = job.grant
    return Response(OutputGrant(job.created_at, job.attempt, grant.worker, grant.fencing_token))


def complete(tx: Transaction, command: Complete) -> Response:
    """Complete the job. The result of an ended grant is late: it may still be stored or adopted."""
    try:
        job = _held(tx, command, "complete")
    except ApiException as rejected:
        if rejected.error.code != "lock_lost":
            raise
        return late_result_rules.complete(tx, command, rejected.error)
    if not isinstance(job, Job):
        return job
    guards.check_result(tx, command)
    ended = _ended_by_holder(tx, job, command, "complete")
    result = Result(command.download_url, command.file_path, command.storage_key, command.metadata)
    done, worker, expires_at = transitions.completed(job, result), ended.worker, command.expires_at
    job = transitions.finish(tx, job, done, "completed", "completed", ended, expires_at=expires_at, worker=worker)
    return views.job_response(tx, job)


def fail(tx: Transaction, command: Fail) -> Response:
    """Put the job back into its queue after a delay if attempts are left; otherwise fail it."""
    job = _held(tx, command, "fail")
    if not isinstance(job, Job):
        return job
    checkpoint = guards.checkpoint_body(tx, command.checkpoint)
    ended = _ended_by_holder(tx, job, command, "fail")
    error = Failure(command.error_message, command.error_code)
    failed = replace(job, error=error)
    if checkpoint is not None:
        failed = replace(failed, extra=with_checkpoint(job.extra, len(checkpoint)))
    worker, reason = ended.worker, error.message
    if not command.retry or job.attempt >= job.options.max_attempts:
        after = transitions.finish(tx, job, failed, "failed", "failed", ended, worker=worker, reason=reason)
        tx.attach(checkpoint_key(job.seq), checkpoint)
        return views.job_response(tx, after)
    wait_ms = command.retry_after_ms
    if wait_ms is None:
        wait_ms = job.options.backoff.wait_ms(job.attempt, tx.fraction(job.attempt))
    run_at = tx.at.now + wait_ms
    details = {"attempt": job.attempt, "run_at": run_at}
    after = transitions.requeue(
        tx, job, failed, "retried", ended, run_at=run_at, worker=worker, reason=reason, details=details
    )
    tx.attach(checkpoint_key(job.seq), checkpoint)
    return views.job_response(tx, after)


def release(tx: Transaction, command: Release | ReleaseLock) -> Response:
    """Put the job back into its place in the queue. The attempt does not count.

    The job is due later if the holder asks for a delay, or after DELAYED_FROM releases in a row without progress. A
    release with a delay of SECOND_MS or more does not count, because it cannot loop fast.
    """
    job = _held(tx, command, "release")
    if not isinstance(job, Job):
        return job
    if isinstance(command, ReleaseLock):
        # The holder did not end it: its next call gets lock_lost.
        ended, worker, reason = transitions.ended_by(job, tx.at.now, "release-lock", "released"), None, command.reason
        delay_ms = None
    else:
        ended, reason, delay_ms = _ended_by_holder(tx, job, command, "release"), None, command.delay_ms
        worker = ended.worker
    releases = job.releases + (delay_ms is None or delay_ms < SECOND_MS)
    if delay_ms is None:
        delay_ms = release_delay_ms(releases)
    refunded = replace(job, attempt=transitions.refunded_attempts(job))
    details = {"releases": releases, "delay_ms": delay_ms} if releases >= DELAYED_FROM else None
    about: dict[str, Any] = {"worker": worker, "reason": reason, "details": details}
    run_at = None if delay_ms is None else tx.at.now + delay_ms
    job = transitions.requeue(tx, job, refunded, "released", ended, run_at=run_at, releases=releases, **about)
    return views.job_response(tx, job)


def release_lock(tx: Transaction, command: ReleaseLock) -> Response:
    """Release the job in place of its holder."""
    release(tx, command)
    job = _latest(tx) if tx.has_changed else guards.find(tx, command.id)
    return operator_rules.lock_response(tx, job, None)


def cancel(tx: Transaction, command: commands.Cancel) -> Response:
    """Cancel the job at once. The next call of a holder gets lock_lost."""
    job = guards.find(tx, command.id)
    if job.status not in commands.Cancel.allowed_from:
        raise guards.invalid_transition(job, "cancelled", "Only a queued or processing job can be cancelled.")
    ended = transitions.ended_by(job, tx.at.now, "cancel", "cancelled")
    return views.job_response(
        tx, transitions.finish(tx, job, job, "cancelled", "cancelled", ended, reason=command.reason)
    )


# -- the holder of a job ----------------------------------------------------------------------------------------------

Holders = AppendOutput | Progress | Extend | Complete | Fail | Release | ExtendLock | ReleaseLock


def _held(tx: Transaction, command: Holders, verb: str) -> Job | Response:
    """Return the job if `command` names its latest grant, or the response to a repeated ending. Raises ApiException."""
    job = guards.find(tx, command.id)
    # A row without lock deadlines is invalid until a cleanup run repairs it; the job has no holder.
    if tx.state.holds(job.id, command.lock_id) and job.deadlines is not None:
        return job
    ended = job.ended
    if ended is not None and ended.lock_id == command.lock_id:
        tx.state.presence.note_seen(ended.worker, tx.now)
    if ended is None or ended.lock_id != command.lock_id or ended.verb is None:
        if isinstance(command, (Progress, Extend, Fail, Release)):
            late_result_rules.note_call(tx, job, command)
        raise _lock_lost(job, command.lock_id)
    if verb == ended.verb and guards.digest(command) == ended.body_hash:
        return views.job_response(tx, job, repeated=True)
    if verb == "release" and ended.verb in ("complete", "fail"):
        return views.job_response(tx, job, repeated=True)
    message = (
        f"This grant of job {job.id} was already ended by {ended.verb}; {verb} changes nothing. Stop working on it."
    )
    raise api_error("invalid_transition", message, status=job.status, ended_by=ended.verb, ended_at=ended.at)


def _lock_lost(job: Job, lock_id: str) -> ApiException:
    """Return a lock_lost that says what happened to the grant, so that its worker can log it and stop."""
    holder = job.grant.worker if job.grant else None
    details: dict[str, Any] = {"status": job.status, "locked_by": holder}
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
    message = f"This lock of job {job.id} is lost: {what}; {now}. Stop working on the job."
    return api_error("lock_lost", message, **details)


def _progress_timeout(tx: Transaction, job: Job) -> ApiException:
    assert job.grant is not None and job.deadlines is not None and job.deadlines.progress_due is not None
    limit = job.grant.progress_timeout_ms
    message = (
        f"Job {job.id} had no progress report for {duration(limit)} (progress_timeout_ms {limit}). "
        "Complete, fail or release it now. Next time report progress in time, or raise progress_timeout_ms of the "
        "job, of the start or claim, or progress_timeout under [locks]; 0 means no timeout."
    )
    details = {"progress_timeout_ms": limit, "progress_due_at": tx.at.wall(job.deadlines.progress_due)}
    return api_error("progress_timeout", message, **details)


def _ended_by_holder(tx: Transaction, job: Job, command: Holders, verb: str) -> PreviousGrant:
    grant = job.grant
    assert grant is not None  # the job is held
    lock_id, token, worker = grant.lock_id, grant.fencing_token, grant.worker
    return PreviousGrant(lock_id, token, worker, tx.now, verb, verb, verb, guards.digest(command))


def _latest(tx: Transaction) -> Job:
    after = tx.changes[-1].after
    assert after is not None
    return after
