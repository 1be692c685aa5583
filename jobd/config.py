"""The settings of the daemon, with their defaults, bounds and descriptions."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, get_type_hints

import msgspec
from msgspec import Meta, Struct

from jobd.journal import url as journal_url
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, YEAR_MS, LatePolicy, OnStall, Policy
from jobd.webhooks.config import WebhookSetting

MAX_ERROR_CHARS: Final = 500  # of an error message, which may contain a value of any length

WEBHOOKS: Final = "webhooks"  # the only list of tables, and only in the file

_UNITS: Final = {"ms": 1, "s": SECOND_MS, "m": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}
_DURATION: Final = re.compile(r"([0-9]{1,12})(ms|s|m|h|d)?")


class ConfigError(Exception):
    """The configuration is wrong. The message is one line: source, key and what is expected."""

    exit_code = 78

    def __init__(self, message: str) -> None:
        printable = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
        super().__init__(
            printable
            if len(printable) <= MAX_ERROR_CHARS
            else f"{printable[: MAX_ERROR_CHARS - 150]} … {printable[-140:]}"
        )


class Duration(int):
    """Milliseconds. In the file, a string such as "15m" or "500ms"."""


_MAX_NUMBER: Final = 1 << 53  # larger numbers would be inexact, or fail at run time
Positive = Annotated[int, Meta(ge=1, le=_MAX_NUMBER)]
NotNegative = Annotated[int, Meta(ge=0, le=_MAX_NUMBER)]


class WorkerSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where workers connect."""

    socket: str = ""
    """Path of the worker API's Unix socket. Empty: `worker.sock` in the runtime directory."""
    socket_mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}$(?!\n)")] = "0660"
    """Octal permissions of the socket, and of a Unix socket in `admin.listen`.

    Any process that can connect to the socket can work on jobs.
    """
    listen: str = ""
    """TCP address of the worker API, such as `127.0.0.1:8771`. Empty: no TCP. Requires `worker.token_file`."""
    token_file: str = ""
    """File with the token that workers send over TCP. During a rotation it has two tokens, one per line."""
    tls_cert: str = ""
    """PEM certificate chain for the TCP address. SIGHUP reads the file again, for new connections."""
    tls_key: str = ""
    """PEM private key of that certificate, not encrypted."""


class AdminSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where operators connect."""

    listen: str = "127.0.0.1:8770"
    """Address of the admin API and the dashboard: `HOST:PORT` or `unix:/path`."""
    token_file: str = ""
    """File with the admin token. `ADMIN_TOKEN` and `ADMIN_TOKEN_FILE` take precedence.

    Without any of the three, a systemd credential named `admin_token` is used.
    """
    readonly_token_file: str = ""
    """File with a read-only token. `ADMIN_READONLY_TOKEN_FILE` takes precedence.

    The token gives access to every page and every GET except the backup. It shows no lock ids.
    """
    hosts: list[str] = []
    """Additional names allowed in the `Host` header, such as the name of a reverse proxy. Ports are ignored."""
    tls_cert: str = ""
    """PEM certificate chain. SIGHUP reads the file again, for new connections.

    Without a certificate, an address other than loopback causes a warning.
    """
    tls_key: str = ""
    """PEM private key of that certificate, not encrypted."""


class StoreSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where job state is stored."""

    path: str = ""
    """Path of the SQLite database. Empty: `jobd.db` in the state directory.

    If there is no such file, jobd creates it and its directory, and logs `event=store_created`. `:memory:` uses no
    file, and all jobs are lost when the daemon exits.
    """
    synchronous: Literal["full", "extra"] = "full"
    """`full`: fsync the database before every response. `extra`: fsync its directory as well."""
    commit: Literal["auto", "inline", "thread"] = "auto"
    """`inline`: commit in the event loop. `thread`: commit in the storage thread. `auto`: by disk speed.

    With `auto`, commits are inline until one takes 50 ms, two of the latest 8 take 10 ms, or their median reaches 3 ms.
    Then the thread is used for at least 10 s, and until at most 4 of the latest 200 commits took 10 ms and their median
    is below 3 ms. With `inline` on a slow disk, every request waits for commits, even `/healthz`.
    """


class JournalSection(Struct, frozen=True, forbid_unknown_fields=True):
    """The journal in PostgreSQL, which several nodes share."""

    url: str = ""
    """`postgresql://ROLE:PASSWORD@HOST:PORT,HOST:PORT/DATABASE`. Empty: the journal is in the SQLite database.

    With several hosts, the one that accepts writes is used. Parameters such as `?sslmode=verify-full&sslrootcert=FILE`
    configure TLS. Without a password, that of the file `PGPASSFILE` is used. It requires the extra `postgres`; see
    [cluster](cluster.md).
    """
    name: Annotated[str, Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$(?!\n)", max_length=30)] = "main"
    """Name of the journal: up to 30 of a-z, 0-9 and single hyphens. Nodes with the same name act as one jobd."""
    lease: Duration = Duration(3 * SECOND_MS)
    """How long the leader may go without renewing its lease before a standby takes over, 500 ms to 1 min.

    The leader renews the lease three times as often, and stops if it cannot.
    """
    snapshot_every: Duration = Duration(10 * MINUTE_MS)
    """Time between two snapshots, from which a node with an empty disk starts. At least 1 s."""
    require_sync: bool = True
    """Report `degraded` while PostgreSQL has no synchronous standby, because a lost disk then loses jobs.

    Set it to `false` for one PostgreSQL server, or if its storage is replicated.
    """


class NodeSection(Struct, frozen=True, forbid_unknown_fields=True):
    """This node of a shared journal."""

    name: Annotated[str, Meta(max_length=100)] = ""
    """Name of the node, different for each. Empty: the host name."""
    advertise: str = ""
    """URL of this node's worker API for clients, such as `http://a.example:8771`.

    Empty: the address in `worker.listen`, unless it is an address of all interfaces. Without either, clients cannot
    follow.
    """
    direct: bool = True
    """Whether `node.advertise` is the address of this process itself, not of a proxy.

    Then a standby takes over at once if PostgreSQL has lost the leader's session and its address refuses connections.
    """


class LocksSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How long a worker can hold a job without reporting."""

    ttl: Duration = Duration(15 * MINUTE_MS)
    """Lifetime of a lock, unless the worker requests another. Progress reports and extensions renew it."""
    progress_timeout: Duration = Duration(30 * MINUTE_MS)
    """Progress timeout: without a progress report, a lock ends after this time even if it is extended. `"0"`: none.

    `progress_timeout_ms` of a job or a grant overrides it. `Worker` and `jobctl run` request no timeout.
    """


class StallSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to a job whose worker has stopped reporting."""

    after: Duration = Duration(10 * MINUTE_MS)
    """Time without a report after which a processing job whose lock has expired is stalled."""
    max_stalls: Annotated[int, Meta(ge=0, le=1000)] = 3
    """A job that stalls more often than this fails."""
    on_stall: OnStall = "auto"
    """What happens to a stalled job: `auto`, `requeue` or `fail`.

    `auto` requeues the job if it reported no progress or has attempts left, and fails it otherwise.
    """


class CleanupSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How often stalled jobs are recovered, and how often cleanup runs start."""

    interval: Duration = Duration(5 * MINUTE_MS)
    """Time between two cleanup runs."""
    min_interval: Duration = Duration(2 * MINUTE_MS)
    """Shortest time between two cleanup runs, unless an operator forces one.

    It takes precedence over a shorter `cleanup.interval`.
    """
    recover_every: Duration = Duration(10 * SECOND_MS)
    """Time between two recoveries of stalled jobs. `"0"`: only cleanup runs recover them."""
    batch: Annotated[int, Meta(ge=1, le=1000)] = 200
    """Number of jobs that a cleanup run handles at a time, 1 to 1000.

    A request waits for at most one such batch.
    """


class RetentionSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How long finished jobs, their events and audit entries are kept."""

    completed: Duration = Duration(7 * DAY_MS)
    """How long completed jobs are kept, unless `complete` sets `expires_at`."""
    failed: Duration = Duration(30 * DAY_MS)
    """How long failed jobs are kept."""
    cancelled: Duration = Duration(7 * DAY_MS)
    """How long cancelled jobs are kept."""
    journal: Duration = Duration(DAY_MS)
    """How long the event log keeps the events of a job after its deletion."""
    journal_bytes: Positive = 4 << 30
    """Size of the database in bytes above which cleanup runs delete the oldest events of deleted jobs earlier."""
    audit: Duration = Duration(90 * DAY_MS)
    """How long audit entries are kept. At most 100,000 changes are kept."""


class ValidationSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What a completed job must have."""

    require_download_url: bool = False
    """Reject a `complete` without a `download_url`.

    This includes completion by an operator, but not imports.
    """


class LateSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Results that a worker submits after its lock was lost."""

    results: LatePolicy = "keep"
    """What happens to a late result: `keep`, `adopt_if_unclaimed` or `drop`.

    `keep` stores it with the job until an operator adopts it. `adopt_if_unclaimed` completes the job with it if nothing
    has happened to the job since recovery ended the grant, and keeps it otherwise. `drop` discards it.
    """
    queues: dict[str, LatePolicy] = {}
    """Exceptions by queue, such as `{video = "adopt_if_unclaimed"}`."""


class LimitsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Upper limits. A request that exceeds one is rejected with the error code named here."""

    mailbox: Positive = 10_000
    """Commands that can wait in the mailbox; beyond that `503 overloaded`."""
    inflight_bytes: Positive = 64 << 20
    """Total bytes of request bodies that wait; beyond that `503 overloaded`."""
    response_bytes: Positive = 256 << 20
    """Total bytes of responses that clients have not read; beyond that `503 overloaded`.

    It is the response to new jobs, claims, starts and reads. Other calls go on, such as those for a job that is held.
    """
    body: Positive = 1 << 20
    """Bytes of a request body, or of one line of a stream; beyond that `413 too_large`."""
    payload: Positive = 256 << 10
    """Bytes of a job's payload, and of its metadata; beyond that `413 too_large`."""
    bulk: Annotated[int, Meta(ge=1, le=1000)] = 1000
    """Jobs in one bulk create, 1 to 1000; beyond that `413 too_large`."""
    claim_wait: Duration = Duration(MINUTE_MS)
    """Longest time that a claim can wait for work, at most one minute."""
    parked_claims: Positive = 10_000
    """Claims that can wait for work at the same time; beyond that `503 overloaded`."""
    event_streams: Positive = 100
    """Open event streams of both APIs and the dashboard together; beyond that `503 overloaded`."""
    output_bytes: NotNegative = 1 << 30
    """Bytes of the file with the output of jobs, at least 1 MiB. The oldest is deleted first. 0: `409 output_off`."""
    downloads: Positive = 20
    """Downloads of artifacts at the same time; beyond that `503 overloaded`."""
    live_jobs: Positive = 5_000_000
    """Live jobs (queued or processing); beyond that `507 too_many_jobs`."""
    queues: Positive = 10_000
    """Queues with jobs, including finished jobs; beyond that, the first job of a queue gets `507 too_many_queues`."""
    schedules: Positive = 10_000
    """Schedules; beyond that, a new one gets `507 too_many_schedules`."""
    idempotency_keys: Positive = 200_000
    """Stored responses to requests with an `Idempotency-Key`.

    Above it, the oldest response is removed once it is 10 minutes old; until then, requests with a key get
    `503 overloaded`.
    """


class AlertsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Alert thresholds. An alert fires above its threshold unless noted otherwise."""

    stalled_jobs: NotNegative = 5
    """Jobs that are stalled now or were recovered in the last 10 minutes."""
    processing_jobs: NotNegative = 20
    """Jobs in `processing`."""
    average_processing: Duration = Duration(10 * MINUTE_MS)
    """Average duration of the jobs completed in the last hour and of those that are processing."""
    cleanup_issues: NotNegative = 10
    """Invalid rows that a cleanup run could not fix."""
    granted_twice: NotNegative = 0
    """Jobs granted again in the last hour while the previous worker's lock had time left."""
    slower_than_usual: Annotated[float, Meta(ge=1, le=1000)] = 2.0
    """95th percentile of a kind's processing time, as a multiple of the usual value for the kind.

    It compares the last hour with the hours before it.
    """
    webhook_failing: Duration = Duration(5 * MINUTE_MS)
    """Time for which a webhook has accepted no message."""
    queue_without_workers: Duration = Duration(2 * MINUTE_MS)
    """Time for which a job has been due while no worker claimed its queue and kind."""
    queue_waits: Duration = Duration(5 * MINUTE_MS)
    """Time for which the oldest due job of a queue has waited. Paused queues are ignored."""
    failure_rate: Annotated[float, Meta(gt=0, le=1)] = 0.5
    """Share of a queue's attempts in the last 10 minutes that failed. Fires at the threshold, too."""
    failure_rate_attempts: Positive = 20
    """Number of attempts in the last 10 minutes from which `failure_rate` applies."""
    disk_free_percent: Annotated[float, Meta(ge=0, le=100)] = 10.0
    """Free space on the store's disk, in percent. Fires below the threshold."""
    disk_free_bytes: NotNegative = 1 << 30
    """Free space on the store's disk, in bytes, but at most a quarter of the disk. Fires below the threshold."""
    release_loop: NotNegative = 0
    """Jobs that were released 10 times in a row without progress, the last time without a snooze."""
    disk_full_within: Duration = Duration(6 * HOUR_MS)
    """Time until the store's disk is full, at the rate of the last hour. Fires below the threshold."""
    backlog_grows: Positive = 50
    """Due jobs of a queue and kind that were added in 10 minutes.

    Fires at the threshold, too, as do the numbers from here to `workers_die_share`.
    """
    retry_backlog: Positive = 20
    """Jobs of a queue that wait for another attempt, while their number rises."""
    rejecting: Positive = 10
    """Responses in 5 minutes with the same error, which says that something is full."""
    expiring: Annotated[float, Meta(gt=0, le=1)] = 0.1
    """Of the jobs of a queue and kind that ended in the last 10 minutes, the share that expired."""
    expiring_jobs: Positive = 10
    """Number of jobs that expired in the last 10 minutes from which `expiring` applies."""
    due_far_jobs: Positive = 20
    """Jobs of a queue and kind created in the last 10 minutes that are due in over 7 days."""
    paused_without_reason: Duration = Duration(15 * MINUTE_MS)
    """Time for which a job of a queue that is paused without a reason has been due."""
    quiet_long: Duration = Duration(24 * HOUR_MS)
    """Time for which a worker has been quiet, while jobs that it takes wait."""
    no_progress: Duration = Duration(10 * MINUTE_MS)
    """Time for which a running job has shown no progress."""
    no_progress_times: Annotated[float, Meta(ge=1, le=1000)] = 3.0
    """The same time, as a multiple of the usual duration of the job's kind."""
    kills_workers: Positive = 2
    """Workers that died with the same job."""
    workers_die: Positive = 3
    """Workers of a host and version that died in the last 10 minutes."""
    workers_die_stalls: Positive = 5
    """Grants to workers of a host and version that stalled in the last 10 minutes."""
    workers_die_share: Annotated[float, Meta(gt=0, le=1)] = 0.2
    """Share of these workers, or of these grants, from which the previous two keys apply."""
    standby_behind: Duration = Duration(30 * SECOND_MS)
    """In a cluster: time since the leader had a record that a standby lacks, or since a standby was last seen."""
    database_horizon: Duration = Duration(MINUTE_MS)
    """In a cluster: age of the oldest transaction in the database of the journal."""
    clocks_differ: Duration = Duration(SECOND_MS)
    """In a cluster: difference between the wall clocks of a node and of PostgreSQL."""


class ArtifactsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the artifacts of jobs are."""

    url: str = ""
    """Store of the objects that `storage_key` names: `file:///DIRECTORY` or `s3://BUCKET/PREFIX`. Empty: none.

    An object is deleted with its job. `s3` URLs need the extra `s3`; see
    [artifacts](operations.md#artifacts).
    """


class LogSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What the daemon writes to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """`debug` (one line per job change), `info`, `warning` or `error`."""
    format: Literal["auto", "console", "logfmt", "json"] = "auto"
    """`auto` (`console` on a terminal, else `logfmt`), `console`, `logfmt` or `json`."""


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration. Durations are milliseconds, sizes bytes."""

    worker: WorkerSection = WorkerSection()
    admin: AdminSection = AdminSection()
    store: StoreSection = StoreSection()
    journal: JournalSection = JournalSection()
    node: NodeSection = NodeSection()
    locks: LocksSection = LocksSection()
    stall: StallSection = StallSection()
    cleanup: CleanupSection = CleanupSection()
    retention: RetentionSection = RetentionSection()
    validation: ValidationSection = ValidationSection()
    late: LateSection = LateSection()
    limits: LimitsSection = LimitsSection()
    alerts: AlertsSection = AlertsSection()
    artifacts: ArtifactsSection = ArtifactsSection()
    log: LogSection = LogSection()

    def policy(self) -> Policy:
        """Return the settings that the rules use."""
        return Policy(
            lock_ttl_ms=int(self.locks.ttl),
            progress_timeout_ms=int(self.locks.progress_timeout),
            stall_after_ms=int(self.stall.after),
            max_stalls=self.stall.max_stalls,
            on_stall=self.stall.on_stall,
            keep_completed_ms=int(self.retention.completed),
            keep_failed_ms=int(self.retention.failed),
            keep_cancelled_ms=int(self.retention.cancelled),
            require_download_url=self.validation.require_download_url,
            late_results=self.late.results,
            late_queues=self.late.queues,
            late_bytes=self.limits.payload,
            live_jobs=self.limits.live_jobs,
            queues=self.limits.queues,
            schedules=self.limits.schedules,
            idempotency_keys=self.limits.idempotency_keys,
            artifacts=bool(self.artifacts.url),
        )


class LoadedConfig(Struct, frozen=True):
    """A configuration with the source of each value, the tokens and the warnings."""

    config: Config
    sources: dict[str, str]  # "section.key" -> default, file PATH, env NAME, flag
    admin_tokens: tuple[str, ...]
    worker_tokens: tuple[str, ...]
    path: str | None = None
    read_only_tokens: tuple[str, ...] = ()
    development: bool = False
    warnings: tuple[str, ...] = ()
    own_directories: tuple[str, ...] = ()  # of the daemon's files; not allowed for artifacts
    webhooks: tuple[WebhookSetting, ...] = ()


# The shortest and the longest value of a duration, if not DURATION_BOUNDS.
BOUNDS: Final[dict[str, tuple[int, int]]] = {
    "journal.lease": (SECOND_MS // 2, MINUTE_MS),
    "journal.snapshot_every": (SECOND_MS, DAY_MS),
    "locks.ttl": (SECOND_MS, DAY_MS),
    "cleanup.interval": (100, DAY_MS),
    "cleanup.min_interval": (0, DAY_MS),
    "cleanup.recover_every": (0, HOUR_MS),
    **{f"retention.{name}": (0, 100 * YEAR_MS) for name in ("completed", "failed", "cancelled", "journal", "audit")},
    "limits.claim_wait": (0, MINUTE_MS),
}
DURATION_BOUNDS: Final = (0, YEAR_MS)


def parse_duration(text: str) -> int:
    """Return the milliseconds of a duration such as "15m", "500ms" or "0". Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or (match[2] is None and int(match[1]) != 0):
        raise ValueError(f'"{text}" is not a duration: write a number and ms, s, m, h or d, such as "15m"')
    return int(match[1]) * _UNITS[match[2] or "ms"]


def show_duration(ms: int) -> str:
    """Return the shortest text that `parse_duration` converts to `ms`."""
    if ms == 0:
        return "0"
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if ms % _UNITS[unit] == 0)
    return f"{ms // _UNITS[unit]}{unit}"


def effective(loaded: LoadedConfig) -> str:
    """Return the configuration as TOML, with the source of each value and without secrets."""
    lines = []
    for section in Config.__struct_fields__:
        lines.append(f"[{section}]")
        for name in getattr(loaded.config, section).__struct_fields__:
            key = f"{section}.{name}"
            lines.append(f"{name} = {to_toml(shown(loaded.config, key))}  # {loaded.sources[key]}")
        lines.append("")
    for webhook in loaded.webhooks:
        lines.append(f"[[{WEBHOOKS}]]  # file {loaded.path}")
        lines += [
            f"{name} = {to_toml(value)}"
            for name, value in msgspec.structs.asdict(webhook.section).items()
            if name != "secret"
        ]
        lines += [f"# secrets: {len(webhook.endpoint.secrets)}", ""]
    count = len(loaded.admin_tokens)
    lines.append(f"# admin tokens: {count or 'a random one at the start'}; worker tokens: {len(loaded.worker_tokens)}")
    lines.append(f"# read-only tokens: {len(loaded.read_only_tokens)}")
    return "\n".join(lines)


def to_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Duration):
        return f'"{show_duration(value)}"'
    if isinstance(value, int | float):  # JSON has no nan
        return repr(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_toml(name)} = {to_toml(each)}' for name, each in value.items())}}}"
    return msgspec.json.encode(value).decode()


def reloaded(old: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """Return `old` with the reloadable settings of `new`, the keys that changed, and those that need a restart."""
    differing = [key for key in KEYS if value_of(old, key) != value_of(new, key)]
    changed = [key for key in differing if key in RELOADABLE]
    need_restart = [key for key in differing if key not in RELOADABLE]
    for key in changed:
        section, name = key.split(".")
        table = msgspec.structs.replace(getattr(old, section), **{name: value_of(new, key)})
        old = msgspec.structs.replace(old, **{section: table})
    return old, changed, need_restart


def value_of(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def shown(config: Config, key: str) -> object:
    """Return the value of a key without secrets."""
    value = value_of(config, key)
    return journal_url.redacted(config.journal.url) if key == "journal.url" else value


def _fields() -> dict[str, type]:
    sections = get_type_hints(Config)
    return {
        f"{section}.{name}": hint
        for section in Config.__struct_fields__
        for name, hint in get_type_hints(sections[section], include_extras=True).items()
    }


KEYS: Final = _fields()

# Keys that SIGHUP applies: those of some sections, and a few more. The others need a restart.
_RELOADABLE_SECTIONS: Final = ("locks.", "stall.", "cleanup.", "retention.", "alerts.", "late.", "validation.")
RELOADABLE: Final = frozenset(
    {
        *(key for key in KEYS if key.startswith(_RELOADABLE_SECTIONS)),
        "limits.live_jobs",
        "limits.queues",
        "limits.schedules",
        "worker.token_file",
        "admin.token_file",
        "admin.readonly_token_file",
        "log.level",
    }
)


def parse_listen(text: str, key: str) -> tuple[str, int] | str:
    """Return ("127.0.0.1", 8770) for "127.0.0.1:8770", or the path of "unix:/path". Raises ConfigError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/"):
            raise ConfigError(f'{key}: "{text}": the path of a Unix socket starts with /')
        return path
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        or_socket = "" if key == "worker.listen" else ", or unix:/path"
        raise ConfigError(f'{key}: "{text}": expected HOST:PORT, such as 127.0.0.1:8770{or_socket}')
    return host.strip("[]"), int(port)
