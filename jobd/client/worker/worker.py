"""A worker in Python: a handler for each kind of job, N at a time, with locks that are extended automatically.

Handlers run on the caller's event loop or in threads. A service thread makes all calls to the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final, TypeVar, overload

from jobd.client.aio import AsyncJobClient
from jobd.client.endpoint import Address
from jobd.client.errors import Unauthorized
from jobd.client.worker.claimer import LOCK_TTL_MS, ClaimOptions, default_name, describe_claims, describe_process
from jobd.client.worker.handlers import AsyncExecution, HandlerLoop, RegisteredHandler, ThreadExecution, logger
from jobd.client.worker.lock_keeper import LockKeeper
from jobd.client.worker.program_output import print_message
from jobd.client.worker.runner import Execution, WorkerRunner, on_signals, seconds
from jobd.client.worker.service_thread import ServiceThread

UNAUTHORISED: Final = 5  # the exit code, as that of jobctl
STREAM_FROM: Final = 8  # from this concurrency on, calls share one stream of commands
HandlerFunction = TypeVar("HandlerFunction", bound=Callable[..., Any])


class Worker:
    """Claim jobs and run a handler for each, `concurrency` at a time.

        worker = Worker(queues=["video"], concurrency=4)

        @worker.handler("transcode")
        async def transcode(context):
            await context.progress(10, "probing")
            return {"file_path": "/videos/1.mp4"}

        worker.run()

    Async handlers run on the event loop, plain handlers in threads. The return value is the job's result: a dict with
    download_url, file_path, storage_key or metadata (other keys are added to the metadata); any other value is
    metadata. An exception fails the job with its class as `error_code`; the `error_message` is `Type: message`, then
    the traceback. Retry and Discard decide whether there is another attempt, and Snooze puts the job back without using
    one. Locks last `lock_ttl_ms` and are extended automatically. If a lock is lost or a job is cancelled, its handler
    is stopped. On SIGTERM and SIGINT the worker drains: it stops claiming, gives running handlers `grace_s` seconds,
    then stops them and releases their jobs. A plain handler that returns normally within 10 s more completes its job.
    The worker logs to `jobd.client`. What it claims and for which jobs a drain waits is printed to stderr if that is a
    terminal or if logging is not configured, else logged at level info. In a terminal, it also prints a line for each
    job.

    A service thread with its own event loop and connections claims jobs and extends locks, so a handler that blocks its
    loop does not lose its lock. A loop that is blocked for 5 s is logged. A C extension that holds the GIL for longer
    than the TTL of a lock stops every thread, and the lock is lost.

    `timeout` (a timedelta, or seconds) limits a whole run; a handler may have its own. When it has passed, an async
    handler is cancelled. It has 10 s to end, then the attempt fails with `error_code` "timeout", regardless of the
    return value. A plain handler runs in a thread, which cannot be stopped: `cancelled` is set and `progress` raises
    Stopped, but the job keeps its lock until the handler ends. If it returns normally, its result counts; if Stopped
    ends it, the attempt fails with "timeout". There is no progress timeout unless `progress_timeout_ms` sets one.
    """

    def __init__(
        self,
        client: AsyncJobClient | Address | None = None,
        *,
        queues: Sequence[str] = ("default",),
        concurrency: int = 1,
        name: str | None = None,
        lock_ttl_ms: int = LOCK_TTL_MS,
        progress_timeout_ms: int = 0,
        timeout: timedelta | float | None = None,
        grace_s: float = 30.0,
    ) -> None:
        self.name: Final = name or default_name()
        self._client = client
        self._options = ClaimOptions(
            worker=self.name,
            queues=[queues] if isinstance(queues, str) else list(queues),
            lock_ttl_ms=lock_ttl_ms,
            progress_timeout_ms=progress_timeout_ms,
            concurrency=concurrency,
        )
        self._timeout_s = seconds(timeout)
        self._grace_s = grace_s
        self._handlers: dict[str | None, RegisteredHandler] = {}
        self._stop: Callable[[], None] | None = None  # set by `serve`
        self._is_stopped = False
        self._shows_runs = os.isatty(2)
        self._progress_every_s = 0.0

    @overload
    def handler(self, function: HandlerFunction, /) -> HandlerFunction: ...

    @overload
    def handler(
        self, *kinds: str, timeout: timedelta | float | None = None
    ) -> Callable[[HandlerFunction], HandlerFunction]: ...

    def handler(self, *kinds: Any, timeout: timedelta | float | None = None) -> Any:
        """Register a function for jobs of these kinds, or, without a kind, for every kind without its own handler.

        `@worker.handler` is the same as `@worker.handler()`. `timeout` takes precedence over that of the worker. Raises
        TypeError for a kind that is not a string and for a function that cannot be called with a context, and
        ValueError if a kind already has a handler.
        """
        timeout_s = seconds(timeout)
        if len(kinds) == 1 and callable(kinds[0]):
            return self._register((), timeout_s, kinds[0])
        for kind in kinds:
            if not isinstance(kind, str):
                raise TypeError(f'{kind!r} is not a kind; write @worker.handler or @worker.handler("kind", ...)')
        return functools.partial(self._register, kinds, timeout_s)

    def _register(self, kinds: tuple[str, ...], timeout_s: float | None, function: HandlerFunction) -> HandlerFunction:
        if not callable(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function!r} cannot be a handler; a handler is a plain or async function of a context")
        with contextlib.suppress(ValueError):  # some built-in callables have no signature
            signature = inspect.signature(function)
            try:
                signature.bind(None)
            except TypeError as error:
                raise TypeError(
                    f"{function!r} cannot be a handler; it must be callable with one argument, a context: {error}"
                ) from None
        for kind in kinds or (None,):
            if kind in self._handlers:
                raise ValueError(f"{'every other kind' if kind is None else kind} already has a handler")
        handler = RegisteredHandler(function, timeout_s or self._timeout_s)
        self._handlers.update(dict.fromkeys(kinds or (None,), handler))
        return function

    def run(self) -> None:
        """Work until SIGTERM or SIGINT, then drain. Raises the JobdError that prevents claiming.

        If the daemon rejects the token, prints one line to stderr instead and exits the program with code 5.
        """
        try:
            asyncio.run(self.serve(signals=True))
        except Unauthorized as error:
            file = os.environ.get("JOBD_WORKER_TOKEN_FILE") or "not set"
            source = f"the first line of the file that JOBD_WORKER_TOKEN_FILE names ({file})"
            print_message(
                f"worker {self.name}: the daemon rejected the token. Unless the program sets one, it is {source} "
                f"[{error.code}]"
            )
            raise SystemExit(UNAUTHORISED) from error

    def stop(self) -> None:
        """Drain, as on SIGTERM. A second call ends the grace, a third stops at once. Thread-safe.

        A call before `run` or `serve` ends it before it claims a job.
        """
        self._is_stopped = True
        if self._stop is not None:
            self._stop()

    async def serve(self, *, signals: bool = False) -> None:
        """Work until `stop`. Async handlers run on this event loop. With `signals`, SIGTERM and SIGINT drain.

        Cancellation stops the handlers at once and releases their jobs. Raises the JobdError that prevents claiming,
        and RuntimeError if no thread can be started for a handler; its job is released.
        """
        if not self._handlers:
            raise ValueError("a worker needs a handler: @worker.handler(...)")
        client = self._client.twin() if isinstance(self._client, AsyncJobClient) else self._streaming(self._client)
        kinds = None if None in self._handlers else [kind for kind in self._handlers if kind is not None]
        options = replace(self._options, kinds=kinds, about=describe_process(self._options.concurrency))
        service = ServiceThread(f"jobd worker {self.name}")
        log = service.background(logger.warning)
        report = service.background(print_message) if self._shows_runs else None
        # Without a configured logger, Python prints warnings to stderr, but no information.
        announce = report or service.background(logger.info if logger.hasHandlers() else print_message)
        announce(describe_claims(options, client))
        loop = HandlerLoop(log)
        begin = functools.partial(self._begin, loop)
        runner = WorkerRunner(
            client,
            options,
            begin,
            log,
            announce=announce,
            grace_s=self._grace_s,
            progress_every_s=self._progress_every_s,
            report=report,
        )

        async def work() -> None:
            watching = asyncio.ensure_future(loop.watch())
            try:
                async with client:
                    await runner.run()
            finally:
                watching.cancel()

        stop = self._stop = functools.partial(service.call, runner.stop)
        first = functools.partial(service.call, runner.stop_claiming)
        if self._is_stopped:
            stop()
        try:
            with on_signals(stop, first) if signals else contextlib.nullcontext():
                await service.run(work, runner.abandon)
        finally:
            self._stop, self._is_stopped = None, False
        if runner.start_error is not None:
            raise runner.start_error

    def _streaming(self, endpoint: Address | None) -> AsyncJobClient:
        client = AsyncJobClient(endpoint)
        return client.stream() if self._options.concurrency >= STREAM_FROM else client

    async def _begin(self, loop: HandlerLoop, keeper: LockKeeper) -> Execution:
        kind = keeper.grant.job.kind
        handler = self._handlers[kind if kind in self._handlers else None]
        return (AsyncExecution if _is_async(handler.function) else ThreadExecution)(handler, keeper, loop)


def _is_async(handler: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004
