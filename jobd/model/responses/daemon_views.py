"""The daemon: counts, health, alerts, clock, audit log, failures and cluster."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Struct, UnsetType

from jobd.model.fields import doc
from jobd.model.responses import shared


class OldestProcessing(Struct, frozen=True):
    """The job that has been processing longest."""

    id: shared.JobIdText
    age: Annotated[float, doc("Seconds since it was granted.")]
    progress: shared.ProgressPercent


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
    locked_jobs: Annotated[int, doc("Jobs whose lock has not expired.")]
    average_processing_time: Annotated[
        float,
        doc(
            "Average time since the latest grant, in seconds: up to the end for jobs completed in the last "
            "hour, up to now for jobs that are processing. 0 without such jobs."
        ),
    ]
    oldest_processing_job: Annotated[OldestProcessing | None, doc("The job that has been processing longest, or null.")]
    stuck_jobs_recovered: Annotated[int, doc("Stalled jobs that were recovered.")]
    timestamp: shared.Timestamp
    cleanup_running: shared.CleanupRunning = False
    time_since_last_cleanup: shared.SinceCleanup = None
    disk: Annotated[DiskView | None, doc("The disk of the store. Null for an in-memory store.")] = None
    store: Annotated[str, doc("Path of the store, or `in memory: lost when the daemon stops`.")] = ""


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


HealthStatus = Literal["healthy", "degraded", "unhealthy"]
HealthLevel = Annotated[HealthStatus, doc("`healthy`, `degraded` or `unhealthy`.")]


class DatabaseHealth(Struct, frozen=True, rename="camel"):
    """Health of the store."""

    status: HealthLevel
    message: shared.MessageText
    total_jobs: Annotated[int, doc("Number of jobs.")]
    path: shared.DiskPath = None
    free_bytes: shared.FreeBytes = None
    total_bytes: shared.TotalBytes = None


class PartHealth(Struct, frozen=True):
    """Health of one part of the daemon."""

    status: HealthLevel
    message: shared.MessageText


class CleanupHealth(Struct, frozen=True, rename="camel"):
    """Health of cleanup."""

    running: shared.CleanupRunning
    time_since_last_cleanup: shared.SinceCleanup
    message: shared.MessageText


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


class ClockView(Struct, frozen=True):
    """The clock of the daemon. While it is suspect, `message` says why and what to do."""

    now: Annotated[int, doc("Wall time of the daemon, in Unix ms.")]
    suspect: Annotated[
        bool, doc("Whether the clock has jumped ahead. While it is suspect, nothing is deleted or failed by age.")
    ]
    message: shared.MessageText


class AuditView(Struct, frozen=True):
    """An audit entry: a change or a rejected request of an operator."""

    seq: Annotated[int, doc("Position in the audit log.")]
    at: Annotated[int, doc("When, in Unix ms.")]
    who: Annotated[str, doc("Name of the operator; `admin` if none was given.")]
    address: Annotated[str, doc("Where the request came from.")]
    action: Annotated[str, doc("The action, such as `force-fail`.")]
    job_id: Annotated[str | None, doc("The job, or null.")]
    queue: Annotated[str | None, doc("The queue, or null.")]
    reason: shared.ReasonText
    outcome: Annotated[str, doc("`done` or an error code.")]
    changed: Annotated[int, doc("How many jobs were changed.")]
    details: Annotated[dict[str, Any], doc("Machine-readable details.")]

    @property
    def target(self) -> str | None:
        """The target of the action: a job, queue, schedule, webhook or worker, else the number of jobs."""
        details = self.details
        if schedule := details.get("schedule"):
            return f"schedule {schedule}"
        if rule := details.get("rule"):
            selects = [f"{name} {details[name]}" for name in ("host", "version", "queue") if name in details]
            return ", ".join(selects) or f"rule {rule}"
        if self.job_id or self.queue:
            return self.job_id or f"queue {self.queue}"
        if webhook := details.get("webhook"):
            delivery = details.get("delivery")
            return f"webhook {webhook}" if delivery is None else f"webhook {webhook}, delivery {delivery}"
        if self.changed:
            return "1 job" if self.changed == 1 else f"{self.changed} jobs"
        return f"worker {details['worker']}" if "worker" in details else None


class AuditPage(Struct):
    """A page of audit entries, newest first."""

    entries: Annotated[list[AuditView], doc("The entries.")]
    next_cursor: shared.NextCursor


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
    complete: Annotated[bool, doc("False until the jobs from before the start of the daemon are counted.")]


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
    config_differs: Annotated[bool, doc("Whether its configuration differs from the leader's.")]
    clock_ahead_ms: Annotated[
        int, doc("By how much its wall clock is ahead of the clock of PostgreSQL, in ms; negative if behind.")
    ] = 0
    lag_ms: Annotated[int, doc("Time since the responding node had a record that it lacks, in ms.")] = 0
    schema_version: Annotated[int, doc("The schema version of its tables; 0 if it did not say.")] = 0

    @property
    def is_unseen(self) -> bool:
        """Whether its process has probably ended."""
        return self.seen_ms >= UNSEEN_MS

    @property
    def is_ready(self) -> bool:
        """Whether it can take over: it is a standby that runs and follows."""
        return self.role == "standby" and not self.is_unseen and self.lag_ms < READY_MS


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
    warnings: Annotated[list[str], doc("What is wrong, in words.")] = []
    nodes: Annotated[list[NodeView], doc("The nodes, by name.")] = []
