"""Follow a shared journal until this node can lead it, and take over.

`Standby` holds the head of the journal as last seen, the lease of the leader as this node sees it, and a warm state:
the state in memory and the tables that a start would load, as of the last applied record.

    every 50 ms  read the head ─> is it our branch? ─> read records ─> apply the acknowledged ones ─> may lead? ──┐
                                   └ no: wait (StoreAhead), or end and rebuild the store (StoreDamaged)           │
    takeover     decode the rest ─> take_over(head as seen, new epoch) ─> apply the rest ─> renew if late ─> lead <┘
                   └ unreadable: end            └ another node was faster: follow on

May lead: the lease is over, or the leader has released it, or the leader's session has ended and its address
refuses connections.

Invariants:

- Records are applied in the order of their numbers, without a gap, each once.
- A record is applied only if it is acknowledged: the leader said so (`Head.acked`), or a later record exists. A record
  that is only visible can be lost with its server. A takeover acknowledges all records up to its head.
- The lease is over if this node has seen no change of the head for the longer one of its own lease and that of the
  leader by the leader's setting. The time in which the head cannot be read counts. Only the boot clock of this node is
  used. Without a head that was just read, no node takes over.
- A refused connection counts only if no proxy is between (`is_direct`) and PostgreSQL has no session of the leader. The
  process of the leader is then taken to have ended.
- Before each takeover, this node has applied all records but the last one at most, the store has all of those, and in
  this epoch the journal was seen to have the last one of them. A store that is ahead of the journal, or on another
  branch, does not lead.
- `take_over` is conditional on the head as seen, so of several nodes one succeeds. Its epoch is above that head's and
  above all epochs of the state, so tokens rise and the former leader is fenced.
- If the outcome of a takeover is unknown twice, the node follows on. Leadership that began unnoticed is not used, and
  ends with its lease.
- The node leads with every record up to the head of the takeover. If the server has lost some of them meanwhile, it
  does not lead.
- If PostgreSQL may have lost acknowledged records (a failover, or no synchronous standby), numbers of jobs and events
  continue JUMP higher, so that no number of a lost record is given again.
- If the takeover took a third of a lease or longer, the lease is renewed before this node leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

import structlog
from msgspec import Struct

from jobd.cluster.leadership import Leadership
from jobd.cluster.lease import LeaderLease, StandbyLease, boot_clock_s, lease_of
from jobd.cluster.warm_state import WarmState
from jobd.journal import record
from jobd.model.clocks import BootS
from jobd.model.journal import BadRecord, Fenced, Head, JournalOutcomeUnknown, JournalUnavailable, Record, SharedJournal
from jobd.model.storage import DiskFull
from jobd.storage.cluster.membership import StoreAhead, StoreDamaged

POLL_S: Final = 0.05
READ_LIMIT: Final = 50  # records of one read; the head is read again after they are applied
CONNECT_S: Final = 0.2  # for the leader's address to refuse a connection
RETRY_S: Final = 1.0  # after a local disk was full
JUMP: Final = 1 << 20  # of the numbers of jobs and events, above those of records that may be lost

log = structlog.get_logger("jobd.cluster")


class NodeSettings(Struct, frozen=True, kw_only=True):
    """The properties of a node that matter to the others.

    `holder` is the random id of this process, `url` its address for clients. `is_direct`: no proxy is between a node
    and its `url`. `is_synchronous`: every acknowledged record survives a failover of the server.
    """

    holder: str
    url: str
    lease_s: float = 3.0
    is_direct: bool = True
    is_synchronous: bool = True


class Standby:
    """Follows `journal` with `warm` until it leads. `next_epoch` returns an epoch above the given one.

    `head` is the journal as last seen, `problem` why it cannot be read or followed now.
    """

    def __init__(
        self,
        journal: SharedJournal,
        warm: WarmState,
        settings: NodeSettings,
        *,
        next_epoch: Callable[[int], int],
        now_s: Callable[[], BootS] = boot_clock_s,
        wall_s: Callable[[], float] = time.time,
        refuses_connections: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        self.head: Head | None = None
        self.problem: str | None = None
        self.settings = settings
        self._journal = journal
        self._warm = warm
        self._next_epoch = next_epoch
        self._now_s = now_s
        self._wall_s = wall_s
        self._refuses_connections = refuses_connections or refuses_connections_at
        self._lease = StandbyLease(settings.lease_s, now_s)
        self._last_event = warm.last_event  # of the records that were read
        self._checked_epoch: int | None = None  # in which the journal has the records that were applied
        self._timeline: int | None = None  # of the server in that epoch
        self._heard_s = now_s()  # when the journal last responded
        self._stop = asyncio.Event()

    @property
    def unheard_s(self) -> float:
        """The seconds since this node has read the head of the journal."""
        return self._now_s() - self._heard_s

    @property
    def leader(self) -> str | None:
        """The URL of the leader. None if its lease is over, or if this node has not heard of it for that long."""
        return None if self.head is None or self._lease.is_over else self.head.url

    @property
    def lag_records(self) -> int:
        """The number of records that this node has not applied."""
        return 0 if self.head is None else max(self.head.number - self._warm.number, 0)

    @property
    def lag_events(self) -> int:
        """The number of events that this node has not applied, at least."""
        return max(self._last_event - self._warm.last_event, self.lag_records)

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    async def run(self) -> Leadership | None:
        """Follow until this node leads. Return None after `stop`. Raises BadRecord or StoreDamaged if it cannot."""
        while not self._stop.is_set():
            wait_s, number = POLL_S, self._warm.number
            try:
                if await self._poll() and (leadership := await self._take_over()) is not None:
                    return leadership
                self._note(None)
                if self._warm.number > number and self.lag_records > 1:
                    wait_s = 0  # it catches up
            except (JournalUnavailable, StoreAhead) as error:
                self._note(str(error))
            except DiskFull as error:
                self._note(f"this node cannot follow: {error}")
                wait_s = RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stop.wait()
        return None

    def _note(self, problem: str | None) -> None:
        if problem is not None and self.problem is None:
            log.warning("standby_waits", reason=problem)
        elif problem is None and self.problem is not None:
            log.info("standby_follows")
        self.problem = problem

    async def read_head(self) -> Head:
        """Read `head`. Raises JournalUnavailable."""
        head = self.head = await self._journal.head()
        self._heard_s = self._now_s()
        return head

    async def _poll(self) -> bool:
        """Apply the next acknowledged records. Return whether this node may lead now."""
        head = await self.read_head()
        is_over = self._lease.see(head)
        if is_over and head.holder is not None:
            is_over = self._lease.respect(lease_of(head.holder, await self._journal.nodes()))
        if head.epoch != self._checked_epoch or head.number < self._warm.number:
            await self._check_branch(head)
        if self._warm.number < head.number:
            try:
                records = await self._journal.read(self._warm.number, READ_LIMIT)
            except BadRecord:
                await self._check_branch(head)  # the journal may have been trimmed meanwhile
                raise
            if records:  # else the server has failed over, and has lost records that were not acknowledged
                self._last_event = records[-1].last_event
                await self._warm.apply(acknowledged(records, head.acked))
        if self._warm.number < head.number - 1:
            return False  # there are more records
        await self._warm.write()  # a leader appends to a store that has all records
        if is_over:
            return True
        is_alone = self.settings.is_direct and not head.is_connected
        return is_alone and bool(head.url) and await self._refuses_connections(head.url or "")

    async def _check_branch(self, head: Head) -> None:
        """Check that the journal has the last record that was applied, which a failover of the server can lose.

        Raises StoreAhead: this node may not lead. Raises StoreDamaged if another node has continued without the record,
        or if it was trimmed.
        """
        if not await self._warm.is_on_branch(self._journal):
            raise StoreDamaged(
                f"the journal has continued without record {self._warm.number}, the last one of this node, or has "
                "trimmed it: the next start rebuilds the tables"
            )
        self._timeline = (await self._journal.health()).timeline
        self._checked_epoch = head.epoch

    async def _take_over(self) -> Leadership | None:
        """Become the leader, and apply the rest of the records.

        Return None if another node was faster, or if the server has lost the takeover.
        """
        assert self.head is not None
        if self.problem is None:
            log.info("takes_over", record=self.head.number)
        if self._warm.number < self.head.number:  # a node that cannot read the last record does not lead
            for each in await self._journal.read(self._warm.number, READ_LIMIT):
                record.decode(each)
        lease = LeaderLease(self.settings.lease_s, self._now_s, self._wall_s)
        head = await self._take_leadership(lease)
        if head is None:
            return None
        self.head = head
        while self._warm.number < head.number:  # all of them are acknowledged now, and later ones perhaps not
            records = await self._journal.read(self._warm.number, READ_LIMIT)
            if not records:
                return None  # the server has failed over, and has lost the takeover and records before it
            await self._warm.apply([each for each in records if each.number <= head.number])
        is_complete = await self._is_complete()
        if lease.renewal_in_s <= 0:  # the takeover waited, as for a row lock
            sent = lease.now()
            try:
                await self._journal.renew(head.number)
            except (Fenced, JournalOutcomeUnknown):
                return None  # leadership is lost, or ends with its lease
            lease.renewed(sent)
        self._begin_epoch(head.epoch, may_have_lost=not is_complete)
        log.info("leads", epoch=head.epoch, record=head.number)
        return Leadership(
            self._journal,
            head,
            lease,
            next_epoch=lambda: self._next_epoch(max(self._warm.state.epoch, head.epoch)),
        )

    async def _take_leadership(self, lease: LeaderLease) -> Head | None:
        seen, settings = self.head, self.settings
        assert seen is not None
        epoch = self._next_epoch(max(seen.epoch, self._warm.state.epoch))
        sent = lease.now()
        try:
            try:
                head = await self._journal.take_over(seen, holder=settings.holder, url=settings.url, epoch=epoch)
            except JournalOutcomeUnknown:
                sent = lease.now()
                head = await self._journal.resolve(epoch)
        except (Fenced, JournalOutcomeUnknown):
            return None  # leadership that began unnoticed ends with its lease
        if head is not None:
            lease.renewed(sent)
        return head

    async def _is_complete(self) -> bool:
        """Return whether the journal has every acknowledged record: no failover of the server can have lost one."""
        try:
            health = await self._journal.health()
        except JournalUnavailable:
            return False
        return self.settings.is_synchronous and health.is_synchronous and health.timeline == self._timeline

    def _begin_epoch(self, epoch: int, *, may_have_lost: bool) -> None:
        """Begin an epoch above the epochs of all records. The last records were not known when leadership was taken.

        If records may be lost, the numbers of their jobs and events are not assigned again.
        """
        state = self._warm.state
        state.epoch, state.next_token = max(epoch, state.epoch + 1), 1
        if may_have_lost:
            state.next_job += JUMP
            state.next_event += JUMP


def acknowledged(records: list[Record], acked: int) -> list[Record]:
    """Return those of consecutive `records` that are acknowledged: up to `acked`, and all but the last one."""
    return [each for each in records if each.number <= acked or each is not records[-1]]


async def refuses_connections_at(url: str) -> bool:
    """Return whether the machine at `url` refuses connections, because no process listens."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(CONNECT_S):
            if parts.scheme == "unix":
                _, writer = await asyncio.open_unix_connection(parts.path)
            else:
                port = parts.port or (443 if parts.scheme == "https" else 80)
                _, writer = await asyncio.open_connection(parts.hostname, port)
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except (OSError, socket.gaierror):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return False
