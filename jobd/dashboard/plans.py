"""What is done to many jobs: planned from the page of jobs, shown, applied. Plans themselves are kept by the daemon.

Does nothing to a job: it asks for a plan, and for its being applied.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal
from urllib.parse import urlencode

import msgspec

from jobd.dashboard.context import Viewer, redirect_with_flash
from jobd.dashboard.filters import JobFilter, search_fields
from jobd.dashboard.pages import BULK_ACTIONS, PAUSED_QUEUES, PageData, banners, query
from jobd.dashboard.rendering import iso_time
from jobd.http.decoding import validation_error
from jobd.model.commands import (
    MAINTENANCE_ACTIONS,
    MAX_PLAN,
    MAX_PLANNING_S,
    MakePlan,
    PlanAction,
    PlanCommand,
    PlanFilter,
)
from jobd.model.errors import ApiError, ApiException, api_error
from jobd.model.job import JobId, Text
from jobd.model.responses import PlanView, Response, plan_late_results_note

MAX_LISTED: Final = 200
DESCRIPTIONS: Final[dict[str, str]] = {
    "retry": "Failed and cancelled jobs wait again as if they were new: no attempts, no stalls, no error, due now.",
    "force-reset": "Failed, cancelled and processing jobs wait again as if they were new. Who holds one has lost it, "
    "and may have done half of the work.",
    "cancel": "Queued and processing jobs end as cancelled. Who holds one is told to stop with the next call.",
    "force-fail": "Queued and processing jobs end as failed, with the reason as error. Who holds one has lost it.",
    "delete": "Finished jobs and their history are gone for good.",
    "recover-stuck": "Jobs whose workers went silent lose their grants: each goes back to its queue, or fails, as its "
    "own rule for that says.",
    "cleanup": "What a cleanup pass would do, but for what it mends: stuck jobs are recovered, queued ones that nobody "
    "wants any more fail, finished ones whose time is over and their history are gone for good.",
}
LABELS: Final = BULK_ACTIONS | {"recover-stuck": "Recover", "cleanup": "Clean up"}
DESTRUCTIVE: Final = frozenset({"force-reset", "cancel", "force-fail", "delete", "cleanup"})


class PlanForm(JobFilter, frozen=True, kw_only=True):
    """`scope`: the jobs of `ids`, or all that the filters find."""

    action: PlanAction
    scope: Literal["selected", "all"]
    ids: list[JobId] = msgspec.field(default_factory=list)
    reason: Text = ""
    csrf: str = ""


class ApplyPlanForm(PlanCommand, frozen=True, kw_only=True):
    csrf: str = ""


class NextPlanForm(PlanCommand, frozen=True, kw_only=True):
    csrf: str = ""


async def create_plan(viewer: Viewer, form: PlanForm) -> Response | ApiError:
    """A plan, and on to its page. Nothing is done yet."""
    found = await viewer.app.services.make_plan(_plan_command(viewer, form))
    return found if isinstance(found, ApiError) else redirect_with_flash(viewer, f"/plans/{found.plan_id}")


async def create_next_plan(viewer: Viewer, form: NextPlanForm) -> Response | ApiError:
    """A plan of what comes after this one, and on to its page."""
    plan = viewer.app.services.planner.find(form.plan_id)
    if isinstance(plan, ApiError):
        return plan
    if plan.next_cursor is None:
        raise api_error("invalid_request", "Nothing comes after this plan: it has all that its filter found.")
    wanted = MakePlan(
        action=plan.action,
        filter=plan.filter,
        cursor=plan.next_cursor,
        reason=plan.reason,
    )
    found = await viewer.app.services.make_plan(wanted)
    return found if isinstance(found, ApiError) else redirect_with_flash(viewer, f"/plans/{found.plan_id}")


def _filters(plan: PlanView) -> dict[str, str]:
    """What the plan's jobs were found by, as the page of jobs takes it."""
    given = {} if plan.filter is None else msgspec.structs.asdict(plan.filter)
    return {
        name: iso_time(value) if isinstance(value, int) else str(value)
        for name, value in given.items()
        if value is not None
    }


def _plan_command(viewer: Viewer, form: PlanForm) -> MakePlan:
    reason = form.reason.strip() or None
    if form.scope == "all":
        if form.error is not None and not form.error.strip():  # else it would be all jobs, for those of one group
            raise api_error("invalid_request", "This group has no name to find its jobs by.", field="$.error")
        try:
            return MakePlan(
                action=form.action, filter=msgspec.convert(search_fields(form, viewer.now), PlanFilter), reason=reason
            )
        except msgspec.ValidationError as fault:
            raise validation_error(str(fault), PlanFilter) from None
    if not form.ids:
        raise api_error("invalid_request", "No job is selected: tick some, or choose all that match.", field="$.ids")
    return MakePlan(action=form.action, ids=form.ids, reason=reason)


async def plan(viewer: Viewer, wanted: PlanCommand) -> PageData:
    """The page of a plan: what it would do, or what became of it."""
    found = viewer.app.services.planner.find(wanted.plan_id)
    if isinstance(found, ApiError):
        raise ApiException(found)
    plan: PlanView = found
    [paused] = await query(viewer, PAUSED_QUEUES)
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
        "of_time": plan.action in MAINTENANCE_ACTIONS,
        "skipped": plan.skipped[:MAX_LISTED],
        "skip_reasons": Counter(job.why for job in plan.skipped).most_common(20),
        "not_applied": [] if result is None else [*result.changed, *result.refused][:MAX_LISTED],
        "not_applied_count": 0 if result is None else len(result.changed) + len(result.refused),
        "max_listed": MAX_LISTED,
        **banners(viewer, paused),
    }


async def apply_plan(viewer: Viewer, form: ApplyPlanForm) -> Response | ApiError:
    """Do what the plan says, and on to its page, which tells what became of it."""
    operator = viewer.visit.operator
    assert operator is not None  # who may change something is one
    done = await viewer.app.services.planner.apply(form.plan_id, operator)
    if isinstance(done, ApiError):
        return done
    jobs = f"{done.applied} {'job' if done.applied == 1 else 'jobs'}"
    said = "It had been applied before; nothing was done this time." if done.repeated else f"It was done to {jobs}."
    return redirect_with_flash(viewer, f"/plans/{form.plan_id}", said)
