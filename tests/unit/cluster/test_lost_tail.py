"""Standbys of a journal that has lost acknowledged records, as after an asynchronous failover of its server."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from jobd.model.commands import Create
from jobd.model.journal import BadRecord
from jobd.storage.cluster.membership import StoreDamaged
from tests.support.cluster_harness import ClusterNode, cluster, in_cluster, join, leader_of, led_cluster
from tests.support.memory_journal import MemoryServer
from tests.support.virtual_engine import seconds


def lose(server: MemoryServer, upto: int) -> None:
    """Lose the records after `upto`, although they are acknowledged."""
    server.durable = replace(server.head, number=upto, acked=upto)
    server.fail_over()


async def standby_with(server: MemoryServer, records: int) -> list[ClusterNode]:
    """Return a leader that has ended, and a standby that has applied its `records`."""
    leader, standby = nodes = cluster(server, "a", "b")
    assert await leader_of(nodes) is leader
    for _ in range(records):
        await leader.ask(Create())
    await seconds(1.2)
    assert standby.warm.number == records
    standby.journal.is_reachable = False
    await leader.kill()
    return nodes


@in_cluster
async def test_a_standby_that_has_lost_records_does_not_lead(server: MemoryServer) -> None:
    leader, standby = await standby_with(server, 3)
    lose(server, 1)
    standby.journal.is_reachable = True
    await seconds(10)
    assert not standby.leads
    assert "has record 3, but the last record of the journal is 1" in (standby.standby.problem or "")
    found = ClusterNode(server, "c")
    join([leader, standby, found])
    assert await leader_of([found]) is found
    await seconds(1)
    assert not standby.leads, "no record is another one yet"
    await found.ask(Create())
    with pytest.raises(StoreDamaged, match="continued without record 3") as ended:
        await standby.ended_by_itself()
    assert ended.value.exit_code == 75


@in_cluster
async def test_a_standby_notices_that_its_last_record_is_another_one(server: MemoryServer) -> None:
    leader, standby = await standby_with(server, 2)
    lose(server, 1)
    other = ClusterNode(server, "c")
    join([leader, standby, other])
    assert await leader_of([other]) is other
    for _ in range(3):
        await other.ask(Create())
    standby.journal.is_reachable = True
    with pytest.raises(StoreDamaged, match="continued without record 2"):
        await standby.ended_by_itself()
    assert len(standby.disk.jobs) == 2, "it applied no record of the other branch"


@in_cluster
async def test_a_standby_that_is_too_far_behind_makes_its_tables_again(server: MemoryServer) -> None:
    """It was cut off for longer than records are kept."""
    leader, standby = await led_cluster(server, "a", "b")
    await leader.ask(Create())
    await seconds(1.2)
    standby.journal.is_reachable = False
    for _ in range(4):
        await leader.ask(Create())
    await leader.journal.trim(3)
    standby.journal.is_reachable = True
    with pytest.raises(StoreDamaged, match="without record 1, the last one of this node, or has trimmed it") as ended:
        await standby.ended_by_itself()
    assert ended.value.exit_code == 75


@in_cluster
async def test_a_missing_record_ends_a_standby_that_is_on_the_branch(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    await leader.ask(Create())
    await seconds(1.2)
    standby.journal.is_reachable = False
    for _ in range(2):
        await leader.ask(Create())
    del server.records[1]
    standby.journal.is_reachable = True
    with pytest.raises(BadRecord, match="record 2 of the journal is missing"):
        await standby.ended_by_itself()
