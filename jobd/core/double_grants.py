"""Detect double grants: a job granted twice within the life of one lock, so that two workers may have worked on it.

Counted from commits, for a warning only.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct, field

from jobd.model.events import Change, Event
from jobd.model.job import MINUTE_MS, Grant, Lease

TAKEN_KEPT: Final = 1_000  # grants to watch; the oldest are forgotten
TAKE_BACK: Final = "take-back"  # the rule that ended such a grant


class Taken(Struct, frozen=True):
    """A grant that ended without its worker. `until` is the lease time until which its lock would have been live."""

    until: int
    fencing_token: int
    worker: str


class Overlap(Struct, frozen=True):
    """A job that was granted while the lock of its previous grant would have been live. Previous and new grant."""

    job_id: str
    tokens: tuple[int, int]
    workers: tuple[str, str]


class Overlaps(Struct):
    """Double grants, and the grants that could become one.

    After an ordinary stall there is none, because the lock expires before the next grant. A grant that ended at its
    ceiling or by a restored backup counts: its worker may still be at work. A grant that an operator ended does not,
    nor one whose worker has received `lock_lost`.
    """

    taken: dict[int, Taken] = field(default_factory=dict)  # job seq -> its last grant
    minutes: dict[int, int] = field(default_factory=dict)  # minute -> jobs
    total: int = 0
    last: Overlap | None = None

    def ended(self, change: Change) -> None:
        """Record that a job stalled or was taken back."""
        before, after = change.before, change.after
        assert before is not None and after is not None  # a stall does not delete the job
        if before.grant is None or before.lease is None:
            return
        if after.ended is not None and after.ended.rule == TAKE_BACK:
            return
        made = before.grant
        self.taken[before.seq] = Taken(lock_end(made, before.lease), made.fencing_token, made.worker)
        if len(self.taken) > TAKEN_KEPT:
            del self.taken[next(iter(self.taken))]

    def refused(self, event: Event) -> None:
        """Record that a worker received `lock_lost` for its ended grant."""
        taken = self.taken.get(event.job_seq)
        if taken is not None and (event.details or {}).get("fencing_token") == taken.fencing_token:
            del self.taken[event.job_seq]

    def granted(self, change: Change) -> None:
        """Record a grant. Most jobs have no watched grant."""
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
        """Return the number in the last 60 minutes of wall time."""
        return sum(self._hour_before(now).values())

    def _hour_before(self, now: int) -> dict[int, int]:
        this = now // MINUTE_MS
        return {minute: count for minute, count in self.minutes.items() if this - 60 < minute <= this}


def lock_end(made: Grant, lease: Lease) -> int:
    """Return the lease time until which the lock would have been live without its ceiling.

    For a lock that was cut to its ceiling, that is one TTL after the last report.
    """
    if lease.ceiling is None or lease.expires < lease.ceiling:
        return lease.expires
    return max(lease.expires, lease.silent - made.stuck_after_ms + made.ttl_ms)
