"""Evaluate the catalogue every few seconds, in slices, and keep the list of problems that everything else reads."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Final

import structlog

from jobd.engine.clock import loop_time
from jobd.maintenance.stoppable_loop import StoppableLoop
from jobd.model.clocks import BootMs, MonotonicS
from jobd.model.events import Event
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS
from jobd.model.problems import Problem, ProblemList, Severity
from jobd.model.responses import AlertView
from jobd.model.storage import DiskSpace
from jobd.model.webhooks import OpenProblems
from jobd.monitoring.problems.catalogue import ALERT_OF, ALERTS, CONDITIONS, KNOWN, OF_CLUSTER, OF_PAIRS
from jobd.monitoring.problems.condition import Condition, DuePair, Scene
from jobd.monitoring.problems.life import CLEAR_MS, HOLD_MS, SUBJECTS, ProblemLife
from jobd.monitoring.problems.queues_and_kinds import SETTLED_MS

EVALUATE_EVERY_S: Final = 5.0
MEASURE_EVERY_S: Final = 10.0  # measuring costs a write with fsync, but an alert must fire within 45 s of a failure
QUIET: Final = "The condition holds for no subject, or was not measured yet."  # the hint of an alert
SLICE_S: Final = 0.0005
DUE_FOR_MS: Final = MINUTE_MS  # below it, no condition asks for a pair, unless its threshold is lower
MANY_PAIRS: Final = 2_000  # beyond, they are scanned less often
SCAN_MANY_EVERY_S: Final = 15.0
RATE_AFTER_MS: Final = 10 * MINUTE_MS
EVALUATIONS: Final = int(5 * MINUTE_MS / SECOND_MS / EVALUATE_EVERY_S) + 1  # of 5 minutes

log = structlog.get_logger("jobd.problems")


class ProblemBoard(StoppableLoop):
    """Calls `check` every few seconds from `run` until `stop`. The views are those of the latest check.

    `on_change` is called when problems open, close or become worse.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        hold_ms: int = HOLD_MS,
        clear_ms: int = CLEAR_MS,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.scene = scene
        self.on_change = on_change
        self.life = ProblemLife(hold_ms, clear_ms)
        self._boot_ms = scene.clock.boot_ms
        self._known: list[Problem] = []
        self._evaluated_at = 0
        self._first: BootMs | None = None  # the first check with measured health
        self._free: deque[tuple[BootMs, int]] = deque(maxlen=61)  # bytes of the disk in the last hour
        self._errors: deque[Counter[str]] = deque(maxlen=EVALUATIONS)
        self._next_scan = MonotonicS(0.0)

    def committed(self, changes: Sequence[Event]) -> None:
        """Count the changes of a committed batch."""
        self.scene.counts.note(changes)
        self.scene.losses.note(changes, self.scene.state.presence)

    # -- views ---------------------------------------------------------------------------------------------------------

    @property
    def is_known(self) -> bool:
        """Whether the list is complete: not in the first `hold_ms` after the start."""
        return self._first is not None and self._boot_ms() - self._first >= self.life.hold_ms

    def view(self, severity: Severity | None = None, queue: str | None = None) -> ProblemList:
        """Return the list, or only the problems of a severity or a queue."""
        if not self.is_known:
            return ProblemList([])
        listed, known = (
            [each for each in found if queue in (None, each.subject.queue)] for found in (self.life.listed, self._known)
        )
        shown = [each for each in listed if severity in (None, each.severity)]
        return ProblemList(shown, known, sum(each.rest for each in self.life.listed), self._evaluated_at)

    def announced(self) -> OpenProblems | None:
        """Return what webhooks announce, or None while it is not known.

        Until presence has settled, nothing is closed that was announced before the start.
        """
        if not self.is_known or self._first is None:
            return None
        settled = self._boot_ms() - self._first >= SETTLED_MS + self.life.hold_ms + EVALUATE_EVERY_S * SECOND_MS
        listed = self.life.listed
        return OpenProblems(listed, {each.id: self.life.changed_at(each.id) for each in listed}, settled)

    def alerts(self) -> list[AlertView]:
        """Return the alerts, which are derived: one fires while its condition holds for any subject."""
        shown = (each for each in ALERTS.values() if each not in OF_CLUSTER or self.scene.cluster().role != "single")
        open_: dict[str, list[Problem]] = {}
        for problem in self.life.open_problems():
            open_.setdefault(ALERT_OF[problem.condition], []).append(problem)
        return [self._alert(each, open_.get(each.alert, [])) for each in shown]

    def _alert(self, condition: Condition, found: list[Problem]) -> AlertView:
        threshold = condition.alert_threshold(self.scene.limits)
        if not found:
            return AlertView(condition.alert, False, None, 0, threshold, QUIET, condition.severity)
        worst, value = found[0], condition.alert_value(max(each.value for each in found))
        advice = "".join(f" {cure.label}: {cure.command}." for cure in worst.cure if cure.command)
        more = f" And {len(found) - 1} more: jobctl status." if len(found) > 1 else ""
        named = f"{worst.name}: " if worst.subject.parts != (worst.subject.type,) else ""
        hint = f"{named}{worst.title}{f' {worst.cause}' if worst.cause else ''}{advice}{more}"
        since = min(each.since for each in found)
        return AlertView(condition.alert, True, since, value, threshold, hint, worst.severity)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Check every few seconds, and measure health now and then. Errors are logged."""
        next_measurement = loop_time()
        while not self._stopping:
            began = loop_time()
            try:
                if began >= next_measurement:
                    next_measurement = began + MEASURE_EVERY_S
                    await self.scene.health.view()
                was_known = self.is_known
                await self.check()
                if self._first is None:
                    self._first = self._boot_ms()
                if not was_known and self.is_known:
                    self.on_change()
            except Exception:
                log.exception("problems_failed")
            # From one beginning to the next, so that a disk that responds late delays no problem.
            await self._pause(max(began + EVALUATE_EVERY_S - loop_time(), EVALUATE_EVERY_S / 2))

    async def check(self) -> None:
        """Read what the conditions need, evaluate them, and update the list. A slice takes about half a millisecond."""
        slices, is_scanned, scene = _Slices(), loop_time() >= self._next_scan, self.scene
        if is_scanned:
            await self._scan(slices)
        await self._look()
        now, boot_ms = scene.at.now, self._boot_ms()
        for condition in CONDITIONS:
            if condition in OF_PAIRS and not is_scanned:
                self.life.find_again(condition, boot_ms)
            else:
                await slices.of(self.life.find(condition, condition.find(scene), now, boot_ms))
        known: list[Problem] = []
        found = (problem for condition in KNOWN for problem in condition.known(scene))
        await slices.of(islice(found, SUBJECTS), known.append)
        self._known, self._evaluated_at = known, now
        if self.life.update(now, boot_ms):
            self.on_change()
        await slices.of(self.life.write_log())

    async def _scan(self, slices: _Slices) -> None:
        """Read what the conditions of queues and kinds need. Many pairs are scanned less often."""
        scene, boot_ms = self.scene, self._boot_ms()
        for old in (scene.there, scene.left, scene.running, scene.due, scene.recent):
            old.clear()
            await slices.end()
        scene.at = scene.clock.moment()
        await slices.of(self._read_workers())
        await slices.of(self._read_running())
        pairs = await slices.of(self._read_due())
        await slices.of(scene.counts.recent(scene.at.now), scene.recent.append)
        if scene.trends.is_over(boot_ms):
            counts: dict[str, int] = {}
            backlogs = ((pair.id("backlog_grows"), pair.due) for pair in scene.due.values())
            retries = ((f"retry_backlog/{queue}", count) for queue, count in list(self.scene.state.retrying.items()))
            await slices.of(chain(backlogs, retries), lambda each: counts.update([each]))
            scene.trends.note(counts, boot_ms)
        self._next_scan = loop_time() + (SCAN_MANY_EVERY_S if pairs > MANY_PAIRS else 0)

    async def _look(self) -> None:
        """Read what holds at this moment."""
        scene, scene.space = self.scene, await self.scene.health.space()
        scene.at, scene.opened = scene.clock.moment(), self.life.opened
        scene.up_ms = 0 if self._first is None else self._boot_ms() - self._first + self.life.hold_ms
        scene.full_in_ms = self._full_in_ms(scene.space)
        self._errors.append(sum(scene.error_counts(), Counter[str]()))
        scene.rejected = self._errors[-1] - self._errors[0]

    def _full_in_ms(self, space: DiskSpace | None) -> float | None:
        """Return when the disk is full at the rate of the last hour, once it was measured for ten minutes.

        None if it would be full later than `disk_full_within` had nothing been written in the part of that hour before
        the start: a burst shortly after it is no rate.
        """
        boot_ms = self._boot_ms()
        if space is None:
            return None
        if not self._free or boot_ms - self._free[-1][0] >= MINUTE_MS:
            self._free.append((boot_ms, space.free_bytes))
        since, free_bytes = self._free[0]
        used_bytes = free_bytes - space.free_bytes
        is_fast = used_bytes * self.scene.limits.disk_full_within > space.free_bytes * HOUR_MS
        if used_bytes <= 0 or boot_ms - since < RATE_AFTER_MS or not is_fast:
            return None
        return space.free_bytes * (boot_ms - since) / used_bytes

    def _read_workers(self) -> Iterator[None]:
        """Count the workers of each claim set by state. Those without a remembered claim have the set None."""
        scene, presence = self.scene, self.scene.state.presence
        for name, worker in presence.remembered():
            claims, state, heard = worker.claims, presence.state(worker), (worker.last_seen_at, name)
            if state in ("died", "gone"):
                scene.left[claims] = max(heard, scene.left.get(claims, heard))
            else:
                scene.there[claims][state] += 1
            yield

    def _read_running(self) -> Iterator[None]:
        """Find since when the oldest job with a live lock of each queue and kind has been running."""
        running = self.scene.running
        for job in self.scene.running_jobs():
            if job is not None:
                pair = job.options.queue, job.options.kind
                started_at = job.started_at or job.created_at
                running[pair] = min(running.get(pair, started_at), started_at)
            yield

    def _read_due(self) -> Iterator[None]:
        """Find the pairs whose oldest due job has waited for a minute, or a lower threshold. Yields once for each pair.

        A suspect jump of the wall clock does not lengthen the wait of jobs.
        """
        state, at, limits = self.scene.state, self.scene.at, self.scene.limits
        now = min(at.now, at.believed)
        times_ms = limits.queue_without_workers, 0.8 * limits.queue_waits, limits.paused_without_reason
        due_for_ms = min(DUE_FOR_MS, *times_ms)
        for queue in list(state.counts):
            for kind in state.queued_kinds(queue):
                yield None
                _, entry = state.oldest_of_kind(queue, kind, now)
                job = None if entry is None else state.jobs.get(entry[3])
                if entry is not None and job is not None and (wait_ms := now - job.waits_since(now)) >= due_for_ms:
                    due, best = state.due_of_kind(queue, kind, now)
                    self.scene.due[queue, kind] = DuePair(queue, kind, due, wait_ms, entry[3], best < entry[0])


class _Slices:
    """Let the loop run after each slice of an evaluation."""

    def __init__(self) -> None:
        self._began = loop_time()

    async def of(self, items: Iterable[object], take: Callable[[Any], object] | None = None) -> int:
        """Take the items. Return how many were read, with those that are None."""
        read = 0
        for read, item in enumerate(items, 1):
            if item is not None and take is not None:
                take(item)
            if read % 8 == 0:  # reading the time costs more than most items
                await self.end()
        await self.end()
        return read

    async def end(self) -> None:
        """Let the loop run if the slice has lasted long enough."""
        if loop_time() - self._began >= SLICE_S:
            await asyncio.sleep(0)
            self._began = loop_time()
