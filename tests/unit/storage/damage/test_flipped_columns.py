"""A flipped bit in a column of a row: each reader returns all that is undamaged, or reports the damage."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from msgspec.structs import replace

from jobd.model.events import ROUTINE, Event
from jobd.model.responses import DamagedRow
from jobd.model.storage import EventPruning, LateResultQuery, Tombstone
from jobd.storage import codec, queries
from jobd.storage.cluster import lost_records
from jobd.storage.cluster.membership import Membership, StoreDamaged
from jobd.storage.codec import SQL
from jobd.storage.damage import scrub
from jobd.storage.database import PUT_TOMBSTONE, Database, StructureDamaged, is_corrupt
from jobd.storage.events import event_queries, event_rows, shortening
from jobd.storage.files import StoreUnreadable
from jobd.storage.offline import doctor
from jobd.storage.startup import MEMORY, connect, start
from jobd.storage.tables import table_writes
from jobd.storage.tables.projection import Projection
from tests.support.factories import NOW, ChangeFactory
from tests.support.projection_harness import content_of
from tests.support.store_files import hidden_indexes, job_of, stored_events
from tests.unit.storage.events.test_event_rows import rounds
from tests.unit.storage.offline.test_doctor import busy_store

pytestmark = pytest.mark.slow

LATER = NOW + 10_000
WRONG = re.compile("damaged|missing|checksum .* wrong")
BITS = (0, 20)
ROWS = f"SELECT {SQL['events']} FROM events"
COLUMNS = ("seq", "last", "job_seq", "at", "body", "crc")


def opened(content: bytes) -> Projection:
    conn = connect(MEMORY, "OFF")
    if content:
        conn.deserialize(content)
    try:
        return start(conn, MEMORY)[0]
    except BaseException:
        conn.close()
        raise


@cache
def original() -> bytes:
    """Return a store whose rows have several events that overlap those of other jobs: live, deleted, and of queues."""
    maker, projection = ChangeFactory(7), opened(b"")
    created = [maker.create(id_) for id_ in "abc"]
    first = [list(rounds(maker, job_of(each), 2, 2)) for each in created]
    projection.append(maker.batch([*created, *(change for same in zip(*first, strict=True) for change in same)]))
    projection.project()
    ended = [maker.delete(maker.jobs[1]), maker.queue_event("video", True), *rounds(maker, maker.jobs[2], 1, 1)]
    projection.append(maker.batch(ended))
    projection.project()
    content = projection.db.conn.serialize()
    projection.db.conn.close()
    return content


@cache
def rows() -> list[tuple[int, ...]]:
    projection = opened(original())
    found = projection.db.rows("SELECT seq, last, job_seq FROM events ORDER BY seq")
    projection.db.conn.close()
    return found


@cache
def events() -> list[Event]:
    projection = opened(original())
    found = stored_events(projection.db.conn)
    projection.db.conn.close()
    return found


def flipped(content: bytes, table: str, column: str, rowid: int, bit: int) -> bytes | None:
    """Flip a bit of a column in its row, but not in an index. Return None if another row has this rowid."""
    with contextlib.closing(sqlite3.connect(MEMORY, isolation_level=None)) as conn:
        conn.deserialize(content)
        with hidden_indexes(conn):
            conn.text_factory = bytes
            select = f"SELECT {column}, typeof({column}) FROM {table} WHERE rowid = ?"
            value, kind = conn.execute(select, (rowid,)).fetchone()
            if isinstance(value, bytes):
                at = min(bit, len(value) - 1)
                value = bytes(each ^ (1 << (bit % 7) if place == at else 0) for place, each in enumerate(value))
            else:
                value = (value or 0) ^ (1 << bit)
            place = "CAST(? AS TEXT)" if kind == b"text" else "?"
            try:
                conn.execute(f"UPDATE {table} SET {column} = {place} WHERE rowid = ?", (value, rowid))
            except sqlite3.IntegrityError:
                return None
        return conn.serialize()


def each_flip() -> Iterator[tuple[bytes, tuple[int, ...], str]]:
    for row in rows():
        for column in COLUMNS:
            for bit in BITS:
                content = flipped(original(), "events", column, row[0], bit)
                if content is not None:
                    yield content, row, f"bit {bit} of {column} of events {row}"


@pytest.fixture(scope="module")
def flips() -> list[tuple[bytes, tuple[int, ...], str]]:
    return list(each_flip())


Flips = list[tuple[bytes, tuple[int, ...], str]]


def check(flips: Flips, read: Callable[[Projection, tuple[int, ...]], None]) -> None:
    """Call `read` for each flip. It fails if the damage is silent."""
    for content, row, what in flips:
        projection = opened(content)
        try:
            read(projection, row)
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        finally:
            projection.db.conn.close()


def scrub_all(db: Database) -> list[DamagedRow]:
    """Return the damaged rows that a scrub finds."""
    found, cursor = [], None
    for _ in range(1_000):
        part = scrub.check_slice(db, cursor)
        assert part is not None
        found += part.damaged
        cursor = part.next_cursor
        if cursor is None:
            return found
    raise AssertionError("the scrub does not end")


def is_reported(db: Database) -> bool:
    return any("checksum is wrong" in fault or "cannot be found" in fault for fault in db.faults)


def after_of(row: tuple[int, ...]) -> set[int]:
    """Return positions of readers to which the row matters."""
    seq, last, _ = row
    return {0, seq - 1, seq, (seq + last) // 2, last - 1, last}


@pytest.mark.parametrize("limit", [2, 100])
def test_the_feed_and_webhooks_miss_no_event_silently(flips: Flips, limit: int) -> None:
    known = {event.seq: event for event in events()}
    end = max(known)
    for content, row, what in flips:
        for after in after_of(row):
            projection = opened(content)
            missing = {seq for seq in known if seq > after}
            position, gone_to = after, 0
            while position < end:
                page = event_queries.events_after(projection.db, position, limit)
                assert all(known[event.seq] == event for event in page.events), what
                missing -= {event.seq for event in page.events}
                gone_to = max(gone_to, page.gone_to)
                assert max(page.end, page.gone_to) > position, what
                position = page.end if page.end > position else page.gone_to
            assert all(seq <= gone_to for seq in missing), f"{what}, from {after}: {missing} are missing silently"
            assert not missing or is_reported(projection.db), what
            projection.db.conn.close()


def test_timelines_miss_no_event_silently(flips: Flips) -> None:
    def read(projection: Projection, row: tuple[int, ...]) -> None:
        found = [event for seq in (1, 2, 3) for event in event_queries.timeline(projection.db, seq)]
        assert all(event in events() for event in found)
        expected = [event for event in events() if event.job_seq]
        assert len(found) == len(expected) or is_reported(projection.db)

    check(flips, read)


@pytest.mark.parametrize("limit", [1, 100])
def test_pruning_deletes_no_event_silently(flips: Flips, limit: int) -> None:
    def read(projection: Projection, row: tuple[int, ...]) -> None:
        db = projection.db
        while True:
            write, count = table_writes.plan_pruning(db, LATER, limit)
            if write is not None:
                projection.append(write)
                projection.project()
            if count < limit:
                break
        left = {each[0] for each in db.rows(ROWS) if event_rows.fault(each) is None}
        damaged = [each for each in db.rows(ROWS) if event_rows.fault(each) is not None]
        for seq, last, job_seq in rows():
            if seq in left:
                continue
            assert job_seq not in (2, 3) or (seq, last, job_seq) == row, f"{seq} is undamaged, and its job is live"
            assert damaged or last <= db.gone_to, f"{seq} to {last} were deleted, but {db.gone_to=}"

    check(flips, read)


def test_pruning_by_another_node_deletes_no_event_silently(flips: Flips) -> None:
    """Its rows have other events, so it may delete a part of a row."""
    first = [event.seq for event in events() if event.job_seq == 1][:3]

    def read(projection: Projection, row: tuple[int, ...]) -> None:
        db = projection.db
        projection.append(EventPruning(first, [], first[-1]))
        projection.project()
        scrub_all(db)
        found = {event.seq for event in stored_events(db.conn)}
        for event in events():
            is_kept = event.seq in found or event.seq in first
            assert is_kept or (is_reported(db) and row[0] <= event.seq <= row[1]), f"{event.seq} is missing"

    check(flips, read)


@pytest.mark.parametrize("begin", [0, 8, 14])
def test_shortening_deletes_no_other_event(flips: Flips, monkeypatch: pytest.MonkeyPatch, begin: int) -> None:
    monkeypatch.setattr(shortening, "KEEP_GRANTS", 1)
    monkeypatch.setattr(shortening, "KEEP_FIRST_GRANTS", 0)
    monkeypatch.setattr(shortening, "SHORTENED_AT_ONCE", 3)
    kept = {event.seq for event in events() if event.job_seq != 2 or event.type not in ROUTINE}

    def read(projection: Projection, row: tuple[int, ...]) -> None:
        db, shortener = projection.db, projection._shortener
        shortener._waiting = {(shortener._thin, 2): begin, (shortener._shorten, 2): begin}
        for _ in range(30):
            if shortener.has_work:
                shortener.shorten()
        assert not shortener.has_work, "it never ends"
        scrub_all(db)
        found = {event.seq for event in stored_events(db.conn)}
        for seq in kept - found:
            assert is_reported(db), f"{seq} is missing"
            assert row[0] <= seq <= row[1], f"{seq} is missing"

    check(flips, read)


def test_accepting_a_loss_names_all_changed_jobs(flips: Flips, tmp_path: Path) -> None:
    path = tmp_path / "jobd.db"
    for content, row, what in flips:
        path.write_bytes(content)
        for after in after_of(row):
            changed = lost_records.changes(str(path), after)
            named = {job.id for job in changed.jobs}
            expected = {event.job_id for event in events() if event.seq > after and event.job_id not in ("", "a")}
            assert expected <= named or changed.damaged, f"{what}, after {after}: {named}"


def test_the_doctor_names_each_row(flips: Flips, tmp_path: Path) -> None:
    path = tmp_path / "jobd.db"
    for content, _, what in flips:
        path.write_bytes(content)
        path.chmod(0o600)
        assert any(each.what == "its checksum is wrong" for each in doctor.check(str(path))), what


def test_the_scrubber_names_each_row(flips: Flips) -> None:
    for content, _, what in flips:
        projection = opened(content)
        assert len(scrub_all(projection.db)) == 1, what
        assert scrub_all(projection.db) == [], what
        projection.db.conn.close()


# ---------------------------------------------------------------------------------------------------------------------
# Other tables

TABLES = (
    *(table for table in scrub.TABLES if table != "events"),
    "payloads",
    "queues",
    "quiet_rules",
    "webhooks",
    "reports",
    "figures",
)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a store with rows in every table."""
    path = str(tmp_path_factory.mktemp("busy") / "jobd.db")
    asyncio.run(busy_store(path))
    content = bytearray(Path(path).read_bytes())
    content[18:20] = b"\1\1"  # no write-ahead log, which a database in memory does not have
    return bytes(content)


def columns_of(content: bytes, table: str) -> tuple[list[str], list[int]]:
    """Return the columns of a table, and the first and last rowid."""
    with contextlib.closing(sqlite3.connect(MEMORY)) as conn:
        conn.deserialize(content)
        columns = [name for (name,) in conn.execute("SELECT name FROM pragma_table_info(?)", (table,))]
        (first, last) = conn.execute(f"SELECT min(rowid), max(rowid) FROM {table}").fetchone()
    return columns, sorted({first, last})


PLACES = {"keys": "key", "late_results": "late result", "payloads": "job", "queues": "queue", "jobs": "job"}


def rows_served(content: bytes) -> tuple[Database, set[bytes]]:
    """Open a store, and return each row that its readers return."""
    conn = connect(MEMORY, "OFF")
    conn.deserialize(content)
    projection, found = start(conn, MEMORY)
    try:
        tables = content_of(projection.db, found)
    except sqlite3.DatabaseError as error:  # a number in an index has no row
        if not is_corrupt(error):
            raise
        return projection.db, set()
    tables.audited = {seq: replace(entry, changed_ids=[]) for seq, entry in tables.audited.items()}
    by_number: list[dict[Any, Any]] = [tables.jobs, tables.payloads, tables.late_results, tables.tombstones]
    by_number += [tables.quiet, tables.audited, tables.outbox, tables.keys, dict(enumerate(tables.kept_reports))]
    rows = {msgspec.json.encode(each) for table in by_number for each in table.items()}
    return projection.db, rows | {tables.figures or b""}


@pytest.mark.parametrize("table", TABLES)
def test_damage_to_any_column_is_reported_and_never_served(busy: bytes, table: str, tmp_path: Path) -> None:
    """A scrub is needed for rows that a search by the damaged column does not select."""
    path = tmp_path / "jobd.db"
    columns, rowids = columns_of(busy, table)
    whole, undamaged = rows_served(busy)
    whole.conn.close()
    count = 0
    for column, rowid, bit in product(columns, rowids, (0, 3, 40)):
        if (content := flipped(busy, table, column, rowid, bit)) is None:
            continue
        what = f"bit {bit} of {column} of {table} {rowid}"
        db, served = rows_served(content)
        assert served <= {*undamaged, b""}, what
        assert scrub_all(db) or db.faults or db.quarantined, f"{what} is silent"
        db.conn.close()
        count += 1
        if bit == 3:
            path.write_bytes(content)
            path.chmod(0o600)
            named = [each for each in doctor.check(str(path)) if WRONG.search(each.what)]
            assert [each for each in named if each.where.startswith(PLACES.get(table, table)) and each.fix], what
    assert count >= 2 * len(columns)


def test_a_negative_number_is_checked_too(busy: bytes) -> None:
    """The tombstones of late results have negative numbers."""
    projection = opened(busy)
    db = projection.db
    db.conn.execute(PUT_TOMBSTONE, codec.struct_row(Tombstone(-5, "a", "k/1", NOW, NOW)))
    db.conn.execute("UPDATE tombstones SET due_at = due_at + 1 WHERE job_seq = -5")
    assert [each.where for each in scrub_all(db)] == ["tombstones -5"]
    db.conn.close()


def test_an_entry_about_a_job_that_exists_deletes_no_event(flips: Flips) -> None:
    projection = opened(original())
    db = projection.db
    db.conn.execute("UPDATE deleted_jobs SET job_seq = 3")
    before = stored_events(db.conn, 3)
    write, count = table_writes.plan_pruning(db, LATER, 100)
    assert (count, write) == (1, EventPruning([29], [], 29))  # of a queue
    assert "deleted_jobs 3: a job with this number exists; the row was quarantined" in db.faults
    assert stored_events(db.conn, 3) == before
    db.conn.close()


@pytest.mark.parametrize("column", ["id", "at", "job_seq"])
def test_the_doctor_names_a_damaged_entry_of_a_deleted_job(column: str, tmp_path: Path) -> None:
    content = flipped(original(), "deleted_jobs", column, 1, 1)
    assert content is not None
    path = tmp_path / "jobd.db"
    path.write_bytes(content)
    path.chmod(0o600)
    number = 3 if column == "job_seq" else 1
    assert f"its row {number} differs from its last event" in {each.what for each in doctor.check(str(path))}


def test_a_job_is_deleted_although_a_damaged_entry_has_its_number() -> None:
    maker, projection = ChangeFactory(), opened(b"")
    db = projection.db
    projection.append(maker.batch([maker.create("a")]))
    db.conn.execute("INSERT INTO deleted_jobs (job_seq, id, at) VALUES (1, 'x', 5)")
    projection.append(maker.batch([maker.delete(maker.jobs[1])]))
    projection.project()
    assert db.conn.execute("SELECT id FROM deleted_jobs").fetchall() == [("a",)]
    db.conn.close()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of rows in their page: the rows are no longer in order, and a search may miss undamaged ones


def varint(content: bytes, at: int) -> tuple[int, int]:
    """Return an integer of SQLite's format of up to 8 bytes, and the place after it."""
    value = 0
    while True:
        value = value << 7 | content[at] & 0x7F
        at += 1
        if content[at - 1] < 0x80:
            return value, at


def flipped_number(content: bytes, table: str, rowid: int, bit: int) -> bytes:
    """Flip a bit of the last byte of a rowid in its page."""
    with contextlib.closing(sqlite3.connect(MEMORY)) as conn:
        conn.deserialize(content)
        pages = conn.execute("SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf'", (table,)).fetchall()
    changed = bytearray(content)
    for (page,) in pages:
        begin = (page - 1) * 4096
        for number in range(int.from_bytes(content[begin + 3 : begin + 5])):
            pointer = begin + 8 + 2 * number
            _, at = varint(content, begin + int.from_bytes(content[pointer : pointer + 2]))
            value, end = varint(content, at)
            if value == rowid:
                changed[end - 1] ^= 1 << bit
                return bytes(changed)
    raise AssertionError(f"{table} has no row {rowid}")


@pytest.mark.parametrize("bit", range(7))
def test_a_damaged_number_in_a_page_is_not_silent(bit: int, tmp_path: Path) -> None:
    path = tmp_path / "jobd.db"
    seqs = {event.seq for event in events()}
    for row in rows():
        content = flipped_number(original(), "events", row[0], bit)
        path.write_bytes(content)
        assert any("out of order" in each.what or WRONG.search(each.what) for each in doctor.check(str(path))), row
        for after in after_of(row):
            projection = opened(content)
            db = projection.db
            page = event_queries.events_after(db, after, 100)
            missing = {seq for seq in seqs if seq > after} - {event.seq for event in page.events}
            assert all(seq <= page.gone_to for seq in missing), f"{row}, from {after}: {missing} are missing silently"
            db.conn.close()
        projection = opened(content)
        db = projection.db
        found = [event for seq in (1, 2, 3) for event in event_queries.timeline(db, seq)]
        assert len(found) == len([event for event in events() if event.job_seq]) or is_reported(db), row
        db.conn.close()


def with_pruning() -> bytes:
    """Return a store whose tail deletes the events of the deleted job and of queues, as another node divided them."""
    projection = opened(original())
    pruned = [event.seq for event in events() if event.job_seq in (0, 1)]
    projection.append(EventPruning(pruned, [], pruned[-1]))
    content = projection.db.conn.serialize()
    projection.db.conn.close()
    return content


def test_a_start_prunes_although_a_number_in_a_page_is_damaged() -> None:
    content, unmoved = with_pruning(), 0
    for row, bit in product(rows(), range(7)):
        projection = opened(flipped_number(content, "events", row[0], bit))
        db = projection.db
        assert projection.behind == 0
        unmoved += any("could not be quarantined: it cannot be found" in fault for fault in db.faults)
        scrub_all(db)
        found = {event.seq for event in stored_events(db.conn)}
        for event in events():
            is_kept = event.seq in found or event.job_seq in (0, 1)
            assert is_kept or (is_reported(db) and row[0] <= event.seq <= row[1]), f"bit {bit} of {row}: {event.seq}"
        again = opened(db.conn.serialize())
        again.db.conn.close()
        db.conn.close()
    assert unmoved


def test_a_start_is_rejected_if_a_damaged_page_prevents_a_pruning() -> None:
    [first, *_] = [row for row in rows() if row[2] == 1]
    content = flipped(with_pruning(), "events", "body", first[0], 1)
    assert content is not None
    with contextlib.closing(sqlite3.connect(MEMORY)) as conn:
        conn.deserialize(content)
        (number,) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events_job'").fetchone()
    begin = (number - 1) * 4096
    with pytest.raises(StoreUnreadable, match=r"malformed.*: run `jobd doctor`") as raised:
        opened(content[:begin] + b"\xff" * 16 + content[begin + 16 :])
    assert isinstance(raised.value.__cause__, StructureDamaged)


def test_a_node_rebuilds_tables_that_a_slice_cannot_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for membership, expected in ((None, StructureDamaged), (Membership("c"), StoreDamaged)):
        projection = opened(with_pruning())
        projection.append(EventPruning([], [], 1))
        projection.db.membership = membership
        monkeypatch.setattr(projection, "_apply", Mock(side_effect=StructureDamaged("two rows have the same id")))
        with pytest.raises(expected, match="two rows have the same id"):
            projection.project()
        projection.db.conn.close()


@pytest.mark.parametrize("max_rows", [1, 2, 100])
def test_a_scrub_finds_a_damaged_number_and_ends(monkeypatch: pytest.MonkeyPatch, max_rows: int) -> None:
    monkeypatch.setattr(scrub, "MAX_ROWS", max_rows)
    for row, bit in product(rows(), range(7)):
        projection = opened(flipped_number(original(), "events", row[0], bit))
        assert len({each.where for each in scrub_all(projection.db)}) == 1, f"bit {bit} of {row}"
        projection.db.conn.close()


def test_a_job_that_only_the_index_has_is_reported(busy: bytes) -> None:
    _, (first, _) = columns_of(busy, "jobs")
    for bit in range(7):
        projection = opened(flipped_number(busy, "jobs", first, bit))
        db = projection.db
        (id_,) = db.conn.execute("SELECT id FROM jobs INDEXED BY jobs_id WHERE seq = ?", (first,)).fetchone()
        loaded = queries.load(db, [id_], [], [])
        assert id_ in loaded.jobs or id_ in loaded.bad
        db.conn.close()


def test_trimming_quarantines_an_audit_entry_whose_age_is_damaged(busy: bytes) -> None:
    _, rowids = columns_of(busy, "audit")
    content = flipped(busy, "audit", "at", rowids[0], 40)
    assert content is not None
    projection = opened(content)
    db = projection.db
    db.conn.execute(
        "INSERT INTO audit SELECT seq + 1, at, who, address, what, job_id, queue, reason, outcome, jobs, "
        "details, part_of, crc FROM audit WHERE seq = ?",
        (rowids[-1],),
    )
    table_writes.plan_trimming(db, NOW, 100)
    assert f"audit {rowids[0]}: its checksum is wrong; the row was quarantined" in db.faults
    db.conn.close()


def test_a_late_result_that_only_the_index_has_is_reported(busy: bytes) -> None:
    columns, (first, *_) = columns_of(busy, "late_results")
    assert "job_seq" in columns
    projection = opened(flipped_number(busy, "late_results", first, 0))
    db = projection.db
    (job_seq,) = db.conn.execute("SELECT job_seq FROM late_results NOT INDEXED").fetchone()
    known = queries.read_late_results(db, [LateResultQuery(job_seq)])
    assert known.results[job_seq] == []
    assert db.faults == [f"late results of {db.job_name(job_seq)}: rows cannot be found; run `jobd doctor`"]
    db.conn.close()
