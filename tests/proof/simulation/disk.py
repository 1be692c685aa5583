"""The disk of a simulated machine: MemoryStorage with seeded delays, every kind of failure, and crashes during a write.

A batch is written, then flushed, then acknowledged. A crash after the first step may keep the batch (the process was
killed) or lose it (the power was cut). After the second step it is kept. Committed data never changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, Final

from msgspec.structs import replace

from jobd.model.job import COUNTER_MASK, TOKEN_COUNTER_BITS, Job, epoch_seconds, new_epoch
from jobd.model.storage import BadRows, Batch, DiskFull, Numbers, OpenedStore
from jobd.storage.commit_mode import CommitSetting
from tests.support.memory_storage import MemoryStorage

STATE: Final = (
    "numbers", "jobs", "payloads", "events", "late_results", "queues", "keys", "suspects", "quarantined", "deleted",
    "kept_reports", "figures", "bad_jobs", "bad_payloads", "quarantined_ids", "damaged_tombstones", "tombstones",
    "audited", "_ids",
)  # fmt: skip
COMMITS: Final = frozenset({"prune", "save_figures", "settle_tombstones", "trim_audit"})  # calls outside batches

Snapshot = dict[str, Any]


class InjectedError(OSError):
    """An injected failure."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EIO, f"simulated: {what}")


class SimDisk(MemoryStorage):
    """Storage whose delays and failures are drawn from `dice`.

    `full` is 0 (no), 1 (for new jobs), 2 (until the reserve file is released) or 3 (for everything).

    `failing` names methods that raise with a chance of one half. `write_fault` of the next write: `unknown` raises with
    nothing written, `lost_answer` raises although it was written. `committed` is called with each batch. While commits
    are inline, time passes in a write only by `freeze`, and nothing else runs.
    """

    def __init__(
        self,
        dice: Random,
        fired: Counter[str],
        wall: Callable[[], int],
        commit: CommitSetting,
        freeze: Callable[[float], None],
    ) -> None:
        super().__init__()
        self.commits_inline = commit == "inline"
        self._commit_setting = commit
        self._freeze = freeze
        self.full = 0
        self.slowness_s = 0.0
        self.slowed = 0  # calls that a slow phase has delayed, also after it is over
        self.failing: frozenset[str] = frozenset()
        self.write_fault: str | None = None
        self.armed: tuple[str, Callable[[], None]] | None = None  # a crash at that stage of the next write
        self.wall = wall
        epoch = self.epoch_file = new_epoch(0, wall())
        # Sometimes the counter is full after a while.
        left = dice.choice((COUNTER_MASK, dice.randrange(200)))
        self.numbers = Numbers(epoch=epoch, next_token=COUNTER_MASK + 1 - left)
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
        self._failed_moves_left.clear()

    def crash(self, *, power_cut: bool) -> None:
        """Crash. A batch that was written and not flushed is kept or lost as a whole."""
        written, self._written = self._written, None
        if written is None:
            return
        kept = not power_cut or self._dice.random() < 0.3
        self._fired["crash: unflushed write " + ("kept" if kept else "lost")] += 1
        if kept:
            with contextlib.suppress(BadRows):
                self._flush(*written)

    def snapshot(self) -> Snapshot:
        """Return a copy of the content, like a backup."""
        return {name: copy.copy(getattr(self, name)) for name in STATE}

    def restore(self, snapshot: Snapshot) -> None:
        """Replace the content with an older copy, marked as a backup. The epoch file does not change."""
        self.epoch_file = max(self.epoch_file, self.numbers.epoch)
        for name, value in snapshot.items():
            setattr(self, name, copy.copy(value))
        self.marked = True

    def opened(self) -> OpenedStore:
        """Return what a start reads. After a restore, begin a new epoch."""
        if self.marked or self.epoch_file > self.numbers.epoch:
            wall, old = self.wall(), self.numbers
            seen = max(self.epoch_file, old.epoch)
            if epoch_seconds(wall) > seen and self._dice.random() < 0.5:
                seen = old.epoch  # as on another machine, which has no epoch file
                self._fired["restored on another machine"] += 1
            epoch = new_epoch(seen, wall)
            self.epoch_file, self.marked = epoch, True
            # As startup.py does: numbers that earlier clients have seen are not reused.
            next_event = max(old.next_event, epoch << TOKEN_COUNTER_BITS)
            self.numbers = replace(old, epoch=epoch, next_token=1, next_event=next_event)
        self.is_broken = False
        opened = super().opened()
        opened.full = self.full >= 2
        self.has_reserve = opened.has_reserve = not opened.full
        return opened

    # -- model.storage.Storage

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
        self._written = batch, reported
        await self._reach("written")
        await self._pause(blocks)
        self._written = None
        shown = self._flush(batch, reported)
        await self._reach("flushed")
        await self._pause(blocks)
        if fault == "lost_answer":
            self._fired["write failed, yet written"] += 1
            raise self._break("fsync")
        return shown

    async def prune(self, before: int, limit: int) -> int:
        self.pruning(before)
        return await super().prune(before, limit)

    async def _reach(self, stage: str) -> None:
        """Crash now if a crash is due at this stage."""
        if self.armed is not None and self.armed[0] == stage:
            _, strike = self.armed
            self.armed = None
            self._fired[f"crash: write {stage}"] += 1
            strike()
            await asyncio.sleep(0)  # the writer is gone

    def _flush(self, batch: Batch, reported: int) -> dict[int, bytes]:
        try:
            shown = self._commit(batch, reported)
        except AssertionError as error:
            self.broken(str(error))
            raise
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
