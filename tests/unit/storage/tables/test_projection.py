"""The tables follow the journal: slices, reads that wait for them, and a start after a crash."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from jobd.model.storage import DiskFull, JobQuery, LateResultQuery, StoredResponse
from jobd.storage import database
from jobd.storage import store as stores
from jobd.storage.store import Store
from jobd.storage.tables import projection as projections
from tests.support.factories import NOW, ChangeFactory
from tests.support.polling import wait_until
from tests.support.store_files import assert_store_holds, edit_store, job_of, open_store


def tail(path: str) -> list[int]:
    """Return the numbers of the records that the tables lack."""
    with edit_store(path) as conn:
        return [number for (number,) in conn.execute("SELECT number FROM journal ORDER BY number")]


def crashed(path: str, directory: Path) -> str:
    """Return the path of a copy of an open store, as a crash of the daemon leaves it."""
    for file in Path(path).parent.glob(f"{Path(path).name}*"):
        shutil.copy(file, directory / file.name)
    return str(directory / Path(path).name)


@pytest.fixture
def no_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only reads and the end write the tables."""
    monkeypatch.setattr(Store, "_plan_slice", lambda self: None)


def fill_for_slices(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let every slice of an open store find the disk full. Return a function that frees it."""
    db = store._database
    commit, apply = db.commit, store._projection._apply

    def full(fn: Any, *args: Any) -> Any:
        if fn == apply:
            raise DiskFull("the disk of this test is full")
        return commit(fn, *args)

    monkeypatch.setattr(db, "commit", full)
    return lambda: monkeypatch.setattr(db, "commit", commit)


async def test_a_slice_writes_a_job_once(store: Store, no_slices: None) -> None:
    maker, statements = ChangeFactory(), list[str]()
    created = maker.create()
    granted = maker.grant(job_of(created))
    for change in (created, granted, maker.finish(job_of(granted))):
        await store.write(maker.batch([change]))
    store._connection.raw.set_trace_callback(statements.append)
    await store.finish_upkeep()
    store._connection.raw.set_trace_callback(None)
    assert len([each for each in statements if " jobs " in each]) == 1


async def test_a_slice_is_bounded_and_reuses_the_pages_of_its_records(store: Store, no_slices: None) -> None:
    maker, statements = ChangeFactory(), list[str]()
    raw = store._connection.raw
    for _ in range(10):
        await store.write(maker.batch([replace(maker.create(), payload=b'"%s"' % (b"x" * 300_000))]))
    (before,) = raw.execute("PRAGMA page_count").fetchone()
    raw.set_trace_callback(statements.append)
    await store.finish_upkeep()
    raw.set_trace_callback(None)
    assert statements.count("COMMIT") == 3
    (after,) = raw.execute("PRAGMA page_count").fetchone()
    assert after <= before + 30


async def test_a_clean_end_leaves_no_tail(maker: ChangeFactory, path: str, no_slices: None) -> None:
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.create()]))
    assert tail(path) == []


async def test_the_tables_are_written_soon(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SLICE_DELAY_S", 0.001)
    maker = ChangeFactory()
    await store.write(maker.batch([maker.create()]))
    assert store.behind == 1
    await wait_until(lambda: not store.behind)


@pytest.mark.parametrize("commit", ["inline", "thread"])
async def test_enough_events_are_written_at_once(path: str, commit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is what they leave for upkeep."""
    monkeypatch.setattr(stores, "SLICE_DELAY_S", 3_600)
    monkeypatch.setattr(database, "CHECKPOINT_FRAMES", 1)
    maker = ChangeFactory()
    async with open_store(path, commit) as (store, _):
        for size in (1, *[projections.SLICE_EVENTS] * (projections.BATCHES_PER_SLICE - 1), 1):
            await store.write(maker.batch([maker.create() for _ in range(size)]))
        assert store.behind == store._projection.behind > 3 * store._projection.slice_events
        await wait_until(lambda: store.behind == 1 and not store._projection.needs_upkeep)


async def test_larger_batches_get_larger_slices(maker: ChangeFactory, store: Store, no_slices: None) -> None:
    """So that the changes of a job in several batches are written once."""
    for size, enough in ((1, 150), (100, 500), (1_000, 1_500)):
        await store.write(maker.batch([maker.create() for _ in range(size)]))
        assert store._projection.slice_events == enough


async def test_reads_by_id_write_the_tables_only_for_what_they_lack(store: Store, no_slices: None) -> None:
    maker = ChangeFactory()
    first = maker.create("a")
    await store.write(maker.batch([first]))
    await store.finish_upkeep()
    second = maker.create("b")
    late = maker.late(job_of(second), 1)
    key = StoredResponse("d1", "b1", NOW, 201, b"{}")
    await store.write(maker.batch([second, late], keys=[key]))
    assert (await store.load(["a", "none"], [1], ["d2"])).jobs == {"a": job_of(first)}
    await store.read_late_results([LateResultQuery(1)])
    assert store._projection.behind == 2
    for read in (
        lambda: store.load(["b"], [], []),
        lambda: store.load([], [], ["d1"]),
        lambda: store.read_late_results([LateResultQuery(2)]),
        lambda: store.timeline(1),
        lambda: store.find_jobs(JobQuery()),
    ):
        await read()
        assert store._projection.behind == 0
        await store.write(
            maker.batch([maker.update(maker.jobs[2], progress_message=str(maker.numbers.next_event))], keys=[key])
        )


async def test_payloads_that_the_tables_lack_are_read_from_memory(store: Store, no_slices: None) -> None:
    maker = ChangeFactory()
    await store.write(maker.batch([maker.create()]))
    assert await store.write(maker.batch([maker.create()], payloads=[1, 2])) == maker.payloads
    loaded = await store.load([], [1, 2], [])
    assert {seq: payload.body for seq, payload in loaded.payloads.items()} == maker.payloads
    assert store._projection.behind == 2
    await store.finish_upkeep()
    await store.write(maker.batch([maker.grant(maker.jobs[1])]))
    assert await store.load([], [1, 2], []) == loaded
    assert store._projection.behind == 1


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["inline", "thread"])
async def test_a_slice_is_repeated_after_a_full_disk(path: str, commit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SLICE_DELAY_S", 0.001)
    monkeypatch.setattr(stores, "RETRY_S", 0.001)
    maker = ChangeFactory()
    async with open_store(path, commit) as (store, _):
        free = fill_for_slices(store, monkeypatch)
        await store.write(maker.batch([maker.create()]))
        await wait_until(lambda: store._projection.is_full)
        free()
        await wait_until(lambda: not store._projection.behind)


@pytest.mark.parametrize("commit", ["inline", "thread"])
async def test_more_events_do_not_repeat_a_slice_on_a_full_disk(
    path: str, commit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SLICE_DELAY_S", 0.001)
    monkeypatch.setattr(projections, "BATCHES_PER_SLICE", 1)
    maker = ChangeFactory()
    async with open_store(path, commit) as (store, _):
        fill_for_slices(store, monkeypatch)
        await store.write(maker.batch([maker.create()]))
        await wait_until(lambda: store._projection.is_full and store._slice is not None)
        retry = store._slice
        await store.write(maker.batch([maker.create() for _ in range(projections.SLICE_EVENTS)]))
        assert store._slice is retry
    assert store._slice is None, "none after the end"


@pytest.mark.parametrize(("synchronous", "level"), [("FULL", 2), ("EXTRA", 3)])
async def test_appends_and_slices_are_synced(path: str, no_slices: None, synchronous: Any, level: int) -> None:
    """Each commit is on the disk before the next begins: the check of the log and its checkpoints rely on that."""
    maker, levels = ChangeFactory(), list[int]()
    store, _ = await Store.open(path, synchronous=synchronous)
    async with store:
        db, conn = store._database, store._connection.raw
        db.before_commit = lambda: levels.extend(conn.execute("PRAGMA synchronous").fetchone())
        for _ in range(2):
            await store.write(maker.batch([maker.create()]))
            await store.finish_upkeep()
    assert levels == [level] * 4


async def test_a_tail_on_a_full_disk_is_in_what_the_start_reads(
    path: str, tmp_path: Path, no_slices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = ChangeFactory()
    (tmp_path / "after").mkdir()
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.create("a"), maker.create("b")]))
        copy = crashed(path, tmp_path / "after")
    with monkeypatch.context() as patch:
        patch.setattr(projections.Projection, "project", raise_disk_full)
        async with open_store(copy) as (store, found):
            assert sorted(job.id for job in found.live()) == ["a", "b"]
            assert [job.id for job, _ in (await store.find_jobs(JobQuery())).jobs] == ["b", "a"]
    assert tail(copy) == [1]
    await assert_store_holds(copy, maker)


def raise_disk_full(*_: Any) -> None:
    raise DiskFull("the disk of this test is full")


# -- damage -----------------------------------------------------------------------------------------------------------


async def test_what_pending_records_concern_is_forgotten_with_them(
    store: Store, no_slices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "SLICE_EVENTS", 2)
    monkeypatch.setattr(projections, "BATCHES_PER_SLICE", 0)
    maker, tables = ChangeFactory(has_extra=False), store._projection
    for number in range(3):
        keys = [StoredResponse(f"{name}{number}", "b", NOW, 201, b"{}") for name in "cd"]
        await store.write(maker.batch([maker.create(str(number)), maker.create()], keys=keys))
    assert all(tables.touches([], [], [f"{name}{number}"]) for name in "cd" for number in range(3))
    await store.write(maker.batch([maker.grant(maker.jobs[1]), maker.grant(maker.jobs[2])]))
    tables.project_slice()
    assert len(tables._payloads) == 4
    assert tables.touches(["0"], [], [])
    assert tables.touches([], [3], [])
    assert tables.touches([], [], ["d1"])
    tables.project_slice()
    assert not tables.touches(["1"], [3, 4], ["d0", "d1"])
    assert tables.touches([], [], ["d2"])
    tables.project()
    assert not tables.touches(["0"], [1, 2], ["d2"])
    assert not tables._payloads


async def test_the_last_batch_of_a_slice_decides_about_a_key(store: Store, no_slices: None) -> None:
    maker = ChangeFactory()

    async def write(kept: str, forgotten: str = "") -> None:
        keys = [StoredResponse(digest, kept, NOW, 201, b"{}") for digest in kept]
        await store.write(maker.batch([maker.create()], keys=keys, forget_keys=[*forgotten]))

    await write("abc")
    await store.finish_upkeep()
    await write("d", "a")
    await write("ae", "bd")
    await write("be", "c")
    stored = (await store.load([], [], [*"abcde"])).responses
    assert {digest: row.body_hash for digest, row in stored.items()} == {"a": "ae", "b": "be", "e": "be"}


@pytest.mark.parametrize("commit", ["inline", "thread"])
@pytest.mark.parametrize("breaks", [True, False])
async def test_an_error_in_a_slice_is_reported(
    path: str, commit: Any, breaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SLICE_DELAY_S", 0.001)
    broken: list[Exception] = []
    maker = ChangeFactory()

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("the disk failed")

    async with open_store(path, commit) as (store, _):
        store.on_broken = broken.append
        monkeypatch.setattr(store._projection, "_apply" if breaks else "project_slice", fail)
        await store.write(maker.batch([maker.create()]))
        await wait_until(lambda: bool(broken))
        assert store._database.is_broken is breaks
        if not breaks:
            monkeypatch.undo()
