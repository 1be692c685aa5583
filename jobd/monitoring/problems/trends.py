"""Find counts that rise from minute to minute."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Generic, TypeVar

from jobd.model.clocks import BootMs
from jobd.model.job import MINUTE_MS
from jobd.monitoring.problems.pair_counts import MINUTES

RISES: Final = 7  # of the last MINUTES
SETTLED: Final = 3  # minutes without a rise end a trend

Key = TypeVar("Key")


class Trends(Generic[Key]):
    """The counts of the last minutes by key: `begin` a minute, `note` its counts, `end` it. Other counts are 0."""

    def __init__(self) -> None:
        self._counts: dict[Key, list[int]] = {}
        self._next: dict[Key, list[int]] | None = None
        self._began: BootMs | None = None

    def begin(self, boot_ms: BootMs) -> None:
        """Begin a minute, unless the last one has not ended."""
        self._next = None
        if self._began is None or boot_ms - self._began >= MINUTE_MS:
            self._next = {}

    def note(self, key: Key, count: int) -> None:
        if self._next is not None:
            before = self._counts.get(key) or [0] * (self._began is not None)
            self._next[key] = [*before, count][-MINUTES - 1 :]

    def end(self, boot_ms: BootMs) -> None:
        if self._next is not None:
            self._counts, self._next, self._began = self._next, None, boot_ms

    def rise(self, key: Key, *, is_open: bool) -> tuple[int, int] | None:
        """Return the first and the last count if they rose in most minutes, or, of an open problem, lately."""
        counts = self._counts.get(key, [])
        rises = [later > earlier for earlier, later in pairwise(counts)]
        if sum(rises) >= RISES or (is_open and any(rises[-SETTLED:])):
            return counts[0], counts[-1]
        return None
