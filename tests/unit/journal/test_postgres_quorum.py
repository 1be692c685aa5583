"""The journal in PostgreSQL with quorum commit, and on a server that restarts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from jobd.journal.postgres import leader_session, session
from jobd.journal.postgres.journal import PostgresJournal, create
from jobd.model.journal import JournalOutcomeUnknown, JournalUnavailable, NodeEntry
from tests.conftest import tool_missing
from tests.support import postgres
from tests.support.polling import wait_until
from tests.support.postgres import PostgresMissing, PostgresServer
from tests.unit.journal.test_shared_journals import lead, record_of

pytestmark = [pytest.mark.slow, pytest.mark.long]

LEASE_MS = 3000


@pytest.fixture
def servers() -> Iterator[list[PostgresServer]]:
    """Run a primary and a standby."""
    try:
        postgres.programs()
    except PostgresMissing:
        tool_missing("postgres", "postgresql")
    with postgres.postgres_cluster() as started:
        yield started


@pytest.fixture
async def nodes(servers: list[PostgresServer]) -> AsyncIterator[tuple[PostgresJournal, PostgresJournal]]:
    """Open two nodes that know both servers. The default of the role suppresses warnings."""
    servers[0].sql("ALTER ROLE postgres SET client_min_messages = 'error'")
    ports = [server.port for server in servers]
    url = servers[0].url().replace(f":{ports[0]}/", f":{ports[0]},127.0.0.1:{ports[1]}/")
    await create(url, "main", "id")
    made = (await PostgresJournal.open(url, "main", LEASE_MS), await PostgresJournal.open(url, "main", LEASE_MS))
    yield made
    for each in made:
        await each.close()


async def is_waiting(node: PostgresJournal) -> bool:
    return (await node.health()).is_waiting


async def searched(node: PostgresJournal) -> asyncio.Task[None]:
    """Return the latest search for hosts that accept writes, after its end."""
    await node.health()
    assert node._search is not None
    await node._search
    return node._search


async def test_an_append_waits_for_a_standby(
    servers: list[PostgresServer], nodes: tuple[PostgresJournal, PostgresJournal]
) -> None:
    a, b = nodes
    await lead(a)
    await a.append(record_of(1, 100), 0)
    health = await b.health()
    assert (health.is_synchronous, health.is_waiting) == (True, False)
    await asyncio.to_thread(servers[1].stop)
    appending = asyncio.create_task(a.append(record_of(2, 100), 1))
    await wait_until(lambda: is_waiting(b))
    assert not appending.done()
    await b.register(NodeEntry("b", "p", "", 1, "", 1))
    assert [node.name for node in await b.nodes()] == ["b"]
    assert [each.number for each in await b.read(0, 10)] == [1]
    taking = asyncio.create_task(b.take_over(await b.head(), holder="b", url="", epoch=0))
    await asyncio.to_thread(servers[1].start)
    await appending
    assert await taking is None
    assert [each.number for each in await b.read(0, 10)] == [1, 2]


async def test_the_server_with_the_highest_timeline_is_used(
    servers: list[PostgresServer], nodes: tuple[PostgresJournal, PostgresJournal]
) -> None:
    """A former primary that runs again, or still runs, accepts writes as well."""
    a, b = nodes
    former, promoted = servers
    await lead(a)
    await a.append(record_of(1, 100), 0)
    assert (await b.health()).timeline == 1
    assert await searched(b) is not await searched(b), "a look at the health asks all hosts"
    await asyncio.to_thread(promoted.promote)

    async def has_left() -> bool:
        health = await b.health()
        return (
            health.timeline,
            [str(each.port) in host for each, host in zip((promoted, former), health.writable, strict=False)],
        ) == (2, [True, True])

    await wait_until(has_left)
    kept: list[int] = []

    async def keep(timeline: int) -> None:
        kept.append(timeline)

    await lead(b, "b")
    await b.append(record_of(2, (await b.head()).epoch), 1)
    ports = [server.port for server in servers]
    url = former.url().replace(f":{ports[0]}/", f":{ports[0]},127.0.0.1:{ports[1]}/")
    node = await PostgresJournal.open(url, "main", LEASE_MS)
    node.on_timeline = keep
    assert ((await node.head()).number, (await node.health()).timeline, kept) == (2, 2, [2])
    assert await node.records() == {f"127.0.0.1:{ports[0]}": 1, f"127.0.0.1:{ports[1]}": 2}
    await asyncio.to_thread(promoted.stop)
    assert list((await node.records()).values()) == [1, None]
    await node.close()
    with pytest.raises(JournalUnavailable, match="has timeline 1, but this node has seen timeline 2") as caught:
        await PostgresJournal.open(url, "main", LEASE_MS, 2)
    assert caught.value.exit_code == 75
    later = PostgresJournal.later(url, "main", LEASE_MS, "id", 2)
    with pytest.raises(JournalUnavailable, match="timeline 1"):
        await later.head()
    await asyncio.to_thread(promoted.start)
    assert (await later.head()).number == 2
    await later.close()


async def test_a_missing_standby_is_named_before_a_journal_is_created(
    servers: list[PostgresServer], nodes: tuple[PostgresJournal, PostgresJournal], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = nodes
    await a.check_commit()
    await asyncio.to_thread(servers[1].stop)
    monkeypatch.setattr(session, "COMMIT_S", 0.5)
    with pytest.raises(JournalUnavailable, match="A write waits for a synchronous standby of PostgreSQL: start one"):
        await a.check_commit()
    with pytest.raises(JournalUnavailable, match="A write waits for a synchronous standby of PostgreSQL: start one"):
        await create(servers[0].url(), "other", "id")
    assert not (await a.health()).is_waiting, "the session has ended"
    await asyncio.to_thread(servers[1].start)
    await a.check_commit()


async def test_a_cancelled_wait_for_a_standby_is_not_an_acknowledgement(
    servers: list[PostgresServer], nodes: tuple[PostgresJournal, PostgresJournal]
) -> None:
    """PostgreSQL reports the success of a statement whose wait an operator has cancelled, and a warning."""
    a, b = nodes
    await lead(a)
    await a.append(record_of(1, 100), 0)
    await asyncio.to_thread(servers[1].stop)
    appending = asyncio.create_task(a.append(record_of(2, 100), 1))
    await wait_until(lambda: is_waiting(b))
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    await asyncio.to_thread(servers[0].sql, cancel)
    with pytest.raises(JournalOutcomeUnknown):
        await appending
    assert [each.number for each in await b.read(0, 10)] == [1, 2]  # visible, and not acknowledged
    assert (await b.head()).acked == 1
    await asyncio.to_thread(servers[1].start)
    head = await a.resolve(0)
    assert (head.number, head.epoch) == (2, 101)


async def test_attempts_to_take_the_leadership_without_a_standby_leave_no_sessions(
    servers: list[PostgresServer], nodes: tuple[PostgresJournal, PostgresJournal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement that waits for a lock ends after its connection. One that waits for a standby does not."""
    monkeypatch.setattr(leader_session, "TAKE_OVER_S", 0.1)
    a, _ = nodes
    b = await PostgresJournal.open(servers[0].url(), "main", 100)
    await lead(a)
    await asyncio.to_thread(servers[1].stop)
    appending = asyncio.create_task(a.append(record_of(1, 100), 0))
    await wait_until(lambda: is_waiting(b))
    appending.cancel()
    await a.close()
    head = await b.head()
    for _ in range(20):
        with pytest.raises(JournalOutcomeUnknown):
            await b.take_over(head, holder="b", url="", epoch=0)

    async def waits() -> list[str]:
        running = (
            "SELECT wait_event_type FROM pg_stat_activity WHERE state = 'active' AND application_name = 'jobd main'"
        )
        return (await asyncio.to_thread(servers[0].sql, f"{running} AND wait_event_type IS NOT NULL")).split()

    async def has_ended() -> bool:
        return "Lock" not in await waits()

    await wait_until(has_ended)
    assert await waits() == ["IPC"]
    assert await b.read(0, 10) == []
    await asyncio.to_thread(servers[1].start)
    await wait_until(lambda: has_record(b, 1))
    assert (await lead(b, "b")).number == 1
    await b.close()


async def has_record(node: PostgresJournal, number: int) -> bool:
    return (await node.head()).number == number


async def test_acknowledged_records_survive_the_loss_of_the_primary(
    servers: list[PostgresServer], nodes: tuple[PostgresJournal, PostgresJournal]
) -> None:
    a, b = nodes
    await lead(a)
    for number in range(1, 51):
        await a.append(record_of(number, 100), number - 1)
    before = await b.health()
    await asyncio.to_thread(servers[0].kill)
    with pytest.raises((JournalOutcomeUnknown, JournalUnavailable)):
        await a.append(record_of(51, 100), 50)
    with pytest.raises(JournalUnavailable, match=r"cannot be reached|accepts no writes|ended the connection"):
        await b.head()
    await asyncio.to_thread(servers[1].promote)
    head = await b.head()
    assert (head.number >= 50, head.is_connected) == (True, False)
    health = await b.health()
    assert (before.is_synchronous, health.is_synchronous) == (True, False)
    assert health.timeline > before.timeline > 0
    head = await a.resolve(0)
    await a.append(record_of(head.number + 1, head.epoch), head.number)
    assert [each.number for each in await b.read(0, 100)] == list(range(1, head.number + 2))


async def test_a_server_that_restarts_is_used_again() -> None:
    with postgres.postgres() as server:
        await create(server.url(), "main", "id")
        node = await PostgresJournal.open(server.url(), "main", LEASE_MS)
        await lead(node)
        await node.append(record_of(1, 100), 0)
        await asyncio.to_thread(server.stop, signal.SIGQUIT)
        with pytest.raises(JournalUnavailable):
            await node.head()
        with pytest.raises((JournalOutcomeUnknown, JournalUnavailable)):
            await node.renew(1)
        await asyncio.to_thread(server.start)
        await node.renew(1)
        await node.append(record_of(2, 100), 1)
        assert (await node.head()).is_connected
        assert [each.number for each in await node.read(0, 10)] == [1, 2]
        await node.close()
