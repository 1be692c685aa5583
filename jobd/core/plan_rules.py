"""A plan, applied: each job only if it is still what the plan saw, judged at the moment when it is done.

Pure. What is done to a job is the rule of the action; a job that has changed, or that the rule refuses, costs no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, assert_never

from jobd.core import planning, transitions
from jobd.core.changeset import Draft
from jobd.model.commands import (
    AnyCommand,
    ApplyPlan,
    Cancel,
    Delete,
    ExpectedVersion,
    ForceFail,
    ForceReset,
    JobCommand,
    PlanAction,
)
from jobd.model.errors import ApiError
from jobd.model.responses import ChangedJob, PlanSlice, Response

Rules = Mapping[PlanAction, Callable[[Draft, Any], Response | ApiError]]


def apply(draft: Draft, command: ApplyPlan, rules: Rules) -> Response:
    done = PlanSlice(0, [], [])
    for expected in command.jobs:
        _one(draft, command, rules, expected, done)
    return Response(done)


def moved(draft: Draft, command: AnyCommand, expected: str) -> ApiError | None:
    """Why `command` is not done: its job is not the one any more that who asks has seen."""
    assert isinstance(command, JobCommand)
    job = transitions.find(draft, command.id)
    if isinstance(job, ApiError):
        return job
    if planning.version(job, draft.book.latest_late(job.seq)) == expected:
        return None
    message = f"The job has moved since you looked: it is {job.status} now. Nothing was done."
    return ApiError("invalid_transition", message, {"job_id": job.id, "status": job.status})


def _one(draft: Draft, command: ApplyPlan, rules: Rules, expected: ExpectedVersion, done: PlanSlice) -> None:
    job = transitions.find(draft, expected.id)
    if isinstance(job, ApiError):
        done.changed.append(ChangedJob(expected.id, "", None, job.message))
    elif planning.version(job, draft.book.latest_late(job.seq), command.action) != expected.version:
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
            return JobCommand(id=job_id)  # its event says why in the words of time; the audit log has the operator's
        case _:
            assert_never(command.action)
