"""Choose where batches are committed: inline in the event loop, or in the storage thread.

Two switches of threads and the GIL cost more than the fsync of a fast disk, and inline commits have the higher
throughput even at 5 ms. But requests that need no commit must not wait long for a slow disk. Fast disks stall now and
then, so a single stall decides nothing unless it is long.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import deque
from typing import Final, Literal

CommitSetting = Literal["auto", "inline", "thread"]

RECENT: Final = 8  # commits that decide whether the disk has become slow
STALL_S: Final = 0.01  # a commit that takes at least this long is a stall
LONG_STALL_S: Final = 0.05  # a single one is enough
MEDIAN_S: Final = 0.003  # of the recent commits
TRIAL: Final = 200  # commits in the thread that decide whether the disk has become fast
TRIAL_STALLS: Final = 4  # stalls allowed among these
PAUSE_S: Final = 10.0  # between the change to the thread and the change back


class _RunQueue(threading.local):
    """The file in which Linux counts for the thread, in ns: run time, wait for a processor, number of runs."""

    def __init__(self) -> None:
        self.file: _Descriptor | None = None
        with contextlib.suppress(OSError):  # a kernel without these counts
            self.file = _Descriptor(os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC))


class _Descriptor:
    """A file descriptor, closed at the end of its thread."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


_run_queue: Final = _RunQueue()


def processor_wait_s() -> float:
    """Return how long the calling thread has waited for a processor since it began; 0 if the kernel does not say."""
    file = _run_queue.file
    return 0.0 if file is None else int(os.pread(file.number, 64, 0).split()[1]) / 1e9


class CommitMode:
    """`is_inline`: where to commit next. With the setting "auto" the durations of commits decide, else it is fixed."""

    def __init__(self, setting: CommitSetting) -> None:
        self.is_inline = setting != "thread"
        self._is_fixed = setting != "auto"
        self._latest: deque[float] = deque(maxlen=RECENT)  # while inline; in the thread TRIAL of them
        self._changed_at_s = -math.inf

    def add(self, took_s: float, now_s: float) -> None:
        """Record that a COMMIT took `took_s` and ended at `now_s`, a time in seconds that never goes back."""
        if self._is_fixed:
            return
        self._latest.append(took_s)
        if self.is_inline and took_s < MEDIAN_S:
            return  # a fast commit is no reason to change
        if self._has_become_slow() if self.is_inline else self._has_become_fast(now_s):
            self.is_inline = not self.is_inline
            self._latest = deque(maxlen=RECENT if self.is_inline else TRIAL)
            self._changed_at_s = now_s

    def _has_become_slow(self) -> bool:
        return self._latest[-1] >= LONG_STALL_S or self._stalls() > 1 or self._has_slow_median()

    def _has_become_fast(self, now_s: float) -> bool:
        if len(self._latest) < TRIAL or now_s - self._changed_at_s < PAUSE_S or self._latest[-1] >= STALL_S:
            return False
        return self._stalls() <= TRIAL_STALLS and not self._has_slow_median()

    def _stalls(self) -> int:
        return sum(took_s >= STALL_S for took_s in self._latest)

    def _has_slow_median(self) -> bool:
        return len(self._latest) == self._latest.maxlen and sorted(self._latest)[len(self._latest) // 2] >= MEDIAN_S
