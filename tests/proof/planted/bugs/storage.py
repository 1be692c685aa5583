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


@bug(
    "key-in-its-own-record",
    Projection.append,
    breaks="a crash leaves a change without its key",
    found_by=PROJECTION,
)
def _(append: Any, self: Projection, given: Any, reported: int = 0) -> Any:
    if not isinstance(given, Batch):
        return append(self, given, reported)
    shown = append(self, replace(given, keys=[]), reported)
    if given.keys:
        append(self, replace(given, changes=[], queues={}, audit=[], tombstones=[], report=None), reported)
    return shown


@bug(
    "record-without-its-keys",
    record.encode,
    breaks="a restart forgets the responses of the last commands",
    found_by=SIMULATION,
)
def _(encode: Any, batch: Batch) -> tuple[bytes, list[EventRow]]:
    body: tuple[bytes, list[EventRow]] = encode(replace(batch, keys=[]))
    return body


@bug(
    "response-before-its-record",
    SqliteJournal.append,
    breaks="a crash loses a change that was acknowledged",
    found_by=PROJECTION,
)
def _(append: Any, /, self: SqliteJournal, record: Record) -> None:
    late, _late_records[self] = _late_records.get(self), record
    if late is not None:
        append(self, late)


@bug(
    "slice-marked-before-it-is-written",
    Projection._apply,
    breaks="a crash in a slice loses its changes",
    found_by=PROJECTION,
)
def _(apply: Any, self: Projection, pending: Iterable[Pending]) -> int:
    chosen = list(pending)
    if not self.db._is_uncommitted:
        self.db.projected_to = chosen[-1].number
        self.db.write_meta()
        self.db.conn.execute("COMMIT")
        self.db.conn.execute("BEGIN IMMEDIATE")
    return int(apply(self, chosen))


@bug(
    "journal-trimmed-ahead-of-the-tables",
    Projection._add,
    breaks="a start does not find the records that the tables lack",
    found_by=PROJECTION,
)
def _(add: Any, self: Projection, pending: Pending) -> None:
    add(self, pending)
    self.journal.trim(pending.number - 1)


@bug("history-read-before-the-slices", Projection.read, breaks="a read lacks the last changes", found_by=PROJECTION)
def _(read: Any, self: Projection, fn: Any, *args: object) -> Any:
    return fn(*args)


@bug(
    "pending-job-read-from-the-tables",
    Projection.touches,
    breaks="a repeated request does not find its key",
    found_by=PROJECTION,
)
def _(touches: Any, self: Projection, ids: Any, seqs: Any, digests: Any) -> bool:
    return bool(touches(self, ids, seqs, []))


@bug(
    "gap-in-the-journal-skipped",
    SqliteJournal.read,
    breaks="a start goes on without a record that is missing",
    found_by=PROJECTION,
)
def _(read: Any, self: SqliteJournal, after: int, limit: int) -> Any:
    try:
        return read(self, after, limit)
    except BadRecord as error:
        return read(self, error.number, limit)


@bug(
    "job-quarantined-before-the-slices",
    Projection._catch_up,
    breaks="a slice counts a job that was moved to quarantine before it",
    found_by=PROJECTION,
)
def _(catch_up: Any, self: Projection) -> None: ...


@bug(
    "quarantined-job-in-pending-counts",
    Projection._uncount,
    breaks="a slice counts a job that it has moved to quarantine",
    found_by=WALK,
)
def _(uncount: Any, self: Projection, seq: int) -> None: ...


@bug(
    "outbox-cursor-in-another-record",
    Store.plan_deliveries,
    breaks="a crash between two records loses events",
    found_by="tests/unit/storage/test_outbox.py",
)
async def _(plan_deliveries: Any, self: Store, moved: Any, new: Any) -> None:
    await plan_deliveries(self, moved, [])
    await plan_deliveries(self, moved, new)


@bug(
    "tables-ahead-of-a-shared-journal",
    ClusterStore._append_shared,
    breaks="a node has a change that the journal never gets",
    found_by=CLUSTER,
)
async def _(append_shared: Any, self: ClusterStore, given: Any, reported: int) -> Any:
    prepared = self._projection.prepare(given, reported)
    self._projection.accept(prepared)
    assert self._appender._to_journal is not None
    await self._appender._to_journal(prepared.record, prepared.record.number - 1)
    return prepared.payloads


@bug(
    "append-goes-on-after-an-unknown-outcome",
    ClusterStore._append_shared,
    breaks="a record is appended behind one that may be in the journal",
    found_by=CLUSTER,
)
async def _(append_shared: Any, self: ClusterStore, given: Any, reported: int) -> Any:
    append = self._appender._to_journal
    try:
        return await append_shared(self, given, reported)
    finally:
        self._appender._to_journal = append


@bug(
    "branch-not-compared",
    membership.is_on_branch,
    breaks="a node with records that the journal has lost leads",
    found_by=CLUSTER,
)
async def _(is_on_branch: Any, path: str, journal: Any, last: Any) -> bool:
    return True


@bug(
    "gap-in-followed-records",
    Projection.follow,
    breaks="a standby goes on without a record that is missing",
    found_by=CLUSTER,
)
def _(follow: Any, self: Projection, records: Any, decoded: Any = ()) -> None:
    for each in records:
        self.last = each.number - 1
        follow(self, [each])


@bug(
    "damaged-row-quarantined-on-one-node",
    Database.raise_if_clustered,
    breaks="the nodes of a cluster have different rows",
    found_by=CLUSTER,
)
def _(raise_if_clustered: Any, self: Database, what: str) -> None: ...


@bug("sums-kept-over-a-rollback", Database.commit, breaks="totals count a rejected batch", found_by=OUTAGES)
def _(commit: Any, self: Database, fn: Any, *args: Any) -> Any:
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


@bug(
    "inline-commit-error-swallowed",
    StoreConnection.run_inline,
    breaks="a batch is acknowledged although its inline commit failed",
    found_by=OUTAGES,
)
def _(run_inline: Any, self: StoreConnection, fn: Any, *args: Any) -> Any:
    try:
        return run_inline(self, fn, *args)
    except Exception:
        return {}


@bug("commit-before-fsync", startup.connect, breaks="a commit returns before its fsync", found_by=STORE)
def _(connect: Any, path: str, synchronous: str) -> Any:
    conn = connect(path, synchronous)
    conn.execute("PRAGMA synchronous = NORMAL")
    return conn


@bug(
    "epoch-file-not-read",
    files.read_epoch,
    breaks="a second restore of one backup takes the epoch of the first",
    found_by="tests/unit/storage/test_startup.py",
)
def _(read_epoch: Any, path: str) -> Any:
    return files.EpochFile(exists=True)


@bug(
    "backup-without-its-mark",
    migrations.change_meta,
    breaks="a restored backup continues as if nothing had happened since",
    found_by="tests/unit/storage/test_backup.py",
)
def _(change_meta: Any, /, conn: Any, **values: int) -> None:
    change_meta(conn, **{name: value for name, value in values.items() if name != "marked"})
