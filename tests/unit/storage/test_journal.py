"""The journal of jobs: thinning, compaction, pruning and reads."""

from __future__ import annotations

import pytest

from jobd.journal import event_codec
from jobd.model.events import KEEP_FIRST_GRANTS, KEEP_GRANTS, KEEP_HEARTBEATS, Event, fold
from jobd.model.job import Job
from jobd.model.storage import Batch
from jobd.storage.events import event_rows, shortening
from jobd.storage.store import Store
from tests.support.factories import NOW, OPTIONS, ChangeFactory, as_stored
from tests.support.store_files import edit_store, job_of, open_store, stored_events


@pytest.fixture(autouse=True)
def upkeep_after_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Store.write

    async def write_and_wait(self: Store, batch: Batch) -> dict[int, bytes]:
        payloads = await write(self, batch)
        await self.finish_upkeep()
        return payloads

    monkeypatch.setattr(Store, "write", write_and_wait)


@pytest.fixture
def rows_of_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_rows, "SPAN", 1)


async def test_the_last_heartbeats_of_each_grant_are_kept(path: str) -> None:
    maker = ChangeFactory(1)
    created = maker.create(options=OPTIONS[1])
    async with open_store(path) as (store, _):
        await store.write(maker.batch([created]))
        change = maker.grant(job_of(created))
        await store.write(maker.batch([change]))
        for number in range(450):
            change = (
                maker.extend(job_of(change))
                if number % 3
                else maker.progress(job_of(change), None, "x" if number == 6 else None)
            )
            await store.write(maker.batch([change]))
        kept = len(stored_events(store._connection.raw))
        assert kept <= 2 + 3 * KEEP_HEARTBEATS
        types = [event.type for event in await store.timeline(1)]
        assert types.count("progress") == types.count("extended") == KEEP_HEARTBEATS
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.extend(job_of(change))]))  # a grant from before the start: thinned at once
        kept = len(stored_events(store._connection.raw))
        assert kept == 2 + 2 * KEEP_HEARTBEATS
        assert maker.jobs[1].progress_message == "x"


async def test_each_batch_thins_one_journal(maker: ChangeFactory, store: Store) -> None:
    """All commands wait for it, so sixteen workers that report together would delay them sixteen times as long."""
    created = [maker.create(), maker.create()]
    await store.write(maker.batch(created))
    held = [maker.grant(job_of(change)) for change in created]
    await store.write(maker.batch(held))

    def heartbeats() -> list[int]:
        types = ([each.type for each in stored_events(store._connection.raw, job_seq)] for job_seq in (1, 2))
        return [each.count("progress") for each in types]

    for _ in range(KEEP_HEARTBEATS + 1):
        held = [maker.progress(job_of(change)) for change in held]
        await store.write(maker.batch(held))
    assert heartbeats() == [KEEP_HEARTBEATS, KEEP_HEARTBEATS + 1]
    await store.write(maker.batch([maker.finish(job_of(held[1])), maker.create()]))
    assert heartbeats() == [KEEP_HEARTBEATS, KEEP_HEARTBEATS]
    assert list(store._projection._shortener._heartbeats) == [1], "a job whose grant has ended is no longer watched"
    await store.write(maker.batch([maker.create()]))
    assert heartbeats() == [KEEP_HEARTBEATS, KEEP_HEARTBEATS]


async def test_a_pending_journal_is_thinned_from_its_recorded_grant(maker: ChangeFactory, store: Store) -> None:
    """The job may have another grant when its turn comes."""
    created = [maker.create(), maker.create()]
    held = [maker.grant(job_of(change)) for change in created]
    await store.write(maker.batch([*created, *held]))
    for _ in range(KEEP_HEARTBEATS + 1):
        held = [maker.progress(job_of(change)) for change in held]
        await store.write(maker.batch(held))
    back = maker.requeue(job_of(held[1]))
    await store.write(maker.batch([back, maker.grant(job_of(back))]))
    types = [each.type for each in stored_events(store._connection.raw, 2)]
    assert types.count("progress") == KEEP_HEARTBEATS


def round_of(maker: ChangeFactory, job: Job, heartbeats: int = 0) -> tuple[Job, list[Event]]:
    """A grant that is released."""
    changes = [maker.grant(job)]
    for _ in range(heartbeats):
        changes.append(maker.extend(job_of(changes[-1])))
    changes.append(maker.requeue(job_of(changes[-1])))
    return job_of(changes[-1]), changes


def tokens_of(events: list[Event]) -> list[int]:
    grants = (event.grant for event in map(as_stored, events))
    return [grant.fencing_token for grant in grants if grant is not None]


def folded(events: list[Event]) -> Job | None:
    row = None
    for event in events:
        row = fold(row, event)
    return row


@pytest.mark.slow
async def test_the_first_and_last_returned_grants_are_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, shorten = ChangeFactory(), event_codec.shorten
    read: list[int] = []
    tokens: list[int] = []

    def counting(events: list[Event]) -> list[Event]:
        read.append(len(events))
        return shorten(events)

    monkeypatch.setattr(event_codec, "shorten", counting)
    change = maker.create()
    job, count = job_of(change), 0
    most = 1 + 2 * (KEEP_FIRST_GRANTS + 2 * KEEP_GRANTS)
    async with open_store(path) as (store, _):
        await store.write(maker.batch([change]))
        for _ in range(5 * KEEP_GRANTS):
            job, changes = round_of(maker, job)
            tokens += tokens_of(list(changes))
            await store.write(maker.batch(changes))
            count = len(stored_events(store._connection.raw))
            assert count <= most
        assert count == 1 + 2 * (KEEP_FIRST_GRANTS + KEEP_GRANTS)
        assert read == [2 * (KEEP_GRANTS - KEEP_FIRST_GRANTS) + 1, *[2 * KEEP_GRANTS + 1] * 3]
    async with open_store(path) as (store, _):  # the counts are not persisted
        for _ in range(KEEP_GRANTS):
            job, changes = round_of(maker, job)
            tokens += tokens_of(list(changes))
            await store.write(maker.batch(changes))
        events = await store.timeline(1)
        assert tokens_of(events) == [*tokens[:KEEP_FIRST_GRANTS], *tokens[-KEEP_GRANTS:]]
        assert folded(events) == job
        page = await store.events_after(0, 10_000)
        assert (page.gone_to, [event.seq for event in page.events]) == (0, [event.seq for event in events])


@pytest.mark.usefixtures("rows_of_one_event")
async def test_a_long_journal_is_compacted_in_slices(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch waits for more than one slice, even if a grant has more events than that."""
    monkeypatch.setattr(shortening, "SHORTENED_AT_ONCE", 20)
    maker = ChangeFactory()
    change = maker.create()
    job, changes = job_of(change), [change]
    for number in range(2 * KEEP_GRANTS):
        job, more = round_of(maker, job, heartbeats=40 if number == 50 else 0)
        changes += more
    expected = 1 + 2 * (KEEP_FIRST_GRANTS + KEEP_GRANTS)
    async with open_store(path) as (store, _):
        await store.write(maker.batch(changes))
        counts = []
        while store._projection._shortener._waiting:
            counts.append(len(stored_events(store._connection.raw)))
            await store.write(maker.batch([maker.create()]))
        assert counts[0] == len(changes) - 18, "two slices would remove more: the grant at the end of a slice stays"
        count = len(stored_events(store._connection.raw, 1))
        assert count == expected + 42, "a grant longer than a slice is kept"
        assert folded(await store.timeline(1)) == job


@pytest.mark.usefixtures("rows_of_one_event")
async def test_a_journal_is_compacted_after_a_damaged_row(maker: ChangeFactory, path: str) -> None:
    change = maker.create()
    job, changes = job_of(change), [change]
    for _ in range(2 * KEEP_GRANTS):
        job, more = round_of(maker, job)
        changes += more
    damaged = 1 + 2 * 45 + 1  # the event of a grant
    async with open_store(path) as (store, _):
        await store.write(maker.batch(changes[: 2 * damaged]))
        store._connection.raw.execute("UPDATE events SET at = 0 WHERE seq = ?", (damaged,))
        await store.write(maker.batch(changes[2 * damaged :]))
        seqs = [
            seq for (seq,) in store._connection.raw.execute("SELECT seq FROM events WHERE job_seq = 1 ORDER BY seq")
        ]
        assert seqs == [*range(1, damaged + 2), *range(len(changes) - 2 * KEEP_GRANTS + 1, len(changes) + 1)]
        events = await store.timeline(1)
        assert folded(events) == job
        assert len(events) == len(seqs) - 1, "it was quarantined"


async def test_returned_grants_are_counted_for_a_limited_number_of_jobs(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortening, "GIVEN_BACK_KEPT", 2)
    maker = ChangeFactory()
    created = [maker.create() for _ in range(3)]
    async with open_store(path) as (store, _):
        await store.write(maker.batch(created))
        jobs = []
        for change in [*created, created[1]]:
            job, changes = round_of(maker, maker.jobs[job_of(change).seq])
            jobs.append(job)
            await store.write(maker.batch(changes))
        assert store._projection._shortener._returned_grants == {3: (0, 1), 2: (0, 2)}
        await store.write(maker.batch([maker.finish(jobs[2], "failed")]))
        assert store._projection._shortener._returned_grants == {2: (0, 2)}


async def test_recently_written_payloads_are_cached(maker: ChangeFactory, store: Store, path: str) -> None:
    await store.write(maker.batch([maker.create(), maker.create()]))
    assert store.cached_payloads([1, 2, 3]) == {seq: maker.payloads[seq] for seq in (1, 2)}
    assert store.cached_payloads([]) == {}


async def test_a_timeline_can_be_limited_to_its_latest_events(maker: ChangeFactory, store: Store) -> None:
    change = maker.create()
    await store.write(maker.batch([change]))
    for _ in range(5):
        change = maker.grant(job_of(change))
        await store.write(maker.batch([change, maker.create()]))
        change = maker.requeue(job_of(change))
        await store.write(maker.batch([change]))
    whole = await store.timeline(1)
    assert len(whole) == 11
    for limit in (1, 2, 10, 11, 50):
        assert await store.timeline(1, limit) == whole[-limit:]


async def test_old_journals_of_deleted_jobs_are_pruned(maker: ChangeFactory, store: Store) -> None:
    first, second = maker.create(), maker.create()
    ended = maker.finish(job_of(first))
    await store.write(maker.batch([first, second, ended, maker.queue_event("video", True)]))
    maker.now += 1_000
    await store.write(maker.batch([maker.delete(job_of(ended))]))
    assert await store.prune(NOW, 100) == 0
    assert await store.prune(NOW + 1, 100) == 1  # of the queue
    assert await store.prune(NOW + 1_000, 100) == 0  # at exactly that time it is kept
    assert await store.prune(NOW + 1_001, 1) == 1
    assert [event.type for event in await store.timeline(1)] == ["deleted"]
    assert await store.prune(NOW + 1_001, 2) == 1
    assert await store.timeline(1) == []
    assert await store.prune(NOW + 1_001, 2) == 0
    assert len(await store.timeline(2)) == 1
    assert store._connection.raw.execute("SELECT count(*) FROM deleted_jobs").fetchone() == (0,)


async def test_the_used_bytes_grow_and_shrink_with_the_events(store: Store) -> None:
    maker, empty = ChangeFactory(), await store.used_bytes()
    created = [maker.create() for _ in range(500)]
    await store.write(maker.batch(created))
    await store.write(maker.batch([maker.delete(job_of(each)) for each in created]))
    await store.finish_upkeep()
    full = await store.used_bytes()
    assert full > empty + 50_000
    assert await store.prune(maker.now + 1, 10_000) == 1_000
    await store.finish_upkeep()
    assert await store.used_bytes() < (full + empty) / 2


async def test_pruned_events_are_reported_after_a_restart(maker: ChangeFactory, path: str) -> None:
    async with open_store(path) as (store, _):
        first, second = maker.create(), maker.create()
        ended = maker.finish(job_of(maker.grant(job_of(first))))
        await store.write(maker.batch([first, second, ended, maker.queue_event("video", True)]))
        maker.now += 1_000
        await store.write(maker.batch([maker.delete(job_of(ended))]))
        last = maker.numbers.next_event - 1
        assert (await store.events_after(0, 100)).gone_to == 0
        assert await store.prune(NOW + 1, 100) == 1
        of_the_queue = (await store.events_after(0, 100)).gone_to
        assert of_the_queue == last - 1
        await store.prune(NOW + 1_001, 100)
        page = await store.events_after(0, 100)
        assert (page.last, page.gone_to) == (last, last)
        assert [event.job_seq for event in page.events] == [2]  # older and undamaged
    async with open_store(path) as (store, _):
        assert (await store.events_after(0, 100)).gone_to == last


async def test_a_damaged_event_number_marks_no_future_events_as_missing(maker: ChangeFactory, path: str) -> None:
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.create() for _ in range(5)]))
    with edit_store(path) as conn:
        conn.execute(f"UPDATE events SET seq = {1 << 60} WHERE seq = 3")
    async with open_store(path) as (store, _):
        assert (await store.events_after(0, 10)).gone_to == 5
