"""Damage: a row with a wrong checksum is reported and quarantined, and never served."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from typing import Final

import msgspec
import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.model import storage
from jobd.model.events import fold
from jobd.model.job import FINISHED, LIVE, Job, Options, Result
from jobd.storage.damage import quarantine
from jobd.storage.store import Store, StoreTooNew, StoreUnreadable
from tests.support import store_files
from tests.support.factories import NOW, ChangeFactory

REBUILT: Final = "an index did not match its rows: all indexes were rebuilt; run `jobd doctor`"


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("column", ["queue", "worker", "status", "id", "created_at", "body", "crc"])
async def test_a_damaged_live_row_is_quarantined_at_the_start(path: str, column: str, bit: int) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, frozenset({"processing"}))
    store_files.flip(path, "jobs", column, "seq", job.seq, bit)
    reason = "its text is not readable" if bit == 7 and column not in ("created_at", "crc") else "its checksum is wrong"
    async with store_files.open_store(path) as (store, found):
        assert found.quarantined == {job.id: reason}
        assert any(f"job {job.id} was quarantined" in fault for fault in found.faults)
        assert job.seq not in store_files.seqs(found.live())
        assert (await store.load([job.id], [], [])) == storage.LoadedRows(bad={job.id: reason})
        assert store._database.totals == store_files.recounted(store)
        await store.finish_upkeep()
        moved = store._connection.raw.execute("SELECT id, payload FROM quarantined_jobs").fetchall()
        assert moved == [(job.id, maker.payloads[job.seq])]
    store_files.remove_quarantined(maker, job)
    async with store_files.open_store(path) as (store, found):
        assert found.quarantined == {job.id: reason}
        await store_files.assert_holds(store, found, maker)


async def test_the_tables_are_written_after_a_quarantine(path: str) -> None:
    """Writes that belong to no batch too, before and after the next batch."""
    maker = await store_files.make_store(path)
    store_files.flip(path, "jobs", "body", "seq", store_files.pick(maker, LIVE).seq)
    async with store_files.open_store(path) as (store, _):
        await store.save_stats(b"{}")
        await store.write(maker.batch([maker.create()]))
        await store.save_stats(b'{"again":1}')
    async with store_files.open_store(path) as (_, found):
        assert found.stats == b'{"again":1}'


async def test_a_job_is_quarantined_as_its_latest_record_has_it(maker: ChangeFactory, path: str) -> None:
    async with store_files.open_store(path) as (store, _):
        created = maker.create("a")
        await store.write(maker.batch([created, maker.create("b")]))
    store_files.flip(path, "payloads", "body", "job_seq", store_files.job_of(created).seq)
    async with store_files.open_store(path, "inline") as (store, _):
        granted = maker.grant(store_files.job_of(created))
        await store.write(maker.batch([granted, maker.finish(store_files.job_of(granted))]))
        assert store._projection.behind
        assert (await store.load([], [store_files.job_of(created).seq], [])).bad
        (row,) = store._connection.raw.execute("SELECT row FROM quarantined_jobs").fetchone()
        assert msgspec.json.decode(row)["status"] == "completed"
        assert store._database.totals == store_files.recounted(store)


@pytest.mark.parametrize("column", ["queue", "id", "error_code", "body", "expires_at", "created_at", "crc"])
@pytest.mark.parametrize("how", ["load", "find", "expired"])
async def test_a_damaged_finished_row_is_quarantined_when_it_is_read(path: str, column: str, how: str) -> None:
    maker = await store_files.make_store(path)
    job = next(j for j in maker.jobs.values() if j.status == "failed" and j.ended is not None)
    store_files.flip(path, "jobs", column, "seq", job.seq)
    quarantined: list[storage.Quarantined] = []
    async with store_files.open_store(path) as (store, found):
        assert found.quarantined == {}
        store.on_quarantined = quarantined.append
        if how == "load":
            assert (await store.load([job.id], [], [])).bad == {job.id: "its checksum is wrong"}
        elif how == "find":
            page = await store.find_jobs(storage.JobQuery(limit=200))
            assert {j.seq for j, _ in page.jobs} == maker.jobs.keys() - {job.seq}
        else:
            assert job.id not in await store.expired_jobs(maker.now * 2, 1_000)
        assert (await store.load([job.id], [], [])).bad == {job.id: "its checksum is wrong"}
        counted = None if column == "queue" else (job.options.queue, "failed")
        assert quarantined == [storage.Quarantined(job.id, "its checksum is wrong", counted)]
        assert store._database.totals == store_files.recounted(store)
    if column == "queue":
        return  # its queue is unknown: the doctor recounts
    store_files.remove_quarantined(maker, job)
    await store_files.assert_store_holds(path, maker)


@pytest.mark.parametrize(
    "damage", ["UPDATE payloads SET body = '1' WHERE job_seq = ?", "DELETE FROM payloads WHERE job_seq = ?"]
)
async def test_a_damaged_payload_is_not_served_and_quarantines_its_job(path: str, damage: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, LIVE)
    with store_files.edit_store(path) as conn:
        conn.execute(damage.replace("'1'", "X'31'"), (job.seq,))
    async with store_files.open_store(path) as (store, found):
        assert found.faults == []
        other = maker.create()
        with pytest.raises(storage.BadRows) as caught:
            await store.write(maker.batch([other], payloads=[job.seq]))
        assert list(caught.value.jobs) == [job.id]
        assert (await store.load([store_files.job_of(other).id], [], [])).jobs == {}  # the batch was not written
        await store.quarantine(job, caught.value.jobs[job.id])
        assert list((await store.load([job.id], [], [])).bad) == [job.id]
        await store.write(maker.batch([other]))
    store_files.remove_quarantined(maker, job)
    async with store_files.open_store(path) as (store, found):
        assert list(found.quarantined) == [job.id]
        await store_files.assert_holds(store, found, maker)


@pytest.mark.parametrize("how", ["changed", "deleted"])
async def test_a_batch_fails_completely_if_one_of_its_rows_was_quarantined_since(path: str, how: str) -> None:
    """A page of jobs may find a damaged row after a batch about its job was decided."""
    maker = ChangeFactory()
    async with store_files.open_store(path) as (store, _):
        created, other = maker.create("a"), maker.create("b")
        granted = maker.grant(store_files.job_of(created))
        finished = maker.finish(store_files.job_of(granted))
        await store.write(maker.batch([created, other, granted, *([finished] if how == "deleted" else [])]))
        late = (
            maker.delete(store_files.job_of(finished))
            if how == "deleted"
            else maker.progress(store_files.job_of(granted), 5)
        )
        await store.finish_upkeep()
        store._connection.raw.execute(
            "UPDATE jobs SET created_at = created_at + 1 WHERE seq = ?", (store_files.job_of(created).seq,)
        )
        assert "a" not in {job.id for job, _ in (await store.find_jobs(storage.JobQuery())).jobs}
        with pytest.raises(storage.BadRows) as caught:
            await store.write(maker.batch([late, maker.grant(store_files.job_of(other))]))
        assert caught.value.jobs == {"a": "its checksum is wrong"}
        assert store._database.totals == store_files.recounted(store)
        assert (await store.load(["b"], [], [])).jobs["b"] == store_files.job_of(other)
        await store.write(maker.batch([maker.create("c")]))
    async with store_files.open_store(path) as (_, found):
        assert sorted(job.id for job in found.live()) == ["b", "c"]
        assert found.quarantined == {"a": "its checksum is wrong"}


async def test_counts_decided_before_a_quarantine_are_written_without_the_row(path: str) -> None:
    """Found by simulation, seed 1013: the old counts were written, and a power cut kept them."""
    maker, quarantined = ChangeFactory(), [storage.Quarantined("a", "its checksum is wrong", ("default", "completed"))]
    async with store_files.open_store(path) as (store, _):
        changes = [maker.create(name, options=Options("default")) for name in "abc"]
        granted = [maker.grant(store_files.job_of(change)) for change in changes]
        finished = [maker.finish(store_files.job_of(change)) for change in granted]
        await store.write(maker.batch([*changes, *granted, *finished[:2]]))
        await store.finish_upkeep()
        store._connection.raw.execute("UPDATE jobs SET created_at = created_at + 1 WHERE id = 'a'")
        reported: list[storage.Quarantined] = []
        store.on_quarantined = reported.append
        count = storage.QueueRow(completed=3)
        looking = asyncio.ensure_future(store.find_jobs(storage.JobQuery()))
        await asyncio.sleep(0)  # it is being written
        batch = maker.batch([finished[2]])
        assert (batch.queues, reported) == ({"default": count}, [])
        await store.write(batch)
        await looking
        assert reported == quarantined
    async with store_files.open_store(path) as (store, found):
        assert found.queues == {"default": count.without("completed")}
        # Memory has already subtracted those that were reported to it.
        maker.queues["default"] = storage.QueueRow(paused=True, completed=2)
        await store.write(maker.batch([maker.create("d", options=Options("default"))]))
    async with store_files.open_store(path) as (_, found):
        assert found.queues == {"default": storage.QueueRow(completed=2, paused=True)}


@pytest.mark.parametrize(
    "damage", ["jobs SET created_at = created_at + 1 WHERE seq", "payloads SET body = x'00' WHERE job_seq"]
)
async def test_on_a_full_disk_a_damaged_row_is_moved_later_and_counted_until_then(
    store: Store, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = ChangeFactory()
    quarantined: list[storage.Quarantined] = []
    created = maker.create("a", options=Options("default"))
    granted = maker.grant(store_files.job_of(created))
    await store.write(maker.batch([created, granted, maker.finish(store_files.job_of(granted))]))
    store.on_quarantined = quarantined.append
    await store.finish_upkeep()
    store._connection.raw.execute(f"UPDATE {damage} = 1")
    reason = "its checksum is wrong" if damage.startswith("jobs") else "the payload is damaged: its checksum is wrong"
    with monkeypatch.context() as patch:
        patch.setattr(quarantine, "_move_job", raise_disk_full)
        for _ in range(2):
            assert (await store.find_jobs(storage.JobQuery())).jobs == []
        assert await store.expired_jobs(maker.now * 2, 10) == []
    assert quarantined == [storage.Quarantined("a", reason, is_moved=False)]
    assert store._database.totals == store_files.recounted(store)
    assert await store.expired_jobs(maker.now * 2, 10) == []  # it was moved and hides nothing
    assert quarantined[1:] == [storage.Quarantined("a", reason, ("default", "completed"))]
    assert store._database.totals == store_files.recounted(store)
    assert store._database.unmoved == {}


async def test_repeatedly_found_damage_uses_no_more_memory_each_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = ChangeFactory()
    await store.write(maker.batch([maker.create() for _ in range(10)]))
    await store.finish_upkeep()
    store._connection.raw.execute("UPDATE jobs SET created_at = created_at + 1 WHERE seq <= 5")
    with monkeypatch.context() as patch:
        patch.setattr(quarantine, "_move_job", raise_disk_full)
        for _ in range(20):
            assert len((await store.find_jobs(storage.JobQuery())).jobs) == 5
    tables = store._database
    assert (len(tables.recently_quarantined), len(tables.faults), tables.quarantined_count) == (5, 5, 5)
    await store.write(maker.batch([maker.create()]))
    assert (tables.recently_quarantined, tables.quarantined_count) == ({}, 5)
    assert len((await store.find_jobs(storage.JobQuery())).jobs) == 6
    assert tables.quarantined_count == 10
    await store.write(maker.batch([maker.create()]))
    assert (tables.recently_quarantined, tables.unmoved) == ({}, {})


def raise_disk_full(*_: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error


async def test_damaged_expired_rows_do_not_hide_later_ones(maker: ChangeFactory, store: Store) -> None:
    """Found by simulation, seed 17782: a slice with only damaged rows was mistaken for the end."""
    for name in "abc":
        created = maker.create(name)
        granted = maker.grant(store_files.job_of(created))
        finished = maker.finish(store_files.job_of(granted))
        await store.write(maker.batch([created, granted, finished]))
    expires = store_files.job_of(finished).expires_at
    assert expires is not None
    await store.finish_upkeep()
    store._connection.raw.execute("UPDATE jobs SET created_at = created_at + 1 WHERE id IN ('a', 'b')")
    assert await store.expired_jobs(expires, 1) == ["c"]
    assert store._database.totals == store_files.recounted(store)


async def test_damaged_rows_that_cannot_be_moved_do_not_hide_later_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, deletions free space."""
    maker = ChangeFactory()
    for name in "abcd":
        created = maker.create(name)
        granted = maker.grant(store_files.job_of(created))
        await store.write(maker.batch([created, granted, maker.finish(store_files.job_of(granted))]))
    await store.finish_upkeep()
    store._connection.raw.execute("UPDATE jobs SET created_at = created_at + 1 WHERE id IN ('a', 'b')")
    monkeypatch.setattr(quarantine, "_move_job", raise_disk_full)
    assert await store.expired_jobs(maker.now * 2, 1) == ["c"]
    assert await store.expired_jobs(maker.now * 2, 10) == ["c", "d"]
    assert await store.expired_jobs(maker.now * 2, 1, 4) == []


@pytest.mark.parametrize("status", ["queued", "completed"])
async def test_a_row_with_the_damaged_id_of_another_job_is_quarantined_at_the_start(path: str, status: str) -> None:
    """The start rebuilds the index, and two rows with one id made it fail."""
    maker = ChangeFactory()
    async with store_files.open_store(path) as (store, _):
        first, second = maker.create("job-0"), maker.create("job-1")
        await store.write(maker.batch([first, second]))
        if status == "completed":
            granted = maker.grant(store_files.job_of(first))
            await store.write(maker.batch([granted, maker.finish(store_files.job_of(granted))]))
    with store_files.without_indexes(path) as conn:
        conn.execute("UPDATE jobs SET id = 'job-1' WHERE id = 'job-0'")
    async with store_files.open_store(path) as (store, found):
        if status == "queued":
            assert found.quarantined == {"job-0": "its checksum is wrong"}
            assert [job.id for job in found.live()] == ["job-1"]
        assert (await store.load(["job-1"], [], [])).jobs["job-1"] == store_files.job_of(second)
        assert (await store.load(["job-0"], [], [])).bad == {"job-0": "its checksum is wrong"}


async def test_a_payload_quarantined_with_its_row_is_reported_with_the_job(maker: ChangeFactory, path: str) -> None:
    created = maker.create("a")
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.batch([created]))
    async with store_files.open_store(path) as (store, _):  # a new process, so that the payload is not cached
        await store.finish_upkeep()
        store._connection.raw.execute("UPDATE jobs SET created_at = created_at + 1 WHERE seq = 1")
        assert "a" not in {job.id for job, _ in (await store.find_jobs(storage.JobQuery())).jobs}
        assert await store.load([], [1], []) == storage.LoadedRows(bad={"a": "its checksum is wrong"})
        assert await store.load([], [99], []) == storage.LoadedRows()
        with pytest.raises(storage.BadRows) as caught:
            await store.write(maker.batch([maker.create("b")], payloads=[1]))
        assert list(caught.value.jobs) == ["a"]


async def test_damaged_queues_stats_and_reports_are_quarantined_and_queues_recounted(path: str) -> None:
    maker = await store_files.make_store(path)
    async with store_files.open_store(path) as (store, _):
        await store.save_stats(b"{}")
        await store.write(maker.batch([maker.queue_event("video", True)], report=b"r1"))
        await store.write(maker.batch([], report=b"r2"))
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE queues SET paused = 0 WHERE name = 'video'")
        conn.execute("UPDATE figures SET body = X'31'")
        conn.execute("UPDATE reports SET body = X'31' WHERE seq = 1")
    async with store_files.open_store(path) as (store, found):
        assert found.stats is None
        open_again = replace(maker.queues["video"], paused=False, paused_at=None, paused_by=None)
        assert found.queues == {**maker.queues, "video": open_again}
        assert len(found.faults) == 2
        assert any("queues video: its checksum is wrong: it may have been paused" in fault for fault in found.faults)
        assert await store.reports(9) == [b"r2"]


@pytest.mark.parametrize(("column", "reported"), [("key", []), ("job_seq", [REBUILT])])
async def test_a_damaged_tombstone_is_quarantined_and_deletes_nothing(
    path: str, column: str, reported: list[str]
) -> None:
    maker = await store_files.make_store(path)
    async with store_files.open_store(path) as (store, _):
        waiting = [storage.Tombstone(seq, f"gone-{seq}", f"k/{seq}", NOW, NOW) for seq in (901, 902)]
        await store.write(maker.batch([], tombstones=waiting))
    store_files.flip(path, "tombstones", column, "job_seq", 901)
    seq = 901 if column == "key" else 900
    async with store_files.open_store(path) as (store, found):
        assert found.tombstones == 2
        due = await store.due_tombstones(NOW, 9)
        assert due == storage.DueTombstones([(waiting[1], False)], damaged=1)
        quarantined = f"tombstones {seq}: its checksum is wrong; the row was quarantined"
        assert store.take_faults() == [*reported, quarantined]
        assert (await store.due_tombstones(NOW, 9)).damaged == 0


async def test_damaged_tombstones_that_cannot_be_moved_do_not_hide_later_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = ChangeFactory()
    waiting = [storage.Tombstone(seq, f"gone-{seq}", f"k/{seq}", NOW, NOW + seq) for seq in range(1, 30)]
    await store.write(maker.batch([], tombstones=waiting))
    await store.finish_upkeep()
    store._connection.raw.execute("UPDATE tombstones SET tries = 7 WHERE job_seq <= 25")
    with monkeypatch.context() as patch:
        patch.setattr(quarantine, "_quarantine_row", raise_disk_full)
        for _ in range(2):
            assert await store.due_tombstones(NOW + 99, 10) == storage.DueTombstones(
                [(each, False) for each in waiting[25:]], unmoved=25
            )
            assert (await store.due_tombstones(NOW + 99, 2)).unmoved == 20  # it skips some of them, not all
    assert (await store.due_tombstones(NOW + 99, 10)) == storage.DueTombstones(
        [(each, False) for each in waiting[25:]], damaged=25
    )
    assert (await store.due_tombstones(NOW + 99, 10)) == storage.DueTombstones([(each, False) for each in waiting[25:]])


async def test_a_missing_live_row_is_reported_at_every_start(path: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, LIVE)
    live = sum(j.status in LIVE for j in maker.jobs.values())
    with store_files.edit_store(path) as conn:
        conn.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
    for _ in range(2):
        async with store_files.open_store(path) as (store, found):
            assert f"{live - 1} live jobs were found, but {live} are recorded" in found.faults
            await store.write(maker.batch([maker.create()]))
            live += 1


async def test_an_older_version_of_a_row_is_reported(maker: ChangeFactory, path: str) -> None:
    change = maker.create("a")
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.batch([change]))
        await store.finish_upkeep()
        old = store._connection.raw.execute("SELECT * FROM jobs").fetchone()
        await store.write(maker.batch([maker.grant(store_files.job_of(change))]))
    with store_files.edit_store(path) as conn:
        conn.execute(f"REPLACE INTO jobs VALUES ({', '.join('?' * len(old))})", old)
    async with store_files.open_store(path) as (_, found):
        assert "the 1 live jobs differ from those that are recorded" in found.faults


async def test_a_damaged_index_of_live_jobs_is_rebuilt_at_the_start(path: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, LIVE)
    store_files.omit_from_index(path, "jobs_live", job.seq)
    async with store_files.open_store(path) as (store, found):
        assert found.faults == [REBUILT]
        found.faults.clear()
        await store_files.assert_holds(store, found, maker)


async def test_an_index_that_leads_to_another_job_is_rebuilt(path: str) -> None:
    maker = await store_files.make_store(path)
    one, two = [job for job in maker.jobs.values() if job.status in FINISHED and 10 <= job.seq < 100][:2]
    with store_files.edit_store(path) as conn:  # swap two entries of the index of ids
        conn.execute("PRAGMA writable_schema = ON")
        sql = "SELECT rootpage, sql FROM sqlite_schema WHERE name = 'jobs_id'"
        root, _ = conn.execute(sql).fetchone()
    swap_index_entries(path, root, one, two)
    async with store_files.open_store(path) as (store, _):
        loaded = await store.load([one.id, two.id], [], [])
        assert loaded.jobs == {one.id: one, two.id: two}
        assert any("rebuilt" in fault for fault in store.take_faults())


def swap_index_entries(path: str, root: int, one: Job, two: Job) -> None:
    """Swap the ids `one` and `two` in the index. Both have the same length."""
    assert len(one.id) == len(two.id)
    content = bytearray(store_files.read_file(path))
    begin, end = (root - 1) * 4096, root * 4096
    page = content[begin:end]
    first, second = page.find(one.id.encode()), page.find(two.id.encode())
    assert first > 0
    assert second > 0
    # The keys stay in order; their row numbers are swapped.
    a, b = first + len(one.id), second + len(two.id)
    page[a], page[b] = page[b], page[a]
    content[begin:end] = page
    store_files.write_file(path, content)


def spoil_page(path: str, mark: bytes) -> None:
    """Make the page with `mark` unreadable by an invalid page type."""
    content = bytearray(store_files.read_file(path))
    place = content.find(mark)
    assert place > 0
    content[place // 4096 * 4096] = 0x77
    store_files.write_file(path, content)


async def make_long_store(path: str) -> ChangeFactory:
    """A store with finished jobs first, on pages of their own, and then live jobs."""
    maker = ChangeFactory(2)
    async with store_files.open_store(path) as (store, _):
        changes = [maker.create() for _ in range(300)]
        await store.write(maker.batch(changes))
        await store.write(maker.batch([maker.finish(job) for job in list(maker.jobs.values())[:250]]))
    with store_files.edit_store(path) as conn:
        conn.execute("VACUUM")  # removes remains of old rows between the new ones
    return maker


async def test_an_unreadable_page_of_jobs_is_skipped(path: str) -> None:
    maker = await make_long_store(path)
    spoil_page(path, b"job-100completed")
    async with store_files.open_store(path) as (store, found):
        assert found.faults == []
        assert list((await store.load(["job-100"], [], [])).bad) == ["job-100"]
        assert (await store.load(["job-1"], [], [])).jobs == {"job-1": maker.jobs[1]}
        assert any("job job-100: the row cannot be read" in fault for fault in store.take_faults())
        jobs, _ = await store_files.all_pages(store, storage.JobQuery(limit=200))
        assert all(maker.jobs[job.seq] == job for job in jobs)
        seen = [job.seq for job in jobs]
        assert seen == sorted(set(seen), reverse=True)
        assert {1, 250, 300} < set(seen)
        for scan in (7, 5_000):
            upwards, _ = await store_files.all_pages(store, storage.JobQuery(limit=200, scan=scan, after=0))
            assert [job.seq for job in upwards] == seen[::-1]
        assert 100 not in seen
        assert any(fault.startswith("jobs ") and "cannot be read" in fault for fault in store.take_faults())
        await store.write(maker.batch([maker.create()]))


async def test_an_unreadable_page_of_live_jobs_stops_the_start(path: str) -> None:
    await make_long_store(path)
    spoil_page(path, b"job-300queued")
    with pytest.raises(StoreUnreadable, match="jobd restore"):
        await Store.open(path)


async def test_an_unreadable_page_of_payloads_quarantines_its_jobs(path: str) -> None:
    maker = await make_long_store(path)
    spoil_page(path, maker.payloads[300])
    async with store_files.open_store(path) as (store, found):
        assert len(found.live()) == 50
        with pytest.raises(storage.BadRows):
            await store.write(maker.batch([], payloads=[300]))
        loaded = await store.load(["job-300", "job-1"], [300, 1], [])
        assert list(loaded.jobs) == ["job-1"]
        assert "the payload cannot be read" in loaded.bad["job-300"]
        assert loaded.payloads[1].body == maker.payloads[1]
    async with store_files.open_store(path) as (_, found):
        assert "job-300" in found.quarantined
        assert len(found.live()) == 49


def event_of(job: Job) -> bytes:
    """Return a part of each event of `job` as it is in the file."""
    return msgspec.msgpack.encode(job.id) + msgspec.msgpack.encode(job.options.queue)


async def test_an_unreadable_page_of_events_is_skipped_in_a_timeline(path: str) -> None:
    maker = await make_long_store(path)
    spoil_page(path, event_of(maker.jobs[300]))
    async with store_files.open_store(path) as (store, _):
        assert await store.timeline(300) == []
        assert [event.type for event in await store.timeline(200)] == ["created", "completed"]
        (fault,) = store.take_faults()
        assert fault.startswith("events 300 to 300: 1 cannot be read")


async def test_an_unreadable_page_of_events_is_missing_in_the_event_log(path: str) -> None:
    maker = await make_long_store(path)
    spoil_page(path, event_of(maker.jobs[300]))
    async with store_files.open_store(path) as (store, _):
        first = await store.events_after(0, 5)
        assert (len(first.events), first.gone_to) == (5, 0)  # another page of the index
        hidden = await store.events_after(290, 100)
        assert hidden == storage.EventPage([], hidden.last, hidden.last)
        assert "the event log cannot be read after event 290" in store.take_faults()[-1]


async def test_an_event_log_with_an_unreadable_index_is_read_without_it(path: str) -> None:
    maker = await store_files.make_store(path)
    store_files.damage_tree(path, "events_job")
    job = store_files.pick(maker, LIVE)
    async with store_files.open_store(path) as (store, _):
        row = None
        for event in await store.timeline(job.seq):
            row = fold(row, event)
        assert row == job
        (fault,) = store.take_faults()
        assert fault.startswith("the index of the event log cannot be read")


async def test_an_unreadable_index_of_late_results_stops_no_plan(maker: ChangeFactory, path: str) -> None:
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.batch([maker.create("a")]))
    store_files.damage_tree(path, "late_results_job")
    async with store_files.open_store(path) as (store, _):
        assert await store.count_late_results([1]) == {}
        (fault,) = store.take_faults()
        assert fault.startswith("the late results cannot be counted")


async def test_an_index_that_leads_to_events_of_another_job_is_rebuilt(path: str) -> None:
    maker = ChangeFactory(2)
    async with store_files.open_store(path) as (store, _):
        changes = [maker.create(f"job-{number}") for number in range(3)]
        await store.write(maker.batch(changes))
    with store_files.edit_store(path) as conn:
        (root,) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events_job'").fetchone()
    content = bytearray(store_files.read_file(path))
    page = bytes(content[(root - 1) * 4096 : root * 4096])
    entry = page.find(b"\x03\x01\x01\x02\x02")  # the entry for job 2, event 2
    assert entry > 0
    content[(root - 1) * 4096 + entry + 3] = 1  # changes the entry to event 2 of job 1
    store_files.write_file(path, content)
    async with store_files.open_store(path) as (store, _):
        assert [event.job_id for event in await store.timeline(1)] == ["job-0"]
        assert [event.job_id for event in await store.timeline(2)] == ["job-1"]
        assert any("rebuilt" in fault for fault in store.take_faults())


@pytest.mark.slow
async def test_no_flipped_bit_in_the_file_causes_a_wrong_response(path: str) -> None:
    from jobd.storage.offline import doctor

    maker = await store_files.make_store(path)
    whole = store_files.read_file(path)
    pick_bit = random.Random(3)
    seen: dict[str, int] = {"rejected": 0, "noticed": 0, "nothing": 0}
    for _ in range(80):
        content = bytearray(whole)
        place = pick_bit.randrange(len(content))
        content[place] ^= 1 << pick_bit.randrange(8)
        store_files.write_file(path, content)
        problems = _examined(path)
        try:
            async with store_files.open_store(path) as (store, found):
                noticed = bool(found.faults or found.quarantined)
                noticed |= await assert_never_wrong(store, found, maker, noticed or problems)
                seen["noticed" if noticed else "nothing"] += 1
        except (StoreUnreadable, StoreTooNew, sqlite3.DatabaseError):
            seen["rejected"] += 1
        store_files.remove(f"{path}-wal", f"{path}-shm")
    assert doctor.MAX_LISTED > 0
    assert min(seen.values()) > 0, seen


def _examined(path: str) -> bool:
    """Return whether the doctor reports a problem."""
    from jobd.storage.offline import doctor

    try:
        return bool(doctor.check(path))
    except (StoreUnreadable, StoreTooNew):
        return True


async def assert_never_wrong(store: Store, found: storage.OpenedStore, maker: ChangeFactory, excused: bool) -> bool:
    """Check that all served data is correct and that missing data is reported. Return whether the store reported it."""
    for job in found.live():
        assert maker.jobs[job.seq] == job
    loaded = await store.load([job.id for job in maker.jobs.values()], [], [])
    for id_, job in loaded.jobs.items():
        assert maker.jobs[job.seq] == job
        assert job.id == id_
    missing = {job.id for job in maker.jobs.values()} - loaded.jobs.keys() - loaded.bad.keys()
    assert not missing or excused
    some = await store.load([], [job.seq for job in loaded.jobs.values()], [])
    for seq, payload in some.payloads.items():
        assert payload.body == maker.payloads[seq]
    page = await store.find_jobs(storage.JobQuery(limit=200))
    for job, body in page.jobs:
        assert maker.jobs[job.seq] == job
        assert maker.payloads[job.seq] == body
    for job in loaded.jobs.values():
        await store.timeline(job.seq)
    return bool(loaded.bad or some.bad or len(page.jobs) < len(maker.jobs) or store.take_faults())


async def test_a_journal_that_cannot_be_thinned_does_not_reject_a_heartbeat(path: str) -> None:
    maker = ChangeFactory(2)
    async with store_files.open_store(path) as (store, _):
        created = maker.create()
        change = maker.grant(store_files.job_of(created))
        first = maker.jobs[1]
        await store.write(maker.batch([created, change]))
        for _ in range(50):
            change = maker.extend(store_files.job_of(change))
            await store.write(maker.batch([change]))
    with store_files.edit_store(path) as conn:
        conn.execute("VACUUM")
    spoil_page(path, b"extended")
    async with store_files.open_store(path) as (store, found):
        assert [job.id for job in found.live()] == [first.id]
        change = maker.extend(store_files.job_of(change))
        await store.write(maker.batch([change]))  # the first event since the start, so the journal is read
        assert (await store.load([first.id], [], [])).jobs == {first.id: store_files.job_of(change)}


@pytest.mark.parametrize("column", ["worker", "fencing_token", "metadata", "file_path", "at", "crc"])
async def test_a_damaged_late_result_is_quarantined_without_its_job(path: str, column: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, LIVE)
    async with store_files.open_store(path) as (store, _):
        changes = [maker.late(job, token, Result(file_path="/x", metadata=Raw(b"[1]"))) for token in (1, 2)]
        await store.write(maker.batch(changes))
    store_files.flip(path, "late_results", column, "seq", changes[0].seq)
    async with store_files.open_store(path) as (store, found):
        assert found.faults == []
        queries = [storage.LateResultQuery(job.seq, with_results=True)]
        assert (await store.read_late_results(queries)).results[job.seq] == [changes[1].late]
        (fault,) = store.take_faults()
        assert fault == f"late_results {changes[0].seq}: its checksum is wrong; the row was quarantined"
        assert (await store.read_late_results(queries)).results[job.seq] == [changes[1].late]
        assert store.take_faults() == []
    async with store_files.open_store(path) as (store, found):
        assert found.faults == ["damaged rows of late_results in quarantine: 1; run `jobd doctor`"]
        found.faults.clear()
        await store_files.assert_holds(store, found, maker)


async def test_a_late_result_indexed_under_another_job_is_not_shown_there(path: str) -> None:
    maker = await store_files.make_store(path)
    job, other = (job for job in list(maker.jobs.values())[:2])
    async with store_files.open_store(path) as (store, _):
        change = maker.late(job, 1)
        await store.write(maker.batch([change]))
    assert change.late is not None
    with store_files.edit_store(path) as conn:  # the row is undamaged, but the index has another job
        conn.execute("UPDATE late_results SET job_seq = ?", (other.seq,))
    with store_files.without_indexes(path) as conn:
        conn.execute("UPDATE late_results SET job_seq = ?", (job.seq,))
    async with store_files.open_store(path) as (store, _):
        assert (await store.read_late_results([storage.LateResultQuery(other.seq)])).results[other.seq] == []
        assert store.take_faults() == []


@pytest.mark.parametrize("table", ["late_results", "late_results_job", "events"])
async def test_unreadable_late_results_are_left_out(path: str, table: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, LIVE)
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.batch([maker.late(job, 1)]))
    store_files.damage_tree(path, table, bytes(4096))
    async with store_files.open_store(path) as (store, _):
        known = await store.read_late_results([storage.LateResultQuery(job.seq, "lock")])
        assert known.grants == {}
        assert len(known.results[job.seq]) == (table == "events")
        assert (store.take_faults() != []) == (table != "events")
