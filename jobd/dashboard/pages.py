"""Load the data of each page: send queries to the actor, and arrange the responses for the templates.

Every list is bounded, and its page says if there are more items.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from functools import partial
from itertools import islice
from typing import Annotated, Any, Final
from urllib.parse import urlencode

import msgspec
from msgspec import UNSET, Meta, Raw
from msgspec.structs import replace

from jobd.api.auditing import check_audit_filter
from jobd.api.explanations import whole_explanation, whole_queue_explanation
from jobd.core.queries import lists_by_end
from jobd.dashboard.context import Viewer, is_live_update, is_secure
from jobd.dashboard.filters import (
    JobsPageQuery,
    active_filters,
    convert_fields,
    filtered_url,
    parse_time_field,
    search_command,
)
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
from jobd.model import commands, responses
from jobd.model.commands import Command, JobCommand, WorkerState
from jobd.model.errors import ApiException, api_error, checked
from jobd.model.fields import Cursor, QueueName, WorkerCursor
from jobd.model.job import STATUSES, may_adopt
from jobd.model.problems import Problem, ProblemList
from jobd.model.requests import ArtifactRequest
from jobd.model.responses import Response
from jobd.model.storage import IN_MEMORY

PageData = dict[str, Any]

PER_PAGE: Final = 50
MAX_QUARANTINED: Final = 200
MAX_QUEUES: Final = 100
MAX_WORKERS: Final = 50  # and locks
MAX_EVENTS: Final = 200
MAX_REPORTS: Final = 50
MAX_GROUPS: Final = 100  # failure groups
MAX_SCANNED: Final = 50_000  # jobs; a page whose search scans more is not updated automatically
INDEXED_STATUSES: Final = ("queued", "processing", "failed", "cancelled")
BULK_ACTIONS: Final = {verb: action.label for verb, action in JOB_ACTIONS.items() if verb in commands.PLAN_COMMANDS}
PAUSE_CHOICES: Final = (("15 minutes", "900000"), ("1 hour", "3600000"), ("4 hours", "14400000"), ("1 day", "86400000"))
MAX_SILENT_NAMES: Final = 3  # silent workers named in the overview
MAX_QUEUE_NAMES: Final = 200  # queues suggested in a filter
_HOST: Final = re.compile(r"[A-Za-z0-9.:\[\]-]{1,200}")


class AuditPageQuery(Command, frozen=True, kw_only=True):
    """Filters of the audit log. Empty fields do not filter."""

    who: str = ""
    action: str = ""
    job_id: str = ""
    since: str = ""
    cursor: str = ""


class QueuesPageQuery(Command, frozen=True, kw_only=True):
    """`cursor` is the name of the queue before the page."""

    cursor: QueueName | None = None


class WorkersPageQuery(Command, frozen=True, kw_only=True):
    """`cursor` is that of the locks, `seen` that of the workers. Without `state`, workers that are not gone."""

    cursor: Cursor | None = None
    seen: WorkerCursor | None = None
    state: WorkerState | None = None


class ConfirmPageQuery(JobCommand, frozen=True, kw_only=True):
    """`result` is the number of the late result, for an action on one."""

    verb: Verb
    result: Annotated[int, Meta(ge=1)] | None = None


async def query(viewer: Viewer, *queries: Command) -> list[Any]:
    """Send commands, and return the data of their responses. Raise ApiException if one fails."""
    return [response.data for response in await query_responses(viewer, *queries)]


async def query_responses(viewer: Viewer, *queries: Command) -> list[Response]:
    """Send commands, and return their responses. Raise ApiException if one fails."""
    return [checked(each) for each in await asyncio.gather(*(viewer.ask(each) for each in queries))]


async def overview(viewer: Viewer, _: Command) -> PageData:
    stats: responses.StatsView
    workers: responses.WorkerList
    stats, workers = await query(viewer, commands.Stats(), commands.Workers(state="silent", limit=MAX_SILENT_NAMES))
    services, now = viewer.app.services, viewer.now
    groups: dict[str, list[Problem]] = {}
    for each in services.problems.view().problems:
        groups.setdefault(each.condition, []).append(each)
    return {
        "stats": stats,
        "problem_groups": list(groups.items()),
        "by_state": workers.by_state,
        "silent": workers.workers,
        "rates": services.timeseries.rates(now),
        "since": services.timeseries.since,
        "cleanup": services.maintainer.state(),
        "vitals": await services.metrics.vitals(),
        "disk": await services.disk_space(),
        "stored": services.disk_sampler.recent(),
        "is_in_memory": services.store == IN_MEMORY,
        "clock": services.clock_view(),
        "quarantined": len(services.quarantine()),
    }


def header(viewer: Viewer) -> PageData:
    """Return the data of the header on every page: the problems. A standby knows none."""
    services = viewer.app.services
    is_standby = services.cluster_view().role == "standby"
    return {
        "problems": ProblemList([]) if is_standby else services.problems.view(),
        "is_fragment": is_live_update(viewer.context),
    }


async def jobs(viewer: Viewer, request: JobsPageQuery) -> PageData:
    data: PageData = {
        "form": request,
        "statuses": STATUSES,
        "page": responses.JobPage([], None),
        "filters": active_filters(request),
        "actions": BULK_ACTIONS if viewer.may_change else {},
        "by_status": [],
        "is_by_end": False,
        "error": "",
        "next": "",
        "first": "",
    }
    names = viewer.app.services.actor.state.queue_names
    data["queues"] = [] if is_live_update(viewer.context) else list(islice(names, MAX_QUEUE_NAMES))
    try:
        command = search_command(request, viewer.now, PER_PAGE)
    except ApiException as exception:
        return {**data, "error": exception.error.message, "status": exception.error.status, "interval_s": 0}
    [response] = await query_responses(viewer, command)
    page: responses.JobPage = response.data
    data["is_by_end"] = lists_by_end(command)
    next_url = filtered_url("/jobs", request, cursor=page.next_cursor) if page.next_cursor else ""
    first = filtered_url("/jobs", request) if request.cursor else ""
    is_slow = bool(request.text or request.error)
    if page.searched_to_at and not request.status and not is_slow:
        data["by_status"] = [
            (status, filtered_url("/jobs", replace(request, status=status))) for status in INDEXED_STATUSES
        ]
    continues = bool(next_url) and not page.jobs  # the page loads the next one into its live region
    if request.cursor or is_slow or continues or response.scanned > MAX_SCANNED:
        data["interval_s"] = 0  # older pages do not change, and scans are expensive
    return {**data, "page": page, "next": next_url, "first": first}


async def open_job(viewer: Viewer, request: JobCommand) -> PageData:
    """Show a job. If it is deleted while its page is open, the page says so."""
    try:
        return await job(viewer, request.id)
    except ApiException as exception:
        if exception.error.code != "job_not_found" or not is_live_update(viewer.context):
            raise
    return {"part": "job_deleted.live.html", "job_id": request.id}


async def job(viewer: Viewer, job_id: str) -> PageData:
    view: responses.JobView
    timeline: responses.TimelineView
    why: responses.WhyView
    late: responses.LateResultList
    view, timeline, why, late = await query(
        viewer,
        commands.Get(id=job_id),
        commands.Timeline(id=job_id, limit=MAX_EVENTS + 1),
        commands.Why(id=job_id),
        commands.LateResults(id=job_id),
    )
    events = timeline.events
    return {
        "job": view,
        "payload": pretty_json(Raw(b"null") if view.payload is UNSET else view.payload),
        "headers": view.headers or {},
        "checkpoint": None if view.checkpoint is UNSET else pretty_json(view.checkpoint),
        "metadata": None if view.metadata is None else pretty_json(view.metadata),
        "events": events[::-1][:MAX_EVENTS],
        "has_older_events": len(events) > MAX_EVENTS,
        "why": await whole_explanation(viewer.app, job_id, why),
        "output": await _output(viewer, view),
        "output_failure": viewer.app.services.outputs.file.failure,
        "late_results": late.late_results[::-1],
        "can_adopt": viewer.may_change and is_allowed(JOB_ACTIONS["adopt"], view, viewer.now),
        "has_artifacts": viewer.app.services.downloads.has_store,
        "actions": available_actions(view, viewer.now) if viewer.may_change else [],
        "base_url": base_url(viewer),
        "no_link_reason": partial(no_link_reason, own=own_hosts(viewer)),
    }


async def _output(viewer: Viewer, job: responses.JobView) -> list[responses.GrantOutput]:
    """Return what the job printed, the latest grant first. If it cannot be read, the file has a `failure`."""
    outputs = viewer.app.services.outputs
    with contextlib.suppress(ApiException):
        return (await outputs.read(job, None))[0][::-1] if outputs.file.limit_bytes else []
    return []


def base_url(viewer: Viewer) -> str:
    """Return the URL of this daemon as the browser sees it, for use in a command line.

    A GET has no Origin header, so the session remembers from the sign-in whether a proxy uses TLS.
    """
    host = viewer.context.header("host")
    tls = is_secure(viewer.context) or (viewer.session is not None and viewer.session.by_tls)
    return f"http{'s' if tls else ''}://{host if _HOST.fullmatch(host) else 'localhost'}"


async def confirm(viewer: Viewer, request: ConfirmPageQuery) -> PageData:
    view: responses.JobView
    action = JOB_ACTIONS[request.verb]
    [view] = await query(viewer, commands.GetVersion(id=request.id))
    payload = (await query(viewer, commands.Get(id=request.id)))[0].payload if action.verb == "copy" else UNSET
    late = await _late_result(viewer, request.id, request.result) if action.needs_late_result else None
    return {
        "job": view,
        "late": late,
        "payload": ("", 0) if payload is UNSET else pretty_json(payload),
        "late_note": await _late_note(viewer, action, view),
        "deletes_artifacts": action.verb == "delete" and viewer.app.services.downloads.has_store,
        "no_link_reason": partial(no_link_reason, own=own_hosts(viewer)),
        "curl": curl_command(
            action, ActionTarget(request.id, result=None if late is None else late.seq), base_url(viewer)
        ),
        "base_url": base_url(viewer),
        "action": action,
        "is_allowed": is_allowed(action, view, viewer.now),
    }


async def _late_note(viewer: Viewer, action: JobAction, job: responses.JobView) -> str | None:
    """Return a warning about the job's late results before `action`, None if there is none."""
    if not (action.verb in BULK_ACTIONS and is_allowed(action, job, viewer.now)):
        return None
    count = len(await _late_results(viewer, job.id))
    if may_adopt(job.status):
        return responses.late_results_note(action.verb, [count])
    return f"Late results are deleted with it: {count}." if count else None


async def _late_result(viewer: Viewer, job_id: str, seq: int | None) -> responses.LateResultView:
    """Return the late result with this number, or the latest. Raise 404 if there is none."""
    for late in reversed(await _late_results(viewer, job_id)):
        if seq in (None, late.seq):
            return late
    raise api_error("late_result_not_found", f"Job {job_id} has no such late result, or no longer has it.")


def own_hosts(viewer: Viewer) -> set[str]:
    """Return the host names under which browsers reach this daemon."""
    return {host_name(viewer.context.header("host")), *(viewer.app.authenticator.hosts or ())} - {""}


async def external_url(viewer: Viewer, request: ArtifactRequest) -> str:
    """Return the `download_url` of a job or of its late result. Raise 404 if there is none or it may not be a link."""
    if request.late_result is None:
        view: responses.JobView
        [view] = await query(viewer, commands.Get(id=request.id))
        url = view.download_url
    else:
        late = await _late_result(viewer, request.id, request.late_result)
        url = late.download_url
    if url is None or no_link_reason(url, own_hosts(viewer)) is not None:
        raise api_error("not_found", "This job has no external link. See its page for the result.")
    return url


async def _late_results(viewer: Viewer, job_id: str) -> list[responses.LateResultView]:
    late: responses.LateResultList
    [late] = await query(viewer, commands.LateResults(id=job_id))
    return late.late_results


async def failures(viewer: Viewer, _: Command) -> PageData:
    return {"failures": viewer.app.services.failures.view(MAX_GROUPS)}


async def queues(viewer: Viewer, request: QueuesPageQuery) -> PageData:
    """Show queues by name, so that rows do not move under the pointer."""
    listed: responses.QueueList
    [listed] = await query(viewer, commands.Queues(limit=MAX_QUEUES, cursor=request.cursor))
    timeseries = viewer.app.services.timeseries
    return {
        "queues": listed.queues,
        "rates": {queue.name: timeseries.queue(queue.name, viewer.now) for queue in listed.queues},
        "since": timeseries.started,
        "next": f"/queues?{urlencode({'cursor': listed.next_cursor})}" if listed.next_cursor else "",
        "is_first": request.cursor is None,
        "cursor": request.cursor,
        "pause_choices": PAUSE_CHOICES,
    }


async def queue(viewer: Viewer, request: commands.WhyQueue) -> PageData:
    """Show why the due jobs of a queue wait."""
    [view] = await query(viewer, request)
    return {"queue": await whole_queue_explanation(viewer.app, view)}


async def workers(viewer: Viewer, request: WorkersPageQuery) -> PageData:
    """Show two lists, workers and locks, each with its own cursor."""
    state_filter = {"state": request.state} if request.state else {}
    workers: responses.WorkerList
    locks: responses.LockList
    stats: responses.StatsView
    rules: responses.QuietRuleList
    workers, locks, stats, rules = await query(
        viewer,
        commands.Workers(limit=MAX_WORKERS, cursor=request.seen, state=request.state),
        commands.Locks(limit=MAX_WORKERS, cursor=request.cursor),
        commands.Stats(),
        commands.QuietRules(),
    )
    return {
        "quiet_rules": rules.rules,
        "workers": workers.workers,
        "by_state": workers.by_state,
        "groups": workers.groups,
        "state": request.state,
        "since": workers.since,
        "next_workers": f"/workers?{urlencode(state_filter | {'seen': workers.next_cursor})}"
        if workers.next_cursor
        else "",
        "is_first_workers": request.seen is None,
        "locks": locks.locks,
        "processing": stats.by_status["processing"],
        "next_locks": f"/workers?cursor={locks.next_cursor}#h-locks" if locks.next_cursor else "",
        "is_first_locks": request.cursor is None,
    }


async def cleanup(viewer: Viewer, _: Command) -> PageData:
    maintainer = viewer.app.services.maintainer
    return {"state": maintainer.state(), "reports": await maintainer.reports(MAX_REPORTS)}


async def alerts(viewer: Viewer, _: Command) -> PageData:
    services = viewer.app.services
    quarantined = services.quarantine()
    return {
        "alerts": sorted(services.problems.alerts(), key=lambda alert: not alert.firing),
        "health": await services.health.view(),
        "clock": services.clock_view(),
        "quarantined": quarantined[:MAX_QUARANTINED],
        "more_quarantined": max(len(quarantined) - MAX_QUARANTINED, 0),
    }


async def audit(viewer: Viewer, request: AuditPageQuery) -> PageData:
    filters = {
        name: value.strip()
        for name, value in msgspec.structs.asdict(request).items()
        if value.strip() and name != "cursor"
    }
    data: PageData = {
        "form": request,
        "known_actions": commands.AUDITED_ACTIONS,
        "entries": [],
        "error": "",
        "next": "",
        "first": "",
    }
    fields: PageData = {**filters, "limit": PER_PAGE, **({"cursor": request.cursor} if request.cursor else {})}
    try:
        if request.since.strip():
            fields["since"] = parse_time_field("since", request.since.strip(), viewer.now)
        command = convert_fields(fields, commands.AuditLog)
        check_audit_filter(command)
    except ApiException as exception:
        return {**data, "error": exception.error.message, "status": exception.error.status, "interval_s": 0}
    page: responses.AuditPage
    [page] = await query(viewer, command)
    data["entries"] = page.entries
    if page.next_cursor:
        data["next"] = f"/audit?{urlencode({**filters, 'cursor': page.next_cursor})}"
    if request.cursor:
        data |= {"interval_s": 0, "first": f"/audit?{urlencode(filters)}" if filters else "/audit"}
    return data
