"""Routes of the admin API, and the handlers of calls that are not one command for the actor.

Paths, names and units are those that existing dashboards expect.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta
from msgspec.structs import replace

from jobd.api.auditing import audit_action, audit_read, check_audit_filter
from jobd.api.cluster import step_down
from jobd.api.downloads import ARTIFACT_TYPE, BACKUP_TYPE, ArtifactRequest, BackupRequest, send_artifact, send_backup
from jobd.api.events import EVENT_STREAM, EventsRequest, send_events
from jobd.api.imports import import_jobs, preview_import
from jobd.api.openapi import ADMIN_PREFIX, tagged, with_document
from jobd.api.probes import PROBES, cluster_route
from jobd.api.services import Services
from jobd.http.app import App, NoFields, run_command
from jobd.http.request import RequestContext, as_one_entry, operator_of
from jobd.http.response import RawBody
from jobd.http.routing import Auth, Route
from jobd.model.commands import (
    Adopt,
    AuditLog,
    Cancel,
    Command,
    Delete,
    Export,
    ExtendLock,
    ForceFail,
    ForceReset,
    Get,
    Import,
    ImportCheck,
    LateResults,
    Locks,
    MakePlan,
    NamedJobCommand,
    Pause,
    PlanCommand,
    Queues,
    ReleaseLock,
    Resume,
    RunNow,
    SearchJobs,
    Stats,
    TakeBack,
    Timeline,
    Transition,
    Update,
    Validate,
    Why,
    Workers,
)
from jobd.model.errors import ApiError
from jobd.model.events import StreamedEvent
from jobd.model.fields import Cursor, PageLimit, Reason, RowCursor
from jobd.model.responses import (
    AdminLockView,
    AlertList,
    AuditPage,
    BackupList,
    CheckedRows,
    CleanupReport,
    CleanupState,
    ClockView,
    ClusterView,
    DeliveryPage,
    DeliveryState,
    DeliveryView,
    ExportPage,
    FailuresView,
    HealthView,
    ImportPreview,
    ImportResult,
    JobPage,
    JobView,
    LateResultList,
    LockList,
    PausedView,
    PlanResult,
    PlanView,
    PreviewView,
    QuarantineList,
    QueueList,
    RecoverStuckView,
    ReportList,
    Resent,
    Response,
    StatsView,
    TakeBackView,
    TimelineView,
    TransitionView,
    ValidateJobView,
    WebhookList,
    WhyView,
    WorkerList,
    public_lock,
)
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


class ValidateJob(NamedJobCommand, frozen=True, kw_only=True):
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

    state: Annotated[DeliveryState | None, Meta(description="Only deliveries in this state.")] = None
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


async def _stats(app: App[Services], ctx: RequestContext, command: Stats) -> Response | ApiError:
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
    view = await app.services.health.view()
    return Response(view, status=503 if view.status == "unhealthy" else 200)


async def _validate_job(app: App[Services], ctx: RequestContext, command: ValidateJob) -> Response | ApiError:
    ctx.job_id = command.id
    response = await app.actor.ask(Validate(id=command.id), by=ctx.by, admin=True)
    if isinstance(response, Response) and not ctx.admin:
        response.data.job.lock = public_lock(response.data.job.lock)
    return response


async def _cleanup(app: App[Services], ctx: RequestContext, command: WithReason) -> Response:
    await audit_action(app, ctx.operator, "cleanup", reason=command.reason)
    return Response(await app.services.maintainer.run_cleanup(forced=True))


async def _cleanup_state(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(app.services.maintainer.state())


async def _recover_stuck(app: App[Services], ctx: RequestContext, command: WithReason) -> Response | ApiError:
    result = await app.services.maintainer.recover_stuck(as_one_entry(ctx.operator), command.reason)
    return result if isinstance(result, ApiError) else Response(result)


async def _take_back(app: App[Services], ctx: RequestContext, command: TakeBack) -> Response | ApiError:
    return _as_response(await app.services.maintainer.take_back(command, as_one_entry(ctx.operator)))


async def _failures(app: App[Services], ctx: RequestContext, command: FailuresRequest) -> Response:
    return Response(app.services.failures.view(command.limit))


async def _preview(app: App[Services], ctx: RequestContext, command: NoFields) -> Response | ApiError:
    return _as_response(await app.services.maintainer.preview())


async def _make_plan(app: App[Services], ctx: RequestContext, command: MakePlan) -> Response | ApiError:
    return _as_response(await app.services.make_plan(command))


async def _plan(app: App[Services], ctx: RequestContext, command: PlanCommand) -> Response | ApiError:
    return _as_response(app.services.planner.find(command.plan_id))


async def _apply_plan(app: App[Services], ctx: RequestContext, command: PlanCommand) -> Response | ApiError:
    return _as_response(await app.services.planner.apply(command.plan_id, ctx.operator or operator_of(ctx)))


def _as_response(result: Any) -> Response | ApiError:
    return result if isinstance(result, ApiError) else Response(result)


async def _reports(app: App[Services], ctx: RequestContext, command: Reports) -> Response:
    return Response(ReportList(await app.services.maintainer.reports(command.limit)))


async def _alerts(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(AlertList(app.services.alerts.evaluate()))


async def _webhooks(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(WebhookList(app.services.webhooks.views()))


async def _deliveries(app: App[Services], ctx: RequestContext, command: Deliveries) -> Response | ApiError:
    before = None if command.cursor is None else int(command.cursor)
    return _as_response(await app.services.deliveries(command.name, command.state, before, command.limit))


async def _deliver_again(app: App[Services], ctx: RequestContext, command: DeliverAgain) -> Response | ApiError:
    sent = await app.services.deliver_again(command.name, command.id)
    if not isinstance(sent, ApiError):
        details = {"webhook": command.name, "delivery": command.id}
        await audit_action(app, ctx.operator, "resend-delivery", details, command.reason)
    return _as_response(sent)


async def _deliver_all_again(app: App[Services], ctx: RequestContext, command: DeliverAllAgain) -> Response | ApiError:
    sent = await app.services.deliver_all_again(command.name, command.upto)
    if not isinstance(sent, ApiError):
        details = {"webhook": command.name, "resent": sent.resent}
        await audit_action(app, ctx.operator, "resend-given-up", details, command.reason)
    return _as_response(sent)


async def _export(app: App[Services], ctx: RequestContext, command: Export) -> Response | ApiError:
    page = await run_command(app, ctx, command)
    if isinstance(page, Response):
        await audit_read(app, ctx, "export")
    return page


async def _test_webhook(app: App[Services], ctx: RequestContext, command: TestWebhook) -> Response | ApiError:
    sent = await app.services.test_webhook(command.name)
    if not isinstance(sent, ApiError):
        await audit_action(app, ctx.operator, "test-webhook", {"webhook": command.name}, command.reason)
    return _as_response(sent)


async def _audit(app: App[Services], ctx: RequestContext, command: AuditLog) -> Response | ApiError:
    check_audit_filter(command)
    return await run_command(app, ctx, command)


async def _clock(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(app.services.clock_view())


async def _accept_clock(app: App[Services], ctx: RequestContext, command: WithReason) -> Response | ApiError:
    view = await app.services.accept_clock()
    if isinstance(view, ApiError):
        return view
    await audit_action(app, ctx.operator, "accept-clock", reason=command.reason)
    return Response(view)


async def _step_down(app: App[Services], ctx: RequestContext, command: StepDown) -> Response | ApiError:
    return _as_response(await step_down(app, ctx.operator, command.reason, force=command.force))


async def _quarantine(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(QuarantineList(app.services.quarantine()))


async def _check_rows(app: App[Services], ctx: RequestContext, command: RowCheckRequest) -> Response | ApiError:
    return _as_response(await app.services.scrubber.scan(command.cursor))


async def _backups(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(BackupList(app.services.backups.views()))


async def _metrics(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return Response(RawBody(METRICS_TYPE, await app.services.metrics_text()))


_A: Final[Auth] = "admin"
_BASE: Final = ADMIN_PREFIX

_ROUTES: Final = (
    *tagged(
        "Jobs",
        Route(
            method="GET",
            path=f"{_BASE}/validate-job",
            request=ValidateJob,
            response=ValidateJobView,
            auth=_A,
            handler=_validate_job,
        ),
        Route(method="POST", path=f"{_BASE}/force-fail", request=ForceFail, response=TransitionView, auth=_A, key=True),
        Route(
            method="POST", path=f"{_BASE}/force-reset", request=ForceReset, response=TransitionView, auth=_A, key=True
        ),
        Route(
            method="POST", path=f"{_BASE}/transition", request=Transition, response=TransitionView, auth=_A, key=True
        ),
        Route(
            method="POST", path=f"{_BASE}/extend-lock", request=ExtendLock, response=AdminLockView, auth=_A, key=True
        ),
        Route(
            method="POST", path=f"{_BASE}/release-lock", request=ReleaseLock, response=AdminLockView, auth=_A, key=True
        ),
        Route(method="GET", path=f"{_BASE}/jobs", request=SearchJobs, response=JobPage, auth=_A),
        Route(method="GET", path=f"{_BASE}/jobs/{{id}}", request=Get, response=JobView, auth=_A),
        Route(method="DELETE", path=f"{_BASE}/jobs/{{id}}", request=Delete, response=JobView, auth=_A, key=True),
        Route(method="GET", path=f"{_BASE}/jobs/{{id}}/timeline", request=Timeline, response=TimelineView, auth=_A),
        Route(method="GET", path=f"{_BASE}/jobs/{{id}}/why", request=Why, response=WhyView, auth=_A),
        Route(
            method="GET",
            path=f"{_BASE}/jobs/{{id}}/artifact",
            request=ArtifactRequest,
            response=bytes,
            auth=_A,
            handler=send_artifact,
            content_type=ARTIFACT_TYPE,
            audited=True,
        ),
        Route(
            method="GET",
            path=f"{_BASE}/jobs/{{id}}/late-results",
            request=LateResults,
            response=LateResultList,
            auth=_A,
        ),
        Route(method="POST", path=f"{_BASE}/jobs/{{id}}/adopt", request=Adopt, response=JobView, auth=_A, key=True),
        Route(method="POST", path=f"{_BASE}/jobs/{{id}}/cancel", request=Cancel, response=JobView, auth=_A, key=True),
        Route(method="POST", path=f"{_BASE}/jobs/{{id}}/run-now", request=RunNow, response=JobView, auth=_A, key=True),
        Route(method="POST", path=f"{_BASE}/jobs/{{id}}/update", request=Update, response=JobView, auth=_A, key=True),
        Route(method="GET", path=f"{_BASE}/locks", request=Locks, response=LockList, auth=_A),
    ),
    *tagged(
        "Many jobs",
        Route(
            method="POST",
            path=f"{_BASE}/import",
            request=Import,
            response=ImportResult,
            auth=_A,
            handler=import_jobs,
            body="lines",
        ),
        Route(
            method="POST",
            path=f"{_BASE}/import/preview",
            request=ImportCheck,
            response=ImportPreview,
            auth=_A,
            handler=preview_import,
            body="lines",
        ),
        Route(
            method="GET",
            path=f"{_BASE}/export",
            request=Export,
            response=ExportPage,
            auth=_A,
            handler=_export,
            audited=True,
        ),
        Route(
            method="GET",
            path=f"{_BASE}/failures",
            request=FailuresRequest,
            response=FailuresView,
            auth=_A,
            handler=_failures,
        ),
        Route(
            method="GET",
            path=f"{_BASE}/preview",
            request=NoFields,
            response=PreviewView,
            auth=_A,
            handler=_preview,
            summary="Show what recovery and a cleanup run would do now: the first 1000 jobs of each kind. Changes "
            "nothing.",
            errors=("overloaded", "shutting_down", "outcome_unknown"),
        ),
        Route(method="POST", path=f"{_BASE}/plans", request=MakePlan, response=PlanView, auth=_A, handler=_make_plan),
        Route(
            method="GET",
            path=f"{_BASE}/plans/{{plan_id}}",
            request=PlanCommand,
            response=PlanView,
            auth=_A,
            handler=_plan,
            summary="Get a plan, with its result if it was applied. Plans are kept for 15 min, applied plans for 12 h.",
        ),
        Route(
            method="POST",
            path=f"{_BASE}/plans/{{plan_id}}/apply",
            request=PlanCommand,
            response=PlanResult,
            auth=_A,
            handler=_apply_plan,
            summary="Apply a plan to every job that has not changed since. A repeated request returns the same result.",
        ),
    ),
    *tagged(
        "Queues and workers",
        Route(
            method="POST", path=f"{_BASE}/queues/{{name}}/pause", request=Pause, response=PausedView, auth=_A, key=True
        ),
        Route(
            method="POST",
            path=f"{_BASE}/queues/{{name}}/resume",
            request=Resume,
            response=PausedView,
            auth=_A,
            key=True,
        ),
        Route(method="GET", path=f"{_BASE}/queues", request=Queues, response=QueueList, auth=_A),
        Route(method="GET", path=f"{_BASE}/workers", request=Workers, response=WorkerList, auth=_A),
        Route(
            method="POST",
            path=f"{_BASE}/workers/{{name}}/take-back",
            request=TakeBack,
            response=TakeBackView,
            auth=_A,
            handler=_take_back,
        ),
    ),
    *tagged(
        "Events",
        Route(method="GET", path=f"{_BASE}/audit", request=AuditLog, response=AuditPage, auth=_A, handler=_audit),
        Route(
            method="GET",
            path=f"{_BASE}/events",
            request=EventsRequest,
            response=StreamedEvent,
            auth=_A,
            handler=send_events,
            content_type=EVENT_STREAM,
        ),
        Route(
            method="GET",
            path=f"{_BASE}/webhooks",
            request=NoFields,
            response=WebhookList,
            auth=_A,
            handler=_webhooks,
            summary="List the configured webhooks and their state.",
        ),
        Route(
            method="GET",
            path=f"{_BASE}/webhooks/{{name}}/deliveries",
            request=Deliveries,
            response=DeliveryPage,
            auth=_A,
            handler=_deliveries,
        ),
        Route(
            method="POST",
            path=f"{_BASE}/webhooks/{{name}}/resend",
            request=DeliverAgain,
            response=DeliveryView,
            auth=_A,
            handler=_deliver_again,
        ),
        Route(
            method="POST",
            path=f"{_BASE}/webhooks/{{name}}/resend-given-up",
            request=DeliverAllAgain,
            response=Resent,
            auth=_A,
            handler=_deliver_all_again,
        ),
        Route(
            method="POST",
            path=f"{_BASE}/webhooks/{{name}}/test",
            request=TestWebhook,
            response=DeliveryView,
            auth=_A,
            handler=_test_webhook,
        ),
    ),
    *tagged(
        "The daemon",
        Route(method="GET", path=f"{_BASE}/stats", request=Stats, response=StatsView, auth=_A, handler=_stats),
        Route(
            method="GET",
            path=f"{_BASE}/health",
            request=NoFields,
            response=HealthView,
            auth=_A,
            handler=_health,
            summary="Return the health of database, memory, artifact store and cleanup, measured at most 5 s ago.",
            other_statuses={503: "A part is unhealthy; the same body says which."},
        ),
        Route(
            method="POST",
            path=f"{_BASE}/cleanup",
            request=WithReason,
            response=CleanupReport,
            auth=_A,
            handler=_cleanup,
            summary="Start a cleanup run, or wait for the one in progress, and return its report.",
        ),
        Route(
            method="GET",
            path=f"{_BASE}/cleanup",
            request=NoFields,
            response=CleanupState,
            auth=_A,
            handler=_cleanup_state,
            summary="Return the state of cleanup and the report of the last run.",
        ),
        Route(
            method="POST",
            path=f"{_BASE}/recover-stuck",
            request=WithReason,
            response=RecoverStuckView,
            auth=_A,
            handler=_recover_stuck,
            summary="Recover the jobs that are stalled now.",
        ),
        Route(method="GET", path=f"{_BASE}/reports", request=Reports, response=ReportList, auth=_A, handler=_reports),
        Route(
            method="GET",
            path=f"{_BASE}/alerts",
            request=NoFields,
            response=AlertList,
            auth=_A,
            handler=_alerts,
            summary="List all alerts, firing or not.",
        ),
        Route(
            method="GET",
            path=f"{_BASE}/clock",
            request=NoFields,
            response=ClockView,
            auth=_A,
            handler=_clock,
            summary="Return the time of the daemon's clock, and whether the clock is suspect.",
        ),
        Route(
            method="POST",
            path=f"{_BASE}/clock/accept",
            request=WithReason,
            response=ClockView,
            auth=_A,
            handler=_accept_clock,
            summary="Accept the clock as correct. Jobs are deleted and failed by age again.",
        ),
        Route(
            method="POST",
            path=f"{_BASE}/cluster/step-down",
            request=StepDown,
            response=ClusterView,
            auth=_A,
            handler=_step_down,
            errors=("not_found", "no_standby"),
            summary="Make this node step down, so that a standby takes over at once. The process ends with code 75.",
        ),
        Route(
            method="GET",
            path="/metrics",
            request=NoFields,
            response=bytes,
            auth=_A,
            handler=_metrics,
            on_standby=True,
            content_type=METRICS_TYPE,
            summary="Return metrics in the Prometheus text format.",
        ),
    ),
    *tagged(
        "The store",
        Route(
            method="GET",
            path=f"{_BASE}/quarantine",
            request=NoFields,
            response=QuarantineList,
            auth=_A,
            handler=_quarantine,
            summary="List the damaged jobs in quarantine.",
        ),
        Route(
            method="GET",
            path=f"{_BASE}/backup",
            request=BackupRequest,
            response=bytes,
            auth=_A,
            handler=send_backup,
            content_type=BACKUP_TYPE,
            secret=True,
        ),
        Route(
            method="GET",
            path=f"{_BASE}/check-rows",
            request=RowCheckRequest,
            response=CheckedRows,
            auth=_A,
            handler=_check_rows,
        ),
        Route(
            method="GET",
            path=f"{_BASE}/backups",
            request=NoFields,
            response=BackupList,
            auth=_A,
            handler=_backups,
            summary="List the backups in progress and the last ones that ended, newest first.",
        ),
    ),
    *PROBES,
    cluster_route(_A),
)
ROUTES: Final = with_document("jobd admin API", _ROUTES)
