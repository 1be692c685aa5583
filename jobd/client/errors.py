"""The errors of the clients: one exception for each error code, and two for calls without a valid response."""

from __future__ import annotations

from typing import Any, Final

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

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class InvalidRequest(JobdError):
    """A field is unknown, has the wrong type or is out of bounds; the message names it."""

    code, status = "invalid_request", 400


class Unauthorized(JobdError):
    """The token is missing or invalid."""

    code, status = "unauthorized", 401


class Forbidden(JobdError):
    """The daemon does not serve the Host or Origin of the request, or the token is read-only."""

    code, status = "forbidden", 403


class NotFound(JobdError):
    """The artifact or the path does not exist. If the path does not, the daemon is too old or the port is wrong."""

    code, status = "not_found", 404


class JobNotFound(JobdError):
    """No job has this id."""

    code, status = "job_not_found", 404


class LateResultNotFound(JobdError):
    """The job has no late result, or none with this number."""

    code, status = "late_result_not_found", 404


class WorkerNotFound(JobdError):
    """The daemon has no worker with this name."""

    code, status = "worker_not_found", 404


class PlanNotFound(JobdError):
    """The plan does not exist or has expired: build it again."""

    code, status = "plan_not_found", 404


class MethodNotAllowed(JobdError):
    """The path exists, but not with this method."""

    code, status = "method_not_allowed", 405


class RequestTimeout(JobdError):
    """The body did not arrive in time; nothing was changed."""

    code, status = "request_timeout", 408


class JobExists(JobdError):
    """A different job with this id exists."""

    code, status = "job_exists", 409


class AlreadyLocked(JobdError):
    """Another worker holds the job."""

    code, status = "already_locked", 409

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

    code, status = "not_due", 409


class QueuePaused(JobdError):
    """The job's queue is paused: none of its jobs is granted until an operator resumes it."""

    code, status = "queue_paused", 409


class InvalidTransition(JobdError):
    """The job's status does not allow this."""

    code, status = "invalid_transition", 409


class LockLost(JobdError):
    """The job is no longer yours: stop working on it. `reason` says why."""

    code, status = "lock_lost", 409

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

    code, status = "max_processing_time_exceeded", 409


class JobQuarantined(JobdError):
    """The job's row on disk is damaged. `jobd doctor` prints how to fix it."""

    code, status = "job_quarantined", 409


class WorkerNotSilent(JobdError):
    """The worker holds no job whose lock has expired; nothing was changed."""

    code, status = "worker_not_silent", 409


class NoStandby(JobdError):
    """No standby of the cluster is ready to take over; nothing was changed."""

    code, status = "no_standby", 409


class EventsGone(JobdError):
    """The requested events are no longer in the journal. Read the current state, then follow events from now on."""

    code, status = "events_gone", 410


class TooLarge(JobdError):
    """The body, the payload or the number of jobs is above its limit."""

    code, status = "too_large", 413


class UnsupportedMediaType(JobdError):
    """The body is not JSON, or is compressed."""

    code, status = "unsupported_media_type", 415


class ExpectationFailed(JobdError):
    """The `Expect` header of the request is not `100-continue`."""

    code, status = "expectation_failed", 417


class IdempotencyKeyReused(JobdError):
    """The key was used before with another body."""

    code, status = "idempotency_key_reused", 422


class InternalError(JobdError):
    """A bug in the daemon; its log has the details. Nothing was changed."""

    code, status = "internal_error", 500


class Overloaded(JobdError):
    """The daemon has too many requests; nothing was changed. Retry after `retry_after_ms`."""

    code, status = "overloaded", 503


class ShuttingDown(JobdError):
    """The daemon is stopping; nothing was changed."""

    code, status = "shutting_down", 503


class NotLeader(JobdError):
    """The node does not lead its cluster; nothing was changed. `details["leader"]` is the leader's URL or None."""

    code, status = "not_leader", 503


class StorageUnavailable(JobdError):
    """The artifact store cannot be read now; the daemon's log has the reason."""

    code, status = "storage_unavailable", 503


class OutcomeUnknown(JobdError):
    """The write failed, and it is unknown whether it is on disk. Repeat the request to find out."""

    code, status = "outcome_unknown", 503


class StorageFull(JobdError):
    """The daemon's disk is full; nothing was changed."""

    code, status = "storage_full", 507


class TooManyJobs(JobdError):
    """The daemon has reached its limit of live jobs; nothing was changed."""

    code, status = "too_many_jobs", 507


class TooManyQueues(JobdError):
    """The job needs a new queue, but the number of queues has reached `limits.queues`; nothing was changed."""

    code, status = "too_many_queues", 507


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
