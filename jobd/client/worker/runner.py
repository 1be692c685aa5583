"""One run of a worker, from its first claim to the end of its drain: who stops what, when, and what becomes of the job.

Does not know what the work is: worker.py runs handlers, run.py runs programs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, Final, Protocol

from jobd.client.aio import AsyncJobClient
from jobd.client.protocol import GrantInfo
from jobd.client.worker.aio_utils import first_of, within
from jobd.client.worker.claimer import Claimer, ClaimOptions
from jobd.client.worker.error_text import MESSAGE_CHARACTERS
from jobd.client.worker.lease import LeaseKeeper
from jobd.client.worker.service_thread import Say

STOP_S: Final = 10.0  # what work that was told to stop gets to do so
PATIENCE_S: Final = 30.0  # how long a daemon that is not there is waited for where an end is wanted (once, drain)
ENDING_S: Final = 10.0  # how long a stopping worker goes on telling an unreachable daemon how its jobs ended


class Execution(Protocol):
    """Work on one job that is under way."""

    @property
    def done(self) -> asyncio.Future[None]:
        """Done when nothing of the work is left running."""

    @property
    def timeout_s(self) -> float | None:
        """How long the work may take, in seconds; None: no limit."""

    async def stop(self, at_once: asyncio.Event) -> None:
        """Have the work end before its time. Returns when it is gone, or when it does not go; then `done` is not done.

        `at_once` says that there is no time left for manners.
        """

    def abort(self) -> None:
        """What can be done about work that does not stop, without waiting."""

    async def finish(self, keeper: LeaseKeeper, give_up: asyncio.Event) -> bool:
        """The work ended by itself: complete the job, or fail it; whether it is completed."""

    def describe_timeout(self) -> str:
        """Return a suffix for the message of a run that took too long. The work was told to stop, and may still run."""


Begin = Callable[[LeaseKeeper], Awaitable[Execution]]


class WorkerRunner:
    """Claims jobs, begins an Effort for each and sees it to its end.

    `stop` claims no more and gives what runs `grace_s`; a second `stop` ends the grace, a third all patience. Work that
    was stopped for the shift's end gives its job back, once it is gone.
    """

    def __init__(
        self,
        client: AsyncJobClient,
        wanted: ClaimOptions,
        begin: Begin,
        say: Say,
        *,
        concurrency: int = 1,
        grace_s: float = 30.0,
        stop_s: float = STOP_S,
        once: bool = False,
        drain: bool = False,
        progress_every_s: float = 0,
    ) -> None:
        self._client = client
        self._begin = begin
        self._say = say
        self._grace_s = grace_s
        self._stop_s = stop_s
        self._progress_every_s = progress_every_s
        self._claims = Claimer(
            client,
            wanted,
            self._work,
            say,
            concurrency=concurrency,
            once=once,
            drain=drain,
            patience_s=PATIENCE_S if once or drain else None,
        )
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()  # the grace is over: work is stopped
        self._give_up = asyncio.Event()  # neither work nor an unreachable daemon is waited for any longer
        self.completed = 0
        self.not_completed = 0
        self.fault: str | None = None  # why no work can be begun

    def stop(self) -> None:
        """As SIGTERM. May be called again, see above."""
        if self._hurry.is_set():
            self._give_up.set()
        elif self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()
        self._claims.stop()

    def claim_no_more(self) -> None:
        """Let what runs go on without a limit; a `stop` follows."""
        self._claims.stop()

    def abandon(self) -> None:
        """Stop without grace."""
        self.stop()
        self._hurry.set()

    @property
    def was_stopped(self) -> bool:
        """Whether it was told to end, or no work could be begun, before it ran out of jobs."""
        return self._stopping.is_set() or self.fault is not None

    async def run(self) -> None:
        """Until it was stopped or ran out of jobs (once, drain). Raises the JobdError that made claiming impossible."""
        clock = asyncio.ensure_future(self._end_grace())
        try:
            await self._claims.run()
        finally:
            clock.cancel()
            await asyncio.gather(clock, return_exceptions=True)

    async def _end_grace(self) -> None:
        await self._stopping.wait()
        await within(self._grace_s, self._hurry)
        self._hurry.set()
        await within(self._stop_s + ENDING_S, self._give_up)
        self._give_up.set()

    async def _work(self, grant: GrantInfo, is_resent: bool) -> None:
        """One job, from its grant to its end."""
        keeper = LeaseKeeper(self._client, grant, self._say, progress_every_s=self._progress_every_s)
        is_completed = False
        if self._stopping.is_set():
            await keeper.release(self._give_up)
        else:
            keeper.start(at_once=is_resent)
            try:
                is_completed = await self._attempt(keeper)
            finally:
                await keeper.stop()
        self.completed += is_completed
        self.not_completed += not is_completed

    async def _attempt(self, keeper: LeaseKeeper) -> bool:
        """Begin the work, see it end, say so to the daemon; whether the job is completed."""
        try:
            effort = await self._begin(keeper)
        except OSError as error:
            self.fault = str(error)
            self._claims.stop()  # the next job would fare no better
            await keeper.release(self._give_up)
            return False
        try:
            return await self._see_out(effort, keeper)
        finally:
            if not effort.done.done():
                effort.abort()

    async def _see_out(self, effort: Execution, keeper: LeaseKeeper) -> bool:
        """Wait until the work has ended. Stop it if the job is lost, the shift is over, or the timeout has passed."""
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(effort.timeout_s):
                    await first_of(effort.done, keeper.lost, hurry)
            if effort.done.done():
                return await effort.finish(keeper, self._give_up)
            timed_out = not keeper.lost.done() and not hurry.done()
            if keeper.lost.done():
                self._say(f"job {keeper.id}: stopping its work: {keeper.lost.result().message}")
            elif timed_out:
                self._say(f"job {keeper.id}: stopping its work: it took longer than {effort.timeout_s} s.")
            await effort.stop(self._give_up)
            if timed_out:
                message = f"The run took longer than its timeout of {effort.timeout_s} s.{effort.describe_timeout()}"
                await keeper.fail(self._give_up, message[:MESSAGE_CHARACTERS], error_code="timeout")
            if not effort.done.done():
                self._say(f"job {keeper.id}: its work does not stop.")
                await first_of(effort.done, hurry)
            if not timed_out and not keeper.lost.done() and effort.done.done():
                await keeper.release(self._give_up)
            return False
        finally:
            hurry.cancel()


def seconds(timeout: timedelta | float | None) -> float | None:
    """Return `timeout` in seconds. Raises ValueError unless it is above 0."""
    time_s = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if time_s is not None and time_s <= 0:
        raise ValueError("timeout must be above 0; None means no limit")
    return time_s


@contextlib.contextmanager
def on_signals(stop: Callable[[], None], first: Callable[[], None] | None = None) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop` on the running loop meanwhile.

    `first` is called at once, between two steps of what the main thread does, even if that blocks the loop.
    """
    loop = asyncio.get_running_loop()
    names = (signal.SIGTERM, signal.SIGINT)
    for name in names:
        loop.add_signal_handler(name, stop)
        if first is not None:
            signal.signal(name, functools.partial(_both, first, signal.getsignal(name)))
            signal.siginterrupt(name, False)
    try:
        yield
    finally:
        for name in names:
            loop.remove_signal_handler(name)


def _both(first: Callable[[], None], loops: Any, number: int, frame: FrameType | None) -> None:
    """Call `first`, then the loop's own handler."""
    first()
    loops(number, frame)
