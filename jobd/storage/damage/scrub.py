"""Check the checksums of all rows of the open store, in slices. Damaged rows are quarantined.

Each call checks one slice in about SLICE_S. It runs in the storage thread, between batches.
"""

from __future__ import annotations

import sqlite3
import time
from typing import Final

from msgspec import Struct

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


class Slice(Struct):
    """The result of one slice. The next one begins after the row with rowid `last`; None at the end of the table.

    That row is undamaged, because damage to a rowid would let the next slice skip rows, or never end.
    """

    table: str
    last: int | None
    checked: int = 0
    damaged: list[DamagedRow] = []


def check_slice(db: Database, cursor: str | None) -> CheckedRows | None:
    """Check the rows after `cursor` (TABLE:ROWID, or TABLE: for its first row).

    An unreadable page is reported and ends the table.
    """
    table, _, after_text = (cursor or f"{TABLES[0]}:").partition(":")
    if table not in TABLES:
        return None
    after = int(after_text or _START)
    db.check()
    result = Slice(table, after)
    until_s = time.perf_counter() + SLICE_S
    try:
        (_jobs if table == "jobs" else _rows)(db, result, after, until_s)
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        where = f"{table} after {max(result.last or 0, 0)}"
        result.damaged.append(DamagedRow(where, f"rows cannot be read: {error}"))
        result.last = None
    return CheckedRows(table, result.checked, result.damaged, _next_cursor(result))


def _next_cursor(result: Slice) -> str | None:
    if result.last is not None:
        return f"{result.table}:{result.last}"
    following = TABLES[TABLES.index(result.table) + 1 :]
    return f"{following[0]}:" if following else None


def _jobs(db: Database, result: Slice, after: int, until_s: float) -> None:
    sql = f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED WHERE seq > ? ORDER BY seq LIMIT ?"
    read, is_cut = db.rows_up_to(sql, (after, MAX_ROWS), MAX_BYTES)
    damaged: list[tuple[Row, str]] = []
    size = 0
    for row in read:
        job, error = read_job(row, db.reader.job)
        if job is not None:
            payload, error = db.payload(job.seq)
            size += 0 if payload is None else len(payload.body)
        result.checked += 1
        if error:
            damaged.append((row, error))
        if error or row[0] <= after:
            continue
        result.last = row[0]
        if size > MAX_BYTES or time.perf_counter() > until_s:
            break
    else:
        _end(result, read, after, is_last=not is_cut and len(read) < MAX_ROWS)
    result.damaged += [DamagedRow(f"job {id_}", error) for id_, error in quarantine_jobs(db, damaged).items()]


def _end(result: Slice, read: list[Row], after: int, *, is_last: bool) -> None:
    """Set `last` after all of `read` was checked. If no rowid is known to be right, take that of the last row."""
    if is_last:
        result.last = None
    elif result.last == after:
        result.last = max(read[-1][0], after + 1)


def _rows(db: Database, result: Slice, after: int, until_s: float) -> None:
    sql = f"SELECT rowid, {SQL[result.table]} FROM {result.table} NOT INDEXED WHERE rowid > ? ORDER BY rowid LIMIT ?"
    read, is_cut = db.rows_up_to(sql, (after, MAX_ROWS), MAX_BYTES)
    damaged: list[tuple[int, Row, str]] = []
    for rowid, *values in read:
        error = key_fault(tuple(values)) if result.table == "keys" else fault(tuple(values))
        result.checked += 1
        if error is not None:
            damaged.append((rowid, tuple(values), error))
        if error is not None or rowid <= after:
            continue
        result.last = rowid
        if time.perf_counter() > until_s:
            break
    else:
        _end(result, read, after, is_last=not is_cut and len(read) < MAX_ROWS)
    if result.table in _QUARANTINED:
        quarantine_rows(db, result.table, damaged)
    result.damaged += [DamagedRow(row_name(db, result.table, row), error) for _, row, error in damaged]
