"""A full disk, a broken disk: acknowledged data is durable. The checks of faults kill the process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from jobd.model.job import LIVE
from jobd.model.storage import SPARE_BYTES, DiskFull, JobQuery
from jobd.storage.commit_mode import CommitSetting
from jobd.storage.store import Store, StoreBroken, StoreBusy, StoreUnreadable
from tests.support.factories import ChangeFactory
from tests.support.store_files import assert_holds, exists, fill, flip, job_of, make_store, open_store, pick, seqs


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "jobd.db")


both_modes = pytest.mark.parametrize("commit", ["inline", "thread"])


def descriptor_of(name: str) -> int:
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{number}") == name:
                return int(number)
    raise AssertionError(f"{name} is not open")


@both_modes
async def test_after_an_unknown_outcome_every_call_fails(path: str, commit: CommitSetting) -> None:
    maker = ChangeFactory()
    async with open_store(path, commit) as (store, _):
        first = maker.create("a")
        await store.write(maker.batch([first]))
        log = os.open("/dev/null", os.O_RDONLY)
        number = descriptor_of(f"{path}-wal")
        saved = os.dup(number)
        os.dup2(log, number)  # the log can no longer be written, for a reason other than space
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            await store.write(maker.batch([maker.create("b")]))
        os.dup2(saved, number)
        os.close(saved)
        os.close(log)
        for call in (
            store.write(maker.batch([])),
            store.find_jobs(JobQuery()),
            store.load(["a"], [], []),
            store.probe(),
        ):
            with pytest.raises(StoreBroken) as caught:
                await call
        assert caught.value.exit_code == 74
    async with open_store(path) as (_, found):
        assert [job.id for job in found.live()] == ["a"]


@both_modes
async def test_a_batch_that_does_not_continue_the_rows_breaks_the_store(path: str, commit: CommitSetting) -> None:
    maker = ChangeFactory()
    async with open_store(path, commit) as (store, _):
        first = maker.create("a")
        await store.write(maker.batch([first]))
        await store.write(maker.batch([maker.create("a")]))
        with pytest.raises(sqlite3.IntegrityError):
            await store.timeline(1)
        with pytest.raises(StoreBroken):
            await store.timeline(1)
    with pytest.raises(StoreUnreadable, match=r"record 1 of the journal or a later one contradicts .* --cut-journal 1"):
        await Store.open(path)


@both_modes
async def test_a_write_ahead_log_without_space_is_a_full_disk_and_the_store_continues(
    path: str, commit: CommitSetting
) -> None:
    maker = ChangeFactory()
    async with open_store(path, commit) as (store, _):
        first = maker.create("a")
        await store.write(maker.batch([first]))
        before = store._database.totals
        number = descriptor_of(f"{path}-wal")
        saved, full = os.dup(number), os.open("/dev/full", os.O_RDWR)
        os.dup2(full, number)
        os.close(full)
        with pytest.raises(DiskFull):
            await store.write(maker.batch([maker.grant(job_of(first))]))
        with pytest.raises(DiskFull):
            await store.probe()
        assert store._database.totals == before
        os.dup2(saved, number)
        os.close(saved)
        assert (await store.load(["a"], [], [])).jobs == {"a": job_of(first)}
        await store.write(maker.batch([maker.create("b")]))
    async with open_store(path) as (_, found):
        assert found.faults == []
        assert [job.id for job in found.live()] == ["a", "b"]


@both_modes
async def test_an_exceeded_quota_is_distinguished_from_a_broken_disk(small_disk: Path, commit: CommitSetting) -> None:
    path = str(small_disk / "jobd.db")
    maker = ChangeFactory()
    async with open_store(path, commit) as (store, _):
        await store.write(maker.batch([maker.create("a")]))
        fill(small_disk)
        number = descriptor_of(f"{path}-wal")
        saved, closed = os.dup(number), os.open("/dev/null", os.O_RDONLY)
        os.dup2(closed, number)  # SQLite only reports a failed write, as for a quota
        os.close(closed)
        with pytest.raises(DiskFull):
            await store.probe()
        with pytest.raises(DiskFull):
            await store.write(maker.batch([maker.create("b")]))
        os.dup2(saved, number)
        os.close(saved)
        assert list((await store.load(["a"], [], [])).jobs) == ["a"]


FAILING = """
import asyncio, os, sys, traceback
from msgspec.structs import replace
from jobd.model.storage import Batch, DiskFull
from jobd.storage.store import Store, StoreBroken

async def main():
    store, opened = await Store.open(sys.argv[1], commit=sys.argv[2])
    try:
        for number in range(100):
            await store.write(Batch([], replace(opened.numbers, next_event=number + 2)))
    except DiskFull:
        print("full")
    except Exception as error:
        print(type(error.__cause__ or error).__name__)  # StoreBroken, if a slice in the background failed first
        try:
            await store.probe()
        except StoreBroken:
            print("broken")
    await store.close()

try:
    asyncio.run(main())
except BaseException:
    traceback.print_exc()
    os._exit(1)  # the storage thread would keep the process alive
"""


@both_modes
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
async def test_a_failed_fsync_is_an_unknown_outcome_for_any_error(path: str, error: str, commit: CommitSetting) -> None:
    if shutil.which("strace") is None:
        pytest.skip("test of a failed fsync: there is no strace here")
    inject = ["-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", f"inject=fdatasync:error={error}:when=20+"]
    process = await asyncio.create_subprocess_exec(
        "strace", *inject, sys.executable, "-c", FAILING, path, commit, stdout=subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out.split() == [b"OperationalError", b"broken"]
    assert process.returncode == 0


@both_modes
async def test_a_disk_that_fills_up_and_frees_up_loses_nothing(small_disk: Path, commit: CommitSetting) -> None:
    path = str(small_disk / "jobd.db")
    maker = ChangeFactory(4)
    store, found = await Store.open(path, commit=commit)
    async with store:
        assert not found.full
        for _ in range(10):
            await store.write(maker.any_batch(20))
        filler = fill(small_disk)
        rejected = 0
        while rejected < 3:
            back = maker.snapshot()
            try:
                await store.write(maker.any_batch(20))
            except DiskFull:
                rejected += 1
                back()
        with pytest.raises(DiskFull):
            await store.probe(SPARE_BYTES)  # a checkpoint can make space for a smaller one
        assert len((await store.find_jobs(JobQuery(limit=200))).jobs) == len(maker.jobs)
        assert await store.drop_reserve()
        assert not await store.drop_reserve()
        await store.probe()
        await store.write(maker.any_batch(20))
        fill(small_disk)
        with pytest.raises(DiskFull):
            await store.build_reserve()
        assert not exists(f"{path}.ballast")
        filler.unlink()
        await store.build_reserve()
        await store.write(maker.batch([]))
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)
        assert not found.full


async def test_a_store_opens_on_a_full_disk_and_reports_it(small_disk: Path) -> None:
    path = str(small_disk / "jobd.db")
    maker = ChangeFactory(4)
    async with open_store(path) as (store, _):
        for _ in range(10):
            await store.write(maker.any_batch(20))
    filler = fill(small_disk)
    async with open_store(path) as (store, found):
        assert (found.full, found.has_reserve) == (True, True)
        found.full = False
        await assert_holds(store, found, maker)
        with pytest.raises(StoreBusy) as caught:
            await Store.open(path)
        assert caught.value.pid == os.getpid()
        filler.unlink()
        await store.probe()
        await store.build_reserve()
    os.unlink(f"{path}.ballast")
    fill(small_disk)
    async with open_store(path) as (_, found):
        assert (found.full, found.has_reserve) == (True, False)
        assert not exists(f"{path}.ballast")


async def test_a_full_disk_needs_a_mebibyte_of_spare_space(small_disk: Path) -> None:
    path = str(small_disk / "jobd.db")
    async with open_store(path) as (store, found):
        assert (found.full, found.has_reserve) == (False, True)
        await store.drop_reserve()
        filler = fill(small_disk)
        os.truncate(filler, filler.stat().st_size - SPARE_BYTES // 2)
        await store.probe()
        with pytest.raises(DiskFull):
            await store.probe(SPARE_BYTES)
        os.truncate(filler, filler.stat().st_size - SPARE_BYTES)
        await store.probe(SPARE_BYTES)
        with pytest.raises(DiskFull):
            await store.build_reserve()
        space = await store.measure_space()
        assert space is not None
        assert SPARE_BYTES < space.free_bytes < 2 * SPARE_BYTES
        assert (space.path, space.total_bytes) == (path, 20 << 20)
    async with open_store(path) as (store, found):  # nothing is rejected for a missing reserve file
        assert (found.full, found.has_reserve, found.faults) == (False, False, [])


async def test_a_damaged_row_on_a_full_disk_is_reported(small_disk: Path) -> None:
    path = str(small_disk / "jobd.db")
    maker = await make_store(path)
    job = pick(maker, LIVE)
    flip(path, "jobs", "queue", "seq", job.seq)
    fill(small_disk)
    async with open_store(path) as (store, found):
        assert found.full
        assert list(found.quarantined) == [job.id]
        assert job.seq not in seqs(found.live())
        assert list((await store.load([job.id], [], [])).bad) == [job.id]


async def test_damaged_rows_that_cannot_be_moved_end_the_search(small_disk: Path) -> None:
    path, maker = str(small_disk / "jobd.db"), ChangeFactory()
    created = maker.create("a")
    granted = maker.grant(job_of(created))
    finished = maker.finish(job_of(granted))
    async with open_store(path) as (store, _):
        await store.write(maker.batch([created, granted, finished]))
        await store.finish_upkeep()
        store._connection.raw.execute("UPDATE jobs SET created_at = created_at + 1")
        store._connection.raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        fill(small_disk)
        expires = job_of(finished).expires_at
        assert expires is not None
        assert await store.expired_jobs(expires, 9) == []


async def test_creating_a_store_on_a_full_disk_fails(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(DiskFull):
        await Store.open(str(small_disk / "jobd.db"))
