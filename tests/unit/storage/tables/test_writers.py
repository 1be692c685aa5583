"""Writes of job rows: the statements, and the cached payloads."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.model.events import Event
from jobd.model.job import packed
from jobd.model.storage import BadRows, Batch
from jobd.storage import codec
from jobd.storage.codec import checksum, job_row
from jobd.storage.database import BY_SEQ
from jobd.storage.startup import connect, start
from jobd.storage.tables import writers
from jobd.storage.tables.projection import Projection
from tests.support.factories import ChangeFactory
from tests.support.store_files import job_of


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[Projection]:
    path = str(tmp_path / "jobd.db")
    conn = connect(path, "FULL")
    yield start(conn, path)[0]
    conn.close()


def write(tables: Projection, batch: Batch) -> dict[int, bytes]:
    payloads = tables.append(batch, 0)
    tables.project()
    return payloads


def statements(tables: Projection, maker: ChangeFactory, *changes: Event) -> list[str]:
    """Return the statements on the table of jobs for `changes`."""
    statement: list[str] = []
    tables.db.conn.set_trace_callback(statement.append)
    write(tables, maker.batch(list(changes)))
    tables.db.conn.set_trace_callback(None)
    return [sql for sql in statement if sql.startswith(("UPDATE jobs", "INSERT INTO jobs"))]


def row_of(tables: Projection, seq: int) -> tuple[object, ...]:
    (row,) = tables.db.rows(BY_SEQ, (seq,))
    return row


def test_the_checksum_of_a_recently_written_job_is_cached(tables: Projection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if memory kept the job in packed form and expands it to another object."""
    maker = ChangeFactory()
    first = maker.create()
    write(tables, maker.batch([first]))
    short = packed(job_of(first))
    assert short is not None
    grant = maker.grant(short.expand())
    assert grant.before is not first.after
    with monkeypatch.context() as now:
        now.delattr(codec, "checksum")
        write(tables, maker.batch([grant]))
        write(tables, maker.batch([maker.finish(job_of(grant))]))
    assert tables.db.totals == (0, 0, 1, checksum(job_row(maker.jobs[1])))


def test_an_update_of_the_body_changes_no_index(maker: ChangeFactory, tables: Projection) -> None:
    first = maker.create()
    (statement,) = statements(tables, maker, first)
    assert statement.startswith("INSERT INTO jobs ")
    (statement,) = statements(tables, maker, maker.grant(job_of(first)))
    assert "SET status = " in statement
    (statement,) = statements(tables, maker, maker.progress(maker.jobs[1], 5))
    assert statement.startswith("UPDATE jobs SET body = ")
    assert "status" not in statement
    (statement,) = statements(tables, maker, maker.finish(maker.jobs[1]))
    assert "SET status = " in statement
    job = maker.jobs[1]
    assert row_of(tables, 1) == (*job_row(job), checksum(job_row(job)))


@pytest.mark.parametrize("order", [(None, "m"), ("m", None)])
def test_removed_and_added_parts_are_both_written(tables: Projection, order: tuple[str | None, ...]) -> None:
    """The same parts change: to nothing in one job, to a value in the other."""
    maker = ChangeFactory()
    created = [maker.create(progress_message="n" if message is None else None) for message in order]
    write(tables, maker.batch(created))
    for change, message in zip(created, order, strict=True):
        after = maker.update(job_of(change), progress_message=message)
        write(tables, maker.batch([after]))
        row = job_row(job_of(after))
        assert row_of(tables, change.job_seq) == (*row, checksum(row))


def test_a_record_from_before_the_start_does_not_create_a_missing_row(maker: ChangeFactory, tables: Projection) -> None:
    grant = replace(maker.grant(job_of(maker.create())), before=None)
    tables.project()
    write(tables, maker.batch([grant]))
    assert tables.db.rows(BY_SEQ, (1,)) == []
    assert tables.db.quarantined == {"job-1": "its row is missing"}


def test_a_rolled_back_batch_leaves_no_cached_payload(maker: ChangeFactory, tables: Projection) -> None:
    write(tables, maker.batch([maker.create()]))
    back = maker.snapshot()
    with pytest.raises(BadRows):
        write(tables, maker.batch([maker.grant(maker.jobs[1])], payloads=[99]))
    back()
    write(tables, maker.batch([maker.finish(maker.jobs[1], "cancelled")]))
    job = maker.jobs[1]
    assert row_of(tables, 1) == (*job_row(job), checksum(job_row(job)))
    assert tables.db.totals == (0, 0, 1, checksum(job_row(job)))


@pytest.mark.parametrize("limit", ["KEEP_ROWS", "KEEP_PAYLOAD_BYTES"])
def test_the_payload_cache_is_limited(tables: Projection, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(writers, limit, 1)
    maker = ChangeFactory(3)
    for _ in range(20):
        batch = maker.any_batch(15)
        assert write(tables, batch) == {seq: maker.payloads[seq] for seq in batch.payloads}
    cache = tables._jobs
    held: dict[str, Sized] = {"KEEP_ROWS": cache._rows, "KEEP_PAYLOAD_BYTES": cache.payloads}
    assert len(held[limit]) <= 1
    for seq, job in maker.jobs.items():
        assert row_of(tables, seq) == (*job_row(job), checksum(job_row(job)))
    write(tables, maker.batch([], payloads=list(maker.payloads)))
