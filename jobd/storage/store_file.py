"""Look at the file of a store without changing it: its version, and whether its write-ahead log is complete."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from jobd.storage import files
from jobd.storage.connection import read_number
from jobd.storage.damage import wal
from jobd.storage.files import NotAStore, StoreTooNew, StoreUnreadable
from jobd.storage.schema import migrations

_MAGIC: Final = b"SQLite format 3\0"


def peek(path: str) -> tuple[int, int]:
    """Return application id and schema version of the file at `path`; (0, 0) if it is empty. Writes nothing."""
    with open(path, "rb") as file:
        header = file.read(100)
    if not header:
        return 0, 0
    if len(header) < 100 or not header.startswith(_MAGIC):
        raise NotAStore(f"{path} is not a jobd database")
    in_file = int.from_bytes(header[68:72]), int.from_bytes(header[60:64])
    if _has_log(path):  # which may have a newer header
        with contextlib.suppress(sqlite3.Error), read_only(path) as conn:  # an error: the disk is full, for example
            return read_number(conn, "PRAGMA application_id"), read_number(conn, "PRAGMA user_version")
    return in_file


def _has_log(path: str) -> bool:
    log = files.log_of(path)
    return os.path.exists(log) and os.path.getsize(log) > 0


@contextlib.contextmanager
def read_only(path: str) -> Iterator[sqlite3.Connection]:
    """Yield a read-only connection. The caller ensures that nothing else writes, for example with the lock."""
    shared = files.shared_memory_of(path)
    had_shared = os.path.exists(shared)
    mode = "mode=ro" if _has_log(path) else "mode=ro&immutable=1"
    conn = sqlite3.connect(f"file:{quote(os.fsencode(path))}?{mode}", uri=True, timeout=1.0, isolation_level=None)
    try:
        yield conn
    finally:
        conn.close()
        if not had_shared:
            Path(shared).unlink(missing_ok=True)


def check_version(path: str, header: tuple[int, int]) -> None:
    """Raise NotAStore if the file is not a jobd store, StoreTooNew or StoreUnreadable for an unsupported version."""
    application, version = header
    if application not in (0, migrations.APPLICATION_ID):
        raise NotAStore(f"{path} is a database of another program")
    if version > migrations.VERSION:
        raise StoreTooNew(
            f"{path} has schema version {version}, but this jobd supports {migrations.VERSION}: "
            "use the newer jobd, or a backup made by this version. The file was not changed"
        )
    if 0 < version < migrations.OLDEST:
        raise StoreUnreadable(f"{path} has schema version {version}, which no release has. The file was not changed")


def check_wal(path: str) -> None:
    """Raise StoreUnreadable if SQLite would skip commits in the write-ahead log of `path`."""
    log = files.log_of(path)
    if not wal.has_frames(log):
        return
    try:
        with read_only(path) as conn:
            conn.execute("PRAGMA user_version").fetchone()
            used = wal.frames_used(files.shared_memory_of(path))
    except (sqlite3.Error, OSError):
        return  # the disk is full, for example
    if wal.is_damaged(log, used):
        raise StoreUnreadable(
            f"{log} is damaged after {used} pages, and later commits cannot be read: restore a backup with `jobd "
            f"restore`, or continue from before the damage with `jobd restore {path}`, which keeps the damaged files"
        )
