"""Schema versions: how a new database begins and how an older one becomes this version's.

A step runs inside the one transaction of its migration and commits nothing itself.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Final

from jobd.batch import Numbers
from jobd.rows import META_COLUMNS, sealed

APPLICATION_ID: Final = 0x6A6F6264  # "jobd", in the header of the file
VERSION: Final = 1

# MIGRATIONS[n] turns schema version n into n + 1. A step that changes the columns of a table with checksums
# has to write them anew, and the XOR of the job checksums with them.
MIGRATIONS: Final[dict[int, Callable[[sqlite3.Connection], None]]] = {}


def statements(script: str) -> Iterator[str]:
    """The statements of an SQL script, one by one (executescript would commit)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def meta_row(numbers: Numbers, totals: tuple[int, int, int, int], marked: int, version: int) -> tuple[int, ...]:
    """The row of META_COLUMNS with its checksum."""
    return sealed(
        (
            version,
            numbers.epoch,
            numbers.next_token,
            numbers.next_job,
            numbers.next_event,
            numbers.lease_ms,
            numbers.wall_ms,
            *totals,
            marked,
        )
    )


def create(conn: sqlite3.Connection) -> None:
    """Lay out an empty database, in one transaction of its own."""
    script = files("jobd").joinpath("schema.sql").read_text("utf-8")
    conn.execute("BEGIN IMMEDIATE")
    for statement in statements(script):
        conn.execute(statement)
    row = meta_row(Numbers(), (0, 0, 0, 0), 0, VERSION)
    names = ", ".join((*META_COLUMNS, "crc"))
    conn.execute(f"INSERT INTO meta (id, {names}) VALUES (1{', ?' * len(row)})", row)
    conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    conn.execute(f"PRAGMA user_version = {VERSION}")
    conn.execute("COMMIT")


def migrate(conn: sqlite3.Connection, found: int) -> None:
    """Bring a database of schema version `found` to VERSION: all steps in one transaction."""
    conn.execute("BEGIN IMMEDIATE")
    for version in range(found, VERSION):
        MIGRATIONS[version](conn)
    set_version(conn, VERSION)
    conn.execute("COMMIT")


def set_version(conn: sqlite3.Connection, version: int) -> None:
    """Note the schema version in the header and in the meta row."""
    row = conn.execute(f"SELECT {', '.join(META_COLUMNS)} FROM meta WHERE id = 1").fetchone()
    crc = sealed((version, *row[1:]))[-1]
    conn.execute("UPDATE meta SET schema_version = ?, crc = ? WHERE id = 1", (version, crc))
    conn.execute(f"PRAGMA user_version = {version}")
