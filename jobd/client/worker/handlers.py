"""Run handlers on the caller's event loop or in threads."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import UNSET

from jobd.client.outcomes import Discard, PayloadMismatch, Retry, Snooze, Stopped
from jobd.client.worker.aio_utils import call_on, done_within, settle, within
from jobd.client.worker.error_text import failure_message, failure_options, safe_text
from jobd.client.worker.handler_context import AsyncHandlerContext, BaseHandlerContext, HandlerContext
from jobd.client.worker.lock_keeper import LockKeeper
from jobd.client.worker.payload_mismatch import give_back
from jobd.client.worker.runner import STOP_S, Execution
from jobd.client.worker.service_thread import Log

RESULT_FIELDS: Final = frozenset({"download_url", "file_path", "storage_key", "metadata"})
logger = logging.getLogger("jobd.client")
LAG_S: Final = 5.0  # an event loop that is blocked for longer is logged
MEASURE_S: Final = 1.0  # between two measurements of the lag


def _is_discard(error: BaseException) -> bool:
    return isinstance(error, Discard)


class RegisteredHandler(NamedTuple):
    """`is_final` says whether there is no other attempt after an error. A completed job is kept for `keep_ms`."""

    function: Callable[[Any], Any]
    timeout_s: float | None
    is_final: Callable[[BaseException], bool] = _is_discard
    keep_ms: int | None = None


class HandlerLoop:
    """The service thread's access to the event loop and context in which the worker was started."""

    def __init__(self, log: Log) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._log = log
        self._jobs: dict[asyncio.Task[Any], str] = {}

    @property
    def context(self) -> contextvars.Context:
        """Return a copy of the context for one handler."""
        return self._context.copy()

    def call(self, function: Callable[[], object]) -> None:
        call_on(self._loop, function, context=self.context)

    def begin(self, work: Coroutine[Any, Any, Any], job_id: str) -> asyncio.Task[Any]:
        """Start a task for this job. Called on the loop."""
        task = self._loop.create_task(work, name=f"job {job_id}")
        self._jobs[task] = job_id
        task.add_done_callback(self._jobs.pop)
        return task

    async def watch(self) -> None:
        """Measure how long the handlers' loop is blocked, and how long this thread does not run. Log long times."""
        here = asyncio.get_running_loop()
        while True:
            called_s, ran = here.time(), asyncio.Event()
            self.call(functools.partial(call_on, here, ran.set))
            if not await within(LAG_S, ran) and self._jobs:
                jobs = self._running()
                self._log(
                    f"{jobs}: the event loop of the handlers has been blocked for {here.time() - called_s:.1f} s. "
                    "Locks are extended, but other async handlers wait. Use asyncio.to_thread or a plain handler."
                )
                await ran.wait()
                self._log(f"{jobs}: the event loop of the handlers runs again, after {here.time() - called_s:.1f} s.")
            called_s = here.time()
            await asyncio.sleep(MEASURE_S)
            if (late_s := here.time() - called_s - MEASURE_S) >= LAG_S:
                self._log(
                    f"{self._running()}: no thread ran for {late_s:.1f} s, so no lock was renewed. "
                    "Does a C extension hold the GIL?"
                )

    def _running(self) -> str:
        """Name the job whose task is running now or, if that is unknown, all async jobs."""
        task = asyncio.current_task(self._loop)
        jobs = [self._jobs[task]] if task in self._jobs else list(self._jobs.values())
        return f"job {', '.join(jobs)}" if jobs else "no async job"


class _HandlerExecution(Execution):
    """The run of a handler for one job. Created and read in the service thread."""

    context: BaseHandlerContext

    def __init__(self, handler: RegisteredHandler) -> None:
        super().__init__(asyncio.get_running_loop().create_future(), handler.timeout_s)
        self._handler = handler
        self._returned: Any = None
        self._raised: BaseException | None = None

    def _ended(self, returned: Any, raised: BaseException | None) -> None:
        """Record the end of the handler. Called in the handler's thread."""
        call_on(self.done.get_loop(), self._end, returned, raised)

    def _end(self, returned: Any, raised: BaseException | None) -> None:
        self._returned, self._raised = returned, raised
        self.gave_up = isinstance(raised, Stopped)
        self.has_result = self.is_thread and raised is None
        settle(self.done)

    async def stop(self, at_once: asyncio.Event) -> None:
        """Ask the handler to stop, and wait up to STOP_S for its end."""
        self.abort()
        await done_within(STOP_S, self.done, at_once)

    def describe_timeout(self) -> str:
        return "" if self.done.done() else " The handler was asked to stop, but it is still running."

    async def finish(self, keeper: LockKeeper, give_up: asyncio.Event) -> bool:
        """Complete the job with the return value of the handler, release it (Snooze), or fail it with the exception."""
        if isinstance(self._raised, Snooze):
            await keeper.release(give_up, self._raised.after_ms)
            return False
        if isinstance(self._raised, PayloadMismatch) and await give_back(keeper, give_up, str(self._raised)):
            return False
        ending = await asyncio.to_thread(self._ending, keeper.id)  # may block: it calls user code and writes the log
        if isinstance(ending, _HandlerFailure):
            await keeper.fail(give_up, ending.message, **ending.options)
            return False
        return await keeper.complete(give_up, **ending)

    def _ending(self, job_id: str) -> dict[str, Any] | _HandlerFailure:
        error = self._raised
        if error is None:
            try:
                return self._encoded_result()
            except BaseException as invalid:  # encoding calls user code, such as `tzinfo.utcoffset`
                error = invalid
        if isinstance(error, Retry) and error.changed and error.checkpoint is UNSET:
            error = TypeError(f"Retry changes {', '.join(error.changed)}, but only a task of an App has arguments")
        if isinstance(error, Retry | Discard):  # raised on purpose: no traceback
            logger.info("job %s: %s: %s", job_id, type(error).__name__, safe_text(error))
        else:
            logger.warning("job %s failed", job_id, exc_info=error)
        return _HandlerFailure(failure_message(error), failure_options(error, is_final=self._handler.is_final(error)))

    def _encoded_result(self) -> dict[str, Any]:
        """Return the result with encoded metadata. Raises TypeError or ValueError, or an error of user code."""
        result = merged_result(self.context.result, self._returned)
        if unknown := result.keys() - RESULT_FIELDS:
            raise TypeError(
                f"the result has unknown fields ({', '.join(sorted(map(repr, unknown)))}); "
                "only download_url, file_path, storage_key and metadata are allowed"
            )
        try:
            if result.get("metadata") is not None:
                result = {**result, "metadata": msgspec.Raw(msgspec.json.encode(result["metadata"]))}
            msgspec.json.encode(result)
        except (TypeError, ValueError, RecursionError) as error:
            function = self._handler.function
            name = getattr(function, "__name__", type(function).__name__)
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"the result of handler {name!r} cannot be encoded as JSON: {safe_text(error)}") from None
        if self._handler.keep_ms is not None:
            result["expires_at"] = time.time_ns() // 1_000_000 + self._handler.keep_ms
        return result


class _HandlerFailure(NamedTuple):
    message: str
    options: dict[str, Any]


class AsyncExecution(_HandlerExecution):
    def __init__(self, handler: RegisteredHandler, keeper: LockKeeper, loop: HandlerLoop) -> None:
        super().__init__(handler)
        self.context: AsyncHandlerContext = AsyncHandlerContext(keeper)
        self._loop = loop
        self._running: asyncio.Task[Any] | None = None
        self._may_end_by_itself = True  # after a call in it has raised that the lock is lost
        loop.call(functools.partial(self._begin, handler.function))

    def _begin(self, function: Callable[[AsyncHandlerContext], Any]) -> None:
        self._running = self._loop.begin(self._run(function), self.context.job.id)
        self._running.add_done_callback(self._on_done)

    async def _run(self, function: Callable[[AsyncHandlerContext], Any]) -> tuple[Any, BaseException | None]:
        try:
            return await function(self.context), None
        except BaseException as error:  # including SystemExit, which ends the job, not the worker
            return None, error

    def _on_done(self, running: asyncio.Task[Any]) -> None:
        self._ended(*((None, asyncio.CancelledError()) if running.cancelled() else running.result()))

    def abort(self) -> None:
        self._loop.call(self._cancel)

    def _cancel(self) -> None:
        self.context.cancelled.set()
        # Calls that are scheduled already run first, so that `progress` raises LockLost and not CancelledError.
        asyncio.get_running_loop().call_soon(self._cancel_unless_ending)

    def _cancel_unless_ending(self) -> None:
        assert self._running is not None, "it was begun by an earlier call"
        is_ending = self._may_end_by_itself and self.context.lost_raised_in is self._running
        if not is_ending:  # a cancellation would interrupt its cleanup
            self._running.cancel()

    async def stop(self, at_once: asyncio.Event) -> None:
        """Stop the handler, and cancel it if it continues after a call has raised that the lock is lost."""
        await super().stop(at_once)
        if self._may_end_by_itself and not self.done.done() and self.context.lost_raised_in is not None:
            self._may_end_by_itself = False
            self.abort()


class ThreadExecution(_HandlerExecution):
    """A plain handler in a daemon thread."""

    is_thread = True

    def __init__(self, handler: RegisteredHandler, keeper: LockKeeper, loop: HandlerLoop) -> None:
        super().__init__(handler)
        self.context: HandlerContext = HandlerContext(keeper)
        run = functools.partial(loop.context.run, self._run, handler.function)
        threading.Thread(target=run, name=f"job {keeper.id}", daemon=True).start()

    def _run(self, function: Callable[[HandlerContext], Any]) -> None:
        returned, raised = None, None
        try:
            returned = function(self.context)
        except BaseException as error:
            raised = error
        self._ended(returned, raised)

    def abort(self) -> None:
        self.context.cancelled.set()


def merged_result(set_: dict[str, Any], returned: Any) -> dict[str, Any]:
    """Merge the result set on the context with the return value of the handler, which takes precedence."""
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
        raise TypeError("a result with keys other than the result fields needs a dict as its metadata")
    return {**result, "metadata": {**(metadata or {}), **rest}}
