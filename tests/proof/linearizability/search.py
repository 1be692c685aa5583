"""Wing and Gong's search, with memoization, for an order that explains the history of one job.

An order explains a history if it respects real time (a call that ended before another began comes first) and the model
predicts each response. A call without a response may take effect at any time after it was made, or never.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct, field

from tests.proof.linearizability import model
from tests.proof.linearizability.history import Operation

MOST_STEPS: Final = 2_000_000  # above this limit the result is unknown, which is an error


class TooHard(Exception):
    """The search has exceeded its limit."""


class SearchResult(Struct):
    """`order` explains the history if `is_explained`. Otherwise it is the longest that fits, and leads to `state`."""

    is_explained: bool
    order: list[Operation]
    state: model.ModelState
    steps: int


def judge(
    operations: Sequence[Operation], world: model.HistoryConditions, first: model.ModelState | None = None
) -> SearchResult:
    """Return whether some order explains these operations on one job, which starts in state `first` (absent)."""
    search = _Search(sorted(operations, key=lambda each: each.call_ns), world)
    is_explained = search.explore(0, first or model.ModelState())
    order = [search.operations[index] for index in search.best]
    return SearchResult(is_explained, order, search.best_state, search.steps)


class _Search(Struct):
    """The state of a search. Sets of operations are integers: bit n is operation n."""

    operations: list[Operation]
    world: model.HistoryConditions
    steps: int = 0
    path: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    best_state: model.ModelState = model.ModelState()
    tried: set[tuple[int, model.ModelState]] = field(default_factory=set)
    needs: list[int] = field(default_factory=list)  # operations that must come before each, by its key

    def __post_init__(self) -> None:
        bits = [(1 << index, each) for index, each in enumerate(self.operations)]
        self.needs = [sum(bit for bit, other in bits if model.comes_after(each, other)) for each in self.operations]

    def explore(self, done: int, state: model.ModelState) -> bool:
        """Return whether the operations not in `done` have an order that starts in `state`."""
        length = len(self.path)
        done = self._take_what_changes_nothing(done, state)
        if self._explores(done, state):
            return True
        del self.path[length:]
        return False

    def _explores(self, done: int, state: model.ModelState) -> bool:
        if len(self.path) >= len(self.best):
            self.best, self.best_state = list(self.path), state
        ends_ns = self._next_end_ns(done)
        if ends_ns == model.NEVER:
            return True  # only lost calls are left, which need not have taken effect
        if (done, state) in self.tried:
            return False
        self.tried.add((done, state))
        for index in self._next(done, ends_ns):
            after = self._step(state, index)
            if after is None or (after == state and self.operations[index].response is None):
                continue  # a lost call that changes nothing does not matter
            self.path.append(index)
            if self.explore(done | 1 << index, after):
                return True
            self.path.pop()
        return any(self.explore(done, drifted) for drifted in model.drifts(state, ends_ns, self.world))

    def _take_what_changes_nothing(self, done: int, state: model.ModelState) -> int:
        """Take operations that fit here and change nothing. Taking them first excludes no order.

        The exception is a lost call, which had to take effect before its daemon ended.
        """
        found = True
        while found:
            found = False
            until_ns = self._until_ns(done)
            for index in self._next(done, self._next_end_ns(done)):
                each = self.operations[index]
                if not model.may_change(each) and each.call_ns <= until_ns and self._step(state, index) == state:
                    self.path.append(index)
                    done, found = done | 1 << index, True
        return done

    def _step(self, state: model.ModelState, index: int) -> model.ModelState | None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise TooHard(f"{self.steps} steps over {len(self.operations)} operations")
        return model.step(state, self.operations[index], self.world)

    def _next_end_ns(self, done: int) -> int:
        """Return the earliest end of the answered calls that are left. The next operation began before it."""
        left = (each.return_ns for index, each in enumerate(self.operations) if each.response and not done >> index & 1)
        return min((end for end in left if end is not None), default=model.NEVER)

    def _next(self, done: int, ends_ns: int) -> Iterator[int]:
        """Return the candidates: begun before any remaining one ended, and lost ones before their daemon died."""
        began_ns = self._began_ns(done)
        for index, each in enumerate(self.operations):
            if each.call_ns > ends_ns:
                return
            if done >> index & 1 or done & self.needs[index] != self.needs[index]:
                continue
            if each.latest_ns is None or each.latest_ns >= began_ns:
                yield index

    def _began_ns(self, done: int) -> int:
        """Return the latest start of the operations that are done. The next one takes effect after it."""
        return self.operations[done.bit_length() - 1].call_ns if done else 0  # they are in order of their calls

    def _until_ns(self, done: int) -> int:
        """Return the earliest deadline of the lost calls that are left."""
        began_ns = self._began_ns(done)
        left = (each.latest_ns for index, each in enumerate(self.operations) if not done >> index & 1)
        return min((end for end in left if end is not None and end >= began_ns), default=model.NEVER)
