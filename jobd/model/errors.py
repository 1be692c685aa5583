"""Error codes with their HTTP status and meaning, and the error as a value and as an exception."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from msgspec import Struct

T = TypeVar("T")


class ErrorCode(Struct, frozen=True):
    """The HTTP status and meaning of a code. `description` is an item of a list: no capital letter, no full stop."""

    status: int
    description: str


ERROR_CODES: Final[dict[str, ErrorCode]] = {
    "invalid_request": ErrorCode(
        400, "a field is unknown, has the wrong type or is out of bounds; `details.field` names it"
    ),
    "unauthorized": ErrorCode(401, "the token is missing or wrong"),
    "forbidden": ErrorCode(
        403,
        "the token is read-only; or, over TCP, the `Host` is not a name of this daemon or the `Origin` is another site",
    ),
    "not_found": ErrorCode(
        404, "the path, webhook or delivery does not exist; or the job has no artifact, or the result was deleted"
    ),
    "job_not_found": ErrorCode(404, "no job has this id: it was never created, or was deleted"),
    "late_result_not_found": ErrorCode(404, "the job has no late result, or none with this `seq`"),
    "worker_not_found": ErrorCode(404, "no worker of this name is known"),
    "quiet_rule_not_found": ErrorCode(404, "no quiet rule has this id: it has ended, or never existed"),
    "plan_not_found": ErrorCode(404, "the plan does not exist or is no longer kept; create it again"),
    "schedule_not_found": ErrorCode(404, "no schedule has this id"),
    "method_not_allowed": ErrorCode(405, "the path exists, but not with this method"),
    "request_timeout": ErrorCode(408, "the body did not arrive in time; nothing was done"),
    "job_exists": ErrorCode(
        409, "another request created a job with this id; `details.differs_in` names the fields that certainly differ"
    ),
    "already_locked": ErrorCode(409, "another worker holds the job; `details.retry_after_ms` says for how long"),
    "not_due": ErrorCode(409, "the `run_at` of the job is in the future"),
    "queue_paused": ErrorCode(409, "an operator paused the queue"),
    "invalid_transition": ErrorCode(409, "the status of the job does not allow this; nothing was changed"),
    "lock_lost": ErrorCode(409, "the lock does not belong to the latest grant; stop working on the job"),
    "progress_timeout": ErrorCode(409, "no progress report within `progress_timeout_ms`"),
    "job_quarantined": ErrorCode(409, "the stored row of the job is damaged"),
    "worker_not_silent": ErrorCode(409, "the worker holds no job whose lock has expired; nothing was changed"),
    "worker_gone": ErrorCode(409, "the worker died or is gone, so it cannot receive a directive"),
    "schedule_owned": ErrorCode(409, "another program or file maintains the schedule; `details.source` names it"),
    "schedule_busy": ErrorCode(409, "the last job of the schedule is unfinished, and `overlap` is skip"),
    "no_standby": ErrorCode(409, "no standby of the cluster is ready to take over; nothing was changed"),
    "events_gone": ErrorCode(
        410, "the event log no longer has the events after the given one, or the id is from another store"
    ),
    "too_large": ErrorCode(413, "the body, payload, metadata or number of jobs exceeds its limit"),
    "unsupported_media_type": ErrorCode(415, "the body has another type, or is compressed"),
    "expectation_failed": ErrorCode(417, "the `Expect` header has a value other than `100-continue`"),
    "output_off": ErrorCode(409, "`limits.output_bytes` is 0, so no output is kept"),
    "idempotency_key_reused": ErrorCode(422, "the key was used with another body"),
    "too_frequent": ErrorCode(429, "the grant sent output less than a second ago; nothing was stored"),
    "internal_error": ErrorCode(500, "a bug in jobd; nothing was changed"),
    "overloaded": ErrorCode(503, "too many requests are waiting; nothing was done; wait `Retry-After` seconds"),
    "shutting_down": ErrorCode(503, "the daemon is stopping; nothing was done"),
    "not_leader": ErrorCode(
        503, "another node leads the cluster; nothing was done; `details.leader` is its URL or null"
    ),
    "upgrade_incomplete": ErrorCode(
        503, "a node of the cluster runs an older version, which cannot read what the request needs; nothing was done"
    ),
    "artifacts_unavailable": ErrorCode(503, "the artifact store cannot be read now"),
    "output_unavailable": ErrorCode(503, "the output file cannot be used now; jobs continue without it"),
    "outcome_unknown": ErrorCode(
        503,
        "the write failed, and its outcome is unknown; send the request again with the same id or key",
    ),
    "storage_full": ErrorCode(507, "the disk is full; nothing was done"),
    "too_many_jobs": ErrorCode(507, "the number of live jobs has reached `limits.live_jobs`"),
    "too_many_schedules": ErrorCode(507, "the number of schedules has reached `limits.schedules`"),
    "too_many_queues": ErrorCode(507, "`limits.queues` queues have jobs; jobs for those queues are still accepted"),
    "too_many_quiet_rules": ErrorCode(507, "there are 100 quiet rules; end one first"),
}
ERROR_STATUS: Final = {code: each.status for code, each in ERROR_CODES.items()}


class ApiError(Struct, frozen=True):
    """An error response: `code` is a key of ERROR_CODES, `message` a sentence that says what to do."""

    code: str
    message: str
    details: dict[str, Any] = {}

    @property
    def status(self) -> int:
        return ERROR_STATUS[self.code]


SHUTTING_DOWN: Final = ApiError("shutting_down", "The daemon is stopping; try again in a moment.")


class ApiException(Exception):
    """Ends the handling of a request with `error`."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.code)
        self.error = error


def checked(result: T | ApiError) -> T:
    """Return `result`, or raise it if it is an error."""
    if isinstance(result, ApiError):
        raise ApiException(result)
    return result


def api_error(code: str, message: str, **details: Any) -> ApiException:
    """Return an exception to raise. `details` are those of the response."""
    return ApiException(ApiError(code, message, details))


def invalid_request_error(field: str, message: str) -> ApiException:
    """Return a 400 invalid_request that names the field by its path."""
    return api_error("invalid_request", f"`{field}`: {message}", field=field)


def too_large_error(message: str, **details: Any) -> ApiException:
    """Return a 413 too_large. `message` says what is too large and what the limit is."""
    return api_error("too_large", message, **details)


def not_leader_error(leader: str | None) -> ApiError:
    """Return a 503 not_leader. `leader` is the URL of the leader, None if this node knows of none."""
    where = "It knows of no leader at the moment; try again." if leader is None else f"The leader is {leader}."
    return ApiError("not_leader", f"This node does not lead its cluster. {where}", {"leader": leader})
