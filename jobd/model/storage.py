"""The storage interface: its protocol, the values that it takes and returns, and its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, Protocol

from msgspec import Struct
from msgspec.structs import replace

from jobd.model.clocks import LockMs
from jobd.model.commands import ClockTrust
from jobd.model.events import Event, QueuePause, QuietRule
from jobd.model.job import HOUR_MS, Grant, Job, LateResult, PackedJob
from jobd.model.responses import DeliveryState
from jobd.model.schedules import Schedule
from jobd.model.webhooks import Delivery, Outbox, WebhookCursor

RESERVE_BYTES: Final = 16 << 20  # size of the reserve file
SPARE_BYTES: Final = 1 << 20  # free space at which a full disk accepts writes again
MAX_POSTPONE_MS: Final = 2 * HOUR_MS  # a tombstone that is postponed for longer was postponed by another clock


class CannotWrite(Exception):
    """Nothing was written. The same write can succeed later."""


class DiskFull(CannotWrite):
    """The disk is full (SQLITE_FULL, ENOSPC). The transaction was rolled back. Reads still work."""


class JournalDiskFull(DiskFull):
    """The disk of the server of a shared journal is full. Nothing was written."""


class FormatNotRead(CannotWrite):
    """A write needs a format of records that a node of the cluster does not read.

    A batch does only if the node has registered since the batch was decided.
    """


class DiskSpace(Struct, frozen=True):
    """The path of the store, and the space on its disk. `free_bytes` is the space available to the daemon's user."""

    path: str
    free_bytes: int
    total_bytes: int


class BadRows(Exception):
    """Rows that the batch needs are damaged or in quarantine. Nothing was written. `jobs` maps ids to reasons."""

    def __init__(self, jobs: dict[str, str]) -> None:
        super().__init__(f"bad rows: {jobs}")
        self.jobs = jobs


class Quarantined(Struct, frozen=True):
    """A job whose damaged rows were quarantined, and why.

    `uncounted` is the queue and status whose count of finished jobs no longer includes it, if they could be read.
    Without `is_moved` the rows could not be moved, for example on a full disk. They are still counted and are found
    again by the next read.
    """

    id: str
    reason: str
    uncounted: tuple[str, str] | None = None
    is_moved: bool = True


class BackupError(Exception):
    """A backup could not be made. The message is a sentence for the operator."""


BackupStep = Literal["copying", "checking"]
# Called often and from another thread, with the step, the bytes done and the total bytes (0 if unknown).
BackupProgress = Callable[[BackupStep, int, int], None]


EXTRA_FORMAT: Final = 3  # of the records with an Extra of a job, a schedule or a quiet rule
IN_MEMORY: Final = "in memory: lost when the daemon stops"  # what such a store shows instead of its path


class Numbers(Struct, frozen=True, gc=False):
    """The high-water marks and clocks that are persisted with each commit. `next_*` is the next number to assign."""

    epoch: int = 1
    next_token: int = 1  # the counter of the next fencing token, 2^24 if the counter is full (see job.py)
    next_job: int = 1
    next_event: int = 1
    lock_ms: LockMs = LockMs(0)
    wall_ms: int = 0
    clock_suspect: bool = False  # then wall_ms is the expected time, not the time of the clock
    expected_ms: int = 0  # the expected wall time; 0: `wall_ms`
    step_since: int = 0  # the last trusted time before the step that made the clock suspect; 0: unknown or none
    step_ms: int = 0

    @property
    def clock(self) -> ClockTrust:
        return ClockTrust(self.clock_suspect, self.expected_ms, self.step_since, self.step_ms)


class QueueRow(Struct, frozen=True, gc=False):
    """The stored state of a queue: its pause, and the number of its finished jobs by status.

    `paused_at`, `paused_by`, `pause_reason` and `paused_until` are the start, operator, reason and end of the pause.
    They are None if the queue is not paused or if they are unknown. Times are wall time, Unix ms.
    """

    paused: bool = False
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    paused_at: int | None = None
    paused_by: str | None = None
    pause_reason: str | None = None
    paused_until: int | None = None

    @property
    def pause(self) -> QueuePause | None:
        """The pause of the queue; None if it is not paused."""
        if not self.paused:
            return None
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)

    def with_counts(self, completed: int, failed: int, cancelled: int) -> QueueRow:
        """Return this row with other numbers of finished jobs."""
        return replace(self, completed=completed, failed=failed, cancelled=cancelled)

    def without(self, status: str) -> QueueRow:
        """Return this row with one finished job of `status` less, at least 0."""
        return replace(self, **{status: max(getattr(self, status) - 1, 0)})


class StoredResponse(Struct, frozen=True, gc=False):
    """The stored response of an Idempotency-Key.

    `digest` is the hash of listener, method, path and key, `body_hash` that of the body. Either `body` is set (the
    encoded `data`, with its HTTP status), or `grants`: the (job id, lock id) of a start or claim, whose response is
    built from the current state while one of them is current.
    """

    digest: str
    body_hash: str
    at: int
    status: int = 200
    body: bytes | None = None
    grants: list[tuple[str, str]] | None = None


class Tombstone(Struct, frozen=True, gc=False):
    """An artifact whose job or late result was deleted. It is deleted too, unless another job names it.

    Times are wall time, Unix ms. Each deleted job or late result leaves at most one, which is smaller than it was, so
    tombstones need no limit.
    """

    job_seq: int  # of a late result: its seq, negative
    job_id: str
    key: str  # the storage_key
    at: int  # when the job or late result was deleted
    due_at: int  # when the next attempt is due
    tries: int = 0  # failed attempts


class AuditEntry(Struct, frozen=True, gc=False):
    """An audit entry: an action or a rejected request of an operator. `at` is wall time, Unix ms.

    `job_id` and `queue` are set if the action was about one. `outcome` is "done" or an error code, `jobs` the number of
    changed jobs. Entries with the same `part_of` become one entry, with the sum of their jobs and the last details.
    `changed_ids` are the changed jobs of an action on many, by which the entry can be found. They are not read back.
    """

    at: int
    who: str
    address: str
    what: str
    job_id: str | None = None
    queue: str | None = None
    reason: str | None = None
    outcome: str = "done"
    jobs: int = 0
    details: dict[str, Any] | None = None
    part_of: str | None = None
    changed_ids: list[str] = []


# Operator actions that change no job, queue or setting: dashboard sessions and downloads.
SIGN_INS: Final = frozenset({"sign-in", "sign-out"})
AUDITED_READS: Final = frozenset({"export", "backup", "artifact"})
AuditShare = Literal["changes", "rejected", "unknown callers", "sign-ins", "reads"]


def audit_share(action: str, outcome: str) -> AuditShare:
    """Return the share of the audit log that an entry belongs to. Each share has its own limit of entries."""
    if action in SIGN_INS:
        return "sign-ins" if outcome == "done" else "unknown callers"
    if outcome != "done":
        return "rejected"
    return "reads" if action in AUDITED_READS else "changes"


class AuditQuery(Struct, frozen=True):
    """A page of the audit log, newest first: seq below `before`, at most `limit` entries out of `scan` rows.

    `job_id` finds the entries about this job, and those of actions on many jobs that changed it.
    """

    who: str | None = None
    what: str | None = None
    job_id: str | None = None
    since: int | None = None  # wall time, Unix ms
    limit: int = 50
    before: int | None = None
    scan: int = 5_000


class AuditRows(Struct):
    """Audit entries with their numbers. `next_before` is the `before` of the next page, None at the end."""

    found: list[tuple[int, AuditEntry]]
    next_before: int | None = None


class DueTombstones(Struct):
    """Due tombstones, each with whether a job names its key.

    `held` has the numbers of those whose key is named by a late result, which can be adopted or deleted with its job.
    `damaged` counts the rows that were quarantined, `unmoved` the damaged rows that could not be.
    """

    found: list[tuple[Tombstone, bool]]
    damaged: int = 0
    held: set[int] = set()
    unmoved: int = 0


def tombstones(changes: Iterable[Event]) -> list[Tombstone]:
    """Return the tombstones of the deletions among `changes`, without those of late results."""
    created = []
    for event in changes:
        job = event.before
        if event.after is None and job is not None and job.result is not None and job.result.storage_key is not None:
            created.append(Tombstone(job.seq, job.id, job.result.storage_key, event.at, event.at))
    return created


def distinct_tombstones(items: Iterable[Tombstone]) -> list[Tombstone]:
    """Drop duplicates. A job can name the same object in its result and in a late result."""
    return list({(each.job_id, each.key): each for each in items}.values())


class OutboxWrite(Struct, frozen=True, tag="outbox"):
    """Rows of the webhook outbox: those to write, ids of deliveries to delete, and names of webhooks to forget."""

    cursors: list[WebhookCursor] = []
    deliveries: list[Delivery] = []
    dropped: list[int] = []
    forgotten: list[str] = []


class TombstoneWrite(Struct, frozen=True, tag="tombstones"):
    """Tombstones to delete, by number, and new values of others."""

    deleted: list[int]
    postponed: list[Tombstone]


class EventPruning(Struct, frozen=True, tag="prune"):
    """Events to delete: those numbered `events`, and all those of the deleted `jobs`. `upto` is the highest number."""

    events: list[int]
    jobs: list[int]
    upto: int


class AuditTrimming(Struct, frozen=True, tag="trim_audit"):
    """Numbers of audit entries to delete, and of rows that name a changed job of entries that are gone."""

    entries: list[int]
    jobs: list[int] = []


class FiguresWrite(Struct, frozen=True, tag="figures"):
    """The statistics that survive a restart."""

    body: bytes


# A change of the tables that no command decides. It names rows and values, so that every node applies it alike. The
# fields are part of the record format.
TableWrite = OutboxWrite | TombstoneWrite | EventPruning | AuditTrimming | FiguresWrite


class Batch(Struct):
    """One transaction. `queues` has the rows of the queues whose pause or counts of finished jobs changed."""

    changes: list[Event]
    numbers: Numbers
    queues: dict[str, QueueRow] = {}
    keys: list[StoredResponse] = []
    forget_keys: list[str] = []
    checked: list[int] = []  # job seqs whose rows were validated
    report: bytes | None = None
    payloads: list[int] = []  # keys of the bodies that the responses need; read in the transaction
    unmark: bool = False  # remove the mark of a restored backup, because all its grants were ended
    tombstones: list[Tombstone] = []  # of the deleted jobs
    sweeps: bool = False  # with an artifact store, deleted late results leave tombstones too
    audit: list[AuditEntry] = []
    writes: list[TableWrite] = []


class Payload(Struct, frozen=True, gc=False):
    """A body. That of a job which a decision needs has the headers of the job too, empty if it has none."""

    body: bytes
    request_hash: str
    headers: bytes = b""


class LoadedRows(Struct):
    """The result of Storage.load. An id in neither `jobs` nor `bad` does not exist.

    `bad` maps the ids of damaged jobs to reasons; their rows were moved to quarantine.
    """

    jobs: dict[str, Job] = {}
    payloads: dict[int, Payload] = {}
    responses: dict[str, StoredResponse] = {}
    bad: dict[str, str] = {}


class LateResultQuery(Struct, frozen=True):
    """The late results that a decision needs: all those of a job, and whether `lock_id` was one of its grants.

    Without `with_results`, the results themselves are not read.
    """

    job_seq: int
    lock_id: str | None = None
    with_results: bool = False


class LateResultRows(Struct):
    """Late results by job seq, oldest grant first, and former grants by (job seq, lock id)."""

    results: dict[int, list[LateResult]] = {}
    grants: dict[tuple[int, str], Grant] = {}


class JobQuery(Struct, frozen=True):
    """A page of jobs, newest first: seq below `before`, at most `limit` jobs out of `scan` rows.

    With `after`, the page is oldest first, with seq above it. With `by_end`, which needs a finished status, the latest
    end is first: jobs that ended before `before_end`, or then with seq below `before`. `worker` is that of the latest
    grant, current or ended. `since` and `until` bound created_at, `finished_*` bound finished_at. `text` is searched in
    id, payload and error message. Without `payloads` the page has none.
    """

    status: str | None = None
    queue: str | None = None
    kind: str | None = None
    worker: str | None = None
    limit: int = 50
    before: int | None = None
    after: int | None = None
    scan: int = 5_000
    payload_bytes: int = 4 << 20  # payload and metadata at which a page ends early
    since: int | None = None
    until: int | None = None
    finished_since: int | None = None
    finished_until: int | None = None
    text: str | None = None
    error: str | None = None  # the fingerprint of the error
    payloads: bool = True
    by_end: bool = False
    before_end: int | None = None

    @property
    def is_slow(self) -> bool:
        """Whether each row takes long to check. Such a page is read in slices."""
        return self.text is not None or self.error is not None


class JobRows(Struct):
    """A page of jobs with their payloads.

    `next_before` is the `before` of the next page (oldest first: its `after`), None at the end, and `next_end` its
    `before_end`. `scanned_until` is the creation time of the last row read (`by_end`: its end) if the page ended early.
    `scanned` is an upper bound of the rows read. `last_event` is the highest seq of a committed event when the page was
    read.
    """

    jobs: list[tuple[Job, bytes]]
    next_before: int | None
    scanned_until: int | None = None
    scanned: int = 0
    last_event: int = 0
    next_end: int | None = None
    bodies: dict[int, bytes] = {}  # headers and checkpoints of the jobs


class EventPage(Struct, frozen=True):
    """A part of the events of the whole store, and their bounds at the time of the read.

    `last` is the highest seq of a committed event. Events up to `gone_to` may be missing: pruned, in quarantine, or
    undone by a restored backup. Above it only two kinds are missing: older progress and extensions (KEEP_HEARTBEATS),
    and grants that were given back, between the first and the last grants of a job (KEEP_GRANTS).
    """

    events: list[Event]
    last: int
    gone_to: int
    more: bool = False  # the page ends before `last`, because of the number or size of its events

    @property
    def end(self) -> int:
        """The seq up to which the page has all events that the store still has. Damaged rows count as missing."""
        if not self.more:
            return self.last
        return self.events[-1].seq if self.events else self.gone_to


class OpenedStore(Struct):
    """The state that the daemon keeps in memory, as read and checked at start.

    `quarantined` maps the ids of all quarantined jobs to reasons. `faults` are sentences for the log and for health
    (quarantined rows, wrong counts). `keys` have no bodies. `stats` is what save_stats stored.
    """

    numbers: Numbers
    jobs: list[Job] = []
    packed_jobs: list[PackedJob] = []  # the other live jobs
    queues: dict[str, QueueRow] = {}
    quiet: Mapping[str, QuietRule] = {}
    schedules: dict[str, Schedule] = {}
    keys: list[StoredResponse] = []
    quarantined: dict[str, str] = {}
    unvalidated: dict[int, str] = {}  # job seq to id, of rows to validate
    faults: list[str] = []
    epoch_warning: str | None = None  # a wrong wall clock weakens fencing tokens
    stats: bytes | None = None
    full: bool = False  # the disk is full at start
    has_reserve: bool = True  # the reserve file exists
    marked: bool = False  # the store is a restored backup: end every grant by its stall rule, then set Batch.unmark
    tombstones: int = 0  # how many are waiting
    last_record: int = 0  # the number of the last record of the journal that is in it

    def live(self) -> list[Job]:
        """Return all live jobs."""
        return [*(job.expand() for job in self.packed_jobs), *self.jobs]


class EventStorage(Protocol):
    """Read access to the events of the whole store."""

    async def events_after(self, after: int, limit: int) -> EventPage:
        """Read up to `limit` committed events with a seq above `after`, oldest first."""


class JobStorage(EventStorage, Protocol):
    """The storage behind the actor.

    Every method but `cached_payloads` is one thread switch, but `write` is none if it commits inline: then it blocks
    the event loop. `commits_inline` is whether it does so next, unless it waits for earlier calls. Results are from
    committed state. `behind` is the number of committed events that the tables lack; reads write them first. Damaged
    rows are quarantined and omitted from results. `on_quarantined` is called in the event loop before the method that
    found them returns. `on_tombstones` is called with the number of tombstones that a slice left, because only the
    storage knows the stored objects of late results.
    """

    commits_inline: bool
    behind: int
    on_quarantined: Callable[[Quarantined], None]
    on_tombstones: Callable[[int], None]

    async def load(self, ids: list[str], payloads: list[int], digests: list[str]) -> LoadedRows:
        """Read jobs by id (live or finished), payloads and other bodies by key, stored responses by digest."""

    def cached_payloads(self, job_seqs: list[int]) -> dict[int, bytes]:
        """Return those payloads of these jobs that are in memory. Not allowed during a write."""

    def too_old_for(self, format: int) -> str | None:
        """Return the name of a node of the cluster that does not read records of this format, or None."""

    async def write(self, batch: Batch) -> dict[int, bytes]:
        """Commit `batch` with fsync and return the requested payloads.

        Raises DiskFull, FormatNotRead or BadRows if nothing was written. After any other exception the content of the
        disk is unknown.
        """

    async def find_jobs(self, query: JobQuery) -> JobRows:
        """Read a page of jobs."""

    async def timeline(self, job_seq: int, limit: int | None = None) -> list[Event]:
        """Read the events of one job, or only its latest `limit` events; oldest first."""

    async def read_late_results(self, requested: list[LateResultQuery]) -> LateResultRows:
        """Read late results of jobs, and which of the given lock ids were grants of those jobs."""

    async def count_late_results(self, job_seqs: list[int]) -> dict[int, int]:
        """Count the late results of each job that has any. Reads only the index."""

    async def expired_jobs(self, now: int, limit: int, skip: int = 0) -> list[str]:
        """Return ids of finished jobs whose `expires_at` is at or before `now`, oldest first, after skipping `skip`.

        May return fewer than `limit` even if there are more.
        """

    async def reports(self, limit: int) -> list[bytes]:
        """Read the stored cleanup reports, newest first."""

    async def quarantine(self, job: Job, reason: str) -> None:
        """Move the rows of `job` to quarantine. Counts no longer include it."""

    async def used_bytes(self) -> int:
        """Return the size of the store without its free space."""

    async def prune(self, before: int, limit: int) -> int:
        """Delete up to `limit` journal rows of jobs deleted before wall time `before`. Return how many."""

    async def read_audit(self, query: AuditQuery) -> AuditRows:
        """Read a page of audit entries, newest first."""

    async def trim_audit(self, before: int, limit: int) -> int:
        """Delete up to `limit` audit entries: older than wall time `before`, or over the limit of their share.

        Return how many, or `limit` if rows are left to read.
        """

    async def due_tombstones(self, now: int, limit: int) -> DueTombstones:
        """Read up to `limit` tombstones that are due at wall time `now`, in the order of their due times."""

    async def update_tombstones(self, deleted: list[int], postponed: list[Tombstone]) -> None:
        """Delete the tombstones with the numbers `deleted`, and replace others by their new values `postponed`."""

    async def save_stats(self, body: bytes) -> None:
        """Store the statistics that survive a restart."""

    async def probe(self, spare_bytes: int = 0) -> None:
        """Commit a write that leaves `spare_bytes` free, and read it back. Raises DiskFull or another error."""

    async def measure_space(self) -> DiskSpace | None:
        """Return the free and total space of the disk. None for an in-memory store, or if unknown."""

    async def replaced_file(self) -> str | None:
        """Return the path of a database file that was deleted or replaced since it was opened, or None.

        None for the tables of a node, which are rebuilt from the journal.
        """

    async def drop_reserve(self) -> bool:
        """Delete the reserve file, so that endings and deletions have space. Return whether there was one."""

    async def build_reserve(self) -> None:
        """Rebuild the reserve file. Raises DiskFull if it and SPARE_BYTES do not fit on the disk."""


class OutboxStorage(EventStorage, Protocol):
    """The storage behind webhooks. Every method is one thread switch, and raises CannotWrite."""

    async def open_outbox(self, names: list[str], now: int) -> Outbox:
        """Read the outbox of the webhooks `names`, and give new ones a cursor at the end of the event log.

        The result has no cursor for a new one if it cannot be written.
        """

    async def plan_deliveries(self, moved: WebhookCursor, new: list[Delivery]) -> None:
        """Store new deliveries together with the moved cursor of their webhook."""

    async def store_outcomes(self, tried: list[Delivery], now: int) -> bool:
        """Store deliveries after an attempt. Return whether old dead-lettered ones were dropped."""

    async def resend_delivery(self, endpoint: str, id_: int, now: int) -> Delivery | None:
        """Return a delivery to the waiting state, from any state. Return None if it is not stored."""

    async def resend_dead_lettered(self, endpoint: str, upto: int, limit: int, now: int) -> list[Delivery]:
        """Return up to `limit` dead-lettered deliveries with numbers up to `upto` to the waiting state."""

    async def deliveries(self, ids: list[int]) -> list[Delivery]:
        """Read deliveries by number."""

    async def dead_letter_counts(self, endpoint: str) -> tuple[int, int]:
        """Return the count of stored dead-lettered deliveries of a webhook, and the number of the latest one."""

    async def list_deliveries(
        self, endpoint: str, state: DeliveryState | None, before: int, limit: int
    ) -> list[Delivery]:
        """Read up to `limit` deliveries with numbers below `before`, newest first."""
