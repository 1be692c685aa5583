"""Wire the parts of the daemon together, run it, and stop it in the reverse order.

Exit codes: 0 stopped, 74 I/O error, 75 another daemon has the store or an address, 78 configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable
from random import SystemRandom
from typing import Final, Protocol
from urllib.parse import quote

import msgspec
import structlog

from jobd import config, logging, systemd
from jobd.api import admin as admin_api
from jobd.api import worker as worker_api
from jobd.api.services import Services
from jobd.config import Config, ConfigError, Duration, LoadedConfig
from jobd.core.state import State
from jobd.dashboard.routes import Dashboard
from jobd.engine.actor import Actor, Bounds, DiskBroken
from jobd.engine.clock import Clock
from jobd.engine.disk_full import Closed
from jobd.engine.event_feed import EventFeed
from jobd.engine.idempotency import Keys
from jobd.http.app import App
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.http.server import HttpListener
from jobd.maintenance.artifact_sweeper import ArtifactSweeper, SweepStats
from jobd.maintenance.backups import Backups
from jobd.maintenance.cleanup_pass import CleanupSchedule
from jobd.maintenance.maintainer import Maintainer, read_extra, read_stats
from jobd.maintenance.plans import Planner
from jobd.maintenance.scrubber import Scrubber
from jobd.maintenance.suspend_detector import SuspendDetector
from jobd.model.commands import EndGrants, ExtendAfterPause, Ping
from jobd.model.job import SECOND_MS
from jobd.model.responses import Response
from jobd.model.storage import OpenedStore, StoredResponse
from jobd.model.webhooks import WebhookEndpoint
from jobd.monitoring import event_log
from jobd.monitoring.alerts import Alerts, Thresholds
from jobd.monitoring.failure_groups import FailureGroups
from jobd.monitoring.health import Health
from jobd.monitoring.metrics import Metrics
from jobd.monitoring.timeseries import Timeseries
from jobd.resources import (
    EXIT_IO,
    CannotStart,
    RandomPool,
    admin_hosts,
    check_addresses_free,
    open_artifacts,
    open_listener,
    open_store,
    reload_certificates,
)
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.store import Store
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.dispatcher import PARALLEL
from jobd.webhooks.manager import WebhookManager
from jobd.webhooks.transport import HttpTransport

GRACE_MS: Final = 30 * SECOND_MS  # after a start or a pause, no processing job ends sooner
SAME_SIGNAL_S: Final = 0.05
STOP_S: Final = 20.0  # for requests in flight; systemd waits longer
SLICE: Final = 500  # jobs of one command

log = structlog.get_logger("jobd.daemon")


def serve(loaded: LoadedConfig, reload: Callable[[], LoadedConfig]) -> int:
    """Run the daemon until a signal stops it. Return the exit code. `reload` reads the configuration again."""
    logging.configure(loaded.config.log.level, loaded.config.log.format)
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(loaded, reload))
    except CannotStart as error:
        log.critical("cannot_start", reason=str(error), exit_code=error.code)
        return error.code
    except DiskBroken as error:
        log.critical("stopped_by_disk", reason=str(error), exit_code=EXIT_IO)
        return EXIT_IO


async def _serve(loaded: LoadedConfig, reload: Callable[[], LoadedConfig]) -> int:
    async with contextlib.AsyncExitStack() as stack:
        daemon = Daemon(loaded, reload, stack)
        await daemon.start()
        gc.freeze()  # so that no collection traverses the jobs loaded at the start
        gc.enable()
        await daemon.wait_stopped()
    log.info("stopped")
    return 0


class BackgroundPart(Protocol):
    async def run(self) -> None: ...
    def stop(self) -> None: ...


class Daemon:
    """A running daemon. `stack` stops what `start` has started, in the reverse order."""

    def __init__(
        self, loaded: LoadedConfig, reload: Callable[[], LoadedConfig], stack: contextlib.AsyncExitStack
    ) -> None:
        self._loaded = loaded
        self._reload = reload
        self._stack = stack
        self._stop = asyncio.Event()
        self._stop_requested_at = 0.0
        self._apps: list[App[Services]] = []
        self._listeners: dict[str, HttpListener] = {}

    async def start(self) -> None:
        """Start the store, the actor, the background parts and the listeners. Raises CannotStart."""
        settings = self._loaded.config
        self._warn(self._loaded.warnings)
        self._passed_sockets = systemd.sockets()
        store, opened = await open_store(settings, lambda: check_addresses_free(settings, self._passed_sockets))
        self._stack.push_async_callback(store.close)
        self._start_actor(store, opened)
        self.webhooks = self._make_webhooks(store)
        self.maintainer = Maintainer(self.actor, self.clock, _schedule(settings))
        self.maintainer.hold_journal(self.webhooks.journal_hold_ms)
        self._run_in_background("cleanup", self.maintainer)
        self._run_in_background("failures", self.failures)
        suspend_detector = SuspendDetector(self._on_pause)
        self.actor.before_batch = suspend_detector.check
        self._run_in_background("presence", suspend_detector)
        sweeper = await self._start_sweeper(store, opened)
        self.services = self._make_services(store, opened, sweeper)
        await self._open_listeners(opened.stats)
        self._add_signal_handlers()
        self._run_until_cancelled("watchdog", self._feed_watchdog())
        if self._running.done():
            await self._running  # the disk failed during the start; raises before the daemon reports that it is ready
        self.services.is_open = True
        systemd.ready()
        self._run_until_cancelled("templates", self._compile_templates())
        log.info("ready", jobs=self.actor.state.total(), store=settings.store.path, pid=os.getpid())

    async def wait_stopped(self) -> None:
        """Wait for a signal, or until the actor has ended because the disk failed. Raises DiskBroken."""
        await self._stop.wait()
        self.services.is_open = False
        self.clock.stop()  # the listeners close, so no lock may expire from now on
        if self._running.done():
            await self._running
        systemd.stopping()
        log.info("stopping")

    # -- start --------------------------------------------------------------------------------------------------------

    def _start_actor(self, store: Store, opened: OpenedStore) -> None:
        settings, numbers = self._loaded.config, opened.numbers
        keep_ms = settings.policy().shortest_keep_ms
        self.clock = Clock(numbers.lease_ms, numbers.wall_ms, suspect=numbers.clock_suspect, keep_ms=keep_ms)
        self.actor = _make_actor(store, opened, self.clock, settings)
        store.on_broken = self.actor.lose_disk
        self.feed = EventFeed(store, numbers.next_event - 1, settings.limits.event_streams)
        self.failures = FailureGroups(store, numbers.next_job, opened.jobs)
        self.actor.on_commit += [self.feed.publish, self.failures.committed]
        self._recover_processing(opened)
        self._running = asyncio.create_task(self.actor.run(), name="actor")
        self._running.add_done_callback(lambda _: self._stop.set())
        self._stack.push_async_callback(self._stop_actor)

    async def _stop_actor(self) -> None:
        self.actor.stop()
        await self._running

    def _recover_processing(self, opened: OpenedStore) -> None:
        """Extend the locks of processing jobs, or end their grants if the store was restored from a backup.

        The actor applies these commands before any other. On a full disk, it applies them once there is space.
        """
        if not opened.marked:
            self._extend_locks(self.clock.moment().lease)
            return
        slices = self._processing_slices()
        for index, ids in enumerate(slices or [[]]):
            self.actor.enqueue_internal(EndGrants(ids=ids, last=index + 1 >= len(slices)))
        log.warning("backup_put_back", grants_to_end=len(self.actor.state.processing), epoch=self.actor.state.epoch)

    def _processing_slices(self) -> list[list[str]]:
        ids = list(self.actor.state.processing)
        return [ids[first : first + SLICE] for first in range(0, len(ids), SLICE)]

    def _extend_locks(self, since: int) -> None:
        """Extend the locks of processing jobs, because no worker could report since the lease time `since`."""
        for ids in self._processing_slices():
            self.actor.enqueue_internal(ExtendAfterPause(ids=ids, grace_ms=GRACE_MS, since=since))

    def _on_pause(self, pause_ms: int) -> None:
        """Extend locks after a time in which the process was stopped, or its machine was suspended or starved."""
        log.warning("was_away", away_ms=pause_ms, processing=len(self.actor.state.processing))
        self._extend_locks(self.clock.moment().lease - pause_ms)

    async def _start_sweeper(self, store: Store, opened: OpenedStore) -> ArtifactSweeper | None:
        """Start the deletion of the artifacts of deleted jobs, if there is an artifact store."""
        self._sweeps = SweepStats(waiting=opened.tombstones)
        self._artifacts = await open_artifacts(self._loaded)
        if self._artifacts is None:
            if opened.tombstones:
                log.warning("artifacts_wait", tombstones=opened.tombstones, reason="artifacts.url is no longer set")
            return None
        self._stack.push_async_callback(self._artifacts.close)
        sweeper = ArtifactSweeper(store, self._artifacts, self.clock, self._sweeps)
        store.on_tombstones = sweeper.expect
        self._run_in_background("sweeper", sweeper)
        return sweeper

    def _make_webhooks(self, store: Store) -> WebhookManager:
        """Make the webhooks. From now on the journal keeps the events that they need. They are started later."""

        def transport(endpoint: WebhookEndpoint) -> HttpTransport:
            return HttpTransport(
                allow_private=endpoint.allow_private, connections=PARALLEL, wall=lambda: self.clock.moment().now
            )

        context = DispatchContext(
            storage=store,
            moment=self.clock.moment,
            source=f"/jobd/{quote(socket.gethostname(), safe='')}",
            may_write=lambda: self.actor.full_disk.closed == Closed.NOTHING,
            alerts=lambda: self.alerts.known(),
            chance=SystemRandom().random,
        )
        webhooks = WebhookManager(context, listen=self.actor.on_commit.append, post=transport)
        webhooks.set_endpoints(each.endpoint for each in self._loaded.webhooks)
        return webhooks

    def _make_services(self, store: Store, opened: OpenedStore, sweeper: ArtifactSweeper | None) -> Services:
        settings = self._loaded.config
        health = Health(
            self.actor,
            self.clock,
            self.maintainer,
            faults=opened.faults,
            take_faults=store.take_faults,
            artifacts=self._artifacts,
            sweeper=sweeper,
        )
        self._stack.push_async_callback(health.close)
        self.alerts = Alerts(self.actor.state, self.clock, health, self.maintainer, _thresholds(settings))
        self._run_in_background("alerts", self.alerts)
        metrics = Metrics(
            self.actor, self.maintainer, self.alerts, self.clock, self._sweeps, store.path, self._apps, self.feed
        )
        metrics.webhooks = self.webhooks.metrics
        self._run_in_background("metrics", metrics)
        planner = Planner(self.actor, self.clock)
        self._stack.push_async_callback(planner.close)
        self.alerts.failing_webhook = self.webhooks.worst
        self.actor.on_commit.append(self.alerts.attempts.note)
        self.alerts.on_change.append(self.webhooks.alerts_changed)
        self._run_in_background("webhooks", self.webhooks)
        return Services(
            actor=self.actor,
            alerts=self.alerts,
            backups=Backups(store, lambda: self.clock.moment().now),
            clock=self.clock,
            downloads=Downloads(self._artifacts, settings.limits.downloads),
            failures=self.failures,
            feed=self.feed,
            health=health,
            maintainer=self.maintainer,
            metrics=metrics,
            planner=planner,
            scrubber=Scrubber(store),
            webhooks=self.webhooks,
            is_alive=lambda: not self._running.done(),
        )

    async def _open_listeners(self, saved_stats: bytes | None) -> None:
        settings, loaded = self._loaded.config, self._loaded
        limits = Limits(body=settings.limits.body, payload=settings.limits.payload, bulk=settings.limits.bulk)
        apps = {"worker": App(Authenticator("worker"), worker_api.ROUTES, self.actor, self.services, limits=limits)}
        if settings.worker.listen:
            # Any Host is accepted: browsers do not know the workers' token, so DNS rebinding gains nothing.
            self._worker_authenticator = Authenticator("worker-tcp", tokens=loaded.worker_tokens)
            apps["worker-tcp"] = App(
                self._worker_authenticator, worker_api.ROUTES, self.actor, self.services, limits=limits
            )
        self._admin_authenticator = Authenticator(
            "admin",
            tokens=self._admin_tokens(),
            read_only_tokens=loaded.read_only_tokens,
            hosts=admin_hosts(settings, self._passed_sockets.get("admin")),
        )
        timeseries = Timeseries.opened(read_extra(saved_stats), self.clock.moment().now)
        self.actor.on_commit.append(timeseries.record)
        self.maintainer.save_extra(timeseries.saved)
        self._dashboard = await asyncio.to_thread(Dashboard, self._admin_authenticator, timeseries)
        apps["admin"] = App(
            self._admin_authenticator,
            (*admin_api.ROUTES, *self._dashboard.routes(), worker_api.DOCUMENT),
            self.actor,
            self.services,
            limits=limits,
            admin=True,
            pages=self._dashboard,
        )
        self._apps += apps.values()
        self._stack.push_async_callback(self._close_listeners)
        for name, app in apps.items():
            self._listeners[name] = await open_listener(name, app, settings, self._passed_sockets)

    async def _close_listeners(self) -> None:
        """Close the listeners after the responses to pending requests. Waiting claims and event streams end at once."""
        self.actor.stop_parking()
        self.services.feed.close()
        self.services.downloads.close()
        await asyncio.gather(*(listener.stop(STOP_S) for listener in self._listeners.values()))

    def _admin_tokens(self) -> tuple[str, ...]:
        """Return the configured tokens. Without any, in development, generate and print one."""
        if self._loaded.admin_tokens:
            return self._loaded.admin_tokens
        if not hasattr(self, "_generated_token"):
            self._generated_token = secrets.token_urlsafe(32)
            text = f"ENVIRONMENT=development: admin token for this run: {self._generated_token}"
            print(text, file=sys.stderr, flush=True)
        return (self._generated_token,)

    def _run_in_background(self, name: str, part: BackgroundPart) -> None:
        """Run `part` until the daemon stops, which calls its `stop` and waits until it ends."""
        task = asyncio.create_task(part.run(), name=name)

        async def end() -> None:
            part.stop()
            await task

        self._stack.push_async_callback(end)

    def _run_until_cancelled(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name=name)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        self._stack.push_async_callback(end)

    async def _compile_templates(self) -> None:
        try:
            await self._dashboard.warm()
        except Exception:
            log.exception("templates_failed")

    # -- signals ------------------------------------------------------------------------------------------------------

    def _add_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal, number.name)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)
        loop.add_signal_handler(signal.SIGUSR1, self._dump)

    def _on_stop_signal(self, name: str) -> None:
        now = time.monotonic()
        if self._stop.is_set() and now - self._stop_requested_at < SAME_SIGNAL_S:
            return  # the same request, sent to the process and to its group
        was_requested, self._stop_requested_at = self._stop_requested_at > 0, now
        if was_requested:
            log.critical("aborted", signal=name)
            os._exit(1)  # every response that was sent is on disk
        log.info("asked_to_stop", signal=name)
        self._stop.set()

    def _on_reload_signal(self) -> None:
        """Reload the configuration and apply the settings that need no restart. Keep the old one on an error."""
        systemd.reloading()
        try:
            new = self._reload()
        except ConfigError as error:
            log.error("reload_failed", reason=str(error), kept="the old configuration")
        else:
            self._apply(new)
        systemd.ready()

    def _warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            log.warning("config_warning", message=warning)

    def _apply(self, new: LoadedConfig) -> None:
        old = self._loaded
        settings, changed, need_restart = config.reloaded(old.config, new.config)
        for field, name in _RELOADED.items():
            if getattr(new, field) != getattr(old, field):
                changed.append(name)
        if new.webhooks != old.webhooks:
            self.webhooks.set_endpoints(each.endpoint for each in new.webhooks)
        self._warn(warning for warning in new.warnings if warning not in old.warnings)
        self._loaded = msgspec.structs.replace(new, config=settings)
        self.actor.policy = settings.policy()
        self.clock.keep_ms = self.actor.policy.shortest_keep_ms
        self.maintainer.set_schedule(_schedule(settings))
        self.alerts.thresholds = _thresholds(settings)
        self._admin_authenticator.replace_tokens(self._admin_tokens(), new.read_only_tokens)
        if settings.worker.listen:
            self._worker_authenticator.replace_tokens(new.worker_tokens)
        reload_certificates(self._listeners, settings)
        logging.set_level(settings.log.level)
        log.info("reloaded", changed=changed, need_restart=need_restart)

    def _dump(self) -> None:
        """Log the mailbox, tasks and stacks, to examine a daemon that makes no progress."""
        log.info("dump", mailbox=self.actor.waiting, parked=len(self.actor.parked), jobs=self.actor.state.totals)
        for task in asyncio.all_tasks():
            stack = " < ".join(f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in task.get_stack())
            log.info("dump_task", task=task.get_name(), stack=stack)
        for number, frame in sys._current_frames().items():
            log.info("dump_thread", thread=number, stack=" < ".join(traceback.format_stack(frame)[-3:]))

    async def _feed_watchdog(self) -> None:
        """Report to systemd's watchdog as long as the actor responds to a command in its mailbox."""
        interval_s = systemd.watchdog_s()
        while interval_s is not None:
            if isinstance(await self.actor.ask(Ping(), by="daemon"), Response):
                systemd.alive()
            await asyncio.sleep(interval_s / 2)


# Fields of LoadedConfig that a reload also applies, with their names in the log.
_RELOADED: Final = {
    "admin_tokens": "admin tokens",
    "worker_tokens": "worker tokens",
    "read_only_tokens": "read-only tokens",
    "webhooks": "webhooks",
}


def _make_actor(store: Store, opened: OpenedStore, clock: Clock, settings: Config) -> Actor:
    state = State.opened(opened)
    state.quarantined = dict(opened.quarantined)
    state.suspects = dict(opened.unvalidated)
    state.figures = read_stats(opened.stats)
    limits = settings.limits
    bounds = Bounds(limits.mailbox, limits.inflight_bytes, limits.parked_claims, int(limits.claim_wait))
    actor = Actor(
        store,
        state,
        Keys(current_responses(opened.keys, state), limits.idempotency_keys),
        clock,
        settings.policy(),
        random=RandomPool(),
        bounds=bounds,
        is_full=opened.full,
        has_reserve=opened.has_reserve,
        now_s=time.monotonic,
    )
    actor.on_commit.append(event_log.write_lines)
    return actor


def current_responses(rows: list[StoredResponse], state: State) -> list[StoredResponse]:
    """Drop the stored responses to starts and claims without a current grant."""
    kept_rows = []
    for row in rows:
        if row.grants is not None:
            current = [(job_id, lock_id) for job_id, lock_id in row.grants if state.holds(job_id, lock_id)]
            row = msgspec.structs.replace(row, grants=current)
        if row.grants is None or row.grants:
            kept_rows.append(row)
    return kept_rows


def _schedule(settings: Config) -> CleanupSchedule:
    cleanup = settings.cleanup
    return CleanupSchedule(
        interval_ms=int(cleanup.interval),
        min_interval_ms=int(cleanup.min_interval),
        recover_every_ms=int(cleanup.recover_every),
        batch=cleanup.batch,
        journal_ms=int(settings.retention.journal),
        audit_ms=int(settings.retention.audit),
    )


def _thresholds(settings: Config) -> Thresholds:
    """Build the thresholds from [alerts], whose keys have no unit."""
    values = msgspec.structs.asdict(settings.alerts)
    durations = {f"{name}_ms": int(value) for name, value in values.items() if isinstance(value, Duration)}
    return Thresholds(**durations, **{name: value for name, value in values.items() if f"{name}_ms" not in durations})
