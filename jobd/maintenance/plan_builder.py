"""Build a plan: find its jobs page by page, within a time limit. Concurrent builders take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from msgspec.structs import asdict

from jobd.core import guards
from jobd.core.rules import plan_rules
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock, loop_time
from jobd.model.clocks import MonotonicS
from jobd.model.commands import (
    MAINTENANCE_ACTIONS,
    MAX_PLAN,
    MAX_PLANNING_S,
    ExpectedVersion,
    MakePlan,
    PlanFilter,
    Preview,
)
from jobd.model.errors import ApiError
from jobd.model.job import FINISHED, HOUR_MS, Job, may_adopt
from jobd.model.responses import PlannedAge, PlannedJob, SkippedJob
from jobd.model.storage import JobQuery

GAP_MS: Final = 6 * HOUR_MS  # between two groups of jobs by age
MAX_AGES: Final = 10
MAX_SKIPPED: Final = 1_000  # listed in a plan
PAGE: Final = 50  # jobs per read
SCAN: Final = 500  # rows scanned per read
SLOW_SCAN: Final = 250  # rows scanned per read if each row takes long to check
PAUSE_S: Final = 0.002  # after each page, so that workers get the loop and the disk


class PlanBuilder:
    """Collects the jobs of a plan. If there are `more`, the next plan can continue at `next_cursor`, if it is set."""

    def __init__(self, request: MakePlan, actor: Actor, clock: Clock, lock: asyncio.Semaphore) -> None:
        self.jobs: list[PlannedJob] = []
        self.expected: list[ExpectedVersion] = []
        self.skipped: list[SkippedJob] = []
        self.skipped_count = 0
        self.next_cursor: str | None = None
        self._is_cut = False
        self._request = request
        self._actor = actor
        self._clock = clock
        self._storage = actor.disk
        self._state = actor.state
        self._lock = lock  # shared with other builders; each holds it for one page
        self._added: set[str] = set()
        self._times: list[int] = []

    @property
    def more(self) -> bool:
        return self._is_cut or self.next_cursor is not None

    @property
    def ages(self) -> list[PlannedAge]:
        """Group the jobs by age. A gap of more than GAP_MS begins the next group; the last of MAX_AGES has the rest."""
        groups: list[list[int]] = []  # since, until, jobs
        for at in sorted(self._times, reverse=True):
            if groups and (groups[-1][0] - at <= GAP_MS or len(groups) == MAX_AGES):
                groups[-1][0], groups[-1][2] = at, groups[-1][2] + 1
            else:
                groups.append([at, at, 1])
        return [PlannedAge(*each) for each in groups]

    async def run(self) -> ApiError | None:
        """Find the jobs. Return an error if the request is invalid."""
        request = self._request
        if request.action in MAINTENANCE_ACTIONS:
            return await self._find_due()
        if (request.filter is None) == (request.ids is None):
            return guards.invalid("filter", "Set either `filter` or `ids`.").error
        if request.ids is not None:
            if request.cursor is not None:
                return guards.invalid("cursor", "A `cursor` requires the `filter` of the previous plan.").error
            await self._find_ids(list(dict.fromkeys(request.ids)))
            return None
        assert request.filter is not None
        return await self._find_matching(request.filter)

    async def _find_ids(self, ids: list[str]) -> None:
        for first in range(0, len(ids), PAGE):
            page = ids[first : first + PAGE]
            async with self._lock:
                loaded = await self._storage.load(page, [], [])
                found = [loaded.jobs[job_id] for job_id in page if job_id in loaded.jobs]
                await self._add([job for job in found if plan_rules.skip_reason(self._request.action, job) is None])
            for job_id in page:
                job = loaded.jobs.get(job_id)
                if job is None:
                    wrong = loaded.bad.get(job_id) or self._state.quarantined.get(job_id)
                    self._skip(job_id, None, f"It is quarantined: {wrong}" if wrong else "There is no such job.")
                elif (why := plan_rules.skip_reason(self._request.action, job)) is not None:
                    self._skip(job_id, job.status, why)
            await asyncio.sleep(PAUSE_S)

    async def _find_due(self) -> ApiError | None:
        """Find the jobs that recovery or cleanup would change, in the order of a cleanup run."""
        for name in ("filter", "ids", "cursor"):
            if getattr(self._request, name) is not None:
                message = f"{self._request.action} does not accept `{name}`: the daemon chooses the jobs."
                return guards.invalid(name, message).error
        response = await self._actor.ask(Preview(limit=0), by="daemon")  # moves passed deadlines in the state
        if isinstance(response, ApiError):
            return response
        until_s = loop_time() + MAX_PLANNING_S
        stalled = self._state.processing.stalled
        await self._add_live(stalled, lambda job: job.id in stalled, until_s)
        at = self._clock.moment()
        if self._request.action == "cleanup" and not at.suspect:
            await self._add_live(self._state.overdue(), lambda job: job.status == "queued", until_s)
            await self._add_expired(at.now, until_s)
        return None

    async def _add_live(self, due: Iterable[str], is_due: Callable[[Job], bool], until_s: MonotonicS) -> None:
        """Add due jobs that are in memory. Leave out a job that is no longer due when it is read."""
        capacity = MAX_PLAN - len(self.jobs)
        ids = list(islice(due, capacity + 1))
        self._is_cut |= len(ids) > capacity
        for first in range(0, min(len(ids), capacity), PAGE):
            if loop_time() >= until_s:
                self._is_cut = True
                return
            page = ids[first : min(first + PAGE, capacity)]
            async with self._lock:
                jobs = map(self._state.jobs.find, page)
                await self._add([job for job in jobs if job is not None and is_due(job)])
            await asyncio.sleep(PAUSE_S)

    async def _add_expired(self, now: int, until_s: MonotonicS) -> None:
        """Find finished jobs past their retention, oldest first."""
        skipped = 0
        while True:
            async with self._lock:
                ids = await self._storage.expired_jobs(now, PAGE, skipped)
                loaded = await self._storage.load(ids, [], [])
                old = [loaded.jobs[job_id] for job_id in ids if job_id in loaded.jobs and job_id not in self._added]
                capacity = MAX_PLAN - len(self.jobs)
                await self._add([job for job in old if job.status in FINISHED][:capacity])
            skipped += len(ids)
            if not ids or len(old) > capacity:
                self._is_cut |= len(old) > capacity
                return
            if loop_time() >= until_s:
                self._is_cut = True
                return
            await asyncio.sleep(PAUSE_S)

    async def _find_matching(self, filter_: PlanFilter) -> ApiError | None:
        statuses, before = plan_rules.statuses(self._request.action, filter_), None
        if self._request.cursor is not None:
            status, _, number = self._request.cursor.partition(".")
            if status not in statuses:
                return guards.invalid("cursor", "This cursor belongs to a plan with another action or filter.").error
            statuses, before = statuses[statuses.index(status) :], int(number)
        until_s = loop_time() + MAX_PLANNING_S
        for status in statuses:
            while self.next_cursor is None:
                capacity = MAX_PLAN - len(self.jobs)
                async with self._lock:
                    page = await self._storage.find_jobs(as_query(filter_, status, before))
                    # A job that changes during the search is found again in its next status.
                    new = [job for job, _ in page.jobs if job.id not in self._added]
                    await self._add(new[:capacity])
                if len(new) > capacity:
                    self.next_cursor = f"{status}.{new[capacity].seq + 1}"
                else:
                    before = page.next_before
                    if before is None:
                        break
                    if loop_time() >= until_s:
                        self.next_cursor = f"{status}.{before}"
                await asyncio.sleep(PAUSE_S)
        return None

    async def _add(self, jobs: list[Job]) -> None:
        """Add jobs to the plan. Read their versions before their late results: a later one changes the version."""
        self._added.update(job.id for job in jobs)
        self._times += [job.finished_at or job.created_at for job in jobs]
        action, latest_late = self._request.action, self._state.late_results.get
        self.expected += [
            ExpectedVersion(job.id, plan_rules.version(job, latest_late(job.seq), action)) for job in jobs
        ]
        adoptable = [job.seq for job in jobs if may_adopt(job.status)]
        late = await self._storage.count_late_results(adoptable) if adoptable else {}
        self.jobs += [
            PlannedJob(job.id, job.status, plan_rules.status_after(action, job), late.get(job.seq, 0)) for job in jobs
        ]

    def _skip(self, job_id: str, status: str | None, why: str) -> None:
        self.skipped_count += 1
        if len(self.skipped) < MAX_SKIPPED:
            self.skipped.append(SkippedJob(job_id, status, why))


def as_query(filter_: PlanFilter, status: str, before: int | None) -> JobQuery:
    """Return the query for the jobs of a filter in this status."""
    is_slow = filter_.text is not None or filter_.error is not None
    paging = {"limit": PAGE, "before": before, "scan": SLOW_SCAN if is_slow else SCAN, "payloads": False}
    return JobQuery(**{**asdict(filter_), **paging, "status": status})
