"""What may be asked, and every refusal code with its HTTP status.

Commands are the typed bodies of both APIs. Nothing here decides: rules.py has one function per command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from msgspec import Meta, Raw, Struct, field

from jobd.model.job import (
    LATEST_MS,
    AdditionalMs,
    Attempts,
    Backoff,
    DelayMs,
    FailureCode,
    JobId,
    Kind,
    Location,
    LockId,
    LockTtlMs,
    MaxProcessingMs,
    OnStall,
    Percent,
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


# ---------------------------------------------------------------------------------------------------------------------
# Commands of workers and creators.

MAX_CLAIM: Final = 100
MAX_NAMES: Final = 100  # queues or kinds of one claim
MAX_WAIT_MS: Final = 60_000
MAX_PAGE: Final = 200
MAX_EVENTS: Final = 1_000  # of a job, where only the latest are asked for
MAX_TEXT: Final = 200  # of a text that is looked for
Fingerprint = Annotated[str, Meta(pattern=r"^[0-9a-f]{12}$(?!\n)")]
MomentMs = Annotated[int, Meta(ge=0, le=LATEST_MS)]  # Unix ms, as bounds of a search: such as can be written as a date
MAX_OPERATOR: Final = 64
OperatorName = Annotated[str, Meta(min_length=1, max_length=MAX_OPERATOR)]
PRINTABLE: Final = r"^[ -~]*$(?!\n)"  # ASCII
Cursor = Annotated[str, Meta(pattern=r"^[0-9]{1,18}$(?!\n)")]
WorkerCursor = Annotated[str, Meta(pattern=r"^[0-9]{1,18} ", max_length=220)]  # when one spoke last, and its name
RowCursor = Annotated[str, Meta(pattern=r"^[a-z_]{1,20}:[0-9]{1,18}$(?!\n)")]  # a table, and a row of it
PlanCursor = Annotated[str, Meta(pattern=r"^[a-z]{1,20}\.[0-9]{1,18}$(?!\n)")]  # a status, and a job of it
PageLimit = Annotated[int, Meta(ge=1, le=MAX_PAGE)]
BackupId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$(?!\n)")]


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


class JobCommand(Command, frozen=True, kw_only=True):
    """A command on one job; over HTTP the path gives its id."""

    id: JobId


class Get(JobCommand, frozen=True, kw_only=True):
    pass


class Timeline(JobCommand, frozen=True, kw_only=True):
    """Every event of the job, or with a `limit` the latest of them; oldest first."""

    limit: Annotated[int, Meta(ge=1, le=MAX_EVENTS)] | None = None


class Why(JobCommand, frozen=True, kw_only=True):
    pass


class Validate(JobCommand, frozen=True, kw_only=True):
    pass


class ListJobs(Command, frozen=True, kw_only=True):
    """A page of jobs, newest first. `cursor` is the `next_cursor` of the page before.

    `worker` is that of the latest grant: it holds the job, or was the last to hold it.
    """

    status: Status | None = None
    queue: QueueName | None = None
    kind: Kind | None = None
    worker: Worker | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50
    cursor: Cursor | None = None


class SearchJobs(ListJobs, frozen=True, kw_only=True):
    """A page of jobs with the filters of operators. `since` and `until` bound `created_at`: from, and before.

    `finished_since` and `finished_until` bound `finished_at` likewise: jobs that are not finished are left out. `q` is
    found in the id, the payload as it came, or the error message; capitals of A to Z do not matter. `error` is the
    fingerprint of the error; of failed jobs, where no status is asked for.
    """

    since: MomentMs | None = None
    until: MomentMs | None = None
    finished_since: MomentMs | None = None
    finished_until: MomentMs | None = None
    q: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)] | None = None
    error: Fingerprint | None = None


class About(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True, gc=False):
    """A worker's description of itself. It is only shown. The bounds keep it below 1 KiB."""

    instance: Annotated[str, Meta(pattern=PRINTABLE, max_length=200)] | None = None
    host: Annotated[str, Meta(pattern=PRINTABLE, max_length=253)] | None = None
    pid: Annotated[int, Meta(ge=1, le=2**32 - 1)] | None = None
    version: Annotated[str, Meta(pattern=PRINTABLE, max_length=100)] | None = None
    concurrency: Annotated[int, Meta(ge=1, le=100_000)] | None = None


class Start(JobCommand, frozen=True, kw_only=True):
    worker: Worker
    lock_ttl_ms: LockTtlMs | None = None
    stuck_after_ms: StuckAfterMs | None = None
    max_processing_ms: MaxProcessingMs | None = None
    about: About | None = None


class Claim(Command, frozen=True, kw_only=True):
    worker: Worker
    queues: Annotated[list[QueueName], Meta(min_length=1, max_length=MAX_NAMES)] = field(
        default_factory=lambda: ["default"]
    )
    kinds: Annotated[list[Kind], Meta(min_length=1, max_length=MAX_NAMES)] | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_CLAIM)] = 1
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 0
    lock_ttl_ms: LockTtlMs | None = None
    stuck_after_ms: StuckAfterMs | None = None
    max_processing_ms: MaxProcessingMs | None = None
    about: About | None = None


class Progress(JobCommand, frozen=True, kw_only=True):
    lock_id: LockId
    progress: Percent
    message: Text | None = None


class Extend(JobCommand, frozen=True, kw_only=True):
    lock_id: LockId
    additional_ms: AdditionalMs | None = None


class Complete(JobCommand, frozen=True, kw_only=True):
    lock_id: LockId
    download_url: Location | None = None
    file_path: Location | None = None
    storage_key: Location | None = None
    metadata: Json = None
    expires_at: UnixMs | None = None


class Fail(JobCommand, frozen=True, kw_only=True):
    lock_id: LockId
    error_message: Annotated[str, Meta(min_length=1, max_length=4096)]
    error_code: FailureCode | None = None
    retry: bool = True
    retry_after_ms: DelayMs | None = None


class Release(JobCommand, frozen=True, kw_only=True):
    lock_id: LockId
    delay_ms: DelayMs | None = None


class Cancel(JobCommand, frozen=True, kw_only=True):
    reason: Text | None = None


class Queues(Command, frozen=True, kw_only=True):
    """A page of the queues that have jobs or are paused, by name. `paused` selects paused or unpaused queues.

    `busiest`: not by name, but those with the most jobs that wait or are worked on; no page comes after it.
    """

    limit: PageLimit = MAX_PAGE
    cursor: QueueName | None = None
    paused: bool | None = None
    busiest: bool = False


WorkerState = Literal["busy", "idle", "silent", "gone"]


class Workers(Command, frozen=True, kw_only=True):
    """A page of workers, most recently seen first: those in `state`, or all that are not gone."""

    limit: PageLimit = MAX_PAGE
    cursor: WorkerCursor | None = None
    state: WorkerState | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Commands of operators. `jobId` and its like are the names that existing dashboards send.


class NamedJobCommand(JobCommand, frozen=True, kw_only=True):
    """A command whose body names the job as `jobId`."""

    id: JobId = field(name="jobId")


NO_REASON: Final = "Failed by an operator."  # what a forced failure says where nobody said why


class ForceFail(NamedJobCommand, frozen=True, kw_only=True):
    reason: Text | None = None


class ForceReset(NamedJobCommand, frozen=True, kw_only=True):
    reason: Text | None = None


class Updates(Struct, frozen=True, forbid_unknown_fields=True):
    """What a transition may set beside the status."""

    error_message: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    priority: Priority | None = None
    run_at: UnixMs | None = None
    max_attempts: Attempts | None = None
    download_url: Location | None = None
    file_path: Location | None = None
    storage_key: Location | None = None
    metadata: Json = None


class Transition(NamedJobCommand, frozen=True, kw_only=True):
    from_: Status = field(name="from")
    to: Status
    updates: Updates = Updates()
    reason: Text | None = None
    dry_run: bool = False


class ExtendLock(NamedJobCommand, frozen=True, kw_only=True):
    lock_id: LockId = field(name="lockId")
    additional_ms: AdditionalMs | None = field(name="additionalTime", default=None)
    reason: Text | None = None


class ReleaseLock(NamedJobCommand, frozen=True, kw_only=True):
    lock_id: LockId = field(name="lockId")
    reason: Text | None = None


class RunNow(JobCommand, frozen=True, kw_only=True):
    reason: Text | None = None
    dry_run: bool = False


class Update(JobCommand, frozen=True, kw_only=True):
    priority: Priority | None = None
    run_at: UnixMs | None = None
    max_attempts: Attempts | None = None
    reason: Text | None = None
    dry_run: bool = False


class GetVersion(JobCommand, frozen=True, kw_only=True):
    """The job, with what it is known again by (plan_rules.version): for who is about to decide what is done to it."""


class LateResults(JobCommand, frozen=True, kw_only=True):
    """What completes brought whose grants had ended."""


class Adopt(JobCommand, frozen=True, kw_only=True):
    """Take a late result as the job's own: the one with this `seq`, or that of the latest grant."""

    result: Annotated[int, Meta(ge=1)] | None = None
    reason: Text | None = None
    dry_run: bool = False


class Delete(JobCommand, frozen=True, kw_only=True):
    reason: Text | None = None


class Pause(Command, frozen=True, kw_only=True):
    """Grant no job of a queue. The daemon resumes it at the wall time `until` (Unix ms)."""

    name: QueueName
    reason: Text | None = None
    until: UnixMs | None = None


class Resume(Command, frozen=True, kw_only=True):
    name: QueueName
    reason: Text | None = None


class TakeBack(Command, frozen=True, kw_only=True):
    """End the expired grants of a silent worker by their stall rule. `dry_run` only lists them."""

    name: Worker
    reason: Text | None = None
    dry_run: bool = False


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
    download_url: Location | None = None
    file_path: Location | None = None
    storage_key: Location | None = None
    metadata: Json = None
    error_message: Text | None = None
    error_code: FailureCode | None = None


class ImportCheck(Import, frozen=True, kw_only=True):
    """What an import of this line would do. Nothing is done."""


class Export(Command, frozen=True, kw_only=True):
    """A page of jobs, oldest first, as an import takes them. `cursor` is the `next_cursor` of the page before."""

    status: Status | None = None
    queue: QueueName | None = None
    kind: Kind | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE
    cursor: Cursor | None = None


class AuditLog(Command, frozen=True, kw_only=True):
    """A page of what operators did, newest first. `cursor` is the `next_cursor` of the page before."""

    who: OperatorName | None = None
    what: Annotated[str, Meta(min_length=1, max_length=40)] | None = None
    job_id: JobId | None = None
    since: MomentMs | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50
    cursor: Cursor | None = None


PlanAction = Literal["retry", "force-reset", "cancel", "force-fail", "delete", "recover-stuck", "cleanup"]
MAINTENANCE_ACTIONS: Final = frozenset({"recover-stuck", "cleanup"})  # what time does anyhow, to jobs that it names
MAX_PLAN: Final = 10_000  # jobs of one plan
MAX_PLANNING_S: Final = 10.0  # for so long at most one plan looks for them; the next one goes on from there


class PlanFilter(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which jobs: the filters of the list of jobs."""

    status: Status | None = None
    queue: QueueName | None = None
    kind: Kind | None = None
    worker: Worker | None = None
    since: MomentMs | None = None
    until: MomentMs | None = None
    finished_since: MomentMs | None = None
    finished_until: MomentMs | None = None
    q: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)] | None = None
    error: Fingerprint | None = None


class MakePlan(Command, frozen=True, kw_only=True):
    """What `action` would do to the jobs that `filter` finds, or to those named. Nothing is done yet.

    `cursor` is the `next_cursor` of a plan with the same action and filter: this one has what comes after it. An action
    of MAINTENANCE_ACTIONS takes none of the three: the daemon itself says which jobs.
    """

    action: PlanAction
    filter: PlanFilter | None = None
    cursor: PlanCursor | None = None
    ids: Annotated[list[JobId], Meta(min_length=1, max_length=MAX_PLAN)] | None = None
    reason: Text | None = None


class PlanCommand(Command, frozen=True, kw_only=True):
    """A call about a plan; the path gives its id."""

    plan_id: JobId


class ExpectedVersion(Struct, frozen=True, gc=False):
    """A job of a plan, with what it was when the plan was made (plan_rules.version)."""

    id: str
    version: str


class ApplyPlan(Command, frozen=True, kw_only=True):
    """Do `action` to each of `jobs` that is still what the plan saw. A slice of a plan, judged job by job."""

    action: PlanAction
    jobs: list[ExpectedVersion]
    reason: str | None = None


class ApplyEndings(ApplyPlan, frozen=True, kw_only=True):
    """The same for actions that end or delete jobs: on a full disk they make room."""


class Preview(Command, frozen=True, kw_only=True):
    """What recovery and expiry would do now, up to `limit` of each. Changes nothing."""

    limit: int


class Stats(Command, frozen=True, kw_only=True):
    pass


class Locks(Command, frozen=True, kw_only=True):
    """The current grants, the oldest first: all of them, or a page."""

    limit: PageLimit | None = None
    cursor: Cursor | None = None


_WITH_DRY_RUN: Final = frozenset({Transition, RunNow, Update, Adopt, TakeBack})


def is_dry_run(command: Any) -> bool:
    """Return whether `command` is a dry run: its response shows the effect, but nothing is changed."""
    return type(command) in _WITH_DRY_RUN and command.dry_run


# ---------------------------------------------------------------------------------------------------------------------
# Commands of the daemon's own parts: time, doors, probes.


class Undelivered(JobCommand, frozen=True, kw_only=True):
    """The connection closed before the first byte of the grant was written: the job goes back at once."""

    lock_id: LockId


class ExtendAfterPause(Command, frozen=True, kw_only=True):
    """The daemon was away: for those of `ids` that are processing, nothing ends in the next `grace_ms`.

    `since` is the lease time of the start (None: now): a lock that was live then is not lost while this waits for a
    slow disk.
    """

    ids: list[str]
    grace_ms: int
    since: int | None = None


class EndGrants(Command, frozen=True, kw_only=True):
    """A backup was put back: end the grants of those of `ids` that are processing by their stall rule.

    With the `last` of them the store's mark as a backup goes, in the same transaction.
    """

    ids: list[str]
    last: bool


class Recover(Command, frozen=True, kw_only=True):
    """Recover up to `limit` stuck jobs and clear up to `limit` expired locks. Judged when it is applied.

    `reason` is an operator's, for the audit log: in the timelines stands what was wrong with each job.
    """

    limit: int
    reason: str | None = None


class Expire(Command, frozen=True, kw_only=True):
    """Fail up to `limit` queued jobs whose `expires_at` has passed."""

    limit: int


class DeleteExpired(Command, frozen=True, kw_only=True):
    """Delete those of `ids` that are finished and expired when the command is applied."""

    ids: list[str]


class RepairJobs(Command, frozen=True, kw_only=True):
    """Validate the jobs `ids` and apply the safe fixes."""

    ids: list[str]


class RecordAction(Command, frozen=True, kw_only=True):
    """An operator did something that is no command on jobs: `what` goes into the audit log, and changes nothing.

    `outcome` is the code of a refusal, where it was refused; `job_id` the job that was looked at.
    """

    what: str
    details: dict[str, Any] | None = None
    job_id: str | None = None
    outcome: str = "done"
    reason: str | None = None


class EndPauses(Command, frozen=True, kw_only=True):
    """Resume the queues whose pause is over."""


class Tick(Command, frozen=True, kw_only=True):
    """Persist lease time; changes no job."""


class Ping(Command, frozen=True, kw_only=True):
    """A round trip through the mailbox; changes nothing."""


class Report(Command, frozen=True, kw_only=True):
    """Keep the report of a cleanup pass (JSON text)."""

    body: bytes


# ---------------------------------------------------------------------------------------------------------------------
# A command on its way into a decision.


class IdempotencyKey(Struct, frozen=True):
    """An Idempotency-Key in use: `digest` of listener, method, path and key; `body_hash` of the body."""

    digest: str
    body_hash: str


class Operator(Struct, frozen=True):
    """Who of the operators asks: the name that they gave ("" for none), and where their request came from.

    `part_of` names a deed of many commands (an import, a plan): the audit log has one row for all of it.
    """

    name: str
    address: str
    part_of: str | None = None

    @property
    def who(self) -> str:
        return self.name or "admin"

    @property
    def by(self) -> str:
        """As events say it."""
        return f"admin:{self.name}" if self.name else "admin"


class Moment(Struct, frozen=True):
    """The time at which a batch is decided: wall time and lease time in ms, and what turns one into the other."""

    now: int
    lease: int
    offset: int  # wall minus lease, steady between steps of the wall clock, so that shown times do not flicker
    trusted: int | None = None  # the expected wall time while the clock is suspect, else None

    @property
    def suspect(self) -> bool:
        """Whether wall time is too far ahead of its expected value. Then nothing is deleted or failed by age."""
        return self.trusted is not None

    @property
    def believed(self) -> int:
        """The wall time to persist, and to age stored responses by: a suspect jump ages nothing."""
        return self.now if self.trusted is None else self.trusted

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
    | ListJobs
    | SearchJobs
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
    | GetVersion
    | LateResults
    | Adopt
    | Delete
    | Pause
    | Resume
    | TakeBack
    | Import
    | ImportCheck
    | Export
    | AuditLog
    | ApplyPlan
    | ApplyEndings
    | Preview
    | Stats
    | Locks
    | Undelivered
    | ExtendAfterPause
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


class Call(Struct, frozen=True):
    """A command with who asked and the randomness it may use. `admin` callers see lock ids.

    `operator` is set if the command came in through an operators' listener. `expected` is the version
    (plan_rules.version) of the job that the caller has seen: if the job has changed since, nothing is done.
    """

    command: AnyCommand
    by: str = "client"
    seed: bytes = b""
    admin: bool = False
    operator: Operator | None = None
    expected: str | None = None
