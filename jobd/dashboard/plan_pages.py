"""Plan an action on many jobs, show the plan, and apply it. The daemon keeps the plans in memory."""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal
from urllib.parse import urlencode

import msgspec

from jobd.core.rules import plan_rules
from jobd.dashboard.context import Viewer, redirect_with_flash
from jobd.dashboard.filters import JobFilter, convert_fields, search_fields
from jobd.dashboard.job_actions import JOB_ACTIONS
from jobd.dashboard.pages import BULK_ACTIONS, PageData
from jobd.dashboard.rendering import iso_time
from jobd.model.commands import (
    MAINTENANCE_ACTIONS,
    MAX_PLAN,
    MAX_PLANNING_S,
    MakePlan,
    PlanAction,
    PlanCommand,
    PlanFilter,
    PlanRate,
)
from jobd.model.errors import api_error, checked
from jobd.model.fields import JobId, Text
from jobd.model.responses import PlanView, Response, plan_late_results_note

MAX_LISTED: Final = 200
DESCRIPTIONS: Final[dict[str, str]] = {
    **{verb: f"Each job {action.description}" for verb, action in JOB_ACTIONS.items()},
    "recover-stuck": "Stalled jobs are taken from their workers: each is requeued or fails, depending on its on_stall.",
    "cleanup": "As in a cleanup run, without repairs: stalled jobs are recovered, expired queued jobs fail, and "
    "finished jobs past their retention are deleted with their history.",
}
LABELS: Final = BULK_ACTIONS | {action: name.capitalize() for action, name in MAINTENANCE_ACTIONS.items()}
DESTRUCTIVE: Final = {"cleanup", *(verb for verb, action in JOB_ACTIONS.items() if action.destructive)}


class PlanForm(JobFilter, frozen=True, kw_only=True):
    """`scope` selects the jobs in `ids`, or all that match the filters. `recent_error` is `error`, in the last day."""

    action: PlanAction
    scope: Literal["selected", "all"]
    ids: list[JobId] = msgspec.field(default_factory=list)
    recent_error: str = ""
    reason: Text = ""
    csrf: str = ""


class PlanIdForm(PlanCommand, frozen=True, kw_only=True):
    csrf: str = ""


class ApplyForm(PlanIdForm, frozen=True, kw_only=True):
    trial: Literal["", "yes"] = ""
    rate: Literal["", "1", "10", "100"] = ""  # jobs in a second


async def create_plan(viewer: Viewer, form: PlanForm) -> Response:
    """Make a plan and redirect to its page. No job changes yet."""
    return await _make_plan(viewer, _plan_command(viewer, form))


async def create_next_plan(viewer: Viewer, form: PlanIdForm) -> Response:
    """Make a plan of the jobs that follow those of another plan, and redirect to its page."""
    plan = checked(viewer.app.services.planner.find(form.plan_id))
    if plan.next_cursor is None:
        raise api_error("invalid_request", "No jobs follow this plan: it contains all jobs that match its filter.")
    command = MakePlan(action=plan.action, filter=plan.filter, cursor=plan.next_cursor, reason=plan.reason)
    return await _make_plan(viewer, command)


async def _make_plan(viewer: Viewer, command: MakePlan) -> Response:
    plan = checked(await viewer.app.services.make_plan(command))
    return redirect_with_flash(viewer, f"/plans/{plan.plan_id}")


def _filters(plan: PlanView) -> dict[str, str]:
    fields = {} if plan.filter is None else msgspec.structs.asdict(plan.filter)
    return {
        name: iso_time(value) if isinstance(value, int) else str(value)
        for name, value in fields.items()
        if value is not None
    }


def _plan_command(viewer: Viewer, form: PlanForm) -> MakePlan:
    reason = form.reason.strip() or None
    if form.recent_error:
        form = msgspec.structs.replace(form, error=form.recent_error, finished_since="1d")
    if form.scope == "all":
        if form.error is not None and not form.error.strip():  # an empty filter would match all jobs
            raise api_error(
                "invalid_request",
                "This failure group has no fingerprint, so its jobs cannot be found.",
                field="$.error",
            )
        selected = convert_fields(search_fields(form, viewer.now), PlanFilter)
        return MakePlan(action=form.action, filter=selected, reason=reason)
    if not form.ids:
        raise api_error("invalid_request", "No job is selected. Select jobs, or choose all that match.", field="$.ids")
    return MakePlan(action=form.action, ids=form.ids, reason=reason)


async def plan_page(viewer: Viewer, shown: PlanCommand) -> PageData:
    """Show what a plan would do, or what it did."""
    plan = checked(viewer.app.services.planner.find(shown.plan_id))
    result = plan.result
    filters = _filters(plan)
    return {
        "plan": plan,
        "filters": filters,
        "jobs_url": f"/jobs?{urlencode(filters)}" if filters else "/jobs",
        "is_full": plan.count >= MAX_PLAN,
        "max_jobs": MAX_PLAN,
        "planning_s": round(MAX_PLANNING_S),
        "label": LABELS[plan.action],
        "description": DESCRIPTIONS[plan.action],
        "deletes_artifacts": viewer.app.services.downloads.has_store and any(job.to is None for job in plan.jobs),
        "destructive": plan.action in DESTRUCTIVE,
        "late_note": plan_late_results_note(plan.action, plan.jobs),
        "late": [job for job in plan.jobs if job.late_results][:MAX_LISTED],
        "transitions": Counter((job.from_, job.to) for job in plan.jobs).most_common(),
        "jobs": plan.jobs[:MAX_LISTED],
        "is_maintenance": plan.action in MAINTENANCE_ACTIONS,
        "may_wait": plan_rules.may_wait(plan.action),
        "skipped": plan.skipped[:MAX_LISTED],
        "skip_reasons": Counter(job.reason for job in plan.skipped).most_common(20),
        "not_applied": [] if result is None else [*result.changed_meanwhile, *result.rejected][:MAX_LISTED],
        "not_applied_count": 0 if result is None else len(result.changed_meanwhile) + len(result.rejected),
        "max_listed": MAX_LISTED,
    }


async def apply_plan(viewer: Viewer, form: ApplyForm) -> Response:
    """Apply a plan, and redirect to its page, which shows the result."""
    operator = viewer.context.operator
    assert operator is not None  # set for every viewer that may change something
    rate = PlanRate(int(form.rate)) if form.rate else None
    planner = viewer.app.services.planner
    result = checked(await planner.apply(form.plan_id, operator, trial=form.trial == "yes", rate=rate))
    applied = f"Applied to {result.applied} {'job' if result.applied == 1 else 'jobs'}."
    message = "This plan was applied before. Nothing has changed." if result.repeated else applied
    return redirect_with_flash(viewer, f"/plans/{form.plan_id}", message)
