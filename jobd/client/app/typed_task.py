"""Tasks and calls, with the types of their function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, Generic, ParamSpec, Protocol, Self, TypeVar, Unpack, cast, overload

from msgspec import Raw

from jobd.client.api_request import uuid7
from jobd.client.app.job_context import running_job
from jobd.client.app.job_handle import JobHandle
from jobd.client.app.job_port import NewJob
from jobd.client.app.options import JobOptions, check_options, request_fields
from jobd.client.app.task_registry import TaskDefinition

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Call(Generic[R_co]):
    """A job that is not created yet. Its id is known already."""

    def __init__(self, definition: TaskDefinition, options: JobOptions, payload: Raw) -> None:
        context, id = running_job(), options.get("id")
        self._is_derived = context is not None and id is None
        if context is not None and id is None:
            id = context.child_id(definition.name, bytes(payload))
        self.id: Final = id or uuid7()
        self.definition: Final = definition
        self._options = options
        self._payload = payload

    def enqueue(self) -> JobHandle[R_co]:
        """Create the job."""
        self.definition.registry.jobs.create(new_jobs([self]))
        return self.handle

    async def aenqueue(self) -> JobHandle[R_co]:
        await self.definition.registry.jobs.acreate(new_jobs([self]))
        return self.handle

    @property
    def handle(self) -> JobHandle[R_co]:
        """The handle of the job, once it is created."""
        return JobHandle(self.definition, self.id)

    def new_job(self) -> NewJob:
        """Return what is sent."""
        options = request_fields(self.definition.options, self._options)
        queue = options.pop("queue", "default")
        headers = dict(self._options.get("headers") or {})
        return NewJob(self.id, self.definition.name, queue, headers, self._payload, options, self._is_derived)


def new_jobs(calls: Iterable[Call[Any]]) -> Sequence[NewJob]:
    """Return what is sent for `calls`, after the functions of `on_enqueue` have seen it."""
    jobs = []
    for call in calls:
        job = call.new_job()
        for function in call.definition.registry.on_enqueue:
            function(job)
        jobs.append(job)
    return jobs


class TaskBase(Generic[P, R]):
    """What both kinds of task have."""

    def __init__(self, definition: TaskDefinition, options: JobOptions) -> None:
        functools.update_wrapper(cast(Any, self), definition.function, updated=())
        self.definition: Final = definition
        self.name: Final = definition.name
        self.queue: Final = options.get("queue") or definition.queue
        self._options = options

    def using(self, **options: Unpack[JobOptions]) -> Self:
        """Return this task with other options for the jobs that it creates."""
        check_options(options, JobOptions, f"task {self.name!r}: using")
        return type(self)(self.definition, {**self._options, **options})

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Create a job. Raises TypeError if the arguments do not fit, and the errors of JobClient."""
        return self.call(*args, **kwargs).enqueue()

    async def aenqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        return await self.call(*args, **kwargs).aenqueue()

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Return a job that is not created yet, for `enqueue_many`. Raises TypeError if the arguments do not fit."""
        return Call(self.definition, self._options, self.definition.codec.encode(args, kwargs))

    def job(self, id: str) -> JobHandle[R]:
        """Return the handle of a job whose id you stored. Asks nothing."""
        return JobHandle(self.definition, id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class Task(TaskBase[P, R]):
    """A task made of a plain function, which a worker runs in a thread. Calling it runs the function here."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.definition.called():
            result: R = self.definition.function(*args, **kwargs)
        return result


class AsyncTask(TaskBase[P, R]):
    """A task made of an async function. Calling it runs the function here."""

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.definition.called():
            result: R = await self.definition.function(*args, **kwargs)
        return result


class TaskDecorator(Protocol):
    """What `app.task(...)` returns."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...
