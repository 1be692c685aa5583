"""How long a client waits for a backup: as long as that moves. Without IO and without a clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from jobd.model.responses import BackupView

LOOK_S: Final = 0.5  # between two looks how far it is

Told = Callable[[BackupView], None]


class StallTimeout:
    """The wait for the backup `id`, which may be silent for `silence_s`. `told` hears how far it is."""

    def __init__(self, id_: str, told: Told | None, silence_s: float, now_s: float) -> None:
        self.id = id_
        self.silence_s = silence_s
        self._told = told
        self._moved_s = now_s
        self._seen: BackupView | None = None

    def look(self, backups: list[BackupView], now_s: float) -> None:
        """What the daemon says of its backups. One that is not among them, or says nothing new, is silent."""
        seen = next((each for each in backups if each.id == self.id), None)
        if seen is not None:
            self._moved_s = max(self._moved_s, now_s - seen.quiet_ms / 1000)
            self._tell(seen)

    def is_over(self, now_s: float) -> bool:
        """Whether it has been silent for too long."""
        return now_s - self._moved_s > self.silence_s

    def received(self, done: int, total: int | None) -> None:
        """So many bytes of the copy have come."""
        if self._seen is not None:
            self._tell(replace(self._seen, state="sending", bytes_done=done, bytes_total=total, quiet_ms=0))

    def words(self) -> str:
        """What is wrong when it is over."""
        last = "" if self._seen is None else f" It was {self._seen.state} at {self._seen.bytes_done} bytes."
        return f"the backup has not moved for {self.silence_s:g} s.{last}"

    def _tell(self, seen: BackupView) -> None:
        self._seen = seen
        if self._told is not None:
            self._told(seen)
