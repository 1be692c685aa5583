"""Handlers of `why`: they add what the core does not know, such as open problems, failures alike and schedules."""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from jobd.api.schedules import with_times
from jobd.api.services import Services
from jobd.http.http_app import HttpApp, run_command
from jobd.http.request import RequestContext
from jobd.model.commands import Get, GetSchedule, Why, WhyQueue
from jobd.model.errors import ApiError
from jobd.model.problems import Subject
from jobd.model.responses import JobView, QueueWhyView, Response, WhyView
from jobd.model.times import utc
from jobd.monitoring.problems.losses import group_of


async def send_why(app: HttpApp[Services], ctx: RequestContext, command: Why) -> Response | ApiError:
    response = await run_command(app, ctx, command)
    if isinstance(response, Response):
        response.data = await whole_explanation(app, command.id, response.data)
    return response


async def send_queue_why(app: HttpApp[Services], ctx: RequestContext, command: WhyQueue) -> Response | ApiError:
    response = await run_command(app, ctx, command)
    if isinstance(response, Response):
        response.data = await whole_queue_explanation(app, response.data)
    return response


async def whole_queue_explanation(app: HttpApp[Services], view: QueueWhyView) -> QueueWhyView:
    kinds = [replace(each, why=await whole_explanation(app, each.job_id, each.why)) for each in view.kinds]
    named = {each.why.problem.id for each in kinds if each.why.problem is not UNSET}
    found = app.services.problems.view(queue=view.queue).problems
    return replace(view, kinds=kinds, problems=[each for each in found if each.id not in named])


async def whole_explanation(app: HttpApp[Services], job_id: str, view: WhyView) -> WhyView:
    found = await app.actor.ask(Get(id=job_id), by="daemon")
    if isinstance(found, ApiError):  # deleted since
        return view
    view = await _with_schedule(app, view)
    if view.state == "failed":
        view = _with_failures_alike(app.services, found.data, view)
    return view if view.state in ("completed", "cancelled") else _with_problem(app, found.data, view)


def _with_problem(app: HttpApp[Services], job: JobView, view: WhyView) -> WhyView:
    """Add the most urgent open problem of the job, its worker, its queue and kind, or its schedule."""
    state = app.actor.state
    live = state.jobs.find(job.id)
    grant = None if live is None else live.grant or live.ended
    name = None if grant is None else grant.worker
    worker = None if name is None else state.presence.workers.get(name)
    host, version = ("", "") if worker is None else group_of(worker)
    whole = Subject(type="job", queue=job.queue, kind=job.kind, host=host, version=version, worker=name, job=job.id)
    whole = replace(whole, schedule=view.schedule_id or None)
    for problem in app.services.problems.view().problems:
        if problem.subject.is_part_of(whole):
            others = [each for each in problem.cure if each.command != f"jobctl why {job.id}"]  # this is its output
            return replace(view, problem=replace(problem, cure=others))
    return view


def _with_failures_alike(services: Services, job: JobView, view: WhyView) -> WhyView:
    """Add how many other jobs failed with the same error, and how to retry all of them."""
    group = services.failures.alike(job.error_message, job.error_code, job.id)
    if group is None or group.count < 2:
        return view
    jobs = "1 other job" if group.count == 2 else f"{group.count - 1:,} other jobs"
    old = f" ({group.older_than_day:,} of all over a day ago)" if group.older_than_day else ""
    because = f"{jobs} failed with the same error since {utc(group.first_at)}{old}. {view.because}"
    retry = f"Fix the cause, then run all {group.count:,} again: jobctl retry --where error={group.fingerprint}"
    return replace(view, because=because, do=[retry, *view.do])


async def _with_schedule(app: HttpApp[Services], view: WhyView) -> WhyView:
    """Add in words which schedule created the job, and its next time."""
    if (name := view.schedule_id) is UNSET:
        return view
    schedule = await app.actor.ask(GetSchedule(id=name), by="daemon")
    if isinstance(schedule, ApiError):
        then = "deleted since"
    elif schedule.data.paused:
        then = "paused now"
    else:
        at = (await with_times(app, schedule.data)).next_at
        then = "no next time" if at is None else f"next {utc(at)}"
    return replace(view, because=f"{view.because} It was created by schedule {name}, {then}.")
