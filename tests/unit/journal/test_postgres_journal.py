"""The journal in PostgreSQL when something fails: lost responses, damage, a full disk, partitions."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import asyncpg
import pytest

from jobd.journal.postgres import journal as postgres_journal
from jobd.journal.postgres import leader_session, partitions, session
from jobd.journal.postgres.journal import PostgresJournal
from jobd.model.journal import BadRecord, BadSnapshot, Fenced, JournalOutcomeUnknown, JournalUnavailable, NodeEntry
from jobd.model.storage import DiskFull
from tests.support.polling import wait_until
from tests.support.postgres import PostgresServer
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.unit.journal.test_shared_journals import connected, lead, parts_of, record_of

pytestmark = pytest.mark.slow

LEASE_MS = 3000


@pytest.fixture
async def proxy(postgres_server: PostgresServer) -> AsyncIterator[TcpProxy]:
    async with tcp_proxy(postgres_server.port) as made:
        yield made


@pytest.fixture
async def a(
    postgres_server: PostgresServer, journal_name: str, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PostgresJournal]:
    """Open a node that reaches the server through the proxy. Partitions are small."""
    for limit in ("FIRST_RECORDS", "MIN_RECORDS", "MAX_RECORDS"):
        monkeypatch.setattr(partitions, limit, 10)
    await postgres_journal.create(postgres_server.url(), journal_name, f"id of {journal_name}")
    node = await PostgresJournal.open(postgres_server.url(port=proxy.port), journal_name, LEASE_MS)
    yield node
    await node.close()


@pytest.fixture
async def b(a: PostgresJournal, postgres_server: PostgresServer, journal_name: str) -> AsyncIterator[PostgresJournal]:
    """Open a node that reaches the server directly."""
    node = await PostgresJournal.open(postgres_server.url(), journal_name, LEASE_MS)
    yield node
    await node.close()


async def query(server: PostgresServer, statement: str) -> str:
    return await asyncio.to_thread(server.sql, statement)


# -- Outcomes ----------------------------------------------------------------------------------------------------------


async def test_an_append_whose_response_is_lost_is_resolved_as_written(
    a: PostgresJournal, b: PostgresJournal, proxy: TcpProxy
) -> None:
    await lead(a)
    await a.append(record_of(1, 100), 0)
    proxy.loses_responses = True
    appending = asyncio.create_task(a.append(record_of(2, 100), 1))
    await proxy.lost.wait()
    proxy.cut()
    with pytest.raises(JournalOutcomeUnknown):
        await appending
    head = await a.resolve(0)
    assert (head.number, head.epoch, head.holder) == (2, 101, "a")
    await a.append(record_of(3, 101), 2)
    assert [each.number for each in await b.read(0, 10)] == [1, 2, 3]


async def test_an_append_that_does_not_arrive_is_resolved_as_not_written(a: PostgresJournal, proxy: TcpProxy) -> None:
    await lead(a)
    proxy.loses_requests = True
    appending = asyncio.create_task(a.append(record_of(1, 100), 0))
    await proxy.lost.wait()
    proxy.cut()
    with pytest.raises(JournalOutcomeUnknown):
        await appending
    assert (await a.resolve(0)).number == 0
    await a.append(record_of(1, 101), 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_an_append_that_is_cut_at_any_time_is_resolved(
    seed: int, a: PostgresJournal, b: PostgresJournal, proxy: TcpProxy
) -> None:
    """A record that is not in the journal at its resolution does not appear later."""
    random = Random(seed)
    expected: list[bytes] = []
    outcomes = []
    epoch = (await lead(a)).epoch
    for turn in range(60):
        number, body = len(expected) + 1, b"turn %d" % turn
        appending = asyncio.create_task(a.append(record_of(number, epoch, body), number - 1))
        await asyncio.sleep(random.uniform(0, 0.002))
        proxy.cut()
        try:
            await appending
            is_in = True
        except JournalUnavailable:  # while the connection was made again
            is_in = False
        except JournalOutcomeUnknown:
            head = await a.resolve(0)
            is_in, epoch = head.number == number, head.epoch
            outcomes.append(is_in)
        if is_in:
            expected.append(body)
        assert [each.body for each in await b.read(0, 100)] == expected
    await a.renew(len(expected))
    assert [each.body for each in await b.read(0, 100)] == expected
    assert outcomes


@asynccontextmanager
async def row_lock(server: PostgresServer, name: str) -> AsyncIterator[None]:
    """Lock the row that appends, renewals and takeovers change."""
    connection = await asyncpg.connect(server.url())
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM jobd_journals WHERE name = $1 FOR UPDATE", name)
            yield
    finally:
        connection.terminate()


async def waiting(server: PostgresServer, count: int) -> bool:
    """Return whether `count` statements wait for a lock."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%jobd_journals%'"
    return int(await query(server, statement)) >= count


async def test_a_resolution_waits_for_an_append_that_still_runs_in_the_server(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal, b: PostgresJournal, proxy: TcpProxy
) -> None:
    await lead(a)
    async with row_lock(postgres_server, journal_name):
        appending = asyncio.create_task(a.append(record_of(1, 100), 0))
        await wait_until(lambda: waiting(postgres_server, 1))
        proxy.cut()
        with pytest.raises(JournalOutcomeUnknown):
            await appending
        resolving = asyncio.create_task(a.resolve(0))
        await wait_until(lambda: waiting(postgres_server, 2))
    head = await resolving
    assert head.number == len(await b.read(0, 10)) == 1


async def test_an_append_without_a_response_for_a_whole_lease_is_given_up_and_not_cancelled(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal, b: PostgresJournal
) -> None:
    short = await PostgresJournal.open(postgres_server.url(), journal_name, 200)
    await lead(short)
    async with row_lock(postgres_server, journal_name):
        with pytest.raises(JournalOutcomeUnknown):
            await short.append(record_of(1, 100), 0)
        assert await waiting(postgres_server, 1)
        assert await b.read(0, 10) == []
    await wait_until(lambda: has_records(b, 1))
    assert (await short.resolve(0)).number == 1
    await short.close()


async def has_records(node: PostgresJournal, count: int) -> bool:
    return (await node.head()).number == count


async def test_a_cancelled_append_runs_to_its_end(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal, b: PostgresJournal
) -> None:
    await lead(a)
    async with row_lock(postgres_server, journal_name):
        appending = asyncio.create_task(a.append(record_of(1, 100), 0))
        await wait_until(lambda: waiting(postgres_server, 1))
        appending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await appending
    await a.append(record_of(2, 100), 1)
    assert [each.number for each in await b.read(0, 10)] == [1, 2]


async def test_an_idle_connection_that_is_lost_is_made_again(
    a: PostgresJournal, b: PostgresJournal, proxy: TcpProxy
) -> None:
    await lead(a)
    proxy.cut()
    await wait_until(lambda: connected(b, False))
    await a.append(record_of(1, 100), 0)
    await a.renew(1)
    assert await connected(b, True)
    assert len(await a.read(0, 10)) == 1


async def test_the_session_of_a_leader_that_does_not_notice_its_end_is_ended(
    postgres_server: PostgresServer, a: PostgresJournal, b: PostgresJournal
) -> None:
    await lead(a)
    await lead(b, "b")
    await b.renew(0)  # ends the session of `a`
    await wait_until(lambda: connected(b, False))
    await b.renew(0)
    assert await connected(b, True)
    with pytest.raises((Fenced, JournalOutcomeUnknown)):  # by whether it has seen the end of the connection
        await a.append(record_of(1, 100), 0)
    with pytest.raises(Fenced):
        await a.resolve(0)


async def test_a_leader_that_appends_all_the_time_ends_that_session_too(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal
) -> None:
    await lead(a)
    node = await PostgresJournal.open(postgres_server.url(), journal_name, 500)
    epoch, number = (await lead(node, "b")).epoch, 0

    async def has_lock() -> bool:
        nonlocal number
        number += 1
        await node.append(record_of(number, epoch), number - 1)
        return node._leader._locked is not None

    assert not await has_lock()
    await wait_until(has_lock)
    assert (await node.head()).is_connected
    await node.close()


async def test_a_server_need_not_tell_its_timeline(
    a: PostgresJournal, postgres_server: PostgresServer, journal_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await a.health()).timeline == 1
    monkeypatch.setattr(session, "_TIMELINE", "SELECT no_such_function()")
    node = await PostgresJournal.open(postgres_server.url(), journal_name, LEASE_MS, 7)
    assert (await node.health()).timeline == 0
    await node.close()


@pytest.mark.parametrize("poll", [PostgresJournal.head, PostgresJournal.health, PostgresJournal.nodes])
async def test_a_server_that_does_not_respond_to_a_poll_for_a_lease_is_unavailable(
    a: PostgresJournal,
    postgres_server: PostgresServer,
    journal_name: str,
    proxy: TcpProxy,
    poll: Callable[[PostgresJournal], Awaitable[object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres_journal, "READ_S", 3_600)  # of a read of much data
    node = await PostgresJournal.open(postgres_server.url(port=proxy.port), journal_name, 200)
    await node.head()
    proxy.loses_responses = True
    with pytest.raises(JournalUnavailable, match=r"PostgreSQL at .* did not respond in time, or ended the connection"):
        await poll(node)
    proxy.cut()
    assert (await node.head()).number == 0
    await node.close()


@pytest.mark.parametrize(
    "columns", [["nodes.schema_version", "nodes.lease_ms"], ["nodes.lease_ms"], ["journals.format"]]
)
async def test_columns_that_earlier_tables_lack_are_added(
    a: PostgresJournal, postgres_server: PostgresServer, journal_name: str, columns: list[str]
) -> None:
    for table, column in (name.split(".") for name in columns):
        postgres_server.sql(f"ALTER TABLE jobd_{table} DROP COLUMN {column}")
    journal = await PostgresJournal.open(postgres_server.url(), journal_name, LEASE_MS)
    await journal.register(NodeEntry("b", "p", "", 2, "", 0, schema_version=12, lease_ms=3_000))
    assert [(node.schema_version, node.lease_ms) for node in await journal.nodes()] == [(12, 3_000)]
    await journal.close()


async def test_a_closed_journal_is_unavailable(a: PostgresJournal) -> None:
    await a.close()
    with pytest.raises(JournalUnavailable, match="closed"):
        await a.head()
    with pytest.raises(JournalUnavailable, match="closed"):
        await a.append(record_of(1, 100), 0)


@pytest.fixture
def small_tablespace(postgres_server: PostgresServer, journal_name: str, small_disk: Path) -> Iterator[str]:
    """Return the name of a database whose tables are on a small disk. The log of PostgreSQL is not."""
    name = journal_name.replace("-", "_")
    place = postgres_server.directory / "small"
    place.mkdir()
    subprocess.run(["mount", "--bind", small_disk, place], check=True)
    shutil.chown(place, postgres_server.directory.owner())
    postgres_server.sql(f"CREATE TABLESPACE {name} LOCATION '{place}'")
    postgres_server.sql(f"CREATE DATABASE {name}")
    postgres_server.sql(f"ALTER DATABASE {name} SET default_tablespace = {name}")
    yield name
    postgres_server.sql(f"DROP DATABASE {name} WITH (FORCE)")
    postgres_server.sql(f"DROP TABLESPACE {name}")
    subprocess.run(["umount", place], check=True)


async def test_a_full_disk_rejects_an_append(
    postgres_server: PostgresServer, journal_name: str, small_tablespace: str
) -> None:
    url = postgres_server.url(small_tablespace)
    await postgres_journal.create(url, journal_name, "id")
    node = await PostgresJournal.open(url, journal_name, LEASE_MS)
    await lead(node)
    await node.append(record_of(1, 100), 0)
    with pytest.raises(DiskFull, match=r"The disk of PostgreSQL at .* is full"):
        await node.append(record_of(2, 100, bytes(30 << 20)), 1)
    await node.append(record_of(2, 100), 1)
    assert [each.number for each in await node.read(0, 10)] == [1, 2]
    await node.close()


# -- Damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["first_event", "last_event", "epoch", "at", "crc", "body"])
async def test_a_damaged_record_is_reported(
    column: str, postgres_server: PostgresServer, journal_name: str, a: PostgresJournal
) -> None:
    await lead(a)
    await a.append(record_of(1, 100), 0)
    value = "'x'" if column == "body" else f"{column} + 1"
    await query(postgres_server, f"UPDATE jobd_journal SET {column} = {value} WHERE name = '{journal_name}'")
    with pytest.raises(BadRecord, match="record 1 of the journal is damaged: its checksum is wrong"):
        await a.read(0, 10)


async def test_a_missing_record_is_reported(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal
) -> None:
    await lead(a)
    for number in range(1, 4):
        await a.append(record_of(number, 100), number - 1)
    await query(postgres_server, f"DELETE FROM jobd_journal WHERE name = '{journal_name}' AND number = 2")
    with pytest.raises(BadRecord, match="record 2 of the journal is missing"):
        await a.read(0, 10)
    await query(postgres_server, f"DELETE FROM jobd_journal WHERE name = '{journal_name}'")
    with pytest.raises(BadRecord, match="record 3 of the journal is missing"):
        await a.read(2, 10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [("UPDATE jobd_snapshots SET body = 'x'", "damaged"), ("DELETE FROM jobd_snapshots", "missing")],
)
async def test_a_damaged_snapshot_is_reported(
    change: str, reason: str, postgres_server: PostgresServer, journal_name: str, a: PostgresJournal
) -> None:
    assert await a.write_snapshot(5, parts_of(b"one", b"two"), 0)
    await query(postgres_server, f"{change} WHERE name = '{journal_name}' AND part = 1")
    with pytest.raises(BadSnapshot, match=f"part 1 of the snapshot of record 5 is {reason}"):
        _ = [part async for part in a.read_snapshot(5)]


async def test_a_snapshot_that_is_dropped_while_it_is_read_is_read_to_its_end(
    a: PostgresJournal, b: PostgresJournal
) -> None:
    assert await a.write_snapshot(5, parts_of(b"one", b"two"), 0)
    reading = a.read_snapshot(5)
    assert await anext(reading) == b"one"
    await b.drop_snapshot(5)
    assert [part async for part in reading] == [b"two"]


# -- Partitions --------------------------------------------------------------------------------------------------------


async def partitions_of(server: PostgresServer, name: str) -> list[str]:
    pattern = f"jobd\\_journal\\_{name}\\_p%"
    statement = f"SELECT relname FROM pg_class WHERE relname LIKE '{pattern}' AND relkind = 'r' ORDER BY oid"
    found = (await query(server, statement)).split()
    return [each.rpartition("_p")[2] for each in found]


async def test_partitions_are_added_ahead_and_dropped_whole(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal
) -> None:
    await lead(a)
    for number in range(1, 10):
        await a.append(record_of(number, 100), number - 1)
        await has_partition(postgres_server, journal_name, "11")  # gives a partition the time to be added
    await wait_until(lambda: has_partition(postgres_server, journal_name, "11"))
    for number in range(10, 31):
        await a.append(record_of(number, 100), number - 1)
    await a.trim(24)
    found = await partitions_of(postgres_server, journal_name)
    assert found[0] == "21"
    assert [each.number for each in await a.read(20, 3)] == [21, 22, 23]
    with pytest.raises(BadRecord):
        await a.read(19, 3)


async def test_a_few_small_records_do_not_make_a_wide_partition(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large records could follow, which are not dropped before the end of the partition."""
    monkeypatch.setattr(partitions, "MAX_RECORDS", 1_000)
    await lead(a)
    for number in range(1, 22):
        await a.append(record_of(number, 100), number - 1)
    assert (await partitions_of(postgres_server, journal_name))[:3] == ["1", "11", "21"]


async def has_partition(server: PostgresServer, name: str, first: str) -> bool:
    return first in await partitions_of(server, name)


async def test_an_interrupted_trim_is_continued(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that reads a partition delays its removal beyond the time limit."""
    monkeypatch.setattr(partitions, "TRIM_S", 0.2)
    await lead(a)
    for number in range(1, 21):
        await a.append(record_of(number, 100), number - 1)
    connection = await asyncpg.connect(postgres_server.url())
    async with connection.transaction():
        await connection.fetch("SELECT count(*) FROM jobd_journal WHERE name = $1", journal_name)
        with pytest.raises(JournalUnavailable):
            await a.trim(10)
        await a.append(record_of(21, 100), 20)
    connection.terminate()
    await a.trim(10)
    assert "1" not in await partitions_of(postgres_server, journal_name)
    assert [each.number for each in await a.read(10, 100)] == list(range(11, 22))


async def test_a_failure_to_add_a_partition_ahead_is_made_up_by_an_append(
    a: PostgresJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_session, "EXTEND_S", 0.0)
    await lead(a)
    for number in range(1, 26):
        await a.append(record_of(number, 100), number - 1)
        await asyncio.sleep(0.001)
    assert len(await a.read(0, 30)) == 25


async def test_a_record_that_does_not_fit_into_the_tables_is_rejected(
    postgres_server: PostgresServer, journal_name: str, a: PostgresJournal
) -> None:
    await lead(a)
    await a.append(record_of(1, 100), 0)
    await query(
        postgres_server, f"ALTER TABLE \"jobd_journal_{journal_name}\" ADD CHECK (name <> '{journal_name}') NOT VALID"
    )
    with pytest.raises(JournalUnavailable, match="violates check constraint"):
        await a.append(record_of(2, 100), 1)
