"""Writes of job rows: the columns of each statement, and the cached payloads."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sized
from pathlib import Path

import pytest

from jobd.model.events import Change
from jobd.model.job import compact
from jobd.model.storage import BadRows
from jobd.storage import codec, writers
from jobd.storage.codec import checksum, job_row
from jobd.storage.database import BY_SEQ, Database
from jobd.storage.startup import connect, start
from tests.support.factories import ChangeFactory
from tests.support.store_files import job_of


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    path = str(tmp_path / "jobd.db")
    conn = connect(path, "FULL")
    yield start(conn, path)[0]
    conn.close()


def statements(db: Database, maker: ChangeFactory, *changes: Change) -> list[str]:
    """Return the statements on the table of jobs for `changes`."""
    statement: list[str] = []
    db.conn.set_trace_callback(statement.append)
    db.write(maker.batch(list(changes)), 0)
    db.conn.set_trace_callback(None)
    return [sql for sql in statement if sql.startswith(("UPDATE jobs", "INSERT INTO jobs"))]


def row_of(db: Database, seq: int) -> tuple[object, ...]:
    (row,) = db.rows(BY_SEQ, (seq,))
    return row


def test_the_checksum_of_a_recently_written_job_is_cached(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if memory kept the job in compact form and expands it to another object."""
    maker = ChangeFactory()
    first = maker.create()
    db.write(maker.batch([first]), 0)
    short = compact(job_of(first))
    assert short is not None
    grant = maker.grant(short.expand())
    assert grant.before is not first.after
    with monkeypatch.context() as now:
        now.delattr(codec, "checksum")
        db.write(maker.batch([grant]), 0)
        db.write(maker.batch([maker.finish(job_of(grant))]), 0)
    assert db.totals == (0, 0, 1, checksum(job_row(maker.jobs[1])))


def test_an_update_sets_only_changed_columns(db: Database) -> None:
    maker = ChangeFactory()
    first = maker.create()
    (statement,) = statements(db, maker, first)
    assert "id" in statement
    assert "lock_id" not in statement
    assert "error_code" not in statement
    (statement,) = statements(db, maker, maker.grant(job_of(first)))
    assert "lock_id" in statement
    assert "status" in statement
    assert "queue" not in statement
    assert "created_at" not in statement
    assert "NULL" not in statement
    (statement,) = statements(db, maker, maker.finish(maker.jobs[1]))
    assert "lock_id = NULL" in statement
    assert "ended_lock_id" in statement
    job = maker.jobs[1]
    assert row_of(db, 1) == (*job_row(job), checksum(job_row(job)))


@pytest.mark.parametrize("order", [(None, "m"), ("m", None)])
def test_removed_and_added_parts_are_both_written(db: Database, order: tuple[str | None, ...]) -> None:
    """The same parts change: to nothing in one job, to a value in the other."""
    maker = ChangeFactory()
    created = [maker.create(progress_message="n" if message is None else None) for message in order]
    db.write(maker.batch(created), 0)
    for change, message in zip(created, order, strict=True):
        after = maker.update(job_of(change), progress_message=message)
        db.write(maker.batch([after]), 0)
        row = job_row(job_of(after))
        assert row_of(db, change.event.job_seq) == (*row, checksum(row))


def test_an_update_does_not_create_a_missing_row(db: Database) -> None:
    maker = ChangeFactory()
    grant = maker.grant(job_of(maker.create()))
    with pytest.raises(sqlite3.IntegrityError):
        db.write(maker.batch([grant]), 0)
    assert db.is_broken


def test_a_rolled_back_batch_leaves_no_cached_payload(db: Database) -> None:
    maker = ChangeFactory()
    db.write(maker.batch([maker.create()]), 0)
    back = maker.snapshot()
    with pytest.raises(BadRows):
        db.write(maker.batch([maker.grant(maker.jobs[1])], payloads=[99]), 0)
    back()
    db.write(maker.batch([maker.finish(maker.jobs[1], "cancelled")]), 0)
    job = maker.jobs[1]
    assert row_of(db, 1) == (*job_row(job), checksum(job_row(job)))
    assert db.totals == (0, 0, 1, checksum(job_row(job)))


def test_a_payload_written_twice_counts_once(db: Database) -> None:
    """A transaction that finds a damaged index is rolled back and run again."""
    maker = ChangeFactory()
    changes = [maker.create() for _ in range(3)]
    for end in ("ROLLBACK", "COMMIT"):
        db.conn.execute("BEGIN")
        db._jobs.write(changes, (0, 0, 0, 0))
        db.conn.execute(end)
    cache = db._jobs
    assert cache._payload_bytes == sum(map(len, cache._payloads.values())) > 0


@pytest.mark.parametrize("limit", ["KEEP_CHECKSUMS", "_SHAPES", "KEEP_PAYLOAD_BYTES"])
def test_the_payload_cache_is_limited(db: Database, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(writers, limit, 1)
    maker = ChangeFactory(3)
    for _ in range(20):
        batch = maker.any_batch(15)
        assert db.write(batch, 0) == {seq: maker.payloads[seq] for seq in batch.payloads}
    cache = db._jobs
    held: dict[str, Sized] = {
        "KEEP_CHECKSUMS": cache._checksums,
        "_SHAPES": cache._statements,
        "KEEP_PAYLOAD_BYTES": cache._payloads,
    }
    assert len(held[limit]) <= 1
    for seq, job in maker.jobs.items():
        assert row_of(db, seq) == (*job_row(job), checksum(job_row(job)))
    db.write(maker.batch([], payloads=list(maker.payloads)), 0)
