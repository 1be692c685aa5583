"""Bugs in the leadership of a shared journal, its standbys and takeovers."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from msgspec.structs import replace

from jobd.cluster import standby
from jobd.cluster.leadership import Leadership
from jobd.cluster.lease import Instant, LeaderLease, StandbyLease
from jobd.cluster.standby import Standby
from jobd.cluster.warm_state import WarmState
from jobd.model.clocks import BootS
from jobd.model.journal import Head, Record
from jobd.model.storage import OpenedStore
from jobd.model.webhooks import Outbox, WebhookEndpoint
from jobd.storage.cluster.appender import Appender
from jobd.webhooks.dispatcher import Dispatcher
from tests.proof.planted.registry import CLUSTER_SIMULATION, bug
from tests.support.memory_journal import MemorySharedJournal


@bug(MemorySharedJournal._append, found_by=CLUSTER_SIMULATION)
async def fence_left_out(append: Any, self: MemorySharedJournal, record: Record, acked: int, epoch: int) -> None:
    """A leader that was replaced appends."""
    await self._begin("append")
    head = self.server.head
    self.server.records.append(replace(record, number=head.number + 1))
    await self._confirm("append", self.server.change(replace(head, number=head.number + 1)), self.server.failovers)


@bug(MemorySharedJournal._confirm, found_by=CLUSTER_SIMULATION)
async def response_before_the_quorum(
    confirm: Any, self: MemorySharedJournal, call: str, head: Any, failovers: int
) -> None:
    """An append returns when one machine has it."""
    if call != "append":
        await confirm(self, call, head, failovers)


@bug(LeaderLease.renewed, found_by=CLUSTER_SIMULATION)
def lease_counted_from_the_response(renewed: Any, self: LeaderLease, sent: Instant) -> None:
    """A renewal counts from its response, not from before it was sent."""
    renewed(self, self.now())


@bug(StandbyLease.see, found_by="tests/unit/cluster/test_lease.py::test_the_leader_stops_before_a_standby_takes_over")
def takeover_before_the_lease_is_over(see: Any, self: StandbyLease, head: Head) -> bool:
    """A standby waits for half of the lease."""
    lease_s, self.lease_s = self.lease_s, self.lease_s / 2
    try:
        return bool(see(self, head))
    finally:
        self.lease_s = lease_s


@bug(StandbyLease.respect, found_by="tests/unit/cluster/test_standby.py")
def longer_lease_of_the_leader_ignored(respect: Any, self: StandbyLease, leader_s: float) -> bool:
    """A leader with a longer lease serves reads after another node leads."""
    return bool(respect(self, 0.0))


@bug(Standby._is_complete, found_by="tests/unit/cluster/test_standby.py")
async def numbers_reused_after_a_failover(is_complete: Any, self: Standby) -> bool:
    """Events get the numbers of events that a failover of the server has lost."""
    return self.settings.is_synchronous


@bug(StandbyLease.see, found_by="tests/unit/cluster/test_lease.py::test_the_wall_clock_of_the_server_does_not_matter")
def lease_judged_by_the_wall_clock(see: Any, self: StandbyLease, head: Head) -> bool:
    """A standby measures the lease with the wall clock of the server."""
    self._now_s = lambda: BootS(head.at / 1000)
    return bool(see(self, head))


@bug(standby.acknowledged, found_by=CLUSTER_SIMULATION)
def unacknowledged_records_applied(acknowledged: Any, records: list[Record], acked: int) -> list[Record]:
    """A standby applies a record that a failover can lose."""
    return records


@bug(Standby._take_over, found_by=CLUSTER_SIMULATION)
async def takeover_without_the_tail(take_over: Any, self: Standby) -> Leadership | None:
    """A new leader lacks the last records."""
    lease = LeaderLease(self.settings.lease_s, self._now_s, self._wall_s)
    if (head := await self._take_leadership(lease)) is None:
        return None
    self._begin_epoch(head.epoch, may_have_lost=False)
    return Leadership(self._journal, head, lease, next_epoch=lambda: self._next_epoch(self._warm.state.epoch))


_followed: WeakSet[WarmState] = WeakSet()


@bug(WarmState.apply, found_by=CLUSTER_SIMULATION)
async def snapshot_without_its_tail(apply: Any, self: WarmState, records: list[Record]) -> None:
    """A node that starts from a snapshot skips the records after it."""
    if self in _followed or not records:
        await apply(self, records)
    else:
        _followed.add(self)
        self.number, self.last_event = records[-1].number, records[-1].last_event


@bug(WarmState.opened, found_by=CLUSTER_SIMULATION)
def locks_age_without_a_leader(opened: Any, self: WarmState) -> OpenedStore:
    """Lock time goes on between two leaders."""
    found: OpenedStore = opened(self)
    return replace(found, numbers=replace(found.numbers, lock_ms=found.numbers.lock_ms + 5_000))


@bug(WarmState.opened, found_by=CLUSTER_SIMULATION)
def keys_lost_at_a_takeover(opened: Any, self: WarmState) -> OpenedStore:
    """A repeat after a takeover is done again."""
    found: OpenedStore = opened(self)
    return replace(found, keys=[])


@bug(Leadership._ensure_appended, found_by=CLUSTER_SIMULATION)
async def lost_response_appended_twice(ensure_appended: Any, self: Leadership, record: Record, acked: int) -> None:
    """A record whose response was lost is appended again."""
    head = await self._resolve()
    await self._journal.append(replace(record, number=head.number + 1), acked)


@bug(Leadership.check, found_by=CLUSTER_SIMULATION)
def lease_not_checked_before_reads(check: Any, self: Leadership) -> None:
    """Responses to reads are sent after the lease."""
    if self._lost is not None:
        raise self._lost


@bug(Appender._check_format, found_by="tests/unit/storage/cluster/test_cluster_store.py")
def record_that_a_node_does_not_read(check: Any, self: Appender, made: Record) -> None:
    """A leader writes a format that an older node does not read."""


@bug(Appender.append, found_by=CLUSTER_SIMULATION)
async def record_that_acknowledges_itself(append: Any, self: Appender, prepare: Any, accept: Any) -> Any:
    """A record says that it is acknowledged while it is written, so a standby applies it too early."""
    to_journal = self._to_journal

    async def acknowledge(made: Record, acked: int) -> None:
        assert to_journal is not None
        await to_journal(made, made.number)

    if to_journal is not None:
        self._to_journal = acknowledge
    try:
        return await append(self, prepare, accept)
    finally:
        if self._to_journal is acknowledge:
            self._to_journal = to_journal


@bug(Dispatcher.__init__, found_by=CLUSTER_SIMULATION)
def outbox_forgotten_at_a_takeover(
    init: Any, self: Dispatcher, endpoint: WebhookEndpoint, outbox: Outbox, context: Any, stats: Any
) -> None:
    """A new leader does not send what the former one had in its outbox."""
    init(self, endpoint, replace(outbox, waiting={endpoint.name: []}), context, stats)
