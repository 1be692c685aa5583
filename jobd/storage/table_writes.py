"""Plan and apply writes of the tables that are not changes of jobs. Each is in a record of the journal first.

A plan reads the tables and returns the write. The projection applies it, on other nodes and after a restart too.
"""

from __future__ import annotations

import sqlite3
from itertools import chain
from typing import Final, assert_never

from jobd.journal.facts import EventRow
from jobd.model.storage import (
    AuditTrimming,
    EventPruning,
    FiguresWrite,
    OutboxWrite,
    TableWrite,
    TombstoneWrite,
)
from jobd.storage import codec, event_rows, outbox
from jobd.storage.codec import Row, with_checksum
from jobd.storage.database import PUT_TOMBSTONE, Database, is_corrupt
from jobd.storage.writers import insert

_PUT_FIGURES: Final = insert("figures", ("id", "body", "crc"), "REPLACE")
_QUEUE_EVENTS: Final = "SELECT seq FROM events WHERE job_seq = 0 AND at < ? ORDER BY seq LIMIT ?"
_DELETED_JOBS: Final = "SELECT job_seq FROM deleted_jobs WHERE at < ? ORDER BY at LIMIT ?"
_ROW: Final = f"SELECT {event_rows.COLUMNS_SQL} FROM events WHERE seq = ?"
_ROWS_BEFORE: Final = f"SELECT {event_rows.COLUMNS_SQL} FROM events WHERE seq > ? AND seq < ? AND last >= ?"
_DELETE_SINGLE: Final = "DELETE FROM events WHERE seq = ? AND last = seq"
_JOB_ROWS: Final = "SELECT seq, last FROM events WHERE job_seq = ? ORDER BY seq LIMIT ?"


def plan_pruning(db: Database, before: int, limit: int) -> tuple[EventPruning | None, int]:
    """Choose up to `limit` rows of events to delete: of queues, and of deleted jobs, from before wall time `before`.

    Return the deletion and the number of rows. Readers that resume below the last of these events get an error, because
    events may be missing there.
    """
    run = db.conn.execute
    seqs = [seq for (seq,) in run(_QUEUE_EVENTS, (before, limit))]
    count, upto, jobs = len(seqs), max(seqs, default=0), []
    for (job_seq,) in run(_DELETED_JOBS, (before, limit)).fetchall():
        room = limit - count
        if room <= 0:
            break
        rows = run(_JOB_ROWS, (job_seq, room + 1)).fetchall()
        count += len(rows[:room])
        upto = max(upto, *(last for _, last in rows[:room]))
        if len(rows) > room:
            seqs += chain.from_iterable(map(_events_of, chain(*(db.rows(_ROW, (seq,)) for seq, _ in rows[:room]))))
            break
        jobs.append(job_seq)
    return (EventPruning(seqs, jobs, upto) if count or jobs else None), count


def _events_of(row: Row) -> dict[int, EventRow]:
    """Return the events of a row by number. Of a damaged row, only the number of the first one is known."""
    return {row[0]: row} if event_rows.fault(row) else {event[0]: event for event in event_rows.unpack(row)}


def plan_trimming(db: Database, before: int, limit: int) -> tuple[AuditTrimming | None, int]:
    """See Storage.trim_audit."""
    try:
        is_counted = db.audit.count_more()
        entries = db.audit.excess(before, limit) if is_counted else []
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        db.faults.append(f"the audit log cannot be read: {error}; run `jobd doctor`")
        return None, 0
    return AuditTrimming(entries) if entries else None, len(entries) if is_counted else limit


def _delete_events(db: Database, numbers: list[int]) -> None:
    """Delete events. A row that also has other events is written again with these."""
    gone, left = frozenset(numbers), set(numbers)
    for number in numbers:
        if number not in left or db.conn.execute(_DELETE_SINGLE, (number,)).rowcount:
            continue
        for row in db.rows(_ROW, (number,)) or db.rows(_ROWS_BEFORE, (number - event_rows.SPAN, number, number)):
            if number in (events := _events_of(row)):
                left -= events.keys()
                event_rows.rewrite(db.conn, [row], [events[seq] for seq in events if seq not in gone])


def apply(db: Database, write: TableWrite) -> None:
    """Apply `write` in a transaction."""
    executemany = db.conn.executemany
    match write:
        case OutboxWrite():
            outbox.apply(db, write)
        case TombstoneWrite(deleted, postponed):
            executemany("DELETE FROM tombstones WHERE job_seq = ?", [(seq,) for seq in deleted])
            executemany(PUT_TOMBSTONE, map(codec.tombstone_row, postponed))
        case EventPruning(events, jobs, upto):
            _delete_events(db, events)
            for table in ("events", "deleted_jobs"):
                executemany(f"DELETE FROM {table} WHERE job_seq = ?", [(seq,) for seq in jobs])
            db.note_missing(upto)
        case AuditTrimming(entries):
            executemany("DELETE FROM audit WHERE seq = ?", [(seq,) for seq in entries])
        case FiguresWrite(body):
            db.conn.execute(_PUT_FIGURES, with_checksum((1, body)))
        case _:
            assert_never(write)
