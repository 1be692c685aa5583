"""Find counts that rise from minute to minute."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Final

from jobd.model.clocks import BootMs
from jobd.model.job import MINUTE_MS
from jobd.monitoring.problems.queue_kind_counts import MINUTES

RISES: Final = 7  # of the last MINUTES
SETTLED: Final = 3  # minutes without a rise end a trend


class Trends:
    """The counts of the last minutes by problem id: `begin` a minute, `note` its counts, `end` it. Others are 0.

    A minute is one dict of numbers, so that thousands of ids make no work for the garbage collector.
    """

    def __init__(self) -> None:
        self._minutes: deque[dict[str, int]] = deque(maxlen=MINUTES + 1)
        self._next: dict[str, int] | None = None
        self._began: BootMs | None = None

    def begin(self, boot_ms: BootMs) -> None:
        """Begin a minute, unless the last one has not ended."""
        self._next = {} if self._began is None or boot_ms - self._began >= MINUTE_MS else None

    def note(self, id_: str, count: int) -> None:
        if self._next is not None:
            self._next[id_] = count

    def end(self, boot_ms: BootMs) -> None:
        if self._next is not None:
            self._minutes.append(self._next)
            self._next, self._began = None, boot_ms

    def rise(self, id_: str, *, is_open: bool) -> tuple[int, int] | None:
        """Return the first and the last count if they rose in most minutes, or, of an open problem, lately."""
        counts = [minute.get(id_, 0) for minute in self._minutes]
        rises = [later > earlier for earlier, later in pairwise(counts)]
        if sum(rises) >= RISES or (is_open and any(rises[-SETTLED:])):
            return counts[0], counts[-1]
        return None
