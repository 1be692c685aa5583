"""Online backups: progress from the first moment, on disks of any speed."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from jobd.api import downloads
from jobd.maintenance import backups
from jobd.maintenance.backups import Backups
from jobd.model.errors import checked
from jobd.model.responses import BackupView
from jobd.model.storage import DiskFull
from jobd.storage import backup
from jobd.storage.backup import BackupStopped
from jobd.storage.store import Store
from tests.support.factories import ChangeFactory
from tests.support.memory_storage import MemoryStorage
from tests.support.polling import wait_until
from tests.support.store_files import edit_store, open_store, write_file
from tests.support.virtual_engine import error_in

PAGE = 4096


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    maker = ChangeFactory(8)
    async with open_store(str(tmp_path / "jobd.db")) as (made, _):
        for _ in range(10):  # some megabytes: many steps
            await made.write(
                maker.batch([replace(maker.create(), payload=b'"%s"' % (b"z" * 3_000)) for _ in range(50)])
            )
        yield made


class SteppedCopy:
    """A slow disk: the copy advances one step each time `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        self.free = False
        monkeypatch.setattr("jobd.storage.backup.time.sleep", self._sleep)

    def _sleep(self, _: float) -> None:
        self.reached.release()
        while not self.free and not self.steps.acquire(timeout=0.01):
            pass

    async def go(self) -> None:
        """Allow one step, and wait until the copy reaches it."""
        self.steps.release()
        await asyncio.to_thread(self.reached.acquire)


class CloseRecordingFile:
    """A file that records which thread closed it."""

    def __init__(self) -> None:
        self.closed_by = 0
        self.is_closed = threading.Event()

    def close(self) -> None:
        self.closed_by = threading.get_ident()
        self.is_closed.set()


async def test_closing_a_large_copy_does_not_block_the_loop(store: Store) -> None:
    """The file has no name, so closing it deletes it: a tenth of a second for a hundred megabytes."""
    copy = checked(await Backups(store, lambda: 1_000).begin("a"))
    file, copy._file = copy._file, CloseRecordingFile()  # type: ignore[assignment]
    watched: Any = copy._file
    copy.close()
    assert await asyncio.to_thread(watched.is_closed.wait, 5)
    assert watched.closed_by != threading.get_ident()
    assert file is not None
    file.close()


async def test_progress_is_reported_from_the_first_step(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Backups(store, lambda: 1_000)
    slow = SteppedCopy(monkeypatch)
    asking = asyncio.create_task(manager.begin("mine"))
    await asyncio.to_thread(slow.reached.acquire)
    seen: list[BackupView] = []
    for _ in range(4):
        [view] = manager.views()
        seen.append(view)
        await slow.go()
    assert {view.state for view in seen} == {"copying"}
    assert [view.bytes_done for view in seen] == [100 * PAGE * n for n in range(1, 5)]
    assert {view.bytes_total for view in seen} == {seen[0].bytes_total}
    assert (seen[0].id, seen[0].started_at, seen[0].ended_at, seen[0].message) == ("mine", 1_000, None, None)
    since_progress_ms = manager.views()[0].since_progress_ms
    await wait_until(lambda: manager.views()[0].since_progress_ms > since_progress_ms)  # the disk hangs
    slow.free = True
    copy = checked(await asking)
    [view] = manager.views()
    assert (view.state, view.bytes_done, view.bytes_total) == ("sending", 0, copy.size)
    sent = 0
    while piece := await copy.read():
        sent += len(piece)
        assert manager.views()[0].bytes_done == sent
    copy.close()
    copy.close("a second time")
    [view] = manager.views()
    assert sent == copy.size
    assert (view.state, view.bytes_done, view.bytes_total, view.ended_at) == ("sent", sent, sent, 1_000)
    assert (view.message, view.since_progress_ms) == (None, 0)


async def test_the_check_reports_progress_and_can_be_cancelled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "_CHECK_STEPS", 100)
    lines: list[str] = []
    with await store.backup(lambda step, done, total: lines.append(step)):
        pass
    assert lines.count("checking") > 10
    assert lines.index("checking") > lines.count("copying") - 1  # only then
    monkeypatch.setattr(backup, "_CHECK_STEPS", 1)
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def report(step: str, done: int, total: int) -> None:
        if step == "checking":
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.01)  # the check would take minutes

    asking = asyncio.create_task(store.backup(report))
    await begun.wait()
    closing = asyncio.create_task(store.close())
    with pytest.raises(BackupStopped):
        await asking
    await closing


async def test_a_failing_check_reports_its_reason(tmp_path: Path) -> None:
    path = str(tmp_path / "jobd.db")
    write_file(path, b"")
    with edit_store(path) as conn, pytest.raises(sqlite3.OperationalError), backup._reporting(conn, None):
        conn.execute("SELECT * FROM nothing")


async def test_backups_run_one_after_the_other_and_are_limited(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "MAX_ACTIVE", 2)
    manager = Backups(store, lambda: 1)
    slow = SteppedCopy(monkeypatch)
    first = asyncio.create_task(manager.begin("first"))
    await asyncio.to_thread(slow.reached.acquire)
    second = asyncio.create_task(manager.begin("second"))
    await asyncio.sleep(0)
    assert [(view.id, view.state) for view in manager.views()] == [("second", "waiting"), ("first", "copying")]
    await slow.go()
    one, other = manager.views()  # a waiting backup is not quiet while the other one progresses
    assert abs(one.since_progress_ms - other.since_progress_ms) < 50
    assert error_in(await manager.begin("third")).code == "overloaded"
    first.cancel()
    while not first.done():  # its thread checks at each step whether it is cancelled
        slow.steps.release()
        await asyncio.sleep(0.001)
    with pytest.raises(asyncio.CancelledError):
        await first
    failed = manager.views()[1]
    assert (failed.id, failed.state, failed.message) == ("first", "failed", "it was cancelled")
    slow.free = True
    copy = checked(await second)
    copy.close("it was not read to its end")
    assert manager.views()[0].message == "it was not read to its end"


async def test_the_reason_of_a_failed_backup_is_kept() -> None:
    storage: Any = MemoryStorage()
    storage.errors["backup"] = DiskFull("a backup needs 48 MiB free")
    manager = Backups(storage, lambda: 1)
    for number in range(backups.MAX_FINISHED + 3):
        with pytest.raises(DiskFull):
            await manager.begin(str(number))
    views = manager.views()
    assert [view.id for view in views] == [str(number) for number in range(backups.MAX_FINISHED + 2, 2, -1)]
    assert {(view.state, view.message) for view in views} == {("failed", "a backup needs 48 MiB free")}
    assert downloads.CONNECTION_CHECK_S < 1
