"""The implementations of the shared journal: the same behaviour on PostgreSQL and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from jobd.journal.postgres import journal, partitions
from jobd.journal.postgres.journal import PostgresJournal
from jobd.journal.record import CLOSING
from jobd.model.journal import BadRecord, BadSnapshot, Fenced, Head, NodeEntry, NodeTooOld, Record, SharedJournal
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.support.polling import wait_until
from tests.support.postgres import PostgresServer

Nodes = Callable[[], Awaitable[SharedJournal]]  # makes a node of the journal under test


@pytest.fixture(params=["memory", pytest.param("postgres", marks=pytest.mark.slow)])
async def node_of(
    request: pytest.FixtureRequest, journal_name: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Nodes]:
    made: list[SharedJournal] = []
    memory = MemoryServer()
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        monkeypatch.setattr(partitions, "FIRST_RECORDS", 10)
        await journal.create(server.url(), journal_name, f"id of {journal_name}")

    async def make() -> SharedJournal:
        if request.param == "memory":
            made.append(MemorySharedJournal(memory))
        else:
            made.append(await PostgresJournal.open(server.url(), journal_name, 3000))
        return made[-1]

    yield make
    for each in made:
        await each.close()


@pytest.fixture
async def a(node_of: Nodes) -> SharedJournal:
    return await node_of()


@pytest.fixture
async def b(node_of: Nodes) -> SharedJournal:
    return await node_of()


def record_of(number: int, epoch: int, body: bytes = b"\x01body") -> Record:
    return Record(number, 10 * number, 10 * number + 3, epoch, 1_000 + number, body)


async def lead(node: SharedJournal, name: str = "a", epoch: int = 100) -> Head:
    """Make `node` the leader."""
    head = await node.take_over(await node.head(), holder=name, url=f"http://{name}", epoch=epoch)
    assert head is not None
    return head


async def test_a_new_journal_has_no_leader(a: SharedJournal) -> None:
    head = await a.head()
    assert (head.number, head.epoch, head.holder, head.url, head.acked) == (0, 0, None, None, 0)
    assert not head.is_connected
    assert await a.read(0, 10) == []
    assert await a.epochs() == []


async def test_every_node_reads_what_the_leader_appends(a: SharedJournal, b: SharedJournal) -> None:
    taken = await lead(a)
    assert (taken.number, taken.epoch, taken.holder, taken.url) == (0, 100, "a", "http://a")
    records = [record_of(number, 100, b"x" * number) for number in range(1, 6)]
    for each in records:
        await a.append(each, each.number - 1)
    assert await b.read(0, 10) == records
    assert await b.read(2, 2) == records[2:4]
    assert await b.read(5, 10) == []
    assert a.cluster_id == b.cluster_id


async def test_a_head_says_what_is_acknowledged_and_that_the_lease_was_renewed(
    a: SharedJournal, b: SharedJournal
) -> None:
    await lead(a)
    seen = [await b.head()]
    await a.append(record_of(1, 100), 0)
    seen.append(await b.head())
    await a.renew(1)
    seen.append(await b.head())
    assert [(each.number, each.acked) for each in seen] == [(0, 0), (1, 0), (1, 1)]
    assert len({each.renewed for each in seen}) == 3
    assert (await b.head()).renewed == seen[-1].renewed
    assert all(each.is_connected and each.holder == "a" for each in seen)


async def test_a_renewal_returns_the_time_of_the_server(a: SharedJournal) -> None:
    await lead(a)
    before = (await a.head()).at
    assert before <= await a.renew(0) <= before + 60_000


async def test_the_old_leader_is_fenced(a: SharedJournal, b: SharedJournal) -> None:
    await lead(a)
    await a.append(record_of(1, 100), 0)
    assert (await lead(b, "b")).epoch == 101
    with pytest.raises(Fenced):
        await a.append(record_of(2, 100), 1)
    with pytest.raises(Fenced):
        await a.renew(1)
    with pytest.raises(Fenced):
        await a.resolve(0)
    await b.append(record_of(2, 101), 1)
    await b.renew(2)
    assert await a.read(0, 10) == [record_of(1, 100), record_of(2, 101)]
    assert await a.epochs() == [(100, 1), (101, 2)]


async def test_a_node_that_never_led_is_fenced(a: SharedJournal) -> None:
    with pytest.raises(Fenced):
        await a.append(record_of(1, 0), 0)
    with pytest.raises(Fenced):
        await a.renew(0)
    with pytest.raises(Fenced):
        await a.resolve(0)
    assert (await a.head()).number == 0


async def test_a_takeover_fails_if_the_journal_has_changed(a: SharedJournal, b: SharedJournal) -> None:
    seen = await b.head()
    await lead(a)
    assert await b.take_over(seen, holder="b", url="", epoch=0) is None
    seen = await b.head()
    await a.append(record_of(1, 100), 0)
    assert await b.take_over(seen, holder="b", url="", epoch=0) is None
    seen = await b.head()
    await a.renew(1)
    assert await b.take_over(seen, holder="b", url="", epoch=0) is None
    assert (await b.head()).holder == "a"


async def test_only_one_of_two_takeovers_succeeds(a: SharedJournal, b: SharedJournal) -> None:
    seen = await a.head()
    assert await a.take_over(seen, holder="a", url="", epoch=7)
    assert await b.take_over(seen, holder="b", url="", epoch=7) is None


async def test_a_record_that_does_not_follow_the_last_is_fenced(a: SharedJournal) -> None:
    await lead(a)
    await a.append(record_of(1, 100), 0)
    for number in (1, 3):
        with pytest.raises(Fenced):
            await a.append(record_of(number, 100), 0)
    assert await a.read(0, 10) == [record_of(1, 100)]


async def test_a_leader_takes_a_new_epoch_and_goes_on(a: SharedJournal) -> None:
    await lead(a)
    await a.append(record_of(1, 100), 0)
    head = await a.resolve(0)
    assert (head.number, head.epoch, head.holder, head.url) == (1, 101, "a", "http://a")
    assert (await a.resolve(200)).epoch == 200
    await a.append(record_of(2, 200), 1)
    assert await a.epochs() == [(100, 1), (101, 2), (200, 2)]


async def test_the_end_of_the_leaders_session_is_seen(node_of: Nodes, b: SharedJournal) -> None:
    a = await node_of()
    await lead(a)
    assert (await b.head()).is_connected
    await a.close()
    await wait_until(lambda: connected(b, False))
    await lead(b, "b")
    assert await connected(b, True)


async def test_a_leader_that_releases_its_leadership_is_no_longer_connected(a: SharedJournal, b: SharedJournal) -> None:
    await lead(a)
    await a.release()
    assert (await b.head()).holder is None
    await wait_until(lambda: connected(b, False))
    await lead(a, "again")
    assert await connected(b, True)


async def connected(node: SharedJournal, expected: bool) -> bool:
    return (await node.head()).is_connected == expected


async def test_a_trimmed_record_is_missing(a: SharedJournal) -> None:
    await lead(a)
    for number in range(1, 31):
        await a.append(record_of(number, 100), number - 1)
    await a.trim(25)
    with pytest.raises(BadRecord, match="record 1 of the journal is missing"):
        await a.read(0, 10)
    assert [each.number for each in await a.read(25, 10)] == [26, 27, 28, 29, 30]
    await a.trim(30)
    await a.append(record_of(31, 100), 30)
    assert await a.read(30, 10) == [record_of(31, 100)]


async def test_a_read_is_limited_by_its_bytes(a: SharedJournal) -> None:
    await lead(a)
    for number in range(1, 5):
        await a.append(record_of(number, 100, bytes(7 << 20)), number - 1)
    assert [each.number for each in await a.read(0, 10)] == [1, 2, 3]


async def test_nodes_are_listed_by_name(a: SharedJournal, b: SharedJournal) -> None:
    east = NodeEntry("east", "p1", "http://east", 1, "abc", 5)
    west = NodeEntry("west", "p2", "http://west", 1, "abc", 7, ahead_ms=-1_500, schema_version=12, lease_ms=3_000)
    assert await b.register(west) is None
    assert await a.register(east) is None
    assert await a.register(east) is None
    found = await b.nodes()
    assert [(each.name, each.process, each.projected_to) for each in found] == [("east", "p1", 5), ("west", "p2", 7)]
    assert [(each.ahead_ms, each.schema_version, each.lease_ms) for each in found] == [(0, 0, 0), (-1_500, 12, 3_000)]
    assert all(0 <= each.seen_ms < 60_000 for each in found)
    assert [each.version for each in await a.nodes()] == [each.version for each in found]
    await b.register(west)
    assert [new.version != old.version for new, old in zip(await a.nodes(), found, strict=True)] == [False, True]
    await a.forget("east")
    assert [each.name for each in await b.nodes()] == ["west"]


async def test_a_second_process_with_the_name_of_a_node_is_reported(a: SharedJournal, b: SharedJournal) -> None:
    await a.register(NodeEntry("east", "p1", "", 1, "", 0))
    assert await b.register(NodeEntry("east", "p2", "", 1, "", 0)) == "p1"
    assert await b.register(NodeEntry("east", "p2", "", 1, "", 0)) is None
    assert await a.register(NodeEntry("east", "p1", "", 1, "", 0)) == "p2"


async def test_a_node_that_does_not_read_the_records_is_not_registered(a: SharedJournal, b: SharedJournal) -> None:
    first, second = (NodeEntry("east", "p1", "", number, "", 0) for number in (1, 2))
    await lead(a)
    await a.append(record_of(1, 100, b"\x02"), 0)
    await b.register(first)
    await a.append(record_of(2, 100, b"\x03"), 1)
    await a.append(record_of(3, 100, CLOSING), 2)
    for node in (first, second):
        with pytest.raises(NodeTooOld, match=f"node east does not read: .* up to {node.format}"):
            await b.register(node)
    assert [node.format for node in await a.nodes()] == [1], "it was registered before"
    await b.register(NodeEntry("east", "p1", "", 3, "", 0))
    assert [node.format for node in await a.nodes()] == [3]


async def parts_of(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_snapshot_is_read_in_parts(a: SharedJournal, b: SharedJournal) -> None:
    assert await a.write_snapshot(7, parts_of(b"one", b"two", b""), 0)
    assert await a.write_snapshot(9, parts_of(b"x" * 1000), 0)
    assert not await b.write_snapshot(9, parts_of(b"another"), 0)
    assert [(each.number, each.parts, each.bytes) for each in await b.snapshots()] == [(7, 3, 6), (9, 1, 1000)]
    assert [part async for part in b.read_snapshot(7)] == [b"one", b"two", b""]
    await b.drop_snapshot(7)
    assert [each.number for each in await a.snapshots()] == [9]
    with pytest.raises(BadSnapshot):
        _ = [part async for part in a.read_snapshot(7)]


async def test_an_incomplete_snapshot_is_not_listed(a: SharedJournal, b: SharedJournal) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"one"
        assert not await b.write_snapshot(8, parts_of(b"another"), 0)
        raise OSError("the disk failed")

    with pytest.raises(OSError, match="failed"):
        await a.write_snapshot(7, failing(), 0)
    assert await b.snapshots() == []
    with pytest.raises(BadSnapshot):
        _ = [part async for part in b.read_snapshot(7)]
    assert await b.write_snapshot(7, parts_of(b"again"), 0)
    assert [part async for part in b.read_snapshot(7)] == [b"again"]


async def test_the_health_of_the_server_is_known(a: SharedJournal) -> None:
    health = await a.health()
    assert not health.is_waiting
    assert health.oldest_transaction_ms < 60_000
