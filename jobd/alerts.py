"""Conditions that an operator is told of: when they hold, since when, and what to do.

Reads figures and the last measured health; changes nothing. Firing and resolving are logged here, once each.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import structlog
from msgspec import Struct

from jobd.answers import AlertView, CleanupReport, DatabaseHealth, HealthView, PartHealth
from jobd.book import Book
from jobd.commands import Moment
from jobd.job import MINUTE_MS, SECOND_MS
from jobd.pace import KindPace
from jobd.views import average_processing_s

log = structlog.get_logger("jobd.alerts")

NAMES: Final = (
    "stuck_jobs",
    "processing_jobs",
    "average_processing",
    "pass_issues",
    "granted_twice",
    "slower_than_usual",
    "database",
    "cache",
    "storage",
    "webhook_failing",
)
EVALUATE_EVERY_S: Final = 5.0
MEASURE_EVERY_S: Final = 30.0  # health costs a write and an fsync; whoever asks for it gets it sooner
NOTICEABLE_MS: Final = 100  # what takes less than that longer is no slower: twice of nothing is nothing
CALM: Final = 0.9  # a ratio that sits at its threshold fires once: it resolves below this part of it


class Thresholds(Struct, frozen=True):
    """An alert fires above its threshold, not at it."""

    stuck_jobs: int = 5
    processing_jobs: int = 20
    average_processing_ms: int = 10 * MINUTE_MS
    pass_issues: int = 10
    granted_twice: int = 0  # jobs in the last hour
    slower_than_usual: float = 2.0  # times the usual
    webhook_failing_ms: int = 5 * MINUTE_MS


class Clock(Protocol):
    def moment(self) -> Moment: ...


class Health(Protocol):
    last: HealthView | None

    async def view(self) -> HealthView: ...


class Cleanup(Protocol):
    @property
    def last_report(self) -> CleanupReport | None: ...


class Failing(Protocol):
    """A webhook that takes nothing."""

    @property
    def name(self) -> str: ...
    @property
    def for_ms(self) -> int: ...
    @property
    def error(self) -> str: ...


class Condition(Struct, frozen=True):
    """One alert as it is now. `value` and `threshold` are numbers of jobs or issues, seconds, times, 1 for not healthy.

    `hint` says what to look at where it fires, `quiet` what is so where it does not (None: the hint holds then, too).
    Once it fires it does so until `value` is no longer above `calm`, where that is given, and below the threshold.
    """

    name: str
    value: float
    threshold: float
    hint: str
    quiet: str | None = None
    calm: float | None = None


class Alerts:
    """`evaluate` is cheap and may be called at any time; `run` does so every few seconds, until `stop`."""

    def __init__(
        self, book: Book, clock: Clock, health: Health, cleanup: Cleanup, thresholds: Thresholds | None = None
    ) -> None:
        self.thresholds = thresholds or Thresholds()
        self.paces: list[KindPace] = []  # as of the last look
        self.on_change: list[Callable[[], None]] = []  # called when one fires, or fires no more
        self.failing_webhook: Callable[[], Failing | None] = lambda: None  # that which fails for longest
        self._book = book
        self._clock = clock
        self._health = health
        self._cleanup = cleanup
        self._since: dict[str, int] = {}  # of those that fire: wall time, Unix ms
        self._measured = False
        self._views: list[AlertView] = []  # as of the last look
        self._stop = asyncio.Event()

    def evaluate(self) -> list[AlertView]:
        """All alerts, in the order of NAMES."""
        at, before = self._clock.moment(), set(self._since)
        self._views = [self._judge(condition, at.now) for condition in self._conditions(at)]
        if before != set(self._since):
            self._tell()
        return self._views

    def known(self) -> list[AlertView] | None:
        """As of the last look; None while health was not measured: what nobody has looked at is not known to be well.

        It costs nothing, however often it is asked for.
        """
        return self._views if self._measured else None

    def _tell(self) -> None:
        for tell in self.on_change:
            tell()

    async def run(self) -> None:
        """Look at the figures every few seconds, and at health now and then. Survives whatever fails."""
        loop_time = asyncio.get_running_loop().time
        next_measurement = loop_time()
        while not self._stop.is_set():
            try:
                if loop_time() >= next_measurement:
                    next_measurement = loop_time() + MEASURE_EVERY_S
                    await self._health.view()
                self.evaluate()
                if not self._measured:
                    self._measured = True
                    self._tell()
            except Exception:
                log.exception("alerts_failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), EVALUATE_EVERY_S)

    def stop(self) -> None:
        self._stop.set()

    def _judge(self, condition: Condition, now: int) -> AlertView:
        """Firing or not; a change of that is logged."""
        name, limit = condition.name, condition.threshold
        if name in self._since and condition.calm is not None:
            limit = condition.calm
        firing = condition.value > limit
        hint = condition.hint if firing or condition.quiet is None else condition.quiet
        told = {"alert": name, "value": condition.value, "threshold": condition.threshold}
        if firing and name not in self._since:
            self._since[name] = now
            log.warning("alert_firing", **told, hint=hint)
        elif not firing and name in self._since:
            log.info("alert_resolved", **told, since=self._since.pop(name))
        return AlertView(name, firing, self._since.get(name), condition.value, condition.threshold, hint)

    def _conditions(self, at: Moment) -> Iterator[Condition]:
        yield self._stuck()
        yield self._processing()
        yield self._average(at)
        yield self._pass_issues()
        yield self._granted_twice(at)
        yield self._slower(at)
        yield from self._unhealthy()
        yield self._webhook()

    def _stuck(self) -> Condition:
        stuck, recovered = len(self._book.stuck), self._book.figures.since_report.recovered
        quiet = f"{stuck} jobs are stuck now, {recovered} were recovered since the last pass."
        hint = f"{quiet} Look for workers that crash or hang: jobctl workers, jobctl timeline ID"
        return Condition("stuck_jobs", stuck + recovered, self.thresholds.stuck_jobs, hint, quiet)

    def _processing(self) -> Condition:
        hint = "More work runs at once than is usual here. Compare with your workers: jobctl workers, jobctl locks"
        value, threshold = self._book.totals["processing"], self.thresholds.processing_jobs
        quiet = f"Jobs in processing: {value}, no more than is usual here."
        return Condition("processing_jobs", value, threshold, hint, quiet)

    def _average(self, at: Moment) -> Condition:
        value = average_processing_s(self._book, self._book.figures, at)
        threshold = self.thresholds.average_processing_ms / SECOND_MS
        hint = "Jobs take longer than is usual here (seconds on average, last hour). Look at the oldest: jobctl stats"
        quiet = "No job took any time in the last hour."
        if value:
            quiet = f"Jobs take no longer than is usual here: {value:g} s on average (last hour)."
        return Condition("average_processing", value, threshold, hint, quiet)

    def _pass_issues(self) -> Condition:
        report = self._cleanup.last_report
        value, quiet = 0, "No cleanup pass has ended yet."
        where = "The log names them; see one with: jobctl validate ID"
        if report is not None:
            value, quiet = report.validation_issues_found, "The last cleanup pass found no bad rows."
        if value:
            quiet = f"The last cleanup pass found few bad rows (issues: {value}). {where}"
        hint = f"The last cleanup pass found many bad rows. {where}"
        return Condition("pass_issues", value, self.thresholds.pass_issues, hint, quiet)

    def _granted_twice(self, at: Moment) -> Condition:
        overlaps = self._book.figures.overlaps
        value, hint = overlaps.last_hour(at.now), "No job was given away while its worker before had time left."
        if value and (last := overlaps.last) is not None:
            (token, next_token), (worker, next_worker) = last.tokens, last.workers
            hint = (
                f"Two workers may have worked on one job at once ({value} in the last hour). The last one: "
                f"{last.job_id} was taken from {worker} (token {token}) while its time ran on, and given to "
                f"{next_worker} (token {next_token}). Compare the tokens where its results lie; "
                f"who did it: jobctl timeline {last.job_id}"
            )
        return Condition("granted_twice", value, self.thresholds.granted_twice, hint)

    def _slower(self, at: Moment) -> Condition:
        """The kind that is furthest from its usual."""
        self.paces = self._book.figures.paces.view(at.now)
        threshold = self.thresholds.slower_than_usual
        slower = [found for pace in self.paces if (found := _times(pace)) is not None]
        value, quiet, hint = 0.0, "No kind of job is known to take longer than usual.", ""
        if slower:
            value, pace, last_s, usual_s = max(slower, key=lambda found: found[0])
            kind = f"kind {pace.kind}" if pace.kind else "no kind"
            quiet = (
                f"Jobs of {kind} take {last_s:g} s (95 of 100, last hour, {pace.completed} jobs); "
                f"usual is {usual_s:g} s."
            )
            look = "Look at what they wait for: the machine, the disk, a service; then at the oldest: jobctl stats"
            hint = f"{quiet} {look}"
        return Condition("slower_than_usual", value, threshold, hint, quiet, calm=threshold * CALM)

    def _unhealthy(self) -> Iterator[Condition]:
        """By the last measured health; while there is none, nothing is known to be wrong."""
        view = self._health.last
        parts: dict[str, DatabaseHealth | PartHealth | None] = {
            "database": None if view is None else view.database,
            "cache": None if view is None else view.cache,
            "storage": None if view is None else view.storage,
        }
        for name, part in parts.items():
            wrong = part is not None and part.status != "healthy"
            yield Condition(name, int(wrong), 0, "It was not measured yet." if part is None else part.message)

    def _webhook(self) -> Condition:
        """Seconds that the one has been failing that fails for longest."""
        threshold, worst = self.thresholds.webhook_failing_ms / SECOND_MS, self.failing_webhook()
        if worst is None:
            return Condition("webhook_failing", 0, threshold, "No webhook fails.")
        value, tried = worst.for_ms // SECOND_MS, f"The last try: {worst.error}"
        hint = (
            f"Webhook {worst.name} takes nothing. What it should be told is kept and tried again; "
            f"look with: jobctl webhooks. {tried}"
        )
        quiet = f"Webhook {worst.name} has taken nothing for {value} s; it is tried again. {tried}"
        return Condition("webhook_failing", value, threshold, hint, quiet)


def _times(pace: KindPace) -> tuple[float, KindPace, float, float] | None:
    """How many times the usual the last hour was, and both in seconds; None where nobody can say, or feel it."""
    if pace.last_hour_ms is None or pace.usual_ms is None or pace.last_hour_ms - pace.usual_ms < NOTICEABLE_MS:
        return None
    times = round(pace.last_hour_ms / max(pace.usual_ms, 1), 2)
    return times, pace, pace.last_hour_ms / SECOND_MS, pace.usual_ms / SECOND_MS
