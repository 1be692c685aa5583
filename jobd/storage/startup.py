"""Open a store: connect, migrate the schema, choose the epoch, and read and verify all live data.

Nothing is changed before the lock is held and the schema version is known. All calls block; the storage thread makes
them.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from jobd.journal.sqlite import SqliteJournal
from jobd.model.job import LAST_EPOCH, SAFE_EPOCH, Job, PackedJob, epoch_seconds, new_epoch
from jobd.model.storage import SPARE_BYTES, DiskFull, Numbers, OpenedStore, QueueRow, StoredResponse
from jobd.storage import codec, database, files, store_file
from jobd.storage.cluster import membership
from jobd.storage.cluster.membership import Membership
from jobd.storage.codec import SQL, Row
from jobd.storage.connection import FunctionConnection, journal_mode, read_number
from jobd.storage.damage import wal
from jobd.storage.damage.quarantine import quarantine_jobs, undamaged_rows
from jobd.storage.database import Database, StructureDamaged, lenient_text, now_ms, readable, result_code
from jobd.storage.files import FileLock, NotAStore, StoreBusy, StoreFailed, StoreUnreadable
from jobd.storage.queries import read_job
from jobd.storage.schema import migrations
from jobd.storage.schema.upgrade import upgrade
from jobd.storage.tables import table_writes
from jobd.storage.tables.projection import Projection
from jobd.storage.tables.tail import JournalTail, read_tail

MEMORY: Final = ":memory:"
PAGE_CACHE_KIB: Final = 8 << 10  # enough for the rows of running jobs
_LOG_BYTES: Final = 32 << 20  # the log shrinks to this after a large transaction
# The index only finds live jobs: a column read from it would hide damage in the row.
_LIVE_JOBS: Final = (
    f"SELECT {SQL['jobs']} FROM (SELECT seq AS found FROM jobs INDEXED BY jobs_live WHERE {database.LIVE_SQL}) "
    "CROSS JOIN jobs NOT INDEXED ON seq = found"
)
_SUSPECTS: Final = "SELECT seq, id FROM suspects CROSS JOIN jobs ON seq = job_seq"
_EPOCH_SLACK_S: Final = 60  # starts within one second use epochs ahead of the clock
# sqlite3 searches for an adapter for each None and each bytes object, which is slow. These return the value itself
# without a Python call.
_NO_ADAPTERS: Final[dict[None, None]] = {}
sqlite3.register_adapter(type(None), _NO_ADAPTERS.get)
sqlite3.register_adapter(bytes, bytes)


def connect(path: str, synchronous: str) -> FunctionConnection:
    """Return an exclusive connection to the store at `path`. The caller holds the lock file.

    With NORMAL, a power failure may tear a commit before others, which SQLite then skips. The journal of such a store
    is elsewhere.
    """
    if path != MEMORY and not files.create_private(path):
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))  # SQLite would report a read-only file as a failed disk
        store_file.check_version(path, store_file.peek(path))
        if synchronous != "NORMAL":
            store_file.check_wal(path)
    conn = FunctionConnection(path, timeout=1.0, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        with translated_errors(path):
            # EXCLUSIVE before WAL prevents other connections and the shared memory file.
            conn.execute("PRAGMA locking_mode = EXCLUSIVE")
            if path != MEMORY:
                journal_mode(conn, path, "wal")
            conn.execute(f"PRAGMA synchronous = {synchronous}")
            conn.execute(f"PRAGMA wal_autocheckpoint = {database.CHECKPOINT_FRAMES}")
            conn.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
            conn.execute(f"PRAGMA cache_size = -{PAGE_CACHE_KIB}")
            conn.execute("PRAGMA temp_store = MEMORY")
            conn.execute("PRAGMA cell_size_check = ON")
            conn.execute("PRAGMA trusted_schema = OFF")
            conn.execute("PRAGMA secure_delete = FAST")
            conn.execute("BEGIN EXCLUSIVE")
            conn.execute("COMMIT")
    except BaseException:
        conn.close()
        raise
    return conn


@contextlib.contextmanager
def opened_alone(path: str) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the existing store at `path`, which no daemon may hold. Raises StoreError or DiskFull."""
    with FileLock(path):
        if not os.path.exists(path):
            raise StoreUnreadable(f"{path} does not exist")
        with contextlib.closing(connect(path, "FULL")) as conn, translated_errors(path):
            yield conn


@contextlib.contextmanager
def opened_read_only(path: str) -> Iterator[tuple[sqlite3.Connection, int]]:
    """Yield a read-only connection to the store at `path`, to which nothing else writes, and its schema version.

    Raises FileNotFoundError, StoreTooNew, NotAStore, StoreUnreadable or DiskFull.
    """
    header = store_file.peek(path)
    store_file.check_version(path, header)
    with translated_errors(path), store_file.read_only(path) as conn:
        check_application_id(conn, path)
        yield conn, header[1]


@contextlib.contextmanager
def translated_errors(path: str) -> Iterator[None]:
    """Translate SQLite's errors while opening `path` into StoreError, DiskFull and PermissionError."""
    try:
        yield
    except sqlite3.Error as error:
        code = result_code(error) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreBusy(path, None) from error
        is_error = code == sqlite3.SQLITE_IOERR  # also reported if there is no space for the shared memory file
        if code == sqlite3.SQLITE_FULL or (is_error and not files.has_space(os.path.dirname(files.log_of(path)))):
            raise DiskFull(f"{path}: {error}") from error
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH):
            raise StoreUnreadable(_unreadable(path, error)) from error
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            files.check_permission(os.path.dirname(files.log_of(path)))
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            raise StoreFailed(f"{path}: {error}: the disk failed; see the kernel log") from error
        raise
    except (UnicodeDecodeError, StructureDamaged) as error:  # a name in the schema, or rows that a slice changes
        raise StoreUnreadable(_unreadable(path, error)) from error


def _unreadable(path: str, error: Exception) -> str:
    return f"{path} cannot be read ({error}): run `jobd doctor`, or restore a backup with `jobd restore`"


# ---------------------------------------------------------------------------------------------------------------------
# Read the store


def start(conn: sqlite3.Connection, path: str, cluster_id: str | None = None) -> tuple[Projection, OpenedStore]:
    """Migrate the schema, choose the epoch, write the tables up to the end of the journal, and read all live data.

    The journal of a store that belongs to a cluster is elsewhere, and so are its epochs. Such a store is read as it is.
    """
    with translated_errors(path):
        projection = Projection(identify(conn, path, cluster_id))
        db = projection.db
        projection.read_tail(path)
        marked = _choose_epoch(projection, path) if cluster_id is None else False
        with projection.starting(path):
            opened = projection.read(_read_all, db)
        opened.marked = marked
        opened.last_record = projection.last
        opened.tombstones = read_number(conn, "SELECT count(*) FROM tombstones")
        opened.epoch_warning = epoch_warning(db.numbers.epoch, now_ms())
        if path != MEMORY:
            _remove_leftovers(path)
            opened.full = not _fits(probe, db, path, SPARE_BYTES)
            opened.has_reserve = _fits(files.build_reserve, path)
        opened.faults = db.faults.copy()
        if path != MEMORY:  # from now on Projection.upkeep makes checkpoints, outside commits
            page_bytes = read_number(conn, "PRAGMA page_size")
            db.log = wal.LogGauge(files.log_of(path), page_bytes)
            if not opened.full:
                wal.extend(files.log_of(path), database.CHECKPOINT_FRAMES, page_bytes)
            conn.execute("PRAGMA wal_autocheckpoint = 0")
        return projection, opened


def identify(conn: sqlite3.Connection, path: str, cluster_id: str | None) -> Database:
    """Migrate the schema, and return the tables with their membership, which a new store gets. Raises WrongCluster."""
    prepare_schema(conn, path)
    db = read_meta(conn, path)
    found = membership.read(conn)
    membership.check(path, found, cluster_id, is_new=db.numbers.epoch == 0)
    if found is None and cluster_id is not None:
        found = Membership(cluster_id)
        db.commit(membership.write, conn, found)
    db.membership = found
    return db


def prepare_schema(conn: sqlite3.Connection, path: str) -> None:
    """Create the schema in an empty file; copy an older store and then migrate it."""
    version = read_number(conn, "PRAGMA user_version")
    store_file.check_version(path, (read_number(conn, "PRAGMA application_id"), version))
    if not read_number(conn, "SELECT count(*) FROM sqlite_schema"):
        migrations.create(conn)
        return
    check_application_id(conn, path)
    if version < migrations.VERSION:
        migrations.check_meta(conn, path)
        upgrade(conn, path, version)
    if lacking := missing_from_schema(conn):
        raise StoreUnreadable(f"{path}: the schema lacks {', '.join(lacking)}: restore a backup with `jobd restore`")


def missing_from_schema(conn: sqlite3.Connection) -> list[str]:
    """Return the tables, columns and indexes of this schema version that the store lacks or whose names are damaged."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        migrations.create(fresh)
        return sorted(_names_in_schema(fresh) - _names_in_schema(conn))


def _names_in_schema(conn: sqlite3.Connection) -> set[str]:
    names = set()
    with lenient_text(conn):
        for kind, name in conn.execute("SELECT type, name FROM sqlite_schema WHERE sql IS NOT NULL").fetchall():
            names.add(name)
            if kind == "table":
                columns = conn.execute("SELECT name FROM pragma_table_info(?)", (readable(name),))
                names |= {f"{name}.{column}" for (column,) in columns}
    return names


def check_application_id(conn: sqlite3.Connection, path: str) -> None:
    """Raise NotAStore if another program wrote the database."""
    if read_number(conn, "PRAGMA application_id") != migrations.APPLICATION_ID:
        raise NotAStore(f"{path} is a database of another program")


def read_meta(conn: sqlite3.Connection, path: str) -> Database:
    """Return the database with the numbers and totals of its meta row. Raises StoreUnreadable."""
    meta = migrations.check_meta(conn, path)
    numbers = msgspec.convert({name: meta[name] for name in Numbers.__struct_fields__}, Numbers, strict=False)
    totals = (meta["live_count"], meta["live_xor"], meta["finished_count"], meta["finished_xor"])
    places = (meta["marked"], meta["events_gone_to"], meta["projected_to"])
    return Database(conn, path, numbers, totals, *places)


def check_tail(conn: sqlite3.Connection, path: str) -> JournalTail:
    """Return the tail of the journal. Raises StoreUnreadable if a record of it cannot be used."""
    db = read_meta(conn, path)
    tail = read_tail(SqliteJournal(conn, db.commit_statement), db.projected_to)
    tail.check(path)
    return tail


def project_tail(conn: sqlite3.Connection, path: str) -> Database:
    """Write the tables up to the end of the journal, and return them. Raises StoreUnreadable or DiskFull."""
    projection = Projection(read_meta(conn, path))
    projection.read_tail(path)
    with projection.starting(path):
        projection.project()
    return projection.db


def _choose_epoch(projection: Projection, path: str) -> bool:
    """Begin a new epoch for a new store, a backup, and a database whose epoch file is missing or newer.

    Return whether a backup or an older copy was restored, so that its grants have to end. An epoch is written to the
    database before the file, so a file that is ahead of its database means that the database is an older copy.
    """
    db = projection.db
    found = 0 if path == MEMORY else files.read_epoch(path)
    in_file, stored_epoch = found or 0, db.numbers.epoch
    is_restored = db.marked > 0 or in_file > stored_epoch
    if stored_epoch == 0 and in_file > 0:
        db.faults.append(
            f"{path} was missing or empty at the start, but {path}.epoch is that of an earlier database, whose jobs "
            "are gone. Unless you deleted it yourself, stop the daemon and restore a backup: jobd restore FILE"
        )
    if is_restored or stored_epoch == 0 or found is None:
        epoch = new_epoch(max(stored_epoch, in_file), now_ms())
        if epoch > LAST_EPOCH:
            raise StoreUnreadable(f"{path}: there is no epoch for fencing tokens above {epoch - 1}")
        db.commit(db.begin_epoch, epoch, projection.last + 1 if is_restored else 0)
    if path != MEMORY:
        if found != db.numbers.epoch:
            files.write_epoch(path, db.numbers.epoch)
        db.store_epoch = partial(files.write_epoch, path)
    db.stored_epoch = db.numbers.epoch
    return is_restored


def epoch_warning(epoch: int, now: int) -> str | None:
    """Describe the effect of a wrong wall clock on fencing tokens; None if it is and was right."""
    seconds = epoch_seconds(now)
    if epoch > SAFE_EPOCH:
        return f"epoch {epoch} gives fencing tokens of 2^53 and more, which JavaScript cannot read exactly"
    if seconds > SAFE_EPOCH:
        return "the wall clock is past 2036: epochs only count up by 1, and copies of this store may use the same one"
    if epoch > seconds + _EPOCH_SLACK_S:
        behind = f"the wall clock is {epoch - seconds} s behind epoch {epoch} of the fencing tokens"
        return f"{behind}: until the clock has caught up, copies of this store may use the same epoch"
    return None


def _remove_leftovers(path: str) -> None:
    """Remove temporary files of backups and other commands that a crash interrupted."""
    shutil.rmtree(f"{path}{files.SCRATCH}", ignore_errors=True)
    for name in glob.glob(f"{glob.escape(path)}{files.TEMPORARY}*"):
        Path(name).unlink(missing_ok=True)


def probe(db: Database, path: str, spare_bytes: int) -> None:
    """Write a value and read it back, with `spare_bytes` left free on the disk. Raises DiskFull."""
    if path == MEMORY or not spare_bytes:
        db.probe()
        return
    with files.occupied(path, spare_bytes):
        db.probe()


def _fits(write: Callable[..., object], *args: object) -> bool:
    """Call `write`, and return whether the disk had space for it."""
    try:
        write(*args)
    except DiskFull:
        return False
    return True


def _read_all(db: Database) -> OpenedStore:
    bad_rows = db.rows("SELECT place, count(*) FROM bad_rows GROUP BY place")
    db.faults += [
        f"damaged rows of {readable(place)} in quarantine: {count}; run `jobd doctor`" for place, count in bad_rows
    ]
    jobs, packed_jobs = _live_jobs(db)
    return OpenedStore(
        numbers=db.numbers,
        jobs=jobs,
        packed_jobs=packed_jobs,
        queues=_queues(db),
        quiet=table_writes.read_quiet(db),
        schedules=table_writes.read_schedules(db),
        keys=_keys(db),
        unvalidated={seq: readable(id_) for seq, id_ in db.rows(_SUSPECTS)},
        faults=[],
        stats=_stats(db),
        quarantined=db.quarantined.copy(),  # last, because the reads quarantine rows
    )


def _live_jobs(db: Database) -> tuple[list[Job], list[PackedJob]]:
    """Read all queued and processing jobs. Add a fault if their number or XOR differs from the stored totals."""
    for rebuilt in (False, True):
        stored = db.totals[:2]
        jobs, packed, damaged, xor = db.leniently(lambda: _scan(db))
        quarantined = quarantine_jobs(db, damaged)
        db.faults += [f"job {id_} was quarantined: {reason}" for id_, reason in quarantined.items()]
        totals = len(jobs) + len(packed) + len(damaged), xor
        if totals == stored:
            return jobs, packed
        if not rebuilt:
            try:
                db.rebuild_indexes()
            except (DiskFull, StructureDamaged):
                break
    db.raise_if_clustered("the live jobs differ from those that are recorded")
    db.faults.append(
        f"{totals[0]} live jobs were found, but {stored[0]} are recorded"
        if totals[0] != stored[0]
        else f"the {totals[0]} live jobs differ from those that are recorded"
    )
    # A damaged tree may return a row twice.
    by_seq = {job.seq: job for job in jobs}
    packed_jobs = {job.seq: job for job in packed if job.seq not in by_seq}
    return list(by_seq.values()), list(packed_jobs.values())


def _scan(db: Database) -> tuple[list[Job], list[PackedJob], list[tuple[Row, str]], int]:
    """Return the live jobs, their damaged rows, and the XOR of all their checksums as they were written."""
    jobs: list[Job] = []
    packed: list[PackedJob] = []
    damaged: list[tuple[Row, str]] = []
    xor = 0
    for row in db.conn.execute(_LIVE_JOBS):
        job, error = read_job(row, db.reader.job_or_packed)
        if job is None:
            damaged.append((row, error))
            xor ^= codec.original_checksum(row)
            continue
        xor ^= row[-1]
        if isinstance(job, PackedJob):
            packed.append(job)
        else:
            jobs.append(job)
    return jobs, packed, damaged, xor


def _queues(db: Database) -> dict[str, QueueRow]:
    rows = db.rows(f"SELECT rowid, {SQL['queues']} FROM queues")
    undamaged = undamaged_rows(db, "queues", rows, ": it may have been paused, and is not paused now")
    queues = {row[0]: codec.queue(row) for row in undamaged}
    if len(queues) < len(rows):
        for name, counts in recount_queues(db.conn).items():
            queues.setdefault(name, QueueRow(False, *counts))
    return queues


def recount_queues(conn: sqlite3.Connection) -> dict[str, tuple[int, int, int]]:
    """Count the completed, failed and cancelled jobs of each queue. Reads every job."""
    counts: dict[str, dict[str, int]] = {}
    sql = f"SELECT queue, status, count(*) FROM jobs NOT INDEXED WHERE {database.FINISHED_SQL} GROUP BY queue, status"
    with lenient_text(conn):
        for queue, status, count in conn.execute(sql):
            counts.setdefault(readable(queue), dict.fromkeys(("completed", "failed", "cancelled"), 0))[status] += count
    return {queue: (c["completed"], c["failed"], c["cancelled"]) for queue, c in counts.items()}


def _keys(db: Database) -> list[StoredResponse]:
    rows = db.rows(f"SELECT rowid, {database.KEY_SQL} FROM keys ORDER BY at")
    return list(map(codec.key, undamaged_rows(db, "keys", rows)))


def _stats(db: Database) -> bytes | None:
    rows = undamaged_rows(db, "figures", db.rows("SELECT rowid, id, body, crc FROM figures"))
    return rows[0][1] if rows else None
