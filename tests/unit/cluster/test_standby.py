"""The standby: what it applies, when it waits, and how it detects that the leader has ended."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.cluster.standby import JUMP, Standby, acknowledged, refuses_connections_at
from jobd.model.commands import Cancel, Create, ForceReset, Get, Start
from jobd.model.journal import BadRecord, Head, JournalUnavailable, NodeEntry, Record
from jobd.model.storage import Batch, FiguresWrite, OutboxWrite, Quarantined, Tombstone, TombstoneWrite
from tests.support.cluster_harness import ClusterNode, cluster, in_cluster, join, leader_of, led_cluster
from tests.support.memory_journal import MemoryServer
from tests.support.virtual_engine import seconds


def record(number: int) -> Record:
    return Record(number, number, number, 1, 0, b"")


def test_a_record_is_acknowledged_by_a_later_one_or_by_the_leader() -> None:
    made = [record(4), record(5), record(6)]
    assert acknowledged(made, 3) == made[:2]
    assert acknowledged(made, 5) == made[:2]
    assert acknowledged(made, 6) == made
    assert acknowledged([record(4)], 3) == []


@in_cluster
async def test_a_standby_waits_for_a_journal_that_cannot_be_reached(server: MemoryServer) -> None:
    _, standby = await led_cluster(server, "a", "b")
    await seconds(0.2)
    with capture_logs() as logs:
        standby.journal.is_reachable = False
        await seconds(10)
        assert standby.standby.problem == "The journal cannot be reached: try again"
        assert standby.standby.leader is None, "its lease is over, as far as this node can see"
        standby.journal.is_reachable = True
        await seconds(1)
    assert [line["event"] for line in logs] == ["standby_waits", "standby_follows"]
    assert standby.standby.problem is None
    assert standby.standby.leader == "http://a"


@in_cluster
async def test_a_standby_with_a_full_disk_goes_on_when_it_has_space(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    standby.disk.is_full = True
    await leader.create("a", "b", "c")
    await seconds(3)
    assert standby.standby.problem == "this node cannot follow: the disk is full"
    standby.disk.is_full = False
    await seconds(2)
    assert standby.standby.problem is None
    assert set(standby.disk.ids) == {"a", "b", "c"}


@in_cluster
async def test_a_standby_whose_disk_lacks_records_does_not_take_over(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    standby.disk.is_full = True
    await leader.create("a", "b")
    await seconds(2)
    await leader.kill()
    await seconds(10)
    assert not standby.leads
    standby.disk.is_full = False
    assert await leader_of([standby]) is standby
    assert await standby.ask(Create(id="c"))
    assert set(standby.disk.ids) == {"a", "b", "c"}


@in_cluster
async def test_a_takeover_does_not_apply_records_of_a_later_leader(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    await leader.ask(Create(id="a"))

    async def append_more(call: str) -> None:
        if call == "read" and standby.journal.epoch > 0:
            server.records.append(record(2))

    standby.journal.before = append_more
    await leader.kill()
    assert await leader_of([standby]) is standby
    assert len(server.records) == 2
    assert standby.warm.number == 1


@in_cluster
async def test_rows_that_a_change_needs_are_read_after_the_records_before_it(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    standby.journal.is_reachable = False  # so that it gets all records at once
    for name in ("a", "b"):
        await leader.create(name)
        await leader.ask(Cancel(id=name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobd.core.jobs_by_id.FINISHED_KEPT", 0)
        await leader.ask(ForceReset(id="a"), admin=True)
        standby.journal.is_reachable = True
        await seconds(1.2)
    assert standby.warm.state.jobs["a"] == standby.disk.job("a") == leader.disk.job("a")


@in_cluster
async def test_a_standby_waits_while_the_server_has_lost_records(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    read, is_lost = standby.journal.read, True

    async def lose(after: int, limit: int) -> list[Record]:
        return [] if is_lost else await read(after, limit)

    standby.journal.read = lose  # type: ignore[method-assign]
    await leader.create("a", "b", "c")
    await seconds(10)
    assert (standby.warm.number, standby.leads) == (0, False)
    is_lost = False
    await seconds(1)
    assert standby.warm.number == 3


@in_cluster
async def test_a_standby_can_be_stopped_while_it_catches_up(server: MemoryServer) -> None:
    [leader] = await led_cluster(server, "a")
    await leader.create(*(f"job-{number}" for number in range(500)))
    standby = ClusterNode(server, "b")
    join([leader, standby])
    follow = standby.disk.follow

    async def stop(records: Sequence[Record], decoded: object = ()) -> None:
        await follow(records)
        if records:
            standby.standby.stop()

    standby.disk.follow = stop  # type: ignore[method-assign]
    await standby.ended_by_itself()
    assert (standby.warm.number, standby.standby.lag_records) == (50, 450)


@in_cluster
async def test_a_standby_that_catches_up_knows_the_leader(server: MemoryServer) -> None:
    [leader] = await led_cluster(server, "a")
    await leader.create(*(f"job-{number}" for number in range(500)))
    standby = ClusterNode(server, "b")
    join([leader, standby])
    follow = standby.disk.follow

    async def follow_slowly(records: Sequence[Record], decoded: object = ()) -> None:
        await asyncio.sleep(1 if records else 0)
        await follow(records)

    standby.disk.follow = follow_slowly  # type: ignore[method-assign]
    for _ in range(8):
        await seconds(1)
        assert standby.standby.leader == "http://a"
        assert standby.standby.unheard_s < 2
    assert standby.standby.lag_records > 1
    await seconds(5)
    assert standby.standby.lag_records == 0
    standby.journal.is_reachable = False
    await seconds(10)
    assert standby.standby.leader is None
    assert standby.standby.unheard_s == pytest.approx(10, abs=0.1)


@in_cluster
async def test_a_failover_that_loses_the_takeover_and_a_record_ends_it(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    await leader.create("a", "b", "lost")
    await seconds(0.2)
    before, take_over = server.head, standby.journal.take_over

    async def lose(seen: Head, *, holder: str, url: str, epoch: int) -> Head | None:
        head = await take_over(seen, holder=holder, url=url, epoch=epoch)
        if server.failovers == 0:
            server.durable = replace(before, number=2, acked=2)
            server.fail_over()
        return head

    standby.journal.take_over = lose  # type: ignore[method-assign]
    await leader.kill()
    assert await leader_of([standby]) is standby
    assert (server.failovers, standby.warm.number, set(standby.disk.ids)) == (1, 2, {"a", "b"})


@in_cluster
async def test_a_takeover_that_is_not_noticed_ends_with_its_lease(server: MemoryServer) -> None:
    [node] = cluster(server, "a")
    node.journal.fail("after", "take_over", "resolve")
    await seconds(2)
    assert not node.leads
    await leader_of([node])


@in_cluster
async def test_the_statistics_of_the_leader_are_kept(server: MemoryServer) -> None:
    leader, standby = nodes = await led_cluster(server, "a", "b")
    standby.warm.expect_tombstones(3)
    for node in nodes:
        node.disk.tombstones = {seq: Tombstone(seq, "a", "key", 1, 1) for seq in (1, 2, 3)}
    for write in (FiguresWrite(b"statistics"), OutboxWrite(), TombstoneWrite([1, 2], [])):
        await leader.disk.write(Batch([], leader.disk.numbers, writes=[write]))
    await seconds(1.2)
    opened = standby.warm.opened()
    assert (opened.stats, opened.tombstones) == (b"statistics", 1)


@in_cluster
async def test_tokens_go_on_above_an_epoch_that_began_in_the_last_record(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    await seconds(1)
    numbers = replace(leader.disk.numbers, epoch=1 << 30)  # the counter of tokens was full
    await leader.disk.write(Batch([], numbers))
    await leader.kill()
    assert await leader_of([standby]) is standby
    assert (standby.warm.state.epoch, standby.warm.state.next_token) == ((1 << 30) + 1, 1)


@in_cluster
async def test_a_record_that_cannot_be_read_ends_the_standby(server: MemoryServer) -> None:
    [leader] = await led_cluster(server, "a")
    await leader.create("a", "b", "c")
    server.records[1] = replace(server.records[1], body=b"\xfe")
    standby = ClusterNode(server, "b")
    join([leader, standby])
    with pytest.raises(BadRecord, match="record 2 of the journal has format 254"):
        await standby.ended_by_itself()
    assert (standby.warm.number, set(standby.disk.ids)) == (1, {"a"})


@in_cluster
async def test_behind_a_proxy_the_lease_decides(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    standby.standby.settings = replace(standby.standby.settings, is_direct=False)
    await leader.kill()
    await seconds(1.5)
    assert not standby.leads
    await leader_of([standby])


@in_cluster
async def test_a_leader_that_listens_is_not_replaced_because_its_session_ended(server: MemoryServer) -> None:
    leader, _ = await led_cluster(server, "a", "b")
    leader.journal.disconnect()
    await seconds(10)
    assert leader.leads


@in_cluster
async def test_a_standby_waits_for_the_lease_of_the_leader_if_it_is_longer(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    holder = leader.standby.settings.holder
    await standby.journal.register(NodeEntry("a", holder, "http://a", 1, "", 0, lease_ms=20_000))
    standby.standby._refuses_connections = _never_refused
    leader.journal.is_reachable = False
    await seconds(18)
    assert not standby.leads
    assert standby.standby.leader == "http://a"
    await seconds(3)
    assert standby.leads


@pytest.mark.parametrize("why", ["nothing", "require_sync is off", "no synchronous standby", "failover", "not known"])
@in_cluster
async def test_numbers_jump_if_acknowledged_records_may_be_lost(server: MemoryServer, why: str) -> None:
    old, standby = await led_cluster(server, "a", "b")
    await old.ask(Create(id="a"))
    await seconds(1.2)
    if why == "require_sync is off":
        standby.standby.settings = replace(standby.standby.settings, is_synchronous=False)
    elif why == "no synchronous standby":
        server.health = replace(server.health, is_synchronous=False)
    elif why == "failover":
        server.fail_over()
    elif why == "not known":
        standby.journal.fail("before", "health", error=JournalUnavailable("try again"))
    await old.kill()
    new = await leader_of([standby])
    await new.ask(Create(id="b"))
    jump = 0 if why == "nothing" else JUMP
    assert new.disk.ids == {"a": 1, "b": 2 + jump}
    assert (new.disk.events[-1].seq > JUMP) == bool(jump)


async def _never_refused(url: str) -> bool:
    return False


@in_cluster
async def test_a_failover_under_an_earlier_leader_lets_no_numbers_jump(server: MemoryServer) -> None:
    first, second, third = await led_cluster(server, "a", "b", "c")
    await first.ask(Create(id="a"))
    await seconds(1.2)
    server.fail_over()
    await first.kill()
    leader = await leader_of([second, third])
    await leader.ask(Create(id="b"))
    await seconds(1.2)
    last = third if leader is second else second
    await leader.kill()
    assert await leader_of([last]) is last
    await last.ask(Create(id="c"))
    assert last.disk.ids == {"a": 1, "b": 2 + JUMP, "c": 3 + JUMP}


@in_cluster
async def test_a_quarantined_job_is_left_out_of_the_warm_state(server: MemoryServer) -> None:
    old, standby = await led_cluster(server, "a", "b")
    await old.ask(Create(id="a"))
    await old.ask(Create(id="b"))
    await seconds(1.2)
    standby.warm.quarantine(Quarantined("a", "damaged"))
    assert standby.warm.opened().quarantined == {"a": "damaged"}
    await old.kill()
    new = await leader_of([standby])
    assert await new.ask(Get(id="a")) == "job_quarantined"
    assert (await new.ask(Start(id="b", worker="w"))).job.id == "b"


def test_a_standby_that_has_seen_nothing_knows_no_leader() -> None:
    standby = Standby.__new__(Standby)
    standby.head = None
    assert (standby.leader, standby.lag_records) == (None, 0)


async def test_a_refused_connection_is_distinguished_from_an_accepted_one(tmp_path: Path) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert not await refuses_connections_at(f"http://127.0.0.1:{port}")
    server.close()
    await server.wait_closed()
    assert await refuses_connections_at(f"http://127.0.0.1:{port}")
    path = tmp_path / "socket"
    assert await refuses_connections_at(f"unix:{path}")
    server = await asyncio.start_unix_server(accept, path)
    assert not await refuses_connections_at(f"unix:{path}")
    server.close()
    await server.wait_closed()


async def test_a_machine_that_does_not_respond_has_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*args: object) -> None:
        await asyncio.sleep(60)

    async def unknown(*args: object) -> None:
        raise socket.gaierror("unknown host")

    for connect in (never, unknown):
        monkeypatch.setattr(asyncio, "open_connection", connect)
        assert not await refuses_connections_at("https://node-a")
