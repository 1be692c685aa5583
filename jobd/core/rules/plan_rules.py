"""The rules for plans: which jobs an action changes, and applying it to those that have not changed since.

Each job is decided by the rule of the action. A job that has changed, or that the rule rejects, does not affect others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from jobd.core import guards
from jobd.core.transaction import Transaction
from jobd.model.commands import (
    MAINTENANCE_ACTIONS,
    PLAN_COMMANDS,
    AnyCommand,
    ApplyPlan,
    ExpectedVersion,
    JobCommand,
    PlanAction,
    PlanFilter,
)
from jobd.model.errors import ApiException, api_error
from jobd.model.job import Job, requeues_on_stall
from jobd.model.responses import PlanSlice, Response, UnchangedJob

Rules = Mapping[PlanAction, Callable[[Transaction, Any], Response]]


def apply(tx: Transaction, command: ApplyPlan, rules: Rules) -> Response:
    done = PlanSlice(0, [], [])
    for expected in command.jobs:
        _one(tx, command, rules, expected, done)
    return Response(done)


def check_version(tx: Transaction, command: AnyCommand, expected: str) -> None:
    """Reject `command` if its job is no longer in the version that the caller expects."""
    assert isinstance(command, JobCommand)
    job = guards.find(tx, command.id)
    if version(job, tx.state.late_results.get(job.seq)) != expected:
        message = f"The job has changed since you read it: it is {job.status} now. Nothing was done."
        raise api_error("invalid_transition", message, job_id=job.id, status=job.status)


def _one(tx: Transaction, command: ApplyPlan, rules: Rules, expected: ExpectedVersion, done: PlanSlice) -> None:
    try:
        job = guards.find(tx, expected.id)
    except ApiException as missing:
        done.changed_meanwhile.append(UnchangedJob(expected.id, "", None, missing.error.message))
        return
    if version(job, tx.state.late_results.get(job.seq), command.action) != expected.version:
        what = "It has changed since the plan was made."
        done.changed_meanwhile.append(UnchangedJob(job.id, "", job.status, what))
        return
    before = len(tx.changes)
    try:
        rules[command.action](tx, _command_for(command, expected))
        done.applied += 1
        plan = {"plan": command.plan, "planned": command.planned} if command.plan else {}
        tx.changes[before:] = [replace(each, details={**(each.details or {}), **plan}) for each in tx.changes[before:]]
    except ApiException as rejected:
        done.rejected.append(UnchangedJob(job.id, "", job.status, rejected.error.message))


def _command_for(command: ApplyPlan, job: ExpectedVersion) -> JobCommand:
    if command.action in MAINTENANCE_ACTIONS:
        return JobCommand(id=job.id)  # recovery has its own reason; the audit log has that of the operator
    due = {} if job.run_at is None else {"run_at": job.run_at}
    return PLAN_COMMANDS[command.action](id=job.id, reason=command.reason, **due)


_MAINTENANCE_SCOPES: Final[dict[PlanAction, str]] = {
    "recover-stuck": "Only stalled jobs; expired locks of other jobs do not change.",
    "cleanup": "Only stalled jobs, queued jobs past their expires_at, and finished jobs past their retention; "
    "validation fixes are not part of a plan.",
}


def scope(action: PlanAction) -> str:
    """Return a sentence that says which jobs a plan of `action` contains."""
    return _MAINTENANCE_SCOPES[action] if action in MAINTENANCE_ACTIONS else PLAN_COMMANDS[action].plan_scope


def may_wait(action: PlanAction) -> bool:
    """Return whether the jobs are queued afterwards, so that they can have a trial, a rate and an outcome."""
    return action not in MAINTENANCE_ACTIONS and PLAN_COMMANDS[action].leads_to == "queued"


def status_after(action: PlanAction, job: Job) -> str | None:
    """Return the status of the job after `action`; None if it is deleted."""
    if action not in MAINTENANCE_ACTIONS:
        status = PLAN_COMMANDS[action].leads_to
        return None if status == "deleted" else status
    if job.status == "processing":
        return "queued" if requeues_on_stall(job) else "failed"
    return "failed" if job.status == "queued" else None


def is_ending(action: PlanAction) -> bool:
    """Return whether the action ends or deletes jobs, so that it is allowed on a full disk."""
    return action in MAINTENANCE_ACTIONS or PLAN_COMMANDS[action].admission == "ending"


def skip_reason(action: PlanAction, job: Job) -> str | None:
    """Return why `action` skips this job; None if it does not."""
    command = PLAN_COMMANDS[action]
    return None if job.status in command.allowed_from else command.plan_scope


def statuses(action: PlanAction, wanted: PlanFilter) -> list[str]:
    """Return the statuses in which `action` searches the jobs of a filter, in this order.

    With an error in the filter it searches failed jobs, like the job list, unless the filter has a status.
    """
    status = wanted.status
    if wanted.error is not None:
        status = status or "failed"
    return [each for each in PLAN_COMMANDS[action].allowed_from if status in (None, each)]


def version(job: Job, late: int | None = None, action: PlanAction | None = None) -> str:
    """Return the version of the job: it changes with everything but progress reports and extensions.

    For MAINTENANCE_ACTIONS it changes with those too, because they decide whether the job is stalled and what happens
    to it. `updated_at` of a job without a grant is included, to detect changes that were undone. `late` is the latest
    late result (State.late_results), which is deleted with the job.
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
        seen += (job.progress, job.deadlines)
    return blake2b(msgspec.msgpack.encode(seen), digest_size=8).hexdigest()
