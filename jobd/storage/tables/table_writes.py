"""Plan and apply writes of the tables that are not changes of jobs. Each is in a record of the journal first.

A plan reads the tables and returns the write. The projection applies it, on other nodes and after a restart too.
"""

from __future__ import annotations

from typing import Final, assert_never

import msgspec

from jobd.model import storage
from jobd.model.events import Event, QuietRule, fold_quiet
from jobd.model.job import MAX_LATE_RESULTS
from jobd.model.schedules import Schedule, fold_schedule, schedule_id
from jobd.storage import codec, outbox
from jobd.storage.codec import SQL, Row, fault, insert, with_checksum
from jobd.storage.damage.quarantine import quarantine_events, quarantine_rows, undamaged_rows
from jobd.storage.database import PUT_TOMBSTONE, Database
from jobd.storage.events import event_queries, event_rows
from jobd.storage.tables.writers import AUDIT_ROW

KEEP_REPORTS: Final = 500
_PUT_QUIET: Final = insert("quiet_rules", "REPLACE")
_PUT_SCHEDULE: Final = insert("schedules", "REPLACE")
_PUT_KEY: Final = insert("keys", "REPLACE")
_PUT_FIGURES: Final = insert("figures", "REPLACE")
_EXISTS: Final = "SELECT 1 FROM jobs WHERE seq = job_seq UNION ALL SELECT 1 FROM quarantined_jobs WHERE seq = job_seq"
_DELETED_JOBS: Final = f"SELECT job_seq, id, at, EXISTS ({_EXISTS}) FROM deleted_jobs WHERE at < ? ORDER BY at LIMIT ?"
_JOB_ROWS: Final = "SELECT seq FROM events INDEXED BY events_job WHERE job_seq = ? ORDER BY seq LIMIT ?"
# By number: a search by job fails if a number in the index has no row.
_DELETE_JOB: Final = "DELETE FROM events WHERE seq IN (SELECT seq FROM events INDEXED BY events_job WHERE job_seq = ?)"
_ROW: Final = f"SELECT {SQL['events']} FROM events WHERE seq = ?"
_ROWS_BEFORE: Final = f"SELECT {SQL['events']} FROM events WHERE seq > ? AND seq < ? AND last >= ?"
_INSERT_LATE: Final = insert("late_results")
_LATE_OF_JOB: Final = "SELECT seq FROM late_results INDEXED BY late_results_job WHERE job_seq = ?"
_EXCESS_LATE: Final = f"{_LATE_OF_JOB} ORDER BY fencing_token DESC LIMIT -1 OFFSET {MAX_LATE_RESULTS}"
_LATE_ROW: Final = f"SELECT {SQL['late_results']} FROM late_results NOT INDEXED WHERE seq = ?"
_DELETE_LATE: Final = "DELETE FROM late_results WHERE seq = ?"
_json = msgspec.json.Encoder().encode
_schedule = msgspec.json.Decoder(Schedule).decode


def plan_pruning(db: Database, before: int, limit: int) -> tuple[storage.EventPruning | None, int]:
    """Choose up to `limit` event rows from before wall time `before` to delete: those of queues and of deleted jobs.

    Return the deletion and the number of rows. Readers that resume below the last of these events get an error, because
    events may be missing there.
    """
    seqs = _old_events_of_queues(db, before, limit)
    count, upto, jobs = len(seqs), max(seqs, default=0), []
    for job_seq, id_, at, exists in db.rows(_DELETED_JOBS, (before, limit)):
        room = limit - count
        if room <= 0:
            break
        if exists:  # damage to its number has changed it to the number of a job
            entry = (job_seq, (job_seq, id_, at), "a job with this number exists")
            quarantine_rows(db, "deleted_jobs", [entry])
            continue
        numbers = [seq for (seq,) in db.rows(_JOB_ROWS, (job_seq, room + 1))]
        is_whole = len(numbers) <= room
        needed = numbers[-1:] if is_whole else numbers[:room]
        rows = event_queries.undamaged(db, [row for seq in needed for row in db.rows(_ROW, (seq,))])
        count += len(numbers) if is_whole else len(rows)
        upto = max([upto, *needed, *(row[1] for row in rows)])
        if not is_whole:
            seqs += [event[0] for row in rows for event in event_rows.unpack(row)]
            break
        jobs.append(job_seq)
    return (storage.EventPruning(seqs, jobs, upto) if count or jobs else None), count


def _old_events_of_queues(db: Database, before: int, limit: int) -> list[int]:
    """Return up to `limit` rows from before wall time `before`, of fewer than twice as many that are read.

    Rows from a time when the clock was ahead may precede old rows, so each call reads on where the last one stopped.
    """
    first = event_queries.first_rows(db, 0, limit)
    seqs = _old(db, first, before)
    if first and len(seqs) < limit:
        last = first[-1][0]
        later = event_queries.first_rows(db, 0, limit - len(seqs), max(last, db.pruning_cursor or last))
        db.pruning_cursor = later[-1][0] if later else 0
        seqs += _old(db, later, before)
    return seqs


def _old(db: Database, rows: list[Row], before: int) -> list[int]:
    return [row[0] for row in event_queries.undamaged(db, rows) if row[event_rows.AT] < before]


def plan_trimming(db: Database, before: int, limit: int) -> tuple[storage.AuditTrimming | None, int]:
    """See Storage.trim_audit. Damaged rows are quarantined, because their age is unknown."""
    with db.noting_corruption("the audit log cannot be read"):
        is_counted = db.audit.count_more()
        entries = db.audit.excess(before, limit) if is_counted else []
        rows = [row for seq in entries for row in db.rows(AUDIT_ROW, (seq,))]
        damaged = [(row[0], row, error) for row in rows if (error := fault(row)) is not None]
        quarantine_rows(db, "audit", damaged)
        jobs = db.audit.gone_jobs(limit - len(entries))
        count = len(entries) + len(jobs)
        return storage.AuditTrimming(entries, jobs) if count else None, count if is_counted else limit
    return None, 0


def _delete_events(db: Database, numbers: list[int]) -> None:
    """Delete events. A row that also has other events is written again with these."""
    gone, left = frozenset(numbers), set(numbers)
    for number in numbers:
        if number not in left:
            continue
        for row in db.rows(_ROW, (number,)) or db.rows(_ROWS_BEFORE, (number - event_rows.SPAN, number, number)):
            if (error := event_rows.fault(row)) is not None:
                quarantine_events(db, row, error)
            elif number in (events := {event[0]: event for event in event_rows.unpack(row)}):
                left -= events.keys()
                event_rows.rewrite(db.conn, [row], [events[seq] for seq in events if seq not in gone])


def read_quiet(db: Database) -> dict[str, QuietRule]:
    """Return the quiet rules by id, oldest first. Damaged rows are quarantined."""
    rows = db.rows(f"SELECT rowid, {SQL['quiet_rules']} FROM quiet_rules ORDER BY at, id")
    undamaged = undamaged_rows(db, "quiet_rules", rows, ": its workers get jobs again")
    return {row[0]: QuietRule(*row[:-1]) for row in undamaged}


def write_quiet(db: Database, event: Event) -> None:
    """Write the change of an event of a quiet rule."""
    for rule in fold_quiet({}, event).values():
        db.conn.execute(_PUT_QUIET, codec.struct_row(rule))
    if event.type == "workers_resumed":
        db.conn.execute("DELETE FROM quiet_rules WHERE id = ?", ((event.details or {})["rule"],))


def read_schedules(db: Database) -> dict[str, Schedule]:
    """Return the schedules by id. Damaged rows are quarantined."""
    rows = db.rows(f"SELECT rowid, {SQL['schedules']} FROM schedules ORDER BY id")
    undamaged = undamaged_rows(db, "schedules", rows, ": it does not fire any more, put it again")
    return {name: _schedule(body) for name, body, _ in undamaged}


def write_schedule(db: Database, event: Event) -> None:
    """Write the change of an event that names a schedule. The row of one that is damaged is left alone.

    Raises StoreDamaged instead if the store belongs to a cluster.
    """
    name = schedule_id(event)
    row = next(iter(db.rows(f"SELECT {SQL['schedules']} FROM schedules WHERE id = ?", (name,))), None)
    if row is not None and (error := fault(row)) is not None:
        db.raise_if_clustered(f"schedules {name}: {error}")
        row = None
    known = None if row is None else _schedule(row[1])
    after = fold_schedule(known, event)
    if after is not None:
        db.conn.execute(_PUT_SCHEDULE, with_checksum((name, _json(after))))
    elif event.type == "schedule_deleted":
        db.conn.execute("DELETE FROM schedules WHERE id = ?", (name,))


def write_late_results(db: Database, batch: storage.Batch) -> list[storage.Tombstone]:
    """Write the late results of a batch. Delete those above the maximum of their job, and those of deleted jobs.

    Return tombstones for the artifacts of the deleted ones if an artifact store `sweeps`.
    """
    touched = [event for event in batch.changes if event.late is not None or event.type == "deleted"]
    kept = [codec.late_row(event.job_seq, event.late) for event in touched if event.late is not None]
    db.conn.executemany(_INSERT_LATE, kept)
    left: list[storage.Tombstone] = []
    # The last event of each job decides: late results of a job that this slice deletes are deleted too.
    for event in {event.job_seq: event for event in touched}.values():
        going = db.rows(_EXCESS_LATE if event.type == "late_result" else _LATE_OF_JOB, (event.job_seq,))
        for row in [row for each in going for row in db.rows(_LATE_ROW, each)] if batch.sweeps else ():
            if (key := _late_key(db, row, event.at)) is not None:
                left.append(storage.Tombstone(-row[0], event.job_id, key, event.at, event.at))
        db.conn.executemany(_DELETE_LATE, going)
    return left


def _late_key(db: Database, row: Row, now: int) -> str | None:
    """Return the storage key of a late result, or None. Quarantine a damaged row.

    Raises StoreDamaged instead if the store belongs to a cluster, whose nodes delete the same artifacts.
    """
    if (error := fault(row)) is None:
        return codec.late(row, whole=True).result.storage_key
    db.raise_if_clustered(f"late_results {row[0]}: {error}")
    shown = codec.as_text("late_results", row)
    db.conn.execute(insert("bad_rows"), ("late_results", f"{row[0]}: {error}", now, shown))
    db.note_fault(f"late_results {row[0]}: {error}; the row was quarantined, and its artifact is not deleted")
    return None


def apply(db: Database, write: storage.TableWrite) -> None:
    """Apply `write` in a transaction."""
    executemany = db.conn.executemany
    match write:
        case storage.OutboxWrite():
            outbox.apply(db, write)
        case storage.TombstoneWrite(deleted, postponed):
            executemany("DELETE FROM tombstones WHERE job_seq = ?", [(seq,) for seq in deleted])
            executemany(PUT_TOMBSTONE, map(codec.struct_row, postponed))
        case storage.EventPruning(events, jobs, upto):
            _delete_events(db, events)
            for sql in (_DELETE_JOB, "DELETE FROM deleted_jobs WHERE job_seq = ?"):
                executemany(sql, [(seq,) for seq in jobs])
            db.note_missing(upto)
        case storage.AuditTrimming(entries, jobs):
            executemany("DELETE FROM audit WHERE seq = ?", [(seq,) for seq in entries])
            executemany("DELETE FROM audit_jobs WHERE seq = ?", [(seq,) for seq in jobs])
        case storage.FiguresWrite(body):
            db.conn.execute(_PUT_FIGURES, with_checksum((1, body)))
        case _:
            assert_never(write)


def write_keys(db: Database, batches: list[storage.Batch]) -> None:
    """Store the responses of batches, and forget those that are no longer kept."""
    keys: dict[str, storage.StoredResponse | None] = {}
    for batch in batches:
        keys.update(dict.fromkeys(batch.forget_keys))
        keys.update((key.digest, key) for key in batch.keys)
    if keys:
        executemany = db.conn.executemany
        executemany("DELETE FROM keys WHERE digest = ?", [(digest,) for digest, key in keys.items() if key is None])
        executemany(_PUT_KEY, [codec.key_row(key) for key in keys.values() if key is not None])


def write_rest(db: Database, batches: list[storage.Batch]) -> None:
    """Write the audit entries, reports and other rows of batches that belong to no job."""
    conn = db.conn
    if checked := [(seq,) for batch in batches for seq in batch.checked]:
        conn.executemany("DELETE FROM suspects WHERE job_seq = ?", checked)
    for batch in [batch for batch in batches if batch.audit or batch.writes]:
        if batch.audit:
            db.audit.write(batch.audit)
        for write in batch.writes:
            apply(db, write)
    for report in (batch.report for batch in batches if batch.report is not None):
        (last,) = conn.execute("SELECT ifnull(max(seq), 0) FROM reports").fetchone()
        conn.execute(insert("reports"), with_checksum((last + 1, bytes(report))))
        conn.execute("DELETE FROM reports WHERE seq <= ?", (last + 1 - KEEP_REPORTS,))
