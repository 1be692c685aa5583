"""The disk of a simulated machine: MemoryStorage with seeded delays, every kind of failure, and crashes during a write.

The record of a batch is written, then flushed, then acknowledged. A crash after the first step may keep it (the process
was killed) or lose it (the power was cut). After the second step it is kept. A slice is not flushed: the flush of the
next record covers it, and until then a power cut may lose it. Committed data never changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from jobd.journal import record
from jobd.model.job import COUNTER_MASK, TOKEN_COUNTER_BITS, Job, epoch_seconds, new_epoch
from jobd.model.journal import BadRecord, Record
from jobd.model.storage import BadRows, Batch, DiskFull, Numbers, OpenedStore, TableWrite
from jobd.storage.commit_mode import CommitSetting
from jobd.storage.store import RETRY_S
from tests.support.memory_storage import MemoryStorage
from tests.support.memory_tables import MemoryTables

# What is on disk beside the journal and the tables behind it.
BESIDE: Final = ("quarantined", "bad_jobs", "bad_payloads", "quarantined_ids", "damaged_tombstones")
COMMITS: Final = frozenset({"prune", "save_figures", "trim_audit", "update_tombstones"})  # calls outside batches


class Snapshot(Struct):
    """A copy of the disk."""

    tables: MemoryTables
    records: list[Record]
    beside: dict[str, Any]


class SliceOptions(Struct, frozen=True):
    """The size of slices, the events that the tables may lack, and the time until a slice, drawn up to `delay_s`."""

    events: int
    max_behind: int
    delay_s: float


class InjectedError(OSError):
    """An injected failure."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EIO, f"simulated: {what}")


class SimDisk(MemoryStorage):
    """Storage whose delays and failures are drawn from `dice`.

    `full` is 0 (no), 1 (for new jobs), 2 (until the reserve file is released) or 3 (for everything).

    `failing` names methods that raise with a chance of one half. `write_fault` of the next write: `unknown` raises with
    nothing written, `lost_answer` raises although it was written. `slice_fault` is that of the next slice. `committed`
    is called with each batch. While commits are inline, time passes in a write only by `freeze`, and nothing else runs.
    """

    def __init__(
        self,
        dice: Random,
        fired: Counter[str],
        wall: Callable[[], int],
        commit: CommitSetting,
        freeze: Callable[[float], None],
        slices: SliceOptions,
        slice_dice: Random,
    ) -> None:
        super().__init__(slices_wait=True)
        self.slice_events, self.max_behind = slices.events, slices.max_behind
        self.slice_fits = self._slice_fits
        self.slice_fault: str | None = None
        self.is_torn = False  # a record that the tables lack is damaged
        self._slice_delay_s = slices.delay_s
        self._slice_dice = slice_dice
        self._slice: asyncio.TimerHandle | None = None  # of the next slice
        self._unsynced: tuple[MemoryTables, list[Record]] | None = None  # tables and journal before unsynced slices
        self._untorn: list[Record] = []
        self.commits_inline = commit == "inline"
        self._commit_setting = commit
        self._freeze = freeze
        self.full = 0
        self.slowness_s = 0.0
        self.slowed = 0  # calls that a slow phase has delayed, also after it is over
        self.failing: frozenset[str] = frozenset()
        self.write_fault: str | None = None
        self.armed: tuple[str, Callable[[], None]] | None = None  # a crash at that stage of the next write or slice
        self.wall = wall
        epoch = self.epoch_file = new_epoch(0, wall())
        # Sometimes the counter is full after a while.
        left = dice.choice((COUNTER_MASK, dice.randrange(200)))
        self.numbers = self.tables.numbers = Numbers(epoch=epoch, next_token=COUNTER_MASK + 1 - left)
        self.committed: Callable[[Batch], None] = lambda batch: None
        self.broken: Callable[[str], None] = lambda message: None
        self.pruning: Callable[[int], None] = lambda before: None
        self._dice = dice
        self._fired = fired
        self._failed_moves_left: dict[int, int] = {}  # seq -> how many more times its row cannot be quarantined
        self._written: tuple[Batch, int] | None = None  # not flushed yet, and what its counts know of
        self.is_broken = False
        self.on_broken: Callable[[Exception], None] = lambda error: None
        self.fits = self._fits
        self.can_move = self._can_move

    def _fits(self, batch: Batch) -> bool:
        if self.full == 1:
            return all(change.payload is None for change in batch.changes)
        return self.full == 0 or (self.full == 2 and not self.has_reserve)

    def _can_move(self, job: Job) -> bool:
        """Return whether a damaged row can be quarantined. That needs space, and intact pages around it."""
        tries = self._failed_moves_left.get(job.seq, 0)
        self._failed_moves_left[job.seq] = max(tries - 1, 0)
        self._fired["damaged row not moved"] += self.full > 0 or tries > 0
        return self.full == 0 and tries == 0

    # -- faults and copies --------------------------------------------------------------------------------------------

    def clear_faults(self) -> None:
        """Stop all faults."""
        self.full, self.slowness_s, self.failing, self.write_fault, self.armed = 0, 0.0, frozenset(), None, None
        self.slice_fault = None
        self._failed_moves_left.clear()

    def crash(self, *, power_cut: bool) -> None:
        """Crash. A batch that was written and not flushed is kept or lost as a whole, and so are unsynced slices."""
        self._stop_slices()
        written, self._written = self._written, None
        if written is not None:
            kept = not power_cut or self._dice.random() < 0.3
            self._fired["crash: unflushed write " + ("kept" if kept else "lost")] += 1
            if kept:
                with contextlib.suppress(BadRows, DiskFull, InjectedError):
                    self._flush(*written)
        if power_cut and self._unsynced is not None and self._slice_dice.random() < 0.5:
            self._fired["crash: unsynced slices lost"] += 1
            tables, self.log.records = self._unsynced
            self.tables.become(tables)
        self._unsynced = None

    def snapshot(self) -> Snapshot:
        """Return a copy of the content, like a backup."""
        beside = {name: copy.copy(getattr(self, name)) for name in BESIDE}
        return Snapshot(self.tables.copy_tables(), self.log.records.copy(), beside)

    def restore(self, snapshot: Snapshot) -> None:
        """Replace the content with an older copy, marked as a backup. The epoch file does not change."""
        self.epoch_file = max(self.epoch_file, self.numbers.epoch)
        self.tables.become(snapshot.tables)
        self.log.records = snapshot.records.copy()
        self.is_torn = False
        for name, value in snapshot.beside.items():
            setattr(self, name, copy.copy(value))
        self.tables.marked = True
        self._marked_at = self.log.records[-1].number if self.log.records else 0
        self.read_tail()

    def tear(self) -> bool:
        """Damage a record that the tables lack. Return whether there is one."""
        tail = [each for each in self.log.records if each.number > self.tables.projected_to]
        if not tail:
            return False
        self._untorn, self.is_torn = self.log.records.copy(), True
        torn = self._slice_dice.choice(tail)
        index = self.log.records.index(torn)
        match self._slice_dice.choice(("missing", "cut", "format") if torn is not tail[-1] else ("cut", "format")):
            case "missing":
                del self.log.records[index]
            case "cut":
                body = torn.body[: self._slice_dice.randrange(len(torn.body))]
                self.log.records[index] = replace(torn, body=body)
            case _:
                self.log.records[index] = replace(torn, body=bytes((record.FORMAT + 1,)) + torn.body[1:])
        return True

    def mend(self) -> None:
        """Undo `tear`."""
        self.log.records, self.is_torn = self._untorn, False

    def opened(self) -> OpenedStore:
        """Return what a start reads: all that was committed. Raises BadRecord."""
        self._stop_slices()
        self.is_broken, self.slice_fault, self._unsynced = False, None, None
        expected = self.copy_tables()
        try:
            self._crash_at_start()
            self.read_tail()
        except BadRecord:
            self.become(expected)  # to be compared with what the next start reads
            raise
        replayed = self.copy_tables()
        opened = super().opened()
        opened.full = self.full >= 2
        self.has_reserve = opened.has_reserve = not opened.full
        if replayed.numbers != expected.numbers:
            self.broken(f"a restart changed the numbers from {expected.numbers} to {replayed.numbers}")
        for difference in replayed.differences(expected):
            self.broken(f"a restart changed {difference}")
        self.check_tables()
        self._plan_slice(RETRY_S)
        return opened

    def _crash_at_start(self) -> None:
        """Write a slice at the start, and crash."""
        if self._slice_dice.random() < 0.2:
            self.read_tail()
            if self.pending:
                with contextlib.suppress(DiskFull):
                    self.write_slice()
                    self._fired["crash: slice at start"] += 1

    def check_tables(self) -> None:
        """Check that the tables are what was committed, if they lack no record."""
        if self.pending:
            return
        if differences := self.tables.differences(self):
            self.broken(f"the tables are not what was committed: {differences[0]}")
        else:
            self.tables.share_rows(self)

    def choose_epoch(self) -> None:
        """After a restore, begin a new epoch."""
        if self.marked or self.epoch_file > self.numbers.epoch:
            wall, old = self.wall(), self.numbers
            seen = max(self.epoch_file, old.epoch)
            if epoch_seconds(wall) > seen and self._dice.random() < 0.5:
                seen = old.epoch  # as on another machine, which has no epoch file
                self._fired["restored on another machine"] += 1
            epoch = new_epoch(seen, wall)
            self.epoch_file, self.marked, self.tables.marked = epoch, True, True
            # As startup.py does: numbers that earlier clients have seen are not reused.
            next_event = max(old.next_event, epoch << TOKEN_COUNTER_BITS)
            self.numbers = self.tables.numbers = replace(old, epoch=epoch, next_token=1, next_event=next_event)
            self._unsynced = None  # a commit of its own, which is flushed

    # -- model.storage

    async def write(self, batch: Batch) -> dict[int, bytes]:
        blocks = self.commits_inline
        try:
            return await self._write(batch, blocks)
        finally:
            self._fired["write inline" if blocks else "write in the thread"] += 1
            if self._commit_setting == "auto" and self._dice.random() < 0.1:
                self.commits_inline = not self.commits_inline

    async def _write(self, batch: Batch, blocks: bool) -> dict[int, bytes]:
        reported = self._reported
        await self._enter("write", blocks)
        await self._reach("entered")
        fault, self.write_fault = self.write_fault, None
        if fault == "unknown":
            self._fired["write failed, nothing written"] += 1
            raise self._break("write")
        if not self.fits(batch):
            self._fired[f"write on a full disk ({self.full})"] += 1
            raise DiskFull("the simulated disk is full")
        if self.behind >= self.max_behind:
            self._fired["write waits for slices"] += 1
            self.project()
        self._written = batch, reported
        await self._reach("written")
        await self._pause(blocks)
        self._written = None
        shown = self._flush(batch, reported)
        self._plan_slice(self._slice_dice.random() * self._slice_delay_s)
        await self._reach("flushed")
        await self._pause(blocks)
        if fault == "lost_answer":
            self._fired["write failed, yet written"] += 1
            raise self._break("fsync")
        return shown

    # -- slices

    def _slice_fits(self) -> bool:
        fits = self.full == 0 or (self.full == 2 and not self.has_reserve)
        if self.full == 1:
            fits = self._slice_dice.random() < 0.5
        self._fired["slice on a full disk"] += not fits
        return fits

    def write_slice(self) -> None:
        before = (self.tables.copy_tables(), self.log.records.copy()) if self._unsynced is None else self._unsynced
        fault, self.slice_fault = self.slice_fault, None
        if fault == "unknown":
            self._fired["slice failed, nothing written"] += 1
            raise self._break("slice")
        super().write_slice()
        self._unsynced = before
        self.check_tables()
        if fault == "lost_answer":
            self._fired["slice failed, yet written"] += 1
            raise self._break("commit of a slice")

    def both(self) -> Iterator[MemoryTables]:
        self._unsynced = None  # a commit of its own, which is flushed
        return super().both()

    def _plan_slice(self, delay_s: float) -> None:
        if self._slice is None and self.pending:
            self._slice = asyncio.get_running_loop().call_later(delay_s, self._write_planned)

    def _stop_slices(self) -> None:
        if self._slice is not None:
            self._slice.cancel()
            self._slice = None

    def _write_planned(self) -> None:
        self._slice = None
        if self.is_broken or not self.pending or self._strike("slice begun"):
            return
        try:
            self.write_slice()
        except DiskFull:
            self._plan_slice(RETRY_S)
        except InjectedError:
            return
        else:
            if not self._strike("slice written"):
                self._plan_slice(self._slice_dice.random() * self._slice_delay_s)

    def close(self) -> None:
        """Write the tables at the end of the daemon, if the disk allows it."""
        self._stop_slices()
        if not self.is_broken:
            with contextlib.suppress(DiskFull, InjectedError):
                self.project()

    def append_write(self, write: TableWrite) -> None:
        if not self.fits(Batch([], self.numbers)):
            raise DiskFull("the simulated disk is full")
        super().append_write(write)
        self._unsynced = None
        self._plan_slice(self._slice_dice.random() * self._slice_delay_s)

    async def prune(self, before: int, limit: int) -> int:
        self.pruning(before)
        return await super().prune(before, limit)

    async def _reach(self, stage: str) -> None:
        """Crash now if a crash is due at this stage of a write."""
        if self._strike(f"write {stage}"):
            await asyncio.sleep(0)  # the writer is gone

    def _strike(self, stage: str) -> bool:
        """Crash now if a crash is due at this stage. Return whether it was."""
        if self.armed is None or self.armed[0] != stage:
            return False
        _, strike = self.armed
        self.armed = None
        self._fired[f"crash: {stage}"] += 1
        strike()
        return True

    def _flush(self, batch: Batch, reported: int) -> dict[int, bytes]:
        try:
            shown = self.append(batch, reported)
        except AssertionError as error:
            self.broken(str(error))
            raise
        self._unsynced = None
        self.batches.clear()
        self._fired["full counter of tokens"] += batch.numbers.epoch > self.epoch_file
        self.epoch_file = max(self.epoch_file, batch.numbers.epoch)
        self.committed(batch)
        return shown

    async def _enter(self, name: str, blocks: bool = False) -> None:
        await self._pause(blocks)
        if self.is_broken:
            raise InjectedError("an earlier write failed")
        if name in COMMITS and self.full == 3:
            raise DiskFull("the simulated disk is full")
        if name in self.failing and self._dice.random() < 0.5:
            self._fired[f"{name} failed"] += 1
            raise self._break(name) if name in COMMITS else InjectedError(name)

    def _break(self, what: str) -> InjectedError:
        """Reject every later call: a commit has failed, so the content is unknown."""
        error = InjectedError(what)
        self.is_broken = True
        self.on_broken(error)
        return error

    async def _pause(self, blocks: bool = False) -> None:
        roll = self._dice.random()
        if blocks:
            self._freeze(roll * (self.slowness_s or 0.002))
        elif roll < 0.5 and not self.slowness_s:
            await asyncio.sleep(0)
        else:
            slowness_s = self.slowness_s
            self.slowed += slowness_s > 0
            try:
                await asyncio.sleep(roll * (slowness_s or 0.002))
            finally:
                self.slowed -= slowness_s > 0

    # -- damage -------------------------------------------------------------------------------------------------------

    def corrupt(self, seq: int, *, payload: bool, stays: int) -> None:
        """Flip a bit in the row or payload of a job. The row can be moved only after it was found `stays` times."""
        self._failed_moves_left[seq] = stays
        if payload:
            self.bad_payloads[seq] = "the checksum of its payload is wrong"
        else:
            self.bad_jobs[self.jobs[seq].id] = "the checksum of its row is wrong"
