"""Run recovery, ticks and cleanup runs, all as commands.

Maintenance finds work, and the rules decide again when they apply its commands. Never cancel it: call `stop`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

import msgspec
import structlog
from msgspec import Raw
from msgspec.structs import astuple, replace

from jobd.core.state import PAUSES_READ_MS, RecoverySchedule
from jobd.core.stats import Counters
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock, loop_time
from jobd.maintenance.cleanup_run import (
    CleanupRun,
    CleanupSchedule,
    CommandRejected,
    InvalidRows,
    MaintenanceContext,
    Unfinished,
)
from jobd.maintenance.preview import SCAN_S, preview
from jobd.maintenance.stoppable_loop import wait_for_wake
from jobd.model.clocks import MonotonicS
from jobd.model.commands import EndPauses, Operator, Report, TakeBack, Tick
from jobd.model.errors import ApiError
from jobd.model.job import SECOND_MS
from jobd.model.journal import JournalOutcomeUnknown, LeadershipLost
from jobd.model.responses import CleanupReport, CleanupState, PreviewView, RecoverStuckView, Recovery, TakeBackView
from jobd.model.storage import FormatNotRead
from jobd.model.times import duration

log = structlog.get_logger("jobd.cleanup")

T = TypeVar("T")

TICK_S: Final = PAUSES_READ_MS / SECOND_MS
PAUSE_RETRY_S: Final = 1.0  # between two attempts to end the pause of a queue, which a full disk rejects
MAX_RESTORED: Final = 100  # reports read at start to find the latest successful run
LATE_AFTER: Final = 3  # intervals without a successful run after which cleanup is degraded


class Maintainer:
    """Runs recovery and cleanup in two loops until `stop`, so that a long cleanup run does not delay recovery.

    The events of deleted jobs are kept for at least `hold_events_ms`, for readers that lag behind. `extra` returns the
    JSON that is saved with the statistics; `read_extra` reads it.
    """

    def __init__(
        self,
        actor: Actor,
        clock: Clock,
        schedule: CleanupSchedule | None = None,
        *,
        hold_events_ms: Callable[[], int] = lambda: 0,
        extra: Callable[[], bytes] = lambda: b"null",
    ) -> None:
        self._context = MaintenanceContext(actor, clock, schedule or CleanupSchedule(), hold_events_ms)
        self.last_report: CleanupReport | None = None
        self.totals = self._context.totals
        self.is_running = False  # a cleanup run is active
        self._actor = actor
        self._state = actor.state
        self._storage = actor.disk
        self._clock = clock
        self._cleanup_wake = asyncio.Event()
        self._recovery_wake = asyncio.Event()
        self._pending_report: asyncio.Future[CleanupReport] | None = None  # of the current or next run
        self._forced = False
        self.last_success: CleanupReport | None = None
        self._failed_runs = 0  # since the latest success
        self._last_failure: CleanupReport | None = None  # since the latest success
        self._last_begin = self._started = loop_time()
        self._last_end: MonotonicS | None = None
        self._last_success: MonotonicS | None = None
        self._extra = extra
        self._announce_next_run()

    @property
    def schedule(self) -> CleanupSchedule:
        return self._context.schedule

    # -- interface -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until `stop`, then save the statistics. Log errors and continue."""
        await self._restore()
        try:
            await asyncio.gather(self._run_recovery(), self._run_cleanups())
        finally:
            self._resolve_pending_report(self._report_without_run())

    def stop(self) -> None:
        """End after the current slice. Call this while the actor still accepts commands."""
        self._context.stopping = True
        self._cleanup_wake.set()
        self._recovery_wake.set()

    def set_schedule(self, schedule: CleanupSchedule) -> None:
        """Apply a new configuration at once."""
        self._context.schedule = schedule
        self._announce_next_run()
        self._cleanup_wake.set()
        self._recovery_wake.set()

    async def run_cleanup(self, *, forced: bool) -> CleanupReport:
        """Wait for the current or a new run and return its report.

        If not `forced`, return the latest report if it is newer than `min_interval_ms`.
        """
        if self._pending_report is None:
            if self._context.stopping:
                return self._report_without_run()
            if not forced and self.last_report is not None and not self._may_run():
                return self.last_report
            self._pending_report = asyncio.get_running_loop().create_future()
        if not self.is_running:
            self._forced = self._forced or forced
            self._cleanup_wake.set()
        return await asyncio.shield(self._pending_report)

    async def recover_stuck(
        self, operator: Operator | None = None, reason: str | None = None
    ) -> RecoverStuckView | ApiError:
        """Recover every stalled job for an operator. Return an error if nothing could be done."""
        details: list[Recovery] = []
        try:
            await self._context.recover("admin" if operator is None else operator.by, details, operator, reason)
        except CommandRejected as rejected:
            if not details:
                return rejected.error
        except Unfinished:
            log.info("recovery_unfinished", recovered=len(details))
        reset = sum(recovery.action == "reset" for recovery in details)
        return RecoverStuckView(
            recovered_jobs=len(details),
            reset_jobs=reset,
            failed_jobs=len(details) - reset,
            details=details,
            timestamp=self._clock.moment().now,
        )

    async def take_back(self, command: TakeBack, operator: Operator | None) -> TakeBackView | ApiError:
        """End the expired grants of a silent worker, for an operator."""
        try:
            return await self._context.take_back(command, "admin" if operator is None else operator.by, operator)
        except CommandRejected as rejected:
            return rejected.error

    async def preview(self, scan_s: float = SCAN_S) -> PreviewView | ApiError:
        """Return what recovery and a cleanup run would do now. Each scan takes at most `scan_s` seconds."""
        try:
            return await preview(self._context, scan_s)
        except CommandRejected as rejected:
            return rejected.error
        except Unfinished as unfinished:
            return ApiError("shutting_down", f"The preview is incomplete: {unfinished}")

    def state(self) -> CleanupState:
        since_success_ms = self._since_ms(self._last_success, self.last_success)
        return CleanupState(self.last_report, self.is_running, since_success_ms, self._failed_runs, self._last_failure)

    async def reports(self, limit: int) -> list[CleanupReport]:
        """Return the stored reports, newest first. Unreadable ones are logged and left out."""
        found = [_read(body, CleanupReport) for body in await self._storage.reports(limit)]
        return [report for report in found if report is not None]

    def degraded_reason(self) -> str | None:
        """Return why cleanup is degraded, as a sentence, or None."""
        schedule = self.schedule
        period_s = max(schedule.interval_ms, schedule.min_interval_ms) / SECOND_MS
        late_s = loop_time() - (self._last_success or self._started)
        if late_s <= LATE_AFTER * period_s:
            return None
        errors = self.last_report.errors if self.last_report else []
        why = f" Errors of the latest run: {' '.join(errors)}" if errors else ""
        late, period = duration(late_s * SECOND_MS), duration(period_s * SECOND_MS)
        return f"No cleanup run has succeeded for {late} (cleanup.interval {period}).{why}"

    # -- recovery and ticks --------------------------------------------------------------------------------------------

    async def _run_recovery(self) -> None:
        next_recovery = next_tick = loop_time()
        while not self._context.stopping:
            every_s = self.schedule.recover_every_ms / SECOND_MS
            next_recovery = min(next_recovery, loop_time() + every_s)
            if every_s and loop_time() >= next_recovery:
                next_recovery = loop_time() + every_s
                await self._guarded("recovery", self.recover_due)
            if loop_time() >= next_tick:
                next_tick = loop_time() + TICK_S
                await self._guarded("tick", self._tick)
            pause_ends_in_s = self._pause_ends_in_s()
            if pause_ends_in_s <= 0:
                await self._guarded("pauses", partial(self._actor.ask, EndPauses(), by="daemon"))
                pause_ends_in_s = PAUSE_RETRY_S
            upcoming = min(next_tick, next_recovery) if every_s else next_tick
            await wait_for_wake(self._recovery_wake, min(upcoming - loop_time(), pause_ends_in_s))

    async def recover_due(self) -> None:
        """Recover stalled jobs, and let queued jobs expire."""
        if self._has_expired():
            await self._context.recover("recovery", [])
        if self._has_overdue():
            await self._context.expire("recovery")

    def _has_expired(self) -> bool:
        """Return whether a lock has expired or a job has stalled. Takes constant time."""
        if self._state.processing.stalled or self._state.processing.expired_locks:
            return True
        deadline = self._state.processing.next_deadline()
        return deadline is not None and deadline <= self._clock.moment().lock_ms

    def _has_overdue(self) -> bool:
        """Return whether a queued job is past its `expires_at`. While the wall clock is suspect, none counts."""
        expiry, at = self._state.next_expiry(), self._clock.moment()
        return not at.suspect and expiry is not None and expiry <= at.now

    def _pause_ends_in_s(self) -> float:
        """Return the seconds until the first pause of a queue or quiet rule ends."""
        untils = [pause.until for pause in self._state.paused.values()]
        ends = [each for each in (*untils, *(rule.until for rule in self._state.quiet.values())) if each is not None]
        return (min(ends) - self._clock.moment().believed) / SECOND_MS if ends else math.inf

    async def _tick(self) -> None:
        """Persist lock time while a job is processing, and changes of a suspect clock.

        This is how an idle daemon detects that its clock has stepped or is trusted again.
        """
        # At start, the daemon compares the clock with the last persisted time. Reports of cleanup runs keep it recent,
        # unless the shortest retention is about as short as the interval between runs.
        is_short = self._clock.keep_ms < 4 * self.schedule.interval_ms
        if self._state.processing or is_short or self._clock.moment().suspect or self._state.clock.suspect:
            # An error is harmless: on a full disk lock time stands still.
            await self._actor.ask(Tick(), by="daemon")

    # -- cleanup runs --------------------------------------------------------------------------------------------------

    async def _run_cleanups(self) -> None:
        while not self._context.stopping:
            if self._pending_report is not None or loop_time() >= self._next_run():
                await self._run_once()
            self._announce_next_run()
            await wait_for_wake(self._cleanup_wake, self._next_run() - loop_time())
        await self._guarded("statistics", self._save_stats)

    def _next_run(self) -> MonotonicS:
        """Return the loop time of the next scheduled run. The first run starts at once."""
        if self._last_end is None:
            return self._last_begin
        schedule = self.schedule
        period_end = self._last_begin + schedule.interval_ms / SECOND_MS
        return max(period_end, self._last_end + schedule.min_interval_ms / SECOND_MS)

    def _announce_next_run(self) -> None:
        """Store when recovery and cleanup run next in the state, for `why`."""
        next_at = self._clock.moment().now + round((self._next_run() - loop_time()) * SECOND_MS)
        period_ms = max(self.schedule.interval_ms, self.schedule.min_interval_ms)
        self._state.recovery = RecoverySchedule(self.schedule.recover_every_ms, period_ms, next_at)

    async def _run_once(self) -> None:
        self.is_running, self._last_begin = True, loop_time()
        try:
            report = await self._run_steps()
        except Exception as error:
            log.exception("cleanup_run_failed")
            report = self._report_without_run(f"run: {error}")
        finally:
            self.is_running, self._last_end = False, loop_time()
        self._record(report)
        if not report.errors:
            self._last_success = self._last_end
        self._resolve_pending_report(report)

    async def _run_steps(self) -> CleanupReport:
        run = CleanupRun(self._context, forced=self._forced)
        self._forced = False
        report = await run.run()
        await run.step("report", lambda: self._save_report(report))
        await run.step("statistics", self._save_stats)
        self.totals.runs += 1
        log.info("cleanup_run", **msgspec.to_builtins(report))
        return report

    @property
    def invalid(self) -> InvalidRows:
        """The rows that the latest cleanup run could not fix."""
        return self._context.invalid

    def _record(self, report: CleanupReport) -> None:
        """Record the report of a run. A successful run resets the count of failed runs."""
        self.last_report = report
        if report.errors:
            self._failed_runs += 1
            self._last_failure = report
        else:
            self.last_success, self._failed_runs, self._last_failure = report, 0, None

    # -- reports -------------------------------------------------------------------------------------------------------

    async def _save_report(self, report: CleanupReport) -> None:
        """Store the report, then subtract its counts from the current counters."""
        await self._context.ask(Report(body=msgspec.json.encode(report)), "cleanup")
        since = self._state.counters.since_report
        since.recovered -= report.stuck_jobs_recovered
        since.deleted -= report.expired_jobs_deleted
        since.locks_cleared -= report.expired_locks_cleared

    async def _save_stats(self) -> None:
        stats = SavedStats(*astuple(self._state.counters))
        stats.beside = Raw(self._extra())
        await self._storage.save_stats(msgspec.json.encode(stats))

    async def _restore(self) -> None:
        try:
            found = await self.reports(MAX_RESTORED)
        except Exception:
            log.exception("last_report_unreadable")
            return
        for report in reversed(found):
            self._record(report)

    def _report_without_run(self, error: str = "run: not started because the daemon is stopping.") -> CleanupReport:
        """Return a report for callers that wait for a run that cannot start or has crashed."""
        return CleanupReport(self._clock.moment().now, 0, 0, 0, 0, 0, 0, [error], self._forced)

    def _resolve_pending_report(self, report: CleanupReport) -> None:
        pending, self._pending_report = self._pending_report, None
        if pending is not None:
            pending.set_result(report)

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _since_ms(self, ended: MonotonicS | None, report: CleanupReport | None) -> int | None:
        """Return the milliseconds since the end of a run. For an earlier process, use the time of the report."""
        if ended is not None:
            return round((loop_time() - ended) * SECOND_MS)
        if report is not None:
            return max(self._clock.moment().now - report.timestamp, 0)
        return None

    def _may_run(self) -> bool:
        since_ms = self._since_ms(self._last_end, self.last_report)
        return since_ms is None or since_ms >= self.schedule.min_interval_ms

    async def _guarded(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except (CommandRejected, Unfinished, LeadershipLost, JournalOutcomeUnknown, FormatNotRead) as rejected:
            log.warning("cleanup_rejected", what=what, error=str(rejected))
        except Exception:
            log.exception("cleanup_failed", what=what)


class SavedStats(Counters):
    """The saved statistics. `beside` is the JSON of `extra`."""

    beside: Raw = Raw(b"null")


def read_extra(body: bytes | None) -> bytes:
    """Return the extra JSON that was saved, or null."""
    stats = None if body is None else _read(body, SavedStats)
    return b"null" if stats is None else bytes(stats.beside)


def read_stats(body: bytes | None) -> Counters:
    """Return the saved statistics, or new ones if there are none or they are unreadable (then an error is logged).

    Totals start at 0: after a crash, the saved ones are below those of the last scrape, and Prometheus would count all
    of them again.
    """
    saved = None if body is None else _read(body, Counters)
    if saved is None:
        return Counters()
    return Counters(
        completions=saved.completions,
        recoveries=saved.recoveries,
        recovered=saved.recovered,
        since_report=saved.since_report,
        baselines=saved.baselines,
        double_grants=replace(saved.double_grants, total=0),
    )


def _read(body: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        log.warning("kept_value_unreadable", kind=kind.__name__, error=str(error))
        return None
