"""Describe what a restore or an offline repair would find and change. Writes nothing.

Raises the errors that the actual call would raise.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from msgspec.structs import asdict

from jobd.model.job import LIVE, Job, new_epoch
from jobd.model.storage import DiskFull
from jobd.storage import backup, files, startup
from jobd.storage.connection import read_number
from jobd.storage.database import Database, lenient_text, now_ms, readable
from jobd.storage.files import FileLock, StoreBusy, StoreError, StoreUnreadable
from jobd.storage.offline import doctor, edited_rows, journal_cut
from jobd.storage.offline.edited_rows import RepairRejected
from jobd.storage.schema import migrations

MAX_SHOWN: Final = 10  # problems of a file to restore
# Fields that identify an edited row for an operator. A lock id is a secret.
_SHOWN_FIELDS: Final = (
    "queue", "kind", "status", "priority", "progress", "attempt", "max_attempts", "stalls", "created_at", "run_at",
    "started_at", "finished_at", "error_message",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Restore


def restore(file: str, path: str) -> list[str]:
    """Describe what `backup.restore` would do with `file` at `path`. Reads all of `file`.

    Raises StoreBusy, StoreTooNew, StoreUnreadable, DiskFull or OSError, as the restore would.
    """
    _check_writable(path)
    files.check_not_held(path)
    used = files.read_epoch(path)
    if not os.path.exists(file):
        raise StoreUnreadable(f"{file} does not exist")
    header = startup.peek(file)
    startup.check_version(file, header)
    with startup.translated_errors(file), startup.read_only(file) as source:
        startup.check_application_id(source, file)
        size = _size(source)
        free = _check_space(path, size)
        migrations.check_meta(source, file)
        tail = startup.check_tail(source, file) if backup.has_tail(source) else None
        backup.check_whole(source, file)
        lines = [f"would restore {file} to {path}", *_checked(source, file, header[1], size, free)]
        if tail is not None:
            lines.append(f"    its tables lack {tail}: they would be written, and these counts are without them")
        backup_epoch = migrations.epoch_of(source)
        lines += _ended(source)
    old, replaced = _replaced(path)
    epoch = new_epoch(max(backup_epoch, used.epoch, old), now_ms())
    lines.append(f"    epoch {epoch} or later would begin; its fencing tokens are higher than all earlier ones")
    return [*lines, replaced]


def _check_writable(path: str) -> None:
    """Raise OSError if the restore could not write its file."""
    directory = os.path.dirname(path) or "."
    if not os.access(directory, os.W_OK | os.X_OK):
        code = errno.EACCES if os.path.isdir(directory) else errno.ENOENT
        raise OSError(code, os.strerror(code), directory)


def _size(conn: sqlite3.Connection) -> int:
    return read_number(conn, "PRAGMA page_count") * read_number(conn, "PRAGMA page_size")


def _check_space(path: str, need: int) -> int:
    """Return the free bytes on the disk of `path`. Raises DiskFull if fewer than `need` are free."""
    disk = os.statvfs(os.path.dirname(path) or ".")
    free = disk.f_bavail * disk.f_frsize
    if free < need:
        raise DiskFull(f"{path} needs {_amount(need)} on its disk, but only {_amount(free)} are free")
    return free


def _amount(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


def _checked(source: sqlite3.Connection, file: str, version: int, size: int, free: int) -> Iterator[str]:
    yield f"    it is a jobd store and its structure is intact: {_amount(size)}; {_amount(free)} are free"
    try:
        files.check_not_held(file)
    except StoreBusy as error:
        yield f"    WARNING: {error}. A copy of a store in use can be inconsistent: make a backup instead"
    if version < migrations.VERSION:
        yield f"    its schema version is {version}: the daemon would migrate it to {migrations.VERSION} at its start"
        return
    problems = [problem for problem in doctor.problems(source, file) if problem.where != file]
    if not problems:
        yield "    the checksums of all rows are correct"
        return
    yield f"    WARNING: {len(problems)} problems; damaged rows would be quarantined:"
    yield from (f"        {problem.where}: {problem.what}" for problem in problems[:MAX_SHOWN])
    if len(problems) > MAX_SHOWN:
        yield f"        and more: run jobd doctor --store {file}"


def _ended(source: sqlite3.Connection) -> Iterator[str]:
    with lenient_text(source):
        counts = dict(source.execute("SELECT status, count(*) FROM jobs NOT INDEXED GROUP BY status").fetchall())
    each = ", ".join(f"{count} {readable(status)}" for status, count in counts.items())
    total = sum(counts.values())
    yield f"    it has {total} {'job' if total == 1 else 'jobs'}{f': {each}' if each else ''}"
    processing = counts.get("processing", 0)
    yield f"    processing: {processing}; their grants would end by their stall rule"


def _replaced(path: str) -> tuple[int, str]:
    """Return the epoch of the existing database (0 if it cannot be read), and a line that says what happens to it."""
    if not os.path.exists(path):
        return 0, "    no database would be replaced"
    if files.has_sqlite_lock(path):
        raise StoreBusy(path, None)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    kept_as = f"would be kept as {path}.{stamp}"
    try:
        startup.peek(path)
        startup.check_wal(path)
        with startup.translated_errors(path), startup.read_only(path) as old:
            startup.check_application_id(old, path)
            (count,) = old.execute("SELECT count(*) FROM jobs NOT INDEXED").fetchone()
            jobs = "1 job" if count == 1 else f"{count} jobs"
            return migrations.epoch_of(old), f"    the existing database ({_amount(_size(old))}, {jobs}) {kept_as}"
    except StoreError:
        return 0, f"    the existing file cannot be read, and {kept_as}"


# ---------------------------------------------------------------------------------------------------------------------
# Repairs


def accept(path: str, ids: Sequence[str] | None) -> list[str]:
    """Describe what `doctor.accept` would write. Raises the errors that it would raise."""
    with _opened_read_only(path) as db:
        if isinstance(db, str):
            return [db]
        live, _, finished, _ = doctor.totals(db.conn)
        lines: list[str] = []
        for id_ in doctor.damaged(db, path) if ids is None else dict.fromkeys(ids):
            try:
                job, described = _accepted(db, id_)
            except RepairRejected as rejected:
                if ids is not None:
                    raise
                lines.append(f"{rejected}. The row would not change")
                continue
            lines += described
            is_new = not db.rows("SELECT 1 FROM jobs NOT INDEXED WHERE seq = ?", (job.seq,))
            live, finished = live + (is_new and job.status in LIVE), finished + (is_new and job.status not in LIVE)
        lines = [*lines, *_counts(db, (live, finished))] if lines else [doctor.NOTHING_DAMAGED]
        return [*_written_first(db, path), *lines]


def _accepted(db: Database, id_: str) -> tuple[Job, list[str]]:
    """Return the job `id_` as it would be accepted, and lines that describe it."""
    edited = edited_rows.edited(db, id_)
    job = edited.job
    duplicates = db.rows("SELECT seq FROM jobs NOT INDEXED WHERE id = ? AND seq <> ?", (job.id, job.seq))
    if duplicates:
        raise RepairRejected(f"job {id_}: another row has this id")
    fields = {**asdict(job.options), **asdict(job), "error_message": job.error and job.error.message}
    values = ", ".join(f"{name} {readable(fields[name])}" for name in _SHOWN_FIELDS if fields[name] not in (None, ""))
    return job, [
        f"job {id_}: {edited.where} would be accepted with a new checksum; validation would check it",
        f"    {values}; a payload of {len(edited.body)} bytes",
    ]


def recount(path: str) -> list[str]:
    """Describe what `doctor.recount` would write. Raises the errors that it would raise."""
    with _opened_read_only(path) as db:
        if isinstance(db, str):
            return [db]
        totals = doctor.totals(db.conn)
        lines = [*_written_first(db, path), "all indexes would be rebuilt from the rows"]
        lines += _counts(db, (totals[0], totals[2]))
        if totals != db.totals and totals[::2] == db.totals[::2]:
            lines.append("the rows differ from those that are recorded; they would be accepted")
        lines += [f"{each.where}: {each.what}" for each in doctor.queues(db.conn, path)]
        return lines


def cut_journal(path: str, number: int) -> list[str]:
    """Describe what `journal_cut.cut` would delete. Raises the errors that it would raise."""
    with _opened_read_only(path) as db:
        if isinstance(db, str):
            return [db]
        return [
            f"would delete {journal_cut.find(db, number)}",
            f"would keep a copy of the store as {path}.{journal_cut.LABEL}-TIME",
            "the next start would begin a new epoch and end all grants by their stall rule, because workers may hold "
            "grants of the deleted records",
        ]


def _written_first(db: Database, path: str) -> Iterator[str]:
    """Yield a line about the tail of the journal, if there is one. Raises StoreUnreadable if it cannot be used."""
    tail = startup.check_tail(db.conn, path)
    if tail.pending:
        yield f"the tables lack {tail}: they would be written first, and can change what follows"


def _counts(db: Database, counted: tuple[int, int]) -> list[str]:
    before = db.totals[0], db.totals[2]
    if counted == before:
        return [f"the counts would not change: {counted[0]} live and {counted[1]} finished jobs"]
    now = f"{counted[0]} live and {counted[1]} finished jobs"
    return [f"the counts would be: {now} (recorded: {before[0]} and {before[1]})"]


@contextlib.contextmanager
def _opened_read_only(path: str) -> Iterator[Database | str]:
    """Yield the database for reads; for an older schema version, a sentence about its migration."""
    with contextlib.ExitStack() as stack:
        if os.path.exists(f"{path}.lock"):
            stack.enter_context(FileLock(path))
        if not os.path.exists(path):
            raise StoreUnreadable(f"{path} does not exist")
        header = startup.peek(path)
        startup.check_version(path, header)
        startup.check_wal(path)
        stack.enter_context(startup.translated_errors(path))
        conn = stack.enter_context(startup.read_only(path))
        startup.check_application_id(conn, path)
        if header[1] < migrations.VERSION:
            yield (
                f"{path} has schema version {header[1]}: it would first be copied and migrated to "
                f"{migrations.VERSION}. Start the daemon once or use --yes, then run this again for details"
            )
            return
        yield startup.read_meta(conn, path)
