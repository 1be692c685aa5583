"""Fold the journal again, and compare the result with the rows of jobs. Writes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

from msgspec.structs import astuple

from jobd.journal import event_codec
from jobd.model.events import Event, fold
from jobd.model.job import Job
from jobd.storage.codec import SQL, JobReader, Row, Unreadable, fault
from jobd.storage.database import lenient_text, readable
from jobd.storage.events import event_rows
from jobd.storage.tables.tail import Pending

_JOBS: Final = f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED ORDER BY seq"
_EVENTS: Final = f"SELECT {SQL['events']} FROM events WHERE job_seq = ? ORDER BY seq"
_STATUS: Final = "SELECT status FROM jobs NOT INDEXED WHERE seq = ?"


def differences(conn: sqlite3.Connection, tail: Iterable[Pending]) -> Iterator[tuple[str, str]]:
    """Yield the id of each job whose row is not what its events give, and the difference. Reads all jobs and events.

    Damaged rows are left out. The events of `tail` are compared with the status of their job.
    """
    reader = JobReader()
    with lenient_text(conn):
        for row in conn.execute(_JOBS):
            try:
                job = None if fault(row) is not None else reader.job(row)
            except Unreadable:
                job = None
            if job is not None and (difference := _compare(job, conn.execute(_EVENTS, (job.seq,)).fetchall())):
                yield job.id, difference
        yield from _compare_tail(conn, tail)


def _compare(job: Job, rows: list[Row]) -> str:
    """Return how `job` differs from the job that its events give; an empty string if it does not."""
    folded: Job | None = None
    for row in rows:
        if (error := event_rows.fault(row)) is not None:
            return f"its events {row[0]} to {row[1]} are damaged ({error}), so its events cannot be folded"
    for event in map(event_codec.decode, chain.from_iterable(map(event_rows.unpack, rows))):
        if folded is None and event.from_status is not None:
            return f"there is no event before its event {event.seq}, so its events cannot be folded"
        folded = fold(folded, event)
    if folded is None:
        return "it has no events" if not rows else "its last event says that it was deleted"
    pairs = zip(Job.__struct_fields__, astuple(job), astuple(folded), strict=True)
    return "; ".join(_field(name, value, expected) for name, value, expected in pairs if value != expected)


def _field(name: str, value: object, expected: object) -> str:
    """Describe a field that differs. Parts of a job may have a lock id, which is a secret."""
    if isinstance(value, str | int | float | None) and isinstance(expected, str | int | float | None):
        return f"{name} is {value!r}, but its events give {expected!r}"
    return f"{name} is not what its events give"


def _compare_tail(conn: sqlite3.Connection, tail: Iterable[Pending]) -> Iterator[tuple[str, str]]:
    statuses: dict[int, str | None] = {}
    hidden = {seq for (seq,) in conn.execute("SELECT seq FROM quarantined_jobs")}
    for record, event in ((pending.number, event) for pending in tail for event in pending.batch.changes):
        seq = event.job_seq
        if seq == 0 or seq in hidden:
            continue
        if seq not in statuses:
            row = conn.execute(_STATUS, (seq,)).fetchone()
            statuses[seq] = None if row is None else row[0]
        if statuses[seq] != event.from_status:
            yield event.job_id, _unexpected(record, event, statuses[seq])
            hidden.add(seq)
        statuses[seq] = event.to_status


def _unexpected(record: int, event: Event, status: str | None) -> str:
    expected = "a new job" if event.from_status is None else f"a {event.from_status} job"
    found = "it has no row" if status is None else f"it is {readable(status)}"
    return f"event {event.seq} in record {record} of the journal is about {expected}, but {found}"
