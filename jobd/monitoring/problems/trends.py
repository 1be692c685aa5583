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
    """The counts of the last minutes by problem id; others are 0. The counts of a minute are noted once it is over.

    A minute is one dict of numbers, so that thousands of ids make no work for the garbage collector.
    """

    def __init__(self) -> None:
        self._minutes: deque[dict[str, int]] = deque(maxlen=MINUTES + 1)
        self._noted: BootMs | None = None

    def is_over(self, boot_ms: BootMs) -> bool:
        return self._noted is None or boot_ms - self._noted >= MINUTE_MS

    def note(self, counts: dict[str, int], boot_ms: BootMs) -> None:
        self._minutes.append(counts)
        self._noted = boot_ms

    def rise(self, id_: str, *, is_open: bool) -> tuple[int, int] | None:
        """Return the first and the last count if they rose in most minutes, or, of an open problem, lately."""
        counts = [minute.get(id_, 0) for minute in self._minutes]
        rises = [later > earlier for earlier, later in pairwise(counts)]
        if sum(rises) >= RISES or (is_open and any(rises[-SETTLED:])):
            return counts[0], counts[-1]
        return None
