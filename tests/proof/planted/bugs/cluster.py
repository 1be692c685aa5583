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


@bug(
    "fence-left-out",
    MemorySharedJournal._append,
    breaks="a leader that was replaced appends",
    found_by=CLUSTER_SIMULATION,
)
async def _(append: Any, self: MemorySharedJournal, record: Record, acked: int, epoch: int) -> None:
    await self._begin("append")
    head = self.server.head
    self.server.records.append(replace(record, number=head.number + 1))
    await self._confirm("append", self.server.change(replace(head, number=head.number + 1)), self.server.failovers)


@bug(
    "response-before-the-quorum",
    MemorySharedJournal._confirm,
    breaks="an append returns when one machine has it",
    found_by=CLUSTER_SIMULATION,
)
async def _(confirm: Any, self: MemorySharedJournal, call: str, head: Any, failovers: int) -> None:
    if call != "append":
        await confirm(self, call, head, failovers)


@bug(
    "lease-counted-from-the-response",
    LeaderLease.renewed,
    breaks="a renewal counts from its response, not from before it was sent",
    found_by=CLUSTER_SIMULATION,
)
def _(renewed: Any, self: LeaderLease, sent: Instant) -> None:
    renewed(self, self.now())


@bug(
    "takeover-before-the-lease-is-over",
    StandbyLease.see,
    breaks="a standby waits for half of the lease",
    found_by="tests/unit/cluster/test_lease.py::test_the_leader_stops_before_a_standby_takes_over",
)
def _(see: Any, self: StandbyLease, head: Head) -> bool:
    lease_s, self.lease_s = self.lease_s, self.lease_s / 2
    try:
        return bool(see(self, head))
    finally:
        self.lease_s = lease_s


@bug(
    "longer-lease-of-the-leader-ignored",
    StandbyLease.respect,
    breaks="a leader with a longer lease serves reads after another node leads",
    found_by="tests/unit/cluster/test_standby.py",
)
def _(respect: Any, self: StandbyLease, leader_s: float) -> bool:
    return bool(respect(self, 0.0))


@bug(
    "numbers-reused-after-a-failover",
    Standby._is_complete,
    breaks="events get the numbers of events that a failover of the server has lost",
    found_by="tests/unit/cluster/test_standby.py",
)
async def _(is_complete: Any, self: Standby) -> bool:
    return self.settings.is_synchronous


@bug(
    "lease-judged-by-the-wall-clock",
    StandbyLease.see,
    breaks="a standby measures the lease with the wall clock of the server",
    found_by="tests/unit/cluster/test_lease.py::test_the_wall_clock_of_the_server_does_not_matter",
)
def _(see: Any, self: StandbyLease, head: Head) -> bool:
    self._now_s = lambda: BootS(head.at / 1000)
    return bool(see(self, head))


@bug(
    "unacknowledged-records-applied",
    standby.acknowledged,
    breaks="a standby applies a record that a failover can lose",
    found_by=CLUSTER_SIMULATION,
)
def _(acknowledged: Any, records: list[Record], acked: int) -> list[Record]:
    return records


@bug(
    "takeover-without-the-tail",
    Standby._take_over,
    breaks="a new leader lacks the last records",
    found_by=CLUSTER_SIMULATION,
)
async def _(take_over: Any, self: Standby) -> Leadership | None:
    lease = LeaderLease(self.settings.lease_s, self._now_s, self._wall_s)
    if (head := await self._take_leadership(lease)) is None:
        return None
    self._begin_epoch(head.epoch, may_have_lost=False)
    return Leadership(self._journal, head, lease, next_epoch=lambda: self._next_epoch(self._warm.state.epoch))


_followed: WeakSet[WarmState] = WeakSet()


@bug(
    "snapshot-without-its-tail",
    WarmState.apply,
    breaks="a node that starts from a snapshot skips the records after it",
    found_by=CLUSTER_SIMULATION,
)
async def _(apply: Any, self: WarmState, records: list[Record]) -> None:
    if self in _followed or not records:
        await apply(self, records)
    else:
        _followed.add(self)
        self.number, self.last_event = records[-1].number, records[-1].last_event


@bug(
    "locks-age-without-a-leader",
    WarmState.opened,
    breaks="lock time goes on between two leaders",
    found_by=CLUSTER_SIMULATION,
)
def _(opened: Any, self: WarmState) -> OpenedStore:
    found: OpenedStore = opened(self)
    return replace(found, numbers=replace(found.numbers, lock_ms=found.numbers.lock_ms + 5_000))


@bug(
    "keys-lost-at-a-takeover",
    WarmState.opened,
    breaks="a repeat after a takeover is done again",
    found_by=CLUSTER_SIMULATION,
)
def _(opened: Any, self: WarmState) -> OpenedStore:
    found: OpenedStore = opened(self)
    return replace(found, keys=[])


@bug(
    "lost-response-appended-twice",
    Leadership._ensure_appended,
    breaks="a record whose response was lost is appended again",
    found_by=CLUSTER_SIMULATION,
)
async def _(ensure_appended: Any, self: Leadership, record: Record, acked: int) -> None:
    head = await self._resolve()
    await self._journal.append(replace(record, number=head.number + 1), acked)


@bug(
    "lease-not-checked-before-reads",
    Leadership.check,
    breaks="responses to reads are sent after the lease",
    found_by=CLUSTER_SIMULATION,
)
def _(check: Any, self: Leadership) -> None:
    if self._lost is not None:
        raise self._lost


@bug(
    "record-that-a-node-does-not-read",
    Appender._check_format,
    breaks="a leader writes a format that an older node does not read",
    found_by="tests/unit/storage/cluster/test_cluster_store.py",
)
def _(check: Any, self: Appender, made: Record) -> None:
    """Accept every format."""


@bug(
    "record-that-acknowledges-itself",
    Appender.append,
    breaks="a record says that it is acknowledged while it is written, so a standby applies it too early",
    found_by=CLUSTER_SIMULATION,
)
async def _(append: Any, self: Appender, prepare: Any, accept: Any) -> Any:
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


@bug(
    "outbox-forgotten-at-a-takeover",
    Dispatcher.__init__,
    breaks="a new leader does not send what the former one had in its outbox",
    found_by=CLUSTER_SIMULATION,
)
def _(init: Any, self: Dispatcher, endpoint: WebhookEndpoint, outbox: Outbox, context: Any, stats: Any) -> None:
    init(self, endpoint, replace(outbox, waiting={endpoint.name: []}), context, stats)
