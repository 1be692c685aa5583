"""Choose where batches are committed: inline in the event loop, or in the storage thread.

Two switches of threads and the GIL cost more than the fsync of a fast disk. But the event loop must not wait for a slow
one.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, Literal

CommitSetting = Literal["auto", "inline", "thread"]

RECENT: Final = 8  # commits that are considered
WORST_S: Final = 0.002  # all of them were faster than this,
MEDIAN_S: Final = 0.001  # and the median of them than this
FAST_IN_A_ROW: Final = 200  # so many fast commits until commits are inline again,
PAUSE_S: Final = 10.0  # and at least so long after the last change


class CommitMode:
    """`is_inline`: where to commit next. With the setting "auto" the durations of commits decide, else it is fixed.

    A slow commit ends the inline mode at once, because each one blocks the event loop. The way back takes longer, so
    that the mode is not inline again before PAUSE_S have passed.
    """

    def __init__(self, setting: CommitSetting) -> None:
        self.is_inline = setting != "thread"
        self._is_fixed = setting != "auto"
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._fast_in_a_row = 0
        self._changed_at_s = -math.inf

    def add(self, took_s: float, now_s: float) -> None:
        """Note that a COMMIT took `took_s` and ended at `now_s`, a time in seconds that never goes back."""
        if self._is_fixed:
            return
        self._recent.append(took_s)
        is_fast = self._is_fast()
        self._fast_in_a_row = self._fast_in_a_row + 1 if is_fast else 0
        if self.is_inline:
            is_due = not is_fast
        else:
            is_due = self._fast_in_a_row >= FAST_IN_A_ROW and now_s - self._changed_at_s >= PAUSE_S
        if is_due:
            self.is_inline = not self.is_inline
            self._changed_at_s = now_s

    def _is_fast(self) -> bool:
        by_duration = sorted(self._recent)
        median_s = by_duration[RECENT // 2] if len(by_duration) == RECENT else 0.0
        return by_duration[-1] < WORST_S and median_s < MEDIAN_S
