"""The wait for the end of a job, without IO: when to look again, and when to give up."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from jobd.client.protocol import JobInfo
from jobd.client.retries import RetryOptions
from jobd.model.job import FINISHED

_FIRST_S: Final = 0.1
_LONGEST_S: Final = 2.0


class JobWait:
    """One wait. `now_s` is monotonic time."""

    def __init__(self, timeout_s: float | None, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline_s = None if timeout_s is None else now_s + timeout_s
        self._pause_s = _FIRST_S

    def retry(self, retry: RetryOptions, now_s: float) -> RetryOptions:
        """Return `retry` without retries after the deadline."""
        if self._deadline_s is None:
            return retry
        left_s = max(self._deadline_s - now_s, 0.0)
        return replace(retry, total_s=left_s if retry.total_s is None else min(retry.total_s, left_s))

    def pause_s(self, job: JobInfo, now_s: float) -> float | None:
        """Return the pause before the next look at `job`, None if it is finished. Raises TimeoutError."""
        if job.status in FINISHED:
            return None
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 1.5, _LONGEST_S)
        if self._deadline_s is None:
            return pause_s
        if now_s >= self._deadline_s:
            raise TimeoutError(f"Job {job.id} is not finished after {self._timeout_s} s: it is {job.status}.")
        return min(pause_s, self._deadline_s - now_s)
