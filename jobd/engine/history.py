"""Read history beside the batches: timelines, late results, pages of jobs and of the audit log.

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
from jobd.core.late_result_rules import refuse_adoption
from jobd.engine.mailbox import Envelope
from jobd.model.commands import AuditLog, Export, ListJobs, Moment, SearchJobs
from jobd.model.errors import ApiError
from jobd.model.events import event_view
from jobd.model.job import Job, Policy
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
SINCE_THE_END: Final = 100  # of a finished job's latest events: few come after that which ended it
SLICE: Final = 250  # rows that are compared in one go where that takes its time
# Where few jobs match, a page is looked for slice by slice, until so many rows or so much time are spent.
MOST_LOOKED: Final = 2_000_000
PATIENCE_S: Final = 0.5
SLOW_PATIENCE_S: Final = 0.03  # where each row takes its time there may be no end: many quick pages tell how it goes
EAGER_S: Final = (
    0.05  # from then on a pause comes before each slice: all who look far leave the disk to others half the time
)
PAUSE_S: Final = 0.002


class History:
    """Answers what the actor decided to be a look."""

    def __init__(self, disk: JobStorage, moment: Callable[[], Moment]) -> None:
        self._disk = disk
        self._moment = moment
        self.reads: set[asyncio.Task[None]] = set()  # in progress
        self._places = asyncio.Semaphore(AT_ONCE)
        self._far = asyncio.Semaphore(1)  # who looks further than a slice holds up nobody but those who do, too

    def start(self, asked: Envelope, answer: Response, policy: Policy) -> None:
        """Read, then answer; the batches go on meanwhile."""
        assert answer.read is not None
        task = asyncio.create_task(self._look(asked, answer, answer.read, policy))
        self.reads.add(task)
        task.add_done_callback(self.reads.discard)

    async def finish(self) -> None:
        """Wait until every look is answered."""
        while self.reads:
            await asyncio.wait(self.reads)

    async def _look(self, asked: Envelope, answer: Response, look: HistoryRead, policy: Policy) -> None:
        try:
            if look.page is not None:
                page = await self._found(_query(look.page))
                answer.data, answer.scanned = self._shown(page, policy, admin=asked.call.admin), page.scanned
            elif look.ended is not None:
                answer.data = await self._with_ending(answer.data, look.ended)
            else:
                async with self._places:
                    answer.data = await self._seen(look, policy)
        except Exception:
            log.exception("history_failed", command=type(asked.call.command).__name__)
            asked.reply(ApiError("internal_error", "Reading the history failed. See the log for details."))
            return
        asked.reply(answer)

    async def _seen(self, look: HistoryRead, policy: Policy) -> TimelineView | LateResultList | ExportPage | AuditPage:
        if look.timeline is not None:
            return TimelineView([event_view(event) for event in await self._disk.timeline(look.timeline, look.events)])
        if look.export is not None:
            return _moved(await self._disk.find_jobs(_from(look.export)))
        if look.late is not None:
            known = await self._disk.read_late_results([LateResultQuery(look.late, with_results=True)])
            found = known.results.get(look.late, [])
            return LateResultList([views.late_view(late, refuse_adoption(late, policy)) for late in found])
        assert look.audit is not None
        return _told(await self._disk.read_audit(_asked(look.audit)))

    async def _with_ending(self, why: WhyView, job: Job) -> WhyView:
        """`why` with who ended the job: the row does not say, the timeline does."""
        async with self._places:
            return replace(why, because=ending(job, await self._disk.timeline(job.seq, SINCE_THE_END)))

    async def _found(self, query: JobQuery) -> JobRows:
        """A page, slice by slice: no batch waits for more than one, and everybody has the loop in between."""
        now_s = asyncio.get_running_loop().time
        began_s, patience_s = now_s(), SLOW_PATIENCE_S if query.is_slow else PATIENCE_S
        page, size = JobRows([], query.before), 0
        places = self._places
        while True:
            left = replace(
                query,
                before=page.next_before,
                limit=query.limit - len(page.jobs),
                scan=SLICE if query.is_slow else query.scan,
                payload_bytes=query.payload_bytes - size,
            )
            async with places:
                if places is self._far and now_s() - began_s >= EAGER_S:
                    await asyncio.sleep(PAUSE_S)
                part = await self._disk.find_jobs(left)
            page = JobRows(page.jobs + part.jobs, part.next_before, part.scanned_until, page.scanned + part.scanned)
            if page.scanned_until is None or page.scanned >= MOST_LOOKED or now_s() - began_s >= patience_s:
                return page
            size = sum(len(payload) for _, payload in page.jobs)
            places = self._far

    def _shown(self, page: JobRows, policy: Policy, *, admin: bool) -> JobPage:
        at = self._moment()
        shown = [views.job_view(job, at, policy, admin=admin, payload=Raw(payload)) for job, payload in page.jobs]
        return JobPage(shown, _cursor(page), page.scanned_until)


def _query(asked: ListJobs) -> JobQuery:
    before = None if asked.cursor is None else int(asked.cursor)
    query = JobQuery(asked.status, asked.queue, asked.kind, asked.worker, asked.limit, before)
    if isinstance(asked, SearchJobs):
        query = replace(
            query,
            since=asked.since,
            until=asked.until,
            finished_since=asked.finished_since,
            finished_until=asked.finished_until,
            text=asked.q,
            error=asked.error,
        )
        if asked.error is not None and asked.status is None:
            query = replace(query, status="failed")
    return query


def _from(asked: Export) -> JobQuery:
    after = 0 if asked.cursor is None else int(asked.cursor)
    return JobQuery(asked.status, asked.queue, asked.kind, limit=asked.limit, after=after)


def _moved(page: JobRows) -> ExportPage:
    return ExportPage([views.moved(job, Raw(payload)) for job, payload in page.jobs], _cursor(page))


def _asked(log: AuditLog) -> AuditQuery:
    before = None if log.cursor is None else int(log.cursor)
    return AuditQuery(log.who, log.what, log.job_id, log.since, log.limit, before)


def _told(found: AuditRows) -> AuditPage:
    entries = [
        AuditView(
            seq=seq,
            at=row.at,
            who=row.who,
            address=row.address,
            what=row.what,
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
    return None if page.next_before is None else str(page.next_before)
