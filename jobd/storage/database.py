"""The tables of a store through one SQLite connection: every read and write of them, in plain calls.

Opens nothing and knows no event loop: opening.py makes the connection, store.py calls this from its thread.
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

from jobd.model.events import GIVEN_BACK, HEARTBEATS, KEEP_FIRST_GRANTS, KEEP_GRANTS, KEEP_HEARTBEATS, Change, Event
from jobd.model.fingerprints import fingerprint_of_bytes
from jobd.model.job import LIVE
from jobd.model.storage import (
    BadRows,
    Batch,
    DiskFull,
    Numbers,
    Payload,
    Quarantined,
    QueueRow,
    Tombstone,
    distinct_tombstones,
)
from jobd.storage import codec, files
from jobd.storage.codec import (
    EVENT_COLUMNS,
    JOB_COLUMNS,
    KEY_COLUMNS,
    LATE_COLUMNS,
    META_COLUMNS,
    QUEUE_COLUMNS,
    TOMBSTONE_COLUMNS,
    Row,
    fault,
    sealed,
)
from jobd.storage.files import StoreBroken
from jobd.storage.migrations import VERSION, meta_row
from jobd.storage.writers import AuditWriter, JobWriter, LateWriter, RowsMissing, Totals, insert

T = TypeVar("T")

KEEP_REPORTS: Final = 500
COMPACTED_AT_ONCE: Final = 1_000  # events of a journal that are read after one batch
GIVEN_BACK_KEPT: Final = 10_000  # jobs with a count of grants that were given back

LIVE_SQL: Final = "status IN ('queued', 'processing')"
FAILED_SQL: Final = "status IN ('failed', 'cancelled')"
FINISHED_SQL: Final = "status IN ('completed', 'failed', 'cancelled')"
NOT_LIVE_SQL: Final = "status NOT IN ('queued', 'processing')"  # or a status that is none; as the index has it
JOB_SQL: Final = f"{', '.join(JOB_COLUMNS)}, crc"
EVENT_SQL: Final = f"{', '.join(EVENT_COLUMNS)}, crc"
KEY_SQL: Final = f"{', '.join(KEY_COLUMNS)}, crc"
QUEUE_SQL: Final = f"{', '.join(QUEUE_COLUMNS)}, crc"
LATE_SQL: Final = f"{', '.join(LATE_COLUMNS)}, crc"
TOMBSTONE_SQL: Final = f"{', '.join(TOMBSTONE_COLUMNS)}, crc"


def _settings(columns: Iterable[str]) -> str:
    return ", ".join(f"{column} = ?" for column in columns)


_INSERT_EVENT: Final = insert("events", (*EVENT_COLUMNS, "crc"))
_UPDATE_EVENT: Final = "UPDATE events SET changes = ?, crc = ? WHERE seq = ?"
_REPLACE_KEY: Final = insert("keys", (*KEY_COLUMNS, "crc", "answer"), "REPLACE")
# Not REPLACE, which deletes and inserts: a row that stays where it is leaves the index of names alone.
PUT_QUEUE: Final = (
    insert("queues", (*QUEUE_COLUMNS, "crc"))
    + " ON CONFLICT (name) DO UPDATE SET "
    + ", ".join(f"{column} = excluded.{column}" for column in (*QUEUE_COLUMNS[1:], "crc"))
)
_PUT_TOMBSTONE: Final = insert("tombstones", (*TOMBSTONE_COLUMNS, "crc"), "REPLACE")
_UPDATE_META: Final = f"UPDATE meta SET {_settings((*META_COLUMNS, 'crc'))} WHERE id = 1"

# A row is always read by its seq: read through an index, a column may come from the index instead of the row, and a
# damaged row would look whole.
BY_SEQ: Final = f"SELECT {JOB_SQL} FROM jobs NOT INDEXED WHERE seq = ?"
BY_ID: Final = f"SELECT {JOB_SQL} FROM jobs NOT INDEXED WHERE seq = (SELECT seq FROM jobs WHERE id = ?)"
_PAYLOAD: Final = "SELECT job_seq, body, request_hash, crc FROM payloads WHERE job_seq = ?"


def result_code(error: BaseException) -> int:
    """SQLite's extended result code of `error`, 0 where it has none."""
    return getattr(error, "sqlite_errorcode", None) or 0


def is_corrupt(error: sqlite3.Error) -> bool:
    """Whether the structure of the file is damaged where `error` was met."""
    return result_code(error) & 0xFF == sqlite3.SQLITE_CORRUPT


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def readable(text: Any) -> str:
    """`text` as it may be shown and stored, whatever a damaged row holds."""
    return str(text).encode(errors="surrogateescape").decode(errors="replace")


def is_undecodable(error: sqlite3.OperationalError) -> bool:
    """Whether `error` is Python's, about text that is no UTF-8."""
    return "decode to UTF-8" in str(error)


@contextlib.contextmanager
def lenient_text(conn: sqlite3.Connection) -> Iterator[None]:
    """Read text that is no UTF-8 with its bad bytes escaped."""
    conn.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    try:
        yield
    finally:
        conn.text_factory = str


def row_bytes(row: Row) -> int:
    """Bytes of what may be long in a row: text (its characters) and blobs."""
    return sum(len(value) for value in row if isinstance(value, str | bytes))


def _fetch_up_to(cursor: sqlite3.Cursor, most_bytes: int) -> tuple[list[Row], bool]:
    found: list[Row] = []
    size = 0
    with contextlib.closing(cursor):  # an open one would keep the file from being written
        for row in cursor:
            if found and size >= most_bytes:
                return found, True
            found.append(row)
            size += row_bytes(row)
    return found, False


class StructureDamaged(Exception):
    """Rows cannot be moved aside, as the structure of the file around them is damaged. Nothing was written."""


class Database:
    """What is in the database, and the sums over it that are kept with each commit.

    After an error that leaves the disk's content unknown every call raises StoreBroken.
    """

    def __init__(
        self, conn: sqlite3.Connection, directory: str, numbers: Numbers, totals: Totals, marked: bool, gone_to: int
    ) -> None:
        self.conn = conn
        self.numbers = numbers
        self.totals = totals
        self.marked = marked
        self.gone_to = gone_to  # events up to this one may be gone
        self.reader = codec.JobReader()
        self._jobs = JobWriter(conn)
        conn.create_function("fingerprint", 3, fingerprint_of_bytes, deterministic=True)
        self._late = LateWriter(conn, self.rows, self.note_fault)
        self._audit = AuditWriter(conn)
        self.store_epoch: Callable[[int], object] = lambda epoch: None  # in the epoch file
        self.stored_epoch = numbers.epoch  # up to there
        self.before_commit: Callable[[], object] = lambda: None  # called when all is said and the disk comes next
        self.quarantined: dict[str, str] = {}
        self.faults: list[str] = []
        self._directory = directory
        self._broken: BaseException | None = None
        self._rebuilding = False
        # Of each grant made or heard of since the start: seq of its event, signs of life since the last thinning.
        self._signs: dict[int, tuple[int, int]] = {}
        self.tombstones_written = 0  # tombstones that were written
        self.quarantined_count = 0  # jobs that were set aside
        self.recently_quarantined: dict[
            int, Quarantined
        ] = {}  # by number; those that every batch to come knows of are dropped
        self.unmoved: dict[int, str] = {}  # seq -> reason, of jobs whose damaged rows could not be moved
        # For each job: the event up to which its journal is compact (0: unknown), and the grants given back since.
        self._given_back: dict[int, tuple[int, int]] = {}
        # Jobs whose journals have to be thinned or compacted, oldest first, with the event to begin at.
        self._to_shorten: dict[tuple[Callable[[int, int], None], int], int] = {}

    # ------------------------------------------------------------------------------------------- one transaction

    @property
    def is_broken(self) -> bool:
        """An earlier write failed in a way that leaves the disk's content unknown."""
        return self._broken is not None

    def check(self) -> None:
        """Raise StoreBroken where an earlier write left the disk's content unknown."""
        if self._broken is not None:
            raise StoreBroken(f"an earlier write failed: {self._broken!r}") from self._broken

    def commit(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn` in one transaction. Raises DiskFull or BadRows with nothing written; anything else breaks."""
        self.check()
        kept = (self.numbers, self.totals, self.marked, self.gone_to)
        for retried in (False, True):
            try:
                self.conn.execute("BEGIN IMMEDIATE")
                result = fn(*args)
                self.before_commit()
                self.conn.execute("COMMIT")
            except BaseException as error:
                self.numbers, self.totals, self.marked, self.gone_to = kept
                self._roll_back(error)
                if isinstance(error, BadRows | StructureDamaged):
                    raise
                if self._is_full(error):
                    raise DiskFull(str(error)) from error
                if result_code(error) != sqlite3.SQLITE_CORRUPT_INDEX or retried or self._rebuilding:
                    self._broken = error
                    raise
            else:
                return result
            self.rebuild_indexes()
        raise AssertionError("unreachable")

    def _roll_back(self, error: BaseException) -> None:
        """Undo the transaction that met `error`. If that fails too, nothing is known any more."""
        try:
            if self.conn.in_transaction:
                self.conn.execute("ROLLBACK")
        except sqlite3.Error as second:
            self._broken = second
            raise second from error
        if self.conn.in_transaction:
            self._broken = error
            raise StoreBroken("the transaction could not be rolled back") from error

    def _is_full(self, error: BaseException) -> bool:
        """Whether there was no room. A failed fsync is never that: its frames may be on the disk or not."""
        code = result_code(error)
        if code & 0xFF == sqlite3.SQLITE_FULL:
            return True
        # SQLite tells an exceeded quota (EDQUOT) no better than a failed write: try it.
        return code == sqlite3.SQLITE_IOERR_WRITE and not files.has_room(self._directory)

    def rebuild_indexes(self) -> None:
        """Make all indexes anew from the rows: they hold nothing of their own. Takes seconds for a million rows."""
        self.faults.append("an index did not match its rows: all indexes were rebuilt; run `jobd doctor`")
        self._rebuilding = True
        try:
            self.commit(self.reindex)
        finally:
            self._rebuilding = False

    def reindex(self) -> None:
        """All indexes from their rows, inside a transaction. Raises CannotMove where two whole rows have one id."""
        try:
            self.conn.execute("REINDEX")
        except sqlite3.IntegrityError:
            self._separate_duplicate_ids()

    def _separate_duplicate_ids(self) -> None:
        """A damaged id is that of another job: give it one of its own, under which its row is met and set aside."""
        run = self.conn.execute
        (made_by,) = run("SELECT sql FROM sqlite_schema WHERE name = 'jobs_id'").fetchone()
        run("DROP INDEX jobs_id")
        twice = "SELECT id FROM jobs NOT INDEXED GROUP BY id HAVING count(*) > 1"
        found = self.rows(f"SELECT {JOB_SQL} FROM jobs NOT INDEXED WHERE id IN ({twice})")
        damaged = [(row[0],) for row in found if fault(row) is not None]
        self.conn.executemany("UPDATE jobs SET id = id || ' of seq ' || seq WHERE seq = ?", damaged)
        try:
            run(made_by)
            run("REINDEX")
        except sqlite3.IntegrityError as error:
            raise StructureDamaged(str(error)) from error

    def rows(self, sql: str, args: tuple[Any, ...] = ()) -> list[Row]:
        """All rows of a query, also those whose text is no UTF-8 (rows.fault names them)."""
        try:
            return self.conn.execute(sql, args).fetchall()
        except sqlite3.OperationalError as error:
            if not is_undecodable(error):
                raise
        with lenient_text(self.conn):
            return self.conn.execute(sql, args).fetchall()

    def rows_up_to(self, sql: str, args: tuple[Any, ...], most_bytes: int) -> tuple[list[Row], bool]:
        """The first rows of a query, one at least, until they hold so much; and whether they end before it does."""
        try:
            return _fetch_up_to(self.conn.execute(sql, args), most_bytes)
        except sqlite3.OperationalError as error:
            if not is_undecodable(error):
                raise
        with lenient_text(self.conn):
            return _fetch_up_to(self.conn.execute(sql, args), most_bytes)

    def rows_one_by_one(self, sql: str, keys: Iterable[int], what: str, args: tuple[Any, ...] = ()) -> list[Row]:
        """The rows of a query asked once for each key, where a damaged page hides some of them; those are named."""
        found: list[Row] = []
        lost: list[int] = []
        for key in keys:
            try:
                found += self.rows(sql, (key, *args))
            except sqlite3.DatabaseError as error:
                if not is_corrupt(error):
                    raise
                lost.append(key)
        if lost:
            self.faults.append(f"{what} {min(lost)} to {max(lost)}: {len(lost)} cannot be read; run `jobd doctor`")
        return found

    # ------------------------------------------------------------------------------------------------ the batch

    def write(self, batch: Batch, reported: int) -> dict[int, bytes]:
        """Commit `batch`, whose counts know of the first `told_aside` jobs of `aside`; gives the asked payloads."""
        if batch.numbers.epoch > self.stored_epoch:
            self._advance_epoch(batch.numbers.epoch)
        shown, buried = self.commit(self._apply, batch, reported)
        self.tombstones_written += buried
        for number in [number for number in self.recently_quarantined if number < reported]:
            del self.recently_quarantined[number]
        if self._to_shorten:
            # One after each batch, as all wait for it. In a transaction of its own: it is no part of the promise, and
            # must not undo it.
            shorten, job_seq = next(iter(self._to_shorten))
            with contextlib.suppress(DiskFull, StructureDamaged):
                self.commit(shorten, job_seq, self._to_shorten.pop((shorten, job_seq)))
        return shown

    def _advance_epoch(self, epoch: int) -> None:
        """Store the epoch after a full counter before its first token, in the database first (see opening.py)."""
        if epoch > self.numbers.epoch:
            self.commit(self._begin_epoch, epoch)
        self.store_epoch(epoch)
        self.stored_epoch = epoch

    def _begin_epoch(self, epoch: int) -> None:
        self.numbers = replace(self.numbers, epoch=epoch, next_token=1)
        self.write_meta()

    def _apply(self, batch: Batch, reported: int) -> tuple[dict[int, bytes], int]:
        """The payloads that were asked for, and how many tombstones were written."""
        tombstones = batch.tombstones
        if batch.changes:
            if left := self._late.write(batch.changes, sweeps=batch.sweeps):
                tombstones = distinct_tombstones([*left, *tombstones])
            self._write_jobs(batch.changes)
            self._write_events(batch.changes)
        if batch.queues:
            self._write_queues(
                batch.queues, [self.recently_quarantined[number] for number in range(reported, self.quarantined_count)]
            )
        if tombstones:
            self.conn.executemany(_PUT_TOMBSTONE, map(codec.tombstone_row, tombstones))
        self._write_rest(batch)
        self.numbers = batch.numbers
        self.marked = self.marked and not batch.unmark
        self.write_meta()
        return self._read_payloads(batch), len(tombstones)

    def _write_jobs(self, changes: list[Change]) -> None:
        try:
            self.totals = self._jobs.write(changes, self.totals)
        except RowsMissing as error:
            # A look at history may have met a damaged row after the batch was decided, and set it aside.
            named = {change.before.id for change in changes if change.before is not None} & self.quarantined.keys()
            if not named:
                raise
            raise BadRows({id_: self.quarantined[id_] for id_ in named}) from error

    def write_meta(self) -> None:
        self.conn.execute(_UPDATE_META, meta_row(self.numbers, self.totals, int(self.marked), self.gone_to, VERSION))

    def _write_events(self, changes: list[Change]) -> None:
        self.conn.executemany(_INSERT_EVENT, [sealed(codec.event_row(change.event)) for change in changes])
        for change in changes:
            event = change.event
            if event.type in HEARTBEATS:
                # Of a grant made before the start nothing is known: look at its journal once.
                begin, signs = self._signs.get(event.job_seq, (0, KEEP_HEARTBEATS))
                self._signs[event.job_seq] = (begin, signs + 1)
                if signs >= KEEP_HEARTBEATS:
                    self._to_shorten.setdefault((self._thin, event.job_seq), begin)
            elif event.type == "granted":
                self._signs[event.job_seq] = (event.seq, 0)
            elif event.after != "processing":
                self._signs.pop(event.job_seq, None)
                if event.type in GIVEN_BACK:
                    self._count_given_back(event.job_seq)
                elif event.after not in LIVE:
                    self._given_back.pop(event.job_seq, None)

    def _count_given_back(self, job_seq: int) -> None:
        """Count a grant of this job that was given back. Above the limit, drop the job counted longest ago."""
        begin, count = self._given_back.pop(job_seq, (0, 0))
        self._given_back[job_seq] = (begin, (count + 1) % KEEP_GRANTS)
        if count + 1 == KEEP_GRANTS:
            self._to_shorten.setdefault((self._compact, job_seq), begin)
        if len(self._given_back) > GIVEN_BACK_KEPT:
            del self._given_back[next(iter(self._given_back))]

    def note_quarantined(self, job_seq: int, aside: Quarantined) -> None:
        """Damaged rows of that job were met, and moved or not. Of one that still cannot be nobody is told again."""
        if aside.is_moved:
            self.unmoved.pop(job_seq, None)
        elif self.unmoved.get(job_seq) == aside.reason:
            return
        else:
            self.unmoved[job_seq] = aside.reason
        self.report_quarantined(aside)

    def note_fault(self, fault: str) -> None:
        """Of what is met again and again, until there is room, one sentence is enough."""
        if fault not in self.faults:
            self.faults.append(fault)

    def report_quarantined(self, aside: Quarantined) -> None:
        """To be told to `Storage.on_quarantined`."""
        self.recently_quarantined[self.quarantined_count] = aside
        self.quarantined_count += 1  # last: the event loop looks at it from its own thread

    def _thin(self, job_seq: int, begin: int) -> None:
        if job_seq in self._signs:  # no grant of it is at work any more, else
            self._signs[job_seq] = (self._signs[job_seq][0], 0)
        sql = f"SELECT {EVENT_SQL} FROM events WHERE job_seq = ? AND seq >= ? ORDER BY seq"
        found = self._journal_rows(sql, (job_seq, begin))
        if any(fault(row) for row in found):
            return  # timeline quarantines the row and names it
        self._shorten(*codec.thin([codec.event(row) for row in found]))

    def _compact(self, job_seq: int, begin: int) -> None:
        """Compact the journal of a job from the event `begin` on (0: after its first grants) up to its last grants."""
        if not begin:
            begin = self._nth_grant(job_seq, "ASC", KEEP_FIRST_GRANTS)
        end = self._nth_grant(job_seq, "DESC", KEEP_GRANTS - 1)
        if begin >= end:
            return
        sql = f"SELECT {EVENT_SQL} FROM events WHERE job_seq = ? AND seq BETWEEN ? AND ? ORDER BY seq LIMIT ?"
        found = self._journal_rows(sql, (job_seq, begin, end, COMPACTED_AT_ONCE))
        damaged = [place for place, row in enumerate(found) if fault(row)]
        events = [codec.event(row) for row in found[damaged[-1] + 1 if damaged else 0 :]]
        self._shorten(*codec.compact(events))
        if found and found[-1][0] < end:  # continue after the next batch, from the last grant, which did not change
            grants = [event.seq for event in events[1:] if event.type == "granted"]
            end = grants[-1] if grants else found[-1][0] + 1
            self._to_shorten[self._compact, job_seq] = end
        if job_seq in self._given_back:
            self._given_back[job_seq] = (end, self._given_back[job_seq][1])

    def _nth_grant(self, job_seq: int, way: str, skipped: int) -> int:
        """Return the seq of the grant after `skipped` others (from the end with DESC); 0 if there is none."""
        sql = (
            "SELECT seq FROM events INDEXED BY events_job WHERE job_seq = ? AND type = 'granted' "
            f"ORDER BY seq {way} LIMIT 1 OFFSET ?"
        )
        return next((seq for (seq,) in self._journal_rows(sql, (job_seq, skipped))), 0)

    def _journal_rows(self, sql: str, args: tuple[Any, ...]) -> list[Row]:
        try:
            return self.rows(sql, args)
        except sqlite3.DatabaseError as error:
            if is_corrupt(error):
                raise StructureDamaged(str(error)) from error
            raise

    def _shorten(self, gone: list[int], changed: list[Event]) -> None:
        self.conn.executemany("DELETE FROM events WHERE seq = ?", [(seq,) for seq in gone])
        merged = [sealed(codec.event_row(event)) for event in changed]
        self.conn.executemany(_UPDATE_EVENT, [(*row[-2:], row[0]) for row in merged])

    def _write_queues(self, queues: dict[str, QueueRow], untold: list[Quarantined]) -> None:
        """Rows of `queues` as memory has them, without the jobs that were set aside since and are counted there yet."""
        put = dict(queues)
        for name, status in (aside.uncounted for aside in untold if aside.uncounted is not None):
            if name in put:
                put[name] = put[name].without(status)
        self.conn.executemany(PUT_QUEUE, [codec.queue_row(name, queue) for name, queue in put.items()])

    def _write_rest(self, batch: Batch) -> None:
        many = self.conn.executemany
        if batch.forget_keys:
            many("DELETE FROM keys WHERE digest = ?", [(digest,) for digest in batch.forget_keys])
        if batch.keys:
            many(_REPLACE_KEY, map(codec.key_row, batch.keys))
        if batch.checked:
            many("DELETE FROM suspects WHERE job_seq = ?", [(seq,) for seq in batch.checked])
        if batch.audit:
            self._audit.write(batch.audit)
        if batch.report is not None:
            (last,) = self.conn.execute("SELECT ifnull(max(seq), 0) FROM reports").fetchone()
            self.conn.execute(insert("reports", ("seq", "body", "crc")), sealed((last + 1, bytes(batch.report))))
            self.conn.execute("DELETE FROM reports WHERE seq <= ?", (last + 1 - KEEP_REPORTS,))

    def _read_payloads(self, batch: Batch) -> dict[int, bytes]:
        shown: dict[int, bytes] = {}
        bad: dict[str, str] = {}
        for seq in batch.payloads:
            payload, wrong = self.payload(seq)
            if payload is not None:
                shown[seq] = payload.body
            else:
                bad[self.job_id_of(seq) or f"seq {seq}"] = wrong
        if bad:
            raise BadRows(bad)
        return shown

    def cached_payloads(self, seqs: Iterable[int]) -> dict[int, bytes]:
        """Payloads that were written lately. Only `write` changes what they are taken from."""
        return {seq: body for seq in seqs if (body := self._jobs.payload(seq)) is not None}

    def job_id_of(self, seq: int) -> str | None:
        """The id of a job, also of one whose row was set aside meanwhile."""
        row = self.rows(BY_SEQ, (seq,))
        if row:
            return readable(row[0][1])
        row = self.rows("SELECT id FROM quarantined_jobs WHERE seq = ?", (seq,))
        return readable(row[0][0]) if row else None

    def payload(self, seq: int) -> tuple[Payload | None, str]:
        """The payload of a job, or None and what is wrong with it."""
        try:
            found = self.rows(_PAYLOAD, (seq,))
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise
            return None, f"its payload cannot be read: {error}"
        if not found:
            return None, "its payload is missing"
        wrong = fault(found[0])
        return (Payload(found[0][1], found[0][2]), "") if wrong is None else (None, f"its payload is bad: {wrong}")

    # ------------------------------------------------------------------------------------------- outside batches

    def prune(self, before: int, limit: int) -> int:
        """Delete up to `limit` journal rows of jobs deleted, and of queues changed, before wall time `before`.

        Who follows the journal from below the last of them is told so: nothing else says what was once between.
        """
        self.check()
        return self.commit(self._prune, before, limit)

    def _prune(self, before: int, limit: int) -> int:
        run = self.conn.execute
        old = "SELECT seq FROM events WHERE job_seq = 0 AND at < ? ORDER BY seq LIMIT ?"
        pruned = self._prune_events(old, before, limit)
        for (job_seq,) in run("SELECT job_seq FROM deleted_jobs WHERE at < ? ORDER BY at LIMIT ?", (before, limit)):
            if pruned >= limit:
                break
            rest = "SELECT seq FROM events WHERE job_seq = ? ORDER BY seq LIMIT ?"
            pruned += self._prune_events(rest, job_seq, limit - pruned)
            if run("SELECT 1 FROM events WHERE job_seq = ?", (job_seq,)).fetchone() is None:
                run("DELETE FROM deleted_jobs WHERE job_seq = ?", (job_seq,))
        if pruned:
            self.write_meta()
        return pruned

    def _prune_events(self, chosen: str, *args: int) -> int:
        gone = self.conn.execute(f"DELETE FROM events WHERE seq IN ({chosen}) RETURNING seq", args).fetchall()
        self.note_gone(max((seq for (seq,) in gone), default=0))
        return len(gone)

    def note_gone(self, seq: int) -> None:
        """The event of this number is gone. A damaged number may be any: none above the last was ever given."""
        self.gone_to = max(self.gone_to, min(seq, self.numbers.next_event - 1))

    def trim_audit(self, before: int, limit: int) -> int:
        """See Storage.trim_audit."""
        self.check()
        try:
            is_counted = self._audit.look_on()
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise
            self.faults.append(f"the audit log cannot be read: {error}; run `jobd doctor`")
            return 0
        return self.commit(self._audit.trim, before, limit) if is_counted else limit

    def settle_tombstones(self, gone: list[int], later: list[Tombstone]) -> None:
        """Forget tombstones by job seq, and write others anew."""
        self.commit(self._settle_tombstones, gone, later)

    def _settle_tombstones(self, gone: list[int], later: list[Tombstone]) -> None:
        self.conn.executemany("DELETE FROM tombstones WHERE job_seq = ?", [(seq,) for seq in gone])
        self.conn.executemany(_PUT_TOMBSTONE, map(codec.tombstone_row, later))

    def save_figures(self, body: bytes) -> None:
        self.commit(self.conn.execute, insert("figures", ("id", "body", "crc"), "REPLACE"), sealed((1, body)))

    def probe(self) -> None:
        """Write a random value and read it back, each committed."""
        value = os.urandom(16)
        self.commit(self.conn.execute, "REPLACE INTO probes (id, value) VALUES (1, ?)", (value,))
        if self.conn.execute("SELECT value FROM probes WHERE id = 1").fetchone() != (value,):
            raise OSError("the probe read back something else than it had written")
