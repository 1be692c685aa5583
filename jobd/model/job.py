"""The job record and its parts, and the bounds of their fields."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import astuple, replace

from jobd.model.clocks import LockMs
from jobd.model.times import DAY_MS as DAY_MS
from jobd.model.times import HOUR_MS as HOUR_MS
from jobd.model.times import MINUTE_MS as MINUTE_MS
from jobd.model.times import SECOND_MS as SECOND_MS
from jobd.model.times import YEAR_MS as YEAR_MS

Status = Literal["queued", "processing", "completed", "failed", "cancelled"]
OnStall = Literal["auto", "requeue", "fail"]
LatePolicy = Literal["keep", "adopt_if_unclaimed", "drop"]
if TYPE_CHECKING:
    JsonValue = msgspec.Raw | None
else:
    JsonValue = msgspec.Raw  # msgspec accepts only null for `Raw | None`; the default of a field can still be None

STATUSES: Final[tuple[Status, ...]] = ("queued", "processing", "completed", "failed", "cancelled")
LIVE: Final = frozenset({"queued", "processing"})
FINISHED: Final = frozenset({"completed", "failed", "cancelled"})

# All changes of status. `completed` is final.
TRANSITIONS: Final = frozenset(
    {
        ("queued", "processing"),
        ("queued", "failed"),
        ("queued", "cancelled"),
        ("queued", "completed"),
        ("processing", "completed"),
        ("processing", "failed"),
        ("processing", "queued"),
        ("processing", "cancelled"),
        ("failed", "queued"),
        ("failed", "completed"),
        ("cancelled", "queued"),
        ("cancelled", "completed"),
    }
)

# A Unix time below this is probably in seconds, not milliseconds: 10^11 ms is March 1973.
EARLIEST_MS: Final = 100_000_000_000
LATEST_MS: Final = 253_402_300_799_999  # 9999-12-31T23:59:59.999Z

# `$` alone would accept a trailing line feed.
ID_PATTERN: Final = r"^[A-Za-z0-9_.:\-]{1,200}$(?!\n)"
# Of new jobs. Clients and proxies remove a `.` or `..` from the path of a URL.
NEW_ID_PATTERN: Final = r"^(?!\.{1,2}$)[A-Za-z0-9_.:\-]{1,200}$(?!\n)"
MAX_PRIORITY: Final = 1000  # priorities range from -MAX_PRIORITY; a smaller one runs first

# A fencing token is (epoch << TOKEN_COUNTER_BITS) | counter. Up to SAFE_EPOCH it is below 2^53, which JavaScript reads
# exactly. Above LAST_EPOCH, SQLite could not store it.
TOKEN_COUNTER_BITS: Final = 24
COUNTER_MASK: Final = (1 << TOKEN_COUNTER_BITS) - 1
SAFE_EPOCH: Final = (1 << 29) - 1  # in January 2037
LAST_EPOCH: Final = (1 << 39) - 1
_EPOCHS_BEGIN_MS: Final = 1_577_836_800_000  # 2020-01-01T00:00:00Z

SMALL_PAYLOAD_BYTES: Final = 8 << 10  # a job does not record the size of a payload up to this one
MAX_PERCENT: Final = 100
MAX_HEADERS: Final = 20
HEADER_BYTES: Final = 2 << 10  # of the names and values of all headers of a job
CHECKPOINT_BYTES: Final = 64 << 10
MAX_LATE_RESULTS: Final = 5  # late results of a job: those of its latest grants
# Releases in a row without progress: from DELAYED_FROM on, the job waits. From LOOP_FROM on, it is in a release loop.
DELAYED_FROM: Final = 5
LOOP_FROM: Final = 10

_ID = re.compile(ID_PATTERN)


def may_adopt(status: str) -> bool:
    """Return whether a late result of such a job can still be adopted, now or when its grant has ended."""
    return (status, "completed") in TRANSITIONS


def is_job_id(text: str) -> bool:
    """Return whether `text` is a valid job id: 1 to 200 of A-Z a-z 0-9 . _ : -"""
    return _ID.fullmatch(text) is not None


def requeues_on_stall(job: Job) -> bool:
    """Return whether the next stall puts the job back into its queue, by its `on_stall`. Otherwise it fails."""
    options = job.options
    if job.stalls >= options.max_stalls or options.on_stall == "fail":
        return False
    return options.on_stall == "requeue" or job.progress == 0 or job.attempt < options.max_attempts


def release_delay_ms(releases: int) -> int | None:
    """Return the delay after `releases` releases in a row without progress: 1 s after the fifth, doubling to 1 min.

    Before the fifth it is None: the job keeps its position in the queue.
    """
    if releases < DELAYED_FROM:
        return None
    return min(SECOND_MS << min(releases - DELAYED_FROM, 6), MINUTE_MS)


def is_release_loop(job: Job) -> bool:
    """Return whether the job was released LOOP_FROM times in a row without progress, the last time without a snooze.

    A snooze is a delay of at least 1 s that its worker asks for. After a grant that was not delivered, the delay is
    unknown until the next release.
    """
    ended = job.ended
    if job.releases < LOOP_FROM or ended is None or ended.rule not in ("release", "release-lock"):
        return False
    delay_ms = job.run_at - ended.at
    return delay_ms < SECOND_MS or delay_ms == release_delay_ms(job.releases)


def is_retried(job: Job) -> bool:
    """Return whether a queued job waits for another attempt after a failed one."""
    return job.attempt > 0 and job.ended is not None and job.ended.verb == "fail"


def recorded_bytes(payload: Collection[int]) -> int:
    """Return the `payload_bytes` of a job with this payload."""
    return len(payload) if len(payload) > SMALL_PAYLOAD_BYTES else 0


def metadata_bytes(job: Job) -> int:
    """Return the size of the metadata of the job's result."""
    metadata = None if job.result is None else job.result.metadata
    return 0 if metadata is None else len(metadata)


def granted_bytes(job: Job) -> int:
    """Return the size of the large payload, the headers and the checkpoint in a view of the job."""
    extra = job.extra
    return job.payload_bytes if extra is None else job.payload_bytes + extra.headers_bytes + extra.checkpoint_bytes


def shown_bytes(job: Job) -> int:
    """Return the size of what `granted_bytes` counts and of the metadata in a view of the job."""
    return granted_bytes(job) if job.result is None else granted_bytes(job) + metadata_bytes(job)


# Payloads, headers and checkpoints are bodies: text that is stored beside the jobs. The key of a payload is the seq of
# its job; those of headers and of a checkpoint are negative.


def headers_key(seq: int) -> int:
    return -2 * seq


def checkpoint_key(seq: int) -> int:
    return -2 * seq - 1


def seq_of_body(key: int) -> int:
    """Return the seq of the job that the body belongs to."""
    return key if key >= 0 else -key // 2


def extra_keys(job: Job | None) -> list[int]:
    """Return the keys of the headers and of the checkpoint of the job, if it has them."""
    if job is None or (extra := job.extra) is None:
        return []
    found = [headers_key(job.seq)] if extra.headers_bytes else []
    return [*found, checkpoint_key(job.seq)] if extra.checkpoint_bytes else found


def with_checkpoint(extra: Extra | None, size: int) -> Extra | None:
    """Return what a job has with a checkpoint of `size` bytes, 0 for none. None if that is nothing."""
    if (0 if extra is None else extra.checkpoint_bytes) == size:
        return extra
    changed = replace(extra or Extra(), checkpoint_bytes=size)
    return None if changed == Extra() else changed


def storage_key_error(key: str) -> str | None:
    """Return why the storage key of an artifact is invalid. It must be relative, without `..` and NUL."""
    if "\x00" in key:
        return "contains NUL"
    if key.startswith("/") or key.startswith("\\"):
        return "must be relative: remove the leading slash"
    if any(part == ".." for part in re.split(r"[/\\]", key)):
        return "must not contain a '..' segment"
    return None


def first_line(text: str) -> str:
    """Return `text` up to its first line feed."""
    return text.partition("\n")[0]


def headline(message: str, width: int) -> str:
    """Shorten an error message for a list: the first line, and more up to `width`, but no traceback."""
    text = message.partition("\nTraceback (most recent call last):")[0]
    width = max(width, len(first_line(text)))
    return text if len(text) <= width else f"{text[:width]}…"


def epoch_seconds(now_ms: int) -> int:
    """Return the seconds from 2020-01-01 UTC to the wall time `now_ms`."""
    return (now_ms - _EPOCHS_BEGIN_MS) // SECOND_MS


def new_epoch(highest: int, now_ms: int) -> int:
    """Return the epoch that begins at the wall time `now_ms`. It is above `highest`, the highest known one.

    Copies of one store get different epochs, because they begin in different seconds. If the clock is past SAFE_EPOCH,
    the epoch is `highest` + 1, which keeps tokens below 2^53 as long as possible.
    """
    seconds = epoch_seconds(now_ms)
    return max(seconds, highest + 1) if seconds <= SAFE_EPOCH else highest + 1


class BackoffOptions(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """How long a failed job waits before its next attempt."""

    kind: Annotated[
        Literal["exponential", "fixed"], Meta(description="How the wait grows from attempt to attempt.")
    ] = "exponential"
    base_ms: Annotated[int, Meta(ge=0, le=YEAR_MS, description="The first wait, in ms.")] = 10 * SECOND_MS
    max_ms: Annotated[int, Meta(ge=0, le=YEAR_MS, description="The longest wait, in ms; at least base_ms.")] = HOUR_MS
    jitter: Annotated[
        bool,
        Meta(description="Wait between half of the computed time and all of it, so that jobs do not return together."),
    ] = True

    def wait_ms(self, attempt: int, fraction: float) -> int:
        """Return the wait after failed attempt number `attempt` (from 1). `fraction` in [0, 1) is the random jitter.

        With jitter, the wait is between half of the full wait and all of it. Jobs that failed together do not return
        together, and no wait is too short for an outage.
        """
        full = self.base_ms
        if self.kind == "exponential":
            full = self.base_ms << min(max(attempt - 1, 0), 62)
        full = min(full, self.max_ms)
        return full - int(full * fraction) // 2 if self.jitter else full


# The journal stores the parts of a job as arrays, because field names would take a third of its size. So new fields are
# appended and have a default, and fields are never removed or moved. BackoffOptions is an object, as clients send it.
# The first event of a job leaves out the defaults of Job, so these never change.


class Options(Struct, frozen=True, gc=False, array_like=True):
    """The options of a job, as its creator set them. Jobs with equal options share one value in memory.

    `stall_after_ms` and `progress_timeout_ms` are None if the daemon's configuration applies.
    """

    queue: str = "default"
    kind: str = ""
    priority: int = 0
    max_attempts: int = 1
    backoff: BackoffOptions = BackoffOptions()
    max_stalls: int = 3
    on_stall: OnStall = "auto"
    stall_after_ms: int | None = None
    progress_timeout_ms: int | None = None


class Grant(Struct, frozen=True, gc=False, array_like=True):
    """A grant: the worker of a job, the secret of its lock and its fencing token.

    The durations are fixed when the grant is made; later changes of the configuration do not affect them.
    `progress_timeout_ms` 0 means no progress timeout.
    """

    lock_id: str
    fencing_token: int
    worker: str
    acquired_at: int
    ttl_ms: int
    stall_after_ms: int
    progress_timeout_ms: int


class LockDeadlines(Struct, frozen=True, gc=False, array_like=True):
    """The deadlines of a grant, in lock time (engine/clock.py), in ms.

    `expires`: the lock expires. `stall_due`: stall_after_ms after the latest grant, progress or extend.
    `progress_due`: progress_timeout_ms after the latest grant or progress; None without a progress timeout.
    `cleared`: recovery has recorded the expiry; the next extend or progress resets it.
    """

    expires: LockMs
    stall_due: LockMs
    progress_due: LockMs | None
    cleared: bool = False

    def is_live(self, lock_ms: LockMs) -> bool:
        """Return whether the lock has not expired. It expires at `expires`."""
        return not self.cleared and lock_ms < self.expires

    def is_past_progress_due(self, lock_ms: LockMs) -> bool:
        return self.progress_due is not None and lock_ms >= self.progress_due

    @property
    def stalled_at(self) -> LockMs:
        """The lock time from which the job is stalled."""
        due = max(self.expires, self.stall_due)
        return due if self.progress_due is None else min(due, self.progress_due)


class PreviousGrant(Struct, frozen=True, gc=False, array_like=True):
    """The last ended grant of a job, for responses to a repeated ending or a late one.

    `verb` and `body_hash` are set if its worker ended it (complete, fail, release). `rule` is the rule that ended it,
    and `reason` the reason, as in a `lock_lost` error.
    """

    lock_id: str
    fencing_token: int
    worker: str
    at: int
    rule: str
    reason: str
    verb: str | None = None
    body_hash: str | None = None


class Result(Struct, frozen=True, gc=False, array_like=True):
    """The result of a job. `metadata` is any JSON, stored as sent."""

    download_url: str | None = None
    file_path: str | None = None
    storage_key: str | None = None
    metadata: JsonValue = None


class LateResult(Struct, frozen=True, gc=False):
    """The result of a complete whose grant had ended. Stored separately from the job, at most one for each grant.

    `seq` is that of its event, `expires_at` the deletion time that the worker requested. `result` is empty if the query
    did not ask for results.
    """

    seq: int
    at: int
    worker: str
    fencing_token: int
    body_hash: str
    expires_at: int | None = None
    result: Result = Result()


class Failure(Struct, frozen=True, gc=False, array_like=True):
    """The last error of a job. It is kept until the job completes or an operator retries it."""

    message: str | None
    code: str | None = None


class Extra(Struct, frozen=True, gc=False, array_like=True):
    """What few jobs have.

    The schedule that created the job, and the time of the schedule that it is for. The sizes of headers and checkpoint,
    0 if there are none. The job of which this one is a copy.
    """

    schedule_id: str | None = None
    scheduled_at: int | None = None
    headers_bytes: int = 0
    checkpoint_bytes: int = 0
    copied_from: str | None = None


class Job(Struct, frozen=True, gc=False):
    """A job, without its payload: memory holds only the fields that decisions need.

    `seq` is the order of creation, unique in a store and never reused. A queued job fails at `expires_at`; a finished
    one is deleted then. Times named `*_at` are wall time, Unix ms. `releases` counts the releases in a row without
    progress. A progress report above 0 % resets it, and so does every other end of a grant. A grant that was not
    delivered does not change it. `payload_bytes` is the size of the payload, 0 if it is SMALL_PAYLOAD_BYTES or less.
    """

    seq: int
    id: str
    options: Options
    status: str
    created_at: int
    updated_at: int
    run_at: int
    progress: int | float = 0
    progress_message: str | None = None
    attempt: int = 0
    stalls: int = 0
    started_at: int | None = None
    finished_at: int | None = None
    expires_at: int | None = None
    grant: Grant | None = None
    deadlines: LockDeadlines | None = None
    ended: PreviousGrant | None = None
    result: Result | None = None
    error: Failure | None = None
    releases: int = 0
    payload_bytes: int = 0
    extra: Extra | None = None

    def waits_since(self, now: int) -> int:
        """Return since when a due job has waited: since it became due, its creation, or the end of its last grant."""
        return max(self.run_at, min(self.created_at if self.ended is None else self.ended.at, now))


class PackedJob(Struct, frozen=True, gc=False):
    """A queued job with a small payload that was due when it was created and has not changed since.

    Nearly all waiting jobs are like this. A PackedJob takes 48 bytes in memory, a Job 184 (state.LiveJobs).
    """

    seq: int
    id: str
    options: Options
    created_at: int

    def expand(self) -> Job:
        """Return the job."""
        return Job(self.seq, self.id, self.options, "queued", self.created_at, self.created_at, self.created_at)


_AS_NEW: Final = Job.__struct_defaults__


def packed(job: Job) -> PackedJob | None:
    """Return the packed form of `job`, None if that would lose a field. A job without an id or queue is invalid."""
    created_at = job.created_at
    if created_at != job.run_at or created_at != job.updated_at or job.status != "queued":
        return None
    if astuple(job)[-len(_AS_NEW) :] != _AS_NEW or not (job.id and job.options.queue):
        return None
    return PackedJob(job.seq, job.id, job.options, created_at)


class Policy(Struct, frozen=True):
    """The settings that the rules use: defaults, retention, limits. Times are in ms, sizes in bytes."""

    lock_ttl_ms: int = 15 * MINUTE_MS
    progress_timeout_ms: int = 30 * MINUTE_MS
    stall_after_ms: int = 10 * MINUTE_MS
    max_stalls: int = 3
    on_stall: OnStall = "auto"
    keep_completed_ms: int = 7 * DAY_MS
    keep_failed_ms: int = 30 * DAY_MS
    keep_cancelled_ms: int = 7 * DAY_MS
    require_download_url: bool = False
    late_results: LatePolicy = "keep"
    late_queues: dict[str, LatePolicy] = {}  # exceptions by queue
    late_bytes: int = 256 << 10  # of the metadata of a late result
    late_calls: bool = True  # the journal records rejected calls of ended grants
    live_jobs: int = 5_000_000
    queues: int = 10_000  # maximum number of queues with jobs
    schedules: int = 10_000
    idempotency_keys: int = 200_000
    artifacts: bool = False  # with an artifact store, the objects of deleted jobs are deleted too

    @property
    def shortest_keep_ms(self) -> int:
        """The shortest retention. A retention of 0 does not count: it deletes at once, even if the clock is suspect."""
        retentions = (self.keep_completed_ms, self.keep_failed_ms, self.keep_cancelled_ms)
        return min((keep_ms for keep_ms in retentions if keep_ms), default=7 * DAY_MS)

    def late_policy(self, queue: str) -> LatePolicy:
        """Return the policy for late results of the jobs of `queue`."""
        return self.late_queues.get(queue, self.late_results)
