"""Error codes with their HTTP status, and the error as a value and as an exception."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

ERROR_STATUS: Final[dict[str, int]] = {
    "invalid_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "job_not_found": 404,
    "late_result_not_found": 404,
    "worker_not_found": 404,
    "plan_not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "job_exists": 409,
    "already_locked": 409,
    "not_due": 409,
    "queue_paused": 409,
    "invalid_transition": 409,
    "lock_lost": 409,
    "max_processing_time_exceeded": 409,
    "job_quarantined": 409,
    "worker_not_silent": 409,
    "events_gone": 410,
    "too_large": 413,
    "unsupported_media_type": 415,
    "expectation_failed": 417,
    "idempotency_key_reused": 422,
    "internal_error": 500,
    "overloaded": 503,
    "shutting_down": 503,
    "storage_unavailable": 503,
    "outcome_unknown": 503,
    "storage_full": 507,
    "too_many_jobs": 507,
    "too_many_queues": 507,
}


class ApiError(Struct, frozen=True):
    """A definite no: `code` is a key of REFUSALS, `message` a sentence that says what to do."""

    code: str
    message: str
    details: dict[str, Any] = {}

    @property
    def status(self) -> int:
        return ERROR_STATUS[self.code]


class ApiException(Exception):
    """Stops the walk of a request with a definite no."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.code)
        self.error = error


def api_error(code: str, message: str, **details: Any) -> ApiException:
    """A refusal to raise; `details` are those of the answer."""
    return ApiException(ApiError(code, message, details))


def invalid_request_error(field: str, message: str) -> ApiException:
    """400 invalid_request that names the path of the field."""
    return api_error("invalid_request", f"`{field}`: {message}", field=field)


def too_large_error(message: str, **details: Any) -> ApiException:
    """413, with what is too large and what the limit is."""
    return api_error("too_large", message, **details)
