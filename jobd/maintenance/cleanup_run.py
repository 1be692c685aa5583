"""Run a cleanup: recovery, expiry, deletion by age, validation, event log and audit log, with a report.

Every change is a command, and the rules decide it again when they apply it. The run works in slices, with pauses.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

import structlog
from msgspec import Struct, field

from jobd.core.job_validation import counts, validate
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock, loop_time
from jobd.model.commands import AnyCommand, DeleteExpired, Expire, Operator, Recover, RepairJobs, TakeBack
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS, MINUTE_MS, SECOND_MS, Job
from jobd.model.journal import JournalOutcomeUnknown, LeadershipLost
from jobd.model.responses import CleanupReport, Issue, MaintenanceResult, Recovered, Recovery, TakeBackView
from jobd.model.storage import FormatNotRead

log = structlog.get_logger("jobd.cleanup")

FULL_PAUSE_S: Final = 0.05  # after a rejection by a full mailbox, which has room again after each batch
FULL_ATTEMPTS: Final = 100
PAUSE_S: Final = 0.002  # after each slice, so that workers get the loop and the disk
SCAN: Final = 500  # jobs validated at a time, in less than a millisecond
MAX_NAMED: Final = 3  # invalid rows
MAX_ISSUES_LOGGED: Final = 20  # per run; the report counts all
ENDED_EARLY: Final = "run: it ended early because the daemon is stopping."


class CleanupSchedule(Struct, frozen=True):
    """How often recovery and cleanup run. If `recover_every_ms` is 0, only cleanup runs recover jobs."""

    interval_ms: int = 5 * MINUTE_MS
    min_interval_ms: int = 2 * MINUTE_MS
    recover_every_ms: int = 10 * SECOND_MS
    batch: int = 200  # jobs per command
    journal_ms: int = DAY_MS  # retention of the events of a deleted job
    journal_bytes: int = 4 << 30  # of a larger store, it ends earlier
    audit_ms: int = 90 * DAY_MS  # retention of the audit log


class MaintenanceTotals(Struct):
    """Counters since the process started."""

    runs: int = 0
    found: Counter[str] = field(default_factory=Counter)  # kind -> jobs
    issues: Counter[str] = field(default_factory=Counter)  # type -> issues


class CommandRejected(Exception):
    """The actor rejected a command."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class Unfinished(Exception):
    """A step ended before its work was done. The message says why."""


class InvalidRows(NamedTuple):
    """How many rows the latest cleanup run found invalid and could not fix, and the ids of the first ones."""

    total: int
    ids: tuple[str, ...]


class MaintenanceContext:
    """Sends maintenance commands in slices until `stopping` is set."""

    def __init__(
        self, actor: Actor, clock: Clock, schedule: CleanupSchedule, hold_events_ms: Callable[[], int]
    ) -> None:
        self.actor = actor
        self.clock = clock
        self.schedule = schedule
        self.hold_events_ms = hold_events_ms  # how far lagging readers are behind
        self.totals = MaintenanceTotals()
        self.invalid = InvalidRows(0, ())
        self.stopping = False

    async def ask(self, command: AnyCommand, by: str, operator: Operator | None = None) -> Any:
        """Send a command and return the data of its response. Raises CommandRejected.

        If the mailbox is full, try again for some seconds.
        """
        attempts = 1
        while isinstance(response := await self.actor.ask(command, by=by, operator=operator), ApiError):
            if response.code != "overloaded" or self.stopping or attempts == FULL_ATTEMPTS:
                raise CommandRejected(response)
            attempts += 1
            await asyncio.sleep(FULL_PAUSE_S)
        return response.data

    def has_issues(self, job: Job) -> bool:
        """Return whether a cleanup run would report or repair the job."""
        return any(map(counts, validate(job, self.clock.moment(), self.actor.policy).issues))

    async def yield_to_workers(self) -> None:
        await asyncio.sleep(PAUSE_S)
        if self.stopping:
            raise Unfinished("the daemon is stopping; the next cleanup run continues.")

    async def recover(
        self, by: str, details: list[Recovery], operator: Operator | None = None, reason: str | None = None
    ) -> None:
        """Recover all stalled jobs and clear expired locks, in slices. Append the results to `details`."""
        while True:
            done: Recovered = await self.ask(Recover(limit=self.schedule.batch, reason=reason), by, operator)
            details += done.details
            self.totals.found["stalled"] += len(done.details)
            self.totals.found["expired_locks"] += done.locks_cleared
            if not done.more or not (done.details or done.locks_cleared):
                return
            await self.yield_to_workers()

    async def take_back(self, command: TakeBack, by: str, operator: Operator | None) -> TakeBackView:
        """End the expired grants of a silent worker in slices. Raises CommandRejected if the first one is rejected."""
        done: TakeBackView = await self.ask(command, by, operator)
        details, more = list(done.details), done.more
        while more and not command.dry_run:
            try:
                await self.yield_to_workers()
                done = await self.ask(command, by, operator)
            except (CommandRejected, Unfinished) as ended:
                more = not (isinstance(ended, CommandRejected) and ended.error.code == "worker_not_silent")
                break
            details += done.details
            more = done.more
        reset = sum(each.action == "reset" for each in details)
        return TakeBackView(command.name, len(details), reset, len(details) - reset, details, more, done.timestamp)

    async def expire(self, by: str) -> None:
        """Fail all queued jobs that are past their `expires_at`, in slices."""
        more = True
        while more:
            result: MaintenanceResult = await self.ask(Expire(limit=self.schedule.batch), by)
            self.totals.found["expired"] += result.done
            more = result.more and result.done > 0
            await self.yield_to_workers()


class CleanupRun:
    """A cleanup run. `run` returns its report. A failed step does not stop the others; the report names it."""

    def __init__(self, context: MaintenanceContext, *, forced: bool) -> None:
        self.errors: list[str] = []
        self._context = context
        self._forced = forced
        self._state = context.actor.state
        self._storage = context.actor.disk
        self._clock = context.clock
        self._batch = context.schedule.batch
        self._found = 0
        self._fixed = 0
        self._logged = 0
        self._invalid = InvalidRows(0, ())
        self._began = loop_time()

    async def run(self) -> CleanupReport:
        for name, step in (
            ("recovery", partial(self._context.recover, "recovery", [])),
            ("expiry", partial(self._context.expire, "cleanup")),
            ("deletion", self._deletion_step),
            ("validation", self._validation_step),
            ("events", self._events_step),
            ("audit", self._audit_step),
        ):
            await self.step(name, step)
        return self._report()

    async def step(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        """Run one step. Record an error for the report instead of raising it."""
        if self._context.stopping:
            if ENDED_EARLY not in self.errors:
                self.errors.append(ENDED_EARLY)
            return
        try:
            await step()
        except FormatNotRead as error:  # until all nodes of the cluster are upgraded
            log.info("cleanup_step_waits", step=name, reason=str(error))
        except (CommandRejected, Unfinished, LeadershipLost, JournalOutcomeUnknown) as rejected:
            log.warning("cleanup_step_failed", step=name, error=str(rejected))
            self.errors.append(f"{name}: {rejected}")
        except Exception as error:
            log.exception("cleanup_step_failed", step=name)
            self.errors.append(f"{name}: {type(error).__name__}: {error}")

    async def _deletion_step(self) -> None:
        """Delete finished jobs past their retention, while the wall clock is trusted. Artifacts are deleted later.

        Jobs that expire during the step wait for the next run. Otherwise the step does not end while jobs expire.
        """
        at = self._clock.moment()
        while not (at.suspect or self._clock.suspect):
            ids = await self._storage.expired_jobs(at.now, self._batch)
            if not ids:
                break
            result: MaintenanceResult = await self._context.ask(DeleteExpired(ids=ids), "cleanup")
            self._context.totals.found["deleted"] += result.done
            if not result.done and not self._clock.suspect:
                raise Unfinished(f"{len(ids)} expired jobs could not be deleted, the first is {ids[0]}.")
            await self._context.yield_to_workers()

    async def _validation_step(self) -> None:
        """Validate imported and hand-edited rows and all live jobs. Only jobs with issues need a command."""
        unvalidated = list(dict.fromkeys(self._state.unvalidated.values()))
        for ids in _slices(unvalidated, self._batch):
            await self._repair(ids)
        already = set(unvalidated)
        # Packed jobs cannot have issues, and there may be millions of them.
        for ids in _slices(list(self._state.jobs.touched()), SCAN):
            wrong = [job_id for job_id in ids if job_id not in already and self._has_issues(job_id)]
            for chunk in _slices(wrong, self._batch):
                await self._repair(chunk)
            await self._context.yield_to_workers()
        self._context.invalid = self._invalid

    def _has_issues(self, job_id: str) -> bool:
        job = self._state.get(job_id)
        return job is not None and self._context.has_issues(job)

    async def _repair(self, ids: list[str]) -> None:
        result: MaintenanceResult = await self._context.ask(RepairJobs(ids=ids), "cleanup")
        self._found += result.found
        self._fixed += result.done
        self._context.totals.found["issues"] += result.found
        for job_id, issue in result.issues:
            self._log_issue(job_id, issue)
        for job_id in dict.fromkeys(job_id for job_id, _ in result.issues):
            if job_id not in self._state.processing.stalled and self._has_issues(job_id):
                count, named = self._invalid
                self._invalid = InvalidRows(count + 1, (*named, job_id)[:MAX_NAMED])
        await self._context.yield_to_workers()

    def _log_issue(self, job_id: str, issue: Issue) -> None:
        self._context.totals.issues[issue.type] += 1
        if self._logged < MAX_ISSUES_LOGGED:
            self._logged += 1
            fields = {"severity": issue.type, "field": issue.field, "problem": issue.message, "fix": issue.fix}
            log.warning("validation_issue", job_id=job_id, **fields)

    async def _events_step(self) -> None:
        """Delete the events of jobs that were deleted long ago, the oldest first. A large store keeps them shorter."""
        limit, schedule = self._batch, self._context.schedule
        while True:
            is_large = await self._storage.used_bytes() > schedule.journal_bytes
            keep_ms = max(0 if is_large else schedule.journal_ms, self._context.hold_events_ms())
            at = self._clock.moment()  # after the wait, during which the clock can be set back
            if at.suspect or await self._storage.prune(at.now - keep_ms, limit) < limit:
                break
            await self._context.yield_to_workers()

    async def _audit_step(self) -> None:
        """Delete excess audit entries, and old ones while the wall clock is trusted."""
        limit = self._batch
        while True:
            at = self._clock.moment()
            before = 0 if at.suspect else at.now - self._context.schedule.audit_ms
            if await self._storage.trim_audit(before, limit) < limit:
                break
            await self._context.yield_to_workers()

    def _report(self) -> CleanupReport:
        since = self._state.counters.since_report
        return CleanupReport(
            timestamp=self._clock.moment().now,
            stuck_jobs_recovered=since.recovered,
            expired_jobs_deleted=since.deleted,
            expired_locks_cleared=since.locks_cleared,
            validation_issues_fixed=self._fixed,
            validation_issues_found=self._found,
            total_processing_time=round((loop_time() - self._began) * SECOND_MS),
            errors=self.errors,
            forced=self._forced,
        )


def _slices(ids: list[str], size: int) -> Iterator[list[str]]:
    remaining = iter(ids)
    while chunk := list(islice(remaining, size)):
        yield chunk
