"""Storage in memory that fails on demand, for tests of the actor and its callers.

A batch is committed when its record is in the journal. The tables are written from the records, at once or in slices. A
batch that does not continue the committed rows fails the test.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from io import BytesIO
from typing import BinaryIO

import msgspec
from msgspec.structs import replace

from jobd.journal import event_codec
from jobd.model import storage
from jobd.model.events import Event
from jobd.model.fingerprints import fingerprint
from jobd.model.job import FINISHED, LIVE, Job, Result, extra_keys, packed, seq_of_body
from jobd.model.responses import CheckedRows, DamagedRow
from tests.support.memory_outbox import MemoryOutbox
from tests.support.memory_projection import MemoryProjection


class MemoryStorage(MemoryProjection, MemoryOutbox, storage.JobStorage, storage.OutboxStorage):
    """The committed data in dicts. Every method yields to the event loop once, as calls of the storage thread do.

    Failures on demand:
    - `write_errors`: the next writes raise these in order and write nothing (None: that write succeeds).
    - `lost_commits`: this many next writes commit and still raise OSError, as a failed fsync can.
    - `has_spare`: if false, a batch may fit, but there is no spare space. `disk_space`: the result of `space`.
    - `fits`: batches for which it returns false raise DiskFull. `fill` and `fill_nearly` set it, `free` clears it.
    - `bad_jobs` (id to reason), `bad_payloads` (job seq to reason): rows whose checksum is wrong.
    - `can_move`: if it returns false for a damaged job, its rows cannot be quarantined, as on a full disk.
    - `errors`: method name to the error that it raises.
    - `commits_inline`: a write does not yield to the event loop.
    - `gate`: while cleared, writes wait for it (a slow disk); `at_gate` is set while one waits.
    """

    commits_inline = False

    def __init__(self, numbers: storage.Numbers | None = None, *, slices_wait: bool = False) -> None:
        MemoryProjection.__init__(self, numbers, slices_wait=slices_wait)
        self.gone_to = 0
        self.event_bytes = 0  # of each event, in the size of the store
        self.has_reserve = True
        self.disk_space: storage.DiskSpace | None = storage.DiskSpace("/disk/jobd.db", 8 << 30, 16 << 30)
        self.replaced: str | None = None
        self.has_spare = True
        self.older_node: str | None = None  # a node that does not read records of the latest format
        self.batches: list[storage.Batch] = []  # committed ones
        self.calls: dict[str, int] = {}
        self.write_errors: deque[Exception | None] = deque()
        self.lost_commits = 0
        self.fits: Callable[[storage.Batch], bool] = lambda batch: True
        self.bad_jobs: dict[str, str] = {}
        self.bad_payloads: dict[int, str] = {}
        self.errors: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_gate = asyncio.Event()
        self.can_move: Callable[[Job], bool] = lambda job: True
        self.unmoved: dict[str, str] = {}  # as `quarantined`: jobs found since the start whose rows are still in place
        self.quarantined_ids: dict[int, str] = {}  # seq -> id of quarantined jobs
        self.damaged_tombstones: dict[int, Job] = {}  # seq -> the quarantined job
        self.on_quarantined: Callable[[storage.Quarantined], None] = lambda aside: None
        self._all_quarantined: list[storage.Quarantined] = []  # in order
        self._reported = 0  # of these

    # -- for tests ----------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Reject every batch until the reserve file is released, and none after that."""
        self.fits = lambda batch: not self.has_reserve

    def fill_nearly(self) -> None:
        """Reject only batches with new jobs."""
        self.fits = lambda batch: all(change.payload is None for change in batch.changes)

    def free(self) -> None:
        self.fits = lambda batch: True
        self.has_spare = True

    def put(self, job: Job, payload: bytes = b"null", request_hash: str = "") -> None:
        """Add an edited or imported row, which is not validated yet."""
        for tables in self.both():
            tables.put_row(job, storage.Payload(payload, request_hash))

    def opened(self) -> storage.OpenedStore:
        """Return what a start would read, after whatever was in memory only is lost. Raises BadRecord."""
        self.read_tail()
        self.choose_epoch()
        with contextlib.suppress(storage.DiskFull):
            self.project()
        self.on_quarantined = lambda aside: None
        self.on_tombstones = lambda count: None
        self.unmoved.clear()
        bad = {job_id: reason for job_id, reason in self.bad_jobs.items() if job_id in self.ids}
        for job_id, reason in bad.items():
            self._quarantine(self.jobs[self.ids[job_id]], reason)
        self._reported = len(self._all_quarantined)
        undamaged = [job for _, job in sorted(self.jobs.items()) if job.id not in self.unmoved]
        live = [(packed(job), job) for job in undamaged if job.status in LIVE]
        return storage.OpenedStore(
            numbers=self.numbers,
            jobs=[job for short, job in live if short is None],
            packed_jobs=[short for short, _ in live if short is not None],
            queues=dict(self.queues),
            quiet=self.quiet,
            schedules=dict(self.schedules),
            keys=[replace(key, body=None) for key in self.keys.values()],
            quarantined=self.quarantined | self.unmoved,
            unvalidated=dict(self.unvalidated),
            faults=[],
            stats=self.figures,
            full=not self.fits(storage.Batch([], self.numbers)),
            has_reserve=self.has_reserve,
            marked=self.marked,
            tombstones=len(self.tombstones),
        )

    def append(self, batch: storage.Batch, reported: int) -> dict[int, bytes]:
        """Append all of `batch` to the journal, or nothing if it raises. Return the payloads that it asks for.

        It considers the first `reported` quarantined jobs.
        """
        self.check_batch(batch)
        if self.behind >= self.max_behind:
            self.project()
        new = {each.job_seq: each.payload for each in batch.changes if each.payload is not None}
        for each in batch.changes:
            new |= each.bodies or {}
        self._check_payloads(batch, new)
        payloads = {seq: new[seq] if seq in new else self.payloads[seq].body for seq in batch.payloads}
        for aside in self._all_quarantined[reported:]:
            if aside.uncounted is not None and aside.uncounted[0] in batch.queues:
                name, status = aside.uncounted
                batch.queues[name] = batch.queues[name].without(status)
        self.append_record(batch)
        self.batches.append(batch)
        for change in batch.changes:
            if change.type == "deleted":
                self.bad_jobs.pop(change.job_id, None)
                self.unmoved.pop(change.job_id, None)
        return payloads

    # -- model.storage

    def too_old_for(self, format: int) -> str | None:
        return self.older_node

    def cached_payloads(self, job_seqs: list[int]) -> dict[int, bytes]:
        return {}

    async def load(self, ids: list[str], payloads: list[int], digests: list[str]) -> storage.LoadedRows:
        await self._enter("load")
        if self.touches(ids, payloads, digests):
            self.project_for_read()
        loaded = storage.LoadedRows({}, {}, {}, {})
        for job_id in ids:
            self._load_job(job_id, loaded)
        for seq in payloads:
            if (reason := self._bad_payload(seq)) is not None:
                job = self.jobs[seq_of_body(seq)]
                loaded.bad[job.id] = reason
                self._quarantine(job, reason)
            elif seq in self.payloads:
                loaded.payloads[seq] = self.payloads[seq]
            elif (quarantined := self.quarantined_ids.get(seq_of_body(seq))) is not None:
                loaded.bad[quarantined] = self.quarantined[quarantined]
        loaded.responses = {digest: self.keys[digest] for digest in digests if digest in self.keys}
        await self._report_quarantined()
        return loaded

    async def write(self, batch: storage.Batch) -> dict[int, bytes]:
        reported = self._reported
        await self._enter("write")
        if not self.gate.is_set():
            self.at_gate.set()
            await self.gate.wait()
            self.at_gate.clear()
        if self.write_errors and (error := self.write_errors.popleft()) is not None:
            raise error
        if not self.fits(batch):
            raise storage.DiskFull("the disk of this test is full")
        shown = self.append(batch, reported)
        if self.tables is self:
            self.project()
        if self.lost_commits:
            self.lost_commits -= 1
            raise OSError("fsync failed; the batch may be there or not")
        return shown

    def _in_order(self, query: storage.JobQuery, beyond: int | None, end: int | None = None) -> list[int]:
        if query.by_end:
            places = sorted(((job.finished_at or 0, job.seq) for job in self.jobs.values()), reverse=True)
            return [place[1] for place in places if beyond is None or end is None or place < (end, beyond)]
        if query.after is None:
            return sorted((seq for seq in self.jobs if beyond is None or seq < beyond), reverse=True)
        return sorted(seq for seq in self.jobs if beyond is None or seq > beyond)

    async def find_jobs(self, query: storage.JobQuery) -> storage.JobRows:
        await self._enter("find")
        self.project_for_read()
        page = storage.JobRows([], None)
        size, scanned = 0, 0
        for seq in self._in_order(query, query.before if query.after is None else query.after, query.before_end):
            if scanned == query.scan or len(page.jobs) == query.limit:
                break
            scanned += 1
            job = self.jobs[seq]
            if not _matches(job, query) or not self._has(job, query.text):
                page.next_before = seq
                continue
            if (reason := self._bad_row(job)) is not None:
                self._quarantine(job, reason)
                continue
            body = self.payloads[seq].body
            if page.jobs and size + len(body) > query.payload_bytes:
                break
            page.jobs.append((job, body))
            page.bodies |= {key: self.payloads[key].body for key in extra_keys(job)}
            page.next_before = seq
            size += len(body)
        if query.by_end and page.next_before is not None:
            page.next_end = self.jobs[page.next_before].finished_at or 0
        if page.next_before is not None and not self._in_order(query, page.next_before, page.next_end):
            page.next_before = None
        page.scanned = scanned
        if page.next_before is not None and scanned == query.scan and len(page.jobs) < query.limit:
            page.scanned_until = page.next_end if query.by_end else self.jobs[page.next_before].created_at
        page.last_event = self.numbers.next_event - 1
        await self._report_quarantined()
        return page

    def _has(self, job: Job, text: str | None) -> bool:
        message = job.error.message if job.error is not None else None
        places = (job.id, message or "", self.payloads[job.seq].body.decode())
        return text is None or any(text.lower() in place.lower() for place in places)

    async def timeline(self, job_seq: int, limit: int | None = None) -> list[Event]:
        await self._enter("timeline")
        self.project_for_read()
        events = [event for event in self.events if event.job_seq == job_seq][-limit if limit else 0 :]
        return event_codec.thin(events)

    async def read_late_results(self, wanted: list[storage.LateResultQuery]) -> storage.LateResultRows:
        await self._enter("late")
        if self.touches((), [each.job_seq for each in wanted]):
            self.project_for_read()
        known = storage.LateResultRows()
        for each in wanted:
            kept = self.late_results.get(each.job_seq, ())
            known.results[each.job_seq] = [
                late if each.with_results else replace(late, result=Result(late.result.download_url)) for late in kept
            ]
            granted = (event for event in self.events if event.job_seq == each.job_seq and event.type == "granted")
            for event in granted:
                if event.grant is not None and event.grant.lock_id == each.lock_id:
                    known.grants[each.job_seq, event.grant.lock_id] = event.grant
        return known

    async def count_late_results(self, job_seqs: list[int]) -> dict[int, int]:
        await self._enter("count_late")
        self.project_for_read()
        return {seq: len(self.late_results[seq]) for seq in job_seqs if self.late_results.get(seq)}

    async def events_after(self, after: int, limit: int) -> storage.EventPage:
        """Return up to `limit` events with a seq above `after`, oldest first."""
        await self._enter("events_after")
        self.project_for_read()
        found = [event for event in self.events if event.seq > after][:limit]
        return storage.EventPage(found, self.numbers.next_event - 1, self.gone_to, len(found) == limit)

    async def expired_jobs(self, now: int, limit: int, skip: int = 0) -> list[str]:
        await self._enter("expired")
        self.project_for_read()
        old = [job for job in self.jobs.values() if job.status in FINISHED and _expires(job) <= now]
        undamaged: list[str] = []
        for job in sorted(old, key=_expires):
            if (reason := self.bad_jobs.get(job.id) or self.unmoved.get(job.id)) is not None:
                self._quarantine(job, reason)
            elif len(undamaged) < skip + limit:
                undamaged.append(job.id)
        await self._report_quarantined()
        return undamaged[skip:]

    async def reports(self, limit: int) -> list[bytes]:
        await self._enter("reports")
        self.project_for_read()
        return list(reversed(self.kept_reports))[:limit]

    async def quarantine(self, job: Job, reason: str) -> None:
        await self._enter("quarantine")
        self.project_for_read()
        self._quarantine(self.jobs.get(job.seq, job), reason)
        await self._report_quarantined()

    async def used_bytes(self) -> int:
        await self._enter("used_bytes")
        return self.event_bytes * len(self.events)

    async def prune(self, before: int, limit: int) -> int:
        await self._enter("prune")
        pruning, before_it = self.plan_pruning(before, limit), len(self.events)
        if pruning.events or pruning.jobs:
            await self.write_tables(pruning)
            self.gone_to = max(self.gone_to, pruning.upto)
        return before_it - len(self.events)

    async def read_audit(self, query: storage.AuditQuery) -> storage.AuditRows:
        await self._enter("audit")
        self.project_for_read()
        below = [seq for seq in sorted(self.audited, reverse=True) if query.before is None or seq < query.before]
        scanned = below[: query.scan]
        found = [(seq, self.audited[seq]) for seq in scanned if _is_asked(self.audited[seq], query)]
        if len(found) > query.limit:
            return storage.AuditRows(found[: query.limit], found[query.limit - 1][0])
        return storage.AuditRows(found, scanned[-1] if len(below) > len(scanned) else None)

    async def trim_audit(self, before: int, limit: int) -> int:
        await self._enter("trim_audit")
        trimming = self.plan_trimming(before, limit)
        if trimming.entries:
            await self.write_tables(trimming)
        return len(trimming.entries)

    async def due_tombstones(self, now: int, limit: int) -> storage.DueTombstones:
        await self._enter("due_tombstones")
        self.project_for_read()
        waiting = self.tombstones.values()
        due = [each for each in waiting if each.due_at <= now or each.due_at > now + storage.MAX_POSTPONE_MS]
        due.sort(key=lambda each: each.due_at)
        late = {result.result.storage_key for kept in self.late_results.values() for result in kept}
        held = {each.job_seq for each in due[:limit] if each.key in late}
        return storage.DueTombstones([(each, self.is_referenced(each.key)) for each in due[:limit]], held=held)

    def is_referenced(self, key: str) -> bool:
        """Return whether a job has `key` as its storage_key. Quarantined jobs count."""
        jobs = [*self.jobs.values(), *self.damaged_tombstones.values()]
        return any(job.result is not None and job.result.storage_key == key for job in jobs)

    async def update_tombstones(self, pruned: list[int], later: list[storage.Tombstone]) -> None:
        await self._enter("update_tombstones")
        await self.write_tables(storage.TombstoneWrite(pruned, later))

    async def save_stats(self, body: bytes) -> None:
        await self._enter("save_figures")
        await self.write_tables(storage.FiguresWrite(bytes(body)))

    async def probe(self, spare_bytes: int = 0) -> None:
        await self._enter("probe")
        if not self.fits(storage.Batch([], self.numbers)) or (spare_bytes and not self.has_spare):
            raise storage.DiskFull("the disk of this test is full")

    async def measure_space(self) -> storage.DiskSpace | None:
        await self._enter("space")
        return self.disk_space

    async def replaced_file(self) -> str | None:
        return self.replaced

    async def drop_reserve(self) -> bool:
        await self._enter("drop_reserve")
        had, self.has_reserve = self.has_reserve, False
        return had

    async def build_reserve(self) -> None:
        await self._enter("build_reserve")
        self.has_reserve = True
        if not self.fits(storage.Batch([], self.numbers)):
            self.has_reserve = False
            raise storage.DiskFull("there is no space for the reserve file")

    async def check_rows(self, cursor: str | None) -> CheckedRows | None:
        """Check all jobs in one slice."""
        await self._enter("check_rows")
        self.project_for_read()
        if cursor is not None:
            return None
        bad = [(job, reason) for job in self.jobs.values() if (reason := self._bad_row(job)) is not None]
        checked = len(self.jobs)
        for job, reason in bad:
            self._quarantine(job, reason)
        await self._report_quarantined()
        return CheckedRows("jobs", checked, [DamagedRow(f"job {job.id}", reason) for job, reason in bad], None)

    async def backup(self, progress: storage.BackupProgress | None = None) -> BinaryIO:
        """Return the live and finished jobs as JSON."""
        await self._enter("backup")
        self.project_for_read()
        body = msgspec.json.encode(list(self.jobs.values()))
        if progress is not None:
            progress("copying", len(body), len(body))
        return BytesIO(body)

    # -- inside -------------------------------------------------------------------------------------------------------

    async def write_tables(self, write: storage.TableWrite) -> None:
        """Append a write that belongs to no batch."""
        self.append_write(write)

    async def _pause(self) -> None:
        await asyncio.sleep(0)

    async def _enter(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if name != "write" or not self.commits_inline:
            await asyncio.sleep(0)
        if (error := self.errors.get(name)) is not None:
            raise error

    def _load_job(self, job_id: str, loaded: storage.LoadedRows) -> None:
        job = self.job(job_id)
        if job is None:
            if job_id in self.quarantined:
                loaded.bad[job_id] = self.quarantined[job_id]
        elif job_id in self.bad_jobs:
            loaded.bad[job_id] = self.bad_jobs[job_id]
            self._quarantine(job, self.bad_jobs[job_id])
        else:
            loaded.jobs[job_id] = job

    def _check_payloads(self, batch: storage.Batch, new: dict[int, bytes]) -> None:
        bad = {}
        for seq in batch.payloads:
            reason = self._bad_payload(seq)
            if reason is not None or (seq not in self.payloads and seq not in new):
                job_seq = seq_of_body(seq)
                job = self.jobs.get(job_seq)
                name = job.id if job else self.quarantined_ids.get(job_seq, f"seq {seq}")
                bad[name] = reason or "the payload is missing"
        if bad:
            raise storage.BadRows(bad)

    def _bad_payload(self, seq: int) -> str | None:
        return self.bad_payloads.get(seq) if seq_of_body(seq) in self.jobs else None

    def _bad_row(self, job: Job) -> str | None:
        return self.bad_jobs.get(job.id) or self._bad_payload(job.seq)

    def _quarantine(self, job: Job, reason: str) -> None:
        """Move the rows of `job`. The tables have to be complete, so that the counts are those of its last row."""
        self.project_for_read()
        if job.seq in self.jobs and (self.pending or not self.can_move(job)):
            self.unmoved[job.id] = reason
            self._all_quarantined.append(storage.Quarantined(job.id, reason, is_moved=False))
            return
        self.unmoved.pop(job.id, None)
        self.quarantined[job.id] = reason
        is_here = job.seq in self.jobs
        for tables in self.both():
            tables.remove(job.seq)
        if is_here:
            self.quarantined_ids[job.seq] = job.id
            self.damaged_tombstones[job.seq] = job
        uncounted = (job.options.queue, job.status) if is_here and job.status in FINISHED else None
        self._all_quarantined.append(storage.Quarantined(job.id, reason, uncounted))

    async def _report_quarantined(self) -> None:
        """Call `on_quarantined` a moment later, as from another thread."""
        if self._reported < len(self._all_quarantined):
            await self._pause()
        while self._reported < len(self._all_quarantined):
            self._reported += 1
            self.on_quarantined(self._all_quarantined[self._reported - 1])


def _expires(job: Job) -> float:
    return float("inf") if job.expires_at is None else job.expires_at


def _name(job: Job) -> str | None:
    assert job.error is not None
    return fingerprint(job.error.message, job.error.code, job.id)


def _is_asked(audited: storage.AuditEntry, query: storage.AuditQuery) -> bool:
    return (
        query.who in (None, audited.who)
        and query.what in (None, audited.what)
        and query.job_id in (None, audited.job_id, *audited.changed_ids)
        and audited.at >= (query.since or 0)
    )


def _matches(job: Job, query: storage.JobQuery) -> bool:
    held = job.grant or job.ended
    finished_at = -1 if job.finished_at is None else job.finished_at
    return (
        (query.status is None or job.status == query.status)
        and (query.queue is None or job.options.queue == query.queue)
        and (query.kind is None or job.options.kind == query.kind)
        and (query.worker is None or (held is not None and held.worker == query.worker))
        and (query.error is None or (job.error is not None and _name(job) == query.error))
        and (query.since is None or job.created_at >= query.since)
        and (query.until is None or job.created_at < query.until)
        and (query.finished_since is None or finished_at >= query.finished_since)
        and (query.finished_until is None or 0 <= finished_at < query.finished_until)
    )
