"""Routes of the admin API, and the handlers of calls that are not one command for the actor.

Paths, names and units are those that existing dashboards expect.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta
from msgspec.structs import replace

from jobd.api import operator_actions
from jobd.api.auditing import audit_read, check_audit_filter
from jobd.api.downloads import ARTIFACT_TYPE, BACKUP_TYPE, ArtifactRequest, BackupRequest, send_artifact, send_backup
from jobd.api.events import EventsRequest, send_events
from jobd.api.imports import import_jobs, preview_import
from jobd.api.openapi import ADMIN_PREFIX, tagged, with_document
from jobd.api.probes import PROBES, cluster_route
from jobd.api.services import Services
from jobd.http.app import App, NoFields, run_command
from jobd.http.request import RequestContext, as_one_entry, operator_of
from jobd.http.response import RawBody
from jobd.http.routing import EVENT_STREAM, Route, RouteHandler
from jobd.model import commands, responses
from jobd.model.commands import Command
from jobd.model.errors import ApiError, checked
from jobd.model.events import StreamedEvent
from jobd.model.fields import Cursor, PageLimit, Reason, RowCursor
from jobd.model.responses import Response
from jobd.model.webhooks import WebhookName

MAX_REPORTS: Final = 500
MAX_GROUPS: Final = 200
MAX_NUMBER: Final = (1 << 63) - 1
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class WithReason(Command, frozen=True, kw_only=True):
    """A call whose only field is the reason for the audit log."""

    reason: Reason | None = None


class StepDown(WithReason, frozen=True, kw_only=True):
    """Make this node step down."""

    force: Annotated[bool, Meta(description="Step down even if no standby is ready to take over.")] = False


class ValidateJob(commands.NamedJobCommand, frozen=True, kw_only=True):
    """Get a job, and the issues in its record."""


class Reports(Command, frozen=True, kw_only=True):
    """List the reports of cleanup runs, newest first. The latest 500 are kept."""

    limit: Annotated[int, Meta(ge=1, le=MAX_REPORTS, description="Maximum number of reports.")] = 50


class FailuresRequest(Command, frozen=True, kw_only=True):
    """Group failed and retrying jobs by error, largest groups first."""

    limit: Annotated[int, Meta(ge=1, le=MAX_GROUPS, description="Maximum number of groups.")] = 50


class WebhookCommand(Command, frozen=True, kw_only=True):
    """A call about a webhook. The path gives its name."""

    errors = ("not_found",)

    name: Annotated[WebhookName, Meta(description="Name of the webhook.")]


class Deliveries(WebhookCommand, frozen=True, kw_only=True):
    """List the waiting and recent deliveries of a webhook, newest first."""

    state: Annotated[responses.DeliveryState | None, Meta(description="Only deliveries in this state.")] = None
    limit: PageLimit = 50
    cursor: Cursor | None = None


class RowCheckRequest(Command, frozen=True, kw_only=True):
    """Check the next rows of the store against their checksums. Quarantine and list the damaged ones."""

    cursor: Annotated[RowCursor | None, Meta(description="The `next_cursor` of the previous call.")] = None


class DeliverAgain(WebhookCommand, frozen=True, kw_only=True):
    """Send a delivery again now, in any state."""

    id: Annotated[int, Meta(ge=1, le=MAX_NUMBER, description="Number of the delivery.")]
    reason: Reason | None = None


class DeliverAllAgain(WebhookCommand, frozen=True, kw_only=True):
    """Send all dead-lettered deliveries again, or those up to a delivery number."""

    upto: Annotated[int, Meta(ge=1, le=MAX_NUMBER, description="Only deliveries up to this number.")] | None = None
    reason: Reason | None = None


class TestWebhook(WebhookCommand, frozen=True, kw_only=True):
    """Send a test message to a webhook."""

    reason: Reason | None = None


async def _stats(app: App[Services], ctx: RequestContext, command: commands.Stats) -> Response | ApiError:
    response = await run_command(app, ctx, command)
    if isinstance(response, Response):
        state = app.services.maintainer.state()
        response.data = replace(
            response.data,
            disk=await app.services.disk_space(),
            cleanup_running=state.cleanup_running,
            time_since_last_cleanup=state.time_since_last_cleanup,
        )
    return response


async def _health(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    """Return the health of database, memory, artifact store and cleanup, measured at most 5 s ago."""
    view = await app.services.health.view()
    return Response(view, status=503 if view.status == "unhealthy" else 200)


async def _validate_job(app: App[Services], ctx: RequestContext, command: ValidateJob) -> Response | ApiError:
    ctx.job_id = command.id
    response = await app.actor.ask(commands.Validate(id=command.id), by=ctx.by, admin=True)
    if isinstance(response, Response) and not ctx.admin:
        response.data.job.lock = responses.public_lock(response.data.job.lock)
    return response


async def _cleanup(app: App[Services], ctx: RequestContext, command: WithReason) -> Response:
    """Start a cleanup run, or wait for the one in progress, and return its report."""
    return Response(await operator_actions.run_cleanup(app, ctx.operator, command.reason))


async def _cleanup_state(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    """Return the state of cleanup and the report of the last run."""
    return Response(app.services.maintainer.state())


async def _recover_stuck(app: App[Services], ctx: RequestContext, command: WithReason) -> Response:
    """Recover the jobs that are stalled now."""
    return Response(checked(await app.services.maintainer.recover_stuck(as_one_entry(ctx.operator), command.reason)))


async def _take_back(app: App[Services], ctx: RequestContext, command: commands.TakeBack) -> Response:
    return Response(checked(await app.services.maintainer.take_back(command, as_one_entry(ctx.operator))))


async def _failures(app: App[Services], ctx: RequestContext, command: FailuresRequest) -> Response:
    return Response(app.services.failures.view(command.limit))


async def _preview(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    """Show what recovery and a cleanup run would do now: the first 1000 jobs of each kind. Changes nothing."""
    return Response(checked(await app.services.maintainer.preview()))


async def _make_plan(app: App[Services], ctx: RequestContext, command: commands.MakePlan) -> Response:
    return Response(checked(await app.services.make_plan(command)))


async def _plan(app: App[Services], ctx: RequestContext, command: commands.PlanCommand) -> Response:
    """Get a plan, with its result if it was applied. Plans are kept for 15 min, applied plans for 12 h."""
    return Response(checked(app.services.planner.find(command.plan_id)))


async def _apply_plan(app: App[Services], ctx: RequestContext, command: commands.PlanCommand) -> Response:
    """Apply a plan to every job that has not changed since. A repeated request returns the same result."""
    return Response(checked(await app.services.planner.apply(command.plan_id, ctx.operator or operator_of(ctx))))


async def _reports(app: App[Services], ctx: RequestContext, command: Reports) -> Response:
    return Response(responses.ReportList(await app.services.maintainer.reports(command.limit)))


async def _alerts(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    """List all alerts, firing or not."""
    return Response(responses.AlertList(app.services.alerts.evaluate()))


async def _webhooks(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    """List the configured webhooks and their state."""
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
    """Return the time of the daemon's clock, and whether the clock is suspect."""
    return Response(app.services.clock_view())


async def _accept_clock(app: App[Services], ctx: RequestContext, command: WithReason) -> Response:
    """Accept the clock as correct. Jobs are deleted and failed by age again."""
    return Response(await operator_actions.accept_clock(app, ctx.operator, command.reason))


async def _step_down(app: App[Services], ctx: RequestContext, command: StepDown) -> Response:
    """Make this node step down, so that a standby takes over at once. The process ends with code 75."""
    return Response(await operator_actions.step_down(app, ctx.operator, command.reason, force=command.force))


async def _quarantine(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    """List the damaged jobs in quarantine."""
    return Response(responses.QuarantineList(app.services.quarantine()))


async def _check_rows(app: App[Services], ctx: RequestContext, command: RowCheckRequest) -> Response:
    return Response(checked(await app.services.scrubber.scan(command.cursor)))


async def _backups(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    """List the backups in progress and the last ones that ended, newest first."""
    return Response(responses.BackupList(app.services.backups.views()))


async def _metrics(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(RawBody(METRICS_TYPE, await app.services.metrics_text()))


def _call(method: str, path: str, request: type[Command], response: Any, **options: Any) -> Route:
    """Return a route below ADMIN_PREFIX. `options` are other fields of Route."""
    return Route(method=method, path=ADMIN_PREFIX + path, request=request, response=response, auth="admin", **options)


def _described(
    method: str, path: str, request: type[Command], response: Any, handler: RouteHandler, **options: Any
) -> Route:
    """Return a route whose summary is the docstring of its handler."""
    return _call(method, path, request, response, handler=handler, summary=handler.__doc__, **options)


_ROUTES: Final = (
    *tagged(
        "Jobs",
        _call("GET", "/validate-job", ValidateJob, responses.ValidateJobView, handler=_validate_job),
        _call("POST", "/force-fail", commands.ForceFail, responses.TransitionView, key=True),
        _call("POST", "/force-reset", commands.ForceReset, responses.TransitionView, key=True),
        _call("POST", "/transition", commands.Transition, responses.TransitionView, key=True),
        _call("POST", "/extend-lock", commands.ExtendLock, responses.AdminLockView, key=True),
        _call("POST", "/release-lock", commands.ReleaseLock, responses.AdminLockView, key=True),
        _call("GET", "/jobs", commands.SearchJobs, responses.JobPage),
        _call("GET", "/jobs/{id}", commands.Get, responses.JobView),
        _call("DELETE", "/jobs/{id}", commands.Delete, responses.JobView, key=True),
        _call("GET", "/jobs/{id}/timeline", commands.Timeline, responses.TimelineView),
        _call("GET", "/jobs/{id}/why", commands.Why, responses.WhyView),
        _call(
            "GET",
            "/jobs/{id}/artifact",
            ArtifactRequest,
            bytes,
            handler=send_artifact,
            content_type=ARTIFACT_TYPE,
            audited=True,
        ),
        _call("GET", "/jobs/{id}/late-results", commands.LateResults, responses.LateResultList),
        _call("POST", "/jobs/{id}/adopt", commands.Adopt, responses.JobView, key=True),
        _call("POST", "/jobs/{id}/cancel", commands.Cancel, responses.JobView, key=True),
        _call("POST", "/jobs/{id}/run-now", commands.RunNow, responses.JobView, key=True),
        _call("POST", "/jobs/{id}/update", commands.Update, responses.JobView, key=True),
        _call("GET", "/locks", commands.Locks, responses.LockList),
    ),
    *tagged(
        "Many jobs",
        _call("POST", "/import", commands.Import, responses.ImportResult, handler=import_jobs, body="lines"),
        _call(
            "POST",
            "/import/preview",
            commands.ImportCheck,
            responses.ImportPreview,
            handler=preview_import,
            body="lines",
        ),
        _call("GET", "/export", commands.Export, responses.ExportPage, handler=_export, audited=True),
        _call("GET", "/failures", FailuresRequest, responses.FailuresView, handler=_failures),
        _described(
            "GET",
            "/preview",
            NoFields,
            responses.PreviewView,
            _preview,
            errors=("overloaded", "shutting_down", "outcome_unknown"),
        ),
        _call("POST", "/plans", commands.MakePlan, responses.PlanView, handler=_make_plan),
        _described("GET", "/plans/{plan_id}", commands.PlanCommand, responses.PlanView, _plan),
        _described("POST", "/plans/{plan_id}/apply", commands.PlanCommand, responses.PlanResult, _apply_plan),
    ),
    *tagged(
        "Queues and workers",
        _call("POST", "/queues/{name}/pause", commands.Pause, responses.PausedView, key=True),
        _call("POST", "/queues/{name}/resume", commands.Resume, responses.PausedView, key=True),
        _call("GET", "/queues", commands.Queues, responses.QueueList),
        _call("GET", "/workers", commands.Workers, responses.WorkerList),
        _call("POST", "/workers/{name}/take-back", commands.TakeBack, responses.TakeBackView, handler=_take_back),
    ),
    *tagged(
        "Events",
        _call("GET", "/audit", commands.AuditLog, responses.AuditPage, handler=_audit),
        _call("GET", "/events", EventsRequest, StreamedEvent, handler=send_events, content_type=EVENT_STREAM),
        _described("GET", "/webhooks", NoFields, responses.WebhookList, _webhooks),
        _call("GET", "/webhooks/{name}/deliveries", Deliveries, responses.DeliveryPage, handler=_deliveries),
        _call("POST", "/webhooks/{name}/resend", DeliverAgain, responses.DeliveryView, handler=_deliver_again),
        _call(
            "POST", "/webhooks/{name}/resend-given-up", DeliverAllAgain, responses.Resent, handler=_deliver_all_again
        ),
        _call("POST", "/webhooks/{name}/test", TestWebhook, responses.DeliveryView, handler=_test_webhook),
    ),
    *tagged(
        "The daemon",
        _call("GET", "/stats", commands.Stats, responses.StatsView, handler=_stats),
        _described(
            "GET",
            "/health",
            NoFields,
            responses.HealthView,
            _health,
            other_statuses={503: "A part is unhealthy; the same body says which."},
        ),
        _described("POST", "/cleanup", WithReason, responses.CleanupReport, _cleanup),
        _described("GET", "/cleanup", NoFields, responses.CleanupState, _cleanup_state),
        _described("POST", "/recover-stuck", WithReason, responses.RecoverStuckView, _recover_stuck),
        _call("GET", "/reports", Reports, responses.ReportList, handler=_reports),
        _described("GET", "/alerts", NoFields, responses.AlertList, _alerts),
        _described("GET", "/clock", NoFields, responses.ClockView, _clock),
        _described("POST", "/clock/accept", WithReason, responses.ClockView, _accept_clock),
        _described(
            "POST",
            "/cluster/step-down",
            StepDown,
            responses.ClusterView,
            _step_down,
            errors=("not_found", "no_standby"),
        ),
        Route(
            method="GET",
            path="/metrics",
            request=NoFields,
            response=bytes,
            auth="admin",
            handler=_metrics,
            on_standby=True,
            content_type=METRICS_TYPE,
            summary="Return metrics in the Prometheus text format.",
        ),
    ),
    *tagged(
        "The store",
        _described("GET", "/quarantine", NoFields, responses.QuarantineList, _quarantine),
        _call("GET", "/backup", BackupRequest, bytes, handler=send_backup, content_type=BACKUP_TYPE, secret=True),
        _call("GET", "/check-rows", RowCheckRequest, responses.CheckedRows, handler=_check_rows),
        _described("GET", "/backups", NoFields, responses.BackupList, _backups),
    ),
    *PROBES,
    cluster_route("admin"),
)
ROUTES: Final = with_document("jobd admin API", _ROUTES)
