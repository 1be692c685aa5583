"""Wing and Gong's search for an order that explains what was seen of one job, with a memo of what was tried.

An order explains a history where it keeps real time (a call that ended before another began comes first) and the model
gives each answer. A call without an answer may take its place anywhere after it was made, or nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct, field

from tests.proof.linearizability.history import Operation
from tests.proof.linearizability.model import NEVER, State, World, comes_after, drifts, may_change, step

MOST_STEPS: Final = 2_000_000  # beyond this a history is neither good nor bad, and that is an error


class TooHard(Exception):
    """The search was given up."""


class Verdict(Struct):
    """`order` explains the history where `is_explained`; else it is the longest that fits, and leads to `state`."""

    is_explained: bool
    order: list[Operation]
    state: State
    steps: int


def judge(operations: Sequence[Operation], world: World, first: State | None = None) -> Verdict:
    """Whether some order explains these operations on one job, which begins in `first` (absent)."""
    search = _Search(sorted(operations, key=lambda each: each.call_ns), world)
    is_explained = search.explore(0, first or State())
    order = [search.operations[index] for index in search.best]
    return Verdict(is_explained, order, search.best_state, search.steps)


class _Search(Struct):
    """Sets of operations are bits of an integer: bit n is operation n."""

    operations: list[Operation]
    world: World
    steps: int = 0
    path: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    best_state: State = State()
    tried: set[tuple[int, State]] = field(default_factory=set)
    needs: list[int] = field(default_factory=list)  # of each operation what has to come before it, by its key

    def __post_init__(self) -> None:
        bits = [(1 << index, each) for index, each in enumerate(self.operations)]
        self.needs = [sum(bit for bit, other in bits if comes_after(each, other)) for each in self.operations]

    def explore(self, done: int, state: State) -> bool:
        """Whether what is not `done` has an order from `state` on."""
        length = len(self.path)
        done = self._take_what_changes_nothing(done, state)
        if self._explores(done, state):
            return True
        del self.path[length:]
        return False

    def _explores(self, done: int, state: State) -> bool:
        if len(self.path) >= len(self.best):
            self.best, self.best_state = list(self.path), state
        ends_ns = self._next_end_ns(done)
        if ends_ns == NEVER:
            return True  # only lost calls are left, and those need not have happened
        if (done, state) in self.tried:
            return False
        self.tried.add((done, state))
        for index in self._next(done, ends_ns):
            after = self._step(state, index)
            if after is None or (after == state and self.operations[index].said is None):
                continue  # where a lost call changes nothing it does not matter
            self.path.append(index)
            if self.explore(done | 1 << index, after):
                return True
            self.path.pop()
        return any(self.explore(done, drifted) for drifted in drifts(state, ends_ns, self.world))

    def _take_what_changes_nothing(self, done: int, state: State) -> int:
        """An answer that never changes anything and fits here need not be tried later: no order is lost by that.

        Unless a lost call would come too late by it: one that had to happen before the daemon died.
        """
        found = True
        while found:
            found = False
            until_ns = self._until_ns(done)
            for index in self._next(done, self._next_end_ns(done)):
                each = self.operations[index]
                if not may_change(each) and each.call_ns <= until_ns and self._step(state, index) == state:
                    self.path.append(index)
                    done, found = done | 1 << index, True
        return done

    def _step(self, state: State, index: int) -> State | None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise TooHard(f"{self.steps} steps over {len(self.operations)} operations")
        return step(state, self.operations[index], self.world)

    def _next_end_ns(self, done: int) -> int:
        """The end of the answered call that ends first of all that are left: whatever comes next began before."""
        left = (each.return_ns for index, each in enumerate(self.operations) if each.said and not done >> index & 1)
        return min((end for end in left if end is not None), default=NEVER)

    def _next(self, done: int, ends_ns: int) -> Iterator[int]:
        """What may come next: begun before anything left has ended, and a lost one not after its daemon died."""
        began_ns = self._began_ns(done)
        for index, each in enumerate(self.operations):
            if each.call_ns > ends_ns:
                return
            if done >> index & 1 or done & self.needs[index] != self.needs[index]:
                continue
            if each.latest_ns is None or each.latest_ns >= began_ns:
                yield index

    def _began_ns(self, done: int) -> int:
        """The latest call of all that are done: whatever comes next comes after it."""
        return self.operations[done.bit_length() - 1].call_ns if done else 0  # they are in order of their calls

    def _until_ns(self, done: int) -> int:
        """The first end of a lost call that may still happen."""
        began_ns = self._began_ns(done)
        left = (each.latest_ns for index, each in enumerate(self.operations) if not done >> index & 1)
        return min((end for end in left if end is not None and end >= began_ns), default=NEVER)
