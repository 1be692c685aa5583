"""Describe what a restore would find and change. Writes nothing."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from typing import Final

from jobd.model.job import new_epoch
from jobd.model.sizes import byte_size
from jobd.model.storage import DiskFull
from jobd.storage import backup, files, startup, store_file
from jobd.storage.connection import page_bytes, read_number
from jobd.storage.database import lenient_text, now_ms, readable
from jobd.storage.files import StoreBusy, StoreError, StoreUnreadable
from jobd.storage.offline import doctor
from jobd.storage.schema import migrations
from jobd.storage.tables.tail import counted

MAX_SHOWN: Final = 10  # defects of a file to restore


def restore(file: str, path: str) -> list[str]:
    """Describe what `backup.restore` would do with `file` at `path`. Reads all of `file`.

    Raises StoreBusy, StoreTooNew, StoreUnreadable, DiskFull or OSError, as the restore would.
    """
    _check_writable(path)
    files.check_not_held(path)
    used = files.read_epoch(path) or 0
    if not os.path.exists(file):
        raise StoreUnreadable(f"{file} does not exist")
    with startup.opened_read_only(file) as (source, version):
        size = sum(page_bytes(source))
        free = _check_space(path, size)
        migrations.check_meta(source, file)
        tail = startup.check_tail(source, file) if backup.has_tail(source) else None
        backup.check_whole(source, file)
        lines = [f"would restore {file} to {path}", *_checked(source, file, version, size, free)]
        if tail is not None:
            lines.append(f"    its tables lack {tail}: they would be written, and these counts are without them")
        backup_epoch = migrations.epoch_of(source)
        lines += _ended(source)
    old, replaced = _replaced(path)
    epoch = new_epoch(max(backup_epoch, used, old), now_ms())
    lines.append(f"    epoch {epoch} or later would begin; its fencing tokens are higher than all earlier ones")
    return [*lines, replaced]


def _check_writable(path: str) -> None:
    """Raise OSError if the restore could not write its file."""
    directory = os.path.dirname(path) or "."
    if not os.access(directory, os.W_OK | os.X_OK):
        code = errno.EACCES if os.path.isdir(directory) else errno.ENOENT
        raise OSError(code, os.strerror(code), directory)


def _check_space(path: str, need: int) -> int:
    """Return the free bytes on the disk of `path`. Raises DiskFull if fewer than `need` are free."""
    disk = os.statvfs(os.path.dirname(path) or ".")
    free = disk.f_bavail * disk.f_frsize
    if free < need:
        raise DiskFull(f"{path} needs {byte_size(need)} on its disk, but only {byte_size(free)} are free")
    return free


def _checked(source: sqlite3.Connection, file: str, version: int, size: int, free: int) -> Iterator[str]:
    yield f"    it is a jobd store and its structure is intact: {byte_size(size)}; {byte_size(free)} are free"
    try:
        files.check_not_held(file)
    except StoreBusy as error:
        yield f"    WARNING: {error}. A copy of a store in use can be inconsistent: make a backup instead"
    if version < migrations.VERSION:
        yield f"    its schema version is {version}: the daemon would migrate it to {migrations.VERSION} at its start"
        return
    defects = [defect for defect in doctor.find_defects(source, file) if defect.where != file]
    if not defects:
        yield "    the checksums of all rows are correct"
        return
    yield f"    WARNING: {len(defects)} defects; damaged rows would be quarantined:"
    yield from (f"        {defect.where}: {defect.what}" for defect in defects[:MAX_SHOWN])
    if len(defects) > MAX_SHOWN:
        yield f"        and more: run jobd doctor --store {file}"


def _ended(source: sqlite3.Connection) -> Iterator[str]:
    with lenient_text(source):
        counts = dict(source.execute("SELECT status, count(*) FROM jobs NOT INDEXED GROUP BY status").fetchall())
    each = ", ".join(f"{count} {readable(status)}" for status, count in counts.items())
    yield f"    it has {counted(sum(counts.values()), 'job')}{f': {each}' if each else ''}"
    yield f"    processing: {counts.get('processing', 0)}; their grants would end by their stall rule"


def _replaced(path: str) -> tuple[int, str]:
    """Return the epoch of the existing database (0 if it cannot be read), and a line that says what happens to it."""
    if not os.path.exists(path):
        return 0, "    no database would be replaced"
    if files.has_sqlite_lock(path):
        raise StoreBusy(path, None)
    kept_as = f"would be kept as {files.dated_name(path)}"
    try:
        store_file.peek(path)
        store_file.check_wal(path)
        with startup.translated_errors(path), store_file.read_only(path) as old:
            startup.check_application_id(old, path)
            jobs = counted(read_number(old, "SELECT count(*) FROM jobs NOT INDEXED"), "job")
            size = byte_size(sum(page_bytes(old)))
            return migrations.epoch_of(old), f"    the existing database ({size}, {jobs}) {kept_as}"
    except StoreError:
        return 0, f"    the existing file cannot be read, and {kept_as}"
