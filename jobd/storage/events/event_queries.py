"""Read events: timelines of jobs, and pages of the events of all jobs.

Damaged rows are quarantined when a query finds them. All calls block; the storage thread makes them. Columns other than
the number of a row may be damaged until its checksum is verified, so none alone decides that a row is not read.
"""

from __future__ import annotations

import contextlib
import sqlite3
from itertools import chain
from operator import itemgetter
from typing import Final

from jobd.journal import event_codec
from jobd.journal.event_codec import EVENT_COLUMNS, EventRow
from jobd.model.events import Event
from jobd.model.storage import DiskFull, EventPage
from jobd.storage.codec import SQL, Row
from jobd.storage.damage.quarantine import quarantine_rows
from jobd.storage.database import Database, StructureDamaged, is_corrupt
from jobd.storage.events import event_rows
from jobd.storage.events.event_rows import fault

SLICE_BYTES: Final = 256 << 10  # of rows read between two batches, which takes less than 2 ms
_EVENTS: Final = f"SELECT {SQL['events']} FROM events NOT INDEXED WHERE seq = ?"
_LATER: Final = f"SELECT {SQL['events']} FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
_SPANNING: Final = f"SELECT {SQL['events']} FROM events WHERE seq > ? AND seq <= ? AND last > ?"
# Without the body of a row that has one event.
_SHORT: Final = (
    f"SELECT seq, last, job_seq, at, CASE WHEN length(body) <= {event_rows.ROW_BYTES} THEN body END, crc FROM events "
    "WHERE seq > ? ORDER BY seq"
)
_SEQ: Final = EVENT_COLUMNS.index("seq")
_seq = itemgetter(_SEQ)
_first = itemgetter(0)
_ALL: Final = -1  # SQLite: no limit
_BEFORE_ALL: Final = -(1 << 63)  # damaged numbers may be negative


def timeline(db: Database, job_seq: int, limit: int | None = None) -> list[Event]:
    """Return the events of a job or its latest `limit` events, oldest first, with the last heartbeat of each grant."""
    db.check()
    try:
        rows = latest_rows(db, job_seq, _ALL if limit is None else limit)
        if any(row[event_rows.JOB_SEQ] != job_seq and fault(row) is None for row in rows):  # the index is damaged
            with contextlib.suppress(DiskFull, StructureDamaged):
                db.rebuild_indexes()
            rows = latest_rows(db, job_seq, _ALL if limit is None else limit)
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        rows = _timeline_of_a_damaged_table(db, job_seq)
    events = events_of(db, [row for row in rows if row[event_rows.JOB_SEQ] == job_seq or fault(row) is not None])
    return event_codec.thin([event_codec.decode(event) for event in events[-limit if limit else 0 :]])


def latest_rows(db: Database, job_seq: int, limit: int) -> list[Row]:
    """Return the latest `limit` rows of events of a job, oldest first."""
    return _rows_of_job(db, job_seq, _BEFORE_ALL, "DESC", limit)


def first_rows(db: Database, job_seq: int, limit: int, after: int = _BEFORE_ALL) -> list[Row]:
    """Return the first `limit` rows of events of a job with a seq above `after`, oldest first."""
    return _rows_of_job(db, job_seq, after, "ASC", limit)


def _rows_of_job(db: Database, job_seq: int, after: int, order: str, limit: int) -> list[Row]:
    """Return rows by their number, because a column from the index would hide damage. Report rows that are missing."""
    chosen = f"WHERE job_seq = ? AND seq > ? ORDER BY seq {order} LIMIT ?"
    inner = f"SELECT seq AS found FROM events INDEXED BY events_job {chosen}"
    sql = f"SELECT {SQL['events']} FROM ({inner}) LEFT JOIN events NOT INDEXED ON seq = found"
    rows = db.rows(sql, (job_seq, after, limit))
    found = sorted((row for row in rows if row[0] is not None), key=_first)
    if len(found) < len(rows):
        lost = f"events of {db.job_name(job_seq)}: {len(rows) - len(found)} rows cannot be found"
        db.raise_if_clustered(lost)
        db.note_fault(f"{lost}; run `jobd doctor`")
    return found


def _timeline_of_a_damaged_table(db: Database, job_seq: int) -> list[Row]:
    """Return the readable events and report the others. If the index is damaged, read the whole table."""
    with db.noting_corruption("the index of the event log cannot be read"):
        seqs = db.rows("SELECT seq FROM events INDEXED BY events_job WHERE job_seq = ? ORDER BY seq", (job_seq,))
        return db.rows_one_by_one(_EVENTS, [seq for (seq,) in seqs], "events")
    sql = f"SELECT {SQL['events']} FROM events NOT INDEXED WHERE job_seq = ? ORDER BY seq"
    return db.rows(sql, (job_seq,))


def events_after(db: Database, after: int, limit: int) -> EventPage:
    """Return up to `limit` events of the store with a seq above `after`, oldest first; fewer if they are large.

    All damaged events count as missing, even if they cannot be quarantined, so that no reader silently skips them.
    """
    db.check()
    last = db.numbers.next_event - 1
    with db.noting_corruption(f"the event log cannot be read after event {after}"):
        spanning = db.rows(_SPANNING, (after - event_rows.SPAN, after, after))
        rows, is_cut = db.rows_up_to(_LATER, (after, limit), SLICE_BYTES)
        is_cut = is_cut or len(rows) == limit
        upto = rows[-1][0] if is_cut else last  # rows that were not read have later events only
        events = _between(events_of(db, spanning + rows), after, upto)
        if len(events) < upto - after:  # damage to `last` may hide the row of a missing number
            known = {*spanning, *rows}
            hidden = undamaged(db, [row for row in _rows_before(db, after) if row not in known])
            events += _between(events_of(db, [row for row in hidden if row[1] > after]), after, upto)
        events.sort(key=_seq)
        page = [event_codec.decode(event) for event in events[:limit]]
        return EventPage(page, last, db.gone_to, is_cut or len(events) > limit)
    return EventPage([], last, last)


def _between(events: list[EventRow], after: int, upto: int) -> list[EventRow]:
    return [event for event in events if after < event[_SEQ] <= upto]


def _rows_before(db: Database, number: int) -> list[Row]:
    """Return all rows that begin up to event `number` and may have later events, whatever their `last` is."""
    rows: list[Row] = []
    with contextlib.closing(db.conn.execute(_SHORT, (number - event_rows.SPAN,))) as cursor:
        for row in cursor:
            is_short = row[event_rows.BODY] is not None
            if row[0] > number and not (is_short and fault(row)):
                break
            if is_short:
                rows.append(row)
    return rows


def events_of(db: Database, rows: list[Row]) -> list[EventRow]:
    """Return the events of undamaged rows."""
    return list(chain.from_iterable(map(event_rows.unpack, undamaged(db, rows))))


def undamaged(db: Database, rows: list[Row]) -> list[Row]:
    """Return the undamaged rows of events. Quarantine the others, and note that their events are missing."""
    errors = [fault(row) for row in rows]
    damaged = [(row[0], row, error) for row, error in zip(rows, errors, strict=True) if error is not None]
    if not damaged:
        return rows
    quarantine_rows(db, "events", damaged)
    for _, row, _ in damaged:
        db.note_missing(event_rows.highest_number(row))
    return [row for row, error in zip(rows, errors, strict=True) if error is None]
