"""Create the schema, and migrate databases of older schema versions.

All steps of a migration run in one transaction. A step does not commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from importlib.resources import files
from typing import Final

from msgspec.structs import astuple

from jobd.model.storage import Numbers
from jobd.storage.codec import META_COLUMNS, fault, with_checksum
from jobd.storage.files import StoreUnreadable

APPLICATION_ID: Final = 0x6A6F6264  # "jobd", in the header of the file
VERSION: Final = 19
OLDEST: Final = 19  # that can be migrated


# MIGRATIONS[n] turns schema version n into n + 1. A step that changes the columns of a table with checksums has to
# recompute them, and the XOR of the job checksums. No version before OLDEST was released.
MIGRATIONS: Final[dict[int, Callable[[sqlite3.Connection], None]]] = {}
# REWRITTEN[n] has the tables that MIGRATIONS[n] writes again, except those with few rows. Used to estimate disk space.
REWRITTEN: Final[dict[int, tuple[str, ...]]] = {}


def meta_row(
    numbers: Numbers, totals: tuple[int, int, int, int], marked: int, gone_to: int, projected_to: int, version: int
) -> tuple[int, ...]:
    """Return the row of META_COLUMNS with its checksum."""
    return with_checksum((version, *map(int, astuple(numbers)), *totals, marked, gone_to, projected_to))


def create(conn: sqlite3.Connection) -> None:
    """Create the schema in an empty database, in one transaction."""
    script = files("jobd.storage.schema").joinpath("schema.sql").read_text("utf-8")
    conn.executescript(f"BEGIN IMMEDIATE;\n{script}")
    row = meta_row(Numbers(epoch=0), (0, 0, 0, 0), 0, 0, 0, VERSION)  # startup.py begins the first epoch
    names = ", ".join((*META_COLUMNS, "crc"))
    conn.execute(f"INSERT INTO meta (id, {names}) VALUES (1{', ?' * len(row)})", row)
    conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    conn.execute(f"PRAGMA user_version = {VERSION}")
    conn.execute("COMMIT")


def migrate(conn: sqlite3.Connection, current: int) -> None:
    """Migrate a database of schema version `current` to VERSION, in one transaction."""
    conn.execute("BEGIN IMMEDIATE")
    for version in range(current, VERSION):
        MIGRATIONS[version](conn)
    set_version(conn, VERSION)
    conn.execute("COMMIT")


def set_version(conn: sqlite3.Connection, version: int) -> None:
    """Write the schema version to the file header and the meta row."""
    change_meta(conn, schema_version=version)
    conn.execute(f"PRAGMA user_version = {version}")


def read_meta(conn: sqlite3.Connection) -> dict[str, int] | None:
    """Return the meta row of any schema version, column to value, with the checksum last; None if it is missing."""
    cursor = conn.execute("SELECT * FROM meta WHERE id = 1")
    row = cursor.fetchone()
    names = [column[0] for column in cursor.description]
    return None if row is None else dict(zip(names[1:], row[1:], strict=True))


def epoch_of(conn: sqlite3.Connection) -> int:
    """Return the epoch of a database of any schema version; 0 if its meta row is damaged."""
    meta = read_meta(conn)
    if meta is None or fault(tuple(meta.values())) is not None:
        return 0
    return meta["epoch"]


def check_meta(conn: sqlite3.Connection, path: str) -> dict[str, int]:
    """Return the meta row. Raises StoreUnreadable if it is missing or damaged."""
    meta = read_meta(conn)
    error = "it is missing" if meta is None else fault(tuple(meta.values()))
    if meta is None or error is not None:
        raise StoreUnreadable(f"{path}: the meta row is unusable ({error}): restore a backup with `jobd restore`")
    return meta


def change_meta(conn: sqlite3.Connection, **values: int) -> None:
    """Set columns of the meta row and update its checksum. The caller has verified the row."""
    meta = read_meta(conn)
    assert meta is not None
    row = {**meta, **values}
    row["crc"] = with_checksum(tuple(row.values())[:-1])[-1]
    conn.execute(f"UPDATE meta SET {', '.join(f'{name} = ?' for name in row)} WHERE id = 1", tuple(row.values()))


def leave_cluster(conn: sqlite3.Connection) -> None:
    """End the membership of a database."""
    conn.execute("DELETE FROM cluster")
