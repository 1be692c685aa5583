"""Bugs in the store: transactions, durability and what is trusted on disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from msgspec.structs import replace

from jobd.journal import record
from jobd.journal.event_codec import EventRow
from jobd.journal.sqlite import SqliteJournal
from jobd.model.journal import BadRecord, Record
from jobd.model.storage import Batch
from jobd.storage import files, startup
from jobd.storage.cluster import membership
from jobd.storage.cluster.cluster_store import ClusterStore
from jobd.storage.connection import StoreConnection
from jobd.storage.database import Database
from jobd.storage.schema import migrations
from jobd.storage.store import Store
from jobd.storage.tables.projection import Projection
from jobd.storage.tables.tail import Pending
from tests.proof.planted.registry import SIMULATION, bug

PROJECTION = "tests/unit/storage/tables/test_projection_faults.py"
STORE = "tests/unit/storage/test_store.py"
WALK = "tests/unit/storage/tables/test_projection_walk.py"
CLUSTER = "tests/unit/storage/cluster/test_cluster_store.py"
OUTAGES = "tests/integration/test_outages.py"

_late_records: WeakKeyDictionary[SqliteJournal, Record] = WeakKeyDictionary()


@bug(Projection.append, found_by=PROJECTION)
def key_in_its_own_record(append: Any, self: Projection, given: Any, reported: int = 0) -> Any:
    """A crash leaves a change without its key."""
    if not isinstance(given, Batch):
        return append(self, given, reported)
    shown = append(self, replace(given, keys=[]), reported)
    if given.keys:
        append(self, replace(given, changes=[], queues={}, audit=[], tombstones=[], report=None), reported)
    return shown


@bug(record.encode, found_by=SIMULATION)
def record_without_its_keys(encode: Any, batch: Batch) -> tuple[bytes, list[EventRow]]:
    """A restart forgets the responses of the last commands."""
    body: tuple[bytes, list[EventRow]] = encode(replace(batch, keys=[]))
    return body


@bug(SqliteJournal.append, found_by=PROJECTION)
def response_before_its_record(append: Any, /, self: SqliteJournal, record: Record) -> None:
    """A crash loses a change that was acknowledged."""
    late, _late_records[self] = _late_records.get(self), record
    if late is not None:
        append(self, late)


@bug(Projection._apply, found_by=PROJECTION)
def slice_marked_before_it_is_written(apply: Any, self: Projection, pending: Iterable[Pending]) -> int:
    """A crash in a slice loses its changes."""
    chosen = list(pending)
    if not self.db._is_uncommitted:
        self.db.projected_to = chosen[-1].number
        self.db.write_meta()
        self.db.conn.execute("COMMIT")
        self.db.conn.execute("BEGIN IMMEDIATE")
    return int(apply(self, chosen))


@bug(Projection._add, found_by=PROJECTION)
def journal_trimmed_ahead_of_the_tables(add: Any, self: Projection, pending: Pending) -> None:
    """A start does not find the records that the tables lack."""
    add(self, pending)
    self.journal.trim(pending.number - 1)


@bug(Projection.read, found_by=PROJECTION)
def history_read_before_the_slices(read: Any, self: Projection, fn: Any, *args: object) -> Any:
    """A read lacks the last changes."""
    return fn(*args)


@bug(Projection.touches, found_by=PROJECTION)
def pending_job_read_from_the_tables(touches: Any, self: Projection, ids: Any, seqs: Any, digests: Any) -> bool:
    """A repeated request does not find its key."""
    return bool(touches(self, ids, seqs, []))


@bug(SqliteJournal.read, found_by="tests/unit/storage/tables/test_tail.py")
def gap_in_the_journal_skipped(read: Any, self: SqliteJournal, after: int, limit: int) -> Any:
    """A start goes on without a record that is missing."""
    try:
        return read(self, after, limit)
    except BadRecord as error:
        return read(self, error.number, limit)


@bug(Projection._catch_up, found_by=PROJECTION)
def job_quarantined_before_the_slices(catch_up: Any, self: Projection) -> None:
    """A slice counts a job that was moved to quarantine before it."""


@bug(Projection._uncount, found_by=WALK)
def quarantined_job_in_pending_counts(uncount: Any, self: Projection, seq: int) -> None:
    """A slice counts a job that it has moved to quarantine."""


@bug(Store.plan_deliveries, found_by="tests/unit/storage/test_outbox.py")
async def outbox_cursor_in_another_record(plan_deliveries: Any, self: Store, moved: Any, new: Any) -> None:
    """A crash between two records loses events."""
    await plan_deliveries(self, moved, [])
    await plan_deliveries(self, moved, new)


@bug(ClusterStore._append_shared, found_by=CLUSTER)
async def tables_ahead_of_a_shared_journal(append_shared: Any, self: ClusterStore, given: Any, reported: int) -> Any:
    """A node has a change that the journal never gets."""
    prepared = self._projection.prepare(given, reported)
    self._projection.accept(prepared)
    assert self._appender._to_journal is not None
    await self._appender._to_journal(prepared.record, prepared.record.number - 1)
    return prepared.payloads


@bug(ClusterStore._append_shared, found_by=CLUSTER)
async def append_goes_on_after_an_unknown_outcome(
    append_shared: Any, self: ClusterStore, given: Any, reported: int
) -> Any:
    """A record is appended behind one that may be in the journal."""
    append = self._appender._to_journal
    try:
        return await append_shared(self, given, reported)
    finally:
        self._appender._to_journal = append


@bug(membership.is_on_branch, found_by=CLUSTER)
async def branch_not_compared(is_on_branch: Any, path: str, journal: Any, last: Any) -> bool:
    """A node with records that the journal has lost leads."""
    return True


@bug(Projection.follow, found_by=CLUSTER)
def gap_in_followed_records(follow: Any, self: Projection, records: Any, decoded: Any = ()) -> None:
    """A standby goes on without a record that is missing."""
    for each in records:
        self.last = each.number - 1
        follow(self, [each])


@bug(Database.raise_if_clustered, found_by=CLUSTER)
def damaged_row_quarantined_on_one_node(raise_if_clustered: Any, self: Database, what: str) -> None:
    """The nodes of a cluster have different rows."""


@bug(Database.commit, found_by=OUTAGES)
def sums_kept_over_a_rollback(commit: Any, self: Database, fn: Any, *args: Any) -> Any:
    """Totals count a rejected batch."""
    totals = self.totals

    def run(*given: Any) -> Any:
        nonlocal totals
        result = fn(*given)
        totals = self.totals
        return result

    try:
        return commit(self, run, *args)
    except BaseException:
        self.totals = totals
        raise


@bug(StoreConnection.run_inline, found_by=OUTAGES)
def inline_commit_error_swallowed(run_inline: Any, self: StoreConnection, fn: Any, *args: Any) -> Any:
    """A batch is acknowledged although its inline commit failed."""
    try:
        return run_inline(self, fn, *args)
    except Exception:
        return {}


@bug(startup.connect, found_by=STORE)
def commit_before_fsync(connect: Any, path: str, synchronous: str) -> Any:
    """A commit returns before its fsync."""
    conn = connect(path, synchronous)
    conn.execute("PRAGMA synchronous = NORMAL")
    return conn


@bug(files.read_epoch, found_by="tests/unit/storage/test_startup.py")
def epoch_file_not_read(read_epoch: Any, path: str) -> Any:
    """A second restore of one backup takes the epoch of the first."""
    return 0


@bug(migrations.change_meta, found_by="tests/unit/storage/test_backup.py")
def backup_without_its_mark(change_meta: Any, /, conn: Any, **values: int) -> None:
    """A restored backup continues as if nothing had happened since."""
    change_meta(conn, **{name: value for name, value in values.items() if name != "marked"})
