"""Write jobs and audit entries. `projection.py` calls this inside a transaction.

A slice writes each job row once.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Callable, Container, Sequence
from typing import Final, get_args

from msgspec import Struct
from msgspec.structs import replace

from jobd.model.events import NOTES, Event, fold
from jobd.model.job import LIVE, Job, extra_keys, seq_of_body
from jobd.model.storage import AuditEntry, AuditShare, audit_share
from jobd.storage import codec
from jobd.storage.codec import COLUMNS, SQL, Row, body_table, insert, with_checksum

Totals = tuple[int, int, int, int]  # count and XOR of the checksums of live jobs, then of finished jobs

KEEP_ROWS: Final = 1000  # cached rows of live jobs
KEEP_PAYLOAD_BYTES: Final = 2 << 20


_INSERT_JOB: Final = insert("jobs")
_UPDATE_JOB: Final = (
    "UPDATE jobs SET "
    + ", ".join(f"{name} = ?{at}" for at, name in enumerate(COLUMNS["jobs"], 1) if name not in ("seq", "id"))
    + " WHERE seq = ?1"
)
_UPDATE_BODY: Final = "UPDATE jobs SET body = ?2, crc = ?3 WHERE seq = ?1"  # changes no index
_INSERT_DELETED: Final = insert("deleted_jobs", "REPLACE")  # damage may have made an entry
_INSERT_PAYLOAD: Final = insert("payloads")


class RowUnusable(Exception):
    """A record from before the start changes a job whose row is damaged, or missing if `row` is None."""

    def __init__(self, job_id: str, row: Row | None = None, reason: str = "its row is missing") -> None:
        super().__init__(reason)
        self.job_id = job_id
        self.row = row


class StoredJob(Struct, frozen=True, gc=False):
    """A job, and its row with the checksum. With `is_gone`, the row has to be inserted again."""

    job: Job
    row: Row
    is_gone: bool = False


class JobWriter:
    """Writes the row that each job has after its changes, once. Caches the rows and payloads written last.

    `find` returns the row of the job of an event. It raises RowUnusable. `note` gets sentences about damage.
    """

    def __init__(
        self,
        conn: sqlite3.Connection,
        find: Callable[[Event], StoredJob],
        note: Callable[[str], object],
    ) -> None:
        self._conn = conn
        self._find = find
        self._note = note
        self._rows: dict[int, StoredJob] = {}  # of live jobs, by seq
        self.payloads: dict[int, bytes] = {}  # cached, of new jobs; a seq is never reused
        self._payload_bytes = 0

    def write(self, changes: Sequence[Event], totals: Totals, skipped: Container[str]) -> Totals:
        """Write the final row and the bodies of each job. Return the new totals.

        Jobs with the ids `skipped` are in quarantine. Their rows are not changed.
        """
        before: dict[int, StoredJob | None] = {}  # None: a new job
        after: dict[int, Job | None] = {}
        payloads: dict[int, Row] = {}
        bodies: dict[int, bytes] = {}
        has_extra = False  # a job has or had headers or a checkpoint
        gone: list[tuple[int, str, int]] = []
        suspects: list[tuple[int]] = []
        for event in changes:
            seq = event.job_seq
            if event.type in NOTES:
                continue  # it changes no row
            if seq not in after:
                stored = None if event.from_status is None else self._stored(event, skipped)
                if stored is None and event.from_status is not None:
                    continue
                before[seq], after[seq] = stored, None if stored is None else stored.job
                has_extra = has_extra or (stored is not None and stored.job.extra is not None)
            after[seq] = event.after or fold(after[seq], event)
            if event.bodies:
                bodies |= event.bodies
                has_extra = True
            if event.from_status is None:
                payloads[seq] = (seq, event.payload or b"null", event.request_hash or "")
                if event.type == "imported":
                    suspects.append((seq,))
            elif event.type == "deleted":
                gone.append((seq, event.job_id, event.at))
        if gone:
            self._delete(gone, [(seq,) for seq, _, _ in gone if before[seq] is not None])
            for seq, _, _ in gone:
                payloads.pop(seq, None)
        totals = self._write_rows(before, after, totals)
        self._conn.executemany(_INSERT_PAYLOAD, map(with_checksum, payloads.values()))
        if has_extra:
            self._write_extra(bodies, before, after)
        if suspects:
            self._conn.executemany("INSERT OR IGNORE INTO suspects (job_seq) VALUES (?)", suspects)
            if gone:
                self._conn.execute("DELETE FROM suspects WHERE job_seq NOT IN (SELECT seq FROM jobs)")
        return totals

    def _write_extra(
        self, bodies: dict[int, bytes], before: dict[int, StoredJob | None], after: dict[int, Job | None]
    ) -> None:
        """Write the headers and checkpoints that jobs have, and delete those that they have no more."""
        kept = {key for job in after.values() for key in extra_keys(job)}
        for key in {key for stored in before.values() if stored is not None for key in extra_keys(stored.job)} - kept:
            self._conn.execute(f"DELETE FROM {body_table(key)} WHERE job_seq = ?", (seq_of_body(key),))
        for key in kept & bodies.keys():
            row = with_checksum((seq_of_body(key), bodies[key]))
            self._conn.execute(insert(body_table(key), "REPLACE"), row)

    def forget_rows(self) -> None:
        """Clear the cache of rows, after a transaction that was rolled back."""
        self._rows.clear()

    def cache_payload(self, seq: int, payload: bytes) -> None:
        """Cache the payload of a new job."""
        self._payload_bytes += len(payload)
        self.payloads[seq] = payload
        while self._payload_bytes > KEEP_PAYLOAD_BYTES:
            oldest = list(self.payloads)[: 1 + len(self.payloads) // 4]
            self._payload_bytes -= sum(len(self.payloads.pop(seq)) for seq in oldest)

    def _stored(self, event: Event, skipped: Container[str]) -> StoredJob | None:
        """Return the row that `change` continues, None if its job is in quarantine. Raises RowUnusable.

        A row that is damaged or missing is written again from the job in memory, which only a change of this run has.
        """
        if (stored := self._rows.pop(event.job_seq, None)) is not None:
            return stored
        try:
            return self._find(event)
        except RowUnusable as error:
            if event.job_id in skipped:
                return None
            if event.before is None:
                raise
            self._conn.execute("DELETE FROM jobs WHERE seq = ?", (event.job_seq,))
            self._note(f"job {event.job_id}: {error}; it was written again from memory")
        return StoredJob(event.before, with_checksum(codec.job_row(event.before)), is_gone=True)

    def _write_rows(self, stored: dict[int, StoredJob | None], after: dict[int, Job | None], totals: Totals) -> Totals:
        live, live_xor, finished, finished_xor = totals
        new: list[Row] = []
        bodies: list[Row] = []  # of rows that change in nothing else
        changed: list[Row] = []
        for seq, job in after.items():
            before = stored[seq]
            if before is not None:
                if before.job.status in LIVE:
                    live, live_xor = live - 1, live_xor ^ before.row[-1]
                else:
                    finished, finished_xor = finished - 1, finished_xor ^ before.row[-1]
            if job is None:
                continue
            row = with_checksum(codec.job_row(job))
            if job.status in LIVE:
                live, live_xor = live + 1, live_xor ^ row[-1]
                self._cache_row(job, row)
            else:
                finished, finished_xor = finished + 1, finished_xor ^ row[-1]
            if before is None or before.is_gone:
                new.append(row)
            elif before.row[:-2] == row[:-2]:
                bodies.append((row[0], *row[-2:]))
            else:
                changed.append(row)
        for sql, rows in ((_UPDATE_BODY, bodies), (_UPDATE_JOB, changed)):
            if rows and self._conn.executemany(sql, rows).rowcount != len(rows):
                raise sqlite3.IntegrityError("a cached row is not on the disk")
        self._conn.executemany(_INSERT_JOB, new)
        return live, live_xor, finished, finished_xor

    def _cache_row(self, job: Job, row: Row) -> None:
        if len(self._rows) >= KEEP_ROWS:
            for seq in list(self._rows)[: 1 + KEEP_ROWS // 4]:
                del self._rows[seq]
        self._rows[job.seq] = StoredJob(job, row)

    def _delete(self, gone: list[tuple[int, str, int]], on_disk: list[Row]) -> None:
        """Delete the jobs `gone`. `on_disk` are those that this slice did not create."""
        self._conn.executemany("DELETE FROM jobs WHERE seq = ?", on_disk)
        for table in ("payloads", "suspects"):
            self._conn.executemany(f"DELETE FROM {table} WHERE job_seq = ?", on_disk)
        self._conn.executemany(_INSERT_DELETED, gone)


# ---------------------------------------------------------------------------------------------------------------------
# Audit log

ReadRows = Callable[[str, Row], list[Row]]
KEEP_AUDIT: Final = 100_000  # entries about changes
KEEP_BESIDE: Final = 10_000  # entries of each other share, so that a looping script displaces only similar entries
COUNTED_AT_ONCE: Final = 2_000  # rows; it takes less than a millisecond
OPEN_ROWS: Final = 1_000  # newest rows in which the row of an action with many parts is searched
_KEEP_OPEN: Final = 64  # actions whose rows are cached
_INSERT_AUDIT_JOB: Final = insert("audit_jobs")
_LAST_AUDIT_JOB: Final = "SELECT ifnull(max(seq), 0) FROM audit_jobs"
# Of the oldest rows, those of entries that are gone.
_GONE_AUDIT_JOBS: Final = (
    "SELECT seq FROM (SELECT seq, audit_seq FROM audit_jobs ORDER BY seq LIMIT ?) "
    "WHERE audit_seq < (SELECT min(seq) FROM audit)"
)
_PUT_AUDIT: Final = insert("audit", "REPLACE")
AUDIT_ROW: Final = f"SELECT {SQL['audit']} FROM audit WHERE seq = ?"
_LAST_AUDIT: Final = "SELECT ifnull(max(seq), 0) FROM audit"
# Only the oldest rows are examined. A row with a later time keeps the rows after it until there are too many.
_OLD_AUDIT: Final = (
    "SELECT seq FROM (SELECT seq, at FROM audit ORDER BY seq LIMIT ?) WHERE at < ? AND seq < ? ORDER BY seq"
)
_OPEN_AUDIT: Final = "SELECT ifnull(max(seq), 0) FROM audit NOT INDEXED WHERE seq > ? AND part_of = ?"
_UNCOUNTED_AUDIT: Final = "SELECT seq, what, outcome FROM audit WHERE seq > ? ORDER BY seq LIMIT ?"
_AUDIT_SHARE: Final = "SELECT what, outcome FROM audit WHERE seq = ?"


class AuditWriter:
    """Writes audit entries through one connection. Rows that a rollback removed are detected and written again.

    `read` runs a query and accepts text that is not UTF-8.
    """

    def __init__(self, conn: sqlite3.Connection, read: ReadRows) -> None:
        self._conn = conn
        self._read = read
        self._open: dict[str, int] = {}  # part_of -> seq of its row
        # Counted rows, see `count_more`.
        self._counted: dict[AuditShare, array[int]] = {share: array("q") for share in get_args(AuditShare)}
        self._counted_to = 0

    def write(self, audit: list[AuditEntry]) -> None:
        (last,) = self._conn.execute(_LAST_AUDIT).fetchone()
        for audited in audit:
            known = self._known(audited, last)
            if known is None:
                last += 1
                known = last, audited
            seq, whole = known
            self._conn.execute(_PUT_AUDIT, codec.audit_row(seq, whole))
            if audited.changed_ids:
                (number,) = self._conn.execute(_LAST_AUDIT_JOB).fetchone()
                named = enumerate(audited.changed_ids, number + 1)
                self._conn.executemany(_INSERT_AUDIT_JOB, [with_checksum((at, seq, job_id)) for at, job_id in named])
            if audited.part_of is not None:
                self._open[audited.part_of] = seq
        while len(self._open) > _KEEP_OPEN:
            del self._open[next(iter(self._open))]

    def _known(self, part: AuditEntry, last: int) -> tuple[int, AuditEntry] | None:
        """Return the seq and the updated entry of the row that `part` belongs to, or None if there is none.

        The rows alone decide, so that each node of a cluster gives an entry the same row.
        """
        if part.part_of is None:
            return None
        if (seq := self._open.pop(part.part_of, 0)) <= last - OPEN_ROWS:
            (seq,) = self._conn.execute(_OPEN_AUDIT, (last - OPEN_ROWS, part.part_of)).fetchone()
        found = self._read(AUDIT_ROW, (seq,))
        if not found or codec.fault(found[0]) is not None:
            return None
        before = codec.audited(found[0])
        if before.part_of != part.part_of:
            return None
        details = before.details if part.details is None else part.details
        return seq, replace(before, jobs=before.jobs + part.jobs, details=details)

    def count_more(self) -> bool:
        """Count up to COUNTED_AT_ONCE more rows. Return whether all are counted. Call it outside transactions."""
        found = self._read(_UNCOUNTED_AUDIT, (self._counted_to, COUNTED_AT_ONCE))
        for seq, what, outcome in found:
            self._counted[audit_share(what, outcome)].append(seq)
            self._counted_to = seq
        return len(found) < COUNTED_AT_ONCE

    def excess(self, before: int, limit: int) -> list[int]:
        """Return up to `limit` rows to delete: those written before wall time `before` (Unix ms), and excess ones.

        Each share has its own maximum, which applies to the rows that `count_more` has counted. The newest row is kept,
        so that its number is not reused.
        """
        (last,) = self._conn.execute(_LAST_AUDIT).fetchone()
        going = {seq: None for (seq,) in self._conn.execute(_OLD_AUDIT, (limit, before, last))}
        for share, seqs in self._counted.items():
            keep = KEEP_AUDIT if share == "changes" else KEEP_BESIDE
            self._drop_deleted(share)
            going |= dict.fromkeys(seq for seq in seqs[: max(min(len(seqs) - keep, limit), 0)] if seq < last)
        return list(going)[:limit]

    def gone_jobs(self, limit: int) -> list[int]:
        """Return rows of changed jobs whose entries are gone, of the `limit` oldest rows."""
        return [seq for (seq,) in self._conn.execute(_GONE_AUDIT_JOBS, (limit,))]

    def _drop_deleted(self, share: AuditShare) -> None:
        """Stop counting deleted rows. They are detected here, because a deletion may have been rolled back."""
        seqs = self._counted[share]
        for count, seq in enumerate(seqs):
            found = self._read(_AUDIT_SHARE, (seq,))
            if found and audit_share(*found[0]) == share:
                del seqs[:count]
                return
        del seqs[:]
