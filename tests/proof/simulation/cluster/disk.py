"""The local tables of a node behind the shared journal: they lose what was not synced, and are full or slow."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from random import Random
from typing import TYPE_CHECKING, Any

from jobd.journal import record
from jobd.journal.checksum import checksum
from jobd.journal.shielding import to_end
from jobd.model.journal import Record, SharedJournal
from jobd.model.storage import Batch, DiskFull, OpenedStore, TableWrite
from jobd.storage.backup import StoreCopy
from jobd.storage.cluster import membership
from jobd.storage.cluster.appender import Appender
from jobd.storage.cluster.membership import Followed
from tests.proof.simulation.disk import SimDisk
from tests.support.cluster_harness import Made
from tests.support.memory_storage import MemoryStorage
from tests.support.memory_tables import MemoryTables

if TYPE_CHECKING:
    from tests.proof.simulation.cluster.node import SimNode


class Copies:
    """Makes copies of the tables for snapshots."""

    def __init__(self, disk: NodeDisk) -> None:
        self._disk = disk

    async def is_on_branch(self, journal: SharedJournal) -> bool:
        return await self._disk.is_on_branch(journal)

    async def snapshot(self) -> StoreCopy:
        """Return the number of a copy, which the cluster keeps."""
        await asyncio.sleep(0.01)
        disk, number = self._disk, self._disk.tables.projected_to
        disk.node.cluster.copies[number] = (disk.tables.copy_tables(), disk.record_checksum)
        return StoreCopy(BytesIO(b"%d" % number), number)


class NodeDisk(SimDisk):
    """Tables of one node, and what it has in memory of the records after them."""

    def __init__(self, node: SimNode) -> None:
        plan, loop = node.scenario, node.loop
        dice, slice_dice = Random(f"{node.seed}: {node.name} disk"), Random(f"{node.seed}: {node.name} slices")
        super().__init__(dice, node.fired, node.wall, "thread", loop.freeze, plan.slices, slice_dice)
        self.node = node
        self.copies = Copies(self)
        self.appender: Any = Appender(lambda lost: None)
        self.empty()

    def empty(self) -> None:
        """Lose everything, as on a new machine."""
        self._stop_slices()
        self._unsynced = None
        self._checksums: dict[int, int] = {}  # of records
        self.tables.become(MemoryTables())

    @property
    def record_checksum(self) -> int | None:
        """The checksum of the last record that the tables have."""
        return self._checksums.get(self.tables.projected_to)

    async def install(self, parts: AsyncIterator[bytes]) -> None:
        """Become the tables of a snapshot."""
        content = zlib.decompress(b"".join([part async for part in parts]))
        tables, last = self.node.cluster.copies[int(content)]
        self.empty()
        self.tables.become(tables)
        self._checksums = {} if last is None else {tables.projected_to: last}

    def take_record(self, made: Record, batch: Batch) -> None:
        super().take_record(made, batch)
        self._checksums[made.number] = checksum(made)

    def opened(self) -> OpenedStore:
        """Return what a start reads: the tables."""
        self._stop_slices()
        self._unsynced, self.appender = None, Appender(lambda lost: None)
        self.is_broken = False
        self.node.cluster.check_tables(self.node.name, self.tables)
        return MemoryStorage.opened(self)

    def choose_epoch(self) -> None:
        """Begin no epoch: a takeover does."""

    def check_tables(self) -> None:
        self.node.cluster.check_not_ahead(self.node.name, self.tables)

    # -- a leader

    async def _write(self, batch: Batch, blocks: bool) -> dict[int, bytes]:
        await self._enter("write")

        async def prepare() -> Made:
            await self._reach("entered")
            self.check_batch(batch)
            if self.behind >= self.max_behind:
                self.project()
            new = {each.job_seq: each.payload for each in batch.changes if each.payload is not None}
            shown = {seq: new[seq] if seq in new else self.payloads[seq].body for seq in batch.payloads}
            return self._made(batch, shown)

        async def accept(made: Made) -> None:
            self._accept(made, batch)
            await self._reach("flushed")

        appended: Made = await self.appender.append(prepare, accept)
        return appended.payloads

    def _made(self, batch: Batch, shown: dict[int, bytes]) -> Made:
        made = Made(self.next_record(batch), shown)
        self.node.cluster.note_written(made.record, batch, self.node.process)
        return made

    def _accept(self, made: Made, batch: Batch) -> None:
        self.take_record(made.record, batch)
        self._plan_slice(self._slice_dice.random() * self._slice_delay_s)

    async def write_tables(self, write: TableWrite) -> None:
        batch = Batch([], self.numbers, writes=[write])

        async def prepare() -> Made:
            batch.numbers = self.numbers
            return self._made(batch, {})

        async def accept(made: Made) -> None:
            self._accept(made, batch)

        await to_end(self.appender.append(prepare, accept))

    async def prune(self, before: int, limit: int) -> int:
        self.pruning(before)
        return await MemoryStorage.prune(self, before, limit)

    # -- a standby

    async def follow(self, records: Sequence[Record], decoded: object = ()) -> None:
        await self._pause()
        if records and self.full:
            raise DiskFull("the simulated disk is full")
        for made in records:
            self.node.cluster.check_acknowledged(self.node.name, made)
            self.take_record(made, record.decode(made)[0])
        if records:
            self.project()

    async def is_on_branch(self, journal: SharedJournal) -> bool:
        last = Followed(self.tables.projected_to, self.record_checksum, self.numbers.epoch)
        return await membership.is_on_branch(self.node.name, journal, last)
