"""Routes of the admin API, and the handlers of calls that are not one command for the actor.

Paths, names and units are those that existing dashboards expect.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any, Final

from msgspec.structs import replace

from jobd.api import operator_actions as actions
from jobd.api.auditing import audit_read, check_audit_filter
from jobd.api.downloads import send_artifact, send_backup
from jobd.api.event_stream import send_events
from jobd.api.explanations import send_queue_why, send_why
from jobd.api.imports import import_jobs, preview_import
from jobd.api.openapi import routes_of, with_document
from jobd.api.output import send_output
from jobd.api.probes import PROBES, send_cluster
from jobd.api.schedules import put_schedule, send_schedule, send_schedules
from jobd.api.services import Services
from jobd.http.http_app import HttpApp, run_command
from jobd.http.request import RequestContext, as_one_entry, operator_of
from jobd.http.response import RawBody
from jobd.http.routing import RouteHandler
from jobd.model import calls, commands, responses
from jobd.model.api_call import ApiCall
from jobd.model.commands import Operator
from jobd.model.errors import ApiError, checked
from jobd.model.requests import Deliveries, NoFields, Reports, ValidateJob
from jobd.model.responses import Response


async def _stats(app: HttpApp[Services], ctx: RequestContext, command: commands.Stats) -> Response | ApiError:
    response = await run_command(app, ctx, command)
    if isinstance(response, Response):
        state = app.services.maintainer.state()
        response.data = replace(
            response.data,
            disk=await app.services.disk_space(),
            store=app.services.store,
            cleanup_running=state.cleanup_running,
            time_since_last_cleanup=state.time_since_last_cleanup,
        )
    return response


async def _health(app: HttpApp[Services], ctx: RequestContext, command: NoFields) -> Response:
    view, problems = await app.services.health.view(), app.services.problems.view()
    if problems.evaluated_at is not None:
        critical = sum(each.severity == "critical" for each in problems.problems)
        view = replace(view, problems=len(problems.problems), critical_problems=critical)
    return Response(view, status=503 if view.status == "unhealthy" else 200)


async def _validate_job(app: HttpApp[Services], ctx: RequestContext, command: ValidateJob) -> Response | ApiError:
    ctx.job_id = command.id
    response = await app.actor.ask(commands.Validate(id=command.id), by=ctx.by, admin=True)
    if isinstance(response, Response) and not ctx.admin:
        response.data.job.lock = responses.public_lock(response.data.job.lock)
    return response


async def _deliveries(app: HttpApp[Services], ctx: RequestContext, command: Deliveries) -> Response:
    before = None if command.cursor is None else int(command.cursor)
    return Response(checked(await app.services.deliveries(command.name, command.state, before, command.limit)))


async def _export(app: HttpApp[Services], ctx: RequestContext, command: commands.Export) -> Response | ApiError:
    page = await run_command(app, ctx, command)
    if isinstance(page, Response):
        await audit_read(app, ctx, "export")
    return page


async def _audit(app: HttpApp[Services], ctx: RequestContext, command: commands.AuditLog) -> Response | ApiError:
    check_audit_filter(command)
    return await run_command(app, ctx, command)


async def _apply_plan(app: HttpApp[Services], ctx: RequestContext, command: commands.RunPlan) -> Response:
    operator = ctx.operator or operator_of(ctx)
    applied = app.services.planner.apply(command.plan_id, operator, trial=command.trial, rate=command.rate)
    return Response(checked(await applied))


async def _metrics(app: HttpApp[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(RawBody(calls.METRICS_TYPE, await app.services.metrics_text()))


async def _reports(app: HttpApp[Services], ctx: RequestContext, command: Reports) -> Response:
    return Response(responses.ReportList(await app.services.maintainer.reports(command.limit)))


def _respond(result_of: Callable[[Services, Any], Any]) -> RouteHandler:
    """Return a handler that responds with a result of the services, or with the ApiError that they return."""

    async def handle(app: HttpApp[Services], ctx: RequestContext, command: Any) -> Response:
        result = result_of(app.services, command)
        return Response(checked(await result if isawaitable(result) else result))

    return handle


def _respond_to_operator(act: Callable[[HttpApp[Services], Operator | None, Any], Awaitable[Any]]) -> RouteHandler:
    async def handle(app: HttpApp[Services], ctx: RequestContext, command: Any) -> Response:
        return Response(checked(await act(app, ctx.operator, command)))

    return handle


_HANDLERS: Final[dict[ApiCall[Any, Any], RouteHandler]] = {
    calls.AdminJobCalls.validate_job: _validate_job,
    calls.AdminJobCalls.why: send_why,
    calls.AdminJobCalls.output: send_output,
    calls.AdminQueueCalls.why_queue: send_queue_why,
    calls.AdminJobRequests.artifact: send_artifact,
    calls.ManyJobRequests.import_jobs: import_jobs,
    calls.ManyJobRequests.preview_import: preview_import,
    calls.ManyJobRequests.export: _export,
    calls.ManyJobRequests.plan: _respond(Services.make_plan),
    calls.ManyJobCalls.failures: _respond(lambda services, query: services.failures.view(query.limit)),
    calls.ManyJobCalls.preview: _respond(lambda services, _: services.maintainer.preview()),
    calls.ManyJobCalls.get_plan: _respond(lambda services, query: services.planner.find(query.plan_id)),
    calls.ManyJobCalls.apply_plan: _apply_plan,
    calls.AdminQueueCalls.take_back: _respond_to_operator(
        lambda app, operator, command: app.services.maintainer.take_back(command, as_one_entry(operator))
    ),
    calls.AdminScheduleCalls.put_schedule: put_schedule,
    calls.AdminScheduleCalls.schedule_page: send_schedules,
    calls.AdminScheduleCalls.get_schedule: send_schedule,
    calls.AdminScheduleCalls.pause_schedule: send_schedule,
    calls.AdminScheduleCalls.resume_schedule: send_schedule,
    calls.AdminScheduleCalls.delete_schedule: send_schedule,
    calls.AdminEventRequests.events: send_events,
    calls.AdminEventCalls.audit: _audit,
    calls.AdminEventCalls.webhooks: _respond(lambda services, _: responses.WebhookList(services.webhooks.views())),
    calls.AdminEventCalls.deliveries: _deliveries,
    calls.AdminEventCalls.resend_delivery: _respond_to_operator(
        lambda app, operator, form: actions.resend_delivery(app, operator, form.name, form.id, form.reason)
    ),
    calls.AdminEventCalls.resend_dead_lettered: _respond_to_operator(
        lambda app, operator, form: actions.resend_dead_lettered(app, operator, form.name, form.upto, form.reason)
    ),
    calls.AdminEventCalls.test_webhook: _respond_to_operator(
        lambda app, operator, form: actions.test_webhook(app, operator, form.name, form.reason)
    ),
    calls.DaemonCalls.stats: _stats,
    calls.DaemonCalls.health: _health,
    calls.DaemonCalls.force_cleanup: _respond_to_operator(
        lambda app, operator, form: actions.run_cleanup(app, operator, form.reason)
    ),
    calls.DaemonCalls.cleanup_state: _respond(lambda services, _: services.maintainer.state()),
    calls.DaemonCalls.detect_and_recover_stuck_jobs: _respond_to_operator(
        lambda app, operator, form: app.services.maintainer.recover_stuck(as_one_entry(operator), form.reason)
    ),
    calls.DaemonCalls.reports: _reports,
    calls.DaemonCalls.alerts: _respond(lambda services, _: responses.AlertList(services.problems.alerts())),
    calls.DaemonCalls.problems: _respond(lambda services, query: services.problems.view(query.severity, query.queue)),
    calls.DaemonCalls.clock: _respond(lambda services, _: services.clock_view()),
    calls.DaemonCalls.accept_clock: _respond_to_operator(
        lambda app, operator, form: actions.accept_clock(app, operator, form.reason)
    ),
    calls.DaemonCalls.step_down: _respond_to_operator(
        lambda app, operator, form: actions.step_down(app, operator, form.reason, force=form.force)
    ),
    calls.AdminNodeCalls.cluster: send_cluster,
    calls.AdminNodeCalls.metrics: _metrics,
    calls.StoreRequests.backup: send_backup,
    calls.StoreCalls.quarantine: _respond(lambda services, _: responses.QuarantineList(services.quarantine())),
    calls.StoreCalls.disk: _respond(lambda services, _: services.disk_sampler.measure()),
    calls.StoreCalls.check_rows: _respond(lambda services, query: services.scrubber.scan(query.cursor)),
    calls.StoreCalls.backups: _respond(lambda services, _: responses.BackupList(services.backups.views())),
}
ROUTES: Final = with_document("jobd admin API", (*routes_of(calls.ADMIN_API, _HANDLERS), *PROBES))
