"""Read and write the tables of a store through one SQLite connection.

All calls block. `startup.py` makes the connection, and `store.py` calls this module.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from jobd.model.fingerprints import fingerprint_of_bytes
from jobd.model.job import TOKEN_COUNTER_BITS, Job, extra_keys, seq_of_body
from jobd.model.storage import BadRows, DiskFull, Numbers, Payload, Quarantined
from jobd.storage import codec, files
from jobd.storage.cluster.membership import Membership, StoreDamaged
from jobd.storage.codec import COLUMNS, KEY_COLUMNS, META_COLUMNS, SQL, Row, body_table, fault, insert
from jobd.storage.commit_mode import processor_wait_s
from jobd.storage.damage.wal import LogGauge
from jobd.storage.files import StoreBroken
from jobd.storage.schema.migrations import VERSION, meta_row
from jobd.storage.tables.writers import AuditWriter, RowUnusable, Totals

T = TypeVar("T")
_Marks = tuple[Numbers, Totals, int, int, int, Membership | None]
_NO_NUMBERS: Final = Numbers()  # of tables that are only read

CHECKPOINT_FRAMES: Final = 1000  # measured: fewer checkpoint too often, more make single commits wait longer

LIVE_SQL: Final = "status IN ('queued', 'processing')"
FAILED_SQL: Final = "status IN ('failed', 'cancelled')"
FINISHED_SQL: Final = "status IN ('completed', 'failed', 'cancelled')"
# Includes invalid statuses. The index has this condition.
NOT_LIVE_SQL: Final = "status NOT IN ('queued', 'processing')"
KEY_SQL: Final = f"{', '.join(KEY_COLUMNS)}, crc"

# An upsert leaves the index of names alone. REPLACE deletes the row and inserts it again.
PUT_QUEUE: Final = (
    insert("queues")
    + " ON CONFLICT (name) DO UPDATE SET "
    + ", ".join(f"{column} = excluded.{column}" for column in COLUMNS["queues"][1:])
)
PUT_TOMBSTONE: Final = insert("tombstones", "REPLACE")
_UPDATE_META: Final = f"UPDATE meta SET {', '.join(f'{column} = ?' for column in (*META_COLUMNS, 'crc'))} WHERE id = 1"

# Rows are always read by seq. A read through an index may take a column from the index, which hides damage in the row.
BY_SEQ: Final = f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED WHERE seq = ?"
BY_ID: Final = f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED WHERE seq = (SELECT seq FROM jobs WHERE id = ?)"


def result_code(error: BaseException) -> int:
    """Return SQLite's extended result code of `error`; 0 if it has none."""
    return getattr(error, "sqlite_errorcode", None) or 0


def is_corrupt(error: sqlite3.Error) -> bool:
    """Return whether `error` reports a damaged structure of the file."""
    return result_code(error) & 0xFF == sqlite3.SQLITE_CORRUPT


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def readable(text: Any) -> str:
    """Return `text` without surrogates, so that it can be encoded even if it comes from a damaged row."""
    return str(text).encode(errors="surrogateescape").decode(errors="replace")


@contextlib.contextmanager
def lenient_text(conn: sqlite3.Connection) -> Iterator[None]:
    """Inside the context, escape the bytes of text that is not UTF-8 instead of raising."""
    conn.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    try:
        yield
    finally:
        conn.text_factory = str


def _fetch_up_to(cursor: sqlite3.Cursor, max_bytes: int) -> tuple[list[Row], bool]:
    rows: list[Row] = []
    size = 0
    with contextlib.closing(cursor):  # an open cursor would block writes
        for row in cursor:
            if rows and size >= max_bytes:
                return rows, True
            rows.append(row)
            size += sum(len(value) for value in row if isinstance(value, str | bytes))
    return rows, False


class StructureDamaged(Exception):
    """Rows cannot be quarantined because the structure of the file around them is damaged. Nothing was written."""


@contextlib.contextmanager
def raising_structure_damaged(*, of_index: bool = False) -> Iterator[None]:
    """Translate an error about a damaged structure into StructureDamaged; `of_index`, an index without its row too."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if is_corrupt(error) and (of_index or result_code(error) != sqlite3.SQLITE_CORRUPT_INDEX):
            raise StructureDamaged(str(error)) from error
        raise


class Database:
    """The tables, and the counts and checksums over them that every slice updates.

    `numbers` are those of the latest record of the journal, `totals` those of the tables, which have the records up to
    `projected_to`. After an error that leaves the content of the disk unknown, every call raises StoreBroken.
    """

    def __init__(
        self,
        conn: sqlite3.Connection,
        path: str,
        numbers: Numbers = _NO_NUMBERS,
        totals: Totals = (0, 0, 0, 0),
        marked: int = 0,
        gone_to: int = 0,
        projected_to: int = 0,
    ) -> None:
        self.conn = conn
        self.numbers = numbers
        self.totals = totals
        self.marked = marked  # 0, or of a restored backup the first record that may remove the mark
        self.gone_to = gone_to  # events up to this number may be missing
        self.projected_to = projected_to
        self.membership: Membership | None = None  # in a cluster
        self.reader = codec.JobReader()
        conn.create_function("fingerprint", 3, fingerprint_of_bytes, deterministic=True)
        self.audit = AuditWriter(conn, self.rows)
        self.store_epoch: Callable[[int], object] = lambda epoch: None  # writes the epoch file
        self.stored_epoch = numbers.epoch  # the highest epoch in the epoch file
        self.before_commit: Callable[[], object] = lambda: None  # called right before the statement that commits
        self.commit_s: float | None = None  # that the disk took for the latest commit, None if it was not reached
        self.quarantined: dict[str, str] = {}
        self.faults: list[str] = []
        self._directory = os.path.dirname(path) or "."
        self.failure: BaseException | None = None  # of an earlier write, which left the content of the disk unknown
        self._rebuilding = False
        self._is_uncommitted = False  # a transaction for reading is open, and no other can be
        self.quarantined_count = 0  # jobs
        self.pruning_cursor = 0  # or the event of a queue up to which `table_writes.plan_pruning` has read
        # Numbered from 0. A batch that was decided with knowledge of an entry drops it.
        self.recently_quarantined: dict[int, Quarantined] = {}
        self.unmoved: dict[int, str] = {}  # seq -> reason, for jobs whose damaged rows could not be moved
        self.on_rollback: Callable[[], object] = lambda: None
        self.catch_up: Callable[[], object] = lambda: None  # writes the records that the tables lack
        self.log: LogGauge | None = None  # None: SQLite itself makes checkpoints, or there is no log
        self._has_new_frames = False  # in the log, since the last checkpoint

    # ------------------------------------------------------------------------------------------- one transaction

    @property
    def is_broken(self) -> bool:
        """Whether an earlier write failed and left the content of the disk unknown."""
        return self.failure is not None

    @property
    def is_damaged(self) -> bool:
        """Whether the tables have to be rebuilt from the journal of the cluster."""
        return isinstance(self.failure, StoreDamaged)

    def check(self) -> None:
        """Raise StoreBroken if an earlier write left the content of the disk unknown."""
        if isinstance(self.failure, StoreDamaged):
            raise self.failure
        if self.failure is not None:
            raise StoreBroken(f"an earlier write failed: {self.failure!r}") from self.failure

    def raise_if_clustered(self, what: str) -> None:
        """Raise StoreDamaged if the store belongs to a cluster: other nodes have the row undamaged.

        The node then rebuilds its tables from the journal. Elsewhere the caller goes on, and quarantines the row.
        """
        if self.membership is not None:
            error = StoreDamaged(f"{what}: the tables are damaged, and are rebuilt from the journal")
            self.failure = error
            raise error

    def commit(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn` in one transaction and return its result.

        Raises DiskFull, BadRows, RowUnusable or StructureDamaged if nothing was written. Any other error breaks the
        store.
        """
        result: T = self._commit(self._transaction, fn, *args)
        return result

    def commit_statement(self, sql: str, row: Row) -> None:
        """Run one statement as a transaction of its own, which takes fewer steps. Raises the same errors."""
        self._commit(self._last_statement, sql, row)

    def _commit(self, write: Callable[..., T], *args: Any) -> T:
        self.check()
        if self._is_uncommitted:
            raise DiskFull("the disk is full, and a read uses a transaction that cannot be committed")
        saved = self._marks()
        self.commit_s = None
        for retried in (False, True):
            try:
                result = write(*args)
            except BaseException as error:
                self._restore(saved)
                self._roll_back(error)
                if isinstance(error, BadRows | RowUnusable | StructureDamaged):
                    raise
                if self._is_full(error):
                    raise DiskFull(str(error)) from error
                if result_code(error) != sqlite3.SQLITE_CORRUPT_INDEX or retried or self._rebuilding:
                    self.failure = error
                    raise
            else:
                self._has_new_frames = True
                return result
            self.rebuild_indexes()
        raise AssertionError("unreachable")

    def _transaction(self, fn: Callable[..., T], *args: Any) -> T:
        self.conn.execute("BEGIN IMMEDIATE")
        result = fn(*args)
        self._last_statement("COMMIT", ())
        return result

    def _last_statement(self, sql: str, row: Row) -> None:
        """Run the statement that commits, and measure the disk: without the time in which no processor was free."""
        self.before_commit()
        waited_s, began_s = processor_wait_s(), time.perf_counter()
        try:
            self.conn.execute(sql, row)
        finally:
            self.commit_s = max(time.perf_counter() - began_s - (processor_wait_s() - waited_s), 0.0)

    def uncommitted(self, change: Callable[[], object], read: Callable[[], T]) -> T:
        """Call `change` and then `read` in a transaction that is rolled back. Uses memory in place of disk space."""
        self.check()
        saved = self._marks()
        self.conn.execute("PRAGMA cache_spill = OFF")
        try:
            self.conn.execute("BEGIN IMMEDIATE")
            self._is_uncommitted = True
            change()
            return read()
        finally:
            self._is_uncommitted = False
            self._restore(saved)
            self.on_rollback()
            if self.conn.in_transaction:
                self.conn.execute("ROLLBACK")
            self.conn.execute("PRAGMA cache_spill = ON")

    def _marks(self) -> _Marks:
        return self.numbers, self.totals, self.marked, self.gone_to, self.projected_to, self.membership

    def _restore(self, marks: _Marks) -> None:
        self.numbers, self.totals, self.marked, self.gone_to, self.projected_to, self.membership = marks

    def _roll_back(self, error: BaseException) -> None:
        """Roll back the transaction that raised `error`. If that fails too, the store is broken."""
        self.on_rollback()
        try:
            if self.conn.in_transaction:
                self.conn.execute("ROLLBACK")
        except sqlite3.Error as rollback_error:
            self.failure = rollback_error
            raise rollback_error from error
        if self.conn.in_transaction:
            self.failure = error
            raise StoreBroken("the transaction could not be rolled back") from error

    def _is_full(self, error: BaseException) -> bool:
        """Return whether `error` means a full disk. A failed fsync does not: its frames may or may not be on disk."""
        code = result_code(error)
        if code & 0xFF == sqlite3.SQLITE_FULL:
            return True
        # SQLite reports an exceeded quota (EDQUOT) as a failed write, so try to allocate space.
        return code == sqlite3.SQLITE_IOERR_WRITE and not files.has_space(self._directory)

    def rebuild_indexes(self) -> None:
        """Rebuild all indexes from the rows. Takes seconds for a million rows."""
        self.faults.append("an index did not match its rows: all indexes were rebuilt; run `jobd doctor`")
        self._rebuilding = True
        try:
            self.commit(self.reindex)
        finally:
            self._rebuilding = False

    def reindex(self) -> None:
        """Rebuild all indexes inside a transaction. Raises StructureDamaged if two undamaged rows have the same id."""
        try:
            self.conn.execute("REINDEX")
        except sqlite3.IntegrityError:
            self._separate_duplicate_ids()

    def _separate_duplicate_ids(self) -> None:
        """Give damaged rows that have the id of another job a unique id, so that a read can quarantine them."""
        run = self.conn.execute
        (index_sql,) = run("SELECT sql FROM sqlite_schema WHERE name = 'jobs_id'").fetchone()
        run("DROP INDEX jobs_id")
        duplicate_ids = "SELECT id FROM jobs NOT INDEXED GROUP BY id HAVING count(*) > 1"
        rows = self.rows(f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED WHERE id IN ({duplicate_ids})")
        damaged = [(row[0],) for row in rows if fault(row) is not None]
        self.conn.executemany("UPDATE jobs SET id = id || ' of seq ' || seq WHERE seq = ?", damaged)
        try:
            run(index_sql)
            run("REINDEX")
        except sqlite3.IntegrityError as error:
            raise StructureDamaged(str(error)) from error

    def rows(self, sql: str, args: tuple[Any, ...] = ()) -> list[Row]:
        """Return all rows of a query, including rows with text that is not UTF-8 (`codec.fault` reports those)."""
        return self.leniently(lambda: self.conn.execute(sql, args).fetchall())

    def rows_up_to(self, sql: str, args: tuple[Any, ...], max_bytes: int) -> tuple[list[Row], bool]:
        """Return the first rows of a query, at least one, up to about `max_bytes`; and whether there are more."""
        return self.leniently(lambda: _fetch_up_to(self.conn.execute(sql, args), max_bytes))

    def leniently(self, read: Callable[[], T]) -> T:
        """Call `read`, again with `lenient_text` if it reads text that is not UTF-8."""
        try:
            return read()
        except sqlite3.OperationalError as error:
            if "decode to UTF-8" not in str(error):  # as Python raises it
                raise
        with lenient_text(self.conn):
            return read()

    @contextlib.contextmanager
    def noting_corruption(self, what: str) -> Iterator[None]:
        """If the structure of the file is damaged, add a fault that begins with `what` and leave the block."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise
            self.faults.append(f"{what}: {error}; run `jobd doctor`")

    def rows_one_by_one(self, sql: str, keys: Iterable[int], label: str, args: tuple[Any, ...] = ()) -> list[Row]:
        """Run a query once for each key and return the rows. Add a fault for keys whose rows cannot be read."""
        rows: list[Row] = []
        lost: list[int] = []
        for key in keys:
            try:
                rows += self.rows(sql, (key, *args))
            except sqlite3.DatabaseError as error:
                if not is_corrupt(error):
                    raise
                lost.append(key)
        if lost:
            self.faults.append(f"{label} {min(lost)} to {max(lost)}: {len(lost)} cannot be read; run `jobd doctor`")
        return rows

    # ------------------------------------------------------------------------------------------------ bookkeeping

    @property
    def has_long_log(self) -> bool:
        """Whether `checkpoint` has work to do."""
        return self._has_new_frames and self.log is not None and self.log.has(CHECKPOINT_FRAMES)

    def checkpoint(self) -> None:
        """Copy the log into the database file. A failure loses nothing: the next commit finds the log long again."""
        with contextlib.suppress(sqlite3.DatabaseError):
            self.conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        self._has_new_frames = False

    def advance_epoch(self, epoch: int) -> None:
        """Store a new epoch before its first token is granted, in the database first (see `startup._choose_epoch`)."""
        if epoch > self.numbers.epoch:
            self.commit(self.begin_epoch, epoch)
        self.store_epoch(epoch)
        self.stored_epoch = epoch

    def begin_epoch(self, epoch: int, mark: int = 0) -> None:
        """Begin `epoch`. The `mark` of a backup is 0 or the first record that may remove it (Batch.unmark).

        After a restore, clients may have seen events that the store no longer has. New events get higher numbers, and a
        client that resumes from an older number gets the error that events are gone.
        """
        self.numbers = replace(self.numbers, epoch=epoch, next_token=1)
        if mark:
            next_event = max(self.numbers.next_event, epoch << TOKEN_COUNTER_BITS)
            self.numbers = replace(self.numbers, next_event=next_event)
            self.gone_to, self.marked = next_event - 1, mark
        self.write_meta()

    def write_meta(self) -> None:
        self.conn.execute(
            _UPDATE_META,
            meta_row(self.numbers, self.totals, self.marked, self.gone_to, self.projected_to, VERSION),
        )

    def note_quarantined(self, job_seq: int, quarantined: Quarantined) -> None:
        """Report that damaged rows of this job were found. A job that still cannot be moved is reported once."""
        if quarantined.is_moved:
            self.unmoved.pop(job_seq, None)
        elif self.unmoved.get(job_seq) == quarantined.reason:
            return
        else:
            self.unmoved[job_seq] = quarantined.reason
        self.report_quarantined(quarantined)

    def note_fault(self, fault: str) -> None:
        """Add `fault` once, because the same damage is found repeatedly until the disk has space."""
        if fault not in self.faults:
            self.faults.append(fault)

    def report_quarantined(self, quarantined: Quarantined) -> None:
        """Queue `quarantined` for `Storage.on_quarantined`."""
        self.recently_quarantined[self.quarantined_count] = quarantined
        self.quarantined_count += 1  # last, because the event loop reads it from another thread

    def job_id_of(self, seq: int) -> str | None:
        """Return the id of a job, even of a quarantined one; None if there is no such job."""
        for sql in (BY_SEQ, "SELECT seq, id FROM quarantined_jobs WHERE seq = ?"):
            if found := self.rows(sql, (seq,)):
                return readable(found[0][1])
        return None

    def job_name(self, seq: int) -> str:
        """Return a name of a job for messages: "job a", or "job number 1" if there is no such job; 0: "queues"."""
        if seq == 0:
            return "queues"
        return f"job {self.job_id_of(seq) or f'number {seq}'}"

    def payload(self, key: int) -> tuple[Payload | None, str]:
        """Return the body with this key, the payload of a job or another one, or None and the error."""
        table = body_table(key)
        name = "payload" if table == "payloads" else f"row of {table}"
        try:
            found = self.rows(f"SELECT {SQL[table]} FROM {table} WHERE job_seq = ?", (seq_of_body(key),))
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise
            return None, f"the {name} cannot be read: {error}"
        if not found:
            return None, f"the {name} is missing"
        wrong = fault(found[0])
        if wrong is not None:
            return None, f"the {name} is damaged: {wrong}"
        return Payload(found[0][1], found[0][2] if key >= 0 else ""), ""

    def extra_bodies(self, job: Job) -> tuple[dict[int, bytes], str]:
        """Return headers and checkpoint of a job by key, and the error if one is damaged."""
        bodies = {}
        for key in extra_keys(job):
            found, error = self.payload(key)
            if found is None:
                return {}, error
            bodies[key] = found.body
        return bodies, ""

    def note_missing(self, seq: int) -> None:
        """Record that the event `seq` is missing. A damaged number can be anything, so limit it."""
        self.gone_to = max(self.gone_to, min(seq, self.numbers.next_event - 1))

    def close(self) -> None:
        """Close the gauge of the log. The connection is closed elsewhere."""
        if self.log is not None:
            self.log.close()
            self.log = None

    def probe(self) -> None:
        """Write a random value and read it back, each committed."""
        value = os.urandom(16)
        self.commit(self.conn.execute, "REPLACE INTO probes (id, value) VALUES (1, ?)", (value,))
        if self.conn.execute("SELECT value FROM probes WHERE id = 1").fetchone() != (value,):
            raise OSError("the probe read back a value that differs from the one it wrote")
