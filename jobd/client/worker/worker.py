"""A worker in Python: a handler for each kind of job, N at a time, with locks that are extended automatically.

Handlers run on the caller's event loop or in threads. A service thread makes all calls to the daemon.
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
from jobd.client.worker.service_thread import Log, ServiceThread, call_on

STREAM_FROM: Final = 8  # the concurrency from which on calls share one stream of commands
LAG_S: Final = 5.0  # an event loop that is blocked for longer is logged
MEASURE_S: Final = 1.0  # between two measurements of the lag
RESULT_FIELDS: Final = frozenset({"download_url", "file_path", "storage_key", "metadata"})

logger = logging.getLogger("jobd.client")

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Retry(Exception):
    """Raised by a handler to fail this attempt and retry after `after_ms` (by default the job's backoff).

    Raises TypeError if `after_ms` is not a whole number.
    """

    def __init__(self, message: str = "The handler asked for a retry.", *, after_ms: int | None = None) -> None:
        if not isinstance(after_ms, int | None):
            raise TypeError(f"after_ms is a whole number of milliseconds, got {type(after_ms).__name__}")
        super().__init__(message)
        self.after_ms = after_ms


class Discard(Exception):
    """Raised by a handler to fail the job without further attempts."""

    def __init__(self, message: str = "The handler discarded the job.") -> None:
        super().__init__(message)


class Stopped(Exception):
    """Raised in a plain handler that has to return, because the worker stops or the timeout has passed."""


class _Task:
    """The job and its result, for both kinds of handler."""

    def __init__(self, keeper: LeaseKeeper) -> None:
        self._keeper = keeper
        self._service = asyncio.get_running_loop()
        self.job: Final[JobInfo] = keeper.grant.job
        self.fencing_token: Final = keeper.grant.fencing_token
        self.result: Final[dict[str, Any]] = {}

    @functools.cached_property
    def payload(self) -> Any:
        """The payload as Python values. Raises msgspec.DecodeError for a value that Python cannot hold (1e999)."""
        return self.job.payload_value

    def set_result(
        self,
        *,
        download_url: str | None = None,
        file_path: str | None = None,
        storage_key: str | None = None,
        metadata: Any = None,
    ) -> None:
        """Set fields of the result with which the job completes. Fields that are not given stay unchanged."""
        named = {
            "download_url": download_url,
            "file_path": file_path,
            "storage_key": storage_key,
            "metadata": metadata,
        }
        self.result.update({name: value for name, value in named.items() if value is not None})

    def raise_if_lost(self) -> None:
        """Raise LockLost (or MaxProcessingTimeExceeded) if the lock is lost."""
        if self._keeper.lost.done():
            raise self._keeper.lost.result()

    def _report(self, progress: float, message: str | None) -> Future[None]:
        """Report progress in the service thread."""
        reported: Future[None] = Future()

        def report() -> None:
            self._keeper.report(progress, message).add_done_callback(functools.partial(_copy, reported))

        try:
            self._service.call_soon_threadsafe(report)
        except RuntimeError:
            raise Stopped("The worker has stopped.") from None
        return reported


def _copy(target: Future[None], source: asyncio.Future[None]) -> None:
    if not target.set_running_or_notify_cancel():
        return
    if (error := source.exception()) is None:
        target.set_result(None)
    else:
        target.set_exception(error)


class Task(_Task):
    """The job of an async handler.

    `payload` is decoded; pass `fencing_token` to resources that check it. If the lock is lost or the job is cancelled,
    the handler is cancelled (CancelledError), and `cancelled` is set.
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
    """The job of a plain handler, which has its own thread.

    Like Task, but a thread cannot be cancelled: report progress, check `cancelled` (a threading.Event) or call
    `raise_if_lost` often, and return soon if the lock is lost, the worker stops, or the timeout has passed.
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
        """Raise LockLost (or MaxProcessingTimeExceeded) if the lock is lost, Stopped if the handler has to return."""
        super().raise_if_lost()
        if self.cancelled.is_set():
            raise Stopped("The handler has to return: the worker is stopping, or the timeout has passed.")


class Worker:
    """Claim jobs and run a handler for each, `concurrency` at a time.

        worker = Worker(queues=["video"], concurrency=4)

        @worker.handler("transcode")
        async def transcode(task):
            await task.progress(10, "probing")
            return {"file_path": "/videos/1.mp4"}

        worker.run()

    Async handlers run on the event loop, plain ones in threads. The return value is the job's result: a dict with
    download_url, file_path, storage_key or metadata (other keys are metadata too); any other value is metadata. An
    exception fails the job with its class as `error_code`; the `error_message` is `Type: message`, then the traceback.
    Retry and Discard decide whether there is another attempt. Locks live `lock_ttl_ms` and are extended automatically.
    If a lock is lost or a job is cancelled, its handler is stopped. SIGTERM and SIGINT drain: the worker stops
    claiming, running handlers get `grace_s` seconds, then they are stopped and their jobs released. The worker logs to
    `jobd.client`.

    A service thread with its own event loop and connections claims jobs and extends locks, so a handler that blocks its
    loop does not lose its lock. A loop that is blocked for 5 s is logged. A C extension that holds the GIL for longer
    than a lock lives stops every thread, and the lock is lost.

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
        self._handlers: dict[str | None, _RegisteredHandler] = {}
        self._stop: Callable[[], None] | None = None

    @overload
    def handler(self, function: Handler, /) -> Handler: ...

    @overload
    def handler(self, *kinds: str, timeout: timedelta | float | None = None) -> Callable[[Handler], Handler]: ...

    def handler(self, *kinds: Any, timeout: timedelta | float | None = None) -> Any:
        """Register a function for jobs of these kinds, or, without a kind, for every kind without its own handler.

        `@worker.handler` means `@worker.handler()`. Raises TypeError for anything but names and one function, and for a
        function that cannot be called with a task; ValueError if a kind already has a handler. `timeout` takes
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
                raise ValueError(f"{'every other kind' if kind is None else kind} already has a handler")
        handler = _RegisteredHandler(function, timeout_s or self._timeout_s)
        self._handlers.update(dict.fromkeys(kinds or (None,), handler))
        return function

    def run(self) -> None:
        """Work until SIGTERM or SIGINT, then drain. Raises the JobdError that made claiming impossible."""
        asyncio.run(self.serve(signals=True))

    def stop(self) -> None:
        """Drain, as on SIGTERM. A second call ends the grace, a third stops at once. Thread-safe."""
        if self._stop is not None:
            self._stop()

    async def serve(self, *, signals: bool = False) -> None:
        """Work until `stop`. Async handlers run on this event loop. With `signals`, SIGTERM and SIGINT drain.

        Cancellation stops the handlers at once and releases their jobs.
        """
        if not self._handlers:
            raise ValueError("a worker needs a handler: @worker.handler(...)")
        client = self._client.twin() if isinstance(self._client, AsyncJobClient) else self._streaming(self._client)
        service = ServiceThread(f"jobd worker {self.name}")
        log = service.background(logger.warning)
        loop = _HandlerLoop(log)
        runner = WorkerRunner(
            client,
            self._claim_options(),
            functools.partial(self._begin, loop),
            log,
            concurrency=self._concurrency,
            grace_s=self._grace_s,
        )

        async def work() -> None:
            watching = asyncio.ensure_future(loop.watch())
            try:
                async with client:
                    await runner.run()
            finally:
                watching.cancel()

        self._stop = functools.partial(service.call, runner.stop)
        first = functools.partial(service.call, runner.stop_claiming)
        with on_signals(self._stop, first) if signals else contextlib.nullcontext():
            await service.run(work, runner.abandon)

    def _streaming(self, endpoint: Endpoint | str | None) -> AsyncJobClient:
        client = AsyncJobClient(endpoint)
        return client.stream() if self._concurrency >= STREAM_FROM else client

    def _claim_options(self) -> ClaimOptions:
        return ClaimOptions(
            worker=self.name,
            queues=self._queues,
            kinds=None if None in self._handlers else [kind for kind in self._handlers if kind is not None],
            lock_ttl_ms=self._lock_ttl_ms,
            max_processing_ms=self._max_processing_ms,
            about=describe_process(self._concurrency),
        )

    async def _begin(self, loop: _HandlerLoop, keeper: LeaseKeeper) -> Execution:
        kind = keeper.grant.job.kind
        handler = self._handlers[kind if kind in self._handlers else None]
        return (_AsyncExecution if _is_async(handler.function) else _ThreadExecution)(handler, keeper, loop)


class _RegisteredHandler(NamedTuple):
    function: Callable[[Any], Any]
    timeout_s: float | None


def _is_async(handler: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


class _HandlerLoop:
    """The service thread's access to the event loop and context in which the worker was started."""

    def __init__(self, log: Log) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._log = log
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
        """Measure, in the service thread, how long the loop is blocked and how long this thread does not run."""
        here = asyncio.get_running_loop()
        while True:
            called_s, ran = here.time(), asyncio.Event()
            self.call(functools.partial(call_on, here, ran.set))
            if not await within(LAG_S, ran) and self._jobs:
                jobs = self._running()
                self._log(
                    f"{jobs}: the event loop of the handlers is blocked for {here.time() - called_s:.1f} s. Locks "
                    "are extended, but other async handlers wait. Use asyncio.to_thread or a plain handler."
                )
                await ran.wait()
                self._log(f"{jobs}: the event loop of the handlers runs again, after {here.time() - called_s:.1f} s.")
            called_s = here.time()
            await asyncio.sleep(MEASURE_S)
            if (late_s := here.time() - called_s - MEASURE_S) >= LAG_S:
                self._log(
                    f"{self._running()}: no thread ran for {late_s:.1f} s, so no lock was extended. "
                    "Does an extension hold the GIL?"
                )

    def _running(self) -> str:
        """Name the job whose task is running now, or all jobs that may be."""
        task = asyncio.current_task(self._loop)
        jobs = [self._jobs[task]] if task in self._jobs else list(self._jobs.values())
        return f"job {', '.join(jobs)}" if jobs else "no async job"


class _HandlerExecution(ABC):
    """The run of a handler for one job. Created and read in the service thread."""

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
        """Tell the handler to stop, and wait up to STOP_S for its end."""
        self.abort()
        timeout = asyncio.ensure_future(within(STOP_S, at_once))
        await first_of(self.done, timeout)
        timeout.cancel()

    @abstractmethod
    def abort(self) -> None:
        """Tell the handler to stop."""

    def describe_timeout(self) -> str:
        return "" if self.done.done() else " The handler was told to stop, but it still runs."

    async def finish(self, keeper: LeaseKeeper, give_up: asyncio.Event) -> bool:
        """Complete the job with the return value of the handler, or fail it with the exception."""
        ending = await asyncio.to_thread(self._ending, keeper.id)  # runs code of the handler's objects, writes the log
        if isinstance(ending, _Failure):
            await keeper.fail(give_up, ending.message, **ending.options)
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
            except (TypeError, ValueError, RecursionError) as not_json:
                error = not_json
            else:
                return result
        if isinstance(error, Retry | Discard):  # raised on purpose: no traceback
            logger.info("job %s: %s: %s", job_id, type(error).__name__, safe_text(error))
        else:
            logger.warning("job %s failed", job_id, exc_info=error)
        return _Failure(_message(error), _failure_options(error))


class _Failure(NamedTuple):
    message: str
    options: dict[str, Any]


class _AsyncExecution(_HandlerExecution):
    """An async handler."""

    def __init__(self, handler: _RegisteredHandler, keeper: LeaseKeeper, loop: _HandlerLoop) -> None:
        super().__init__(handler.timeout_s)
        self.task: Task = Task(keeper)
        self._loop = loop
        self._running: asyncio.Task[Any] | None = None
        loop.call(functools.partial(self._begin, handler.function))

    def _begin(self, function: Callable[[Task], Any]) -> None:
        self._running = self._loop.begin(self._run(function), self.task.job.id)
        self._running.add_done_callback(self._on_done)

    async def _run(self, function: Callable[[Task], Any]) -> tuple[Any, BaseException | None]:
        try:
            return await function(self.task), None
        except BaseException as error:  # SystemExit too: it ends the job, not the worker
            return None, error

    def _on_done(self, running: asyncio.Task[Any]) -> None:
        self._ended(*((None, asyncio.CancelledError()) if running.cancelled() else running.result()))

    def abort(self) -> None:
        self._loop.call(self._cancel)

    def _cancel(self) -> None:
        self.task.cancelled.set()
        assert self._running is not None, "it was begun by an earlier call"
        # After calls that are already scheduled, so that the handler gets LockLost from `progress`, not a cancellation.
        asyncio.get_running_loop().call_soon(self._running.cancel)


class _ThreadExecution(_HandlerExecution):
    """A plain handler in a daemon thread."""

    def __init__(self, handler: _RegisteredHandler, keeper: LeaseKeeper, loop: _HandlerLoop) -> None:
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


def _result(set_: dict[str, Any], returned: Any) -> dict[str, Any]:
    """Merge what was set on the task with the return value of the handler, which takes precedence."""
    if returned is None:
        return set_
    if not isinstance(returned, dict):
        return {**set_, "metadata": returned}
    result = {**set_, **{name: returned[name] for name in RESULT_FIELDS & returned.keys()}}
    rest = {name: value for name, value in returned.items() if name not in RESULT_FIELDS}
    if not rest:
        return result
    metadata = result.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError("a result with other keys than the result fields needs a dict as its metadata")
    return {**result, "metadata": {**(metadata or {}), **rest}}


def _message(error: BaseException) -> str:
    """Return the `error_message`: of Retry and Discard their text, else the error with its traceback."""
    if isinstance(error, Retry | Discard):
        first, _, rest = (safe_text(error) or type(error).__name__).partition("\n")
        return fitted(first, rest)
    return describe_error(error)


def _failure_options(error: BaseException) -> dict[str, Any]:
    """Return the other options of `fail`: the class of the error, and whether and when to retry."""
    options: dict[str, Any] = {"error_code": type(error).__name__[:200]}
    if isinstance(error, Retry):
        options["retry_after_ms"] = error.after_ms
    if isinstance(error, Discard):
        options["retry"] = False
    return options
