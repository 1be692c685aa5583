"""Jobs on their way to the disk: each row once for a batch, and of a row that is there only what has changed.

Begins and ends no transaction: tables.py calls this inside one. Reads nothing of what it has written.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import ne
from typing import Any, Final

from jobd import rows
from jobd.events import Change
from jobd.job import LIVE, Job
from jobd.rows import JOB_COLUMNS, Row, sealed

Totals = tuple[int, int, int, int]  # number and XOR of the checksums of the live jobs, then of the finished ones

KEEP_ROWS: Final = 1000  # what the next change of a job starts from; a kilobyte each at most
KEEP_PAYLOAD_BYTES: Final = 2 << 20
_SHAPES: Final = 200  # statements that are kept ready


def insert(table: str, columns: Iterable[str], verb: str = "INSERT") -> str:
    names = tuple(columns)
    return f"{verb} INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"


_INSERT_PAYLOAD: Final = insert("payloads", ("job_seq", "body", "request_hash", "crc"))


class RowsMissing(sqlite3.IntegrityError):
    """The batch names jobs that are not on the disk."""


class JobWriter:
    """Writes the rows of jobs and their payloads, and keeps those of the last jobs at hand."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        # By seq: a live job, the row it was written as, its checksum. Used only for the very same (immutable) job,
        # so that a batch that was rolled back leaves nothing wrong here.
        self._rows: dict[int, tuple[Job, Row, int]] = {}
        self._payloads: dict[int, bytes] = {}
        self._payload_bytes = 0
        self._sql: dict[Any, str] = {}

    def write(self, changes: list[Change], totals: Totals) -> Totals:
        """Write the last row of each job, and the payloads of new ones; gives the new totals."""
        spans: dict[int, tuple[Job | None, Job | None]] = {}
        payloads: dict[int, Row] = {}
        gone: list[tuple[int, str, int]] = []
        suspects: list[tuple[int]] = []
        for change in changes:
            before, after = change.before, change.after
            if after is not None:
                seq = after.seq
                if before is None:
                    payloads[seq] = (seq, bytes(change.payload or b"null"), change.request_hash or "")
                if change.event.type == "imported":
                    suspects.append((seq,))
            elif before is not None:
                seq = before.seq
                gone.append((seq, before.id, change.event.at))
            else:
                continue
            span = spans.get(seq)
            spans[seq] = (before if span is None else span[0], after)
        if gone:
            self._delete(gone, [(seq,) for seq, _, _ in gone if spans[seq][0] is not None])
            for seq, _, _ in gone:
                payloads.pop(seq, None)
        totals = self._write_rows(spans, totals)
        self._conn.executemany(_INSERT_PAYLOAD, map(sealed, payloads.values()))
        self._keep_payloads(payloads)
        if suspects:
            self._conn.executemany("INSERT OR IGNORE INTO suspects (job_seq) VALUES (?)", suspects)
            if gone:
                self._conn.execute("DELETE FROM suspects WHERE job_seq NOT IN (SELECT seq FROM jobs)")
        return totals

    def payload(self, seq: int) -> bytes | None:
        """The payload of a job that was made lately. A seq is never given twice, so it cannot be another's."""
        return self._payloads.get(seq)

    def _keep_payloads(self, payloads: dict[int, Row]) -> None:
        for seq, row in payloads.items():
            known = self._payloads.get(seq, b"")  # from a transaction that was rolled back and is run again
            self._payload_bytes += len(row[1]) - len(known)
            self._payloads[seq] = row[1]
        while self._payload_bytes > KEEP_PAYLOAD_BYTES:
            oldest = list(self._payloads)[: 1 + len(self._payloads) // 4]
            self._payload_bytes -= sum(len(self._payloads.pop(seq)) for seq in oldest)

    def _write_rows(self, spans: dict[int, tuple[Job | None, Job | None]], totals: Totals) -> Totals:
        live, live_xor, finished, finished_xor = totals
        new: defaultdict[str, list[Row]] = defaultdict(list)
        changed: defaultdict[str, list[Row]] = defaultdict(list)
        for seq, (before, after) in spans.items():
            old: Row | None = None
            if before is not None:
                old, crc = self._row(before)
                if before.status in LIVE:
                    live, live_xor = live - 1, live_xor ^ crc
                else:
                    finished, finished_xor = finished - 1, finished_xor ^ crc
            if after is None:
                continue
            row = rows.job_row(after)
            crc = rows.checksum(row)
            if after.status in LIVE:
                live, live_xor = live + 1, live_xor ^ crc
                self._keep_row(after, row, crc)
            else:
                finished, finished_xor = finished + 1, finished_xor ^ crc
            if old is None:
                new[self._insert(row)].append((*_values(row), crc))
            else:
                sql, values = self._update(old, row)
                changed[sql].append((*values, crc, seq))
        for sql, many in changed.items():
            self._each_row(sql, many)
        for sql, many in new.items():
            self._conn.executemany(sql, many)
        return live, live_xor, finished, finished_xor

    def _each_row(self, sql: str, many: Sequence[Row]) -> None:
        """Run `sql` for each; every one has to find its row."""
        if self._conn.executemany(sql, many).rowcount != len(many):
            raise RowsMissing("a job that is in memory has no row on the disk")

    def _row(self, job: Job) -> tuple[Row, int]:
        kept = self._rows.pop(job.seq, None)
        if kept is not None and kept[0] is job:
            return kept[1], kept[2]
        row = rows.job_row(job)
        return row, rows.checksum(row)

    def _keep_row(self, job: Job, row: Row, crc: int) -> None:
        if len(self._rows) >= KEEP_ROWS:
            self._rows.clear()
        self._rows[job.seq] = (job, row, crc)

    # A statement names only the columns that it has to: each value costs time, and each null twice as much. What is
    # not named in an INSERT is null; an UPDATE that leaves status and expires_at alone touches no index.

    def _insert(self, row: Row) -> str:
        shape = tuple(map(type, row))
        sql = self._sql.get(shape)
        if sql is None:
            columns = [column for column, value in zip(JOB_COLUMNS, row, strict=True) if value is not None]
            sql = self._keep_sql(shape, insert("jobs", (*columns, "crc")))
        return sql

    def _update(self, old: Row, row: Row) -> tuple[str, Row]:
        """The statement that makes `row` of `old`, and its values but for the checksum and the seq."""
        changed = bytes(map(ne, old, row))
        values = tuple(compress(row, changed))
        shape = changed, tuple(map(type, values))
        sql = self._sql.get(shape)
        if sql is None:
            columns = zip(compress(JOB_COLUMNS, changed), values, strict=True)
            settings = [f"{column} = {'NULL' if value is None else '?'}" for column, value in columns]
            sql = self._keep_sql(shape, f"UPDATE jobs SET {', '.join([*settings, 'crc = ?'])} WHERE seq = ?")
        return sql, _values(values)

    def _keep_sql(self, shape: Any, sql: str) -> str:
        if len(self._sql) >= _SHAPES:
            self._sql.clear()
        self._sql[shape] = sql
        return sql

    def _delete(self, gone: list[tuple[int, str, int]], on_disk: list[Row]) -> None:
        """`on_disk` are those that this batch has not made itself."""
        self._each_row("DELETE FROM jobs WHERE seq = ?", on_disk)
        for table in ("payloads", "suspects"):
            self._conn.executemany(f"DELETE FROM {table} WHERE job_seq = ?", on_disk)
        self._conn.executemany("INSERT INTO deleted_jobs (job_seq, id, at) VALUES (?, ?, ?)", gone)


def _values(row: Row) -> Row:
    return tuple([value for value in row if value is not None])
