"""Move damaged rows to quarantine, report them, and remove them from all counts. No row is lost.

Each row is moved in a transaction of its own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from typing import Any, Final

from jobd.model.job import FINISHED, Job, is_job_id
from jobd.model.storage import DiskFull, Quarantined
from jobd.storage import codec, database
from jobd.storage.codec import JOB_COLUMNS, SQL, Row, fault, insert
from jobd.storage.events import event_rows

_INSERT: Final = insert("quarantined_jobs", "REPLACE")
_QUEUE: Final = JOB_COLUMNS.index("queue")
_FIRST_EVENTS: Final = f"SELECT {SQL['events']} FROM events WHERE job_seq = ? ORDER BY seq LIMIT 1"
_NOT_FOUND: Final = "it cannot be found by its number; run `jobd doctor`"
_WAS_LIVE: Final = f"SELECT 1 FROM jobs INDEXED BY jobs_live WHERE {database.LIVE_SQL} AND seq = ?"


def quarantine_jobs(
    db: database.Database,
    damaged: list[tuple[Row, str]],
    uncount: Callable[[int], tuple[str, str] | None] | None = None,
) -> dict[str, str]:
    """Quarantine job rows (columns and checksum), each because of its error. Return errors by job id.

    On a full disk or in a damaged tree, a row stays in its table and is reported. A later read quarantines it.
    `uncount` subtracts a job from the counts of pending records. It returns the `uncounted` of a job that they change.
    """
    reasons: dict[str, str] = {}
    for row, reason in damaged:
        id_ = original_id(db, row)
        db.raise_if_clustered(f"job {id_}: {reason}")
        uncounted, is_moved = None, False
        try:
            projected_to = db.projected_to
            db.catch_up()  # pending records have counts from before the row is moved
            if db.projected_to != projected_to:
                row = next(iter(db.rows(database.BY_SEQ, (row[0],))), row)
            # Read before the transaction: SQLite allows no write in a transaction that has read a damaged page.
            payload = _payload_columns(db, row[0])
            was_live = _was_live(db, row[0])  # before the transaction may rebuild the indexes
            uncounted, is_moved = db.commit(_move_job, db, row, payload, id_, reason, was_live), True
            if uncount is not None:
                uncounted = uncount(row[0])
        except DiskFull:
            db.note_fault(f"job {id_} could not be quarantined: the disk is full")
        except database.StructureDamaged as error:
            db.note_fault(f"job {id_} could not be quarantined: {error}; run `jobd doctor`")
        db.quarantined[id_] = reasons[id_] = reason
        db.note_quarantined(row[0], Quarantined(id_, reason, uncounted, is_moved))
    return reasons


def original_id(db: database.Database, row: Row) -> str:
    """Return the id with which a damaged row was written, from its columns, its journal and the index of ids."""
    seq, read = row[0], database.readable(row[1])
    try:
        rows = db.rows(_FIRST_EVENTS, (seq,))
        is_undamaged = bool(rows) and event_rows.fault(rows[0]) is None
        journaled = event_rows.job_id(rows[0]) if is_undamaged else read
        if journaled == read or not is_job_id(journaled):
            return read
        indexed = db.rows("SELECT seq FROM jobs INDEXED BY jobs_id WHERE id = ?", (journaled,))
    except sqlite3.DatabaseError as error:
        if not database.is_corrupt(error):
            raise
        return read
    return journaled if indexed in ([], [(seq,)]) else read  # a rebuilt index has the damaged id


def _was_live(db: database.Database, seq: int) -> bool:
    """Return whether a damaged row was live: its index has the status with which it was written."""
    with database.raising_structure_damaged(of_index=True):
        return bool(db.rows(_WAS_LIVE, (seq,)))


@database.raising_structure_damaged()
def _move_job(
    db: database.Database, row: Row, payload: Row | None, id_: str, reason: str, was_live: bool
) -> tuple[str, str] | None:
    """Move the row. Return the queue and status whose count of finished jobs included it, or None."""
    run = db.conn.execute
    seq = row[0]
    row_text = codec.job_as_text(row)
    run(_INSERT, (seq, id_, reason, database.now_ms(), row_text, *(payload or (None, None))))
    was_present = run("DELETE FROM jobs WHERE seq = ?", (seq,)).rowcount > 0
    uncounted = _uncount(db, row, was_live) if was_present else None
    if was_present and database.readable(row[1]) != id_:
        db.reindex()  # the index lost the entry of the job with this id, or still has one of this row
    run("DELETE FROM suspects WHERE job_seq = ?", (seq,))
    if payload is not None:  # a payload that cannot be read stays in its table
        run("DELETE FROM payloads WHERE job_seq = ?", (seq,))
    db.write_meta()
    return uncounted


def _payload_columns(db: database.Database, seq: int) -> Row | None:
    sql = "SELECT CAST(body AS BLOB), request_hash FROM payloads WHERE job_seq = ?"
    rows = db.rows_one_by_one(sql, [seq], "payloads")
    return (rows[0][0], database.readable(rows[0][1])) if rows else None


def _uncount(db: database.Database, row: Row, was_live: bool) -> tuple[str, str] | None:
    live, live_xor, finished, finished_xor = db.totals
    crc = codec.original_checksum(row)
    if was_live:
        db.totals = (live - 1, live_xor ^ crc, finished, finished_xor)
        return None
    db.totals = (live, live_xor, finished - 1, finished_xor ^ crc)
    status, name = database.readable(row[2]), database.readable(row[_QUEUE])
    rows = db.rows(f"SELECT {SQL['queues']} FROM queues WHERE name = ?", (name,))
    if status not in FINISHED or not rows or fault(rows[0]) is not None:
        return None
    queue = codec.queue(rows[0])
    count = getattr(queue, status)
    if count == 0:
        return None
    db.conn.execute(database.PUT_QUEUE, codec.queue_row(name, queue.without(status)))
    return name, status


def quarantine_job(db: database.Database, job: Job, reason: str) -> None:
    """Quarantine the rows of `job` because of `reason`."""
    rows = db.rows(database.BY_SEQ, (job.seq,))
    quarantine_jobs(db, [(rows[0] if rows else codec.with_checksum(codec.job_row(job)), reason)])


def undamaged_rows(db: database.Database, table: str, rows: Iterable[Row], effect: str = "") -> list[Row]:
    """Return the undamaged ones of `rows`, each a rowid and the columns of a row.

    Quarantine the others. The `effect` follows the error.
    """
    undamaged: list[Row] = []
    damaged: list[tuple[int, Row, str]] = []
    for rowid, *columns in rows:
        row = tuple(columns)
        if (error := fault(row)) is None:
            undamaged.append(row)
        else:
            damaged.append((rowid, row, f"{error}{effect}"))
    quarantine_rows(db, table, damaged)
    return undamaged


def quarantine_rows(db: database.Database, table: str, damaged: list[tuple[int, Row, str]]) -> set[int]:
    """Quarantine damaged rows (rowid, columns, error) of a table other than jobs, and report each as a fault.

    Return the rowids of rows that could not be moved.
    """
    unmoved: set[int] = set()
    for rowid, row, reason in damaged:
        name = row_name(db, table, row)
        db.raise_if_clustered(f"{name}: {reason}")
        error = _NOT_FOUND
        try:
            if db.commit(_quarantine_row, db, table, rowid, row, f"{name.partition(' ')[2]}: {reason}"):
                db.faults.append(f"{name}: {reason}; the row was quarantined")
                continue
        except DiskFull:
            error = "the disk is full"
        except database.StructureDamaged as structure:
            error = str(structure)
        unmoved.add(rowid)
        db.note_fault(f"{name}: {reason}; the row could not be quarantined: {error}")
    return unmoved


def row_name(db: database.Database, table: str, row: Row) -> str:
    """Name a damaged row, for example "audit 4" or "events 17 to 19 of job a"."""
    if table != "events":
        return f"{table} {database.readable(row[0])}"
    first, last, job_seq = row[:3]
    numbers = f"events {first}" if first == last else f"events {first} to {last}"
    return numbers if job_seq == 0 else f"{numbers} of {db.job_name(job_seq)}"


def quarantine_events(db: database.Database, row: Row, reason: str) -> None:
    """Quarantine a damaged row of events inside a transaction, and report it.

    A row that cannot be found by its number stays in its table. Raises StructureDamaged if a page is damaged: SQLite
    allows no further write in the transaction.
    """
    name = row_name(db, "events", row)
    db.raise_if_clustered(f"{name}: {reason}")
    is_moved = _quarantine_row(db, "events", row[0], row, f"{name.partition(' ')[2]}: {reason}")
    db.note_missing(event_rows.highest_number(row))
    result = "was quarantined" if is_moved else f"could not be quarantined: {_NOT_FOUND}"
    db.note_fault(f"{name}: {reason}; the row {result}")


def _quarantine_row(db: database.Database, table: str, rowid: int, row: Row, description: str) -> bool:
    """Move a row. Return False, with nothing written, if it cannot be found by its number."""
    columns = codec.COLUMNS[table][: len(row)]
    sql = f"DELETE FROM {table} WHERE rowid = ?"
    args: tuple[Any, ...] = (rowid,)
    if "crc" in columns:  # damage to its number may have made it that of another row
        sql, args = f"{sql} AND crc = ?", (rowid, row[columns.index("crc")])
    with database.raising_structure_damaged():
        deleted = db.conn.execute(sql, args).rowcount
    if not deleted:  # damage to its number, or to those of other rows, hides it from a search
        return False
    db.conn.execute(insert("bad_rows"), (table, description, database.now_ms(), codec.as_text(table, row)))
    if table == "events":
        db.note_missing(event_rows.highest_number(row))
        db.write_meta()
    return True
