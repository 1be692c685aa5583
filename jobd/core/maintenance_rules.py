"""The rules for maintenance: recovery, expiry, deletion by age, repairs, pauses of the daemon.

Whether a job is affected is judged when the command is applied, not when the job was found.
"""

from __future__ import annotations

from itertools import islice
from typing import Final, Literal

from msgspec.structs import replace

from jobd.core import transitions
from jobd.core.changeset import Draft
from jobd.core.validation import counts, safe_fixes, validate
from jobd.model.commands import (
    DeleteExpired,
    EndGrants,
    Expire,
    ExtendAfterPause,
    JobCommand,
    Moment,
    Preview,
    Recover,
    RepairJobs,
    TakeBack,
)
from jobd.model.errors import ApiError
from jobd.model.job import FINISHED, Job, Lease
from jobd.model.responses import Issue, MaintenanceResult, PreviewResult, Recovered, Recovery, Response, TakeBackView

TAKEN_BACK: Final = 200  # jobs of one take-back command


def recover(draft: Draft, command: Recover) -> Response:
    """Recover stuck jobs by their stall rule and clear expired locks, up to `limit` of each."""
    book, lease = draft.book, draft.at.lease
    details = []
    for job_id in islice(book.stuck, command.limit):
        job = book.processing[job_id]
        if transitions.is_stuck(job, lease):
            job = transitions.stall(draft, job, transitions.silence(draft, job))
            details.append(_recovery(draft, job))
    cleared = 0
    for job_id in islice(book.expired_locks, command.limit):
        job = book.processing[job_id]
        if job.lease is not None and lease >= job.lease.expires and not transitions.is_stuck(job, lease):
            _clear_lock(draft, job, job.lease)
            cleared += 1
    more = len(book.stuck) > command.limit or len(book.expired_locks) > command.limit
    return Response(Recovered(details, cleared, more))


def take_back(draft: Draft, command: TakeBack) -> Response | ApiError:
    """End the first expired grants of a silent worker by their stall rule. Live locks do not change."""
    name, presence = command.name, draft.book.presence
    worker = presence.workers.get(name)
    if worker is None:
        message = f"Worker {name} has not been seen since the start. List the workers: jobctl workers"
        return ApiError("worker_not_found", message, {"worker": name})
    if not worker.expired:
        state = presence.state(worker)
        held = (
            f"the locks of its {len(worker.jobs)} jobs are live"
            if len(worker.jobs) > 1
            else "the lock of its job is live"
        )
        why = held if worker.jobs else "it holds no job"
        message = f"Worker {name} is {state}, not silent: {why}. To end a live grant: jobctl force-reset ID"
        return ApiError("worker_not_silent", message, {"worker": name, "state": state})
    details = []
    for job_id in islice(worker.expired, TAKEN_BACK):
        job = draft.book.processing[job_id]
        cause = f"{transitions.silence(draft, job)} An operator took the job back."
        job = transitions.stall(draft, job, cause, rule="take-back", why="taken_back")
        details.append(_recovery(draft, job))
    reset = sum(each.action == "reset" for each in details)
    more = len(worker.expired) > len(details)
    return Response(TakeBackView(name, len(details), reset, len(details) - reset, details, more, draft.at.now))


def _recovery(draft: Draft, job: Job) -> Recovery:
    """Describe what the last step did to a stalled job."""
    action: Literal["reset", "failed"] = "reset" if job.status == "queued" else "failed"
    return Recovery(job.id, action, draft.changes[-1].event.reason or "")


def recover_one(draft: Draft, command: JobCommand) -> Response | ApiError:
    """Recover this job, if it is stalled at this moment."""
    job = transitions.find(draft, command.id)
    if isinstance(job, ApiError):
        return job
    if transitions.is_stuck(job, draft.at.lease):
        transitions.stall(draft, job, transitions.silence(draft, job))
        return Response(MaintenanceResult(1))
    return _not_due(job, draft.at)


def clean_one(draft: Draft, command: JobCommand) -> Response | ApiError:
    """Do what a cleanup run would do to this job now, without repairs: recover, fail or delete it."""
    job = transitions.find(draft, command.id)
    if isinstance(job, ApiError):
        return job
    if transitions.may_expire(job, draft.at):
        transitions.expire(draft, job)
    elif _is_past(job, draft.at):
        draft.delete(job)
    else:
        return recover_one(draft, command)
    return Response(MaintenanceResult(1))


def _not_due(job: Job, at: Moment) -> ApiError:
    message = transitions.CLOCK_SUSPECT if at.suspect else "It is no longer due for deletion or expiry."
    return ApiError("invalid_transition", message, {"job_id": job.id, "status": job.status})


def preview(draft: Draft, command: Preview) -> Response:
    """Return what `recover` and `expire` would do now, by running them in a draft that is not written."""
    recovered = recover(draft, Recover(limit=command.limit)).data
    overdue, more_overdue = _overdue(draft, command.limit)
    expired = [job.id for job in overdue if transitions.may_expire(job, draft.at)]
    draft.changes.clear()
    more = recovered.more or more_overdue
    return Response(PreviewResult(recovered.details, recovered.locks_cleared, expired, more))


def _clear_lock(draft: Draft, job: Job, lease: Lease) -> None:
    """Record that the lock has expired. The holder can revive it until the job is stalled."""
    details = {"worker": job.grant.worker if job.grant else None}
    draft.step(job, "lock_expired", details=details, lease=replace(lease, cleared=True))


def end_grants(draft: Draft, command: EndGrants) -> Response:
    """End grants that were made before the store was restored from a backup."""
    done = 0
    for job_id in dict.fromkeys(command.ids):
        job = draft.book.processing.get(job_id)
        if job is not None:
            cause = "The store was restored from a backup, which ends every grant in it."
            transitions.stall(draft, job, cause, rule="restore", why="restored")
            done += 1
    return Response(MaintenanceResult(done))


def credit_absence(draft: Draft, command: ExtendAfterPause) -> Response:
    """Postpone deadlines of processing jobs to at least `grace_ms` from now: after a start, workers must reconnect."""
    until = draft.at.lease + command.grace_ms
    since = draft.at.lease if command.since is None else command.since
    done = 0
    for job_id in dict.fromkeys(command.ids):
        job = draft.book.processing.get(job_id)
        if job is None or job.lease is None:
            continue
        lease = _credited(job.lease, since, until)
        if lease != job.lease:
            draft.step(job, "resumed", details={"grace_ms": command.grace_ms}, lease=lease)
            done += 1
    return Response(MaintenanceResult(done))


def _credited(lease: Lease, since: int, until: int) -> Lease:
    """Return the lease with no deadline before `until`. A lock that had expired at `since` stays expired."""
    expires = max(lease.expires, until) if lease.is_live(since) else lease.expires
    ceiling = None if lease.ceiling is None else max(lease.ceiling, until)
    return replace(lease, expires=expires, silent=max(lease.silent, until), ceiling=ceiling)


def expire(draft: Draft, command: Expire) -> Response:
    """Fail queued jobs past their `expires_at`."""
    overdue, more = _overdue(draft, command.limit)
    late = [job for job in overdue if transitions.may_expire(job, draft.at)]
    for job in late:
        transitions.expire(draft, job)
    return Response(MaintenanceResult(len(late), more=more))


def _overdue(draft: Draft, limit: int) -> tuple[list[Job], bool]:
    """Return the jobs that have been overdue longest, and whether there are more."""
    found = list(islice(draft.book.overdue(), limit + 1))
    return [draft.book.jobs[job_id] for job_id in found[:limit]], len(found) > limit


def delete_expired(draft: Draft, command: DeleteExpired) -> Response:
    """Delete those of the named jobs that are finished and past their `expires_at` now."""
    done = 0
    for job_id in dict.fromkeys(command.ids):
        job = draft.book.get(job_id)
        if job is None or not _is_past(job, draft.at):
            continue
        draft.delete(job)
        done += 1
    return Response(MaintenanceResult(done))


def _is_past(job: Job, at: Moment) -> bool:
    """Return whether the job is finished and past its `expires_at` by a clock that is not suspect."""
    return not at.suspect and job.status in FINISHED and job.expires_at is not None and job.expires_at <= at.now


def end_pauses(draft: Draft) -> Response:
    """Resume the queues whose pause is over, by the trusted wall time."""
    over = [
        name
        for name, pause in draft.book.paused.items()
        if pause.until is not None and pause.until <= draft.at.believed
    ]
    for name in over:
        draft.queue(name, "queue_resumed", "The pause ended as scheduled.")
    return Response(MaintenanceResult(len(over)))


def mend(draft: Draft, command: RepairJobs) -> Response:
    """Validate the named jobs and apply the safe fixes. Other issues are reported in every run."""
    found: list[tuple[str, Issue]] = []
    fixed = 0
    for job_id in dict.fromkeys(command.ids):
        job = draft.book.get(job_id)
        if job is None:
            continue
        issues = [issue for issue in validate(job, draft.at, draft.policy).issues if counts(issue)]
        found.extend((job_id, issue) for issue in issues)
        left = issues
        if issues:
            left = [issue for issue in validate(_mend(draft, job), draft.at, draft.policy).issues if counts(issue)]
            fixed += len(issues) - len(left)
        if not left:
            draft.checked.append(job.seq)
    return Response(MaintenanceResult(fixed, found=len(found), issues=found))


def _mend(draft: Draft, job: Job) -> Job:
    """Apply the safe fixes to one job and return its row."""
    fixes = safe_fixes(job)
    if fixes:
        job = draft.step(job, "fixed", reason="validation", details={"fields": sorted(fixes)}, **fixes)
    if job.status == "processing" and (job.grant is None or job.lease is None):
        job = transitions.stall(draft, job, transitions.silence(draft, job))
    return job
