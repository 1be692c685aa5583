"""Writes of the tables that belong to no batch: each is a record first, and survives a kill before its slice."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from msgspec.structs import replace

from jobd.model.storage import AuditEntry, DiskFull, FiguresWrite, OutboxWrite, Tombstone, TombstoneWrite
from jobd.model.webhooks import Delivery, WebhookCursor
from jobd.storage import codec, outbox, queries
from jobd.storage.events import event_queries, event_rows
from jobd.storage.startup import connect, start
from jobd.storage.tables import table_writes
from jobd.storage.tables.projection import Projection
from tests.support.factories import NOW, ChangeFactory
from tests.support.projection_harness import fail_commits
from tests.support.store_files import job_of, stored_events

CURSOR = WebhookCursor("e", 7, 7, 3, {"stuck_jobs": NOW}, NOW)
DELIVERY = Delivery(2, "e", "waiting", "jobs/a", "job.failed", "evt_2", 2, NOW, NOW, 0, None, None, None, b"{}")
GONE = Tombstone(1, "a", "key", NOW, NOW)


def opened(path: str) -> Projection:
    return start(connect(path, "FULL"), path)[0]


def written(path: str) -> Projection:
    """Return a store with every kind of write in its tail."""
    projection, maker = opened(path), ChangeFactory()
    created = [maker.create(id_) for id_ in "abc"]
    deleted = maker.delete(job_of(created[1]))
    audit = [AuditEntry(NOW, "eve", "", "pause"), AuditEntry(NOW, "eve", "", "resume")]
    projection.append(maker.batch([*created, deleted], tombstones=[GONE, replace(GONE, job_seq=3)], audit=audit), 0)
    projection.project()
    maker.now += 1_000
    pruning, pruned = table_writes.plan_pruning(projection.db, maker.now + 1_000, 100)
    trimming, trimmed = table_writes.plan_trimming(projection.db, NOW + 1, 100)
    assert (pruned, trimmed) == (1, 1)
    assert pruning is not None
    assert trimming is not None
    later = replace(GONE, job_seq=3, due_at=NOW + 9, tries=1)
    planned = (TombstoneWrite([1], [later]), pruning, trimming)
    for write in (FiguresWrite(b"1"), OutboxWrite([CURSOR], [DELIVERY]), *planned):
        projection.append(write)
    assert projection.behind == 5
    return projection


def check(projection: Projection) -> None:
    db = projection.db
    assert db.conn.execute("SELECT body FROM figures").fetchall() == [(b"1",)]
    assert outbox.by_ids(db, [2]) == [DELIVERY]
    (_, (found, unwritten)) = outbox.plan_opening(db, ["e"], NOW)
    assert found.cursors == unwritten.cursors == {"e": CURSOR}
    assert [each.job_seq for each, _ in queries.due_tombstones(db, NOW + 9, 9).found] == [3]
    assert queries.due_tombstones(db, NOW + 8, 9).found == []
    assert [event.job_id for event in event_queries.events_after(db, 0, 9).events] == ["a", "c"]
    assert db.gone_to == 4
    assert db.conn.execute("SELECT count(*) FROM deleted_jobs").fetchone() == (0,)
    assert db.conn.execute("SELECT what FROM audit").fetchall() == [("resume",)]


def test_writes_are_in_the_tables_after_their_slice(path: str) -> None:
    projection = written(path)
    projection.project()
    check(projection)
    projection.db.conn.close()


def test_writes_survive_a_kill_before_their_slice(path: str) -> None:
    projection = written(path)
    last = projection.last
    projection.db.conn.close()
    projection = opened(path)
    assert projection.last == last
    check(projection)
    projection.db.conn.close()


def test_the_outbox_is_read_with_its_pending_writes_only(path: str) -> None:
    projection = opened(path)
    projection.append(FiguresWrite(b"1"))
    assert projection.read_outbox(outbox.by_ids, projection.db, [2]) == []
    assert projection.behind == 1
    projection.append(OutboxWrite([CURSOR], [DELIVERY]))
    assert projection.read_outbox(outbox.by_ids, projection.db, [2]) == [DELIVERY]
    assert projection.behind == 0
    projection.db.conn.close()


def test_a_write_that_does_not_fit_leaves_nothing(path: str) -> None:
    projection = written(path)
    last = projection.last
    fail_commits(projection, sqlite3.SQLITE_FULL)
    with pytest.raises(DiskFull):
        projection.append(OutboxWrite([replace(CURSOR, position=9)]))
    projection.db.before_commit = lambda: None
    assert projection.last == last
    projection.project()
    check(projection)
    projection.db.conn.close()


def test_pruning_stops_within_a_job_and_goes_on_later(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_rows, "SPAN", 1)
    projection, maker = opened(path), ChangeFactory()
    created = [maker.create("a"), maker.create("b")]
    projection.append(maker.batch([*created, *(maker.delete(job_of(each)) for each in created)]), 0)
    projection.project()
    for limit, count, left in ((1, 1, 2), (2, 2, 1), (5, 1, 0), (5, 0, 0)):
        assert pruned(projection, NOW + 10_000, limit) == count
        assert projection.db.conn.execute("SELECT count(*) FROM deleted_jobs").fetchone() == (left,)
    projection.db.conn.close()


def queue_events_of_a_clock_that_was_ahead(path: str, ahead: int, old: int) -> Projection:
    projection, maker = opened(path), ChangeFactory()
    maker.now = 10 * NOW
    projection.append(maker.batch([maker.queue_event("video", True) for _ in range(ahead)]), 0)
    maker.now = NOW
    projection.append(maker.batch([maker.queue_event("video", True) for _ in range(old)]), 0)
    projection.project()
    return projection


def pruned(projection: Projection, before: int, limit: int) -> int:
    """Prune once. Return how many rows were deleted."""
    write, count = table_writes.plan_pruning(projection.db, before, limit)
    if write is not None:
        projection.append(write)
        projection.project()
    return count


@pytest.mark.parametrize("ahead", [5, 10, 12, 30])
def test_pruning_goes_on_behind_events_of_a_clock_that_was_ahead(path: str, ahead: int) -> None:
    projection = queue_events_of_a_clock_that_was_ahead(path, ahead, 25)
    counts = [pruned(projection, NOW + 1, 10) for _ in range(10)]
    assert sum(counts) == 25
    assert max(counts) <= 10
    assert stored_events(projection.db.conn)[-1].seq == ahead
    assert pruned(projection, 10 * NOW + 1, ahead) == ahead
    projection.db.conn.close()


def test_a_pass_reads_a_bounded_number_of_events(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    projection = queue_events_of_a_clock_that_was_ahead(path, 100, 1)
    read: list[int] = []
    first_rows = event_queries.first_rows

    def counted(*args: Any) -> list[codec.Row]:
        rows = first_rows(*args)
        read.append(len(rows))
        return rows

    monkeypatch.setattr(event_queries, "first_rows", counted)
    counts = [pruned(projection, NOW + 1, 10) for _ in range(10)]
    assert counts == [0] * 9 + [1]
    assert max(read) <= 10
    assert len(read) == 20
    projection.db.conn.close()


def test_a_damaged_time_prunes_no_event_of_a_queue(path: str) -> None:
    projection = queue_events_of_a_clock_that_was_ahead(path, 12, 0)
    db = projection.db
    db.conn.execute("UPDATE events SET at = 1 WHERE seq = 12")
    assert pruned(projection, NOW + 1, 10) == 0
    assert db.faults == ["events 12: its checksum is wrong; the row was quarantined"]
    db.conn.close()
