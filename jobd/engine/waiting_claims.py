"""Claims that wait for work, outside the mailbox: found by queue and kind, served in order of arrival.

The actor rejects a claim that would wait above `limits.parked_claims`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

from jobd.core.worker_presence import ClaimSet, WorkerPresence
from jobd.engine.envelope import Envelope
from jobd.model.clocks import MonotonicS
from jobd.model.commands import Claim

Place = tuple[str, str | None]  # queue, and kind, None for all kinds, or _MANY

FEW: Final = 200  # places of one claim. One with more queues and kinds has a place per queue, where it is searched
_MANY: Final = "\n"  # no kind has a line feed


class WaitingClaims:
    """Waiting claims by the queues and kinds that they wait for.

    `presence` records each wait, because a worker counts as seen while its claim waits. A claim waits for the jobs of
    `open_queues` only. If there are none, it waits for a directive.
    """

    def __init__(
        self, presence: WorkerPresence, open_queues: Callable[[Claim], Sequence[str]] = lambda claim: claim.queues
    ) -> None:
        self._presence = presence
        self._open_queues = open_queues
        self.by_ticket: dict[int, tuple[Envelope, list[Place], ClaimSet]] = {}
        self._at: dict[Place, dict[int, None]] = {}  # tickets
        self._deadlines: list[tuple[MonotonicS, int]] = []
        self._by_digest: dict[str, Envelope] = {}
        self._next_ticket = 1

    def __len__(self) -> int:
        return len(self.by_ticket)

    def add(self, envelope: Envelope) -> None:
        """Let a claim wait. One that waited before, in a batch that was not written, gets its former place."""
        claim = envelope.command
        assert isinstance(claim, Claim)
        if envelope.ticket == 0:
            envelope.ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        places: list[Place] = [(queue, kind) for queue in self._queues_of(claim) for kind in _kinds(claim)]
        wait = self._presence.begin_wait(claim, self._open_queues(claim))
        self.by_ticket[envelope.ticket] = (envelope, places, wait)
        for place in places:
            waiting = self._at.setdefault(place, {})
            late = bool(waiting) and next(reversed(waiting)) > envelope.ticket
            waiting[envelope.ticket] = None
            if late:
                self._at[place] = dict.fromkeys(sorted(waiting))
        heapq.heappush(self._deadlines, (envelope.deadline, envelope.ticket))
        if envelope.key is not None:
            self._by_digest[envelope.key.digest] = envelope

    def remove(self, envelope: Envelope, *, has_left: bool = False) -> bool:
        """Remove a claim. `has_left`: because its connection closed. Return whether it waited."""
        found = self.by_ticket.pop(envelope.ticket, None)
        if found is None:
            return False
        claim = envelope.command
        assert isinstance(claim, Claim)
        self._presence.end_wait(claim.worker, found[2], has_left=has_left)
        for place in found[1]:
            del self._at[place][envelope.ticket]
            if not self._at[place]:
                del self._at[place]
        if envelope.key is not None and self._by_digest.get(envelope.key.digest) is envelope:
            del self._by_digest[envelope.key.digest]
        return True

    def of_worker(self, name: str) -> list[Envelope]:
        """Return the waiting claims of a worker."""
        return [
            each
            for each, _, _ in self.by_ticket.values()
            if isinstance(each.command, Claim) and each.command.worker == name
        ]

    def reopen(self) -> list[Claim]:
        """Let each claim wait for the queues that are open to it now. Return the claims for which they have changed."""
        changed = []
        for envelope, places, _ in list(self.by_ticket.values()):
            claim = envelope.command
            assert isinstance(claim, Claim)
            if {queue for queue, _ in places} != self._queues_of(claim).keys():
                self.remove(envelope)
                self.add(envelope)
                changed.append(claim)
        return changed

    def _queues_of(self, claim: Claim) -> dict[str, None]:
        """Return the queues for whose jobs a claim waits."""
        return dict.fromkeys(self._open_queues(claim) if claim.limit else ())

    def first(self, queue: str, kind: str) -> Envelope | None:
        """Return the claim that has waited longest for a job of this queue and kind."""
        waiting = [self._at[place] for place in ((queue, kind), (queue, None)) if place in self._at]
        tickets = [next(iter(each)) for each in waiting]
        many = self._at.get((queue, _MANY), ())
        tickets += islice((ticket for ticket in many if self.by_ticket[ticket][2].takes(kind)), 1)
        ticket = min(tickets, default=None)
        return None if ticket is None else self.by_ticket[ticket][0]

    def waiting_with(self, digest: str) -> Envelope | None:
        """Return the waiting claim with this idempotency key."""
        return self._by_digest.get(digest)

    def next_deadline(self) -> MonotonicS | None:
        while self._deadlines and self._deadlines[0][1] not in self.by_ticket:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def take_expired(self, time: MonotonicS) -> Iterator[Envelope]:
        """Remove and return the claims whose wait is over at loop time `time`."""
        while (deadline := self.next_deadline()) is not None and deadline <= time:
            envelope = self.by_ticket[heapq.heappop(self._deadlines)[1]][0]
            self.remove(envelope)
            yield envelope

    def take_all(self) -> list[Envelope]:
        envelopes = [envelope for envelope, _, _ in self.by_ticket.values()]
        for envelope in envelopes:
            self.remove(envelope)
        return envelopes


def _kinds(claim: Claim) -> Sequence[str | None]:
    if claim.kinds is None:
        return (None,)
    return tuple(dict.fromkeys(claim.kinds)) if len(claim.queues) * len(claim.kinds) <= FEW else (_MANY,)
