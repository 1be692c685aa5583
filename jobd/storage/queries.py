"""Read committed data: jobs by id, pages of jobs, late results, reports and the audit log.

Damaged rows are quarantined when a query finds them. All calls block; the storage thread makes them.
"""

from __future__ import annotations

import contextlib
import sqlite3
import zlib
from collections.abc import Callable, Iterable
from itertools import chain
from string import ascii_lowercase, ascii_uppercase
from typing import Any, Final, TypeVar

from msgspec import Struct

from jobd.journal import event_codec
from jobd.journal.event_codec import EVENT_COLUMNS
from jobd.model import storage
from jobd.model.job import LIVE, Grant, Job, LateResult, granted_bytes, seq_of_body
from jobd.storage import codec, database
from jobd.storage.codec import KEY_COLUMNS, SQL, Row, fault
from jobd.storage.damage.quarantine import quarantine_jobs, quarantine_rows, undamaged_rows
from jobd.storage.events import event_queries

T = TypeVar("T")

_NO_LIMIT: Final = 1 << 62
_TYPE: Final = EVENT_COLUMNS.index("type")
_RESPONSE_CRC: Final = KEY_COLUMNS.index("response_crc")
_INDEXED: Final = "SELECT seq FROM jobs INDEXED BY jobs_id WHERE id = ?"
_CREATED: Final = "SELECT created_at FROM jobs NOT INDEXED WHERE seq = ?"
_LATE: Final = f"SELECT rowid, {SQL['late_results']} FROM late_results NOT INDEXED WHERE seq = ?"
GRANT_SEARCH_EVENTS: Final = 1_000  # latest events of a job that are searched for an ended grant
MAX_DAMAGED_SLICES: Final = 10  # slices of damaged tombstones after which the search ends
_REFERENCED_LATE: Final = "SELECT 1 FROM late_results INDEXED BY late_results_storage_key WHERE storage_key = ? LIMIT 1"
_DUE: Final = f"SELECT {SQL['tombstones']} FROM tombstones {{}} WHERE due_at {{}} ? ORDER BY due_at LIMIT ?"
TEXT_BYTES: Final = 2 << 20  # of payloads searched per query
_SIZE: Final = "ifnull((SELECT length(body) FROM payloads WHERE job_seq = jobs.seq), 0)"
_HAS_TEXT: Final = (
    "(instr(lower(id), ?) OR instr(lower(error_message), ?) OR EXISTS (SELECT 1 FROM payloads "
    "WHERE job_seq = jobs.seq AND instr(lower(CAST(body AS TEXT)), ?)))"
)
_ENDED: Final = "ifnull(finished_at, 0)"  # as in the index
_BY_END: Final = f"INDEXED BY jobs_finished WHERE {database.NOT_LIVE_SQL} AND status = ?"
_ONE_BY_ONE: Final = 10**18 - 1  # `before_end` of a list of a damaged table
_TABLE: Final = "NOT INDEXED WHERE true"
# The index for the jobs of a status. Completed jobs have none.
_SCOPES: Final = {
    **dict.fromkeys(LIVE, f"INDEXED BY jobs_live WHERE {database.LIVE_SQL} AND status = ?"),
    **dict.fromkeys(("failed", "cancelled"), f"INDEXED BY jobs_failed WHERE {database.FAILED_SQL} AND status = ?"),
}
_AUDIT_JOBS: Final = (
    "FROM (SELECT seq AS found FROM audit_jobs INDEXED BY audit_jobs_job WHERE job_id = ?) "
    "CROSS JOIN audit_jobs NOT INDEXED ON seq = found"
)
_AUDIT_OF_JOB: Final = (
    f"(SELECT seq FROM audit INDEXED BY audit_job WHERE job_id = ? UNION SELECT audit_seq {_AUDIT_JOBS}) WHERE true"
)
_TO_LOWER: Final = str.maketrans(ascii_uppercase, ascii_lowercase)  # as SQLite's lower() does
_NO_PAYLOAD: Final = storage.Payload(b"null", "")
# Includes quarantined jobs, because an operator may accept them.
_REFERENCED: Final = (
    "SELECT 1 FROM jobs INDEXED BY jobs_storage_key WHERE storage_key = ?1 "
    "UNION ALL SELECT 1 FROM quarantined_jobs WHERE json_valid(row) AND json_extract(row, '$.storage_key') = ?1 LIMIT 1"
)


def read_job(row: Row, decode: Callable[[Row], T]) -> tuple[T | None, str]:
    """Return the job of a row as decoded by a JobReader, or None and the error."""
    wrong = fault(row)
    if wrong is None:
        try:
            return decode(row), ""
        except codec.Unreadable as error:
            wrong = str(error)
    return None, wrong


def load(db: database.Database, ids: list[str], payloads: list[int], digests: list[str]) -> storage.LoadedRows:
    """See Storage.load."""
    db.check()
    loaded = storage.LoadedRows()
    damaged: list[tuple[Row, str]] = []
    for id_ in ids:
        row, error = _row_by_id(db, id_)
        job = None
        if row is not None:
            job, error = read_job(row, db.reader.job)
        if job is not None:
            loaded.jobs[id_] = job
        elif error:
            loaded.bad[id_] = error
            if row is not None:
                damaged.append((row, error))
    for seq in payloads:
        payload, error = db.payload(seq)
        if payload is not None:
            loaded.payloads[seq] = payload
        elif row_of := db.rows(database.BY_SEQ, (seq_of_body(seq),)):
            damaged.append((row_of[0], error))
        elif (id_of := db.job_id_of(seq_of_body(seq))) is not None:
            loaded.bad[id_of] = db.quarantined.get(id_of, error)  # quarantined after the caller saw it
    if damaged:
        loaded.bad.update(quarantine_jobs(db, damaged))
        loaded.jobs = {id_: job for id_, job in loaded.jobs.items() if id_ not in loaded.bad}
    for digest in digests:
        if (key := _stored_response(db, digest)) is not None:
            loaded.responses[digest] = key
    return loaded


def _row_by_id(db: database.Database, id_: str) -> tuple[Row | None, str]:
    """Return the row of a job, or None and the error ("" if there is no such job)."""
    try:
        rows = db.rows(database.BY_ID, (id_,))
        if rows and _belongs_to_another(rows[0], id_):
            with contextlib.suppress(storage.DiskFull, database.StructureDamaged):
                db.rebuild_indexes()
            rows = db.rows(database.BY_ID, (id_,))
    except sqlite3.DatabaseError as error:
        if not database.is_corrupt(error):
            raise
        return None, _report_lost(db, id_, f"the row cannot be read: {error}")
    if not rows and id_ not in db.quarantined and db.rows(_INDEXED, (id_,)):
        return None, _report_lost(db, id_, "the row cannot be found by its number")
    if not rows:
        return None, db.quarantined.get(id_, "")
    if _belongs_to_another(rows[0], id_):
        return None, _report_lost(db, id_, "the row cannot be found: the table is damaged")
    return rows[0], ""


def _belongs_to_another(row: Row, id_: str) -> bool:
    """Return whether the index of ids led to the undamaged row of another job."""
    return bool(row[1] != id_) and fault(row) is None


def _report_lost(db: database.Database, id_: str, reason: str) -> str:
    """Report a job whose row cannot be read and so cannot be quarantined."""
    db.raise_if_clustered(f"job {id_}: {reason}")
    if db.quarantined.get(id_) != reason:
        db.quarantined[id_] = reason
        db.report_quarantined(storage.Quarantined(id_, reason, is_moved=False))
        db.faults.append(f"job {id_}: {reason}; run `jobd doctor`")
    return reason


def _stored_response(db: database.Database, digest: str) -> storage.StoredResponse | None:
    """Return a stored response; None if there is none or it is damaged, so that the request is decided again."""
    rows = db.rows(f"SELECT rowid, {SQL['keys']} FROM keys WHERE digest = ?", (digest,))
    if not rows:
        return None
    rowid, *row = rows[0]
    if (error := key_fault(tuple(row))) is None:
        return codec.key(tuple(row[:-1]), row[-1])
    quarantine_rows(db, "keys", [(rowid, tuple(row), error)])
    return None


def key_fault(row: Row) -> str | None:
    """Return the error of a row of keys (its columns and the stored response), or None."""
    *columns, body = row
    if (error := fault(tuple(columns))) is not None:
        return error
    if columns[_RESPONSE_CRC] != (None if body is None else zlib.crc32(body)):
        return "the checksum of the stored response is wrong"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def find_jobs(db: database.Database, query: storage.JobQuery) -> storage.JobRows:
    """See Storage.find_jobs."""
    db.check()
    try:
        page = _page_one_by_one(db, query) if query.before_end == _ONE_BY_ONE else _page(db, query)
    except sqlite3.DatabaseError as error:
        if not database.is_corrupt(error):
            raise
        page = _page_one_by_one(db, query)
    page.last_event = db.numbers.next_event - 1
    return page


class _Order(Struct, frozen=True):
    """The order of a page in SQL. The values of `columns` in a row are its position, as `beyond` and `upto` take it."""

    columns: str
    order_by: str
    beyond: str
    upto: str
    begin: tuple[int, ...]
    end: tuple[int, ...]


def _order(query: storage.JobQuery) -> _Order:
    before = _NO_LIMIT if query.before is None else query.before
    if query.by_end:
        end = _NO_LIMIT if query.before_end is None else query.before_end
        return _Order(
            f"{_ENDED}, {_ENDED}, seq",  # twice, because SQLite uses no index for a row value with an expression
            f"{_ENDED} DESC, seq DESC",
            f"{_ENDED} <= ? AND ({_ENDED}, seq) < (?, ?)",
            f"{_ENDED} >= ? AND ({_ENDED}, seq) >= (?, ?)",
            (end, end, before),
            (-_NO_LIMIT, -_NO_LIMIT, 0),
        )
    if query.after is None:
        return _Order("seq", "seq DESC", "seq < ?", "seq >= ?", (before,), (0,))
    return _Order("seq", "seq ASC", "seq > ?", "seq <= ?", (query.after,), (_NO_LIMIT,))


def _page(db: database.Database, query: storage.JobQuery) -> storage.JobRows:
    scope, scope_args, filters, args = _conditions(query)
    order = _order(query)
    begin = (*scope_args, *order.begin)
    ordered_sql = f"FROM jobs {scope} AND {order.beyond} ORDER BY {order.order_by} LIMIT"
    edge = db.conn.execute(f"SELECT {order.columns} {ordered_sql} 1 OFFSET ?", (*begin, query.scan - 1)).fetchone()
    if query.text is not None:
        sized = db.conn.execute(f"SELECT {order.columns}, {_SIZE} {ordered_sql} ?", (*begin, query.scan))
        edge = _text_edge(sized) or edge
    end = order.end if edge is None else edge
    rows_sql = f"FROM jobs {scope} AND {order.beyond} AND {order.upto}"
    if scope == _TABLE:
        sql = f"SELECT {SQL['jobs']} {rows_sql}{filters} ORDER BY {order.order_by} LIMIT ?"  # twice as fast as the join
    else:
        joined_order = order.order_by.replace(_ENDED, "ended").replace("seq", "found")
        sql = (
            f"SELECT {SQL['jobs']}{', ended' if query.by_end else ''} FROM (SELECT seq AS found, {_ENDED} AS ended "
            f"{rows_sql} ORDER BY {order.order_by}) CROSS JOIN jobs NOT INDEXED ON seq = found WHERE true{filters} "
            f"ORDER BY {joined_order} LIMIT ?"
        )
    matched, is_cut = db.rows_up_to(sql, (*begin, *end, *args, query.limit + 1), query.payload_bytes)
    ends: dict[int, int] = {}
    if query.by_end:
        ends, matched = {row[0]: row[-1] for row in matched}, [row[:-1] for row in matched]
    page = storage.JobRows([], None, scanned=query.scan)
    last = _fill_page(db, page, matched, query)
    if is_cut and last is None:
        last = matched[-1][0]
    if last is not None:
        page.next_before, page.next_end = last, ends.get(last)
    elif edge is not None:
        more_sql = f"SELECT 1 FROM jobs {scope} AND {order.beyond}"
        if db.conn.execute(more_sql, (*scope_args, *end)).fetchone() is not None:
            _end_early(db, page, query, end)
    return page


def _end_early(db: database.Database, page: storage.JobRows, query: storage.JobQuery, end: Row) -> None:
    """End a page at the position up to which it was searched."""
    page.next_before = end[-1]
    if query.by_end:
        page.next_end = page.scanned_until = end[0]
    else:
        row = db.conn.execute(_CREATED, (end[-1],)).fetchone()
        page.scanned_until = None if row is None else row[0]


def _page_one_by_one(db: database.Database, query: storage.JobQuery) -> storage.JobRows:
    """Return a page of a damaged table. Reads row by row; unreadable rows are reported and skipped.

    If its order is `by_end`, it begins a list in the order of creation, which may repeat jobs of earlier pages.
    """
    is_next = not query.by_end or query.before_end == _ONE_BY_ONE
    _, _, filters, args = _conditions(query)
    sql = f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED WHERE seq = ?{filters}"
    top = db.numbers.next_job
    if query.after is None:
        top = query.before if query.before is not None and is_next else top
        end = max(0, top - query.scan)
        seqs, is_last = range(top - 1, max(end - 1, 0), -1), end <= 1
    else:
        end = query.after + query.scan
        seqs, is_last = range(query.after + 1, min(end + 1, top)), end + 1 >= top
    page = storage.JobRows([], None)
    last = _fill_page(db, page, db.rows_one_by_one(sql, seqs, "jobs", args), query)
    page.next_before = last if last is not None else None if is_last else end
    page.next_end = _ONE_BY_ONE if query.by_end else None
    return page


def _conditions(query: storage.JobQuery) -> tuple[str, tuple[Any, ...], str, tuple[Any, ...]]:
    """Return SQL and arguments for the rows to scan (those of an index if possible) and for the rows that match."""
    scope = _TABLE
    scope_args: tuple[Any, ...] = ()
    if query.by_end:
        scope, scope_args = _BY_END, (query.status,)
        for bound, at in ((">= ?", query.finished_since), ("< ?", query.finished_until)):
            if at is not None:
                scope, scope_args = f"{scope} AND {_ENDED} {bound}", (*scope_args, at)
    elif query.status in _SCOPES:
        scope, scope_args = _SCOPES[query.status], (query.status,)
    values = {
        "status = ?": query.status,
        "queue = ?": query.queue,
        "kind = ?": query.kind,
        "worker = ?": query.worker,
        "created_at >= ?": query.since,
        "created_at < ?": query.until,
        "finished_at >= ?": query.finished_since,
        "finished_at < ?": query.finished_until,
    }
    conditions: dict[str, tuple[Any, ...]] = {each: (value,) for each, value in values.items() if value is not None}
    if query.text is not None:
        conditions[_HAS_TEXT] = (query.text.translate(_TO_LOWER),) * 3
    if query.error is not None:
        texts = ", ".join(f"CAST({name} AS BLOB)" for name in ("error_message", "error_code", "id"))
        conditions[f"fingerprint({texts}) = ?"] = (query.error,)
    return scope, scope_args, "".join(f" AND {each}" for each in conditions), tuple(chain(*conditions.values()))


def _text_edge(sized: Iterable[Row]) -> Row | None:
    """Return the position at which the payloads exceed TEXT_BYTES; None if they do not."""
    total = 0
    for *position, size in sized:
        total += size
        if total > TEXT_BYTES:
            return tuple(position)
    return None


def _fill_page(db: database.Database, page: storage.JobRows, matched: list[Row], query: storage.JobQuery) -> int | None:
    """Add rows to a page. Return the seq of its last row if there are rows for another page, else None."""
    damaged: list[tuple[Row, str]] = []
    size, last = 0, None
    for row in matched:
        if len(page.jobs) + len(damaged) >= query.limit:
            break
        bodies: dict[int, bytes] = {}
        job, error = read_job(row, db.reader.job)
        payload: storage.Payload | None = _NO_PAYLOAD
        if job is not None and query.payloads:
            payload, error = db.payload(job.seq)
            if job.extra is not None and not error:
                bodies, error = db.extra_bodies(job)
        if job is None or payload is None or error:
            damaged.append((row, error))
        elif page.jobs and size + _size_of(job, payload) > query.payload_bytes:
            break
        else:
            page.jobs.append((job, payload.body))
            page.bodies |= bodies
            size += _size_of(job, payload)
        last = row[0]
    else:
        last = None
    if damaged:
        quarantine_jobs(db, damaged)
    return last


def _size_of(job: Job, payload: storage.Payload) -> int:
    metadata = None if job.result is None else job.result.metadata
    extra_bytes = granted_bytes(job) - job.payload_bytes
    return len(payload.body) + extra_bytes + (0 if metadata is None else len(bytes(metadata)))


# ---------------------------------------------------------------------------------------------------------------------
# Late results, expired jobs, reports


def read_late_results(db: database.Database, requested: list[storage.LateResultQuery]) -> storage.LateResultRows:
    """See Storage.read_late_results. Reads each job once."""
    db.check()
    whole: dict[int, bool] = {}
    locks: dict[int, set[str]] = {}
    for each in requested:
        whole[each.job_seq] = each.with_results or whole.get(each.job_seq, False)
        if each.lock_id is not None:
            locks.setdefault(each.job_seq, set()).add(each.lock_id)
    known = storage.LateResultRows()
    for job_seq, is_whole in whole.items():
        known.results[job_seq] = _late_results(db, job_seq, whole=is_whole)
    for job_seq, lock_ids in locks.items():
        grants = {grant.lock_id: grant for grant in _latest_grants(db, job_seq)}
        known.grants |= {(job_seq, lock_id): grants[lock_id] for lock_id in lock_ids & grants.keys()}
    return known


def _late_results(db: database.Database, job_seq: int, *, whole: bool) -> list[LateResult]:
    """Return the late results of a job, oldest grant first. Quarantine damaged rows."""
    sql = "SELECT seq FROM late_results INDEXED BY late_results_job WHERE job_seq = ? ORDER BY seq"
    seqs: list[int] = []
    with db.noting_corruption("the late results cannot be read"):
        seqs = [seq for (seq,) in db.rows(sql, (job_seq,))]
    rows = db.rows_one_by_one(_LATE, seqs, "late results")
    if len(rows) < len(seqs):
        db.note_fault(f"late results of {db.job_name(job_seq)}: rows cannot be found; run `jobd doctor`")
    undamaged = undamaged_rows(db, "late_results", rows)
    results = [codec.late(row, whole=whole) for row in undamaged if row[1] == job_seq]
    return sorted(results, key=lambda result: result.fencing_token)


def count_late_results(db: database.Database, job_seqs: list[int]) -> dict[int, int]:
    """See Storage.count_late_results."""
    db.check()
    sql = "SELECT count(*) FROM late_results INDEXED BY late_results_job WHERE job_seq = ?"
    with db.noting_corruption("the late results cannot be counted"):
        return {seq: count for seq in job_seqs if (count := db.rows(sql, (seq,))[0][0])}
    return {}


def _latest_grants(db: database.Database, job_seq: int) -> list[Grant]:
    """Return the grants in the latest GRANT_SEARCH_EVENTS events of a job, limited because batches wait for it."""
    try:
        rows = event_queries.latest_rows(db, job_seq, GRANT_SEARCH_EVENTS)
    except sqlite3.DatabaseError as error:
        if not database.is_corrupt(error):
            raise
        return []  # `timeline` reports the error
    latest = event_queries.events_of(db, rows)[-GRANT_SEARCH_EVENTS:]
    events = [event_codec.decode(event) for event in latest if event[_TYPE] == "granted"]
    return [event.grant for event in events if event.job_seq == job_seq and event.grant is not None]


def expired_jobs(db: database.Database, now: int, limit: int, skip: int = 0) -> list[str]:
    """See Storage.expired_jobs. Skips damaged rows that cannot be quarantined."""
    db.check()
    inner = (  # the index also has jobs with an invalid status
        f"SELECT seq AS found, expires_at AS due FROM jobs INDEXED BY jobs_expiry "
        f"WHERE expires_at IS NOT NULL AND {database.NOT_LIVE_SQL} AND {database.FINISHED_SQL} AND expires_at <= ? "
        "ORDER BY expires_at LIMIT ? OFFSET ?"
    )
    sql = f"SELECT {SQL['jobs']} FROM ({inner}) CROSS JOIN jobs NOT INDEXED ON seq = found ORDER BY due"
    while True:
        rows, _ = db.rows_up_to(sql, (now, limit, skip), event_queries.SLICE_BYTES)
        # If a job could not be quarantined, its row may be undamaged and only the payload damaged.
        damaged = [(row, error) for row in rows if (error := fault(row) or db.unmoved.get(row[0])) is not None]
        damaged_seqs = {row[0] for row, _ in damaged}
        undamaged = [row[1] for row in rows if row[0] not in damaged_seqs]
        if damaged:
            quarantine_jobs(db, damaged)
        if undamaged or not rows:
            return undamaged
        skip += sum(bool(db.rows(database.BY_SEQ, (row[0],))) for row, _ in damaged)


def reports(db: database.Database, limit: int) -> list[bytes]:
    """Return cleanup reports, newest first."""
    db.check()
    rows = db.rows("SELECT rowid, seq, body, crc FROM reports ORDER BY seq DESC LIMIT ?", (limit,))
    return [body for _, body, _ in undamaged_rows(db, "reports", rows)]


def due_tombstones(db: database.Database, now: int, limit: int) -> storage.DueTombstones:
    """See Storage.due_tombstones. Skips damaged tombstones that cannot be quarantined, up to a few hundred."""
    db.check()
    damaged_seqs: set[int] = set()
    unmoved: set[int] = set()
    for _ in range(MAX_DAMAGED_SLICES):
        rows = _due_rows(db, now, limit + len(unmoved))
        new = [(row[0], row, error) for row in rows if row[0] not in damaged_seqs and (error := fault(row)) is not None]
        unmoved |= quarantine_rows(db, "tombstones", new)
        damaged_seqs |= {seq for seq, _, _ in new}
        undamaged = [storage.Tombstone(*row[:-1]) for row in rows if row[0] not in damaged_seqs]
        if not new or len(undamaged) >= limit:
            break
    late = {each.job_seq for each in undamaged if db.rows(_REFERENCED_LATE, (each.key,))}
    due = [(each, bool(db.rows(_REFERENCED, (each.key,)))) for each in undamaged]
    return storage.DueTombstones(due, len(damaged_seqs) - len(unmoved), late, len(unmoved))


def _due_rows(db: database.Database, now: int, limit: int) -> list[Row]:
    """Return rows of due tombstones, from a scan if the index leads to missing rows."""
    for scan in ("", "NOT INDEXED"):
        try:
            due = db.rows(_DUE.format(scan, "<="), (now, limit))
            return due or db.rows(_DUE.format(scan, ">"), (now + storage.MAX_POSTPONE_MS, limit))
        except sqlite3.DatabaseError as error:
            if scan or not database.is_corrupt(error):
                raise
    raise AssertionError("unreachable")


def read_audit(db: database.Database, query: storage.AuditQuery) -> storage.AuditRows:
    """See Storage.read_audit."""
    db.check()
    with db.noting_corruption("the audit log cannot be read"):
        return _audit_page(db, query)
    return storage.AuditRows([])


def _audit_page(db: database.Database, query: storage.AuditQuery) -> storage.AuditRows:
    scope_args: tuple[Any, ...] = ()
    scope = "audit NOT INDEXED WHERE true"
    if query.job_id is not None:
        undamaged_rows(db, "audit_jobs", db.rows(f"SELECT seq, {SQL['audit_jobs']} {_AUDIT_JOBS}", (query.job_id,)))
        scope, scope_args = _AUDIT_OF_JOB, (query.job_id, query.job_id)
    filters, args = _audit_conditions(query)
    begin = _NO_LIMIT if query.before is None else query.before
    edge_sql = f"SELECT seq FROM {scope} AND seq < ? ORDER BY seq DESC LIMIT 1 OFFSET ?"
    edge = db.conn.execute(edge_sql, (*scope_args, begin, query.scan - 1)).fetchone()
    end = 0 if edge is None else edge[0]
    inner = f"SELECT seq AS found FROM {scope} AND seq < ? AND seq >= ? ORDER BY seq DESC"
    sql = (
        f"SELECT rowid, {SQL['audit']} FROM ({inner}) CROSS JOIN audit NOT INDEXED ON seq = found "
        f"WHERE true{filters} ORDER BY found DESC LIMIT ?"
    )
    matched = db.rows(sql, (*scope_args, begin, end, *args, query.limit + 1))
    page_rows = matched[: query.limit]
    next_before = None
    if len(matched) > len(page_rows):
        next_before = page_rows[-1][0]
    elif edge is not None:
        more = db.conn.execute(f"SELECT 1 FROM {scope} AND seq < ?", (*scope_args, end)).fetchone()
        next_before = None if more is None else end
    undamaged = undamaged_rows(db, "audit", page_rows)
    return storage.AuditRows([(row[0], codec.audited(row)) for row in undamaged], next_before)


def _audit_conditions(query: storage.AuditQuery) -> tuple[str, tuple[Any, ...]]:
    """Return SQL and arguments for the rows that match."""
    what = "what IN (?, 'artefact')" if query.what == "artifact" else "what = ?"  # the former spelling
    job = "(job_id IS NULL OR job_id = ?)"  # the scope has the entries of the job
    conditions = {"who = ?": query.who, what: query.what, job: query.job_id, "at >= ?": query.since}
    conditions = {condition: value for condition, value in conditions.items() if value is not None}
    return "".join(f" AND {condition}" for condition in conditions), tuple(conditions.values())
