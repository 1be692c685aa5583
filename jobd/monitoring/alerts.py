"""Evaluate alerts: whether each condition holds, since when, and what to do about it.

An alert is logged once when it fires and once when it resolves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final

import structlog
from msgspec import Struct, field
from msgspec.structs import replace

from jobd.core.state import State
from jobd.core.stats import Attempts, KindDurations
from jobd.core.views import average_processing_s
from jobd.engine.clock import Clock, loop_time
from jobd.maintenance.maintainer import Maintainer
from jobd.model.clocks import BootMs, LockMs
from jobd.model.commands import Moment
from jobd.model.job import MINUTE_MS, SECOND_MS
from jobd.model.responses import AlertSeverity, AlertView, ClusterView, DatabaseHealth, PartHealth
from jobd.model.storage import DiskSpace
from jobd.model.times import duration
from jobd.model.webhooks import FailingWebhook
from jobd.monitoring.cluster_conditions import cluster_conditions
from jobd.monitoring.condition import Condition
from jobd.monitoring.health import Health

log = structlog.get_logger("jobd.alerts")

SEVERITIES: Final[dict[str, AlertSeverity]] = {
    "stalled_jobs": "warning",
    "processing_jobs": "notice",
    "average_processing": "warning",
    "cleanup_issues": "warning",
    "granted_twice": "critical",
    "slower_than_usual": "warning",
    "database": "critical",
    "cache": "critical",
    "storage": "warning",
    "webhook_failing": "warning",
    "queue_without_workers": "warning",
    "queue_waits": "warning",
    "failure_rate": "warning",
    "disk_nearly_full": "warning",
    "release_loop": "warning",
    "standby_behind": "warning",
    "no_standby": "warning",
    "journal_not_synchronous": "critical",
    "two_primaries": "critical",
    "database_horizon": "warning",
    "clocks_differ": "warning",
}
NAMES: Final = tuple(SEVERITIES)
CLUSTER_NAMES: Final = NAMES[NAMES.index("standby_behind") :]  # of a cluster only
EVALUATE_EVERY_S: Final = 5.0
MEASURE_EVERY_S: Final = 10.0  # measuring costs a write with fsync, but an alert must fire within 45 s of a failure
HOLD_MS: Final = 30 * SECOND_MS  # an alert fires after its condition has held for this long
CLEAR_MS: Final = 60 * SECOND_MS  # an alert resolves after its condition has been false for this long
PAIRS_PER_SLICE: Final = 500  # queue and kind pairs scanned at a time: about a millisecond
SLICES_PER_CHECK: Final = 50  # enough for 10,000 queues of one kind
NOTICEABLE_MS: Final = 100  # a smaller difference never counts as slower, whatever the ratio
MIB: Final = 1 << 20
GIB: Final = 1 << 30
RESOLVE_RATIO: Final = 0.9  # a ratio resolves at this part of its threshold, so that an alert near it does not flap


class Thresholds(Struct, frozen=True):
    """Thresholds of the alerts. Unless noted, an alert fires above its threshold, not at it."""

    stalled_jobs: int = 5
    processing_jobs: int = 20
    average_processing_ms: int = 10 * MINUTE_MS
    cleanup_issues: int = 10
    granted_twice: int = 0  # jobs in the last hour
    slower_than_usual: float = 2.0  # ratio to the usual duration
    webhook_failing_ms: int = 5 * MINUTE_MS
    queue_without_workers_ms: int = 2 * MINUTE_MS
    queue_waits_ms: int = 5 * MINUTE_MS
    failure_rate: float = 0.5  # of the attempts of a queue; also fires at the threshold
    failure_rate_attempts: int = 20
    disk_free_percent: float = 10.0
    disk_free_bytes: int = GIB
    release_loop: int = 0  # jobs
    standby_behind_ms: int = 30 * SECOND_MS
    database_horizon_ms: int = MINUTE_MS
    clocks_differ_ms: int = SECOND_MS


class WaitingJob(Struct):
    """The job that has been waiting for the longest time, as found by a scan over the queues."""

    for_ms: int = 0
    queue: str = ""
    kind: str = ""
    job_id: str = ""


class QueueScan(Struct):
    """A scan over the queues and kinds of queued jobs, which may take several calls."""

    left: Iterator[tuple[str, str]]
    unclaimed: WaitingJob = field(default_factory=WaitingJob)  # no worker has claimed its queue and kind for as long
    oldest: WaitingJob = field(default_factory=WaitingJob)  # in a queue that is not paused


class Alerts:
    """Calls `check` every few seconds from `run` until `stop`. `evaluate` is cheap and may be called at any time.

    An alert fires after its condition has held for `hold_ms`, and resolves after it has been false for `clear_ms`.
    `on_change` is called then. `failing_webhook` returns the webhook that has been failing for the longest time.
    """

    def __init__(
        self,
        state: State,
        clock: Clock,
        health: Health,
        cleanup: Maintainer,
        thresholds: Thresholds | None = None,
        *,
        hold_ms: int = HOLD_MS,
        clear_ms: int = CLEAR_MS,
        failing_webhook: Callable[[], FailingWebhook | None] = lambda: None,
        cluster: Callable[[], ClusterView] = lambda: ClusterView(role="single"),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.thresholds = thresholds or Thresholds()
        self.durations: list[KindDurations] = []  # as of the latest check
        self.on_change = on_change
        self.failing_webhook = failing_webhook
        self.attempts = Attempts()  # updated with every commit
        self.cluster = cluster
        self._state = state
        self._clock = clock
        self._hold_ms = hold_ms
        self._clear_ms = clear_ms
        self._health = health
        self._cleanup = cleanup
        self._since: dict[str, int] = {}  # firing alert -> wall time, Unix ms
        self._differs_since: dict[str, BootMs] = {}  # alert -> since when its condition differs from its state
        self._first: BootMs | None = None  # the first check with measured health
        self._space: DiskSpace | None = None
        self._scan: QueueScan | None = None  # the current one
        self._waiting = QueueScan(iter(()))  # the latest complete one
        self._views: list[AlertView] = []  # as of the latest check
        self._stop = asyncio.Event()

    def evaluate(self) -> list[AlertView]:
        """Return all alerts, in the order of NAMES. Without a cluster, those of CLUSTER_NAMES are left out."""
        at, boot_ms, before = self._clock.moment(), self._clock.boot_ms(), set(self._since)
        self._views = [self._evaluate(condition, at.now, boot_ms) for condition in self._conditions(at)]
        if before != set(self._since):
            self.on_change()
        return self._views

    def known(self) -> list[AlertView] | None:
        """Return the alerts of the latest check, or None in the first `hold_ms` after the start.

        So a restart does not resolve an alert whose condition persists.
        """
        is_known = self._first is not None and self._clock.boot_ms() - self._first >= self._hold_ms
        return self._views if is_known else None

    async def check(self) -> list[AlertView]:
        """Read the free space of the disk, scan the queues in slices, and evaluate the alerts."""
        self._space = await self._health.space()
        for _ in range(SLICES_PER_CHECK):
            if self._scan_queues():
                break
            await asyncio.sleep(0)
        return self.evaluate()

    def _scan_queues(self) -> bool:
        """Continue the scan for about a millisecond. Return whether it is complete.

        A suspect jump of the wall clock does not lengthen the wait of jobs.
        """
        state, at = self._state, self._clock.moment()
        if self._scan is None:
            self._scan = QueueScan((queue, kind) for queue in list(state.counts) for kind in state.queued_kinds(queue))
        now, buckets = min(at.now, at.believed), 0
        for queue, kind in self._scan.left:
            count, entry = state.oldest_of_kind(queue, kind, now)
            if entry is not None:
                for_ms = now - state.jobs[entry[3]].waits_since(now)
                self._compare(self._scan, WaitingJob(for_ms, queue, kind, entry[3]), at.lock_ms)
            buckets += count + 1
            if buckets >= PAIRS_PER_SLICE:
                return False
        self._waiting, self._scan = self._scan, None
        return True

    def _compare(self, found: QueueScan, waits: WaitingJob, lock_ms: LockMs) -> None:
        if waits.for_ms > found.oldest.for_ms and waits.queue not in self._state.paused:
            found.oldest = waits
        if waits.for_ms > found.unclaimed.for_ms:
            unclaimed_ms = self._state.presence.unclaimed_ms(waits.queue, waits.kind, lock_ms)
            if unclaimed_ms > found.unclaimed.for_ms:
                found.unclaimed = replace(waits, for_ms=min(waits.for_ms, unclaimed_ms))

    async def run(self) -> None:
        """Check every few seconds, and measure health now and then. Errors are logged."""
        next_measurement = loop_time()
        while not self._stop.is_set():
            try:
                if loop_time() >= next_measurement:
                    next_measurement = loop_time() + MEASURE_EVERY_S
                    await self._health.view()
                was_known = self.known() is not None
                await self.check()
                if self._first is None:
                    self._first = self._clock.boot_ms()
                if not was_known and self.known() is not None:
                    self.on_change()
            except Exception:
                log.exception("alerts_failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), EVALUATE_EVERY_S)

    def stop(self) -> None:
        self._stop.set()

    def _evaluate(self, condition: Condition, now: int, boot_ms: BootMs) -> AlertView:
        """Update an alert from its condition, and log if it fires or resolves.

        Boot time decides how long the condition has held, because lock time stands still on a full disk.
        """
        name, limit = condition.name, condition.threshold
        if name in self._since and condition.resolve_at is not None:
            limit = condition.resolve_at
        holds = condition.value > limit or (condition.inclusive and condition.value == limit)
        hint = condition.hint if holds or condition.quiet is None else condition.quiet
        severity = SEVERITIES[name]
        fields = {"alert": name, "severity": severity, "value": condition.value, "threshold": condition.threshold}
        if holds == (name in self._since):
            self._differs_since.pop(name, None)
        elif boot_ms - self._differs_since.setdefault(name, boot_ms) >= (self._hold_ms if holds else self._clear_ms):
            del self._differs_since[name]
            if holds:
                self._since[name] = now
                log.warning("alert_firing", **fields, hint=hint)
            else:
                log.info("alert_resolved", **fields, since=self._since.pop(name))
        since = self._since.get(name)
        if since is not None and not holds:
            hint = f"{hint} The alert resolves when this has lasted for {duration(self._clear_ms)}."
        return AlertView(name, since is not None, since, condition.value, condition.threshold, hint, severity)

    def _conditions(self, at: Moment) -> Iterator[Condition]:
        yield self._stalled(at)
        yield self._processing()
        yield self._average(at)
        yield self._cleanup_issues()
        yield self._granted_twice(at)
        yield self._slower(at)
        yield from self._unhealthy()
        yield self._webhook()
        yield self._without_workers()
        yield self._waits()
        yield self._failure_rate(at)
        yield self._disk()
        yield self._release_loop()
        limits = self.thresholds
        yield from cluster_conditions(
            self.cluster(),
            behind_ms=limits.standby_behind_ms,
            horizon_ms=limits.database_horizon_ms,
            clocks_ms=limits.clocks_differ_ms,
        )

    def _stalled(self, at: Moment) -> Condition:
        count, recovered = len(self._state.stalled), self._state.counters.recovered_lately(at.now)
        stalled = f"{count} {'job has' if count == 1 else 'jobs have'} stalled"
        quiet = f"{stalled}, and {recovered} {'was' if recovered == 1 else 'were'} recovered in the last 10 minutes."
        hint = f"{quiet} Check for workers that crash or hang: jobctl workers, jobctl timeline ID"
        return Condition("stalled_jobs", count + recovered, self.thresholds.stalled_jobs, hint, quiet)

    def _processing(self) -> Condition:
        hint = "More jobs than expected are processing. Compare with your workers: jobctl workers, jobctl locks"
        value, threshold = self._state.totals["processing"], self.thresholds.processing_jobs
        quiet = f"Jobs processing: {value}, no more than expected."
        return Condition("processing_jobs", value, threshold, hint, quiet)

    def _average(self, at: Moment) -> Condition:
        value = average_processing_s(self._state, self._state.counters, at)
        threshold = self.thresholds.average_processing_ms / SECOND_MS
        hint = "Jobs take longer than expected (seconds on average, of jobs completed in the last hour or processing). "
        hint += "See the oldest: jobctl stats"
        quiet = "No job is processing, and none completed in the last hour."
        if value:
            average = duration(value * SECOND_MS)
            quiet = f"Jobs take no longer than expected: {average} on average (last hour, and those processing)."
        return Condition("average_processing", value, threshold, hint, quiet)

    def _cleanup_issues(self) -> Condition:
        report = self._cleanup.last_report
        value, quiet = 0, "No cleanup run has finished yet."
        where = "The log names them. Inspect one with: jobctl validate ID"
        if report is not None:
            value, quiet = report.validation_issues_found, "The latest cleanup run found no invalid rows."
        if value:
            quiet = f"The latest cleanup run found few invalid rows (issues: {value}). {where}"
        hint = f"The latest cleanup run found many invalid rows. {where}"
        return Condition("cleanup_issues", value, self.thresholds.cleanup_issues, hint, quiet)

    def _granted_twice(self, at: Moment) -> Condition:
        double_grants = self._state.counters.double_grants
        value = double_grants.last_hour(at.now)
        hint = "No job was granted again while its previous worker had time left."
        if value and (last := double_grants.last) is not None:
            (token, next_token), (worker, next_worker) = last.tokens, last.workers
            hint = (
                f"Two workers may have worked on one job at once ({value} in the last hour). The latest: "
                f"{last.job_id} was taken from {worker} (token {token}) before its lock expired, and granted to "
                f"{next_worker} (token {next_token}). Compare these tokens with those stored with its results. "
                f"See the operator's action: jobctl timeline {last.job_id}"
            )
        return Condition("granted_twice", value, self.thresholds.granted_twice, hint)

    def _slower(self, at: Moment) -> Condition:
        self.durations = self._state.counters.baselines.view(at.now)
        threshold = self.thresholds.slower_than_usual
        slower = [found for each in self.durations if (found := _ratio(each)) is not None]
        value, quiet, hint = 0.0, "No kind of job takes longer than usual.", ""
        if slower:
            value, each, last_s, usual_s = max(slower, key=lambda found: found[0])
            kind = f"kind {each.kind}" if each.kind else "no kind"
            quiet = (
                f"Jobs of {kind} take {duration(last_s * SECOND_MS)} (95th percentile, last hour, {each.completed} "
                f"jobs); the usual is {duration(usual_s * SECOND_MS)}."
            )
            advice = "Check the machine, the disk and the services that they use, then the oldest jobs: jobctl stats"
            hint = f"{quiet} {advice}"
        return Condition("slower_than_usual", value, threshold, hint, quiet, resolve_at=threshold * RESOLVE_RATIO)

    def _unhealthy(self) -> Iterator[Condition]:
        """Report the parts of the latest health. A part that has not been measured yet is not unhealthy."""
        for name in ("database", "cache", "storage"):
            part: DatabaseHealth | PartHealth | None = getattr(self._health.last, name, None)
            wrong = part is not None and part.status != "healthy"
            yield Condition(name, int(wrong), 0, "Not measured yet." if part is None else part.message)

    def _webhook(self) -> Condition:
        """Report for how many seconds the worst webhook has been failing."""
        threshold, worst = self.thresholds.webhook_failing_ms / SECOND_MS, self.failing_webhook()
        if worst is None:
            return Condition("webhook_failing", 0, threshold, "No webhook is failing.")
        value, tried = worst.for_ms // SECOND_MS, f"The latest attempt: {worst.error}"
        hint = (
            f"Webhook {worst.name} accepts no deliveries. Messages are retried until give_up_after. "
            f"See: jobctl webhooks. {tried}"
        )
        quiet = (
            f"Webhook {worst.name} has accepted nothing for {duration(worst.for_ms)}; deliveries are retried. {tried}"
        )
        return Condition("webhook_failing", value, threshold, hint, quiet)

    def _without_workers(self) -> Condition:
        """Report for how many seconds a due job has been waiting without a claim of its queue and kind."""
        waits, threshold = self._waiting.unclaimed, self.thresholds.queue_without_workers_ms / SECOND_MS
        value, quiet, hint = waits.for_ms // SECOND_MS, "Workers claim every queue and kind that has due jobs.", ""
        if value:
            queued = self._state.counts.get(waits.queue, {}).get("queued", 0)
            has = f"the queue has {queued} queued {'job' if queued == 1 else 'jobs'}"
            rest, when = f"Its job {waits.job_id} is due; {has}.", "for it"
            if (pause := self._state.paused.get(waits.queue)) is not None:
                rest, when = f"{has.capitalize()} and was paused {pause.describe()}.", "before you resume it"
            quiet = f"No worker has claimed {_bucket_name(waits)} for {duration(waits.for_ms)}. {rest}"
            advice = f"See which workers claim what: jobctl workers, jobctl why {waits.job_id}"
            hint = f"{quiet} Start a worker {when}. {advice}"
        return Condition("queue_without_workers", value, threshold, hint, quiet)

    def _waits(self) -> Condition:
        """Report for how many seconds the oldest due job has been waiting. Paused queues do not count."""
        waits, threshold = self._waiting.oldest, self.thresholds.queue_waits_ms / SECOND_MS
        value, quiet, hint = waits.for_ms // SECOND_MS, "No due job is waiting.", ""
        if self._state.paused:
            quiet = "No due job is waiting. Jobs of paused queues do not count."
        if value:
            quiet = (
                f"The oldest due job, {waits.job_id} of {_bucket_name(waits)}, has waited for {duration(waits.for_ms)}."
            )
            advice = f"See why it waits: jobctl why {waits.job_id}, jobctl queues"
            hint = f"{quiet} Add workers, or find out what creates so many jobs. {advice}"
        return Condition("queue_waits", value, threshold, hint, quiet)

    def _failure_rate(self, at: Moment) -> Condition:
        """Report the queue with the highest share of failed attempts in the last 10 minutes."""
        self.attempts.forget(at.now)
        least, threshold = self.thresholds.failure_rate_attempts, self.thresholds.failure_rate
        counted = ((found[1] / found[0], *found, queue) for queue, found in self.attempts.by_queue.items() if found[1])
        share, ended, failed, queue = max((each for each in counted if each[1] >= least), default=(0.0, 0, 0, ""))
        quiet, hint = f"No queue with at least {least} attempts in the last 10 minutes had a failure.", ""
        if failed:
            quiet = f"{failed} of {ended} attempts in queue {queue} failed in the last 10 minutes."
            hint = f"{quiet} See its errors: jobctl failures, jobctl jobs --queue {queue} --status failed"
        return Condition("failure_rate", round(share, 4), threshold, hint, quiet, inclusive=True)

    def _disk(self) -> Condition:
        """Report the used percentage of the disk. The threshold is that of the limit that is reached first."""
        space, limits = self._space, self.thresholds
        percent = 100 - limits.disk_free_percent
        if space is None or not space.total_bytes:
            return Condition("disk_nearly_full", 0, percent, "The free space of the disk is unknown.")
        threshold = max(min(percent, 100 - 100 * limits.disk_free_bytes / space.total_bytes), 0)
        used = 100 - 100 * space.free_bytes / space.total_bytes
        quiet = f"{_bytes(space.free_bytes)} of {_bytes(space.total_bytes)} are free on the disk of {space.path}."
        advice = "See what is stored: jobctl stats"
        hint = f"{quiet} On a full disk the daemon rejects new jobs. Free some space, or shorten [retention]. {advice}"
        return Condition("disk_nearly_full", used, threshold, hint, quiet)

    def _release_loop(self) -> Condition:
        loops, threshold = self._state.release_loops, self.thresholds.release_loop
        quiet, hint = "No job is released repeatedly.", ""
        if loops:
            job_id, releases = next(iter(loops.items()))
            quiet = f"Job {job_id} was released {releases} times in a row without progress."
            hint = (
                f"{quiet} Its workers cannot process it. See which ones release it, and why: jobctl timeline {job_id}. "
                f"To end the loop: jobctl cancel {job_id}"
            )
        return Condition("release_loop", len(loops), threshold, hint, quiet)


def _bytes(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _bucket_name(waits: WaitingJob) -> str:
    return f"queue {waits.queue}, kind {waits.kind}" if waits.kind else f"queue {waits.queue}"


def _ratio(each: KindDurations) -> tuple[float, KindDurations, float, float] | None:
    """Return the ratio of the last hour to the usual duration, and both in seconds; None if unknown or too close."""
    if each.last_hour_ms is None or each.usual_ms is None or each.last_hour_ms - each.usual_ms < NOTICEABLE_MS:
        return None
    times = round(each.last_hour_ms / max(each.usual_ms, 1), 2)
    return times, each, each.last_hour_ms / SECOND_MS, each.usual_ms / SECOND_MS
