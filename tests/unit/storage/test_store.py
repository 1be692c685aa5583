"""The store on real files: batches, restarts, and epochs of fencing tokens."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import threading
from sqlite3 import SQLITE_DENY, SQLITE_OK, SQLITE_PRAGMA

import pytest
from msgspec.structs import replace

from jobd.model.job import COUNTER_MASK
from jobd.model.storage import SPARE_BYTES, Batch, DiskFull, JobQuery, Numbers, OpenedStore, StoredResponse
from jobd.storage import database, files
from jobd.storage.commit_mode import LONG_STALL_S, CommitSetting
from jobd.storage.database import CHECKPOINT_FRAMES
from jobd.storage.store import MEMORY, Store
from jobd.storage.tables.projection import Projection
from tests.support.factories import NOW, ChangeFactory
from tests.support.store_files import assert_holds, assert_store_holds, exists, job_of, make_empty_store, open_store


async def test_a_new_store_is_empty_private_and_durable(path: str) -> None:
    async with open_store(path) as (store, found):
        assert found == OpenedStore(Numbers())
        for name in (path, f"{path}.lock", f"{path}.epoch", f"{path}.ballast"):
            assert stat.S_IMODE(os.stat(name).st_mode) == 0o600, name
        assert os.stat(f"{path}.ballast").st_blocks * 512 >= files.RESERVE_FILE_BYTES
        pragmas = ("journal_mode", "synchronous", "locking_mode")
        raw = store._connection.raw
        assert [raw.execute(f"PRAGMA {p}").fetchone()[0] for p in pragmas] == ["wal", 2, "exclusive"]
        assert not exists(f"{path}-shm")


async def test_synchronous_is_at_least_full(path: str) -> None:
    store, _ = await Store.open(path, synchronous="EXTRA")
    async with store:
        assert store._connection.raw.execute("PRAGMA synchronous").fetchone() == (3,)
    with pytest.raises(ValueError, match="loses acknowledged work"):
        await Store.open(path, synchronous="NORMAL")  # type: ignore[arg-type]


async def test_a_batch_is_one_statement_and_a_slice_is_a_transaction(store: Store) -> None:
    """Jobs, events, stored responses, queues, a report and audit entries."""
    maker, statements = ChangeFactory(), list[str]()
    old = StoredResponse("d0", "b0", NOW, 200, b"{}")
    await store.write(maker.batch([maker.create("old")], keys=[old]))
    first, second = maker.create("a"), maker.create("b")
    changes = [first, second, maker.grant(job_of(first)), maker.finish(job_of(second), "cancelled")]
    keys = [StoredResponse("d1", "b1", NOW, 201, b'{"x":1}')]
    store._connection.raw.set_trace_callback(statements.append)
    await store.write(maker.batch(changes, keys=keys, forget_keys=["d0"], report=b"{}", checked=[1]))
    assert [each.split()[:3] for each in statements] == [["INSERT", "INTO", "journal"]]
    statements.clear()
    await store.finish_upkeep()
    store._connection.raw.set_trace_callback(None)
    words = [each.split()[0] for each in statements]
    assert words[0] == "BEGIN"
    assert words[-1] == "COMMIT"
    assert (words.count("BEGIN"), words.count("COMMIT")) == (1, 1)
    for table in ("jobs", "events", "keys", "reports", "meta", "journal"):
        assert any(table in each for each in statements[1:-1]), table


async def test_a_batch_behind_other_work_does_not_block_the_event_loop(store: Store) -> None:
    maker, busy = ChangeFactory(), threading.Event()
    other = asyncio.create_task(store._connection.run(busy.wait))
    writing = asyncio.create_task(store.write(maker.batch([maker.create()])))
    await asyncio.sleep(0)
    busy.set()  # impossible if the loop waited for the thread
    assert await other is True
    assert await writing == {}


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The thread of each batch."""
    found: list[int] = []
    append = Projection.append

    def note(self: Projection, batch: Batch, reported: int) -> dict[int, bytes]:
        found.append(threading.get_ident())
        return append(self, batch, reported)

    monkeypatch.setattr(Projection, "append", note)
    return found


@pytest.mark.parametrize("commit", ["inline", "thread"])
async def test_a_fixed_mode_commits_in_its_thread(path: str, writers: list[int], commit: CommitSetting) -> None:
    maker = ChangeFactory()
    async with open_store(path, commit) as (store, _):
        for _ in range(3):
            await store.write(maker.any_batch(5))
        assert store.commits_inline == (commit == "inline")
    assert {writer == threading.get_ident() for writer in writers} == {commit == "inline"}
    await assert_store_holds(path, maker)


class FakeClock:
    """Time passes only between two reads, which are before and after COMMIT."""

    def __init__(self) -> None:
        self.commit_s = self._now_s = 0.0

    def perf_counter(self) -> float:
        self._now_s += self.commit_s
        return self._now_s


async def test_a_slow_commit_moves_the_next_ones_to_the_thread(
    path: str, writers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, clock = ChangeFactory(), FakeClock()
    monkeypatch.setattr(database, "time", clock)
    async with open_store(path) as (store, _):
        for clock.commit_s in (LONG_STALL_S / 2, LONG_STALL_S, 0.0, 0.0):
            await store.write(maker.batch([maker.create()]))
        assert not store.commits_inline
    assert [writer == threading.get_ident() for writer in writers] == [True, True, False, False]


async def test_a_wait_for_a_processor_does_not_count_as_a_slow_disk(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, clock = ChangeFactory(), FakeClock()
    clock.commit_s = LONG_STALL_S
    monkeypatch.setattr(database, "time", clock)
    monkeypatch.setattr(database, "processor_wait_s", clock.perf_counter)
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.create()]))
        assert store.commits_inline


async def test_an_inline_commit_waits_in_the_thread_behind_a_call_in_flight(path: str, writers: list[int]) -> None:
    maker, busy, order = ChangeFactory(), threading.Event(), list[str]()
    async with open_store(path, "inline") as (store, _):
        await store.write(maker.batch([maker.create()]))
        reading = asyncio.create_task(store._connection.run(busy.wait))
        writing = asyncio.create_task(store.write(maker.batch([maker.create()])))
        reading.add_done_callback(lambda _: order.append("read"))
        writing.add_done_callback(lambda _: order.append("write"))
        await asyncio.sleep(0)
        busy.set()
        await asyncio.gather(reading, writing)
        assert order == ["read", "write"]
        await store.write(maker.batch([maker.create()]))
    assert [writer == threading.get_ident() for writer in writers] == [True, False, True]


async def test_an_inline_commit_waits_for_the_read_of_a_cancelled_caller(path: str, writers: list[int]) -> None:
    maker, busy = ChangeFactory(), threading.Event()
    async with open_store(path, "inline") as (store, _):
        reading = asyncio.create_task(store._connection.run(busy.wait))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        writing = asyncio.create_task(store.write(maker.batch([maker.create()])))
        await asyncio.sleep(0)
        assert writers == []
        busy.set()
        await writing
    assert writers != [threading.get_ident()]


async def test_commits_run_in_the_thread_during_a_backup(maker: ChangeFactory, path: str, writers: list[int]) -> None:
    idle: list[bool] = []
    async with open_store(path, "inline") as (store, _):
        (await store.backup(lambda *_: idle.append(store._connection.is_idle))).close()
        with store._connection.lend():
            await store.write(maker.batch([maker.create()]))
        await store.write(maker.batch([maker.create()]))
    assert set(idle) == {False}
    assert [writer == threading.get_ident() for writer in writers] == [False, True]


@pytest.mark.parametrize("commit", ["inline", "thread"])
async def test_reads_and_commits_in_turns_keep_every_batch(path: str, commit: CommitSetting) -> None:
    """Reads, scrubs and copies use the thread while batches are committed wherever that is possible."""
    maker = ChangeFactory(3)
    async with open_store(path, commit) as (store, _):
        is_over = False

        async def read() -> None:
            while not is_over:
                await store.find_jobs(JobQuery())
                await store.check_rows(None)

        async def copy() -> None:
            while not is_over:
                (await store.backup()).close()

        others = [asyncio.create_task(each()) for each in (read, read, copy)]
        for _ in range(60):
            await store.write(maker.any_batch(10))
            await asyncio.sleep(0)
        is_over = True
        await asyncio.gather(*others)
    await assert_store_holds(path, maker)


@pytest.mark.parametrize("commit", ["inline", "thread"])
async def test_checkpoints_keep_the_log_short(path: str, commit: CommitSetting) -> None:
    """Also if few rows fill many pages."""
    maker, longest = ChangeFactory(), 0
    large = b'"%s"' % (b"x" * 300_000)
    async with open_store(path, commit) as (store, _):
        assert os.path.getsize(f"{path}-wal") == 32 + CHECKPOINT_FRAMES * 4120  # so that it does not grow at first
        for number in range(60):
            change = maker.create()
            await store.write(maker.batch([replace(change, payload=large) if number % 2 else change]))
            await store.finish_upkeep()
            longest = max(longest, os.path.getsize(f"{path}-wal"))
    assert os.path.getsize(path) > 8 << 20
    assert longest < 1.2 * CHECKPOINT_FRAMES * 4120


async def test_a_failed_checkpoint_is_repeated(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "CHECKPOINT_FRAMES", 5)
    maker, conn, log, statements = ChangeFactory(), store._connection.raw, store._database.log, list[str]()
    assert log is not None

    def note(statement: str) -> None:
        if "checkpoint" in statement:
            statements.append(statement)

    conn.set_trace_callback(note)
    conn.set_authorizer(lambda action, *_: SQLITE_DENY if action == SQLITE_PRAGMA else SQLITE_OK)
    for _ in range(3):
        await store.write(maker.any_batch(5))
        await store.finish_upkeep()
        assert log.has(5)
    conn.set_authorizer(None)
    for _ in range(3):
        await store.write(maker.batch([maker.create()]))
        await store.finish_upkeep()
    conn.set_trace_callback(None)
    assert statements == ["PRAGMA wal_checkpoint(PASSIVE)"] * len(statements)
    assert len(statements) >= 3, "only those that are not denied are traced"
    assert not log.has(40), "the log was restarted"


async def test_an_error_in_upkeep_breaks_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No caller waits for upkeep, so the actor learns of it."""
    errors: list[Exception] = []
    store.on_broken = errors.append
    monkeypatch.setattr(database, "CHECKPOINT_FRAMES", 1)
    monkeypatch.setattr(Projection, "upkeep", lambda self: 1 // 0)
    assert await store.write(ChangeFactory().any_batch(1)) is not None
    await store.finish_upkeep()
    assert [type(error) for error in errors] == [ZeroDivisionError]


async def test_cancelling_the_opening_waits_for_it_and_releases_the_lock(path: str) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def on_locked() -> None:
        begun.set()
        goes_on.wait()

    opening = asyncio.create_task(Store.open(path, on_locked=on_locked))
    await asyncio.to_thread(begun.wait)
    opening.cancel()
    await asyncio.sleep(0)
    assert not opening.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await make_empty_store(path)


async def test_the_last_500_reports_are_kept(maker: ChangeFactory, store: Store) -> None:
    for number in range(503):
        await store.write(maker.batch([], report=b"%d" % number))
    reports = await store.reports(1_000)
    assert reports == [b"%d" % number for number in range(502, 2, -1)]
    assert await store.reports(2) == [b"502", b"501"]


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_a_file_that_is_deleted_or_replaced_is_named(store: Store, path: str, suffix: str) -> None:
    await store.write(ChangeFactory(1).any_batch(10))
    assert await store.replaced_file() is None
    kept = f"{path}.kept"
    os.rename(f"{path}{suffix}", kept)
    assert await store.replaced_file() == f"{os.path.realpath(path)}{suffix}"
    shutil.copy(kept, f"{path}{suffix}")
    assert await store.replaced_file() == f"{os.path.realpath(path)}{suffix}"
    os.rename(kept, f"{path}{suffix}")
    assert await store.replaced_file() is None


async def test_a_store_in_memory_behaves_the_same() -> None:
    maker = ChangeFactory(3)
    async with open_store(MEMORY) as (store, found):
        assert found.live() == []
        for _ in range(30):
            await store.write(maker.any_batch(10))
        assert len((await store.find_jobs(JobQuery(limit=200))).jobs) == len(maker.jobs)
        assert await store.measure_space() is None
        assert await store.replaced_file() is None
        await store.probe(SPARE_BYTES)
        assert await store.drop_reserve() is False
        await store.build_reserve()
        await store.probe()


async def test_the_epoch_after_a_full_counter_is_stored_before_its_first_token(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_epoch, has_room = files.write_epoch, [False, False, True]

    def write_if_there_is_room(path: str, epoch: int) -> None:
        if not has_room.pop(0):
            raise DiskFull("no room for the epoch file")
        write_epoch(path, epoch)

    maker = ChangeFactory(numbers=Numbers(epoch=1, next_token=COUNTER_MASK))
    monkeypatch.setattr(files, "write_epoch", write_if_there_is_room)
    has_room.insert(0, True)  # for the epoch of the new store
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.create("a"), maker.create("b"), maker.grant(maker.jobs[1])]))
        maker.numbers = replace(maker.numbers, epoch=9, next_token=1)
        batch = maker.batch([maker.grant(maker.jobs[2])])
        for _ in range(2):
            with pytest.raises(DiskFull, match="no room for the epoch file"):
                await store.write(batch)
            assert (await store.load(["b"], [], [])).jobs["b"].status == "queued"
            assert files.read_epoch(path) == 1
        await store.write(batch)
        assert files.read_epoch(path) == 9
    assert has_room == []
    async with open_store(path) as (store, found):
        assert not found.marked
        await assert_holds(store, found, maker)


async def test_a_crash_between_two_epochs_ends_no_grant(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = ChangeFactory()
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.create("a"), maker.grant(maker.jobs[1])]))
        reports = maker.numbers

        def crash(epoch: int) -> None:
            raise OSError(errno.EIO, "the disk fails")

        monkeypatch.setattr(store._database, "store_epoch", crash)
        with pytest.raises(OSError, match="the disk fails"):
            await store.write(Batch([], replace(reports, epoch=9, next_token=4, lock_ms=77)))
    async with open_store(path) as (_, found):
        assert (found.marked, found.numbers) == (False, replace(reports, epoch=9, next_token=1))
        assert found.live() == [maker.jobs[1]]
    assert files.read_epoch(path) == 9
