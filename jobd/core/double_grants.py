"""The same job granted twice within the life of one lock: two workers may have been at work on it at the same time.

Pure. It is told of committed changes (figures.py) and decides nothing; to forget costs no more than a warning.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct, field

from jobd.model.events import Change, Event
from jobd.model.job import MINUTE_MS, Grant, Lease

TAKEN_KEPT: Final = 1_000  # grants that are watched; the oldest is forgotten first


TAKE_BACK: Final = "take-back"  # the rule that ended such a grant


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
    """A usual stall is not an overlap: the lock has expired before the next grant.

    A ceiling counts, because its worker may have reported a moment ago, and so does a restored backup. What an operator
    ends does not count, nor a grant whose worker has received `lock_lost`.
    """

    taken: dict[int, Taken] = field(default_factory=dict)  # job seq -> its last grant
    minutes: dict[int, int] = field(default_factory=dict)  # minute -> jobs
    total: int = 0
    last: Overlap | None = None

    def ended(self, change: Change) -> None:
        """A job has stalled, or an operator has taken it back."""
        before, after = change.before, change.after
        assert before is not None and after is not None  # a stall keeps its job
        if before.grant is None or before.lease is None:
            return
        if after.ended is not None and after.ended.rule == TAKE_BACK:
            return
        made = before.grant
        self.taken[before.seq] = Taken(lock_end(made, before.lease), made.fencing_token, made.worker)
        if len(self.taken) > TAKEN_KEPT:
            del self.taken[next(iter(self.taken))]

    def refused(self, event: Event) -> None:
        """A worker has received `lock_lost` for the grant that it no longer has."""
        taken = self.taken.get(event.job_seq)
        if taken is not None and (event.details or {}).get("fencing_token") == taken.fencing_token:
            del self.taken[event.job_seq]

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
