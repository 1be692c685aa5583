"""Validate the record of a job: what is wrong, how serious it is, and what fixes it.

Invalid rows come from imports and manual edits; the rules never make one.
"""

from __future__ import annotations

from typing import Any, Final

from jobd.model.commands import Moment
from jobd.model.job import FINISHED, LIVE, MAX_PERCENT, MAX_PRIORITY, STATUSES, Failure, Job, Policy, storage_key_error
from jobd.model.responses import Issue, Validation

NO_MESSAGE: Final = "No error message was recorded."
_CORRECT: Final = "Correct the row, then run: jobd doctor --accept ID"


def validate(job: Job, at: Moment, policy: Policy) -> Validation:
    """Return everything that is wrong with `job` now. `can_proceed` is false if an issue is critical."""
    issues = [
        *_identity(job),
        *_priority(job),
        *_progress(job),
        *_old_error(job),
        *_ending(job, policy),
        *_storage_key(job),
        *_lock(job, at),
        *_times(job),
        *_expiry(job, at),
    ]
    can_proceed = all(issue.type != "critical" for issue in issues)
    return Validation(is_valid=not any(map(counts, issues)), issues=issues, can_proceed=can_proceed)


def counts(issue: Issue) -> bool:
    """Return whether cleanup runs count `issue`. Warnings are only shown."""
    return issue.type != "warning"


def safe_fixes(job: Job) -> dict[str, Any]:
    """Return the fields that a cleanup run may fix on its own, with their valid values.

    A processing job without a grant has no field to fix: it is treated as stalled.
    """
    fixes: dict[str, Any] = {}
    if (progress := _right_progress(job)) != job.progress:
        fixes["progress"] = progress
    if job.status == "failed" and (job.error is None or not job.error.message):
        fixes["error"] = Failure(NO_MESSAGE, job.error.code if job.error else None)
    if job.status != "processing" and (job.grant is not None or job.deadlines is not None):
        fixes["grant"], fixes["deadlines"] = None, None
    return fixes | _ordered_times(job)


def _right_progress(job: Job) -> float:
    """Return the nearest valid progress: 0 for a queued job, 100 for a completed one."""
    match job.status:
        case "queued":
            return 0
        case "completed":
            return MAX_PERCENT
        case _:
            return min(max(job.progress, 0), MAX_PERCENT)


def _ordered_times(job: Job) -> dict[str, Any]:
    """Return times that must move forward, so that created, started, finished and updated are in order."""
    fixes: dict[str, Any] = {}
    started = job.started_at
    if started is not None and started < job.created_at:
        started = fixes["started_at"] = job.created_at
    finished = job.finished_at
    earliest = max(job.created_at, started or job.created_at)
    if job.status in FINISHED and (finished is None or finished < earliest):
        finished = fixes["finished_at"] = max(earliest, job.updated_at if finished is None else earliest)
    latest = max(earliest, finished or earliest)
    if job.updated_at < latest:
        fixes["updated_at"] = latest
    return fixes


def _identity(job: Job) -> list[Issue]:
    issues = []
    for name, value in (("id", job.id), ("queue", job.options.queue)):
        if not value:
            issues.append(Issue("critical", name, f"{name} is missing.", "Delete the job and create it again."))
    if job.status not in STATUSES:
        message = f"Status '{job.status}' is not one of {', '.join(STATUSES)}."
        issues.append(Issue("critical", "status", message, _CORRECT))
    return issues


def _priority(job: Job) -> list[Issue]:
    priority = job.options.priority
    if -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        return []
    message = f"Priority is {priority}, outside -{MAX_PRIORITY} to {MAX_PRIORITY}."
    fix = f"Set a valid one: jobctl update {job.id} --priority N" if job.status in LIVE else _CORRECT
    return [Issue("error", "priority", message, fix)]


def _progress(job: Job) -> list[Issue]:
    right = _right_progress(job)
    if right == job.progress:
        return []
    message = f"Progress is {job.progress:g}, outside 0 to 100."
    if job.status in ("queued", "completed"):
        message = f"The job is {job.status}, but its progress is {job.progress:g}."
    return [Issue("error", "progress", message, f"A cleanup run sets it to {right:g}.")]


def _old_error(job: Job) -> list[Issue]:
    """Report an error on a queued job without an attempt. Only an attempt leaves an error."""
    if job.status != "queued" or job.error is None or job.attempt or job.ended is not None:
        return []
    message = "The job is queued and had no attempt, but it has an error."
    return [Issue("warning", "error_message", message, "It is cleared when the job completes.")]


def _ending(job: Job, policy: Policy) -> list[Issue]:
    if job.status == "failed" and (job.error is None or not job.error.message):
        fix = "A cleanup run fills in a default message."
        return [Issue("error", "error_message", "The job failed without an error message.", fix)]
    if job.status != "completed":
        return []
    result = job.result
    if policy.require_download_url and (result is None or not result.download_url):
        message = "The job is completed without a download_url, which [validation] require_download_url requires."
        return [Issue("error", "download_url", message, "Delete the job and create it again.")]
    if result is None or not (result.download_url or result.file_path or result.storage_key or result.metadata):
        message = "The job is completed without download_url, file_path, storage_key or metadata."
        return [Issue("warning", "download_url", message, "Pass the result of the work to complete.")]
    return []


def _storage_key(job: Job) -> list[Issue]:
    """Report an invalid key, which no API accepts. Its object is not deleted with the job."""
    key = None if job.result is None else job.result.storage_key
    fault = None if key is None else storage_key_error(key)
    if fault is None:
        return []
    return [Issue("error", "storage_key", f"The storage_key {fault}.", _CORRECT)]


def _lock(job: Job, at: Moment) -> list[Issue]:
    if job.status != "processing":
        if job.grant is None and job.deadlines is None:
            return []
        message = f"The job is {job.status}, but has a lock."
        return [Issue("error", "lock", message, "A cleanup run removes the orphan lock.")]
    if job.grant is None or job.deadlines is None:
        message = "The job is processing, but no worker holds it."
        return [Issue("critical", "lock", message, "A cleanup run treats it as stalled.")]
    if at.lock_ms >= job.deadlines.stalled_at:
        message = f"The job is stalled: worker {job.grant.worker} did not report in time."
        fix = "Recovery puts it back into its queue or fails it, within cleanup.recover_every."
        return [Issue("error", "lock", message, fix)]
    return []


def _times(job: Job) -> list[Issue]:
    wrong = _ordered_times(job)
    message = "Times are out of order: created, started, finished, updated must follow each other."
    return [Issue("error", name, message, "A cleanup run puts them in order.") for name in wrong]


def _expiry(job: Job, at: Moment) -> list[Issue]:
    if job.expires_at is None or job.expires_at > at.now or job.status == "processing":
        return []
    message = f"The job expired at {job.expires_at} (Unix ms)."
    fix = "It fails with error_code expired." if job.status == "queued" else "The next cleanup run deletes it."
    if at.suspect:
        fix = "None while the clock is suspect. Check the clock; if it is correct: jobctl clock accept"
    return [Issue("warning", "expires_at", message, fix)]
