"""Migrations of older stores: the copy, the space for it, and the lines of the log."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jobd.model.job import LIVE
from jobd.model.storage import DiskSpace
from jobd.storage import files, startup, store_file
from jobd.storage.files import MigrationNeedsSpace
from jobd.storage.schema import migrations, upgrade
from tests.support import store_files
from tests.support.factories import ChangeFactory
from tests.unit.storage.conftest import simulate_next_version

OLD = migrations.VERSION

KILLED = """
import os, signal, sys
from jobd.storage import files, startup
from jobd.storage.schema import migrations
from jobd.storage.schema import upgrade
kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "copy":
    files.sync = kill

def step(conn):
    conn.execute("CREATE TABLE notes (a ANY) STRICT")
    conn.execute("DELETE FROM jobs")
    kill()

migrations.MIGRATIONS = {migrations.VERSION: step}
migrations.VERSION += 2
conn = startup.connect(sys.argv[1], "FULL")
startup.prepare_schema(conn, sys.argv[1])
"""


def kill_migration(path: str, step: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, path, step], check=False)
    assert done.returncode == -signal.SIGKILL


def copies(path: str) -> list[str]:
    return glob.glob(f"{path}.v*") + glob.glob(f"{path}.tmp-*")


async def test_a_copy_of_an_interrupted_migration_is_used_again(older: ChangeFactory, path: str) -> None:
    kill_migration(path, "copy")
    assert copies(path) == [f"{path}.tmp-v{OLD}"]
    for _ in range(3):
        kill_migration(path, "migrate")
        [copy] = copies(path)
        assert f"{path}.v{OLD}-" in copy
    before = store_files.read_file(copy)
    await store_files.assert_store_holds(path, older)
    assert copies(path) == [copy]
    assert store_files.read_file(copy) == before
    assert store_file.peek(copy)[1] == OLD


async def test_a_copy_of_an_earlier_content_is_kept_and_not_used(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = await store_files.make_store(path)
    store_files.write_file(f"{path}.v{OLD}-note", b"no store")
    shutil.copy2(path, f"{path}.v{OLD}-1")
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.any_batch(5))
    simulate_next_version(monkeypatch)
    await store_files.assert_store_holds(path, maker)
    assert len(copies(path)) == 3


async def test_the_log_shows_a_migration(older: ChangeFactory, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_files.edit_store(path) as conn:
        (events,) = conn.execute("SELECT count(*) FROM events").fetchone()
    monkeypatch.setattr(upgrade, "REPORT_S", 0.0)
    monkeypatch.setattr(upgrade, "_INSTRUCTIONS", 100)
    monkeypatch.setattr(upgrade, "_COPIED_AT_ONCE", 1)
    with capture_logs() as logs:
        await store_files.make_empty_store(path)
    [begun, *steps, done] = [each for each in logs if each["event"].startswith("migrat")]
    assert begun == {
        "event": "migrating",
        "log_level": "info",
        "path": path,
        "from_version": OLD,
        "to_version": migrations.VERSION,
        "jobs": len(older.jobs),
        "events": events,
    }
    assert {each["step"] for each in steps} == {"copying", "rewriting"}
    assert all(each["copied"] <= each["pages"] for each in steps if each["step"] == "copying")
    written = [each["written_bytes"] for each in steps if each["step"] == "rewriting"]
    assert written == sorted(written)
    assert (done["event"], [done["kept"]]) == ("migrated", copies(path))
    assert done["duration_s"] >= 0


async def test_a_short_migration_logs_no_progress(older: ChangeFactory, path: str) -> None:
    with capture_logs() as logs:
        await store_files.make_empty_store(path)
    assert [each["event"] for each in logs if each["event"].startswith("migrat")] == ["migrating", "migrated"]


async def test_a_migration_without_space_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{small_disk}/jobd.db"
    maker = await store_files.make_store(path)
    os.unlink(f"{path}.ballast")
    simulate_next_version(monkeypatch)
    size = os.path.getsize(path)
    filler = store_files.fill(small_disk)
    os.truncate(filler, filler.stat().st_size - size - (1 << 20))  # enough for the copy
    before = sorted(os.listdir(small_disk))
    for _ in range(2):
        with pytest.raises(
            MigrationNeedsSpace, match=rf"version {OLD} needs \d+ bytes for a copy and the new tables, but only \d+ are"
        ):
            await store_files.make_empty_store(path)
        assert sorted(os.listdir(small_disk)) == before
        assert store_file.peek(path)[1] == OLD
    filler.unlink()
    await store_files.assert_store_holds(path, maker)


async def test_a_migration_with_its_copy_needs_less_space(
    older: ChangeFactory, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_migration(path, "migrate")
    with monkeypatch.context() as now:
        now.setattr(files, "space", lambda path: DiskSpace(path, 1000, 1 << 40))
        match = r"needs \d+ bytes for the new tables, but only 1000 are free. Free \d+ bytes"
        with pytest.raises(MigrationNeedsSpace, match=match) as raised:
            await store_files.make_empty_store(path)
        assert raised.value.exit_code == 78, "systemd does not restart it"
    monkeypatch.setattr(files, "space", lambda path: None)  # the file system does not say
    await store_files.make_empty_store(path)
    assert len(copies(path)) == 1


# Of the trees that a migration does not need, and that a start does not read.
UNREAD = (
    "audit",
    "audit_job",
    "deleted_jobs",
    "deleted_jobs_at",
    "deliveries",
    "deliveries_place",
    "jobs_expiry",
    "jobs_failed",
    "jobs_id",
    "jobs_storage_key",
    "late_results",
    "late_results_job",
    "late_results_storage_key",
    "payloads",
    "reports",
    "tombstones",
    "webhooks",
)


@pytest.mark.parametrize("tree", UNREAD)
async def test_a_damaged_page_of_a_tree_that_is_not_read_does_not_prevent_a_migration(
    older: ChangeFactory, path: str, tree: str
) -> None:
    store_files.damage_tree(path, tree)
    with capture_logs() as logs:
        async with store_files.open_store(path) as (_, found):
            assert len(found.jobs) + len(found.packed_jobs) == sum(job.status in LIVE for job in older.jobs.values())
    [begun] = [each for each in logs if each["event"] == "migrating"]
    assert begun["jobs"] == len(older.jobs)


def space_needed(path: str) -> int:
    """Return how many bytes the next start needs, apart from the copy."""
    conn = startup.connect(path, "FULL")
    with contextlib.closing(conn), pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "space", lambda path: DiskSpace(path, 0, 1 << 40))
        with pytest.raises(MigrationNeedsSpace) as raised:
            startup.prepare_schema(conn, path)
        [needed] = re.findall(r"needs (\d+) bytes for a copy", str(raised.value))
        (size,) = conn.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()
        return int(needed) - int(size)


async def test_free_pages_and_kept_tables_need_no_space(older: ChangeFactory, path: str) -> None:
    needed = space_needed(path)
    body = b"x" * 3_500
    with store_files.edit_store(path) as conn:
        conn.execute("CREATE TABLE deleted (body BLOB)")
        conn.executemany("INSERT INTO deleted VALUES (?)", [(body,)] * 200)
        conn.execute("DROP TABLE deleted")
    assert abs(space_needed(path) - needed) < 10_000
    keep = "INSERT INTO payloads (job_seq, body, request_hash, crc) VALUES (?, ?, '', 0)"
    with store_files.edit_store(path) as conn:
        conn.executemany(keep, [(1_000 + number, body) for number in range(200)])
    assert space_needed(path) - needed < 200 * len(body) // 2
    with store_files.edit_store(path) as conn:
        sql = "INSERT INTO events SELECT 1000 + seq, last, job_seq, at, ?, crc FROM events ORDER BY seq LIMIT 50"
        conn.execute(sql, (body,))
    assert space_needed(path) - needed > 50 * len(body)


async def test_a_failed_copy_is_removed(older: ChangeFactory, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as now:
        now.setattr(upgrade, "journal_mode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await store_files.make_empty_store(path)
    assert copies(path) == []
    assert not store_files.exists(f"{path}.tmp-v{OLD}")
    with store_files.edit_store(path) as conn, pytest.raises(sqlite3.OperationalError):
        conn.execute("SELECT * FROM notes")
