"""How long a client waits for a backup: as long as it progresses. No IO, no clock."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from jobd.model.responses import BackupView


class StallTimeout:
    """The limit of the time that the backup `id` may make no progress. `on_progress` is called with its state."""

    def __init__(
        self, id_: str, on_progress: Callable[[BackupView], None] | None, limit_s: float, now_s: float
    ) -> None:
        self.id = id_
        self.limit_s = limit_s
        self._on_progress = on_progress
        self._progress_s = now_s
        self._seen: BackupView | None = None

    def update(self, backups: list[BackupView], now_s: float) -> None:
        """Take the daemon's list of backups. A backup that is not in it makes no progress."""
        seen = next((each for each in backups if each.id == self.id), None)
        if seen is not None:
            self._progress_s = max(self._progress_s, now_s - seen.quiet_ms / 1000)
            self._report(seen)

    def is_over(self, now_s: float) -> bool:
        """Return whether the backup has stalled for too long."""
        return now_s - self._progress_s > self.limit_s

    def received(self, done: int, total: int | None) -> None:
        """Take the number of bytes received so far."""
        if self._seen is not None:
            self._report(replace(self._seen, state="sending", bytes_done=done, bytes_total=total, quiet_ms=0))

    def describe(self) -> str:
        """Return the error message of a stalled backup."""
        last = "" if self._seen is None else f" It was {self._seen.state} at {self._seen.bytes_done} bytes."
        return f"the backup has not moved for {self.limit_s:g} s.{last}"

    def _report(self, seen: BackupView) -> None:
        self._seen = seen
        if self._on_progress is not None:
            self._on_progress(seen)
