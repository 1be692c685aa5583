"""Read history concurrently with the batches: timelines, late results, pages of jobs and of the audit log.

A few reads run at a time. They return committed data only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import views
from jobd.core.explain import ending
from jobd.core.queries import lists_by_end, searched_status
from jobd.core.rules.late_result_rules import not_adoptable
from jobd.engine.clock import loop_time
from jobd.engine.envelope import Envelope
from jobd.engine.unread_responses import UnreadResponses
from jobd.model.commands import AuditLog, Export, ListJobs, Moment, SearchJobs
from jobd.model.errors import ApiError
from jobd.model.events import event_view
from jobd.model.job import Job, Policy, extra_keys
from jobd.model.responses import (
    AuditPage,
    AuditView,
    ExportPage,
    HistoryRead,
    JobPage,
    LateResultList,
    Response,
    TimelineView,
    WhyView,
)
from jobd.model.storage import AuditQuery, AuditRows, JobQuery, JobRows, JobStorage, LateResultQuery

log = structlog.get_logger("jobd.actor")

AT_ONCE: Final = 4
ENDING_EVENTS: Final = 100  # latest events of a finished job, of which few follow the one that ended it
SLICE: Final = 250  # rows of one query if each takes long to compare
# If few jobs match, a page is searched in slices, up to these numbers of rows and seconds.
MAX_SCANNED: Final = 2_000_000
SEARCH_S: Final = 0.5
SLOW_SEARCH_S: Final = 0.03  # if each row takes long; the client sees progress by many short pages
PAUSES_AFTER_S: Final = 0.05  # after this time, a pause precedes each slice and leaves the disk to others half the time
PAUSE_S: Final = 0.002


class HistoryReader:
    """Serve the reads of history that the actor has decided."""

    def __init__(self, disk: JobStorage, moment: Callable[[], Moment], unread: UnreadResponses) -> None:
        self._disk = disk
        self._unread = unread
        self._moment = moment
        self.reads: set[asyncio.Task[None]] = set()  # in progress
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._long_searches = asyncio.Semaphore(1)  # searches of more than a slice delay only each other

    def start(self, envelope: Envelope, response: Response, policy: Policy) -> None:
        """Start a read that sends its response. Batches continue meanwhile."""
        assert response.read is not None
        task = asyncio.create_task(self._run(envelope, response, response.read, policy))
        self.reads.add(task)
        task.add_done_callback(self.reads.discard)

    async def finish(self) -> None:
        """Wait until all reads have ended."""
        while self.reads:
            await asyncio.wait(self.reads)

    async def _run(self, envelope: Envelope, response: Response, read: HistoryRead, policy: Policy) -> None:
        try:
            if read.page is not None:
                page = await self._find_page(_query(read.page))
                response.data, response.scanned = self._shown(page, policy, admin=envelope.admin), page.scanned
            elif read.ended is not None:
                response.data = await self._with_ending(response.data, read.ended)
            else:
                async with self._slots:
                    response.data = await self._read(read, policy)
        except Exception:
            log.exception("history_failed", command=type(envelope.command).__name__)
            envelope.reply(ApiError("internal_error", "Reading the history failed. See the log for details."))
            return
        envelope.reply(self._unread.reject(envelope.command) or response)

    async def _read(self, read: HistoryRead, policy: Policy) -> TimelineView | LateResultList | ExportPage | AuditPage:
        if read.timeline is not None:
            return TimelineView([event_view(event) for event in await self._disk.timeline(read.timeline, read.events)])
        if read.export is not None:
            return _export_page(await self._disk.find_jobs(_from(read.export)))
        if read.late is not None:
            known = await self._disk.read_late_results([LateResultQuery(read.late, with_results=True)])
            found = known.results.get(read.late, [])
            return LateResultList([views.late_view(late, not_adoptable(late, policy)) for late in found])
        assert read.audit is not None
        return _audit_page(await self._disk.read_audit(_audit_query(read.audit)))

    async def _with_ending(self, why: WhyView, job: Job) -> WhyView:
        """Return `why` with the cause of the ending, which only the timeline has."""
        async with self._slots:
            return replace(why, because=ending(job, await self._disk.timeline(job.seq, ENDING_EVENTS)))

    async def _find_page(self, query: JobQuery) -> JobRows:
        """Return a page, read in slices so that no batch waits for more than one."""
        began_s, limit_s = loop_time(), SLOW_SEARCH_S if query.is_slow else SEARCH_S
        page, size = JobRows([], query.before, next_end=query.before_end), 0
        slots = self._slots
        while True:
            left = replace(
                query,
                before=page.next_before,
                before_end=page.next_end,
                limit=query.limit - len(page.jobs),
                scan=SLICE if query.is_slow else query.scan,
                payload_bytes=query.payload_bytes - size,
            )
            async with slots:
                if slots is self._long_searches and loop_time() - began_s >= PAUSES_AFTER_S:
                    await asyncio.sleep(PAUSE_S)
                part = await self._disk.find_jobs(left)
            part.jobs, part.scanned = page.jobs + part.jobs, page.scanned + part.scanned
            part.bodies |= page.bodies
            page = part
            if page.scanned_until is None or page.scanned >= MAX_SCANNED or loop_time() - began_s >= limit_s:
                return page
            size = sum(len(payload) for _, payload in page.jobs)
            slots = self._long_searches

    def _shown(self, page: JobRows, policy: Policy, *, admin: bool) -> JobPage:
        at = self._moment()
        shown = [views.job_view(job, at, policy, admin=admin, payload=Raw(payload)) for job, payload in page.jobs]
        for (job, _), view in zip(page.jobs, shown, strict=True):
            for key in extra_keys(job) if page.bodies else ():
                setattr(view, *views.body_field(key, page.bodies[key]))
        return JobPage(shown, _cursor(page), page.scanned_until)


def _query(command: ListJobs) -> JobQuery:
    end, _, before = (command.cursor or "").rpartition(".")
    query = JobQuery(
        searched_status(command),
        command.queue,
        command.kind,
        command.worker,
        command.limit,
        before=int(before) if before else None,
        by_end=lists_by_end(command),
        before_end=int(end) if end else None,
    )
    if isinstance(command, SearchJobs):
        query = replace(
            query,
            since=command.since,
            until=command.until,
            finished_since=command.finished_since,
            finished_until=command.finished_until,
            text=command.text,
            error=command.error,
        )
    return query


def _from(command: Export) -> JobQuery:
    after = 0 if command.cursor is None else int(command.cursor)
    return JobQuery(command.status, command.queue, command.kind, limit=command.limit, after=after)


def _export_page(page: JobRows) -> ExportPage:
    return ExportPage([views.as_import(job, Raw(payload), page.bodies) for job, payload in page.jobs], _cursor(page))


def _audit_query(log: AuditLog) -> AuditQuery:
    before = None if log.cursor is None else int(log.cursor)
    return AuditQuery(log.who, log.action, log.job_id, log.since, log.limit, before)


def _audit_page(found: AuditRows) -> AuditPage:
    entries = [
        AuditView(
            seq=seq,
            at=row.at,
            who=row.who,
            address=row.address,
            action=row.what,
            job_id=row.job_id,
            queue=row.queue,
            reason=row.reason,
            outcome=row.outcome,
            changed=row.jobs,
            details=row.details or {},
        )
        for seq, row in found.found
    ]
    return AuditPage(entries, _cursor(found))


def _cursor(page: JobRows | AuditRows) -> str | None:
    if page.next_before is None:
        return None
    end = page.next_end if isinstance(page, JobRows) else None
    return str(page.next_before) if end is None else f"{end}.{page.next_before}"
