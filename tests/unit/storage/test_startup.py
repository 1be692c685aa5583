"""Opening a store: locks, epochs, and unusable files, which are rejected and not changed."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.model.job import COUNTER_MASK, FINISHED, LAST_EPOCH, LIVE, SAFE_EPOCH, TOKEN_COUNTER_BITS
from jobd.model.storage import Batch
from jobd.storage import files, startup, store_file
from jobd.storage.backup import restore
from jobd.storage.files import StoreFailed
from jobd.storage.schema import migrations
from jobd.storage.store import MEMORY, Store, StoreBusy, StoreTooNew, StoreUnreadable
from tests.support import store_files
from tests.support.factories import ChangeFactory


def untouched(path: str) -> dict[str, bytes]:
    """Return the content of every file of the store except its lock, by name."""
    beside = Path(path).parent.iterdir()
    return {p.name: p.read_bytes() for p in beside if not p.name.endswith((".lock", ".ballast"))}


async def test_opening_a_store_twice_fails_and_names_the_process(store: Store, path: str) -> None:
    before = untouched(path)
    code = "import asyncio, sys\nfrom jobd.storage.store import Store\nasyncio.run(Store.open(sys.argv[1]))"
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, path, stderr=subprocess.PIPE)
    _, errors = await other.communicate()
    assert other.returncode == 1
    assert f"StoreBusy: {path} is in use by process {os.getpid()}" in errors.decode()
    with pytest.raises(StoreBusy) as caught:
        await Store.open(path)
    assert caught.value.pid == os.getpid()
    assert caught.value.exit_code == 75
    assert before == untouched(path)


async def test_the_lock_is_released_after_close_and_after_an_error(path: str) -> None:
    await store_files.make_empty_store(path)
    await store_files.make_empty_store(path)
    store_files.write_file(path, b"no database " * 100)
    for _ in range(2):
        with pytest.raises(StoreUnreadable, match="is not a jobd database"):
            await Store.open(path)


async def test_a_database_that_another_program_holds_is_busy(path: str) -> None:
    await store_files.make_empty_store(path)
    with store_files.edit_store(path) as conn:
        conn.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy):
            await Store.open(path)


@pytest.mark.parametrize("in_log", [False, True])
async def test_a_newer_store_is_rejected_and_not_changed(path: str, in_log: bool) -> None:
    async with store_files.open_store(path) as (store, _):
        await store.write(ChangeFactory().any_batch(3))
    conn = sqlite3.connect(path, isolation_level=None)
    conn.execute(f"PRAGMA user_version = {migrations.VERSION + 1}")
    if in_log:  # as after a crash of the newer version: only the log has the schema version
        copies = {suffix: store_files.read_file(path + suffix) for suffix in ("", "-wal")}
        conn.close()
        for suffix, content in copies.items():
            store_files.write_file(path + suffix, content)
    else:
        conn.close()
    before = untouched(path)
    with pytest.raises(StoreTooNew, match="use the newer jobd") as caught:
        await Store.open(path)
    assert caught.value.exit_code == 78
    assert before == untouched(path)


async def test_the_database_of_another_program_is_rejected(path: str) -> None:
    with store_files.edit_store(path) as conn:
        conn.execute("CREATE TABLE mine (a)")
    before = store_files.read_file(path)
    with pytest.raises(StoreUnreadable, match="another program"):
        await Store.open(path)
    with store_files.edit_store(path) as conn:
        assert conn.execute("SELECT count(*) FROM mine").fetchone() == (0,)
        conn.execute("PRAGMA application_id = 77")
    assert len(before) == len(store_files.read_file(path))
    with pytest.raises(StoreUnreadable, match="another program"):
        await Store.open(path)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM meta",
        "UPDATE meta SET next_token = next_token + 1",
        "UPDATE meta SET crc = crc + 1",
        "DROP TABLE meta",
    ],
)
async def test_a_damaged_meta_row_stops_the_start(path: str, damage: str) -> None:
    await store_files.make_empty_store(path)
    with store_files.edit_store(path) as conn:
        conn.execute(damage)
    with pytest.raises(StoreUnreadable) as caught:
        await Store.open(path)
    assert caught.value.exit_code == 78


async def test_a_missing_directory_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await Store.open(str(tmp_path / "nowhere" / "jobd.db"))


async def test_a_killed_store_whose_name_is_not_utf_8_can_be_read(tmp_path: Path) -> None:
    path = str(tmp_path / "\udcff.db")
    async with store_files.killed_store(path) as (store, _):
        await store.write(ChangeFactory().any_batch(3))
    assert store_file.peek(path) == (migrations.APPLICATION_ID, migrations.VERSION)
    await store_files.make_empty_store(path)


async def test_text_that_is_not_utf_8_reaches_no_response(path: str) -> None:
    """Neither the quarantine nor the list of jobs to validate has checksums, and no response can have such text."""
    maker = await store_files.make_store(path)
    live, done = store_files.pick(maker, LIVE), store_files.pick(maker, FINISHED)
    async with store_files.open_store(path) as (store, _):
        await store.quarantine(live, "for a test")
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE quarantined_jobs SET reason = CAST(x'ff' AS TEXT)")
        conn.execute("INSERT INTO bad_rows (place, what, at, row) VALUES (CAST(x'ff' AS TEXT), '', 0, '')")
        conn.execute("UPDATE jobs SET id = CAST(x'ff' AS TEXT) WHERE seq = ?", (done.seq,))
        conn.execute("INSERT OR IGNORE INTO suspects (job_seq) VALUES (?)", (done.seq,))
    async with store_files.open_store(path) as (store, found):
        assert found.quarantined == {live.id: "\ufffd"}
        assert found.unvalidated[done.seq] == "\ufffd"
        assert any("damaged rows of \ufffd in quarantine" in fault for fault in found.faults)
        assert (await store.load(["\ufffd"], [], [])).jobs == {}


async def test_a_read_only_file_is_an_os_error(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite would report a failed disk."""
    await store_files.make_empty_store(path)
    monkeypatch.chdir(tmp_path)  # other users cannot use the whole path
    tmp_path.chmod(0o777)
    os.chmod(path, 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            startup.connect(os.path.basename(path), "FULL")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


async def test_no_thread_is_left_behind(path: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    async with store_files.open_store(path) as (store, _):
        with pytest.raises(StoreBusy):
            await Store.open(path)
    await store.close()
    (tmp_path / "x").write_bytes(b"x" * 200)
    with pytest.raises(StoreUnreadable):
        await Store.open(str(tmp_path / "x"))
    new = [each for each in threading.enumerate() if each not in before]
    ours = [each for each in new if not each.name.startswith(("asyncio", "uvloop"))]
    for thread in ours:
        await asyncio.to_thread(thread.join, 5)  # it was asked to end and may be about to
    assert [each.name for each in ours if each.is_alive()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Epochs


async def test_a_marked_store_begins_a_new_epoch_until_its_grants_are_ended(maker: ChangeFactory, path: str) -> None:
    async with store_files.open_store(path) as (store, found):
        assert (found.marked, found.numbers.epoch) == (False, 1)
        await store.write(maker.batch([maker.create()]))
    with store_files.edit_store(path) as conn:
        migrations.change_meta(conn, marked=1)
    async with store_files.open_store(path) as (_, found):
        assert (found.marked, found.numbers.epoch, found.numbers.next_token) == (True, 2, 1)
        assert found.numbers.next_job == 2
        assert files.read_epoch(path) == 2
    async with store_files.open_store(path) as (
        store,
        found,
    ):  # a crash before the grants were ended: another epoch begins
        assert (found.marked, found.numbers.epoch) == (True, 3)
        await store.write(Batch([], replace(found.numbers, next_token=7)))
    async with store_files.open_store(path) as (store, found):
        assert (found.marked, found.numbers.epoch) == (True, 4)
        await store.write(Batch([], found.numbers, unmark=True))
    async with store_files.open_store(path) as (_, found):
        assert (found.marked, found.numbers.epoch) == (False, 4)


async def test_an_older_copy_without_a_mark_is_detected_by_the_epoch_file(path: str) -> None:
    await store_files.make_empty_store(path)
    files.write_epoch(path, 5)
    async with store_files.open_store(path) as (store, found):
        assert (found.marked, found.numbers.epoch) == (True, 6)
        await store.write(Batch([], found.numbers, unmark=True))


@pytest.mark.parametrize("is_empty", [True, False])
async def test_a_database_that_is_missing_or_empty_next_to_its_epoch_file_is_a_fault(path: str, is_empty: bool) -> None:
    async with store_files.open_store(path) as (_, found):
        assert found.faults == []
    os.unlink(path)
    if is_empty:
        store_files.write_file(path, b"")
    async with store_files.open_store(path) as (_, found):
        assert [fault.split(" at the start")[0] for fault in found.faults] == [f"{path} was missing or empty"]
        assert (found.numbers.epoch, found.numbers.next_event) == (2, 2 << TOKEN_COUNTER_BITS)
    async with store_files.open_store(path) as (_, found):
        assert found.faults == []


async def test_a_store_without_its_epoch_file_begins_a_new_epoch_and_keeps_its_grants(path: str) -> None:
    async with store_files.open_store(path) as (store, found):
        await store.write(Batch([], replace(found.numbers, next_token=9, next_event=5)))
    os.unlink(f"{path}.epoch")
    async with store_files.open_store(path) as (_, found):  # it may be a copy next to its original
        assert (found.marked, found.numbers.epoch, found.numbers.next_token) == (False, 2, 1)
        assert found.numbers.next_event == 5
    assert files.read_epoch(path) == 2
    async with store_files.open_store(path) as (_, found):
        assert found.numbers.epoch == 2


def clock_says(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """Return the seconds since 2020."""
    monkeypatch.setattr(startup, "now_ms", lambda: 1_577_836_800_000 + seconds * 1000)


async def test_two_machines_that_restore_one_backup_begin_different_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = str(tmp_path / "jobd.db")
    clock_says(monkeypatch, 1_000)
    async with store_files.open_store(original) as (_, found):
        assert (found.numbers.epoch, found.epoch_warning) == (1_000, None)
    given: dict[str, range] = {}
    for second, machine in enumerate("abc", 2_000):
        clock_says(monkeypatch, second)
        path = str(tmp_path / machine)
        assert restore(original, path) is None
        async with store_files.open_store(path) as (store, found):
            assert (found.marked, found.numbers.epoch) == (True, second)
            await store.write(Batch([], replace(found.numbers, next_token=1 << TOKEN_COUNTER_BITS), unmark=True))
        async with store_files.open_store(path) as (_, found):  # a normal start continues
            first, last = second << TOKEN_COUNTER_BITS, found.numbers.epoch << TOKEN_COUNTER_BITS
            given[machine] = range(first + 1, last + found.numbers.next_token)
    a, b, c = given.values()
    assert len(a) == COUNTER_MASK
    assert a.stop <= b.start
    assert b.stop <= c.start


@pytest.mark.parametrize(
    ("seconds", "epoch", "warning"),
    [
        (-50, 1_001, "the wall clock is 1051 s behind epoch 1001"),
        (999, 1_001, None),
        (SAFE_EPOCH, SAFE_EPOCH, None),
        (SAFE_EPOCH + 1, 1_001, "the wall clock is past 2036"),
    ],
)
async def test_a_wrong_clock_at_a_restore_is_reported(
    path: str, monkeypatch: pytest.MonkeyPatch, seconds: int, epoch: int, warning: str | None
) -> None:
    clock_says(monkeypatch, 1_000)
    await store_files.make_empty_store(path)
    with store_files.edit_store(path) as conn:
        migrations.change_meta(conn, marked=1)
    clock_says(monkeypatch, seconds)
    async with store_files.open_store(path) as (_, found):
        assert found.numbers.epoch == epoch
        assert (found.epoch_warning or "").startswith(warning or "")
        assert (found.epoch_warning is None) is (warning is None)
        assert epoch << TOKEN_COUNTER_BITS < 1 << 53


async def test_a_number_from_an_operator_can_leave_no_safe_epoch(path: str) -> None:
    await store_files.make_empty_store(path)
    store_files.write_file(f"{path}.epoch", b"%d" % SAFE_EPOCH)
    async with store_files.open_store(path) as (_, found):
        assert found.numbers.epoch == SAFE_EPOCH + 1
        assert "gives fencing tokens of 2^53 and more" in str(found.epoch_warning)
    store_files.write_file(f"{path}.epoch", b"%d" % LAST_EPOCH)
    with pytest.raises(StoreUnreadable, match=f"no epoch for fencing tokens above {LAST_EPOCH}"):
        await Store.open(path)


async def test_a_crash_between_database_and_epoch_file_ends_no_grant(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: str, epoch: int) -> None:
        raise OSError("the power goes")

    await store_files.make_empty_store(path)
    os.unlink(f"{path}.epoch")
    with monkeypatch.context() as cut:
        cut.setattr(files, "write_epoch", crash)
        with pytest.raises(OSError, match="the power goes"):
            await Store.open(path)
    async with store_files.open_store(path) as (_, found):
        assert (found.marked, found.numbers.epoch) == (False, 3)


async def test_a_store_in_memory_takes_its_epoch_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_says(monkeypatch, 700)
    async with store_files.open_store(MEMORY) as (store, found):
        assert (found.numbers.epoch, found.marked) == (700, False)
        await store.write(Batch([], replace(found.numbers, epoch=900)))  # a full counter
    assert not os.path.exists(f"{MEMORY}.epoch")


async def test_a_damaged_epoch_file_stops_the_start(path: str) -> None:
    await store_files.make_empty_store(path)
    content = bytearray(store_files.read_file(f"{path}.epoch"))
    content[0] ^= 1
    store_files.write_file(f"{path}.epoch", content)
    with pytest.raises(StoreUnreadable, match="epoch is damaged"):
        await Store.open(path)


async def test_a_schema_name_that_is_not_text_stops_the_start(path: str) -> None:
    await store_files.make_empty_store(path)
    content = bytearray(store_files.read_file(path))
    content[content.index(b"job_seq", content.index(b"CREATE TABLE payloads")) + 1] ^= 0x80
    store_files.write_file(path, content)
    with pytest.raises(StoreUnreadable, match=r"the schema lacks payloads\.job_seq.*jobd restore"):
        await Store.open(path)


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ("ALTER TABLE payloads RENAME COLUMN job_seq TO jnb_seq", "payloads.job_seq"),
        ("ALTER TABLE bad_rows RENAME TO bad_rowr", "bad_rows, bad_rows.at"),
        ("DROP INDEX events_job", "events_job"),
    ],
)
async def test_a_damaged_schema_name_stops_the_start(path: str, change: str, lacking: str) -> None:
    await store_files.make_empty_store(path)
    with store_files.edit_store(path) as conn:
        conn.execute(change)
    with pytest.raises(StoreUnreadable, match=f"the schema lacks {lacking}.*jobd restore"):
        await Store.open(path)


def test_a_directory_that_the_user_may_not_write_to_is_no_failed_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = sqlite3.OperationalError("attempt to write a readonly database")
    error.sqlite_errorcode = sqlite3.SQLITE_READONLY
    with pytest.raises(StoreFailed, match="the disk failed"), startup.translated_errors(f"{tmp_path}/jobd.db"):
        raise error
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(PermissionError) as caught, startup.translated_errors(f"{tmp_path}/jobd.db"):
        raise error
    assert caught.value.filename == str(tmp_path.resolve())
