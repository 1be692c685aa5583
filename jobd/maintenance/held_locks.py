"""Extend the locks of processing jobs after a time in which no worker could report: a start, or a pause."""

from __future__ import annotations

from typing import Final

from jobd.engine.actor import Actor
from jobd.model.commands import ExtendAfterPause
from jobd.model.job import SECOND_MS, Lease

GRACE_MS: Final = 30 * SECOND_MS  # after a start or a pause, no processing job ends sooner
SLICE: Final = 500  # jobs of one command


def extend_held_locks(actor: Actor, lease_ms: int, since: int, *, slice_jobs: int = SLICE) -> None:
    """Postpone the deadlines of processing jobs. A lock that was not live at lease time `since` stays expired.

    `lease_ms` is the present lease time. The actor decides these commands before any other. Jobs without a deadline
    within twice the grace are omitted: a takeover with many of them would have to wait.
    """
    until = lease_ms + 2 * GRACE_MS
    ids = [job.id for job in actor.state.processing.values() if job.lease is not None and _ends(job.lease) < until]
    for first in range(0, len(ids), slice_jobs):
        actor.enqueue_internal(ExtendAfterPause(ids=ids[first : first + slice_jobs], grace_ms=GRACE_MS, since=since))


def _ends(lease: Lease) -> int:
    """Return the first deadline of a lease, in lease time."""
    first = min(lease.expires, lease.silent)
    return first if lease.ceiling is None else min(first, lease.ceiling)
