"""What can go wrong with a call: one exception for each refusal code, and two for a daemon that did not answer.

Only names and fields; when to try again is in protocol.py.
"""

from __future__ import annotations

from typing import Any, Final

ERRORS: Final[dict[str, type[JobdError]]] = {}


class JobdError(Exception):
    """A call that did not succeed.

    `code` is the daemon's refusal code, `message` its sentence, `details` what it adds (a dict, times in Unix ms,
    durations in ms), `status` the HTTP status, 0 where there was no answer.
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
    """A field is unknown, of the wrong type or out of its bounds; the message names it."""

    code, status = "invalid_request", 400


class Unauthorized(JobdError):
    """No token, or one that is not valid."""

    code, status = "unauthorized", 401


class Forbidden(JobdError):
    """The Host or Origin of the request is not one that the daemon serves."""

    code, status = "forbidden", 403


class NotFound(JobdError):
    """There is no such path: the client is newer than the daemon, or speaks to another port. Or no stored result."""

    code, status = "not_found", 404


class JobNotFound(JobdError):
    """No job has this id."""

    code, status = "job_not_found", 404


class LateResultNotFound(JobdError):
    """The job has no late result, or none with this number."""

    code, status = "late_result_not_found", 404


class WorkerNotFound(JobdError):
    """No worker of this name is remembered."""

    code, status = "worker_not_found", 404


class PlanNotFound(JobdError):
    """There is no such plan, or no more: make it anew."""

    code, status = "plan_not_found", 404


class MethodNotAllowed(JobdError):
    """The path exists, the method does not."""

    code, status = "method_not_allowed", 405


class RequestTimeout(JobdError):
    """The body did not arrive in time; nothing was done."""

    code, status = "request_timeout", 408


class JobExists(JobdError):
    """Another request created a job with this id."""

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
        """When its lock expires unless it is extended, Unix ms."""
        return _number(self.details.get("lock_expires_at"))


class NotDue(JobdError):
    """The job's `run_at` has not come yet."""

    code, status = "not_due", 409


class QueuePaused(JobdError):
    """The job's queue is paused: nothing of it is granted until an operator resumes it."""

    code, status = "queue_paused", 409


class InvalidTransition(JobdError):
    """The job's status does not allow this."""

    code, status = "invalid_transition", 409


class LockLost(JobdError):
    """The job is no longer yours: stop working on it. `reason` says what happened."""

    code, status = "lock_lost", 409

    @property
    def reason(self) -> str | None:
        """What ended the grant, in a word: `cancelled`, `stalled`, ..."""
        return _text(self.details.get("reason"))

    @property
    def late_result(self) -> int | None:
        """The number under which what a complete brought is kept for an operator, where it is."""
        return _number(self.details.get("late_result"))

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody cancelled the job."""
        return self.details.get("cancel_requested") is True


class MaxProcessingTimeExceeded(JobdError):
    """No progress was reported within `max_processing_ms`: the lock cannot be extended any further."""

    code, status = "max_processing_time_exceeded", 409


class JobQuarantined(JobdError):
    """The job's row on disk is damaged; `jobd doctor` says what to do."""

    code, status = "job_quarantined", 409


class WorkerNotSilent(JobdError):
    """The worker holds no job whose lock has expired; nothing was changed."""

    code, status = "worker_not_silent", 409


class EventsGone(JobdError):
    """The events asked for are older than the journal: read the state anew, then follow from now on."""

    code, status = "events_gone", 410


class TooLarge(JobdError):
    """The body, the payload or the number of jobs is above its limit."""

    code, status = "too_large", 413


class UnsupportedMediaType(JobdError):
    """The body is not JSON, or compressed."""

    code, status = "unsupported_media_type", 415


class ExpectationFailed(JobdError):
    """The request had an `Expect` header with another value than `100-continue`."""

    code, status = "expectation_failed", 417


class IdempotencyKeyReused(JobdError):
    """The key was used before with another body."""

    code, status = "idempotency_key_reused", 422


class InternalError(JobdError):
    """A fault of the daemon; its log has more. Nothing was changed."""

    code, status = "internal_error", 500


class Overloaded(JobdError):
    """Too much is waiting; nothing was done. `retry_after_ms` says when to try again."""

    code, status = "overloaded", 503


class ShuttingDown(JobdError):
    """The daemon is stopping; nothing was done."""

    code, status = "shutting_down", 503


class StorageUnavailable(JobdError):
    """The store of artifacts cannot be read now; the daemon's log says why."""

    code, status = "storage_unavailable", 503


class OutcomeUnknown(JobdError):
    """The write failed in a way that leaves open whether it is on disk; asking again tells."""

    code, status = "outcome_unknown", 503


class StorageFull(JobdError):
    """The daemon's disk is full; nothing was done."""

    code, status = "storage_full", 507


class TooManyJobs(JobdError):
    """The daemon holds as many live jobs as it may; nothing was done."""

    code, status = "too_many_jobs", 507


class TooManyQueues(JobdError):
    """The job would be the first of a new queue, but `limits.queues` queues have jobs; nothing was done."""

    code, status = "too_many_queues", 507


class Unreachable(JobdError):
    """No answer: the daemon is not there, or the connection broke. What was asked may have been done or not."""

    code = "unreachable"


class BadAnswer(JobdError):
    """What answered does not speak as this client expects: another program, or another version."""

    code = "bad_answer"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
