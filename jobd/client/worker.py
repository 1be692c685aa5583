"""A worker in Python: a handler for each kind of job, N at a time, locks kept by themselves.

Speaks to the daemon only through shift.py and keeper.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, overload

import msgspec

from jobd.client.aio import AsyncJobClient
from jobd.client.claims import LOCK_TTL_MS, Wanted, default_name
from jobd.client.endpoint import Endpoint
from jobd.client.keeper import Keeper
from jobd.client.protocol import JobInfo
from jobd.client.shift import STOP_S, Effort, Shift, on_signals
from jobd.client.waiting import first_of, within

TRACE_LINES: Final = 20
MESSAGE_CHARACTERS: Final = 4096
STREAM_FROM: Final = 8  # jobs at a time, from which on they are reported and ended over one stream of commands
RESULT_FIELDS: Final = frozenset({"download_url", "file_path", "storage_key", "metadata"})

log = logging.getLogger("jobd.client")

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Retry(Exception):
    """Raised by a handler: this attempt failed, try again after `after_ms` (the job's backoff by default)."""

    def __init__(self, message: str = "The handler asked for a retry.", *, after_ms: int | None = None) -> None:
        super().__init__(message)
        self.after_ms = after_ms


class Discard(Exception):
    """Raised by a handler: the job failed for good, whatever attempts are left."""

    def __init__(self, message: str = "The handler discarded the job.") -> None:
        super().__init__(message)


class Stopped(Exception):
    """Raised inside a plain handler when the worker is stopping: its job goes back to the queue."""


class _Task:
    """What both kinds of handler get: the job, and where its result goes."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
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


class Task(_Task):
    """One job, given to an async handler.

    `payload` is decoded, `fencing_token` goes to resources that check it. When the job is lost or cancelled the
    handler is cancelled (CancelledError); `cancelled` is set too.
    """

    def __init__(self, keeper: Keeper) -> None:
        super().__init__(keeper)
        self.cancelled: Final = asyncio.Event()

    async def progress(self, progress: float, message: str | None = None) -> None:
        """Report progress (0 to 100), which renews the lock. Returns at once while the daemon is unreachable.

        Raises LockLost, MaxProcessingTimeExceeded, InvalidRequest.
        """
        await self._keeper.report(progress, message)


class SyncTask(_Task):
    """One job, given to a plain handler in a thread of its own.

    As Task, but nothing can cancel a thread: report progress, look at `cancelled` (a threading.Event) or call
    `raise_if_lost` now and then, and return soon when the job is lost or the worker is stopping.
    """

    def __init__(self, keeper: Keeper) -> None:
        super().__init__(keeper)
        self._loop = asyncio.get_running_loop()
        self.cancelled: Final = threading.Event()

    def progress(self, progress: float, message: str | None = None) -> None:
        """Report progress (0 to 100), which renews the lock. Returns at once while the daemon is unreachable.

        Raises LockLost, MaxProcessingTimeExceeded, InvalidRequest, and Stopped when the worker is stopping.
        """
        self.raise_if_lost()

        async def report() -> None:
            await self._keeper.report(progress, message)

        asyncio.run_coroutine_threadsafe(report(), self._loop).result()

    def raise_if_lost(self) -> None:
        """Raise LockLost (or MaxProcessingTimeExceeded) where the job is no longer ours, Stopped where we must stop."""
        super().raise_if_lost()
        if self.cancelled.is_set():
            raise Stopped("The worker is stopping.")


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
    exception fails the job with its class as `error_code`; Retry and Discard say what happens next. Locks live
    `lock_ttl_ms` and are extended by themselves; a handler whose job was lost or cancelled is stopped. SIGTERM and
    SIGINT drain: no more claims, the running handlers get `grace_s` seconds, then they are stopped and their jobs
    released. What goes on is logged to `jobd.client`.
    """

    def __init__(
        self,
        client: AsyncJobClient | Endpoint | str | None = None,
        *,
        queues: Sequence[str] = ("default",),
        concurrency: int = 1,
        name: str | None = None,
        lock_ttl_ms: int = LOCK_TTL_MS,
        grace_s: float = 30.0,
    ) -> None:
        if concurrency < 1:
            raise ValueError("concurrency must be at least 1")
        self.name: Final = name or default_name()
        self._client = client
        self._queues = [queues] if isinstance(queues, str) else list(queues)
        self._concurrency = concurrency
        self._lock_ttl_ms = lock_ttl_ms
        self._grace_s = grace_s
        self._handlers: dict[str | None, Callable[[Any], Any]] = {}
        self._shift: Shift | None = None

    @overload
    def handler(self, function: Handler, /) -> Handler: ...

    @overload
    def handler(self, *kinds: str) -> Callable[[Handler], Handler]: ...

    def handler(self, *kinds: Any) -> Any:
        """Register a function for jobs of these kinds, or, without a kind, for every kind without its own handler.

        `@worker.handler` means `@worker.handler()`. Raises TypeError for anything but names and one function, and for a
        function that cannot be called with a task; ValueError if a kind has a handler already.
        """
        if len(kinds) == 1 and callable(kinds[0]):
            return self._register((), kinds[0])
        for kind in kinds:
            if not isinstance(kind, str):
                raise TypeError(f'{kind!r} is no kind; write @worker.handler or @worker.handler("kind", ...)')
        return functools.partial(self._register, kinds)

    def _register(self, kinds: tuple[str, ...], function: Handler) -> Handler:
        if not callable(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function!r} cannot be a handler; a handler is a function or an async function of a task")
        with contextlib.suppress(ValueError):  # some built-in callables have no signature
            signature = inspect.signature(function)
            try:
                signature.bind(None)
            except TypeError as error:
                raise TypeError(f"{function!r} is called with a task and nothing else: {error}") from None
        for kind in kinds or (None,):
            if kind in self._handlers:
                raise ValueError(f"there is a handler for {'every other kind' if kind is None else kind} already")
        self._handlers.update(dict.fromkeys(kinds or (None,), function))
        return function

    def run(self) -> None:
        """Work until SIGTERM or SIGINT, then drain. Raises the JobdError that made claiming impossible."""
        asyncio.run(self.serve(signals=True))

    def stop(self) -> None:
        """Drain, as SIGTERM: a second call ends the grace, a third all patience. Call it on the event loop."""
        if self._shift is not None:
            self._shift.stop()

    async def serve(self, *, signals: bool = False) -> None:
        """Work until `stop`, on this event loop. With `signals` SIGTERM and SIGINT drain, as in `run`.

        Cancelling it stops the handlers at once and releases their jobs.
        """
        if not self._handlers:
            raise ValueError("a worker needs a handler: @worker.handler(...)")
        async with contextlib.AsyncExitStack() as stack:
            client = self._client
            if not isinstance(client, AsyncJobClient):
                client = await stack.enter_async_context(AsyncJobClient(client))
                if self._concurrency >= STREAM_FROM:
                    client = await stack.enter_async_context(client.stream())
            self._shift = Shift(
                client, self._wanted(), self._begin, log.warning, concurrency=self._concurrency, grace_s=self._grace_s
            )
            if signals:
                stack.enter_context(on_signals(self._shift.stop))
            await self._shift.run()

    def _wanted(self) -> Wanted:
        kinds = None if None in self._handlers else [kind for kind in self._handlers if kind is not None]
        return Wanted(worker=self.name, queues=self._queues, kinds=kinds, lock_ttl_ms=self._lock_ttl_ms)

    async def _begin(self, keeper: Keeper) -> Effort:
        kind = keeper.grant.job.kind
        handler = self._handlers[kind if kind in self._handlers else None]
        return _OnLoop(handler, keeper) if _is_async(handler) else _InThread(handler, keeper)


def _is_async(handler: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


class _Call(ABC):
    """A handler at work on one job."""

    task: _Task

    def __init__(self) -> None:
        self.done: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()
        self._returned: Any = None
        self._raised: BaseException | None = None

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

    async def finish(self, keeper: Keeper, give_up: asyncio.Event) -> bool:
        """Complete the job with what the handler returned, or fail it with what it raised."""
        error = self._raised
        if error is None:
            try:
                result = _result(self.task.result, self._returned)
                msgspec.json.encode(result)
            except (TypeError, ValueError, RecursionError) as unfit:
                error = unfit
            else:
                return await keeper.complete(give_up, **result)
        if isinstance(error, Retry | Discard):  # the handler's own word: nothing to be traced
            log.info("job %s: %s: %s", keeper.id, type(error).__name__, error)
        else:
            log.warning("job %s failed", keeper.id, exc_info=error)
        await keeper.fail(give_up, _described(error), **_how(error))
        return False


class _OnLoop(_Call):
    """An async handler."""

    def __init__(self, handler: Callable[[Task], Any], keeper: Keeper) -> None:
        super().__init__()
        self.task: Task = Task(keeper)
        self._running = asyncio.ensure_future(self._run(handler))

    async def _run(self, handler: Callable[[Task], Any]) -> None:
        try:
            self._end(await handler(self.task), None)
        except BaseException as error:  # SystemExit too: it ends the job, not the worker
            self._end(None, error)

    def abort(self) -> None:
        self.task.cancelled.set()
        self._running.cancel()


class _InThread(_Call):
    """A plain handler, in a thread that does not keep the process alive."""

    def __init__(self, handler: Callable[[SyncTask], Any], keeper: Keeper) -> None:
        super().__init__()
        self.task: SyncTask = SyncTask(keeper)
        self._loop = asyncio.get_running_loop()
        run = functools.partial(contextvars.copy_context().run, self._run, handler)
        threading.Thread(target=run, name=f"job {keeper.id}", daemon=True).start()

    def _run(self, handler: Callable[[SyncTask], Any]) -> None:
        returned, raised = None, None
        try:
            returned = handler(self.task)
        except BaseException as error:
            raised = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._end, returned, raised)

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
    """The message of a failed job: what the handler said, or the last lines of its traceback."""
    if isinstance(error, Retry | Discard):
        return str(error)[:MESSAGE_CHARACTERS] or type(error).__name__
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return "\n".join(lines[-TRACE_LINES:])[-MESSAGE_CHARACTERS:]


def _how(error: BaseException) -> dict[str, Any]:
    """The rest of `fail`: the class of the error, and whether and when to try again."""
    how: dict[str, Any] = {"error_code": type(error).__name__[:200]}
    if isinstance(error, Retry):
        how["retry_after_ms"] = error.after_ms
    if isinstance(error, Discard):
        how["retry"] = False
    return how
