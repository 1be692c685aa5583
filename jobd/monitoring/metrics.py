"""Export metrics as Prometheus text. Values are copied on the event loop and formatted in a thread."""

from __future__ import annotations

import asyncio
import math
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, islice
from typing import Final, get_args

from msgspec import Struct
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
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
from jobd.maintenance.stoppable_loop import StoppableLoop
from jobd.model.errors import ERROR_STATUS
from jobd.model.events import EventType
from jobd.model.job import SECOND_MS, STATUSES
from jobd.model.problems import Problem, Severity
from jobd.model.responses import ClusterView, ProcessStats
from jobd.model.webhooks import WebhookMetrics
from jobd.monitoring.problems.board import ProblemBoard
from jobd.monitoring.problems.catalogue import CONDITIONS
from jobd.storage.files import log_of

PROBLEM_QUEUES: Final = 50
QUEUES_SHOWN: Final = 200  # the first ones; the others are summed under OTHER_QUEUES
MAX_BUCKETS_SCANNED: Final = 2_000  # pairs of kind and priority scanned for the oldest due jobs
LAG_EVERY_S: Final = 1.0
COMMITS_KEPT: Final = 300  # seconds of commits that `vitals` covers
LAGS_KEPT: Final = 20  # the worst is exported, so that a scrape every 15 s misses none
FOUND_KINDS: Final = ("stalled", "expired_locks", "expired", "deleted", "issues")
ISSUE_TYPES: Final = ("error", "critical")  # cleanup runs do not count warnings

# Makes a metric from copied values, in another thread.
MakeMetric = Callable[[], Metric]


class Metrics(StoppableLoop):
    """Renders the metrics. From `run` until `stop` it measures the lag of the event loop.

    `error_counts` returns the errors sent by each listener, by code. A store in memory has no files; their sizes are 0.
    """

    def __init__(
        self,
        actor: Actor,
        maintainer: Maintainer,
        problems: ProblemBoard,
        clock: Clock,
        sweeps: SweepStats,
        store_path: str,
        error_counts: Callable[[], Iterable[Counter[str]]],
        feed: EventFeed,
        *,
        webhooks: Callable[[], Mapping[str, WebhookMetrics]] = dict,
        cluster: Callable[[], ClusterView] = lambda: ClusterView(role="single"),
        append_seconds: Histogram | None = None,
    ) -> None:
        super().__init__()
        self._actor = actor
        self._maintainer = maintainer
        self._problems = problems
        self._clock = clock
        self._sweeps = sweeps
        self._error_counts = error_counts
        self._feed = feed
        self._store_path = store_path
        self.webhooks = webhooks
        self.cluster = cluster
        self.append_seconds = append_seconds  # to the journal of a cluster, with COMMIT_BUCKETS_S
        self._lags: deque[float] = deque(maxlen=LAGS_KEPT)
        self._commits: deque[list[int]] = deque([actor.commit_seconds.counts.copy()], COMMITS_KEPT)
        self._started_s = time.monotonic()

    async def render(self) -> bytes:
        """Return the metrics in Prometheus text format 0.0.4."""
        return await asyncio.to_thread(text, self.families())

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

    def families(self) -> list[MakeMetric]:
        """Copy all values. Blocks the loop for well under a millisecond, or 2 ms with 100 kinds."""
        parts = self._jobs(), self._cleanup(), self._problem_states(), self._webhook_states(), self._machine()
        cluster = cluster_metrics(self.cluster(), self.append_seconds)
        return [*chain(*parts), *_files(self._store_path), *cluster, _build()]

    async def run(self) -> None:
        """Measure the lag of the event loop once a second."""
        while not self._stopping:
            began = time.perf_counter()
            await self._pause(LAG_EVERY_S)
            self._lags.append(max(time.perf_counter() - began - LAG_EVERY_S, 0.0))
            self._commits.append(self._actor.commit_seconds.counts.copy())

    def _jobs(self) -> Iterator[MakeMetric]:
        state, stats = self._actor.state, self._actor.state.counters
        by_status = ((status, state.totals[status]) for status in STATUSES)
        yield _gauges("jobs", "Jobs by status.", ["status"], by_status)
        queues = ((name, status, counts.get(status, 0)) for name, counts in capped(state) for status in STATUSES)
        yield _gauges("queue_jobs", "Jobs by queue and status.", ["queue", "status"], queues)
        paused = ((name, int(name in state.paused)) for name in islice(state.counts, QUEUES_SHOWN))
        yield _gauges("queue_paused", "1 while the queue is paused.", ["queue"], paused)
        help_ = "How long the oldest due job has been waiting, by queue."
        oldest = oldest_due_s(state, self._clock.moment().now)
        yield _gauges("queue_oldest_due_seconds", help_, ["queue"], oldest.items())
        yield _gauge("stalled_jobs", "Jobs whose worker has stalled.", len(state.processing.stalled))
        yield _gauge("locked_jobs", "Jobs whose lock has not expired.", state.processing.live_locks())
        yield _counters("grants", "Jobs granted to workers, by queue.", ["queue"], stats.grants.items())
        events = ((kind, stats.events.get(kind, 0)) for kind in get_args(EventType))
        yield _counters("events", "Committed events, by type.", ["type"], events)
        errors = sum(self._error_counts(), Counter[str]())
        rejections = ((code, errors[code]) for code in ERROR_STATUS)
        yield _counters(
            "rejections", "Error responses, by code; already_locked is lock contention.", ["code"], rejections
        )
        yield _counter("stalls", "Grants that ended because the worker stalled.", stats.stalls)
        recovered = {"reset": stats.reset, "failed": stats.failed}
        help_ = "Stalled jobs recovered: reset to queued, or failed."
        yield _counters("recovered", help_, ["action"], recovered.items())
        late = {"kept": stats.late_kept, "adopted": stats.late_adopted}
        yield _counters("late_results", "Results submitted after the lock was lost.", ["action"], late.items())
        help_ = "Time from grant to completion, by queue."
        yield _histograms("processing_seconds", help_, ["queue"], stats.processing, PROCESSING_BUCKETS_S)
        help_ = "95th percentile of processing times by kind, in the last hour and usually."
        durations = stats.baselines.view(self._clock.moment().now)
        yield _gauges("processing_p95_seconds", help_, ["kind", "window"], _durations(durations))
        help_ = "Jobs granted again while the previous worker had time left and had not reported that it stopped."
        yield _counter("granted_twice", help_, stats.double_grants.total)
        outcomes = ((outcome, stats.scheduled.get(outcome, 0)) for outcome in ("fired", "skipped", "missed"))
        yield _counters("schedule_fired", "Times of schedules, by outcome.", ["outcome"], outcomes)
        yield _gauge("quarantined_jobs", "Quarantined jobs.", len(state.quarantined))

    def _cleanup(self) -> Iterator[MakeMetric]:
        maintainer, sweeps = self._maintainer, self._sweeps
        totals, report = maintainer.totals, maintainer.last_success
        yield _counter("cleanup_runs", "Cleanup runs since the start.", totals.runs)
        found = ((kind, totals.found[kind]) for kind in FOUND_KINDS)
        help_ = "Jobs that recovery and cleanup runs acted on since the start."
        yield _counters("cleanup_found", help_, ["kind"], found)
        last = [] if report is None else [(report.timestamp / SECOND_MS,)]
        help_ = "End of the latest successful cleanup run (Unix time)."
        yield _gauges("cleanup_last_timestamp_seconds", help_, [], last)
        help_ = "Cleanup runs with errors since the last successful one."
        yield _gauge("cleanup_failed_runs", help_, maintainer.state().failed_since_last_success)
        issues = ((kind, totals.issues[kind]) for kind in ISSUE_TYPES)
        help_ = "Issues that cleanup runs found since the start, by type."
        yield _counters("validation_issues", help_, ["type"], issues)
        help_ = "Artifacts of deleted jobs and late results that wait for deletion."
        yield _gauge("artifact_tombstones", help_, sweeps.waiting)
        help_ = "How long the oldest artifact that waits for deletion has been due."
        yield _gauge("artifact_sweep_behind_seconds", help_, sweeps.behind_ms / SECOND_MS)
        swept = {"deleted": sweeps.deleted, "left": sweeps.kept, "failed": sweeps.failures}
        help_ = (
            "Artifacts of deleted jobs since the start: deleted, kept because another job uses them, failed attempts."
        )
        yield _counters("artifacts_swept", help_, ["outcome"], swept.items())

    def _problem_states(self) -> Iterator[MakeMetric]:
        problems, labels = self._problems.view().problems, ["condition", "severity"]
        now, opened = Counter((each.condition, each.severity) for each in problems), self._problems.life.opened_total
        keys: list[tuple[str, Severity]] = [(each.name, level) for each in CONDITIONS for level in get_args(Severity)]
        yield _gauges("problems", "Open problems.", labels, ((*key, now[key]) for key in keys))
        help_ = "Problems that were opened since the start."
        yield _counters("problems_opened", help_, labels, ((*key, opened[key]) for key in keys))
        help_ = "Jobs of the worst problems of queues."
        yield _gauges("problem_jobs", help_, ["condition", "queue"], _problem_jobs(problems))
        firing = ((alert.name, int(alert.firing)) for alert in self._problems.alerts())
        yield _gauges("alert_firing", "1 while the condition of the alert holds for any subject.", ["alert"], firing)

    def _webhook_states(self) -> Iterator[MakeMetric]:
        webhooks = self.webhooks()
        help_ = (
            "Webhook messages since the start: delivered, failed attempts, dead-lettered, and gaps (events not "
            "delivered)."
        )
        yield _counters("webhook_deliveries", help_, ["webhook", "outcome"], _outcomes(webhooks))
        waiting = ((name, each.waiting) for name, each in webhooks.items())
        yield _gauges("webhook_waiting_deliveries", "Messages that wait for delivery.", ["webhook"], waiting)
        lags = ((name, each.lag) for name, each in webhooks.items())
        yield _gauges("webhook_lag_events", "Events not read for the webhook yet.", ["webhook"], lags)
        paused = ((name, int(each.paused)) for name, each in webhooks.items())
        help_ = "1 while the circuit breaker of the webhook is open or half-open."
        yield _gauges("webhook_paused", help_, ["webhook"], paused)

    def _machine(self) -> Iterator[MakeMetric]:
        actor, feed, space = self._actor, self._feed, self._actor.full_disk.space
        modes = (("inline", int(actor.disk.commits_inline)), ("thread", int(not actor.disk.commits_inline)))
        help_ = "1 for the current mode: `inline` in the event loop, or `thread`."
        yield _gauges("commit_mode", help_, ["mode"], modes)
        yield _gauge("tail_events", "Committed events that the tables lack.", actor.disk.behind)
        help_ = "Duration of a commit with its fsync."
        yield _histogram("commit_seconds", help_, actor.commit_seconds, COMMIT_BUCKETS_S)
        yield _histogram("batch_commands", "Commands per commit.", actor.batch_commands, BATCH_BUCKETS)
        yield _gauge("mailbox_commands", "Commands that wait in the mailbox.", actor.waiting)
        help_ = "Maximum number of waiting commands (limits.mailbox)."
        yield _gauge("mailbox_limit_commands", help_, actor.bounds.mailbox)
        yield _gauge("parked_claims", "Claims that wait for work.", len(actor.waiting_claims))
        yield _gauge("response_bytes", "Bytes of responses that clients have not read.", actor.unread.bytes)
        yield _gauge("event_streams", "Open event streams.", feed.listeners)
        help_ = "Event streams closed because the client read too slowly."
        yield _counter("event_streams_dropped", help_, feed.dropped)
        help_ = "Worst lag of the event loop in the last 20 s."
        yield _gauge("loop_lag_seconds", help_, max(self._lags, default=0.0))
        help_ = "Writes rejected because the disk is full: 0 none, 1 creates, 2 all but endings and deletions, 3 all."
        yield _gauge("disk_full", help_, int(actor.full_disk.write_limit))
        disks = [] if space is None else [space]
        help_ = "Free space of the store's disk that jobd can use."
        yield _gauges("disk_free_bytes", help_, [], [(disk.free_bytes,) for disk in disks])
        help_ = "Size of the disk of the store."
        yield _gauges("disk_total_bytes", help_, [], [(disk.total_bytes,) for disk in disks])
        help_ = "1 while the wall clock is suspect and nothing is deleted or failed by age."
        yield _gauge("clock_suspect", help_, self._clock.suspect)


class _Collected(Struct):
    families: list[Metric]

    def collect(self) -> list[Metric]:
        return self.families


def text(families: Iterable[MakeMetric]) -> bytes:
    """Format the metrics, without those of the process. Reads the sizes of files: call this off the loop."""
    return generate_latest(_Collected([make() for make in families]))


def standby_text(cluster: ClusterView) -> bytes:
    return text([*cluster_metrics(cluster), _build()])


def _problem_jobs(problems: Iterable[Problem]) -> Iterator[tuple[str, str, int]]:
    """Return the jobs of the worst problems by condition and queue, and of all others together."""
    jobs = Counter({("", OTHER_QUEUES): 0})
    for each in problems:
        if each.subject.queue is not None:
            key = each.condition, each.subject.queue
            jobs[key if key in jobs or len(jobs) <= PROBLEM_QUEUES else ("", OTHER_QUEUES)] += each.jobs
    return ((*key, count) for key, count in jobs.items())


def _durations(durations: Iterable[KindDurations]) -> Iterator[tuple[str, str, float]]:
    for each in durations:
        for window, ms in (("hour", each.last_hour_ms), ("usual", each.usual_ms)):
            if ms is not None:
                yield each.kind, window, ms / SECOND_MS


def _outcomes(webhooks: Mapping[str, WebhookMetrics]) -> Iterator[tuple[str, str, int]]:
    for name, each in webhooks.items():
        yield name, "delivered", each.delivered
        yield name, "failed", each.failed
        yield name, "dead-lettered", each.dead_lettered
        yield name, "gap", each.gaps


def cluster_metrics(view: ClusterView, append_seconds: Histogram | None = None) -> Iterator[MakeMetric]:
    """Yield the metrics of a node of a cluster. They have no values without a cluster."""
    nodes = [] if view.role == "single" else [view]
    yield _gauges("leader", "1 if this node leads its cluster.", [], [(node.role == "leader",) for node in nodes])
    help_ = "Events that this node has not applied."
    yield _gauges("standby_lag_events", help_, [], [(node.lag_events,) for node in nodes])
    help_ = "Duration of an append to the journal, by the leader."
    yield _histogram("journal_append_seconds", help_, append_seconds, COMMIT_BUCKETS_S)


def _build() -> MakeMetric:
    build = [(__version__, platform.python_version(), 1)]
    return _gauges("build_info", "Version of jobd and of Python.", ["version", "python"], build)


def _files(store_path: str) -> Iterator[MakeMetric]:
    yield lambda: GaugeMetricFamily("jobd_wal_bytes", "Size of the write-ahead log.", value=_size(log_of(store_path)))
    yield lambda: GaugeMetricFamily("jobd_database_bytes", "Size of the database file.", value=_size(store_path))


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


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:  # no write-ahead log yet, or a store in memory
        return 0


def _gauge(name: str, help_: str, value: float) -> MakeMetric:
    return partial(GaugeMetricFamily, f"jobd_{name}", help_, value=value)


def _counter(name: str, help_: str, value: float) -> MakeMetric:
    """Prepare a counter, which is exported as `jobd_<name>_total`."""
    return partial(CounterMetricFamily, f"jobd_{name}", help_, value=value)


Rows = Iterable[tuple[str | float, ...]]  # the label values, then the value


def _gauges(name: str, help_: str, labels: list[str], rows: Rows) -> MakeMetric:
    return partial(_labelled, GaugeMetricFamily, name, help_, labels, list(rows))


def _counters(name: str, help_: str, labels: list[str], rows: Rows) -> MakeMetric:
    return partial(_labelled, CounterMetricFamily, name, help_, labels, list(rows))


def _labelled(
    kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, help_: str, labels: list[str], rows: Rows
) -> Metric:
    family = kind(f"jobd_{name}", help_, labels=labels)
    for *values, number in rows:
        family.add_metric([str(value) for value in values], float(number))
    return family


def _histogram(name: str, help_: str, histogram: Histogram | None, bounds: Sequence[float]) -> MakeMetric:
    """Prepare a histogram without labels, and without a value if `histogram` is None."""
    return _histograms(name, help_, [], {} if histogram is None else {"": histogram}, bounds)


def _histograms(
    name: str, help_: str, labels: list[str], histograms: Mapping[str, Histogram], bounds: Sequence[float]
) -> MakeMetric:
    copies = [(value, histogram.counts.copy(), histogram.total) for value, histogram in histograms.items()]
    names = [*map(floatToGoString, bounds), "+Inf"]

    def make() -> Metric:
        family = HistogramMetricFamily(f"jobd_{name}", help_, labels=labels)
        for value, counts, total in copies:
            buckets = list(zip(names, accumulate(counts), strict=True))
            family.add_metric([value] if labels else [], buckets, total)
        return family

    return make
