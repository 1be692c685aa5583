"""Check the checksums of all rows of the open store, in slices. Damaged rows are quarantined.

Each call checks one slice in about SLICE_S. It runs in the storage thread, between batches.
"""

from __future__ import annotations

import sqlite3
import time
from typing import Final

from jobd.model.responses import CheckedRows, DamagedRow
from jobd.storage.codec import SQL, Row, fault
from jobd.storage.damage.quarantine import quarantine_jobs, quarantine_rows, row_name
from jobd.storage.database import Database, is_corrupt
from jobd.storage.queries import key_fault, read_job

SLICE_S: Final = 0.002
MAX_ROWS: Final = 100  # per query
MAX_BYTES: Final = 1 << 20
_START: Final = -(1 << 63)  # below every rowid: those of tombstones may be negative, and damage can make any so

# The code that uses the other tables quarantines their rows.
_QUARANTINED: Final = ("events", "late_results", "audit", "audit_jobs")
TABLES: Final = ("jobs", *_QUARANTINED, "keys", "tombstones", "deliveries")


def check_slice(db: Database, cursor: str | None) -> CheckedRows | None:
    """Check the rows after `cursor` (TABLE:ROWID, or TABLE: for its first row). An unreadable page ends the table."""
    table, _, after_text = (cursor or f"{TABLES[0]}:").partition(":")
    if table not in TABLES:
        return None
    after = int(after_text or _START)
    db.check()
    try:
        checked, damaged, last = _check(db, table, after)
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        place = f"{table} after {max(after, 0)}"
        checked, damaged, last = 0, [DamagedRow(place, f"rows cannot be read: {error}")], None
    following = TABLES[TABLES.index(table) + 1 :]
    next_cursor = f"{following[0]}:" if following else None
    return CheckedRows(table, checked, damaged, next_cursor if last is None else f"{table}:{last}")


def _check(db: Database, table: str, after: int) -> tuple[int, list[DamagedRow], int | None]:
    """Return how many rows were checked, the damaged ones, and the rowid after which the next slice begins.

    It is None at the end of the table. Its row is undamaged, because damage to a rowid would let the next slice skip
    rows, or never end.
    """
    until_s = time.perf_counter() + SLICE_S
    sql = f"SELECT rowid, {SQL[table]} FROM {table} NOT INDEXED WHERE rowid > ? ORDER BY rowid LIMIT ?"
    read, is_cut = db.rows_up_to(sql, (after, MAX_ROWS), MAX_BYTES)
    damaged: list[tuple[int, Row, str]] = []
    checked, size, last = 0, 0, after
    for rowid, *values in read:
        row, error = tuple(values), None
        if table == "jobs":
            job, error = read_job(row, db.reader.job)
            if job is not None:
                payload, error = db.payload(job.seq)
                if not error and job.extra is not None:
                    error = db.extra_bodies(job)[1]
                size += 0 if payload is None else len(payload.body)
        else:
            error = key_fault(row) if table == "keys" else fault(row)
        checked += 1
        if error:
            damaged.append((rowid, row, error))
        if error or rowid <= after:
            continue
        last = rowid
        if size > MAX_BYTES or time.perf_counter() > until_s:
            break
    is_end = checked == len(read) < MAX_ROWS and not is_cut
    if last == after and read:  # no rowid is known to be right
        last = max(read[-1][0], after + 1)
    if table == "jobs":
        moved = quarantine_jobs(db, [(row, error) for _, row, error in damaged])
        found = [DamagedRow(f"job {id_}", error) for id_, error in moved.items()]
    else:
        if table in _QUARANTINED:
            quarantine_rows(db, table, damaged)
        found = [DamagedRow(row_name(db, table, row), error) for _, row, error in damaged]
    return checked, found, None if is_end else last
