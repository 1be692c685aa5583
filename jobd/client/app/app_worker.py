"""A worker that runs the tasks of an app."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import UNSET, Raw, UnsetType

from jobd.client.app.app_schedules import AppSchedules
from jobd.client.app.daemon_jobs import DaemonJobs
from jobd.client.app.job_context import JobContext, RunHere, context_of
from jobd.client.app.options import milliseconds
from jobd.client.app.task_registry import TaskDefinition, TaskRegistry
from jobd.client.app.worker_processes import ParentLink
from jobd.client.errors import JobdError, Unreachable
from jobd.client.outcomes import Stopped
from jobd.client.worker.handler_context import AsyncHandlerContext, BaseHandlerContext, HandlerContext
from jobd.client.worker.handlers import HandlerLoop, RegisteredHandler
from jobd.client.worker.lock_keeper import LOST, LockKeeper
from jobd.client.worker.runner import Execution, seconds
from jobd.client.worker.worker import Worker

_SCHEDULES_EVERY_S = 5.0  # between two attempts to put them
_PROGRESS_EVERY_S = 0.2  # a task may report more often; the latest report is sent


class AppWorker(Worker):
    """A Worker whose handlers are the tasks of an app. It claims from `queues`, by default those of the tasks.

    Raises ValueError for an app that is inline or has no task, TypeError for a task with an annotation that cannot be
    used, and ImportError for a module of `include` that cannot be imported.
    """

    def __init__(
        self,
        registry: TaskRegistry,
        include: Sequence[str] = (),
        *,
        queues: Sequence[str] | None = None,
        schedules: AppSchedules | None = None,
        link: ParentLink | None = None,
        shows_runs: bool = False,
        **options: Any,
    ) -> None:
        for module in include:
            importlib.import_module(module)
        tasks = list(registry.tasks.values())
        if not tasks:
            raise ValueError("the app has no tasks: declare one with @app.task, or name its module: App(include=[...])")
        if not isinstance(registry.jobs, DaemonJobs):
            raise ValueError("an app with inline=True runs its jobs itself and needs no worker")
        declared = sorted({task.queue for task in tasks} | registry.queues)
        super().__init__(registry.jobs.endpoints, queues=queues or declared, **options)
        self._progress_every_s = _PROGRESS_EVERY_S
        self._shows_runs = shows_runs or self._shows_runs
        self._link = link
        self._schedules = schedules
        self._jobs = registry.jobs
        for task in tasks:
            self._handlers[task.name] = _handler(task)

    async def serve(self, *, signals: bool = False) -> None:
        """Work until `stop`, as a Worker does. Put the schedules of the app first, as soon as the daemon is there."""
        if self._schedules is None or not self._schedules.requests():
            await super().serve(signals=signals)
            return
        putting = asyncio.create_task(self._put_schedules(self._schedules))
        try:
            await super().serve(signals=signals)
        finally:
            putting.cancel()
            await asyncio.wait([putting])
        if not putting.cancelled() and (error := putting.exception()) is not None:
            raise error

    async def _put_schedules(self, schedules: AppSchedules) -> None:
        """Put the schedules, however long the daemon is away. If one is rejected, stop the worker."""
        while True:
            try:
                async with self._jobs.asynchronous_client() as client:
                    await schedules.put(client)
                return
            except Unreachable:
                await asyncio.sleep(_SCHEDULES_EVERY_S)
            except JobdError:
                self.stop()
                raise

    async def _begin(self, loop: HandlerLoop, keeper: LockKeeper) -> Execution:
        execution = await super()._begin(loop, keeper)
        if self._link is not None:
            self._link.began(keeper, execution)
        return execution


class _WorkerRun(RunHere):
    """The run of a task in a worker, for its JobContext."""

    def __init__(self, context: AsyncHandlerContext | HandlerContext) -> None:
        self._context = context

    @property
    def has_to_end(self) -> bool:
        return self._context.cancelled.is_set()

    def report(self, progress: float, message: str | None, checkpoint: Raw | UnsetType) -> None:
        if isinstance(self._context, HandlerContext):
            try:
                self._context.raise_if_lost()
            except LOST as error:
                raise Stopped(error.message) from error
        self._context.report_latest(progress, message, checkpoint)

    def add_output(self, text: str) -> None:
        self._context.add_output(text)

    def set_result(self, **fields: Any) -> None:
        self._context.set_result(**fields)


def _handler(definition: TaskDefinition) -> RegisteredHandler:
    """Return the handler that runs a task. Raises TypeError if an annotation cannot be used."""
    assert definition.codec, "it is made when the worker starts"
    timeout, keep = definition.options.get("timeout"), definition.options.get("keep")
    return RegisteredHandler(
        _async_function(definition) if definition.is_async else _function(definition),
        seconds(timeout),
        definition.is_final,
        None if keep is None else milliseconds("keep", keep),
    )


def _function(definition: TaskDefinition) -> Callable[[HandlerContext], dict[str, Any]]:
    def run(context: HandlerContext) -> dict[str, Any]:
        return {"metadata": definition.run(_job_context(context), _payload(context))}

    return run


def _async_function(definition: TaskDefinition) -> Callable[[AsyncHandlerContext], Any]:
    async def run(context: AsyncHandlerContext) -> dict[str, Any]:
        return {"metadata": await definition.arun(_job_context(context), _payload(context))}

    return run


def _job_context(context: AsyncHandlerContext | HandlerContext) -> JobContext:
    return context_of(context.job, context.fencing_token, _WorkerRun(context))


def _payload(context: BaseHandlerContext) -> bytes:
    return b"null" if context.job.payload is UNSET else bytes(context.job.payload)
