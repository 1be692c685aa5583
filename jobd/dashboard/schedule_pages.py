"""Show schedules, and run, pause, resume and delete them after a confirmation."""

from __future__ import annotations

from typing import Any, Final, Literal
from urllib.parse import quote, urlencode

import msgspec

from jobd.api.schedules import with_times
from jobd.dashboard.context import ReasonForm, Viewer, redirect_with_flash
from jobd.dashboard.pages import PAUSE_CHOICES, PER_PAGE, PageData, query
from jobd.dashboard.rendering import pretty_json
from jobd.model.commands import (
    Command,
    DeleteSchedule,
    GetSchedule,
    PauseSchedule,
    ResumeSchedule,
    RunSchedule,
    Schedules,
)
from jobd.model.errors import checked
from jobd.model.fields import ScheduleId
from jobd.model.job import LIVE
from jobd.model.responses import Response, ScheduleList, ScheduleView

Verb = Literal["run", "pause", "resume", "delete"]
LABELS: Final[dict[Verb, str]] = {"run": "Run now", "pause": "Pause", "resume": "Resume", "delete": "Delete"}


class SchedulesPageQuery(Command, frozen=True, kw_only=True):
    """`cursor` is the id of the schedule before the page."""

    cursor: ScheduleId | None = None


class ChangeScheduleQuery(Command, frozen=True, kw_only=True):
    id: ScheduleId
    verb: Verb


class ChangeScheduleForm(ReasonForm, frozen=True, kw_only=True):
    id: ScheduleId
    verb: Verb
    for_ms: Literal["", "900000", "3600000", "14400000", "86400000"] = ""
    force: Literal["", "1"] = ""


async def schedule_list(viewer: Viewer, request: SchedulesPageQuery) -> PageData:
    listed: ScheduleList
    [listed] = await query(viewer, Schedules(limit=PER_PAGE, cursor=request.cursor))
    return {
        "schedules": [await with_times(viewer.app, each) for each in listed.schedules],
        "next": f"/schedules?{urlencode({'cursor': listed.next_cursor})}" if listed.next_cursor else "",
        "is_first": request.cursor is None,
    }


async def schedule_detail(viewer: Viewer, request: GetSchedule) -> PageData:
    schedule = await _find(viewer, request.id)
    return {"schedule": schedule, "job": pretty_json(msgspec.json.encode(schedule.job)), "labels": LABELS}


async def confirm_change(viewer: Viewer, asked: ChangeScheduleQuery) -> PageData:
    """Ask for the reason. The form on the page makes the change."""
    schedule = await _find(viewer, asked.id)
    return {
        "schedule": schedule,
        "verb": asked.verb,
        "label": LABELS[asked.verb],
        "is_busy": asked.verb == "run" and schedule.overlap == "skip" and schedule.last_status in LIVE,
        "pause_choices": PAUSE_CHOICES,
    }


async def change_schedule(viewer: Viewer, form: ChangeScheduleForm) -> Response:
    """Run, pause, resume or delete, and return to the page of the schedule."""
    name, reason = form.id, form.reason_or_none
    url = f"/schedules/{quote(name, safe='')}"
    if form.verb == "run":
        job: Any = checked(await viewer.ask(RunSchedule(id=name, force=bool(form.force), reason=reason))).data
        return redirect_with_flash(viewer, url, f"Job {job.id} was created.")
    if form.verb == "delete":
        checked(await viewer.ask(DeleteSchedule(id=name, reason=reason)))
        return redirect_with_flash(viewer, "/schedules", f"Schedule {name} was deleted.")
    if form.verb == "pause":
        until = viewer.now + int(form.for_ms) if form.for_ms else None
        checked(await viewer.ask(PauseSchedule(id=name, reason=reason, until=until)))
        return redirect_with_flash(viewer, url, f"Schedule {name} is paused.")
    checked(await viewer.ask(ResumeSchedule(id=name, reason=reason)))
    return redirect_with_flash(viewer, url, f"Schedule {name} is resumed.")


async def _find(viewer: Viewer, name: str) -> ScheduleView:
    [view] = await query(viewer, GetSchedule(id=name))
    return await with_times(viewer.app, view)
