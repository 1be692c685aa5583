"""Conditions: what each one reads, what it finds, and its thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from msgspec import Struct

from jobd.core.state import State
from jobd.core.stats import KindDurations
from jobd.core.worker_presence import ClaimSet
from jobd.maintenance.cleanup_run import InvalidRows
from jobd.model.commands import Moment
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS
from jobd.model.problems import Cure, Severity, Subject, Unit
from jobd.model.responses import ClusterView, DiskUse, HealthView
from jobd.model.storage import DiskSpace
from jobd.model.webhooks import FailingWebhook
from jobd.monitoring.problems.losses import WorkerLosses
from jobd.monitoring.problems.queue_kind_counts import PairCounts, Tally
from jobd.monitoring.problems.trends import Trends

CLOSE_RATIO: Final = 0.9  # a ratio closes at this part of its threshold, so that a value near it does not flap
GIB: Final = 1 << 30


class Thresholds(Struct, frozen=True):
    """Thresholds of the conditions. Unless noted, a condition holds above its threshold, not at it."""

    stalled_jobs: int = 5
    processing_jobs: int = 20
    average_processing_ms: int = 10 * MINUTE_MS
    cleanup_issues: int = 10
    granted_twice: int = 0  # jobs in the last hour
    slower_than_usual: float = 2.0  # ratio to the usual duration
    webhook_failing_ms: int = 5 * MINUTE_MS
    queue_without_workers_ms: int = 2 * MINUTE_MS
    queue_waits_ms: int = 5 * MINUTE_MS
    failure_rate: float = 0.5  # of the attempts of a queue and kind; also holds at the threshold
    failure_rate_attempts: int = 20
    disk_free_percent: float = 10.0
    disk_free_bytes: int = GIB
    release_loop: int = 0  # jobs
    disk_full_within_ms: int = 6 * HOUR_MS
    backlog_grows: int = 50  # due jobs more than 10 minutes ago; from here on, most also hold at the threshold
    retry_backlog: int = 20
    rejecting: int = 10  # responses in 5 minutes
    expiring: float = 0.1  # of the jobs that ended in 10 minutes
    expiring_jobs: int = 10
    due_far_jobs: int = 20  # created in 10 minutes
    paused_without_reason_ms: int = 15 * MINUTE_MS
    quiet_long_ms: int = 24 * HOUR_MS
    no_progress_ms: int = 10 * MINUTE_MS
    no_progress_times: float = 3.0  # the usual duration
    kills_workers: int = 2
    workers_die: int = 3  # of a host and version, in 10 minutes
    workers_die_stalls: int = 5
    workers_die_share: float = 0.2  # of the workers, or of the grants
    standby_behind_ms: int = 30 * SECOND_MS
    database_horizon_ms: int = MINUTE_MS
    clocks_differ_ms: int = SECOND_MS

    @property
    def disk_nearly_full(self) -> float:
        return 100 - self.disk_free_percent


class Finding(Struct, frozen=True, kw_only=True, gc=False):
    """A subject for which a condition holds now. `severity` is that of the condition if it is None."""

    subject: Subject
    title: str
    value: float = 1
    jobs: int = 0
    wait_ms: int = 0
    severity: Severity | None = None
    cause: str = ""
    cure: tuple[Cure, ...] = ()

    @property
    def rank(self) -> tuple[int, int]:
        """The more jobs wait for the longer, the worse."""
        return rank_of(self.jobs, self.wait_ms)


class Draft(NamedTuple):
    """A finding of a subject of which there may be thousands. It is made only if the subject is chosen."""

    id: str
    rank: tuple[int, int]
    make: Callable[[], Finding]


class Crew(Struct, gc=False):
    """How many workers of one claim set are in each state, and the one heard last of those that died or are gone."""

    silent: int = 0
    busy: int = 0
    waiting: int = 0
    idle: int = 0
    last: str | None = None


class DuePair(Struct, frozen=True, gc=False):
    """A queue and a kind with due jobs. `job_id` waits longest. `is_behind`: others have a better priority."""

    queue: str
    kind: str
    due: int
    wait_ms: int
    job_id: str
    is_behind: bool = False

    @property
    def subject(self) -> Subject:
        return Subject(type="pair", queue=self.queue, kind=self.kind)

    @property
    def rank(self) -> tuple[int, int]:
        return rank_of(self.due, self.wait_ms)


class Scene(Struct, kw_only=True):
    """What an evaluation reads. `opened` are the ids of open problems, whose thresholds to close are lower."""

    state: State
    at: Moment
    limits: Thresholds
    opened: frozenset[str] = frozenset()
    up_ms: int = HOUR_MS  # since the start, when a finding of now can be a problem
    health: HealthView | None = None
    damage: str | None = None  # of the store, as health says it
    space: DiskSpace | None = None
    full_in_ms: float | None = None  # at the rate of the last hour; None if it is not known or the disk does not fill
    disk_use: Callable[[], DiskUse | None] = lambda: None  # None: it is being measured
    rejects_creates: bool = False
    invalid: InvalidRows = InvalidRows(0, ())
    failing_webhooks: Iterable[FailingWebhook] = ()
    cluster: ClusterView
    counts: PairCounts
    losses: WorkerLosses
    durations: Iterable[KindDurations] = ()
    due: Iterable[DuePair] = ()
    tallies: Iterable[Tally] = ()
    trends: Trends
    rejected: Mapping[str, int] = {}  # code -> error responses of the last 5 minutes
    crews: Mapping[ClaimSet | None, Crew] = {}
    running: Mapping[str, int] = {}  # pair_id("running", …) -> the oldest started_at of its jobs with a live lock

    def exceeds(self, id_: str, value: float, threshold: float, close_at: float | None = None) -> bool:
        """Return whether a value is above the threshold, or, of an open problem, above the value at which it closes."""
        return value > (threshold if close_at is None or id_ not in self.opened else close_at)


class Condition(Struct, frozen=True):
    """One row of the catalogue.

    `find` yields the subjects for which it holds, and None where a slice may end. `alert` is the name of the alert that
    is derived from it, and of its threshold. `per` is the value of the problem for 1 of the alert, if the unit does not
    give it. `hides` names conditions whose problems are explained by one of this condition, if their subjects overlap.
    `of_pairs`: it reads all queues and kinds, and is evaluated less often if they are many.
    """

    name: str
    severity: Severity
    find: Callable[[Scene], Iterable[Finding | Draft | None]]
    unit: Unit = "jobs"
    alert: str = ""
    per: int | None = None
    hides: tuple[str, ...] = ()
    of_cluster: bool = False
    of_pairs: bool = False

    def alert_threshold(self, limits: Thresholds) -> float:
        name = self.alert if hasattr(limits, self.alert) else f"{self.alert}_ms"
        limit: float = getattr(limits, name, 0)
        return limit / SECOND_MS if self.unit == "ms" else limit

    def alert_value(self, value: float) -> float:
        """Return a value as alerts have it: in seconds instead of ms, as a ratio instead of percent."""
        return value / (self.per or {"ms": SECOND_MS, "percent": 100}.get(self.unit, 1))


def rank_of(jobs: int, wait_ms: int = 0) -> tuple[int, int]:
    return max(jobs, 1) * max(wait_ms, 1), jobs


def problem_id(condition: str, subject: Subject) -> str:
    return "/".join((condition, *subject.parts))


def pair_id(condition: str, queue: str, kind: str = "") -> str:
    """Return the `problem_id` of a queue and a kind, at a fifth of the cost."""
    return f"{condition}/{queue}/{kind}" if kind else f"{condition}/{queue}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
