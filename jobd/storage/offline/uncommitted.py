"""Open a store for a dry run: the repair runs as usual, in one transaction that is rolled back."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from typing import Any, Final

from jobd.storage import startup, store_file
from jobd.storage.connection import read_number
from jobd.storage.files import FileLock, StoreUnreadable
from jobd.storage.schema import migrations


class _Uncommitted(sqlite3.Connection):
    """A connection whose transactions are parts of one that is never committed."""

    _PARTS: Final = {"BEGIN IMMEDIATE": "SAVEPOINT part", "COMMIT": "RELEASE part", "ROLLBACK": "ROLLBACK TO part"}
    in_transaction = False

    def execute(self, sql: str, /, *args: Any) -> sqlite3.Cursor:
        cursor = super().execute(self._PARTS.get(sql, sql), *args)
        if sql in self._PARTS:
            self.in_transaction = sql == "BEGIN IMMEDIATE"
        return cursor


@contextlib.contextmanager
def opened_uncommitted(path: str) -> Iterator[sqlite3.Connection | str]:
    """Yield a connection to the existing store at `path`, or a sentence if its schema version is older.

    Changes no file. Raises the errors of `startup.opened_alone`.
    """
    with FileLock(path):
        if not os.path.exists(path):
            raise StoreUnreadable(f"{path} does not exist")
        store_file.check_version(path, header := store_file.peek(path))
        store_file.check_wal(path)
        if header[1] < migrations.VERSION:
            yield (
                f"{path} has schema version {header[1]}: it would first be copied and migrated to "
                f"{migrations.VERSION}. Start the daemon once or use --yes, then run this again for details"
            )
            return
        # While another connection is open, SQLite does not write the log into the file when it closes this one.
        with startup.translated_errors(path), store_file.read_only(path) as other:
            read_number(other, "PRAGMA user_version")
            with contextlib.closing(
                sqlite3.connect(path, timeout=1.0, isolation_level=None, factory=_Uncommitted)
            ) as conn:
                if conn.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                    conn.execute("PRAGMA cache_spill = OFF")  # a killed process would leave changed pages in the file
                sqlite3.Connection.execute(conn, "BEGIN IMMEDIATE")
                yield conn
