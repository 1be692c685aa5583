"""The tables of a node, behind a journal that several nodes share.

A standby follows the records of the leader. The leader appends a record to the journal first, and keeps it for its
tables when the journal has it, so the tables are never ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import structlog

from jobd.journal.record import Decoded
from jobd.journal.shielding import to_end
from jobd.model.journal import BadSnapshot, JournalUnavailable, Record, SharedJournal
from jobd.model.storage import Batch, DiskFull, OpenedStore, TableWrite
from jobd.storage import backup, files, startup
from jobd.storage.backup import StoreCopy
from jobd.storage.cluster import membership, snapshots
from jobd.storage.cluster.appender import Append, Appender, TooOldFor
from jobd.storage.cluster.joining import FIRST_RECORD
from jobd.storage.cluster.membership import Followed, StoreDamaged
from jobd.storage.commit_mode import CommitMode
from jobd.storage.connection import StoreConnection
from jobd.storage.database import Database
from jobd.storage.files import FileLock, StoreBroken, StoreUnreadable
from jobd.storage.store import Store, open_or_close
from jobd.storage.tables.projection import Prepared, Projection

log = structlog.get_logger("jobd.storage")

T = TypeVar("T")


class ClusterStore(Store):
    """The storage of a node. Create it with `open_for`; always `close` it.

    A damaged row raises StoreDamaged and ends the node, because the other nodes have it as it was. When the store is
    closed, its file is set aside, and the next start rebuilds it from the journal.
    """

    def __init__(self, path: str, connection: StoreConnection, projection: Projection, lock: FileLock) -> None:
        super().__init__(path, connection, projection, lock, CommitMode("thread"))
        self._appender = Appender(lambda lost: self.on_broken(lost))

    @classmethod
    async def open_for(
        cls,
        path: str,
        journal: SharedJournal,
        *,
        on_locked: Callable[[], None] | None = None,
        needs_snapshot: bool = True,
    ) -> tuple[Self, OpenedStore]:
        """Open the tables at `path` to follow `journal` from their last record.

        A store that cannot follow it is set aside and rebuilt from a snapshot, if it belongs to this cluster: it is
        damaged, on another branch, or too far behind. While the journal cannot be used, it is opened as it is. If it
        `needs_snapshot`, the store that a cluster is made from is rejected before its snapshot is complete. Raises
        WrongCluster, StoreAhead, StoreBusy, StoreTooNew, StoreUnreadable, DiskFull, JournalUnavailable, or an
        OSError.
        """
        return await open_or_close(cls._open_for(path, journal, on_locked, needs_snapshot))

    @classmethod
    async def _open_for(
        cls, path: str, journal: SharedJournal, on_locked: Callable[[], None] | None, needs_snapshot: bool
    ) -> tuple[Self, OpenedStore]:
        lock = await asyncio.to_thread(FileLock, path)
        try:
            if on_locked is not None:
                on_locked()
            if (found := await cls._try_open(path, journal, lock, needs_snapshot)) is None:
                found = await cls._rebuild(path, journal, lock, needs_snapshot)
        except BaseException:
            lock.release()
            raise
        if found is None:
            lock.release()
            if (await journal.head()).number == FIRST_RECORD:
                raise _unfinished(path)
            raise StoreUnreadable(
                f"{path} cannot follow the journal, which has no usable snapshot and no first record: "
                "start the node with the most advanced store, so that it writes a snapshot, or restore the database of "
                "the journal"
            )
        return found

    @classmethod
    async def _rebuild(
        cls, path: str, journal: SharedJournal, lock: FileLock, needs_snapshot: bool
    ) -> tuple[Self, OpenedStore] | None:
        """Open a store made from the newest snapshot that can be used, or from the first record.

        Return None if there is neither. A snapshot can have records that the journal has lost since.
        """
        known, head = await journal.snapshots(), await journal.head()
        for each in reversed(known):
            found, reason = None, "the journal lacks its last record, or the record after it"
            if each.number <= head.number:
                try:
                    await snapshots.install(path, journal.read_snapshot(each.number), journal.cluster_id)
                    found = await cls._try_open(path, journal, lock, needs_snapshot, is_rebuilt=True)
                except BadSnapshot as error:
                    reason = str(error)
            if found is not None:
                log.info("store_made_from_snapshot", path=path, record=each.number)
                return found
            log.warning("snapshot_unusable", record=each.number, reason=reason)
        return await cls._try_open(path, journal, lock, needs_snapshot, is_rebuilt=True)

    @classmethod
    async def _try_open(
        cls, path: str, journal: SharedJournal, lock: FileLock, needs_snapshot: bool, *, is_rebuilt: bool = False
    ) -> tuple[Self, OpenedStore] | None:
        """Open the store. If it cannot follow the journal, remove it and return None.

        The store that the node had is set aside, unless it is new.
        """
        is_kept = not is_rebuilt
        connection = await StoreConnection.open(partial(startup.connect, path, "NORMAL"))
        try:
            db = await connection.run(startup.identify, connection.raw, path, journal.cluster_id)
            if needs_snapshot:
                await _check_snapshot(db, path, journal)
            if await _can_follow(db, path, journal, may_be_new=is_rebuilt):
                projection, opened = await connection.run(startup.start, connection.raw, path, journal.cluster_id)
                return cls(path, connection, projection, lock), opened
            is_kept = is_kept and db.numbers.epoch > 0
            if is_kept:
                reason = "the journal lacks the last record of the store, or the record after it"
                log.warning("store_set_aside", path=path, record=db.projected_to, kept=f"{path}.old", reason=reason)
        except StoreDamaged as error:
            log.error("store_damaged", path=path, reason=str(error))
        except BaseException:
            await connection.close()
            raise
        await connection.close()
        await asyncio.to_thread(files.set_aside if is_kept else files.remove, path)
        return None

    # -- a standby

    async def follow(self, records: Sequence[Record], decoded: Sequence[Decoded] = ()) -> None:
        """Keep the next records for the tables. Raises DiskFull if it keeps none, and BadRecord.

        `decoded` has the first of them as decoded, if the caller has them.
        """
        try:
            await self._run(self._projection.follow, records, decoded)
        finally:
            self._plan_slice()

    async def project(self) -> None:
        """Write all records that were followed into the tables. Raises DiskFull."""
        await self._run(self._projection.project)

    @property
    def is_full(self) -> bool:
        """Whether the tables could not be written, because the disk is full."""
        return self._projection.is_full

    @property
    def projected_to(self) -> int:
        """The last record that the tables have. It stands still while the disk is full."""
        return self._database.projected_to

    async def is_on_branch(self, journal: SharedJournal) -> bool:
        """Return whether `journal` still has the last record that was followed. Raises StoreAhead."""
        projection = self._projection
        last = Followed(projection.last, projection.last_crc, self._database.numbers.epoch)
        return await membership.is_on_branch(self.path, journal, last)

    async def keep_timeline(self, timeline: int) -> None:
        """Keep the highest timeline of the journal's server that was seen. While the disk is full, it is not kept."""
        known = self._database.membership
        if known is not None and timeline > known.timeline:
            with contextlib.suppress(DiskFull):
                await self._run(self._projection.keep_timeline, timeline)

    async def snapshot(self) -> StoreCopy:
        """Check all rows, and return a copy of the tables, for `SharedJournal.write_snapshot`. See `backup`.

        A damaged row ends the node. In a snapshot, it would replace the undamaged rows of the other nodes.
        Raises DiskFull if the tables cannot be written, because each slice of the check would apply pending records
        again.
        """
        async with self._backup_lock:
            if self._closing.is_set():
                raise StoreBroken("the store is closed")
            await self.project()
            await self._check_all_rows()
            with self._connection.lend() as raw:
                return await backup.make_copy(raw, self.path, self._closing, None, is_snapshot=True)

    async def _check_all_rows(self) -> None:
        """Raise StoreDamaged if a row is damaged. Leave half of the time to other work, as `Scrubber.scan` does."""
        loop, cursor = asyncio.get_running_loop(), None
        while True:
            began_s = loop.time()
            part = await self.check_rows(cursor)
            if part is None or (cursor := part.next_cursor) is None:
                return
            await asyncio.sleep(loop.time() - began_s)

    # -- the leader

    def lead(self, append: Append, too_old_for: TooOldFor) -> None:
        """Write with `append` from now on. All records of the journal have been followed.

        A write that needs a format for which a node is `too_old_for` raises FormatNotRead.
        """
        self._appender.lead(append, too_old_for)

    def too_old_for(self, format: int) -> str | None:
        return self._appender.too_old_for(format)

    async def write(self, batch: Batch) -> dict[int, bytes]:
        return await self._append_shared(batch, self._reported)

    async def probe(self, spare_bytes: int = 0) -> None:
        await super().probe(spare_bytes)
        if self._appender.is_leading:
            await self._append(None)  # the server's disk may be the full one

    async def _append(self, given: Batch | TableWrite | None, reported: int = 0) -> dict[int, bytes]:
        return await to_end(self._append_shared(given, reported))  # callers may be cancelled, unlike that of `write`

    async def _append_shared(self, given: Batch | TableWrite | None, reported: int) -> dict[int, bytes]:
        prepare = partial(self._call, self._projection.prepare, given, reported)
        return (await self._appender.append(prepare, self._accept)).payloads

    async def _accept(self, prepared: Prepared) -> None:
        try:
            await self._call(self._projection.accept, prepared)
        finally:
            self._plan_slice()

    async def _call(self, fn: Callable[..., T], *args: Any) -> T:
        """Call `fn`, which is fast, in the event loop if no other call runs."""
        with self._reporting():
            if self._connection.is_idle:
                return self._connection.run_inline(fn, *args)
            return await self._connection.run(fn, *args)

    @property
    def _slices_inline(self) -> bool:
        return True  # their commits flush nothing, and the event loop waits for the journal anyway


async def _can_follow(db: Database, path: str, journal: SharedJournal, *, may_be_new: bool) -> bool:
    """Return whether the store can follow the journal from its last record. Raises StoreAhead."""
    is_new = db.numbers.epoch == 0
    if is_new and not may_be_new and await journal.snapshots():
        return False
    crc = None if db.membership is None else db.membership.record_crc
    try:
        return await membership.is_on_branch(path, journal, Followed(db.projected_to, crc, db.numbers.epoch))
    except JournalUnavailable:
        if is_new:
            raise
        return True  # a standby checks it again before it follows


async def _check_snapshot(db: Database, path: str, journal: SharedJournal) -> None:
    """Raise StoreUnreadable if the content of the cluster is on this disk only, so that no other node could follow."""
    is_first = db.membership is not None and db.membership.record_crc is None and db.projected_to == FIRST_RECORD
    if is_first and not await journal.snapshots():
        raise _unfinished(path)


def _unfinished(path: str) -> StoreUnreadable:
    return StoreUnreadable(
        f"{path} cannot follow the journal, which has no snapshot yet: repeat `jobd cluster init --from-store PATH` on "
        "the machine of the database that becomes the cluster"
    )
