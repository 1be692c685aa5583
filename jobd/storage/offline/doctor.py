"""Check a store that no daemon holds and suggest a fix for each problem, accept edited rows, and recount.

`check` writes nothing. The values of jobs are validated in `core/job_validation.py`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Final

import msgspec
from msgspec.structs import asdict, replace

from jobd.journal import event_codec
from jobd.journal.sqlite import SqliteJournal
from jobd.model.job import DAY_MS, LIVE, TOKEN_COUNTER_BITS, Extra, Job, extra_keys, headers_key
from jobd.model.storage import QueueRow, Tombstone
from jobd.storage import codec, files, startup, store_file
from jobd.storage.cluster import membership
from jobd.storage.codec import META_COLUMNS, SQL, Row, body_table, fault, insert
from jobd.storage.damage.quarantine import original_id, row_name
from jobd.storage.database import PUT_QUEUE, Database, lenient_text, now_ms, readable
from jobd.storage.events import event_rows
from jobd.storage.files import FileLock, StoreError
from jobd.storage.offline.edited_rows import RepairRejected, edited
from jobd.storage.offline.refold import differences
from jobd.storage.offline.uncommitted import opened_uncommitted
from jobd.storage.queries import key_fault, read_job
from jobd.storage.schema import migrations
from jobd.storage.tables.tail import JournalTail, jobs_without_row, read_tail
from jobd.storage.tables.tail import fix as tail_fix

MAX_LISTED: Final = 100  # defects listed per kind; the others are counted
NOTHING_DAMAGED: Final = "no job is in quarantine, and no row is damaged"
OVERDUE_MS: Final = DAY_MS  # of a tombstone; an artifact store may be unavailable for a while

_ACCEPT: Final = "repair the row with sqlite3, then run `jobd doctor --accept {}`"
_RECOUNT: Final = "compare with a backup; `jobd doctor --recount` accepts the current rows"
_REBUILD: Final = "rebuild all indexes from the rows with `jobd doctor --recount`"
_SWEEP: Final = "see artifact_not_deleted in the log; check artifacts.url and the daemon's permission to delete there"
_RESTORE: Final = "restore a backup with `jobd restore`"
_ON_ACCESS: Final = "nothing to do: the daemon quarantines it when it reads it"
_REFOLDED: Final = "compare with a backup; an edited row that was accepted differs from its events for good"
_LATE_OR_EARLY: Final = "correct the row of deleted_jobs with sqlite3, because it decides when these events are deleted"
_LAST_EVENTS: Final = f"SELECT {SQL['events']} FROM events WHERE job_seq = ? ORDER BY seq DESC LIMIT 1"
_LEFT: Final = "compare with a backup; the events stay, and only take up space"
_UNUSED: Final = "nothing to do: it only takes up space"
# Fields that identify an edited row for an operator. A lock id is a secret.
_SHOWN_FIELDS: Final = (
    "queue", "kind", "status", "priority", "progress", "attempt", "max_attempts", "stalls", "created_at", "run_at",
    "started_at", "finished_at", "error_message",
)  # fmt: skip


class Defect(msgspec.Struct, frozen=True):
    """One fault: where it is, what it is, and how to fix it."""

    where: str
    what: str
    fix: str


# ---------------------------------------------------------------------------------------------------------------------
# Check


def check(path: str, *, refold: bool = False, on_note: Callable[[str], object] = lambda note: None) -> list[Defect]:
    """Return all defects of the store at `path`. Reads all of it, which takes about a minute for ten million rows.

    With `refold`, also compare each job with its events. Calls `on_note` with a sentence about committed batches that
    the tables lack, because that is no defect.

    Raises StoreBusy while a daemon holds it, StoreTooNew, or StoreUnreadable if it is not a store.
    """
    with contextlib.ExitStack() as stack:
        if os.path.exists(f"{path}.lock"):  # do not create a lock file for a copy that no daemon has opened
            stack.enter_context(FileLock(path))
        store_file.check_wal(path)
        conn, version = stack.enter_context(startup.opened_read_only(path))
        if version < migrations.VERSION:
            problem = f"it has schema version {version}, but this jobd has {migrations.VERSION}"
            fix = "start the daemon once, which copies and migrates the store; then check again"
            return [Defect(path, problem, fix)]
        found = find_defects(conn, path)
        tail = _read_tail(conn)
        if tail.pending:
            on_note(f"the tables lack {tail} of the journal: the daemon writes them at its next start")
        if refold:
            found += _limited(Defect(f"job {id_}", what, _REFOLDED) for id_, what in differences(conn, tail.pending))
        return found


def find_defects(conn: sqlite3.Connection, path: str) -> list[Defect]:
    """Return all defects of an open store. It has the current schema version, and nothing writes to it."""
    found: list[Defect] = []
    tables = (_jobs, _payloads, _extra, _late, _events, _deleted, _keys, queues, _small_tables, _tombstones)
    for part in (_meta, _file, _tail, *tables, _quarantined, _epoch_file, _mode):
        found += _limited(part(conn, path))
    return found


def _limited(defects: Iterator[Defect]) -> list[Defect]:
    """Return the first MAX_LISTED defects and the number of the others. An unreadable table is also a defect."""
    listed: list[Defect] = []
    more = 0
    try:
        for defect in defects:
            if len(listed) < MAX_LISTED:
                listed.append(defect)
            else:
                more += 1
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        listed.append(Defect("file", f"it cannot be read completely: {error}", _RESTORE))
    if more:
        listed.append(Defect(listed[-1].where.split()[0], f"and {more} more of this kind", listed[-1].fix))
    return listed


def _all_rows(conn: sqlite3.Connection, sql: str) -> Iterator[Row]:
    """Yield the rows of a query, including rows with text that is not UTF-8."""
    with lenient_text(conn):
        yield from conn.execute(sql)


def _meta(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    row = migrations.read_meta(conn)
    if row is not None and _known_meta(conn) is None:
        error: str | None = f"its columns are {', '.join(map(readable, row))}"
    else:
        error = "it is missing" if row is None else fault(tuple(row.values()))
    if error is not None:
        yield Defect("meta", error, _RESTORE)


def _known_meta(conn: sqlite3.Connection) -> dict[str, int] | None:
    """Return the meta row; None if it is missing or has other columns, which `_meta` reports."""
    row = migrations.read_meta(conn)
    return row if row is not None and tuple(row) == (*META_COLUMNS, "crc") else None


def _file(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    for (line,) in conn.execute(f"PRAGMA integrity_check({MAX_LISTED + 1})"):
        if line != "ok":
            yield Defect("file", line, _REBUILD if "index" in line else _RESTORE)
    for name in startup.missing_from_schema(conn):
        yield Defect(f"schema {name}", "it is missing", _RESTORE)


def _read_tail(conn: sqlite3.Connection) -> JournalTail:
    meta = _known_meta(conn)
    return JournalTail() if meta is None else read_tail(SqliteJournal(conn, conn.execute), meta["projected_to"])


def _tail(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    tail = _read_tail(conn)
    if tail.error is not None:
        yield Defect("journal", f"{tail.error}, and the tables lack it", tail_fix(tail.error))
    for id_ in jobs_without_row(conn, tail.pending):
        problem = "the journal has later changes of it, but its row is missing"
        yield Defect(f"job {id_}", problem, "compare with a backup; the next start skips these changes")


def _jobs(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    meta = _known_meta(conn)
    db = Database(conn, path)
    sums = {True: [0, 0], False: [0, 0]}
    next_job, next_token = 0, 0
    for row in _all_rows(conn, f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED ORDER BY seq"):
        job, error = read_job(row, db.reader.job)
        group = sums[row[2] in LIVE]
        group[0] += 1
        group[1] ^= codec.original_checksum(row)
        if job is None:
            id_ = original_id(db, row)
            yield Defect(f"job {id_}", error, _ACCEPT.format(id_))
            continue
        next_job = max(next_job, job.seq + 1)
        tokens = (part.fencing_token for part in (job.grant, job.ended) if part is not None)
        next_token = max(next_token, *(token + 1 for token in tokens), 0)
    if meta is None:
        return
    for live, name in ((True, "live"), (False, "finished")):
        stored = [meta[f"{name}_count"], meta[f"{name}_xor"]]
        if sums[live] != stored:
            if sums[live][0] != stored[0]:
                problem = f"there are {sums[live][0]} rows, but {stored[0]} are recorded"
            else:
                problem = f"the {stored[0]} rows differ from those that are recorded"
            yield Defect(f"{name} jobs", problem, _RECOUNT)
    if next_job > meta["next_job"] or next_token > (meta["epoch"] << TOKEN_COUNTER_BITS) + meta["next_token"]:
        yield Defect("meta", "a job has a number that is not assigned yet", _RESTORE)


def _payloads(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    ids = "(SELECT id FROM jobs WHERE seq = job_seq)"
    for *columns, id_ in _all_rows(conn, f"SELECT job_seq, body, request_hash, crc, {ids} FROM payloads"):
        error = fault(tuple(columns))
        if id_ is None:
            yield Defect(f"payload {columns[0]}", "its job does not exist", _UNUSED)
        elif error is not None:
            problem = f"the payload is damaged: {error}"
            yield Defect(f"job {readable(id_)}", problem, _ACCEPT.format(readable(id_)))
    without = "SELECT id FROM jobs NOT INDEXED WHERE seq NOT IN (SELECT job_seq FROM payloads)"
    for (id_,) in _all_rows(conn, without):
        yield Defect(f"job {readable(id_)}", "the payload is missing", _ACCEPT.format(readable(id_)))


def _extra(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    """Check headers and checkpoints."""
    db = Database(conn, path)
    kept = {seq for (seq,) in conn.execute("SELECT seq FROM quarantined_jobs")}
    expected: dict[int, str] = {}
    for row in _all_rows(conn, f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED WHERE instr(body, '\"extra\":') > 0"):
        job, _ = read_job(row, db.reader.job)
        if job is None:
            kept.add(row[0])  # `_jobs` reports it
        else:
            expected |= dict.fromkeys(extra_keys(job), job.id)
    for key, id_ in expected.items():
        if (error := db.payload(key)[1]) != "":
            yield Defect(f"job {id_}", error, _ACCEPT.format(id_))
    for offset, table in enumerate(("headers", "checkpoints")):
        for (seq,) in conn.execute(f"SELECT job_seq FROM {table}"):
            if headers_key(seq) - offset not in expected and seq not in kept:
                yield Defect(f"{table} {seq}", "no job has them", _UNUSED)


def _late(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    known = {seq for (seq,) in conn.execute("SELECT seq FROM jobs UNION SELECT seq FROM quarantined_jobs")}
    for row in _all_rows(conn, f"SELECT {SQL['late_results']} FROM late_results NOT INDEXED"):
        place = f"late result {readable(row[0])}"
        if (error := fault(row)) is not None:
            yield Defect(place, error, _ON_ACCESS)
        elif row[1] not in known:
            yield Defect(place, "its job does not exist", _UNUSED)


def _events(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    last = 0
    db = Database(conn, path)
    for row in _all_rows(conn, f"SELECT {SQL['events']} FROM events NOT INDEXED"):
        if (error := event_rows.fault(row)) is not None:
            yield Defect(row_name(db, "events", row), error, _ON_ACCESS)
        else:
            last = max(last, row[1])
    meta = _known_meta(conn)
    if meta is not None and last >= meta["next_event"]:
        yield Defect("meta", "an event has a number that is not assigned yet", _RESTORE)
    known = "SELECT seq FROM jobs UNION SELECT seq FROM quarantined_jobs UNION SELECT job_seq FROM deleted_jobs"
    orphans = f"SELECT {SQL['events']} FROM events WHERE job_seq NOT IN ({known}) AND job_seq <> 0 ORDER BY job_seq"
    undamaged = (row for row in _all_rows(conn, orphans) if event_rows.fault(row) is None)
    for _, rows in groupby(undamaged, itemgetter(event_rows.JOB_SEQ)):
        events = list(chain.from_iterable(map(event_rows.unpack, rows)))
        problem = f"it has {len(events)} events but no row, and it was not deleted"
        yield Defect(f"job {event_codec.decode(events[0]).job_id}", problem, _LEFT)


def _deleted(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    """Yield deleted jobs that differ from their last event, because their rows have no checksum."""
    for job_seq, id_, at in _all_rows(conn, "SELECT job_seq, id, at FROM deleted_jobs"):
        row = conn.execute(_LAST_EVENTS, (job_seq,)).fetchone()
        if row is None or event_rows.fault(row) is not None:
            continue  # `_events` reports damaged rows, and events of a job that was not deleted
        event = event_codec.decode(event_rows.unpack(row)[-1])
        if (event.type, event.job_id, event.at) != ("deleted", id_, at):
            yield Defect(
                f"deleted job {readable(id_)}", f"its row {job_seq} differs from its last event", _LATE_OR_EARLY
            )


def _keys(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    for row in _all_rows(conn, f"SELECT {SQL['keys']} FROM keys NOT INDEXED"):
        if (error := key_fault(row)) is not None:
            yield Defect(f"key {readable(row[0])}", error, _ON_ACCESS)


def queues(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    """Yield queues with damaged rows or with counts that differ from their jobs. Reads every job."""
    stored: dict[str, tuple[int, int, int]] = {}
    for row in _all_rows(conn, f"SELECT {SQL['queues']} FROM queues NOT INDEXED"):
        if (error := fault(row)) is not None:
            fix = "nothing to do: the daemon counts its jobs at the next start; pause it again if it was paused"
            yield Defect(f"queue {readable(row[0])}", error, fix)
        else:
            stored[row[0]] = row[2:5]
    counted = startup.recount_queues(conn)
    for name in sorted(stored.keys() | counted.keys()):
        expected, actual = stored.get(name, (0, 0, 0)), counted.get(name, (0, 0, 0))
        if expected != actual:
            problem = f"it has {actual} completed, failed and cancelled jobs, but {expected} are recorded"
            yield Defect(f"queue {readable(name)}", problem, _RECOUNT)


def _small_tables(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    for table in (
        *("quiet_rules", "schedules", "reports", "figures", "tombstones"),
        *("audit", "audit_jobs", "webhooks", "deliveries"),
    ):
        for row in _all_rows(conn, f"SELECT {SQL[table]} FROM {table}"):
            if (error := fault(row)) is not None:
                yield Defect(f"{table} {readable(row[0])}", error, _ON_ACCESS)


def _tombstones(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    """Yield artifacts that should have been deleted more than OVERDUE_MS ago."""
    now = now_ms()
    for row in _all_rows(conn, f"SELECT {SQL['tombstones']} FROM tombstones NOT INDEXED WHERE at < {now - OVERDUE_MS}"):
        if fault(row) is not None:
            continue
        tombstone = Tombstone(*row[:-1])
        days = (now - tombstone.at) // DAY_MS
        deleted = "job" if tombstone.job_seq > 0 else "a late result of job"
        cause = f"{deleted} {tombstone.job_id} was deleted {days} days ago"
        problem = f"{cause}, but its artifact was not (failed attempts: {tombstone.tries})"
        yield Defect(f"artifact {readable(tombstone.key)}", problem, _SWEEP)


def _quarantined(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    for id_, reason in _all_rows(conn, "SELECT id, reason FROM quarantined_jobs ORDER BY seq"):
        fix = f"repair `row` in quarantined_jobs with sqlite3, then run `jobd doctor --accept {readable(id_)}`"
        yield Defect(f"job {readable(id_)}", f"it is in quarantine: {readable(reason)}", fix)
    for place, problem in _all_rows(conn, "SELECT place, what FROM bad_rows ORDER BY seq"):
        fix = "inspect it, then delete it from bad_rows with sqlite3"
        yield Defect(f"{readable(place)} in quarantine", readable(problem), fix)


def _epoch_file(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    try:
        in_file = files.read_epoch(path) or 0
    except StoreError as error:
        yield Defect("epoch file", str(error), "see the error")
        return
    meta = _known_meta(conn)
    if meta is not None and not meta["marked"] and in_file > meta["epoch"]:
        problem = f"it has epoch {in_file} and the database {meta['epoch']}, so the database is an older copy"
        yield Defect("epoch file", problem, "nothing to do: the next start begins a new epoch and ends all grants")
    name = f"{path}.epoch"
    if os.path.exists(name) and os.stat(name).st_uid != (owner := os.stat(path).st_uid):
        problem = f"it belongs to user {os.stat(name).st_uid}, the database to user {owner}"
        yield Defect("epoch file", problem, f"chown --reference {path} {name}")


def _mode(conn: sqlite3.Connection, path: str) -> Iterator[Defect]:
    if os.stat(path).st_mode & 0o077:
        yield Defect(path, "other users can read it; it contains payloads and lock ids", f"chmod 600 {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Repairs


def accept(path: str, ids: Sequence[str] | None, *, is_dry_run: bool = False) -> str:
    """Accept edited rows of jobs, in their table or in quarantine. Return a line about each.

    If `ids` is None, this accepts all jobs that are in quarantine or have a damaged row, and skips rows that are not
    valid jobs; a line names each. If a row of `ids` is not a valid job, it raises RepairRejected and writes nothing.
    Accepted rows get new checksums, and the daemon validates the jobs. All rows are written in one transaction.
    """
    return repair(path, lambda db: db.commit(_accept, db, path, ids, is_dry_run), is_dry_run=is_dry_run)


def damaged(db: Database, path: str) -> list[str]:
    """Return the ids of jobs that are in quarantine or have damaged rows. Reads every job."""
    quarantined = [readable(id_) for (id_,) in _all_rows(db.conn, "SELECT id FROM quarantined_jobs ORDER BY seq")]
    named = (
        problem.where.removeprefix("job ")
        for part in (_jobs, _payloads, _extra)
        for problem in part(db.conn, path)
        if problem.fix.startswith(_ACCEPT.partition("{")[0])
    )
    return list(dict.fromkeys([*quarantined, *named]))


def recount(path: str, *, is_dry_run: bool = False) -> str:
    """Accept all current rows: rebuild all indexes, the totals of jobs and the counts of queues."""

    def change(db: Database) -> list[str]:
        before = db.totals
        wrong = [f"{each.where}: {each.what}" for each in queues(db.conn, path)] if is_dry_run else []
        db.commit(db.reindex)
        lines = db.commit(_recount, db, is_dry_run)
        if not is_dry_run:
            return lines
        if db.totals != before and db.totals[::2] == before[::2]:
            lines.append("the rows differ from those that are recorded; they would be accepted")
        return ["all indexes would be rebuilt from the rows", *lines, *wrong]

    return repair(path, change, is_dry_run=is_dry_run)


def repair(path: str, change: Callable[[Database], list[str]], *, is_dry_run: bool, is_projected: bool = True) -> str:
    """Call `change` with the tables of a store that no daemon holds. Return its lines, after those about the start."""
    with (opened_uncommitted if is_dry_run else startup.opened_alone)(path) as conn:
        if isinstance(conn, str):
            return conn
        startup.prepare_schema(conn, path)
        membership.check_single(conn, path)
        if not is_projected:
            return "\n".join(change(startup.read_meta(conn, path)))
        tail = startup.check_tail(conn, path)
        db = startup.project_tail(conn, path)
        first = [f"the tables lack {tail}: they would be written first"] if is_dry_run and tail.pending else []
        return "\n".join([*first, *db.faults, *change(db)])


def _accept(db: Database, path: str, ids: Sequence[str] | None, is_dry_run: bool) -> list[str]:
    lines = []
    for id_ in damaged(db, path) if ids is None else dict.fromkeys(ids):
        db.conn.execute("SAVEPOINT row")
        try:
            lines += _accept_row(db, id_, is_dry_run)
        except RepairRejected as rejected:
            if ids is not None:
                raise
            db.conn.execute("ROLLBACK TO row")
            lines.append(f"{rejected}. The row {'would' if is_dry_run else 'does'} not change")
        db.conn.execute("RELEASE row")
    return [*lines, *_recount(db, is_dry_run)] if lines else [NOTHING_DAMAGED]


def _accept_row(db: Database, id_: str, is_dry_run: bool) -> list[str]:
    run = db.conn.execute
    accepted = edited(db, id_)
    accepted = replace(accepted, job=_with_undamaged_extra(db, accepted.job))
    if accepted.quarantine_seq is not None:
        run("DELETE FROM quarantined_jobs WHERE seq = ?", (accepted.quarantine_seq,))
    seq = accepted.job.seq
    run("DELETE FROM jobs WHERE seq = ?", (seq,))
    run("DELETE FROM payloads WHERE job_seq = ?", (seq,))
    try:
        run(insert("jobs"), codec.with_checksum(codec.job_row(accepted.job)))
    except sqlite3.IntegrityError as error:
        raise RepairRejected(f"job {id_}: {error}") from error
    payload = codec.with_checksum((seq, accepted.body, accepted.request_hash))
    run(insert("payloads"), payload)
    run("INSERT OR IGNORE INTO suspects (job_seq) VALUES (?)", (seq,))
    if not is_dry_run:
        return [f"job {id_}: {accepted.where} was accepted; validation will check it"]
    job = accepted.job
    fields = {**asdict(job.options), **asdict(job), "error_message": job.error and job.error.message}
    values = ", ".join(f"{name} {readable(fields[name])}" for name in _SHOWN_FIELDS if fields[name] not in (None, ""))
    return [
        f"job {id_}: {accepted.where} would be accepted with a new checksum; validation would check it",
        f"    {values}; a payload of {len(accepted.body)} bytes",
    ]


def _with_undamaged_extra(db: Database, job: Job) -> Job:
    """Return the job without headers and checkpoint if their rows are damaged or missing. Damaged rows are deleted."""
    extra = job.extra
    for key in extra_keys(job):
        if db.payload(key)[0] is None:
            db.conn.execute(f"DELETE FROM {body_table(key)} WHERE job_seq = ?", (job.seq,))
            extra = replace(extra or Extra(), **{"checkpoint_bytes" if key % 2 else "headers_bytes": 0})
    return replace(job, extra=None if extra == Extra() else extra)


def totals(conn: sqlite3.Connection) -> tuple[int, int, int, int]:
    """Return count and XOR of the checksums of live jobs, then of finished jobs. Reads every job."""
    sums = {True: (0, 0), False: (0, 0)}
    for status, crc in _all_rows(conn, "SELECT status, crc FROM jobs NOT INDEXED"):
        count, xor = sums[status in LIVE]
        sums[status in LIVE] = (count + 1, xor ^ crc)
    return (*sums[True], *sums[False])


def _recount(db: Database, is_dry_run: bool) -> list[str]:
    before = db.totals
    db.totals = totals(db.conn)
    counted = startup.recount_queues(db.conn)
    for row in db.rows(f"SELECT {SQL['queues']} FROM queues"):
        if fault(row) is None:
            queue = codec.queue(row)
            counts = counted.pop(row[0], (0, 0, 0))
            db.conn.execute(PUT_QUEUE, codec.queue_row(row[0], queue.with_counts(*counts)))
    for name, counts in counted.items():
        db.conn.execute(PUT_QUEUE, codec.queue_row(name, QueueRow(False, *counts)))
    db.write_meta()
    jobs = f"{db.totals[0]} live and {db.totals[2]} finished jobs"
    if not is_dry_run:
        return [f"Counted: {jobs} (before: {before[0]} and {before[2]})."]
    if db.totals[::2] == before[::2]:
        return [f"the counts would not change: {jobs}"]
    return [f"the counts would be: {jobs} (recorded: {before[0]} and {before[2]})"]
