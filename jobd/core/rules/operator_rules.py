"""The rules for commands of operators: force-fail, force-reset, transition, update, run-now, delete, pause, import.

If an operator ends a live grant, the next call of its holder gets lock_lost.
"""

from __future__ import annotations

from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from jobd.core import guards, transitions, views
from jobd.core.transaction import Transaction
from jobd.model import commands
from jobd.model.events import EventType, QueuePause
from jobd.model.flat_job import NO_ERROR, NO_RESULT
from jobd.model.job import (
    FINISHED,
    LIVE,
    MAX_PERCENT,
    TRANSITIONS,
    Extra,
    Failure,
    Grant,
    Job,
    LockDeadlines,
    Result,
    checkpoint_key,
    headers_key,
    recorded_bytes,
    with_checkpoint,
)
from jobd.model.responses import AdminLockView, Imported, LockState, Response, TransitionView
from jobd.model.storage import Payload


def force_fail(tx: Transaction, command: commands.ForceFail) -> Response:
    job = guards.find(tx, command.id)
    if job.status not in commands.ForceFail.allowed_from:
        raise guards.invalid_transition(job, "failed", "Only a queued or processing job can be failed.")
    reason = command.reason or commands.NO_REASON
    ended = transitions.ended_by(job, tx.at.now, "force-fail", "force_failed")
    failed = replace(job, error=Failure(reason, "force_failed"))
    after = transitions.finish(tx, job, failed, "force_failed", "failed", ended, reason=reason)
    return _forced(tx, job, after, reason)


def force_reset(tx: Transaction, command: commands.ForceReset) -> Response:
    """Requeue the job as new. For a failed or cancelled job this is a retry, whichever command asks for it.

    Only RetryJob keeps the checkpoint.
    """
    job = guards.find(tx, command.id)
    job = transitions.expire_if_overdue(tx, job)
    if job.status in ("queued", "completed"):  # a job whose row has an unknown status can be reset too
        what = "It needs no retry." if job.status == "queued" else "A completed job is final; create a new job instead."
        raise guards.invalid_transition(job, "queued", what)
    if job.status == "processing" and isinstance(command, commands.RetryJob):
        raise guards.invalid_transition(job, "queued", "Only failed and cancelled jobs can be retried.")
    ended = transitions.ended_by(job, tx.at.now, "force-reset", "force_reset")
    fresh = replace(_without_past_expiry(tx, job), attempt=0, stalls=0, error=None)
    if job.extra is not None and not isinstance(command, commands.RetryJob):
        fresh = replace(fresh, extra=with_checkpoint(job.extra, 0))
    event: EventType = "retried_by_operator" if job.status in commands.RetryJob.allowed_from else "force_reset"
    after = transitions.requeue(tx, job, fresh, event, ended, run_at=command.run_at or tx.at.now, reason=command.reason)
    return _forced(tx, job, after, command.reason)


def _without_past_expiry(tx: Transaction, job: Job) -> Job:
    """Clear an `expires_at` that has passed, because the job would fail again at once."""
    return replace(job, expires_at=None) if job.expires_at is not None and job.expires_at <= tx.at.now else job


def transition(tx: Transaction, command: commands.Transition) -> Response:
    """Compare and set: change the status only if it still is `from_`."""
    job = guards.find(tx, command.id)
    job = transitions.expire_if_overdue(tx, job)
    if job.status != command.from_:
        what = f"The transition expected {command.from_}. Check the job again before you decide."
        raise guards.invalid_transition(job, command.to, what)
    if command.to == "processing":
        raise guards.invalid_transition(job, command.to, "Only start and claim can make a job processing.")
    if (job.status, command.to) not in TRANSITIONS:
        raise guards.invalid_transition(job, command.to, f"It cannot go from {job.status} to {command.to}.")
    changed = _updated(tx, job, command.updates)
    if command.to == "completed":
        guards.check_url(tx.policy, (changed.result or NO_RESULT).download_url, "updates.download_url")
    after = _transitioned(tx, job, changed, command)
    return _forced(tx, job, after, command.reason)


def _transitioned(tx: Transaction, job: Job, changed: Job, command: commands.Transition) -> Job:
    reason = command.reason
    ended = transitions.ended_by(job, tx.at.now, "transition", "transitioned")
    if command.to == "queued":
        # The last attempt does not count.
        changed = replace(_without_past_expiry(tx, changed), attempt=transitions.refunded_attempts(job))
        return transitions.requeue(
            tx, job, changed, "transitioned", ended, run_at=command.updates.run_at, reason=reason
        )
    if command.to == "completed":
        changed = transitions.completed(changed, changed.result or NO_RESULT)
    elif command.to == "failed" and command.updates.error_message is None:
        changed = replace(changed, error=Failure(reason or commands.NO_REASON, "transitioned"))
    return transitions.finish(tx, job, changed, "transitioned", command.to, ended, reason=reason)


def _updated(tx: Transaction, job: Job, updates: commands.Updates) -> Job:
    """Return the row with the fields that `updates` set."""
    job = _rescheduled(tx, job, updates.priority, updates.run_at, updates.max_attempts)
    if updates.error_message is not None:
        job = replace(job, error=Failure(updates.error_message, "transitioned"))
    given = {name: value for name in Result.__struct_fields__ if (value := getattr(updates, name)) is not None}
    if given:
        job = replace(job, result=transitions.normalize_result(replace(job.result or NO_RESULT, **given)))
    return job


def _rescheduled(tx: Transaction, job: Job, priority: int | None, run_at: int | None, max_attempts: int | None) -> Job:
    options = job.options
    if priority is not None:
        options = replace(options, priority=priority)
    if max_attempts is not None:
        options = replace(options, max_attempts=max_attempts)
    if options != job.options:
        job = replace(job, options=tx.state.shared(options))
    return job if run_at is None else replace(job, run_at=run_at)


def run_now(tx: Transaction, command: commands.RunNow) -> Response:
    job = guards.find(tx, command.id)
    job = transitions.expire_if_overdue(tx, job)
    if job.status not in commands.RunNow.allowed_from:
        raise guards.invalid_transition(job, "queued", "Only a queued job can be run now.")
    if job.run_at > tx.at.now:
        reason = command.reason or "run now"
        due = replace(job, run_at=tx.at.now)
        job = tx.update(job, due, "updated", reason=reason, details={"run_at": tx.at.now})
    return views.job_response(tx, job)


def update(tx: Transaction, command: commands.Update) -> Response:
    job = guards.find(tx, command.id)
    job = transitions.expire_if_overdue(tx, job)
    if job.status == "completed":
        raise guards.invalid_transition(job, "completed", "A completed job cannot be changed.")
    changed = _rescheduled(tx, job, command.priority, command.run_at, command.max_attempts)
    if changed is not job:
        given = {"priority": command.priority, "run_at": command.run_at, "max_attempts": command.max_attempts}
        details = {name: value for name, value in given.items() if value is not None}
        job = tx.update(job, changed, "updated", reason=command.reason, details=details)
    return views.job_response(tx, job)


def copy(tx: Transaction, command: commands.Copy) -> Response:
    """Create a job with the options and headers of another one, and with its payload unless there is a new one."""
    job = guards.find(tx, command.id)
    guards.check_format(tx, "copied_from of jobs")
    guards.check_live_jobs(tx)
    guards.check_queue(tx, job.options.queue)
    stored = tx.requests.get(job.id) or Payload(b"null", "")
    body = tx.payloads.get(job.seq, stored.body) if command.payload is UNSET else bytes(command.payload)
    headers = tx.payloads.get(headers_key(job.seq), stored.headers)
    now, number = tx.now, tx.job_number()
    extra, size = Extra(headers_bytes=len(headers), copied_from=job.id), recorded_bytes(body)
    made = Job(number, tx.job_id(number), job.options, "queued", now, now, now, payload_bytes=size, extra=extra)
    tx.create(made, "created", body, "")
    tx.attach(headers_key(number), headers)
    response = views.job_response(tx, made)
    response.status = 201
    return response


def delete(tx: Transaction, command: commands.Delete) -> Response:
    job = guards.find(tx, command.id)
    if job.status not in commands.Delete.allowed_from:
        raise guards.invalid_transition(job, "deleted", "Only a finished job can be deleted: cancel it first.")
    response = views.job_response(tx, job)
    tx.delete(job, command.reason)
    return response


def pause(tx: Transaction, command: commands.Pause) -> Response:
    """Pause a queue. A second pause with another reason or end replaces both and keeps the start of the first one."""
    now, known = tx.at.now, tx.state.paused.get(command.name)
    guards.check_until(tx, command.until, "Leave it out to pause until an operator resumes the queue.")
    given = command.reason, command.until
    if known is not None and given in ((None, None), (known.reason, known.until)):
        return Response(views.paused_view(command.name, known))
    pause = QueuePause(now if known is None else known.at, tx.call.by, *given)
    tx.set_pause(command.name, pause, pause.reason)
    return Response(views.paused_view(command.name, pause))


def resume(tx: Transaction, command: commands.Resume) -> Response:
    if command.name in tx.state.paused:
        tx.set_pause(command.name, None, command.reason)
    return Response(views.paused_view(command.name, None))


def import_job(tx: Transaction, command: commands.Import) -> Response:
    """Import a job as it was. An id that exists is skipped, so that an import can be repeated."""
    room = max(tx.policy.live_jobs - tx.state.live_count, 0)
    if command.id in tx.state.quarantined:
        return Response(Imported(command.id, True, None, "A job with this id exists, but its row is damaged.", room))
    if (there := tx.state.get(command.id)) is not None:
        reason = f"A job with this id exists: it is {there.status}."
        return Response(Imported(command.id, True, there.status, reason, room))
    guards.check_backoff(command.backoff)
    if command.status in LIVE:
        guards.check_live_jobs(tx)
    guards.check_queue(tx, command.queue)
    headers = guards.headers_body(tx, command.headers) if command.headers else b""
    checkpoint = guards.checkpoint_body(tx, command.checkpoint) or b""
    if command.copied_from is not UNSET or command.schedule_id is not None:
        guards.check_format(tx, "copied_from or schedule_id of jobs")
    job = _imported(tx, command)
    beside = {"headers_bytes": len(headers), "checkpoint_bytes": len(checkpoint)}
    extra = replace(job.extra or Extra(), copied_from=command.copied_from or None, **beside)
    job = replace(job, extra=None if extra == Extra() else extra)
    tx.create(job, "imported", bytes(command.payload), "")
    tx.attach(headers_key(job.seq), headers)
    tx.attach(checkpoint_key(job.seq), checkpoint)
    if job.status == "processing":
        transitions.stall(tx, job, "The job was processing when it was imported; its worker is unknown here.")
    last = tx.changes[-1]
    return Response(Imported(command.id, False, last.to_status, last.reason, room), status=201)


# Fields of a job that an import gives.
_GIVEN: Final = [name for name in Job.__struct_fields__ if name in commands.Import.__struct_fields__]


def _imported(tx: Transaction, command: commands.Import) -> Job:
    now = tx.at.now
    given = (command.started_at, command.finished_at, command.updated_at)
    created = command.created_at or min([now, *(time for time in given if time is not None)])
    updated = command.updated_at or max(created, command.finished_at or now)
    finished = (command.finished_at or updated) if command.status in FINISHED else None
    expires = command.expires_at
    if expires is None and command.status in FINISHED:
        # Counted from now, so that no imported job is deleted at once.
        expires = tx.at.latest + transitions.keep_ms(tx.policy, command.status)
    error = Failure(command.error_message, command.error_code)
    progress = MAX_PERCENT if command.status == "completed" else 0
    fields = {name: value for name in _GIVEN if (value := getattr(command, name)) is not UNSET} | {
        "seq": tx.job_number(),
        "options": transitions.requested_options(tx, command),
        "created_at": created,
        "updated_at": updated,
        "run_at": command.run_at or created,
        "progress": transitions.normalize_number(progress if command.progress is None else command.progress),
        "finished_at": finished,
        "expires_at": expires,
        "result": transitions.normalize_result(Result(*[getattr(command, name) for name in Result.__struct_fields__])),
        "error": None if error == NO_ERROR else error,
        "payload_bytes": recorded_bytes(command.payload),
        "extra": None if command.schedule_id is None else Extra(command.schedule_id, command.scheduled_at),
    }
    job = Job(**fields)
    return _held_elsewhere(tx, job, command.worker or "unknown") if command.status == "processing" else job


def _held_elsewhere(tx: Transaction, job: Job, worker: str) -> Job:
    """Add the grant that the job had where it came from, as far as it is known. The stall rule needs a grant to end."""
    now, lock_ms, policy = tx.at.now, tx.at.lock_ms, tx.policy
    token = tx.token()
    started = job.started_at or job.updated_at
    made = Grant(tx.secret(token), token, worker, started, policy.lock_ttl_ms, policy.stall_after_ms, 0)
    attempt = max(job.attempt, 1)
    return replace(
        job, grant=made, deadlines=LockDeadlines(lock_ms, lock_ms, None), started_at=min(started, now), attempt=attempt
    )


def lock_response(tx: Transaction, job: Job, state: LockState | None) -> Response:
    """Return the lock after extend-lock or release-lock, in the names that existing dashboards expect."""
    return Response(
        AdminLockView(
            job_id=job.id,
            status=job.status,
            lock=views.lock_view(job, tx.at, admin=True),
            lock_expires_at=state.lock_expires_at if state else None,
            progress_due_at=state.progress_due_at if state else None,
            extended=bool(state and state.extended),
            timestamp=tx.at.now,
        )
    )


def _forced(tx: Transaction, before: Job, after: Job, reason: str | None) -> Response:
    return Response(TransitionView(before.id, before.status, after.status, reason, tx.at.now))
