"""The implementations of the journal: the same behaviour in SQLite and in memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest

from jobd.journal.sqlite import SqliteJournal
from jobd.model.journal import BadRecord, Record
from jobd.storage.schema import migrations
from tests.support.memory_journal import MemoryJournal

Journal = MemoryJournal | SqliteJournal


def connection() -> sqlite3.Connection:
    conn = sqlite3.connect(":memory:", isolation_level=None)
    migrations.create(conn)
    return conn


def sqlite_journal(conn: sqlite3.Connection) -> SqliteJournal:
    return SqliteJournal(conn, conn.execute)


@pytest.fixture(params=["sqlite", "memory"])
def journal(request: pytest.FixtureRequest) -> Iterator[Journal]:
    if request.param == "memory":
        yield MemoryJournal()
        return
    conn = connection()
    yield sqlite_journal(conn)
    conn.close()


def record_of(number: int) -> Record:
    return Record(number, number, number, 1, 1_000 + number, b"body %d" % number)


def test_records_are_read_in_order_and_in_parts(journal: Journal) -> None:
    records = [record_of(number) for number in range(1, 6)]
    for each in records:
        journal.append(each)
    assert journal.read(0, 10) == records
    assert journal.read(2, 2) == records[2:4]
    assert journal.read(5, 10) == []


def test_a_trimmed_journal_has_only_later_records(journal: Journal) -> None:
    for number in range(1, 6):
        journal.append(record_of(number))
    journal.trim(3)
    assert journal.read(3, 10) == [record_of(4), record_of(5)]
    journal.trim(9)
    assert journal.read(5, 10) == []


def test_a_missing_record_is_reported(journal: Journal) -> None:
    journal.append(record_of(1))
    journal.append(record_of(3))
    with pytest.raises(BadRecord, match="record 2 of the journal is missing"):
        journal.read(0, 10)


@pytest.mark.parametrize("column", ["first_event", "last_event", "epoch", "at", "body", "crc"])
def test_a_damaged_record_is_reported(column: str) -> None:
    conn = connection()
    journal = sqlite_journal(conn)
    journal.append(record_of(1))
    value = "x'00'" if column == "body" else f"{column} + 1"
    conn.execute(f"UPDATE journal SET {column} = {value}")
    with pytest.raises(BadRecord, match="record 1 of the journal is damaged: its checksum is wrong"):
        journal.read(0, 10)
    conn.close()


def test_a_failed_append_in_memory_writes_nothing() -> None:
    journal = MemoryJournal()

    def fail(_: Record) -> None:
        raise OSError("the disk failed")

    journal.before_append = fail
    with pytest.raises(OSError, match="failed"):
        journal.append(record_of(1))
    assert journal.read(0, 10) == []
