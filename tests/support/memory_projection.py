"""A journal in memory and the tables behind it, with the checks that every batch has to pass."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from msgspec.structs import replace

from jobd.journal import record
from jobd.model.events import Event, fold
from jobd.model.job import Job
from jobd.model.journal import Record
from jobd.model.storage import BadRows, Batch, DiskFull, Numbers, TableWrite
from jobd.storage.tables.projection import MAX_BEHIND, SLICE_EVENTS
from tests.support.factories import as_stored
from tests.support.memory_journal import MemoryJournal
from tests.support.memory_tables import MemoryTables

Pending = tuple[int, Batch]  # number of a record that the tables lack, and its batch as decoded


class MemoryProjection(MemoryTables):
    """The committed data: a batch is committed when its record is in `log`.

    With `slices_wait`, `tables` lack the `pending` records until `project`, a read, or `max_behind` events. Without it,
    `tables` is this object. If `slice_fits` returns false, a slice raises DiskFull.
    """

    def __init__(self, numbers: Numbers | None = None, *, slices_wait: bool = False) -> None:
        super().__init__(numbers)
        self.log = MemoryJournal()
        self.tables: MemoryTables = MemoryTables(numbers) if slices_wait else self
        self.pending: deque[Pending] = deque()
        self.behind = 0  # events of the pending records, each record at least one
        self.slice_events = SLICE_EVENTS
        self.max_behind = MAX_BEHIND
        self.slice_fits: Callable[[], bool] = lambda: True
        self.quarantined: dict[str, str] = {}  # id -> reason
        self.on_tombstones: Callable[[int], None] = lambda count: None
        self._last_record = 0
        self._marked_at = 0  # the last record when a backup was restored: earlier ones do not remove its mark

    # -- the journal

    def append_record(self, batch: Batch) -> None:
        """Append `batch` to the journal."""
        made = self.next_record(batch)
        self.log.append(made)
        self.take_record(made, batch)

    def next_record(self, batch: Batch) -> Record:
        """Return `batch` as the record after the last one."""
        body, events = record.encode(batch)
        numbers = batch.numbers
        last = events[-1][0] if events else numbers.next_event - 1
        first = events[0][0] if events else last + 1
        return Record(self._last_record + 1, first, last, numbers.epoch, numbers.wall_ms, body)

    def take_record(self, made: Record, batch: Batch) -> None:
        """Note that the journal has a record, which the tables lack. `batch` may be as decided."""
        assert made.number == self._last_record + 1, f"record {made.number} after {self._last_record}"
        self._last_record = made.number
        self._add(made.number, record.decode(made)[0])
        if self.tables is not self:
            self.apply(batch)

    def append_write(self, write: TableWrite) -> None:
        """Append a write that belongs to no batch."""
        self.append_record(Batch([], self.numbers, writes=[write]))
        if self.tables is self:
            self.project()

    def _add(self, number: int, batch: Batch) -> None:
        self.pending.append((number, batch))
        self.behind += max(len(batch.changes), 1)

    def read_tail(self) -> None:
        """Forget what is in memory only, and read the records that the tables lack. Raises BadRecord."""
        if not self.pending and self.tables is self:
            return
        self.pending.clear()
        self.behind, self._last_record = 0, self.tables.projected_to
        self.become(self.tables)
        while records := self.log.read(self._last_record, 10):
            for each in records:
                batch, _ = record.decode(each)
                if each.number <= self._marked_at:
                    batch.unmark = False
                self._add(each.number, batch)
                self.apply(batch)
            self._last_record = records[-1].number
        if (begun := self.tables.numbers).epoch > self.numbers.epoch:  # after the tail, and before it was projected
            self.numbers = replace(
                self.numbers, epoch=begun.epoch, next_token=begun.next_token, next_event=begun.next_event
            )

    def choose_epoch(self) -> None:
        """Begin a new epoch if the store is a restored backup. Here it never is."""

    # -- the tables

    def project(self) -> None:
        """Write all pending records into the tables. Raises DiskFull."""
        while self.pending:
            self.write_slice()

    def write_slice(self) -> None:
        """Write the next pending records into the tables, and trim the journal. Raises DiskFull."""
        if not self.slice_fits():
            raise DiskFull("the disk of this test has no space for a slice")
        written = 0
        while self.pending and written < self.slice_events:
            number, batch = self.pending.popleft()
            size = max(len(batch.changes), 1)
            written, self.behind = written + size, self.behind - size
            if left := self.tables.apply(batch):
                self.on_tombstones(len(left))
            self.tables.projected_to = number
        self.tables.numbers = self.numbers  # those of the last record, or of an epoch that has begun since
        self.log.trim(self.tables.projected_to)

    def project_for_read(self) -> None:
        """Write all pending records. On a full disk a read has them in a transaction that is rolled back."""
        with contextlib.suppress(DiskFull):
            self.project()

    def touches(self, ids: Iterable[str], seqs: Iterable[int], digests: Iterable[str] = ()) -> bool:
        """Return whether the pending records concern one of these jobs or stored responses."""
        if not self.pending:
            return False
        events = [event for _, batch in self.pending for event in batch.changes]
        keys = {key.digest for _, batch in self.pending for key in batch.keys}
        changed, numbers = {event.job_id for event in events}, {event.job_seq for event in events}
        return not (changed.isdisjoint(ids) and numbers.isdisjoint(seqs) and keys.isdisjoint(digests))

    def both(self) -> Iterator[MemoryTables]:
        """Return the tables and the committed data, for what is written past the journal."""
        yield self
        if self.tables is not self:
            yield self.tables

    # -- checks

    def check_batch(self, batch: Batch) -> None:
        """Check that `batch` goes on from the committed data, and that marks and lock time never go back.

        Raises BadRows if it changes a job that was quarantined since it was decided.
        """
        for name in ("epoch", "next_job", "next_event", "lock_ms"):
            assert getattr(batch.numbers, name) >= getattr(self.numbers, name), f"{name} went back"
        if batch.numbers.epoch == self.numbers.epoch:
            assert batch.numbers.next_token >= self.numbers.next_token, "next_token went back"
        self._check_changes(batch.changes)

    def _check_changes(self, changes: list[Event]) -> None:
        """Check that each change continues from the one before, and that its event says everything that changed."""
        rows: dict[int, Job | None] = {}
        ids: dict[str, int | None] = {}
        last = self.events[-1].seq if self.events else 0
        for change in changes:
            event, seq = as_stored(change), change.job_seq
            assert event.seq > last, f"event {event.seq} comes after {last}"
            last = event.seq
            if seq == 0:
                continue
            before = rows[seq] if seq in rows else self.jobs.get(seq)
            if before is None and event.from_status is not None and event.job_id in self.quarantined:
                raise BadRows({event.job_id: self.quarantined[event.job_id]})  # quarantined since the batch was decided
            assert before == change.before, f"job {event.job_id} is not on the disk as the batch has it"
            if before is None:
                taken = ids[event.job_id] if event.job_id in ids else self.ids.get(event.job_id)
                assert taken is None, f"there is a job {event.job_id} already"
                assert change.payload is not None, f"job {event.job_id} comes without its payload"
            after = fold(before, event)
            assert after == change.after, f"{event.type} of job {event.job_id} does not say what happened"
            rows[seq] = after
            ids[event.job_id] = None if after is None else seq
