"""Tests of programs that use jobd: a real daemon in a thread of this process, with an empty store in memory.

pytest has the fixture `jobd`, which `pytest_plugin.py` declares. Other test runners use `daemon`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
import secrets
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from datetime import datetime, timedelta
from typing import Any, Final, Self, TypeVar

import structlog
import uvloop
from msgspec import UNSET, Raw, UnsetType

from jobd.api import worker_routes
from jobd.api.services import Services
from jobd.client import JobClient
from jobd.client.app.app import App
from jobd.client.app.daemon_jobs import DaemonJobs, replaced_daemon
from jobd.client.app.inline_jobs import run_coroutine
from jobd.client.app.job_context import RunHere, context_of
from jobd.client.app.job_handle import JobHandle
from jobd.client.app.options import milliseconds, unix_ms
from jobd.client.app.task_registry import TaskDefinition
from jobd.client.errors import LockLost
from jobd.client.outcomes import Snooze, Stopped
from jobd.client.worker.error_text import failure_message, failure_options
from jobd.config_loader import load
from jobd.core.state import State
from jobd.engine.clock import Clock, boot_clock_ms, wall_clock_ms
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.http.http_app import HttpApp
from jobd.http.routing import Router
from jobd.http.server import WorkerListener
from jobd.model.responses import GrantView, JobView
from jobd.serving import Serving
from jobd.storage.store import MEMORY, Store

T = TypeVar("T")
STOP_S: Final = 5.0  # for requests in progress at the end of the session
_ERROR_LEVEL: Final = 40  # of the lines of the daemon, unless the program configures structlog
_WORKER: Final = "test"


class DaemonThread:
    """The event loop and the listener of a daemon, in a thread. Each test has its own store, one after another."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="jobd-")
        directory = self._directory.name
        self.path: Final = f"{directory}/worker.sock"
        flags = {"store.path": MEMORY, "worker.socket": self.path, "admin.listen": f"unix:{directory}/admin.sock"}
        self._loaded = load(flags, {"ADMIN_TOKEN": secrets.token_urlsafe(32)}, "")
        limits = self._loaded.config.limits
        self._limits = Limits(body=limits.body, payload=limits.payload, bulk=limits.bulk)
        self._router = Router(worker_routes.ROUTES, self._limits)
        self._apps: list[HttpApp[Services]] = []
        self._listener: WorkerListener | None = None
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="jobd test daemon", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._directory.cleanup()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread of the daemon, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @contextlib.contextmanager
    def new_store(self) -> Iterator[TestDaemon]:
        """Serve an empty store. All apps use it, and so does $JOBD_SOCKET."""
        stack, clock = contextlib.AsyncExitStack(), MovableTime()
        before = os.environ.get("JOBD_SOCKET")
        os.environ["JOBD_SOCKET"] = self.path
        is_configured = structlog.is_configured()
        if not is_configured:
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(_ERROR_LEVEL))
        try:
            serving = self.call(self._serve(stack, clock))
            with replaced_daemon(f"unix:{self.path}"), TestDaemon(self, serving, clock) as opened:
                yield opened
        finally:
            os.environ.pop("JOBD_SOCKET")
            if before is not None:
                os.environ["JOBD_SOCKET"] = before
            self.call(stack.aclose())
            if not is_configured:
                structlog.reset_defaults()

    async def _serve(self, stack: contextlib.AsyncExitStack, clock: MovableTime) -> Serving:
        store, opened = await Store.open(MEMORY)
        stack.push_async_callback(store.close)
        make_clock = functools.partial(Clock, wall=clock.wall_ms, boot=clock.boot_ms)
        serving = Serving(
            stack, self._loaded, store, opened, State.opened(opened), self._apps, None, make_clock=make_clock
        )
        await serving.start(lambda: None)
        stack.callback(serving.end_streams)
        serving.services.is_open = True
        if self._listener is not None:
            self._listener.app.serve(self._router, serving.actor, serving.services)
            return serving
        app = HttpApp(Authenticator("worker"), self._router, serving.actor, serving.services, limits=self._limits)
        self._apps.append(app)
        self._listener = WorkerListener(app)
        await self._listener.open_unix(self.path, 0o600)
        return serving

    async def _stop(self) -> None:
        if self._listener is not None:
            await self._listener.stop(STOP_S)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


class MovableTime:
    """The clocks of the daemon. Time that is added passes for locks and schedules too; the wall clock can go back."""

    def __init__(self) -> None:
        self._wall_moved_ms = self._boot_moved_ms = 0

    def wall_ms(self) -> int:
        return wall_clock_ms() + self._wall_moved_ms

    def boot_ms(self) -> Any:  # a BootMs
        return boot_clock_ms() + self._boot_moved_ms

    def move(self, by_ms: int) -> None:
        self._wall_moved_ms += by_ms
        self._boot_moved_ms += max(by_ms, 0)


class TestDaemon:
    """A real daemon with an empty store in memory. Apps use it while the fixture or `daemon` lives."""

    __test__ = False  # pytest does not collect it

    def __init__(self, thread: DaemonThread, serving: Serving, time: MovableTime) -> None:
        self.url: Final = f"unix:{thread.path}"
        self._thread = thread
        self._serving = serving
        self._time = time
        self._client = JobClient(self.url)
        self._definitions: dict[str, TaskDefinition] = {}
        self._apps: dict[App, set[str]] = {}  # with the queues from which they claim

    def __enter__(self) -> TestDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def run_until_empty(self, app: App, *, raises: bool = True, limit: int = 1000) -> list[JobHandle[Any]]:
        """Run jobs here, one at a time, also delayed ones and retries, until none is left. Return those that ran.

        The clock moves to the next delay or retry. The schedules of `app` are put first, as by a worker. If a job
        fails, its error is raised, unless `raises` is false. Raises RuntimeError if jobs are left after `limit` runs.
        """
        ran: list[JobHandle[Any]] = []
        while (grant := self._claim(app, moves=True)) is not None:
            if len(ran) == limit:
                self._client.release_job(grant.job.id, lock_id=grant.lock_id)
                raise RuntimeError(f"job {grant.job.id} and perhaps others are left after {limit} runs: raise `limit`")
            ran.append(self._run(app, grant, raises=raises))
        return ran

    def run_next(self, app: App) -> JobHandle[Any] | None:
        """Run the first job that is due, and return it. None: none is due. Raises its error if it fails."""
        grant = self._claim(app, moves=False)
        return None if grant is None else self._run(app, grant, raises=True)

    def jobs(self, name: str | None = None) -> list[JobHandle[Any]]:
        """Return the jobs, or those of the task `name`, in the order of their creation.

        The result of a task whose app was not run here has JSON values.
        """
        return [JobHandle(self._definition(job.kind), job.id) for job in reversed(self._list(kind=name))]

    def advance(self, by: timedelta) -> None:
        """Move the clock. Due schedules fire. Raises ValueError if `by` is negative."""
        if (by_ms := milliseconds("by", by)) < 0:
            raise ValueError(f"advance moves the clock ahead, not by {by}: use `at` for a time in the past")
        self._thread.call(self._move(by_ms))

    @contextlib.contextmanager
    def at(self, time: datetime) -> Iterator[None]:
        """Set the clock to `time`, which may be in the past, and back at the end. Raises TypeError if it is naive."""
        by_ms = unix_ms("time", time) - self._time.wall_ms()
        self._thread.call(self._move(by_ms))
        try:
            yield
        finally:
            self._thread.call(self._move(-by_ms))

    async def _move(self, by_ms: int) -> None:
        self._time.move(by_ms)
        self._serving.clock.accept()
        await self._serving.clock_moved()

    def _list(self, **chosen: Any) -> list[JobView]:
        """Return the jobs, newest first."""
        return list(self._client.iterate_jobs(limit=200, **chosen))

    def _definition(self, kind: str) -> TaskDefinition:
        if kind not in self._definitions:
            self._definitions[kind] = App(_WORKER).registry.define(_unknown, {"name": kind})
        return self._definitions[kind]

    def _queues(self, app: App) -> set[str]:
        """Return the queues of `app`. Put its schedules first, if this was not done."""
        if app not in self._apps:
            if not isinstance(app.registry.jobs, DaemonJobs):
                raise ValueError("an app with inline=True runs its jobs itself")
            for module in app.include:
                importlib.import_module(module)
            for name, fields in app.schedules.requests().items():
                self._client.put_schedule(id=name, source=app.schedules.source, **fields)
            self._definitions |= app.registry.tasks
            self._apps[app] = {task.queue for task in app.registry.tasks.values()} or {"default"}
        return self._apps[app]

    def _claim(self, app: App, *, moves: bool) -> GrantView | None:
        """Return the grant of the first due job, with `moves` after moving the clock to it."""
        queues, kinds = self._queues(app), list(app.registry.tasks)
        while kinds:
            if grants := self._client.claim(_WORKER, queues=sorted(queues), kinds=kinds):
                return grants[0]
            waiting = [job for job in self._list(status="queued") if job.kind in kinds]
            if others := {job.queue for job in waiting} - queues:
                queues |= others
                continue
            wait_ms = min((job.run_at for job in waiting), default=0) - self._time.wall_ms()
            if wait_ms <= 0 or not moves:  # the queue of a job that is due is paused
                return None
            self._thread.call(self._move(wait_ms))
        return None

    def _run(self, app: App, grant: GrantView, *, raises: bool) -> JobHandle[Any]:
        definition, job = app.registry.tasks[grant.job.kind], grant.job
        run = _InlineRun(self._client, grant)
        context = context_of(job, grant.fencing_token, run)
        payload = b"null" if job.payload is UNSET else bytes(job.payload)
        handle: JobHandle[Any] = JobHandle(definition, job.id)
        try:
            if definition.is_async:
                metadata = run_coroutine(definition.arun(context, payload))
            else:
                metadata = definition.run(context, payload)
        except Snooze as snooze:
            with contextlib.suppress(LockLost):
                self._client.release_job(job.id, lock_id=grant.lock_id, delay_ms=snooze.after_ms)
        except BaseException as error:
            if self._fail(definition, grant, error) and (raises or not isinstance(error, Exception)):
                raise
        else:
            with contextlib.suppress(LockLost):
                self._client.complete_job(job.id, lock_id=grant.lock_id, **{**run.result, "metadata": metadata})
        return handle

    def _fail(self, definition: TaskDefinition, grant: GrantView, error: BaseException) -> bool:
        """Fail the attempt. Return whether the error is to be raised: there is no other attempt."""
        options = failure_options(error, is_final=definition.is_final(error) or not isinstance(error, Exception))
        try:
            failed = self._client.fail_job(
                grant.job.id, lock_id=grant.lock_id, error_message=failure_message(error), **options
            )
        except LockLost:
            return False
        return failed.status == "failed"


class _InlineRun(RunHere):
    """The run of a task here, for its JobContext."""

    def __init__(self, client: JobClient, grant: GrantView) -> None:
        self._client = client
        self._grant = grant
        self.result: dict[str, Any] = {}

    def report(self, progress: float, message: str | None, checkpoint: Raw | UnsetType) -> None:
        id, lock_id = self._grant.job.id, self._grant.lock_id
        try:
            self._client.update_progress(id, lock_id=lock_id, progress=progress, message=message, checkpoint=checkpoint)
        except LockLost as error:
            raise Stopped(error.message) from error

    def set_result(self, **fields: Any) -> None:
        self.result |= fields


def _unknown() -> Any:
    """Stand for a task whose app was not run."""


@contextlib.contextmanager
def daemon() -> Iterator[TestDaemon]:
    """Provide a daemon with an empty store, which all apps use meanwhile. For tests without pytest."""
    with DaemonThread() as thread, thread.new_store() as opened:
        yield opened
