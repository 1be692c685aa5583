"""The tasks of a program, and its connection to the daemon."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack, overload

from jobd.client.app.app_schedules import AppSchedules, ScheduleDecorator, ScheduleOptions, Target
from jobd.client.app.daemon_jobs import DaemonJobs
from jobd.client.app.inline_jobs import InlineJobs
from jobd.client.app.job_handle import JobHandle
from jobd.client.app.job_port import JobPort, NewJob
from jobd.client.app.options import TaskOptions, check_options
from jobd.client.app.task_registry import Middleware, TaskDefinition, TaskRegistry
from jobd.client.app.typed_task import AsyncTask, Call, P, R, Task, TaskDecorator, new_jobs

if TYPE_CHECKING:
    from jobd.client.app.app_worker import AppWorker

AnyMiddleware = TypeVar("AnyMiddleware", bound=Middleware)
OnEnqueue = TypeVar("OnEnqueue", bound=Callable[[NewJob], None])


class App:
    """The tasks of a program, and its connection to the daemon. Opens nothing until the first call.

        app = App("shop")

        @app.task(queue="images", max_attempts=5)
        def resize(path: str, width: int = 320) -> str: ...

        job = resize.enqueue("a.png", width=640)
        job.result(timeout=60)

    `include` names modules with tasks of this app, which a worker imports at its start. `url` and `token` are those of
    JobClient. With `inline`, each job runs where it is enqueued, without a daemon.
    """

    def __init__(
        self,
        name: str,
        *,
        include: Sequence[str] = (),
        url: str | Sequence[str] | None = None,
        token: str | None = None,
        inline: bool = False,
    ) -> None:
        tasks: dict[str, TaskDefinition] = {}
        jobs: JobPort = InlineJobs(tasks) if inline else DaemonJobs(url, token, name)
        self.name: Final = name
        self.include: Final = (include,) if isinstance(include, str) else tuple(include)
        self.registry: Final = TaskRegistry(jobs, tasks)
        self.schedules: Final = AppSchedules(name)

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(self, **options: Unpack[TaskOptions]) -> TaskDecorator: ...
    def task(self, *functions: Any, **options: Any) -> Any:
        """Make a task of a function: `@app.task`, or `@app.task(queue="images")`.

        `name` (default: that of the function) is the kind of its jobs, and `queue`, `priority`, `max_attempts`,
        `backoff` and `expires` are their options. `timeout` limits a run. `retry_on` (default: every Exception) and
        `discard_on` say after which exceptions there is another attempt. A completed job is kept for `keep`. Raises
        TypeError for a function that cannot be a task, for a name that another task has, and for an unknown option.
        """
        check_options(options, TaskOptions, "app.task")
        return self._task(options, *functions) if functions else functools.partial(self._task, options)

    def _task(self, options: Any, function: Callable[..., Any], /) -> Any:
        definition = self.registry.define(function, options)
        return (AsyncTask if definition.is_async else Task)(definition, {})

    def schedule(self, when: str | timedelta, /, **options: Unpack[ScheduleOptions]) -> ScheduleDecorator:
        """Create a job of a task by the clock: `@app.schedule("0 3 * * *")` above `@app.task`.

        `when` is a cron expression (five fields, or @hourly, @daily, @weekly, @monthly) in `timezone`, or a timedelta.
        The task needs a default for each parameter. A call needs none: `app.schedule("@weekly", id="w")(tidy.call(7))`.
        `id` is the name of the task by default. Workers of the app put its schedules into the daemon when they start.
        Raises TypeError for a task without defaults and for an id that is used twice.
        """
        check_options(options, ScheduleOptions, "app.schedule")

        def add(target: Target, /) -> Target:
            self.schedules.add(when, target, options)
            return target

        return add

    def enqueue_many(self, calls: Iterable[Call[R]]) -> list[JobHandle[R]]:
        """Create up to 1,000 jobs in one commit: all or none."""
        listed = list(calls)
        if listed:
            self.registry.jobs.create(new_jobs(listed))
        return [call.handle for call in listed]

    async def aenqueue_many(self, calls: Iterable[Call[R]]) -> list[JobHandle[R]]:
        listed = list(calls)
        if listed:
            await self.registry.jobs.acreate(new_jobs(listed))
        return [call.handle for call in listed]

    def middleware(self, function: AnyMiddleware, /) -> AnyMiddleware:
        """Run a generator around each run of a task. It yields once, where the task runs.

        A plain generator wraps all tasks, in the thread or on the event loop of the task. An async one wraps async
        tasks. The first one that is declared is the outermost, and async ones are inside plain ones.
        """
        self.registry.add_middleware(function)
        return function

    def on_enqueue(self, function: OnEnqueue, /) -> OnEnqueue:
        """Call a function with each NewJob before it is sent."""
        self.registry.on_enqueue.append(function)
        return function

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Close the connections when an ASGI application ends: FastAPI(lifespan=app.lifespan)."""
        try:
            yield
        finally:
            await self.aclose()

    def run(self, *, queues: Sequence[str] | None = None, concurrency: int = 8, name: str | None = None) -> None:
        """Work until SIGTERM or SIGINT, then drain. `queues` are those of the tasks by default."""
        self._worker(queues=queues, concurrency=concurrency, name=name).run()

    @contextlib.asynccontextmanager
    async def running(self, *, queues: Sequence[str] | None = None, concurrency: int = 8) -> AsyncIterator[None]:
        """Work on this event loop while the context is entered, for small programs and notebooks."""
        import asyncio

        worker = self._worker(queues=queues, concurrency=concurrency)
        serving = asyncio.create_task(worker.serve())
        try:
            yield
        finally:
            worker.stop()
            await serving

    def _worker(self, **options: Any) -> AppWorker:
        from jobd.client.app.app_worker import AppWorker

        return AppWorker(self.registry, self.include, schedules=self.schedules, **options)

    def close(self) -> None:
        """Close the connections of blocking calls. The next call opens them again."""
        self.registry.jobs.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop and those of blocking calls."""
        await self.registry.jobs.aclose()
