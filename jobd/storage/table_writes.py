"""Write the tables apart from the changes of jobs. A record of the journal has each write first.

A plan reads the tables and returns the write. The projection applies it, also on other nodes and after a restart.
"""

from __future__ import annotations

import sqlite3
from typing import Final, assert_never

from jobd.model.storage import (
    AuditTrimming,
    EventPruning,
    FiguresWrite,
    OutboxWrite,
    TableWrite,
    TombstoneWrite,
)
from jobd.storage import codec, outbox
from jobd.storage.codec import sealed
from jobd.storage.database import PUT_TOMBSTONE, Database, is_corrupt
from jobd.storage.writers import insert

_PUT_FIGURES: Final = insert("figures", ("id", "body", "crc"), "REPLACE")
_QUEUE_EVENTS: Final = "SELECT seq FROM events WHERE job_seq = 0 AND at < ? ORDER BY seq LIMIT ?"
_DELETED_JOBS: Final = "SELECT job_seq FROM deleted_jobs WHERE at < ? ORDER BY at LIMIT ?"
_JOB_EVENTS: Final = "SELECT seq FROM events WHERE job_seq = ? ORDER BY seq LIMIT ?"


def plan_pruning(db: Database, before: int, limit: int) -> tuple[EventPruning | None, int]:
    """Choose up to `limit` events of jobs deleted, and of queues changed, before wall time `before`.

    Return their deletion and number. Readers that resume below the last of them get an error, because events may be
    missing there.
    """
    run = db.conn.execute
    seqs = [seq for (seq,) in run(_QUEUE_EVENTS, (before, limit))]
    named, jobs = len(seqs), []
    for (job_seq,) in run(_DELETED_JOBS, (before, limit)).fetchall():
        room = limit - len(seqs)
        if room <= 0:
            break
        found = [seq for (seq,) in run(_JOB_EVENTS, (job_seq, room + 1))]
        seqs += found[:room]
        if len(found) <= room:
            jobs.append(job_seq)
        else:
            return EventPruning(seqs[:named] + found[:room], jobs, max(seqs)), len(seqs)
    if not seqs and not jobs:
        return None, 0
    return EventPruning(seqs[:named], jobs, max(seqs, default=0)), len(seqs)


def plan_trimming(db: Database, before: int, limit: int) -> tuple[AuditTrimming | None, int]:
    """See Storage.trim_audit."""
    try:
        is_counted = db.audit.look_on()
        entries = db.audit.excess(before, limit) if is_counted else []
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        db.faults.append(f"the audit log cannot be read: {error}; run `jobd doctor`")
        return None, 0
    return AuditTrimming(entries) if entries else None, len(entries) if is_counted else limit


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
            executemany("DELETE FROM events WHERE seq = ?", [(seq,) for seq in events])
            for table in ("events", "deleted_jobs"):
                executemany(f"DELETE FROM {table} WHERE job_seq = ?", [(seq,) for seq in jobs])
            db.note_missing(upto)
        case AuditTrimming(entries):
            executemany("DELETE FROM audit WHERE seq = ?", [(seq,) for seq in entries])
        case FiguresWrite(body):
            db.conn.execute(_PUT_FIGURES, sealed((1, body)))
        case _:
            assert_never(write)
