"""Queue the waiting deliveries of one endpoint, in order per subject.

The queue holds numbers, not messages. Time is an argument, in monotonic ms.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator

from msgspec import Struct


class QueuedDelivery(Struct, order=True):
    """A waiting delivery with `tries` failed attempts. `due` is the earliest next attempt."""

    id: int
    subject: str
    due: int
    tries: int = 0


class DeliveryQueue:
    """Only the first delivery of each subject may start. It stays in the queue until `remove` or `postpone`."""

    def __init__(self) -> None:
        self._subjects: dict[str, list[QueuedDelivery]] = {}
        self._subject_of: dict[int, str] = {}
        self._in_flight: dict[str, int] = {}  # subject -> id of its running delivery
        self._expedited: set[int] = set()  # running deliveries that were expedited meanwhile
        # Heaps of deliveries that are the first of their subject. Stale entries are skipped later.
        self._ready: list[int] = []
        self._later: list[tuple[int, int]] = []
        self._now = 0

    def __len__(self) -> int:
        """Return the number of deliveries, running ones included."""
        return len(self._subject_of)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._subject_of

    def has_subject(self, subject: str) -> bool:
        """Return whether a delivery of `subject` is waiting or running."""
        return subject in self._subjects

    def ids(self) -> Iterator[int]:
        """Return the numbers of all waiting deliveries, in order."""
        running = set(self._in_flight.values())
        return (id_ for id_ in sorted(self._subject_of) if id_ not in running)

    def add(self, waiting: QueuedDelivery) -> None:
        """Insert a delivery in the order of the numbers."""
        siblings = self._subjects.setdefault(waiting.subject, [])
        insort(siblings, waiting)
        self._subject_of[waiting.id] = waiting.subject
        if siblings[0] is waiting and waiting.subject not in self._in_flight:
            self._push(waiting)

    def take(self, now: int) -> QueuedDelivery | None:
        """Start and return the oldest delivery that may start now."""
        self._promote_due(now)
        while self._ready:
            if (first := self._if_due(heapq.heappop(self._ready))) is not None:
                return self._start(first)
        return None

    def take_probe(self, now: int) -> QueuedDelivery | None:
        """Start the due delivery with the fewest failures, so that a message that always fails blocks no others."""
        self._promote_due(now)
        firsts = [first for id_ in self._ready if (first := self._if_due(id_)) is not None]
        if not firsts:
            return None
        return self._start(min(firsts, key=lambda each: (each.tries, each.id)))

    def remove(self, id_: int) -> None:
        """Remove a delivery that was delivered or dead-lettered."""
        subject = self._subject_of.pop(id_)
        siblings = self._subjects[subject]
        del siblings[self._index(siblings, id_)]
        self._expedited.discard(id_)
        if self._in_flight.get(subject) == id_:
            del self._in_flight[subject]
        if not siblings:
            del self._subjects[subject]
        elif subject not in self._in_flight:
            self._push(siblings[0])

    def postpone(self, id_: int, due: int) -> None:
        """Return a failed delivery to the queue. It is next due at `due`, or at once if it was expedited meanwhile."""
        subject = self._subject_of[id_]
        siblings = self._subjects[subject]
        waiting = siblings[self._index(siblings, id_)]
        waiting.due, waiting.tries = 0 if id_ in self._expedited else due, waiting.tries + 1
        self._expedited.discard(id_)
        del self._in_flight[subject]
        self._push(siblings[0])

    def requeue(self, id_: int) -> None:
        """Return a delivery that was not attempted."""
        self._expedited.discard(id_)
        del self._in_flight[self._subject_of[id_]]
        self._push(self._subjects[self._subject_of[id_]][0])

    def up_to(self, id_: int) -> list[int]:
        """Return the numbers of a delivery and of those that it waits for."""
        siblings = self._subjects[self._subject_of[id_]]
        return [each.id for each in siblings[: self._index(siblings, id_) + 1]]

    def expedite(self, id_: int | None = None) -> None:
        """Make one delivery, or all of them, due now. A running one is due at once if it fails."""
        if id_ is not None and self._in_flight.get(self._subject_of[id_]) == id_:
            self._expedited.add(id_)
        groups = self._subjects.values() if id_ is None else [self._subjects[self._subject_of[id_]]]
        for siblings in groups:
            for waiting in siblings:
                if id_ in (None, waiting.id) and waiting.due:
                    waiting.due = 0
                    if waiting is siblings[0] and waiting.subject not in self._in_flight:
                        heapq.heappush(self._ready, waiting.id)

    def next_due(self) -> int | None:
        """Return when the next delivery may start: 0 for now, None if none is waiting."""
        while self._ready and self._if_due(self._ready[0]) is None:
            heapq.heappop(self._ready)
        if self._ready:
            return 0
        while self._later and not self._is_due_then(*self._later[0]):
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def _push(self, waiting: QueuedDelivery) -> None:
        if waiting.due:
            heapq.heappush(self._later, (waiting.due, waiting.id))
        else:
            heapq.heappush(self._ready, waiting.id)

    def _promote_due(self, now: int) -> None:
        self._now = now
        while self._later and self._later[0][0] <= now:
            due, id_ = heapq.heappop(self._later)
            if self._is_due_then(due, id_):
                heapq.heappush(self._ready, id_)

    def _is_due_then(self, due: int, id_: int) -> bool:
        first = self._first(id_)
        return first is not None and first.due == due

    def _if_due(self, id_: int) -> QueuedDelivery | None:
        first = self._first(id_)
        return first if first is not None and first.due <= self._now else None

    def _first(self, id_: int) -> QueuedDelivery | None:
        """Return the delivery if it is the first of its subject and none of that subject is running."""
        subject = self._subject_of.get(id_)
        if subject is None or subject in self._in_flight:
            return None
        first = self._subjects[subject][0]
        return first if first.id == id_ else None

    def _start(self, waiting: QueuedDelivery) -> QueuedDelivery:
        self._in_flight[waiting.subject] = waiting.id
        return waiting

    @staticmethod
    def _index(siblings: list[QueuedDelivery], id_: int) -> int:
        return bisect_left(siblings, id_, key=lambda each: each.id)
