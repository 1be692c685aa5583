"""Keep jobs due that are not due any more because the wall clock was set back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from jobd.core.rules.maintenance_rules import WasDue, due_before
from jobd.engine.actor import Actor
from jobd.model.commands import KeepDue, Moment

SLICE: Final = 500  # jobs of one command
PIECE: Final = 2_000  # jobs that are read at once before the actor runs


class DueJobs:
    """Send the jobs in slices, each after the commit of the one before, so that requests are decided between them.

    The first slice is decided before any other command.
    """

    def __init__(self, actor: Actor, moment: Callable[[], Moment], *, slice_jobs: int = SLICE) -> None:
        self.idle = asyncio.Event()  # all slices are committed
        self.idle.set()
        self._actor = actor
        self._moment = moment
        self._slice_jobs = slice_jobs
        self._slices: deque[list[WasDue]] = deque()

    def keep(self, until: int) -> None:
        """Keep the jobs due that were due at wall time `until`."""
        now = self._moment().now
        self._send(due_before(self._actor.state.not_due(now), now, until))

    async def keep_at_start(self, until: int) -> None:
        """Do as `keep` does, in pieces, so that the lease of a leader is renewed. The actor must not run yet."""
        now = self._moment().now
        jobs, found = self._actor.state.not_due(now), list[WasDue]()
        while piece := list(islice(jobs, PIECE)):
            found += due_before(piece, now, until)
            await asyncio.sleep(0)
        self._send(found)

    def _send(self, found: list[WasDue]) -> None:
        found.sort()
        self._slices += [found[first : first + self._slice_jobs] for first in range(0, len(found), self._slice_jobs)]
        if self._slices and self.idle.is_set():
            self.idle.clear()
            self._send_next()

    def _send_next(self) -> None:
        if not self._slices:
            self.idle.set()
            return
        jobs = {job.id: job.run_at for job in self._slices.popleft()}
        self._actor.enqueue_internal(KeepDue(jobs=jobs)).add_done_callback(lambda _: self._send_next())
