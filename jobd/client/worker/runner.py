"""Run a worker from the first claim to the end of its drain: execute each job, stop it in time, and end its grant."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, Final

from jobd.client.aio import AsyncJobClient
from jobd.client.errors import JobdError
from jobd.client.worker.aio_utils import first_of, within
from jobd.client.worker.claimer import Claimer, ClaimOptions
from jobd.client.worker.error_text import MESSAGE_CHARACTERS, describe_error
from jobd.client.worker.lock_keeper import LockKeeper, describe_end, describe_failure
from jobd.client.worker.service_thread import Log
from jobd.model.commands import About, GoodbyeReason
from jobd.model.responses import GrantView
from jobd.model.times import duration

STOP_S: Final = 10.0  # for an execution to stop
NAMED: Final = 3  # jobs that the message at a stop names
GOODBYE_S: Final = 1.0
REPORT_S: Final = 10.0  # for a stopping worker to report the ends of its jobs to an unreachable daemon


class Execution(ABC):
    """The running work on one job. `done` is done when no part of it is running any more."""

    is_thread = False  # the work cannot be stopped before it returns
    gave_up = False  # the work has ended because it was asked to
    has_result = False  # the work has ended with a result, although it was asked to stop

    def __init__(self, done: asyncio.Future[None], timeout_s: float | None) -> None:
        self.done: Final = done
        self.timeout_s: Final = timeout_s  # of the whole run; None: no limit

    @abstractmethod
    async def stop(self, at_once: asyncio.Event) -> None:
        """Stop the work before its end. Return when it has ended, or if it does not stop; `done` is then not done.

        If `at_once` is set, there is no time for a graceful end.
        """

    @abstractmethod
    def abort(self) -> None:
        """Ask the work to stop, without waiting."""

    @abstractmethod
    async def finish(self, keeper: LockKeeper, give_up: asyncio.Event) -> bool:
        """Complete or fail the job after the work has ended by itself. Return whether it is completed."""

    @abstractmethod
    def describe_timeout(self) -> str:
        """Return a suffix for the error message of a timeout. The work was stopped, but may still be running."""


Begin = Callable[[LockKeeper], Awaitable[Execution]]


class WorkerRunner:
    """Claim jobs, begin an Execution for each and wait for its end.

    `stop` stops claiming and gives running work `grace_s`. A second `stop` ends the grace, a third all other waits. A
    job whose work was stopped with the worker is released after the work has ended. `announce` (default: `log`) gets
    the line that names the jobs for which a drain waits, `report` a line for each run.
    """

    def __init__(
        self,
        client: AsyncJobClient,
        options: ClaimOptions,
        begin: Begin,
        log: Log,
        *,
        announce: Log | None = None,
        grace_s: float = 30.0,
        stop_s: float = STOP_S,
        progress_every_s: float = 0,
        report: Log | None = None,
    ) -> None:
        self._client = client
        self._options = options
        self._begin = begin
        self._log = log
        self._announce = announce or log
        self._report = report
        self._grace_s = grace_s
        self._stop_s = stop_s
        self._progress_every_s = progress_every_s
        self._claimer = Claimer(client, options, self._work, log, self.stop)
        self._running: list[str] = []  # ids of jobs; one twice if it was claimed again before its work has stopped
        self._stopping = asyncio.Event()
        self._grace_is_over = asyncio.Event()  # executions are stopped
        self._give_up = asyncio.Event()  # do not wait for executions or an unreachable daemon any longer
        self._is_bounded = options.once or options.drain
        self.ran_any = False
        self.not_completed: set[str] = set()  # with `once` or `drain`: jobs whose last run here did not complete them
        self.start_error: OSError | RuntimeError | None = None  # why no execution can begin

    def stop(self) -> None:
        """Stop as on SIGTERM. Further calls shorten the waits, as described above."""
        if self._grace_is_over.is_set():
            self._give_up.set()
        elif self._stopping.is_set():
            self._grace_is_over.set()
        self._stopping.set()
        self._claimer.stop()

    def stop_claiming(self) -> None:
        """Stop claiming. Running work continues without a time limit until `stop` is called."""
        self._claimer.stop()

    def abandon(self) -> None:
        """Stop without grace."""
        self.stop()
        self._grace_is_over.set()

    @property
    def was_stopped(self) -> bool:
        """Whether the worker was stopped, or no execution could begin, before its queues were empty."""
        return self._stopping.is_set() or self.start_error is not None

    async def run(self) -> None:
        """Work until stopped, or until no job is left (`once`, `drain`).

        Raises the JobdError that prevents claiming.
        """
        grace = asyncio.ensure_future(self._end_grace())
        try:
            await self._claimer.run()
            if self._options.about is not None and self._claimer.has_claimed:
                await self._say_goodbye(self._options.about)
        finally:
            grace.cancel()
            await asyncio.gather(grace, return_exceptions=True)

    async def _say_goodbye(self, about: About) -> None:
        """Tell the daemon that this worker ends, so that operators do not take it for one that is there."""
        reason: GoodbyeReason = "stopped"
        if self.start_error is not None:
            reason = "error"
        elif not self._stopping.is_set():
            reason = "once" if self._options.once else "drained"
        with contextlib.suppress(JobdError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._client.goodbye(self._options.worker, instance=about.instance, reason=reason)

    async def _end_grace(self) -> None:
        await self._stopping.wait()
        if self._running and not self._grace_is_over.is_set():
            self._announce(describe_drain(self._running, self._grace_s))
        await within(self._grace_s, self._grace_is_over)
        self._grace_is_over.set()
        await within(self._stop_s + REPORT_S, self._give_up)
        self._give_up.set()

    async def _work(self, grant: GrantView, is_resent: bool) -> None:
        begun_s = asyncio.get_running_loop().time()
        keeper = LockKeeper(self._client, grant, self._log, progress_every_s=self._progress_every_s)
        is_completed = False
        if self._claimer.is_stopping:
            await keeper.release(self._give_up)
        else:
            keeper.start(at_once=is_resent)
            self._running.append(keeper.id)
            try:
                is_completed = await self._attempt(keeper)
            finally:
                self._running.remove(keeper.id)
                await keeper.stop()
        self.ran_any = True
        if is_completed:
            self.not_completed.discard(keeper.id)
        elif self._is_bounded:
            self.not_completed.add(keeper.id)
            if keeper.ending is not None and keeper.ending[1].status == "queued" and keeper.ending[0] == "fail":
                job = keeper.ending[1]
                self._claimer.await_retry(job.id, (job.run_at - job.updated_at) / 1000)
        if self._report is not None:
            self._report(describe_end(keeper, asyncio.get_running_loop().time() - begun_s))

    async def _attempt(self, keeper: LockKeeper) -> bool:
        """Execute the job and report its end. Return whether it is completed. A bug in jobd fails the job first."""
        try:
            return await self._execute(keeper)
        except Exception as bug:
            await keeper.fail(self._give_up, describe_error(bug), error_code=type(bug).__name__[:200])
            raise

    async def _execute(self, keeper: LockKeeper) -> bool:
        try:
            execution = await self._begin(keeper)
        except (OSError, RuntimeError) as error:  # RuntimeError: the system starts no new thread
            self.start_error = error
            self._claimer.stop()  # the next job would fail in the same way
            await keeper.release(self._give_up)
            return False
        try:
            return await self._wait_for_end(execution, keeper)
        finally:
            if not execution.done.done():
                execution.abort()

    async def _wait_for_end(self, execution: Execution, keeper: LockKeeper) -> bool:
        """Wait until the work has ended. Stop it if the lock is lost, the grace has ended, or the timeout passes.

        A thread is asked to return after its timeout. It keeps its lock, and its result counts, because another attempt
        would run at the same time. Its result also counts if it returns after the grace, before the worker ends.
        """
        grace_is_over = asyncio.ensure_future(self._grace_is_over.wait())
        ends = execution.done, keeper.lost, grace_is_over
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(execution.timeout_s):
                    await first_of(*ends)
            timed_out = not any(end.done() for end in ends)
            if timed_out:
                self._log_timeout(execution, keeper)
            if timed_out and execution.is_thread:
                execution.abort()
                await first_of(*ends)
                timed_out = execution.gave_up
            if execution.done.done() and not timed_out:
                return await execution.finish(keeper, self._give_up)
            if keeper.lost.done():
                self._log(f"job {keeper.id}: stopping its work: {keeper.lost.result().message}")
            await execution.stop(self._give_up)
            if timed_out:
                await self._fail_timeout(execution, keeper)
            is_held = not timed_out and not keeper.lost.done()
            if not execution.done.done():
                expiry = f" Its lock expires within {keeper.grant.ttl_ms / 1000:g} s, then its stall rule applies."
                self._log(f"job {keeper.id}: its work does not stop.{expiry if is_held else ''}")
                await first_of(execution.done, grace_is_over)
            if is_held and execution.done.done():
                if execution.has_result:
                    return await execution.finish(keeper, self._give_up)
                await keeper.release(self._give_up)
            return False
        finally:
            grace_is_over.cancel()

    def _log_timeout(self, execution: Execution, keeper: LockKeeper) -> None:
        what = (
            "a thread cannot be stopped. It was asked to return, and keeps its lock until then"
            if execution.is_thread
            else "stopping its work"
        )
        self._log(f"job {keeper.id}: it took longer than {_limit(execution)}; {what}.")

    async def _fail_timeout(self, execution: Execution, keeper: LockKeeper) -> None:
        message = f"The run took longer than its timeout of {_limit(execution)}.{execution.describe_timeout()}"
        job = await keeper.fail(self._give_up, message[:MESSAGE_CHARACTERS], error_code="timeout")
        if job is not None and self._report is None:
            self._log(describe_failure(job, "timeout"))


def describe_drain(jobs: Sequence[str], grace_s: float) -> str:
    """Return the line that says at a stop for which jobs the worker waits, and how to shorten that."""
    more = f" and {len(jobs) - NAMED} more" if len(jobs) > NAMED else ""
    again = f"a second Ctrl-C or SIGTERM asks {'it' if len(jobs) == 1 else 'them'} to stop"
    return f"stopping: waiting up to {duration(grace_s * 1000)} for {', '.join(jobs[:NAMED])}{more}; {again}"


def _limit(execution: Execution) -> str:
    return duration((execution.timeout_s or 0) * 1000)


def seconds(timeout: timedelta | float | None) -> float | None:
    """Return `timeout` in seconds. Raises ValueError unless it is above 0."""
    time_s = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if time_s is not None and time_s <= 0:
        raise ValueError("timeout must be above 0; None means no limit")
    return time_s


@contextlib.contextmanager
def on_signals(stop: Callable[[], None], first: Callable[[], None] | None = None) -> Iterator[None]:
    """Make SIGTERM and SIGINT call `stop` on the running loop. Restore the handlers of the program at the end.

    `first` is called before that, by the interpreter in the main thread, even if the loop is blocked.
    """
    loop = asyncio.get_running_loop()
    previous = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    for name in previous:
        loop.add_signal_handler(name, stop)
        if first is not None:
            signal.signal(name, functools.partial(_call_both, first, signal.getsignal(name)))
            signal.siginterrupt(name, False)
    try:
        yield
    finally:
        for name, handler in previous.items():
            loop.remove_signal_handler(name)
            if handler is not None:  # one that was not set in Python cannot be restored
                signal.signal(name, handler)


def _call_both(first: Callable[[], None], loop_handler: Any, number: int, frame: FrameType | None) -> None:
    first()
    loop_handler(number, frame)
