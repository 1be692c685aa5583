"""The errors of the clients: one exception for each error code, and two for calls without a valid response."""

from __future__ import annotations

from typing import Any, Final

from jobd.model.errors import ERROR_STATUS

__all__ = [
    "ERRORS",
    "AlreadyLocked",
    "ArtifactsUnavailable",
    "BadResponse",
    "EventsGone",
    "ExpectationFailed",
    "Forbidden",
    "IdempotencyKeyReused",
    "InternalError",
    "InvalidRequest",
    "InvalidTransition",
    "JobExists",
    "JobNotFound",
    "JobQuarantined",
    "JobdError",
    "LateResultNotFound",
    "LockLost",
    "MethodNotAllowed",
    "NoStandby",
    "NotDue",
    "NotFound",
    "NotLeader",
    "OutcomeUnknown",
    "OutputOff",
    "OutputUnavailable",
    "Overloaded",
    "PlanNotFound",
    "ProgressTimeout",
    "QueuePaused",
    "QuietRuleNotFound",
    "RequestTimeout",
    "ScheduleBusy",
    "ScheduleNotFound",
    "ScheduleOwned",
    "ShuttingDown",
    "StorageFull",
    "TooFrequent",
    "TooLarge",
    "TooManyJobs",
    "TooManyQueues",
    "TooManyQuietRules",
    "TooManySchedules",
    "Unauthorized",
    "Unreachable",
    "UnsupportedMediaType",
    "UpgradeIncomplete",
    "WorkerGone",
    "WorkerNotFound",
    "WorkerNotSilent",
]

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

    def __init_subclass__(cls, code: str | None = None) -> None:
        cls.code = code or cls.code
        cls.status = ERROR_STATUS.get(cls.code, cls.status)
        ERRORS[cls.code] = cls

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class InvalidRequest(JobdError, code="invalid_request"):
    """A field is unknown, has the wrong type or is out of bounds; the message names it."""


class Unauthorized(JobdError, code="unauthorized"):
    """The token is missing or invalid."""


class Forbidden(JobdError, code="forbidden"):
    """The daemon does not serve the Host or Origin of the request, or the token is read-only."""


class NotFound(JobdError, code="not_found"):
    """The artifact or the path does not exist. If the path does not, the daemon is too old or the port is wrong."""


class JobNotFound(JobdError, code="job_not_found"):
    """No job has this id."""


class LateResultNotFound(JobdError, code="late_result_not_found"):
    """The job has no late result, or none with this number."""


class WorkerNotFound(JobdError, code="worker_not_found"):
    """The daemon has no worker with this name."""


class QuietRuleNotFound(JobdError, code="quiet_rule_not_found"):
    """No quiet rule has this id: it has ended, or never existed."""


class PlanNotFound(JobdError, code="plan_not_found"):
    """The plan does not exist or has expired: build it again."""


class MethodNotAllowed(JobdError, code="method_not_allowed"):
    """The path exists, but not with this method."""


class RequestTimeout(JobdError, code="request_timeout"):
    """The body did not arrive in time; nothing was changed."""


class JobExists(JobdError, code="job_exists"):
    """A different request created the job with this id. `details["differs_in"]` names the fields."""


class AlreadyLocked(JobdError, code="already_locked"):
    """Another worker holds the job."""

    @property
    def locked_by(self) -> str | None:
        """The name of the worker that holds the job."""
        return _text(self.details.get("locked_by"))

    @property
    def lock_expires_at(self) -> int | None:
        """When that lock expires unless it is extended (Unix ms)."""
        return _number(self.details.get("lock_expires_at"))


class NotDue(JobdError, code="not_due"):
    """The job's `run_at` is in the future."""


class OutputOff(JobdError, code="output_off"):
    """The daemon keeps no output of jobs. Send none."""


class OutputUnavailable(JobdError, code="output_unavailable"):
    """The output file cannot be used now. Jobs continue without it."""


class TooFrequent(JobdError, code="too_frequent"):
    """The grant has sent output less than a second ago. Nothing was stored."""


class QueuePaused(JobdError, code="queue_paused"):
    """The job's queue is paused: none of its jobs is granted until an operator resumes it."""


class InvalidTransition(JobdError, code="invalid_transition"):
    """The job's status does not allow this."""


class LockLost(JobdError, code="lock_lost"):
    """The job is no longer yours: stop working on it. `reason` says why."""

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


class ProgressTimeout(JobdError, code="progress_timeout"):
    """No progress was reported within `progress_timeout_ms`: the lock cannot be extended any further."""


class JobQuarantined(JobdError, code="job_quarantined"):
    """The job's row on disk is damaged. `jobd doctor` prints how to fix it."""


class WorkerNotSilent(JobdError, code="worker_not_silent"):
    """The worker holds no job whose lock has expired; nothing was changed."""


class WorkerGone(JobdError, code="worker_gone"):
    """The worker died or is gone, so it cannot receive a directive; nothing was changed."""


class ScheduleNotFound(JobdError, code="schedule_not_found"):
    """No schedule has this id."""


class ScheduleOwned(JobdError, code="schedule_owned"):
    """Another program or file maintains the schedule: `details["source"]`, None for an operator."""


class ScheduleBusy(JobdError, code="schedule_busy"):
    """The last job of the schedule is unfinished, and its `overlap` is skip."""


class NoStandby(JobdError, code="no_standby"):
    """No standby of the cluster is ready to take over; nothing was changed."""


class EventsGone(JobdError, code="events_gone"):
    """The requested events are no longer in the event log. Read the current state, then follow events from now on."""


class TooLarge(JobdError, code="too_large"):
    """The body, the payload or the number of jobs is above its limit."""


class UnsupportedMediaType(JobdError, code="unsupported_media_type"):
    """The body is not JSON, or is compressed."""


class ExpectationFailed(JobdError, code="expectation_failed"):
    """The `Expect` header of the request is not `100-continue`."""


class IdempotencyKeyReused(JobdError, code="idempotency_key_reused"):
    """The key was used before with another body."""


class InternalError(JobdError, code="internal_error"):
    """A bug in the daemon; its log has the details. Nothing was changed."""


class Overloaded(JobdError, code="overloaded"):
    """The daemon has too many requests; nothing was changed. Retry after `retry_after_ms`."""


class ShuttingDown(JobdError, code="shutting_down"):
    """The daemon is stopping; nothing was changed."""


class NotLeader(JobdError, code="not_leader"):
    """The node does not lead its cluster; nothing was changed. `details["leader"]` is the leader's URL or None."""


class ArtifactsUnavailable(JobdError, code="artifacts_unavailable"):
    """The artifact store cannot be read now; the daemon's log has the reason."""


class OutcomeUnknown(JobdError, code="outcome_unknown"):
    """The write failed, and it is unknown whether it is on disk. Repeat the request to find out."""


class StorageFull(JobdError, code="storage_full"):
    """The daemon's disk is full; nothing was changed."""


class TooManyJobs(JobdError, code="too_many_jobs"):
    """The daemon has reached its limit of live jobs; nothing was changed."""


class TooManyQueues(JobdError, code="too_many_queues"):
    """The job needs a new queue, but the number of queues has reached `limits.queues`; nothing was changed."""


class TooManyQuietRules(JobdError, code="too_many_quiet_rules"):
    """There are 100 quiet rules: end one first; nothing was changed."""


class TooManySchedules(JobdError, code="too_many_schedules"):
    """The number of schedules has reached `limits.schedules`; nothing was changed."""


class UpgradeIncomplete(JobdError, code="upgrade_incomplete"):
    """A node of the cluster runs an older version, which cannot read what the request needs; nothing was changed."""


class Unreachable(JobdError, code="unreachable"):
    """There was no response: the daemon is not running, or the connection broke. The request may have been applied.

    With several URLs, `details["tried"]` has the outcome of each. `is_slow` is set if the daemon accepted a connection
    but did not respond in time.
    """

    is_slow = False


class BadResponse(JobdError, code="bad_response"):
    """The response is not from jobd, or from another version."""


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
