"""What may be asked, what is answered, and every refusal code with its HTTP status.

Commands are the typed bodies of both APIs. Nothing here decides: rules.py has one function per command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from jobd.events import EventView
from jobd.job import (
    AdditionalMs,
    Attempts,
    Backoff,
    Code,
    DelayMs,
    Job,
    JobId,
    Kind,
    LockId,
    LockTtlMs,
    MaxProcessingMs,
    OnStall,
    Percent,
    Place,
    Priority,
    QueueName,
    Stalls,
    Status,
    StuckAfterMs,
    Text,
    UnixMs,
    Worker,
)

if TYPE_CHECKING:
    Json = Raw | None
else:
    Json = Raw  # to msgspec `Raw | None` means null and nothing else; what is missing is None all the same

# ---------------------------------------------------------------------------------------------------------------------
# Refusals: a code with its status beside it.

REFUSALS: Final[dict[str, int]] = {
    "invalid_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "job_not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "job_exists": 409,
    "already_locked": 409,
    "not_due": 409,
    "queue_paused": 409,
    "invalid_transition": 409,
    "lock_lost": 409,
    "max_processing_time_exceeded": 409,
    "job_quarantined": 409,
    "events_gone": 410,
    "too_large": 413,
    "unsupported_media_type": 415,
    "idempotency_key_reused": 422,
    "internal_error": 500,
    "overloaded": 503,
    "shutting_down": 503,
    "outcome_unknown": 503,
    "storage_full": 507,
    "too_many_jobs": 507,
}


class Refusal(Struct, frozen=True):
    """A definite no: `code` is a key of REFUSALS, `message` a sentence that says what to do."""

    code: str
    message: str
    details: dict[str, Any] = {}

    @property
    def status(self) -> int:
        return REFUSALS[self.code]


# ---------------------------------------------------------------------------------------------------------------------
# Commands of workers and creators (SPEC 5).

MAX_BULK: Final = 1000
MAX_CLAIM: Final = 100
MAX_WAIT_MS: Final = 60_000
MAX_PAGE: Final = 200


class Command(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request to the actor, as a typed value. Decoded straight from a body; unknown fields are refused."""


class Create(Command, frozen=True, kw_only=True):
    id: JobId | None = None
    queue: QueueName = "default"
    kind: Kind = ""
    payload: Raw = Raw(b"null")
    priority: Priority = 0
    max_attempts: Attempts = 1
    backoff: Backoff = Backoff()
    max_stalls: Stalls | None = None
    on_stall: OnStall | None = None
    stuck_after_ms: StuckAfterMs | None = None
    max_processing_ms: MaxProcessingMs | None = None
    run_at: UnixMs | None = None
    delay_ms: DelayMs | None = None
    expires_at: UnixMs | None = None


class Bulk(Command, frozen=True, kw_only=True):
    jobs: Annotated[list[Create], Meta(min_length=1)]


class OnJob(Command, frozen=True, kw_only=True):
    """A command on one job; over HTTP the path gives its id."""

    id: JobId


class Get(OnJob, frozen=True, kw_only=True):
    pass


class Timeline(OnJob, frozen=True, kw_only=True):
    pass


class Why(OnJob, frozen=True, kw_only=True):
    pass


class Validate(OnJob, frozen=True, kw_only=True):
    pass


class List(Command, frozen=True, kw_only=True):
    """A page of jobs, newest first. `cursor` is the `next_cursor` of the page before."""

    status: Status | None = None
    queue: QueueName | None = None
    kind: Kind | None = None
    worker: Worker | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50
    cursor: Annotated[str, Meta(pattern=r"^[0-9]{1,18}$")] | None = None


class Start(OnJob, frozen=True, kw_only=True):
    worker: Worker
    lock_ttl_ms: LockTtlMs | None = None
    stuck_after_ms: StuckAfterMs | None = None


class Claim(Command, frozen=True, kw_only=True):
    worker: Worker
    queues: Annotated[list[QueueName], Meta(min_length=1, max_length=100)] = field(default_factory=lambda: ["default"])
    kinds: Annotated[list[Kind], Meta(min_length=1, max_length=100)] | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_CLAIM)] = 1
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 0
    lock_ttl_ms: LockTtlMs | None = None
    stuck_after_ms: StuckAfterMs | None = None


class Progress(OnJob, frozen=True, kw_only=True):
    lock_id: LockId
    progress: Percent
    message: Text | None = None


class Extend(OnJob, frozen=True, kw_only=True):
    lock_id: LockId
    additional_ms: AdditionalMs | None = None


class Complete(OnJob, frozen=True, kw_only=True):
    lock_id: LockId
    download_url: Place | None = None
    file_path: Place | None = None
    storage_key: Place | None = None
    metadata: Json = None
    expires_at: UnixMs | None = None


class Fail(OnJob, frozen=True, kw_only=True):
    lock_id: LockId
    error_message: Annotated[str, Meta(min_length=1, max_length=4096)]
    error_code: Code | None = None
    retry: bool = True
    retry_after_ms: DelayMs | None = None


class Release(OnJob, frozen=True, kw_only=True):
    lock_id: LockId
    delay_ms: DelayMs | None = None


class Cancel(OnJob, frozen=True, kw_only=True):
    reason: Text | None = None


class Queues(Command, frozen=True, kw_only=True):
    pass


class Workers(Command, frozen=True, kw_only=True):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# Commands of operators (SPEC 6). `jobId` and its like are the names that existing dashboards send.


class OnJobNamed(OnJob, frozen=True, kw_only=True):
    """A command whose body names the job as `jobId`."""

    id: JobId = field(name="jobId")


class ForceFail(OnJobNamed, frozen=True, kw_only=True):
    reason: Text | None = None


class ForceReset(OnJobNamed, frozen=True, kw_only=True):
    reason: Text | None = None


class Updates(Struct, frozen=True, forbid_unknown_fields=True):
    """What a transition may set beside the status."""

    error_message: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    priority: Priority | None = None
    run_at: UnixMs | None = None
    max_attempts: Attempts | None = None
    download_url: Place | None = None
    file_path: Place | None = None
    storage_key: Place | None = None
    metadata: Json = None


class Transition(OnJobNamed, frozen=True, kw_only=True):
    from_: Status = field(name="from")
    to: Status
    updates: Updates = Updates()
    reason: Text | None = None


class ExtendLock(OnJobNamed, frozen=True, kw_only=True):
    lock_id: LockId = field(name="lockId")
    additional_ms: AdditionalMs | None = field(name="additionalTime", default=None)


class ReleaseLock(OnJobNamed, frozen=True, kw_only=True):
    lock_id: LockId = field(name="lockId")


class RunNow(OnJob, frozen=True, kw_only=True):
    pass


class Update(OnJob, frozen=True, kw_only=True):
    priority: Priority | None = None
    run_at: UnixMs | None = None
    max_attempts: Attempts | None = None


class Delete(OnJob, frozen=True, kw_only=True):
    pass


class Pause(Command, frozen=True, kw_only=True):
    name: QueueName


class Resume(Command, frozen=True, kw_only=True):
    name: QueueName


class Import(Command, frozen=True, kw_only=True):
    """A job of any status, with its own times, moved in from elsewhere. Missing times become the time of import."""

    id: JobId
    queue: QueueName = "default"
    kind: Kind = ""
    payload: Raw = Raw(b"null")
    priority: Priority = 0
    status: Status = "queued"
    progress: Percent | None = None
    progress_message: Text | None = None
    attempt: Annotated[int, Meta(ge=0, le=1000)] = 0
    max_attempts: Attempts = 1
    backoff: Backoff = Backoff()
    stalls: Stalls = 0
    max_stalls: Stalls | None = None
    on_stall: OnStall | None = None
    stuck_after_ms: StuckAfterMs | None = None
    max_processing_ms: MaxProcessingMs | None = None
    created_at: UnixMs | None = None
    updated_at: UnixMs | None = None
    run_at: UnixMs | None = None
    started_at: UnixMs | None = None
    finished_at: UnixMs | None = None
    expires_at: UnixMs | None = None
    worker: Worker | None = None
    download_url: Place | None = None
    file_path: Place | None = None
    storage_key: Place | None = None
    metadata: Json = None
    error_message: Text | None = None
    error_code: Code | None = None


class Stats(Command, frozen=True, kw_only=True):
    pass


class Locks(Command, frozen=True, kw_only=True):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# Commands of the daemon's own parts: time, doors, probes.


class Undelivered(OnJob, frozen=True, kw_only=True):
    """The connection closed before the first byte of the grant was written: the job goes back at once."""

    lock_id: LockId


class CreditAbsence(Command, frozen=True, kw_only=True):
    """The daemon was away: for those of `ids` that are processing, nothing ends in the next `grace_ms`."""

    ids: list[str]
    grace_ms: int


class EndGrants(Command, frozen=True, kw_only=True):
    """A backup was put back: end the grants of those of `ids` that are processing by their stall rule.

    With the `last` of them the store's mark as a backup goes, in the same transaction.
    """

    ids: list[str]
    last: bool


class Recover(Command, frozen=True, kw_only=True):
    """Recover up to `limit` stuck jobs and clear up to `limit` expired locks. Judged when it is applied."""

    limit: int


class Expire(Command, frozen=True, kw_only=True):
    """Fail up to `limit` queued jobs whose `expires_at` has passed."""

    limit: int


class DeleteExpired(Command, frozen=True, kw_only=True):
    """Delete those of `ids` that are finished and expired when the command is applied."""

    ids: list[str]


class Mend(Command, frozen=True, kw_only=True):
    """Validate the jobs `ids` and apply the safe fixes."""

    ids: list[str]


class Tick(Command, frozen=True, kw_only=True):
    """Persist lease time; changes no job."""


class Ping(Command, frozen=True, kw_only=True):
    """A round trip through the mailbox; changes nothing."""


class Report(Command, frozen=True, kw_only=True):
    """Keep the report of a cleanup pass (JSON text)."""

    body: bytes


# ---------------------------------------------------------------------------------------------------------------------
# Answers. Their fields are the names of the wire.


class LockView(Struct, frozen=True):
    worker: str
    fencing_token: int
    acquired_at: int
    expires_at: int
    lock_id: str | UnsetType = UNSET  # admins only


class JobView(Struct):
    """A job as everybody sees it. `payload` is filled in from the disk before the answer leaves."""

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
    repeated: bool | UnsetType = UNSET


class JobPage(Struct):
    jobs: list[JobView]
    next_cursor: str | None


class JobList(Struct):
    jobs: list[JobView]


class TimelineView(Struct):
    events: list[EventView]


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


class Next(Struct, frozen=True):
    """The next thing that will happen to a job by itself."""

    what: str
    at: int
    rule: str


class WhyView(Struct, frozen=True):
    state: str
    because: str
    next: Next | None
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


class QueueList(Struct):
    queues: list[QueueView]


class WorkerView(Struct, frozen=True):
    worker: str
    jobs: list[str]
    last_seen_at: int


class WorkerList(Struct):
    workers: list[WorkerView]


class LockedJob(Struct, frozen=True):
    """A current grant, for operators. `stuck_at` is when the job will count as stuck if nothing is heard."""

    id: str
    queue: str
    kind: str
    worker: str
    lock_id: str
    fencing_token: int
    acquired_at: int
    expires_at: int
    live: bool
    ceiling_at: int | None
    stuck_at: int
    progress: int | float


class LockList(Struct):
    locks: list[LockedJob]


class OldestProcessing(Struct, frozen=True):
    id: str
    age: float
    progress: int | float


class StatsView(Struct, frozen=True, rename="camel"):
    """Times in seconds where a dashboard expects them so (SPEC 6); `time_since_last_cleanup` in ms."""

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


class Forced(Struct, frozen=True, rename="camel"):
    """The answer to force-fail, force-reset and transition."""

    job_id: str
    previous_status: str
    status: str
    reason: str | None
    timestamp: int


class AdminLock(Struct, frozen=True, rename="camel"):
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


class Worked(Struct, frozen=True):
    """The answer to Expire, DeleteExpired and Mend: how many jobs changed and what was found."""

    done: int
    found: int = 0
    issues: list[tuple[str, Issue]] = []
    storage_keys: list[str] = []
    more: bool = False


class PausedView(Struct, frozen=True):
    queue: str
    paused: bool


class Imported(Struct, frozen=True):
    """The answer to one line of an import. `job_id` exists afterwards in both cases."""

    job_id: str
    skipped: bool


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
    last_report: CleanupReport | None
    cleanup_running: bool
    time_since_last_cleanup: int | None  # ms


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
    status: HealthStatus
    message: str
    total_jobs: int


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


class AlertView(Struct, frozen=True):
    """`since` is the Unix time in ms at which the alert began to fire, None while it does not."""

    name: str
    firing: bool
    since: int | None
    value: float
    threshold: float
    hint: str


class AlertList(Struct):
    alerts: list[AlertView]


class ReportList(Struct):
    reports: list[CleanupReport]


class ClockView(Struct, frozen=True):
    """`suspect` holds deletion by age back until an operator accepts the clock."""

    now: int
    suspect: bool
    message: str


class QuarantinedJob(Struct, frozen=True):
    id: str
    reason: str


class QuarantineList(Struct):
    jobs: list[QuarantinedJob]


class Done(Struct, frozen=True):
    """The answer where there is nothing to say."""


class Look(Struct, frozen=True):
    """A read of history: the timeline of the job with this seq, or a page of the jobs that match."""

    timeline: int | None = None
    page: List | None = None


class Answer(Struct):
    """A yes. `shows` are the job views whose payload is still to be read, with the job's seq; `grants` lets an
    undelivered answer be taken back: (job id, lock id) of each grant in it; `look` is answered from the disk.
    """

    data: Any
    status: int = 200
    shows: list[tuple[int, JobView]] = []
    grants: list[tuple[str, str]] = []
    look: Look | None = None
    replayed: bool = False  # a stored idempotent answer


class KeyUse(Struct, frozen=True):
    """An Idempotency-Key in use: `digest` of listener, method, path and key; `body_hash` of the body."""

    digest: str
    body_hash: str


class Moment(Struct, frozen=True):
    """The time at which a batch is decided: wall time and lease time in ms, and what turns one into the other."""

    now: int
    lease: int
    offset: int  # wall minus lease, steady between steps of the wall clock, so that shown times do not flicker
    trusted: int | None = None  # the wall time to persist, where `now` is not believed yet

    def wall(self, lease_ms: int) -> int:
        """The wall time at which lease time will be `lease_ms`."""
        return lease_ms + self.offset


AnyCommand = (
    Create
    | Bulk
    | Get
    | Timeline
    | Why
    | Validate
    | List
    | Start
    | Claim
    | Progress
    | Extend
    | Complete
    | Fail
    | Release
    | Cancel
    | Queues
    | Workers
    | ForceFail
    | ForceReset
    | Transition
    | ExtendLock
    | ReleaseLock
    | RunNow
    | Update
    | Delete
    | Pause
    | Resume
    | Import
    | Stats
    | Locks
    | Undelivered
    | CreditAbsence
    | EndGrants
    | Recover
    | Expire
    | DeleteExpired
    | Mend
    | Tick
    | Ping
    | Report
)


class Call(Struct, frozen=True):
    """A command with who asked and the randomness it may use. `admin` callers see lock ids."""

    command: AnyCommand
    by: str = "client"
    seed: bytes = b""
    admin: bool = False
