"""What each page shows: the commands that it asks, and their answers as the templates take them.

Changes nothing. Every list has a bound, and says what is beyond it.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Annotated, Any, Final
from urllib.parse import urlencode

import msgspec
from msgspec import UNSET, Meta, Raw
from msgspec.structs import replace

from jobd.api.downloads import ArtifactRequest
from jobd.dashboard.context import Viewer, is_live_update, is_secure
from jobd.dashboard.filters import JobsPageQuery, active_filters, filtered_url, parse_time_field, search_command
from jobd.dashboard.job_actions import (
    JOB_ACTIONS,
    ActionTarget,
    JobAction,
    Verb,
    available_actions,
    curl_command,
    is_allowed,
)
from jobd.dashboard.rendering import pretty_json
from jobd.dashboard.urls import no_link_reason
from jobd.http.auth import host_name
from jobd.http.decoding import validation_error
from jobd.model.commands import (
    AuditLog,
    Command,
    Cursor,
    Get,
    GetVersion,
    JobCommand,
    LateResults,
    Locks,
    Queues,
    Stats,
    Timeline,
    Why,
    WorkerCursor,
    Workers,
    WorkerState,
)
from jobd.model.errors import ApiError, ApiException, api_error
from jobd.model.job import STATUSES, QueueName, may_adopt
from jobd.model.responses import AuditPage as AuditEntries
from jobd.model.responses import (
    JobPage,
    JobView,
    LateResultList,
    LateResultView,
    LockList,
    QueueList,
    Response,
    StatsView,
    TimelineView,
    VersionedJob,
    WhyView,
    WorkerList,
    late_results_note,
)
from jobd.monitoring.timeseries import Timeseries

PageData = dict[str, Any]

PER_PAGE: Final = 50
MAX_QUARANTINED: Final = 200  # of damaged jobs
MAX_QUEUES: Final = 100
MAX_WORKERS: Final = 50  # of workers and of locks
MAX_EVENTS: Final = 200
MAX_REPORTS: Final = 50
MAX_GROUPS: Final = 100  # of failures
MAX_SCANNED: Final = 50_000  # jobs: a page that looks at more, for those that match, does so once
INDEXED_STATUSES: Final = ("queued", "processing", "failed", "cancelled")  # statuses that have an index
BULK_ACTIONS: Final = {  # on many jobs
    "retry": "Retry",
    "force-reset": "Reset",
    "cancel": "Cancel",
    "force-fail": "Fail",
    "delete": "Delete",
}
AUDITED_ACTIONS: Final = (
    "force-fail", "force-reset", "transition", "extend-lock", "release-lock", "run-now", "update", "adopt", "cancel",
    "delete", "pause", "resume", "import", "recover-stuck", "take-back", "cleanup", "accept-clock", "backup",
    "export", "artifact", "sign-in", "sign-out",
    "resend-delivery", "resend-given-up", "test-webhook", "plan-retry", "plan-force-reset", "plan-cancel",
    "plan-force-fail", "plan-delete", "plan-recover-stuck", "plan-cleanup",
)  # fmt: skip
PAUSED_QUEUES: Final = Queues(paused=True, limit=20)  # asked by every page, so it costs by the paused queues alone
PAUSE_CHOICES: Final = (("15 minutes", "900000"), ("1 hour", "3600000"), ("4 hours", "14400000"), ("1 day", "86400000"))
MAX_SILENT_NAMES: Final = 3  # silent workers that the overview names
MAX_QUEUE_NAMES: Final = 200  # of queues that a filter offers
_HOST: Final = re.compile(r"[A-Za-z0-9.:\[\]-]{1,200}")


class AuditPageQuery(Command, frozen=True, kw_only=True):
    """A form sends fields that are empty, too: they filter nothing."""

    who: str = ""
    what: str = ""
    job_id: str = ""
    since: str = ""
    cursor: str = ""


class QueuesPageQuery(Command, frozen=True, kw_only=True):
    """`cursor`: the queue behind which the page begins."""

    cursor: QueueName | None = None


class WorkersPageQuery(Command, frozen=True, kw_only=True):
    """Cursors of the page: `cursor` of the locks, `seen` of the workers. `state` selects workers; else all not gone."""

    cursor: Cursor | None = None
    seen: WorkerCursor | None = None
    state: WorkerState | None = None


class JobPageQuery(JobCommand, frozen=True, kw_only=True):
    pass


class ConfirmPageQuery(JobCommand, frozen=True, kw_only=True):
    """`result`: which late result, for a action that is about one."""

    verb: Verb
    result: Annotated[int, Meta(ge=1)] | None = None


async def query(viewer: Viewer, *commands: Command) -> list[Any]:
    """The data of the answers; Refused where one of them is a no."""
    return [answer.data for answer in await query_responses(viewer, *commands)]


async def query_responses(viewer: Viewer, *commands: Command) -> list[Response]:
    """The answers; Refused where one of them is a no."""
    found = await asyncio.gather(*(viewer.ask(command) for command in commands))
    for answer in found:
        if isinstance(answer, ApiError):
            raise ApiException(answer)
    return [answer for answer in found if isinstance(answer, Response)]


async def overview(viewer: Viewer, recorder: Timeseries) -> PageData:
    stats: StatsView
    workers: WorkerList
    stats, workers, paused = await query(
        viewer, Stats(), Workers(state="silent", limit=MAX_SILENT_NAMES), PAUSED_QUEUES
    )
    services, now = viewer.app.services, viewer.now
    return {
        "stats": stats,
        "by_state": workers.by_state,
        "silent": workers.workers,
        "rates": recorder.rates(now),
        "since": recorder.since,
        "cleanup": services.maintainer.state(),
        "vitals": await services.metrics.vitals(),
        "disk": await services.disk_space(),
        "clock": services.clock_view(),
        "damaged": len(services.quarantine()),
        **banners(viewer, paused),
    }


def banners(viewer: Viewer, paused: QueueList) -> PageData:
    """What every page says at its top: paused queues (the answer to PAUSED), and alerts."""
    return {
        "paused": paused.queues,
        "more_paused": paused.next_cursor is not None,
        "firing": [alert for alert in viewer.app.services.alerts.evaluate() if alert.firing],
    }


async def jobs(viewer: Viewer, wanted: JobsPageQuery) -> PageData:
    shown: PageData = {"wanted": wanted, "statuses": STATUSES, "page": JobPage([], None), "error": "", "next": ""}
    shown |= {
        "filters": active_filters(wanted),
        "actions": BULK_ACTIONS if viewer.may_change else {},
        "first": "",
        "by_status": [],
    }
    shown["queues"] = [] if is_live_update(viewer.visit) else viewer.app.services.queue_names(MAX_QUEUE_NAMES)
    try:
        command = search_command(wanted, viewer.now, PER_PAGE)
    except ApiException as no:
        (paused,) = await query(viewer, PAUSED_QUEUES)
        refusal = no.error
        fault = {"error": refusal.message, "status": refusal.status, "interval_s": 0}
        return {**shown, **fault, **banners(viewer, paused)}
    found, paused = await query_responses(viewer, command, PAUSED_QUEUES)
    page: JobPage = found.data
    more = filtered_url("/jobs", wanted, cursor=page.next_cursor) if page.next_cursor else ""
    first = filtered_url("/jobs", wanted) if wanted.cursor else ""
    looks_slowly = bool(wanted.q or wanted.error)
    if page.looked_to_at and not wanted.status and not looks_slowly:
        shown["by_status"] = [
            (status, filtered_url("/jobs", replace(wanted, status=status))) for status in INDEXED_STATUSES
        ]
    looks_on = bool(more) and not page.jobs  # by itself, into the part of the page that would be renewed
    if wanted.cursor or looks_slowly or looks_on or found.scanned > MAX_SCANNED:
        shown["interval_s"] = 0  # what is older stays where it is, and looking costs
    shown |= {"page": page, "next": more, "first": first}
    return {**shown, **banners(viewer, paused.data)}


async def open_job(viewer: Viewer, wanted: JobPageQuery) -> PageData:
    """The job's page. One that is open says so when the job is gone, in place of what could be done to it."""
    try:
        return await job(viewer, wanted.id)
    except ApiException as no:
        if no.error.code != "job_not_found" or not is_live_update(viewer.visit):
            raise
    [paused] = await query(viewer, PAUSED_QUEUES)
    return {"part": "job_deleted.live.html", "job_id": wanted.id, **banners(viewer, paused)}


async def job(viewer: Viewer, job_id: str) -> PageData:
    view: JobView
    timeline: TimelineView
    why: WhyView
    late: LateResultList
    view, timeline, why, late, paused = await query(
        viewer,
        Get(id=job_id),
        Timeline(id=job_id, limit=MAX_EVENTS + 1),
        Why(id=job_id),
        LateResults(id=job_id),
        PAUSED_QUEUES,
    )
    events = timeline.events
    return {
        "job": view,
        "payload": pretty_json(Raw(b"null") if view.payload is UNSET else view.payload),
        "metadata": None if view.metadata is None else pretty_json(view.metadata),
        "events": events[::-1][:MAX_EVENTS],
        "are_older": len(events) > MAX_EVENTS,
        "why": why,
        "late": late.late_results[::-1],
        "can_adopt": viewer.may_change and is_allowed(JOB_ACTIONS["adopt"], view, viewer.now),
        "has_store": viewer.app.services.downloads.has_store,
        "actions": available_actions(view, viewer.now) if viewer.may_change else [],
        "base_url": base_url(viewer),
        "no_link_reason": partial(no_link_reason, own=own_hosts(viewer)),
        **banners(viewer, paused),
    }


def base_url(viewer: Viewer) -> str:
    """The address of this daemon as the browser knows it, fit for a command line. A look tells no Origin: whether a
    proxy before us speaks TLS is known from the sign-in.
    """
    host = viewer.visit.head.headers.get("Host", "")
    tls = is_secure(viewer.visit) or (viewer.session is not None and viewer.session.by_tls)
    return f"http{'s' if tls else ''}://{host if _HOST.fullmatch(host) else 'localhost'}"


async def confirm(viewer: Viewer, wanted: ConfirmPageQuery) -> PageData:
    found: VersionedJob
    found, paused = await query(viewer, GetVersion(id=wanted.id), PAUSED_QUEUES)
    view = found.job
    action: JobAction = JOB_ACTIONS[wanted.verb]
    late = await _late_result(viewer, wanted.id, wanted.result) if action.needs_late_result else None
    return {
        "job": view,
        "late": late,
        "late_note": await _late_note(viewer, action, view),
        "deletes_artifacts": action.verb == "delete" and viewer.app.services.downloads.has_store,
        "no_link_reason": partial(no_link_reason, own=own_hosts(viewer)),
        "curl": curl_command(
            action, ActionTarget(wanted.id, result=None if late is None else late.seq), base_url(viewer)
        ),
        "base_url": base_url(viewer),
        "action": action,
        "is_allowed": is_allowed(action, view, viewer.now),
        "version": found.version,
        **banners(viewer, paused),
    }


async def _late_note(viewer: Viewer, action: JobAction, job: JobView) -> str | None:
    """What is to be known of the job's late results before `action`; None: nothing."""
    if not (action.verb in BULK_ACTIONS and is_allowed(action, job, viewer.now)):
        return None
    count = len(await _late_results(viewer, job.id))
    if may_adopt(job.status):
        return late_results_note(action.verb, [count])
    return f"Work that came late goes with it: {count} of it." if count else None


async def _late_result(viewer: Viewer, job_id: str, seq: int | None) -> LateResultView:
    """The one that is asked for, or the latest. Refused where there is none."""
    for late in reversed(await _late_results(viewer, job_id)):
        if seq in (None, late.seq):
            return late
    raise api_error("late_result_not_found", f"Job {job_id} has no such late result (any more).")


def own_hosts(viewer: Viewer) -> set[str]:
    """The names of the host that the browser has come to, or may come to."""
    return {host_name(viewer.visit.head.headers.get("Host", "")), *(viewer.app.authenticator.hosts or ())} - {""}


async def external_url(viewer: Viewer, wanted: ArtifactRequest) -> str:
    """The `download_url` of a job or of its late result. Refused where there is none that one may be led to."""
    if wanted.late_result is None:
        view: JobView
        [view] = await query(viewer, Get(id=wanted.id))
        url = view.download_url
    else:
        late = await _late_result(viewer, wanted.id, wanted.late_result)
        url = late.download_url
    if url is None or no_link_reason(url, own_hosts(viewer)) is not None:
        raise api_error(
            "not_found", "There is no address here that leads elsewhere. See what stands on the job's page."
        )
    return url


async def _late_results(viewer: Viewer, job_id: str) -> list[LateResultView]:
    found: LateResultList
    [found] = await query(viewer, LateResults(id=job_id))
    return found.late_results


async def failures(viewer: Viewer) -> PageData:
    [paused] = await query(viewer, PAUSED_QUEUES)
    return {"found": viewer.app.services.failures.view(MAX_GROUPS), **banners(viewer, paused)}


async def queues(viewer: Viewer, recorder: Timeseries, wanted: QueuesPageQuery) -> PageData:
    """In the order of their names, which stays: a row that moves away under a finger is another queue's."""
    found: QueueList
    found, paused = await query(viewer, Queues(limit=MAX_QUEUES, cursor=wanted.cursor), PAUSED_QUEUES)
    return {
        "rows": found.queues,
        "rates": {queue.name: recorder.queue(queue.name, viewer.now) for queue in found.queues},
        "since": recorder.started,
        "next": f"/queues?{urlencode({'cursor': found.next_cursor})}" if found.next_cursor else "",
        "is_first": wanted.cursor is None,
        "cursor": wanted.cursor,
        "pause_choices": PAUSE_CHOICES,
        **banners(viewer, paused),
    }


async def workers(viewer: Viewer, wanted: WorkersPageQuery) -> PageData:
    """Two lists, each of which is walked by itself."""
    in_state = {"state": wanted.state} if wanted.state else {}
    found: WorkerList
    held: LockList
    stats: StatsView
    found, held, stats, paused = await query(
        viewer,
        Workers(limit=MAX_WORKERS, cursor=wanted.seen, state=wanted.state),
        Locks(limit=MAX_WORKERS, cursor=wanted.cursor),
        Stats(),
        PAUSED_QUEUES,
    )
    return {
        "workers": found.workers,
        "by_state": found.by_state,
        "state": wanted.state,
        "remembered_since": found.since,
        "next_workers": f"/workers?{urlencode(in_state | {'seen': found.next_cursor})}" if found.next_cursor else "",
        "are_first": wanted.seen is None,
        "locks": held.locks,
        "held": stats.by_status["processing"],
        "next": f"/workers?cursor={held.next_cursor}#h-locks" if held.next_cursor else "",
        "is_first": wanted.cursor is None,
        **banners(viewer, paused),
    }


async def cleanup(viewer: Viewer) -> PageData:
    services = viewer.app.services
    [paused] = await query(viewer, PAUSED_QUEUES)
    return {
        "state": services.maintainer.state(),
        "reports": await services.maintainer.reports(MAX_REPORTS),
        **banners(viewer, paused),
    }


async def alerts(viewer: Viewer) -> PageData:
    services = viewer.app.services
    [paused] = await query(viewer, PAUSED_QUEUES)
    damaged = services.quarantine()
    return {
        "alerts": sorted(services.alerts.evaluate(), key=lambda alert: not alert.firing),
        "health": await services.health.view(),
        "clock": services.clock_view(),
        "damaged": damaged[:MAX_QUARANTINED],
        "more_damaged": max(len(damaged) - MAX_QUARANTINED, 0),
        **banners(viewer, paused),
    }


async def audit(viewer: Viewer, wanted: AuditPageQuery) -> PageData:
    filters = {
        name: value.strip()
        for name, value in msgspec.structs.asdict(wanted).items()
        if value.strip() and name != "cursor"
    }
    shown: PageData = {
        "wanted": wanted,
        "known_actions": AUDITED_ACTIONS,
        "entries": [],
        "error": "",
        "next": "",
        "first": "",
    }
    asks: PageData = {**filters, "limit": PER_PAGE, **({"cursor": wanted.cursor} if wanted.cursor else {})}
    [paused] = await query(viewer, PAUSED_QUEUES)
    try:
        if wanted.since.strip():
            asks["since"] = parse_time_field("since", wanted.since.strip(), viewer.now)
        command = msgspec.convert(asks, AuditLog)
    except (ApiException, msgspec.ValidationError) as fault:
        no = fault.error if isinstance(fault, ApiException) else validation_error(str(fault), AuditLog).error
        return {**shown, "error": no.message, "status": no.status, "interval_s": 0, **banners(viewer, paused)}
    page: AuditEntries
    [page] = await query(viewer, command)
    shown["entries"] = page.entries
    if page.next_cursor:
        shown["next"] = f"/audit?{urlencode({**filters, 'cursor': page.next_cursor})}"
    if wanted.cursor:
        shown |= {"interval_s": 0, "first": f"/audit?{urlencode(filters)}" if filters else "/audit"}
    return {**shown, **banners(viewer, paused)}
