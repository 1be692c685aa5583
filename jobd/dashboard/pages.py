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

from jobd.api.downloads import Artifact
from jobd.dashboard.context import Guest, is_renewal, is_secure
from jobd.dashboard.filters import JobsPage, address, given, moment_of, search
from jobd.dashboard.job_actions import DEEDS, Chosen, Deed, Verb, can, curl, open_to
from jobd.dashboard.rendering import pretty
from jobd.dashboard.urls import why_no_link
from jobd.http.auth import host_name
from jobd.http.decoding import explain
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
from jobd.monitoring.timeseries import Recorder

Shown = dict[str, Any]

PER_PAGE: Final = 50
MOST_ROWS: Final = 200  # of damaged jobs
MOST_QUEUES: Final = 100
MOST_HELD: Final = 50  # of workers and of locks
MOST_EVENTS: Final = 200
MOST_REPORTS: Final = 50
MOST_GROUPS: Final = 100  # of failures
LOOKED_FAR: Final = 50_000  # jobs: a page that looks at more, for those that match, does so once
AT_ONCE: Final = ("queued", "processing", "failed", "cancelled")  # statuses that have an index
ACTIONS: Final = {  # on many jobs
    "retry": "Retry",
    "force-reset": "Reset",
    "cancel": "Cancel",
    "force-fail": "Fail",
    "delete": "Delete",
}
DEEDS_KEPT: Final = (
    "force-fail", "force-reset", "transition", "extend-lock", "release-lock", "run-now", "update", "adopt", "cancel",
    "delete", "pause", "resume", "import", "recover-stuck", "take-back", "cleanup", "accept-clock", "backup",
    "export", "artifact", "sign-in", "sign-out",
    "resend-delivery", "resend-given-up", "test-webhook", "plan-retry", "plan-force-reset", "plan-cancel",
    "plan-force-fail", "plan-delete", "plan-recover-stuck", "plan-cleanup",
)  # fmt: skip
PAUSED: Final = Queues(paused=True, limit=20)  # asked by every page, so it costs by the paused queues alone
PAUSE_CHOICES: Final = (("15 minutes", "900000"), ("1 hour", "3600000"), ("4 hours", "14400000"), ("1 day", "86400000"))
SILENT_NAMED: Final = 3  # silent workers that the overview names
MOST_NAMES: Final = 200  # of queues that a filter offers
_HOST: Final = re.compile(r"[A-Za-z0-9.:\[\]-]{1,200}")


class AuditPage(Command, frozen=True, kw_only=True):
    """A form sends fields that are empty, too: they filter nothing."""

    who: str = ""
    what: str = ""
    job_id: str = ""
    since: str = ""
    cursor: str = ""


class QueuesPage(Command, frozen=True, kw_only=True):
    """`cursor`: the queue behind which the page begins."""

    cursor: QueueName | None = None


class WorkersPage(Command, frozen=True, kw_only=True):
    """Cursors of the page: `cursor` of the locks, `seen` of the workers. `state` selects workers; else all not gone."""

    cursor: Cursor | None = None
    seen: WorkerCursor | None = None
    state: WorkerState | None = None


class OneJob(JobCommand, frozen=True, kw_only=True):
    pass


class ConfirmPage(JobCommand, frozen=True, kw_only=True):
    """`result`: which late result, for a deed that is about one."""

    verb: Verb
    result: Annotated[int, Meta(ge=1)] | None = None


async def query(guest: Guest, *commands: Command) -> list[Any]:
    """The data of the answers; Refused where one of them is a no."""
    return [answer.data for answer in await query_responses(guest, *commands)]


async def query_responses(guest: Guest, *commands: Command) -> list[Response]:
    """The answers; Refused where one of them is a no."""
    found = await asyncio.gather(*(guest.ask(command) for command in commands))
    for answer in found:
        if isinstance(answer, ApiError):
            raise ApiException(answer)
    return [answer for answer in found if isinstance(answer, Response)]


async def overview(guest: Guest, recorder: Recorder) -> Shown:
    stats: StatsView
    workers: WorkerList
    stats, workers, paused = await query(guest, Stats(), Workers(state="silent", limit=SILENT_NAMED), PAUSED)
    rooms, now = guest.site.rooms, guest.now
    return {
        "stats": stats,
        "by_state": workers.by_state,
        "silent": workers.workers,
        "rates": recorder.rates(now),
        "since": recorder.since,
        "cleanup": rooms.cleanup_state(),
        "vitals": await rooms.vitals(),
        "disk": await rooms.disk_space(),
        "clock": rooms.clock(),
        "damaged": len(rooms.quarantine()),
        **strip(guest, paused),
    }


def strip(guest: Guest, paused: QueueList) -> Shown:
    """What every page says at its top: paused queues (the answer to PAUSED), and alerts."""
    return {
        "paused": paused.queues,
        "more_paused": paused.next_cursor is not None,
        "firing": [alert for alert in guest.site.rooms.alerts() if alert.firing],
    }


async def jobs(guest: Guest, wanted: JobsPage) -> Shown:
    shown: Shown = {"wanted": wanted, "statuses": STATUSES, "page": JobPage([], None), "fault": "", "next": ""}
    shown |= {"filters": given(wanted), "actions": ACTIONS if guest.may_change else {}, "first": "", "by_status": []}
    shown["queues"] = [] if is_renewal(guest.visit) else guest.site.rooms.queue_names(MOST_NAMES)
    try:
        command = search(wanted, guest.now, PER_PAGE)
    except ApiException as no:
        (paused,) = await query(guest, PAUSED)
        refusal = no.error
        fault = {"fault": refusal.message, "status": refusal.status, "every_s": 0}
        return {**shown, **fault, **strip(guest, paused)}
    found, paused = await query_responses(guest, command, PAUSED)
    page: JobPage = found.data
    more = address("/jobs", wanted, cursor=page.next_cursor) if page.next_cursor else ""
    first = address("/jobs", wanted) if wanted.cursor else ""
    looks_slowly = bool(wanted.q or wanted.error)
    if page.looked_to_at and not wanted.status and not looks_slowly:
        shown["by_status"] = [(status, address("/jobs", replace(wanted, status=status))) for status in AT_ONCE]
    looks_on = bool(more) and not page.jobs  # by itself, into the part of the page that would be renewed
    if wanted.cursor or looks_slowly or looks_on or found.scanned > LOOKED_FAR:
        shown["every_s"] = 0  # what is older stays where it is, and looking costs
    shown |= {"page": page, "next": more, "first": first}
    return {**shown, **strip(guest, paused.data)}


async def open_job(guest: Guest, wanted: OneJob) -> Shown:
    """The job's page. One that is open says so when the job is gone, in place of what could be done to it."""
    try:
        return await job(guest, wanted.id)
    except ApiException as no:
        if no.error.code != "job_not_found" or not is_renewal(guest.visit):
            raise
    [paused] = await query(guest, PAUSED)
    return {"part": "job_gone.live.html", "job_id": wanted.id, **strip(guest, paused)}


async def job(guest: Guest, job_id: str) -> Shown:
    view: JobView
    timeline: TimelineView
    why: WhyView
    late: LateResultList
    view, timeline, why, late, paused = await query(
        guest,
        Get(id=job_id),
        Timeline(id=job_id, limit=MOST_EVENTS + 1),
        Why(id=job_id),
        LateResults(id=job_id),
        PAUSED,
    )
    events = timeline.events
    return {
        "job": view,
        "payload": pretty(Raw(b"null") if view.payload is UNSET else view.payload),
        "metadata": None if view.metadata is None else pretty(view.metadata),
        "events": events[::-1][:MOST_EVENTS],
        "are_older": len(events) > MOST_EVENTS,
        "why": why,
        "late": late.late_results[::-1],
        "can_adopt": guest.may_change and can(DEEDS["adopt"], view, guest.now),
        "has_store": guest.site.rooms.has_artifacts(),
        "deeds": open_to(view, guest.now) if guest.may_change else [],
        "base": base_url(guest),
        "no_link": partial(why_no_link, own=own_hosts(guest)),
        **strip(guest, paused),
    }


def base_url(guest: Guest) -> str:
    """The address of this daemon as the browser knows it, fit for a command line. A look tells no Origin: whether a
    proxy before us speaks TLS is known from the sign-in.
    """
    host = guest.visit.head.headers.get("Host", "")
    tls = is_secure(guest.visit) or (guest.session is not None and guest.session.by_tls)
    return f"http{'s' if tls else ''}://{host if _HOST.fullmatch(host) else 'localhost'}"


async def confirm(guest: Guest, wanted: ConfirmPage) -> Shown:
    found: VersionedJob
    found, paused = await query(guest, GetVersion(id=wanted.id), PAUSED)
    view = found.job
    deed: Deed = DEEDS[wanted.verb]
    late = await _late_result(guest, wanted.id, wanted.result) if deed.wants_result else None
    return {
        "job": view,
        "late": late,
        "late_note": await _late_note(guest, deed, view),
        "goes_too": deed.verb == "delete" and guest.site.rooms.has_artifacts(),
        "no_link": partial(why_no_link, own=own_hosts(guest)),
        "curl": curl(deed, Chosen(wanted.id, result=None if late is None else late.seq), base_url(guest)),
        "base": base_url(guest),
        "deed": deed,
        "can": can(deed, view, guest.now),
        "seen": found.version,
        **strip(guest, paused),
    }


async def _late_note(guest: Guest, deed: Deed, job: JobView) -> str | None:
    """What is to be known of the job's late results before `deed`; None: nothing."""
    if not (deed.verb in ACTIONS and can(deed, job, guest.now)):
        return None
    count = len(await _late_results(guest, job.id))
    if may_adopt(job.status):
        return late_results_note(deed.verb, [count])
    return f"Work that came late goes with it: {count} of it." if count else None


async def _late_result(guest: Guest, job_id: str, seq: int | None) -> LateResultView:
    """The one that is asked for, or the latest. Refused where there is none."""
    for late in reversed(await _late_results(guest, job_id)):
        if seq in (None, late.seq):
            return late
    raise api_error("late_result_not_found", f"Job {job_id} has no such late result (any more).")


def own_hosts(guest: Guest) -> set[str]:
    """The names of the host that the browser has come to, or may come to."""
    return {host_name(guest.visit.head.headers.get("Host", "")), *(guest.site.gate.hosts or ())} - {""}


async def elsewhere(guest: Guest, wanted: Artifact) -> str:
    """The `download_url` of a job or of its late result. Refused where there is none that one may be led to."""
    if wanted.late_result is None:
        view: JobView
        [view] = await query(guest, Get(id=wanted.id))
        url = view.download_url
    else:
        late = await _late_result(guest, wanted.id, wanted.late_result)
        url = late.download_url
    if url is None or why_no_link(url, own_hosts(guest)) is not None:
        raise api_error(
            "not_found", "There is no address here that leads elsewhere. See what stands on the job's page."
        )
    return url


async def _late_results(guest: Guest, job_id: str) -> list[LateResultView]:
    found: LateResultList
    [found] = await query(guest, LateResults(id=job_id))
    return found.late_results


async def failures(guest: Guest) -> Shown:
    [paused] = await query(guest, PAUSED)
    return {"found": guest.site.rooms.failures(MOST_GROUPS), **strip(guest, paused)}


async def queues(guest: Guest, recorder: Recorder, wanted: QueuesPage) -> Shown:
    """In the order of their names, which stays: a row that moves away under a finger is another queue's."""
    found: QueueList
    found, paused = await query(guest, Queues(limit=MOST_QUEUES, cursor=wanted.cursor), PAUSED)
    return {
        "rows": found.queues,
        "rates": {queue.name: recorder.queue(queue.name, guest.now) for queue in found.queues},
        "since": recorder.started,
        "next": f"/queues?{urlencode({'cursor': found.next_cursor})}" if found.next_cursor else "",
        "is_first": wanted.cursor is None,
        "cursor": wanted.cursor,
        "pause_choices": PAUSE_CHOICES,
        **strip(guest, paused),
    }


async def workers(guest: Guest, wanted: WorkersPage) -> Shown:
    """Two lists, each of which is walked by itself."""
    in_state = {"state": wanted.state} if wanted.state else {}
    found: WorkerList
    held: LockList
    stats: StatsView
    found, held, stats, paused = await query(
        guest,
        Workers(limit=MOST_HELD, cursor=wanted.seen, state=wanted.state),
        Locks(limit=MOST_HELD, cursor=wanted.cursor),
        Stats(),
        PAUSED,
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
        **strip(guest, paused),
    }


async def cleanup(guest: Guest) -> Shown:
    rooms = guest.site.rooms
    [paused] = await query(guest, PAUSED)
    return {"state": rooms.cleanup_state(), "reports": await rooms.reports(MOST_REPORTS), **strip(guest, paused)}


async def alerts(guest: Guest) -> Shown:
    rooms = guest.site.rooms
    [paused] = await query(guest, PAUSED)
    damaged = rooms.quarantine()
    return {
        "alerts": sorted(rooms.alerts(), key=lambda alert: not alert.firing),
        "health": await rooms.health(),
        "clock": rooms.clock(),
        "damaged": damaged[:MOST_ROWS],
        "more_damaged": max(len(damaged) - MOST_ROWS, 0),
        **strip(guest, paused),
    }


async def audit(guest: Guest, wanted: AuditPage) -> Shown:
    filters = {
        name: value.strip()
        for name, value in msgspec.structs.asdict(wanted).items()
        if value.strip() and name != "cursor"
    }
    shown: Shown = {"wanted": wanted, "deeds": DEEDS_KEPT, "entries": [], "fault": "", "next": "", "first": ""}
    asks: Shown = {**filters, "limit": PER_PAGE, **({"cursor": wanted.cursor} if wanted.cursor else {})}
    [paused] = await query(guest, PAUSED)
    try:
        if wanted.since.strip():
            asks["since"] = moment_of("since", wanted.since.strip(), guest.now)
        command = msgspec.convert(asks, AuditLog)
    except (ApiException, msgspec.ValidationError) as fault:
        no = fault.error if isinstance(fault, ApiException) else explain(str(fault), AuditLog).error
        return {**shown, "fault": no.message, "status": no.status, "every_s": 0, **strip(guest, paused)}
    page: AuditEntries
    [page] = await query(guest, command)
    shown["entries"] = page.entries
    if page.next_cursor:
        shown["next"] = f"/audit?{urlencode({**filters, 'cursor': page.next_cursor})}"
    if wanted.cursor:
        shown |= {"every_s": 0, "first": f"/audit?{urlencode(filters)}" if filters else "/audit"}
    return {**shown, **strip(guest, paused)}
