"""Extend the locks of processing jobs after a time in which no worker could report: a start, or a pause."""

from __future__ import annotations

from operator import itemgetter
from typing import Final

from jobd.engine.actor import Actor
from jobd.model.clocks import LockMs
from jobd.model.commands import ExtendAfterPause
from jobd.model.job import SECOND_MS, LockDeadlines

GRACE_MS: Final = 30 * SECOND_MS  # after a start or a pause, no processing job ends sooner
URGENT_MS: Final = 10 * SECOND_MS  # jobs that end later do not hold up other commands
SLICE: Final = 500  # jobs of one command


def extend_held_locks(actor: Actor, lock_ms: LockMs, since: LockMs, *, slice_jobs: int = SLICE) -> None:
    """Postpone the deadlines of processing jobs. A lock that was not live at lock time `since` stays expired.

    `lock_ms` is the present lock time. The actor extends jobs that end within URGENT_MS before it decides any other
    command, and the others between commands, the earliest first: a takeover with many of them would have to wait. Jobs
    without a deadline within twice the grace are omitted.
    """
    held = [
        (_ends(job.deadlines, since), job.id) for job in actor.state.processing.values() if job.deadlines is not None
    ]
    ending = sorted((each for each in held if each[0] < lock_ms + 2 * GRACE_MS), key=itemgetter(0))
    for first in range(0, len(ending), slice_jobs):
        jobs = ending[first : first + slice_jobs]
        command = ExtendAfterPause(ids=[job_id for _, job_id in jobs], grace_ms=GRACE_MS, since=since)
        actor.defer_internal(command, (jobs[0][0] - lock_ms - URGENT_MS) / SECOND_MS)


def _ends(deadlines: LockDeadlines, since: LockMs) -> LockMs:
    """Return the first of these deadlines after lock time `since`: its lock expires, or its job stalls."""
    end = deadlines.expires if deadlines.is_live(since) else deadlines.stalled_at
    return end if deadlines.progress_due is None else min(end, deadlines.progress_due)
