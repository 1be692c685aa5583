"""Conditions: what each one reads, what it finds, and its thresholds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

from msgspec import Struct, field

from jobd.config import AlertsSection
from jobd.core.state import State
from jobd.core.worker_presence import ClaimSet
from jobd.engine.clock import Clock
from jobd.maintenance.maintainer import Maintainer
from jobd.model.clocks import LockMs
from jobd.model.commands import Moment, WorkerState
from jobd.model.job import HOUR_MS, SECOND_MS, Job
from jobd.model.problems import Cure, Problem, Severity, Subject, Unit
from jobd.model.responses import ClusterView, DiskUse
from jobd.model.storage import DiskSpace
from jobd.model.webhooks import FailingWebhook
from jobd.monitoring.health import Health
from jobd.monitoring.problems.losses import WorkerLosses
from jobd.monitoring.problems.queue_kind_counts import Pair, PairCounts, QueueKindCounts, Trends

CLOSE_RATIO: Final = 0.9  # a ratio closes at this part of its threshold, so that a value near it does not flap
RUNNING_READ: Final = 10_000


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


class DuePair(Pair, gc=False):
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
    limits: AlertsSection = AlertsSection()
    failing_webhooks: Callable[[], Iterable[FailingWebhook]] = tuple
    cluster: Callable[[], ClusterView] = lambda: ClusterView(role="single")
    rejects_creates: Callable[[], bool] = lambda: False
    error_counts: Callable[[], Iterable[Counter[str]]] = tuple
    disk_use: Callable[[], DiskUse | None] = lambda: None  # None: it is being measured
    counts: QueueKindCounts = field(default_factory=QueueKindCounts)
    losses: WorkerLosses = field(default_factory=WorkerLosses)
    trends: Trends = field(default_factory=Trends)
    # The latest scan.
    there: defaultdict[ClaimSet | None, Counter[WorkerState]] = field(default_factory=lambda: defaultdict(Counter))
    left: dict[ClaimSet | None, tuple[int, str]] = {}  # when the last of the others was heard, and its name
    running: dict[tuple[str, str], int] = {}  # queue and kind -> the oldest started_at of their jobs with a live lock
    due: dict[tuple[str, str], DuePair] = {}  # by queue and kind
    recent: list[PairCounts] = []  # those with events in the last 10 minutes
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
    derived from it, and of its threshold. `hides` names conditions whose problems are explained by one of this
    condition, if their subjects overlap.
    """

    name: str
    severity: Severity
    check: Callable[..., Finding | Draft | None]
    each: Callable[[Scene], Iterable[Any]] | None = None
    unit: Unit = "jobs"
    alert: str = ""
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

    def alert_threshold(self, limits: AlertsSection) -> float:
        if self.alert == "disk_nearly_full":
            return 100 - limits.disk_free_percent
        limit: float = getattr(limits, self.alert, 0)
        return limit / SECOND_MS if self.unit == "ms" else limit

    def alert_value(self, value: float) -> float:
        """Return a value as alerts have it: in seconds, or as a ratio unless it is of the disk."""
        scale = {"ms": SECOND_MS, "percent": 1 if self.alert == "disk_nearly_full" else 100}
        return value / scale.get(self.unit, 1)


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
