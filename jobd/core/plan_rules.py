"""The rules for plans: which jobs an action changes, and applying it to those that have not changed since.

Each job is decided by the rule of the action. A job that has changed, or that the rule rejects, does not affect others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final, assert_never

import msgspec

from jobd.core import transitions
from jobd.core.changeset import Draft
from jobd.model.commands import (
    MAINTENANCE_ACTIONS,
    AnyCommand,
    ApplyPlan,
    Cancel,
    Delete,
    ExpectedVersion,
    ForceFail,
    ForceReset,
    JobCommand,
    PlanAction,
    PlanFilter,
)
from jobd.model.errors import ApiError
from jobd.model.job import Job, requeues_on_stall
from jobd.model.responses import ChangedJob, PlanSlice, Response

Rules = Mapping[PlanAction, Callable[[Draft, Any], Response | ApiError]]


def apply(draft: Draft, command: ApplyPlan, rules: Rules) -> Response:
    done = PlanSlice(0, [], [])
    for expected in command.jobs:
        _one(draft, command, rules, expected, done)
    return Response(done)


def moved(draft: Draft, command: AnyCommand, expected: str) -> ApiError | None:
    """Return an error if the job of `command` is no longer in the version that the caller expects."""
    assert isinstance(command, JobCommand)
    job = transitions.find(draft, command.id)
    if isinstance(job, ApiError):
        return job
    if version(job, draft.book.latest_late(job.seq)) == expected:
        return None
    message = f"The job has changed since you read it: it is {job.status} now. Nothing was done."
    return ApiError("invalid_transition", message, {"job_id": job.id, "status": job.status})


def _one(draft: Draft, command: ApplyPlan, rules: Rules, expected: ExpectedVersion, done: PlanSlice) -> None:
    job = transitions.find(draft, expected.id)
    if isinstance(job, ApiError):
        done.changed.append(ChangedJob(expected.id, "", None, job.message))
    elif version(job, draft.book.latest_late(job.seq), command.action) != expected.version:
        what = "It has changed since the plan was made."
        done.changed.append(ChangedJob(job.id, "", job.status, what))
    else:
        answer = rules[command.action](draft, _asked(command, job.id))
        if isinstance(answer, ApiError):
            done.refused.append(ChangedJob(job.id, "", job.status, answer.message))
        else:
            done.applied += 1


def _asked(command: ApplyPlan, job_id: str) -> JobCommand:
    match command.action:
        case "retry" | "force-reset":
            return ForceReset(id=job_id, reason=command.reason)
        case "cancel":
            return Cancel(id=job_id, reason=command.reason)
        case "force-fail":
            return ForceFail(id=job_id, reason=command.reason)
        case "delete":
            return Delete(id=job_id, reason=command.reason)
        case "recover-stuck" | "cleanup":
            return JobCommand(id=job_id)  # recovery has its own reason; the audit log has that of the operator
        case _:
            assert_never(command.action)


# The status that an action leads to (None: deleted), the statuses it applies to, and a sentence about them.
TO: Final[dict[PlanAction, str | None]] = {
    "retry": "queued",
    "force-reset": "queued",
    "cancel": "cancelled",
    "force-fail": "failed",
    "delete": None,
}

_FROM: Final[dict[PlanAction, tuple[str, ...]]] = {
    "retry": ("failed", "cancelled"),
    "force-reset": ("processing", "failed", "cancelled"),
    "cancel": ("queued", "processing"),
    "force-fail": ("queued", "processing"),
    "delete": ("failed", "cancelled", "completed"),
}

ONLY: Final[dict[PlanAction, str]] = {
    "retry": "Only failed and cancelled jobs can be retried.",
    "force-reset": "Only processing, failed and cancelled jobs can be reset.",
    "cancel": "Only queued and processing jobs can be cancelled.",
    "force-fail": "Only queued and processing jobs can be failed.",
    "delete": "Only finished jobs can be deleted.",
    "recover-stuck": "Only stuck jobs; expired locks of other jobs do not change.",
    "cleanup": "Only stuck jobs, queued jobs past their expires_at, and finished jobs past their retention; validation "
    "fixes are not part of a plan.",
}


def to(action: PlanAction, job: Job) -> str | None:
    """Return the status of the job after `action`; None if it is deleted."""
    if action not in MAINTENANCE_ACTIONS:
        return TO[action]
    if job.status == "processing":
        return "queued" if requeues_on_stall(job) else "failed"
    return "failed" if job.status == "queued" else None


def is_ending(action: PlanAction) -> bool:
    """Return whether the action ends or deletes jobs, so that it is allowed on a full disk."""
    return TO.get(action) != "queued"


def why_not(action: PlanAction, job: Job) -> str | None:
    """Return why `action` skips this job; None if it does not."""
    return None if job.status in _FROM[action] else ONLY[action]


def statuses(action: PlanAction, wanted: PlanFilter) -> list[str]:
    """Return the statuses in which `action` searches the jobs of a filter, in this order.

    With an error in the filter it searches failed jobs, like the job list, unless the filter has a status.
    """
    status = wanted.status
    if wanted.error is not None:
        status = status or "failed"
    return [each for each in _FROM[action] if status in (None, each)]


def version(job: Job, late: int | None = None, action: PlanAction | None = None) -> str:
    """Return the version of the job: it changes with everything but progress reports and extensions.

    For MAINTENANCE_ACTIONS it changes with those too, because they decide whether the job is stuck and what happens to
    it. `updated_at` of a job without a grant is included, to detect changes that were undone. `late` is the latest late
    result (Book.latest_late), which is deleted with the job.
    """
    seen: tuple[object, ...] = (
        job.seq,
        job.status,
        job.options,
        job.run_at,
        job.attempt,
        job.stalls,
        job.started_at,
        job.finished_at,
        job.expires_at,
        job.grant,
        job.ended,
        job.result,
        job.error,
        job.updated_at if job.grant is None else None,
        late,
    )
    if action in MAINTENANCE_ACTIONS:
        seen += (job.progress, job.lease)
    return blake2b(msgspec.msgpack.encode(seen), digest_size=8).hexdigest()
