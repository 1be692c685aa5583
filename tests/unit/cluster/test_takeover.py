"""Several nodes on one journal: who leads, what a takeover keeps, and that an old leader sends no more responses."""

from __future__ import annotations

import asyncio

import pytest

from jobd.cluster import warm_state
from jobd.cluster.leadership import Leadership
from jobd.core.state import State
from jobd.model.commands import Claim, Complete, Create, Get, Progress, Release, Start, Why
from jobd.model.job import TOKEN_COUNTER_BITS
from jobd.model.journal import Fenced, JournalOutcomeUnknown, LeadershipLost
from tests.support.cluster_harness import LEASE_S, ClusterNode, cluster, in_cluster, join, leader_of, led_cluster
from tests.support.memory_journal import MemoryServer
from tests.support.rule_harness import snapshot
from tests.support.virtual_engine import key, seconds, settle


def loop_s() -> float:
    return asyncio.get_running_loop().time()


@in_cluster
async def test_one_node_leads_and_the_others_follow(server: MemoryServer) -> None:
    leader, *_ = nodes = await led_cluster(server, "a", "b", "c")
    await leader.create(*(f"job-{number}" for number in range(20)))
    await seconds(1.2)  # a renewal confirms the last record
    for node in nodes:
        assert node.disk.jobs == leader.disk.jobs
        assert (node.warm.number, node.standby.lag_events) == (20, 0) or node is leader
    assert [node.leads for node in nodes].count(True) == 1


@in_cluster
async def test_the_last_record_is_applied_once_it_is_known_to_be_acknowledged(server: MemoryServer) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    await leader.ask(Create(id="a"))
    await seconds(0.2)
    assert (standby.warm.number, standby.standby.lag_records, standby.standby.lag_events) == (0, 1, 1)
    await leader.ask(Create(id="b"))
    await seconds(0.2)
    assert standby.warm.number == 1
    await seconds(1)
    assert (standby.warm.number, standby.standby.lag_records) == (2, 0)


@in_cluster
async def test_a_killed_leader_is_replaced_at_once_and_nothing_acknowledged_is_lost(server: MemoryServer) -> None:
    old, *others = await led_cluster(server, "a", "b", "c")
    await old.ask(Create(id="held"))
    grant = await old.ask(Start(id="held", worker="w-1", lock_ttl_ms=60_000))
    repeated = key("same")
    await old.ask(Create(id="b"), key=repeated)
    await old.kill()
    began_s = loop_s()
    new = await leader_of(others)
    assert loop_s() - began_s < 0.2
    assert (await new.ask(Get(id="held"))).lock.fencing_token == grant.fencing_token
    assert b'"id":"b"' in bytes(await new.ask(Create(id="b"), key=repeated)), "the stored response is replayed"
    assert await new.ask(Progress(id="held", lock_id=grant.lock_id, progress=50)) != "lock_lost"
    await new.ask(Create(id="next"))
    later = await new.ask(Start(id="next", worker="w-2"))
    assert later.fencing_token > grant.fencing_token
    assert later.fencing_token >> TOKEN_COUNTER_BITS == server.head.epoch


@in_cluster
async def test_the_warm_state_equals_one_that_is_read_from_the_same_store(server: MemoryServer) -> None:
    old, standby = await led_cluster(server, "a", "b")
    for number in range(300):
        await old.ask(Create(id=f"job-{number}", priority=number % 3), key=key(f"key {number}"))
    for turn in range(5):
        grants = (await old.ask(Claim(worker="w-1", limit=20), key=key(f"claim {turn}"))).grants
        for granted in grants[: 10 * turn]:
            await old.ask(Complete(id=granted.job.id, lock_id=granted.lock_id, file_path="/f"))
    await old.kill()
    await leader_of([standby])
    cold = standby.disk.opened()
    warm, opened = standby.warm.opened(), State.opened(cold)
    assert [row.digest for row in warm.keys] == [row.digest for row in cold.keys]
    assert [row.grants for row in warm.keys] == [row.grants for row in cold.keys]
    assert warm.queues == cold.queues
    state = standby.state
    at = standby.clock.moment()
    for each in (state, opened):
        each.finished.clear()
        each.advance(at.now, at.lock_ms)
    shown, expected = snapshot(state), snapshot(opened)
    for name in expected:
        if name not in {"epoch", "next_token"}:
            assert shown[name] == expected[name], name


@in_cluster
async def test_a_node_that_is_lost_is_replaced_after_the_lease(server: MemoryServer) -> None:
    """Its machine does not refuse connections, because it is lost."""
    old, standby = await led_cluster(server, "a", "b")
    await old.ask(Create(id="a"))
    old.journal.is_reachable = False
    began_s = loop_s()
    new = await leader_of([standby])
    assert LEASE_S * 0.6 < loop_s() - began_s < LEASE_S + 0.2
    assert isinstance(old.ended, LeadershipLost), "it stopped before the other began"
    assert (await new.ask(Get(id="a"))).id == "a"


@in_cluster
async def test_a_stopped_leader_that_resumes_late_serves_nothing(server: MemoryServer) -> None:
    old, standby = await led_cluster(server, "a", "b")
    await old.ask(Create(id="a"))
    frozen = old.journal.hold()  # its renewals do not get out
    append = asyncio.create_task(old.ask(Create(id="lost")))
    await settle()
    new = await leader_of([standby])
    assert (await new.ask(Create(id="b"))).id == "b"
    read = asyncio.create_task(old.ask(Get(id="b")))
    frozen.set()
    assert await append == "outcome_unknown"
    assert await read == "not_leader"
    assert isinstance(old.ended, Fenced | JournalOutcomeUnknown)
    assert await new.ask(Get(id="lost")) == "job_not_found"


@in_cluster
async def test_a_read_is_not_served_after_the_lease(server: MemoryServer) -> None:
    """The process was stopped after its last renewal, and no renewal has failed yet."""
    [node] = await led_cluster(server, "a")
    await node.ask(Create(id="a"))
    node.boot_ms += 3_000
    assert await node.ask(Get(id="a")) == "not_leader"
    assert isinstance(node.ended, LeadershipLost)


@in_cluster
async def test_a_paused_machine_serves_no_stale_read(server: MemoryServer) -> None:
    """Its clocks stood still, and its wall clock was corrected."""
    old, standby = await led_cluster(server, "a", "b")
    resumed = old.journal.hold()
    old.boot_ms -= 10_000
    new = await leader_of([standby])
    assert (await new.ask(Create(id="a"))).id == "a"
    read = asyncio.create_task(old.ask(Get(id="a")))
    await settle()
    resumed.set()
    assert await read == "not_leader"
    assert isinstance(old.ended, Fenced)


@pytest.mark.parametrize("hook", ["before", "after"])
@in_cluster
async def test_a_lost_response_to_an_append_is_not_noticed_by_clients(server: MemoryServer, hook: str) -> None:
    old, standby = await led_cluster(server, "a", "b")
    old.journal.fail(hook, "append")
    assert (await old.ask(Create(id="a"))).id == "a"
    token = (await old.ask(Start(id="a", worker="w"))).fencing_token
    assert token >> TOKEN_COUNTER_BITS == server.head.epoch
    await old.kill()
    new = await leader_of([standby])
    assert (await new.ask(Get(id="a"))).lock.fencing_token == token


@pytest.mark.parametrize("hook", ["before", "after"])
@in_cluster
async def test_a_lost_response_to_a_takeover_is_resolved(server: MemoryServer, hook: str) -> None:
    [node] = cluster(server, "a")
    node.journal.fail(hook, "take_over")
    began_s = loop_s()
    await leader_of([node])
    assert loop_s() - began_s < 0.2


@pytest.mark.parametrize("lost", [0, 1])
@in_cluster
async def test_a_takeover_that_waits_longer_than_the_lease_leads(server: MemoryServer, lost: int) -> None:
    """It waits for a row lock, or for a statement of the former leader."""
    [old] = await led_cluster(server, "a")
    await old.kill()
    new = ClusterNode(server, "b")
    join([old, new])
    left, follow = {"renew": lost}, new.standby.run

    async def wait(call: str) -> None:
        if call == "take_over":
            await asyncio.sleep(LEASE_S + 1)
        if left.get(call, 0):
            left[call] -= 1
            raise JournalOutcomeUnknown

    async def follow_until_served() -> Leadership | None:
        leadership = await follow()
        assert leadership is not None
        leadership.check()  # as the first request does
        assert server.head.acked == server.head.number
        return leadership

    new.journal.before = wait
    new.standby.run = follow_until_served  # type: ignore[method-assign]
    await leader_of([new], within_s=20)
    assert (await new.ask(Create(id="a"))).id == "a"
    assert len(server.epochs) == 2 + lost


@in_cluster
async def test_time_without_a_leader_does_not_age_locks(server: MemoryServer) -> None:
    old, standby = await led_cluster(server, "a", "b")
    await old.ask(Create(id="a"))
    grant = await old.ask(Start(id="a", worker="w", lock_ttl_ms=60_000))
    await seconds(20)
    await old.ask(Create(id="b"))  # carries the lock time
    await old.kill()
    standby.journal.is_reachable = False
    await seconds(120)
    standby.journal.is_reachable = True
    new = await leader_of([standby])
    left_ms = (await new.ask(Get(id="a"))).lock.expires_at - new.wall_ms()
    assert 39_000 < left_ms <= 40_100
    assert (await new.ask(Progress(id="a", lock_id=grant.lock_id, progress=1))).ttl_ms == 60_000


@pytest.mark.parametrize("ahead_ms", [-3_600_000, 3_600_000])
@in_cluster
async def test_clocks_that_differ_by_an_hour_change_no_lock_and_no_token_goes_back(
    server: MemoryServer, ahead_ms: int
) -> None:
    old = ClusterNode(server, "a")
    await leader_of([old])
    standby = ClusterNode(server, "b", ahead_ms=ahead_ms, boot_ms=987_654_321)
    join([old, standby])
    await old.ask(Create(id="a"))
    grant = await old.ask(Start(id="a", worker="w", lock_ttl_ms=60_000))
    await seconds(1)
    await old.kill()
    new = await leader_of([standby])
    left_ms = (await new.ask(Get(id="a"))).lock.expires_at - new.wall_ms()
    assert 57_000 < left_ms <= 60_100
    await new.ask(Create(id="b"))
    assert (await new.ask(Start(id="b", worker="w"))).fencing_token > grant.fencing_token


@in_cluster
async def test_jobs_of_a_leader_whose_clock_was_ahead_stay_due(server: MemoryServer) -> None:
    old, standby = ClusterNode(server, "a", ahead_ms=3_600_000), ClusterNode(server, "b")
    join([old, standby])
    old = await leader_of([old, standby])
    assert old.ahead_ms
    await old.create("first", "held")
    grant = await old.ask(Start(id="held", worker="w"))
    await old.ask(Create(id="later", delay_ms=60_000))
    await old.ask(Create(id="delayed", delay_ms=500))
    await seconds(1)
    await old.ask(Create(id="last"))
    await old.kill()
    new = await leader_of([standby])
    await new.ask(Create(id="new"))
    assert (await new.ask(Why(id="first"))).because.startswith("It has waited for")
    assert (await new.ask(Start(id="later", worker="w"))) == "not_due"
    await new.ask(Release(id="held", lock_id=grant.lock_id))
    granted = (await new.ask(Claim(worker="w", limit=9))).grants
    assert [each.job.id for each in granted] == ["first", "held", "delayed", "last", "new"]


@in_cluster
async def test_a_node_starts_from_an_empty_disk_and_from_an_old_one(
    server: MemoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_state, "PIECE_EVENTS", 20)  # less than the events of one read
    [first] = await led_cluster(server, "a")
    await first.create(*(f"job-{number}" for number in range(450)))  # several reads
    late = ClusterNode(server, "b")
    join([first, late])
    await seconds(2)
    assert late.warm.number == 450
    disk = late.disk
    await late.stop()
    await first.ask(Create(id="more"))
    again = ClusterNode(server, "b", disk)
    join([first, again])
    await first.kill()
    await leader_of([again])
    assert again.disk.jobs.keys() == first.disk.jobs.keys()


@in_cluster
async def test_a_stopped_leader_is_replaced_at_once(server: MemoryServer) -> None:
    old, other = await led_cluster(server, "a", "b")
    await old.ask(Create(id="a"))
    began_s = loop_s()
    await old.stop()
    await leader_of([other])
    assert loop_s() - began_s < 0.2


@in_cluster
async def test_two_nodes_that_take_over_at_once_do_not_both_lead() -> None:
    for _ in range(20):
        server = MemoryServer()
        nodes = cluster(server, "a", "b", "c")
        await leader_of(nodes)
        await seconds(1)
        assert [node.leads for node in nodes].count(True) == 1
        assert len(server.epochs) == 1
        for node in nodes:
            await node.stop()
