"""Rows with several events: how events are divided into rows changes nothing that readers get."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.journal import event_codec
from jobd.model.events import KEEP_GRANTS, KEEP_HEARTBEATS, Event
from jobd.model.job import Job, Result
from jobd.model.storage import Batch, EventPruning
from jobd.storage.codec import SQL, with_checksum
from jobd.storage.events import event_queries, event_rows
from jobd.storage.events.event_rows import pack, unpack
from jobd.storage.offline import doctor
from jobd.storage.startup import connect, start
from jobd.storage.tables import table_writes
from jobd.storage.tables.projection import Projection
from tests.support.factories import NOW, ChangeFactory
from tests.support.store_files import job_of, make_store, open_store, stored_events, without_indexes

SPANS = (1, 3, 1_000)


@pytest.fixture(params=SPANS)
def span(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(event_rows, "SPAN", request.param)
    span: int = request.param
    return span


def opened(path: str) -> Projection:
    return start(connect(path, "FULL"), path)[0]


def some_events(count: int, seed: int) -> list[Event]:
    maker = ChangeFactory(seed)
    events: list[Event] = []
    while len(events) < count:
        events += list(maker.any_batch(20).changes)
    return events


def test_rows_have_the_events_of_one_job_in_order_and_close_to_each_other(span: int) -> None:
    events = some_events(500, span)
    rows = pack(map(event_codec.encode, events))
    assert sorted(event for row in rows for event in unpack(row)) == sorted(map(event_codec.encode, events))
    by_job: dict[int, int] = {}
    for row in sorted(rows):
        seq, last, job_seq, at, body, _ = row
        packed = unpack(row)
        numbers = [event[0] for event in packed]
        assert (seq, last, at) == (numbers[0], numbers[-1], packed[0][1])
        assert numbers == sorted(numbers)
        assert {event[3] for event in packed} == {job_seq}
        assert last - seq < span
        assert len(packed) == 1 or (job_seq != 0 and len(body) <= event_rows.ROW_BYTES)
        assert seq > by_job.get(job_seq, 0)
        by_job[job_seq] = last
    assert any(len(unpack(row)) > 1 for row in rows) == (span > 1)


def test_a_large_event_has_a_row_of_its_own(maker: ChangeFactory) -> None:
    created = maker.create("a")
    granted = maker.grant(job_of(created))
    ended = maker.finish(job_of(granted))
    result = Result(metadata=Raw(b'"' + b"x" * event_rows.ROW_BYTES + b'"'))
    large = replace(ended, after=replace(job_of(ended), result=result))
    rows = pack(map(event_codec.encode, (created, granted, large)))
    assert sorted(len(unpack(row)) for row in rows) == [1, 1, 1]


def test_a_row_of_a_later_format_is_not_read() -> None:
    (row,) = pack([event_codec.encode(ChangeFactory().create())])
    later = with_checksum((*row[:4], bytes((9, *row[4][1:]))))
    assert event_rows.fault(row) is None
    assert event_rows.fault(later) == "it has format 9, but this jobd supports format 1"


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_readers_get_all_events_in_order_from_every_number_on(path: str, limit: int, span: int) -> None:
    projection, maker = opened(path), ChangeFactory(limit)
    for _ in range(12):
        projection.append(maker.any_batch(15))
        if maker.random.random() < 0.4:
            projection.project()
    projection.project()
    db = projection.db
    events = stored_events(db.conn)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    for begin in range(0, len(events) + 1, 7):
        found: list[Event] = []
        while True:
            page = event_queries.events_after(db, found[-1].seq if found else begin, limit)
            assert len(page.events) <= limit
            found += page.events
            if not page.more:
                break
        assert found == events[begin:]
    db.conn.close()


def rounds(maker: ChangeFactory, job: Job, count: int, heartbeats: int) -> Iterator[Event]:
    """Grants that are released."""
    for _ in range(count):
        change = maker.grant(job)
        yield change
        for number in range(heartbeats):
            change = (maker.progress if number % 3 else maker.extend)(job_of(change))
            yield change
        change = maker.requeue(job_of(change))
        yield change
        job = job_of(change)


def busy_batches() -> list[Batch]:
    """Batches with journals that are shortened, those of deleted jobs, and events of queues."""
    maker = ChangeFactory(5)
    created = [maker.create() for _ in range(4)]
    batches = [maker.batch([*created, maker.queue_event("video", True)])]
    changes = [
        *rounds(maker, job_of(created[0]), 2 * KEEP_GRANTS + 5, 1),
        *rounds(maker, job_of(created[1]), 2, 4 * KEEP_HEARTBEATS),
        *rounds(maker, job_of(created[2]), 20, 3),
    ]
    changes.sort(key=lambda change: change.seq % 7)  # jobs take turns
    changes = [
        replace(change, seq=number)
        for number, change in enumerate(sorted(changes, key=lambda change: change.seq), changes[0].seq)
    ]
    while changes:
        batches.append(maker.batch(changes[:40]))
        changes = changes[40:]
    gone = maker.jobs[created[2].job_seq]
    batches.append(maker.batch([maker.delete(gone)]))
    return batches


def test_nodes_end_with_the_same_events_however_they_divide_them(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = busy_batches()
    deleted = batches[-1].changes[0].job_seq
    contents = []
    for number, span in enumerate(SPANS):
        monkeypatch.setattr(event_rows, "SPAN", span)
        projection = opened(f"{path}.{number}")
        for batch in batches:
            projection.append(batch)
            if number:
                projection.project()
        projection.project()
        while projection.needs_upkeep:
            projection.upkeep()
        db = projection.db
        if not number:  # it leads: the others get its writes
            prunings = []
            for limit in (1, 5, 8, 100):
                write, count = table_writes.plan_pruning(db, NOW + 10_000, limit)
                assert write is not None
                assert 0 < count <= limit
                prunings.append(write)
                projection.append(write)
                projection.project()
            assert prunings[1].events
            assert prunings[-1].jobs == [deleted]
            assert table_writes.plan_pruning(db, NOW + 10_000, 9) == (None, 0)
        for write in prunings if number else []:
            projection.append(write)
            projection.project()
        assert stored_events(db.conn, deleted) == []
        contents.append((stored_events(db.conn), db.gone_to, [event_queries.timeline(db, seq) for seq in (1, 2)]))
        db.conn.close()
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0][0]) < sum(len(batch.changes) for batch in batches) / 2


def test_a_part_of_a_row_can_be_pruned(path: str) -> None:
    """A record of a node whose rows are smaller names some of the events of a row."""
    projection, maker = opened(path), ChangeFactory()
    created = maker.create("a")
    changes = list(rounds(maker, job_of(created), 2, 2))
    projection.append(maker.batch([created, *changes]))
    projection.project()
    db = projection.db
    (row,) = db.rows(f"SELECT {SQL['events']} FROM events")
    for numbers, left in (([1, 2], [3, 4, 5, 6, 7, 8, 9]), ([4, 77], [3, 5, 6, 7, 8, 9]), ([3, 5, 6, 7, 8, 9], [])):
        projection.append(EventPruning(numbers, [], numbers[-1]))
        projection.project()
        assert [event.seq for event in stored_events(db.conn)] == left
    assert row[:2] == (1, 9)
    db.conn.close()


async def test_damage_in_a_row_that_began_earlier_is_a_gap(maker: ChangeFactory, path: str) -> None:
    async with open_store(path) as (store, _):
        created = [maker.create() for _ in range(3)]
        await store.write(maker.batch([*created, *(maker.grant(job_of(each)) for each in created)]))
        conn = store._connection.raw
        await store.timeline(1)
        conn.execute("UPDATE events SET at = 0 WHERE seq = 2")
        page = await store.events_after(4, 100)
        assert ([event.seq for event in page.events], page.gone_to) == ([6], 5)
        assert store.take_faults() == [
            f"events 2 to 5 of job {created[1].job_id}: its checksum is wrong; the row was quarantined"
        ]
    (problem,) = [each for each in doctor.check(path) if each.where == "events in quarantine"]
    assert problem.what == f"2 to 5 of job {created[1].job_id}: its checksum is wrong"


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_of_a_row_is_silent(maker: ChangeFactory, bit: int) -> None:
    """Each byte of the body, and each bit of the other columns."""
    created = maker.create("a")
    projection = opened(":memory:")
    projection.append(maker.batch([created, *rounds(maker, job_of(created), 1, 1)]))
    projection.project()
    db = projection.db
    (row,) = db.rows(f"SELECT {SQL['events']} FROM events")
    number = row[1]
    for column in range(1, 6):
        places = range(len(row[4])) if column == 4 else range(4)
        for place in places:
            values = list(row)
            if column == 4:
                values[4] = bytes(each ^ (1 << bit if at == place else 0) for at, each in enumerate(row[4]))
            else:
                values[column] ^= 1 << (8 * place + bit)
            db.gone_to = 0
            db.conn.execute("DELETE FROM events")
            db.conn.execute(event_rows.INSERT, values)
            db.numbers = replace(maker.numbers, next_event=number + 1)
            assert event_rows.fault(tuple(values)) is not None
            page = event_queries.events_after(db, 0, 10)
            assert (page.events, page.gone_to) == ([], number)
    db.conn.close()


async def test_the_index_of_jobs_is_not_needed_to_find_damage(path: str) -> None:
    await make_store(path)
    with without_indexes(path) as conn:
        conn.execute("UPDATE events SET job_seq = job_seq + 1 WHERE seq = 3")
    async with open_store(path) as (store, _):
        assert (await store.events_after(0, 10)).gone_to >= 3
