"""The changes of a decision: rules add them to a draft, which numbers them and keeps rows and events consistent.

A draft reads the book and never changes it; `Book.put` applies the finished changes.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from jobd.core.state import Book
from jobd.model.commands import Call, Moment
from jobd.model.errors import ApiError
from jobd.model.events import Change, Changes, Event, EventType, initial_changes
from jobd.model.job import COUNTER_MASK, TOKEN_COUNTER_BITS, Job, LateResult, Policy, new_epoch
from jobd.model.responses import Response


class Decision(Struct):
    """The result of a command. An error can have changes too: a stuck job recovered first, a late call recorded."""

    answer: Response | ApiError
    changes: list[Change] = []
    checked: list[int] = []  # seqs of jobs whose rows were validated
    report: bytes | None = None


class Draft:
    """The changes of one decision so far, and the numbers that they use."""

    __slots__ = (
        "_epoch", "_next_event", "_next_job", "_next_token", "at", "book", "call", "changes", "checked", "policy",
    )  # fmt: skip

    def __init__(self, book: Book, call: Call, at: Moment, policy: Policy) -> None:
        self.book = book
        self.call = call
        self.at = at
        self.policy = policy
        self.changes: list[Change] = []
        self.checked: list[int] = []
        self._next_event = book.next_event
        self._next_job = book.next_job
        self._epoch = book.epoch
        self._next_token = book.next_token

    def step(
        self,
        job: Job,
        event_type: EventType,
        *,
        by: str | None = None,
        reason: str | None = None,
        details: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Job:
        """Set `fields` of `job` and `updated_at`, with their event; return the new row."""
        # The times of a job stay in order even if the wall clock stepped back.
        started_at, finished_at = fields.get("started_at", job.started_at), fields.get("finished_at", job.finished_at)
        fields["updated_at"] = max(self.at.now, job.created_at, started_at or 0, finished_at or 0)
        after = replace(job, **fields)
        event = self._event(job, job.status, after.status, event_type, by, reason, details, Changes(**fields))
        self.changes.append(Change(job, after, event))
        return after

    def create(self, job: Job, event_type: EventType, payload: bytes, request_hash: str) -> Job:
        """Add a new job with its first event."""
        event = self._event(job, None, job.status, event_type, None, None, None, initial_changes(job))
        self.changes.append(Change(None, job, event, payload, request_hash))
        return job

    def keep_late(self, job: Job, late: LateResult, reason: str, details: dict[str, Any]) -> LateResult:
        """Store a late result beside the unchanged row of `job`; return it with the number of its event."""
        event = self._note(job, "late_result", late.worker, reason, details)
        late = replace(late, seq=event.seq)
        self.changes.append(Change(job, job, event, late=late))
        return late

    def note_call(self, job: Job, worker: str, reason: str, details: dict[str, Any]) -> None:
        """Record a rejected call. The row of `job` does not change."""
        self.changes.append(Change(job, job, self._note(job, "late_call", worker, reason, details)))

    def delete(self, job: Job, reason: str | None = None) -> None:
        event = self._event(job, job.status, None, "deleted", None, reason, None, None)
        self.changes.append(Change(job, None, event))

    def queue(
        self, name: str, event_type: EventType, reason: str | None = None, details: dict[str, Any] | None = None
    ) -> None:
        """Add an event of a queue."""
        by = self.call.by
        event = Event(self._event_number(), self.at.now, event_type, 0, "", name, None, None, by, reason, details)
        self.changes.append(Change(None, None, event))

    def job_number(self) -> int:
        """Return the seq of a new job, in the order of creation, never reused."""
        number, self._next_job = self._next_job, self._next_job + 1
        return number

    def token(self) -> int:
        """Return the fencing token of a new grant, greater than all before. A full counter begins the next epoch."""
        if self._next_token > COUNTER_MASK:
            self._epoch, self._next_token = new_epoch(self._epoch, self.at.believed), 1
        counter, self._next_token = self._next_token, self._next_token + 1
        return (self._epoch << TOKEN_COUNTER_BITS) | counter

    def secret(self, number: int) -> str:
        """Return an unguessable lock id from the seed of the call. A replay returns the same."""
        return blake2b(number.to_bytes(8, "big"), key=self.call.seed, digest_size=16).hexdigest()

    def job_id(self, number: int) -> str:
        """Return a UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then bits from the seed of the call."""
        tail = blake2b(number.to_bytes(8, "big"), key=self.call.seed, digest_size=10, person=b"job id").hexdigest()
        at = f"{self.at.now & (2**48 - 1):012x}"
        variant = "89ab"[int(tail[4], 16) & 0b11]  # 0b10 and two bits more
        return f"{at[:8]}-{at[8:]}-7{tail[1:4]}-{variant}{tail[5:8]}-{tail[8:]}"  # 7 is the version

    def fraction(self, number: int) -> float:
        """Return a number in [0, 1) from the seed of the call."""
        digest = blake2b(number.to_bytes(8, "big"), key=self.call.seed, digest_size=8, person=b"jitter").digest()
        return int.from_bytes(digest, "big") / 2**64

    def _note(self, job: Job, event_type: EventType, worker: str, reason: str, details: dict[str, Any]) -> Event:
        return self._event(job, job.status, job.status, event_type, f"worker:{worker}", reason, details, None)

    def _event(
        self,
        job: Job,
        before: str | None,
        after: str | None,
        event_type: EventType,
        by: str | None,
        reason: str | None,
        details: dict[str, Any] | None,
        changes: Changes | None,
    ) -> Event:
        return Event(
            self._event_number(),
            self.at.now,
            event_type,
            job.seq,
            job.id,
            job.options.queue,
            before,
            after,
            by or self.call.by,
            reason,
            details,
            changes,
        )

    def _event_number(self) -> int:
        number, self._next_event = self._next_event, self._next_event + 1
        return number
