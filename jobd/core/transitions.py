"""Make the transitions of a job: grant, requeue, finish, stall, expire.

Each transition adds one event and returns the new row. It is allowed: the rules have called guards.py before. The
statuses that may follow one another are `TRANSITIONS` in model/job.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from msgspec import Raw
from msgspec.structs import replace

from jobd.core import guards
from jobd.core.transaction import Transaction
from jobd.model.clocks import LockMs
from jobd.model.commands import Claim, NewJobFields, Start
from jobd.model.events import EventType
from jobd.model.flat_job import FIELDS, NO_RESULT, maker
from jobd.model.job import (
    LATEST_MS,
    MAX_PERCENT,
    Failure,
    Grant,
    Job,
    LockDeadlines,
    Options,
    Policy,
    PreviousGrant,
    Result,
    requeues_on_stall,
    with_checkpoint,
)
from jobd.model.times import duration

STALLED: Final = "stalled"
EXPIRED: Final = "expired"
MAX_QUOTED_ERROR: Final = 500  # characters of the last error that the message of an expiry repeats
_NULL: Final = Raw(b"null")


# Rows are made by position, because replace() by name takes four times as long.
_ROW: Final = {name: f"job.{name}" for name in Job.__struct_fields__}
_granted = maker(
    Job, "job, status, updated_at, progress, progress_message, attempt, started_at, grant, deadlines", _ROW
)
_requeued = maker(
    Job,
    "job, status, updated_at, run_at, progress, progress_message, started_at, finished_at, expires_at, grant, "
    "deadlines, ended, releases",
    _ROW,
)
_finished = maker(Job, "job, status, updated_at, finished_at, expires_at, grant, deadlines, ended, releases", _ROW)
_options = maker(Options, "request, max_stalls, on_stall", {name: f"request.{name}" for name in FIELDS})


def requested_options(tx: Transaction, request: NewJobFields) -> Options:
    """Return the options of a new job. max_stalls and on_stall get their defaults here, so that the job shows them."""
    policy = tx.policy
    max_stalls = policy.max_stalls if request.max_stalls is None else request.max_stalls
    return tx.state.shared(_options(request, max_stalls, request.on_stall or policy.on_stall))


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
        stall_after_ms = policy.stall_after_ms if options.stall_after_ms is None else options.stall_after_ms
    progress_timeout_ms = options.progress_timeout_ms
    if progress_timeout_ms is None:
        progress_timeout_ms = request.progress_timeout_ms
    if progress_timeout_ms is None:
        progress_timeout_ms = policy.progress_timeout_ms
    ttl_ms = request.lock_ttl_ms or policy.lock_ttl_ms
    expires, progress_due = lock_ms + ttl_ms, None
    if progress_timeout_ms:
        progress_due = lock_ms + progress_timeout_ms
        expires = expires if expires < progress_due else progress_due
    attempt = job.attempt + 1
    started_at = now if now > job.created_at else job.created_at
    made = Grant(tx.secret(token), token, worker, now, ttl_ms, stall_after_ms, progress_timeout_ms)
    deadlines = LockDeadlines(expires, lock_ms + stall_after_ms, progress_due)
    granted = _granted(job, "processing", now, 0, None, attempt, started_at, made, deadlines)
    details = {"worker": worker, "fencing_token": token, "attempt": attempt, "ttl_ms": ttl_ms}
    # `by` instead of `worker`, because `note_request` has already recorded the worker.
    return tx.update(job, granted, "granted", by=f"worker:{worker}", details=details)


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
    changed: Job,
    event_type: EventType,
    ended: PreviousGrant | None,
    *,
    run_at: int | None = None,
    releases: int = 0,
    worker: str | None = None,
    reason: str | None = None,
    details: dict[str, Any] | None = None,
) -> Job:
    """Put the job back into its queue. It keeps its last error and, without a `run_at`, its place.

    `changed` is the row with what else changes.
    """
    is_finished = job.status != "processing"
    if run_at is None and is_finished and tx.at.now < job.run_at <= job.updated_at:  # the wall clock was set back
        run_at = tx.at.now
    run_at = job.run_at if run_at is None else run_at
    expires_at = None if is_finished else changed.expires_at  # the deletion time of a finished job
    after = _requeued(changed, "queued", tx.now, run_at, 0, None, None, None, expires_at, None, None, ended, releases)
    return tx.update(job, after, event_type, worker=worker, reason=reason, details=details)


def finish(
    tx: Transaction,
    job: Job,
    changed: Job,
    event_type: EventType,
    status: str,
    ended: PreviousGrant | None,
    *,
    expires_at: int | None = None,
    worker: str | None = None,
    by: str | None = None,
    reason: str | None = None,
    details: dict[str, Any] | None = None,
) -> Job:
    """Move the job to a finished status. It is deleted after its retention, or at `expires_at`.

    `changed` is the row with what else changes.
    """
    finished_at = tx.now
    if finished_at < job.created_at:  # the wall clock stepped back
        finished_at = job.created_at
    if job.started_at is not None and finished_at < job.started_at:
        finished_at = job.started_at
    if expires_at is None:
        expires_at = min(max(finished_at, tx.at.latest) + keep_ms(tx.policy, status), LATEST_MS)
    after = _finished(changed, status, tx.now, finished_at, expires_at, None, None, ended, 0)
    return tx.update(job, after, event_type, worker=worker, by=by, reason=reason, details=details)


def completed(job: Job, result: Result) -> Job:
    """Return the row of a job that completes with `result`: progress 100, no error, no checkpoint."""
    done = replace(job, progress=MAX_PERCENT, result=normalize_result(result), error=None)
    return done if job.extra is None else replace(done, extra=with_checkpoint(job.extra, 0))


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
    return None if result == NO_RESULT else result


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
    stalls, attempt = job.stalls + 1, _attempts_after_stall(job)
    ended = ended_by(job, tx.at.now, rule, why)
    details = {"worker": job.grant.worker if job.grant else None, "progress": job.progress, "stalls": stalls}
    if job.grant is not None:
        tx.state.presence.note_lost(job.grant.worker, job)
    failure = _stall_failure(job)
    if failure is None:
        changed = replace(job, attempt=attempt, stalls=stalls)
        return requeue(tx, job, changed, "stalled", ended, reason=cause, details=details)
    error = Failure(f"{cause} {failure.advice}", STALLED)
    changed = replace(job, attempt=attempt, stalls=stalls, error=error)
    return finish(tx, job, changed, "stalled", "failed", ended, reason=error.message, details=details)


def stall_outcome(job: Job) -> str:
    """Say what the next stall does to a processing job, as a clause."""
    failure = _stall_failure(job)
    if failure is not None:
        return f"it fails{failure.why}"
    attempt = _attempts_after_stall(job) + 1
    return f"it is queued again (attempt {attempt} of {max(attempt, job.options.max_attempts)})"


def stall_outcomes(jobs: Iterable[Job]) -> str:
    """Say what the next stall of each job does, as clauses: `5 are queued again, 1 fails (no attempts left)`."""
    failures = [_stall_failure(job) for job in jobs]
    counts = Counter(failure.brief for failure in failures if failure is not None)
    queued = failures.count(None)
    clauses = [f"{queued:,} {'is' if queued == 1 else 'are'} queued again"] if queued else []
    return ", ".join(clauses + [f"{count:,} fail{'s' * (count == 1)} ({why})" for why, count in counts.items()])


class _StallFailure(NamedTuple):
    why: str  # ends the clause "it fails"
    brief: str
    advice: str


def _stall_failure(job: Job) -> _StallFailure | None:
    """Return why the next stall fails a job. None: it puts the job back into its queue."""
    options, stalls = job.options, job.stalls + 1
    if requeues_on_stall(job):
        return None
    if stalls > options.max_stalls:
        times = "once" if stalls == 1 else f"{stalls} times"
        advice = f"It stalled {times} (max_stalls {options.max_stalls}); find out what kills its workers."
        return _StallFailure(f", as stall {stalls} (max_stalls {options.max_stalls})", "max_stalls", advice)
    if options.on_stall == "fail":
        return _StallFailure(", by its on_stall", "on_stall", "Its on_stall is fail; retry the job to run it again.")
    used = f"({job.attempt} of {options.max_attempts})"
    advice = f"No attempts are left {used}. The work may be half done; check it, then retry the job to run it again."
    return _StallFailure(f": progress {job.progress:g} %, no attempts left {used}", "no attempts left", advice)


def _attempts_after_stall(job: Job) -> int:
    """Return the attempts of a job after its next stall, which uses none if there was no progress."""
    return refunded_attempts(job) if job.progress == 0 else job.attempt


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


def expire(tx: Transaction, job: Job, by: str | None = None) -> Job:
    """Fail a queued job whose `expires_at` has passed. The message repeats its last error."""
    waited = "before a worker took the job" if job.ended is None else "while it waited for a retry"
    message = f"Its expires_at passed {waited}. Create it again if it is still needed."
    if job.error is not None and job.error.message:
        message += f" Its last error: {job.error.message[:MAX_QUOTED_ERROR]}"
    failed = replace(job, error=Failure(message, EXPIRED))
    return finish(tx, job, failed, "expired", "failed", job.ended, by=by, reason=message)


def expire_if_overdue(tx: Transaction, job: Job) -> Job:
    """Fail the job if it is queued and past its `expires_at`. Return its row. Commands that do not end it call this."""
    return expire(tx, job, by="daemon") if guards.may_expire(job, tx.at) else job
