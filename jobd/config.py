"""Configuration: config.toml, environment and flags become one frozen value that holds every default.

Reads files and nothing else; it opens no socket and no store.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints
from urllib.parse import unquote

import msgspec
from msgspec import Meta, Struct

from jobd import credentials
from jobd.credentials import MAKE_TOKEN, InvalidToken
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, YEAR_MS, LatePolicy, OnStall, Policy, is_job_id
from jobd.webhooks import config as webhook_config
from jobd.webhooks.config import BadWebhook, WebhookSetting

EXIT_CONFIG: Final = 78
DEFAULT_PATH: Final = "/etc/jobd/config.toml"

SHOWN: Final = 500  # characters of a message; a value in it may be of any length

WEBHOOKS: Final = "webhooks"  # the one list of tables, in the file alone

_UNITS: Final = {"ms": 1, "s": SECOND_MS, "m": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}
_DURATION: Final = re.compile(r"([0-9]{1,12})(ms|s|m|h|d)?")
_NOT_SETTINGS: Final = frozenset({"JOBD_CONFIG", "JOBD_SOCKET", "JOBD_URL", "JOBD_ADMIN_URL"})
_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.IGNORECASE | re.ASCII)
_LONGEST_HOST: Final = 253  # characters
_HOST_EXPECTED: Final = (
    'expected a host name, an IPv4 address or an IPv6 address in brackets, such as "jobs.example.com", without scheme, '
    "port and path"
)


class ConfigError(Exception):
    """What is wrong, with file, key and what is expected, in one line. The daemon exits with 78."""

    def __init__(self, message: str) -> None:
        plain = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
        super().__init__(plain if len(plain) <= SHOWN else f"{plain[: SHOWN - 150]} … {plain[-140:]}")


class Duration(int):
    """Milliseconds; in the file a string such as "15m" or "500ms"."""


Positive = Annotated[int, Meta(ge=1)]


class WorkerSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where workers connect."""

    socket: str = ""
    """Path of the worker API's Unix socket. Empty: `worker.sock` in the runtime directory."""
    socket_mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}$(?!\n)")] = "0660"
    """Octal permissions of the socket. A process that can connect to it can work on jobs.

    They apply to a Unix socket in `admin.listen` as well.
    """
    listen: str = ""
    """TCP address of the worker API, such as `127.0.0.1:8771`. Empty: no TCP. Requires `worker.token_file`."""
    token_file: str = ""
    """File with the token that workers send over TCP. During a rotation it holds two, one per line."""
    tls_cert: str = ""
    """PEM certificate chain for the TCP address."""
    tls_key: str = ""
    """PEM private key of that certificate."""


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

    The token gives access to every page and every GET except the backup, and shows no lock ids.
    """
    hosts: list[str] = []
    """Additional names allowed in the `Host` header, such as that of a reverse proxy. Ports are ignored."""
    tls_cert: str = ""
    """PEM certificate chain. Without one, an address other than loopback logs a warning."""
    tls_key: str = ""
    """PEM private key of that certificate."""


class ServerSection(Struct, frozen=True, forbid_unknown_fields=True):
    """HTTP, on both listeners."""

    python_parser: bool = False
    """Start even if aiohttp's C parser is missing. Its Python parser accepts some malformed requests.

    If this is `false` and the C parser is missing, the start fails with exit code 78.
    """


class StoreSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where job state is stored."""

    path: str = ""
    """Path of the SQLite database. Empty: `jobd.db` in the state directory.

    `:memory:` uses no file, and all jobs are lost when the daemon exits.
    """
    synchronous: Literal["full", "extra"] = "full"
    """`full`: fsync the database before every response. `extra`: fsync its directory as well."""


class LocksSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How long a worker can hold a job without reporting."""

    ttl: Duration = Duration(15 * MINUTE_MS)
    """Lifetime of a lock, unless the grant asks for another. Progress reports and extensions renew it."""
    max_processing: Duration = Duration(30 * MINUTE_MS)
    """Ceiling: the longest time that a lock can last after the latest progress report. `"0"`: no ceiling.

    `max_processing_ms` of a job or a grant overrides it. `Worker` and `jobctl run` ask for no ceiling.
    """


class StuckSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to a job whose worker stopped reporting."""

    after: Duration = Duration(10 * MINUTE_MS)
    """Time since the last report after which a processing job without a live lock is stalled."""
    max_stalls: Annotated[int, Meta(ge=0, le=1000)] = 3
    """A job that stalls more often than this fails."""
    on_stall: OnStall = "auto"
    """What happens to a stalled job: `auto`, `requeue` or `fail`.

    `auto` requeues the job if it reported no progress or has attempts left, and fails it otherwise.
    """


class CleanupSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How often stalled jobs are recovered and cleanup runs."""

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

    Workers wait for one such batch at most.
    """


class RetentionSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How long finished jobs and records are kept."""

    completed: Duration = Duration(7 * DAY_MS)
    """How long completed jobs are kept, unless `complete` sets `expires_at`."""
    failed: Duration = Duration(30 * DAY_MS)
    """How long failed jobs are kept."""
    cancelled: Duration = Duration(7 * DAY_MS)
    """How long cancelled jobs are kept."""
    journal: Duration = Duration(DAY_MS)
    """How long the journal keeps the events of a deleted job."""
    audit: Duration = Duration(90 * DAY_MS)
    """How long audit entries are kept. At most 100,000 changes are kept."""


class ValidationSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What a completed job must have."""

    require_download_url: bool = False
    """Reject a `complete` without a `download_url`.

    Completion by an operator is rejected as well; an import is not.
    """


class LateSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Results that a worker submits after it lost its lock."""

    results: LatePolicy = "keep"
    """What happens to a late result: `keep`, `adopt_if_unclaimed` or `drop`.

    `keep` stores it beside the job until an operator adopts it. `adopt_if_unclaimed` completes the job with it if
    nothing has happened to the job since recovery ended the grant, and keeps it otherwise. `drop` discards it.
    """
    queues: dict[str, LatePolicy] = {}
    """Exceptions by queue, such as `{video = "adopt_if_unclaimed"}`."""


class LimitsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Upper limits. A request above one is rejected with the error code named here."""

    mailbox: Positive = 10_000
    """Commands that can wait in the mailbox; above it `503 overloaded`."""
    inflight_bytes: Positive = 64 << 20
    """Total bytes of request bodies that wait; above it `503 overloaded`."""
    body: Positive = 1 << 20
    """Bytes of a request body, or of one line of a stream; above it `413 too_large`."""
    payload: Positive = 256 << 10
    """Bytes of a job's payload, and of its metadata; above it `413 too_large`."""
    bulk: Annotated[int, Meta(ge=1, le=1000)] = 1000
    """Jobs in one bulk create, 1 to 1000; above it `413 too_large`."""
    claim_wait: Duration = Duration(MINUTE_MS)
    """Longest time that a claim can wait for work, at most one minute."""
    parked_claims: Positive = 10_000
    """Claims that can wait for work at the same time; above it `503 overloaded`."""
    event_streams: Positive = 100
    """Open event streams of both APIs and the dashboard together; above it `503 overloaded`."""
    downloads: Positive = 20
    """Stored results that can be downloaded at the same time; above it `503 overloaded`."""
    live_jobs: Positive = 5_000_000
    """Unfinished jobs; above it `507 too_many_jobs`."""
    queues: Positive = 10_000
    """Queues with jobs, finished jobs included; the first job of one more queue gets `507 too_many_queues`."""
    idempotency_keys: Positive = 200_000
    """Stored responses to requests with an `Idempotency-Key`.

    Above it, the oldest response is removed once it is 10 minutes old; until then, requests with a key get
    `503 overloaded`.
    """


class AlertsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Alert thresholds. An alert fires above its threshold unless noted otherwise."""

    stuck_jobs: Annotated[int, Meta(ge=0)] = 5
    """Jobs that are stalled now or were recovered in the last 10 minutes."""
    processing_jobs: Annotated[int, Meta(ge=0)] = 20
    """Jobs in `processing`."""
    average_processing: Duration = Duration(10 * MINUTE_MS)
    """Average processing time."""
    pass_issues: Annotated[int, Meta(ge=0)] = 10
    """Issues found by one cleanup run."""
    granted_twice: Annotated[int, Meta(ge=0)] = 0
    """Jobs granted again in the last hour while the previous worker's lock had time left."""
    slower_than_usual: Annotated[float, Meta(ge=1, le=1000)] = 2.0
    """95th percentile of a kind's processing time, as a multiple of what is usual for the kind.

    It compares the last hour with the hours before it.
    """
    webhook_failing: Duration = Duration(5 * MINUTE_MS)
    """Time for which a webhook has accepted no message."""
    queue_without_workers: Duration = Duration(2 * MINUTE_MS)
    """Time for which a job has been due while no worker claimed its queue and kind."""
    queue_waits: Duration = Duration(5 * MINUTE_MS)
    """Time for which the oldest due job of a queue has waited. Paused queues are ignored."""
    failure_rate: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Share of a queue's attempts in the last 10 minutes that failed. Fires at the threshold, too."""
    failure_rate_attempts: Annotated[int, Meta(ge=1)] = 20
    """Number of attempts in the last 10 minutes from which `failure_rate` applies."""
    disk_free_percent: Annotated[float, Meta(ge=0, le=100)] = 10.0
    """Free space on the store's disk, in percent. Fires below the threshold."""
    disk_free_bytes: Annotated[int, Meta(ge=0)] = 1 << 30
    """Free space on the store's disk, in bytes. Fires below the threshold."""
    release_loop: Annotated[int, Meta(ge=0)] = 0
    """Jobs released 20 times in a row without progress, the last time with a delay below 1 s."""


class ArtifactsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where stored results are kept."""

    url: str = ""
    """Store of the objects that `storage_key` names: `file:///DIRECTORY` or `s3://BUCKET/PREFIX`. Empty: none.

    An object is deleted with its job. `s3` URLs need the extra `s3`; see
    [stored results](operations.md#stored-results).
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
    server: ServerSection = ServerSection()
    store: StoreSection = StoreSection()
    locks: LocksSection = LocksSection()
    stuck: StuckSection = StuckSection()
    cleanup: CleanupSection = CleanupSection()
    retention: RetentionSection = RetentionSection()
    validation: ValidationSection = ValidationSection()
    late: LateSection = LateSection()
    limits: LimitsSection = LimitsSection()
    alerts: AlertsSection = AlertsSection()
    artifacts: ArtifactsSection = ArtifactsSection()
    log: LogSection = LogSection()

    def policy(self) -> Policy:
        """What the rules need of it."""
        return Policy(
            lock_ttl_ms=int(self.locks.ttl),
            max_processing_ms=int(self.locks.max_processing),
            stuck_after_ms=int(self.stuck.after),
            max_stalls=self.stuck.max_stalls,
            on_stall=self.stuck.on_stall,
            keep_completed_ms=int(self.retention.completed),
            keep_failed_ms=int(self.retention.failed),
            keep_cancelled_ms=int(self.retention.cancelled),
            require_download_url=self.validation.require_download_url,
            late_results=self.late.results,
            late_queues=self.late.queues,
            late_bytes=self.limits.payload,
            live_jobs=self.limits.live_jobs,
            queues=self.limits.queues,
            idempotency_keys=self.limits.idempotency_keys,
            artifacts=bool(self.artifacts.url),
        )


class LoadedConfig(Struct, frozen=True):
    """A configuration with where each value came from, the tokens, and what deserves a loud warning."""

    config: Config
    sources: dict[str, str]  # "section.key" -> default, file PATH, env NAME, flag
    admin_tokens: tuple[str, ...]
    worker_tokens: tuple[str, ...]
    path: str | None = None
    read_only_tokens: tuple[str, ...] = ()
    development: bool = False
    warnings: tuple[str, ...] = ()
    own_directories: tuple[str, ...] = ()  # directories of the daemon's own files, where no artifact may lie
    webhooks: tuple[WebhookSetting, ...] = ()


# What a running daemon takes over on SIGHUP; the rest is settled when its sockets and its store are opened.
RELOADABLE: Final = frozenset(
    {
        *(f"locks.{name}" for name in LocksSection.__struct_fields__),
        *(f"stuck.{name}" for name in StuckSection.__struct_fields__),
        *(f"cleanup.{name}" for name in CleanupSection.__struct_fields__),
        *(f"retention.{name}" for name in RetentionSection.__struct_fields__),
        *(f"alerts.{name}" for name in AlertsSection.__struct_fields__),
        "validation.require_download_url",
        *(f"late.{name}" for name in LateSection.__struct_fields__),
        "limits.live_jobs",
        "limits.queues",
        "worker.token_file",
        "admin.token_file",
        "admin.readonly_token_file",
        "log.level",
    }
)

_BOUNDS: Final[dict[str, tuple[int, int]]] = {
    "locks.ttl": (SECOND_MS, DAY_MS),
    "locks.max_processing": (0, YEAR_MS),
    "stuck.after": (0, YEAR_MS),
    "cleanup.interval": (100, DAY_MS),
    "cleanup.min_interval": (0, DAY_MS),
    "cleanup.recover_every": (0, HOUR_MS),
    "retention.completed": (0, 100 * YEAR_MS),
    "retention.failed": (0, 100 * YEAR_MS),
    "retention.cancelled": (0, 100 * YEAR_MS),
    "retention.journal": (0, 100 * YEAR_MS),
    "retention.audit": (0, 100 * YEAR_MS),
    "limits.claim_wait": (0, MINUTE_MS),
    "alerts.average_processing": (0, YEAR_MS),
    "alerts.webhook_failing": (0, YEAR_MS),
    "alerts.queue_without_workers": (0, YEAR_MS),
    "alerts.queue_waits": (0, YEAR_MS),
}


def parse_duration(text: str) -> int:
    """Milliseconds of "15m", "500ms", "10s", "7d", "0". Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or (match[2] is None and int(match[1]) != 0):
        raise ValueError(f'"{text}" is no duration: write a number and ms, s, m, h or d, such as "15m"')
    return int(match[1]) * _UNITS[match[2] or "ms"]


def show_duration(ms: int) -> str:
    """The shortest text that `parse_duration` reads as `ms`."""
    if ms == 0:
        return "0"
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if ms % _UNITS[unit] == 0)
    return f"{ms // _UNITS[unit]}{unit}"


def load(
    flags: Mapping[str, str], environ: Mapping[str, str], path: str | None = None, *, need_token: bool = True
) -> LoadedConfig:
    """The effective configuration. `flags` maps "section.key" to text; `path` is that of --config.

    `need_token` is off for work on files, which no token guards. Raises ConfigError: file, key and what is expected.
    """
    found = _find_file(environ, path)
    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    webhooks: tuple[WebhookSetting, ...] = ()
    if found is not None:
        tables = _read_file(found)
        webhooks = _webhooks(found, tables.pop(WEBHOOKS, []))
        for key, value in tables.items():
            _set(values, sources, key, value, f"file {found}")
    for name, key in _environment(environ).items():
        _set(values, sources, key, environ[name], f"env {name}")
    for key, text in flags.items():
        _set(values, sources, key, text, "flag")
    config = _fill_in_paths(_convert(values, sources), environ, sources)
    try:
        _check(config)
        own_places = _own_directories(config, environ, found, webhooks)
        check_artifact_directory(
            config.artifacts.url, own_places, os.path.abspath
        )  # where they lie may hang, also on a reload
    except ConfigError as error:
        raise ConfigError(_with_sources(str(error), sources)) from None
    if need_token:
        _check_parser(config)
    development = _is_development(environ)
    admin_tokens, worker_tokens, reader_tokens = _tokens(config, environ)
    if not admin_tokens and need_token and not development:
        raise ConfigError(
            "no admin token: set ADMIN_TOKEN, ADMIN_TOKEN_FILE or [admin] token_file (a systemd credential named "
            f"admin_token works too). Make one with: {MAKE_TOKEN}"
        )
    return LoadedConfig(
        config,
        {key: sources.get(key, "default") for key in KEYS},
        admin_tokens,
        worker_tokens,
        None if found is None else str(found),
        reader_tokens,
        development,
        (
            *_warnings(config),
            *_exposed_secrets(found, _secret_files(config, environ, webhooks), webhooks),
            *_doubtful_settings(config, sources, development),
        ),
        own_places,
        webhooks,
    )


def _check_parser(config: Config) -> None:
    """Refuse to serve with aiohttp's Python parser, which accepts requests that the C parser rejects."""
    from aiohttp import http_parser  # only a daemon needs it

    if config.server.python_parser or http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy:
        return
    raise ConfigError(
        "aiohttp has no C parser here, and its Python parser accepts malformed requests. Unset AIOHTTP_NO_EXTENSIONS "
        "and reinstall aiohttp from a wheel or with a C compiler; or accept it: [server] python_parser = true"
    )


def effective(loaded: LoadedConfig) -> str:
    """The configuration as TOML, each line with the source of its value. No secret is in it."""
    lines = []
    for section in Config.__struct_fields__:
        lines.append(f"[{section}]")
        for name in getattr(loaded.config, section).__struct_fields__:
            value = getattr(getattr(loaded.config, section), name)
            lines.append(f"{name} = {to_toml(value)}  # {loaded.sources[f'{section}.{name}']}")
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
    lines.append(f"# admin tokens: {count or 'a random one at start'}; worker tokens: {len(loaded.worker_tokens)}")
    lines.append(f"# tokens that may only look: {len(loaded.read_only_tokens)}")
    return "\n".join(lines)


def to_toml(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Duration):
        return f'"{show_duration(value)}"'
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_toml(name)} = {to_toml(each)}' for name, each in value.items())}}}"
    return msgspec.json.encode(value).decode()


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Return the keys that differ: those that a running daemon can apply, and those that need a restart."""
    differing = [key for key in KEYS if _get(old, key) != _get(new, key)]
    return [key for key in differing if key in RELOADABLE], [key for key in differing if key not in RELOADABLE]


def reloaded(old: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """Return `old` with the reloadable settings of `new`, the keys that changed, and those that need a restart."""
    changed, need_restart = changes(old, new)
    for key in changed:
        section, name = key.split(".")
        table = msgspec.structs.replace(getattr(old, section), **{name: _get(new, key)})
        old = msgspec.structs.replace(old, **{section: table})
    return old, changed, need_restart


def _get(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _fields() -> dict[str, type]:
    sections = get_type_hints(Config)
    return {
        f"{section}.{name}": hint
        for section in Config.__struct_fields__
        for name, hint in get_type_hints(sections[section], include_extras=True).items()
    }


KEYS: Final = _fields()


def _find_file(environ: Mapping[str, str], path: str | None) -> Path | None:
    named = path or environ.get("JOBD_CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigError(f"{named}: no such file. Give the path of a config.toml with --config or JOBD_CONFIG")
        return Path(named)
    return Path(DEFAULT_PATH) if Path(DEFAULT_PATH).is_file() else None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: it is nested too deeply") from None
    except (OSError, ValueError) as error:  # no UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = {}
    for section, table in tables.items():
        if section == WEBHOOKS:
            values[section] = table
            continue
        if section not in Config.__struct_fields__:
            known = ", ".join((*Config.__struct_fields__, WEBHOOKS))
            raise ConfigError(f"{path}: unknown section [{section}]. Known: {known}{_renamed(section)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} must be a section: write [{section}] on a line of its own")
        for name, value in table.items():
            values[f"{section}.{name}"] = value
    return values


def _renamed(section: str) -> str:
    """Return a hint if `section` is the former name of a section, else an empty string."""
    return ". [artefacts] was renamed to [artifacts]" if section == "artefacts" else ""


def _webhooks(path: Path, tables: Any) -> tuple[WebhookSetting, ...]:
    try:
        return webhook_config.read(tables, parse_duration)
    except BadWebhook as bad:
        raise ConfigError(f"{path}: {bad}") from None


def _tokens(config: Config, environ: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Those of operators, of workers, and of who may only look."""
    try:
        admin = credentials.admin_tokens(config.admin.token_file, environ)
        workers = (
            credentials.read_tokens(config.worker.token_file, "[worker] token_file") if config.worker.token_file else ()
        )
        return admin, workers, credentials.read_only_tokens(config.admin.readonly_token_file, environ, admin)
    except InvalidToken as bad:
        raise ConfigError(str(bad)) from None


def _exposed_secrets(
    path: Path | None, secret_files: list[str], webhooks: tuple[WebhookSetting, ...]
) -> tuple[str, ...]:
    """A secret in a file that everybody may read is none."""
    loud = [
        f"{each} holds a secret, and EVERYBODY may read it: chmod 640"
        for each in secret_files
        if _is_world_readable(each)
    ]
    if path is not None and any(each.is_inline for each in webhooks) and _is_world_readable(path):
        loud.append(f"{path} holds secrets of webhooks, and EVERYBODY may read it: chmod 640, or use secret_file.")
    return tuple(loud)


def _is_world_readable(path: str | Path) -> bool:
    """Whether everybody may read it. A file that is not there is the affair of who reads it."""
    try:
        return bool(os.stat(path).st_mode & 0o004)
    except OSError:
        return False


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Names JOBD_<SECTION>_<KEY> that are set, with the key that each means."""
    found = {}
    for name in environ:
        if not name.startswith("JOBD_") or name in _NOT_SETTINGS or name.startswith("JOBD_JOB_"):
            continue
        section, _, key = name.removeprefix("JOBD_").lower().partition("_")
        if f"{section}.{key}" not in KEYS:
            raise ConfigError(
                f"environment {name}: no such key. Names are JOBD_<SECTION>_<KEY>, as in config.toml{_renamed(section)}"
            )
        found[name] = f"{section}.{key}"
    return found


def _set(values: dict[str, dict[str, Any]], sources: dict[str, str], key: str, value: Any, source: str) -> None:
    if key not in KEYS:
        section = key.partition(".")[0]
        known = ", ".join(name.partition(".")[2] for name in KEYS if name.startswith(f"{section}."))
        raise ConfigError(f"{source}: unknown key {key}. Known in [{section}]: {known}{_renamed(section)}")
    hint = KEYS[key]
    try:
        if hint is Duration:
            value = _duration(key, value)
        elif source.startswith(("env", "flag")):
            value = _from_text(hint, value)
    except ValueError as error:
        raise ConfigError(f"{source}: {key}: {error}") from None
    section, _, name = key.partition(".")
    values.setdefault(section, {})[name] = value
    sources[key] = source


def _duration(key: str, value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError(f'expected a duration in quotes, such as "15m", not {value!r}')
    ms = parse_duration(value)
    least, most = _BOUNDS[key]
    if not least <= ms <= most:
        raise ValueError(f"{value} is outside {show_duration(least)} to {show_duration(most)}")
    return ms


def _from_text(hint: Any, text: str) -> Any:
    """`text` as the key has it. Lists and tables may also be written as in the file."""
    if (hint == list[str] or get_origin(hint) is dict) and (given := _as_in_file(text)) is not None:
        return given
    if hint == list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(hint) is dict:
        return dict(_pair(part) for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"expected true or false, not {text!r}")
        return text.lower() in ("true", "1", "yes")
    try:
        return msgspec.convert(text, hint, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}{_choices(hint)}") from None


def _as_in_file(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or table that `text` is in TOML, None where it is none: an IPv6 address has brackets, too."""
    try:
        values = tomllib.loads(f"it = {text}")
    except (ValueError, RecursionError):
        return None
    value = values.pop("it")
    return value if isinstance(value, list | dict) and not values else None


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"expected NAME=VALUE, several with a comma between them, not {text.strip()!r}")
    return name.strip(), value.strip()


def _choices(hint: object) -> str:
    """The values that a key takes, where they are a few words."""
    if get_origin(hint) is dict:
        return _choices(get_args(hint)[1])
    words = get_args(hint) if get_origin(hint) is Literal else ()
    return f"; expected one of {', '.join(map(str, words))}" if words else ""


def _convert(values: dict[str, dict[str, Any]], sources: Mapping[str, str]) -> Config:
    try:
        return msgspec.convert(values, Config, dec_hook=lambda hint, value: hint(value))
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        key = where.rstrip("`").partition("[")[0]
        message += _choices(KEYS.get(key))
        raise ConfigError(f"{sources.get(key, 'configuration')}: {key}: {message}") from None


def _fill_in_paths(config: Config, environ: Mapping[str, str], sources: dict[str, str]) -> Config:
    """Fill in the default places: systemd's directories, those of root, else the user's."""
    worker, store = config.worker, config.store
    if not worker.socket:
        worker = msgspec.structs.replace(worker, socket=str(runtime_directory(environ) / "worker.sock"))
    if not store.path:
        in_memory = _is_development(environ) and "store.path" not in sources
        path = ":memory:" if in_memory else str(state_directory(environ) / "jobd.db")
        store = msgspec.structs.replace(store, path=path)
    worker = msgspec.structs.replace(worker, socket=os.path.abspath(worker.socket))
    if store.path != ":memory:":
        store = msgspec.structs.replace(store, path=os.path.abspath(store.path))
    return msgspec.structs.replace(config, worker=worker, store=store)


def _is_development(environ: Mapping[str, str]) -> bool:
    return environ.get("ENVIRONMENT") == "development"


def runtime_directory(environ: Mapping[str, str]) -> Path:
    if environ.get("RUNTIME_DIRECTORY"):
        return Path(environ["RUNTIME_DIRECTORY"].partition(":")[0])
    if os.geteuid() == 0:
        return Path("/run/jobd")
    return Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "jobd"


def state_directory(environ: Mapping[str, str]) -> Path:
    if environ.get("STATE_DIRECTORY"):
        return Path(environ["STATE_DIRECTORY"].partition(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/jobd")
    return Path(environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/")) / ".local/state") / "jobd"


def parse_listen(text: str, key: str) -> tuple[str, int] | str:
    """("127.0.0.1", 8770) of "127.0.0.1:8770", or the path of "unix:/path"."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/"):
            raise ConfigError(f'{key}: "{text}": the path of a Unix socket starts with /')
        return path
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(f'{key}: "{text}": expected HOST:PORT, such as 127.0.0.1:8770, or unix:/path')
    return host.strip("[]"), int(port)


def _with_sources(message: str, sources: Mapping[str, str]) -> str:
    """With where the keys come from that it names, but for those that nobody has set."""
    places = dict.fromkeys(place for key, place in sources.items() if re.search(rf"\b{re.escape(key)}\b", message))
    return f"{', '.join(places)}: {message}" if places else message


def _check(config: Config) -> None:
    """Values and combinations that cannot work."""
    for key in KEYS:
        value = _get(config, key)
        if "\0" in (value if isinstance(value, str) else "".join(value) if isinstance(value, list) else ""):
            raise ConfigError(f"{key}: there is a NUL in it, which no name has")
    for name, section in (("worker", config.worker), ("admin", config.admin)):
        if bool(section.tls_cert) != bool(section.tls_key):
            raise ConfigError(f"{name}.tls_cert and {name}.tls_key go together: set both or none")
    if isinstance(parse_listen(config.admin.listen, "admin.listen"), str) and config.admin.tls_cert:
        raise ConfigError("admin.tls_cert: a Unix socket has no TLS; listen on HOST:PORT or remove it")
    if config.worker.listen:
        if isinstance(parse_listen(config.worker.listen, "worker.listen"), str):
            raise ConfigError("worker.listen: expected HOST:PORT; the Unix socket is worker.socket")
        if not config.worker.token_file:
            raise ConfigError("worker.listen needs worker.token_file: a TCP port is never open without a token")
    elif config.worker.tls_cert:
        raise ConfigError("worker.tls_cert needs worker.listen: a Unix socket has no TLS")
    if config.limits.payload > config.limits.body:
        raise ConfigError("limits.payload must not be larger than limits.body")
    if config.limits.inflight_bytes < 2 * config.limits.body:
        raise ConfigError("limits.inflight_bytes must be at least twice limits.body, or no large request comes in")
    for host in config.admin.hosts:
        if not is_host(host):
            raise ConfigError(f"admin.hosts: {host!r}: {_HOST_EXPECTED}")
    for name in config.late.queues:
        if not is_job_id(name):  # names of queues are made as ids are
            raise ConfigError(f"late.queues: {name!r}: a queue has 1 to 200 characters of A-Z a-z 0-9 . _ : -")
    if config.artifacts.url:
        _check_artifacts(config.artifacts.url)


def _check_artifacts(url: str) -> None:
    """Whether that names a store, and whether what it takes is installed."""
    expected = "expected file:///DIRECTORY or s3://BUCKET/PREFIX"
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ConfigError(f"artifacts.url: {expected}, without a key: that belongs into AWS_ACCESS_KEY_ID and its like")
    if re.fullmatch(r"file:///[^?#]+", url) and "\0" not in unquote(url):
        return
    bucket = re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?", url)
    prefix = unquote(bucket[1] or "").strip("/") if bucket is not None else ""
    if bucket is None or (prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/"))):
        raise ConfigError(f'artifacts.url: "{url}": {expected}')
    if find_spec("obstore") is None:
        raise ConfigError("artifacts.url: s3:// needs an extra that is not installed: pip install 'jobd[s3]'")


def _own_directories(
    config: Config, environ: Mapping[str, str], file: Path | None, webhooks: Iterable[WebhookSetting]
) -> tuple[str, ...]:
    """The directories, as named and without links, of the daemon's own files: store, sockets, config.toml, secrets."""
    listens = (parse_listen(place, "listen") for place in (config.worker.listen, config.admin.listen) if place)
    files = [
        "" if config.store.path == ":memory:" else config.store.path,
        config.worker.socket,
        *(place for place in listens if isinstance(place, str)),
        "" if file is None else str(file),
        config.worker.tls_cert,
        config.admin.tls_cert,
        *_secret_files(config, environ, webhooks),
    ]
    ways = [way for path in files if path for way in (os.path.abspath(path), os.path.realpath(path))]
    places = [*map(os.path.dirname, ways), environ.get("CREDENTIALS_DIRECTORY", "")]
    return tuple(dict.fromkeys(way for place in places if place for way in (place, os.path.realpath(place))))


def _secret_files(config: Config, environ: Mapping[str, str], webhooks: Iterable[WebhookSetting]) -> list[str]:
    """The files with tokens, keys and secrets that somebody has named. What systemd hands over it guards itself."""
    files = [
        *(path for section in (config.worker, config.admin) for path in (section.token_file, section.tls_key)),
        config.admin.readonly_token_file,
        *(setting.section.secret_file for setting in webhooks),
        *(environ.get(name, "") for name in ("ADMIN_TOKEN_FILE", "ADMIN_READONLY_TOKEN_FILE")),
    ]
    return list(dict.fromkeys(filter(None, files)))


def check_artifact_directory(
    url: str, own_places: tuple[str, ...], resolve: Callable[[str], str] = os.path.realpath
) -> None:
    """Raise ConfigError where a file of ours lies in the directory of artifacts: workers say what is deleted there.

    `resolve` makes an absolute path of its name. With the one that follows links it touches the place, which may hang.
    """
    if not url.startswith("file:"):
        return
    directory = resolve(unquote(url.removeprefix("file://")))
    for place in own_places:
        if os.path.commonpath((directory, place)) == directory:
            told = f"the daemon's own files lie in {place}, and workers say what is deleted in {directory}"
            raise ConfigError(f'artifacts.url: "{url}": {told}. Give artifacts a directory of their own')


def _warnings(config: Config) -> tuple[str, ...]:
    """A TCP address that others can reach, without TLS: the token travels in the clear."""
    loud = []
    for name, section in (("admin", config.admin), ("worker", config.worker)):
        if not section.listen or section.tls_cert:
            continue
        place = parse_listen(section.listen, f"{name}.listen")
        if not isinstance(place, str) and not _is_loopback(place[0]):
            loud.append(f"[{name}] listens on {section.listen} WITHOUT TLS: tokens travel in the clear. Set tls_cert.")
    return tuple(loud)


def _doubtful_settings(config: Config, sources: Mapping[str, str], development: bool) -> tuple[str, ...]:
    """What can be set so, and is hardly meant: of two keys the other holds, or no job is kept."""
    told = []

    def said(key: str) -> str:
        return f"{key} = {to_toml(_get(config, key))} ({sources.get(key, 'default')})"

    if config.cleanup.interval < config.cleanup.min_interval:
        holds = show_duration(config.cleanup.min_interval)
        text = f"{said('cleanup.interval')} is below {said('cleanup.min_interval')}, which holds"
        told.append(f"{text}: a pass comes every {holds}. Lower that one too.")
    if 0 < config.locks.max_processing < config.locks.ttl:
        text = f"{said('locks.ttl')} is above {said('locks.max_processing')}, which holds"
        told.append(f"{text}: locks are cut to it, unless their job has a max_processing_ms. Raise that one too.")
    if config.store.path == ":memory:" and not development:
        text = f"{said('store.path')}: all jobs are gone when the daemon ends"
        told.append(f"{text}. Name a file, or set ENVIRONMENT=development where that is meant.")
    return tuple(told)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: whoever runs the name server says where it points


def is_host(text: str) -> bool:
    """Whether somebody can call this daemon so: by a name, or by an address that is one place."""
    is_bracketed = text.startswith("[") and text.endswith("]")
    plain = text[1:-1] if is_bracketed else text
    if ":" in plain:
        return _is_address(plain)
    if is_bracketed or len(plain.removesuffix(".")) > _LONGEST_HOST or not _HOST_NAME.fullmatch(plain):
        return False
    ends_in_number = plain.removesuffix(".").rpartition(".")[2].isdigit()  # for a browser that is an address
    return _is_address(plain) if ends_in_number else True


def _is_address(text: str) -> bool:
    """Not so an address with its zone, which no Host header has, or the one that stands for all."""
    try:
        return "%" not in text and not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False
