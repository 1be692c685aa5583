"""Routes of the admin API, and the handlers of calls that are not one command for the actor.

Paths, names and units are those that existing dashboards expect.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from jobd.api import operator_actions
from jobd.api.auditing import audit_read, check_audit_filter
from jobd.api.downloads import send_artifact, send_backup
from jobd.api.event_stream import send_events
from jobd.api.imports import import_jobs, preview_import
from jobd.api.openapi import routes_of, with_document
from jobd.api.probes import PROBES, send_cluster
from jobd.api.services import Services
from jobd.http.app import App, run_command
from jobd.http.request import RequestContext, as_one_entry, operator_of
from jobd.http.response import RawBody
from jobd.http.routing import RouteHandler
from jobd.model import calls, commands, responses
from jobd.model.api_call import ApiCall
from jobd.model.errors import ApiError, checked
from jobd.model.requests import (
    DeliverAgain,
    DeliverAllAgain,
    Deliveries,
    FailuresRequest,
    NoFields,
    Reports,
    RowCheckRequest,
    StepDown,
    TestWebhook,
    ValidateJob,
    WithReason,
)
from jobd.model.responses import Response


async def _stats(app: App[Services], ctx: RequestContext, command: commands.Stats) -> Response | ApiError:
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


async def _health(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    view = await app.services.health.view()
    return Response(view, status=503 if view.status == "unhealthy" else 200)


async def _validate_job(app: App[Services], ctx: RequestContext, command: ValidateJob) -> Response | ApiError:
    ctx.job_id = command.id
    response = await app.actor.ask(commands.Validate(id=command.id), by=ctx.by, admin=True)
    if isinstance(response, Response) and not ctx.admin:
        response.data.job.lock = responses.public_lock(response.data.job.lock)
    return response


async def _cleanup(app: App[Services], ctx: RequestContext, command: WithReason) -> Response:
    return Response(await operator_actions.run_cleanup(app, ctx.operator, command.reason))


async def _cleanup_state(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(app.services.maintainer.state())


async def _recover_stuck(app: App[Services], ctx: RequestContext, command: WithReason) -> Response:
    return Response(checked(await app.services.maintainer.recover_stuck(as_one_entry(ctx.operator), command.reason)))


async def _take_back(app: App[Services], ctx: RequestContext, command: commands.TakeBack) -> Response:
    return Response(checked(await app.services.maintainer.take_back(command, as_one_entry(ctx.operator))))


async def _failures(app: App[Services], ctx: RequestContext, command: FailuresRequest) -> Response:
    return Response(app.services.failures.view(command.limit))


async def _preview(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(checked(await app.services.maintainer.preview()))


async def _make_plan(app: App[Services], ctx: RequestContext, command: commands.MakePlan) -> Response:
    return Response(checked(await app.services.make_plan(command)))


async def _plan(app: App[Services], ctx: RequestContext, command: commands.PlanCommand) -> Response:
    return Response(checked(app.services.planner.find(command.plan_id)))


async def _apply_plan(app: App[Services], ctx: RequestContext, command: commands.PlanCommand) -> Response:
    return Response(checked(await app.services.planner.apply(command.plan_id, ctx.operator or operator_of(ctx))))


async def _reports(app: App[Services], ctx: RequestContext, command: Reports) -> Response:
    return Response(responses.ReportList(await app.services.maintainer.reports(command.limit)))


async def _alerts(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(responses.AlertList(app.services.alerts.evaluate()))


async def _webhooks(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(responses.WebhookList(app.services.webhooks.views()))


async def _deliveries(app: App[Services], ctx: RequestContext, command: Deliveries) -> Response:
    before = None if command.cursor is None else int(command.cursor)
    return Response(checked(await app.services.deliveries(command.name, command.state, before, command.limit)))


async def _deliver_again(app: App[Services], ctx: RequestContext, command: DeliverAgain) -> Response:
    operator, name = ctx.operator, command.name
    return Response(await operator_actions.deliver_again(app, operator, name, command.id, command.reason))


async def _deliver_all_again(app: App[Services], ctx: RequestContext, command: DeliverAllAgain) -> Response:
    operator, name = ctx.operator, command.name
    return Response(await operator_actions.deliver_all_again(app, operator, name, command.upto, command.reason))


async def _test_webhook(app: App[Services], ctx: RequestContext, command: TestWebhook) -> Response:
    return Response(await operator_actions.test_webhook(app, ctx.operator, command.name, command.reason))


async def _export(app: App[Services], ctx: RequestContext, command: commands.Export) -> Response | ApiError:
    page = await run_command(app, ctx, command)
    if isinstance(page, Response):
        await audit_read(app, ctx, "export")
    return page


async def _audit(app: App[Services], ctx: RequestContext, command: commands.AuditLog) -> Response | ApiError:
    check_audit_filter(command)
    return await run_command(app, ctx, command)


async def _clock(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(app.services.clock_view())


async def _accept_clock(app: App[Services], ctx: RequestContext, command: WithReason) -> Response:
    return Response(await operator_actions.accept_clock(app, ctx.operator, command.reason))


async def _step_down(app: App[Services], ctx: RequestContext, command: StepDown) -> Response:
    return Response(await operator_actions.step_down(app, ctx.operator, command.reason, force=command.force))


async def _quarantine(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(responses.QuarantineList(app.services.quarantine()))


async def _check_rows(app: App[Services], ctx: RequestContext, command: RowCheckRequest) -> Response:
    return Response(checked(await app.services.scrubber.scan(command.cursor)))


async def _backups(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(responses.BackupList(app.services.backups.views()))


async def _metrics(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(RawBody(calls.METRICS_TYPE, await app.services.metrics_text()))


_HANDLERS: Final[dict[ApiCall[Any, Any], RouteHandler]] = {
    calls.AdminJobCalls.validate_job: _validate_job,
    calls.AdminJobRequests.artifact: send_artifact,
    calls.ManyJobRequests.import_jobs: import_jobs,
    calls.ManyJobRequests.preview_import: preview_import,
    calls.ManyJobRequests.export: _export,
    calls.ManyJobRequests.plan: _make_plan,
    calls.ManyJobCalls.failures: _failures,
    calls.ManyJobCalls.preview: _preview,
    calls.ManyJobCalls.get_plan: _plan,
    calls.ManyJobCalls.apply_plan: _apply_plan,
    calls.AdminQueueCalls.take_back: _take_back,
    calls.AdminEventRequests.events: send_events,
    calls.AdminEventCalls.audit: _audit,
    calls.AdminEventCalls.webhooks: _webhooks,
    calls.AdminEventCalls.deliveries: _deliveries,
    calls.AdminEventCalls.deliver_again: _deliver_again,
    calls.AdminEventCalls.deliver_all_again: _deliver_all_again,
    calls.AdminEventCalls.test_webhook: _test_webhook,
    calls.DaemonCalls.stats: _stats,
    calls.DaemonCalls.health: _health,
    calls.DaemonCalls.force_cleanup: _cleanup,
    calls.DaemonCalls.cleanup_state: _cleanup_state,
    calls.DaemonCalls.detect_and_recover_stuck_jobs: _recover_stuck,
    calls.DaemonCalls.reports: _reports,
    calls.DaemonCalls.alerts: _alerts,
    calls.DaemonCalls.clock: _clock,
    calls.DaemonCalls.accept_clock: _accept_clock,
    calls.DaemonCalls.step_down: _step_down,
    calls.AdminNodeCalls.cluster: send_cluster,
    calls.AdminNodeCalls.metrics: _metrics,
    calls.StoreRequests.backup: send_backup,
    calls.StoreCalls.quarantine: _quarantine,
    calls.StoreCalls.check_rows: _check_rows,
    calls.StoreCalls.backups: _backups,
}
ROUTES: Final = with_document("jobd admin API", (*routes_of(calls.ADMIN_API, _HANDLERS), *PROBES))
