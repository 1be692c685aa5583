"""Which of many lines that say the same are written: the first few of each second.

Writes none itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

MOST_A_SECOND: Final = 20  # of each kind: enough to see what happens, whatever a client does


class Sparing:
    """Counts lines by their kind. `now` gives a time in seconds that does not run backwards."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._second = 0
        self._seen: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def left_out(self, kind: str) -> int | None:
        """None where this line is to be left out; else how many were, since the last one of its kind was written."""
        second = int(self._now())
        if second != self._second:
            self._second = second
            self._seen.clear()
        self._seen[kind] += 1
        if self._seen[kind] <= MOST_A_SECOND:
            return self._left_out.pop(kind, 0)
        self._left_out[kind] += 1
        return None
