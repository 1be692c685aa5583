"""The real actor and cleaner on a disk in memory, in virtual time: for tests of what time does by itself.

Hours pass in a moment, and nothing happens by chance: the clock moves only when nobody has anything left to do.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Final

from jobd.core.state import Book
from jobd.engine.actor import Actor, Bounds
from jobd.engine.clock import Clock
from jobd.engine.idempotency import Keys
from jobd.maintenance.cleanup_pass import CleanupSchedule
from jobd.maintenance.maintainer import Maintainer, read_figures
from jobd.model.commands import AnyCommand, Create, Start
from jobd.model.errors import ApiError
from jobd.model.job import HOUR_MS, Job, Options, Policy
from jobd.model.responses import GrantView, Response
from tests.support.memory_storage import MemoryStorage

WALL: Final = 1_700_000_000_000
QUIET: Final = CleanupSchedule(interval_ms=HOUR_MS, min_interval_ms=HOUR_MS, recover_every_ms=0)


class VirtualTime(selectors.DefaultSelector):
    """Where the loop would sleep, its time moves on instead. Never ask a thread for anything meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for something that will never happen"
            self.now_s += max(timeout, 0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = VirtualTime()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a loop of virtual time. It takes no fixtures."""

    def run() -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test())

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    return run


class VirtualEngine:
    """`async with Household() as house`: the actor runs; the cleaner too after `keep`. Times in ms."""

    def __init__(
        self,
        disk: MemoryStorage | None = None,
        *,
        schedule: CleanupSchedule = QUIET,
        policy: Policy | None = None,
        bounds: Bounds | None = None,
        step_ms: int = 0,
        **cleaner: Any,
    ) -> None:
        self.disk = disk or MemoryStorage()
        opened = self.disk.opened()
        loop_time = asyncio.get_running_loop().time
        self.step_ms = step_ms  # of the wall clock
        self.synchronised = False  # as the kernel reports it
        policy = policy or Policy()
        self.clock = Clock(
            opened.numbers.lease_ms,
            opened.numbers.wall_ms,
            suspect=opened.numbers.clock_suspect,
            keep_ms=policy.shortest_keep_ms,
            wall=lambda: WALL + self.step_ms + round(loop_time() * 1000),
            boot=lambda: round(loop_time() * 1000),
            synchronised=lambda: self.synchronised,
        )
        self.book = Book.opened(opened)
        self.book.suspects = dict(opened.suspects)
        self.book.quarantined = dict(opened.quarantined)
        self.book.figures = read_figures(opened.figures)
        self.actor = Actor(
            self.disk,
            self.book,
            Keys(opened.keys, 1000),
            self.clock,
            policy,
            random=lambda size: b"s" * size,
            bounds=bounds,
            is_full=opened.full,
            has_reserve=opened.has_reserve,
        )
        self.cleaner = Maintainer(self.actor, self.clock, schedule, **cleaner)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> VirtualEngine:
        self._tasks.append(asyncio.create_task(self.actor.run()))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cleaner.stop()
        await asyncio.gather(*self._tasks[1:])
        self.actor.stop()
        await self._tasks[0]

    def keep(self) -> asyncio.Task[None]:
        """Let the cleaner run."""
        task = asyncio.create_task(self.cleaner.run())
        self._tasks.append(task)
        return task

    @property
    def now(self) -> int:
        return self.clock.moment().now

    async def yes(self, command: AnyCommand, **asked: Any) -> Any:
        """The data of an answer that is a yes."""
        answer = await self.actor.ask(command, **asked)
        assert isinstance(answer, Response), answer
        return answer.data

    async def no(self, command: AnyCommand, **asked: Any) -> ApiError:
        answer = await self.actor.ask(command, **asked)
        assert isinstance(answer, ApiError), answer
        return answer

    async def held(
        self, job_id: str = "a", *, lock_ttl_ms: int = 60_000, stuck_after_ms: int = 0, **fields: Any
    ) -> str:
        """A new job in the hands of worker w-1: its lock id."""
        await self.yes(Create(id=job_id, **fields))
        start = Start(id=job_id, worker="w-1", lock_ttl_ms=lock_ttl_ms, stuck_after_ms=stuck_after_ms)
        granted: GrantView = await self.yes(start)
        return granted.lock_id


def row(seq: int, job_id: str = "", status: str = "queued", **fields: Any) -> Job:
    """A row as hands may leave it."""
    times = {"created_at": WALL, "updated_at": WALL, "run_at": WALL}
    return Job(seq=seq, id=job_id or f"job-{seq}", options=Options(), status=status, **(times | fields))


async def seconds(count: float) -> None:
    """Let virtual time pass."""
    await asyncio.sleep(count)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something has happened, as others act; an hour at most."""
    for _ in range(3_600_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never happened")
