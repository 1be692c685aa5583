"""The rules for maintenance: recovery, expiry, deletion by age, repairs, pauses of the daemon.

Whether a job is affected is judged when the command is applied, not when the job was found.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final, Literal, NamedTuple

from msgspec.structs import replace

from jobd.core import guards, transitions
from jobd.core.job_validation import counts, safe_fixes, validate
from jobd.core.transaction import Transaction
from jobd.model import commands
from jobd.model.clocks import LockMs
from jobd.model.commands import Moment
from jobd.model.errors import api_error
from jobd.model.job import FINISHED, Job, LockDeadlines
from jobd.model.responses import Issue, MaintenanceResult, PreviewResult, Recovered, Recovery, Response, TakeBackView
from jobd.model.storage import EXTRA_FORMAT

TAKEN_BACK: Final = 200  # jobs of one take-back command


def recover(tx: Transaction, command: commands.Recover) -> Response:
    """Recover stalled jobs by their stall rule and clear expired locks, up to `limit` of each."""
    state, lock_ms = tx.state, tx.at.lock_ms
    more = len(state.processing.stalled) > command.limit or len(state.processing.expired_locks) > command.limit
    stalled = list(islice(state.processing.stalled, command.limit))
    expired = list(islice(state.processing.expired_locks, command.limit))
    details = []
    for job_id in stalled:
        job = state.processing[job_id]
        if guards.is_stalled(job, lock_ms):
            job = transitions.stall(tx, job, transitions.stall_reason(tx, job))
            details.append(_recovery(tx, job))
    cleared = 0
    for job_id in expired:
        job = state.processing[job_id]
        if job.deadlines is not None and lock_ms >= job.deadlines.expires and not guards.is_stalled(job, lock_ms):
            _clear_lock(tx, job, job.deadlines)
            cleared += 1
    return Response(Recovered(details, cleared, more))


def take_back(tx: Transaction, command: commands.TakeBack) -> Response:
    """End the first expired grants of a silent worker by their stall rule. Live locks do not change."""
    name, presence = command.name, tx.state.presence
    worker = presence.workers.get(name)
    if worker is None:
        message = f"Worker {name} has not been seen since the start. List the workers: jobctl workers"
        raise api_error("worker_not_found", message, worker=name)
    if not worker.expired:
        state = presence.state(worker)
        count = len(worker.jobs)
        held = (
            "the lock of its job has not expired" if count == 1 else f"the locks of its {count} jobs have not expired"
        )
        why = held if count else "it holds no job"
        message = f"Worker {name} is not silent, but {state}: {why}. To take a job from it: jobctl force-fail ID"
        raise api_error("worker_not_silent", message, worker=name, state=state)
    more = len(worker.expired) > TAKEN_BACK
    details = []
    for job_id in list(islice(worker.expired, TAKEN_BACK)):
        job = tx.state.processing[job_id]
        cause = f"{transitions.stall_reason(tx, job)} An operator took the job back."
        job = transitions.stall(tx, job, cause, rule="take-back", why="taken_back")
        details.append(_recovery(tx, job))
    reset = sum(each.action == "reset" for each in details)
    return Response(TakeBackView(name, len(details), reset, len(details) - reset, details, more, tx.at.now))


def _recovery(tx: Transaction, job: Job) -> Recovery:
    """Describe what the last step did to a stalled job."""
    action: Literal["reset", "failed"] = "reset" if job.status == "queued" else "failed"
    return Recovery(job.id, action, tx.changes[-1].reason or "")


def recover_one(tx: Transaction, command: commands.JobCommand) -> Response:
    """Recover this job, if it is stalled at this moment."""
    job = guards.find(tx, command.id)
    if guards.is_stalled(job, tx.at.lock_ms):
        transitions.stall(tx, job, transitions.stall_reason(tx, job))
        return Response(MaintenanceResult(1))
    message = guards.CLOCK_SUSPECT if tx.at.suspect else "It is no longer due for deletion or expiry."
    raise api_error("invalid_transition", message, job_id=job.id, status=job.status)


def clean_one(tx: Transaction, command: commands.JobCommand) -> Response:
    """Do what a cleanup run would do to this job now, without repairs: recover, fail or delete it."""
    job = guards.find(tx, command.id)
    if guards.may_expire(job, tx.at):
        transitions.expire(tx, job)
    elif _is_past(job, tx.at):
        tx.delete(job)
    else:
        return recover_one(tx, command)
    return Response(MaintenanceResult(1))


def preview(tx: Transaction, command: commands.Preview) -> Response:
    """Return what `recover` and `expire` would do now. The command is a dry run."""
    recovered = recover(tx, commands.Recover(limit=command.limit)).data
    overdue, more_overdue = _overdue(tx, command.limit)
    expired = [job.id for job in overdue if guards.may_expire(job, tx.at)]
    more = recovered.more or more_overdue
    return Response(PreviewResult(recovered.details, recovered.locks_cleared, expired, more))


def _clear_lock(tx: Transaction, job: Job, deadlines: LockDeadlines) -> None:
    """Record that the lock has expired. The holder can revive it until the job is stalled."""
    assert job.grant is not None  # without one it is stalled
    details = {"worker": job.grant.worker}
    tx.update(job, replace(job, deadlines=replace(deadlines, cleared=True)), "lock_expired", details=details)


def end_grants(tx: Transaction, command: commands.EndGrants) -> Response:
    """End grants that were made before the store was restored from a backup, or its journal lost records."""
    done = 0
    for job_id in dict.fromkeys(command.ids):
        job = tx.state.processing.get(job_id)
        if job is not None:
            transitions.stall(tx, job, command.cause, rule="restore", why="restored")
            done += 1
    if command.last:  # an operator decides which schedules go on, here or where the backup was made
        for schedule in [each for each in tx.state.schedules.values() if each.pause is None]:
            reason = "The store was restored from a backup."
            tx.change_schedule(schedule.id, "schedule_paused", schedule.queue, reason, until=None)
    return Response(MaintenanceResult(done))


def extend_after_pause(tx: Transaction, command: commands.ExtendAfterPause) -> Response:
    """Postpone deadlines of processing jobs to at least `grace_ms` from now: after a start, workers must reconnect."""
    until = tx.at.lock_ms + command.grace_ms
    since = tx.at.lock_ms if command.since is None else command.since
    done = 0
    for job_id in dict.fromkeys(command.ids):
        job = tx.state.processing.get(job_id)
        if job is None or job.deadlines is None:
            continue
        deadlines = _postponed(job.deadlines, since, until)
        if deadlines != job.deadlines:
            tx.update(job, replace(job, deadlines=deadlines), "resumed", details={"grace_ms": command.grace_ms})
            done += 1
    return Response(MaintenanceResult(done))


class WasDue(NamedTuple):
    """A job that was due before the clock was set back.

    Sorts jobs known only from `until` first, because a crash loses `until`.
    """

    by_row: bool
    run_at: int
    seq: int
    id: str


def due_before(jobs: Iterable[Job], now: int, until: int) -> list[WasDue]:
    """Return those of `jobs`, which are not due `now`, that were due at `until` or when they last changed.

    Since then, the wall clock was set back, or a node with another clock has become the leader.
    """
    found = (WasDue(guards.was_due(job, now), job.run_at, job.seq, job.id) for job in jobs)
    return [each for each in found if each.by_row or each.run_at <= until]


def keep_due(tx: Transaction, command: commands.KeepDue) -> Response:
    done = 0
    for job_id, run_at in command.jobs.items():
        job = tx.state.jobs.find(job_id)
        if job is not None and tx.at.now < job.run_at == run_at:
            reason = "It was due before the wall clock was set back."
            due = replace(job, run_at=tx.at.now)
            tx.update(job, due, "updated", reason=reason, details={"run_at": tx.at.now})
            done += 1
    return Response(MaintenanceResult(done))


def _postponed(deadlines: LockDeadlines, since: LockMs, until: LockMs) -> LockDeadlines:
    """Return the deadlines, each postponed to at least `until`. A lock that had expired at `since` stays expired."""
    expires = max(deadlines.expires, until) if deadlines.is_live(since) else deadlines.expires
    progress_due = None if deadlines.progress_due is None else max(deadlines.progress_due, until)
    return replace(deadlines, expires=expires, stall_due=max(deadlines.stall_due, until), progress_due=progress_due)


def expire(tx: Transaction, command: commands.Expire) -> Response:
    """Fail queued jobs past their `expires_at`."""
    overdue, more = _overdue(tx, command.limit)
    late = [job for job in overdue if guards.may_expire(job, tx.at)]
    for job in late:
        transitions.expire(tx, job)
    return Response(MaintenanceResult(len(late), more=more))


def _overdue(tx: Transaction, limit: int) -> tuple[list[Job], bool]:
    """Return the jobs that have been overdue longest, and whether there are more."""
    found = list(islice(tx.state.overdue(), limit + 1))
    return [tx.state.jobs[job_id] for job_id in found[:limit]], len(found) > limit


def delete_expired(tx: Transaction, command: commands.DeleteExpired) -> Response:
    """Delete those of the named jobs that are finished and past their `expires_at` now."""
    done = 0
    for job_id in dict.fromkeys(command.ids):
        job = tx.state.get(job_id)
        if job is not None and _is_past(job, tx.at):
            tx.delete(job)
            done += 1
    return Response(MaintenanceResult(done))


def _is_past(job: Job, at: Moment) -> bool:
    """Return whether the job is finished and past its `expires_at` by a clock that is not suspect."""
    return not at.suspect and job.status in FINISHED and job.expires_at is not None and job.expires_at <= at.now


def end_pauses(tx: Transaction, command: commands.EndPauses) -> Response:
    """Resume the queues whose pause is over, and end such quiet rules, by the trusted wall time.

    Quiet rules wait while a node does not read their records.
    """
    over = [
        name for name, pause in tx.state.paused.items() if pause.until is not None and pause.until <= tx.at.believed
    ]
    for name in over:
        tx.set_pause(name, None, "The pause ended as scheduled.")
    ended = [rule for rule in tx.state.quiet.values() if rule.until is not None and rule.until <= tx.at.believed]
    for rule in ended if tx.state.too_old_for(EXTRA_FORMAT) is None else ():
        tx.resume_workers(rule, "The rule ended as scheduled.")
    return Response(MaintenanceResult(len(over)))


def repair(tx: Transaction, command: commands.RepairJobs) -> Response:
    """Validate the named jobs and apply the safe fixes. Other issues are reported in every run."""
    found: list[tuple[str, Issue]] = []
    fixed = 0
    for job_id in dict.fromkeys(command.ids):
        job = tx.state.get(job_id)
        if job is None:
            continue
        issues = [issue for issue in validate(job, tx.at, tx.policy).issues if counts(issue)]
        found.extend((job_id, issue) for issue in issues)
        left = issues
        if issues:
            left = [issue for issue in validate(_repair_one(tx, job), tx.at, tx.policy).issues if counts(issue)]
            fixed += len(issues) - len(left)
        if not left:
            tx.checked.append(job.seq)
    return Response(MaintenanceResult(fixed, found=len(found), issues=found))


def _repair_one(tx: Transaction, job: Job) -> Job:
    """Apply the safe fixes to one job and return its row."""
    fixes = safe_fixes(job)
    if fixes:
        details = {"fields": sorted(fixes)}
        job = tx.update(job, replace(job, **fixes), "fixed", reason="validation", details=details)
    if job.status == "processing" and (job.grant is None or job.deadlines is None):
        job = transitions.stall(tx, job, transitions.stall_reason(tx, job))
    return job
