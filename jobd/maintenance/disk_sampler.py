"""Measure what the disk of the store holds, in short slices with pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from jobd.engine.clock import loop_time
from jobd.model.job import MINUTE_MS, SECOND_MS
from jobd.model.responses import DiskUse
from jobd.storage.disk_use import Sample
from jobd.storage.store import Store

KEPT_MS: Final = 10 * MINUTE_MS
EMPTY_KEPT_MS: Final = 10 * SECOND_MS  # so that the first jobs show soon; an empty store costs nothing to read

log = structlog.get_logger("jobd.disk")


class DiskSampler:
    """Measures once at a time. Callers during a measurement get its result."""

    def __init__(self, storage: Store, now: Callable[[], int]) -> None:
        self.latest: DiskUse | None = None
        self._storage = storage
        self._now = now
        self._running: asyncio.Task[DiskUse] | None = None

    async def measure(self) -> DiskUse:
        return await asyncio.shield(self._start())

    def recent(self) -> DiskUse | None:
        """Return the latest measurement. Start another one if it is more than 10 minutes old, 10 s if it is empty."""
        latest = self.latest
        kept_ms = KEPT_MS if latest is not None and latest.jobs_read else EMPTY_KEPT_MS
        if latest is None or not 0 <= self._now() - latest.measured_at < kept_ms:
            self._start().add_done_callback(_log_error)
        return latest

    def _start(self) -> asyncio.Task[DiskUse]:
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._measure())
        return self._running

    async def _measure(self) -> DiskUse:
        sample, has_more = Sample(), True
        while has_more:
            began_s = loop_time()
            has_more = await self._storage.sample_jobs(sample)
            await asyncio.sleep(loop_time() - began_s)  # for others, as in Scrubber.scan
        self.latest = await self._storage.report_use(sample, self._now())
        return self.latest


def _log_error(task: asyncio.Task[DiskUse]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("disk_not_measured", reason=repr(error))
