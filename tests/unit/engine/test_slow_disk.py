"""The actor on a slow disk: full batches and early reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from jobd.engine.actor import BATCH_WEIGHT, DiskBroken
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.responses import Response
from jobd.model.storage import Batch, JobQuery, JobRows
from tests.support import virtual_engine
from tests.support.memory_storage import MemoryStorage

COMMIT_S = 0.02


class SlowStorage(MemoryStorage):
    """Each commit takes 20 ms in the thread that also reads pages. `written`: the number of changes in each."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = asyncio.Lock()

    async def write(self, batch: Batch) -> dict[int, bytes]:
        async with self._thread:
            await asyncio.sleep(COMMIT_S)
            return await super().write(batch)

    async def find_jobs(self, query: JobQuery) -> JobRows:
        async with self._thread:
            return await super().find_jobs(query)

    @property
    def written(self) -> list[int]:
        return [len(batch.changes) for batch in self.batches]


in_slow_engine = virtual_engine.in_context(lambda: virtual_engine.checked_engine(SlowStorage()))


@pytest.mark.parametrize(("waiting", "written"), [(1, [3, 4]), (2, [3, 2, 3])])
@virtual_engine.in_virtual_time
async def test_few_waiting_commands_join_the_next_commit(waiting: int, written: list[int]) -> None:
    """Clients that got a response send their next command at once; with them the commit holds more."""
    disk = SlowStorage()
    async with virtual_engine.checked_engine(disk) as engine:

        async def create(times: int) -> None:
            for _ in range(times):
                await engine.yes(cmd.Create())

        first = [virtual_engine.start_task(create(2)) for _ in range(3)]
        await asyncio.sleep(COMMIT_S / 2)
        await asyncio.gather(*first, *(virtual_engine.start_task(create(1)) for _ in range(waiting)))
        assert disk.written == written


class CountingResponder:
    """Notes how many batches are committed when it gets a response."""

    def __init__(self, disk: MemoryStorage) -> None:
        self._disk = disk
        self.committed: list[int] = []

    def done(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def set_result(self, answer: Response | ApiError) -> None:
        self.committed.append(len(self._disk.batches))


class BusyStorage(MemoryStorage):
    """More work arrives during the first write."""

    at_first_write: Callable[[], object]

    async def write(self, batch: Batch) -> dict[int, bytes]:
        if not self.batches:
            self.at_first_write()
        return await super().write(batch)


@pytest.mark.parametrize("inline", [True, False])
@virtual_engine.in_virtual_time
async def test_responses_do_not_wait_for_the_next_inline_commit(inline: bool) -> None:
    """They could not leave while it blocks the event loop. A commit in the thread runs beside them."""
    disk = BusyStorage()
    disk.commits_inline = inline
    async with virtual_engine.checked_engine(disk) as engine:
        waiter = CountingResponder(disk)
        disk.at_first_write = lambda: engine.actor.send(cmd.Create(), waiter)
        engine.actor.send(cmd.Create(), waiter)
        sent: list[bool] = []
        turn = engine.actor._turn

        async def note(*args: Any, **kwargs: Any) -> None:
            sent.append(bool(waiter.committed))
            await turn(*args, **kwargs)

        engine.actor._turn = note  # type: ignore[method-assign]
        await virtual_engine.settle()
        assert waiter.committed == [1, 2]
        assert sent == [False, inline], "before the second batch is decided"


@virtual_engine.in_virtual_time
async def test_a_full_mailbox_with_inline_commits_leaves_the_event_loop_to_others() -> None:
    disk = MemoryStorage()
    disk.commits_inline = True
    async with virtual_engine.checked_engine(disk) as engine:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += bool(disk.batches)

        other = virtual_engine.start_task(others())
        last = virtual_engine.ask_all(engine, [cmd.Create()] * (3 * BATCH_WEIGHT + 1))[-1]
        await last
        other.cancel()
        assert len(disk.batches) == 4
        assert turns >= 3


class BusyEngine:
    """A commit is in progress; a cancel of job "a" waits behind it, and then the command under test."""

    def __init__(self, engine: virtual_engine.VirtualEngine) -> None:
        self.engine = engine
        self.began_s = 0.0
        self.behind: asyncio.Task[Any]

    async def begin(self) -> None:
        await self.engine.actor.ask(cmd.Create(id="a"))
        self.began_s = asyncio.get_running_loop().time()
        virtual_engine.start_task(self.engine.actor.ask(cmd.Create(id="b")))
        await virtual_engine.settle()
        self.behind = virtual_engine.start_task(self.engine.actor.ask(cmd.Cancel(id="a")))
        await virtual_engine.settle()

    async def ask(self, command: cmd.AnyCommand) -> tuple[Any, int]:
        """Return the response and the number of commits until it came."""
        answer = await self.engine.actor.ask(command)
        return answer, round((asyncio.get_running_loop().time() - self.began_s) / COMMIT_S)


@pytest.mark.parametrize(
    "read", [cmd.Get(id="a"), cmd.GetVersion(id="a"), cmd.ListJobs(), cmd.Stats(), cmd.Why(id="a"), cmd.Get(id="none")]
)
@in_slow_engine
async def test_on_a_slow_disk_a_read_waits_for_one_commit(
    engine: virtual_engine.VirtualEngine, read: cmd.AnyCommand
) -> None:
    busy = BusyEngine(engine)
    await busy.begin()
    answer, commits = await busy.ask(read)
    assert commits == 1
    assert not busy.behind.done()
    if read == cmd.Get(id="a"):
        assert answer.data.status == "queued"
    if isinstance(read, cmd.Why):
        assert answer.data.state == "queued"
    assert (await busy.behind).data.status == "cancelled"


@in_slow_engine
async def test_on_a_slow_disk_a_ping_waits_as_long_as_a_write(engine: virtual_engine.VirtualEngine) -> None:
    busy = BusyEngine(engine)
    await busy.begin()
    assert (await busy.ask(cmd.Ping()))[1] == 2, "health measures how long a command takes"


@virtual_engine.in_checked_engine()
async def test_on_a_fast_disk_a_batch_is_decided_in_order(engine: virtual_engine.VirtualEngine) -> None:
    await engine.actor.ask(cmd.Create(id="a"))
    cancelling = virtual_engine.start_task(engine.actor.ask(cmd.Cancel(id="a")))
    looking = virtual_engine.start_task(engine.actor.ask(cmd.Get(id="a")))
    assert (await looking).data.status == "cancelled"
    await cancelling


@in_slow_engine
async def test_an_ordered_read_stays_behind_earlier_commands(engine: virtual_engine.VirtualEngine) -> None:
    await engine.actor.ask(cmd.Create(id="a"))
    futures: list[asyncio.Future[Any]] = [asyncio.get_running_loop().create_future() for _ in range(2)]
    engine.actor.send(cmd.Cancel(id="a"), futures[0], ordered=True)
    engine.actor.send(cmd.Get(id="a"), futures[1], ordered=True)
    assert (await futures[1]).data.status == "cancelled"


@in_slow_engine
async def test_a_read_does_not_overtake_internal_commands(engine: virtual_engine.VirtualEngine) -> None:
    await engine.actor.ask(cmd.Create(id="a", stall_after_ms=0))
    await engine.actor.ask(cmd.Start(id="a", worker="w", lock_ttl_ms=1_000))
    await asyncio.sleep(10)
    engine.actor.enqueue_internal(cmd.ExtendAfterPause(ids=["a"], grace_ms=30_000))
    stats = await engine.respond(cmd.Stats())
    assert stats.data.stuck_jobs == 0


@in_slow_engine
async def test_a_read_does_not_wait_for_grants_to_waiting_claims(engine: virtual_engine.VirtualEngine) -> None:
    await engine.actor.ask(cmd.Create(id="late", queue="q", delay_ms=1_000))
    claim = await virtual_engine.waiting_claim(engine, "w", queues=["q"])
    await asyncio.sleep(0.95)
    busy = BusyEngine(engine)
    await busy.begin()  # the job becomes due during this write
    answer, commits = await busy.ask(cmd.Get(id="late"))
    assert (answer.data.status, commits) == ("queued", 1)
    assert virtual_engine.granted_ids(await claim) == ["late"]


@virtual_engine.in_virtual_time
async def test_a_read_is_answered_even_if_the_next_commit_fails() -> None:
    disk = SlowStorage()
    engine = virtual_engine.VirtualEngine(disk)
    running = asyncio.create_task(engine.actor.run())
    await engine.actor.ask(cmd.Create(id="a"))
    disk.write_errors.append(OSError("gone"))
    cancelling = virtual_engine.start_task(engine.actor.ask(cmd.Cancel(id="a")))
    looking = virtual_engine.start_task(engine.actor.ask(cmd.Get(id="a")))
    assert (await looking).data.status == "queued"
    assert (await cancelling).code == "outcome_unknown"
    with pytest.raises(DiskBroken):
        await running


@in_slow_engine
async def test_a_full_disk_after_an_early_read_is_handled_as_usual(engine: virtual_engine.VirtualEngine) -> None:
    await engine.actor.ask(cmd.Create(id="a"))
    engine.disk.fill_nearly()
    creating = virtual_engine.start_task(engine.actor.ask(cmd.Create(id="b")))
    looking = virtual_engine.start_task(engine.actor.ask(cmd.Get(id="a")))
    assert (await looking).data.status == "queued"
    assert (await creating).code == "storage_full"
    engine.disk.free()


@virtual_engine.in_virtual_time
async def test_a_bug_in_a_callback_ends_the_actor_after_all_responses() -> None:
    engine = virtual_engine.VirtualEngine(SlowStorage())
    running = virtual_engine.start_task(engine.actor.run())

    def fail(_: object) -> None:
        raise LookupError("a bug")

    engine.actor.on_commit.append(fail)
    asked = []
    for _ in range(3):  # the responses of each batch are sent while the next one is written
        asked += virtual_engine.ask_all(engine, [cmd.Create()])
        await asyncio.sleep(COMMIT_S * 0.7)
    with pytest.raises(DiskBroken, match="a bug"):
        await running
    assert [type(await each) for each in asked] == [Response, Response, ApiError]
