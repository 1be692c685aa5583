"""The wiring: put together in order, taken apart in the opposite order. The only place that knows all rooms.

No rule and no SQL. Exit codes: 0 stopped, 74 the disk failed, 75 another daemon has the store, 78 configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import secrets
import signal
import socket
import ssl
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import SystemRandom
from typing import Final, Protocol
from urllib.parse import quote, unquote, urlsplit

import msgspec
import structlog

from jobd import config, logging, systemd
from jobd.api import admin as admin_api
from jobd.api import worker
from jobd.api.services import Services
from jobd.config import Config, ConfigError, LoadedConfig
from jobd.core.state import Book
from jobd.dashboard.routes import Dashboard
from jobd.engine.actor import Actor, Bounds, DiskBroken
from jobd.engine.clock import Clock
from jobd.engine.disk_full import Closed
from jobd.engine.event_feed import EventFeed
from jobd.engine.idempotency import Keys
from jobd.http.app import App
from jobd.http.auth import Authenticator, own_names
from jobd.http.decoding import Limits
from jobd.http.server import HttpListener, is_in_use
from jobd.maintenance.artifact_sweeper import ArtifactSweeper, SweepStats
from jobd.maintenance.backups import Backups
from jobd.maintenance.cleanup_pass import CleanupSchedule
from jobd.maintenance.maintainer import Maintainer, read_extra, read_figures
from jobd.maintenance.plans import Planner
from jobd.maintenance.scrubber import Scrubber
from jobd.maintenance.suspend_detector import SuspendDetector
from jobd.model.commands import EndGrants, ExtendAfterPause, Ping
from jobd.model.job import SECOND_MS
from jobd.model.responses import Response
from jobd.model.storage import DiskFull, OpenedStore, StoredResponse
from jobd.model.webhooks import WebhookEndpoint
from jobd.monitoring import event_log
from jobd.monitoring.alerts import Alerts, Thresholds
from jobd.monitoring.failure_groups import FailureGroups
from jobd.monitoring.health import Health
from jobd.monitoring.metrics import Metrics
from jobd.monitoring.timeseries import Timeseries
from jobd.storage.artifacts.base import ArtifactStore, ArtifactStoreError
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.artifacts.filesystem import FileArtifactStore
from jobd.storage.files import StoreError
from jobd.storage.store import Store, Synchronous
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.dispatcher import PARALLEL
from jobd.webhooks.manager import WebhookManager
from jobd.webhooks.transport import HttpTransport

EXIT_OK: Final = 0
EXIT_IO: Final = 74
EXIT_BUSY: Final = 75
EXIT_CONFIG: Final = 78

GRACE_MS: Final = 30 * SECOND_MS  # after a start nothing of a processing job ends sooner
SAME_MOMENT_S: Final = 0.05
PLACE_S: Final = 2.0  # for the directory of artifacts to answer
STOP_S: Final = 20.0  # for requests in flight; systemd waits longer
SLICE: Final = 500

log = structlog.get_logger("jobd.daemon")


class CannotStart(Exception):
    """Why the daemon does not start, with its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def serve(loaded: LoadedConfig, reload: Callable[[], LoadedConfig]) -> int:
    """Run the daemon until it is told to stop; gives the exit code. `reload` reads the configuration again."""
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
        daemon = Daemon(loaded, reload)
        await daemon.start(stack)
        gc.freeze()  # the jobs that are there need not be looked through again and again
        gc.enable()
        await daemon.until_stopped()
    log.info("stopped")
    return EXIT_OK


class Daemon:
    """A daemon on its way up, at work and down again."""

    def __init__(self, loaded: LoadedConfig, reload: Callable[[], LoadedConfig]) -> None:
        self._loaded = loaded
        self._reload = reload
        self._stop = asyncio.Event()
        self._stop_requested_at = 0.0
        self._apps: list[App[Services]] = []

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Disk, actor, time, doors: each is taken down by `stack` in the opposite order."""
        settings = self._loaded.config
        self._warn(self._loaded.warnings)
        self._passed_sockets = systemd.sockets()
        store, opened = await self._open_store(stack)
        numbers, keep_ms = opened.numbers, settings.policy().shortest_keep_ms
        self.clock = Clock(numbers.lease_ms, numbers.wall_ms, suspect=numbers.clock_suspect, keep_ms=keep_ms)
        self.actor = _actor(store, opened, self.clock, settings)
        store.on_broken = self.actor.lose_disk
        self.feed = EventFeed(store, opened.numbers.next_event - 1, settings.limits.event_streams)
        self.actor.on_commit.append(self.feed.publish)
        self.failures = FailureGroups(store, opened.numbers.next_job, opened.jobs)
        self.actor.on_commit.append(self.failures.committed)
        self._recover_processing(opened)
        self._running = asyncio.create_task(self.actor.run(), name="actor")
        self._running.add_done_callback(lambda _: self._stop.set())
        stack.push_async_callback(self._stop_actor)
        self.webhooks = self._make_webhooks(store)
        self.cleaner = Maintainer(self.actor, self.clock, _schedule(settings))
        self.cleaner.hold_journal(self.webhooks.journal_hold_ms)
        _run_in_background(stack, "cleanup", self.cleaner)
        _run_in_background(stack, "failures", self.failures)
        presence = SuspendDetector(self._on_pause)
        self.actor.look = presence.check
        _run_in_background(stack, "presence", presence)
        sweeper = await self._start_sweeper(store, opened, stack)
        self.services = self._make_services(store, opened, sweeper, stack)
        await self._open_listeners(stack, opened.figures)
        self._listen_to_signals()
        self._watchdog = asyncio.create_task(self._feed_watchdog(), name="watchdog")
        stack.push_async_callback(_cancel, self._watchdog)
        if self._running.done():
            await self._running  # the disk failed meanwhile: we were never ready
        self.services.is_open = True
        systemd.ready()
        stack.push_async_callback(_cancel, asyncio.create_task(self._warm(), name="templates"))
        log.info("ready", jobs=self.actor.book.total(), store=settings.store.path, pid=os.getpid())

    async def _warm(self) -> None:
        try:
            await self._dashboard.warm()
        except Exception:
            log.exception("templates_failed")

    async def until_stopped(self) -> None:
        """Until a signal, or until the actor has ended by itself (the disk failed)."""
        await self._stop.wait()
        self.services.is_open = False
        self.clock.stop()  # no worker can be heard while we go down, and that may take as long as a lock lasts
        if self._running.done():
            await self._running
        systemd.stopping()
        log.info("stopping")

    # -- up -----------------------------------------------------------------------------------------------------------

    async def _open_store(self, stack: contextlib.AsyncExitStack) -> tuple[Store, OpenedStore]:
        settings = self._loaded.config.store
        synchronous: Synchronous = "EXTRA" if settings.synchronous == "extra" else "FULL"
        try:
            if settings.path != ":memory:":
                Path(settings.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            store, opened = await Store.open(
                settings.path, synchronous=synchronous, on_locked=self._check_addresses_free
            )
        except StoreError as error:
            raise CannotStart(str(error), error.exit_code) from None
        except OSError as error:
            raise CannotStart(*_open_error(settings.path, error)) from None
        except DiskFull as error:
            raise CannotStart(f"{settings.path}: {error}", EXIT_IO) from None
        stack.push_async_callback(store.close)
        for fault in opened.faults:
            log.error("store_fault", message=fault)
        if opened.full and (space := await store.space()) is not None:
            log.error("disk_full", refused="creates", reserve=opened.has_reserve, **msgspec.structs.asdict(space))
        elif not opened.has_reserve:
            log.warning("reserve_file_missing", message="on a full disk, running jobs may not be able to end")
        if opened.epoch_warning is not None:
            log.warning("fencing_epoch", message=opened.epoch_warning)
        return store, opened

    def _check_addresses_free(self) -> None:
        """Raise CannotStart where another process listens at one of our places, before anything has been touched."""
        for name, place in _addresses(self._loaded.config).items():
            if name not in self._passed_sockets and is_in_use(config.parse_listen(place, name)):
                taken = OSError(errno.EADDRINUSE, "another process listens there")
                raise _cannot_listen(name, place, taken)

    def _recover_processing(self, opened: OpenedStore) -> None:
        """What a start owes the jobs that were processing: time to be heard of, or an end after a restore.

        The actor does it before anything else; on a full disk, as soon as there is room.
        """
        if not opened.marked:
            self._extend_locks(self.clock.moment().lease)
            return
        slices = self._processing_slices()
        for index, ids in enumerate(slices or [[]]):
            self.actor.owe(EndGrants(ids=ids, last=index + 1 >= len(slices)))
        held = len(self.actor.book.processing)
        log.warning("backup_put_back", grants_to_end=held, epoch=self.actor.book.epoch)

    def _processing_slices(self) -> list[list[str]]:
        """The jobs that are processing, in slices."""
        held = list(self.actor.book.processing)
        return [held[first : first + SLICE] for first in range(0, len(held), SLICE)]

    def _extend_locks(self, since: int) -> None:
        """No worker could be heard since that lease time: none of their jobs ends at once."""
        for ids in self._processing_slices():
            self.actor.owe(ExtendAfterPause(ids=ids, grace_ms=GRACE_MS, since=since))

    def _on_pause(self, away_ms: int) -> None:
        """The process was stopped, or its machine was suspended or starved, and goes on."""
        log.warning("was_away", away_ms=away_ms, processing=len(self.actor.book.processing))
        self._extend_locks(self.clock.moment().lease - away_ms)

    async def _start_sweeper(
        self, store: Store, opened: OpenedStore, stack: contextlib.AsyncExitStack
    ) -> ArtifactSweeper | None:
        """Artifacts of deleted jobs are deleted, where there is a store of them."""
        self._sweeps = SweepStats(waiting=opened.tombstones)
        self._artifacts = await _open_artifacts(self._loaded)
        if self._artifacts is None:
            if opened.tombstones:
                log.warning("artifacts_wait", tombstones=opened.tombstones, reason="artifacts.url is not set any more")
            return None
        stack.push_async_callback(self._artifacts.close)
        sweeper = ArtifactSweeper(store, self._artifacts, self.clock, self._sweeps)
        store.on_tombstones = sweeper.expect
        _run_in_background(stack, "sweeper", sweeper)
        return sweeper

    def _make_webhooks(self, store: Store) -> WebhookManager:
        """Webhooks, not at work yet. Who is configured keeps the journal from now on."""

        def poster(endpoint: WebhookEndpoint) -> HttpTransport:
            return HttpTransport(
                allow_private=endpoint.allow_private, most=PARALLEL, wall=lambda: self.clock.moment().now
            )

        office = DispatchContext(
            disk=store,
            moment=self.clock.moment,
            source=f"/jobd/{quote(socket.gethostname(), safe='')}",
            may_write=lambda: self.actor.full_disk.closed == Closed.NOTHING,
            alerts=lambda: self.alerts.known(),
            chance=SystemRandom().random,
        )
        webhooks = WebhookManager(office, listen=self.actor.on_commit.append, post=poster)
        webhooks.set_endpoints(each.endpoint for each in self._loaded.webhooks)
        return webhooks

    def _make_services(
        self, store: Store, opened: OpenedStore, sweeper: ArtifactSweeper | None, stack: contextlib.AsyncExitStack
    ) -> Services:
        settings = self._loaded.config
        health = Health(
            self.actor,
            self.clock,
            self.cleaner,
            faults=opened.faults,
            take_faults=store.take_faults,
            artifacts=self._artifacts,
            sweeper=sweeper,
        )
        stack.push_async_callback(health.close)
        self.alerts = Alerts(self.actor.book, self.clock, health, self.cleaner, _thresholds(settings))
        _run_in_background(stack, "alerts", self.alerts)
        metrics = Metrics(
            self.actor, self.cleaner, self.alerts, self.clock, self._sweeps, store.path, self._apps, self.feed
        )
        metrics.webhooks = self.webhooks.metrics
        _run_in_background(stack, "metrics", metrics)
        planner = Planner(self.actor, self.clock)
        stack.push_async_callback(planner.close)
        self.alerts.failing_webhook = self.webhooks.worst
        self.actor.on_commit.append(self.alerts.attempts.note)
        self.alerts.on_change.append(self.webhooks.alerts_changed)
        _run_in_background(stack, "webhooks", self.webhooks)
        return Services(
            actor=self.actor,
            alerts=self.alerts,
            maintainer=self.cleaner,
            clock=self.clock,
            backups=Backups(store, lambda: self.clock.moment().now),
            downloads=Downloads(self._artifacts, settings.limits.downloads),
            failures=self.failures,
            feed=self.feed,
            health=health,
            metrics=metrics,
            planner=planner,
            scrubber=Scrubber(store),
            webhooks=self.webhooks,
            is_alive=lambda: not self._running.done(),
        )

    async def _open_listeners(self, stack: contextlib.AsyncExitStack, figures: bytes | None) -> None:
        settings, given, places = self._loaded.config, self._passed_sockets, _addresses(self._loaded.config)
        limits = Limits(body=settings.limits.body, payload=settings.limits.payload, bulk=settings.limits.bulk)
        local = App(Authenticator("worker"), worker.ROUTES, self.actor, self.services, limits=limits)
        doors = [ApiListener("worker", local, places["worker"])]
        if settings.worker.listen:
            # By whatever name workers call: no browser knows their token, so there is no rebinding to be feared.
            self._worker_authenticator = Authenticator("worker-tcp", tokens=self._loaded.worker_tokens)
            remote = App(self._worker_authenticator, worker.ROUTES, self.actor, self.services, limits=limits)
            doors.append(ApiListener("worker-tcp", remote, places["worker-tcp"]))
        self._admin_authenticator = Authenticator(
            "admin",
            tokens=self._admin_tokens(),
            read_only_tokens=self._loaded.read_only_tokens,
            hosts=_admin_hosts(settings, given.get("admin")),
        )
        recorder = Timeseries.opened(read_extra(figures), self.clock.moment().now)
        self.actor.on_commit.append(recorder.record)
        self.cleaner.save_extra(recorder.saved)
        self._dashboard = await asyncio.to_thread(Dashboard, self._admin_authenticator, recorder)
        calls = (*admin_api.ROUTES, *self._dashboard.routes(), worker.DOCUMENT)
        admin = App(
            self._admin_authenticator,
            calls,
            self.actor,
            self.services,
            limits=limits,
            admin=True,
            pages=self._dashboard,
        )
        doors.append(ApiListener("admin", admin, places["admin"]))
        self._apps += [door.app for door in doors]
        listeners: list[HttpListener] = []
        stack.push_async_callback(_close_listeners, listeners, self.actor, self.services)
        for door in doors:
            listeners.append(await door.open(given.get(door.name), settings))

    def _admin_tokens(self) -> tuple[str, ...]:
        """The configured ones; in development, where there are none, a random one that is printed."""
        if self._loaded.admin_tokens:
            return self._loaded.admin_tokens
        if not hasattr(self, "_generated_token"):
            self._generated_token = secrets.token_urlsafe(32)
            print(
                f"ENVIRONMENT=development: admin token for this run: {self._generated_token}",
                file=sys.stderr,
                flush=True,
            )
        return (self._generated_token,)

    # -- at work ------------------------------------------------------------------------------------------------------

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal, number.name)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)
        loop.add_signal_handler(signal.SIGUSR1, self._dump)

    def _on_stop_signal(self, name: str) -> None:
        now = time.monotonic()
        if self._stop.is_set() and now - self._stop_requested_at < SAME_MOMENT_S:
            return  # one wish, told twice: to the process and to its group
        was_asked, self._stop_requested_at = self._stop_requested_at > 0, now
        if was_asked:
            log.critical("aborted", signal=name)
            os._exit(1)  # whatever was answered is on disk
        log.info("asked_to_stop", signal=name)
        self._stop.set()

    def _on_reload_signal(self) -> None:
        """Take over what can change at work; on an error the old configuration stays."""
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
        taken, refused = config.changes(self._loaded.config, new.config)
        settings = _merge(self._loaded.config, new.config, taken)
        if new.admin_tokens != self._loaded.admin_tokens:
            taken.append("admin tokens")
        if new.worker_tokens != self._loaded.worker_tokens:
            taken.append("worker tokens")
        if new.read_only_tokens != self._loaded.read_only_tokens:
            taken.append("read-only tokens")
        if new.webhooks != self._loaded.webhooks:
            taken.append("webhooks")
            self.webhooks.set_endpoints(each.endpoint for each in new.webhooks)
        self._warn(warning for warning in new.warnings if warning not in self._loaded.warnings)
        self._loaded = msgspec.structs.replace(
            self._loaded,
            webhooks=new.webhooks,
            config=settings,
            admin_tokens=new.admin_tokens,
            read_only_tokens=new.read_only_tokens,
            worker_tokens=new.worker_tokens,
            warnings=new.warnings,
        )
        self.actor.policy = settings.policy()
        self.clock.keep_ms = self.actor.policy.shortest_keep_ms
        self.cleaner.set_schedule(_schedule(settings))
        self.alerts.thresholds = _thresholds(settings)
        self._admin_authenticator.replace_tokens(self._admin_tokens(), new.read_only_tokens)
        if settings.worker.listen:
            self._worker_authenticator.replace_tokens(new.worker_tokens)
        logging.set_level(settings.log.level)
        log.info("reloaded", changed=taken, need_restart=refused)

    def _dump(self) -> None:
        """Mailbox, tasks and stacks, for a look at a daemon that does not move."""
        log.info("dump", mailbox=self.actor.waiting, parked=len(self.actor.parked), jobs=self.actor.book.totals)
        for task in asyncio.all_tasks():
            stack = " < ".join(f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in task.get_stack())
            log.info("dump_task", task=task.get_name(), stack=stack)
        for number, frame in sys._current_frames().items():
            log.info("dump_thread", thread=number, stack=" < ".join(traceback.format_stack(frame)[-3:]))

    async def _feed_watchdog(self) -> None:
        """systemd is told that we live by the actor: only an answer through the mailbox counts."""
        interval_s = systemd.watchdog_s()
        while interval_s is not None:
            if isinstance(await self.actor.ask(Ping(), by="daemon"), Response):
                systemd.alive()
            await asyncio.sleep(interval_s / 2)

    # -- down ---------------------------------------------------------------------------------------------------------

    async def _stop_actor(self) -> None:
        self.actor.stop()
        await self._running


def _open_error(path: str, error: OSError) -> tuple[str, int]:
    """A sentence and the exit code: a place where this user cannot keep a store is a matter of configuration."""
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = f"user {os.geteuid()} may not keep a store there; give it the directory, or choose another store.path"
        return f"{path}: {error.strerror}: {hint}", EXIT_CONFIG
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return f"{path}: {error.strerror}: store.path has to name a file in a directory", EXIT_CONFIG
    return f"{path}: {error}", EXIT_IO


class RandomPool:
    """The system's randomness in large pieces: each draw gives the interpreter's lock up to the disk's thread."""

    def __init__(self) -> None:
        self._drawn = b""
        self._used = 0

    def __call__(self, size: int) -> bytes:
        """`size` bytes (16 or so), none of them given before."""
        start, self._used = self._used, self._used + size
        if self._used > len(self._drawn):
            self._drawn, start, self._used = os.urandom(8192), 0, size
        return self._drawn[start : self._used]


class ApiListener(msgspec.Struct):
    """One API and where it listens, unless systemd has opened its socket already."""

    name: str
    app: App[Services]
    address: str

    async def open(self, given: list[socket.socket] | None, settings: Config) -> HttpListener:
        listener = HttpListener(self.app)
        section = settings.admin if self.name == "admin" else settings.worker
        tls = None if self.name == "worker" else _tls(section.tls_cert, section.tls_key)
        try:
            if given:
                for opened in given:
                    await listener.open_socket(opened, tls=tls)
                return listener
            place = config.parse_listen(self.address, self.name)
            if isinstance(place, str):
                await asyncio.to_thread(os.makedirs, os.path.dirname(place) or ".", 0o755, exist_ok=True)
                await listener.open_unix(place, int(settings.worker.socket_mode, 8))
            else:
                await listener.open_tcp(*place, tls=tls)
        except OSError as error:
            raise _cannot_listen(self.name, self.address, error) from None
        log.info("listening", door=self.name, at=self.address)
        return listener


def _cannot_listen(name: str, place: str, error: OSError) -> CannotStart:
    code = EXIT_BUSY if error.errno == errno.EADDRINUSE else EXIT_CONFIG
    return CannotStart(f"[{name}] cannot listen on {place}: {error}", code)


def _addresses(settings: Config) -> dict[str, str]:
    """Where each door is, as the configuration names it."""
    places = {"worker": f"unix:{settings.worker.socket}", "admin": settings.admin.listen}
    return places | ({"worker-tcp": settings.worker.listen} if settings.worker.listen else {})


def _tls(cert: str, key: str) -> ssl.SSLContext | None:
    if not cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise CannotStart(f"tls_cert {cert}, tls_key {key}: {error}", EXIT_CONFIG) from None
    return context


def _admin_hosts(settings: Config, given: list[socket.socket] | None) -> frozenset[str] | None:
    """The names that the admin listener answers to; None on a Unix socket, which no browser reaches."""
    if given:
        names = [opened.getsockname() for opened in given if opened.family != socket.AF_UNIX]
        if not names:
            return None
        return frozenset().union(*(own_names(name[0], settings.admin.hosts) for name in names))
    if settings.admin.listen.startswith("unix:"):
        return None
    return own_names(settings.admin.listen, settings.admin.hosts)


def _actor(store: Store, opened: OpenedStore, clock: Clock, settings: Config) -> Actor:
    book = Book.opened(opened)
    book.quarantined = dict(opened.quarantined)
    book.suspects = dict(opened.suspects)
    book.figures = read_figures(opened.figures)
    limits = settings.limits
    bounds = Bounds(limits.mailbox, limits.inflight_bytes, limits.parked_claims, int(limits.claim_wait))
    keys = Keys(_current_keys(opened.keys, book), limits.idempotency_keys)
    actor = Actor(
        store,
        book,
        keys,
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


def _current_keys(rows: list[StoredResponse], book: Book) -> list[StoredResponse]:
    """Of a start or claim only the grants that are still current keep its key alive."""
    kept = []
    for row in rows:
        if row.grants is not None:
            current = [(job_id, lock_id) for job_id, lock_id in row.grants if book.holds(job_id, lock_id)]
            row = msgspec.structs.replace(row, grants=current)
        if row.grants is None or row.grants:
            kept.append(row)
    return kept


async def _open_artifacts(loaded: LoadedConfig) -> ArtifactStore | None:
    """The store that artifacts.url names, if any. What a bucket takes is imported for a bucket alone."""
    settings = loaded.config
    if not settings.artifacts.url:
        return None
    url = urlsplit(settings.artifacts.url)
    owner = blake2b(f"{socket.gethostname()} {settings.store.path}".encode(), digest_size=6).hexdigest()
    if url.scheme == "file":
        store = FileArtifactStore(unquote(url.path), owner, loaded.own_directories)
        try:
            async with asyncio.timeout(PLACE_S):  # one that hangs is health's matter; it is looked at again before use
                await store.ask(
                    partial(config.check_artifact_directory, settings.artifacts.url, loaded.own_directories)
                )
        except ConfigError as error:
            raise CannotStart(str(error), EXIT_CONFIG) from None
        except TimeoutError:
            log.warning("artifacts_wait", place=store.place, reason=f"no answer within {PLACE_S:g} s")
        return store
    from jobd.storage.artifacts.s3 import S3ArtifactStore

    try:
        return S3ArtifactStore(url.netloc, unquote(url.path).strip("/"), owner)
    except ArtifactStoreError as fault:
        raise CannotStart(f"artifacts.url: {fault}", EXIT_CONFIG) from None


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
    alerts = settings.alerts
    return Thresholds(
        stuck_jobs=alerts.stuck_jobs,
        processing_jobs=alerts.processing_jobs,
        average_processing_ms=int(alerts.average_processing),
        pass_issues=alerts.pass_issues,
        granted_twice=alerts.granted_twice,
        slower_than_usual=alerts.slower_than_usual,
        webhook_failing_ms=int(alerts.webhook_failing),
        queue_without_workers_ms=int(alerts.queue_without_workers),
        queue_waits_ms=int(alerts.queue_waits),
        failure_rate=alerts.failure_rate,
        failure_rate_attempts=alerts.failure_rate_attempts,
        disk_free_percent=alerts.disk_free_percent,
        disk_free_bytes=alerts.disk_free_bytes,
        release_loop=alerts.release_loop,
    )


def _merge(old: Config, new: Config, taken: list[str]) -> Config:
    """The old configuration with the `taken` keys of the new one."""
    for key in taken:
        section, name = key.split(".")
        value = getattr(getattr(new, section), name)
        old = msgspec.structs.replace(old, **{section: msgspec.structs.replace(getattr(old, section), **{name: value})})
    return old


class BackgroundPart(Protocol):
    async def run(self) -> None: ...
    def stop(self) -> None: ...


def _run_in_background(stack: contextlib.AsyncExitStack, name: str, part: BackgroundPart) -> None:
    """Run a part until it is stopped, by a message; then wait for its end."""
    task = asyncio.create_task(part.run(), name=name)

    async def end() -> None:
        part.stop()
        await task

    stack.push_async_callback(end)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _close_listeners(listeners: list[HttpListener], actor: Actor, rooms: Services) -> None:
    """No new requests; those in flight are answered, parked claims with nothing, and streams of events end."""
    actor.stop_parking()
    rooms.feed.close()
    rooms.downloads.close()
    await asyncio.gather(*(listener.stop(STOP_S) for listener in listeners))
