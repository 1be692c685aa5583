"""The processing jobs in the order of their grants, their deadlines, and those whose lock is not live.

    grant ───> live lock: in none of these four           end ───>
               expired_locks: recovery has not seen it
               noted_expired: recovery has recorded it
               stalled: recovery may end the grant
               without_deadlines: an invalid row

The time is that of the last `advance`, in lock time. It does not go back. Invariants:

- A job is in none of `expired_locks`, `noted_expired`, `stalled` and `without_deadlines`, or in one of them, which
  `_not_live` names. In none of them, its lock is live.
- A job with deadlines that is not stalled has a valid entry in `_deadlines`, at its next deadline or before it;
  `_deadline_of` has its time. A report moves the deadline of the job and leaves the entry, which is checked again when
  it comes up. The heap may have stale entries, which `trim` bounds.
- After an undo, a start or a replay, `order` restores the order.
"""

from __future__ import annotations

from heapq import heappush
from operator import itemgetter

from jobd.core.orders import SLACK, LazyHeap
from jobd.core.worker_presence import WorkerPresence
from jobd.model.clocks import LockMs
from jobd.model.job import Job

DeadlineEntry = tuple[LockMs, int, str]  # lock time, job seq, job id


class ProcessingJobs(dict[str, Job]):
    """Processing jobs by id. `presence` is told which worker holds a job, and whether its lock has expired.

    `progressed` has the time of the latest progress report since the start. `started_sum` is the sum of `started_at`.
    """

    __slots__ = (
        "_deadline_of", "_deadlines", "_not_live", "expired_locks", "lock_ms", "noted_expired", "presence",
        "progressed", "stalled", "started_sum", "without_deadlines",
    )  # fmt: skip

    def __init__(self, presence: WorkerPresence, lock_ms: LockMs) -> None:
        super().__init__()
        self.presence = presence
        self.lock_ms = lock_ms
        self.started_sum = 0
        self.progressed: dict[str, LockMs] = {}
        self.expired_locks: dict[str, None] = {}  # expired, not yet recorded by recovery
        self.noted_expired: dict[str, None] = {}  # expired and recorded; the holder can still revive them
        self.stalled: dict[str, None] = {}
        # Rows without a grant, which come from manual edits. A cleanup run repairs them.
        self.without_deadlines: dict[str, None] = {}
        self._not_live: dict[str, dict[str, None]] = {}  # id -> which of these four it is in
        self._deadlines: LazyHeap[DeadlineEntry] = LazyHeap()
        self._deadline_of: dict[str, LockMs] = {}  # id -> lock time of its one valid entry

    def next_deadline(self) -> LockMs | None:
        """Return the lock time at which the next lock expires or the next job stalls."""
        entry = self._deadlines.first(self._is_deadline)
        return None if entry is None else entry[0]

    def live_locks(self) -> int:
        """Return the number of jobs with a live lock."""
        return len(self) - len(self._not_live)

    def advance(self, lock_ms: LockMs) -> None:
        """Apply the time: locks expire, jobs stall."""
        self.lock_ms = lock_ms
        for entry in self._deadlines.pop_until(lock_ms):
            if self._is_deadline(entry):
                job = self[entry[2]]
                self._unsort(job)
                self._schedule(job)

    def begin(self, job: Job) -> None:
        """Add a job that was granted."""
        job_id, grant = job.id, job.grant
        self[job_id] = job
        self.started_sum += job.started_at or job.created_at
        if grant is None or job.deadlines is None:
            self._sort(job_id, self.without_deadlines)  # an invalid row; validation reports it
            return
        self.presence.add_job(grant.worker, job_id, job.updated_at)
        self._schedule(job)

    def end(self, job: Job) -> None:
        """Remove a job whose grant has ended."""
        job_id = job.id
        self.pop(job_id, None)
        self.progressed.pop(job_id, None)
        self.started_sum -= job.started_at or job.created_at
        if job_id in self._not_live:
            self._unsort(job)
        deadlines = self._deadlines
        self._deadline_of.pop(job_id, None)
        if len(deadlines.entries) > 2 * len(self._deadline_of) + SLACK:
            deadlines.trim(len(self._deadline_of), self._is_deadline)
        if job.grant is not None:
            self.presence.remove_job(job.grant.worker, job_id)

    def renew(self, before: Job, job: Job) -> None:
        """Replace the row of a job that has the same grant."""
        job_id, deadlines = job.id, job.deadlines
        self[job_id] = job
        if before.started_at != job.started_at:  # repaired
            self.started_sum += (job.started_at or job.created_at) - (before.started_at or before.created_at)
        assert deadlines is not None
        # An entry that is too early is checked again when it comes up, so moving a deadline costs nothing here.
        # Deadlines move back only if they are undone.
        known = self._deadline_of.get(job_id)
        is_late = (
            known is None
            or known > deadlines.expires
            or (deadlines.progress_due is not None and known > deadlines.progress_due)
        )
        if is_late or job_id in self.expired_locks or job_id in self.noted_expired:
            self._unsort(job)
            self._schedule(job)

    def order(self) -> None:
        """Sort the jobs by grant, after a start or an undo added them in another order."""
        tokens = [job.grant.fencing_token if job.grant else 0 for job in self.values()]
        if tokens != sorted(tokens):
            by_token = sorted(zip(tokens, self.items(), strict=True), key=itemgetter(0))
            self.clear()
            self.update(item for _, item in by_token)
        not_live = (self.expired_locks, self.noted_expired, self.stalled)
        expired = (worker.expired for worker in self.presence.workers.values())
        if to_sort := [ids for ids in (*not_live, *expired) if len(ids) > 1]:
            place = {job_id: number for number, job_id in enumerate(self)}
            for ids in to_sort:
                ordered = sorted(ids, key=place.__getitem__)
                ids.clear()
                ids.update(dict.fromkeys(ordered))

    def _schedule(self, job: Job) -> None:
        """Sort a job into live, expired or stalled, and set its next deadline."""
        job_id, grant, deadlines, now = job.id, job.grant, job.deadlines, self.lock_ms
        assert grant is not None and deadlines is not None
        if now < deadlines.expires and not deadlines.cleared:
            deadline = (
                deadlines.expires if deadlines.progress_due is None else min(deadlines.expires, deadlines.progress_due)
            )
        else:
            deadline = deadlines.stalled_at
            self.presence.set_expired(grant.worker, job_id, True)
            if now < deadline:
                self._sort(job_id, self.noted_expired if deadlines.cleared else self.expired_locks)
        if now >= deadline:
            self._sort(job_id, self.stalled)
            self._deadline_of.pop(job_id, None)
            return
        self._deadline_of[job_id] = deadline
        heappush(self._deadlines.entries, (deadline, job.seq, job_id))

    def _unsort(self, job: Job) -> None:
        ids = self._not_live.pop(job.id, None)
        if ids is not None:
            del ids[job.id]
            if job.grant is not None:
                self.presence.set_expired(job.grant.worker, job.id, False)

    def _sort(self, job_id: str, ids: dict[str, None]) -> None:
        ids[job_id] = None
        self._not_live[job_id] = ids

    def _is_deadline(self, entry: DeadlineEntry) -> bool:
        return self._deadline_of.get(entry[2]) == entry[0] and self[entry[2]].seq == entry[1]
