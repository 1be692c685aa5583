"""Keep jobs due that are not due any more because the wall clock was set back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from jobd.core import maintenance_rules
from jobd.engine.actor import Actor
from jobd.model.commands import KeepDue, Moment

SLICE: Final = 500  # jobs of one command


class DueJobs:
    """Send the jobs in slices, each after the commit of the one before, so that requests are decided between them."""

    def __init__(self, actor: Actor, moment: Callable[[], Moment], *, slice_jobs: int = SLICE) -> None:
        self.is_busy = False  # a slice is not committed yet
        self._actor = actor
        self._moment = moment
        self._slice_jobs = slice_jobs
        self._slices: deque[dict[str, int]] = deque()

    def keep(self, until: int) -> None:
        """Keep the jobs due that were due at wall time `until`. The first slice is decided before any other command."""
        due = list(maintenance_rules.due_before(self._actor.state, self._moment().now, until).items())
        self._slices += [dict(due[first : first + self._slice_jobs]) for first in range(0, len(due), self._slice_jobs)]
        if not self.is_busy:
            self._send_next()

    def _send_next(self) -> None:
        self.is_busy = bool(self._slices)
        if self.is_busy:
            sent = self._actor.enqueue_internal(KeepDue(jobs=self._slices.popleft()))
            sent.add_done_callback(lambda _: self._send_next())
