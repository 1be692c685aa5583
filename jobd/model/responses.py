"""What is answered: the shapes of the wire, and the answer as the actor gives it.

Shapes only: views.py and reads.py fill them. Their field names are the contract of both APIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from jobd.model.commands import About, AuditLog, Export, Import, Json, ListJobs, PlanAction, PlanFilter, WorkerState
from jobd.model.events import EventView, QueuePause
from jobd.model.job import Backoff, Job


class LockView(Struct, frozen=True):
    worker: str
    fencing_token: int
    acquired_at: int
    expires_at: int
    lock_id: str | UnsetType = UNSET  # admins only


def public_lock(lock: LockView | None) -> LockView | None:
    """`lock` as everybody may see it."""
    return None if lock is None else msgspec.structs.replace(lock, lock_id=UNSET)


class JobView(Struct):
    """A job as responses show it. `payload` is read from the disk before the response is sent.

    `worker` is set only while the lock has expired and `lock` is null: that worker may still end the job.
    """

    id: str
    queue: str
    kind: str
    payload: Raw | UnsetType
    priority: int
    status: str
    progress: int | float
    progress_message: str | None
    attempt: int
    max_attempts: int
    backoff: Backoff
    stalls: int
    max_stalls: int
    on_stall: str
    stuck_after_ms: int
    max_processing_ms: int
    created_at: int
    updated_at: int
    run_at: int
    started_at: int | None
    finished_at: int | None
    expires_at: int | None
    lock: LockView | None
    download_url: str | None
    file_path: str | None
    storage_key: str | None
    metadata: Json
    error_message: str | None
    error_code: str | None
    worker: str | UnsetType = UNSET
    repeated: bool | UnsetType = UNSET


class JobPage(Struct):
    """`looked_to_at`: when the oldest job that was looked at was created, where the page ended for having looked at
    enough, with less in it than was asked for; null where it is full, or the last one."""

    jobs: list[JobView]
    next_cursor: str | None
    looked_to_at: int | None = None


class ExportPage(Struct):
    """Jobs, oldest first, as an import takes them: what the creator left to the daemon is null."""

    jobs: list[Import]
    next_cursor: str | None


class JobList(Struct):
    jobs: list[JobView]


class TimelineView(Struct):
    events: list[EventView]


class ErrorView(Struct, frozen=True):
    """The refusal that something would meet: its code and its message."""

    error: str
    message: str


class LateResultView(Struct, frozen=True):
    """A late result. `expires_at` is the time of deletion that its worker asked for.

    `refusal` is what its adoption would be refused with, whatever the job's status, as the daemon is set now; null
    where nothing of the result is against it.
    """

    seq: int
    at: int
    worker: str
    fencing_token: int
    download_url: str | None
    file_path: str | None
    storage_key: str | None
    metadata: Json
    expires_at: int | None
    refusal: ErrorView | None = None


class LateResultList(Struct):
    late_results: list[LateResultView]


class GrantView(Struct):
    job: JobView
    lock_id: str
    fencing_token: int
    lock_expires_at: int
    ttl_ms: int
    ceiling_at: int | None


class Grants(Struct):
    grants: list[GrantView]


class LockState(Struct):
    """The answer to a sign of life. `extended` is false where an extension changed nothing."""

    lock_expires_at: int
    ttl_ms: int
    ceiling_at: int | None
    cancel_requested: bool = False
    extended: bool | UnsetType = UNSET


class NextEvent(Struct, frozen=True):
    """The next event of a job. `at` is None if it depends on a worker."""

    what: str
    at: int | None
    rule: str


class WhyView(Struct, frozen=True):
    state: str
    because: str
    next: NextEvent | None
    blocked_by: str | None
    do: list[str]


class Issue(Struct, frozen=True):
    type: Literal["warning", "error", "critical"]
    field: str
    message: str
    fix: str


class Validation(Struct, frozen=True, rename="camel"):
    is_valid: bool
    issues: list[Issue]
    can_proceed: bool


class QueueView(Struct, frozen=True):
    name: str
    paused: bool
    queued: int
    processing: int
    completed: int
    failed: int
    cancelled: int
    oldest_due_at: int | None
    paused_at: int | None = None
    paused_by: str | None = None
    pause_reason: str | None = None
    paused_until: int | None = None

    @property
    def pause(self) -> QueuePause:
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)


class QueueList(Struct):
    """In the order of their names, or the busiest first. `next_cursor` is None on the last page."""

    queues: list[QueueView]
    next_cursor: str | None = None


class WorkerView(Struct, frozen=True):
    """A worker. `jobs` are the first jobs that it holds, `held` counts all, `expired` those with an expired lock.

    `queues` and `kinds` are those of its latest claim: `queues` is None if no claim is remembered, `kinds` is None if
    the claim takes all kinds. `waiting` is true while a claim of it waits for a job.
    """

    worker: str
    state: WorkerState
    jobs: list[str]
    held: int
    expired: int
    queues: list[str] | None
    kinds: list[str] | None
    waiting: bool
    about: About | None
    last_seen_at: int


class WorkerList(Struct):
    """A page of workers, most recently seen first. `next_cursor` is None on the last page.

    `by_state` counts all workers. Nothing before `since` (Unix ms) is remembered.
    """

    workers: list[WorkerView]
    next_cursor: str | None
    by_state: dict[WorkerState, int]
    since: int


class LockedJob(Struct, frozen=True, kw_only=True):
    """A current grant, for operators. `stuck_at` is when the job will count as stuck if nothing is heard."""

    id: str
    queue: str
    kind: str
    worker: str
    lock_id: str | UnsetType = UNSET  # not for who may only look
    fencing_token: int
    acquired_at: int
    expires_at: int
    live: bool
    ceiling_at: int | None
    stuck_at: int
    progress: int | float


class LockList(Struct):
    locks: list[LockedJob]
    next_cursor: str | None = None


class OldestProcessing(Struct, frozen=True):
    id: str
    age: float
    progress: int | float


class OldestDue(Struct, frozen=True):
    """The job that has been due longest, and since when (Unix ms)."""

    id: str
    queue: str
    due_at: int


class DiskView(Struct, frozen=True, rename="camel"):
    """The path of the store, and the space on its disk. `free_bytes` is the space available to the daemon's user."""

    path: str
    free_bytes: int
    total_bytes: int


class StatsView(Struct, frozen=True, rename="camel"):
    """Times in seconds where a dashboard expects them so; `time_since_last_cleanup` in ms."""

    total_jobs: int
    by_status: dict[str, int]
    stuck_jobs: int
    locked_jobs: int
    average_processing_time: float
    oldest_processing_job: OldestProcessing | None
    stuck_jobs_recovered: int
    timestamp: int
    cleanup_running: bool = False
    time_since_last_cleanup: int | None = None
    disk: DiskView | None = None  # None for a store in memory


class TransitionView(Struct, frozen=True, rename="camel"):
    """The answer to force-fail, force-reset and transition."""

    job_id: str
    previous_status: str
    status: str
    reason: str | None
    timestamp: int


class AdminLockView(Struct, frozen=True, rename="camel"):
    """The answer to extend-lock and release-lock. `lock` is null once the job is back in its queue."""

    job_id: str
    status: str
    lock: LockView | None
    lock_expires_at: int | None
    ceiling_at: int | None
    extended: bool
    timestamp: int


class Recovery(Struct, frozen=True, rename="camel"):
    """What recovery did to one job."""

    job_id: str
    action: Literal["reset", "failed"]
    reason: str


class Recovered(Struct, frozen=True):
    """The answer to Recover. `more` says that stuck jobs or expired locks are left for the next slice."""

    details: list[Recovery]
    locks_cleared: int
    more: bool


class TakeBackView(Struct, frozen=True, rename="camel"):
    """The jobs that a take-back ended, or would end as a dry run. `more`: not all jobs are in `details`."""

    worker: str
    recovered_jobs: int
    reset_jobs: int
    failed_jobs: int
    details: list[Recovery]
    more: bool
    timestamp: int


class MaintenanceResult(Struct, frozen=True):
    """The answer to Expire, DeleteExpired and Mend: how many jobs changed and what was found."""

    done: int
    found: int = 0
    issues: list[tuple[str, Issue]] = []
    more: bool = False


class PausedView(Struct, frozen=True):
    """Whether a queue is paused, and the start, operator, reason and end of the pause. Times are Unix ms."""

    queue: str
    paused: bool
    paused_at: int | None = None
    paused_by: str | None = None
    pause_reason: str | None = None
    paused_until: int | None = None

    @property
    def pause(self) -> QueuePause:
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)


class Imported(Struct, frozen=True):
    """The answer to one line of an import. `job_id` exists afterwards in both cases."""

    job_id: str
    skipped: bool


class ImportCheckResult(Struct, frozen=True):
    """What one line of an import would do. `room`: so many unfinished jobs may still be created."""

    job_id: str
    what: Literal["create", "skip"]
    status: str | None  # after it; None where that is not known
    reason: str | None
    room: int


class RejectedLine(Struct, frozen=True):
    """A line of an import that was rejected. `line` counts from 1; `id` is null if the line has none."""

    line: int
    id: str | None
    reason: str


class ImportResult(Struct, rename="camel"):
    """The result of an import. `refused` shows the first 1000 rejected lines, `refused_count` counts all."""

    imported: int = 0
    skipped: int = 0
    refused_count: int = 0
    refused: list[RejectedLine] = []


class PreviewedLine(Struct, frozen=True):
    """What an import would do with a line. `line` counts from 1; `id` is null if the line has none.

    `status` is that of the job afterwards.
    """

    line: int
    id: str | None
    what: Literal["create", "skip", "refuse"]
    status: str | None
    reason: str | None


class ImportPreview(Struct, rename="camel"):
    """What an import would do. `lines` shows the first 10 000 lines; `more` says that there are more.

    `stops_at` is the line at which the import would stop early, for `stop_reason`, or null.
    """

    would_import: int = 0
    would_skip: int = 0
    would_refuse: int = 0
    lines: list[PreviewedLine] = []
    more: bool = False
    stops_at: int | None = None
    stop_reason: str | None = None


class CleanupReport(Struct, frozen=True, rename="camel"):
    """What was done since the previous report, in the names that existing dashboards expect. Times in ms."""

    timestamp: int
    stuck_jobs_recovered: int
    expired_jobs_deleted: int
    expired_locks_cleared: int
    validation_issues_fixed: int
    validation_issues_found: int
    total_processing_time: int
    errors: list[str]
    forced: bool


class CleanupState(Struct, frozen=True, rename="camel"):
    """`time_since_last_cleanup` is since the last successful pass, in ms. A pass with errors is a failed one."""

    last_report: CleanupReport | None
    cleanup_running: bool
    time_since_last_cleanup: int | None
    failed_since_last_success: int = 0  # passes
    last_failure: CleanupReport | None = None  # since the last successful pass


class RecoverStuckView(Struct, frozen=True, rename="camel"):
    recovered_jobs: int
    reset_jobs: int
    failed_jobs: int
    details: list[Recovery]
    timestamp: int


class ValidateJobView(Struct, frozen=True, rename="camel"):
    job_id: str
    job: JobView
    validation: Validation
    timestamp: int


HealthStatus = Literal["healthy", "degraded", "unhealthy"]


class DatabaseHealth(Struct, frozen=True, rename="camel"):
    """Health of the database. `path`, `free_bytes` and `total_bytes` describe its disk; None for a store in memory."""

    status: HealthStatus
    message: str
    total_jobs: int
    path: str | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None


class PartHealth(Struct, frozen=True):
    status: HealthStatus
    message: str


class CleanupHealth(Struct, frozen=True, rename="camel"):
    running: bool
    time_since_last_cleanup: int | None  # ms
    message: str


class HealthView(Struct, frozen=True, rename="camel"):
    """Measured at `timestamp`, at most 5 s ago."""

    status: HealthStatus
    database: DatabaseHealth
    cache: PartHealth
    storage: PartHealth
    cleanup_status: CleanupHealth
    timestamp: int


AlertSeverity = Literal["critical", "warning", "notice"]


class AlertView(Struct, frozen=True):
    """`since` is the Unix time in ms at which the alert began to fire, None while it does not."""

    name: str
    firing: bool
    since: int | None
    value: float
    threshold: float
    hint: str
    severity: AlertSeverity = "warning"


class AlertList(Struct):
    alerts: list[AlertView]


class WebhookView(Struct, frozen=True):
    """A webhook: where it goes, what it tells, and how it is going. Times in Unix ms, None where it never happened.

    `state` is that of its breaker: while it is `open` (on a break) nothing is sent, `half_open` one delivery is tried.
    `next_try_at` is when the next try may be made, None where one may now, or nothing waits to be tried again.
    `position` is the newest event that was looked at, `lag` how many were not yet. `delivered`, `failed` (tries) and
    `given_up` are counted since the start.
    """

    name: str
    url: str
    events: list[str]
    queues: list[str]
    state: Literal["starting", "closed", "open", "half_open"]
    failing_since: int | None
    next_try_at: int | None
    position: int
    lag: int
    waiting: int
    delivered: int
    failed: int
    given_up: int
    last_success_at: int | None
    last_error: str | None
    last_error_at: int | None


class WebhookList(Struct):
    webhooks: list[WebhookView]


DeliveryState = Literal["waiting", "delivered", "given_up"]


class DeliveryView(Struct, frozen=True):
    """One message to one webhook. `event_id` is its header `webhook-id`, `seq` the event that it tells of, if any.

    Times in Unix ms; `due_at` where it waits, `ended_at` where it was delivered or given up.
    """

    id: int
    state: DeliveryState
    type: str
    subject: str
    event_id: str
    seq: int | None
    at: int
    due_at: int | None
    tries: int
    ended_at: int | None
    status: int | None
    error: str | None


class DeliveryPage(Struct):
    """The last page has no `next_cursor`."""

    deliveries: list[DeliveryView]
    next_cursor: str | None


class Resent(Struct):
    """`resent` deliveries that were given up are on their way again."""

    resent: int


class ReportList(Struct):
    reports: list[CleanupReport]


class ClockView(Struct, frozen=True):
    """The clock. While it is `suspect`, nothing is deleted or failed by age; `message` says why and what to do."""

    now: int
    suspect: bool
    message: str


class QuarantinedJob(Struct, frozen=True):
    id: str
    reason: str


class QuarantineList(Struct):
    jobs: list[QuarantinedJob]


class ProcessStats(Struct, frozen=True):
    """How the process is, and which job has waited longest.

    `commit_p99_s` is a bound: 99 of 100 commits of the last minutes took no longer; None where there was none.
    """

    mailbox: int
    parked: int
    commit_p99_s: float | None
    loop_lag_s: float
    database_bytes: int
    wal_bytes: int
    uptime_ms: int
    oldest_due: OldestDue | None


class AuditView(Struct, frozen=True):
    """What an operator did, or was refused. `outcome` is "done" or the code of the refusal."""

    seq: int
    at: int
    who: str
    address: str
    what: str
    job_id: str | None
    queue: str | None
    reason: str | None
    outcome: str
    changed: int
    details: dict[str, Any]


class AuditPage(Struct):
    entries: list[AuditView]
    next_cursor: str | None


class VersionedJob(Struct, frozen=True):
    """A job, and the version by which it is known again."""

    job: JobView
    version: str


class PlannedJob(Struct, frozen=True, gc=False, rename={"from_": "from"}):
    """A job as a plan found it, and what it would be. `to` is null where it would be deleted.

    `late_results` counts those of it that nobody has adopted; of a completed job none can be.
    """

    id: str
    from_: str
    to: str | None
    late_results: int = 0


class SkippedJob(Struct, frozen=True, gc=False):
    """A job that a plan leaves alone, and why. `status` is null where there is no such job."""

    id: str
    status: str | None
    why: str


class ChangedJob(Struct, frozen=True, gc=False, rename={"from_": "from"}):
    """A job of a plan to which nothing was done: what it was, what it is now (null: gone), and why."""

    id: str
    from_: str
    now: str | None
    why: str


class PlanResult(Struct, frozen=True):
    """What became of a plan. `repeated`: it had been applied before, and nothing was done this time."""

    plan_id: str
    action: str
    applied: int
    changed: list[ChangedJob]
    refused: list[ChangedJob]
    applied_at: int
    repeated: bool = False


class DamagedRow(Struct, frozen=True):
    """A row whose checksum is wrong, or that cannot be read."""

    where: str
    what: str


class CheckedRows(Struct, frozen=True):
    """A piece of the walk over all rows: `checked` rows of `table`, and those of them that are damaged."""

    table: str
    checked: int
    damaged: list[DamagedRow]
    next_cursor: str | None


BackupState = Literal["waiting", "copying", "checking", "sending", "sent", "failed"]


class BackupView(Struct, frozen=True):
    """An online backup. Times in Unix ms.

    `bytes_done` of `bytes_total` (null until it is known) are copied, or sent. `quiet_ms`: for how long nothing has
    moved. `message`: why it failed.
    """

    id: str
    state: BackupState
    bytes_done: int
    bytes_total: int | None
    quiet_ms: int
    started_at: int
    ended_at: int | None
    message: str | None


class BackupList(Struct, frozen=True):
    """The online backups under way and the last that have ended, newest first."""

    backups: list[BackupView]


class PlanView(Struct, frozen=True):
    """What an action would do: to `count` jobs. `skipped` shows the first of those left alone, `skipped_count` counts
    them. `filter` is what the jobs were found by, null where they were named, or the action itself says which; `scope`
    says which of them were looked at. `more`: the plan is full, or its time was over, before all were looked at;
    `next_cursor` makes the next one, where it is null make it anew once this one was applied. `with_late_results`
    counts the jobs to which work came late that nobody has adopted.
    """

    plan_id: str
    action: PlanAction
    reason: str | None
    filter: PlanFilter | None
    scope: str | None
    count: int
    jobs: list[PlannedJob]
    skipped: list[SkippedJob]
    skipped_count: int
    more: bool
    next_cursor: str | None
    made_at: int
    expires_at: int
    result: PlanResult | None = None
    with_late_results: int = 0


def late_results_note(action: str, late: Sequence[int]) -> str | None:
    """What who asks for `action` has to know of late results; None: nothing. `late`: how many there are of each job."""
    jobs, results = sum(count > 0 for count in late), sum(late)
    if not jobs:
        return None
    has = "It has" if len(late) == 1 else "1 of these jobs has" if jobs == 1 else f"{jobs} of these jobs have"
    is_one = results == 1
    what, then = ("1 late result", "it") if is_one else (f"{results} late results", "they")
    if action == "delete":
        then += f" {'goes' if is_one else 'go'} with the {'job' if jobs == 1 else 'jobs'}"
    else:
        then = f"see whether {then} can be adopted instead"
    return f"{has} {what} that nobody has adopted: {then}."


def plan_late_results_note(action: str, jobs: Sequence[PlannedJob]) -> str | None:
    """late_note of the jobs of a plan. Of a cleanup of those that it deletes: with the others it stays what it is."""
    if action == "cleanup":
        action, jobs = "delete", [job for job in jobs if job.to is None]
    return late_results_note(action, [job.late_results for job in jobs])


class PlanSlice(Struct):
    """The answer to ApplyPlan: how many jobs it was done to, and to which not."""

    applied: int
    changed: list[ChangedJob]
    refused: list[ChangedJob]


class PreviewResult(Struct, frozen=True):
    """The answer to Preview. `more`: there is more than was looked at."""

    details: list[Recovery]
    locks: int
    expired: list[str]
    more: bool


class PreviewView(Struct, frozen=True, rename="camel"):
    """What recovery and a cleanup pass would do now: the first jobs of each kind. `more`: there are more.

    `more_mended`: not all jobs that are alive were looked at for `mended_jobs`, or there are more than are shown.

    `held_jobs` are past their retention too, but are kept while the clock is suspect.
    """

    recover: list[Recovery]
    expired_locks: int
    expired_jobs: list[str]
    deleted_jobs: list[str]
    mended_jobs: list[str]
    more: bool
    timestamp: int
    held_jobs: list[str] = []
    more_held: bool = False
    more_mended: bool = False


class FailureGroup(Struct, frozen=True):
    """Jobs whose errors are the same but for numbers, names and the like; `message` is that of the latest.

    `count` are the failed ones, `retrying` those that wait to be tried again.
    """

    fingerprint: str
    message: str
    error_code: str | None
    count: int
    retrying: int
    kinds: list[str]
    queues: list[str]
    first_at: int
    last_at: int
    job_ids: list[str]


class FailuresView(Struct, frozen=True):
    """The largest groups of failed jobs and of those that wait to be tried again. `total` are all failed jobs, `other`
    those of no group here; `retrying` and `other_retrying` are the same of those that wait. `whole` is false as long as
    what was there at the start is still being counted."""

    groups: list[FailureGroup]
    total: int
    retrying: int
    other: int
    other_retrying: int
    whole: bool


class EmptyResponse(Struct, frozen=True):
    """The answer where there is nothing to say."""


class HistoryRead(Struct, frozen=True):
    """A read of history: timeline (the latest `events` of it) or late results of the job with this seq, a page of jobs
    of either kind, or of the audit log. `ended`: a finished job, of which the timeline is asked who ended it."""

    timeline: int | None = None
    events: int | None = None
    ended: Job | None = None
    late: int | None = None
    page: ListJobs | None = None
    export: Export | None = None
    audit: AuditLog | None = None


class Response(Struct):
    """A yes. `shows` are the job views whose payload is still to be read, with the job's seq; `grants` lets an
    undelivered answer be taken back: (job id, lock id) of each grant in it; `look` is answered from the disk, `looked`
    is at how many jobs it looked at most, for a page of them.
    """

    data: Any
    status: int = 200
    unread_payloads: list[tuple[int, JobView]] = []
    grants: list[tuple[str, str]] = []
    read: HistoryRead | None = None
    scanned: int = 0
    replayed: bool = False  # a stored idempotent answer
