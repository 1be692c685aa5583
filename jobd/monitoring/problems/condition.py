"""Conditions: what each one reads, what it finds, and its thresholds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

from msgspec import Struct, field

from jobd.core.state import State
from jobd.core.worker_presence import ClaimSet
from jobd.engine.clock import Clock
from jobd.maintenance.maintainer import Maintainer
from jobd.model.clocks import LockMs
from jobd.model.commands import Moment, WorkerState
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS, Job
from jobd.model.problems import Cure, Problem, Severity, Subject, Unit
from jobd.model.responses import ClusterView, DiskUse
from jobd.model.storage import DiskSpace
from jobd.model.webhooks import FailingWebhook
from jobd.monitoring.health import Health
from jobd.monitoring.problems.losses import WorkerLosses
from jobd.monitoring.problems.queue_kind_counts import Pair, PairCounts, Tally
from jobd.monitoring.problems.trends import Trends

CLOSE_RATIO: Final = 0.9  # a ratio closes at this part of its threshold, so that a value near it does not flap
GIB: Final = 1 << 30
RUNNING_READ: Final = 10_000


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


class Finding(Struct, frozen=True, gc=False):
    """A subject for which a condition holds now.

    Unless given, `value` is the wait if the unit is ms, else the number of jobs, and `severity` that of the condition.
    `since` is for conditions that are known, whose findings are not tracked.
    """

    subject: Subject
    title: str
    jobs: int = 0
    wait_ms: int = 0
    value: float | None = None
    severity: Severity | None = None
    cause: str = ""
    cure: tuple[Cure, ...] = ()
    since: int = 0


class Draft(NamedTuple):
    """A finding of a subject of which there may be thousands. It is made only if the subject is chosen."""

    rank: tuple[int, int]
    id: str
    make: Callable[[], Finding]


class Crew(Struct):
    """How many workers of claim sets are there, by state, and when the last of the others was heard, with its name."""

    there: Counter[WorkerState] = field(default_factory=Counter)
    last: tuple[int, str] | None = None


class DuePair(Pair, frozen=True, gc=False):
    """A queue and a kind with due jobs. `job_id` waits longest. `is_behind`: others have a better priority."""

    due: int
    wait_ms: int
    job_id: str
    is_behind: bool = False


class Scene(Struct, kw_only=True):
    """What an evaluation reads: parts of the daemon, what the latest scan found, and what was measured last."""

    state: State
    clock: Clock
    health: Health
    cleanup: Maintainer
    limits: Thresholds = Thresholds()
    failing_webhooks: Callable[[], Iterable[FailingWebhook]] = tuple
    cluster: Callable[[], ClusterView] = lambda: ClusterView(role="single")
    rejects_creates: Callable[[], bool] = lambda: False
    error_counts: Callable[[], Iterable[Counter[str]]] = tuple
    disk_use: Callable[[], DiskUse | None] = lambda: None  # None: it is being measured
    counts: PairCounts = field(default_factory=PairCounts)
    losses: WorkerLosses = field(default_factory=WorkerLosses)
    trends: Trends = field(default_factory=Trends)
    # The latest scan.
    crews: defaultdict[ClaimSet | None, Crew] = field(default_factory=lambda: defaultdict(Crew))
    running: dict[str, int] = {}  # pair_id("running", …) -> the oldest started_at of its jobs with a live lock
    due: dict[tuple[str, str], DuePair] = {}  # by queue and kind
    tallies: list[Tally] = []
    # The latest evaluation.
    at: Moment = Moment(0, LockMs(0), 0)
    opened: frozenset[str] = frozenset()  # ids of open problems, whose thresholds to close are lower
    up_ms: int = HOUR_MS  # since the start, when a finding of now can be a problem
    space: DiskSpace | None = None
    full_in_ms: float | None = None  # at the rate of the last hour; None if it is not known or the disk does not fill
    rejected: Mapping[str, int] = {}  # code -> error responses of the last 5 minutes

    def due_of(self, queue: str) -> list[DuePair]:
        return [pair for kind in self.state.queued_kinds(queue) if (pair := self.due.get((queue, kind))) is not None]

    def running_jobs(self) -> Iterator[Job | None]:
        """Iterate over the jobs with live locks, the oldest grant first. Yields once for each processing job."""
        for job in list(islice(self.state.processing.values(), RUNNING_READ)):
            yield job if job.deadlines is not None and job.deadlines.is_live(self.at.lock_ms) else None

    def exceeds(self, id_: str, value: float, threshold: float, close_at: float) -> bool:
        """Return whether a value is above the threshold, or, of an open problem, above the value at which it closes."""
        return value > (close_at if id_ in self.opened else threshold)


class Condition(Struct, frozen=True):
    """One row of the catalogue.

    `check` returns the finding of one item of `each`, if the condition holds for it, or of the scene if `each` is None.
    A slice may end after each item, and items that are None are not checked. `alert` is the name of the alert that is
    derived from it, and of its threshold. `per` is the value of the problem for 1 of the alert, if the unit does not
    give it. `hides` names conditions whose problems are explained by one of this condition, if their subjects overlap.
    """

    name: str
    severity: Severity
    check: Callable[..., Finding | Draft | None]
    each: Callable[[Scene], Iterable[Any]] | None = None
    unit: Unit = "jobs"
    alert: str = ""
    per: int | None = None
    hides: tuple[str, ...] = ()

    def find(self, scene: Scene) -> Iterable[Finding | Draft | None]:
        if self.each is None:
            return (self.check(scene),)
        return (None if item is None else self.check(scene, item) for item in self.each(scene))

    def known(self, scene: Scene) -> Iterable[Problem]:
        """Make the problems of a condition whose findings need no action, and are not tracked."""
        for found in self.find(scene):
            if isinstance(found, Finding):
                yield self.problem(problem_id(self.name, found.subject), found, found.since)

    def problem(self, id_: str, finding: Finding, since: int) -> Problem:
        value = finding.value
        if value is None:
            value = finding.wait_ms if self.unit == "ms" else finding.jobs or 1
        return Problem(
            id=id_,
            condition=self.name,
            severity=finding.severity or self.severity,
            subject=finding.subject,
            since=since,
            jobs=finding.jobs,
            value=round(value, 4),
            unit=self.unit,
            title=finding.title,
            cause=finding.cause,
            cure=list(finding.cure),
        )

    def alert_threshold(self, limits: Thresholds) -> float:
        name = self.alert if hasattr(limits, self.alert) else f"{self.alert}_ms"
        limit: float = getattr(limits, name, 0)
        return limit / SECOND_MS if self.unit == "ms" else limit

    def alert_value(self, value: float) -> float:
        """Return a value as alerts have it: in seconds instead of ms, as a ratio instead of percent."""
        return value / (self.per or {"ms": SECOND_MS, "percent": 100}.get(self.unit, 1))


def rank_of(jobs: int, wait_ms: int = 0) -> tuple[int, int]:
    """The more jobs wait for the longer, the worse."""
    return max(jobs, 1) * max(wait_ms, 1), jobs


def problem_id(condition: str, subject: Subject) -> str:
    return "/".join((condition, *subject.parts))


def plural(count: int, noun: str, one: str = "", many: str = "") -> str:
    """Return the count and its noun, and then the verb for one or for many."""
    return f"{count:,} {noun} {one}".rstrip() if count == 1 else f"{count:,} {noun}s {many}".rstrip()


def job_cure(label: str, verb: str, job_id: str, *, changes: bool = False) -> Cure:
    return Cure(label, f"jobctl {verb} {job_id}", f"/jobs/{job_id}", changes)
