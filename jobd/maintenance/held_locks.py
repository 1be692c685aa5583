"""Extend the locks of processing jobs after a time in which no worker could report: a start, or a pause."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from jobd.engine.actor import Actor
from jobd.model.commands import ExtendAfterPause, Moment
from jobd.model.errors import ApiError
from jobd.model.job import SECOND_MS, Job
from jobd.model.responses import Response

GRACE_MS: Final = 30 * SECOND_MS  # after a start or a pause, no processing job ends sooner
SLICE: Final = 200  # jobs of one command, which takes a few milliseconds
SOON_MS: Final = 10 * SECOND_MS  # locks that end sooner are extended before any other command
HURRY_MS: Final = 5 * SECOND_MS  # after this time, so are all that are left


class HeldLocks:
    """Send the jobs in slices. Requests are decided between those slices whose locks cannot end meanwhile."""

    def __init__(self, actor: Actor, moment: Callable[[], Moment], *, slice_jobs: int = SLICE) -> None:
        self._actor = actor
        self._moment = moment
        self._slice_jobs = slice_jobs

    def extend(self, since: int) -> None:
        """Extend the locks that were live at lease time `since`, and postpone the other deadlines of their jobs."""
        now = self._moment().lease
        first: list[Job] = []
        rest: list[Job] = []
        for job in self._actor.state.processing.values():
            (first if _ends_before(job, now + SOON_MS) else rest).append(job)
        for jobs in self._slices(first):
            self._send(jobs, since)
        self._send_rest(deque(self._slices(rest)), since, now + HURRY_MS)

    def _slices(self, jobs: list[Job]) -> list[list[Job]]:
        return [jobs[first : first + self._slice_jobs] for first in range(0, len(jobs), self._slice_jobs)]

    def _send_rest(self, slices: deque[list[Job]], since: int, until: int) -> None:
        """Send the next slice, and the others after its commit. From lease time `until` on, send all of them."""
        while slices:
            sent = self._send(slices.popleft(), since)
            if self._moment().lease < until:
                sent.add_done_callback(lambda _: self._send_rest(slices, since, until))
                return

    def _send(self, jobs: list[Job], since: int) -> asyncio.Future[Response | ApiError]:
        """Send those of `jobs` that still have the same grant."""
        processing = self._actor.state.processing
        ids = [job.id for job in jobs if (row := processing.get(job.id)) is not None and row.grant == job.grant]
        return self._actor.enqueue_internal(ExtendAfterPause(ids=ids, grace_ms=GRACE_MS, since=since))


def _ends_before(job: Job, lease_ms: int) -> bool:
    """Return whether the lock or the progress timeout of a processing job ends before `lease_ms`."""
    lease = job.lease
    return lease is not None and (lease.expires < lease_ms or (lease.ceiling is not None and lease.ceiling < lease_ms))
