"""The leadership of a journal: renewals, appends with an unknown outcome, and when it is lost."""

from __future__ import annotations

import asyncio

import pytest

from jobd.cluster.leadership import LATE_S, MIN_WAIT_S, Leadership
from jobd.cluster.lease import LeaderLease
from jobd.model.clocks import BootS
from jobd.model.journal import Fenced, JournalOutcomeUnknown, LeadershipLost, Record
from jobd.model.storage import DiskFull
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.support.virtual_engine import in_virtual_time, seconds

LEASE_S = 3.0
OVER_S = LEASE_S * 0.9  # after which the leader counts its lease as over
LATE_RESPONSE_S = OVER_S + LATE_S / 2


class Node:
    """One node of a cluster with virtual time, which leads from `lead` on."""

    def __init__(self, server: MemoryServer, name: str = "a") -> None:
        self.journal = MemorySharedJournal(server)
        self.name = name
        self.lost: list[Exception] = []
        self.epochs: list[int] = []

    async def lead(self) -> Leadership:
        now_s = asyncio.get_running_loop().time
        self.ahead_s = 0.0  # of the wall clock
        self.lease = LeaderLease(LEASE_S, lambda: BootS(now_s()), lambda: now_s() + self.ahead_s)
        sent = self.lease.now()
        seen = await self.journal.head()
        head = await self.journal.take_over(seen, holder=self.name, url=f"http://{self.name}", epoch=100)
        assert head is not None
        self.lease.renewed(sent)
        self.leadership = Leadership(
            self.journal,
            head,
            self.lease,
            next_epoch=lambda: self.leadership.epoch + 1,
            on_epoch=self.epochs.append,
            on_lost=self.lost.append,
        )
        return self.leadership

    def delay(self, call: str, by_s: float) -> None:
        async def wait(name: str) -> None:
            if name == call:
                await asyncio.sleep(by_s)

        self.journal.after = wait


@pytest.fixture
def node(server: MemoryServer) -> Node:
    return Node(server)


def record(number: int) -> Record:
    return Record(number, number, number, 100, 0, b"body")


def numbers(server: MemoryServer) -> list[int]:
    return [each.number for each in server.records]


@in_virtual_time
async def test_an_idle_leader_renews_at_a_third_of_the_lease(server: MemoryServer, node: Node) -> None:
    leadership = await node.lead()
    version = server.head.version
    task = asyncio.create_task(leadership.run())
    await seconds(30.5)
    assert (server.head.version - version, server.head.acked) == (30, 0)
    leadership.check()
    leadership.stop()
    await task


@in_virtual_time
async def test_an_append_renews_the_lease(server: MemoryServer, node: Node) -> None:
    leadership = await node.lead()
    task = asyncio.create_task(leadership.run())
    renewals = server.head.version
    for number in range(1, 11):
        await seconds(0.9)
        await leadership.append(record(number), number - 1)
    assert server.head.version - renewals == 10
    assert (leadership.acked, server.head.acked, numbers(server)) == (10, 9, list(range(1, 11)))
    await seconds(LEASE_S / 2)
    assert server.head.acked == 10, "as the renewal says"
    leadership.stop()
    await task


@pytest.mark.parametrize("hook", ["before", "after"])
@in_virtual_time
async def test_a_lost_response_to_an_append_is_resolved(server: MemoryServer, node: Node, hook: str) -> None:
    leadership = await node.lead()
    node.journal.fail(hook, "append")
    await leadership.append(record(1), 0)
    await leadership.append(record(2), 1)
    assert (numbers(server), leadership.acked, node.epochs, leadership.epoch) == ([1, 2], 2, [101], 101)


@in_virtual_time
async def test_a_lost_response_is_resolved_although_the_next_ones_are_lost_too(
    server: MemoryServer, node: Node
) -> None:
    leadership = await node.lead()
    node.journal.fail("before", "append", "append", "resolve", "resolve")
    await leadership.append(record(1), 0)
    assert numbers(server) == [1]


@pytest.mark.parametrize("hook", ["before", "after"])
@in_virtual_time
async def test_an_outcome_that_becomes_unknown_after_the_lease_is_still_resolved(
    server: MemoryServer, node: Node, hook: str
) -> None:
    """Only the journal knows whether another node leads."""
    leadership = await node.lead()
    slow = {"append": LEASE_S * 0.9 + LATE_S / 2, "resolve": MIN_WAIT_S / 2}

    async def lose(call: str) -> None:
        await asyncio.sleep(slow.pop(call, 0))
        if call == "append" and "resolve" in slow:
            assert node.lease.is_over
            raise JournalOutcomeUnknown

    setattr(node.journal, hook, lose)
    await leadership.append(record(1), 0)
    assert (numbers(server), leadership.acked, node.epochs) == ([1], 1, [101])
    leadership.check()


@in_virtual_time
async def test_a_lost_renewal_is_resolved(node: Node) -> None:
    leadership = await node.lead()
    node.journal.fail("after", "renew")
    task = asyncio.create_task(leadership.run())
    await seconds(10)
    assert (node.lost, node.epochs) == ([], [101])
    leadership.check()
    leadership.stop()
    await task


@in_virtual_time
async def test_a_leader_without_its_journal_stops_before_its_lease_ends_elsewhere(node: Node) -> None:
    leadership = await node.lead()
    task = asyncio.create_task(leadership.run())
    began_s = node.lease.now().at_s
    node.journal.is_reachable = False
    await task
    assert 2.6 < node.lease.now().at_s - began_s < LEASE_S
    assert [str(error) for error in node.lost] == [
        "the lease is over, because the journal did not confirm a renewal in time"
    ]
    with pytest.raises(LeadershipLost):
        leadership.check()


@in_virtual_time
async def test_a_journal_that_returns_within_the_lease_interrupts_nothing(server: MemoryServer, node: Node) -> None:
    leadership = await node.lead()
    node.journal.is_reachable = False
    append = asyncio.create_task(leadership.append(record(1), 0))
    await seconds(2)
    assert not append.done()
    node.journal.is_reachable = True
    await append
    assert numbers(server) == [1]
    leadership.check()


@pytest.mark.parametrize("is_reachable", [False, True])
@in_virtual_time
async def test_an_append_whose_outcome_stays_unknown_says_so(node: Node, is_reachable: bool) -> None:
    leadership = await node.lead()

    async def lose(call: str) -> None:
        node.journal.is_reachable = is_reachable
        raise JournalOutcomeUnknown

    node.journal.before = lose
    with pytest.raises(JournalOutcomeUnknown, match="record 1 may be in the journal or not: the lease is over"):
        await leadership.append(record(1), 0)


@in_virtual_time
async def test_an_append_waits_for_a_resolution_until_the_lease_ends(node: Node) -> None:
    leadership = await node.lead()

    async def hang(call: str) -> None:
        if call == "append":
            raise JournalOutcomeUnknown
        await asyncio.sleep(60)

    node.journal.before = hang
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(JournalOutcomeUnknown, match="the lease is over"):
        await leadership.append(record(1), 0)
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(OVER_S + LATE_S)


@in_virtual_time
async def test_a_leadership_that_an_append_has_lost_is_not_renewed(node: Node) -> None:
    leadership = await node.lead()
    task = asyncio.create_task(leadership.run())
    calls: list[str] = []

    async def lose(call: str) -> None:
        calls.append(call)
        raise JournalOutcomeUnknown

    node.journal.before = lose
    with pytest.raises(JournalOutcomeUnknown):
        await leadership.append(record(1), 0)
    count = len(calls)
    await task
    assert (len(calls), [type(error) for error in node.lost]) == (count, [JournalOutcomeUnknown])


@in_virtual_time
async def test_a_fenced_leader_writes_nothing(server: MemoryServer) -> None:
    old, new = Node(server), Node(server, "b")
    leadership = await old.lead()
    task = asyncio.create_task(leadership.run())
    await new.lead()
    with pytest.raises(Fenced, match="another node leads"):
        await leadership.append(record(1), 0)
    await task
    assert ([type(error) for error in old.lost], numbers(server)) == ([Fenced], [])


@in_virtual_time
async def test_a_leader_that_was_fenced_during_a_lost_append_does_not_know_the_outcome(server: MemoryServer) -> None:
    old, new = Node(server), Node(server, "b")
    leadership = await old.lead()

    async def take_over(call: str) -> None:
        if call == "append":
            await new.lead()
            raise JournalOutcomeUnknown

    old.journal.after = take_over
    with pytest.raises(JournalOutcomeUnknown, match="another node leads"):
        await leadership.append(record(1), 0)


@in_virtual_time
async def test_a_full_disk_of_the_server_is_not_an_unknown_outcome(server: MemoryServer, node: Node) -> None:
    leadership = await node.lead()
    node.journal.fail("before", "append", error=DiskFull("the disk of the server is full"))
    with pytest.raises(DiskFull):
        await leadership.append(record(1), 0)
    assert leadership.acked == 0
    await leadership.append(record(1), 0)
    assert leadership.acked == 1


@in_virtual_time
async def test_an_append_that_outlasts_the_lease_is_followed_by_a_renewal(node: Node) -> None:
    """It is durable, so no other node led when it was written; a later read needs proof of its own."""
    leadership = await node.lead()
    node.delay("append", LATE_RESPONSE_S)
    append = asyncio.create_task(leadership.append(record(1), 0))
    await seconds(LEASE_S - 1)
    assert leadership.is_waiting
    await seconds(LATE_RESPONSE_S - LEASE_S + 1 - 0.01)
    assert not leadership.is_waiting, "the lease is over"
    assert isinstance(leadership.loss, LeadershipLost)
    await append
    assert leadership.loss is None


@in_virtual_time
async def test_an_append_that_outlasts_the_lease_of_a_fenced_leader_ends_the_leadership(server: MemoryServer) -> None:
    old, new = Node(server), Node(server, "b")
    leadership = await old.lead()

    async def take_over(call: str) -> None:
        if call == "append":
            await asyncio.sleep(LATE_RESPONSE_S)
            await new.lead()

    old.journal.after = take_over
    await leadership.append(record(1), 0)
    with pytest.raises(LeadershipLost):
        leadership.check()


@in_virtual_time
async def test_the_wait_for_an_append_ends_with_the_lease_and_the_append_goes_on(
    server: MemoryServer, node: Node
) -> None:
    began_s = asyncio.get_running_loop().time()
    leadership = await node.lead()
    await seconds(1)
    node.delay("append", 10)
    with pytest.raises(JournalOutcomeUnknown, match="record 1 may be in the journal or not: the lease is over"):
        await leadership.append(record(1), 0)
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(OVER_S + LATE_S)
    assert server.durable.number == 0
    await seconds(10)
    assert server.durable.number == 1


@in_virtual_time
async def test_an_append_that_waits_for_a_renewal_waits_no_longer_than_the_lease(node: Node) -> None:
    began_s = asyncio.get_running_loop().time()
    leadership = await node.lead()
    task = asyncio.create_task(leadership.run())
    node.delay("renew", 10)
    await seconds(1.5)
    with pytest.raises(LeadershipLost, match="this node no longer leads: the lease is over"):
        await leadership.append(record(1), 0)
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(OVER_S + LATE_S)
    await task
    assert [str(error) for error in node.lost] == [
        "the lease is over, because the journal did not confirm a renewal in time"
    ]


@in_virtual_time
async def test_a_statement_that_is_sent_after_the_lease_gets_a_moment(node: Node) -> None:
    """After the process stood still, no other node may lead."""
    leadership = await node.lead()
    await seconds(LEASE_S)
    node.delay("append", MIN_WAIT_S - 0.1)
    await leadership.append(record(1), 0)
    leadership.check()


@pytest.mark.parametrize("jump_s", [-1.0, 1.0])
@in_virtual_time
async def test_reads_wait_for_a_renewal_after_the_clocks_have_jumped(server: MemoryServer, jump_s: float) -> None:
    """The clock of the lease of a virtual machine stands still while it is paused. Its wall clock is corrected."""
    old, new = Node(server), Node(server, "b")
    leadership = await old.lead()
    assert leadership.confirm() is None
    leadership.check_confirmed()
    old.ahead_s = jump_s
    with pytest.raises(LeadershipLost, match="the clocks of this machine have jumped"):
        leadership.check_confirmed()
    version = server.head.version
    first, second = leadership.confirm(), leadership.confirm()
    assert first is not None
    assert second is not None
    await asyncio.gather(first, second)
    assert server.head.version == version + 1
    assert leadership.confirm() is None
    old.ahead_s += 10
    await new.lead()
    confirming = leadership.confirm()
    assert confirming is not None
    with pytest.raises(Fenced):
        await confirming
    with pytest.raises(Fenced):
        leadership.check()


@in_virtual_time
async def test_a_renewal_that_is_confirmed_after_the_lease_allows_no_read(server: MemoryServer) -> None:
    old, new = Node(server), Node(server, "b")
    leadership = await old.lead()

    async def lose_leadership(call: str) -> None:
        if call == "renew" and server.head.holder == "a":
            await asyncio.sleep(LATE_RESPONSE_S)
            await new.lead()

    old.journal.after = lose_leadership
    old.ahead_s = 1.0
    confirming = leadership.confirm()
    assert confirming is not None
    with pytest.raises(Fenced):
        await confirming


@in_virtual_time
async def test_a_renewal_that_is_due_during_an_append_is_left_out(server: MemoryServer, node: Node) -> None:
    leadership = await node.lead()
    task = asyncio.create_task(leadership.run())
    await seconds(0.9)
    node.delay("append", 0.5)
    await leadership.append(record(1), 0)
    version = server.head.version
    await seconds(0.4)
    assert server.head.version == version
    await seconds(0.2)
    assert server.head.version == version + 1
    leadership.stop()
    await task


@in_virtual_time
async def test_a_stopped_lead_no_longer_renews(server: MemoryServer) -> None:
    leadership = await Node(server).lead()
    version = server.head.version
    leadership.stop()
    await leadership.run()
    assert server.head.version == version


@in_virtual_time
async def test_released_leadership_is_free_at_once(server: MemoryServer, node: Node) -> None:
    leadership = await node.lead()
    await leadership.release()
    assert (server.head.holder, (await node.journal.head()).is_connected) == (None, False)
    with pytest.raises(LeadershipLost, match="has released leadership"):
        leadership.check()
    version = server.head.version
    await leadership.release()
    assert server.head.version == version
    await leadership.run()  # it has nothing to renew


@pytest.mark.parametrize("is_reachable", [True, False])
@in_virtual_time
async def test_a_leadership_that_cannot_be_released_ends_with_its_lease(node: Node, is_reachable: bool) -> None:
    leadership = await node.lead()
    node.journal.fail("after", "release")
    node.journal.is_reachable = is_reachable
    await leadership.release()
    with pytest.raises(LeadershipLost):
        leadership.check()


@in_virtual_time
async def test_a_renewal_is_repeated_while_the_disk_of_the_server_is_full(server: MemoryServer, node: Node) -> None:
    leadership = await node.lead()
    task = asyncio.create_task(leadership.run())
    is_full = True

    async def fill(call: str) -> None:
        if is_full:
            raise DiskFull("the disk of the server is full")

    node.journal.before = fill
    await seconds(2)
    assert not task.done()
    is_full = False
    await seconds(2)
    leadership.check()
    is_full = True
    await task
    assert [type(error) for error in node.lost] == [LeadershipLost]
