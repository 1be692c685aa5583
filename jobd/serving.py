"""The parts of a daemon that serves jobs: the actor, what runs beside it, and the services of the APIs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from random import SystemRandom
from typing import Any, Final, Protocol
from urllib.parse import quote

import structlog
from msgspec import Struct
from msgspec.structs import replace

from jobd.api.services import Services
from jobd.cluster.leadership import Leadership
from jobd.config import Config, LoadedConfig
from jobd.core.state import State
from jobd.engine.actor import Actor, Bounds
from jobd.engine.clock import Clock, monotonic_s
from jobd.engine.disk_full import WriteLimit
from jobd.engine.event_feed import EventFeed
from jobd.engine.idempotency import IdempotencyStore
from jobd.http.http_app import HttpApp
from jobd.maintenance.artifact_sweeper import ArtifactSweeper, SweepStats
from jobd.maintenance.backups import Backups
from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.maintenance.clock_monitor import ClockMonitor
from jobd.maintenance.disk_sampler import DiskSampler
from jobd.maintenance.due_jobs import DueJobs
from jobd.maintenance.maintainer import Maintainer, read_extra, read_stats
from jobd.maintenance.outputs import Outputs
from jobd.maintenance.plan_runner import Planner
from jobd.maintenance.restart_grace import SLICE, extend_held_locks
from jobd.maintenance.schedules import Scheduler
from jobd.maintenance.scrubber import Scrubber
from jobd.model.clocks import LockMs
from jobd.model.commands import EndGrants, Ping
from jobd.model.errors import ApiError, not_leader_error
from jobd.model.responses import ClusterView, Response
from jobd.model.storage import IN_MEMORY, OpenedStore
from jobd.model.webhooks import WebhookEndpoint
from jobd.monitoring import event_logging
from jobd.monitoring.failure_groups import FailureGroups
from jobd.monitoring.health import Health
from jobd.monitoring.metrics import Metrics
from jobd.monitoring.problems.board import ProblemBoard
from jobd.monitoring.problems.condition import Scene
from jobd.monitoring.timeseries import Timeseries
from jobd.resources import RandomPool
from jobd.storage.artifacts.base import ArtifactStore
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.output_file import OutputFile
from jobd.storage.startup import MEMORY
from jobd.storage.store import Store
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.dispatcher import PARALLEL
from jobd.webhooks.manager import WebhookManager
from jobd.webhooks.transport import HttpTransport

KEEP_DUE_S: Final = 10.0  # for jobs to be kept due, before a daemon stops
FINISH_S: Final = 0.1  # for requests, deliveries and sweeps in progress, before a leader releases its leadership

log = structlog.get_logger("jobd.daemon")


class BackgroundPart(Protocol):
    async def run(self) -> None: ...
    def stop(self) -> None: ...


class Background:
    """Tasks beside the requests. `stack` ends them, the latest first."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        self._parts: dict[asyncio.Task[None], BackgroundPart] = {}

    def run(self, name: str, part: BackgroundPart) -> asyncio.Task[None]:
        """Run `part` until the daemon stops, which calls its `stop` and waits until it ends."""
        task = asyncio.create_task(part.run(), name=name)
        self._parts[task] = part

        async def end() -> None:
            part.stop()
            await task

        self._stack.push_async_callback(end)
        return task

    def stop(self) -> list[asyncio.Task[None]]:
        """Stop all parts of `run`. Return their tasks, which are about to end."""
        for part in self._parts.values():
            part.stop()
        return list(self._parts)

    def run_until_cancelled(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name=name)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        self._stack.push_async_callback(end)


class Leading(Struct, frozen=True):
    """What a node has when it begins to lead: `view` returns the state of the cluster, which `refresh` reads."""

    leadership: Leadership
    view: Callable[[], ClusterView]
    refresh: Callable[[], Awaitable[None]]
    step_down: Callable[[], None]


class Serving:
    """The parts that serve the jobs of `store`. `stack` stops what `start` has started, in the reverse order.

    `state` is as of `opened`. `apps` are those of the listeners, also of those that are added later. `leading` is None
    without a cluster. The parts are made once, each with those that it calls. Only the store and the leadership are
    older: their callbacks are set here.
    """

    def __init__(
        self,
        stack: contextlib.AsyncExitStack,
        loaded: LoadedConfig,
        store: Store,
        opened: OpenedStore,
        state: State,
        apps: list[HttpApp[Any]],
        artifacts: ArtifactStore | None,
        leading: Leading | None = None,
        *,
        make_clock: Callable[..., Clock] = Clock,
    ) -> None:
        self._stack = stack
        self._background = Background(stack)
        self._loaded = loaded
        self._store = store
        self._opened = opened
        self._apps = apps
        self._artifacts = artifacts
        self._leading = leading
        self._leadership = None if leading is None else leading.leadership
        settings, numbers = loaded.config, opened.numbers
        self.clock = make_clock(numbers, keep_ms=settings.policy().shortest_keep_ms)
        self._clock_monitor = ClockMonitor(
            self._on_pause,
            self._on_set_back,
            self.clock.moment,
            on_set_ahead=lambda ahead_ms: log.warning("clock_set_ahead", ahead_ms=ahead_ms),
        )
        self.actor = _make_actor(store, opened, state, self.clock, settings, self._before_batch)
        self._scheduler = Scheduler(self.actor, self.clock.moment)
        self._due_jobs = DueJobs(self.actor, self.clock.moment)
        self.webhooks = self._make_webhooks()
        self.timeseries = Timeseries.opened(read_extra(opened.stats), self.clock.moment().now)
        self.maintainer = Maintainer(
            self.actor,
            self.clock,
            _schedule(settings),
            hold_events_ms=self.webhooks.event_hold_ms,
            extra=self.timeseries.saved,
        )
        self._sweeper = self._make_sweeper()
        self.services = self._make_services()
        store.on_broken = self.actor.lose_disk
        if self._leadership is not None:
            self._leadership.on_epoch, self._leadership.on_lost = self._begin_epoch, self.actor.lose_disk

    async def start(self, on_end: Callable[[], None]) -> None:
        """Start the actor and the background parts. `on_end` is called when the actor ends."""
        services, run = self.services, self._background.run
        run("clock monitor", self._clock_monitor)
        self._recover_processing()
        # The clock may have been set back since the last commit, or that of the former leader is ahead.
        await self._due_jobs.keep_at_start(self._opened.numbers.wall_ms)
        self.running = asyncio.create_task(self.actor.run(), name="actor")
        self.running.add_done_callback(lambda _: on_end())
        self._stack.push_async_callback(self._stop_actor)
        self._maintaining = run("cleanup", self.maintainer)
        run("schedules", self._scheduler)
        run("failures", services.failures)
        if self._sweeper is not None:
            run("sweeper", self._sweeper)
        self._stack.push_async_callback(services.health.close)
        run("problems", services.problems)
        run("metrics", services.metrics)
        self._stack.push_async_callback(services.planner.close)
        run("webhooks", self.webhooks)

    async def clock_moved(self) -> None:
        """Do at once what is due by the clock, which was moved by a test."""
        await self.maintainer.recover_due()
        await self._scheduler.fire_due()
        await self.actor.ask(Ping(), by="daemon")  # it serves the claims that wait

    def _before_batch(self) -> Awaitable[None] | None:
        self._clock_monitor.check()
        return None if self._leadership is None else self._leadership.confirm()

    def _begin_epoch(self, epoch: int) -> None:
        self.actor.state.epoch, self.actor.state.next_token = epoch, 1

    def check_leadership(self) -> ApiError | None:
        """Return the error of a request if this node has lost its leadership."""
        assert self._leadership is not None
        try:
            self._leadership.check()
        except Exception:
            return not_leader_error(None)
        return None

    def confirm_leadership(self) -> Awaitable[None] | None:
        """Return what a read has to wait for. Raises LeadershipLost. See `Leadership.confirm`."""
        assert self._leadership is not None
        return self._leadership.confirm()

    def may_serve(self) -> bool:
        """Return whether no other node can lead. Always true without a cluster."""
        return self._leadership is None or self.check_leadership() is None

    def _may_send(self) -> bool:
        """Return whether no other node can lead, even if this machine was paused."""
        return self._leadership is None or self._leadership.loss is None

    async def responds(self, check_s: float, on_wait: Callable[[], object]) -> bool:
        """Return whether the actor responds to a command.

        While there is no response because the leader waits for the journal, `on_wait` is called every `check_s`.
        """
        asked = asyncio.ensure_future(self.actor.ask(Ping(), by="daemon"))
        try:
            while not (await asyncio.wait([asked], timeout=check_s))[0]:
                if self._leadership is not None and self._leadership.is_waiting:
                    on_wait()
            return isinstance(asked.result(), Response)
        finally:
            asked.cancel()

    def end_streams(self) -> None:
        """End what listeners would wait for: waiting claims, event streams and downloads."""
        self.actor.end_claim_waits()
        self.services.feed.close()
        self.services.downloads.close()

    def apply(self, settings: Config, new: LoadedConfig) -> None:
        """Apply the settings that need no restart."""
        if new.webhooks != self._loaded.webhooks:
            self.webhooks.set_endpoints(each.endpoint for each in new.webhooks)
        self._loaded = new
        self.actor.policy = settings.policy()
        self.clock.keep_ms = self.actor.policy.shortest_keep_ms
        self.maintainer.set_schedule(_schedule(settings))
        self.services.problems.scene.limits = settings.alerts

    async def finish(self) -> None:
        """Stop the background parts, and decide the commands that were accepted. Nothing is decided after that.

        Clients, webhooks, the artifact store and jobs to be kept due delay this by at most FINISH_S.
        """
        waits = [self._due_jobs.idle.wait(), *(app.wait_idle() for app in self._apps)]
        idle = [asyncio.create_task(each) for each in waits]
        await asyncio.wait([*self._background.stop(), *idle], timeout=FINISH_S)
        for each in idle:
            each.cancel()
        await asyncio.wait([self._maintaining])  # it saves the statistics
        self.actor.stop()
        await self.actor.ended.wait()

    async def _stop_actor(self) -> None:
        if self.actor.full_disk.write_limit == WriteLimit.NONE:  # else the jobs cannot be kept due
            kept = asyncio.create_task(self._due_jobs.idle.wait())
            await asyncio.wait([kept, self.running], timeout=KEEP_DUE_S, return_when=asyncio.FIRST_COMPLETED)
            kept.cancel()
        self.actor.stop()
        await self.running

    def _recover_processing(self) -> None:
        """Extend the locks of processing jobs, or end their grants if the store was restored from a backup.

        The actor applies these commands before any other. On a full disk, it applies them once there is space.
        """
        if not self._opened.marked:
            # A lock that was live at the last commit stays so, however long the start takes.
            extend_held_locks(self.actor, self.clock.moment().lock_ms, since=self._opened.numbers.lock_ms)
            return
        ids = list(self.actor.state.processing)
        slices = [ids[first : first + SLICE] for first in range(0, len(ids), SLICE)]
        for index, each in enumerate(slices or [[]]):
            self.actor.enqueue_internal(EndGrants(ids=each, last=index + 1 >= len(slices)))
        log.warning("backup_put_back", grants_to_end=len(ids), epoch=self.actor.state.epoch)

    def _on_pause(self, pause_ms: int, since: LockMs) -> None:
        """Extend locks after a time in which the process was stopped, or its machine was suspended or overloaded."""
        log.warning("was_away", away_ms=pause_ms, processing=len(self.actor.state.processing))
        extend_held_locks(self.actor, self.clock.moment().lock_ms, since)

    def _on_set_back(self, back_ms: int, until: int) -> None:
        log.warning("clock_set_back", back_ms=back_ms)
        self._due_jobs.keep(until)

    def _make_sweeper(self) -> ArtifactSweeper | None:
        """Make what deletes the artifacts of deleted jobs, if there is an artifact store."""
        self._sweeps = SweepStats(waiting=self._opened.tombstones)
        if self._artifacts is None:
            if self._opened.tombstones:
                log.warning(
                    "artifacts_wait", tombstones=self._opened.tombstones, reason="artifacts.url is no longer set"
                )
            self._store.on_tombstones = self._sweeps.expect
            return None
        check = self._leadership.check_confirmed if self._leadership is not None else lambda: None
        sweeper = ArtifactSweeper(self._store, self._artifacts, self.clock, self._sweeps, check=check)
        self._store.on_tombstones = sweeper.expect
        self.actor.on_commit.append(sweeper.committed)
        return sweeper

    def _make_webhooks(self) -> WebhookManager:
        """Make the webhooks. From now on the journal keeps the events that they need."""

        def transport(endpoint: WebhookEndpoint) -> HttpTransport:
            return HttpTransport(
                allow_private=endpoint.allow_private, connections=PARALLEL, wall=lambda: self.clock.moment().now
            )

        context = DispatchContext(
            storage=self._store,
            moment=self.clock.moment,
            source=f"/jobd/{quote(socket.gethostname(), safe='')}",
            may_write=lambda: self.actor.full_disk.write_limit == WriteLimit.NONE,
            may_send=self._may_send,
            problems=lambda: self.services.problems.announced(),
            chance=SystemRandom().random,
        )
        webhooks = WebhookManager(context, subscribe=self.actor.on_commit.append, make_transport=transport)
        webhooks.set_endpoints(each.endpoint for each in self._loaded.webhooks)
        return webhooks

    def _error_counts(self) -> Iterable[Counter[str]]:
        return (app.error_counts for app in self._apps)

    def _with_full_disk(self, cluster_view: Callable[[], ClusterView]) -> ClusterView:
        """Return the state of the cluster, with a full disk of the journal's server as a warning."""
        view, full_disk = cluster_view(), self.actor.full_disk
        if full_disk.is_remote:
            return replace(view, warnings=[*view.warnings, f"{full_disk.described()}."])
        return view

    def _make_services(self) -> Services:
        settings, store, clock, leading = self._loaded.config, self._store, self.clock, self._leading
        view = partial(ClusterView, role="single") if leading is None else partial(self._with_full_disk, leading.view)
        feed = EventFeed(store, self._opened.numbers.next_event - 1, settings.limits.event_streams)
        failures = FailureGroups(store, clock.moment, self._opened.numbers.next_job, self._opened.jobs)
        outputs = self._make_outputs(feed)
        health = self._make_health(view, lambda: outputs.file.failure)
        disk_sampler = DiskSampler(store, lambda: clock.moment().now)
        problems = self._make_problems(health, view, disk_sampler)
        metrics = Metrics(
            self.actor,
            self.maintainer,
            problems,
            clock,
            self._sweeps,
            store.path,
            self._error_counts,
            feed,
            webhooks=self.webhooks.metrics,
            cluster=view,
            append_seconds=None if leading is None else leading.leadership.append_seconds,
        )
        listeners = [feed.publish, failures.committed, problems.committed, self.timeseries.record, outputs.committed]
        self.actor.on_commit += listeners
        return Services(
            actor=self.actor,
            backups=Backups(store, lambda: clock.moment().now),
            clock=clock,
            downloads=Downloads(self._artifacts, settings.limits.downloads),
            failures=failures,
            feed=feed,
            health=health,
            maintainer=self.maintainer,
            metrics=metrics,
            outputs=outputs,
            planner=Planner(self.actor, clock),
            problems=problems,
            scrubber=Scrubber(store),
            disk_sampler=disk_sampler,
            timeseries=self.timeseries,
            webhooks=self.webhooks,
            is_alive=lambda: not self.running.done(),
            store=IN_MEMORY if store.path == MEMORY else store.path,
            may_serve=self.may_serve,
            cluster_view=view,
            step_down=None if leading is None else leading.step_down,
            refresh_nodes=None if leading is None else leading.refresh,
        )

    def _make_outputs(self, feed: EventFeed) -> Outputs:
        path = MEMORY if self._store.path == MEMORY else f"{self._store.path}.output"
        file = OutputFile(path, self._loaded.config.limits.output_bytes)
        self._stack.push_async_callback(file.close)
        return Outputs(file, feed, lambda: self.clock.moment().now)

    def _make_health(self, view: Callable[[], ClusterView], output_failure: Callable[[], str | None]) -> Health:
        return Health(
            self.actor,
            self.clock,
            self.maintainer,
            faults=self._opened.faults,
            take_faults=self._store.take_faults,
            artifacts=self._artifacts,
            sweeper=self._sweeper,
            is_in_memory=self._store.path == MEMORY,
            output_failure=output_failure,
            cluster=view,
        )

    def _make_problems(
        self, health: Health, view: Callable[[], ClusterView], disk_sampler: DiskSampler
    ) -> ProblemBoard:
        scene = Scene(
            state=self.actor.state,
            clock=self.clock,
            health=health,
            cleanup=self.maintainer,
            limits=self._loaded.config.alerts,
            failing_webhooks=self.webhooks.failing,
            cluster=view,
            rejects_creates=lambda: self.actor.full_disk.write_limit != WriteLimit.NONE,
            error_counts=self._error_counts,
            disk_use=disk_sampler.recent,
        )
        return ProblemBoard(scene, on_change=self.webhooks.problems_changed)


def _make_actor(
    store: Store,
    opened: OpenedStore,
    state: State,
    clock: Clock,
    settings: Config,
    before_batch: Callable[[], Awaitable[None] | None],
) -> Actor:
    state.quarantined = dict(opened.quarantined)
    state.unvalidated = dict(opened.unvalidated)
    state.counters = read_stats(opened.stats)
    limits = settings.limits
    bounds = Bounds(
        limits.mailbox, limits.inflight_bytes, limits.parked_claims, int(limits.claim_wait), limits.response_bytes
    )
    actor = Actor(
        store,
        state,
        IdempotencyStore(opened.keys, limits.idempotency_keys, state.holds),
        clock,
        settings.policy(),
        random=RandomPool().draw,
        bounds=bounds,
        is_full=opened.full,
        has_reserve=opened.has_reserve,
        now_s=monotonic_s,
        before_batch=before_batch,
    )
    actor.on_commit.append(event_logging.write_lines)
    return actor


def _schedule(settings: Config) -> CleanupSchedule:
    cleanup = settings.cleanup
    return CleanupSchedule(
        interval_ms=int(cleanup.interval),
        min_interval_ms=int(cleanup.min_interval),
        recover_every_ms=int(cleanup.recover_every),
        batch=cleanup.batch,
        journal_ms=int(settings.retention.journal),
        journal_bytes=settings.retention.journal_bytes,
        audit_ms=int(settings.retention.audit),
    )
