"""The audit entry of an operator's command."""

from __future__ import annotations

from typing import Any

from jobd.model.commands import (
    AddQuietRule,
    AnyCommand,
    ApplyPlan,
    Copy,
    DirectWorker,
    EndQuietRule,
    Import,
    IssuedCommand,
    JobCommand,
    Operator,
    Pause,
    PutSchedule,
    RecordAction,
    Resume,
    ScheduleCommand,
    TakeBack,
)
from jobd.model.errors import ApiError
from jobd.model.events import Event
from jobd.model.responses import Response
from jobd.model.storage import AuditEntry


def entry(call: IssuedCommand, response: Response | ApiError, changes: list[Event], at: int) -> AuditEntry | None:
    """Return the audit entry of `call` and its changes; None if it needs none. `at` is wall time."""
    if call.operator is None or call.command.dry_run:
        return None
    command = call.command
    if isinstance(command, RecordAction):
        given = {"job_id": command.job_id, "outcome": command.outcome, "details": command.details}
        return _row(call.operator, at, command.what, reason=command.reason, **given)
    what = f"plan-{command.action}" if isinstance(command, ApplyPlan) else command.audit_name
    if what is None or (isinstance(command, Import) and not changes):
        return None  # a read, or a line of an import that was skipped or rejected, which is in the report
    if isinstance(command, ScheduleCommand):
        return _of_schedule(call.operator, at, what, command, response, changes)
    queue = command.name if isinstance(command, Pause | Resume) else None
    if isinstance(command, AddQuietRule | EndQuietRule) and changes:
        queue = changes[0].queue or None
    is_one = isinstance(command, JobCommand)
    changed = {change.job_id: None for change in changes if change.job_seq}
    return _row(
        call.operator,
        at,
        what,
        job_id=_job_of(command),
        queue=changes[0].queue if is_one and changes else queue,
        reason=getattr(command, "reason", None),
        outcome=response.code if isinstance(response, ApiError) else "done",
        jobs=len(changed),
        details=_details(command, response, changes),
        changed_ids=list(changed) if isinstance(command, ApplyPlan | Copy | TakeBack) else [],
    )


def _details(command: AnyCommand, response: Response | ApiError, changes: list[Event]) -> dict[str, Any] | None:
    if isinstance(command, TakeBack | DirectWorker):
        return {"worker": command.name}
    if isinstance(command, AddQuietRule | EndQuietRule):
        return changes[-1].details if changes else None
    is_done = isinstance(command, JobCommand) and isinstance(response, Response)
    return _summary(changes) if is_done else None


def _of_schedule(
    operator: Operator,
    at: int,
    what: str,
    command: ScheduleCommand,
    response: Response | ApiError,
    changes: list[Event],
) -> AuditEntry | None:
    """Return the entry of a change of a schedule. A program that puts it again, unchanged, needs none."""
    if isinstance(command, PutSchedule) and isinstance(response, Response) and not changes:
        return None
    return _row(
        operator,
        at,
        what,
        job_id=changes[0].job_id or None if changes else None,
        queue=changes[0].queue if changes else None,
        reason=getattr(command, "reason", None),
        outcome=response.code if isinstance(response, ApiError) else "done",
        jobs=sum(change.job_seq > 0 for change in changes),
        details={"schedule": command.id},
    )


def _job_of(command: AnyCommand) -> str | None:
    """Return the id of the job that the command is about, or of the only job of a plan."""
    if isinstance(command, ApplyPlan):
        return command.jobs[0].id if len(command.jobs) == 1 else None
    return command.id if isinstance(command, JobCommand) else None


def _row(operator: Operator, at: int, what: str, **more: Any) -> AuditEntry:
    return AuditEntry(at, operator.who, operator.address, what, part_of=operator.part_of, **more)


def _summary(changes: list[Event]) -> dict[str, Any] | None:
    """Return the details of a change: both statuses, the number of the event, and its public details."""
    if not changes:
        return None
    first, last = changes[0], changes[-1]
    return {**(last.details or {}), "from": first.from_status, "to": last.to_status, "event": last.seq}
