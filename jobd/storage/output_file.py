"""Keep what running jobs print: the last part for each of the latest grants, in a SQLite file beside the store.

Output is no state: it is not in the journal, in backups or on other nodes, and a crash of the machine may lose it. If
the file is deleted or damaged, a new one is made, and only output is lost. The file never exceeds its limit, and grows
only while its disk has free space, which jobs need more: the output of the oldest grants goes first. A file that is
larger than a lowered limit is made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import structlog

from jobd.model.responses import GrantOutput, OutputGrant
from jobd.storage import files
from jobd.storage.connection import page_bytes
from jobd.storage.startup import MEMORY

KEPT_BYTES: Final = 64 << 10  # of a grant
KEPT_GRANTS: Final = 5  # of a job
_SPARE_BYTES: Final = 256 << 10  # more than one append adds to the file
_FREE_BYTES: Final = 64 << 20  # of the disk; with less, the file does not grow
_MAX_WAITING: Final = 1_000  # calls; a slow disk delays the others only so long
# Errors of an intact file on a disk with a problem. All others, and rows of wrong types, mean damage.
_OF_THE_DISK: Final = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
_SCHEMA: Final = """
PRAGMA journal_mode = TRUNCATE;
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS grants (
    seq INTEGER PRIMARY KEY, job_id TEXT NOT NULL, job_created_at INTEGER NOT NULL, token INTEGER NOT NULL,
    attempt INTEGER NOT NULL, worker TEXT NOT NULL, begins_at INTEGER NOT NULL, end INTEGER NOT NULL,
    UNIQUE (job_id, token)
);
CREATE TABLE IF NOT EXISTS pieces (
    grant_seq INTEGER NOT NULL REFERENCES grants ON DELETE CASCADE, begin INTEGER NOT NULL, text BLOB NOT NULL,
    PRIMARY KEY (grant_seq, begin)
) WITHOUT ROWID;
PRAGMA foreign_keys = ON;
"""
_OLD_GRANTS: Final = (
    "DELETE FROM grants WHERE job_id = ? AND (job_created_at != ? OR token NOT IN "
    "(SELECT token FROM grants WHERE job_id = ? ORDER BY token DESC LIMIT ?))"
)
_OLDEST_OTHER: Final = (
    "DELETE FROM grants WHERE seq = (SELECT min(seq) FROM grants WHERE NOT (job_id = ? AND token = ?))"
)

T = TypeVar("T")
log = structlog.get_logger("jobd.output")


class OutputFileFailed(Exception):
    """The file cannot be used now. The message says why."""


class OutputFile:
    """The output of jobs in the file at `path`, which has at most `limit_bytes`. 0: none is kept.

    Its methods are called on the event loop and work in a thread of their own. They raise OutputFileFailed. `failure`
    is the error of the latest method, until text is added without an error.
    """

    def __init__(self, path: str, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.failure: str | None = None
        self._path = path
        self._file: tuple[int, int] | None = None  # device and inode
        self._conn: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, "output")  # it starts with the first call
        self._waiting = 0  # calls
        self._is_closed = False

    async def append(self, job_id: str, grant: OutputGrant, text: bytes, now: int) -> int:
        """Add text to the output of a grant at time `now` (Unix ms). Return how many bytes the grant has sent."""
        end = await self._call(lambda conn: self._append(conn, job_id, grant, text, now))
        self.failure = None
        return end

    async def read(self, job_id: str, created_at: int, token: int, begin: int) -> list[GrantOutput]:
        """Return the output of the job's grants from `token` on, of this grant only the text after `begin` bytes."""
        return await self._call(lambda conn: _read(conn, job_id, created_at, token, begin))

    async def delete(self, job_ids: list[str]) -> None:
        """Delete the output of deleted jobs."""
        rows = [(job_id,) for job_id in job_ids]
        await self._call(lambda conn: conn.executemany("DELETE FROM grants WHERE job_id = ?", rows))

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
            self._thread.shutdown(wait=False)  # it has nothing to do any more

    async def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._is_closed:
            raise OutputFileFailed("The daemon is stopping")
        if self._waiting >= _MAX_WAITING:
            raise OutputFileFailed(f"{_MAX_WAITING} requests already wait for its disk")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)
        finally:
            self._waiting -= 1

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._is_closed:
            raise OutputFileFailed("The daemon is stopping")
        try:
            try:
                result = self._do(work)
            except (sqlite3.DatabaseError, TypeError, ValueError) as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_DISK:
                    raise
                self._remove(str(error))
                result = self._do(work)
        except (OSError, sqlite3.Error) as error:
            self._close()
            if self.failure is None:
                log.warning("output_unavailable", path=self._path, error=str(error), help="Jobs go on without output.")
            self.failure = str(error)
            raise OutputFileFailed(str(error)) from None
        return result

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        conn = self._open()
        with conn:  # commits or rolls back
            return work(conn)

    def _open(self) -> sqlite3.Connection:
        """Return the connection. A file that was deleted or replaced is left."""
        if self._conn is not None and (self._path == MEMORY or files.identity(self._path) == self._file):
            return self._conn
        self._close()
        if self._path != MEMORY:
            with contextlib.suppress(FileNotFoundError):
                if (size := os.stat(self._path).st_size) > self.limit_bytes:  # which was lowered; a file never shrinks
                    self._remove(f"It has {size} bytes, more than limits.output_bytes.")
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        self._conn = sqlite3.connect(self._path, check_same_thread=False)
        self._conn.executescript(_SCHEMA)
        self._file = files.identity(self._path)
        return self._conn

    def _remove(self, reason: str) -> None:
        log.warning("output_lost", path=self._path, error=reason, help="The file is made anew.")
        self._close()
        os.unlink(self._path)

    def _close(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            with contextlib.suppress(sqlite3.Error):
                conn.close()

    def _append(self, conn: sqlite3.Connection, job_id: str, grant: OutputGrant, text: bytes, now: int) -> int:
        key = (job_id, grant.fencing_token)
        limit_bytes = min(self.limit_bytes, self._possible_bytes())
        while page_bytes(conn)[0] > limit_bytes - _SPARE_BYTES:
            if not conn.execute(_OLDEST_OTHER, key).rowcount:
                raise OSError(f"Less than {_FREE_BYTES >> 20} MiB are free on its disk")
        values = (job_id, grant.created_at, grant.fencing_token, grant.attempt, grant.worker, now)
        is_new = conn.execute("INSERT OR IGNORE INTO grants VALUES (NULL, ?, ?, ?, ?, ?, ?, 0)", values).rowcount
        if is_new:
            conn.execute(_OLD_GRANTS, (job_id, grant.created_at, job_id, KEPT_GRANTS))
        update = "UPDATE grants SET end = end + ? WHERE job_id = ? AND token = ? RETURNING seq, end"
        [(seq, end)] = conn.execute(update, (len(text), *key)).fetchall()
        conn.execute("INSERT INTO pieces VALUES (?, ?, ?)", (seq, end - len(text), text))
        conn.execute("DELETE FROM pieces WHERE grant_seq = ? AND begin < ?", (seq, end - KEPT_BYTES))
        return int(end)

    def _possible_bytes(self) -> int:
        """Return which size the file may have on its disk."""
        if self._path == MEMORY:
            return self.limit_bytes
        disk = os.statvfs(self._path)
        size = os.stat(self._path).st_size
        return max(size, size + disk.f_bavail * disk.f_frsize - _FREE_BYTES)


def _read(conn: sqlite3.Connection, job_id: str, created_at: int, token: int, begin: int) -> list[GrantOutput]:
    found = []
    columns = "seq, token, attempt, worker, begins_at, end"
    which = "job_id = ? AND job_created_at = ? AND token >= ? ORDER BY token"
    for seq, its_token, *rest, end in conn.execute(
        f"SELECT {columns} FROM grants WHERE {which}", (job_id, created_at, token)
    ).fetchall():
        pieces = conn.execute("SELECT begin, text FROM pieces WHERE grant_seq = ? ORDER BY begin", (seq,)).fetchall()
        kept = b"".join(text for _, text in pieces)
        offset = max(end - len(kept), begin if its_token == token and begin <= end else 0)
        if text := kept[len(kept) - (end - offset) :]:
            attempt, worker, begins_at = rest
            found.append(GrantOutput(attempt, worker, its_token, begins_at, offset, end, text.decode(errors="replace")))
    return found
