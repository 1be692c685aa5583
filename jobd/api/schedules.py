"""Handlers of the calls about schedules: they check the timing, and add what follows from it to the responses."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from jobd.api.services import Services
from jobd.http.http_app import HttpApp, run_command
from jobd.http.request import RequestContext
from jobd.maintenance.cron import InvalidTiming, explanation, load_zone, next_times
from jobd.model.commands import Get, PutSchedule
from jobd.model.errors import ApiError, invalid_request_error
from jobd.model.responses import Response, ScheduleView
from jobd.model.schedules import Timing

TIMES_SHOWN = 5


async def put_schedule(app: HttpApp[Services], ctx: RequestContext, command: PutSchedule) -> Response | ApiError:
    """Reject a timing that cannot be read or never fires."""
    if (command.cron is None) != (command.every_ms is None):  # else the rule rejects it
        await _check(Timing(command.cron, command.every_ms, command.offset_ms, command.timezone))
    return await send_schedule(app, ctx, command)


async def send_schedule(app: HttpApp[Services], ctx: RequestContext, command: Any) -> Response | ApiError:
    response = await run_command(app, ctx, command)
    if isinstance(response, Response):
        response.data = await with_times(app, response.data)
    return response


async def send_schedules(app: HttpApp[Services], ctx: RequestContext, command: Any) -> Response | ApiError:
    response = await run_command(app, ctx, command)
    if isinstance(response, Response):
        response.data.schedules = [await with_times(app, each) for each in response.data.schedules]
    return response


async def _check(timing: Timing) -> None:
    try:
        await load_zone(timing.timezone)
        if not next_times(timing, 0, 1):
            message = f'"{timing.cron}" has no time within 50 years. Give it a day that one of its months has.'
            raise invalid_request_error("$.cron", message)
    except InvalidTiming as error:
        raise invalid_request_error(f"$.{error.field}", f"{error}.") from None


async def with_times(app: HttpApp[Services], view: ScheduleView) -> ScheduleView:
    """Add the times and words of the timing, and the status of a job that is not in memory."""
    timing = Timing(view.cron, view.every_ms, view.offset_ms, view.timezone)
    try:
        await load_zone(timing.timezone)
    except InvalidTiming as error:  # a node that accepted it had a newer tzdata
        return replace(view, explanation=f"It does not fire here: time zone {error}.", next_at=None)
    status = view.last_status
    if status is None and view.last_job_id is not None:
        found = await app.actor.ask(Get(id=view.last_job_id), by="daemon")
        status = None if isinstance(found, ApiError) else found.data.status
    times = [] if view.paused else next_times(timing, view.next_at or 0, TIMES_SHOWN)
    return replace(
        view, explanation=explanation(timing), next_at=next(iter(times), None), next_times=times, last_status=status
    )
