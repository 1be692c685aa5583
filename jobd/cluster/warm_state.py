"""Follow the records of the leader: write them into the local store, and apply them to a state in memory."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec.structs import replace

from jobd.core import replay
from jobd.core.state import State
from jobd.journal import record
from jobd.journal.record import Decoded
from jobd.model.job import Job
from jobd.model.journal import Record, SharedJournal
from jobd.model.storage import Batch, FiguresWrite, OpenedStore, Quarantined, StoredResponse, TombstoneWrite
from jobd.storage.cluster.cluster_store import ClusterStore

PIECE_EVENTS: Final = 200  # applied in one turn of the event loop, in about 5 ms


class WarmState:
    """The state that startup would load from `store`, kept up to date. `opened` has the records up to `number`.

    `last_event` is the seq of the last event of these records.
    """

    def __init__(self, store: ClusterStore, opened: OpenedStore, number: int) -> None:
        self.number = number
        self.last_event = opened.numbers.next_event - 1
        self.state = State.opened(opened)
        self.state.quarantined = dict(opened.quarantined)
        self.state.unvalidated = dict(opened.unvalidated)
        self._store = store
        self._unwritten: list[Record] = []  # applied, and not in the store yet
        self._decoded: list[Decoded] = []  # the same, decoded
        self._opened = replace(opened, jobs=[], packed_jobs=[], keys=[], unvalidated={})
        self._keys = {row.digest: row for row in opened.keys}

    def expect_tombstones(self, count: int) -> None:
        """Record that the store has new tombstones."""
        self._opened.tombstones += count

    def quarantine(self, quarantined: Quarantined) -> None:
        """Record that the store has quarantined a job."""
        self.state.quarantine(quarantined.id, quarantined.reason, quarantined.uncounted, is_moved=quarantined.is_moved)

    async def apply(self, records: list[Record]) -> None:
        """Apply the next records. Raises DiskFull, and BadRecord, after applying those before the bad one."""
        await self.write()
        events = 0
        try:
            for each in records:
                if events > PIECE_EVENTS:
                    events = 0
                    await asyncio.sleep(0)
                decoded = record.decode(each)
                batch = decoded[0]
                loaded: list[Job] = []
                events += len(batch.changes)
                if needed := replay.rows_needed(self.state, batch):
                    await self.write()
                    loaded += (await self._store.load(needed, [], [])).jobs.values()
                self._apply(each, batch, loaded)
                self._decoded.append(decoded)
        finally:
            await self.write()

    def _apply(self, made: Record, batch: Batch, loaded: list[Job]) -> None:
        replay.apply(self.state, batch, loaded)
        for digest in batch.forget_keys:
            self._keys.pop(digest, None)
        self._keys |= {row.digest: replace(row, body=None) for row in batch.keys}
        for write in batch.writes:
            if isinstance(write, FiguresWrite):
                self._opened.stats = write.body
            elif isinstance(write, TombstoneWrite):
                self._opened.tombstones -= len(write.deleted)
        self._unwritten.append(made)
        self.number, self.last_event = made.number, made.last_event

    async def write(self) -> None:
        """Pass the records that were applied to the store. On a full disk they wait for the next call."""
        if self._unwritten:
            await self._store.follow(self._unwritten, self._decoded)
            self._unwritten, self._decoded = [], []

    async def is_on_branch(self, journal: SharedJournal) -> bool:
        """Return whether `journal` still has the last record that was applied. Raises StoreAhead, and DiskFull."""
        await self.write()
        return await self._store.is_on_branch(journal)

    def opened(self) -> OpenedStore:
        """Return what startup would load. It has only queued jobs that have changed; `state` has all jobs."""
        state = self.state
        replay.finish(state)
        presence = state.presence
        keys: list[StoredResponse] = sorted(self._keys.values(), key=lambda row: row.at)
        return replace(
            self._opened,
            jobs=[state.jobs[job_id] for job_id in state.jobs.touched() if job_id not in state.processing],
            numbers=state.numbers(presence.lock_ms, presence.now, state.clock),
            queues={name: state.queue_row(name) for name in state.queue_names},
            quiet=state.quiet,
            schedules=dict(state.schedules),
            keys=keys,
            quarantined=dict(state.quarantined),
            unvalidated=dict(state.unvalidated),
        )
