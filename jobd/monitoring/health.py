"""Measure the health of the database, of memory, of the artifact store and of cleanup.

Measuring changes no job and never raises. A part that cannot be measured is unhealthy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from itertools import chain, islice
from typing import Any, Final

import structlog
from msgspec import UNSET
from msgspec.structs import replace

from jobd.engine.actor import Actor
from jobd.engine.clock import Clock, loop_time
from jobd.engine.disk_full import WriteLimit
from jobd.maintenance.artifact_sweeper import ArtifactSweeper
from jobd.maintenance.maintainer import Maintainer
from jobd.model.clocks import MonotonicS
from jobd.model.commands import Ping
from jobd.model.errors import ApiError
from jobd.model.job import STATUSES, Job
from jobd.model.responses import CleanupHealth, ClusterView, DatabaseHealth, HealthStatus, HealthView, PartHealth
from jobd.model.storage import IN_MEMORY, RESERVE_BYTES, SPARE_BYTES, DiskFull, DiskSpace
from jobd.storage.artifacts.base import ArtifactStore, ArtifactStoreError

log = structlog.get_logger("jobd.health")

MAX_AGE_S: Final = 5.0
SPACE_MAX_AGE_S: Final = 1.0
TIMEOUT_S: Final = 2.0  # per part; a slower part is unhealthy, and is not measured again until it responds
STORAGE_TIMEOUT_S: Final = 5.0  # a bucket may have a high latency
SAMPLE: Final = 50  # jobs compared with the disk
SAMPLED_FROM: Final = 10_000  # the oldest live jobs; each sample continues where the previous one ended
COMPARISONS: Final = 3
MAX_FAULTS: Final = 100
MAX_NAMED: Final = 5  # jobs or faults named in a message
_FROM_BEST_TO_WORST: Final[tuple[HealthStatus, ...]] = ("healthy", "degraded", "unhealthy")
_LIMITS: Final = {
    WriteLimit.NONE: "writes are accepted, but a test write failed",
    WriteLimit.CREATES: "new jobs are rejected",
    WriteLimit.ALL_BUT_ENDINGS: "only writes that end or delete jobs are accepted",
    WriteLimit.ALL_WRITES: "every change is rejected",
}


class Health:
    """Measures health on demand. `last` is the latest result, `damage` its sentences about damaged rows and files.

    `faults` are sentences about damage found at start. `take_faults` returns the damage found since its last call.
    `artifacts` and `sweeper` are None if no artifact store is configured.
    """

    def __init__(
        self,
        actor: Actor,
        clock: Clock,
        cleanup: Maintainer,
        *,
        faults: Iterable[str] = (),
        take_faults: Callable[[], Iterable[str]] = tuple,
        artifacts: ArtifactStore | None = None,
        sweeper: ArtifactSweeper | None = None,
        is_in_memory: bool = False,
        output_failure: Callable[[], str | None] = lambda: None,
        cluster: Callable[[], ClusterView] = lambda: ClusterView(role="single"),
    ) -> None:
        self.last: HealthView | None = None
        self.damage: str | None = None
        self.cluster = cluster
        self._actor = actor
        self._clock = clock
        self._cleanup = cleanup
        self._artifacts = artifacts
        self._sweeper = sweeper
        self._is_in_memory = is_in_memory
        self._output_failure = output_failure
        self._faults: deque[str] = deque(faults, MAX_FAULTS)
        self._take_faults = take_faults
        self._known = self._known_now()  # as of the latest measurement
        self._measured_at = MonotonicS(0.0)  # at the start of the measurement
        self._space_at: MonotonicS | None = None  # when the free space was read
        self._measuring: asyncio.Task[HealthView] | None = None
        self._pending: dict[str, asyncio.Task[Any]] = {}  # measurements without a response yet
        self._next_sample = 0

    async def view(self) -> HealthView:
        """Return the health of the daemon, at most 5 s old. Concurrent callers share a measurement."""
        measured_at = loop_time()
        is_fresh = measured_at - self._measured_at < MAX_AGE_S and self._known == self._known_now()
        if self.last is not None and self._measuring is None and is_fresh:
            return self._as_of_now(self.last)
        if self._measuring is None:
            self._measured_at, self._known = measured_at, self._known_now()
            self._measuring = asyncio.create_task(self._measure())
        return await asyncio.shield(self._measuring)

    async def space(self) -> DiskSpace | None:
        """Return free and total space of the store's disk, at most a second old, unless the disk hangs."""
        full_disk = self._actor.full_disk
        if self._space_at is None or loop_time() - self._space_at >= SPACE_MAX_AGE_S:
            with contextlib.suppress(TimeoutError):
                await self._in_time("space", full_disk.measure)
                self._space_at = loop_time()
        return full_disk.space

    def _known_now(self) -> tuple[object, ...]:
        """Return values whose change makes the latest result outdated: limits of a full disk, a suspect clock, …"""
        full_disk = self._actor.full_disk
        return full_disk.write_limit, full_disk.has_reserve, self._clock.moment().suspect, self._output_failure()

    def _as_of_now(self, last: HealthView) -> HealthView:
        """Return the latest result with the current state of cleanup."""
        state, cleanup = self._cleanup.state(), last.cleanup_status
        now = replace(cleanup, running=state.cleanup_running, time_since_last_cleanup=state.time_since_last_cleanup)
        return replace(last, cleanup_status=now)

    async def close(self) -> None:
        """Wait for pending measurements of the disk and the mailbox. Call this before these are closed.

        A measurement of the artifact store is cancelled, because a mount may hang.
        """
        if (storage := self._pending.get("storage")) is not None:
            storage.cancel()
        under_way = [*self._pending.values(), *([self._measuring] if self._measuring else [])]
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _measure(self) -> HealthView:
        try:
            timestamp = self._clock.moment().now
            database, cache, storage = await asyncio.gather(
                self._measure_part("database", self._database),
                self._measure_part("cache", self._cache),
                self._measure_part("storage", self._storage),
            )
            cleanup, cleanup_status = self._measure_cleanup()
            journal = journal_health(self.cluster())
            if journal is not None and self._actor.full_disk.is_remote:
                journal = PartHealth("unhealthy", f"{self._actor.full_disk.described()}.")
            statuses = [database.status, cache.status, storage.status, cleanup_status]
            worst = max((*statuses, "healthy" if journal is None else journal.status), key=_FROM_BEST_TO_WORST.index)
            total, disk = self._actor.state.total(), self._actor.full_disk.space
            message = f"{database.message} The store is {IN_MEMORY}." if self._is_in_memory else database.message
            health = DatabaseHealth(database.status, message, total)
            if disk is not None:
                health = replace(health, path=disk.path, free_bytes=disk.free_bytes, total_bytes=disk.total_bytes)
            self.last = HealthView(worst, health, cache, storage, cleanup, timestamp, journal or UNSET)
            return self.last
        finally:
            self._measuring = None

    async def _measure_part(self, part: str, measure: Callable[[], Awaitable[PartHealth]]) -> PartHealth:
        try:
            return await measure()
        except Exception as error:
            log.exception("health_check_failed", part=part)
            return PartHealth("unhealthy", f"It cannot be measured: {type(error).__name__}: {error}")

    async def _in_time(
        self, what: str, ask: Callable[[], Coroutine[Any, Any, Any]], timeout_s: float = TIMEOUT_S
    ) -> Any:
        """Return the response to a new request, or raise TimeoutError. The request continues, and the next call waits.

        A response to the request of an earlier call, which was late, is ignored: it says nothing about the present.
        """
        deadline = loop_time() + timeout_s
        task = self._pending.get(what)
        if task is not None and await self._ended(what, task, timeout_s):
            task = self._pending.get(what)  # another caller may have asked again
        if task is None:
            task = self._pending[what] = asyncio.create_task(ask())
        if not await self._ended(what, task, deadline - loop_time()) or task.cancelled():
            raise TimeoutError  # `close` cancels a request
        return task.result()

    async def _ended(self, what: str, task: asyncio.Task[Any], timeout_s: float) -> bool:
        done, _ = await asyncio.wait({task}, timeout=max(timeout_s, 0))
        if done and self._pending.get(what) is task:
            del self._pending[what]
        if done and not task.cancelled():
            task.exception()  # so that asyncio does not log the exception of an ignored response
        return bool(done)

    # -- the database ------------------------------------------------------------------------------------------------

    async def _database(self) -> PartHealth:
        began, self.damage = loop_time(), self._damage()
        try:
            replaced = await self._in_time("probe", self._probe)
        except DiskFull as error:
            self._actor.full_disk.note(error)
            return await self._full_disk()
        except TimeoutError:
            disk = "The disk" if self.cluster().role == "single" else "The disk, or that of the journal's server,"
            return PartHealth("unhealthy", f"{disk} has not completed a write for {TIMEOUT_S:g} s. Is it overloaded?")
        except Exception as error:
            return PartHealth("unhealthy", f"A write and a read failed ({error}). See the log and run: jobd doctor")
        took_ms = (loop_time() - began) * 1000
        if replaced is not None:
            return PartHealth("unhealthy", _replaced(replaced))
        if self._actor.full_disk.write_limit:
            return await self._full_disk()
        space = await self.space()
        wrong = [] if self.damage is None else [self.damage]
        if not self._actor.full_disk.has_reserve:
            wrong.append(_without_reserve(space))
        if (failure := self._output_failure()) is not None:
            wrong.append(f"The output of jobs is not kept: {failure}. Jobs go on without it.")
        if wrong:
            return PartHealth("degraded", " ".join(wrong))
        return PartHealth("healthy", f"A write and a read took {took_ms:.1f} ms.")

    async def _probe(self) -> str | None:
        """Return a file of the database that was replaced. Raises what a test write raises."""
        await self._actor.disk.probe()
        return await self._actor.disk.replaced_file()

    async def _full_disk(self) -> PartHealth:
        full_disk = self._actor.full_disk
        await self.space()
        described = f"{full_disk.described()}: {_LIMITS[full_disk.write_limit]}."
        return PartHealth("unhealthy", f"{described} Free some space; jobd tries again every second.")

    def _damage(self) -> str | None:
        for fault in self._take_faults():
            log.error("store_fault", fault=fault)
            if fault not in self._faults:
                self._faults.append(fault)
        sentences = []
        if quarantined := self._actor.state.quarantined:
            names = _listed(list(islice(quarantined, MAX_NAMED)), len(quarantined))
            sentences.append(f"Quarantined jobs: {names}.")
        if self._faults:
            sentences.append(f"Damage: {_listed(list(islice(self._faults, MAX_NAMED)), len(self._faults), '; ')}.")
        return f"{' '.join(sentences)} Run: jobd doctor" if sentences else None

    # -- memory ------------------------------------------------------------------------------------------------------

    async def _cache(self) -> PartHealth:
        began = loop_time()
        try:
            response = await self._in_time("ping", self._ping)
        except TimeoutError:
            count = self._actor.waiting
            waiting = f"{count} command{' is' if count == 1 else 's are'} waiting"
            return PartHealth("unhealthy", f"The mailbox has not responded for {TIMEOUT_S:g} s; {waiting}.")
        if isinstance(response, ApiError):
            status: HealthStatus = "degraded" if response.code == "overloaded" else "unhealthy"
            return PartHealth(status, response.message)
        took_ms = (loop_time() - began) * 1000
        wrong = self._miscount()
        if wrong is not None:
            return PartHealth("unhealthy", f"{wrong} Restart the daemon to count again.")
        try:
            differing, compared = await self._in_time("sample", self._compare_with_disk)
        except TimeoutError:
            return PartHealth("degraded", f"The disk has not completed a read for {TIMEOUT_S:g} s.")
        if differing:
            message = f"Memory and disk differ for {', '.join(differing)}."
            return PartHealth("unhealthy", f"{message} Restart the daemon: it loads the state from the disk.")
        match = "1 job matches" if compared == 1 else f"{compared} jobs match"
        return PartHealth("healthy", f"A round trip took {took_ms:.1f} ms; {match} the disk.")

    async def _ping(self) -> object:
        return await self._actor.ask(Ping(), by="daemon")

    def _miscount(self) -> str | None:
        """Return the first counters that disagree with each other or with the jobs, as a sentence, or None."""
        state = self._actor.state
        for status in STATUSES:
            total, by_queue = state.totals[status], sum(counts.get(status, 0) for counts in state.counts.values())
            if total != by_queue:
                return f"The daemon counts {total} {status} jobs in total, but {by_queue} by queue."
        processing = len(state.processing)
        for status, jobs in (("processing", processing), ("queued", len(state.jobs) - processing)):
            if state.totals[status] != jobs:
                return f"{jobs} jobs are {status}, but the daemon counts {state.totals[status]}."
        return None

    async def _compare_with_disk(self) -> tuple[list[str], int]:
        """Compare a sample of live jobs with the disk. Return the ids of jobs that differ, and the number compared.

        Memory is ahead of the disk while a batch is being written, and briefly after a failed one. So a job counts as
        different only if it differs in each comparison and does not change in memory. The comparisons are separated by
        round trips through the mailbox.
        """
        sample = self._sample()
        compared = len(sample)
        for _ in range(COMPARISONS):
            sample = await self._differing(sample)
            if not sample:
                return [], compared
            if isinstance(await self._ping(), ApiError):
                return [], 0  # overloaded or stopping: the next measurement checks again
        return sorted(sample)[:MAX_NAMED], compared

    def _sample(self) -> dict[str, Job]:
        """Return processing and queued jobs; each sample continues where the previous one ended."""
        state = self._actor.state
        begin = self._next_sample if self._next_sample < min(len(state.jobs), SAMPLED_FROM) else 0
        self._next_sample = begin + SAMPLE
        processing = islice(state.processing.values(), SAMPLE // 2)
        window = (state.jobs[job_id] for job_id in islice(state.jobs, begin, begin + SAMPLE))
        return {job.id: job for job in islice(chain(processing, window), SAMPLE)}

    async def _differing(self, sample: dict[str, Job]) -> dict[str, Job]:
        state = self._actor.state
        loaded = await self._actor.disk.load(list(sample), [], [])
        return {
            job_id: job
            for job_id, job in sample.items()
            if state.jobs.find(job_id) == job and loaded.jobs.get(job_id) != job
        }

    # -- artifacts and cleanup ---------------------------------------------------------------------------------------

    async def _storage(self) -> PartHealth:
        if self._artifacts is None:
            return PartHealth("healthy", "not configured")
        place = self._artifacts.place
        began = loop_time()
        try:
            await self._in_time("storage", self._artifacts.probe, STORAGE_TIMEOUT_S)
        except TimeoutError:
            return PartHealth("unhealthy", f"{place} has not responded for {STORAGE_TIMEOUT_S:g} s.")
        except ArtifactStoreError as error:
            return PartHealth("unhealthy", str(error))
        if self._sweeper is not None and (reason := self._sweeper.degraded_reason()) is not None:
            return PartHealth("degraded", reason)
        took_ms = (loop_time() - began) * 1000
        return PartHealth("healthy", f"{place}: a write, a read and a deletion took {took_ms:.1f} ms.")

    def _measure_cleanup(self) -> tuple[CleanupHealth, HealthStatus]:
        try:
            state, found = self._cleanup.state(), (self._cleanup.degraded_reason(), self._clock.suspect_reason())
        except Exception as error:
            log.exception("health_check_failed", part="cleanup")
            return CleanupHealth(False, None, f"It cannot be measured: {type(error).__name__}: {error}"), "unhealthy"
        reasons = [each for each in found if each is not None]
        message = " ".join(reasons) or "Cleanup runs in time."
        view = CleanupHealth(state.cleanup_running, state.time_since_last_cleanup, message)
        return view, "degraded" if reasons else "healthy"


def journal_health(view: ClusterView) -> PartHealth | None:
    """Return the health of the journal that this node leads, or None without a cluster."""
    if view.role == "single":
        return None
    if view.synchronous is None:
        return PartHealth("unhealthy", "PostgreSQL does not respond. Without it, this node steps down.")
    if view.waits_for_sync:
        return PartHealth(
            "unhealthy",
            "A write waits for a synchronous standby of PostgreSQL. Start its standbys: without one, nothing is "
            "acknowledged, and this node steps down.",
        )
    if not view.synchronous and view.require_sync:
        return PartHealth(
            "degraded",
            "PostgreSQL has no synchronous standby: if its disk is lost, acknowledged jobs are lost. Start its "
            "standbys, and check synchronous_standby_names.",
        )
    servers = "two PostgreSQL servers" if view.synchronous else "one PostgreSQL server"
    return PartHealth("healthy", f"Record {view.record} of journal {view.journal} is on {servers}.")


def _replaced(path: str) -> str:
    return (
        f"{path} was deleted or replaced while the daemon runs. Its changes since then are lost when the daemon stops, "
        "so copy them first: jobd backup FILE. Then stop the daemon, and restore the copy: jobd restore FILE"
    )


def _without_reserve(space: DiskSpace | None) -> str:
    needed = RESERVE_BYTES + SPARE_BYTES
    where = "" if space is None else f" next to {space.path} ({needed} bytes are needed, {space.free_bytes} are free)"
    return f"The reserve file is missing{where}. On a full disk, running jobs may not be able to end. Free some space."


def _listed(names: list[str], count: int, between: str = ", ") -> str:
    more = count - len(names)
    return between.join(names) + (f" and {more} more" if more > 0 else "")
