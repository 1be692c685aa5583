"""The same job granted twice within the life of one lock: two workers may have been at work on it at the same time.

Pure. It is told of committed changes (figures.py) and decides nothing; to forget costs no more than a warning.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct, field

from jobd.events import Change
from jobd.job import MINUTE_MS, Grant, Lease

TAKEN_KEPT: Final = 1_000  # grants that are watched; the oldest is forgotten first


class Taken(Struct, frozen=True):
    """A grant that was ended without a word from its worker. Its lock would have lived until this lease time."""

    until: int
    fencing_token: int
    worker: str


class Overlap(Struct, frozen=True):
    """A job that was granted while the time of the grant before had not run out. Tokens and workers: then, and now."""

    job_id: str
    tokens: tuple[int, int]
    workers: tuple[str, str]


class Overlaps(Struct):
    """A stall of the usual kind is none: there the lock had run out before the job was given to another.

    What counts is what others did while its time ran on (force-reset, transition, cancel, release-lock, a restored
    backup), and a ceiling, which ends the grant of a worker that may have spoken a moment ago.
    """

    taken: dict[int, Taken] = field(default_factory=dict)  # job seq -> its last grant
    minutes: dict[int, int] = field(default_factory=dict)  # minute -> jobs
    total: int = 0
    last: Overlap | None = None

    def ended(self, change: Change) -> None:
        """A grant may have been ended by somebody else than its holder."""
        before, after = change.before, change.after
        assert before is not None  # nothing ends of a job that is new
        if before.grant is None or before.lease is None:
            return
        ended = after.ended if after is not None else None
        if ended is not None and ended.verb is not None:
            return  # the holder itself said that it stopped
        made = before.grant
        self.taken[before.seq] = Taken(lock_end(made, before.lease), made.fencing_token, made.worker)
        if len(self.taken) > TAKEN_KEPT:
            del self.taken[next(iter(self.taken))]

    def granted(self, change: Change) -> None:
        """A job was handed to a worker. Of most jobs nothing is known here."""
        taken = self.taken.pop(change.event.job_seq, None)
        if taken is None:
            return
        after = change.after
        assert after is not None and after.grant is not None and after.lease is not None  # it was granted
        made = after.grant
        if after.lease.silent - made.stuck_after_ms >= taken.until:  # the lease time of the grant
            return
        minute = change.event.at // MINUTE_MS
        self.minutes[minute] = self.minutes.get(minute, 0) + 1
        self.minutes = self._hour_before(change.event.at)
        self.total += 1
        self.last = Overlap(after.id, (taken.fencing_token, made.fencing_token), (taken.worker, made.worker))

    def last_hour(self, now: int) -> int:
        """How many in the last 60 minutes, by wall time. After a step back of it what lies ahead does not count."""
        return sum(self._hour_before(now).values())

    def _hour_before(self, now: int) -> dict[int, int]:
        this = now // MINUTE_MS
        return {minute: count for minute, count in self.minutes.items() if this - 60 < minute <= this}


def lock_end(made: Grant, lease: Lease) -> int:
    """The lease time until which the worker had been promised the job, whatever ceiling has cut the lock short.

    A lock at its ceiling says nothing about silence; then it is one TTL from the last sign of life.
    """
    if lease.ceiling is None or lease.expires < lease.ceiling:
        return lease.expires
    return max(lease.expires, lease.silent - made.stuck_after_ms + made.ttl_ms)
