"""The errors of the clients: one exception for each error code, and two for calls without a valid response."""

from __future__ import annotations

from typing import Any, Final

from jobd.model.errors import ERROR_STATUS

ERRORS: Final[dict[str, type[JobdError]]] = {}


class JobdError(Exception):
    """A call that did not succeed.

    `code`, `message` and `details` (times in Unix ms, durations in ms) are those of the daemon's response. `status` is
    the HTTP status, 0 without a response.
    """

    code: str = "error"
    status: int = 0

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        details: dict[str, Any] | None = None,
        status: int | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details or {}
        self.retry_after_ms = retry_after_ms
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status

    def __init_subclass__(cls) -> None:
        ERRORS[cls.code] = cls
        cls.status = ERROR_STATUS.get(cls.code, cls.status)

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class InvalidRequest(JobdError):
    """A field is unknown, has the wrong type or is out of bounds; the message names it."""

    code = "invalid_request"


class Unauthorized(JobdError):
    """The token is missing or invalid."""

    code = "unauthorized"


class Forbidden(JobdError):
    """The daemon does not serve the Host or Origin of the request, or the token is read-only."""

    code = "forbidden"


class NotFound(JobdError):
    """The artifact or the path does not exist. If the path does not, the daemon is too old or the port is wrong."""

    code = "not_found"


class JobNotFound(JobdError):
    """No job has this id."""

    code = "job_not_found"


class LateResultNotFound(JobdError):
    """The job has no late result, or none with this number."""

    code = "late_result_not_found"


class WorkerNotFound(JobdError):
    """The daemon has no worker with this name."""

    code = "worker_not_found"


class PlanNotFound(JobdError):
    """The plan does not exist or has expired: build it again."""

    code = "plan_not_found"


class MethodNotAllowed(JobdError):
    """The path exists, but not with this method."""

    code = "method_not_allowed"


class RequestTimeout(JobdError):
    """The body did not arrive in time; nothing was changed."""

    code = "request_timeout"


class JobExists(JobdError):
    """A different job with this id exists."""

    code = "job_exists"


class AlreadyLocked(JobdError):
    """Another worker holds the job."""

    code = "already_locked"

    @property
    def locked_by(self) -> str | None:
        """The name of the worker that holds the job."""
        return _text(self.details.get("locked_by"))

    @property
    def lock_expires_at(self) -> int | None:
        """When that lock expires unless it is extended (Unix ms)."""
        return _number(self.details.get("lock_expires_at"))


class NotDue(JobdError):
    """The job's `run_at` is in the future."""

    code = "not_due"


class QueuePaused(JobdError):
    """The job's queue is paused: none of its jobs is granted until an operator resumes it."""

    code = "queue_paused"


class InvalidTransition(JobdError):
    """The job's status does not allow this."""

    code = "invalid_transition"


class LockLost(JobdError):
    """The job is no longer yours: stop working on it. `reason` says why."""

    code = "lock_lost"

    @property
    def reason(self) -> str | None:
        """What ended the grant: `cancelled`, `stalled`, ..."""
        return _text(self.details.get("reason"))

    @property
    def late_result(self) -> int | None:
        """The number of the late result, if the daemon kept the result of this `complete`."""
        return _number(self.details.get("late_result"))

    @property
    def cancel_requested(self) -> bool:
        """Whether the job was cancelled."""
        return self.details.get("cancel_requested") is True


class MaxProcessingTimeExceeded(JobdError):
    """No progress was reported within `max_processing_ms`: the lock cannot be extended any further."""

    code = "max_processing_time_exceeded"


class JobQuarantined(JobdError):
    """The job's row on disk is damaged. `jobd doctor` prints how to fix it."""

    code = "job_quarantined"


class WorkerNotSilent(JobdError):
    """The worker holds no job whose lock has expired; nothing was changed."""

    code = "worker_not_silent"


class NoStandby(JobdError):
    """No standby of the cluster is ready to take over; nothing was changed."""

    code = "no_standby"


class EventsGone(JobdError):
    """The requested events are no longer in the journal. Read the current state, then follow events from now on."""

    code = "events_gone"


class TooLarge(JobdError):
    """The body, the payload or the number of jobs is above its limit."""

    code = "too_large"


class UnsupportedMediaType(JobdError):
    """The body is not JSON, or is compressed."""

    code = "unsupported_media_type"


class ExpectationFailed(JobdError):
    """The `Expect` header of the request is not `100-continue`."""

    code = "expectation_failed"


class IdempotencyKeyReused(JobdError):
    """The key was used before with another body."""

    code = "idempotency_key_reused"


class InternalError(JobdError):
    """A bug in the daemon; its log has the details. Nothing was changed."""

    code = "internal_error"


class Overloaded(JobdError):
    """The daemon has too many requests; nothing was changed. Retry after `retry_after_ms`."""

    code = "overloaded"


class ShuttingDown(JobdError):
    """The daemon is stopping; nothing was changed."""

    code = "shutting_down"


class NotLeader(JobdError):
    """The node does not lead its cluster; nothing was changed. `details["leader"]` is the leader's URL or None."""

    code = "not_leader"


class StorageUnavailable(JobdError):
    """The artifact store cannot be read now; the daemon's log has the reason."""

    code = "storage_unavailable"


class OutcomeUnknown(JobdError):
    """The write failed, and it is unknown whether it is on disk. Repeat the request to find out."""

    code = "outcome_unknown"


class StorageFull(JobdError):
    """The daemon's disk is full; nothing was changed."""

    code = "storage_full"


class TooManyJobs(JobdError):
    """The daemon has reached its limit of live jobs; nothing was changed."""

    code = "too_many_jobs"


class TooManyQueues(JobdError):
    """The job needs a new queue, but the number of queues has reached `limits.queues`; nothing was changed."""

    code = "too_many_queues"


class Unreachable(JobdError):
    """There was no response: the daemon is not running, or the connection broke. The request may have been applied.

    With several URLs, `details["tried"]` has the outcome of each. `is_slow` is set if the daemon accepted a connection
    but did not respond in time.
    """

    code = "unreachable"
    is_slow = False


class BadResponse(JobdError):
    """The response is not from jobd, or from another version."""

    code = "bad_response"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
