"""Jobs on their way to the disk: each row once for a batch, and of a row that is there only what has changed.

Begins and ends no transaction: tables.py calls this inside one. Reads nothing of what it has written.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import compress, repeat
from operator import is_not, itemgetter
from typing import Any, Final

from msgspec.structs import astuple

from jobd.model.events import Change
from jobd.model.job import LIVE, Job
from jobd.storage import codec
from jobd.storage.codec import JOB_COLUMNS, JOB_FIELDS, Row, sealed

Totals = tuple[int, int, int, int]  # number and XOR of the checksums of the live jobs, then of the finished ones
Statement = tuple[str, Callable[[Row], Row]]  # and what picks its values out of a whole row

KEEP_CHECKSUMS: Final = 1000  # each with its job
KEEP_PAYLOAD_BYTES: Final = 2 << 20
_SHAPES: Final = 200  # statements that are kept ready


def insert(table: str, columns: Iterable[str], verb: str = "INSERT") -> str:
    names = tuple(columns)
    return f"{verb} INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"


_PARTS: Final = Job.__struct_fields__
_INSERT_PAYLOAD: Final = insert("payloads", ("job_seq", "body", "request_hash", "crc"))


class RowsMissing(sqlite3.IntegrityError):
    """The batch names jobs that are not on the disk."""


class JobWriter:
    """Writes the rows of jobs and their payloads, and keeps the payloads of the last jobs at hand."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        # By seq: a live job and the checksum of its row. Used only for an equal job, so that a batch that was rolled
        # back leaves nothing wrong here.
        self._checksums: dict[int, tuple[Job, int]] = {}
        self._payloads: dict[int, bytes] = {}
        self._payload_bytes = 0
        self._statements: dict[Any, Statement] = {}

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
        for before, after in spans.values():
            if before is not None:
                crc = self._checksum(before)
                if before.status in LIVE:
                    live, live_xor = live - 1, live_xor ^ crc
                else:
                    finished, finished_xor = finished - 1, finished_xor ^ crc
            if after is None:
                continue
            row = codec.sealed(codec.job_row(after))
            crc = row[-1]
            if after.status in LIVE:
                live, live_xor = live + 1, live_xor ^ crc
                self._keep_checksum(after, crc)
            else:
                finished, finished_xor = finished + 1, finished_xor ^ crc
            sql, values = self._insert(after) if before is None else self._update(before, after)
            (new if before is None else changed)[sql].append(values(row))
        for sql, many in changed.items():
            self._each_row(sql, many)
        for sql, many in new.items():
            self._conn.executemany(sql, many)
        return live, live_xor, finished, finished_xor

    def _each_row(self, sql: str, many: Sequence[Row]) -> None:
        """Run `sql` for each; every one has to find its row."""
        if self._conn.executemany(sql, many).rowcount != len(many):
            raise RowsMissing("a job that is in memory has no row on the disk")

    def _checksum(self, job: Job) -> int:
        kept = self._checksums.pop(job.seq, None)
        return kept[1] if kept is not None and kept[0] == job else codec.checksum(codec.job_row(job))

    def _keep_checksum(self, job: Job, crc: int) -> None:
        if len(self._checksums) >= KEEP_CHECKSUMS:
            self._checksums.clear()
        self._checksums[job.seq] = (job, crc)

    # A statement names only the columns that it has to: each value costs time. What is not named in an INSERT is null;
    # an UPDATE that leaves status and expires_at alone touches no index. What has changed is told by the parts of a job
    # that are other objects than before, which takes half the time of comparing all columns. A part that is the same
    # object cannot have changed, as jobs and their parts are frozen; an equal one that is another is written once more.

    def _insert(self, job: Job) -> Statement:
        """What inserts the row of `job`."""
        shape = bytes(map(is_not, astuple(job), repeat(None)))
        return self._statements.get(shape) or self._keep_statement(shape, _inserting(shape))

    def _update(self, before: Job, after: Job) -> Statement:
        """What makes the row of `after` of that of `before`."""
        parts = astuple(after)
        changed = bytes(map(is_not, astuple(before), parts))
        shape = changed, bytes(map(is_not, compress(parts, changed), repeat(None)))
        return self._statements.get(shape) or self._keep_statement(shape, _updating(*shape))

    def _keep_statement(self, shape: Any, statement: Statement) -> Statement:
        if len(self._statements) >= _SHAPES:
            self._statements.clear()
        self._statements[shape] = statement
        return statement

    def _delete(self, gone: list[tuple[int, str, int]], on_disk: list[Row]) -> None:
        """`on_disk` are those that this batch has not made itself."""
        self._each_row("DELETE FROM jobs WHERE seq = ?", on_disk)
        for table in ("payloads", "suspects"):
            self._conn.executemany(f"DELETE FROM {table} WHERE job_seq = ?", on_disk)
        self._conn.executemany("INSERT INTO deleted_jobs (job_seq, id, at) VALUES (?, ?, ?)", gone)


def _inserting(there: bytes) -> Statement:
    """Inserts the columns of the parts that are `there`."""
    columns = _columns(compress(_PARTS, there))
    return insert("jobs", columns), _values(columns)


def _updating(changed: bytes, there: bytes) -> Statement:
    """Sets the columns of the parts that have `changed`: to null those of parts that are not `there` any more."""
    parts = list(compress(_PARTS, changed))
    columns = _columns(compress(parts, there))
    gone = [column for part, is_there in zip(parts, there, strict=True) if not is_there for column in JOB_FIELDS[part]]
    settings = [*(f"{column} = ?" for column in columns), *(f"{column} = NULL" for column in gone)]
    return f"UPDATE jobs SET {', '.join(settings)} WHERE seq = ?", _values([*columns, "seq"])


def _columns(parts: Iterable[str]) -> list[str]:
    return [*(column for part in parts for column in JOB_FIELDS[part]), "crc"]


def _values(columns: list[str]) -> Callable[[Row], Row]:
    """Picks the values of `columns` out of a whole row."""
    return itemgetter(*map((*JOB_COLUMNS, "crc").index, columns))
