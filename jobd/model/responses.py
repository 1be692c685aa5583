"""Responses: the types of `data` in both APIs, and the response that the actor returns.

The field names are the contract of the APIs. Docstrings and descriptions appear in the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from jobd.model.commands import (
    About,
    AuditLog,
    CatchUp,
    DirectiveAction,
    Export,
    GoodbyeReason,
    Import,
    ListJobs,
    Overlap,
    PlanAction,
    PlanFilter,
    WorkerState,
)
from jobd.model.events import EventView, QueuePause
from jobd.model.fields import Metadata, doc
from jobd.model.job import BackoffOptions, Job
from jobd.model.problems import Problem
from jobd.model.times import duration, utc

# Fields that several responses have.
JobIdText = Annotated[str, doc("Id of the job.")]
QueueText = Annotated[str, doc("Name of the queue.")]
KindText = Annotated[str, doc("Kind of the job; selects the handler.")]
StatusText = Annotated[str, doc("Status of the job.")]
WorkerText = Annotated[str, doc("Name of the worker.")]
MessageText = Annotated[str, doc("A human-readable message.")]
FencingToken = Annotated[
    int,
    doc(
        "Rises with every grant of this store and stays below 2^53. A resource can reject requests with a lower token."
    ),
]
LockSecret = Annotated[str, doc("Secret of the grant. The worker sends it with every call about the job.")]
LockExpiresAt = Annotated[int, doc("When the lock expires unless it is renewed, in Unix ms.")]
TtlMs = Annotated[int, doc("How long the lock lasts after each progress report, in ms.")]
ProgressDueAt = Annotated[int | None, doc("When the progress timeout ends the lock, in Unix ms. Null: no timeout.")]
ProgressPercent = Annotated[int | float, doc("Progress in percent, 0 to 100.")]
ResultUrl = Annotated[str | None, doc("Where the result can be downloaded, as the worker gave it.")]
ResultPath = Annotated[str | None, doc("Where the result is stored, as the worker gave it.")]
ResultKey = Annotated[str | None, doc("Key of the artifact: relative, without a `..` segment.")]
NextCursor = Annotated[str | None, doc("Cursor of the next page. Null on the last page.")]
PausedAt = Annotated[int | None, doc("When the queue was paused, in Unix ms, or null.")]
PausedBy = Annotated[str | None, doc("The operator who paused the queue, as in `by` of events, or null.")]
PauseReason = Annotated[str | None, doc("Why the queue is paused, or null.")]
PausedUntil = Annotated[int | None, doc("When the daemon resumes the queue, in Unix ms, or null.")]
IsPaused = Annotated[bool, doc("Whether the queue is paused.")]
ReasonText = Annotated[str | None, doc("Reason given by the operator, or null.")]
Timestamp = Annotated[int, doc("Time of the response, in Unix ms.")]
DiskPath = Annotated[str | None, doc("Path of the store. Null for an in-memory store.")]
FreeBytes = Annotated[
    int | None, doc("Space on the disk of the store that is available to the daemon. Null for an in-memory store.")
]
TotalBytes = Annotated[int | None, doc("Size of the disk of the store. Null for an in-memory store.")]
CleanupRunning = Annotated[bool, doc("Whether a cleanup run is in progress.")]
SinceCleanup = Annotated[int | None, doc("Time since the last successful cleanup run, in ms, or null.")]


class LockView(Struct, frozen=True, gc=False, repr_omit_defaults=True):
    """A live lock. Only operators see the `lock_id`."""

    worker: WorkerText
    fencing_token: FencingToken
    acquired_at: Annotated[int, doc("When the lock was granted, in Unix ms.")]
    expires_at: LockExpiresAt
    lock_id: LockSecret | UnsetType = UNSET


def public_lock(lock: LockView | None) -> LockView | None:
    """Return `lock` without its secret."""
    return None if lock is None else msgspec.structs.replace(lock, lock_id=UNSET)


class JobView(Struct, gc=False):
    """A job.

    `worker` is present only while the lock has expired (`lock` is null) and that worker may still end the job.
    """

    # `payload` is read from disk before the response is sent.

    id: JobIdText
    queue: QueueText
    kind: KindText
    payload: Annotated[Raw | UnsetType, doc("The payload as sent by the creator.")]
    priority: Annotated[int, doc("Priority. Jobs with smaller values run first.")]
    status: StatusText
    progress: ProgressPercent
    progress_message: Annotated[str | None, doc("The latest message of the worker.")]
    attempt: Annotated[int, doc("Attempts used, including the running one.")]
    max_attempts: Annotated[int, doc("Maximum number of attempts.")]
    backoff: Annotated[BackoffOptions, doc("Wait between a failed attempt and the next one.")]
    stalls: Annotated[int, doc("Number of times the job has stalled.")]
    max_stalls: Annotated[int, doc("A job that stalls more often fails.")]
    on_stall: Annotated[str, doc("What happens to the job when it stalls.")]
    stall_after_ms: Annotated[
        int, doc("A job without a live lock is stalled this long after its latest report, in ms.")
    ]
    progress_timeout_ms: Annotated[
        int,
        doc(
            "Progress timeout, in ms: without a progress report, the lock ends after this time even if "
            "it is extended. 0: no timeout."
        ),
    ]
    created_at: Annotated[int, doc("When the job was created, in Unix ms.")]
    updated_at: Annotated[int, doc("When the job last changed, in Unix ms.")]
    run_at: Annotated[int, doc("When the job is due, in Unix ms.")]
    started_at: Annotated[int | None, doc("When the job was last granted, in Unix ms.")]
    finished_at: Annotated[int | None, doc("When the job finished, in Unix ms.")]
    expires_at: Annotated[
        int | None, doc("When a finished job is deleted, or a job that is still queued fails, in Unix ms.")
    ]
    lock: Annotated[LockView | None, doc("The lock, or null.")]
    download_url: ResultUrl
    file_path: ResultPath
    storage_key: ResultKey
    metadata: Metadata
    error_message: Annotated[str | None, doc("A human-readable error message.")]
    error_code: Annotated[str | None, doc("A code for the failure, as the worker gave it.")]
    worker: Annotated[str | UnsetType, doc("The worker whose lock has expired and that may still end the job.")] = UNSET
    repeated: Annotated[bool | UnsetType, doc("True if an earlier request with the same content ended the job.")] = (
        UNSET
    )
    version: Annotated[
        str | UnsetType, doc("In GET /jobs/{id} of the admin API: changes with all but progress reports.")
    ] = UNSET
    schedule_id: Annotated[str | UnsetType, doc("The schedule that created the job, if one did.")] = UNSET
    scheduled_at: Annotated[int | UnsetType, doc("The time of the schedule that the job is for, in Unix ms.")] = UNSET
    headers: Annotated[dict[str, str] | UnsetType, doc("The headers of the job, if it has any.")] = UNSET
    checkpoint: Annotated[Raw | UnsetType, doc("The latest checkpoint, if there is one.")] = UNSET
    copied_from: Annotated[str | UnsetType, doc("The job of which this one is a copy.")] = UNSET

    def __repr__(self) -> str:
        """Show payload and metadata decoded, and leave out what the response does not have."""
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        shown = (f"{name}={_decoded(value)!r}" for name, value in fields if value is not UNSET)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def payload_value(self) -> Any:
        """The payload as Python values. Raises msgspec.DecodeError for a value that Python cannot hold (1e999)."""
        return None if self.payload is UNSET else msgspec.json.decode(self.payload)

    @property
    def checkpoint_value(self) -> Any:
        """The checkpoint as Python values, None if there is none."""
        return None if self.checkpoint is UNSET else msgspec.json.decode(self.checkpoint)

    @property
    def metadata_value(self) -> Any:
        """The metadata of the job's result as Python values, None if there is none."""
        return None if self.metadata is None else msgspec.json.decode(self.metadata)


def _decoded(value: Any) -> Any:
    """Decode JSON text. Text that Python cannot hold, and any other value, is returned as it is."""
    if not isinstance(value, Raw):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return bytes(value)


class JobPage(Struct):
    """A page of jobs."""

    jobs: Annotated[list[JobView], doc("The jobs.")]
    next_cursor: NextCursor
    looked_to_at: Annotated[
        int | None,
        doc(
            "Creation time of the last job that was read (with a finished `status`, its end), in Unix ms, "
            "if the page ended early. Null if it is full or the last page."
        ),
    ] = None


class ExportPage(Struct):
    """A page of jobs, oldest first, in the form that an import takes. Options that the creator did not set are null."""

    jobs: Annotated[list[Import], doc("The jobs.")]
    next_cursor: NextCursor


class JobEnd(Struct, gc=False):
    """The status of a job. It is null if the job does not exist."""

    id: JobIdText
    status: Annotated[str | None, doc("The status, null if the job does not exist.")]
    error_message: Annotated[str | None, doc("A human-readable error message.")] = None


class JobEnds(Struct, gc=False):
    """The statuses of jobs, and whether all that exist are finished."""

    jobs: Annotated[list[JobEnd], doc("The jobs in the order of the request.")]
    finished: Annotated[bool, doc("Whether no job is queued or processing.")]


class OutputEnd(Struct):
    """How much output a grant has sent."""

    end: Annotated[int, doc("Bytes of UTF-8 that the grant has sent so far.")]


class GrantOutput(Struct):
    """The output of a grant that is kept. Text before `offset` was removed or not asked for."""

    attempt: Annotated[int, doc("The attempt of the grant.")]
    worker: Annotated[str, doc("The worker that held the job.")]
    fencing_token: Annotated[int, doc("The fencing token of the grant.")]
    begins_at: Annotated[int, doc("When the first output came, in Unix ms.")]
    offset: Annotated[int, doc("Bytes of UTF-8 before `text`.")]
    end: Annotated[int, doc("Bytes of UTF-8 up to the end of `text`.")]
    text: Annotated[str, doc("What the job printed. It may contain control characters.")]


class OutputView(Struct):
    """What a job printed."""

    id: JobIdText
    status: StatusText
    finished: Annotated[bool, doc("Whether the job is finished, so that no more text comes.")]
    position: Annotated[str, doc("The end of the output. As `after` of the next request it gives only later text.")]
    grants: Annotated[list[GrantOutput], doc("The output of the latest grants, oldest first.")]


class OutputGrant(Struct):
    """The grant that output belongs to. `created_at` tells apart jobs that had the same id."""

    created_at: int
    attempt: int
    worker: str
    fencing_token: int


class JobList(Struct):
    """A list of jobs."""

    jobs: Annotated[list[JobView], doc("The jobs.")]


class TimelineView(Struct):
    """The events of a job."""

    events: Annotated[list[EventView], doc("The events, oldest first.")]


class ErrorView(Struct, frozen=True):
    """The error that an action would return."""

    error: Annotated[str, doc("The error code.")]
    message: MessageText


class LateResultView(Struct, frozen=True):
    """A result that was submitted after the lock of its grant was lost."""

    seq: Annotated[int, doc("Position of its event in the event log. Identifies the late result.")]
    at: Annotated[int, doc("When it was submitted, in Unix ms.")]
    worker: WorkerText
    fencing_token: FencingToken
    download_url: ResultUrl
    file_path: ResultPath
    storage_key: ResultKey
    metadata: Metadata
    expires_at: Annotated[int | None, doc("Deletion time that the worker requested, in Unix ms, or null.")]
    rejection: Annotated[
        ErrorView | None,
        doc(
            "The error with which the current configuration rejects its adoption, whatever the status of "
            "the job, or null."
        ),
    ] = None


class LateResultList(Struct):
    """The late results of a job."""

    late_results: Annotated[list[LateResultView], doc("The late results, oldest grant first.")]


class GrantView(Struct, gc=False):
    """A grant: a job and the lock under which the worker holds it."""

    job: Annotated[JobView, doc("The job.")]
    lock_id: LockSecret
    fencing_token: FencingToken
    lock_expires_at: LockExpiresAt
    ttl_ms: TtlMs
    progress_due_at: ProgressDueAt


class DirectiveView(Struct, frozen=True, gc=False):
    """What a worker should do: take no new jobs (`quiet`), take jobs again (`resume`) or end (`stop`)."""

    action: Annotated[DirectiveAction, doc("`quiet`, `resume` or `stop`.")]
    by: Annotated[str, doc("Who gave it, as in `by` of events.")]
    reason: Annotated[str | None, doc("Why, or null.")] = None
    rule: Annotated[
        str | UnsetType,
        doc("The quiet rule that the daemon applies. The worker need not keep it and claims as before."),
    ] = UNSET


class Grants(Struct, gc=False):
    """The grants of a claim."""

    grants: Annotated[list[GrantView], doc("One grant for each job. Empty if no job is due.")]
    directive: Annotated[DirectiveView | UnsetType, doc("What an operator wants of the worker.")] = UNSET


class LockState(Struct, gc=False, repr_omit_defaults=True):
    """The lock after a progress report or an extension."""

    lock_expires_at: LockExpiresAt
    ttl_ms: TtlMs
    progress_due_at: ProgressDueAt
    cancel_requested: Annotated[bool, doc("Whether the worker should stop working on the job.")] = False
    extended: Annotated[bool | UnsetType, doc("Only in responses to an extension. False if it changed nothing.")] = (
        UNSET
    )


class NextEvent(Struct, frozen=True):
    """What happens to a job next without an action of a worker or an operator."""

    what: Annotated[str, doc("What will happen.")]
    at: Annotated[int | None, doc("When, in Unix ms. Null if it depends on a worker or on a full disk.")]
    rule: Annotated[str, doc("The rule by which it happens.")]
    latest_at: Annotated[
        int | None,
        doc("The latest time. Null if `at` is null, while the clock is suspect, and on a full disk."),
    ] = None


class WhyView(Struct, frozen=True):
    """Why a job is in its state, and what happens next."""

    state: Annotated[str, doc("The state of the job.")]
    because: Annotated[
        str,
        doc(
            "The reason, in words. For a finished job, it says how the job ended, if the timeline still has that event."
        ),
    ]
    next: Annotated[NextEvent | None, doc("What happens next without an action, or null.")]
    blocked_by: Annotated[str | None, doc("What prevents the job from running, or null.")]
    do: Annotated[list[str], doc("What an operator can do about it.")]
    schedule_id: Annotated[str | UnsetType, doc("The schedule that created the job, if one did.")] = UNSET
    problem: Annotated[Problem | UnsetType, doc("The most urgent open problem of the job, if there is one.")] = UNSET


class KindWhy(Struct, frozen=True):
    """Why the due jobs of a kind wait."""

    kind: KindText
    due: Annotated[int, doc("How many jobs of the kind are due.")]
    job_id: Annotated[str, doc("The job that has been due longest.")]
    why: Annotated[WhyView, doc("Why this job waits, and what happens next.")]


class QueueWhyView(Struct, frozen=True):
    """Why the due jobs of a queue wait."""

    queue: QueueText
    because: Annotated[str, doc("The state of the queue, in words.")]
    kinds: Annotated[list[KindWhy], doc("Up to 100 kinds with due jobs, the one that has waited longest first.")]
    problems: Annotated[list[Problem], doc("Open problems of the queue that none of `kinds` names.")] = []


class Issue(Struct, frozen=True):
    """An issue in the record of a job."""

    type: Annotated[Literal["warning", "error", "critical"], doc("How serious it is.")]
    field: Annotated[str, doc("The affected field.")]
    message: MessageText
    fix: Annotated[str, doc("How to fix it.")]


class Validation(Struct, frozen=True, rename="camel"):
    """The issues in the record of a job."""

    is_valid: Annotated[bool, doc("Whether there are no issues.")]
    issues: Annotated[list[Issue], doc("The issues.")]
    can_proceed: Annotated[bool, doc("False if an issue is critical.")]


class QueueView(Struct, frozen=True):
    """A queue: its jobs by status, and its pause."""

    name: QueueText
    paused: IsPaused
    queued: Annotated[int, doc("Number of queued jobs.")]
    processing: Annotated[int, doc("Number of processing jobs.")]
    completed: Annotated[int, doc("Number of completed jobs.")]
    failed: Annotated[int, doc("Number of failed jobs.")]
    cancelled: Annotated[int, doc("Number of cancelled jobs.")]
    oldest_due_at: Annotated[int | None, doc("When the oldest due job became due, in Unix ms, or null.")]
    paused_at: PausedAt = None
    paused_by: PausedBy = None
    pause_reason: PauseReason = None
    paused_until: PausedUntil = None

    @property
    def pause(self) -> QueuePause:
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)


class QueueList(Struct):
    """A page of queues."""

    queues: Annotated[list[QueueView], doc("The queues, by name or the busiest first.")]
    next_cursor: NextCursor = None


class ScheduleView(Struct, frozen=True, kw_only=True):
    """A schedule: its timing, what its jobs get, and what it did."""

    id: Annotated[str, doc("Id of the schedule.")]
    cron: Annotated[str | None, doc("The cron expression, or null.")]
    every_ms: Annotated[int | None, doc("The interval, in ms, or null.")]
    offset_ms: Annotated[int, doc("Time added to the multiples of `every_ms`, in ms.")]
    timezone: Annotated[str, doc("Time zone of `cron`.")]
    explanation: Annotated[str, doc("The timing in words.")] = ""
    job: Annotated[dict[str, Any], doc("The fields of each job, as given.")]
    overlap: Annotated[Overlap, doc("What happens at a time while the last job of the schedule is unfinished.")]
    catch_up: Annotated[CatchUp, doc("Which of the missed times fire.")]
    jitter_ms: Annotated[int, doc("Up to this time is added to `run_at`.")]
    source: Annotated[str | None, doc("The program or file that maintains the schedule. Null: an operator.")]
    paused: Annotated[bool, doc("Whether the schedule is paused.")]
    paused_at: Annotated[int | None, doc("When it was paused, in Unix ms, or null.")] = None
    paused_by: Annotated[str | None, doc("Its author, as in `by` of events, or null.")] = None
    pause_reason: Annotated[str | None, doc("Why it is paused, or null.")] = None
    paused_until: Annotated[int | None, doc("When the daemon resumes it, in Unix ms, or null.")] = None
    created_at: Annotated[int, doc("When it was created, in Unix ms.")]
    updated_at: Annotated[int, doc("When it was last changed by a request, in Unix ms.")]
    next_at: Annotated[int | None, doc("When it fires next, in Unix ms. Null while it is paused.")] = None
    next_times: Annotated[list[int], doc("The next five times, in Unix ms. Empty while it is paused.")] = []
    last_fired_at: Annotated[int | None, doc("The latest time that fired, in Unix ms, or null.")]
    last_job_id: Annotated[str | None, doc("The latest job, or null.")]
    last_status: Annotated[str | None, doc("Status of the latest job. Null if it was deleted.")]
    skipped: Annotated[int, doc("Number of times that were skipped.")]
    missed: Annotated[int, doc("Number of times that nothing could fire, and that were not made up.")]
    last_skip: Annotated[SkipView | None, doc("The latest time that was skipped, and why, or null.")]

    @property
    def pause(self) -> QueuePause:
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)


class SkipView(Struct, frozen=True):
    """A time at which a schedule created no job."""

    scheduled_at: Annotated[int, doc("The time, in Unix ms.")]
    reason: Annotated[str, doc("Why.")]


class ScheduleList(Struct):
    """A page of schedules."""

    schedules: Annotated[list[ScheduleView], doc("The schedules, by id.")]
    next_cursor: NextCursor = None


class LostJobView(Struct, frozen=True):
    """A job that was taken back from a worker."""

    id: JobIdText
    progress: Annotated[float, doc("Its progress, in percent.")]
    at: Annotated[int, doc("When it was taken back, in Unix ms.")]


class WorkerView(Struct, frozen=True):
    """A worker: its state, its latest claim and the jobs that it holds."""

    worker: WorkerText
    state: Annotated[
        WorkerState,
        doc(
            "`silent` (it holds a job whose lock has expired), `busy`, `waiting` (for a job), `idle`, `died` (its last "
            "job was taken back from it, and it was not heard since) or `gone`."
        ),
    ]
    jobs: Annotated[list[str], doc("Ids of the first jobs that the worker holds.")]
    held: Annotated[int, doc("How many jobs the worker holds.")]
    expired: Annotated[int, doc("How many of the jobs have an expired lock.")]
    queues: Annotated[list[str] | None, doc("Queues of the latest claim. Null if none is known.")]
    kinds: Annotated[list[str] | None, doc("Kinds of the latest claim. Null: all kinds.")]
    waiting: Annotated[bool, doc("Whether a claim of the worker waits for a job now.")]
    about: Annotated[About | None, doc("The worker's description of itself, or null.")]
    last_seen_at: Annotated[
        int, doc("When the worker was last seen, in Unix ms. The current time while one of its claims waits.")
    ]
    goodbye: Annotated[GoodbyeReason | None, doc("Why the worker ended, if it said so.")] = None
    lost: Annotated[LostJobView | None, doc("The job that was taken back from a worker that died.")] = None
    quiet: Annotated[bool, doc("Whether the worker gets no jobs: by a directive or by a quiet rule.")] = False
    directive: Annotated[DirectiveAction | None, doc("The directive for its next claim, or null.")] = None


class WorkerGroup(Struct, frozen=True):
    """The workers of one version on one host. Null: they did not say."""

    host: Annotated[str | None, doc("The `host` of their `about`.")]
    version: Annotated[str | None, doc("The `version` of their `about`.")]
    by_state: Annotated[dict[WorkerState, int], doc("Number of workers in each state.")]
    quiet: Annotated[int, doc("How many of them get no jobs.")] = 0


class GoodbyeView(Struct, frozen=True):
    """The state of a worker after its goodbye."""

    worker: WorkerText
    state: Annotated[WorkerState, doc("`busy` if it holds a job.")]


class WorkerList(Struct):
    """A page of workers, most recently seen first."""

    workers: Annotated[list[WorkerView], doc("The workers.")]
    next_cursor: NextCursor
    by_state: Annotated[dict[WorkerState, int], doc("Number of workers in each state, over all pages.")]
    groups: Annotated[list[WorkerGroup], doc("The same by host and version: the 100 largest groups, over all pages.")]
    since: Annotated[int, doc("Start of the daemon, in Unix ms. Workers last seen before it are unknown.")]


class LockedJob(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """A current grant. Read-only callers do not see the `lock_id`."""

    id: JobIdText
    queue: QueueText
    kind: KindText
    worker: WorkerText
    lock_id: LockSecret | UnsetType = UNSET
    fencing_token: FencingToken
    acquired_at: Annotated[int, doc("When the lock was granted, in Unix ms.")]
    expires_at: LockExpiresAt
    live: Annotated[bool, doc("False if the lock has expired.")]
    progress_due_at: ProgressDueAt
    stalled_at: Annotated[int, doc("When the job is stalled if the worker sends no report, in Unix ms.")]
    progress: ProgressPercent


class LockList(Struct):
    """The current grants."""

    locks: Annotated[list[LockedJob], doc("The grants, oldest first.")]
    next_cursor: NextCursor = None


class OldestProcessing(Struct, frozen=True):
    """The job that has been processing longest."""

    id: JobIdText
    age: Annotated[float, doc("Seconds since it was granted.")]
    progress: ProgressPercent


class OldestDue(Struct, frozen=True):
    """The job that has been due longest. `due_at` is in Unix ms, `paused` describes the pause of its queue."""

    id: str
    queue: str
    due_at: int
    paused: str | None = None


class DiskView(Struct, frozen=True, rename="camel"):
    """The disk of the store."""

    path: Annotated[str, doc("Path of the store.")]
    free_bytes: Annotated[int, doc("Space on the disk of the store that is available to the daemon.")]
    total_bytes: Annotated[int, doc("Size of the disk of the store.")]


class StatsView(Struct, frozen=True, rename="camel"):
    """Counts of jobs and locks. Some times are in seconds, because existing dashboards expect seconds."""

    total_jobs: Annotated[int, doc("Number of jobs.")]
    by_status: Annotated[dict[str, int], doc("Number of jobs by status.")]
    stuck_jobs: Annotated[int, doc("Jobs that are stalled now.")]
    locked_jobs: Annotated[int, doc("Jobs with a live lock.")]
    average_processing_time: Annotated[
        float,
        doc(
            "Average time since the latest grant, in seconds: up to the end for jobs completed in the last "
            "hour, up to now for jobs that are processing. 0 without such jobs."
        ),
    ]
    oldest_processing_job: Annotated[OldestProcessing | None, doc("The job that has been processing longest, or null.")]
    stuck_jobs_recovered: Annotated[int, doc("Stalled jobs that were recovered.")]
    timestamp: Timestamp
    cleanup_running: CleanupRunning = False
    time_since_last_cleanup: SinceCleanup = None
    disk: Annotated[DiskView | None, doc("The disk of the store. Null for an in-memory store.")] = None
    store: Annotated[str, doc("Path of the store, or `in memory: lost when the daemon stops`.")] = ""


class TransitionView(Struct, frozen=True, rename="camel"):
    """The result of force-fail, force-reset, retry and transition."""

    job_id: JobIdText
    previous_status: Annotated[str, doc("The status before.")]
    status: StatusText
    reason: ReasonText
    timestamp: Timestamp


class AdminLockView(Struct, frozen=True, rename="camel"):
    """The result of extend-lock and release-lock. `lock` is null once the job is back in its queue."""

    job_id: JobIdText
    status: StatusText
    lock: Annotated[LockView | None, doc("The lock, or null.")]
    lock_expires_at: Annotated[int | None, doc("When the lock expires, in Unix ms, or null.")]
    progress_due_at: ProgressDueAt
    extended: Annotated[bool, doc("False if the extension changed nothing.")]
    timestamp: Timestamp


class Recovery(Struct, frozen=True, rename="camel"):
    """What recovery did to one job."""

    job_id: JobIdText
    action: Annotated[Literal["reset", "failed"], doc("What was done to the job, or would be done.")]
    reason: Annotated[str, doc("Why, in words.")]


class Recovered(Struct, frozen=True):
    """The result of Recover. `more`: stalled jobs or expired locks are left for the next slice."""

    details: list[Recovery]
    locks_cleared: int
    more: bool


class TakeBackView(Struct, frozen=True, rename="camel"):
    """The grants that a take-back ended, or would end."""

    worker: WorkerText
    recovered_jobs: Annotated[int, doc("How many stalled jobs were recovered.")]
    reset_jobs: Annotated[int, doc("How many of them returned to their queue.")]
    failed_jobs: Annotated[int, doc("How many of them failed.")]
    details: Annotated[list[Recovery], doc("What was done to each job.")]
    more: Annotated[bool, doc("Whether there are more jobs than `details` shows.")]
    timestamp: Timestamp


class MaintenanceResult(Struct, frozen=True):
    """The result of Expire, DeleteExpired and RepairJobs: how many jobs changed, and what was found."""

    done: int
    found: int = 0
    issues: list[tuple[str, Issue]] = []
    more: bool = False


class DirectedView(Struct, frozen=True):
    """A directive to a worker."""

    worker: WorkerText
    action: Annotated[DirectiveAction, doc("`quiet`, `resume` or `stop`.")]
    state: Annotated[WorkerState, doc("The state of the worker.")]
    is_sent: Annotated[
        bool, doc("Whether a waiting claim was answered with it or shows that it is obeyed. Else the next is.")
    ]


class QuietRuleView(Struct, frozen=True):
    """A quiet rule: which workers get no jobs, and why."""

    id: Annotated[str, doc("Id of the rule.")]
    host: Annotated[str | None, doc("Only workers of this host, or null.")]
    version: Annotated[str | None, doc("Only workers of this version, or null.")]
    queue: Annotated[str | None, doc("Only for jobs of this queue, or null.")]
    reason: Annotated[str, doc("Why.")]
    by: Annotated[str, doc("The operator, as in `by` of events.")]
    at: Annotated[int, doc("Since when, in Unix ms.")]
    until: Annotated[int | None, doc("When the daemon ends it, in Unix ms, or null.")]
    workers: Annotated[int, doc("How many workers it covers now, without those that died or are gone.")] = 0

    @property
    def described(self) -> str:
        """The words after "quiet", as those of a pause."""
        return QueuePause(self.at, self.by, self.reason, self.until).describe()


class QuietRuleList(Struct, frozen=True):
    """The quiet rules."""

    rules: Annotated[list[QuietRuleView], doc("The rules, oldest first.")]


class PausedView(Struct, frozen=True):
    """The pause of a queue."""

    queue: QueueText
    paused: IsPaused
    paused_at: PausedAt = None
    paused_by: PausedBy = None
    pause_reason: PauseReason = None
    paused_until: PausedUntil = None

    @property
    def pause(self) -> QueuePause:
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)


class Imported(Struct, frozen=True):
    """The result of one line of an import. `skipped`: the job existed before.

    `status` is that of the job afterwards, None if it is not known. `room` is the number of unfinished jobs that could
    be created before.
    """

    job_id: str
    skipped: bool
    status: str | None = None
    reason: str | None = None
    room: int = 0


class RejectedLine(Struct, frozen=True):
    """A line of an import that was rejected."""

    line: Annotated[int, doc("Number of the line, from 1.")]
    id: Annotated[str | None, doc("Id of the job. Null if the line has none.")]
    reason: Annotated[str, doc("Why the line was rejected.")]


class ImportResult(Struct, rename="camel"):
    """The result of an import."""

    imported: Annotated[int, doc("How many jobs were created.")] = 0
    skipped: Annotated[int, doc("How many lines have the id of an existing job.")] = 0
    refused_count: Annotated[int, doc("How many lines were rejected.")] = 0
    refused: Annotated[list[RejectedLine], doc("The first 1000 rejected lines.")] = []


class PreviewedLine(Struct, frozen=True):
    """What an import would do with a line."""

    line: Annotated[int, doc("Number of the line, from 1.")]
    id: Annotated[str | None, doc("Id of the job. Null if the line has none.")]
    what: Annotated[Literal["create", "skip", "reject"], doc("What an import would do with the line.")]
    status: Annotated[str | None, doc("Status of the job afterwards, or null.")]
    reason: Annotated[str | None, doc("Why, or null.")]


class ImportPreview(Struct, rename="camel"):
    """What an import would do."""

    would_import: Annotated[int, doc("How many jobs would be created.")] = 0
    would_skip: Annotated[int, doc("How many lines have the id of an existing job or of an earlier line.")] = 0
    would_reject: Annotated[int, doc("How many lines would be rejected.")] = 0
    lines: Annotated[list[PreviewedLine], doc("The first 10,000 lines.")] = []
    more: Annotated[bool, doc("Whether there are more lines than are shown.")] = False
    stops_at: Annotated[int | None, doc("The line at which the import would stop early, or null.")] = None
    stop_reason: Annotated[str | None, doc("Why it would stop there, or null.")] = None


class CleanupReport(Struct, frozen=True, rename="camel"):
    """What cleanup and recovery did since the previous report, with the names that existing dashboards expect."""

    timestamp: Timestamp
    stuck_jobs_recovered: Annotated[int, doc("Stalled jobs that were recovered.")]
    expired_jobs_deleted: Annotated[int, doc("Finished jobs that were deleted by age.")]
    expired_locks_cleared: Annotated[int, doc("Expired locks that were cleared.")]
    validation_issues_fixed: Annotated[int, doc("Issues that were fixed.")]
    validation_issues_found: Annotated[int, doc("Issues that were found.")]
    total_processing_time: Annotated[int, doc("How long the run took, in ms.")]
    errors: Annotated[list[str], doc("Steps of the run that failed.")]
    forced: Annotated[bool, doc("Whether an operator requested the run.")]


class CleanupState(Struct, frozen=True, rename="camel"):
    """The state of cleanup. A run with errors is a failed run."""

    last_report: Annotated[CleanupReport | None, doc("The report of the last run, or null.")]
    cleanup_running: CleanupRunning
    time_since_last_cleanup: SinceCleanup
    failed_since_last_success: Annotated[int, doc("Number of runs with errors since the last successful one.")] = 0
    last_failure: Annotated[
        CleanupReport | None, doc("The report of the latest failed run since the last successful one, or null.")
    ] = None


class RecoverStuckView(Struct, frozen=True, rename="camel"):
    """The result of a recovery."""

    recovered_jobs: Annotated[int, doc("How many stalled jobs were recovered.")]
    reset_jobs: Annotated[int, doc("How many of them returned to their queue.")]
    failed_jobs: Annotated[int, doc("How many of them failed.")]
    details: Annotated[list[Recovery], doc("What was done to each job.")]
    timestamp: Timestamp


class ValidateJobView(Struct, frozen=True, rename="camel"):
    """A job and the issues in its record."""

    job_id: JobIdText
    job: Annotated[JobView, doc("The job.")]
    validation: Annotated[Validation, doc("The issues in its record.")]
    timestamp: Timestamp


HealthStatus = Literal["healthy", "degraded", "unhealthy"]
HealthLevel = Annotated[HealthStatus, doc("`healthy`, `degraded` or `unhealthy`.")]


class DatabaseHealth(Struct, frozen=True, rename="camel"):
    """Health of the store."""

    status: HealthLevel
    message: MessageText
    total_jobs: Annotated[int, doc("Number of jobs.")]
    path: DiskPath = None
    free_bytes: FreeBytes = None
    total_bytes: TotalBytes = None


class PartHealth(Struct, frozen=True):
    """Health of one part of the daemon."""

    status: HealthLevel
    message: MessageText


class CleanupHealth(Struct, frozen=True, rename="camel"):
    """Health of cleanup."""

    running: CleanupRunning
    time_since_last_cleanup: SinceCleanup
    message: MessageText


class HealthView(Struct, frozen=True, rename="camel"):
    """Health of the daemon, measured at most 5 s ago."""

    status: Annotated[HealthStatus, doc("The worst of all parts.")]
    database: Annotated[DatabaseHealth, doc("The store.")]
    cache: Annotated[PartHealth, doc("The state in memory.")]
    storage: Annotated[PartHealth, doc("The artifact store.")]
    cleanup_status: Annotated[CleanupHealth, doc("The cleanup runs.")]
    timestamp: Annotated[int, doc("When it was measured, in Unix ms.")]
    journal: Annotated[PartHealth | UnsetType, doc("The journal of a cluster.")] = UNSET
    problems: Annotated[int | UnsetType, doc("How many problems are open. Missing: not known yet.")] = UNSET
    critical_problems: Annotated[int | UnsetType, doc("How many of them are critical.")] = UNSET


AlertSeverity = Literal["critical", "warning", "notice"]


class AlertView(Struct, frozen=True):
    """An alert: it fires while its condition holds for any subject. GET `/problems` names them."""

    name: Annotated[str, doc("Name of the alert.")]
    firing: Annotated[bool, doc("Whether it fires now.")]
    since: Annotated[int | None, doc("When it began to fire, in Unix ms, or null.")]
    value: Annotated[float, doc("The worst measured value; 0 while it does not fire.")]
    threshold: Annotated[float, doc("The value from which it fires.")]
    hint: Annotated[str, doc("The worst problem and what to do while it fires; otherwise the normal state.")]
    severity: Annotated[AlertSeverity, doc("How urgent it is: `critical`, `warning` or `notice`.")] = "warning"


class AlertList(Struct):
    """All alerts, firing or not."""

    alerts: Annotated[list[AlertView], doc("The alerts.")]


class WebhookView(Struct, frozen=True):
    """A webhook and the state of its deliveries. Counters start at 0 with the daemon."""

    name: Annotated[str, doc("Name of the webhook.")]
    url: Annotated[str, doc("Scheme and host of its URL. Parts that may be secret are left out.")]
    events: Annotated[list[str], doc("The types of its events.")]
    queues: Annotated[list[str], doc("Only events of these queues. Empty: all queues.")]
    state: Annotated[
        Literal["starting", "closed", "open", "half_open"],
        doc(
            "State of its circuit breaker: `closed` is normal, `open` sends nothing, `half_open` sends one "
            "delivery as a trial."
        ),
    ]
    failing_since: Annotated[int | None, doc("Since when every attempt has failed, in Unix ms, or null.")]
    next_try_at: Annotated[
        int | None, doc("When the next attempt is possible, in Unix ms. Null: now, or no delivery waits for a retry.")
    ]
    position: Annotated[int, doc("The newest event that was read for it.")]
    lag: Annotated[int, doc("How many events have not been read for it yet.")]
    waiting: Annotated[int, doc("How many deliveries are waiting.")]
    delivered: Annotated[int, doc("How many deliveries succeeded.")]
    failed: Annotated[int, doc("How many attempts failed.")]
    dead_lettered: Annotated[int, doc("How many deliveries were dead-lettered.")]
    last_success_at: Annotated[int | None, doc("When a delivery last succeeded, in Unix ms, or null.")]
    last_error: Annotated[str | None, doc("The error of the last attempt that failed, or null.")]
    last_error_at: Annotated[int | None, doc("When that attempt failed, in Unix ms, or null.")]


class WebhookList(Struct):
    """The configured webhooks."""

    webhooks: Annotated[list[WebhookView], doc("The webhooks.")]


DeliveryState = Literal["waiting", "delivered", "dead-lettered"]


class DeliveryView(Struct, frozen=True):
    """A delivery: one message to one webhook."""

    id: Annotated[int, doc("Number of the delivery.")]
    state: Annotated[DeliveryState, doc("`waiting`, `delivered` or `dead-lettered`.")]
    type: Annotated[str, doc("Type of the message.")]
    subject: Annotated[str, doc("What it is about: `jobs/ID`, `queues/NAME`, `problems/ID`.")]
    event_id: Annotated[str, doc("Id of the message: its header `webhook-id`.")]
    seq: Annotated[int | None, doc("Position of the event in the event log. Null if it is not an event.")]
    at: Annotated[int, doc("When the delivery was created, in Unix ms.")]
    due_at: Annotated[int | None, doc("When the next attempt is due, in Unix ms. Null once it has ended.")]
    tries: Annotated[int, doc("Number of attempts so far.")]
    ended_at: Annotated[int | None, doc("When it was delivered or dead-lettered, in Unix ms, or null.")]
    status: Annotated[int | None, doc("HTTP status of the last response, or null.")]
    error: Annotated[str | None, doc("What was wrong with the last attempt, or null.")]


class DeliveryPage(Struct):
    """A page of deliveries, newest first."""

    deliveries: Annotated[list[DeliveryView], doc("The deliveries.")]
    next_cursor: NextCursor


class Resent(Struct):
    """The result of retrying dead-lettered deliveries."""

    resent: Annotated[int, doc("How many dead-lettered deliveries are queued again.")]


class ReportList(Struct):
    """Reports of cleanup runs."""

    reports: Annotated[list[CleanupReport], doc("The reports, newest first.")]


class ClockView(Struct, frozen=True):
    """The clock of the daemon. While it is suspect, `message` says why and what to do."""

    now: Annotated[int, doc("Wall time of the daemon, in Unix ms.")]
    suspect: Annotated[
        bool, doc("Whether the clock has jumped ahead. While it is suspect, nothing is deleted or failed by age.")
    ]
    message: MessageText


class QuarantinedJob(Struct, frozen=True):
    """A damaged job in quarantine."""

    id: JobIdText
    reason: Annotated[str, doc("The damage.")]


class QuarantineList(Struct):
    """The damaged jobs in quarantine."""

    jobs: Annotated[list[QuarantinedJob], doc("The jobs.")]


class ProcessStats(Struct, frozen=True):
    """Measurements of the process, and the job that has been due longest.

    `commit_p99_s`: 99 % of the commits in the last minutes took at most this long. None without commits.
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
    """An audit entry: a change or a rejected request of an operator."""

    seq: Annotated[int, doc("Position in the audit log.")]
    at: Annotated[int, doc("When, in Unix ms.")]
    who: Annotated[str, doc("Name of the operator; `admin` if none was given.")]
    address: Annotated[str, doc("Where the request came from.")]
    what: Annotated[str, doc("The action, such as `force-fail`.")]
    job_id: Annotated[str | None, doc("The job, or null.")]
    queue: Annotated[str | None, doc("The queue, or null.")]
    reason: ReasonText
    outcome: Annotated[str, doc("`done` or an error code.")]
    changed: Annotated[int, doc("How many jobs were changed.")]
    details: Annotated[dict[str, Any], doc("Machine-readable details.")]


class AuditPage(Struct):
    """A page of audit entries, newest first."""

    entries: Annotated[list[AuditView], doc("The entries.")]
    next_cursor: NextCursor


class PlannedJob(Struct, frozen=True, gc=False, rename={"from_": "from"}):
    """A job that a plan would change."""

    id: JobIdText
    from_: Annotated[str, doc("The status when the plan was made.")]
    to: Annotated[str | None, doc("The status afterwards. Null for a deletion.")]
    late_results: Annotated[int, doc("How many of its late results were not adopted. 0 for a completed job.")] = 0


class SkippedJob(Struct, frozen=True, gc=False):
    """A job that a plan skips."""

    id: JobIdText
    status: Annotated[str | None, doc("Status of the job. Null if the job does not exist.")]
    why: Annotated[str, doc("Why the job is skipped.")]


class ChangedJob(Struct, frozen=True, gc=False, rename={"from_": "from"}):
    """A job of a plan that the plan did not change."""

    id: JobIdText
    from_: Annotated[str, doc("The status when the plan was made.")]
    now: Annotated[str | None, doc("The current status. Null if the job was deleted.")]
    why: Annotated[str, doc("Why the job was not changed.")]


class PlanTrial(Struct, frozen=True):
    """The first job of a plan that begins with a trial."""

    job_id: JobIdText
    state: Annotated[Literal["waiting", "completed", "failed"], doc("Whether its first attempt has ended, and how.")]


class PlanOutcome(Struct, frozen=True):
    """How the jobs of an applied plan have ended since, as long as the plan is kept."""

    completed: Annotated[int, doc("How many were completed.")]
    failed: Annotated[int, doc("How many failed again.")]
    cancelled: Annotated[int, doc("How many were cancelled.")]
    waiting: Annotated[int, doc("How many are queued or processing.")]

    def __str__(self) -> str:
        """Return `118 completed, 6 failed again, 83 wait`."""
        cancelled = f", {self.cancelled:,} cancelled" if self.cancelled else ""
        return f"{self.completed:,} completed, {self.failed:,} failed again{cancelled}, {self.waiting:,} wait"


class PlannedAge(Struct, frozen=True):
    """Jobs of a plan that ended, or were created if they are unfinished, within a time without a gap of 6 h."""

    since: Annotated[int, doc("The earliest of them, in Unix ms.")]
    until: Annotated[int, doc("The latest of them, in Unix ms.")]
    jobs: Annotated[int, doc("How many.")]


class PlanResult(Struct, frozen=True):
    """The result of a plan."""

    plan_id: Annotated[str, doc("Id of the plan.")]
    action: Annotated[str, doc("The action of the plan.")]
    applied: Annotated[int, doc("How many jobs the plan changed.")]
    changed: Annotated[list[ChangedJob], doc("The jobs that had changed since the plan was made.")]
    rejected: Annotated[list[ChangedJob], doc("The jobs that a rule rejected.")]
    applied_at: Annotated[int, doc("When the last job was changed, in Unix ms.")]
    repeated: Annotated[
        bool, doc("Whether the plan had been applied before, so that this request changed nothing.")
    ] = False
    left: Annotated[int, doc("How many jobs were not tried, because the trial has not completed.")] = 0
    trial: Annotated[PlanTrial | None, doc("The trial. While it is `waiting`, the other jobs are `left`.")] = None
    due_until: Annotated[int | None, doc("When the last job is due, in Unix ms, if there is a rate.")] = None


class DamagedRow(Struct, frozen=True):
    """A row whose checksum is wrong, or that cannot be read."""

    where: Annotated[str, doc("The row.")]
    what: Annotated[str, doc("The damage.")]


class CheckedRows(Struct, frozen=True):
    """Rows whose checksums were checked."""

    table: Annotated[str, doc("The table of the rows.")]
    checked: Annotated[int, doc("How many rows were checked.")]
    damaged: Annotated[list[DamagedRow], doc("The damaged rows.")]
    next_cursor: NextCursor


class StoredKind(Struct, frozen=True):
    """About how much the jobs of a queue and kind take in the database, from a sample. Sizes are in bytes."""

    queue: Annotated[str, doc("Name of the queue.")]
    kind: Annotated[str, doc("The kind of the jobs; empty for jobs without one.")]
    jobs: Annotated[int, doc("About how many jobs there are.")]
    bytes: Annotated[int, doc("What these jobs take: the sum of the four sizes below.")]
    records: Annotated[int, doc("Their records without results.")]
    payloads: Annotated[int, doc("Their payloads.")]
    results: Annotated[int, doc("Their results.")]
    events: Annotated[int, doc("Their timelines.")]

    @property
    def name(self) -> str:
        """The queue and the kind, if there is one: `reports / monthly`."""
        return f"{self.queue} / {self.kind}" if self.kind else self.queue

    @property
    def main_part(self) -> tuple[str, int]:
        """The largest of the four sizes: its name, and the size."""
        parts = ("records", "payloads", "results", "events")
        return max(((part, int(getattr(self, part))) for part in parts), key=lambda part: part[1])


class DiskUse(Struct, frozen=True, kw_only=True):
    """What the disk of the store holds. Sizes are in bytes, and null if the store is in memory."""

    path: Annotated[str, doc("Path of the store.")]
    total_bytes: Annotated[int | None, doc("Size of the disk.")] = None
    free_bytes: Annotated[int | None, doc("Space that is available to the daemon.")] = None
    not_jobd_bytes: Annotated[
        int | None, doc("Used by other files than those of the store. Artifacts and backups are among them.")
    ] = None
    database_bytes: Annotated[int, doc("Pages of the database that are in use.")]
    free_page_bytes: Annotated[int, doc("Pages of the database that are free and used again.")]
    journal_bytes: Annotated[int, doc("Part of `database_bytes`: records that the tables lack.")]
    wal_bytes: Annotated[int, doc("The write-ahead log.")] = 0
    side_bytes: Annotated[int, doc("Other files whose names begin with that of the store, such as its reserve.")] = 0
    kinds: Annotated[list[StoredKind], doc("What the jobs of each queue and kind take, the largest 100.")]
    more_kinds: Annotated[int, doc("How many further queues and kinds the sample contains.")] = 0
    other_bytes: Annotated[
        int, doc("The rest of `database_bytes`: indexes, stored responses, the audit log, events of deleted jobs.")
    ]
    jobs_read: Annotated[int, doc("How many jobs the sample contains.")]
    measured_at: Annotated[int, doc("When it was measured, in Unix ms.")]


BackupState = Literal["waiting", "copying", "checking", "sending", "sent", "failed"]


class BackupView(Struct, frozen=True):
    """An online backup."""

    id: Annotated[str, doc("Id of the backup, as its caller gave it.")]
    state: Annotated[BackupState, doc("State of the backup.")]
    bytes_done: Annotated[int, doc("How many bytes are copied, or sent.")]
    bytes_total: Annotated[int | None, doc("How many bytes there are in total. Null until known.")]
    quiet_ms: Annotated[int, doc("Time since the last progress, in ms.")]
    started_at: Annotated[int, doc("When the backup began, in Unix ms.")]
    ended_at: Annotated[int | None, doc("When it was sent or failed, in Unix ms, or null.")]
    message: Annotated[str | None, doc("Why it failed, or null.")]


class BackupList(Struct, frozen=True):
    """The online backups in progress and the last ones that ended."""

    backups: Annotated[list[BackupView], doc("The backups, newest first.")]


class PlanView(Struct, frozen=True):
    """A plan: what an action would do to many jobs.

    `more`: the plan was full, or its time limit passed, before all jobs were read. The next plan continues at
    `next_cursor`; if that is null, create the plan again after applying this one.
    """

    plan_id: Annotated[str, doc("Id of the plan.")]
    action: Annotated[PlanAction, doc("What is done to each job.")]
    reason: ReasonText
    filter: Annotated[
        PlanFilter | None, doc("The filter of the plan. Null for a plan by ids, for `recover-stuck` and for `cleanup`.")
    ]
    scope: Annotated[str | None, doc("Which jobs the plan contains, in words. Null for a plan by ids.")]
    count: Annotated[int, doc("How many jobs the plan would change.")]
    jobs: Annotated[list[PlannedJob], doc("The jobs that the plan would change.")]
    skipped: Annotated[list[SkippedJob], doc("The first 1000 jobs that are skipped.")]
    skipped_count: Annotated[int, doc("How many jobs are skipped.")]
    more: Annotated[bool, doc("Whether the plan may not cover all jobs.")]
    next_cursor: Annotated[str | None, doc("Cursor of the next plan, or null.")]
    made_at: Annotated[int, doc("When the plan was made, in Unix ms.")]
    expires_at: Annotated[int, doc("When the plan is removed, in Unix ms.")]
    result: Annotated[PlanResult | None, doc("The result. Null until the plan is applied.")] = None
    with_late_results: Annotated[int, doc("How many of the jobs have late results that were not adopted.")] = 0
    ages: Annotated[list[PlannedAge], doc("How old the jobs are: the latest first, at most 10.")] = []
    trial: Annotated[PlanTrial | None, doc("The trial, if the plan begins with one.")] = None
    outcome: Annotated[PlanOutcome | None, doc("How its jobs have ended since, for a retry or force-reset.")] = None

    @property
    def aged(self) -> str:
        """The ages in words: `500 since 2026-12-02 02:58:00 UTC, 60 older than 26 h`. Empty for one job."""
        if not self.ages or self.count < 2:
            return ""
        latest, *older = self.ages
        text = f"{latest.jobs:,} since {utc(latest.since)}"
        if older:
            text += f", {sum(age.jobs for age in older):,} older than {duration(self.made_at - older[0].until)}"
        return text


def late_results_note(action: str, late: Sequence[int]) -> str | None:
    """Return a warning about late results for a caller of `action`; None if there are none.

    `late` has the number of late results of each job.
    """
    jobs, results = sum(count > 0 for count in late), sum(late)
    if not jobs:
        return None
    has = "It has" if len(late) == 1 else "1 of these jobs has" if jobs == 1 else f"{jobs} of these jobs have"
    is_one = results == 1
    counted = "1 late result that was not adopted" if is_one else f"{results} late results that were not adopted"
    if action == "delete":
        return (
            f"{has} {counted}. {'It is' if is_one else 'They are'} deleted with the {'job' if jobs == 1 else 'jobs'}."
        )
    return f"{has} {counted}. Check whether {'it' if is_one else 'they'} can be adopted instead."


def plan_late_results_note(action: str, jobs: Sequence[PlannedJob]) -> str | None:
    """Return late_results_note for the jobs of a plan. Of a cleanup, only deletions affect late results."""
    if action == "cleanup":
        action, jobs = "delete", [job for job in jobs if job.to is None]
    return late_results_note(action, [job.late_results for job in jobs])


class PlanSlice(Struct):
    """The result of ApplyPlan: the number of changed jobs, and the jobs that were not changed."""

    applied: int
    changed: list[ChangedJob]
    rejected: list[ChangedJob]


class PreviewResult(Struct, frozen=True):
    """The result of Preview. `more`: not everything was read."""

    details: list[Recovery]
    locks: int
    expired: list[str]
    more: bool


class PreviewView(Struct, frozen=True, rename="camel"):
    """What recovery and a cleanup run would do now: the first jobs of each kind."""

    recover: Annotated[list[Recovery], doc("Stalled jobs that would be recovered.")]
    expired_locks: Annotated[int, doc("Number of expired locks that would be cleared.")]
    expired_jobs: Annotated[list[str], doc("Queued jobs past their `expires_at` that would fail.")]
    deleted_jobs: Annotated[list[str], doc("Finished jobs that would be deleted by age.")]
    mended_jobs: Annotated[list[str], doc("Jobs with validation issues that would be fixed or reported.")]
    more: Annotated[bool, doc("Whether there are more jobs than are shown.")]
    timestamp: Timestamp
    held_jobs: Annotated[
        list[str], doc("Finished jobs past their retention that are kept while the clock is suspect.")
    ] = []
    more_held: Annotated[bool, doc("Whether `heldJobs` does not show all of them.")] = False
    more_mended: Annotated[bool, doc("Whether `mendedJobs` may be incomplete: the time limit ended the search.")] = (
        False
    )


class FailureGroup(Struct, frozen=True):
    """Jobs with the same error, apart from numbers, quoted texts, paths and ids."""

    fingerprint: Annotated[
        str,
        doc(
            "Identifies the error. Errors that differ only in numbers, quoted texts, URLs, paths or the "
            "id of the job, or in their traceback, have the same fingerprint."
        ),
    ]
    message: Annotated[str, doc("The error message of the latest job.")]
    error_code: Annotated[str | None, doc("The error code, or null.")]
    count: Annotated[int, doc("Number of failed jobs.")]
    older_than_day: Annotated[
        int, doc("How many of `count` ended over a day ago, by whole hours: a job counts after 24 to 25 h.")
    ]
    retrying: Annotated[int, doc("Number of queued jobs that wait for a retry after this error.")]
    kinds: Annotated[list[str], doc("Kinds of the jobs.")]
    queues: Annotated[list[str], doc("Queues of the jobs.")]
    first_at: Annotated[int, doc("When the first job failed, in Unix ms. Not reset while the group is empty.")]
    last_at: Annotated[int, doc("When the latest job failed, in Unix ms.")]
    job_ids: Annotated[list[str], doc("Ids of some of the latest jobs.")]


class FailuresView(Struct, frozen=True):
    """Failed and retrying jobs, grouped by error."""

    groups: Annotated[list[FailureGroup], doc("The groups, the largest first.")]
    total: Annotated[int, doc("Number of failed jobs.")]
    retrying: Annotated[int, doc("Number of queued jobs that wait for a retry after an error.")]
    other: Annotated[int, doc("Number of failed jobs that are in none of these groups.")]
    other_retrying: Annotated[int, doc("Number of retrying jobs that are in none of these groups.")]
    whole: Annotated[bool, doc("False until the jobs from before the start of the daemon are counted.")]


NodeRole = Literal["leader", "standby", "single"]
UNSEEN_MS: Final = 10_000  # a node describes itself every 2 s, and reads what the others wrote as often
READY_MS: Final = 10_000  # a standby that is behind by less takes over within seconds


class NodeView(Struct, frozen=True):
    """A node of a cluster, as it last described itself."""

    name: Annotated[str, doc("Its name, `node.name`.")]
    url: Annotated[str, doc("Its address for clients, `node.advertise`.")]
    role: Annotated[NodeRole, doc("`leader` or `standby`.")]
    seen_ms: Annotated[int, doc("Time since it last described itself, in ms.")]
    record: Annotated[int, doc("The last record of the journal that its tables have.")]
    lag_records: Annotated[int, doc("Number of records that its tables lack.")]
    format: Annotated[int, doc("The highest format of a record that it reads.")]
    config_differs: Annotated[bool, doc("Whether its configuration differs from that of the leader.")]
    ahead_ms: Annotated[
        int, doc("By how much its wall clock is ahead of that of PostgreSQL, in ms; negative if behind.")
    ] = 0
    behind_ms: Annotated[int, doc("Time since the responding node had a record that it lacks, in ms.")] = 0
    schema_version: Annotated[int, doc("The schema version of its tables; 0 if it did not say.")] = 0

    @property
    def is_unseen(self) -> bool:
        """Whether its process has probably ended."""
        return self.seen_ms >= UNSEEN_MS

    @property
    def is_ready(self) -> bool:
        """Whether it can take over: it is a standby that runs and follows."""
        return self.role == "standby" and not self.is_unseen and self.behind_ms < READY_MS


class ClusterView(Struct, frozen=True, kw_only=True):
    """The cluster, as the node that responds sees it. A daemon with a journal of its own is `single`."""

    role: Annotated[NodeRole, doc("Role of the node that responds.")]
    node: Annotated[str | None, doc("Its name.")] = None
    journal: Annotated[str | None, doc("Name of the journal.")] = None
    leader: Annotated[str | None, doc("URL of the leader, or null if this node knows of none.")] = None
    epoch: Annotated[int | None, doc("The epoch of the leader.")] = None
    record: Annotated[int | None, doc("Number of the last record of the journal.")] = None
    lag_events: Annotated[int, doc("Number of events that the node has not applied.")] = 0
    lease_ms: Annotated[int | None, doc("Duration of the lease, in ms.")] = None
    synchronous: Annotated[
        bool | None, doc("Whether a record is on two machines before it is acknowledged; null if unknown.")
    ] = None
    require_sync: Annotated[bool, doc("Whether it must be: `journal.require_sync`.")] = False
    waits_for_sync: Annotated[bool, doc("Whether a write waits for a synchronous standby of PostgreSQL.")] = False
    oldest_transaction_ms: Annotated[
        int | None, doc("Age of the oldest transaction in the database, in ms; null if unknown.")
    ] = None
    writable: Annotated[
        list[str],
        doc("Hosts of `journal.url` that accept writes, the one in use first: more than one if a former primary runs."),
    ] = []
    problems: Annotated[list[str], doc("What is wrong, in words.")] = []
    nodes: Annotated[list[NodeView], doc("The nodes, by name.")] = []


class EmptyResponse(Struct, frozen=True):
    """A success without data."""


class HistoryRead(Struct, frozen=True):
    """A read of history that the actor leaves to the storage.

    `timeline` is the seq of a job whose events are read (only the latest `events`, if set), `late` that of a job whose
    late results are read. `page`, `export` and `audit` are pages. `ended` is a finished job whose ending is read.
    """

    timeline: int | None = None
    events: int | None = None
    ended: Job | None = None
    late: int | None = None
    page: ListJobs | None = None
    export: Export | None = None
    audit: AuditLog | None = None


class Response(Struct, gc=False):
    """A success.

    `unread_payloads` has the job views that lack bodies, each with the key of one (model/job.py). `grants` has (job
    id, lock id) of each grant in the response, so that the grants of an undelivered response can be released. With
    `read`, the data comes from the storage; `scanned` is an upper bound of the number of jobs read for a page.
    `large_bytes` is the size of the large payloads and of the metadata that it shows.
    """

    data: Any
    status: int = 200
    unread_payloads: list[tuple[int, JobView]] = []
    grants: list[tuple[str, str]] = []
    read: HistoryRead | None = None
    scanned: int = 0
    replayed: bool = False  # a stored idempotent response
    large_bytes: int = 0
