"""The details that clients and operators need of errors of the core."""

from __future__ import annotations

from typing import Final

from jobd.model.errors import ApiError

# The keys of each code that are never null.
REQUIRED: Final = {
    "already_locked": {"locked_by", "lock_expires_at", "retry_after_ms"},
    "invalid_request": {"field"},
    "invalid_transition": {"status"},
    "job_exists": {"job_id", "status"},
    "job_not_found": {"job_id"},
    "job_quarantined": {"job_id", "reason"},
    "late_result_not_found": {"job_id"},
    "not_due": {"run_at", "retry_after_ms"},
    "progress_timeout": {"progress_timeout_ms", "progress_due_at"},
    "queue_paused": {"queue", "paused", "paused_at"},
    "quiet_rule_not_found": {"rule"},
    "schedule_busy": {"job_id", "status"},
    "schedule_not_found": {"schedule"},
    "too_many_jobs": {"limit"},
    "too_many_queues": {"queue", "limit"},
    "too_many_quiet_rules": {"limit"},
    "too_many_schedules": {"limit"},
    "upgrade_incomplete": {"node"},
    "worker_gone": {"worker", "state"},
    "worker_not_found": {"worker"},
    "worker_not_silent": {"worker", "state"},
}


def check_error(error: ApiError) -> None:
    """Check that an error has a message and the details of its code."""
    assert error.message
    given = {name for name, value in error.details.items() if value is not None}
    assert REQUIRED.get(error.code, set()) <= given, error
