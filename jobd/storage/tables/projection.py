"""Append batches to the journal, and write the tables behind it, in slices.

A batch is durable when its record is. The tables follow: the records that they lack are kept in memory (`_pending`),
and those that a crash leaves in the journal are read back at the start (tail.py). All calls block, and run one at a
time: in the storage thread, or in the event loop while that is idle.

    number      1 ................ 812 │ 813   814   815   816 │ 817
                in the tables          │ pending               │ prepared
                projected_to ──────────┘ last ─────────────────┘
    SQLite      jobs, events, keys …   │ table journal         │ not there yet

    append      check, encode, BEGIN, insert 817, COMMIT with fsync; accept: 817 is pending
    slice       BEGIN, delete 813 and 814, write their rows, projected_to = 814, COMMIT with fsync

Invariants:

- Record numbers count from 1 without gaps. `last` is that of the last record that was appended or followed.
- The committed tables are the result of the records 1 to `projected_to`, and of nothing else but what can be rebuilt:
  quarantine, shortened timelines, indexes. `_pending` has the records after that, up to `last`, in order.
- A slice takes whole records from the front of `_pending`. Its transaction writes their rows and `projected_to`, and
  deletes the records. So the table `journal` of a store on its own has exactly the pending records.
- In a cluster, the table `journal` is not used: the records are in PostgreSQL. The leader prepares, appends there, and
  calls `accept`; a standby calls `follow` with acknowledged records. `last_crc` is the checksum of the last one.
- After `prepare`, either the record is in the journal, and `accept` is called before the next `prepare`, or it is not
  (BadRows, DiskFull), and the state is as before. After an error that leaves the disk unknown, `db` is broken, and
  every later call raises.
- `behind` is the sum of the sizes of the pending records: their events, at least 1 for each.
- `_payloads` has the payload of each new job of the pending records, and their latest headers and checkpoints, and no
  other body. So a body is in memory or in the tables.
- A read of the tables writes all pending records first. If the disk is full, it applies them in a transaction that is
  rolled back. A read that concerns no pending record may skip both (`touches`, `read_outbox`).
- Numbers in `db.numbers` are those of the last record. Counts and checksums in `db` are those of the tables.
- A rollback restores everything that a slice has set in `db` and in the writers, so a slice can be repeated.
- The tables do not depend on where slices end, except for the rows of events (events/event_rows.py). A job that
  several records of a slice change is written once.
- In a record of this process, changes have the rows before and after them, so a damaged row of a changed job is
  written again from memory. A record of the tail or of another node has events only. The row is then read; a damaged
  one is quarantined, and in a cluster the tables are rebuilt.
- `prepare` writes a slice first if the tables lack MAX_BEHIND events, on a full disk MAX_BEHIND_FULL. If that fails,
  the append is rejected. So the memory of pending records is bounded.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Final, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from jobd.journal import record
from jobd.journal.checksum import checksum
from jobd.journal.record import Decoded
from jobd.journal.sqlite import SqliteJournal
from jobd.model.events import QUIET, Event
from jobd.model.job import FINISHED, seq_of_body
from jobd.model.journal import BadRecord, Record
from jobd.model.storage import (
    BadRows,
    Batch,
    DiskFull,
    OutboxWrite,
    Payload,
    QueueRow,
    TableWrite,
    Tombstone,
    distinct_tombstones,
)
from jobd.storage import codec
from jobd.storage.cluster import membership
from jobd.storage.cluster.membership import Membership
from jobd.storage.damage.quarantine import quarantine_jobs
from jobd.storage.database import BY_SEQ, PUT_QUEUE, PUT_TOMBSTONE, Database, StructureDamaged, readable
from jobd.storage.events import event_rows
from jobd.storage.events.shortening import TimelineShortener
from jobd.storage.files import StoreUnreadable
from jobd.storage.queries import read_job
from jobd.storage.tables import table_writes
from jobd.storage.tables.tail import Pending, fix, read_tail
from jobd.storage.tables.writers import JobWriter, RowUnusable, StoredJob

T = TypeVar("T")


class Prepared(Struct, gc=False):
    """A record to append. `payloads` are those that its batch asks for. See `Projection.prepare`."""

    record: Record
    pending: Pending
    payloads: dict[int, bytes]
    reported: int


SLICE_EVENTS: Final = 150  # of one transaction, if there are as many: it takes a millisecond or two
# A slice with the changes of several batches writes each of their jobs once, so larger batches get larger slices.
BATCHES_PER_SLICE: Final = 5
MAX_SLICE_EVENTS: Final = 1_500
SLICE_BYTES: Final = 1 << 20  # of its records are enough too, because a transaction with large payloads takes longer
MAX_BEHIND: Final = 30_000  # events that the tables may lack
MAX_BEHIND_FULL: Final = 3_000  # on a full disk, because every read then applies them in memory


class Projection:
    """The journal of a store and the tables behind it. `db` has the tables as of `db.projected_to`."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.journal = SqliteJournal(db.conn, db.commit_statement)
        self.behind = 0  # events that the tables lack
        self.append_s: float | None = None  # duration of the COMMIT of the latest `append`; None if it made none
        self.tombstones_written = 0
        self.is_full = False  # the latest slice found the disk full
        self.last = db.projected_to  # number of the last record
        self.last_crc = None if db.membership is None else db.membership.record_crc  # of the last record of a cluster
        self._batch_events = 0  # of the latest batch
        self._pending: deque[Pending] = deque()
        self._payloads: dict[int, Payload] = {}  # bodies of the pending records, by key
        self._outbox = 0  # number of the last record that concerns the webhook outbox
        self._jobs = JobWriter(db.conn, self._find, db.note_fault)
        self._shortener = TimelineShortener(db)
        self._is_projecting = False
        db.on_rollback = self._jobs.forget_rows
        db.catch_up = self._catch_up

    # ------------------------------------------------------------------------------------------------ the journal

    def append(self, given: Batch | TableWrite, reported: int = 0) -> dict[int, bytes]:
        """Append a batch, or a write that belongs to none, and return the payloads that it asks for.

        The batch already considers the first `reported` quarantined jobs. Raises BadRows or DiskFull if nothing was
        written.
        """
        prepared = self.prepare(given, reported)
        db = self.db
        if prepared.record.epoch > db.stored_epoch:
            db.advance_epoch(prepared.record.epoch)
        try:
            self.journal.append(prepared.record)
        finally:
            self.append_s = db.commit_s
        self.accept(prepared)
        return prepared.payloads

    def prepare(self, given: Batch | TableWrite | None, reported: int = 0) -> Prepared:
        """Check what is to be appended, read the payloads, and make the record. See `append`. With None, it is empty.

        If the record is in the journal, pass the result to `accept` before the next call.
        """
        db = self.db
        db.check()
        self.append_s = None
        # Numbers that were read earlier may be old, because the caller can have waited for another append.
        batch = given if isinstance(given, Batch) else Batch([], db.numbers, writes=[] if given is None else [given])
        if self.behind >= (MAX_BEHIND_FULL if self.is_full else MAX_BEHIND):
            self.project_slice()
        if db.membership is not None and self.behind >= 2 * self.slice_events:
            with contextlib.suppress(DiskFull):  # bound the work of the next read, which writes all pending events
                self.project_slice()
        self._check_quarantined(batch)
        payloads = self._read_payloads(batch)
        self._subtract_quarantined(batch.queues, reported)
        body, events = record.encode(batch)
        numbers, number = batch.numbers, self.last + 1
        first = batch.changes[0].seq if batch.changes else numbers.next_event
        last = batch.changes[-1].seq if batch.changes else numbers.next_event - 1
        made = Record(number, first, last, numbers.epoch, numbers.wall_ms, body)
        pending = Pending(number, batch, events, len(body), 0 if db.membership is None else checksum(made))
        return Prepared(made, pending, payloads, reported)

    def accept(self, prepared: Prepared) -> None:
        """Queue an appended record for the tables."""
        db, pending = self.db, prepared.pending
        self.last, self.last_crc = pending.number, pending.crc
        self._batch_events = len(pending.events)
        self._add(pending)
        for forgotten in [each for each in db.recently_quarantined if each < prepared.reported]:
            del db.recently_quarantined[forgotten]

    def follow(self, records: Iterable[Record], decoded: Iterable[Decoded] = ()) -> None:
        """Queue the next records of a shared journal for the tables, and write slices while enough events are queued.

        `decoded` has the first of them as decoded. Raises DiskFull if it keeps none, and BadRecord, after keeping the
        records that precede the bad one.
        """
        self.db.check()
        if self.is_full and self.behind >= MAX_BEHIND_FULL:
            self.project_slice()
        known = iter(decoded)
        for made in records:
            if made.number != self.last + 1:
                raise BadRecord(self.last + 1, "is missing")
            pending = Pending(made.number, *(next(known, None) or record.decode(made)), len(made.body), checksum(made))
            self.last, self.last_crc = made.number, pending.crc
            self._add(pending)
        with contextlib.suppress(DiskFull):  # the tables are written later
            while self.behind >= self.slice_events:
                self.project_slice()

    def _check_quarantined(self, batch: Batch) -> None:
        """Raise BadRows if `batch` changes a job that a read has quarantined since the batch was decided."""
        if quarantined := self.db.quarantined:
            changed = {change.job_id for change in batch.changes if change.from_status is not None}
            if ids := changed & quarantined.keys():
                raise BadRows({id_: quarantined[id_] for id_ in ids})

    def _subtract_quarantined(self, queues: dict[str, QueueRow], reported: int) -> None:
        """Subtract the jobs quarantined since the batch was decided from its counts of finished jobs."""
        if not queues:
            return
        for number in range(reported, self.db.quarantined_count):
            uncounted = self.db.recently_quarantined[number].uncounted
            if uncounted is not None and uncounted[0] in queues:
                queues[uncounted[0]] = queues[uncounted[0]].without(uncounted[1])

    def _read_payloads(self, batch: Batch) -> dict[int, bytes]:
        if not batch.payloads:
            return {}
        payloads: dict[int, bytes] = {}
        bad: dict[str, str] = {}
        new = {change.job_seq: change.payload for change in batch.changes if change.payload is not None}
        for bodies in [change.bodies for change in batch.changes if change.bodies]:
            new |= bodies
        for seq in batch.payloads:
            if (body := self._jobs.payloads.get(seq) or new.get(seq)) is not None:
                payloads[seq] = body
                continue
            payload, error = self._payloads.get(seq), ""
            if payload is None:
                payload, error = self.db.payload(seq)
            if payload is not None:
                payloads[seq] = payload.body
            else:
                bad[self.db.job_id_of(seq_of_body(seq)) or f"seq {seq}"] = error
        if bad:
            raise BadRows(bad)
        return payloads

    def pending_payloads(self, seqs: Iterable[int]) -> dict[int, Payload]:
        """Return those of the bodies that the tables lack. The tables have the latest of the others."""
        return {seq: self._payloads[seq] for seq in seqs if seq in self._payloads}

    def cached_payloads(self, seqs: Iterable[int]) -> dict[int, bytes]:
        """Return those of the payloads that were written recently. Safe outside the storage thread."""
        cached = self._jobs.payloads
        return {seq: body for seq in seqs if (body := cached.get(seq)) is not None}

    def _add(self, pending: Pending) -> None:
        batch = pending.batch
        self.db.numbers = batch.numbers
        self._pending.append(pending)
        self.behind += pending.size
        for change in batch.changes:
            if change.payload is not None:
                job_seq = change.job_seq
                self._payloads[job_seq] = Payload(change.payload, change.request_hash or "")
                self._jobs.cache_payload(job_seq, change.payload)
            if change.bodies:
                self._payloads |= {key: Payload(body, "") for key, body in change.bodies.items()}
        if batch.writes and any(type(write) is OutboxWrite for write in batch.writes):
            self._outbox = pending.number

    def read_tail(self, path: str) -> None:
        """Read the quarantine, and the records that the tables lack. Raises StoreUnreadable if one is unusable."""
        db = self.db
        for id_, reason in db.rows("SELECT id, reason FROM quarantined_jobs"):
            db.quarantined[readable(id_)] = readable(reason)
        begun = db.numbers
        tail = read_tail(self.journal, db.projected_to)
        tail.check(path)
        for pending in tail.pending:
            self._add(pending)
            self.last = pending.number
            self._unmark(pending)
            pending.batch.unmark = False  # the mark of a start that follows stays
        if begun.epoch > db.numbers.epoch:  # an earlier start began an epoch, and wrote none of these records
            marks = {"epoch": begun.epoch, "next_token": begun.next_token, "next_event": begun.next_event}
            db.numbers = replace(db.numbers, **marks)

    @contextlib.contextmanager
    def starting(self, path: str) -> Iterator[None]:
        """Write the tables for the first time inside the context.

        Changes of a job without a row are skipped. Raises StoreUnreadable if a record contradicts the tables.
        """
        try:
            yield
        except sqlite3.IntegrityError as error:
            if not self._pending:
                raise
            number = self._pending[0].number
            bad = BadRecord(number, f"or a later one contradicts the tables ({error})")
            raise StoreUnreadable(f"{path}: {bad}: {fix(bad)}") from error

    # ------------------------------------------------------------------------------------------------- the tables

    def touches(self, ids: Collection[str], seqs: Collection[int], digests: Collection[str]) -> bool:
        """Return whether the tables may lack a change of these jobs or stored responses."""
        names = {*ids, *seqs, *digests}
        batches = [pending.batch for pending in self._pending] if names else []
        events = (event for batch in batches for event in batch.changes)
        if any(event.job_id in names or event.job_seq in names for event in events):
            return True
        return any(key.digest in names for batch in batches for key in batch.keys)

    def read_outbox(self, fn: Callable[..., T], *args: object) -> T:
        """Return the result of a query of the webhook outbox as of the last record."""
        return self.read(fn, *args) if self._outbox > self.db.projected_to else fn(*args)

    def read(self, fn: Callable[..., T], *args: object) -> T:
        """Return the result of a query as of the last record.

        If the tables cannot be written because the disk is full, it reads from a transaction that is rolled back.
        """
        try:
            self.project()
        except DiskFull:
            while True:
                with self._quarantining():
                    return self.db.uncommitted(lambda: self._apply(self._pending), lambda: fn(*args))
        return fn(*args)

    @property
    def slice_events(self) -> int:
        """The number of events that is enough for a slice."""
        return max(SLICE_EVENTS, min(BATCHES_PER_SLICE * self._batch_events, MAX_SLICE_EVENTS))

    def project(self) -> None:
        """Write all pending records into the tables. Raises DiskFull."""
        while self._pending:
            self.project_slice()

    def _catch_up(self) -> None:
        if not self._is_projecting:
            self.project()

    def project_slice(self) -> None:
        """Write the first pending records into the tables, in one transaction. Raises DiskFull."""
        self._is_projecting = True
        try:
            with self._quarantining():
                self._project_slice()
            self.is_full = False
        except DiskFull:
            self.is_full = True
            raise
        finally:
            self._is_projecting = False

    def _project_slice(self) -> None:
        chosen: list[Pending] = []
        enough = self.slice_events
        events = body_bytes = 0
        for pending in self._pending:
            chosen.append(pending)
            events += pending.size
            body_bytes += pending.body_bytes
            if events >= enough or body_bytes >= SLICE_BYTES:
                break
        if chosen:
            self.tombstones_written += self.db.commit(self._apply, chosen)
            for pending in chosen:
                changes = pending.batch.changes
                self._shortener.note(changes)
                for change in changes:
                    if change.payload is not None:
                        self._payloads.pop(change.job_seq, None)
                    if change.bodies:
                        self._forget_bodies(change.bodies)
                self.behind -= pending.size
                self._pending.popleft()

    def _forget_bodies(self, bodies: dict[int, bytes]) -> None:
        """Forget headers and checkpoints of which no later record has another one."""
        for key, body in bodies.items():
            if (known := self._payloads.get(key)) is not None and known.body is body:
                del self._payloads[key]

    @contextlib.contextmanager
    def _quarantining(self) -> Iterator[None]:
        """Quarantine a job of the tail whose row is damaged, or skip it if the row is missing.

        The caller can then repeat what it did. After the start, rows are written again from memory instead. Raises
        StructureDamaged, or StoreDamaged for the store of a cluster.
        """
        try:
            yield
        except RowUnusable as error:
            if error.row is None:
                self.db.raise_if_clustered(f"job {error.job_id}: {error}")
                self.db.note_fault(f"job {error.job_id}: {error}")
            self.db.quarantined[error.job_id] = str(error)
            if error.row is not None:
                quarantine_jobs(self.db, [(error.row, str(error))], self._uncount)
        except StructureDamaged as error:
            self.db.raise_if_clustered(str(error))
            raise

    def _uncount(self, seq: int) -> tuple[str, str] | None:
        """Subtract a job from the counts of the pending records. Return its queue and status if it is finished."""
        events = [event for each in self._pending for event in each.batch.changes]
        first = next((event for event in events if event.job_seq == seq), None)
        if first is None:
            return None
        queue, status = first.queue, first.from_status
        for batch in (each.batch for each in self._pending):
            for event in (event for event in batch.changes if event.job_seq == seq):
                status = event.to_status
            if status in FINISHED and queue in batch.queues:
                batch.queues[queue] = batch.queues[queue].without(status)
        return (queue, status) if status in FINISHED else None

    def _apply(self, pending: Sequence[Pending]) -> int:
        """Write records in a transaction. Return the number of tombstones."""
        db = self.db
        if pending and db.membership is None:
            self.journal.trim(pending[-1].number)  # first: the tables get the pages, and the file hardly grows
        batches = [each.batch for each in pending]
        changes: list[Event] = list(chain.from_iterable(batch.changes for batch in batches))
        tombstones: list[Tombstone] = []
        deletes = bool([each for each in changes if each.late is not None or each.type == "deleted"])
        if deletes or any([batch.tombstones for batch in batches]):
            for batch in batches:  # one by one, so that the tombstones do not depend on the slices
                left = table_writes.write_late_results(db, batch)
                tombstones += distinct_tombstones([*left, *batch.tombstones]) if left else batch.tombstones
        if changes:
            db.totals = self._jobs.write(changes, db.totals, db.quarantined)
            events = chain.from_iterable(each.events for each in pending)
            db.conn.executemany(event_rows.INSERT, event_rows.pack(events))
        if queues := {name: row for batch in batches for name, row in batch.queues.items()}:
            db.conn.executemany(PUT_QUEUE, [codec.queue_row(name, row) for name, row in queues.items()])
        for event in [each for each in changes if each.details is not None and each.type != "granted"]:
            if event.type in QUIET:
                table_writes.write_quiet(db, event)
            elif event.details and "schedule" in event.details:
                table_writes.write_schedule(db, event)
        if tombstones:
            db.conn.executemany(PUT_TOMBSTONE, map(codec.struct_row, tombstones))
        table_writes.write_keys(db, batches)
        table_writes.write_rest(db, batches)
        for each in pending:
            db.projected_to = each.number
            self._unmark(each)
        if pending and db.membership is not None:
            self._write_membership(replace(db.membership, record_crc=pending[-1].crc))
        db.write_meta()
        return len(tombstones)

    def keep_timeline(self, timeline: int) -> None:
        """Write the highest timeline of the journal's server that was seen. Raises DiskFull."""
        db = self.db
        assert db.membership is not None
        db.commit(self._write_membership, replace(db.membership, timeline=timeline))

    def _write_membership(self, changed: Membership) -> None:
        self.db.membership = changed
        membership.write(self.db.conn, changed)

    def _unmark(self, pending: Pending) -> None:
        if pending.batch.unmark and pending.number >= self.db.marked:
            self.db.marked = 0

    def _find(self, event: Event) -> StoredJob:
        """Return the row of the job of `event`. Raises RowUnusable."""
        rows = self.db.rows(BY_SEQ, (event.job_seq,))
        if not rows:
            raise RowUnusable(event.job_id)
        job, error = read_job(rows[0], self.db.reader.job)
        if job is None:
            raise RowUnusable(event.job_id, rows[0], error)
        return StoredJob(job, rows[0])

    # --------------------------------------------------------------------------------------------------- upkeep

    @property
    def needs_upkeep(self) -> bool:
        """Whether earlier calls have left work for `upkeep`."""
        return not self.db.is_broken and (self._shortener.has_work or self.db.has_long_log)

    def upkeep(self) -> None:
        """Shorten the journal of one job, and checkpoint the log if it is long. The next commands may wait for it."""
        self.db.check()
        if self._shortener.has_work:
            self._shortener.shorten()
        if self.db.has_long_log:
            self.db.checkpoint()
