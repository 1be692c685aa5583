"""Write a snapshot of the tables into the journal from time to time, and trim the journal behind it.

A node with an empty disk starts from the newest snapshot. The first standby by name writes it, the leader only if no
standby is running. While nodes of several versions run, one with the lowest schema version does: all can read it. If it
fails, the next node writes the snapshot after another interval.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO, Final

import structlog

from jobd.cluster.node_registry import GONE_S, NodeRegistry
from jobd.engine.clock import loop_time, wall_clock_ms
from jobd.model.clocks import MonotonicS
from jobd.model.journal import BadRecord, Head, JournalUnavailable, SharedJournal, SnapshotInfo
from jobd.model.storage import BackupError, DiskFull
from jobd.storage.cluster import snapshots
from jobd.storage.cluster.cluster_store import ClusterStore
from jobd.storage.files import StoreError

CHECK_S: Final = 10.0
MIN_RECORDS: Final = 1_000  # since the latest snapshot: fewer are read faster than a snapshot
KEPT: Final = 2

log = structlog.get_logger("jobd.cluster")


class SnapshotSchedule:
    """Writes snapshots at most every `every_ms` while `run` runs.

    Records are trimmed when two snapshots have them and they are older than `keep_ms`. `leader` returns the id of the
    leading process, and `process` is that of this one.
    """

    def __init__(
        self,
        journal: SharedJournal,
        store: ClusterStore,
        registry: NodeRegistry,
        *,
        process: str,
        leader: Callable[[], str | None],
        every_ms: int,
        keep_ms: int,
        wall_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._journal = journal
        self._store = store
        self._registry = registry
        self._process = process
        self._leader = leader
        self._every_ms = every_ms
        self.keep_ms = keep_ms
        self._wall_ms = wall_ms
        self._due: tuple[int, MonotonicS] | None = None  # the latest snapshot, since when one is due
        self._trimmed = 0  # records up to this one are known to be gone

    async def run(self) -> None:
        """Write snapshots until cancelled, which also ends a snapshot in progress."""
        while True:
            await asyncio.sleep(min(CHECK_S, self._every_ms / 1000))
            if (turn := self._turn()) is not None:
                await self._write_if_due(turn)

    def _turn(self) -> int | None:
        """Return how many nodes come before this one, None if it writes no snapshots."""
        running = [node for node in self._registry.nodes if node.seen_ms < GONE_S * 1000]
        leader, oldest = self._leader(), min((node.schema_version for node in running), default=0)
        writers: list[str | None] = [node.process for node in running if node.schema_version == oldest]
        writers = sorted(writers or [leader], key=lambda process: process == leader)
        return writers.index(self._process) if self._process in writers else None

    def _is_due(self, head: Head, last: SnapshotInfo, turn: int) -> bool:
        """Return whether it is the turn of this node to write the snapshot after `last`.

        A snapshot of the future does not count: the clock of the server was ahead.
        """
        if head.number - last.number < MIN_RECORDS or 0 <= head.at - last.at < self._every_ms:
            self._due = None
            return False
        now_s = loop_time()
        if self._due is None or self._due[0] != last.number:
            self._due = last.number, now_s
        return now_s - self._due[1] >= turn * self._every_ms / 1000

    async def _write_if_due(self, turn: int) -> None:
        try:
            head, known = await self._journal.head(), await self._journal.snapshots()
            last = known[-1] if known else SnapshotInfo(0, 0, 0, 0)
            if not self._is_due(head, last, turn):
                return
            await self._check_branch()
            copy = await self._store.snapshot()
            with copy.file:
                is_new = await self._journal.write_snapshot(copy.last_record, self._parts(copy.file))
            if is_new:
                log.info("snapshot_written", record=copy.last_record)
                await self._clean_up()
        except (JournalUnavailable, DiskFull, BackupError, StoreError) as error:
            log.warning("snapshot_failed", reason=str(error))
        except Exception:
            log.exception("snapshot_failed")

    async def _parts(self, file: BinaryIO) -> AsyncIterator[bytes]:
        """Yield a copy in parts, after a check. A later failover of the server ends the session that writes them."""
        await self._check_branch()
        async for part in snapshots.compressed(file):
            yield part

    async def _check_branch(self) -> None:
        """Raise an error if the journal lacks records of the store, which nodes would get from a snapshot."""
        if not await self._store.is_on_branch(self._journal):
            raise BackupError("the journal lacks the last record of this node")

    async def _clean_up(self) -> None:
        """Drop old snapshots, and trim the records that nothing needs."""
        known = await self._journal.snapshots()
        for old in known[:-KEPT]:
            await self._journal.drop_snapshot(old.number)
        if len(known) >= KEPT:
            number = await self._last_before(self._wall_ms() - self.keep_ms, known[-KEPT].number)
            if number > self._trimmed:
                await self._journal.trim(number)
                self._trimmed = number

    async def _last_before(self, at: int, upto: int) -> int:
        """Return the last record up to `upto` that is older than wall time `at`."""
        low, high = self._trimmed, upto
        while low < high:
            middle = (low + high + 1) // 2
            try:
                is_older = (await self._journal.read(middle - 1, 1))[0].at < at
            except BadRecord:
                is_older = True  # it was trimmed
            low, high = (middle, high) if is_older else (low, middle - 1)
        return low
