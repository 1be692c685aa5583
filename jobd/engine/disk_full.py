"""Reject writes on a full disk, in steps, and probe when they can be accepted again.

Creates are rejected first. If that is not enough, all writes but endings and deletions are rejected, the reserve file
is released, and lock time stands still, because reports of workers cannot be written. At worst, every write is
rejected. Reads are always accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

import structlog

from jobd.engine.clock import Clock
from jobd.model.clocks import MonotonicS
from jobd.model.commands import Command
from jobd.model.errors import ApiError
from jobd.model.storage import SPARE_BYTES, DiskFull, DiskSpace, JobStorage, JournalDiskFull

log = structlog.get_logger("jobd.actor")

PROBE_EVERY_S: Final = 1.0


class WriteLimit(IntEnum):
    """Which writes a full disk rejects."""

    NONE = 0
    CREATES = 1
    ALL_BUT_ENDINGS = 2
    ALL_WRITES = 3


class FullDisk:
    """The state of the disk. `write_limit` says what is rejected now.

    `space` is the result of the last `measure`; None before the first one, and for a store in memory.
    """

    def __init__(
        self,
        disk: JobStorage,
        clock: Clock,
        loop_time: Callable[[], MonotonicS],
        *,
        is_full: bool,
        has_reserve: bool = True,
    ) -> None:
        self.write_limit = WriteLimit.CREATES if is_full else WriteLimit.NONE
        self.space: DiskSpace | None = None
        self.next_probe = loop_time()
        self._needs_reserve = not has_reserve
        self._is_released = False  # the reserve file is released, and its space is left for endings
        self._is_remote = False  # the disk of the journal's server is full, not that of the store
        self._reserve_fault = ""  # why it could not be rebuilt, other than a full disk
        self._logged = self.write_limit  # the furthest step since writes were accepted last
        self._disk = disk
        self._clock = clock
        self._loop_time = loop_time

    @property
    def has_reserve(self) -> bool:
        """Whether endings have the space of the reserve file when the disk is full."""
        return self._is_released or not self._needs_reserve

    @property
    def is_local(self) -> bool:
        """Whether writes are rejected because the disk of the store is full."""
        return self.write_limit > WriteLimit.NONE and not self._is_remote

    @property
    def is_remote(self) -> bool:
        """Whether writes are rejected because the disk of the journal's server is full."""
        return self.write_limit > WriteLimit.NONE and self._is_remote

    @property
    def probe_at(self) -> MonotonicS | None:
        """The loop time of the next probe; None if no probe is needed."""
        return self.next_probe if self.write_limit or self._needs_reserve else None

    def reject(self, command: Command) -> ApiError | None:
        """Return why `command` may not be written now; None if it may."""
        if not self.write_limit or command.admission in ("read", "ping"):
            return None
        if self.write_limit == WriteLimit.CREATES and command.admission != "create":
            return None
        if self.write_limit == WriteLimit.ALL_BUT_ENDINGS and command.admission == "ending":
            return None
        return self.rejection("nothing was changed. Free some space; jobd tries again every second.")

    def rejection(self, what: str) -> ApiError:
        """Return a `storage_full` error that names the path and the free bytes, followed by `what`."""
        return ApiError("storage_full", f"{self.described()}; {what}", self._figures())

    def note(self, error: DiskFull) -> None:
        """Record which disk is full."""
        self._is_remote = isinstance(error, JournalDiskFull)

    def described(self) -> str:
        """Describe the full disk: path, free bytes, and the reserve file if it is released or missing."""
        if self._is_remote:
            return "The disk of the journal's server is full"
        space = self.space
        where = "The disk of the store is full"
        if space is not None:
            where = f"{where} ({space.free_bytes} bytes free at {space.path})"
        if self._is_released:
            return f"{where}, and the reserve file is released for endings"
        return where if self.has_reserve else f"{where}, and the reserve file is missing, so endings may not fit either"

    def _figures(self) -> dict[str, Any]:
        space = self.space
        if space is None or self._is_remote:
            return {}
        return {"path": space.path, "free_bytes": space.free_bytes, "total_bytes": space.total_bytes}

    async def measure(self) -> None:
        """Read the free and total space of the disk."""
        self.space = await self._disk.measure_space()

    async def escalate(self, error: DiskFull) -> None:
        """Reject more, because an accepted write found the disk full."""
        self.note(error)
        self.write_limit = WriteLimit(min(self.write_limit + 1, WriteLimit.ALL_WRITES))
        self.next_probe = self._loop_time() + PROBE_EVERY_S
        if self.write_limit == WriteLimit.ALL_BUT_ENDINGS:
            self._clock.hold()
            self._is_released = await self._disk.drop_reserve()
            self._needs_reserve = True
        await self.measure()
        if self.write_limit > self._logged:
            self._logged = self.write_limit
            disk = "journal" if self._is_remote else "store"
            rejected = self.write_limit.name.lower()
            log.error("disk_full", disk=disk, rejected=rejected, reserve=self.has_reserve, **self._figures())

    async def probe(self) -> None:
        """Accept writes again and rebuild the reserve file if there is room. Once a second while one of them is due.

        Raises what the disk raises, except DiskFull.
        """
        if (due := self.probe_at) is None or self._loop_time() < due:
            return
        self.next_probe = self._loop_time() + PROBE_EVERY_S
        if self.write_limit and not await self._has_room():
            return
        if self._needs_reserve:
            await self._rebuild_reserve()

    async def _has_room(self) -> bool:
        """Return whether all writes are accepted again. If space is short, at least try to accept endings."""
        try:
            await self._disk.probe(SPARE_BYTES)
        except DiskFull as error:
            self.note(error)
            if self.write_limit == WriteLimit.ALL_WRITES and await self._fits():
                self.write_limit = WriteLimit.ALL_BUT_ENDINGS
            await self.measure()
            return False
        if self.write_limit >= WriteLimit.ALL_BUT_ENDINGS:
            self._clock.resume()
        self.write_limit = self._logged = WriteLimit.NONE
        self._is_released = self._is_remote = False
        await self.measure()
        log.info("disk_has_room", message="writes are accepted again", reserve=self.has_reserve, **self._figures())
        return True

    async def _fits(self) -> bool:
        try:
            await self._disk.probe()
        except DiskFull:
            return False
        return True

    async def _rebuild_reserve(self) -> None:
        """Rebuild the reserve file if there is room. A failure rejects no write; the next probe tries again."""
        try:
            await self._disk.build_reserve()
        except DiskFull:
            return
        except OSError as error:
            if str(error) != self._reserve_fault:
                self._reserve_fault = str(error)
                log.warning("reserve_file_not_rebuilt", reason=str(error))
            return
        self._needs_reserve = False
        await self.measure()
        log.info("reserve_file_rebuilt", **self._figures())
