"""The tables of a store as dicts, into which batches are folded."""

from __future__ import annotations

from collections import deque
from typing import Any, Final, get_args

from msgspec.structs import replace

from jobd.model import storage
from jobd.model.events import QUIET, Event, QuietRule, fold, fold_quiet
from jobd.model.job import FINISHED, MAX_LATE_RESULTS, Job, LateResult, checkpoint_key, extra_keys, headers_key
from jobd.model.schedules import Schedule, fold_schedule, schedule_id
from jobd.model.webhooks import Delivery, WebhookCursor
from jobd.storage.tables.writers import KEEP_AUDIT, KEEP_BESIDE
from tests.support.factories import as_stored

KEPT_REPORTS: Final = 500


class MemoryTables:
    """What batches change. It has the records of the journal up to `projected_to`."""

    def __init__(self, numbers: storage.Numbers | None = None) -> None:
        self.numbers = numbers or storage.Numbers()
        self.projected_to = 0
        self.jobs: dict[int, Job] = {}  # seq -> row
        self.ids: dict[str, int] = {}  # id -> seq
        self.payloads: dict[int, storage.Payload] = {}
        self.events: list[Event] = []
        self.late_results: dict[int, tuple[LateResult, ...]] = {}  # job seq -> its late results, the oldest grant first
        self.queues: dict[str, storage.QueueRow] = {}
        self.quiet: dict[str, QuietRule] = {}
        self.schedules: dict[str, Schedule] = {}
        self.keys: dict[str, storage.StoredResponse] = {}
        self.unvalidated: dict[int, str] = {}
        self.deleted: dict[int, int] = {}  # seq -> wall time of the deletion
        self.kept_reports: deque[bytes] = deque(maxlen=KEPT_REPORTS)
        self.tombstones: dict[int, storage.Tombstone] = {}  # job seq -> row
        self.audited: dict[int, storage.AuditEntry] = {}  # seq -> audit entry as written; parts are not merged
        self.figures: bytes | None = None
        self.cursors: dict[str, WebhookCursor] = {}
        self.outbox: dict[int, Delivery] = {}  # id -> row
        self.marked = False

    # -- copies

    def copy_tables(self) -> MemoryTables:
        made = MemoryTables()
        made.become(self)
        return made

    def become(self, other: MemoryTables) -> None:
        """Take over a copy of the tables of `other`."""
        for name in TABLES:
            table = getattr(other, name)
            setattr(self, name, table.copy() if isinstance(table, dict | list | deque) else table)

    def differences(self, other: MemoryTables) -> list[str]:
        """Return descriptions of the tables that differ from those of `other`. Their numbers may differ."""
        return [
            f"{name}: {_first_difference(getattr(self, name), getattr(other, name))}"
            for name in COMPARED
            if getattr(self, name) != getattr(other, name)
        ]

    def share_rows(self, other: MemoryTables) -> None:
        """Use the rows of `other`, which are equal and cannot change. The same row is compared at no cost."""
        for name in SHARED:
            setattr(self, name, getattr(other, name).copy())

    # -- batches

    def apply(self, batch: storage.Batch) -> list[storage.Tombstone]:
        """Fold `batch` into the tables. Return the tombstones that it left."""
        left: list[storage.Tombstone] = []
        for change in batch.changes:
            left += self._write_late_results(change, sweeps=batch.sweeps)
            self._write_row(change)
        self.numbers = batch.numbers
        self.queues |= batch.queues
        for event in batch.changes:
            if event.type in QUIET:
                self.quiet = fold_quiet(self.quiet, event)
            if (name := schedule_id(event)) is not None:
                after = fold_schedule(self.schedules.pop(name, None), event)
                self.schedules |= {} if after is None else {name: after}
        for digest in batch.forget_keys:
            self.keys.pop(digest, None)
        self.keys |= {key.digest: key for key in batch.keys}
        for seq in batch.checked:
            self.unvalidated.pop(seq, None)
        left = storage.distinct_tombstones([*left, *batch.tombstones])
        for tombstone in left:
            assert tombstone.job_seq not in self.jobs, f"job {tombstone.job_id} is there, and has a tombstone"
            self.tombstones[tombstone.job_seq] = tombstone
        for audited in batch.audit:
            self.audited[max(self.audited, default=0) + 1] = audited
        if batch.report is not None:
            self.kept_reports.append(bytes(batch.report))
        for write in batch.writes:
            self._apply_write(write)
        self.marked = self.marked and not batch.unmark
        return left

    def _write_late_results(self, change: Event, *, sweeps: bool) -> list[storage.Tombstone]:
        """Store a late result; delete excess ones and those of a deleted job, and return their tombstones."""
        event = change
        kept = [*self.late_results.get(event.job_seq, ()), *([change.late] if change.late is not None else [])]
        if not kept:
            return []
        kept.sort(key=lambda late: late.fencing_token)
        going = kept if event.type == "deleted" else kept[:-MAX_LATE_RESULTS]
        self.late_results[event.job_seq] = tuple(kept[len(going) :])
        named = [(late.seq, late.result.storage_key) for late in going]
        return [
            storage.Tombstone(-seq, event.job_id, key, event.at, event.at)
            for seq, key in named
            if sweeps and key is not None
        ]

    def _write_row(self, change: Event) -> None:
        event, seq = as_stored(change), change.job_seq
        self.events.append(event)
        if not seq:
            return
        job = fold(self.jobs.get(seq), event)
        if job is None:
            self.delete(seq)
            self.deleted[seq] = event.at
            return
        self.jobs[seq] = job
        self.ids[job.id] = seq
        if event.from_status is None:
            self.payloads[seq] = storage.Payload(change.payload or b"null", change.request_hash or "")
        for key, body in (change.bodies or {}).items():
            self.payloads[key] = storage.Payload(body, "")
        for key in {headers_key(seq), checkpoint_key(seq)} & self.payloads.keys() - set(extra_keys(job)):
            del self.payloads[key]
        if event.type == "imported":
            self.unvalidated[seq] = event.job_id

    # -- changes past the journal

    def job(self, job_id: str) -> Job | None:
        """Return the row of a job."""
        seq = self.ids.get(job_id)
        return None if seq is None else self.jobs[seq]

    def put_row(self, job: Job, payload: storage.Payload) -> None:
        """Add an edited or imported row, which is not validated yet."""
        self.jobs[job.seq] = job
        self.ids[job.id] = job.seq
        self.payloads[job.seq] = payload
        self.unvalidated[job.seq] = job.id
        if job.status in FINISHED:
            self._count(job, +1)
        numbers = self.numbers
        self.numbers = replace(numbers, next_job=max(numbers.next_job, job.seq + 1))

    def delete(self, seq: int) -> None:
        """Delete the rows of a job, if there are any."""
        old = self.jobs.pop(seq, None)
        if old is not None and self.ids.get(old.id) == seq:
            del self.ids[old.id]
        for key in (seq, headers_key(seq), checkpoint_key(seq)):
            self.payloads.pop(key, None)
        self.unvalidated.pop(seq, None)
        self.late_results.pop(seq, None)

    def remove(self, seq: int) -> None:
        """Remove the row of a job that goes to quarantine, and uncount it. Its late results stay."""
        job = self.jobs.get(seq)
        if job is None:
            return
        late = self.late_results.get(seq)
        self.delete(seq)
        if late is not None:
            self.late_results[seq] = late
        if job.status in FINISHED:
            self._count(job, -1)

    # -- writes that belong to no batch

    def _apply_write(self, write: storage.TableWrite) -> None:
        match write:
            case storage.EventPruning(events, jobs):
                gone, rest = set(jobs), set(events)
                self.events = [each for each in self.events if each.job_seq not in gone and each.seq not in rest]
                for seq in jobs:
                    del self.deleted[seq]
            case storage.AuditTrimming(entries):
                for seq in entries:
                    self.audited.pop(seq, None)
            case storage.TombstoneWrite(deleted, postponed):
                for seq in deleted:
                    del self.tombstones[seq]
                for tombstone in postponed:
                    assert tombstone.job_seq in self.tombstones, f"{tombstone.job_id} has no tombstone to postpone"
                    self.tombstones[tombstone.job_seq] = tombstone
            case storage.FiguresWrite(body):
                self.figures = body
            case storage.OutboxWrite(cursors, deliveries):
                self.cursors |= {each.name: each for each in cursors}
                self.outbox |= {each.id: each for each in deliveries}

    def plan_pruning(self, before: int, limit: int) -> storage.EventPruning:
        """Choose up to `limit` events of jobs deleted before wall time `before`, and of queues before it."""
        old = {seq for seq, at in self.deleted.items() if at < before}
        pruned = [event for event in self.events if event.job_seq in old or (event.job_seq == 0 and event.at < before)]
        whole = old - {event.job_seq for event in pruned[limit:]}
        chosen = [event for event in pruned[:limit] if event.job_seq not in whole]
        return storage.EventPruning(
            [event.seq for event in chosen], sorted(whole), max((event.seq for event in pruned[:limit]), default=0)
        )

    def plan_trimming(self, before: int, limit: int) -> storage.AuditTrimming:
        """Choose up to `limit` audit entries: older than wall time `before`, or over the limit of their share."""
        last = max(self.audited, default=0)
        old = [seq for seq in sorted(self.audited)[:limit] if seq < last]
        trimmed = [seq for seq in old if self.audited[seq].at < before]
        for share in get_args(storage.AuditShare):
            keep = KEEP_AUDIT if share == "changes" else KEEP_BESIDE
            if len(self.audited) <= keep:
                continue
            rows = [
                seq for seq, row in sorted(self.audited.items()) if storage.audit_share(row.what, row.outcome) == share
            ]
            trimmed += [seq for seq in rows[: max(len(rows) - keep, 0)] if seq < last and seq not in trimmed]
        return storage.AuditTrimming(trimmed[:limit])

    def _count(self, job: Job, step: int) -> None:
        queue = self.queues.get(job.options.queue, storage.QueueRow())
        count = max(getattr(queue, job.status) + step, 0)
        self.queues[job.options.queue] = replace(queue, **{job.status: count})


TABLES: Final = tuple(vars(MemoryTables()))
COMPARED: Final = tuple(name for name in TABLES if name not in ("numbers", "projected_to"))
SHARED: Final = ("jobs", "payloads", "events", "keys", "audited")


def _first_difference(mine: Any, other: Any) -> str:
    if isinstance(mine, dict):
        keys = [key for key in [*mine, *other] if mine.get(key) != other.get(key)]
        return f"{keys[0]}: {mine.get(keys[0])} is not {other.get(keys[0])}" if keys else "another order"
    if isinstance(mine, list | deque):
        pairs = zip(mine, other, strict=False)
        found = next((f"{a} is not {b}" for a, b in pairs if a != b), None)
        return found or f"{len(mine)} entries are not {len(other)}"
    return f"{mine} is not {other}"
