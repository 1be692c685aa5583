"""Fixtures of the storage tests: the path of a store, an open store, and an older store of a later version of jobd."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobd.storage.schema import migrations
from jobd.storage.store import Store
from tests.support.factories import ChangeFactory
from tests.support.store_files import make_store


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "jobd.db")


@pytest.fixture
def maker() -> ChangeFactory:
    return ChangeFactory()


@pytest.fixture
async def store(path: str) -> AsyncIterator[Store]:
    store, _ = await Store.open(path)
    async with store:
        yield store


def _add_table(conn: sqlite3.Connection) -> None:
    conn.execute("CREATE TABLE notes (seq INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT")
    conn.execute("INSERT INTO notes SELECT seq, id FROM jobs NOT INDEXED")


def _rewrite_events(conn: sqlite3.Connection) -> None:
    for statement in (
        "CREATE TABLE copied AS SELECT * FROM events",
        "DELETE FROM events",
        "INSERT INTO events SELECT * FROM copied",
        "DROP TABLE copied",
    ):
        conn.execute(statement)


def simulate_next_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a later version of jobd with two more migrations, of which the first writes all events again."""
    version = migrations.VERSION
    monkeypatch.setattr(migrations, "VERSION", version + 2)
    monkeypatch.setattr(migrations, "MIGRATIONS", {version: _rewrite_events, version + 1: _add_table})
    monkeypatch.setattr(migrations, "REWRITTEN", {version: ("events",)})


@pytest.fixture
async def older(path: str, monkeypatch: pytest.MonkeyPatch) -> ChangeFactory:
    """Make a store that is two schema versions older than jobd."""
    maker = await make_store(path)
    simulate_next_version(monkeypatch)
    return maker
