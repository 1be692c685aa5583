"""Make online backups, report their progress and read the finished copy in pieces.

The list of backups is in memory only.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import BinaryIO, Final

import structlog

from jobd.model.errors import ApiError
from jobd.model.responses import BackupState, BackupView
from jobd.model.storage import BackupError, BackupStep, DiskFull
from jobd.storage.store import Store

MAX_ACTIVE: Final = 8  # one is being copied; the others wait or are being sent
MAX_FINISHED: Final = 20  # kept in the list
PIECE_BYTES: Final = 256 << 10
READ_TIMEOUT_S: Final = 30.0  # per piece

log = structlog.get_logger("jobd.daemon")


class Backups:
    """Makes one backup at a time. `now` returns Unix ms."""

    def __init__(self, storage: Store, now: Callable[[], int]) -> None:
        self._storage = storage
        self.now = now
        self._active: list[Backup] = []
        self._finished: deque[BackupView] = deque(maxlen=MAX_FINISHED)
        self.progressed_s = 0.0  # monotonic time of the latest progress of any backup

    def views(self) -> list[BackupView]:
        """Return the active backups and the latest finished ones, newest first."""
        return [*(each.view() for each in reversed(self._active)), *reversed(self._finished)]

    async def begin(self, id_: str) -> Backup | ApiError:
        """Make a marked and checked copy. This may take minutes.

        The caller must `close` the backup. Raises DiskFull or BackupError.
        """
        if len(self._active) >= MAX_ACTIVE:
            return ApiError("overloaded", f"{MAX_ACTIVE} backups are under way. Try again when one of them has ended.")
        backup = Backup(self, id_, self.now())
        self._active.append(backup)
        try:
            await backup.copy(self._storage)
        except BaseException as error:
            backup.close(str(error) if isinstance(error, DiskFull | BackupError) else "it was cancelled")
            raise
        return backup

    def finish(self, backup: Backup) -> None:
        if backup in self._active:
            self._active.remove(backup)
            self._finished.append(backup.view())


class Backup:
    """One backup. `read` returns its `size` bytes in pieces, then an empty one. Always `close` it."""

    def __init__(self, backups: Backups, id_: str, started_at: int) -> None:
        self.size = 0
        self._backups = backups
        self._id = id_
        self._state: BackupState = "waiting"
        self._done = 0
        self._total: int | None = None
        self._started_at = started_at
        self._ended_at: int | None = None
        self._message: str | None = None
        self._file: BinaryIO | None = None
        self._progressed_s = time.monotonic()

    def view(self) -> BackupView:
        # A waiting backup progresses with the one that is being copied.
        progressed_s = (
            max(self._progressed_s, self._backups.progressed_s) if self._state == "waiting" else self._progressed_s
        )
        since_progress_ms = 0 if self._ended_at is not None else round(max(time.monotonic() - progressed_s, 0.0) * 1000)
        return BackupView(
            id=self._id,
            state=self._state,
            bytes_done=self._done,
            bytes_total=self._total,
            since_progress_ms=since_progress_ms,
            started_at=self._started_at,
            ended_at=self._ended_at,
            message=self._message,
        )

    async def copy(self, storage: Store) -> None:
        """Make the copy and open it for `read`."""
        self._file = await storage.backup(self._on_progress)
        self.size = await asyncio.to_thread(self._file.seek, 0, 2)
        await asyncio.to_thread(self._file.seek, 0)
        self._state, self._done, self._total = "sending", 0, self.size

    def _on_progress(self, step: BackupStep, done: int, total: int) -> None:
        """Record progress. Called in the copying thread, so a view may mix two steps for a moment."""
        self._state = step
        if total:
            self._done, self._total = done, total
        self._progressed_s = self._backups.progressed_s = time.monotonic()

    async def read(self) -> bytes:
        assert self._file is not None
        async with asyncio.timeout(READ_TIMEOUT_S):
            piece = await asyncio.to_thread(self._file.read, PIECE_BYTES)
        self._done += len(piece)
        self._progressed_s = self._backups.progressed_s = time.monotonic()
        return piece

    def close(self, why: str | None = None) -> None:
        """End the backup: sent completely, or failed with the reason `why`."""
        if self._ended_at is not None:
            return
        self._state = "sent" if why is None else "failed"
        self._message = why
        self._ended_at = self._backups.now()
        self._backups.finish(self)
        if self._file is not None:
            # The file has no name, so closing it frees its space. That takes a while for a large file.
            asyncio.get_running_loop().run_in_executor(None, _close, self._file)


def _close(file: BinaryIO) -> None:
    try:
        file.close()
    except OSError as error:
        log.warning("copy_not_closed", error=str(error))
