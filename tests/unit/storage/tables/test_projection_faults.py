"""The journal and the tables behind it when the disk is full, the process is killed, or a record is damaged.

The tables are compared with batches that were folded in memory (tests/support/memory_tables.py).
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
from msgspec.structs import replace

from jobd.journal import record
from jobd.model.events import Event
from jobd.model.job import Job
from jobd.model.journal import BadRecord, Record
from jobd.model.storage import AuditEntry, AuditQuery, DiskFull, LateResultQuery, StoredResponse, Tombstone
from jobd.storage import startup
from jobd.storage.backup import finish_copy
from jobd.storage.files import StoreBroken, write_epoch
from jobd.storage.startup import connect, start
from jobd.storage.store import Store
from jobd.storage.tables import projection as projections
from jobd.storage.tables.projection import Projection
from tests.support.factories import OPTIONS, ChangeFactory, as_recorded
from tests.support.memory_tables import MemoryTables
from tests.support.projection_harness import EVERYTHING, Writer, content_of, differences, fail_commits
from tests.support.store_files import flip, job_of, leave_tail, open_store, remove, remove_quarantined


def restarted(path: str) -> MemoryTables:
    """Return the content of a store that is opened after its process was killed."""
    conn = connect(path, "FULL")
    try:
        projection, found = start(conn, path)
        assert found.faults == []
        return content_of(projection.db, found)
    finally:
        conn.close()


def read_now(projection: Projection) -> MemoryTables:
    """Return the content of an open store, as a read of history has it."""
    db = projection.db
    return projection.read(lambda: content_of(db, startup._read_all(db)))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "SLICE_EVENTS", 10)
    monkeypatch.setattr(projections, "BATCHES_PER_SLICE", 0)


@pytest.fixture
def opened(path: str) -> Iterator[Projection]:
    conn = connect(path, "FULL")
    yield start(conn, path)[0]
    conn.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_crash_at_any_moment_keeps_every_acknowledged_batch(
    opened: Projection, path: str, tmp_path: Path, seed: int
) -> None:
    """Copies of the files at many statements are opened, as after a kill."""
    writer, dice = Writer(seed), Random(seed)
    states = [writer.tables.copy_tables()]
    images: list[tuple[str, int]] = []

    def copy_files(statement: str) -> None:
        if statement.startswith(("BEGIN", "COMMIT", "INSERT INTO journal", "UPDATE meta")) or dice.random() < 0.02:
            target = tmp_path / f"image-{len(images)}"
            target.mkdir()
            for name in (path, f"{path}-wal", f"{path}.epoch"):
                shutil.copy(name, target)
            images.append((str(target / Path(path).name), len(states) - 1))

    opened.db.conn.set_trace_callback(copy_files)
    for _ in range(12):
        writer.write(opened)
        states.append(writer.tables.copy_tables())
        if dice.random() < 0.3:
            opened.project()
    opened.db.conn.set_trace_callback(None)
    for image, acknowledged in images:
        assert differences(states[acknowledged], restarted(image)) == [], f"{image} after {acknowledged} batches"


def test_too_many_pending_records_stop_the_next_append(opened: Projection, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(0)
    monkeypatch.setattr(projections, "MAX_BEHIND", 5)
    while opened.behind < 5:
        writer.write(opened)
    with monkeypatch.context() as full:
        full.setattr(opened.db, "commit", pytest.fail)
        full.setattr(opened, "project_slice", lambda: raise_full())
        with pytest.raises(DiskFull):
            opened.append(writer.maker.batch([]), 0)
    opened.append(writer.maker.batch([]), 0)
    assert opened.behind == 1


@pytest.mark.parametrize("place", ["the row", "the id", "the first event too", "no row"])
@pytest.mark.parametrize("story", ["progress", "finish", "delete"])
def test_a_row_that_is_damaged_when_its_job_changes_is_written_again(
    opened: Projection, place: str, story: str
) -> None:
    """Memory has the job. No acknowledged change of it may be lost."""
    maker, db = ChangeFactory(), opened.db
    opened.append(maker.batch([maker.create("a"), maker.grant(maker.jobs[1]), maker.create("b")]), 0)
    opened.project()
    db.on_rollback()  # clears the cache of rows
    if place == "no row":
        db.conn.execute("DELETE FROM jobs WHERE seq = 1")
    else:
        column = "created_at = created_at + 1" if place == "the row" else "id = 'c'"
        db.conn.execute(f"UPDATE jobs SET {column} WHERE seq = 1")
    if place == "the first event too":
        db.conn.execute("UPDATE events SET at = at + 1 WHERE seq = 1")
    if story == "delete":
        opened.append(maker.batch([maker.finish(maker.jobs[1])]), 0)
    change: Callable[[Job], Event] = getattr(maker, story)
    opened.append(maker.batch([change(maker.jobs[1])]), 0)
    content = read_now(opened)
    assert content.jobs == maker.jobs
    assert content.queues == maker.queues
    assert db.quarantined == {}
    assert (
        sum(fault.startswith("job a: its ") and fault.endswith("written again from memory") for fault in db.faults) == 1
    )
    sums = db.conn.execute("SELECT count(*) FROM jobs WHERE status IN ('queued', 'processing')").fetchone()
    assert db.totals[0] == sums[0]


def raise_full() -> None:
    raise DiskFull("full")


@pytest.mark.parametrize("act", ["append", "slice"])
def test_a_commit_of_unknown_outcome_breaks_the_store(opened: Projection, act: str) -> None:
    writer = Writer(0)
    writer.write(opened)
    fail_commits(opened, sqlite3.SQLITE_IOERR_FSYNC)
    with pytest.raises(sqlite3.OperationalError):
        writer.write(opened) if act == "append" else opened.project()
    opened.db.before_commit = lambda: None
    with pytest.raises(StoreBroken):
        opened.append(writer.batch(), 0)
    with pytest.raises(StoreBroken):
        opened.read(lambda: None)


@pytest.mark.parametrize("seed", range(20))
def test_any_part_of_a_record_is_rejected(seed: int) -> None:
    """A record that was cut off, or that a later version wrote."""
    writer = Writer(seed)
    for _ in range(5):
        batch = writer.batch()
        body, events = record.encode(batch)
        made = Record(1, 1, 1, 1, 0, body)
        decoded, _ = record.decode(made)
        assert decoded.changes == list(map(as_recorded, batch.changes))
        assert len(events) == len(batch.changes)
        for length in (0, 1, len(body) // 2, len(body) - 1):
            with pytest.raises(BadRecord):
                record.decode(replace(made, body=body[:length]))
        with pytest.raises(BadRecord, match="has format 4"):
            record.decode(replace(made, body=b"\x04" + body[1:]))


READS: Final[dict[str, Callable[[Store], Awaitable[Any]]]] = {
    "load by id": lambda store: store.load(["a"], [], []),
    "load by number": lambda store: store.load([], [1, 2], []),
    "load by key": lambda store: store.load([], [], ["digest"]),
    "find_jobs": lambda store: store.find_jobs(EVERYTHING),
    "timeline": lambda store: store.timeline(1),
    "read_late_results": lambda store: store.read_late_results([LateResultQuery(1, with_results=True)]),
    "count_late_results": lambda store: store.count_late_results([1]),
    "events_after": lambda store: store.events_after(0, 100),
    "expired_jobs": lambda store: store.expired_jobs(1 << 60, 100),
    "reports": lambda store: store.reports(10),
    "read_audit": lambda store: store.read_audit(AuditQuery()),
    "due_tombstones": lambda store: store.due_tombstones(1 << 60, 10),
}


@pytest.mark.parametrize("name", READS)
async def test_a_read_has_everything_that_was_committed(store: Store, name: str) -> None:
    maker, read = ChangeFactory(), READS[name]
    await store.write(maker.batch([maker.create("a"), maker.create("b"), maker.create("c")]))
    await store.finish_upkeep()
    before = await read(store)
    granted = maker.grant(maker.jobs[1])
    finished = maker.finish(job_of(granted))
    late = maker.late(job_of(finished), 1 << 41)
    ended = maker.finish(maker.jobs[3], "cancelled")
    batch = maker.batch([granted, finished, late, ended, maker.delete(job_of(ended))], report=b"{}")
    batch.keys = [StoredResponse("digest", "body", maker.now, 201, b"{}")]
    batch.audit = [AuditEntry(maker.now, "admin", "", "pause")]
    batch.tombstones = [Tombstone(3, "c", "key", maker.now, maker.now)]
    payloads, maker.payloads[1] = dict(maker.payloads), b"1"
    await store.write(batch)
    shown = await read(store)
    await store.finish_upkeep()
    assert shown == await read(store)
    assert shown != before or name == "load by number"
    assert payloads


async def test_a_job_quarantined_before_a_slice_is_not_counted_by_it(maker: ChangeFactory, path: str) -> None:
    async with open_store(path) as (store, _):
        first, second = maker.create("a", options=OPTIONS[1]), maker.create("b", options=OPTIONS[1])
        await store.write(maker.batch([first, second, maker.finish(job_of(first))]))
    flip(path, "jobs", "created_at", "seq", 1)
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.finish(job_of(second))]))
        assert list((await store.load(["a"], [], [])).bad) == ["a"]
    remove_quarantined(maker, maker.jobs[1])
    async with open_store(path) as (store, found):
        assert found.queues == maker.queues


async def test_tombstones_written_at_the_start_are_reported_once(maker: ChangeFactory, path: str) -> None:
    conn = connect(path, "FULL")
    projection, _ = start(conn, path)
    projection.append(maker.batch([], tombstones=[Tombstone(1, "a", "key", maker.now, maker.now)]), 0)
    conn.close()
    async with open_store(path) as (store, found):
        reported: list[int] = []
        store.on_tombstones = reported.append
        assert found.tombstones == 1
        await store.find_jobs(EVERYTHING)
        assert reported == []


async def test_tombstones_that_the_start_could_not_write_are_reported_later(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = ChangeFactory()
    await leave_tail(path, maker.batch([], tombstones=[Tombstone(1, "a", "key", maker.now, maker.now)]))
    with monkeypatch.context() as full:
        full.setattr(Projection, "project", lambda self: raise_full())
        store, found = await Store.open(path)
    async with store:
        reported: list[int] = []
        store.on_tombstones = reported.append
        await store.find_jobs(EVERYTHING)
        assert found.tombstones + sum(reported) == 1


@pytest.mark.parametrize("restore", [finish_copy, lambda path: write_epoch(path, 100)])
def test_a_restored_store_is_marked_although_its_journal_removed_a_mark(
    opened: Projection, path: str, restore: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has a record that removed an earlier mark, and its tables lack it also after the first start."""
    opened.append(replace(Writer(0).batch(), unmark=True), 0)
    opened.db.conn.close()
    restore(path)
    monkeypatch.setattr(Projection, "project", lambda self: raise_full())
    for _ in range(2):
        conn = connect(path, "FULL")
        _, found = start(conn, path)
        conn.close()
        assert found.marked


def test_an_epoch_that_began_before_a_crash_ends_no_grant(opened: Projection, path: str) -> None:
    """The epoch file was lost, and the tables lack a record of the epoch before."""
    Writer(0).write(opened)
    opened.db.conn.close()
    remove(f"{path}.epoch")
    conn = connect(path, "FULL")
    projection = Projection(startup.read_meta(conn, path))
    projection.read_tail(path)
    startup._choose_epoch(projection, path)
    begun = projection.db.numbers
    conn.close()
    tables = restarted(path)
    assert (tables.marked, tables.numbers) == (0, begun)


@pytest.mark.parametrize("story", ["finished", "finished later", "reset", "deleted", "live"])
def test_the_counts_after_a_start_do_not_include_a_job_that_it_quarantines(
    opened: Projection, path: str, story: str
) -> None:
    """The damaged row has an older status than the records that the tables lack."""
    maker = ChangeFactory()
    opened.append(maker.batch([maker.create(name, options=OPTIONS[1]) for name in "ab"]), 0)
    if story in ("reset", "deleted"):
        opened.append(maker.batch([maker.finish(maker.jobs[1])]), 0)
    opened.project()
    opened.db.on_rollback()  # clears the cache of rows
    opened.db.conn.execute("UPDATE jobs SET created_at = created_at + 1 WHERE seq = 1")
    opened.append(maker.batch([maker.finish(maker.jobs[2])]), 0)
    if story == "finished later":
        opened.append(maker.batch([maker.grant(maker.jobs[1])]), 0)
    changes = {"reset": maker.requeue, "deleted": maker.delete, "live": maker.grant}
    last = changes.get(story, maker.finish)(maker.jobs[1])
    opened.append(maker.batch([last]), 0)
    if last.after is not None:
        remove_quarantined(maker, job_of(last))
    opened.db.conn.close()
    conn = connect(path, "FULL")
    projection, found = start(conn, path)
    (aside,) = projection.db.recently_quarantined.values()
    conn.close()
    assert aside.uncounted == (("video", "completed") if story.startswith("finished") else None)
    assert found.queues == maker.queues
