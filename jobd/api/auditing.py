"""Record audit entries for actions and reads of operators that are not job commands."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from jobd.api.services import Services
from jobd.http.http_app import HttpApp, log
from jobd.http.request import RequestContext, reading_operator
from jobd.model.commands import AuditLog, Operator, RecordAction, RecordedAction
from jobd.model.errors import ApiError, invalid_request_error
from jobd.model.job import MINUTE_MS


def check_audit_filter(query: AuditLog) -> None:
    """Raise ApiException for the former spelling of an action. Other unknown actions may be in rows of older versions.

    The filter `artifact` matches rows of both spellings.
    """
    if query.action == "artefact":
        raise invalid_request_error("$.action", "the action is spelled artifact.")


async def audit_action(
    app: HttpApp[Services],
    operator: Operator | None,
    action: RecordedAction,
    details: dict[str, Any] | None = None,
    reason: str | None = None,
    job_id: str | None = None,
) -> None:
    """Record an operator action that is not a job command.

    Best effort: the action proceeds even if the entry cannot be written.
    """
    command = RecordAction(what=action, details=details, reason=reason, job_id=job_id)
    response = await app.actor.ask(command, operator=operator)
    if isinstance(response, ApiError):
        log.warning("audit_missed", action=action, by=None if operator is None else operator.by, reason=response.code)


async def audit_read(
    app: HttpApp[Services], ctx: RequestContext, action: RecordedAction, *, name: str = "", job_id: str | None = None
) -> None:
    """Record an audited read: one entry per minute, operator, job and kind of read."""
    operator, details = reading_operator(ctx, name), {"access": "read"} if ctx.by == "reader" else None
    minute = app.services.clock.moment().now // MINUTE_MS
    part_of = " ".join((action, operator.who, operator.address, job_id or "", str(minute)))
    await audit_action(app, replace(operator, part_of=part_of), action, details, job_id=job_id)
