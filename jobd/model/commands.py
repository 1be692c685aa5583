"""Commands: the typed requests of both APIs and the internal requests to the actor.

A command class declares everything about its command: the bounds and descriptions of its fields, its admission class,
the name of its audit entries, its error codes, and the statuses that allow it. The first paragraph of its docstring is
the summary of the call in the OpenAPI document.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from msgspec import UNSET, Raw, Struct, UnsetType, defstruct, field, structs

from jobd.model.clocks import LockMs
from jobd.model.fields import (
    MAX_PAGE,
    PRINTABLE,
    AdditionalMs,
    AnyJson,
    Checkpoint,
    Count,
    Cursor,
    DelayMs,
    DownloadUrl,
    DryRun,
    DueAt,
    ErrorFilter,
    ErrorMessage,
    ExpiresInMs,
    FailureCode,
    FilePath,
    FinishedSince,
    FinishedUntil,
    GrantProgressTimeoutMs,
    GrantStallAfterMs,
    Headers,
    JobCursor,
    JobId,
    Kind,
    KindFilter,
    LockId,
    LockTtlMs,
    MaxAttempts,
    MaxStalls,
    Metadata,
    MomentMs,
    NamedJobId,
    NewJobId,
    NewQueueName,
    OperatorName,
    PageLimit,
    Payload,
    Percent,
    PlanCursor,
    Priority,
    ProgressTimeoutMs,
    QueueFilter,
    QueueName,
    Reason,
    ScheduleId,
    ScheduleSource,
    SearchText,
    Since,
    StallAfterMs,
    StatusFilter,
    StorageKey,
    Text,
    UnixMs,
    Until,
    WorkerCursor,
    WorkerFilter,
    WorkerName,
    doc,
)
from jobd.model.job import DAY_MS, HOUR_MS, SECOND_MS, STATUSES, YEAR_MS, BackoffOptions, OnStall, Status

MAX_CLAIM: Final = 100
MAX_NAMES: Final = 100  # queues or kinds of one claim
MAX_WAIT_MS: Final = 60_000
MAX_WAITED: Final = 1_000  # jobs of one wait
MAX_EVENTS: Final = 1_000  # of a timeline with a limit
ADOPT_WEIGHT: Final = 20  # its late results are read with their metadata

# The admission class of a command (engine/envelope.py, engine/disk_full.py). As the mailbox fills up, `create` is
# rejected first, then `read` and `grant`. A full disk first rejects `create`, then everything but `ending`, `read` and
# `ping`. `ending` commands free space or store the result of work that was done.
Overlap = Literal["skip", "allow"]
CatchUp = Literal["latest", "none"]

Admission = Literal["create", "read", "ping", "grant", "change", "ending"]


class Command(Struct, frozen=True, gc=False, forbid_unknown_fields=True, kw_only=True):
    """A request to the actor. Decoded directly from a body; unknown fields are rejected."""

    admission: ClassVar[Admission]  # of commands that reach the actor
    audit_name: ClassVar[str | None] = None  # `what` of its audit entries; None: no entries
    errors: ClassVar[tuple[str, ...]] = ()  # in addition to those that every call can return
    is_of_job: ClassVar[bool] = False  # a JobCommand; isinstance() is slow for a struct of another class
    is_of_holder: ClassVar[bool] = False  # it names a grant of its job
    dry_run: ClassVar[bool] = False  # the response shows the effect, but nothing is changed
    can_wait: ClassVar[bool] = False  # the response may wait for a job
    needs_payload: ClassVar[bool] = False  # the decision needs the payload or the request hash of its jobs
    stores_job: ClassVar[bool] = False  # a stored response shows its job with payload and metadata

    def sender(self) -> str | None:
        """Return the worker that sends the command, in the form of `Event.by`, if the command names it."""
        return None

    def job_ids(self) -> list[str]:
        """Return the ids of the jobs that the rule finds by id."""
        return []

    def deleted_ids(self) -> list[str]:
        """Return the ids of the jobs that the command may delete without naming them alone."""
        return []

    def weight(self) -> int:
        """Return how much the command counts in a batch, by what it writes, so that a batch takes a few ms."""
        return 1


# ---------------------------------------------------------------------------------------------------------------------
# Commands of workers and of programs that create jobs.


class NewJobFields(Command, frozen=True, kw_only=True):
    """The fields of a new job, created or imported."""

    admission = "create"

    id: Annotated[NewJobId | None, doc("Id of the job. Default: a new UUIDv7.")] = None
    queue: NewQueueName = "default"
    kind: Kind = ""
    payload: Payload = Raw(b"null")
    priority: Priority = 0
    max_attempts: MaxAttempts = 1
    backoff: Annotated[BackoffOptions, doc("Wait between a failed attempt and the next one.")] = BackoffOptions()
    max_stalls: MaxStalls | None = None
    on_stall: Annotated[OnStall | None, doc("What happens to the job when it stalls.")] = None
    stall_after_ms: StallAfterMs | None = None
    progress_timeout_ms: ProgressTimeoutMs | None = None
    run_at: DueAt | None = None
    # A field without a value is not part of the hash of a request, so the hashes on disk do not change.
    headers: Headers | UnsetType = UNSET


class Create(NewJobFields, frozen=True, kw_only=True):
    """Create a job. Repeating the request returns the same job.

    An `id` that exists with other fields is rejected; `details.differs_in` names the fields that certainly differ.
    """

    errors = ("job_exists", "job_quarantined", "too_many_jobs", "too_many_queues", "upgrade_incomplete")
    needs_payload = True

    delay_ms: Annotated[DelayMs | None, doc("Time from now until the job is due, in ms.")] = None
    expires_at: Annotated[UnixMs | None, doc("If the job is still queued at this time (Unix ms), it fails.")] = None
    expires_in_ms: Annotated[ExpiresInMs | UnsetType, doc("Time from now until `expires_at`, in ms.")] = UNSET

    def job_ids(self) -> list[str]:
        return [] if self.id is None else [self.id]


class Bulk(Command, frozen=True, kw_only=True):
    """Create up to `limits.bulk` jobs in the given order, all or none."""

    admission = "create"
    errors = Create.errors
    needs_payload = True

    jobs: Annotated[list[Create], doc("The jobs to create.", min_length=1)]

    def job_ids(self) -> list[str]:
        return [job.id for job in self.jobs if job.id is not None]

    def weight(self) -> int:
        return len(self.jobs)


class Read(Command, frozen=True):
    """A command that changes nothing."""

    admission = "read"


class JobCommand(Command, frozen=True):
    """A command on one job. Over HTTP the path gives its id.

    The class of an operator's action also declares `allowed_from`, the statuses that allow it, and `leads_to`, the
    status afterwards: None if it does not change. `plan_scope` says which jobs a plan of the action contains.
    """

    allowed_from: ClassVar[tuple[Status, ...]]
    leads_to: ClassVar[Status | Literal["deleted"] | None] = None
    plan_scope: ClassVar[str]
    is_of_job = True
    stores_job: ClassVar[bool] = True

    id: NamedJobId

    def job_ids(self) -> list[str]:
        return [self.id]


class JobRead(JobCommand, Read, frozen=True):
    """A read of one job."""


EndWaitMs = Annotated[int, doc("How long to wait for the end, in ms.", ge=0, le=MAX_WAIT_MS)]


class Get(JobRead, frozen=True, kw_only=True):
    """Get one job. With `wait_ms`, the response comes when the job is finished, or after this time."""

    can_wait = True

    wait_ms: EndWaitMs = 0


class WaitForJobs(Read, frozen=True, kw_only=True):
    """Return the statuses of jobs when all are finished, or after `wait_ms`."""

    can_wait = True

    ids: Annotated[list[NamedJobId], doc("The jobs.", min_length=1, max_length=MAX_WAITED)]
    wait_ms: EndWaitMs = 0

    def job_ids(self) -> list[str]:
        return self.ids

    def weight(self) -> int:
        return len(self.ids)


class Timeline(JobRead, frozen=True, kw_only=True):
    """List the events of a job, oldest first. With `limit`, only the latest ones."""

    limit: Annotated[int, doc("Maximum number of events.", ge=1, le=MAX_EVENTS)] | None = None


class Why(JobRead, frozen=True, kw_only=True):
    """Explain why a job is in its state and what happens next."""


class WhyQueue(Read, frozen=True):
    """Explain for each kind of a queue why the job that has been due longest waits, and what happens next."""

    name: QueueName


class Validate(JobRead, frozen=True, kw_only=True):
    """List the issues in the record of a job."""


class ListJobs(Read, frozen=True, kw_only=True):
    """List jobs, newest first. With a finished status, the latest to end is first.

    A page may be short; `looked_to_at` then says how far jobs were read. The last page has no `next_cursor`. `worker`
    matches the worker of the latest grant, which holds the job or was the last to hold it.
    """

    status: StatusFilter | None = None
    queue: QueueFilter | None = None
    kind: KindFilter | None = None
    worker: WorkerFilter | None = None
    limit: PageLimit = 50
    cursor: JobCursor | None = None


class SearchJobs(ListJobs, frozen=True, kw_only=True):
    """List jobs as GET `/v1/jobs` does, with more filters.

    A search ends after half a second, so a page may be short; `looked_to_at` then says how far jobs were read. The last
    page has no `next_cursor`. `finished_since` and `finished_until` select only finished jobs.
    """

    since: Since | None = None
    until: Until | None = None
    finished_since: FinishedSince | None = None
    finished_until: FinishedUntil | None = None
    q: SearchText | None = None
    error: ErrorFilter | None = None


_NAMED: Final = {"expected": "printable ASCII characters"}
_INSTANCE: Final = "Distinguishes the worker from others of the same name."
Instance = Annotated[str, doc(_INSTANCE, pattern=PRINTABLE, max_length=200, extra=_NAMED)]
Host = Annotated[str, doc("The machine of the worker.", pattern=PRINTABLE, max_length=253, extra=_NAMED)]
Version = Annotated[str, doc("The version of the worker.", pattern=PRINTABLE, max_length=100, extra=_NAMED)]


class About(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True, gc=False):
    """A worker's description of itself, for display only. The bounds keep it below 1 KiB."""

    instance: Instance | None = None
    host: Host | None = None
    pid: Annotated[int, doc("The process id of the worker.", ge=1, le=2**32 - 1)] | None = None
    version: Version | None = None
    concurrency: Annotated[int, doc("How many jobs the worker runs at the same time.", ge=1, le=100_000)] | None = None
    quiet: Annotated[bool, doc("Whether an operator has told the worker to take no new jobs.")] = False


class _StartByWorker(JobCommand, frozen=True):
    worker: WorkerName

    def sender(self) -> str | None:
        return f"worker:{self.worker}"


class Start(_StartByWorker, frozen=True, kw_only=True):
    """Take this job. It must be queued and due, and its queue must not be paused."""

    admission = "grant"
    errors = ("already_locked", "not_due", "queue_paused", "invalid_transition")
    stores_job = False

    lock_ttl_ms: LockTtlMs | None = None
    stall_after_ms: GrantStallAfterMs | None = None
    progress_timeout_ms: GrantProgressTimeoutMs | None = None
    about: Annotated[About | None, doc("The worker's description of itself, for display only.")] = None


class Claim(Command, frozen=True, kw_only=True):
    """Take the first due jobs, ordered by priority, due time and creation. Wait up to `wait_ms` if there are none.

    A response with a `directive` has no grants. A worker that was told to be quiet claims with `limit` 0, which grants
    nothing and waits for the next directive. One without a free place may do so with `busy`, and is not quiet.
    """

    admission = "grant"
    can_wait = True

    worker: WorkerName
    queues: Annotated[list[QueueName], doc("Only jobs of these queues.", min_length=1, max_length=MAX_NAMES)] = field(
        default_factory=["default"].copy
    )
    kinds: (
        Annotated[list[Kind], doc("Only jobs of these kinds. Default: all kinds.", min_length=1, max_length=MAX_NAMES)]
        | None
    ) = None
    limit: Annotated[int, doc("Maximum number of jobs, or 8 MiB of payloads. 0: none.", ge=0, le=MAX_CLAIM)] = 1
    wait_ms: Annotated[int, doc("How long to wait for a job, in ms.", ge=0, le=MAX_WAIT_MS)] = 0
    lock_ttl_ms: LockTtlMs | None = None
    stall_after_ms: GrantStallAfterMs | None = None
    progress_timeout_ms: GrantProgressTimeoutMs | None = None
    about: Annotated[About | None, doc("The worker's description of itself, for display only.")] = None
    busy: Annotated[bool, doc("With `limit` 0: the worker has no free place, but is not quiet.")] | UnsetType = UNSET

    @property
    def is_quiet(self) -> bool:
        return self.limit == 0 and self.busy is not True

    def sender(self) -> str | None:
        return f"worker:{self.worker}"

    def weight(self) -> int:
        return self.limit or 1


class HolderCommand(JobCommand, frozen=True, kw_only=True):
    """A command of the worker that holds the job."""

    is_of_holder: ClassVar[bool] = True

    lock_id: LockId


class Progress(HolderCommand, frozen=True, kw_only=True):
    """Report progress and renew the lock."""

    admission = "change"
    errors: ClassVar[tuple[str, ...]] = ("lock_lost", "invalid_transition", "progress_timeout", "upgrade_incomplete")

    progress: Percent
    message: Annotated[Text | None, doc("A human-readable message. Without one, the previous message is cleared.")] = (
        None
    )
    checkpoint: Checkpoint | UnsetType = UNSET


class AppendOutput(HolderCommand, frozen=True, kw_only=True):
    """Add to the output of the current grant. It does not renew the lock.

    `text` has at most 16 KiB of UTF-8. A grant may send about one request a second. Output can be lost, so an error of
    this call is no reason to fail the job.
    """

    admission = "read"
    errors = ("lock_lost", "too_frequent", "output_off", "output_unavailable")

    text: Annotated[str, doc("What the job printed.", min_length=1)]


class Extend(HolderCommand, frozen=True, kw_only=True):
    """Extend the lock. It is never shortened."""

    admission = "change"
    errors = ("lock_lost", "invalid_transition", "progress_timeout")

    additional_ms: AdditionalMs | None = None


class Complete(HolderCommand, frozen=True, kw_only=True):
    """Complete the job. `expires_at` sets when it is deleted."""

    admission = "ending"
    errors = ("lock_lost", "invalid_transition")

    download_url: DownloadUrl | None = None
    file_path: FilePath | None = None
    storage_key: StorageKey | None = None
    metadata: Metadata = None
    expires_at: Annotated[UnixMs | None, doc("When the completed job is deleted, in Unix ms.")] = None


class Fail(HolderCommand, frozen=True, kw_only=True):
    """End the attempt as failed. The job returns to its queue if attempts are left, unless `retry` is false."""

    admission = "ending"
    errors = (*Complete.errors, "upgrade_incomplete")

    error_message: ErrorMessage
    error_code: FailureCode | None = None
    retry: Annotated[bool, doc("Whether the job may be tried again.")] = True
    retry_after_ms: Annotated[DelayMs | None, doc("Time until the next attempt, in ms, instead of the backoff.")] = None
    checkpoint: Checkpoint | UnsetType = UNSET


class Release(HolderCommand, frozen=True, kw_only=True):
    """Return the job to its queue. The attempt does not count.

    From the fifth release in a row without progress, the job waits.
    """

    admission = "ending"
    errors = Complete.errors

    delay_ms: Annotated[
        DelayMs | None,
        doc(
            "Time from now until the job is due, in ms. Default: 0; from the 5th release in a row without "
            "progress on, a growing delay. A release with 1000 or more is not counted."
        ),
    ] = None


class Cancel(JobCommand, frozen=True):
    """Cancel a queued or processing job. The next call of its worker gets `lock_lost`."""

    admission = "ending"
    audit_name = "cancel"
    errors = ("invalid_transition",)
    allowed_from = ("queued", "processing")
    leads_to = "cancelled"
    plan_scope = "Only queued and processing jobs can be cancelled."

    reason: Reason | None = None


# The commands of a stream, by the `op` of their lines.
STREAMED_COMMANDS: Final[dict[str, type[Command]]] = {
    command.__name__.lower(): command
    for command in (Create, Bulk, Start, Claim, Progress, Extend, Complete, Fail, Release, Cancel, Get)
}


class Queues(Read, frozen=True, kw_only=True):
    """List the queues that have jobs or are paused, with their counts, oldest due job and pause.

    Pages are ordered by name and have up to 200 queues. With `busiest` there is one page: the queues with the most
    queued and processing jobs.
    """

    limit: PageLimit = MAX_PAGE
    cursor: Annotated[QueueName | None, doc("The `next_cursor` of the previous page.")] = None
    paused: Annotated[bool | None, doc("Only queues that are paused, or only those that are not.")] = None
    busiest: Annotated[
        bool, doc("Order by the number of queued and processing jobs instead of by name. There is no next page.")
    ] = False


WorkerState = Literal["silent", "busy", "waiting", "idle", "died", "gone"]


class Workers(Read, frozen=True, kw_only=True):
    """List workers with their state, latest claim and jobs, most recently seen first.

    Workers that died or are gone are listed only with their `state`.
    """

    limit: PageLimit = MAX_PAGE
    cursor: Annotated[WorkerCursor | None, doc("The `next_cursor` of the previous page.")] = None
    state: Annotated[
        WorkerState | None,
        doc(
            "Only workers in this state. `silent`: it holds a job whose lock has expired. `died`: its last job was "
            "taken back from it, and it was not heard since. Default: all but `died` and `gone`."
        ),
    ] = None


DirectiveAction = Literal["quiet", "resume", "stop"]

GoodbyeReason = Literal["stopped", "drained", "once", "error"]


class Goodbye(Command, frozen=True):
    """Say that a worker ends, so that it is not taken for one that is there. Changes no job.

    It is ignored if another instance of the worker was heard later. A worker that holds a job stays busy.
    """

    admission = "read"
    errors = ("worker_not_found",)

    name: WorkerName
    instance: Instance | None = None
    reason: Annotated[GoodbyeReason, doc("Why the worker ends.")] = "stopped"


# ---------------------------------------------------------------------------------------------------------------------
# Commands of operators. Names such as `jobId` are those that existing dashboards send.


class NamedJobCommand(JobCommand, frozen=True):
    """A command whose body names the job as `jobId`."""

    id: NamedJobId = field(name="jobId")


NO_REASON: Final = "Failed by an operator."  # error message of a force-fail without a reason


class ForceFail(NamedJobCommand, frozen=True):
    """Fail a queued or processing job. Its grant ends immediately. `reason` becomes `error_message`."""

    admission = "ending"
    audit_name = "force-fail"
    errors = ("invalid_transition",)
    allowed_from = ("queued", "processing")
    leads_to = "failed"
    plan_scope = "Only queued and processing jobs can be failed."

    reason: Reason | None = None


class ForceReset(NamedJobCommand, frozen=True):
    """Requeue a processing, failed or cancelled job as if it were new. A worker that holds it loses it."""

    admission = "change"
    audit_name = "force-reset"
    errors = ("invalid_transition",)
    allowed_from: ClassVar[tuple[Status, ...]] = ("processing", "failed", "cancelled")
    leads_to = "queued"
    plan_scope: ClassVar[str] = "Only processing, failed and cancelled jobs can be reset."

    reason: Reason | None = None
    run_at: DueAt | None = None


class RetryJob(ForceReset, frozen=True):
    """Requeue a failed or cancelled job as if it were new."""

    audit_name = "retry"
    allowed_from = ("failed", "cancelled")
    plan_scope = "Only failed and cancelled jobs can be retried."


class Updates(Struct, frozen=True, forbid_unknown_fields=True):
    """Fields that a transition sets in addition to the status. Omitted fields stay unchanged."""

    error_message: ErrorMessage | None = None
    priority: Priority | None = None
    run_at: DueAt | None = None
    max_attempts: MaxAttempts | None = None
    download_url: DownloadUrl | None = None
    file_path: FilePath | None = None
    storage_key: StorageKey | None = None
    metadata: Metadata = None


class Transition(NamedJobCommand, frozen=True, kw_only=True):
    """Change the status of a job from `from` to `to`, if it still is `from`. `to` cannot be `processing`.

    A job that no worker has taken may become `completed`; this is final, and `validation.require_download_url` applies.
    """

    admission = "change"
    audit_name = "transition"
    errors = ("invalid_transition",)

    from_: Annotated[Status, doc("The expected status of the job.")] = field(name="from")
    to: Annotated[Status, doc("The new status.")]
    updates: Annotated[Updates, doc("Fields to set together with the status. Omitted fields stay unchanged.")] = (
        Updates()
    )
    reason: Reason | None = None
    dry_run: DryRun = False  # type: ignore[misc]  # of the class in others


class ExtendLock(NamedJobCommand, frozen=True):
    """Extend a lock on behalf of its worker."""

    admission = "change"
    audit_name = "extend-lock"
    errors = ("lock_lost", "invalid_transition", "progress_timeout")
    allowed_from = ("processing",)

    lock_id: LockId = field(name="lockId")
    additional_ms: AdditionalMs | None = field(name="additionalTime", default=None)
    reason: Reason | None = None


class ReleaseLock(NamedJobCommand, frozen=True):
    """Return a job to its queue on behalf of its worker."""

    admission = "ending"
    audit_name = "release-lock"
    errors = ("lock_lost", "invalid_transition")
    allowed_from = ("processing",)
    leads_to = "queued"

    lock_id: LockId = field(name="lockId")
    reason: Reason | None = None


class RunNow(JobCommand, frozen=True):
    """Make a queued job due now."""

    admission = "change"
    audit_name = "run-now"
    errors = ("invalid_transition",)
    allowed_from = ("queued",)

    reason: Reason | None = None
    dry_run: DryRun = False  # type: ignore[misc]  # of the class in others


class Update(JobCommand, frozen=True, kw_only=True):
    """Change the priority, due time or maximum attempts of a job that is not completed."""

    admission = "change"
    audit_name = "update"
    errors = ("invalid_transition",)
    allowed_from = ("queued", "processing", "failed", "cancelled")

    priority: Priority | None = None
    run_at: DueAt | None = None
    max_attempts: MaxAttempts | None = None
    reason: Reason | None = None
    dry_run: DryRun = False  # type: ignore[misc]  # of the class in others


class GetVersion(JobRead, frozen=True, kw_only=True):
    """Get one job with its `version`, which an action on it can require in the header `If-Match`."""


class LateResults(JobRead, frozen=True, kw_only=True):
    """List the results that workers submitted for this job after their lock was lost, oldest grant first."""


class Adopt(JobCommand, frozen=True):
    """Complete a queued, failed or cancelled job with one of its late results, by default that of the latest grant."""

    admission = "change"
    audit_name = "adopt"
    errors = ("invalid_transition", "late_result_not_found")
    allowed_from = ("queued", "failed", "cancelled")
    leads_to = "completed"

    result: Annotated[int, doc("The `seq` of the late result. Default: that of the latest grant.", ge=1)] | None = None
    reason: Reason | None = None
    dry_run: DryRun = False  # type: ignore[misc]  # of the class in others

    def weight(self) -> int:
        return ADOPT_WEIGHT


class Copy(JobCommand, frozen=True, kw_only=True):
    """Create a job that is due now, with the options, headers and payload of another one, or with a new payload."""

    admission = "create"
    audit_name = "copy"
    errors = ("invalid_transition", "too_many_jobs", "too_many_queues", "upgrade_incomplete")
    allowed_from = STATUSES
    needs_payload = True

    payload: Annotated[AnyJson | UnsetType, doc("The payload of the new job. Default: that of the old one.")] = UNSET
    reason: Reason | None = None


class Delete(JobCommand, frozen=True):
    """Delete a finished job with its history and its artifacts."""

    admission = "ending"
    audit_name = "delete"
    errors = ("invalid_transition",)
    allowed_from = ("failed", "cancelled", "completed")
    leads_to = "deleted"
    plan_scope = "Only finished jobs can be deleted."
    needs_payload = True

    reason: Reason | None = None


class Pause(Command, frozen=True):
    """Grant no jobs of a queue until an operator resumes it, or until `until`. A pause survives a restart."""

    admission = "change"
    audit_name = "pause"

    name: QueueName
    reason: Reason | None = None
    until: Annotated[UnixMs | None, doc("When the daemon resumes the queue, in Unix ms.")] = None


class Resume(Command, frozen=True):
    """Grant the jobs of a queue again."""

    admission = "change"
    audit_name = "resume"

    name: QueueName
    reason: Reason | None = None


class TakeBack(Command, frozen=True):
    """End the expired grants of a silent worker now. The stall rule requeues or fails each job.

    Live locks do not change. With `dry_run` the grants are only listed.
    """

    admission = "ending"
    audit_name = "take-back"
    errors = ("worker_not_found", "worker_not_silent")

    name: WorkerName
    reason: Reason | None = None
    dry_run: DryRun = False  # type: ignore[misc]  # of the class in others


class DirectWorker(Command, frozen=True):
    """An instruction to the process that has a worker's name. It gets the instruction with its next claim.

    A waiting claim is answered at once. The daemon forgets it with the process: it does not survive a restart.
    """

    admission = "change"
    errors = ("worker_not_found", "worker_gone")
    action: ClassVar[DirectiveAction]

    name: WorkerName
    reason: Reason | None = None


class QuietWorker(DirectWorker, frozen=True):
    """Let a worker take no new jobs until it is resumed. Its running jobs continue.

    The process that has the name gets the directive with its next claim, a waiting one at once, and keeps it.
    """

    audit_name = "quiet"
    action = "quiet"


class ResumeWorker(DirectWorker, frozen=True):
    """Let a worker that was told to be quiet take jobs again. Quiet rules still apply to it."""

    audit_name = "resume"
    action = "resume"


class StopWorker(DirectWorker, frozen=True):
    """Let a worker end as on SIGTERM: it takes no new jobs, and its running jobs get their grace."""

    audit_name = "stop"
    action = "stop"


MAX_QUIET_RULES: Final = 100


class AddQuietRule(Command, frozen=True, kw_only=True):
    """Grant no jobs to the workers of a host, of a version or for a queue, also to those that appear later.

    A rule applies to workers that match all of its fields. It survives a restart. A rule with the same fields replaces
    reason and end of the first one. Jobs that a worker starts by id are not affected.
    """

    admission = "change"
    audit_name = "quiet"
    errors = ("too_many_quiet_rules", "upgrade_incomplete")

    host: Host | None = None
    version: Version | None = None
    queue: QueueFilter | None = None
    reason: Reason
    until: Annotated[UnixMs | None, doc("When the daemon ends the rule, in Unix ms.")] = None


class EndQuietRule(Command, frozen=True):
    """End a quiet rule: the workers that it covers get jobs again."""

    admission = "change"
    audit_name = "resume"
    errors = ("quiet_rule_not_found", "upgrade_incomplete")

    rule: Annotated[JobId, doc("The `id` of the rule.")]
    reason: Reason | None = None


class QuietRules(Read, frozen=True, kw_only=True):
    """List the quiet rules, oldest first."""


class Import(NewJobFields, frozen=True, kw_only=True):
    """Import jobs from a stream of JSON lines, one job per line.

    Each line is created, skipped (its id exists) or rejected independently. Missing times become the time of the
    import. A job that was processing is handled as stalled.
    """

    audit_name: ClassVar[str | None] = "import"
    errors: ClassVar[tuple[str, ...]] = ("too_many_jobs", "too_many_queues", "upgrade_incomplete")

    id: NewJobId
    status: Annotated[Status, doc("Status of the job.")] = "queued"
    progress: Percent | None = None
    progress_message: Annotated[Text | None, doc("The latest message of the worker.")] = None
    attempt: Annotated[Count, doc("Attempts used.")] = 0
    stalls: Annotated[Count, doc("Number of times the job has stalled.")] = 0
    created_at: Annotated[UnixMs | None, doc("When the job was created, in Unix ms.")] = None
    updated_at: Annotated[UnixMs | None, doc("When the job last changed, in Unix ms.")] = None
    started_at: Annotated[UnixMs | None, doc("When the job was last granted, in Unix ms.")] = None
    finished_at: Annotated[
        UnixMs | None, doc("When the job was finished, in Unix ms. Ignored for an unfinished job.")
    ] = None
    expires_at: Annotated[
        UnixMs | None, doc("When a finished job is deleted, or a job that is still queued fails, in Unix ms.")
    ] = None
    worker: WorkerName | None = None
    download_url: DownloadUrl | None = None
    file_path: FilePath | None = None
    storage_key: StorageKey | None = None
    metadata: Metadata = None
    error_message: Annotated[Text | None, doc("A human-readable error message.")] = None
    error_code: FailureCode | None = None
    schedule_id: ScheduleId | None = None
    scheduled_at: Annotated[UnixMs | None, doc("The time of the schedule that the job is for, in Unix ms.")] = None
    checkpoint: Checkpoint | UnsetType = UNSET
    copied_from: Annotated[JobId | UnsetType, doc("The job of which this one is a copy.")] = UNSET

    def job_ids(self) -> list[str]:
        return [self.id]


class ImportCheck(Import, frozen=True, kw_only=True):
    """Show what an import of these lines would do, line by line. Changes nothing."""

    audit_name = None
    errors = ()
    dry_run = True


class Export(Read, frozen=True, kw_only=True):
    """List jobs, oldest first, in the form that an import takes."""

    status: StatusFilter | None = None
    queue: QueueFilter | None = None
    kind: KindFilter | None = None
    limit: PageLimit = MAX_PAGE
    cursor: Cursor | None = None


class AuditLog(Read, frozen=True, kw_only=True):
    """List audit entries, newest first: changes and rejected requests of operators.

    A page may be short. The last page has no `next_cursor`.
    """

    who: Annotated[OperatorName | None, doc("Only entries of this operator.")] = None
    what: (
        Annotated[str, doc("Only entries of this action, such as `force-fail`.", min_length=1, max_length=40)] | None
    ) = None
    job_id: Annotated[JobId | None, doc("Only entries about this job, and plans that changed it.")] = None
    since: Annotated[MomentMs | None, doc("Only entries from this time on, in Unix ms.")] = None
    limit: PageLimit = 50
    cursor: Cursor | None = None


PlanAction = Literal["retry", "force-reset", "cancel", "force-fail", "delete", "recover-stuck", "cleanup"]
# The actions that cleanup runs do too, with their names in a question.
MAINTENANCE_ACTIONS: Final[dict[PlanAction, str]] = {"recover-stuck": "recover", "cleanup": "clean up"}
# The command that each of the other actions sends for a job.
PLAN_COMMANDS: Final[dict[PlanAction, type[ForceReset | Cancel | ForceFail | Delete]]] = {
    "retry": RetryJob,
    "force-reset": ForceReset,
    "cancel": Cancel,
    "force-fail": ForceFail,
    "delete": Delete,
}
MAX_PLAN: Final = 10_000  # jobs of one plan
MAX_PLANNING_S: Final = 10.0  # a plan stops reading after this time; the next plan continues


class PlanFilter(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Selects jobs by the filters of the job list."""

    status: StatusFilter | None = None
    queue: QueueFilter | None = None
    kind: KindFilter | None = None
    worker: WorkerFilter | None = None
    since: Since | None = None
    until: Until | None = None
    finished_since: FinishedSince | None = None
    finished_until: FinishedUntil | None = None
    q: SearchText | None = None
    error: ErrorFilter | None = None


class MakePlan(Command, frozen=True, kw_only=True):
    """Plan an action on many jobs: those that match a filter, or those with the given ids. Changes nothing yet.

    `cursor` is the `next_cursor` of a plan with the same action and filter; the new plan continues after it. The
    actions `recover-stuck` and `cleanup` take no `filter`, `ids` or `cursor`, because the daemon selects the jobs.
    """

    action: Annotated[PlanAction, doc("The action on each job.")]
    filter: Annotated[PlanFilter | None, doc("Only jobs that match these filters.")] = None
    cursor: Annotated[PlanCursor | None, doc("The `next_cursor` of the previous plan.")] = None
    ids: Annotated[list[JobId], doc("Only jobs with these ids.", min_length=1, max_length=MAX_PLAN)] | None = None
    reason: Reason | None = None


class PlanCommand(Command, frozen=True):
    """A call about a plan. The path gives its id."""

    errors = ("plan_not_found",)

    plan_id: Annotated[JobId, doc("Id of the plan.")]


class PlanRate(Struct, frozen=True, forbid_unknown_fields=True):
    """At most `count` jobs in `per_ms`, evenly."""

    count: Annotated[int, doc("How many jobs.", ge=1, le=1_000_000)]
    per_ms: Annotated[int, doc("In which time, in ms.", ge=SECOND_MS, le=DAY_MS)] = SECOND_MS


class RunPlan(PlanCommand, frozen=True, kw_only=True):
    """Apply a plan to every job that has not changed since. A repeated request returns the same result.

    A `retry` or `force-reset` can begin with a trial, or make the jobs due one after the other.
    """

    trial: Annotated[
        bool, doc("Begin with one job. The others follow by themselves once it completes, and not at all if it fails.")
    ] = False
    rate: Annotated[PlanRate | None, doc("How many of the jobs become due in which time. Default: all at once.")] = None


class ExpectedVersion(Struct, frozen=True, gc=False):
    """A job of a plan, with its version (core/rules/plan_rules.py) when the plan was made, and when it is to be due."""

    id: str
    version: str
    run_at: int | None = None


class ApplyPlan(Command, frozen=True, kw_only=True):
    """Apply a slice of a plan: `action` on those of `jobs` that have not changed since the plan was made.

    The events of the jobs name the `plan` and the number of its jobs, `planned`.
    """

    admission: ClassVar[Admission] = "change"

    action: PlanAction
    jobs: list[ExpectedVersion]
    plan: str = ""
    planned: int = 0
    reason: str | None = None

    def job_ids(self) -> list[str]:
        return [expected.id for expected in self.jobs]

    def deleted_ids(self) -> list[str]:
        return self.job_ids() if self.action in ("delete", "cleanup") else []

    def weight(self) -> int:
        return len(self.jobs)


class ApplyEndings(ApplyPlan, frozen=True, kw_only=True):
    """Apply a slice of a plan that ends or deletes jobs, which is allowed on a full disk."""

    admission = "ending"


class Preview(Read, frozen=True, kw_only=True):
    """Return what recovery and expiry would do now, up to `limit` jobs of each. Changes nothing."""

    dry_run = True

    limit: int


class Stats(Read, frozen=True, kw_only=True):
    """Count jobs and locks, and show the oldest processing job. `averageProcessingTime` and `age` are in seconds."""


class Locks(Read, frozen=True, kw_only=True):
    """List the current grants, oldest first: all of them, or a page."""

    limit: Annotated[int, doc("Maximum number of grants. Default: all.", ge=1, le=MAX_PAGE)] | None = None
    cursor: Cursor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Schedules.

# The fields that a schedule gives its jobs. A field without a value is left out.
ScheduledJob: Any = defstruct(
    "ScheduledJob",
    [
        (each.name, each.type | UnsetType, UNSET)
        for each in structs.fields(Create)
        if each.name not in {"id", "run_at", "delay_ms", "expires_at"}
    ],
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    namespace={"__doc__": "The fields of the jobs of a schedule."},
)


def scheduled_job_id(schedule: str, at: int) -> str:
    """Return the id of the job of a schedule for the time `at`, Unix ms."""
    return f"{schedule}:{datetime.fromtimestamp(at // SECOND_MS, UTC):%Y-%m-%dT%H:%M:%SZ}"


class ScheduleCommand(Command, frozen=True, kw_only=True):
    """A change of one schedule. Over HTTP the path gives its id."""

    errors: ClassVar[tuple[str, ...]] = ("schedule_not_found", "upgrade_incomplete")

    id: ScheduleId


class PutSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Create a schedule, or replace it. The same request again changes nothing, and resumes nothing.

    Give either `cron` or `every_ms`. A changed timing counts from now; anything else leaves the next time as it is.
    """

    admission = "create"
    audit_name = "put-schedule"
    errors = ("schedule_owned", "too_many_schedules", "upgrade_incomplete")

    cron: (
        Annotated[
            str,
            doc(
                "Five fields (minute, hour, day of month, month, day of week), or @hourly, @daily, @weekly, @monthly. "
                "If both days are restricted, a day that matches either fires.",
                min_length=1,
                max_length=200,
            ),
        ]
        | None
    ) = None
    every_ms: (
        Annotated[int, doc("Fire at the multiples of this time since 1970, in ms.", ge=SECOND_MS, le=YEAR_MS)] | None
    ) = None
    offset_ms: Annotated[int, doc("Time added to the multiples of `every_ms`, in ms.", ge=0, le=YEAR_MS)] = 0
    timezone: Annotated[str, doc("IANA name of the time zone of `cron`.", min_length=1, max_length=100)] = "UTC"
    job: Annotated[ScheduledJob, doc("The fields of each job, as in the request that creates a job.")]
    overlap: Annotated[Overlap, doc("What happens at a time while the last job of the schedule is unfinished.")] = (
        "skip"
    )
    catch_up: Annotated[
        CatchUp, doc("After a time in which nothing could fire: fire the latest missed time, or none.")
    ] = "latest"
    jitter_ms: Annotated[
        int, doc("Up to this time is added to `run_at`, the same for each time.", ge=0, le=HOUR_MS)
    ] = 0
    paused: Annotated[bool, doc("A new schedule begins paused. Later, only pause and resume change that.")] = False
    source: ScheduleSource | None = None


class GetSchedule(Read, frozen=True, kw_only=True):
    """Get one schedule, with its next times."""

    errors = ("schedule_not_found",)

    id: ScheduleId


class Schedules(Read, frozen=True, kw_only=True):
    """List the schedules by id."""

    source: Annotated[ScheduleSource, doc("Only schedules of this source.")] | None = None
    limit: PageLimit = 50
    cursor: Annotated[ScheduleId, doc("The `next_cursor` of the previous page.")] | None = None


class RunSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Create one job of a schedule now, or the job of `scheduled_at`. It works while the schedule is paused.

    The job of a time has a fixed id, so repeating the request creates nothing.
    """

    admission = "create"
    audit_name = "run-schedule"
    errors = (
        "schedule_not_found", "schedule_busy", "job_exists", "too_many_jobs", "too_many_queues", "upgrade_incomplete",
    )  # fmt: skip

    scheduled_at: Annotated[UnixMs | None, doc("A time of the schedule, in Unix ms, in full seconds.")] = None
    force: Annotated[bool, doc("Create it although the last job is unfinished and `overlap` is skip.")] = False
    reason: Reason | None = None

    def job_ids(self) -> list[str]:
        return [] if self.scheduled_at is None else [scheduled_job_id(self.id, self.scheduled_at)]


class PauseSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Fire at no time until an operator resumes the schedule, or until `until`. These times are not made up."""

    admission = "change"
    audit_name = "pause-schedule"

    reason: Reason | None = None
    until: Annotated[UnixMs | None, doc("When the daemon resumes the schedule, in Unix ms.")] = None


class ResumeSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Fire again, from now on."""

    admission = "change"
    audit_name = "resume-schedule"

    reason: Reason | None = None


class DeleteSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Delete a schedule. Its jobs stay."""

    admission = "ending"
    audit_name = "delete-schedule"

    reason: Reason | None = None


class Fire(Command, frozen=True, kw_only=True):
    """Create the job of the time `scheduled_at` of a schedule, or skip it. `missed` earlier times create none.

    With `is_missed` the time itself is missed, too. A firing that was computed for another `version` is void.
    """

    admission = "create"

    id: str
    version: int
    scheduled_at: int
    missed: int = 0
    is_missed: bool = False

    def job_ids(self) -> list[str]:
        return [scheduled_job_id(self.id, self.scheduled_at)]


# ---------------------------------------------------------------------------------------------------------------------
# Commands of the daemon itself.


class Undelivered(JobCommand, frozen=True, kw_only=True):
    """Return a job to its queue at once: the connection closed before the first byte of the grant was written."""

    admission = "ending"

    lock_id: LockId


class ExtendAfterPause(Command, frozen=True, kw_only=True):
    """Extend the deadlines of the processing jobs `ids` by `grace_ms` after a time in which the daemon did not run.

    `since` is the lock time at which the daemon runs again (None: now). A lock that was live then is not lost while
    this command waits for a slow disk.
    """

    admission = "ending"

    ids: list[str]
    grace_ms: int
    since: LockMs | None = None

    def weight(self) -> int:
        return len(self.ids)


class KeepDue(Command, frozen=True, kw_only=True):
    """Keep the live jobs due that were due before the wall clock was set back: id -> `run_at` at that time.

    A job whose `run_at` has changed since then is not affected.
    """

    admission = "ending"

    jobs: dict[str, int]

    def weight(self) -> int:
        return len(self.jobs)


class EndGrants(Command, frozen=True, kw_only=True):
    """End the grants of the processing jobs `ids` by their stall rule, after a restored backup or lost records.

    With `last`, the mark of a restored backup is removed from the store in the same transaction. `cause` is a sentence.
    """

    admission = "ending"

    ids: list[str]
    last: bool
    cause: str = "The store was restored from a backup, which ends every grant in it."

    def weight(self) -> int:
        return len(self.ids)


class Recover(Command, frozen=True, kw_only=True):
    """Recover up to `limit` stalled jobs and clear up to `limit` expired locks, judged when the command is applied.

    `reason` is the operator's, for the audit log. The timeline of each job says why it was recovered.
    """

    admission = "ending"
    audit_name = "recover-stuck"

    limit: int
    reason: str | None = None


class Expire(Command, frozen=True, kw_only=True):
    """Fail up to `limit` queued jobs whose `expires_at` has passed."""

    admission = "ending"

    limit: int


class DeleteExpired(Command, frozen=True, kw_only=True):
    """Delete the jobs in `ids` that are finished and expired when the command is applied."""

    admission = "ending"

    ids: list[str]

    def job_ids(self) -> list[str]:
        return self.ids

    def deleted_ids(self) -> list[str]:
        return self.ids


class RepairJobs(Command, frozen=True, kw_only=True):
    """Validate the jobs `ids` and apply the fixes that are safe."""

    admission = "change"

    ids: list[str]

    def job_ids(self) -> list[str]:
        return self.ids


# Operator actions that are not job commands. They are recorded with RecordAction.
RecordedAction = Literal[
    "import",
    "cleanup",
    "accept-clock",
    "step-down",
    "resend-delivery",
    "resend-dead-lettered",
    "test-webhook",
    "backup",
    "export",
    "artifact",
    "sign-in",
    "sign-out",
]


class RecordAction(Command, frozen=True, kw_only=True):
    """Record an operator action that is not a job command, or the end of a plan. Changes nothing else.

    `what` is a RecordedAction or `plan-ACTION`, `outcome` is "done" or an error code, `job_id` the job that was read.
    """

    admission = "change"

    what: str
    details: dict[str, Any] | None = None
    job_id: str | None = None
    outcome: str = "done"
    reason: str | None = None


class EndPauses(Command, frozen=True, kw_only=True):
    """Resume the queues whose pause has ended, and end the quiet rules whose time is over."""

    admission = "change"


class Tick(Command, frozen=True, kw_only=True):
    """Persist the lock time. Changes no job."""

    admission = "change"


class Ping(Command, frozen=True, kw_only=True):
    """Pass through the mailbox and change nothing."""

    admission = "ping"


class Report(Command, frozen=True, kw_only=True):
    """Store the report of a cleanup run (JSON text)."""

    admission = "change"

    body: bytes


# ---------------------------------------------------------------------------------------------------------------------
# A command with its context.


class IdempotencyKey(Struct, frozen=True):
    """An Idempotency-Key in use: `digest` of listener, method, path and key; `body_hash` of the body."""

    digest: str
    body_hash: str


class Operator(Struct, frozen=True):
    """An operator: the name given in the request ("" for none), and the address that it came from.

    `part_of` identifies an action that consists of many commands (an import, a plan) and has one audit entry.
    """

    name: str
    address: str
    part_of: str | None = None

    @property
    def who(self) -> str:
        return self.name or "admin"

    @property
    def by(self) -> str:
        """The operator in the form of `Event.by`."""
        return f"admin:{self.name}" if self.name else "admin"


class ClockStep(Struct, frozen=True, gc=False):
    """A step that made the wall clock suspect: the last time that was trusted, and the ms that the clock was ahead."""

    since: int
    ahead_ms: int


class ClockTrust(Struct, frozen=True, gc=False):
    """What is persisted about the wall clock. `step_since` and `step_ms` are those of the step while it is suspect."""

    suspect: bool = False
    expected_ms: int = 0  # the wall time that is expected; a clock that was set back is behind it
    step_since: int = 0
    step_ms: int = 0


class Moment(Struct, frozen=True, gc=False):
    """The time at which a batch is decided: wall time, lock time and their difference, in ms."""

    now: int
    lock_ms: LockMs
    offset: int  # wall time minus lock time; constant between steps of the wall clock, so displayed times are stable
    trusted: int | None = None  # the expected wall time while the clock is suspect, else None
    ahead: int = 0  # wall time minus its expected value
    step: ClockStep | None = None  # while the clock is suspect
    held: bool = False  # lock time stands still, because a full disk rejects the reports of workers

    @property
    def suspect(self) -> bool:
        """Whether wall time is too far ahead of the expected time. While it is, nothing is deleted or failed by age."""
        return self.trusted is not None

    @property
    def believed(self) -> int:
        """The wall time to persist. It ignores a suspect jump."""
        return self.now if self.trusted is None else self.trusted

    @property
    def expected(self) -> int:
        """The expected wall time, by which stored responses age: no step moves it while the daemon runs."""
        return self.now - self.ahead if self.trusted is None else self.trusted

    @property
    def latest(self) -> int:
        """The wall time from which retention and `expires_in_ms` count.

        While the clock is behind its expected value, that value: otherwise a job that finishes now would be deleted as
        soon as the clock is put right, and a new one would expire.
        """
        return self.now - min(self.ahead, 0)

    @property
    def aging(self) -> int:
        """The wall time by which deliveries of webhooks age: `believed`, or the expected time if that is later.

        So a delivery that begins while the clock is behind is not old when the clock is put right.
        """
        return max(self.believed, self.expected)

    @property
    def clock(self) -> ClockTrust:
        """What to persist about the clock."""
        if self.step is None:
            return ClockTrust(self.suspect, self.expected)
        return ClockTrust(self.suspect, self.expected, self.step.since, self.step.ahead_ms)

    def wall(self, lock_ms: LockMs) -> int:
        """Return the wall time at which lock time will be `lock_ms`."""
        return lock_ms + self.offset  # type: ignore[return-value]  # elsewhere they never mix


AnyCommand = (
    Create
    | Bulk
    | Get
    | WaitForJobs
    | Timeline
    | Why
    | WhyQueue
    | Validate
    | ListJobs
    | SearchJobs
    | Start
    | Claim
    | Progress
    | Extend
    | AppendOutput
    | Complete
    | Fail
    | Release
    | Cancel
    | Queues
    | Workers
    | ForceFail
    | ForceReset
    | RetryJob
    | Transition
    | ExtendLock
    | ReleaseLock
    | RunNow
    | Update
    | GetVersion
    | LateResults
    | Adopt
    | Copy
    | Delete
    | Pause
    | Resume
    | TakeBack
    | QuietWorker
    | ResumeWorker
    | StopWorker
    | AddQuietRule
    | EndQuietRule
    | QuietRules
    | Import
    | ImportCheck
    | Export
    | AuditLog
    | ApplyPlan
    | ApplyEndings
    | Preview
    | Stats
    | Locks
    | Goodbye
    | PutSchedule
    | GetSchedule
    | Schedules
    | RunSchedule
    | PauseSchedule
    | ResumeSchedule
    | DeleteSchedule
    | Fire
    | Undelivered
    | ExtendAfterPause
    | KeepDue
    | EndGrants
    | Recover
    | Expire
    | DeleteExpired
    | RepairJobs
    | RecordAction
    | EndPauses
    | Tick
    | Ping
    | Report
)

# Every `what` of an audit entry.
AUDITED_ACTIONS: Final = tuple(
    dict.fromkeys(
        [
            *(kind.audit_name for kind in get_args(AnyCommand) if kind.audit_name is not None),
            *get_args(RecordedAction),
            *(f"plan-{action}" for action in get_args(PlanAction)),
        ]
    )
)


class IssuedCommand(Struct):
    """A command with its caller and the randomness that it may use. `admin` callers see lock ids.

    `operator` is set for requests of operators. `expected` is the version of the job that the caller has seen
    (core/rules/plan_rules.py): if the job has changed since, the command is rejected.
    """

    command: AnyCommand
    by: str = "client"
    seed: bytes = b""
    admin: bool = False
    operator: Operator | None = None
    expected: str | None = None
