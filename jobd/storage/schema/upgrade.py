"""Migrate the store of an older schema version, with a copy of it, a check of the free space, and lines in the log."""

from __future__ import annotations

import contextlib
import glob
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import structlog

from jobd.model.storage import SPARE_BYTES
from jobd.storage import files
from jobd.storage.connection import journal_mode, page_bytes, read_number
from jobd.storage.database import is_corrupt, now_ms, result_code
from jobd.storage.schema import migrations

log = structlog.get_logger("jobd.storage")

REPORT_S: Final = 5.0  # between lines about the progress
_INSTRUCTIONS: Final = 100_000  # SQLite instructions between two checks of the clock: some milliseconds
_COPIED_AT_ONCE: Final = 4_096  # pages
# Measured: the log and the new pages need at most 1.35 times the bytes of the tables that are written again.
_REWRITE_FACTOR: Final = 1.5
# Each table, and an expression for the size of a row. Integers are left out, so the result is too small.
_LENGTHS: Final = (
    """SELECT t.name, group_concat('ifnull(length("' || c.name || '"), 0)', ' + ') """
    "FROM sqlite_schema AS t, pragma_table_info(t.name) AS c "
    "WHERE t.type = 'table' AND c.type IN ('BLOB', 'TEXT') GROUP BY t.name"
)


def upgrade(conn: sqlite3.Connection, path: str, version: int) -> None:
    """Copy the store at `path`, which has schema version `version`, to `<path>.v<version>-<time>`, and migrate it.

    A complete copy that an interrupted migration has left is used again. Raises MigrationNeedsSpace
    before anything is written if the disk does not have the space.
    """
    label = f"v{version}"
    _remove_part(path, label)
    _shorten_log(conn)
    copy = _complete_copy(conn, path, label)
    _check_space(conn, path, version, needs_copy=copy is None)
    began_s = time.monotonic()
    meta = migrations.check_meta(conn, path)
    counts = {  # jobs are not counted, because that reads an index which may be damaged
        "jobs": meta["live_count"] + meta["finished_count"],
        "events": read_number(conn, "SELECT count(*) FROM events"),
    }
    log.info("migrating", path=path, from_version=version, to_version=migrations.VERSION, **counts)
    if copy is None:
        copy = copy_next_to(conn, path, label)
    with _reporting(conn, path):
        migrations.migrate(conn, version)
    log.info("migrated", path=path, kept=copy, duration_s=round(time.monotonic() - began_s, 1))


def _shorten_log(conn: sqlite3.Connection) -> None:
    """Give back the space of the log, because an interrupted migration leaves a large one."""
    try:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:
        if result_code(error) & 0xFF != sqlite3.SQLITE_FULL:  # `_check_space` says how much is needed
            raise


def copy_next_to(conn: sqlite3.Connection, path: str, label: str) -> str:
    """Copy the store to `<path>.<label>-<time>` and return this name.

    The copy gets its final name when it is complete. The next start removes an incomplete one.
    """
    part, whole, report = _part(path, label), f"{path}.{label}-{now_ms()}", _Report()
    try:
        _remove_part(path, label)
        files.create_private(part)
        with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as copy:
            conn.backup(
                copy,
                pages=_COPIED_AT_ONCE,
                progress=lambda _, left, total: report.note("copying", pages=total, copied=total - left),
            )
            journal_mode(copy, part, "delete")
        files.sync(part)
        os.replace(part, whole)
        files.sync_directory(path)
        return whole
    except BaseException:
        _remove_part(path, label)
        raise


def _part(path: str, label: str) -> str:
    return f"{path}{files.TEMPORARY}{label}"


def _remove_part(path: str, label: str) -> None:
    for suffix in ("", "-journal"):
        Path(_part(path, label) + suffix).unlink(missing_ok=True)


def _complete_copy(conn: sqlite3.Connection, path: str, label: str) -> str | None:
    """Return a complete copy of the store as it is, if there is one.

    Every batch changes the meta row, so a copy with the same row and size has the same jobs and events.
    """
    content = _content(conn)
    for name in glob.glob(f"{glob.escape(path)}.{label}-*"):
        uri = f"file:{quote(os.fsencode(name))}?mode=ro&immutable=1"
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(uri, uri=True)) as copy:
            if _content(copy) == content:
                return name
    return None


def _content(conn: sqlite3.Connection) -> tuple[int, dict[str, int] | None]:
    return read_number(conn, "PRAGMA page_count"), migrations.read_meta(conn)


def _check_space(conn: sqlite3.Connection, path: str, version: int, *, needs_copy: bool) -> None:
    """Raise MigrationNeedsSpace if the disk has no space for the copy and for the tables that are written again."""
    used, free = page_bytes(conn)
    needed = int((used - _kept_bytes(conn, version)) * _REWRITE_FACTOR) + SPARE_BYTES
    needed += used + free if needs_copy else 0
    disk = files.space(path)
    if disk is not None and disk.free_bytes < needed:
        what = "a copy and the new tables" if needs_copy else "the new tables"
        lacking = needed - disk.free_bytes
        raise files.MigrationNeedsSpace(
            f"{path}: the migration from schema version {version} needs {needed} bytes for {what}, but only "
            f"{disk.free_bytes} are free. Free {lacking} bytes on the disk of {os.path.dirname(path)}, then start jobd "
            "again. The file was not changed"
        )


def _kept_bytes(conn: sqlite3.Connection, version: int) -> int:
    """Return the size of the texts and blobs in tables that are not written again; a damaged table counts as 0."""
    kept = 0
    rewritten = {table for step, tables in migrations.REWRITTEN.items() if step >= version for table in tables}
    for table, lengths in conn.execute(_LENGTHS).fetchall():
        if table not in rewritten:
            try:
                kept += read_number(conn, f'SELECT ifnull(sum({lengths}), 0) FROM "{table}"')
            except sqlite3.DatabaseError as error:
                if not is_corrupt(error):
                    raise
    return kept


@contextlib.contextmanager
def _reporting(conn: sqlite3.Connection, path: str) -> Iterator[None]:
    """Log how much the transaction inside the context has written."""
    report, written = _Report(), files.log_of(path)

    def note() -> None:
        with contextlib.suppress(OSError):
            report.note("rewriting", written_bytes=os.path.getsize(written))

    conn.set_progress_handler(note, _INSTRUCTIONS)
    try:
        yield
    finally:
        conn.set_progress_handler(None, 0)


class _Report:
    """Logs the progress, at most every REPORT_S."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + REPORT_S

    def note(self, step: str, **fields: Any) -> None:
        if (now_s := time.monotonic()) >= self._next_s:
            self._next_s = now_s + REPORT_S
            log.info("migrating", step=step, **fields)
