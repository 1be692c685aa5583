"""Export metrics as Prometheus text. Values are copied on the event loop and formatted in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import accumulate, chain, islice
from typing import Final, Protocol, get_args

from msgspec import Struct
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from jobd import __version__
from jobd.core import views
from jobd.core.state import State
from jobd.core.stats import OTHER_QUEUES, PROCESSING_BUCKETS_S, Histogram, KindDurations
from jobd.engine.actor import BATCH_BUCKETS, COMMIT_BUCKETS_S, Actor
from jobd.engine.clock import Clock
from jobd.engine.event_feed import EventFeed
from jobd.maintenance.artifact_sweeper import SweepStats
from jobd.maintenance.maintainer import Maintainer
from jobd.model.errors import ERROR_STATUS
from jobd.model.events import EventType
from jobd.model.job import SECOND_MS, STATUSES
from jobd.model.responses import ClusterView, ProcessStats
from jobd.model.storage import DiskSpace
from jobd.model.webhooks import WebhookMetrics
from jobd.monitoring.alerts import Alerts
from jobd.storage.files import log_of

QUEUES_SHOWN: Final = 200  # the first ones; the others are summed under OTHER_QUEUES
MAX_BUCKETS_SCANNED: Final = 2_000  # pairs of kind and priority scanned for the oldest due jobs
LAG_EVERY_S: Final = 1.0
COMMITS_KEPT: Final = 300  # seconds of commits that `vitals` covers
LAGS_KEPT: Final = 20  # the worst is exported, so that a scrape every 15 s misses none
FOUND_KINDS: Final = ("stuck", "expired_locks", "expired", "deleted", "issues")
ISSUE_TYPES: Final = ("error", "critical")  # cleanup runs do not count warnings

Counts = tuple[list[int], float]  # of a histogram: counts by bucket, and the sum


class Snapshot(Struct, frozen=True):
    """A copy of all values at one moment."""

    jobs: dict[str, int]  # status -> jobs
    queues: list[tuple[str, dict[str, int]]]
    paused: dict[str, bool]  # queue -> paused
    oldest_due_s: dict[str, float]  # queue -> seconds
    stuck: int
    locked: int
    grants: dict[str, int]  # queue -> grants
    errors: dict[str, int]  # code -> responses
    stalls: int
    recovered: dict[str, int]  # action -> jobs
    late: dict[str, int]  # action -> late results
    cleanup_runs: int
    found: dict[str, int]  # kind -> jobs
    last_cleanup_at: int | None  # latest successful run, Unix ms
    failed_cleanups: int  # since then
    issues: dict[str, int]  # type -> issues
    processing: dict[str, Counts]  # queue -> seconds
    durations: list[KindDurations]
    granted_twice: int
    quarantined: int
    clock_suspect: bool
    disk_full: int  # full_disk.WriteLimit
    disk: DiskSpace | None
    commits_inline: bool
    unprojected: int  # events
    commit_seconds: Counts
    batch_commands: Counts
    mailbox: int
    mailbox_limit: int
    events: dict[str, int]  # type -> events
    waiting_claims: int
    listeners: int
    dropped: int
    lag_s: float
    alerts: dict[str, bool]
    sweeps: SweepStats
    webhooks: dict[str, WebhookMetrics]  # by name
    cluster: ClusterView
    append_seconds: Counts | None  # to the journal of a cluster


class ErrorCounts(Protocol):
    error_counts: Counter[str]  # by code


class Metrics:
    """Renders the metrics. From `run` until `stop` it measures the lag of the event loop.

    `listeners` is read at each call, so it may grow. A store in memory has no files; their sizes are 0.
    """

    def __init__(
        self,
        actor: Actor,
        maintainer: Maintainer,
        alerts: Alerts,
        clock: Clock,
        sweeps: SweepStats,
        store_path: str,
        listeners: Sequence[ErrorCounts],
        feed: EventFeed,
    ) -> None:
        self._actor = actor
        self._maintainer = maintainer
        self._alerts = alerts
        self._clock = clock
        self._sweeps = sweeps
        self._listeners = listeners
        self._feed = feed
        self._store_path = store_path
        self.webhooks: Callable[[], Mapping[str, WebhookMetrics]] = dict
        self.cluster: Callable[[], ClusterView] = lambda: ClusterView(role="single")
        self.append_seconds: Histogram | None = None  # to the journal of a cluster, with COMMIT_BUCKETS_S
        self._lags: deque[float] = deque(maxlen=LAGS_KEPT)
        self._commits: deque[list[int]] = deque([actor.commit_seconds.counts.copy()], COMMITS_KEPT)
        self._started_s = time.monotonic()
        self._stop = asyncio.Event()

    async def render(self) -> bytes:
        """Return the metrics in Prometheus text format 0.0.4."""
        return await asyncio.to_thread(text, self.snapshot(), self._store_path)

    async def vitals(self) -> ProcessStats:
        """Return the state of the process for operators."""
        path = self._store_path
        database, wal = await asyncio.to_thread(lambda: (_size(path), _size(log_of(path))))
        return ProcessStats(
            mailbox=self._actor.waiting,
            parked=len(self._actor.waiting_claims),
            commit_p99_s=self.commit_p99_s(),
            loop_lag_s=max(self._lags, default=0.0),
            database_bytes=database,
            wal_bytes=wal,
            uptime_ms=int((time.monotonic() - self._started_s) * SECOND_MS),
            oldest_due=views.oldest_due(self._actor.state),
        )

    def commit_p99_s(self) -> float | None:
        """Return the 99th percentile of commit times of the last minutes, or None."""
        before, now = self._commits[0], self._actor.commit_seconds.counts
        return quantile(0.99, [count - then for count, then in zip(now, before, strict=True)], COMMIT_BUCKETS_S)

    def snapshot(self) -> Snapshot:
        """Copy all values. Blocks the loop for well under a millisecond, or 2 ms with 100 kinds."""
        actor, state, maintainer = self._actor, self._actor.state, self._maintainer
        stats, report = state.counters, maintainer.last_success
        alerts = {alert.name: alert.firing for alert in self._alerts.evaluate()}
        return Snapshot(
            jobs=dict(state.totals),
            queues=capped(state),
            paused={name: name in state.paused for name in islice(state.counts, QUEUES_SHOWN)},
            oldest_due_s=oldest_due_s(state, self._clock.moment().now),
            stuck=len(state.stuck),
            locked=state.live_locks(),
            grants=dict(stats.grants),
            errors=dict(sum((listener.error_counts for listener in self._listeners), Counter[str]())),
            stalls=stats.stalls,
            late={"kept": stats.late_kept, "adopted": stats.late_adopted},
            recovered={"reset": stats.reset, "failed": stats.failed},
            cleanup_runs=maintainer.totals.runs,
            found=dict(maintainer.totals.found),
            last_cleanup_at=None if report is None else report.timestamp,
            failed_cleanups=maintainer.state().failed_since_last_success,
            issues=dict(maintainer.totals.issues),
            processing={queue: _copy(histogram) for queue, histogram in stats.processing.items()},
            durations=self._alerts.durations,
            granted_twice=stats.double_grants.total,
            quarantined=len(state.quarantined),
            clock_suspect=self._clock.suspect,
            disk_full=int(actor.full_disk.write_limit),
            disk=actor.full_disk.space,
            commits_inline=actor.disk.commits_inline,
            unprojected=actor.disk.behind,
            commit_seconds=_copy(actor.commit_seconds),
            batch_commands=_copy(actor.batch_commands),
            mailbox=actor.waiting,
            mailbox_limit=actor.bounds.mailbox,
            events=dict(stats.events),
            waiting_claims=len(actor.waiting_claims),
            listeners=self._feed.listeners,
            dropped=self._feed.dropped,
            lag_s=max(self._lags, default=0.0),
            alerts=alerts,
            sweeps=copy(self._sweeps),
            webhooks=dict(self.webhooks()),
            cluster=self.cluster(),
            append_seconds=None if self.append_seconds is None else _copy(self.append_seconds),
        )

    async def run(self) -> None:
        """Measure the lag of the event loop once a second."""
        while not self._stop.is_set():
            began = time.perf_counter()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LAG_EVERY_S)
            self._lags.append(max(time.perf_counter() - began - LAG_EVERY_S, 0.0))
            self._commits.append(self._actor.commit_seconds.counts.copy())

    def stop(self) -> None:
        self._stop.set()


def text(now: Snapshot, store_path: str) -> bytes:
    """Format `now` and the sizes of the store's files. Reads the file system: call this off the loop."""
    families = (_jobs(now), _cleanup(now), _webhooks(now), _machine(now), _files(store_path))
    return _text([*chain(*families), *cluster_metrics(now.cluster, now.append_seconds), _build()])


def standby_text(cluster: ClusterView) -> bytes:
    """Format the metrics of a standby."""
    return _text([*cluster_metrics(cluster), _build()])


def _text(families: list[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)  # our own registry: no process metrics
    registry.register(_Collected(families))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return self._families


def _jobs(now: Snapshot) -> Iterator[Metric]:
    by_status = ((status, now.jobs.get(status, 0)) for status in STATUSES)
    yield _gauges("jobs", "Jobs by status.", ["status"], by_status)
    queues = ((name, status, counts.get(status, 0)) for name, counts in now.queues for status in STATUSES)
    yield _gauges("queue_jobs", "Jobs by queue and status.", ["queue", "status"], queues)
    paused = ((name, int(is_paused)) for name, is_paused in now.paused.items())
    yield _gauges("queue_paused", "1 while the queue is paused.", ["queue"], paused)
    help_ = "How long the oldest due job has been waiting, by queue."
    yield _gauges("queue_oldest_due_seconds", help_, ["queue"], now.oldest_due_s.items())
    yield _gauge("stuck_jobs", "Jobs whose worker has stalled.", now.stuck)
    yield _gauge("locked_jobs", "Jobs with a live lock.", now.locked)
    yield _counters("grants", "Jobs granted to workers, by queue.", ["queue"], now.grants.items())
    events = ((kind, now.events.get(kind, 0)) for kind in get_args(EventType))
    yield _counters("events", "Committed events, by type.", ["type"], events)
    refusals = ((code, now.errors.get(code, 0)) for code in ERROR_STATUS)
    yield _counters("refusals", "Error responses, by code; already_locked is lock contention.", ["code"], refusals)
    yield _counter("stalls", "Grants that ended because the worker stalled.", now.stalls)
    yield _counters(
        "recovered", "Stalled jobs recovered: reset to queued, or failed.", ["action"], now.recovered.items()
    )
    yield _counters("late_results", "Results submitted after the lock was lost.", ["action"], now.late.items())
    help_ = "Time from grant to completion, by queue."
    seconds = HistogramMetricFamily("jobd_processing_seconds", help_, labels=["queue"])
    for queue, counts in now.processing.items():
        seconds.add_metric([queue], _buckets(counts[0], PROCESSING_BUCKETS_S), counts[1])
    yield seconds
    help_ = "95th percentile of processing times by kind, in the last hour and usually."
    yield _gauges("processing_p95_seconds", help_, ["kind", "window"], _durations(now))
    help_ = "Jobs granted again while the previous worker had time left and had not reported that it stopped."
    yield _counter("granted_twice", help_, now.granted_twice)
    help_ = "Quarantined jobs."
    yield _gauge("quarantined_jobs", help_, now.quarantined)


def _durations(now: Snapshot) -> Iterator[tuple[str, str, float]]:
    for each in now.durations:
        for window, ms in (("hour", each.last_hour_ms), ("usual", each.usual_ms)):
            if ms is not None:
                yield each.kind, window, ms / SECOND_MS


def _cleanup(now: Snapshot) -> Iterator[Metric]:
    yield _counter("cleanup_passes", "Cleanup runs since the start.", now.cleanup_runs)
    found = ((kind, now.found.get(kind, 0)) for kind in FOUND_KINDS)
    yield _counters("cleanup_found", "Jobs that recovery and cleanup runs acted on since the start.", ["kind"], found)
    last = [] if now.last_cleanup_at is None else [(now.last_cleanup_at / SECOND_MS,)]
    yield _gauges("cleanup_last_timestamp_seconds", "End of the latest successful cleanup run (Unix time).", [], last)
    help_ = "Cleanup runs with errors since the last successful one."
    yield _gauge("cleanup_failed_passes", help_, now.failed_cleanups)
    issues = ((kind, now.issues.get(kind, 0)) for kind in ISSUE_TYPES)
    yield _counters("validation_issues", "Issues that cleanup runs found since the start, by type.", ["type"], issues)
    help_ = "Artifacts of deleted jobs and late results that wait for deletion."
    yield _gauge("artifact_tombstones", help_, now.sweeps.waiting)
    help_ = "How long the oldest of them has been due."
    yield _gauge("artifact_sweep_behind_seconds", help_, now.sweeps.behind_ms / SECOND_MS)
    swept = {"deleted": now.sweeps.deleted, "left": now.sweeps.kept, "failed": now.sweeps.failures}
    help_ = "Artifacts of deleted jobs since the start: deleted, kept because another job uses them, failed attempts."
    yield _counters("artifacts_swept", help_, ["outcome"], swept.items())
    firing = ((name, int(is_firing)) for name, is_firing in now.alerts.items())
    yield _gauges("alert_firing", "1 while the alert fires.", ["alert"], firing)


def _webhooks(now: Snapshot) -> Iterator[Metric]:
    help_ = (
        "Webhook messages since the start: delivered, failed attempts, dead-lettered, and gaps (events not delivered)."
    )
    family = CounterMetricFamily("jobd_webhook_deliveries", help_, labels=["endpoint", "outcome"])
    for name, each in now.webhooks.items():
        outcomes = {"delivered": each.delivered, "failed": each.failed, "given_up": each.given_up, "gap": each.gaps}
        for outcome, count in outcomes.items():
            family.add_metric([name, outcome], count)
    yield family
    waiting = ((name, each.waiting) for name, each in now.webhooks.items())
    yield _gauges("webhook_waiting_deliveries", "Messages that wait for delivery.", ["endpoint"], waiting)
    lags = ((name, each.lag) for name, each in now.webhooks.items())
    yield _gauges("webhook_lag_events", "Journal events not read for the webhook yet.", ["endpoint"], lags)
    paused = ((name, int(each.paused)) for name, each in now.webhooks.items())
    help_ = "1 while the circuit breaker of the webhook is open or half-open."
    yield _gauges("webhook_paused", help_, ["endpoint"], paused)


def _machine(now: Snapshot) -> Iterator[Metric]:
    modes = (("inline", int(now.commits_inline)), ("thread", int(not now.commits_inline)))
    yield _gauges("commit_mode", "1 for the current mode: `inline` in the event loop, or `thread`.", ["mode"], modes)
    yield _gauge("unprojected_events", "Committed events that the tables lack.", now.unprojected)
    for name, help_, counts, bounds in (
        ("commit_seconds", "Duration of a commit with its fsync.", now.commit_seconds, COMMIT_BUCKETS_S),
        ("batch_commands", "Commands per commit.", now.batch_commands, BATCH_BUCKETS),
    ):
        family = HistogramMetricFamily(f"jobd_{name}", help_)
        family.add_metric([], _buckets(counts[0], bounds), counts[1])
        yield family
    yield _gauge("mailbox_commands", "Commands that wait in the mailbox.", now.mailbox)
    yield _gauge("mailbox_limit_commands", "Maximum number of waiting commands (limits.mailbox).", now.mailbox_limit)
    yield _gauge("parked_claims", "Claims that wait for work.", now.waiting_claims)
    yield _gauge("event_streams", "Open event streams.", now.listeners)
    yield _counter("event_streams_dropped", "Event streams closed because the client read too slowly.", now.dropped)
    yield _gauge("loop_lag_seconds", "Worst lag of the event loop in the last 20 s.", now.lag_s)
    help_ = "Writes rejected because the disk is full: 0 none, 1 creates, 2 all but endings and deletions, 3 all."
    yield _gauge("disk_full", help_, now.disk_full)
    disks = [] if now.disk is None else [now.disk]
    help_ = "Free space of the store's disk that jobd can use."
    yield _gauges("disk_free_bytes", help_, [], [(disk.free_bytes,) for disk in disks])
    yield _gauges("disk_total_bytes", "Size of the disk of the store.", [], [(disk.total_bytes,) for disk in disks])
    yield _gauge(
        "clock_suspect", "1 while the wall clock is suspect and nothing is deleted or failed by age.", now.clock_suspect
    )


def cluster_metrics(view: ClusterView, append_seconds: Counts | None = None) -> Iterator[Metric]:
    """Yield the metrics of a node of a cluster. They have no values without a cluster."""
    nodes = [] if view.role == "single" else [view]
    yield _gauges("leader", "1 if this node leads its cluster.", [], [(node.role == "leader",) for node in nodes])
    help_ = "Events of the journal that this node has not applied."
    yield _gauges("standby_lag_events", help_, [], [(node.lag_events,) for node in nodes])
    help_ = "Duration of an append to the journal, by the leader."
    family = HistogramMetricFamily("jobd_journal_append_seconds", help_)
    if append_seconds is not None:
        family.add_metric([], _buckets(append_seconds[0], COMMIT_BUCKETS_S), append_seconds[1])
    yield family


def _build() -> Metric:
    build = [(__version__, platform.python_version(), 1)]
    return _gauges("build_info", "Version of jobd and of Python.", ["version", "python"], build)


def _files(store_path: str) -> Iterator[Metric]:
    yield _gauge("wal_bytes", "Size of the write-ahead log.", _size(log_of(store_path)))
    yield _gauge("database_bytes", "Size of the database file.", _size(store_path))


def oldest_due_s(state: State, now: int) -> dict[str, float]:
    """Return how long the oldest due job of each named queue has waited, or 0. Skips queues with very many kinds."""
    found, left = {}, MAX_BUCKETS_SCANNED
    for queue in islice(state.counts, QUEUES_SHOWN):
        left -= (buckets := state.due_buckets(queue))
        if left < 0:
            left += buckets
            continue
        oldest = state.oldest_due_at(queue)
        found[queue] = 0.0 if oldest is None else max(now - oldest, 0) / SECOND_MS
    return found


def capped(state: State) -> list[tuple[str, dict[str, int]]]:
    """Return the counts of the first QUEUES_SHOWN queues, and of all others together, to limit the label values."""
    shown = [(name, counts.copy()) for name, counts in islice(state.counts.items(), QUEUES_SHOWN)]
    if len(state.counts) <= QUEUES_SHOWN:
        return shown
    rest = {status: total - sum(counts[status] for _, counts in shown) for status, total in state.totals.items()}
    return [*shown, (OTHER_QUEUES, rest)]


def quantile(part: float, counts: Sequence[int], bounds: Sequence[float]) -> float | None:
    """Return the bound of the bucket with the quantile: infinity above all bounds, None if there are no counts."""
    wanted = part * sum(counts)
    if not wanted:
        return None
    return next(bound for total, bound in zip(accumulate(counts), (*bounds, math.inf), strict=True) if total >= wanted)


def _copy(histogram: Histogram) -> Counts:
    return histogram.counts.copy(), histogram.total


def _buckets(counts: list[int], bounds: Sequence[float]) -> list[tuple[str, float]]:
    """Return upper bounds with cumulative counts."""
    names = [*map(floatToGoString, bounds), "+Inf"]
    return list(zip(names, accumulate(counts), strict=True))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:  # no write-ahead log yet, or a store in memory
        return 0


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(f"jobd_{name}", help_, value=value)


def _counter(name: str, help_: str, value: float) -> Metric:
    """Make a counter, which is exported as `jobd_<name>_total`."""
    return CounterMetricFamily(f"jobd_{name}", help_, value=value)


def _gauges(name: str, help_: str, labels: list[str], rows: Iterable[tuple[str | float, ...]]) -> Metric:
    """Make a gauge with labels. Each row is the label values, then the value."""
    family = GaugeMetricFamily(f"jobd_{name}", help_, labels=labels)
    for *values, number in rows:
        family.add_metric([str(value) for value in values], float(number))
    return family


def _counters(name: str, help_: str, labels: list[str], rows: Iterable[tuple[str, float]]) -> Metric:
    family = CounterMetricFamily(f"jobd_{name}", help_, labels=labels)
    for value, number in rows:
        family.add_metric([value], number)
    return family
