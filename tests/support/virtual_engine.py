"""The real actor and maintainer on in-memory storage, in virtual time.

Hours pass in a moment, and tests are deterministic: time advances only when all tasks wait.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random
from typing import Any, Final

from msgspec import Raw

from jobd.core.state import State
from jobd.engine.actor import Actor, Bounds
from jobd.engine.clock import Clock
from jobd.engine.idempotency import IdempotencyStore
from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.maintenance.maintainer import Maintainer, read_stats
from jobd.maintenance.plan_runner import Planner
from jobd.model.clocks import BootMs
from jobd.model.commands import AnyCommand, Claim, Complete, Create, IdempotencyKey, Start
from jobd.model.errors import ApiError
from jobd.model.events import fold
from jobd.model.job import HOUR_MS, Job, Options, Policy
from jobd.model.responses import CleanupReport, GrantView, Response
from tests.support.error_details import check_error
from tests.support.memory_storage import MemoryStorage

WALL: Final = 1_700_000_000_000
QUIET: Final = CleanupSchedule(interval_ms=HOUR_MS, min_interval_ms=HOUR_MS, recover_every_ms=0)


class VirtualTime(selectors.DefaultSelector):
    """Advances the time of the loop instead of sleeping. Tests must not wait for threads."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "deadlock: every task waits, and no timer is set"
            self.now_s += max(timeout, 0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = VirtualTime()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a loop of virtual time. Its fixtures are made outside the loop."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(**fixtures))

    return run


def in_engine(**options: Any) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Run an async test in virtual time, with a VirtualEngine of these options as its first argument."""
    return in_context(lambda: VirtualEngine(**options))


def in_context(
    make: Callable[[], AbstractAsyncContextManager[Any]],
) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Run an async test in virtual time and in the context of `make`, with its value as the first argument."""

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        @in_virtual_time
        @functools.wraps(test)
        async def run(**fixtures: Any) -> None:
            async with make() as value:
                await test(value, **fixtures)

        _, *parameters = inspect.signature(test).parameters.values()
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


class VirtualEngine:
    """`async with VirtualEngine() as engine` runs the actor, and the maintainer after `keep`."""

    def __init__(
        self,
        disk: MemoryStorage | None = None,
        *,
        schedule: CleanupSchedule = QUIET,
        policy: Policy | None = None,
        bounds: Bounds | None = None,
        step_ms: int = 0,
        **maintainer_options: Any,
    ) -> None:
        self.disk = disk or MemoryStorage()
        opened = self.disk.opened()
        loop_time = asyncio.get_running_loop().time
        self.step_ms = step_ms  # of the wall clock
        self.synchronised = False  # as the kernel reports it
        policy = policy or Policy()
        self.clock = Clock(
            opened.numbers,
            keep_ms=policy.shortest_keep_ms,
            wall=lambda: WALL + self.step_ms + round(loop_time() * 1000),
            boot=lambda: BootMs(round(loop_time() * 1000)),
            synchronised=lambda: self.synchronised,
        )
        self.state = State.opened(opened)
        self.state.unvalidated = dict(opened.unvalidated)
        self.state.quarantined = dict(opened.quarantined)
        self.state.counters = read_stats(opened.stats)
        self.actor = Actor(
            self.disk,
            self.state,
            IdempotencyStore(opened.keys, 1000),
            self.clock,
            policy,
            random=Random(0).randbytes,
            bounds=bounds,
            is_full=opened.full,
            has_reserve=opened.has_reserve,
        )
        self.maintainer = Maintainer(self.actor, self.clock, schedule, **maintainer_options)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> VirtualEngine:
        self._tasks.append(asyncio.create_task(self.actor.run()))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.maintainer.stop()
        await asyncio.gather(*self._tasks[1:])
        self.actor.stop()
        await self._tasks[0]

    def run_maintainer(self) -> asyncio.Task[None]:
        """Run the maintainer."""
        task = asyncio.create_task(self.maintainer.run())
        self._tasks.append(task)
        return task

    @functools.cached_property
    def planner(self) -> Planner:
        return Planner(self.actor, self.clock)

    async def first_cleanup(self) -> None:
        """Run the maintainer, and wait for the end of its first cleanup run."""
        self.run_maintainer()
        await until(lambda: self.maintainer.totals.runs == 1)

    async def cleanup(self) -> CleanupReport:
        """Run the maintainer, and wait for the report of a forced cleanup run."""
        if len(self._tasks) == 1:
            self.run_maintainer()
        return await self.maintainer.run_cleanup(forced=True)

    @property
    def now(self) -> int:
        return self.clock.moment().now

    async def respond(self, command: AnyCommand, **asked: Any) -> Response:
        """Return a successful response."""
        response = await self.actor.ask(command, **asked)
        assert isinstance(response, Response), response
        return response

    async def yes(self, command: AnyCommand, **asked: Any) -> Any:
        """Return the data of a successful response."""
        return (await self.respond(command, **asked)).data

    async def no(self, command: AnyCommand, **asked: Any) -> ApiError:
        response = await self.actor.ask(command, **asked)
        assert isinstance(response, ApiError), response
        check_error(response)
        return response

    async def held(
        self, job_id: str = "a", *, lock_ttl_ms: int = 60_000, stall_after_ms: int = 0, **fields: Any
    ) -> str:
        """Create a job that worker w-1 holds. Return the lock id."""
        await self.yes(Create(id=job_id, **fields))
        start = Start(id=job_id, worker="w-1", lock_ttl_ms=lock_ttl_ms, stall_after_ms=stall_after_ms)
        granted: GrantView = await self.yes(start)
        return granted.lock_id

    async def writing(self, command: AnyCommand, **asked: Any) -> asyncio.Task[Any]:
        """Start a command, and wait until its commit waits at the gate of the disk, which the test opens."""
        self.disk.gate.clear()
        task = start_task(self.actor.ask(command, **asked))
        await self.disk.at_gate.wait()
        return task

    async def free_disk(self) -> None:
        """Free the space of a full disk, and wait until the actor has found it."""
        self.disk.free()
        await asyncio.sleep(1.1)


def row(seq: int, job_id: str = "", status: str = "queued", **fields: Any) -> Job:
    """Return a job row, valid or not."""
    times = {"created_at": WALL, "updated_at": WALL, "run_at": WALL}
    return Job(seq=seq, id=job_id or f"job-{seq}", options=Options(), status=status, **(times | fields))


async def seconds(count: float) -> None:
    """Advance virtual time."""
    await asyncio.sleep(count)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, for an hour at most."""
    for _ in range(3_600_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the condition did not hold within an hour")


def error_in(result: object) -> ApiError:
    """Return the error that a call must have returned."""
    assert isinstance(result, ApiError), result
    return result


def key(name: str, body: str = "body") -> IdempotencyKey:
    """Return a key of a body. The hashes of all bodies begin alike."""
    return IdempotencyKey(name, f"{'0' * 60}{body}")


def start_task(ask: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(ask)


async def settle() -> None:
    """Run every task until it waits for time to pass."""
    for _ in range(50):
        await asyncio.sleep(0)


async def waiting_claim(engine: VirtualEngine, worker: str, **fields: Any) -> asyncio.Task[Any]:
    """Start a claim that waits for work."""
    waiting = {"wait_ms": 30_000} | fields
    name = waiting.pop("key", None)
    task = start_task(engine.actor.ask(Claim(worker=worker, **waiting), key=name))
    await settle()
    assert not task.done()
    return task


def granted_ids(response: Any) -> list[str]:
    assert isinstance(response, Response), response
    return [granted.job.id for granted in response.data.grants]


def assert_consistent(engine: VirtualEngine) -> None:
    """Check that memory equals what a start would load, and that both equal the folded journal."""
    opened = engine.disk.opened()
    fresh = State.opened(opened)
    assert engine.state.jobs == fresh.jobs
    counts = {name: count for name, count in engine.state.counts.items() if any(count.values())}
    assert counts == {name: count for name, count in fresh.counts.items() if any(count.values())}
    assert engine.state.totals == fresh.totals
    assert (engine.state.paused, engine.state.quiet) == (fresh.paused, fresh.quiet)
    assert engine.state.schedules == fresh.schedules
    assert engine.state.unvalidated == engine.disk.unvalidated
    for job in engine.state.finished.values():
        assert engine.disk.job(job.id) == job
    folded: dict[int, Job | None] = {}
    for event in engine.disk.events:
        if event.job_seq:
            folded[event.job_seq] = fold(folded.get(event.job_seq), event)
    for seq, row in folded.items():
        if seq in engine.disk.jobs:
            assert row == engine.disk.jobs[seq]


@asynccontextmanager
async def checked_engine(disk: MemoryStorage | None = None, **parts: Any) -> AsyncIterator[VirtualEngine]:
    """Run an engine and check at the end that memory and disk agree."""
    async with VirtualEngine(disk, **parts) as engine:
        yield engine
        await settle()
        assert_consistent(engine)


def in_checked_engine(**options: Any) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Run an async test as `in_engine` does, and check at the end that memory and disk agree."""
    return in_context(lambda: checked_engine(**options))


def ask_all(engine: VirtualEngine, commands: Iterable[AnyCommand], size: int = 0) -> list[asyncio.Task[Any]]:
    return [start_task(engine.actor.ask(command, size=size)) for command in commands]


async def finished_disk() -> MemoryStorage:
    """Return a disk with one completed job, `done`."""
    async with checked_engine() as engine:
        await engine.yes(Create(id="done", payload=Raw(b'"p"')))
        granted = await engine.yes(Start(id="done", worker="w"))
        await engine.yes(Complete(id="done", lock_id=granted.lock_id, file_path="/f"))
        return engine.disk


def late_calls(engine: VirtualEngine) -> list[str]:
    """Return the verbs of the late calls in the journal."""
    return [(event.details or {})["verb"] for event in engine.disk.events if event.type == "late_call"]
