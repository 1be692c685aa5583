"""Commands are rejected while clients have not read too many bytes of their responses."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import Raw

from jobd.engine.actor import Bounds
from jobd.engine.unread_responses import UnreadResponses
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.responses import Response
from jobd.model.storage import DiskFull, JobQuery, JobRows
from tests.support import virtual_engine

MIB = 1 << 20
LIMIT = Bounds(response_bytes=5 * MIB)


class SlowReader:
    """A waiter whose response stays unread."""

    def __init__(self, engine: virtual_engine.VirtualEngine, command: cmd.AnyCommand, **asked: Any) -> None:
        self._unread = engine.actor.unread
        self.response: Response | ApiError | None = None
        engine.actor.send(command, self, **asked)

    def done(self) -> bool:
        return self.response is not None

    def cancelled(self) -> bool:
        return False

    def set_result(self, response: Response | ApiError, /) -> None:
        self.response = response
        if isinstance(response, Response):
            self._unread.add(response.large_bytes)

    @property
    def outcome(self) -> str:
        assert self.response is not None
        return self.response.code if isinstance(self.response, ApiError) else "ok"


async def create(engine: virtual_engine.VirtualEngine, *sizes: int) -> None:
    for number, size in enumerate(sizes, 1):
        await engine.yes(cmd.Create(id=f"job-{number}", payload=Raw(b"1" * size)))


def test_there_is_room_again_below_the_limit() -> None:
    told: list[int] = []
    responses = UnreadResponses(10, lambda: told.append(responses.bytes))
    responses.add(4)
    responses.remove(3)
    assert not responses.is_full
    responses.add(9)
    responses.add(5)
    assert responses.is_full
    responses.remove(5)
    assert responses.is_full
    responses.remove(1)
    assert (responses.is_full, told) == (False, [9])


@virtual_engine.in_checked_engine(bounds=LIMIT)
async def test_beyond_the_limit_only_holders_and_operators_are_served(engine: virtual_engine.VirtualEngine) -> None:
    lock_id = await engine.held()
    engine.actor.unread.add(LIMIT.response_bytes)
    for command in (
        cmd.Create(),
        cmd.Import(id="i"),
        cmd.Claim(worker="w"),
        cmd.Start(id="a", worker="w"),
        cmd.ListJobs(),
    ):
        rejected = await engine.no(command)
        assert rejected.code == "overloaded"
        assert f"not read {5 * MIB} bytes" in rejected.message
        assert "limits.response_bytes" in rejected.message
    await engine.yes(cmd.Progress(id="a", lock_id=lock_id, progress=1))
    await engine.yes(cmd.Ping())
    await engine.yes(cmd.Complete(id="a", lock_id=lock_id, file_path="/f"))
    engine.actor.unread.remove(1)
    assert (await engine.yes(cmd.Get(id="a"))).status == "completed"


@virtual_engine.in_checked_engine(bounds=LIMIT)
async def test_claims_that_arrive_together_are_checked_when_they_are_decided(
    engine: virtual_engine.VirtualEngine,
) -> None:
    await create(engine, *[4 * MIB] * 6)
    claims = [SlowReader(engine, cmd.Claim(worker="w", limit=2)) for _ in range(3)]
    await virtual_engine.settle()
    assert [claim.outcome for claim in claims] == ["ok", "overloaded", "overloaded"]
    assert [job.status for job in engine.disk.jobs.values()] == ["processing"] * 2 + ["queued"] * 4


@virtual_engine.in_checked_engine(bounds=LIMIT)
async def test_repeats_of_a_claim_that_arrive_together_are_checked_too(engine: virtual_engine.VirtualEngine) -> None:
    await create(engine, 5 * MIB)
    await engine.yes(cmd.Claim(worker="w"), key=virtual_engine.key("k"))
    repeats = [SlowReader(engine, cmd.Claim(worker="w"), key=virtual_engine.key("k")) for _ in range(4)]
    await virtual_engine.settle()
    assert [repeat.outcome for repeat in repeats] == ["ok", "ok", "overloaded", "overloaded"]


@virtual_engine.in_checked_engine(bounds=LIMIT)
async def test_a_large_ending_is_repeated_only_below_the_limit(engine: virtual_engine.VirtualEngine) -> None:
    ending = cmd.Complete(id="a", lock_id=await engine.held(payload=Raw(b"1" * (5 * MIB))), file_path="/f")
    engine.actor.unread.add(LIMIT.response_bytes)
    await engine.yes(ending)
    engine.actor.unread.remove(LIMIT.response_bytes)
    repeats = [SlowReader(engine, ending) for _ in range(4)]
    await virtual_engine.settle()
    assert [repeat.outcome for repeat in repeats] == ["ok", "ok", "overloaded", "overloaded"]


@virtual_engine.in_virtual_time
async def test_the_responses_of_a_batch_are_bounded() -> None:
    for large_metadata in (False, True):
        async with virtual_engine.checked_engine(bounds=LIMIT) as engine:
            await create(engine, *[1 if large_metadata else 5 * MIB] * 5)
            for number in range(1, 6):
                lock_id = (await engine.yes(cmd.Start(id=f"job-{number}", worker="w"))).lock_id
                metadata = Raw(b"1" * (5 * MIB)) if large_metadata else None
                await engine.yes(cmd.Complete(id=f"job-{number}", lock_id=lock_id, file_path="/f", metadata=metadata))
            reads = [SlowReader(engine, cmd.Get(id=f"job-{number}")) for number in range(1, 6)]
            await virtual_engine.settle()
            assert [read.outcome for read in reads] == ["ok", "ok", "overloaded", "overloaded", "overloaded"]


@virtual_engine.in_checked_engine()
async def test_commands_after_a_large_response_keep_their_order(engine: virtual_engine.VirtualEngine) -> None:
    """Also if the disk is full for a moment. The batch with the large response ends before the other commands."""
    await create(engine, 9 * MIB)
    engine.disk.write_errors.append(DiskFull("once"))
    tasks = virtual_engine.ask_all(engine, [cmd.Claim(worker="w"), *(cmd.Pause(name=name) for name in "bcd")], size=7)
    claimed, *_ = await asyncio.gather(*tasks)
    assert virtual_engine.granted_ids(claimed) == ["job-1"]
    assert [event.queue for event in engine.disk.events] == ["default", "default", "b", "c", "d"]
    assert [len(batch.changes) for batch in engine.disk.batches] == [1, 1, 3]
    assert engine.actor._bytes == 0


@virtual_engine.in_checked_engine(bounds=LIMIT)
async def test_a_waiting_claim_is_served_once_there_is_room(engine: virtual_engine.VirtualEngine) -> None:
    lock_id = await engine.held(payload=Raw(b"1" * (9 * MIB)))
    waiting = await virtual_engine.waiting_claim(engine, "w-2")
    engine.actor.unread.add(LIMIT.response_bytes)
    await engine.yes(cmd.Release(id="a", lock_id=lock_id))
    await virtual_engine.settle()
    assert not waiting.done()
    paused = engine.actor.enqueue_internal(cmd.Pause(name="q"))  # the next batch has no room for it
    engine.actor.unread.remove(1)
    assert virtual_engine.granted_ids(await waiting) == ["a"]
    assert isinstance(await paused, Response)
    await virtual_engine.settle()
    assert engine.actor.batch_commands.total == 5  # create, start, release, claim and pause


@virtual_engine.in_checked_engine()
async def test_waiting_claims_with_large_payloads_are_served_in_several_batches(
    engine: virtual_engine.VirtualEngine,
) -> None:
    waiting = [await virtual_engine.waiting_claim(engine, f"w-{number}") for number in range(3)]
    jobs = [cmd.Create(id=name, payload=Raw(b"1" * (9 * MIB))) for name in "abc"]
    await engine.yes(cmd.Bulk(jobs=jobs))
    assert [virtual_engine.granted_ids(await task) for task in waiting] == [["a"], ["b"], ["c"]]
    assert [len(batch.changes) for batch in engine.disk.batches] == [4, 1, 1]


@virtual_engine.in_checked_engine(bounds=LIMIT)
async def test_a_page_that_was_read_meanwhile_is_not_sent(engine: virtual_engine.VirtualEngine) -> None:
    find = engine.disk.find_jobs

    async def find_slowly(query: JobQuery) -> JobRows:
        engine.actor.unread.add(LIMIT.response_bytes)
        return await find(query)

    engine.disk.find_jobs = find_slowly  # type: ignore[method-assign]
    assert (await engine.no(cmd.ListJobs())).code == "overloaded"
