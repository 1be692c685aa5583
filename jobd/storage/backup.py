"""A whole copy of a store: taken from the running daemon's own connection, and put back while no daemon runs.

Neither touches the rows of the store itself. The copy is marked: who opens it takes a new epoch and ends its grants.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, Literal

from jobd.model.storage import BackupError, DiskFull
from jobd.storage import files, migrations, startup
from jobd.storage.files import FileLock, StoreError, StoreUnreadable
from jobd.storage.store import MEMORY, Store

Step = Literal["copying", "checking"]
# What is being done, how many bytes of it are done, and of how many (0 where nobody knows). Called often, from the
# thread of the copy; what it raises ends that.
Progress = Callable[[Step, int, int], None]

_STEP_PAGES: Final = 100
# In one go the copy would block every commit for as long as it takes.
_PAUSE_S: Final = 0.002
_SPARE_BYTES: Final = 32 << 20
# So many steps of SQLite between two signs of life of a check: some milliseconds.
_CHECK_STEPS: Final = 20_000


class BackupStopped(StoreError, BackupError):
    """The store was closed, or the one who asked went away, before the copy was whole."""

    exit_code = 75


class BadCopy(StoreUnreadable, BackupError):
    """The copy does not pass its check, so the store that it was taken from would not either."""


async def make_copy(store: Store, told: Progress | None = None) -> BinaryIO:
    """A marked, checked copy of the store as it is at some moment during the call, as an open file without a name.

    Copies in a thread. When this task is cancelled the thread is told to stop, and waited for. Raises DiskFull before
    anything is copied where there is no room for the copy beside the store, BadCopy where the copy does not pass its
    check, BackupStopped.
    """
    async with store.connection_for_backup() as (conn, closing):
        gone = threading.Event()

        def step(what: Step, done: int, total: int) -> None:
            if closing.is_set() or gone.is_set():
                raise BackupStopped("the backup was cut short")
            if told is not None:
                told(what, done, total)

        thread = asyncio.ensure_future(asyncio.to_thread(_copy_and_open, conn, store.path, step))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            gone.set()
            await asyncio.wait([thread])
            if not thread.cancelled() and thread.exception() is None:
                await asyncio.to_thread(thread.result().close)
            raise


def _copy_and_open(conn: sqlite3.Connection, path: str, step: Progress) -> BinaryIO:
    """The copy as an open file that has no name any more: nothing is left behind, whatever happens."""
    name = os.urandom(8).hex()
    target = f"{tempfile.gettempdir()}/jobd-{name}" if path == MEMORY else f"{path}.backup-{name}"
    try:
        if path != MEMORY:
            _check_space(path, target)
        copy_marked(conn, target, step, durable=False)
        return open(target, "rb")
    except StoreUnreadable as error:
        raise BadCopy(f"the copy of {path} does not pass its check: {error}") from error
    finally:
        for suffix in ("", "-journal", "-wal"):
            Path(target + suffix).unlink(missing_ok=True)


def copy_marked(
    source: sqlite3.Connection,
    target: str,
    step: Progress | None = None,
    *,
    durable: bool = True,
) -> None:
    """Copy a database into the new file `target`, mark it and check it; also make it durable.

    With `step` others work with `source` meanwhile, and it gives way to them. A copy that is only read out and
    forgotten need not be durable: to flush it would hold up the store's own commits.
    """
    files.create_private(target)
    with _raising_disk_full(), contextlib.closing(_connect(target)) as copy:
        copy.execute("PRAGMA journal_mode = OFF")
        copy.execute("PRAGMA synchronous = OFF")
        pause = None if step is None else _pausing(step, *source.execute("PRAGMA page_size").fetchone())
        source.backup(copy, pages=_STEP_PAGES, progress=pause, sleep=0.001)
    mark_copy(target, step)
    if durable:
        files.sync(target)


def _pausing(step: Progress, page_bytes: int) -> Callable[[int, int, int], None]:
    def pause(_status: int, remaining: int, total: int) -> None:
        step("copying", (total - remaining) * page_bytes, total * page_bytes)
        time.sleep(_PAUSE_S)

    return pause


def _check_space(path: str, target: str) -> None:
    """A copy that fills the disk would stop the daemon from writing: see first."""
    size = sum(os.path.getsize(name) for name in (path, f"{path}-wal") if os.path.exists(name))
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
        if (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF == sqlite3.SQLITE_FULL:
            raise DiskFull(str(error)) from error
        raise


def mark_copy(path: str, step: Progress | None = None) -> None:
    """Mark the copy at `path` as one, in a file without a write-ahead log, and check it through."""
    with _raising_disk_full(), startup.translated_errors(path), contextlib.closing(_connect(path)) as copy:
        startup.journal_mode(copy, path, "delete")
        copy.execute("PRAGMA synchronous = OFF")  # nobody else knows the file yet
        startup.check_application_id(copy, path)
        migrations.check_meta(copy, path)
        copy.execute("BEGIN IMMEDIATE")
        migrations.change_meta(copy, marked=1)
        copy.execute("COMMIT")
        with _reporting(copy, step):
            check_whole(copy, path)


def check_whole(conn: sqlite3.Connection, path: str) -> None:
    """Raise StoreUnreadable where the database at `path` is damaged. Reads all of it."""
    wrong = [line for (line,) in conn.execute("PRAGMA integrity_check(10)")]
    if wrong != ["ok"]:
        raise StoreUnreadable(f"{path} is damaged: {'; '.join(wrong)}")


@contextlib.contextmanager
def _reporting(conn: sqlite3.Connection, step: Progress | None) -> Iterator[None]:
    """While `conn` checks, `step` is told that it goes on; what `step` raises ends the check, and is raised here."""
    stopped: list[Exception] = []

    def look() -> bool:
        try:
            if step is not None:
                step("checking", 0, 0)
        except BackupStopped as error:
            stopped.append(error)
        return bool(stopped)

    conn.set_progress_handler(look, _CHECK_STEPS)
    try:
        yield
    except sqlite3.OperationalError:
        if stopped:
            raise stopped[0] from None
        raise


def _connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Putting back


def restore(file: str, path: str) -> str | None:
    """Put the database in `file` at `path`; gives the name under which the old one is kept, None where there was none.

    Raises StoreBusy while a daemon holds the store, StoreTooNew or StoreUnreadable for a file that it could not use,
    DiskFull; then the store is as before.
    """
    with FileLock(path):
        used = files.read_epoch(path)
        new = f"{path}.restoring"
        Path(new).unlink(missing_ok=True)
        try:
            _check_and_copy(file, new)
            epoch, aside = _keep_old(path)
            if epoch > used.epoch:
                files.write_epoch(path, epoch)
            _give_to_owner(path, aside)
            os.replace(new, path)
            files.sync_directory(path)
        finally:
            Path(new).unlink(missing_ok=True)
    return aside


def _check_and_copy(file: str, new: str) -> None:
    if not os.path.exists(file):
        raise StoreUnreadable(f"{file} does not exist")
    startup.check_version(file, startup.peek(file))
    with startup.translated_errors(file), startup.read_only(file) as source:
        startup.check_application_id(source, file)
        copy_marked(source, new)


def _give_to_owner(path: str, aside: str | None) -> None:
    """Root puts backups back for daemons that are not root: what it writes belongs to whom the store belongs to."""
    if os.geteuid() != 0:
        return
    model = os.stat(aside or Path(path).resolve().parent)
    for name in (f"{path}.restoring", f"{path}.lock", f"{path}.epoch"):
        if os.path.exists(name):
            os.chown(name, model.st_uid, model.st_gid)


def _keep_old(path: str) -> tuple[int, str | None]:
    """Give the old database a second name; its epoch (0 where it cannot be read) and that name.

    Its write-ahead log must not meet the new database: it is written back first, or moved along.
    """
    if not os.path.exists(path):
        return 0, None
    epoch = _checkpoint_old(path)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = f"{path}.{stamp}"
    number = 1
    while os.path.exists(aside):
        number += 1
        aside = f"{path}.{stamp}-{number}"
    os.link(path, aside)
    for suffix in ("-wal", "-shm"):
        if os.path.exists(path + suffix):
            os.rename(path + suffix, aside + suffix)
    files.sync_directory(path)
    return epoch, aside


def _checkpoint_old(path: str) -> int:
    """Write the log of the old database back; its epoch, 0 where it cannot be read."""
    try:
        startup.peek(path)
    except StoreUnreadable:
        return 0  # no database at all: SQLite would throw its log away
    try:
        startup.check_wal(path)
    except StoreUnreadable:
        return 0  # what cannot be read any more is kept for whoever can
    try:
        with contextlib.closing(_connect(path)) as old:
            old.execute("PRAGMA locking_mode = EXCLUSIVE")
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            (application,) = old.execute("PRAGMA application_id").fetchone()
            if application != migrations.APPLICATION_ID:
                return 0
            return migrations.epoch_of(old)
    except sqlite3.Error as error:
        if (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise files.StoreBusy(path, None) from error
        return 0  # it is being replaced because it cannot be read
