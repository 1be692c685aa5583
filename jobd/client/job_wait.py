"""The wait for the end of a job, without IO: how long a request may wait, and when to stop."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from jobd.client.api_request import ApiRequest, request_for
from jobd.client.errors import Unreachable
from jobd.client.retries import RetryOptions
from jobd.model.calls import JobCalls
from jobd.model.job import FINISHED
from jobd.model.responses import JobView
from jobd.model.times import duration

_LONGEST_MS: Final = 30_000  # of one request
_POLL_MS: Final = 1_000  # of one request, if the caller wants to see the progress
_RESPONSE_S: Final = 1.0  # for the response to a poll that begins at the deadline
_EARLY_S: Final = 0.01  # a timer may end this much too early


class JobWait:
    """One wait. `now_s` is monotonic time. With `polls`, the job is seen about once a second."""

    def __init__(self, timeout_s: float | None, now_s: float, *, polls: bool = False) -> None:
        self._timeout_s = timeout_s
        self._limit = duration((timeout_s or 0) * 1000)
        self._deadline_s = math.inf if timeout_s is None else now_s + timeout_s
        self._wait_ms = _POLL_MS if polls else _LONGEST_MS

    def request(self, job_id: str, now_s: float) -> ApiRequest[JobView]:
        """Return the next request."""
        left_ms = max(self._deadline_s - now_s, 0.0) * 1000
        return request_for(JobCalls.get_job, job_id, wait_ms=int(min(self._wait_ms, left_ms)))

    def retry(self, retry: RetryOptions, now_s: float) -> RetryOptions:
        """Return `retry` without retries, and without waiting for a response, after the deadline."""
        if self._timeout_s is None:
            return retry
        left_s = max(self._deadline_s - now_s, 0.0)
        return replace(
            retry,
            total_s=left_s if retry.total_s is None else min(retry.total_s, left_s),
            timeout_s=min(retry.timeout_s, max(left_s, _RESPONSE_S)),
        )

    def check_deadline(self, job_id: str, error: Unreachable, now_s: float) -> None:
        """Raise TimeoutError if `error` ends a poll after the deadline."""
        if now_s >= self._deadline_s - _EARLY_S:
            text = f"It is unknown whether job {job_id} is finished after {self._limit}: {error.message}"
            raise TimeoutError(text) from error

    def is_over(self, job: JobView, now_s: float) -> bool:
        """Return whether `job` is finished. Raises TimeoutError."""
        if job.status in FINISHED:
            return True
        if now_s >= self._deadline_s - _EARLY_S:
            raise TimeoutError(f"Job {job.id} is not finished after {self._limit}: it is {job.status}.")
        return False
