"""Check a closed store: the offline doctor finds nothing, and the journal folds to the rows.

Rows are read with the daemon's codec. The checks are independent.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from jobd.journal import event_codec
from jobd.journal.sqlite import SqliteJournal
from jobd.model.events import Event, fold
from jobd.model.job import Job
from jobd.storage import codec, store_file
from jobd.storage.codec import SQL
from jobd.storage.events import event_rows
from jobd.storage.offline import doctor
from jobd.storage.tables.tail import read_tail


@dataclass
class StoreContents:
    """All rows by job id, the `tokens` of all grants in the journal, in order, and the events of its `tail`."""

    jobs: dict[str, Job] = field(default_factory=dict)
    payloads: dict[str, Any] = field(default_factory=dict)
    events: dict[str, list[Event]] = field(default_factory=dict)
    tokens: dict[int, str] = field(default_factory=dict)
    tail: int = 0


def checked_contents(path: str | Path) -> StoreContents:
    """Return the contents of a store. Raise AssertionError if anything is wrong."""
    problems = doctor.check(str(path))
    assert not problems, f"the doctor finds: {[f'{one.where}: {one.what}' for one in problems[:5]]}"
    return contents(path)


def contents(path: str | Path) -> StoreContents:
    """Read and compare everything: each journal folds to its row, tokens increase, only processing jobs have locks."""
    found = StoreContents()
    reader = codec.JobReader()
    with store_file.read_only(str(path)) as conn:
        for row in conn.execute(f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED"):
            job = reader.job(row)
            found.jobs[job.id] = job
        by_seq = {job.seq: job.id for job in found.jobs.values()}
        for seq, body in conn.execute("SELECT job_seq, body FROM payloads"):
            found.payloads[by_seq[seq]] = msgspec.json.decode(body)
        rows = conn.execute(f"SELECT {SQL['events']} FROM events NOT INDEXED").fetchall()
        for event in sorted(chain.from_iterable(map(event_rows.unpack, rows))):
            _note(found, event_codec.decode(event))
        _fold_tail(found, conn)
    _compare(found)
    return found


def _fold_tail(found: StoreContents, conn: sqlite3.Connection) -> None:
    """Add what a kill left in the journal and not in the tables."""
    (projected_to,) = conn.execute("SELECT projected_to FROM meta").fetchone()
    tail = read_tail(SqliteJournal(conn, conn.execute), projected_to)
    assert tail.error is None, tail.error
    found.tail = sum(len(each.events) for each in tail.pending)
    for event in (event for pending in tail.pending for event in pending.batch.changes):
        # The tables store what is set here beside the event.
        _note(found, replace(event, payload=None, request_hash=None, late=None))
        if event.job_seq == 0:
            continue
        job = fold(found.jobs.get(event.job_id), event)
        if job is None:
            del found.jobs[event.job_id], found.payloads[event.job_id]
            continue
        found.jobs[job.id] = job
        if event.payload is not None:
            found.payloads[job.id] = msgspec.json.decode(event.payload)


def _note(found: StoreContents, event: Event) -> None:
    if event.job_seq == 0:
        return
    found.events.setdefault(event.job_id, []).append(event)
    if event.type == "granted":
        assert event.grant is not None
        token = event.grant.fencing_token
        last = next(reversed(found.tokens), 0)
        assert token > last, f"token {token} of {event.job_id} was given after {last}"
        found.tokens[token] = event.job_id


def _compare(found: StoreContents) -> None:
    for job_id, job in found.jobs.items():
        row: Job | None = None
        for event in found.events.get(job_id, []):
            row = fold(row, event)
        assert row == job, f"the journal of {job_id} says {row}, its row is {job}"
        held = job.grant is not None and job.deadlines is not None
        assert held == (job.status == "processing"), f"{job_id} is {job.status} and its grant is {job.grant}"
