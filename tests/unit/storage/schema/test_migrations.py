"""Schema versions: an older store is copied and migrated in one transaction, or not changed."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import sqlite3
from pathlib import Path

import pytest

from jobd.storage import codec
from jobd.storage.schema import migrations
from jobd.storage.store import Store, StoreUnreadable
from tests.support.factories import ChangeFactory
from tests.support.store_files import assert_store_holds, edit_store, make_store, read_file


def test_the_header_of_the_schema_names_no_version() -> None:
    head, table, _ = Path(migrations.__file__).with_name("schema.sql").read_text("utf-8").partition("CREATE TABLE")
    assert table
    assert not re.search(r"version [0-9]", head)


def test_every_older_version_has_a_migration() -> None:
    assert sorted(migrations.MIGRATIONS) == list(range(migrations.OLDEST, migrations.VERSION))


async def test_a_version_before_the_oldest_is_rejected(path: str) -> None:
    await make_store(path)
    with edit_store(path) as conn:
        migrations.set_version(conn, migrations.OLDEST - 1)
    before = read_file(path)
    with pytest.raises(StoreUnreadable, match="which no release has"):
        await Store.open(path)
    assert read_file(path) == before


async def test_a_migration_does_not_fix_the_checksum_of_a_damaged_meta_row(older: ChangeFactory, path: str) -> None:
    with edit_store(path) as conn:
        conn.execute("UPDATE meta SET next_token = next_token + 1")
    with pytest.raises(StoreUnreadable, match="meta row"):
        await Store.open(path)


async def test_an_older_store_is_copied_and_migrated(older: ChangeFactory, path: str) -> None:
    version, before = migrations.VERSION, migrations.OLDEST
    await assert_store_holds(path, older)
    with edit_store(path) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (version,)
        assert conn.execute("SELECT schema_version FROM meta").fetchone() == (version,)
        assert conn.execute("SELECT count(*) FROM notes").fetchone() == (len(older.jobs),)
        migrations.check_meta(conn, path)
    (copy,) = glob.glob(f"{path}.v{before}-*")
    assert os.stat(copy).st_mode & 0o777 == 0o600
    with edit_store(copy) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (before,)
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert conn.execute("SELECT count(*) FROM jobs").fetchone() == (len(older.jobs),)
    await assert_store_holds(path, older)
    assert glob.glob(f"{path}.v{before}-*") == [copy]


def _fail(conn: sqlite3.Connection) -> None:
    conn.execute("DELETE FROM events")
    raise sqlite3.OperationalError("the second step fails")


async def test_a_failed_migration_leaves_the_store_unchanged(
    older: ChangeFactory, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as now:
        now.setitem(migrations.MIGRATIONS, migrations.VERSION - 1, _fail)
        with pytest.raises(sqlite3.OperationalError, match="second step"):
            await Store.open(path)
    with edit_store(path) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (migrations.OLDEST,)
        assert conn.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'notes'").fetchone() == (0,)
        assert conn.execute("SELECT count(*) FROM events").fetchone() != (0,)
    await assert_store_holds(path, older)


def test_every_table_is_strict_and_durable_rows_have_a_checksum() -> None:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        migrations.create(conn)
        tables = conn.execute("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'").fetchall()
        assert all(strict for name, strict in tables if not name.startswith("sqlite_"))
        promised = ("jobs", "payloads", "late_results", "events", "keys", "queues", "meta", "reports", "figures")
        for table in (*promised, "tombstones", "audit", "webhooks", "deliveries"):
            assert "crc" in [row[1] for row in conn.execute(f"PRAGMA table_info({table})")], table
        assert conn.execute("PRAGMA application_id").fetchone() == (migrations.APPLICATION_ID,)


def test_changing_the_meta_row_updates_its_checksum() -> None:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        migrations.create(conn)
        migrations.change_meta(conn, marked=1, epoch=9)
        found = migrations.read_meta(conn)
        assert found is not None
        assert (found["marked"], found["epoch"], found["schema_version"]) == (1, 9, migrations.VERSION)
        assert codec.fault(tuple(found.values())) is None
