"""A worker in Python: a handler for each kind of job, N at a time, locks kept by themselves.

Handlers run on the caller's event loop or in threads. All calls to the daemon are made in a service thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Final, NamedTuple, TypeVar, overload

import msgspec

from jobd.client.aio import AsyncJobClient
from jobd.client.endpoint import Endpoint
from jobd.client.protocol import JobInfo
from jobd.client.worker.aio_utils import first_of, within
from jobd.client.worker.claimer import LOCK_TTL_MS, ClaimOptions, default_name, describe_process
from jobd.client.worker.error_text import describe_error, fitted, safe_text
from jobd.client.worker.lease import LeaseKeeper
from jobd.client.worker.runner import STOP_S, Execution, WorkerRunner, on_signals, seconds
from jobd.client.worker.service_thread import Say, ServiceThread, call_on

STREAM_FROM: Final = 8  # jobs at a time, from which on they are reported and ended over one stream of commands
LAG_S: Final = 5.0  # an event loop that is blocked for longer is reported
LOOK_S: Final = 1.0  # between two measurements
RESULT_FIELDS: Final = frozenset({"download_url", "file_path", "storage_key", "metadata"})

log = logging.getLogger("jobd.client")

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Retry(Exception):
    """Raised by a handler: this attempt failed, try again after `after_ms` (the job's backoff by default).

    Raises TypeError if `after_ms` is no whole number.
    """

    def __init__(self, message: str = "The handler asked for a retry.", *, after_ms: int | None = None) -> None:
        if not isinstance(after_ms, int | None):
            raise TypeError(f"after_ms is a whole number of milliseconds, got {type(after_ms).__name__}")
        super().__init__(message)
        self.after_ms = after_ms


class Discard(Exception):
    """Raised by a handler: the job failed for good, whatever attempts are left."""

    def __init__(self, message: str = "The handler discarded the job.") -> None:
        super().__init__(message)


class Stopped(Exception):
    """Raised inside a plain handler that has to return: the worker is stopping, or the timeout has passed."""


class _Task:
    """What both kinds of handler get: the job, and where its result goes."""

    def __init__(self, keeper: LeaseKeeper) -> None:
        self._keeper = keeper
        self._service = asyncio.get_running_loop()
        self.job: Final[JobInfo] = keeper.grant.job
        self.fencing_token: Final = keeper.grant.fencing_token
        self.result: Final[dict[str, Any]] = {}

    @functools.cached_property
    def payload(self) -> Any:
        """The job's payload as Python values. Raises msgspec.DecodeError where Python cannot hold it (1e999)."""
        return self.job.payload_value

    def set_result(
        self,
        *,
        download_url: str | None = None,
        file_path: str | None = None,
        storage_key: str | None = None,
        metadata: Any = None,
    ) -> None:
        """What the job will have made when it completes. What was set before and is not named here stays."""
        named = {
            "download_url": download_url,
            "file_path": file_path,
            "storage_key": storage_key,
            "metadata": metadata,
        }
        self.result.update({name: value for name, value in named.items() if value is not None})

    def raise_if_lost(self) -> None:
        """Raise LockLost (or MaxProcessingTimeExceeded) where the job is no longer ours."""
        if self._keeper.lost.done():
            raise self._keeper.lost.result()

    def _report(self, progress: float, message: str | None) -> Future[None]:
        """Let the keeper report progress in its own thread."""
        told: Future[None] = Future()

        def report() -> None:
            self._keeper.report(progress, message).add_done_callback(functools.partial(_copy, told))

        try:
            self._service.call_soon_threadsafe(report)
        except RuntimeError:
            raise Stopped("The worker has stopped.") from None
        return told


def _copy(told: Future[None], reported: asyncio.Future[None]) -> None:
    if not told.set_running_or_notify_cancel():
        return
    if (error := reported.exception()) is None:
        told.set_result(None)
    else:
        told.set_exception(error)


class Task(_Task):
    """One job, given to an async handler.

    `payload` is decoded, `fencing_token` goes to resources that check it. When the job is lost or cancelled the
    handler is cancelled (CancelledError); `cancelled` is set too.
    """

    def __init__(self, keeper: LeaseKeeper) -> None:
        super().__init__(keeper)
        self.cancelled: Final = asyncio.Event()

    async def progress(self, progress: float, message: str | None = None) -> None:
        """Report progress (0 to 100), which renews the lock. Returns at once while the daemon is unreachable.

        Raises LockLost, MaxProcessingTimeExceeded, InvalidRequest.
        """
        await asyncio.wrap_future(self._report(progress, message))


class SyncTask(_Task):
    """One job, given to a plain handler in a thread of its own.

    As Task, but nothing can cancel a thread: report progress, look at `cancelled` (a threading.Event) or call
    `raise_if_lost` often, and return soon if the job is lost, the worker is stopping, or the timeout has passed.
    """

    def __init__(self, keeper: LeaseKeeper) -> None:
        super().__init__(keeper)
        self.cancelled: Final = threading.Event()

    def progress(self, progress: float, message: str | None = None) -> None:
        """Report progress (0 to 100), which renews the lock. Returns at once while the daemon is unreachable.

        Raises LockLost, MaxProcessingTimeExceeded, InvalidRequest, and Stopped if the handler has to return.
        """
        self.raise_if_lost()
        self._report(progress, message).result()

    def raise_if_lost(self) -> None:
        """Raise LockLost (or MaxProcessingTimeExceeded) where the job is no longer ours, Stopped where we must stop."""
        super().raise_if_lost()
        if self.cancelled.is_set():
            raise Stopped("The handler has to return: the worker is stopping, or the timeout has passed.")


class Worker:
    """Claims jobs and runs a handler for each, `concurrency` at a time.

        worker = Worker(queues=["video"], concurrency=4)

        @worker.handler("transcode")
        async def transcode(task):
            await task.progress(10, "probing")
            return {"file_path": "/videos/1.mp4"}

        worker.run()

    Async handlers run on the event loop, plain ones in threads. What a handler returns is the job's result: a dict with
    download_url, file_path, storage_key or metadata (its other keys are metadata too), any other value is metadata. An
    exception fails the job with its class as `error_code`; the `error_message` is `Type: message`, then the traceback.
    Retry and Discard say what happens next. Locks live
    `lock_ttl_ms` and are extended by themselves; a handler whose job was lost or cancelled is stopped. SIGTERM and
    SIGINT drain: no more claims, the running handlers get `grace_s` seconds, then they are stopped and their jobs
    released. What goes on is logged to `jobd.client`.

    A service thread with its own event loop and connections claims jobs and extends locks, so a handler that blocks its
    loop loses no lock. A loop that is blocked for 5 s is logged. An extension that holds the GIL for longer than a lock
    lives stops every thread, and the lock is lost.

    `timeout` (a timedelta, or seconds) limits a whole run; a handler may have its own. When it has passed, an async
    handler is cancelled. A plain one finds `cancelled` set, and `progress` raises Stopped. Both have 10 s to end. Then
    the attempt fails with `error_code` "timeout", whatever the handler returns. A thread cannot be killed: a plain
    handler that continues may run beside the job's next attempt. Its result is dropped, and it counts against
    `concurrency` until it returns. Locks have no ceiling unless `max_processing_ms` sets one.
    """

    def __init__(
        self,
        client: AsyncJobClient | Endpoint | str | None = None,
        *,
        queues: Sequence[str] = ("default",),
        concurrency: int = 1,
        name: str | None = None,
        lock_ttl_ms: int = LOCK_TTL_MS,
        max_processing_ms: int = 0,
        timeout: timedelta | float | None = None,
        grace_s: float = 30.0,
    ) -> None:
        if concurrency < 1:
            raise ValueError("concurrency must be at least 1")
        self.name: Final = name or default_name()
        self._client = client
        self._queues = [queues] if isinstance(queues, str) else list(queues)
        self._concurrency = concurrency
        self._lock_ttl_ms = lock_ttl_ms
        self._max_processing_ms = max_processing_ms
        self._timeout_s = seconds(timeout)
        self._grace_s = grace_s
        self._handlers: dict[str | None, _Handler] = {}
        self._stop: Callable[[], None] | None = None

    @overload
    def handler(self, function: Handler, /) -> Handler: ...

    @overload
    def handler(self, *kinds: str, timeout: timedelta | float | None = None) -> Callable[[Handler], Handler]: ...

    def handler(self, *kinds: Any, timeout: timedelta | float | None = None) -> Any:
        """Register a function for jobs of these kinds, or, without a kind, for every kind without its own handler.

        `@worker.handler` means `@worker.handler()`. Raises TypeError for anything but names and one function, and for a
        function that cannot be called with a task; ValueError if a kind has a handler already. `timeout` takes
        precedence over that of the worker.
        """
        timeout_s = seconds(timeout)
        if len(kinds) == 1 and callable(kinds[0]):
            return self._register((), timeout_s, kinds[0])
        for kind in kinds:
            if not isinstance(kind, str):
                raise TypeError(f'{kind!r} is not a kind; write @worker.handler or @worker.handler("kind", ...)')
        return functools.partial(self._register, kinds, timeout_s)

    def _register(self, kinds: tuple[str, ...], timeout_s: float | None, function: Handler) -> Handler:
        if not callable(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function!r} cannot be a handler; a handler is a function or an async function of a task")
        with contextlib.suppress(ValueError):  # some built-in callables have no signature
            signature = inspect.signature(function)
            try:
                signature.bind(None)
            except TypeError as error:
                raise TypeError(
                    f"{function!r} cannot be a handler; it must be callable with a task as its only argument: {error}"
                ) from None
        for kind in kinds or (None,):
            if kind in self._handlers:
                raise ValueError(f"there is a handler for {'every other kind' if kind is None else kind} already")
        handler = _Handler(function, timeout_s or self._timeout_s)
        self._handlers.update(dict.fromkeys(kinds or (None,), handler))
        return function

    def run(self) -> None:
        """Work until SIGTERM or SIGINT, then drain. Raises the JobdError that made claiming impossible."""
        asyncio.run(self.serve(signals=True))

    def stop(self) -> None:
        """Drain, as on SIGTERM. A second call ends the grace, a third stops at once. May be called from any thread."""
        if self._stop is not None:
            self._stop()

    async def serve(self, *, signals: bool = False) -> None:
        """Work until `stop`; async handlers run on this event loop. With `signals` SIGTERM and SIGINT drain.

        Cancelling it stops the handlers at once and releases their jobs.
        """
        if not self._handlers:
            raise ValueError("a worker needs a handler: @worker.handler(...)")
        client = self._client.twin() if isinstance(self._client, AsyncJobClient) else self._streaming(self._client)
        service = ServiceThread(f"jobd worker {self.name}")
        say = service.say(log.warning)
        loop = _HandlersLoop(say)
        shift = WorkerRunner(
            client,
            self._wanted(),
            functools.partial(self._begin, loop),
            say,
            concurrency=self._concurrency,
            grace_s=self._grace_s,
        )

        async def work() -> None:
            watching = asyncio.ensure_future(loop.watch())
            try:
                async with client:
                    await shift.run()
            finally:
                watching.cancel()

        self._stop = functools.partial(service.call, shift.stop)
        first = functools.partial(service.call, shift.claim_no_more)
        with on_signals(self._stop, first) if signals else contextlib.nullcontext():
            await service.run(work, shift.abandon)

    def _streaming(self, endpoint: Endpoint | str | None) -> AsyncJobClient:
        client = AsyncJobClient(endpoint)
        return client.stream() if self._concurrency >= STREAM_FROM else client

    def _wanted(self) -> ClaimOptions:
        return ClaimOptions(
            worker=self.name,
            queues=self._queues,
            kinds=None if None in self._handlers else [kind for kind in self._handlers if kind is not None],
            lock_ttl_ms=self._lock_ttl_ms,
            max_processing_ms=self._max_processing_ms,
            about=describe_process(self._concurrency),
        )

    async def _begin(self, loop: _HandlersLoop, keeper: LeaseKeeper) -> Execution:
        kind = keeper.grant.job.kind
        handler = self._handlers[kind if kind in self._handlers else None]
        return (_AsyncExecution if _is_async(handler.function) else _ThreadExecution)(handler, keeper, loop)


class _Handler(NamedTuple):
    function: Callable[[Any], Any]
    timeout_s: float | None


def _is_async(handler: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


class _HandlersLoop:
    """The service thread's access to the event loop and context in which the worker was started."""

    def __init__(self, say: Say) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._say = say
        self._jobs: dict[asyncio.Task[Any], str] = {}

    @property
    def context(self) -> contextvars.Context:
        """A copy of the context, for one handler."""
        return self._context.copy()

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` on the loop soon. Thread-safe."""
        call_on(self._loop, function, context=self.context)

    def begin(self, work: Coroutine[Any, Any, Any], job_id: str) -> asyncio.Task[Any]:
        """Start a task for this job. Called on the loop."""
        task = self._loop.create_task(work, name=f"job {job_id}")
        self._jobs[task] = job_id
        task.add_done_callback(self._jobs.pop)
        return task

    async def watch(self) -> None:
        """Measure, in the service thread, how long the loop is blocked, and how long this thread does not run."""
        here = asyncio.get_running_loop()
        while True:
            asked_s, turned = here.time(), asyncio.Event()
            self.call(functools.partial(call_on, here, turned.set))
            if not await within(LAG_S, turned) and self._jobs:
                jobs = self._running()
                self._say(
                    f"{jobs}: the event loop of the handlers is blocked for {here.time() - asked_s:.1f} s. Locks "
                    "are extended, but other async handlers wait. Use asyncio.to_thread or a plain handler."
                )
                await turned.wait()
                self._say(f"{jobs}: the event loop of the handlers runs again, after {here.time() - asked_s:.1f} s.")
            asked_s = here.time()
            await asyncio.sleep(LOOK_S)
            if (late_s := here.time() - asked_s - LOOK_S) >= LAG_S:
                self._say(
                    f"{self._running()}: no thread ran for {late_s:.1f} s, so no lock was extended. "
                    "Does an extension hold the GIL?"
                )

    def _running(self) -> str:
        """Name the job whose task is running, or all jobs that may be."""
        task = asyncio.current_task(self._loop)
        jobs = [self._jobs[task]] if task in self._jobs else list(self._jobs.values())
        return f"job {', '.join(jobs)}" if jobs else "no async job"


class _HandlerExecution(ABC):
    """A handler at work on one job. Created and queried in the service thread."""

    task: _Task

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s: Final = timeout_s
        self.done: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()
        self._returned: Any = None
        self._raised: BaseException | None = None

    def _ended(self, returned: Any, raised: BaseException | None) -> None:
        """Record the end of the handler. Called in the handler's thread."""
        call_on(self.done.get_loop(), self._end, returned, raised)

    def _end(self, returned: Any, raised: BaseException | None) -> None:
        self._returned, self._raised = returned, raised
        if not self.done.done():
            self.done.set_result(None)

    async def stop(self, at_once: asyncio.Event) -> None:
        """Tell the handler, and give it a while."""
        self.abort()
        patience = asyncio.ensure_future(within(STOP_S, at_once))
        await first_of(self.done, patience)
        patience.cancel()

    @abstractmethod
    def abort(self) -> None:
        """Tell the handler to stop."""

    def describe_timeout(self) -> str:
        return "" if self.done.done() else " The handler was told to stop, but it still runs."

    async def finish(self, keeper: LeaseKeeper, give_up: asyncio.Event) -> bool:
        """Complete the job with what the handler returned, or fail it with what it raised."""
        ending = await asyncio.to_thread(self._ending, keeper.id)  # runs code of the handler's objects, writes the log
        if isinstance(ending, _Failure):
            await keeper.fail(give_up, ending.message, **ending.how)
            return False
        return await keeper.complete(give_up, **ending)

    def _ending(self, job_id: str) -> dict[str, Any] | _Failure:
        error = self._raised
        if error is None:
            try:
                result = _result(self.task.result, self._returned)
                if result.get("metadata") is not None:
                    result = {**result, "metadata": msgspec.Raw(msgspec.json.encode(result["metadata"]))}
                msgspec.json.encode(result)
            except (TypeError, ValueError, RecursionError) as unfit:
                error = unfit
            else:
                return result
        if isinstance(error, Retry | Discard):  # the handler's own word: nothing to be traced
            log.info("job %s: %s: %s", job_id, type(error).__name__, safe_text(error))
        else:
            log.warning("job %s failed", job_id, exc_info=error)
        return _Failure(_described(error), _how(error))


class _Failure(NamedTuple):
    message: str
    how: dict[str, Any]


class _AsyncExecution(_HandlerExecution):
    """An async handler."""

    def __init__(self, handler: _Handler, keeper: LeaseKeeper, loop: _HandlersLoop) -> None:
        super().__init__(handler.timeout_s)
        self.task: Task = Task(keeper)
        self._loop = loop
        self._running: asyncio.Task[Any] | None = None
        loop.call(functools.partial(self._begin, handler.function))

    def _begin(self, function: Callable[[Task], Any]) -> None:
        self._running = self._loop.begin(self._run(function), self.task.job.id)
        self._running.add_done_callback(self._tell)

    async def _run(self, function: Callable[[Task], Any]) -> tuple[Any, BaseException | None]:
        try:
            return await function(self.task), None
        except BaseException as error:  # SystemExit too: it ends the job, not the worker
            return None, error

    def _tell(self, running: asyncio.Task[Any]) -> None:
        self._ended(*((None, asyncio.CancelledError()) if running.cancelled() else running.result()))

    def abort(self) -> None:
        self._loop.call(self._cancel)

    def _cancel(self) -> None:
        self.task.cancelled.set()
        assert self._running is not None, "it was begun by an earlier call"
        # After calls that are already scheduled, so that the handler gets LockLost from `progress`, not a cancellation.
        asyncio.get_running_loop().call_soon(self._running.cancel)


class _ThreadExecution(_HandlerExecution):
    """A plain handler, in a thread that does not keep the process alive."""

    def __init__(self, handler: _Handler, keeper: LeaseKeeper, loop: _HandlersLoop) -> None:
        super().__init__(handler.timeout_s)
        self.task: SyncTask = SyncTask(keeper)
        run = functools.partial(loop.context.run, self._run, handler.function)
        threading.Thread(target=run, name=f"job {keeper.id}", daemon=True).start()

    def _run(self, function: Callable[[SyncTask], Any]) -> None:
        returned, raised = None, None
        try:
            returned = function(self.task)
        except BaseException as error:
            raised = error
        self._ended(returned, raised)

    def abort(self) -> None:
        self.task.cancelled.set()


def _result(given: dict[str, Any], returned: Any) -> dict[str, Any]:
    """The fields of `complete`: what was set on the task, and over it what the handler returned."""
    if returned is None:
        return given
    if not isinstance(returned, dict):
        return {**given, "metadata": returned}
    result = {**given, **{name: returned[name] for name in RESULT_FIELDS & returned.keys()}}
    rest = {name: value for name, value in returned.items() if name not in RESULT_FIELDS}
    if not rest:
        return result
    metadata = result.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError("a result with other keys than the result fields needs a dict as its metadata")
    return {**result, "metadata": {**(metadata or {}), **rest}}


def _described(error: BaseException) -> str:
    """Describe a failed job: the message that the handler gave, or its error with the traceback."""
    if isinstance(error, Retry | Discard):
        first, _, rest = (safe_text(error) or type(error).__name__).partition("\n")
        return fitted(first, rest)
    return describe_error(error)


def _how(error: BaseException) -> dict[str, Any]:
    """The rest of `fail`: the class of the error, and whether and when to try again."""
    how: dict[str, Any] = {"error_code": type(error).__name__[:200]}
    if isinstance(error, Retry):
        how["retry_after_ms"] = error.after_ms
    if isinstance(error, Discard):
        how["retry"] = False
    return how
