"""The local tables of a node behind the shared journal: they lose what was not synced, and are full or slow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from jobd.cluster.leadership import Leadership
from jobd.journal import record
from jobd.model.journal import Record
from jobd.model.storage import Batch, DiskFull, OpenedStore, TableWrite
from tests.proof.simulation.disk import SimDisk
from tests.support.memory_storage import MemoryStorage
from tests.support.memory_tables import MemoryTables

if TYPE_CHECKING:
    from tests.proof.simulation.cluster.node import SimNode


class NodeDisk(SimDisk):
    """Tables of one node, and what it has in memory of the records after them."""

    leadership: Leadership

    def __init__(self, node: SimNode) -> None:
        plan, loop = node.scenario, node.loop
        dice, slice_dice = Random(f"{node.seed}: {node.name} disk"), Random(f"{node.seed}: {node.name} slices")
        super().__init__(dice, node.fired, node.wall, "thread", loop.freeze, plan.slices, slice_dice)
        self._node = node
        self._appending = asyncio.Lock()
        self.empty()

    def empty(self) -> None:
        """Lose everything, as on a new machine."""
        self._stop_slices()
        self._unsynced = None
        self.tables.become(MemoryTables())

    def opened(self) -> OpenedStore:
        """Return what a start reads: the tables."""
        self._stop_slices()
        self._unsynced, self._appending = None, asyncio.Lock()
        self.is_broken = False
        self._node.cluster.check_tables(self._node.name, self.tables)
        return MemoryStorage.opened(self)

    def settle_epoch(self) -> None:
        """Begin no epoch: a takeover does."""

    def check_tables(self) -> None:
        self._node.cluster.check_not_ahead(self._node.name, self.tables)

    # -- a leader

    async def _write(self, batch: Batch, blocks: bool) -> dict[int, bytes]:
        await self._enter("write")
        async with self._appending:
            await self._reach("entered")
            self.check_batch(batch)
            if self.behind >= self.max_behind:
                self.project()
            new = {each.event.job_seq: each.payload for each in batch.changes if each.payload is not None}
            shown = {seq: new[seq] if seq in new else self.payloads[seq].body for seq in batch.payloads}
            await self._append_remotely(batch)
            await self._reach("flushed")
            return shown

    async def _append_remotely(self, batch: Batch) -> None:
        made = self.next_record(batch)
        self._node.cluster.note_written(made, batch, self._node.process)
        await self.leadership.append(made, made.number - 1)
        self.take_record(made, batch)
        self._plan_slice(self._slice_dice.random() * self._slice_delay_s)

    async def write_tables(self, write: TableWrite) -> None:
        async with self._appending:
            await self._append_remotely(Batch([], self.numbers, writes=[write]))

    async def prune(self, before: int, limit: int) -> int:
        self.pruning(before)
        return await MemoryStorage.prune(self, before, limit)

    # -- a standby

    async def follow(self, records: Sequence[Record], decoded: object = ()) -> None:
        await self._pause()
        if records and self.full:
            raise DiskFull("the simulated disk is full")
        for made in records:
            self._node.cluster.check_acknowledged(self._node.name, made)
            self.take_record(made, record.decode(made)[0])
        if records:
            self.project()
