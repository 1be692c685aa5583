"""Journals in memory. They fail on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from jobd.journal.record import format_of
from jobd.journal.shielding import to_end
from jobd.model import journal
from jobd.model.storage import EXTRA_FORMAT

_READ_BYTES: Final = 16 << 20
_LEADING: Final = {"append", "renew", "take_over", "resolve", "release"}  # calls whose outcome can be unknown
_UNREACHABLE: Final = "The journal cannot be reached: try again"

T = TypeVar("T")


class MemoryJournal:
    """Keeps its records in a list. `before_append` is called before each append, and may raise its error."""

    def __init__(self) -> None:
        self.records: list[journal.Record] = []
        self.before_append: Callable[[journal.Record], object] = lambda record: None

    def append(self, record: journal.Record) -> None:
        self.before_append(record)
        self.records.append(record)

    def read(self, after: int, limit: int) -> list[journal.Record]:
        return _read(self.records, after, limit)

    def trim(self, upto: int) -> None:
        self.records = [record for record in self.records if record.number > upto]


def _read(records: list[journal.Record], after: int, limit: int) -> list[journal.Record]:
    found = [record for record in records if record.number > after][:limit]
    for number, record in enumerate(found, after + 1):
        if record.number != number:
            raise journal.BadRecord(number, "is missing")
    return found


class MemoryHead(Struct, frozen=True):
    """The row of a shared journal that each append changes. `version` counts its changes."""

    number: int = 0
    epoch: int = 0
    holder: str | None = None
    url: str | None = None
    acked: int = 0
    format: int = 0
    version: int = 0


class MemoryServer:
    """A journal that several MemorySharedJournal share: one for each node.

    A change is visible at once, and durable when the call that made it returns. `fail_over` loses the changes that are
    not durable, as a promoted standby does. `now_ms` is the wall clock of the server.
    """

    def __init__(self, now_ms: Callable[[], int] = lambda: 0, cluster_id: str = "memory") -> None:
        self.now_ms = now_ms
        self.cluster_id = cluster_id
        self.head = MemoryHead()
        self.durable = self.head
        self.records: list[journal.Record] = []
        self.epochs: list[tuple[int, int]] = []
        self.nodes: dict[str, tuple[journal.NodeEntry, int]] = {}  # with the wall time
        self.writes = 0  # of these
        self.snapshots: dict[int, tuple[list[bytes], int]] = {}
        self.snapshot_writer: MemorySharedJournal | None = None
        self.health = journal.JournalHealth(is_synchronous=True, is_waiting=False, oldest_transaction_ms=0)
        self.leader: MemorySharedJournal | None = None  # the handle with the session of the leader
        self.failovers = 0

    def change(self, head: MemoryHead) -> MemoryHead:
        """Make `head` the current state, and return it with its version."""
        self.head = replace(head, version=self.head.version + 1)
        return self.head

    def confirm(self, head: MemoryHead) -> None:
        """Make a change durable, with all changes before it."""
        if head.version > self.durable.version:
            self.durable = head

    def fail_over(self) -> None:
        """Lose what is not durable, and all sessions."""
        self.failovers += 1
        self.head = replace(self.durable, version=self.head.version + 1)
        self.durable = self.head
        self.records = [record for record in self.records if record.number <= self.head.number]
        self.epochs = [each for each in self.epochs if each[0] <= self.head.epoch]
        self.leader = None


Hook = Callable[[str], Awaitable[None]]


async def _nothing(call: str) -> None:
    return None


class MemorySharedJournal:
    """The access of one node to a MemoryServer.

    The hooks get the name of the call. `before` is awaited before its effect, and `after` before it returns: between
    them a record is visible and not durable. They can wait (a slow server) or raise an error. JournalOutcomeUnknown
    from `before` leaves a record out, one from `after` leaves it in. While `is_reachable` is False, every call raises
    JournalUnavailable, and JournalOutcomeUnknown if it was in flight.
    """

    def __init__(self, server: MemoryServer) -> None:
        self.server = server
        self.cluster_id = server.cluster_id
        self.before: Hook = _nothing
        self.after: Hook = _nothing
        self.holder: str | None = None  # the name under which this node last tried to lead
        self.epoch = -1  # matches no epoch
        self._is_reachable = True

    @property
    def is_reachable(self) -> bool:
        return self._is_reachable

    @is_reachable.setter
    def is_reachable(self, value: bool) -> None:
        self._is_reachable = value
        if not value:
            self.disconnect()

    def hold(self, hook: str = "before") -> asyncio.Event:
        """Let all calls wait for the event that is returned."""
        goes_on = asyncio.Event()

        async def wait(call: str) -> None:
            await goes_on.wait()

        setattr(self, hook, wait)
        return goes_on

    def fail(self, hook: str, *calls: str, error: Exception | None = None) -> None:
        """Raise an error once for each of these calls, by default that the outcome is unknown."""
        left = list(calls)

        async def raise_error(call: str) -> None:
            if call in left:
                left.remove(call)
                raise error or journal.JournalOutcomeUnknown

        setattr(self, hook, raise_error)

    def disconnect(self) -> None:
        """End the session of this node on the server."""
        if self.server.leader is self:
            self.server.leader = None

    async def head(self) -> journal.Head:
        await self._begin("head")
        return await self._end("head", self._head(self.server.head))

    async def append(self, record: journal.Record, acked: int) -> None:
        await to_end(self._append(record, acked, self.epoch))

    async def renew(self, acked: int) -> int:
        return await to_end(self._renew(acked, self.epoch))

    async def take_over(self, seen: journal.Head, *, holder: str, url: str, epoch: int) -> journal.Head | None:
        return await to_end(self._take_over(seen, holder, url, epoch))

    async def resolve(self, epoch: int) -> journal.Head:
        return await to_end(self._resolve(epoch))

    async def release(self) -> None:
        failovers = await self._begin("release")
        if self.server.head.epoch == self.epoch:
            self.disconnect()
            await self._confirm("release", self.server.change(replace(self.server.head, holder=None)), failovers)

    async def read(self, after: int, limit: int) -> list[journal.Record]:
        await self._begin("read")
        found, size = [], 0
        for record in _read(self.server.records, after, limit):
            found.append(record)
            size += len(record.body)
            if size >= _READ_BYTES:
                break
        if not found and self.server.head.number > after:
            raise journal.BadRecord(after + 1, "is missing")
        return await self._end("read", found)

    async def epochs(self) -> list[tuple[int, int]]:
        await self._begin("epochs")
        return await self._end("epochs", list(self.server.epochs))

    async def trim(self, upto: int) -> None:
        await self._begin("trim")
        self.server.records = [record for record in self.server.records if record.number > upto]
        await self._end("trim", None)

    async def register(self, node: journal.NodeEntry) -> str | None:
        await self._begin("register")
        if node.format < self.server.head.format >= EXTRA_FORMAT:
            raise journal.NodeTooOld(node)
        before = self.server.nodes.get(node.name)
        self.server.writes += 1
        node = replace(node, version=str(self.server.writes))
        self.server.nodes[node.name] = (node, self.server.now_ms())
        is_other = before is not None and before[0].process != node.process
        return await self._end("register", before[0].process if before and is_other else None)

    async def nodes(self) -> list[journal.NodeEntry]:
        await self._begin("nodes")
        now = self.server.now_ms()
        found = [replace(node, seen_ms=max(now - at, 0)) for _, (node, at) in sorted(self.server.nodes.items())]
        return await self._end("nodes", found)

    async def forget(self, name: str) -> None:
        await self._begin("forget")
        self.server.nodes.pop(name, None)
        await self._end("forget", None)

    async def write_snapshot(self, number: int, parts: AsyncIterable[bytes], pause_s: float = 0.05) -> bool:
        await self._begin("write_snapshot")
        server, written = self.server, []
        if server.snapshot_writer is not None or number in server.snapshots:
            return False
        server.snapshot_writer = self
        try:
            async for part in parts:
                written.append(part)
                await self._end("write_part", None)
        finally:
            server.snapshot_writer = None
        server.snapshots[number] = (written, server.now_ms())
        return await self._end("write_snapshot", True)

    async def snapshots(self) -> list[journal.SnapshotInfo]:
        await self._begin("snapshots")
        found = [
            journal.SnapshotInfo(number, len(parts), sum(map(len, parts)), at)
            for number, (parts, at) in sorted(self.server.snapshots.items())
        ]
        return await self._end("snapshots", found)

    async def read_snapshot(self, number: int) -> AsyncIterator[bytes]:
        await self._begin("read_snapshot")
        if number not in self.server.snapshots:
            raise journal.BadSnapshot(f"there is no complete snapshot of record {number}")
        for part in self.server.snapshots[number][0]:
            yield await self._end("read_part", part)

    async def drop_snapshot(self, number: int) -> None:
        await self._begin("drop_snapshot")
        self.server.snapshots.pop(number, None)
        await self._end("drop_snapshot", None)

    async def health(self) -> journal.JournalHealth:
        await self._begin("health")
        return await self._end("health", replace(self.server.health, timeline=self.server.failovers))

    async def close(self) -> None:
        self.disconnect()

    # ------------------------------------------------------------------------------------------------------------------

    async def _append(self, record: journal.Record, acked: int, epoch: int) -> None:
        failovers = await self._begin("append")
        server, head = self.server, self.server.head
        if head.number != record.number - 1 or head.epoch != epoch:
            raise journal.Fenced
        server.records.append(record)
        head = replace(head, number=record.number, acked=acked, format=max(head.format, format_of(record)))
        await self._confirm("append", server.change(head), failovers)

    async def _renew(self, acked: int, epoch: int) -> int:
        failovers = await self._begin("renew")
        if self.server.head.epoch != epoch:
            raise journal.Fenced
        self.server.leader = self
        await self._confirm("renew", self.server.change(replace(self.server.head, acked=acked)), failovers)
        return self.server.now_ms()

    async def _take_over(self, seen: journal.Head, holder: str, url: str, epoch: int) -> journal.Head | None:
        failovers = await self._begin("take_over")
        self.holder = holder
        head = self.server.head
        if (head.epoch, str(head.version)) != (seen.epoch, seen.renewed):
            return None
        return await self._lead("take_over", replace(head, holder=holder, url=url), epoch, failovers)

    async def _resolve(self, epoch: int) -> journal.Head:
        failovers = await self._begin("resolve")
        if self.holder is None or self.server.head.holder != self.holder:
            raise journal.Fenced
        return await self._lead("resolve", self.server.head, epoch, failovers)

    def _head(self, head: MemoryHead) -> journal.Head:
        is_connected = self.server.leader is not None
        renewed, at = str(head.version), self.server.now_ms()
        return journal.Head(head.number, head.epoch, head.holder, head.url, head.acked, renewed, is_connected, at)

    async def _lead(self, call: str, head: MemoryHead, epoch: int, failovers: int) -> journal.Head:
        """Take leadership with a new epoch."""
        head = self.server.change(replace(head, epoch=max(epoch, head.epoch + 1)))
        self.server.epochs.append((head.epoch, head.number + 1))
        self.server.leader = self
        await self._confirm(call, head, failovers)
        self.epoch = max(self.epoch, head.epoch)
        return self._head(head)

    async def _begin(self, call: str) -> int:
        """Check that the server can be reached, and return the number of its failovers."""
        if not self._is_reachable:
            raise journal.JournalUnavailable(_UNREACHABLE)
        failovers = self.server.failovers
        await self.before(call)
        if not self._is_reachable or failovers != self.server.failovers:
            raise journal.JournalOutcomeUnknown if call in _LEADING else journal.JournalUnavailable(_UNREACHABLE)
        return failovers

    async def _confirm(self, call: str, head: MemoryHead, failovers: int) -> None:
        """Wait until a change is durable."""
        await self.after(call)
        if not self._is_reachable or failovers != self.server.failovers:
            raise journal.JournalOutcomeUnknown
        self.server.confirm(head)

    async def _end(self, call: str, value: T) -> T:
        """Return `value` of a call that changes no row."""
        await self.after(call)
        if not self._is_reachable:
            raise journal.JournalUnavailable(_UNREACHABLE)
        return value
