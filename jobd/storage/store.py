"""Store jobs in SQLite through one connection: one call per batch, inline in the event loop or in the storage thread.

`startup.py` opens the database. Slices run where batches do. Queries and all other calls run in the storage thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, BinaryIO, Concatenate, Final, Literal, ParamSpec, Self, TypeVar

import structlog

from jobd.model import storage
from jobd.model.responses import DiskUse
from jobd.model.webhooks import Delivery, Outbox, WebhookCursor
from jobd.storage import backup, disk_use, files, outbox, queries, startup
from jobd.storage.commit_mode import CommitMode, CommitSetting
from jobd.storage.connection import FunctionConnection, StoreConnection, page_bytes
from jobd.storage.damage import quarantine, scrub
from jobd.storage.database import Database
from jobd.storage.events import event_queries
from jobd.storage.files import FileLock, StoreBroken, StoreBusy, StoreError, StoreTooNew, StoreUnreadable
from jobd.storage.startup import MEMORY
from jobd.storage.tables import table_writes
from jobd.storage.tables.projection import Projection

__all__ = ["MEMORY", "Store", "StoreBroken", "StoreBusy", "StoreError", "StoreTooNew", "StoreUnreadable"]

log = structlog.get_logger("jobd.storage")

S = TypeVar("S", bound="Store")
T = TypeVar("T")
P = ParamSpec("P")
SLICE_DELAY_S: Final = 0.1  # until the tables are written, if there is not enough for a slice before
APPENDS_PER_SLICE: Final = 100  # the delay is as long as this many appends, because a slice costs one on a slow disk
MAX_DELAY_S: Final = 5.0
RETRY_S: Final = 1.0  # until they are written again after the disk was full
Synchronous = Literal["FULL", "EXTRA"]


async def open_or_close(work: Coroutine[Any, Any, tuple[S, storage.OpenedStore]]) -> tuple[S, storage.OpenedStore]:
    """Return the store that `work` opens. A cancelled caller waits for its thread, then closes the store."""
    opening = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([opening])
        if opening.exception() is None:
            await opening.result()[0].close()
        raise


def _query(
    read: Callable[Concatenate[Database, P], T], *, of_outbox: bool = False
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Return a method that calls `read` with the tables."""

    async def query(self: Store, /, *args: P.args, **named: P.kwargs) -> T:
        return await self._read(partial(read, **named) if named else read, *args, of_outbox=of_outbox)

    return query


def _planned(
    plan: Callable[Concatenate[Database, P], tuple[storage.TableWrite | None, T]], *, of_outbox: bool = False
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Return a method that calls `plan` with the tables, appends the write that it returns, and returns the result."""

    async def write(self: Store, /, *args: P.args, **named: P.kwargs) -> T:
        async with self._planning:  # no other write comes between
            planned, result = await self._read(partial(plan, **named), *args, of_outbox=of_outbox)
            if planned is not None:
                await self._append(planned)
            return result

    return write


class Store(storage.JobStorage, storage.OutboxStorage):
    """The SQLite storage. Create it with `open`; always `close` it."""

    def __init__(
        self,
        path: str,
        connection: StoreConnection,
        projection: Projection,
        lock: FileLock | None,
        mode: CommitMode,
        identities: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        self.path = path
        self._identities = identities or {}
        self._connection = connection
        self._projection = projection
        self._database = db = projection.db
        self._lock = lock
        self._mode = mode
        self.commits_inline = mode.is_inline
        self.behind = 0
        self.on_broken: Callable[[Exception], None] = lambda error: None
        self.on_quarantined: Callable[[storage.Quarantined], None] = lambda quarantined: None
        self.on_tombstones: Callable[[int], None] = lambda count: None
        self._reported = db.quarantined_count  # `OpenedStore` reports those found at the start
        self._reported_tombstones = projection.tombstones_written  # `OpenedStore` counts those
        self._upkeep: asyncio.Task[None] | None = None
        self._slicing: asyncio.Task[None] | None = None
        self._slice: asyncio.Handle | None = None  # of the next call of `_write_slice`
        self._slice_is_fixed = False  # more events do not bring it forward
        self._committing = threading.Event()
        db.before_commit = self._note_commit
        self._closing = threading.Event()
        self._backup_lock = asyncio.Lock()
        self._planning = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        synchronous: Synchronous = "FULL",
        commit: CommitSetting = "auto",
        on_locked: Callable[[], None] | None = None,
    ) -> tuple[Self, storage.OpenedStore]:
        """Open the store at `path` (or MEMORY). Creates it with mode 0600 if it does not exist.

        Calls `on_locked` when the lock is held and before anything else is touched; an error in it ends the opening.
        Raises StoreBusy (before anything is touched), StoreTooNew, StoreUnreadable, DiskFull, or an OSError.
        """
        if synchronous not in ("FULL", "EXTRA"):
            raise ValueError("synchronous must be FULL or EXTRA: anything less loses acknowledged work")

        def connect() -> FunctionConnection:
            if on_locked is not None:
                on_locked()
            return startup.connect(path, synchronous)

        return await open_or_close(cls._open(path, connect, CommitMode(commit)))

    @classmethod
    async def _open(
        cls, path: str, connect: Callable[[], FunctionConnection], mode: CommitMode
    ) -> tuple[Self, storage.OpenedStore]:
        lock = None if path == MEMORY else await asyncio.to_thread(FileLock, path)
        try:
            connection = await StoreConnection.open(connect)
            try:
                projection, opened = await connection.run(startup.start, connection.raw, path)
                identities = {} if path == MEMORY else await connection.run(files.identities, path)
            except BaseException:
                await connection.close()
                raise
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return cls(path, connection, projection, lock, mode, identities), opened

    async def close(self) -> None:
        """Close the connection, end its thread and release the lock. Stops a running backup."""
        self._closing.set()
        async with self._backup_lock:
            try:
                await self.finish_upkeep()
                await self._connection.close()
                if self._database.is_damaged:
                    await asyncio.to_thread(files.set_aside, self.path)
            finally:
                self._database.close()
                if self._lock is not None:
                    self._lock.release()

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn` in the storage thread. Calls `on_broken` if it leaves the content of the disk unknown."""
        try:
            with self._reporting():
                return await self._connection.run(fn, *args)
        finally:
            self._start_upkeep()

    async def _read(self, fn: Callable[..., T], *args: Any, of_outbox: bool = False) -> T:
        """Call `fn` in the storage thread with the tables as of the last commit, or as of the last one `of_outbox`."""
        if of_outbox:
            return await self._run(self._projection.read_outbox, fn, self._database, *args)
        with contextlib.suppress(storage.DiskFull):
            await self._write_whole_slices()
        return await self._run(self._projection.read, fn, self._database, *args)

    async def _write_whole_slices(self) -> None:
        """Write as many slices as there are enough events for. Commits come in between. Raises DiskFull."""
        for _ in range(self._projection.behind // self._projection.slice_events):
            await self._run(self._projection.project_slice)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._database.is_broken:
                self.on_broken(error)
            raise
        finally:
            self.behind = self._projection.behind
            while self._reported < self._database.quarantined_count:
                self._reported += 1
                self.on_quarantined(self._database.recently_quarantined[self._reported - 1])
            if new := self._projection.tombstones_written - self._reported_tombstones:
                self._reported_tombstones += new
                self.on_tombstones(new)

    def _note_commit(self) -> None:
        if not self._committing.is_set():  # setting it again would take as long as a lock
            self._committing.set()

    def _start_upkeep(self) -> None:
        """Start upkeep if it is needed. Called after slices, which are frequent enough, and not after each append."""
        is_running = self._upkeep is not None and not self._upkeep.done()
        if not is_running and not self._closing.is_set() and self._projection.needs_upkeep:
            self._upkeep = asyncio.create_task(self._run_in_background(self._projection.upkeep))

    @property
    def failure(self) -> BaseException | None:
        """The error of an earlier write that left the content of the disk unknown."""
        return self._database.failure

    @property
    def _slices_inline(self) -> bool:
        return self.commits_inline

    def _plan_slice(self) -> None:
        """Write the tables at once if there is enough for a slice, else after a delay."""
        if self._closing.is_set() or not self._projection.behind:
            return
        is_enough = self._projection.behind >= self._projection.slice_events
        if self._slice is not None:
            if self._slice_is_fixed or not is_enough:
                return
            self._slice.cancel()
        loop = asyncio.get_running_loop()
        self._slice_is_fixed = is_enough
        delay_s = min(max(SLICE_DELAY_S, APPENDS_PER_SLICE * (self._projection.append_s or 0)), MAX_DELAY_S)
        self._slice = loop.call_soon(self._write_slice) if is_enough else loop.call_later(delay_s, self._write_slice)

    def _write_slice(self) -> None:
        self._slice = None
        if self._slicing is not None and not self._slicing.done():
            return  # it plans the next one
        if not (self._slices_inline and self._connection.is_idle):
            self._slicing = asyncio.create_task(self._write_slice_in_background())
            return
        try:
            with self._reporting():
                self._connection.run_inline(self._projection.project_slice)
        except storage.DiskFull:
            self._plan_retry()
        except Exception as error:
            self.on_broken(error)
        else:
            self._plan_slice()
        self._start_upkeep()

    async def _write_slice_in_background(self) -> None:
        await self._run_in_background(self._projection.project_slice)
        self._slicing = None
        if not self._database.is_broken:
            self._plan_slice()

    def _plan_retry(self) -> None:
        if self._slice is None and not self._closing.is_set():
            self._slice_is_fixed = True
            self._slice = asyncio.get_running_loop().call_later(RETRY_S, self._write_slice)

    async def _run_in_background(self, work: Callable[[], object]) -> None:
        """Run `work` in the storage thread; no caller waits for it."""
        try:
            await self._run(work)
        except storage.DiskFull:
            self._plan_retry()
        except Exception as error:
            self.on_broken(error)

    async def finish_upkeep(self) -> None:
        """Write the tables, and wait for the work that the latest calls left for the storage thread."""
        if self._slice is not None:
            self._slice.cancel()
            self._slice = None
        if not self._database.is_broken:
            await self._run_in_background(self._projection.project)
        for task in (self._slicing, self._upkeep):
            if task is not None:
                await task

    def take_faults(self) -> list[str]:
        """Return descriptions of the damage found since the last call."""
        faults, self._database.faults = self._database.faults, []
        return faults

    # -- jobs

    async def load(self, ids: list[str], payloads: list[int], digests: list[str]) -> storage.LoadedRows:
        return await self._run(self._load, ids, payloads, digests)

    def _load(self, ids: list[str], payloads: list[int], digests: list[str]) -> storage.LoadedRows:
        pending = self._projection.pending_payloads(payloads)
        args = (self._database, ids, [seq for seq in payloads if seq not in pending], digests)
        if self._projection.touches(ids, [], digests):
            loaded = self._projection.read(queries.load, *args)
        else:
            loaded = queries.load(*args)
        loaded.payloads |= pending
        return loaded

    def _read_late_results(self, requested: list[storage.LateResultQuery]) -> storage.LateResultRows:
        if self._projection.touches([], [each.job_seq for each in requested], []):
            return self._projection.read(queries.read_late_results, self._database, requested)
        return queries.read_late_results(self._database, requested)

    def cached_payloads(self, job_seqs: list[int]) -> dict[int, bytes]:
        return self._projection.cached_payloads(job_seqs)

    def too_old_for(self, format: int) -> str | None:
        return None

    async def write(self, batch: storage.Batch) -> dict[int, bytes]:
        return await self._append(batch, self._reported)

    async def _append(self, given: storage.Batch | storage.TableWrite, reported: int = 0) -> dict[int, bytes]:
        """Append a record, in the event loop if the disk is fast and no other call runs, else in the storage thread."""
        projection, connection = self._projection, self._connection
        try:
            with self._reporting():
                if self.commits_inline and connection.is_idle:
                    return connection.run_inline(projection.append, given, reported)
                self._committing.clear()
                until = self._committing if connection.is_idle else None  # else earlier calls run first
                return await connection.run(projection.append, given, reported, until=until)
        finally:
            if projection.append_s is not None:
                self._mode.add(projection.append_s, time.monotonic())
                self.commits_inline = self._mode.is_inline
            self._plan_slice()

    find_jobs = _query(queries.find_jobs)
    timeline = _query(event_queries.timeline)
    count_late_results = _query(queries.count_late_results)
    events_after = _query(event_queries.events_after)
    expired_jobs = _query(queries.expired_jobs)
    reports = _query(queries.reports)
    quarantine = _query(quarantine.quarantine_job)
    read_audit = _query(queries.read_audit)
    due_tombstones = _query(queries.due_tombstones)
    check_rows = _query(scrub.check_slice)
    """Check the checksums of the rows at `cursor` (None: the first ones) for some milliseconds.

    Damaged rows are quarantined. Return None if `cursor` is not the `next_cursor` of an earlier call.
    """
    prune = _planned(table_writes.plan_pruning)
    trim_audit = _planned(table_writes.plan_trimming)

    async def read_late_results(self, requested: list[storage.LateResultQuery]) -> storage.LateResultRows:
        return await self._run(self._read_late_results, requested)

    async def used_bytes(self) -> int:
        return (await self._run(page_bytes, self._connection.raw))[0]

    async def sample_jobs(self, sample: disk_use.Sample) -> bool:
        """See disk_use.read_slice."""
        return await self._run(disk_use.read_slice, self._database, sample)

    async def report_use(self, sample: disk_use.Sample, now: int) -> DiskUse:
        """See disk_use.report."""
        return await self._run(disk_use.report, self._database, self.path, sample, now)

    async def update_tombstones(self, deleted: list[int], postponed: list[storage.Tombstone]) -> None:
        await self._append(storage.TombstoneWrite(deleted, postponed))

    # -------------------------------------------------------------------------------------------- webhook outbox

    async def open_outbox(self, names: list[str], now: int) -> Outbox:
        async with self._planning:
            write, (found, unwritten) = await self._read(outbox.plan_opening, names, now, of_outbox=True)
            try:
                if write is not None:
                    await self._append(write)
            except storage.CannotWrite:
                return unwritten  # cursors can be written later, but alerts about the full disk are delivered now
            return found

    async def plan_deliveries(self, moved: WebhookCursor, new: list[Delivery]) -> None:
        await self._append(storage.OutboxWrite([moved], new))

    store_outcomes = _planned(outbox.plan_outcomes, of_outbox=True)
    resend_delivery = _planned(outbox.plan_retry, of_outbox=True)
    resend_dead_lettered = _planned(outbox.plan_retries, of_outbox=True)
    deliveries = _query(outbox.by_ids, of_outbox=True)
    dead_letter_counts = _query(outbox.dead_letter_counts, of_outbox=True)
    list_deliveries = _query(outbox.page, of_outbox=True)

    # ----------------------------------------------------------------------------------------- miscellaneous

    async def backup(self, progress: storage.BackupProgress | None = None) -> BinaryIO:
        """Return a marked and checked copy of the storage as an open file without a name. May take minutes.

        One backup runs at a time. A cancellation stops it. Raises DiskFull or BackupError.
        """
        async with self._backup_lock:
            if self._closing.is_set():
                raise StoreBroken("the store is closed")
            with contextlib.suppress(storage.DiskFull):  # the copy then has records that its tables lack
                await self._write_whole_slices()
                await self._run(self._projection.project)
            with self._connection.lend() as raw:
                return (await backup.make_copy(raw, self.path, self._closing, progress)).file

    async def save_stats(self, body: bytes) -> None:
        await self._append(storage.FiguresWrite(body))

    async def probe(self, spare_bytes: int = 0) -> None:
        await self._run(startup.probe, self._database, self.path, spare_bytes)

    async def measure_space(self) -> storage.DiskSpace | None:
        return None if self.path == MEMORY else await self._run(files.space, self.path)

    async def replaced_file(self) -> str | None:
        return await self._run(files.replaced, self._identities)

    async def drop_reserve(self) -> bool:
        return self.path != MEMORY and await self._run(files.drop_reserve, self.path)

    async def build_reserve(self) -> None:
        if self.path != MEMORY:
            await self._run(files.build_reserve, self.path)
