"""Delete the end of the journal of a store that no daemon holds, from a record that cannot be used."""

from __future__ import annotations

import sqlite3
from typing import Final

from msgspec import Struct

from jobd.journal import record
from jobd.journal.sqlite import SqliteJournal
from jobd.model.journal import BadRecord
from jobd.storage.database import Database, is_corrupt
from jobd.storage.offline.doctor import repair
from jobd.storage.offline.edited_rows import RepairRejected
from jobd.storage.schema.upgrade import copy_next_to
from jobd.storage.tables.tail import Pending, counted

_LABEL: Final = "before-cut"  # in the name of the copy
_MAX_IDS: Final = 20  # jobs named
_NUMBERS: Final = "SELECT number FROM journal WHERE number >= ? OR number <= ? ORDER BY number"
_DELETE: Final = "DELETE FROM journal WHERE number >= ? OR number <= ?"


class Cut(Struct):
    """The records to delete. Nothing is known about the content of `unreadable` ones."""

    number: int
    readable: list[Pending] = []
    unreadable: int = 0
    is_table_damaged: bool = False

    def __str__(self) -> str:
        if self.is_table_damaged:
            return "the table of the journal, which cannot be read, so its records are unknown"
        changes = [change for each in self.readable for change in each.batch.changes]
        ids = list(dict.fromkeys(change.job_id for change in changes if change.job_seq))
        records = counted(len(self.readable) + self.unreadable, "record")
        text = f"{records} of the journal, from {self.number} on, with {counted(len(changes), 'event')}"
        text += f" of {counted(len(ids), 'job')}"
        if ids:
            text += f" ({', '.join(ids[:_MAX_IDS])}{', …' if len(ids) > _MAX_IDS else ''})"
        if self.unreadable:
            text += f"; {self.unreadable} of them cannot be read, so their events and jobs are unknown"
        return text


def find(db: Database, number: int) -> Cut:
    """Return the records from `number` on, and those that a slice should have deleted. Raises RepairRejected."""
    if number <= db.projected_to:
        raise RepairRejected(f"the tables have the records up to {db.projected_to}: only later ones can be deleted")
    try:
        numbers = [each for (each,) in db.conn.execute(_NUMBERS, (number, db.projected_to))]
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        return Cut(number, is_table_damaged=True)
    if not numbers:
        raise RepairRejected(f"the journal has no record {number} or later")
    cut = Cut(number)
    journal = SqliteJournal(db.conn, db.commit_statement)
    for each in numbers:
        try:
            [found] = journal.read(each - 1, 1)
            cut.readable.append(Pending(each, *record.decode(found), len(found.body)))
        except BadRecord:
            cut.unreadable += 1
    return cut


def cut(path: str, number: int, *, is_dry_run: bool = False) -> str:
    """Copy the store, delete the records from `number` on, and mark the store like a backup. Return a line about it.

    Workers may hold grants of the deleted records, so the next start has to begin a new epoch and end all grants.
    """

    def change(db: Database) -> list[str]:
        found = find(db, number)
        if is_dry_run:
            return [
                f"would delete {found}",
                f"would keep a copy of the store as {path}.{_LABEL}-TIME",
                "the next start would begin a new epoch and end all grants by their stall rule, because workers may "
                "hold grants of the deleted records",
            ]
        copy = copy_next_to(db.conn, path, _LABEL)
        if found.is_table_damaged:
            db.commit(_replace_table, db, number)
            db.conn.execute("VACUUM")  # the old pages of the journal belong to no table
        else:
            db.commit(_cut, db, number)
        return [f"deleted {found}. The store from before is kept as {copy}. The next start begins a new epoch"]

    return repair(path, change, is_dry_run=is_dry_run, is_projected=False)


def _replace_table(db: Database, number: int) -> None:
    """Create the table of the journal again. Its pages cannot be read, so it cannot be dropped."""
    run = db.conn.execute
    (create_sql,) = run("SELECT sql FROM sqlite_schema WHERE name = 'journal'").fetchone()
    run("PRAGMA writable_schema = ON")
    run("DELETE FROM sqlite_schema WHERE name = 'journal'")
    run("PRAGMA writable_schema = RESET")
    run(create_sql)
    _cut(db, number)


def _cut(db: Database, number: int) -> None:
    db.conn.execute(_DELETE, (number, db.projected_to))
    db.marked = number  # a record that stays cannot remove the mark
    db.write_meta()
