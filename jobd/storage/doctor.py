"""What is wrong with a store that no daemon holds, each problem with its mend; and taking edited rows as they are.

`check` writes nothing. Which values of a job make sense is not judged here: that is validation.py.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from jobd.model.job import DAY_MS, LIVE, TOKEN_COUNTER_BITS, is_job_id
from jobd.model.storage import Numbers, QueueRow
from jobd.storage import codec, files, migrations, startup
from jobd.storage.codec import JOB_COLUMNS, META_COLUMNS, Row, fault
from jobd.storage.database import (
    EVENT_SQL,
    JOB_SQL,
    KEY_SQL,
    LATE_SQL,
    PUT_QUEUE,
    QUEUE_SQL,
    TOMBSTONE_SQL,
    Database,
    lenient_text,
    now_ms,
    readable,
)
from jobd.storage.files import FileLock, StoreError
from jobd.storage.outbox import CURSOR_SQL, DELIVERY_SQL
from jobd.storage.quarantine import true_id
from jobd.storage.queries import read_job
from jobd.storage.writers import AUDIT_SQL, insert

# Of one kind of problem so many are named, the rest counted.
NAMED: Final = 100
NOTHING_DAMAGED: Final = "no job is in quarantine, and no row is damaged"
LONG_MS: Final = DAY_MS  # that a tombstone may wait: a store of artifacts may be away for a while

_ACCEPT: Final = "mend the row with sqlite3, then `jobd doctor --accept {}`"
_RECOUNT: Final = "compare with a backup; `jobd doctor --recount` takes the rows that are there as all there are"
_REBUILD: Final = "`jobd doctor --recount` rebuilds all indexes from the rows"
_SWEEP: Final = "the log says why (artifact_not_deleted); is artifacts.url set, and may the daemon delete there?"
_RESTORE: Final = "put a backup back with `jobd restore`"


class StoreProblem(msgspec.Struct, frozen=True):
    """One thing that is wrong: where, what, and what mends it."""

    where: str
    what: str
    mend: str


class RepairRefused(StoreError):
    """The edited row cannot be taken as it is; the message says why."""

    exit_code = 4


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def check(path: str) -> list[StoreProblem]:
    """Everything that is wrong with the store at `path`. Reads all of it: about a minute for ten million rows.

    Raises StoreBusy while a daemon holds it, StoreTooNew, StoreUnreadable where it is no store at all.
    """
    with contextlib.ExitStack() as stack:
        if os.path.exists(f"{path}.lock"):  # a copy that no daemon ever opened gets no lock file from us
            stack.enter_context(FileLock(path))
        found = startup.peek(path)
        startup.check_version(path, found)
        startup.check_wal(path)
        if found[1] < migrations.VERSION:
            what = f"it has schema version {found[1]}, this jobd has {migrations.VERSION}"
            return [StoreProblem(path, what, "start the daemon once: it makes a copy and migrates; then check again")]
        stack.enter_context(startup.translated_errors(path))
        conn = stack.enter_context(startup.read_only(path))
        startup.check_application_id(conn, path)
        return problems(conn, path)


def problems(conn: sqlite3.Connection, path: str) -> list[StoreProblem]:
    """The same of a store of this version that is open already, and that nobody writes."""
    found: list[StoreProblem] = []
    tables = (_jobs, _payloads, _late, _journal, _keys, queues, _small_tables, _tombstones)
    for part in (_meta, _file, *tables, _quarantined, _files):
        found += _limited(part(conn, path))
    return found


def _limited(problems: Iterator[StoreProblem]) -> list[StoreProblem]:
    """The first of them, and how many more there are. A table that cannot be read through is a problem itself."""
    named: list[StoreProblem] = []
    more = 0
    try:
        for problem in problems:
            if len(named) < NAMED:
                named.append(problem)
            else:
                more += 1
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        named.append(StoreProblem("file", f"it cannot be read through: {error}", _RESTORE))
    if more:
        named.append(StoreProblem(named[-1].where.split()[0], f"and {more} more of this kind", named[-1].mend))
    return named


def _all_rows(conn: sqlite3.Connection, sql: str) -> Iterator[Row]:
    """The rows of a query, one by one, also those whose text is no UTF-8."""
    with lenient_text(conn):
        yield from conn.execute(sql)


def _meta(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    found = migrations.read_meta(conn)
    if found is not None and tuple(found) != (*META_COLUMNS, "crc"):
        wrong: str | None = f"its columns are {', '.join(map(readable, found))}"
    else:
        wrong = "it is missing" if found is None else fault(tuple(found.values()))
    if wrong is not None:
        yield StoreProblem("meta", wrong, _RESTORE)


def _known_meta(conn: sqlite3.Connection) -> dict[str, int] | None:
    """The meta row, None where it is not there or its columns are others: `_meta` names that."""
    found = migrations.read_meta(conn)
    return found if found is not None and tuple(found) == (*META_COLUMNS, "crc") else None


def _file(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    for (line,) in conn.execute(f"PRAGMA integrity_check({NAMED + 1})"):
        if line != "ok":
            yield StoreProblem("file", line, _REBUILD if "index" in line else _RESTORE)
    for name in startup.missing_from_schema(conn):
        yield StoreProblem(f"schema {name}", "it is missing", _RESTORE)


def _jobs(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    meta = _known_meta(conn)
    db = _database_of(conn, path)
    sums = {True: [0, 0], False: [0, 0]}
    next_job, next_token = 0, 0
    for row in _all_rows(conn, f"SELECT {JOB_SQL} FROM jobs NOT INDEXED ORDER BY seq"):
        job, wrong = read_job(db, row)
        group = sums[row[2] in LIVE]
        group[0] += 1
        group[1] ^= codec.first_checksum(row)
        if job is None:
            id_ = true_id(db, row)
            yield StoreProblem(f"job {id_}", wrong, _ACCEPT.format(id_))
            continue
        next_job = max(next_job, job.seq + 1)
        tokens = (part.fencing_token for part in (job.grant, job.ended) if part is not None)
        next_token = max(next_token, *(token + 1 for token in tokens), 0)
    if meta is None:
        return
    for live, name in ((True, "live"), (False, "finished")):
        kept = [meta[f"{name}_count"], meta[f"{name}_xor"]]
        if sums[live] != kept:
            what = f"{sums[live][0]} where {kept[0]} had been written"
            what = what if sums[live][0] != kept[0] else f"the {kept[0]} rows are not those that had been written"
            yield StoreProblem(f"{name} jobs", what, _RECOUNT)
    if next_job > meta["next_job"] or next_token > (meta["epoch"] << TOKEN_COUNTER_BITS) + meta["next_token"]:
        yield StoreProblem("meta", "a job has a number that is still to be given", _RESTORE)


def _database_of(conn: sqlite3.Connection, path: str) -> Database:
    """Tables to read with; their sums are not looked at."""
    return Database(conn, os.path.dirname(path) or ".", Numbers(), (0, 0, 0, 0), False, 0)


def _payloads(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    ids = "(SELECT id FROM jobs WHERE seq = job_seq)"
    for *columns, id_ in _all_rows(conn, f"SELECT job_seq, body, request_hash, crc, {ids} FROM payloads"):
        wrong = fault(tuple(columns))
        if id_ is None:
            yield StoreProblem(f"payload {columns[0]}", "there is no such job", "it takes up room, nothing more")
        elif wrong is not None:
            what = f"its payload is bad: {wrong}"
            yield StoreProblem(f"job {readable(id_)}", what, _ACCEPT.format(readable(id_)))
    without = "SELECT id FROM jobs NOT INDEXED WHERE seq NOT IN (SELECT job_seq FROM payloads)"
    for (id_,) in _all_rows(conn, without):
        yield StoreProblem(f"job {readable(id_)}", "its payload is missing", _ACCEPT.format(readable(id_)))


def _late(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    known = {seq for (seq,) in conn.execute("SELECT seq FROM jobs UNION SELECT seq FROM quarantined_jobs")}
    for row in _all_rows(conn, f"SELECT {LATE_SQL} FROM late_results NOT INDEXED"):
        where = f"late result {readable(row[0])}"
        if (wrong := fault(row)) is not None:
            yield StoreProblem(where, wrong, "the daemon sets it aside when it meets it")
        elif row[1] not in known:
            yield StoreProblem(where, "there is no such job", "it takes up room, nothing more")


def _journal(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    last = 0
    for row in _all_rows(conn, f"SELECT {EVENT_SQL} FROM events NOT INDEXED"):
        if (wrong := fault(row)) is not None:
            yield StoreProblem(f"event {readable(row[0])}", wrong, "the daemon sets it aside when it meets it")
        else:
            last = row[0]
    meta = _known_meta(conn)
    if meta is not None and last >= meta["next_event"]:
        yield StoreProblem("meta", "an event has a number that is still to be given", _RESTORE)
    known = "SELECT seq FROM jobs UNION SELECT seq FROM quarantined_jobs UNION SELECT job_seq FROM deleted_jobs"
    orphans = f"SELECT job_id, count(*) FROM events WHERE job_seq NOT IN ({known}) AND job_seq <> 0 GROUP BY job_seq"
    for id_, count in _all_rows(conn, orphans):
        what = f"there are {count} events of it, but no job, and it was not deleted"
        yield StoreProblem(f"job {readable(id_)}", what, _RECOUNT)


def _keys(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    for *columns, answer in _all_rows(conn, f"SELECT {KEY_SQL}, answer FROM keys NOT INDEXED"):
        wrong = fault(tuple(columns))
        if wrong is None and (None if answer is None else zlib.crc32(answer)) != columns[5]:
            wrong = "the checksum of its answer is wrong"
        if wrong is not None:
            yield StoreProblem(f"key {readable(columns[0])}", wrong, "the daemon sets it aside when it meets it")


def queues(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    """Queues whose rows are damaged, or whose counts are not those of their jobs. Reads every job."""
    kept: dict[str, tuple[int, int, int]] = {}
    for row in _all_rows(conn, f"SELECT {QUEUE_SQL} FROM queues NOT INDEXED"):
        if (wrong := fault(row)) is not None:
            mend = "the daemon counts its jobs anew; pause it again if it was paused"
            yield StoreProblem(f"queue {readable(row[0])}", wrong, mend)
        else:
            kept[row[0]] = row[2:5]
    with lenient_text(conn):
        counted = startup.recount_queues(conn)
    for name in sorted(kept.keys() | counted.keys()):
        says, has = kept.get(name, (0, 0, 0)), counted.get(name, (0, 0, 0))
        if says != has:
            what = f"it has {has} completed, failed and cancelled jobs where {says} had been written"
            yield StoreProblem(f"queue {readable(name)}", what, _RECOUNT)


def _small_tables(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    small = {
        "reports": "seq, body, crc",
        "figures": "id, body, crc",
        "tombstones": TOMBSTONE_SQL,
        "audit": AUDIT_SQL,
        "webhooks": CURSOR_SQL,
        "deliveries": DELIVERY_SQL,
    }
    for table, columns in small.items():
        for row in _all_rows(conn, f"SELECT {columns} FROM {table}"):
            if (wrong := fault(row)) is not None:
                yield StoreProblem(f"{table} {readable(row[0])}", wrong, "the daemon sets it aside when it meets it")


def _tombstones(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    """Stored objects that should have been deleted long ago."""
    now = now_ms()
    for row in _all_rows(conn, f"SELECT {TOMBSTONE_SQL} FROM tombstones NOT INDEXED WHERE at < {now - LONG_MS}"):
        if fault(row) is not None:
            continue
        late = codec.tombstone(row)
        days = (now - late.at) // DAY_MS
        gone = f"job {late.job_id} was deleted" if late.job_seq > 0 else f"a late result of job {late.job_id} went"
        what = f"{gone} {days} days ago, and its object not yet; {late.tries} tries have failed"
        yield StoreProblem(f"artifact {readable(late.key)}", what, _SWEEP)


def _quarantined(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    for id_, reason in _all_rows(conn, "SELECT id, reason FROM quarantined_jobs ORDER BY seq"):
        mend = f"mend `row` in quarantined_jobs with sqlite3, then `jobd doctor --accept {readable(id_)}`"
        yield StoreProblem(f"job {readable(id_)}", f"it is in quarantine: {readable(reason)}", mend)
    for place, what in _all_rows(conn, "SELECT place, what FROM bad_rows ORDER BY seq"):
        mend = "it is kept for you to look at: delete it from bad_rows with sqlite3"
        yield StoreProblem(f"{readable(place)} set aside", readable(what), mend)


def _epoch_file(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    try:
        file = files.read_epoch(path)
    except StoreError as error:
        yield StoreProblem("epoch file", str(error), "see there")
        return
    meta = _known_meta(conn)
    if meta is not None and not meta["marked"] and file.is_ahead_of(meta["epoch"]):
        what = f"it has seen epoch {file.epoch}, the database {meta['epoch']}: the database is an older copy"
        yield StoreProblem("epoch file", what, "nothing to do: the next start begins a new epoch and ends all grants")
    name = f"{path}.epoch"
    if os.path.exists(name) and os.stat(name).st_uid != (owner := os.stat(path).st_uid):
        what = f"it belongs to user {os.stat(name).st_uid}, the database to user {owner}"
        yield StoreProblem("epoch file", what, f"chown --reference {path} {name}")


def _files(conn: sqlite3.Connection, path: str) -> Iterator[StoreProblem]:
    yield from _epoch_file(conn, path)
    if os.stat(path).st_mode & 0o077:
        yield StoreProblem(path, "others may read it; it holds payloads and lock ids", f"chmod 600 {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Taking rows as they are


def accept(path: str, ids: Sequence[str] | None) -> str:
    """Accept the edited rows of jobs, in place or in quarantine, and return a line about each.

    `ids` None means all jobs that are in quarantine or have a damaged row. The rows get new checksums, and validation
    checks the jobs. All rows are one transaction. If a named row is not a valid job, this raises Refused and writes
    nothing. With `ids` None such rows do not change, and a line names each.
    """
    return _changing(path, lambda db: db.commit(_accept, db, path, ids))


def damaged(db: Database, path: str) -> list[str]:
    """Return the ids of jobs that are in quarantine or have damaged rows. Reads every job."""
    aside = [readable(id_) for (id_,) in _all_rows(db.conn, "SELECT id FROM quarantined_jobs ORDER BY seq")]
    named = (
        problem.where.removeprefix("job ")
        for part in (_jobs, _payloads)
        for problem in part(db.conn, path)
        if problem.mend.startswith(_ACCEPT.partition("{")[0])
    )
    return list(dict.fromkeys([*aside, *named]))


def recount(path: str) -> str:
    """Take the rows that are there as all there are: indexes, sums over jobs and counts of queues are made anew."""

    def change(db: Database) -> str:
        db.commit(db.conn.execute, "REINDEX")
        return db.commit(_recount, db)

    return _changing(path, change)


def _changing(path: str, change: Callable[[Database], str]) -> str:
    with FileLock(path):
        if not os.path.exists(path):
            raise files.StoreUnreadable(f"{path} does not exist")
        with contextlib.closing(startup.connect(path, "FULL")) as conn, startup.translated_errors(path):
            startup.prepare_schema(conn, path)
            return change(startup.read_meta(conn, path))


class Edited(msgspec.Struct, frozen=True):
    """A row as an operator left it, as jobd would write it. `aside` is the quarantine's number for it, or None."""

    quarantine_seq: int | None
    row: Row
    body: bytes
    request_hash: str

    @property
    def where(self) -> str:
        return "its row" if self.quarantine_seq is None else "its row in quarantine"


def edited(db: Database, id_: str) -> Edited:
    """The edited row of job `id_`. Raises Refused where there is none, or where it makes no job."""
    run = db.conn.execute
    aside = run("SELECT seq, row, payload, request_hash FROM quarantined_jobs WHERE id = ?", (id_,)).fetchone()
    row, body, request_hash = _in_place(db, id_) if aside is None else (*_quarantined_row(id_, aside), aside[3])
    row = _normalized(db, id_, row)
    return Edited(None if aside is None else aside[0], row, _json_text(id_, body), request_hash or "")


def _accept(db: Database, path: str, ids: Sequence[str] | None) -> str:
    lines = []
    for id_ in damaged(db, path) if ids is None else dict.fromkeys(ids):
        db.conn.execute("SAVEPOINT row")
        try:
            lines.append(_accept_row(db, id_))
        except RepairRefused as refused:
            if ids is not None:
                raise
            db.conn.execute("ROLLBACK TO row")
            lines.append(f"{refused}. The row does not change")
        db.conn.execute("RELEASE row")
    return "\n".join([*lines, _recount(db)] if lines else [NOTHING_DAMAGED])


def _accept_row(db: Database, id_: str) -> str:
    run = db.conn.execute
    taken = edited(db, id_)
    if taken.quarantine_seq is not None:
        run("DELETE FROM quarantined_jobs WHERE seq = ?", (taken.quarantine_seq,))
    seq = taken.row[0]
    run("DELETE FROM jobs WHERE seq = ?", (seq,))
    run("DELETE FROM payloads WHERE job_seq = ?", (seq,))
    try:
        run(insert("jobs", (*JOB_COLUMNS, "crc")), codec.sealed(taken.row))
    except sqlite3.IntegrityError as error:
        raise RepairRefused(f"job {id_}: {error}") from error
    payload = codec.sealed((seq, taken.body, taken.request_hash))
    run(insert("payloads", ("job_seq", "body", "request_hash", "crc")), payload)
    run("INSERT OR IGNORE INTO suspects (job_seq) VALUES (?)", (seq,))
    return f"job {id_}: {taken.where} was accepted as it is; validation will check it"


def _in_place(db: Database, id_: str) -> tuple[Row, Any, Any]:
    found = db.rows(f"SELECT {JOB_SQL} FROM jobs NOT INDEXED WHERE id = ?", (id_,))
    if not found:
        raise RepairRefused(f"there is no job {id_}, neither in jobs nor in quarantined_jobs")
    payload = db.rows("SELECT body, request_hash FROM payloads WHERE job_seq = ?", (found[0][0],))
    return (found[0][:-1], *(payload[0] if payload else (b"null", "")))


def _quarantined_row(id_: str, aside: Row) -> tuple[Row, Any]:
    try:
        row = codec.from_text(JOB_COLUMNS, aside[1])
    except codec.Unreadable as error:
        raise RepairRefused(f"job {id_}: its row in quarantine: {error}") from error
    return row, b"null" if aside[2] is None else aside[2]


def _normalized(db: Database, id_: str, row: Row) -> Row:
    """The row as jobd would write it. Raises Refused where it makes no job."""
    try:
        job = db.reader.job(row)
        taken = codec.job_row(job)
        codec.checksum(taken)
    except (codec.Unreadable, AttributeError, TypeError, UnicodeEncodeError) as error:
        raise RepairRefused(f"job {id_}: the row is not a valid job: {error}") from error
    if not isinstance(job.id, str) or not is_job_id(job.id):
        raise RepairRefused(f"{readable(job.id)!r} is no id of a job")
    given = (db.numbers.epoch << TOKEN_COUNTER_BITS) + db.numbers.next_token
    if job.seq >= db.numbers.next_job or (job.grant is not None and job.grant.fencing_token >= given):
        raise RepairRefused(f"job {job.id}: its seq or fencing_token is higher than any that was ever given")
    return taken


def _json_text(id_: str, body: Any) -> bytes:
    text = body.encode() if isinstance(body, str) else body
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as error:
        raise RepairRefused(f"job {id_}: its payload is no JSON ({error}): mend it first") from error
    return bytes(text)


def totals(conn: sqlite3.Connection) -> tuple[int, int, int, int]:
    """Number and XOR of checksums of the live and of the finished jobs that are there. Reads every job."""
    sums = {True: (0, 0), False: (0, 0)}
    for status, crc in _all_rows(conn, "SELECT status, crc FROM jobs NOT INDEXED"):
        count, xor = sums[status in LIVE]
        sums[status in LIVE] = (count + 1, xor ^ crc)
    return (*sums[True], *sums[False])


def _recount(db: Database) -> str:
    before = db.totals
    db.totals = totals(db.conn)
    counted = startup.recount_queues(db.conn)
    for row in db.rows(f"SELECT {QUEUE_SQL} FROM queues"):
        if fault(row) is None:
            kept = codec.queue(row)
            counts = counted.pop(row[0], (0, 0, 0))
            db.conn.execute(PUT_QUEUE, codec.queue_row(row[0], kept.with_counts(*counts)))
    for name, counts in counted.items():
        db.conn.execute(PUT_QUEUE, codec.queue_row(name, QueueRow(False, *counts)))
    db.write_meta()
    jobs = f"{db.totals[0]} live and {db.totals[2]} finished jobs"
    return f"Counted: {jobs} (before: {before[0]} and {before[2]})."
