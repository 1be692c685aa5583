"""The tasks of an app, and one run of a task."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Raw

from jobd.client.api_request import uuid7
from jobd.client.app.job_context import JobContext, RunHere, entered, running_job
from jobd.client.app.job_port import JobPort, NewJob
from jobd.client.app.options import TaskOptions
from jobd.client.app.payload_codec import PayloadCodec, check_signature
from jobd.client.outcomes import Discard, Retry

Middleware = Callable[[JobContext], Iterator[None]] | Callable[[JobContext], AsyncIterator[None]]


class TaskRegistry:
    """The tasks of an app and what surrounds their runs."""

    def __init__(self, jobs: JobPort, tasks: dict[str, TaskDefinition]) -> None:
        self.jobs: Final = jobs
        self.tasks: Final = tasks
        self.queues: set[str] = set()  # from which a worker claims, beside those of the tasks
        self.middleware: Final[list[Callable[[JobContext], contextlib.AbstractContextManager[None]]]] = []
        self.async_middleware: Final[list[Callable[[JobContext], contextlib.AbstractAsyncContextManager[None]]]] = []
        self.on_enqueue: Final[list[Callable[[NewJob], None]]] = []

    def define(self, function: Callable[..., Any], options: TaskOptions) -> TaskDefinition:
        """Add a task. Raises TypeError if `function` cannot be one, or if its name is taken."""
        name = str(options.get("name") or getattr(function, "__name__", ""))
        check_signature(function, name)
        if "<" in name:
            raise TypeError(f'task {name!r} needs a name that does not change: app.task(name="...")')
        if name in self.tasks:
            other = self.tasks[name].function
            raise TypeError(
                f"two tasks have the name {name!r}: {_place(other)} and {_place(function)}. "
                'Give one of them another: @app.task(name="...")'
            )
        definition = self.tasks[name] = TaskDefinition(self, function, name, options)
        return definition

    def add_middleware(self, function: Callable[..., Any]) -> None:
        """Run a generator around each run of a task. Raises TypeError if it is none."""
        if inspect.isasyncgenfunction(function):
            self.async_middleware.append(contextlib.asynccontextmanager(function))
        elif inspect.isgeneratorfunction(function):
            self.middleware.append(contextlib.contextmanager(function))
        else:
            raise TypeError(f"middleware {_place(function)} is no generator: it has to yield once, where the task runs")


class TaskDefinition:
    """The function of a task and its options."""

    def __init__(self, registry: TaskRegistry, function: Callable[..., Any], name: str, options: TaskOptions) -> None:
        self.registry: Final = registry
        self.function: Final = function
        self.name: Final = name
        self.options: Final = options
        self.queue: Final = options.get("queue", "default")
        self.is_async: Final = inspect.iscoroutinefunction(function)

    @functools.cached_property
    def codec(self) -> PayloadCodec:
        """The codec, made when all annotations are defined. Raises TypeError if one cannot be used."""
        return PayloadCodec(self.function, self.name)

    def is_final(self, error: BaseException) -> bool:
        """Return whether there is no other attempt after `error`."""
        if isinstance(error, (Discard, *self.options.get("discard_on", ()))):
            return True
        is_chosen = isinstance(error, (Retry, *self.options.get("retry_on", (Exception,))))
        return isinstance(error, Exception) and not is_chosen

    def called(self) -> AbstractContextManager[None]:
        """Return the context of a call of the function: the job that runs here, or one for this call."""
        if running_job() is not None:
            return contextlib.nullcontext()
        now = datetime.now(UTC)
        return entered(
            JobContext(
                RunHere(),
                id=uuid7(),
                queue=self.queue,
                kind=self.name,
                attempt=1,
                max_attempts=1,
                created_at=now,
                is_call=True,
            )
        )

    def run(self, context: JobContext, payload: bytes | Raw) -> Raw:
        """Run a plain task here, and return the encoded result. Raises PayloadMismatch, or the error of the task."""
        value = None
        with entered(context), contextlib.ExitStack() as stack:
            arguments = self.codec.decode(payload, context.stored.changed)
            for each in self.registry.middleware:
                stack.enter_context(each(context))
            try:
                value = self.function(**arguments)
            except Retry as retry:
                self._keep_changed(retry, context, payload)
                raise
        return self.codec.encode_result(value)

    async def arun(self, context: JobContext, payload: bytes | Raw) -> Raw:
        """Run an async task here, as `run` does."""
        value = None
        with entered(context):
            arguments = self.codec.decode(payload, context.stored.changed)
            async with contextlib.AsyncExitStack() as stack:
                for each in self.registry.middleware:
                    stack.enter_context(each(context))
                for each_async in self.registry.async_middleware:
                    await stack.enter_async_context(each_async(context))
                try:
                    value = await self.function(**arguments)
                except Retry as retry:
                    self._keep_changed(retry, context, payload)
                    raise
        return self.codec.encode_result(value)

    def _keep_changed(self, retry: Retry, context: JobContext, payload: bytes | Raw) -> None:
        """Put the arguments that `retry` changes into the checkpoint."""
        if retry.changed:
            context.stored.changed |= self.codec.encode_changed(retry.changed, payload)
            retry.checkpoint = context.stored.body

    def __reduce__(self) -> Any:
        place = self.function.__module__, self.function.__qualname__
        try:
            is_found = _find(*place) is self
        except (ImportError, AttributeError):
            is_found = False
        if not is_found:
            raise pickle.PicklingError(
                f"task {self.name!r} is not a global of its module, so handles of its jobs cannot be pickled: "
                "keep the id of the job, and use the `job` method of the task"
            )
        return _find, place


def _find(module: str, name: str) -> Any:
    """Return the definition of the task at this place."""
    return functools.reduce(getattr, name.split("."), importlib.import_module(module)).definition


def _place(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
