"""The audit entry of an operator's command."""

from __future__ import annotations

from typing import Any

from jobd.model import commands
from jobd.model.commands import IssuedCommand, JobCommand
from jobd.model.errors import ApiError
from jobd.model.events import Event
from jobd.model.responses import Response
from jobd.model.storage import AuditEntry

_QuietRules = commands.AddQuietRule | commands.EndQuietRule


def entry(call: IssuedCommand, response: Response | ApiError, changes: list[Event], at: int) -> AuditEntry | None:
    """Return the audit entry of `call` and its changes; None if it needs none. `at` is wall time."""
    command, operator = call.command, call.operator
    if operator is None or command.dry_run:
        return None
    if isinstance(command, commands.RecordAction):
        about: dict[str, Any] = {"job_id": command.job_id, "outcome": command.outcome, "details": command.details}
        what = command.what
    else:
        name = f"plan-{command.action}" if isinstance(command, commands.ApplyPlan) else command.audit_name
        if name is None or (not changes and _is_idle(command, response)):
            return None  # also a read
        what, about = name, _about(command, response, changes)
    reason = getattr(command, "reason", None)
    return AuditEntry(at, operator.who, operator.address, what, reason=reason, part_of=operator.part_of, **about)


def _is_idle(command: commands.AnyCommand, response: Response | ApiError) -> bool:
    """Return whether a command that changed nothing needs no entry.

    A line of an import that was skipped or rejected is in the report. A program may put a schedule again, unchanged.
    """
    is_repeated = isinstance(command, commands.PutSchedule) and isinstance(response, Response)
    return is_repeated or isinstance(command, commands.Import)


def _about(command: commands.AnyCommand, response: Response | ApiError, changes: list[Event]) -> dict[str, Any]:
    job_id, queue = _job_of(command), command.name if isinstance(command, commands.Pause | commands.Resume) else None
    if changes and isinstance(command, JobCommand | commands.ScheduleCommand | _QuietRules):
        queue = changes[0].queue or None
    if changes and isinstance(command, commands.ScheduleCommand):
        job_id = changes[0].job_id or None
    changed = {change.job_id: None for change in changes if change.job_seq}
    lists_ids = isinstance(command, commands.ApplyPlan | commands.Copy | commands.TakeBack)
    return {
        "job_id": job_id,
        "queue": queue,
        "outcome": response.code if isinstance(response, ApiError) else "done",
        "jobs": len(changed),
        "details": _details(command, response, changes),
        "changed_ids": list(changed) if lists_ids else [],
    }


def _job_of(command: commands.AnyCommand) -> str | None:
    """Return the id of the job that the command is about, or of the only job of a plan."""
    if isinstance(command, commands.ApplyPlan):
        return command.jobs[0].id if len(command.jobs) == 1 else None
    return command.id if isinstance(command, JobCommand) else None


def _details(
    command: commands.AnyCommand, response: Response | ApiError, changes: list[Event]
) -> dict[str, Any] | None:
    """Return what the command named; for a job both statuses, the number of the event, and its public details."""
    if isinstance(command, commands.ScheduleCommand):
        return {"schedule": command.id}
    if isinstance(command, commands.TakeBack | commands.DirectWorker):
        return {"worker": command.name}
    if not changes or isinstance(command, _QuietRules):
        return changes[-1].details if changes else None
    if not isinstance(command, JobCommand) or isinstance(response, ApiError):
        return None
    first, last = changes[0], changes[-1]
    return {**(last.details or {}), "from": first.from_status, "to": last.to_status, "event": last.seq}
