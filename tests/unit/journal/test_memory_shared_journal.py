"""How the shared journal in memory fails on demand."""

from __future__ import annotations

import asyncio

import pytest

from jobd.model.journal import Fenced, JournalOutcomeUnknown, JournalUnavailable, Record
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.unit.journal.test_shared_journals import lead, record_of


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


async def unknown(call: str) -> None:
    if call == "append":
        raise JournalOutcomeUnknown


async def nothing(call: str) -> None:
    return None


async def test_a_record_with_an_unknown_outcome_is_left_out_or_in(server: MemoryServer) -> None:
    a = MemorySharedJournal(server)
    await lead(a)
    a.before = unknown
    with pytest.raises(JournalOutcomeUnknown):
        await a.append(record_of(1, 100), 0)
    assert (await a.resolve(0)).number == 0
    a.before, a.after = nothing, unknown
    with pytest.raises(JournalOutcomeUnknown):
        await a.append(record_of(1, 101), 0)
    assert (await a.resolve(0)).number == 1


async def test_a_record_is_visible_before_it_is_durable(server: MemoryServer) -> None:
    a, b = MemorySharedJournal(server), MemorySharedJournal(server)
    await lead(a)
    is_visible, go_on = asyncio.Event(), asyncio.Event()

    async def wait(call: str) -> None:
        if call == "append":
            is_visible.set()
            await go_on.wait()

    a.after = wait
    appending = asyncio.create_task(a.append(record_of(1, 100), 0))
    await is_visible.wait()
    assert len(await b.read(0, 10)) == 1
    assert server.durable.number == 0
    go_on.set()
    await appending
    assert server.durable.number == 1


async def test_a_failover_loses_what_is_not_durable(server: MemoryServer) -> None:
    a = MemorySharedJournal(server)
    await lead(a)
    await a.append(record_of(1, 100), 0)

    async def fail_over(call: str) -> None:
        if call == "append":
            server.fail_over()

    a.after = fail_over
    with pytest.raises(JournalOutcomeUnknown):
        await a.append(record_of(2, 100), 1)
    a.after = nothing
    head = await a.head()
    assert (head.number, head.is_connected) == (1, False)
    assert [each.number for each in await a.read(0, 10)] == [1]
    assert (await a.resolve(0)).number == 1


async def test_a_partition_ends_calls_and_the_session(server: MemoryServer) -> None:
    a, b = MemorySharedJournal(server), MemorySharedJournal(server)
    await lead(a)

    async def part(call: str) -> None:
        a.is_reachable = False

    a.before = part
    with pytest.raises(JournalOutcomeUnknown):
        await a.append(record_of(1, 100), 0)
    with pytest.raises(JournalUnavailable):
        await a.append(record_of(1, 100), 0)
    assert not (await b.head()).is_connected
    await lead(b, "b")
    a.before, a.is_reachable = nothing, True
    with pytest.raises(Fenced):
        await a.append(record_of(1, 100), 0)
    assert a.is_reachable

    async def cut(call: str) -> None:
        b.is_reachable = False

    b.before = cut
    with pytest.raises(JournalUnavailable):
        await b.read(0, 10)
    b.before, b.is_reachable, b.after = nothing, True, cut
    with pytest.raises(JournalUnavailable):
        await b.read(0, 10)


async def test_a_cancelled_append_is_not_undone(server: MemoryServer) -> None:
    a = MemorySharedJournal(server)
    await lead(a)
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait(call: str) -> None:
        started.set()
        await go_on.wait()

    a.before = wait
    appending = asyncio.create_task(a.append(record_of(1, 100), 0))
    await started.wait()
    appending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await appending
    a.before = nothing
    go_on.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert server.records == [Record(1, 10, 13, 100, 1_001, b"\x01body")]
