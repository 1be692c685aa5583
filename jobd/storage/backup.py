"""Back up a store through the running daemon's connection, and restore a backup while no daemon runs.

A backup is marked: a daemon that opens it begins a new epoch and ends its grants.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from msgspec import Struct

from jobd.model.storage import BackupError, BackupProgress, BackupStep, DiskFull
from jobd.storage import files, startup, store_file
from jobd.storage.connection import journal_mode, read_number
from jobd.storage.database import result_code
from jobd.storage.files import FileLock, StoreError, StoreUnreadable
from jobd.storage.schema import migrations
from jobd.storage.startup import MEMORY

_STEP_PAGES: Final = 100
# Pauses between steps let the daemon commit.
_PAUSE_S: Final = 0.002
_SPARE_BYTES: Final = 32 << 20
# Steps of SQLite's virtual machine between two progress calls of a check: some milliseconds.
_CHECK_STEPS: Final = 20_000


class StoreCopy(Struct):
    """A copy of a store, as an open file without a name, and the number of the last record in it."""

    file: BinaryIO
    last_record: int


class BackupStopped(StoreError, BackupError):
    """The store was closed, or the request was cancelled, before the copy was complete."""

    exit_code = 75


class CopyFailed(StoreError, BackupError):
    """The copy could not be written."""

    exit_code = 74


class BadCopy(StoreUnreadable, BackupError):
    """The copy did not pass its check, so the store is damaged too."""


async def make_copy(
    conn: sqlite3.Connection,
    path: str,
    closing: threading.Event,
    progress: BackupProgress | None,
    *,
    is_snapshot: bool = False,
) -> StoreCopy:
    """Return a marked and checked copy of the store at some moment during the call, as an open unlinked file.

    A snapshot has no mark, and keeps its membership in a cluster.
    Copies in a thread, which a cancellation or `closing` stops. Raises DiskFull before it copies anything if the disk
    has no space for the copy, CopyFailed if it cannot be written, BadCopy if it does not pass its check, or
    BackupStopped.
    """
    cancelled = threading.Event()

    def step(phase: BackupStep, done: int, total: int) -> None:
        if closing.is_set() or cancelled.is_set():
            raise BackupStopped("the backup was interrupted")
        if progress is not None:
            progress(phase, done, total)

    thread = asyncio.ensure_future(asyncio.to_thread(_copy_and_open, conn, path, step, is_snapshot))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait([thread])
        if not thread.cancelled() and thread.exception() is None:
            await asyncio.to_thread(thread.result().file.close)
        raise


def _copy_and_open(conn: sqlite3.Connection, path: str, step: BackupProgress, is_snapshot: bool) -> StoreCopy:
    """Return the copy as an open file without a name, so that no file is left on the disk."""
    name = os.urandom(8).hex()
    target = f"{tempfile.gettempdir()}/jobd-{name}" if path == MEMORY else f"{path}{files.TEMPORARY}{name}"
    try:
        if path != MEMORY:
            _check_space(path, target)
        last_record = copy_database(conn, target, step, durable=False, is_marked=not is_snapshot)
        return StoreCopy(open(target, "rb"), last_record)
    except StoreUnreadable as error:
        raise BadCopy(f"the copy of {path} does not pass its check: {error}") from error
    except (FileNotFoundError, PermissionError) as error:
        directory = os.path.dirname(target) or "."
        reason = f"{error.strerror}. The directory must exist, and the daemon must be able to write there"
        raise CopyFailed(f"the copy cannot be written in {directory}: {reason}") from error
    finally:
        for suffix in ("", "-journal", "-wal"):
            Path(target + suffix).unlink(missing_ok=True)


def copy_database(
    source: sqlite3.Connection,
    target: str,
    step: BackupProgress | None = None,
    *,
    durable: bool = True,
    is_marked: bool = True,
) -> int:
    """Copy a database to the new file `target`, mark it and check it. Return the number of the last record in it.

    With `step`, the copy yields to other users of `source`. A temporary copy need not be `durable`, because flushing it
    would delay the store's commits.
    """
    files.create_private(target)
    with _raising_disk_full(), contextlib.closing(_connect(target)) as copy:
        copy.execute("PRAGMA journal_mode = OFF")
        copy.execute("PRAGMA synchronous = OFF")
        page_bytes = read_number(source, "PRAGMA page_size")

        def pause(_status: int, remaining: int, total: int) -> None:
            if step is not None:
                step("copying", (total - remaining) * page_bytes, total * page_bytes)
                time.sleep(_PAUSE_S)

        source.backup(copy, pages=_STEP_PAGES, progress=pause, sleep=0.001)
    last_record = finish_copy(target, step, is_marked=is_marked)
    if durable:
        files.sync(target)
    return last_record


def _check_space(path: str, target: str) -> None:
    """Raise DiskFull if a copy would fill the disk, because that would stop the daemon from writing."""
    size = sum(os.path.getsize(name) for name in (path, files.log_of(path)) if os.path.exists(name))
    directory = os.path.dirname(target) or "."
    disk = os.statvfs(directory)
    need, free = size + _SPARE_BYTES, disk.f_bavail * disk.f_frsize
    if free < need:
        raise DiskFull(f"a backup needs {need >> 20} MiB free in {directory}, but only {free >> 20} MiB are free")


@contextlib.contextmanager
def _raising_disk_full() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if result_code(error) & 0xFF == sqlite3.SQLITE_FULL:
            raise DiskFull(str(error)) from error
        raise


def finish_copy(path: str, step: BackupProgress | None = None, *, is_marked: bool = True) -> int:
    """Mark the copy at `path`, turn its write-ahead log off, and check it. Return the number of its last record.

    The tail of its journal is written into its tables first, so that no record in it can remove the mark. A marked copy
    of a node is the store of a single machine.
    """
    with _raising_disk_full(), startup.translated_errors(path), contextlib.closing(_connect(path)) as copy:
        journal_mode(copy, path, "delete")
        copy.execute("PRAGMA synchronous = OFF")  # the file is not in use yet
        startup.check_application_id(copy, path)
        migrations.check_meta(copy, path)
        if has_tail(copy):
            startup.project_tail(copy, path)
        if is_marked:
            copy.execute("BEGIN IMMEDIATE")
            migrations.change_meta(copy, marked=1)
            migrations.leave_cluster(copy)
            copy.execute("COMMIT")
        with _reporting(copy, step):
            check_whole(copy, path)
        return (migrations.read_meta(copy) or {}).get("projected_to", 0)


def has_tail(conn: sqlite3.Connection) -> bool:
    """Return whether the journal has records that the tables lack."""
    return conn.execute("SELECT 1 FROM journal LIMIT 1").fetchone() is not None


def check_whole(conn: sqlite3.Connection, path: str) -> None:
    """Raise StoreUnreadable if the structure of the database at `path` is damaged. Reads all of it."""
    problems = [line for (line,) in conn.execute("PRAGMA integrity_check(10)")]
    if problems != ["ok"]:
        raise StoreUnreadable(f"{path} is damaged: {'; '.join(problems)}")


@contextlib.contextmanager
def _reporting(conn: sqlite3.Connection, step: BackupProgress | None) -> Iterator[None]:
    """Call `step` regularly while `conn` works. If `step` raises BackupStopped, end the work and raise it."""
    stopped: list[Exception] = []

    def is_stopped() -> bool:
        try:
            if step is not None:
                step("checking", 0, 0)
        except BackupStopped as error:
            stopped.append(error)
        return bool(stopped)

    conn.set_progress_handler(is_stopped, _CHECK_STEPS)
    try:
        yield
    except sqlite3.OperationalError:
        if stopped:
            raise stopped[0] from None
        raise


def _connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Restore


def restore(file: str, path: str) -> str | None:
    """Restore the database in `file` to `path`. Return the new name of the old database; None if there was none.

    Raises StoreBusy while a daemon holds the store, StoreTooNew or StoreUnreadable if the daemon could not use `file`,
    or DiskFull. After an error the store is unchanged.
    """
    with FileLock(path):
        used = files.read_epoch(path) or 0
        new = f"{path}.restoring"
        Path(new).unlink(missing_ok=True)
        try:
            _check_and_copy(file, new)
            epoch = _checkpoint_old(path)
            if epoch > used:
                files.write_epoch(path, epoch)
            for name in (new, f"{path}.epoch"):
                if os.path.exists(name):
                    files.give_to_owner(name, path)
            old_name = _keep_old(path)
            os.replace(new, path)
            files.sync_directory(path)
        finally:
            Path(new).unlink(missing_ok=True)
    return old_name


def _check_and_copy(file: str, new: str) -> None:
    if not os.path.exists(file):
        raise StoreUnreadable(f"{file} does not exist")
    with startup.opened_read_only(file) as (source, _):
        migrations.check_meta(source, file)
        if has_tail(source):
            startup.check_tail(source, file)
        copy_database(source, new)


def _keep_old(path: str) -> str | None:
    """Give the old database a second name, and return it. A log that was not checkpointed goes with it.

    Until the new database is in place, the old one lacks this log, so nothing comes in between.
    """
    if not os.path.exists(path):
        return None
    old_name = files.dated_name(path)
    os.link(path, old_name)
    for suffix in ("-wal", "-shm", "-journal"):
        if os.path.exists(path + suffix):
            os.rename(path + suffix, old_name + suffix)
    files.sync_directory(path)
    return old_name


def _checkpoint_old(path: str) -> int:
    """Checkpoint the old database. Return its epoch, 0 if there is none or it cannot be read."""
    try:
        store_file.peek(path)
        store_file.check_wal(path)
    except (StoreUnreadable, FileNotFoundError):
        return 0  # keep the log, which SQLite cannot read completely, or would delete without a database
    try:
        with contextlib.closing(_connect(path)) as old:
            old.execute("PRAGMA locking_mode = EXCLUSIVE")
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            is_store = read_number(old, "PRAGMA application_id") == migrations.APPLICATION_ID
            return migrations.epoch_of(old) if is_store else 0
    except sqlite3.Error as error:
        if result_code(error) & 0xFF == sqlite3.SQLITE_BUSY:
            raise files.StoreBusy(path, None) from error
        return 0  # an unreadable database may be the reason for the restore
