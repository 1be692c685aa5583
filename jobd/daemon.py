"""Wire the parts of the daemon together, run it, and stop it in the reverse order.

Exit codes: 0 stopped, 74 I/O error, 75 another daemon has the store or an address, or another node leads, 78
configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import msgspec
import structlog

from jobd import config, logging, systemd
from jobd.api import admin_routes as admin_api
from jobd.api import worker_routes as worker_api
from jobd.cluster.advertised import advertised_problem
from jobd.cluster.hand_over import hand_over_if_full
from jobd.cluster.leadership import Leadership
from jobd.config import ConfigError, LoadedConfig
from jobd.core.state import State
from jobd.dashboard.routes import Dashboard
from jobd.engine.actor import DiskBroken
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.http.http_app import HttpApp
from jobd.http.routing import Route, Router
from jobd.http.server import HttpListener, WorkerListener
from jobd.model.storage import OpenedStore
from jobd.node import ClusterNode, exit_code
from jobd.resources import (
    EXIT_BUSY,
    EXIT_IO,
    CannotStart,
    admin_hosts,
    check_addresses_free,
    check_passed_sockets,
    open_artifacts,
    open_listener,
    open_store,
    reload_certificates,
)
from jobd.serving import Background, Leading, Serving
from jobd.storage.artifacts.base import ArtifactStore
from jobd.storage.store import Store

SAME_SIGNAL_S: Final = 0.05
STOP_S: Final = 20.0  # for requests in flight; systemd waits longer
RELOAD_FLUSH_S: Final = 0.2  # at most, to write the log of a reload

ADMIN_ROUTES: Final = (*admin_api.ROUTES, worker_api.DOCUMENT)

log = structlog.get_logger("jobd.daemon")


def serve(loaded: LoadedConfig, reload: Callable[[], LoadedConfig]) -> int:
    """Run the daemon until a signal stops it. Return the exit code. `reload` reads the configuration again."""
    logging.configure(loaded.config.log.level, loaded.config.log.format)
    os.umask(os.umask(0o022) | 0o022)  # other users may not write to directories that the daemon creates
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(loaded, reload))
    except CannotStart as error:
        log.critical("cannot_start", reason=str(error), exit_code=error.code)
        return error.code
    except DiskBroken as error:
        code = exit_code(error.__cause__)
        if code == EXIT_IO:
            log.critical("stopped_by_disk", reason=str(error), exit_code=code)
        else:
            log.error("stopped_leading", reason=str(error), exit_code=code)
        return code


async def _serve(loaded: LoadedConfig, reload: Callable[[], LoadedConfig]) -> int:
    async with contextlib.AsyncExitStack() as stack:
        daemon = Daemon(loaded, reload, stack)
        if await daemon.start():
            gc.freeze()  # so that no collection traverses the jobs loaded at the start
            gc.enable()
            await daemon.wait_stopped()
    log.info("stopped", exit_code=daemon.exit_code)
    return daemon.exit_code


async def _close_store(store: Store, kind: type[BaseException] | None, *_: object) -> None:
    """Close the store. Raises DiskBroken if the disk fails in this last moment."""
    await store.close()
    if kind is None and (error := store.failure) is not None:
        raise DiskBroken(str(error)) from error


class Daemon:
    """A running daemon. `stack` stops what `start` has started, in the reverse order."""

    def __init__(
        self, loaded: LoadedConfig, reload: Callable[[], LoadedConfig], stack: contextlib.AsyncExitStack
    ) -> None:
        self._loaded = loaded
        self._reload = reload
        self._stack = stack
        self._background = Background(stack)
        self._stop = asyncio.Event()
        self._stop_requested_at = 0.0
        self._is_store_open = False
        self._is_ready = False  # the start is complete, and systemd was notified
        self._apps: list[HttpApp[Any]] = []
        self._listeners: dict[str, HttpListener] = {}
        self._authenticators: dict[str, Authenticator] = {}
        self._preparing: asyncio.Future[None] | None = None
        self.node: ClusterNode | None = None  # None: the daemon has a journal of its own
        self.exit_code = 0
        self._serving: Serving | None = None  # None: the node is a standby, or the daemon starts
        self._watchdog_s = systemd.watchdog_s()

    async def start(self) -> bool:
        """Start the daemon. A node of a cluster follows the leader until it leads. Raises CannotStart.

        Return False if a signal stopped a standby.
        """
        self._add_signal_handlers()
        settings = self._loaded.config
        self._warn(self._loaded.warnings)
        self._passed_sockets = systemd.sockets()
        check_passed_sockets(settings, self._passed_sockets)
        if settings.journal.url:
            if not await self._follow():
                return False
        else:
            artifacts = await self._open_artifacts()
            store, opened = await open_store(settings, self._check_addresses)
            self._stack.push_async_exit(partial(_close_store, store))
            self._is_store_open = True
            await self._lead(store, opened, State.opened(opened), artifacts)
        self._report_ready()
        self._background.run_until_cancelled("templates", self._compile_templates())
        assert self._serving is not None
        log.info("ready", jobs=self._serving.actor.state.total(), store=settings.store.path, pid=os.getpid())
        return True

    async def _follow(self) -> bool:
        """Run as a standby until this node leads. Return False if a signal came first."""
        node = self.node = ClusterNode(self._loaded)
        await node.open(self._stack, self._check_addresses)
        self._is_store_open = True
        artifacts = await self._open_artifacts()  # now, because an error must not end a takeover
        self._background.run_until_cancelled("registry", node.registry.run())
        self._background.run_until_cancelled("snapshots", node.snapshots.run())
        self._stack.push_async_callback(self._close_listeners)
        self._make_authenticators()
        await asyncio.to_thread(self._make_dashboard)
        self._prepared()  # now, because it takes half a second and a takeover must be fast
        for name, authenticator in self._authenticators.items():
            pages = self._dashboard if name == "admin" else None
            self._apps.append(node.app(authenticator, self._routes_of(name), self._limits(), pages))
        await self._listen()
        self._background.run_until_cancelled("advertised", self._check_advertised())
        gc.freeze()
        gc.enable()  # a standby can run for months
        watchdog = asyncio.create_task(self._feed_watchdog())
        self._report_ready()
        log.info("standby", node=self._loaded.config.node.name, pid=os.getpid())
        leadership = await node.follow(self._stop)
        gc.disable()  # as during every start, because a collection delays it
        watchdog.cancel()
        if leadership is None:
            return False
        self._stack.push_async_callback(leadership.release)
        self._background.run("lease", leadership)
        leading = Leading(leadership, node.view, node.registry.refresh, self._step_down)
        await self._lead(node.store, node.warm.opened(), node.warm.state, artifacts, leading)
        assert self._serving is not None
        full_disk = self._serving.actor.full_disk
        handing_over = hand_over_if_full(lambda: node.store.is_full or full_disk.is_local, node.view, self._step_down)
        self._background.run_until_cancelled("hand_over", handing_over)
        return True

    async def _open_artifacts(self) -> ArtifactStore | None:
        artifacts = await open_artifacts(self._loaded)
        if artifacts is not None:
            self._stack.push_async_callback(artifacts.close)
        return artifacts

    async def _check_advertised(self) -> None:
        """Warn if the advertised address does not lead to this node."""
        node, listener = self._loaded.config.node, self._listeners.get("worker-tcp")
        if node.advertise:
            is_own = listener.has_peer if node.direct and isinstance(listener, WorkerListener) else None
            if (problem := await advertised_problem(node.advertise, is_own)) is not None:
                self._warn([problem])

    async def _lead(
        self,
        store: Store,
        opened: OpenedStore,
        state: State,
        artifacts: ArtifactStore | None,
        leading: Leading | None = None,
    ) -> None:
        """Start all parts, and open the listeners or let those of a standby serve all routes. Raises CannotStart."""
        loaded = self._loaded
        serving = Serving(self._stack, loaded, store, opened, state, self._apps, artifacts, leading)
        await serving.start(self._stop.set)
        self._serving = serving
        if self._loaded is not loaded:  # a standby was reloaded meanwhile
            serving.apply(self._loaded.config, self._loaded)
        await self._open_listeners(serving)
        self._background.run_until_cancelled("watchdog", self._feed_watchdog())
        if leading is not None:
            self._stack.push_async_callback(self._release, serving, leading.leadership)
        if serving.running.done():
            await serving.running  # the disk failed during the start; raises before the daemon reports that it is ready
        serving.services.is_open = True

    async def _release(self, serving: Serving, leadership: Leadership) -> None:
        """Release leadership before responses are flushed and webhooks end, so that another node leads meanwhile."""
        serving.end_streams()
        for each in self._listeners.values():
            await each.stop_accepting()
            each.reject_incomplete()
        await serving.finish()
        await leadership.release()

    def _report_ready(self) -> None:
        self._is_ready = True
        systemd.ready()

    def _step_down(self) -> None:
        """Stop after the requests in progress, so that a standby takes over."""
        log.info("steps_down")
        self.exit_code = EXIT_BUSY
        self._stop.set()

    def _check_addresses(self) -> None:
        check_addresses_free(self._loaded.config, self._passed_sockets)

    async def wait_stopped(self) -> None:
        """Wait for a signal, or until the actor has ended because the disk failed. Raises DiskBroken."""
        serving = self._serving
        assert serving is not None
        await self._stop.wait()
        serving.services.is_open = False
        serving.clock.stop()  # the listeners close, so no lock may expire from now on
        if serving.running.done():
            await serving.running
        systemd.stopping()
        log.info("stopping")

    # -- listeners ----------------------------------------------------------------------------------------------------

    async def _open_listeners(self, serving: Serving) -> None:
        """Open the listeners, or let those of a standby serve all routes."""
        if not self._authenticators:
            self._make_authenticators()
            await asyncio.to_thread(self._make_dashboard)
        await self._prepared()
        standbys = {app.authenticator.name: app for app in self._apps}
        for name, router in self._routers.items():
            pages = self._dashboard if name == "admin" else None
            if name in standbys:
                app, services = standbys[name], serving.services
                app.serve(router, serving.actor, services, pages=pages, guard=serving.check_leadership)
                app.confirm = serving.confirm_leadership
                continue
            authenticator, limits, is_admin = self._authenticators[name], self._limits(), name == "admin"
            app = HttpApp(
                authenticator, router, serving.actor, serving.services, limits=limits, admin=is_admin, pages=pages
            )
            self._apps.append(app)
        self._stack.push_async_callback(self._close_listeners)
        await self._listen()

    def _prepared(self) -> asyncio.Future[None]:
        """Build the routers in a thread, once."""
        if self._preparing is None:
            self._preparing = asyncio.ensure_future(asyncio.to_thread(self._prepare))
        return self._preparing

    def _prepare(self) -> None:
        limits = self._limits()
        self._routers = {name: Router(self._routes_of(name), limits) for name in self._authenticators}

    def _routes_of(self, name: str) -> tuple[Route, ...]:
        return (*ADMIN_ROUTES, *self._dashboard.routes()) if name == "admin" else worker_api.ROUTES

    def _make_dashboard(self) -> None:
        view = None if self.node is None else self.node.view
        self._dashboard = Dashboard(self._authenticators["admin"], cluster_view=view)

    def _make_authenticators(self) -> None:
        settings, loaded = self._loaded.config, self._loaded
        self._authenticators["worker"] = Authenticator("worker")
        if settings.worker.listen:
            # Any Host is accepted: browsers do not know the workers' token, so DNS rebinding gains nothing.
            self._authenticators["worker-tcp"] = Authenticator("worker-tcp", tokens=loaded.worker_tokens)
        self._authenticators["admin"] = Authenticator(
            "admin",
            tokens=self._admin_tokens(),
            read_only_tokens=loaded.read_only_tokens,
            hosts=admin_hosts(settings, self._passed_sockets.get("admin")),
        )

    def _limits(self) -> Limits:
        limits = self._loaded.config.limits
        return Limits(body=limits.body, payload=limits.payload, bulk=limits.bulk)

    async def _listen(self) -> None:
        for app in self._apps:
            if (name := app.authenticator.name) not in self._listeners:
                self._listeners[name] = await open_listener(name, app, self._loaded.config, self._passed_sockets)

    async def _close_listeners(self) -> None:
        """Close the listeners after the responses to pending requests. Waiting claims and event streams end at once."""
        if self._serving is not None:
            self._serving.end_streams()
        listeners, self._listeners = self._listeners, {}
        await asyncio.gather(*(listener.stop(STOP_S) for listener in listeners.values()))

    def _admin_tokens(self) -> tuple[str, ...]:
        """Return the configured tokens. Without any, in development, generate and print one."""
        if self._loaded.admin_tokens:
            return self._loaded.admin_tokens
        if not hasattr(self, "_generated_token"):
            self._generated_token = secrets.token_urlsafe(32)
            admin = self._loaded.config.admin
            text = f"ENVIRONMENT=development: admin token for this run: {self._generated_token}"
            if not admin.listen.startswith("unix:"):
                url = f"http{'s' if admin.tls_cert else ''}://{admin.listen}/sign-in#{self._generated_token}"
                text = f"{text}\nSign in: {url}"
            print(text, file=sys.stderr, flush=True)
        return (self._generated_token,)

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
        if not self._is_store_open:  # the opening thread cannot be stopped; the store survives a kill
            log.info("stopped", exit_code=0)
            logging.flush()
            os._exit(0)
        self._stop.set()

    def _on_reload_signal(self) -> None:
        """Reload the configuration and apply the settings that need no restart. Keep the old one on an error."""
        if not self._is_ready:
            log.warning("reload_ignored", reason="the daemon is still starting: reload again when it is ready")
            return
        systemd.reloading()
        try:
            self._apply(self._reload())
        except ConfigError as error:
            log.error("reload_failed", reason=str(error), kept="the old configuration")
        except Exception:
            log.exception("reload_failed")
        logging.flush(RELOAD_FLUSH_S)  # because `systemctl reload` returns after READY=1
        systemd.ready()

    def _warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            log.warning("config_warning", message=warning)

    def _apply(self, new: LoadedConfig) -> None:
        old = self._loaded
        settings, changed, need_restart = config.reloaded(old.config, new.config)
        # They may be removed together with worker.listen, which needs a restart.
        new = msgspec.structs.replace(new, worker_tokens=new.worker_tokens or old.worker_tokens)
        for field, name in _RELOADED.items():
            if getattr(new, field) != getattr(old, field):
                changed.append(name)
        self._warn(warning for warning in new.warnings if warning not in old.warnings)
        self._loaded = msgspec.structs.replace(new, config=settings)
        if self.node is not None:
            self.node.reload(self._loaded)
        if self._serving is not None:
            self._serving.apply(settings, new)
        self._authenticators["admin"].replace_tokens(self._admin_tokens(), new.read_only_tokens)
        if settings.worker.listen:
            self._authenticators["worker-tcp"].replace_tokens(new.worker_tokens)
        for app in self._apps:
            app.cut_off_revoked()
        reload_certificates(self._listeners, settings)
        logging.set_level(settings.log.level)
        log.info("reloaded", changed=changed, need_restart=need_restart)

    def _dump(self) -> None:
        """Log the mailbox, tasks and stacks at every log level, to examine a daemon that makes no progress."""
        if self._serving is not None:
            actor = self._serving.actor
            log.error("dump", mailbox=actor.waiting, parked=len(actor.waiting_claims), jobs=actor.state.totals)
        for task in asyncio.all_tasks():
            stack = " < ".join(f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in task.get_stack())
            log.error("dump_task", task=task.get_name(), stack=stack)
        for number, frame in sys._current_frames().items():
            log.error("dump_thread", thread=number, stack=" < ".join(traceback.format_stack(frame)[-3:]))

    async def _feed_watchdog(self) -> None:
        """Report to systemd's watchdog as long as the actor responds to a command in its mailbox.

        A full mailbox rejects the command. It has room again after each batch, so the next attempt follows soon.
        A leader that waits for the journal is alive until its lease ends, which may be after the watchdog's timeout.
        """
        while self._watchdog_s is not None:
            serving = self._serving
            is_alive = serving is None or await serving.responds(self._watchdog_s / 4, systemd.alive)
            if is_alive:
                systemd.alive()
            await asyncio.sleep(self._watchdog_s / (2 if is_alive else 200))


# Fields of LoadedConfig that a reload also applies, with their names in the log.
_RELOADED: Final = {
    "admin_tokens": "admin tokens",
    "worker_tokens": "worker tokens",
    "read_only_tokens": "read-only tokens",
    "webhooks": "webhooks",
}
