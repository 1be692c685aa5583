"""What a full disk closes, step by step, and what opens it again.

First creates are refused; where that is not enough, everything but endings and deletions, with the ballast given up
and lease time standing still (no sign of life can be taken); at worst every write. Reads go on all the while.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final, Protocol

import structlog

from jobd.batch import Disk, DiskFull
from jobd.commands import Refusal
from jobd.envelope import CREATES, ENDINGS, READS

log = structlog.get_logger("jobd.actor")

PROBE_EVERY_S: Final = 1.0


class Closed(IntEnum):
    """How far the full disk has closed the daemon."""

    NOTHING = 0
    CREATES = 1
    ALL_BUT_ENDINGS = 2
    ALL_WRITES = 3


class LeaseTime(Protocol):
    def hold(self) -> None: ...
    def resume(self) -> None: ...


class FullDisk:
    """`closed` says what is refused now. `loop_time` is that of the event loop, in seconds."""

    def __init__(self, disk: Disk, lease: LeaseTime, loop_time: Callable[[], float], *, is_full: bool) -> None:
        self.closed = Closed.CREATES if is_full else Closed.NOTHING
        self.next_probe = loop_time()
        self._has_ballast = False  # one was given up, and has to be there again before we open
        self._disk = disk
        self._lease = lease
        self._loop_time = loop_time

    def refuse(self, command: object) -> Refusal | None:
        """Why `command` may not be written now; None where it may be decided."""
        if not self.closed or isinstance(command, READS):
            return None
        if self.closed == Closed.CREATES and not isinstance(command, CREATES):
            return None
        if self.closed == Closed.ALL_BUT_ENDINGS and isinstance(command, ENDINGS):
            return None
        message = "The disk of the store is full; nothing was changed. Free some space: it is tried again every second."
        return Refusal("storage_full", message)

    async def close_further(self) -> None:
        """A write hit the full disk although `closed` was respected."""
        self.closed = Closed(min(self.closed + 1, Closed.ALL_WRITES))
        self.next_probe = self._loop_time() + PROBE_EVERY_S
        if self.closed == Closed.ALL_BUT_ENDINGS:
            self._lease.hold()
            self._has_ballast = await self._disk.drop_ballast() or self._has_ballast
        log.error("disk_full", refused=self.closed.name.lower())

    async def probe(self) -> None:
        """Once a second while closed: is there room again? Then the ballast is made anew and everything let in.

        Raises what the disk raises, except DiskFull.
        """
        if self.closed == Closed.NOTHING or self._loop_time() < self.next_probe:
            return
        self.next_probe = self._loop_time() + PROBE_EVERY_S
        try:
            await self._disk.probe()
            if self.closed >= Closed.ALL_BUT_ENDINGS:
                self.closed = Closed.ALL_BUT_ENDINGS
                await self._rebuild_ballast()
        except DiskFull:
            return
        if self.closed >= Closed.ALL_BUT_ENDINGS:
            self._lease.resume()
        self.closed = Closed.NOTHING
        log.info("disk_has_room", message="writes are taken again")

    async def _rebuild_ballast(self) -> None:
        """A store that was too small for a ballast from the start opens without one. Raises DiskFull."""
        try:
            await self._disk.build_ballast()
        except DiskFull:
            if self._has_ballast:
                raise
