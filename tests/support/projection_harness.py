"""Random batches for a store, and the content of a store in the form of `memory_tables.py`."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from random import Random
from typing import Final

from msgspec.structs import replace

from jobd.model.job import Result
from jobd.model.storage import AuditEntry, AuditQuery, Batch, JobQuery, LateResultQuery, OpenedStore, Tombstone
from jobd.storage import outbox, queries
from jobd.storage.database import Database
from jobd.storage.events import event_queries
from jobd.storage.tables.projection import Projection
from tests.support.factories import ChangeFactory
from tests.support.memory_tables import MemoryTables

EVERYTHING: Final = JobQuery(limit=10_000, scan=10_000)


class Writer:
    """Makes random batches. `tables` is what a store must have after those that were written."""

    def __init__(self, seed: int) -> None:
        self.maker = ChangeFactory(seed)
        self.dice = Random(seed)
        self.tables = MemoryTables()
        self._token = 1 << 40

    def batch(self) -> Batch:
        """Return a batch that may contain everything that a batch can contain."""
        maker, dice = self.maker, self.dice
        batch = maker.any_batch(dice.randrange(8))
        batch.payloads = []
        if maker.jobs and dice.random() < 0.3:
            self._token += 1
            job = dice.choice(list(maker.jobs.values()))
            change = maker.late(job, self._token, Result(storage_key=f"late-{self._token}"))
            batch.changes.append(change)
            batch.numbers = maker.numbers
        for event in iter(batch.changes):
            if event.type == "deleted":
                batch.tombstones.append(Tombstone(event.job_seq, event.job_id, event.job_id, event.at, event.at))
        batch.sweeps = True
        if dice.random() < 0.3:
            batch.changes.append(maker.quiet_event(dice.choice("qrs"), dice.random() < 0.3))
            batch.changes.append(maker.schedule_event(dice.choice("stu"), dice.choice(("put", "skipped", "deleted"))))
            batch.numbers = maker.numbers
        if dice.random() < 0.3:
            batch.audit = [
                AuditEntry(maker.now, "admin", "", "pause", details={"n": dice.random()}, changed_ids=["a", "b"])
            ]
        if dice.random() < 0.3:
            batch.report = b"%d" % dice.randrange(1_000)
        return batch

    def write(self, projection: Projection) -> None:
        batch = self.batch()
        projection.append(batch, 0)
        self.tables.apply(batch)


def content_of(db: Database, found: OpenedStore) -> MemoryTables:
    """Return the content of a store."""
    tables = MemoryTables(found.numbers)
    page = queries.find_jobs(db, EVERYTHING)
    keys = [*(job.seq for job, _ in page.jobs), *page.bodies]
    loaded = queries.load(db, [], keys, [key.digest for key in found.keys])
    assert page.bodies == {key: loaded.payloads[key].body for key in page.bodies}
    tables.payloads |= {key: loaded.payloads[key] for key in page.bodies}
    for job, body in reversed(page.jobs):
        tables.jobs[job.seq], tables.ids[job.id] = job, job.seq
        tables.payloads[job.seq] = loaded.payloads[job.seq]
        assert loaded.payloads[job.seq].body == body
    tables.events = event_queries.events_after(db, 0, 10_000).events
    requested = [LateResultQuery(seq, with_results=True) for seq in tables.jobs]
    late = queries.read_late_results(db, requested).results
    tables.late_results = {seq: tuple(kept) for seq, kept in late.items() if kept}
    tables.quiet = dict(found.quiet)
    tables.schedules = dict(found.schedules)
    tables.queues, tables.keys, tables.unvalidated = found.queues, loaded.responses, found.unvalidated
    tables.deleted = dict(db.rows("SELECT job_seq, at FROM deleted_jobs"))
    tables.kept_reports.extend(reversed(queries.reports(db, 1_000)))
    tables.tombstones = {each.job_seq: each for each, _ in queries.due_tombstones(db, 1 << 60, 1_000).found}
    changed: defaultdict[int, list[str]] = defaultdict(list)
    for audit_seq, job_id in db.rows("SELECT audit_seq, job_id FROM audit_jobs ORDER BY seq"):
        changed[audit_seq].append(job_id)
    entries = queries.read_audit(db, AuditQuery(limit=1_000)).found
    tables.audited = {seq: replace(entry, changed_ids=changed[seq]) for seq, entry in reversed(entries)}
    tables.figures, tables.marked = found.stats, found.marked
    names = [name for (name,) in db.rows("SELECT name FROM webhooks")]
    tables.cursors = outbox.plan_opening(db, names, 0)[1][0].cursors
    ids = [id_ for (id_,) in db.rows("SELECT id FROM deliveries ORDER BY id")]
    tables.outbox = {each.id: each for each in outbox.by_ids(db, ids)}
    return tables


def differences(expected: MemoryTables, tables: MemoryTables) -> list[str]:
    """Return descriptions of what differs.

    A slice takes the time of the tombstone of a late result from the last event of its job.
    """
    numbers = [] if tables.numbers == expected.numbers else [f"numbers: {tables.numbers} is not {expected.numbers}"]
    expected.late_results = {seq: kept for seq, kept in expected.late_results.items() if kept}
    for seq, tombstone in tables.tombstones.items():
        if seq < 0 and (other := expected.tombstones.get(seq)) is not None and other.at < tombstone.at:
            expected.tombstones[seq] = replace(other, at=tombstone.at, due_at=tombstone.due_at)
    return [*tables.differences(expected), *numbers]


def fail_commits(projection: Projection, code: int) -> None:
    """Let every commit fail with this result code of SQLite."""

    def fail() -> None:
        error = sqlite3.OperationalError("the disk of this test fails")
        error.sqlite_errorcode = code
        raise error

    projection.db.before_commit = fail
