"""A journal in a table of the store, next to the tables that are written from it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

from msgspec.structs import astuple

from jobd.journal.checksum import checked, checksum
from jobd.model.journal import BadRecord, Record

_INSERT: Final = (
    "INSERT INTO journal (number, first_event, last_event, epoch, at, body, crc) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_READ: Final = (
    "SELECT number, first_event, last_event, epoch, at, body, crc FROM journal WHERE number > ? ORDER BY number LIMIT ?"
)
_LEFT: Final = "SELECT number FROM journal WHERE number <= ?"
_TRIM: Final = "DELETE FROM journal WHERE number <= ?"


class SqliteJournal:
    """The journal of one store. `commit` runs a statement as a transaction, and translates its errors.

    `trim` deletes the records that the tables have. It belongs to the transaction that writes these.
    """

    def __init__(self, conn: sqlite3.Connection, commit: Callable[..., object]) -> None:
        self._conn = conn
        self._commit = commit

    def check(self, upto: int) -> None:
        """Raise BadRecord if the table is damaged, or still has a record up to `upto`, which a slice has deleted.

        `read` does not see either.
        """
        try:
            (line,) = self._conn.execute("PRAGMA integrity_check(journal)").fetchone()
            left = self._conn.execute(_LEFT, (upto,)).fetchone() if line == "ok" else None
        except sqlite3.DatabaseError as error:
            raise BadRecord(upto + 1, f"cannot be read: {error}") from error
        if line != "ok":
            raise BadRecord(upto + 1, f"cannot be read: {line}")
        if left is not None:
            raise BadRecord(upto + 1, f"may be missing: record {left[0]} is present, although it was deleted")

    def append(self, record: Record) -> None:
        """Write `record`. It is durable when this returns.

        Raises DiskFull if nothing was written. After any other exception the outcome is unknown.
        """
        self._commit(_INSERT, (*astuple(record), checksum(record)))

    def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with a number above `after`, in order. Raises BadRecord."""
        return checked(self._conn.execute(_READ, (after, limit)).fetchall(), after)

    def trim(self, upto: int) -> None:
        self._conn.execute(_TRIM, (upto,))
