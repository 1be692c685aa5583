"""The calls of operators: a table, and for what is no command to the actor one line of adapter each.

No logic. Paths, names and units are those that existing dashboards call.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta
from msgspec.structs import replace

from jobd.api.auditing import note, note_look
from jobd.api.descriptions import ADMIN_TITLE
from jobd.api.downloads import BACKUP_KIND, Artifact, BackupAsked, give, give_out
from jobd.api.downloads import KIND as ARTIFACT_KIND
from jobd.api.events import EVENT_STREAM, Follow, follow
from jobd.api.imports import look_over, take_in
from jobd.api.openapi import ADMIN_PREFIX, with_document
from jobd.api.probes import PROBES
from jobd.api.services import Rooms
from jobd.http.app import Nothing, Web, ask
from jobd.http.request import Visit, in_parts, operator_of
from jobd.http.response import Text
from jobd.http.routing import Route, Who
from jobd.model.commands import (
    MAX_PAGE,
    Adopt,
    AuditLog,
    Cancel,
    Command,
    Cursor,
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
    RowCursor,
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
from jobd.model.job import Text as Words
from jobd.model.responses import (
    AdminLockView,
    AlertList,
    AuditPage,
    BackupList,
    CheckedRows,
    CleanupReport,
    CleanupState,
    ClockView,
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
METRICS_KIND: Final = "text/plain; version=0.0.4; charset=utf-8"


class Because(Command, frozen=True, kw_only=True):
    """A call that takes no fields but why it is done, for the audit log."""

    reason: Words | None = None


class ValidateJob(NamedJobCommand, frozen=True, kw_only=True):
    """Validate, with the job named as `jobId` in the query."""


class Reports(Command, frozen=True, kw_only=True):
    """The latest cleanup reports, newest first."""

    limit: Annotated[int, Meta(ge=1, le=MAX_REPORTS)] = 50


class FailuresAsked(Command, frozen=True, kw_only=True):
    """Failed jobs by their error, the largest groups first."""

    limit: Annotated[int, Meta(ge=1, le=MAX_GROUPS)] = 50


class Deliveries(Command, frozen=True, kw_only=True):
    """A page of the deliveries of a webhook, newest first. `cursor` is the `next_cursor` of the page before."""

    name: WebhookName
    state: DeliveryState | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50
    cursor: Cursor | None = None


class RowsAsked(Command, frozen=True, kw_only=True):
    """Go on with the walk over all rows. `cursor` is the `next_cursor` of the call before."""

    cursor: RowCursor | None = None


class DeliverAgain(Command, frozen=True, kw_only=True):
    """Send a delivery again, whatever became of it."""

    name: WebhookName
    id: Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
    reason: Words | None = None


class DeliverAllAgain(Command, frozen=True, kw_only=True):
    """Send again what was given up: all of it, or up to the number `upto`."""

    name: WebhookName
    upto: Annotated[int, Meta(ge=1, le=MAX_NUMBER)] | None = None
    reason: Words | None = None


class TestWebhook(Command, frozen=True, kw_only=True):
    """Send a message that says that it is a test."""

    name: WebhookName
    reason: Words | None = None


async def _stats(site: Web[Rooms], visit: Visit, asked: Stats) -> Response | ApiError:
    answer = await ask(site, visit, asked)
    if isinstance(answer, Response):
        state = site.rooms.cleanup_state()
        answer.data = replace(
            answer.data,
            disk=await site.rooms.disk_space(),
            cleanup_running=state.cleanup_running,
            time_since_last_cleanup=state.time_since_last_cleanup,
        )
    return answer


async def _health(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    view = await site.rooms.health()
    return Response(view, status=503 if view.status == "unhealthy" else 200)


async def _validate_job(site: Web[Rooms], visit: Visit, asked: ValidateJob) -> Response | ApiError:
    visit.job_id = asked.id
    answer = await site.actor.ask(Validate(id=asked.id), by=visit.by, admin=True)
    if isinstance(answer, Response) and not visit.admin:
        answer.data.job.lock = public_lock(answer.data.job.lock)
    return answer


async def _cleanup(site: Web[Rooms], visit: Visit, asked: Because) -> Response:
    await note(site, visit.operator, "cleanup", reason=asked.reason)
    return Response(await site.rooms.run_cleanup(forced=True))


async def _cleanup_state(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return Response(site.rooms.cleanup_state())


async def _recover_stuck(site: Web[Rooms], visit: Visit, asked: Because) -> Response | ApiError:
    done = await site.rooms.recover_stuck(in_parts(visit.operator), asked.reason)
    return done if isinstance(done, ApiError) else Response(done)


async def _take_back(site: Web[Rooms], visit: Visit, asked: TakeBack) -> Response | ApiError:
    return _given(await site.rooms.take_back(asked, in_parts(visit.operator)))


async def _failures(site: Web[Rooms], visit: Visit, asked: FailuresAsked) -> Response:
    return Response(site.rooms.failures(asked.limit))


async def _preview(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response | ApiError:
    return _given(await site.rooms.preview())


async def _make_plan(site: Web[Rooms], visit: Visit, asked: MakePlan) -> Response | ApiError:
    return _given(await site.rooms.make_plan(asked))


async def _plan(site: Web[Rooms], visit: Visit, asked: PlanCommand) -> Response | ApiError:
    return _given(site.rooms.plan(asked.plan_id))


async def _apply_plan(site: Web[Rooms], visit: Visit, asked: PlanCommand) -> Response | ApiError:
    return _given(await site.rooms.apply_plan(asked.plan_id, visit.operator or operator_of(visit)))


def _given(found: Any) -> Response | ApiError:
    return found if isinstance(found, ApiError) else Response(found)


async def _reports(site: Web[Rooms], visit: Visit, asked: Reports) -> Response:
    return Response(ReportList(await site.rooms.reports(asked.limit)))


async def _alerts(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return Response(AlertList(site.rooms.alerts()))


async def _webhooks(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return Response(WebhookList(site.rooms.webhooks()))


async def _deliveries(site: Web[Rooms], visit: Visit, asked: Deliveries) -> Response | ApiError:
    before = None if asked.cursor is None else int(asked.cursor)
    return _given(await site.rooms.deliveries(asked.name, asked.state, before, asked.limit))


async def _deliver_again(site: Web[Rooms], visit: Visit, asked: DeliverAgain) -> Response | ApiError:
    sent = await site.rooms.deliver_again(asked.name, asked.id)
    if not isinstance(sent, ApiError):
        details = {"webhook": asked.name, "delivery": asked.id}
        await note(site, visit.operator, "resend-delivery", details, asked.reason)
    return _given(sent)


async def _deliver_all_again(site: Web[Rooms], visit: Visit, asked: DeliverAllAgain) -> Response | ApiError:
    sent = await site.rooms.deliver_all_again(asked.name, asked.upto)
    if not isinstance(sent, ApiError):
        details = {"webhook": asked.name, "resent": sent.resent}
        await note(site, visit.operator, "resend-given-up", details, asked.reason)
    return _given(sent)


async def _export(site: Web[Rooms], visit: Visit, asked: Export) -> Response | ApiError:
    page = await ask(site, visit, asked)
    if isinstance(page, Response):
        await note_look(site, visit, "export")
    return page


async def _test_webhook(site: Web[Rooms], visit: Visit, asked: TestWebhook) -> Response | ApiError:
    sent = await site.rooms.test_webhook(asked.name)
    if not isinstance(sent, ApiError):
        await note(site, visit.operator, "test-webhook", {"webhook": asked.name}, asked.reason)
    return _given(sent)


async def _clock(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return Response(site.rooms.clock())


async def _accept_clock(site: Web[Rooms], visit: Visit, asked: Because) -> Response | ApiError:
    view = await site.rooms.accept_clock()
    if isinstance(view, ApiError):
        return view
    await note(site, visit.operator, "accept-clock", reason=asked.reason)
    return Response(view)


async def _quarantine(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return Response(QuarantineList(site.rooms.quarantine()))


async def _check_rows(site: Web[Rooms], visit: Visit, asked: RowsAsked) -> Response | ApiError:
    return _given(await site.rooms.check_rows(asked.cursor))


async def _backups(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return Response(BackupList(site.rooms.backups()))


async def _metrics(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return Response(Text(METRICS_KIND, await site.rooms.metrics()))


_A: Final[Who] = "admin"
_P: Final = ADMIN_PREFIX

_ROUTES: Final = (
    Route(method="GET", path=f"{_P}/stats", asks=Stats, gives=StatsView, who=_A, via=_stats),
    Route(method="GET", path=f"{_P}/health", asks=Nothing, gives=HealthView, who=_A, via=_health),
    Route(method="POST", path=f"{_P}/cleanup", asks=Because, gives=CleanupReport, who=_A, via=_cleanup),
    Route(method="GET", path=f"{_P}/cleanup", asks=Nothing, gives=CleanupState, who=_A, via=_cleanup_state),
    Route(method="POST", path=f"{_P}/recover-stuck", asks=Because, gives=RecoverStuckView, who=_A, via=_recover_stuck),
    Route(method="GET", path=f"{_P}/validate-job", asks=ValidateJob, gives=ValidateJobView, who=_A, via=_validate_job),
    Route(method="POST", path=f"{_P}/force-fail", asks=ForceFail, gives=TransitionView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/force-reset", asks=ForceReset, gives=TransitionView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/transition", asks=Transition, gives=TransitionView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/extend-lock", asks=ExtendLock, gives=AdminLockView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/release-lock", asks=ReleaseLock, gives=AdminLockView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/import", asks=Import, gives=ImportResult, who=_A, via=take_in, reads="lines"),
    Route(
        method="POST",
        path=f"{_P}/import/preview",
        asks=ImportCheck,
        gives=ImportPreview,
        who=_A,
        via=look_over,
        reads="lines",
    ),
    Route(method="GET", path=f"{_P}/export", asks=Export, gives=ExportPage, who=_A, via=_export, noted=True),
    Route(method="GET", path=f"{_P}/jobs", asks=SearchJobs, gives=JobPage, who=_A),
    Route(method="GET", path=f"{_P}/jobs/{{id}}", asks=Get, gives=JobView, who=_A),
    Route(method="DELETE", path=f"{_P}/jobs/{{id}}", asks=Delete, gives=JobView, who=_A, key=True),
    Route(method="GET", path=f"{_P}/jobs/{{id}}/timeline", asks=Timeline, gives=TimelineView, who=_A),
    Route(method="GET", path=f"{_P}/jobs/{{id}}/why", asks=Why, gives=WhyView, who=_A),
    Route(
        method="GET",
        path=f"{_P}/jobs/{{id}}/artifact",
        asks=Artifact,
        gives=bytes,
        who=_A,
        via=give,
        sends=ARTIFACT_KIND,
        noted=True,
    ),
    Route(method="GET", path=f"{_P}/jobs/{{id}}/late-results", asks=LateResults, gives=LateResultList, who=_A),
    Route(method="POST", path=f"{_P}/jobs/{{id}}/adopt", asks=Adopt, gives=JobView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/jobs/{{id}}/cancel", asks=Cancel, gives=JobView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/jobs/{{id}}/run-now", asks=RunNow, gives=JobView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/jobs/{{id}}/update", asks=Update, gives=JobView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/queues/{{name}}/pause", asks=Pause, gives=PausedView, who=_A, key=True),
    Route(method="POST", path=f"{_P}/queues/{{name}}/resume", asks=Resume, gives=PausedView, who=_A, key=True),
    Route(method="GET", path=f"{_P}/locks", asks=Locks, gives=LockList, who=_A),
    Route(method="GET", path=f"{_P}/queues", asks=Queues, gives=QueueList, who=_A),
    Route(method="GET", path=f"{_P}/workers", asks=Workers, gives=WorkerList, who=_A),
    Route(
        method="POST",
        path=f"{_P}/workers/{{name}}/take-back",
        asks=TakeBack,
        gives=TakeBackView,
        who=_A,
        via=_take_back,
    ),
    Route(method="GET", path=f"{_P}/reports", asks=Reports, gives=ReportList, who=_A, via=_reports),
    Route(method="GET", path=f"{_P}/failures", asks=FailuresAsked, gives=FailuresView, who=_A, via=_failures),
    Route(method="GET", path=f"{_P}/preview", asks=Nothing, gives=PreviewView, who=_A, via=_preview),
    Route(method="POST", path=f"{_P}/plans", asks=MakePlan, gives=PlanView, who=_A, via=_make_plan),
    Route(method="GET", path=f"{_P}/plans/{{plan_id}}", asks=PlanCommand, gives=PlanView, who=_A, via=_plan),
    Route(
        method="POST", path=f"{_P}/plans/{{plan_id}}/apply", asks=PlanCommand, gives=PlanResult, who=_A, via=_apply_plan
    ),
    Route(method="GET", path=f"{_P}/audit", asks=AuditLog, gives=AuditPage, who=_A),
    Route(method="GET", path=f"{_P}/alerts", asks=Nothing, gives=AlertList, who=_A, via=_alerts),
    Route(method="GET", path=f"{_P}/events", asks=Follow, gives=StreamedEvent, who=_A, via=follow, sends=EVENT_STREAM),
    Route(method="GET", path=f"{_P}/webhooks", asks=Nothing, gives=WebhookList, who=_A, via=_webhooks),
    Route(
        method="GET",
        path=f"{_P}/webhooks/{{name}}/deliveries",
        asks=Deliveries,
        gives=DeliveryPage,
        who=_A,
        via=_deliveries,
    ),
    Route(
        method="POST",
        path=f"{_P}/webhooks/{{name}}/resend",
        asks=DeliverAgain,
        gives=DeliveryView,
        who=_A,
        via=_deliver_again,
    ),
    Route(
        method="POST",
        path=f"{_P}/webhooks/{{name}}/resend-given-up",
        asks=DeliverAllAgain,
        gives=Resent,
        who=_A,
        via=_deliver_all_again,
    ),
    Route(
        method="POST",
        path=f"{_P}/webhooks/{{name}}/test",
        asks=TestWebhook,
        gives=DeliveryView,
        who=_A,
        via=_test_webhook,
    ),
    Route(method="GET", path=f"{_P}/clock", asks=Nothing, gives=ClockView, who=_A, via=_clock),
    Route(method="POST", path=f"{_P}/clock/accept", asks=Because, gives=ClockView, who=_A, via=_accept_clock),
    Route(method="GET", path=f"{_P}/quarantine", asks=Nothing, gives=QuarantineList, who=_A, via=_quarantine),
    Route(
        method="GET",
        path=f"{_P}/backup",
        asks=BackupAsked,
        gives=bytes,
        who=_A,
        via=give_out,
        sends=BACKUP_KIND,
        secret=True,
    ),
    Route(method="GET", path=f"{_P}/check-rows", asks=RowsAsked, gives=CheckedRows, who=_A, via=_check_rows),
    Route(method="GET", path=f"{_P}/backups", asks=Nothing, gives=BackupList, who=_A, via=_backups),
    Route(method="GET", path="/metrics", asks=Nothing, gives=bytes, who=_A, via=_metrics, sends=METRICS_KIND),
    *PROBES,
)
ROUTES: Final = with_document(ADMIN_TITLE, _ROUTES)
