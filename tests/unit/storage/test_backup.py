"""Backup and restore: a copy under load is complete and marked, and opens with a new epoch."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.model.job import FINISHED, LIVE
from jobd.model.storage import BackupError, Batch, DiskFull
from jobd.storage import backup, files
from jobd.storage.backup import BackupStopped, restore
from jobd.storage.files import FileLock, StoreBusy, StoreTooNew, StoreUnreadable
from jobd.storage.offline import doctor, dry_run
from jobd.storage.schema import migrations
from jobd.storage.store import MEMORY, Store, StoreBroken
from tests.support import store_files
from tests.support.daemon_process import DaemonProcess
from tests.support.factories import ChangeFactory


@pytest.fixture
def copy(tmp_path: Path) -> str:
    return str(tmp_path / "elsewhere.db")


async def take(store: Store, target: str) -> None:
    with await store.backup() as file:
        store_files.write_file(target, file.read())


def names(path: str) -> set[str]:
    return {os.path.basename(name) for name in glob.glob(f"{path}*")}


async def test_a_backup_without_the_directory_of_the_store_says_what_is_missing(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    async with store_files.open_store(str(directory / "jobd.db")) as (store, _):
        directory.rename(tmp_path / "elsewhere")
        with pytest.raises(BackupError, match=f"cannot be written in {directory}: No such file or directory. The dir"):
            await take(store, str(tmp_path / "copy.db"))
        (tmp_path / "elsewhere").rename(directory)  # for the close of the store


async def test_a_copy_is_complete_marked_and_one_file(path: str, copy: str) -> None:
    maker = await store_files.make_store(path)
    async with store_files.open_store(path) as (store, _):
        await take(store, copy)
        assert names(path) == {"jobd.db" + suffix for suffix in ("", "-wal", ".lock", ".epoch", ".ballast")}
    assert store_files.read_file(copy)[18:20] == b"\x01\x01"  # it has no write-ahead log
    with store_files.edit_store(copy) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert conn.execute("SELECT marked FROM meta").fetchone() == (1,)
    async with store_files.open_store(path) as (store, found):  # the store itself is not marked
        assert not found.marked
    await store_files.assert_restored(copy, maker)


async def test_a_copy_under_load_is_consistent(path: str, copy: str) -> None:
    maker = ChangeFactory(8)
    seen: list[tuple[int, int]] = []
    async with store_files.open_store(path) as (store, _):
        for _ in range(20):  # some megabytes, for many steps of the copy
            changes = [replace(maker.create(), payload=b'"%s"' % (b"z" * 3_000)) for _ in range(50)]
            await store.write(maker.batch(changes))
        first = maker.numbers.next_event
        task = asyncio.create_task(take_with(store, copy, seen))
        batches = 0
        while not task.done():
            changes = [replace(maker.create(), payload=b'"%s"' % (b"z" * 3_000))]
            await store.write(maker.batch([*changes, maker.any_change()]))
            await asyncio.sleep(0)  # a write whose commit is inline does not yield
            batches += 1
        await task
        last = maker.numbers.next_event
    assert batches > 10
    assert len(seen) > 5
    assert seen[-1][0] == seen[-1][1]
    async with store_files.open_store(copy) as (store, found):
        assert found.faults == []
        count = {status: 0 for status in (*LIVE, *FINISHED)}
        for (status,) in store._connection.raw.execute("SELECT status FROM jobs"):
            count[status] += 1
        assert len(found.live()) == count["queued"] + count["processing"]
        (events,) = store._connection.raw.execute("SELECT max(seq) FROM events").fetchone()
        assert first <= events + 1 <= last
        # Event numbers used after the copy was made are not reused.
        page = await store.events_after(events, 10)
        assert (found.numbers.next_event, page.last, page.gone_to) == (2 << 24, (2 << 24) - 1, (2 << 24) - 1)


async def take_with(store: Store, target: str, seen: list[tuple[int, int]]) -> None:
    def report_step(step: str, done: int, total: int) -> None:
        if step == "copying":
            seen.append((done, total))

    with await store.backup(report_step) as file:
        store_files.write_file(target, file.read())


async def test_a_store_in_memory_can_be_copied(copy: str) -> None:
    maker = ChangeFactory(2)
    async with store_files.open_store(MEMORY) as (store, _):
        await store.write(maker.any_batch(30))
        await take(store, copy)
    async with store_files.open_store(copy) as (_, found):
        assert found.marked
        assert len(found.live()) == sum(job.status in LIVE for job in maker.jobs.values())


async def test_closing_the_store_stops_a_copy_and_leaves_no_file(path: str, copy: str) -> None:
    await store_files.make_store(path)
    store, _ = await Store.open(path)
    loop = asyncio.get_running_loop()
    begun = asyncio.Event()
    closing: list[asyncio.Task[None]] = []

    def progress(step: str, done: int, total: int) -> None:
        loop.call_soon_threadsafe(begun.set)
        while not store._closing.is_set():  # the copy continues only when the store is closing
            pass

    async def collect() -> None:
        (await store.backup(progress)).close()

    task = asyncio.create_task(collect())
    await begun.wait()
    closing.append(asyncio.create_task(store.close()))
    with contextlib.suppress(BackupStopped):  # a copy of one step is complete by then
        await task
    await closing[0]
    assert not glob.glob(f"{path}.tmp-*")
    with pytest.raises(StoreBroken):
        await take(store, copy)
    FileLock(path).release()


async def test_the_check_of_a_copy_can_be_stopped(copy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await store_files.make_store(copy)
    monkeypatch.setattr(backup, "_CHECK_STEPS", 1)

    def progress(step: str, done: int, total: int) -> None:
        raise BackupStopped((step, done, total))

    with pytest.raises(BackupStopped, match=r"'checking', 0, 0"):
        backup.finish_copy(copy, progress)


async def test_a_cancelled_request_stops_the_copy(store: Store, path: str) -> None:
    maker = ChangeFactory(8)
    for _ in range(10):
        changes = [replace(maker.create(), payload=b'"%s"' % (b"z" * 3_000)) for _ in range(50)]
        await store.write(maker.batch(changes))
    loop = asyncio.get_running_loop()
    begun = asyncio.Event()
    steps: list[int] = []

    def progress(step: str, done: int, total: int) -> None:
        steps.append(done)
        loop.call_soon_threadsafe(begun.set)

    async def collect() -> None:
        (await store.backup(progress)).close()

    task = asyncio.create_task(collect())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not glob.glob(f"{path}.tmp-*")
    await store.write(maker.batch([maker.create()]))


async def test_files_left_by_a_crash_are_removed_at_the_next_start(path: str) -> None:
    await store_files.make_store(path)
    store_files.write_file(f"{path}.tmp-0123", b"half")
    store_files.write_file(f"{path}.backup-monday", b"an operator's")
    async with store_files.open_store(path):
        assert not store_files.exists(f"{path}.tmp-0123")
        assert store_files.exists(f"{path}.backup-monday")


async def test_a_damaged_store_cannot_be_copied(path: str, copy: str) -> None:
    await store_files.make_store(path)
    with store_files.edit_store(path) as conn:
        (page,) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events_job'").fetchone()
    content = bytearray(store_files.read_file(path))
    content[(page - 1) * 4096 + 3] ^= 0x10  # the number of entries on a page of an index
    store_files.write_file(path, content)
    async with store_files.open_store(path) as (store, _):
        with pytest.raises(StoreUnreadable, match="does not pass its check"):
            await take(store, copy)
    assert not store_files.exists(copy)


async def test_a_copy_of_a_store_with_a_tail_has_its_tables_written(path: str, copy: str) -> None:
    """A record in the tail that removes an earlier mark does not remove that of the copy."""
    maker = await store_files.make_store(path)
    async with store_files.open_store(path) as (store, _):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(store._projection, "project", full_disk)
            await store.write(maker.any_batch(20))
            await store.write(Batch([], maker.numbers, unmark=True))
            await take(store, copy)
    with store_files.edit_store(copy) as conn:
        assert conn.execute("SELECT count(*) FROM journal").fetchone() == (0,)
    await store_files.assert_restored(copy, maker)


def full_disk() -> None:
    raise DiskFull("for a test")


# ---------------------------------------------------------------------------------------------------------------------
# Restore


async def test_a_killed_store_is_restored_with_its_tail(path: str, copy: str) -> None:
    maker = await store_files.make_store(copy)
    await store_files.leave_tail(copy, maker.any_batch(20), Batch([], maker.numbers, unmark=True))
    assert any("its tables lack 2 committed batches (20 events)" in line for line in dry_run.restore(copy, path))
    restore(copy, path)
    with store_files.edit_store(path) as conn:
        assert conn.execute("SELECT count(*) FROM journal").fetchone() == (0,)
    await store_files.assert_restored(path, maker)


async def test_the_log_is_found_through_a_symbolic_link(path: str, copy: str, tmp_path: Path) -> None:
    """SQLite keeps it next to the file that the link names. It has the latest commits of a killed store."""
    maker = await store_files.make_store(copy)
    await store_files.leave_tail(copy, maker.any_batch(20))
    link = tmp_path / "link.db"
    link.symlink_to(copy)
    notes: list[str] = []
    doctor.check(str(link), on_note=notes.append)
    assert any("the tables lack 1 committed batch (20 events)" in note for note in notes)
    restore(str(link), path)
    await store_files.assert_restored(path, maker)


async def test_a_file_whose_tail_is_damaged_is_not_restored(path: str, copy: str) -> None:
    maker = await store_files.make_store(copy)
    [number] = await store_files.leave_tail(copy, maker.any_batch(4))
    with store_files.edit_store(copy) as conn:
        conn.execute("UPDATE journal SET at = 0")
    for call in (dry_run.restore, restore):
        with pytest.raises(
            StoreUnreadable, match=f"^{copy}: record {number} of the journal is damaged.* --cut-journal"
        ):
            call(copy, path)
    assert not store_files.exists(path)


async def test_a_file_of_an_older_schema_version_is_restored(path: str, older: ChangeFactory) -> None:
    copy = f"{path}.copy"
    os.replace(path, copy)
    restore(copy, path)
    await store_files.assert_restored(path, older)


async def test_a_restore_keeps_the_old_store(path: str, copy: str) -> None:
    maker = ChangeFactory(3)
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.any_batch(30))
        await take(store, copy)
        jobs = dict(maker.jobs)
        later = [maker.any_batch(30) for _ in range(5)]
        for batch in later:
            await store.write(batch)
    old_path = restore(copy, path)
    assert old_path is not None
    assert os.path.dirname(old_path) == os.path.dirname(path)
    async with store_files.open_store(path) as (store, found):
        assert (found.marked, found.numbers.epoch, found.numbers.next_event) == (True, 2, 2 << 24)
        assert {job.seq for job in found.live()} == {seq for seq, job in jobs.items() if job.status in LIVE}
        await store.write(Batch([], found.numbers, unmark=True))
    async with store_files.open_store(old_path) as (_, found):  # the old store is complete; it has no epoch file
        assert found.numbers == replace(maker.numbers, epoch=2, next_token=1)
        assert found.faults == []


async def test_a_restore_marks_an_unmarked_file(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    assert restore(copy, path) is None
    assert os.stat(path).st_mode & 0o777 == 0o600
    with store_files.edit_store(copy) as conn:
        assert conn.execute("SELECT marked FROM meta").fetchone() == (0,)
    async with store_files.open_store(path) as (_, found):
        assert found.marked


async def test_the_epoch_of_the_old_store_counts_without_its_epoch_file(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    await store_files.make_store(path)
    with store_files.edit_store(path) as conn:
        migrations.change_meta(conn, epoch=7)
    store_files.remove(f"{path}.epoch")
    restore(copy, path)
    assert files.read_epoch(path) == 7
    async with store_files.open_store(path) as (_, found):
        assert found.numbers.epoch == 8


async def test_the_write_ahead_log_of_the_old_store_is_kept_with_it(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    maker = await store_files.make_store(path)
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.any_batch(5))
        left = {suffix: store_files.read_file(path + suffix) for suffix in ("", "-wal")}
    for suffix, content in left.items():  # as after a kill
        store_files.write_file(path + suffix, content)
    old_path = restore(copy, path)
    assert not store_files.exists(f"{path}-wal")
    assert old_path is not None
    async with store_files.open_store(old_path) as (store, found):
        maker.numbers = replace(maker.numbers, epoch=2, next_token=1)
        await store_files.assert_holds(store, found, maker)


async def test_an_unreadable_store_is_kept_unchanged(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    store_files.write_file(path, b"rubbish" * 1_000)
    for suffix in ("-wal", "-journal"):
        store_files.write_file(path + suffix, b"more rubbish")
    old_path = restore(copy, path)
    assert old_path is not None
    assert store_files.read_file(old_path) == b"rubbish" * 1_000
    for suffix in ("-wal", "-journal"):
        assert not store_files.exists(path + suffix)
        assert store_files.read_file(old_path + suffix) == b"more rubbish"
    async with store_files.open_store(path) as (_, found):
        assert found.marked


async def test_a_restore_that_fails_leaves_the_old_store_and_its_log(
    path: str, copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store_files.make_store(copy)
    store_files.write_file(path, b"rubbish" * 1_000)
    store_files.write_file(f"{path}-wal", b"more rubbish")
    monkeypatch.setattr(files, "give_to_owner", lambda name, path: os.chown(f"{name}-missing", 0, 0))
    monkeypatch.setattr(backup, "FileLock", lambda path: contextlib.nullcontext())
    with pytest.raises(FileNotFoundError):
        restore(copy, path)
    assert names(path) == {"jobd.db", "jobd.db-wal"}
    assert store_files.read_file(f"{path}-wal") == b"more rubbish"


async def test_two_restores_in_one_second_keep_both_stores(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    old_paths = [restore(copy, path) for _ in range(4)]
    assert old_paths[0] is None
    assert len({old_path for old_path in old_paths if old_path and store_files.exists(old_path)}) == 3


async def test_a_restore_is_rejected_while_a_daemon_runs(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    async with store_files.open_store(path):
        before = store_files.read_file(path)
        with pytest.raises(StoreBusy, match=str(os.getpid())):
            restore(copy, path)
        assert store_files.read_file(path) == before


@pytest.mark.parametrize("what", ["missing", "rubbish", "foreign", "newer", "meta", "page"])
async def test_an_unusable_file_is_not_restored(path: str, copy: str, what: str) -> None:
    await store_files.make_store(copy)
    await store_files.make_store(path, seed=12)
    store_files.damage_backup(copy, what)
    before = {name: store_files.read_file(name) for name in glob.glob(f"{path}*")}
    with pytest.raises(StoreTooNew if what == "newer" else StoreUnreadable):
        restore(copy, path)
    assert {name: store_files.read_file(name) for name in glob.glob(f"{path}*")} == before


async def test_a_store_held_by_another_program_is_not_touched(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    await store_files.make_store(path)
    with store_files.edit_store(path) as conn:
        conn.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy):
            restore(copy, path)
    async with store_files.open_store(path) as (_, found):
        assert not found.marked


async def test_a_copy_never_fills_the_disk_of_the_store(small_disk: Path, copy: str) -> None:
    path = str(small_disk / "jobd.db")
    maker = await store_files.make_store(path)
    async with store_files.open_store(path) as (store, _):
        with pytest.raises(DiskFull, match=f"MiB free in {small_disk}, but only"):
            await take(store, copy)
        await store.write(maker.any_batch(5))
    assert not glob.glob(f"{path}.tmp-*")


def test_jobd_backup_exits_with_75_without_disk_space(small_disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    with DaemonProcess(tmp_path, JOBD_STORE_PATH=str(small_disk / "jobd.db")) as daemon:
        command = [sys.executable, "-m", "jobd", "backup", str(target), "--admin-url", f"unix:{daemon.admin_socket}"]
        done = subprocess.run(command, env=daemon.environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (75, "")
        assert f"MiB free in {small_disk}, but only" in done.stderr
        assert "[storage_full]" in done.stderr
        assert done.stderr.count("\n") == 1
        assert daemon.post("/v1/jobs", {"id": "a"}).status == 201  # the copy took no space of the store
    assert not target.exists()
    assert not glob.glob(f"{small_disk}/jobd.db.tmp-*")


async def test_a_restore_without_disk_space_leaves_the_store(small_disk: Path, copy: str) -> None:
    path = str(small_disk / "jobd.db")
    await store_files.make_store(copy)
    maker = await store_files.make_store(path)
    filler = store_files.fill(small_disk)
    with pytest.raises(DiskFull):
        restore(copy, path)
    filler.unlink()
    await store_files.assert_store_holds(path, maker)


def test_other_errors_are_not_reported_as_a_full_disk() -> None:
    with (
        contextlib.closing(sqlite3.connect(":memory:")) as conn,
        pytest.raises(sqlite3.OperationalError, match="syntax"),
        backup._raising_disk_full(),
    ):
        conn.execute("no sql")


def test_files_restored_by_root_belong_to_the_owner_of_the_store(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    store, copy = tmp_path / "store", tmp_path / "copy.db"
    store.mkdir()
    asyncio.run(_made(str(store / "jobd.db")))
    shutil.copy(store / "jobd.db", copy)
    for entry in [store, *store.iterdir()]:
        os.chown(entry, 12345, 12346)
    restore(str(copy), str(store / "jobd.db"))
    (store / "jobd.db").unlink()
    restore(str(copy), str(store / "jobd.db"))  # without a store, the owner of the directory counts
    owners = {entry.name: (entry.stat().st_uid, entry.stat().st_gid) for entry in store.iterdir()}
    assert set(owners.values()) == {(12345, 12346)}, owners


async def _made(path: str) -> None:
    store, _ = await Store.open(path)
    await store.close()
