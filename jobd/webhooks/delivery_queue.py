"""The line before an endpoint: what waits for it, which may go now, so that no message of a subject overtakes another.

Holds numbers, not messages. Time is an argument, in ms of a clock that never steps.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator

from msgspec import Struct


class Waiting(Struct, order=True):
    """A delivery in line. `due`: not before; `tries` have failed."""

    id: int
    subject: str
    due: int
    tries: int = 0


class Line:
    """Of each subject only the first in line may go. One that goes is in line until it is `gone` or `put_off`."""

    def __init__(self) -> None:
        self._subjects: dict[str, list[Waiting]] = {}
        self._subject_of: dict[int, str] = {}
        self._going: dict[str, int] = {}  # subject -> the id of the one that is on its way
        self._again: set[int] = set()  # of those: who were hurried meanwhile
        self._ready: list[int] = []  # heaps of firsts, whose entries go stale instead of being removed
        self._later: list[tuple[int, int]] = []
        self._now = 0

    def __len__(self) -> int:
        """How many wait, with those on their way."""
        return len(self._subject_of)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._subject_of

    def has(self, subject: str) -> bool:
        """Whether one of `subject` waits, or is on its way."""
        return subject in self._subjects

    def ids(self) -> Iterator[int]:
        """The numbers of all who wait and are not on their way, in order."""
        going = set(self._going.values())
        return (id_ for id_ in sorted(self._subject_of) if id_ not in going)

    def add(self, waiting: Waiting) -> None:
        """To its place in line, which may be before others."""
        mates = self._subjects.setdefault(waiting.subject, [])
        insort(mates, waiting)
        self._subject_of[waiting.id] = waiting.subject
        if mates[0] is waiting and waiting.subject not in self._going:
            self._push(waiting)

    def take(self, now: int) -> Waiting | None:
        """The longest in line of those who may go."""
        self._ripen(now)
        while self._ready:
            if (first := self._ripe(heapq.heappop(self._ready))) is not None:
                return self._go(first)
        return None

    def take_for_trial(self, now: int) -> Waiting | None:
        """The one that has failed least often: a message that no endpoint takes shall not stand for all others."""
        self._ripen(now)
        firsts = [first for id_ in self._ready if (first := self._ripe(id_)) is not None]
        if not firsts:
            return None
        return self._go(min(firsts, key=lambda each: (each.tries, each.id)))

    def gone(self, id_: int) -> None:
        """It is not in line any more: delivered, or given up."""
        subject = self._subject_of.pop(id_)
        mates = self._subjects[subject]
        del mates[self._place(mates, id_)]
        self._again.discard(id_)
        if self._going.get(subject) == id_:
            del self._going[subject]
        if not mates:
            del self._subjects[subject]
        elif subject not in self._going:
            self._push(mates[0])

    def put_off(self, id_: int, due: int) -> None:
        """It has failed, and stays in line: until `due`, or not at all if it was hurried while it was on its way."""
        subject = self._subject_of[id_]
        mates = self._subjects[subject]
        waiting = mates[self._place(mates, id_)]
        waiting.due, waiting.tries = 0 if id_ in self._again else due, waiting.tries + 1
        self._again.discard(id_)
        del self._going[subject]
        self._push(mates[0])

    def back(self, id_: int) -> None:
        """It did not go after all."""
        self._again.discard(id_)
        del self._going[self._subject_of[id_]]
        self._push(self._subjects[self._subject_of[id_]][0])

    def hurry(self, id_: int | None = None) -> None:
        """Nobody has to wait for his time any more, or not this one: if it is on its way, not after it either."""
        if id_ is not None and self._going.get(self._subject_of[id_]) == id_:
            self._again.add(id_)
        for mates in self._subjects.values():
            for waiting in mates:
                if id_ in (None, waiting.id) and waiting.due:
                    waiting.due = 0
                    if waiting is mates[0] and waiting.subject not in self._going:
                        heapq.heappush(self._ready, waiting.id)

    def next_due(self) -> int | None:
        """When the next may go, 0 where one may already; None where all are on their way, or nobody waits."""
        while self._ready and self._ripe(self._ready[0]) is None:
            heapq.heappop(self._ready)
        if self._ready:
            return 0
        while self._later and not self._is_due_then(*self._later[0]):
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def _push(self, waiting: Waiting) -> None:
        if waiting.due:
            heapq.heappush(self._later, (waiting.due, waiting.id))
        else:
            heapq.heappush(self._ready, waiting.id)

    def _ripen(self, now: int) -> None:
        self._now = now
        while self._later and self._later[0][0] <= now:
            due, id_ = heapq.heappop(self._later)
            if self._is_due_then(due, id_):
                heapq.heappush(self._ready, id_)

    def _is_due_then(self, due: int, id_: int) -> bool:
        first = self._first(id_)
        return first is not None and first.due == due

    def _ripe(self, id_: int) -> Waiting | None:
        """The same, if it may go now: one that has failed since it was found to be ready may have an entry left."""
        first = self._first(id_)
        return first if first is not None and first.due <= self._now else None

    def _first(self, id_: int) -> Waiting | None:
        """The one of this number, if it is the first of its subject and nobody of that is on his way."""
        subject = self._subject_of.get(id_)
        if subject is None or subject in self._going:
            return None
        first = self._subjects[subject][0]
        return first if first.id == id_ else None

    def _go(self, waiting: Waiting) -> Waiting:
        self._going[waiting.subject] = waiting.id
        return waiting

    @staticmethod
    def _place(mates: list[Waiting], id_: int) -> int:
        return bisect_left(mates, id_, key=lambda each: each.id)
