"""Jobs, changes and batches as the rules make them, and the content that a store must have after them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from msgspec import Raw, to_builtins
from msgspec.structs import replace

from jobd.journal import event_codec
from jobd.model.clocks import LockMs
from jobd.model.events import Event
from jobd.model.job import (
    FINISHED,
    LIVE,
    TOKEN_COUNTER_BITS,
    BackoffOptions,
    Extra,
    Failure,
    Grant,
    Job,
    LateResult,
    LockDeadlines,
    Options,
    PreviousGrant,
    Result,
    checkpoint_key,
    extra_keys,
    headers_key,
    with_checkpoint,
)
from jobd.model.schedules import Schedule, Timing
from jobd.model.storage import Batch, Numbers, QueueRow, StoredResponse

NOW: Final = 1_700_000_000_000
LATE: Final = Result(file_path="/late")
OPTIONS: Final = (
    Options(),
    Options(queue="video", kind="convert", priority=-5, max_attempts=3),
    Options(queue="mail", backoff=BackoffOptions("fixed", 5, 10, False), on_stall="requeue", stall_after_ms=0),
    Options(queue="video", progress_timeout_ms=0, max_stalls=0, on_stall="fail"),
)


def deadlines_at(
    expires: int, stall_due: int, progress_due: int | None = None, *, cleared: bool = False
) -> LockDeadlines:
    return LockDeadlines(
        LockMs(expires), LockMs(stall_due), None if progress_due is None else LockMs(progress_due), cleared
    )


def full_job(seq: int = 7) -> Job:
    """Return a job with every field set to a value other than its default."""
    return Job(
        seq=seq,
        id=f"job-{seq}",
        options=replace(OPTIONS[1], stall_after_ms=60_000, progress_timeout_ms=90_000),
        status="processing",
        created_at=NOW,
        updated_at=NOW + 1,
        run_at=NOW + 2,
        progress=12.5,
        progress_message="scène 3\x00",
        attempt=2,
        stalls=1,
        started_at=NOW + 3,
        finished_at=NOW + 4,
        expires_at=NOW + 5,
        grant=Grant("lock", (1 << TOKEN_COUNTER_BITS) | 9, "w-1", NOW + 3, 60_000, 0, 90_000),
        deadlines=deadlines_at(1_000, 2_000, 3_000, cleared=True),
        ended=PreviousGrant("old", (1 << TOKEN_COUNTER_BITS) | 3, "w-0", NOW, "stall", "silent", "fail", "abc"),
        result=Result("https://x/y", "/a", "k/e/y", Raw(b'{"a": [1, null]}')),
        error=Failure("it broke", "E1"),
        releases=6,
        payload_bytes=9_000,
        extra=Extra("nightly", NOW + 6, 2, 3, "old"),
    )


def as_stored(event: Event) -> Event:
    """Return an event as it is read from the tables: with the fields that it set, without rows."""
    return event_codec.decode(event_codec.encode(event))


def as_recorded(event: Event) -> Event:
    """Return an event as it is read from a record."""
    beside = {name: getattr(event, name) for name in ("payload", "request_hash", "late", "bodies")}
    return replace(as_stored(event), **beside)


class ChangeFactory:
    """Make successive changes, and keep the resulting rows."""

    def __init__(self, seed: int = 0, numbers: Numbers | None = None, *, has_extra: bool = True) -> None:
        self.random = random.Random(seed)
        self.numbers = numbers or Numbers()
        self.jobs: dict[int, Job] = {}
        self.payloads: dict[int, bytes] = {}  # bodies by key
        self.unvalidated: set[int] = set()
        self.queues: dict[str, QueueRow] = {}
        self.deleted: dict[int, str] = {}
        self.now = NOW
        self.has_extra = has_extra  # some jobs get headers, and some progress reports a checkpoint

    # -- single changes -----------------------------------------------------------------------------------------------

    def create(self, job_id: str | None = None, *, type_: str = "created", **fields: Any) -> Event:
        seq = self.numbers.next_job
        self.numbers = replace(self.numbers, next_job=seq + 1)
        options = fields.pop("options", None) or self.random.choice(OPTIONS)
        job = Job(seq, job_id or f"job-{seq}", options, "queued", self.now, self.now, self.now)
        job = replace(job, **fields)
        payload = b'{"n":%d,"fill":"%s"}' % (seq, b"x" * self.random.randrange(60))
        self.payloads[seq] = payload
        if type_ == "imported":
            self.unvalidated.add(seq)
        bodies = None
        if self.has_extra and seq % 3 == 0:
            bodies = {headers_key(seq): b'{"h":"%d"}' % seq}
            job = replace(job, extra=Extra(headers_bytes=9))
        return self._step(None, job, type_, payload=payload, request_hash=f"hash-{seq}", bodies=bodies)

    def grant(self, job: Job, *, stall_after_ms: int = 600_000) -> Event:
        token = (self.numbers.epoch << TOKEN_COUNTER_BITS) | self.numbers.next_token
        self.numbers = replace(self.numbers, next_token=self.numbers.next_token + 1)
        worker = f"w-{self.random.randrange(4)}"
        grant = Grant(f"lock-{token}", token, worker, self.now, 900_000, stall_after_ms, 1_800_000)
        deadlines = deadlines_at(self.now + 900_000, self.now + stall_after_ms, self.now + 1_800_000)
        after = replace(
            job,
            status="processing",
            grant=grant,
            deadlines=deadlines,
            attempt=job.attempt + 1,
            started_at=self.now,
            updated_at=self.now,
            progress=0,
        )
        return self._step(job, after, "granted")

    def progress(self, job: Job, progress: float | None = None, message: str | None = None) -> Event:
        self.now += 1
        value = round(self.random.uniform(0, 100), 1) if progress is None else progress
        assert job.deadlines is not None
        deadlines = replace(job.deadlines, expires=job.deadlines.expires + 1, progress_due=self.now + 1_800_000)
        message = message or job.progress_message
        after = replace(job, progress=value, progress_message=message, deadlines=deadlines, updated_at=self.now)
        bodies = None
        if self.has_extra and job.seq % 2:
            body = b"%d" % self.now if self.now % 4 else b""
            bodies = {checkpoint_key(job.seq): body} if body else None
            after = replace(after, extra=with_checkpoint(job.extra, len(body)))
        return self._step(job, after, "progress", bodies=bodies)

    def extend(self, job: Job) -> Event:
        self.now += 1
        assert job.deadlines is not None
        deadlines = replace(job.deadlines, expires=job.deadlines.expires + 10)
        return self._step(job, replace(job, deadlines=deadlines, updated_at=self.now), "extended")

    def finish(self, job: Job, status: str = "completed", metadata: bytes = b'{"size":3}') -> Event:
        fields: dict[str, Any] = {"status": status, "finished_at": self.now, "expires_at": self.now + 1_000}
        if status == "completed":
            extra = with_checkpoint(job.extra, 0)
            fields |= {"extra": extra, "progress": 100, "result": Result(file_path="/out", metadata=Raw(metadata))}
        elif status == "failed":
            fields |= {"error": Failure("boom", "E2")}
        if job.grant is not None:
            grant = job.grant
            ended = PreviousGrant(
                grant.lock_id, grant.fencing_token, grant.worker, self.now, "holder", "done", "complete", "h"
            )
            fields |= {"grant": None, "deadlines": None, "ended": ended}
        return self._step(job, replace(job, **fields), status)

    def requeue(self, job: Job) -> Event:
        after = replace(job, status="queued", progress=0, grant=None, deadlines=None, finished_at=None, expires_at=None)
        return self._step(job, after, "released" if job.status == "processing" else "force_reset")

    def update(self, job: Job, **fields: Any) -> Event:
        return self._step(job, replace(job, **fields), "updated")

    def delete(self, job: Job) -> Event:
        return self._step(job, None, "deleted")

    def late(self, job: Job, token: int, result: Result = LATE) -> Event:
        """Return a late result of the grant with this token. The row of `job` does not change."""
        change = self._step(job, job, "late_result")
        kept = LateResult(change.seq, self.now, "w-late", token, f"body of {token}", self.now + 9, result)
        return replace(change, late=kept)

    def queue_event(self, queue: str, paused: bool) -> Event:
        at, by = (self.now, "admin") if paused else (None, None)
        row = self.queues.get(queue, QueueRow())
        self.queues[queue] = replace(row, paused=paused, paused_at=at, paused_by=by)
        type_ = "queue_paused" if paused else "queue_resumed"
        return Event(self._event(), self.now, type_, 0, "", queue, None, None, "admin")  # type: ignore[arg-type]

    def quiet_event(self, rule: str, is_end: bool) -> Event:
        """Return the event of a quiet rule that begins or changes, or of its end."""
        more = {} if is_end else {"host": rule * 2, "since": self.now, "until": None}
        type_ = "workers_resumed" if is_end else "workers_quieted"
        details = {"rule": rule, **more}
        return Event(self._event(), self.now, type_, 0, "", "", None, None, "admin", "bad", details)  # type: ignore[arg-type]

    def schedule_event(self, name: str, change: str) -> Event:
        """Return an event of a schedule: put, skipped or deleted."""
        number, at = self._event(), self.now
        row = Schedule(
            id=name, timing=Timing(every_ms=at), job={}, created_at=at, updated_at=at, timed_from=at, version=number
        )
        details: dict[str, Any] = {"schedule": name}
        if change == "put":
            details["row"] = to_builtins(row)
        elif change == "skipped":
            details |= {"scheduled_at": at, "missed": 2}
        return Event(number, at, f"schedule_{change}", 0, "", "q", None, None, "admin", "busy", details)  # type: ignore[arg-type]

    # -- batches ------------------------------------------------------------------------------------------------------

    def batch(self, changes: list[Event], **fields: Any) -> Batch:
        """Return a batch of `changes` with the current rows of every queue."""
        self.numbers = replace(self.numbers, lock_ms=self.now - NOW, wall_ms=self.now)
        return Batch(changes, self.numbers, queues=dict(self.queues), **fields)

    def any_change(self) -> Event:
        """Return a random change that is valid now."""
        live = [job for job in self.jobs.values() if job.status in LIVE]
        choices: list[Callable[[], Event]] = [self.create]
        if self.jobs:
            job = self.random.choice(live or list(self.jobs.values()))
            if self.random.random() < 0.2:
                job = self.random.choice(list(self.jobs.values()))
            choices += self._choices(job)
        return self.random.choice(choices)()

    def any_batch(self, size: int) -> Batch:
        """Return a batch of `size` changes that sometimes also stores, deletes and reads other rows."""
        changes = [self.any_change() for _ in range(size)]
        batch = self.batch(changes)
        if self.random.random() < 0.3 and self.jobs:
            batch.payloads = [self.random.choice(list(self.jobs))]
        if self.random.random() < 0.3:
            batch.keys = [StoredResponse(f"digest-{self.random.randrange(50)}", "body", self.now, 201, b'{"a":1}')]
        if self.random.random() < 0.1:
            batch.forget_keys = [f"digest-{self.random.randrange(50)}"]
        if self.random.random() < 0.1 and self.unvalidated:
            batch.checked = [self.unvalidated.pop()]
        return batch

    def _choices(self, job: Job) -> list[Callable[[], Event]]:
        if job.status == "processing":
            return [
                lambda: self.progress(job),
                lambda: self.progress(job, float(self.random.randrange(101)), f"step {self.now}"),
                lambda: self.extend(job),
                lambda: self.finish(job, self.random.choice(sorted(FINISHED))),
                lambda: self.requeue(job),
            ]
        if job.status == "queued":
            return [
                lambda: self.grant(job),
                lambda: self.grant(job),
                lambda: self.finish(job, "cancelled"),
                lambda: self.create(type_="imported"),
            ]
        return [lambda: self.delete(job), lambda: self.requeue(job)]

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores the current model. Numbers that were issued stay issued."""
        jobs, payloads, queues = dict(self.jobs), dict(self.payloads), dict(self.queues)
        unvalidated, deleted = set(self.unvalidated), dict(self.deleted)

        def back() -> None:
            self.jobs, self.payloads, self.queues = jobs, payloads, queues
            self.unvalidated, self.deleted = unvalidated, deleted

        return back

    # -- the model ----------------------------------------------------------------------------------------------------

    def _event(self) -> int:
        seq = self.numbers.next_event
        self.numbers = replace(self.numbers, next_event=seq + 1)
        return seq

    def _step(
        self,
        before: Job | None,
        after: Job | None,
        type_: str,
        *,
        payload: bytes | None = None,
        request_hash: str = "",
        bodies: dict[int, bytes] | None = None,
    ) -> Event:
        job = after or before
        assert job is not None
        event = Event(
            seq=self._event(),
            at=self.now,
            type=type_,  # type: ignore[arg-type]
            job_seq=job.seq,
            job_id=job.id,
            queue=job.options.queue,
            from_status=None if before is None else before.status,
            to_status=None if after is None else after.status,
            by="client",
            details={"attempt": job.attempt},
            before=before,
            after=after,
            payload=payload,
            request_hash=request_hash or None,
            bodies=bodies,
        )
        for key in extra_keys(before):
            if key not in extra_keys(after):
                del self.payloads[key]
        self.payloads |= bodies or {}
        self._count(before, -1)
        self._count(after, +1)
        if after is None:
            del self.jobs[job.seq], self.payloads[job.seq]
            self.unvalidated.discard(job.seq)
            self.deleted[job.seq] = job.id
        else:
            self.jobs[job.seq] = after
        return event

    def _count(self, job: Job | None, by: int) -> None:
        if job is None or job.status not in FINISHED:
            return
        row = self.queues.get(job.options.queue, QueueRow())
        self.queues[job.options.queue] = replace(row, **{job.status: getattr(row, job.status) + by})
