"""A transaction: rules change the state through it, and it can undo the changes of a command or of the whole batch.

It applies each change at once, with one event, so that the next command of the batch sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, Final

from msgspec.structs import replace

from jobd.core.state import State, remember
from jobd.model.commands import IssuedCommand, Moment
from jobd.model.events import Event, EventType, QueuePause, QuietRule, fold_quiet
from jobd.model.job import COUNTER_MASK, TOKEN_COUNTER_BITS, Job, LateResult, Policy, new_epoch
from jobd.model.schedules import fold_schedule
from jobd.model.storage import LateResultRows, Payload

_VARIANTS: Final = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))  # the bits 0b10, and two bits more


class Transaction:
    """The changes of one batch. `call` is the current command; the lists are those of all commands so far.

    `checked` has the seqs of jobs whose rows were validated, `ended` the lock ids of ended grants, `payloads` new
    bodies by key. `_restores` are calls that restore pauses, schedules and quiet rules, in the order of the changes.
    The changes of a dry run are not applied to the state, so that it costs nothing and leaves no trace.
    """

    __slots__ = (
        "_begun", "_first", "_restores", "_uuid_time", "at", "call", "changes", "checked", "ended", "is_dry_run",
        "late", "now", "payloads", "policy", "requests", "state",
    )  # fmt: skip

    def __init__(
        self,
        state: State,
        at: Moment,
        policy: Policy,
        requests: Mapping[str, Payload] | None = None,
        late: LateResultRows | None = None,
    ) -> None:
        self.state = state
        self.requests = dict(requests or {})
        self.late = late or LateResultRows()
        self.at = at
        self.now = at.now
        self.policy = policy
        self.changes: list[Event] = []
        self.checked: list[int] = []
        self.ended: list[str] = []
        self.payloads: dict[int, bytes] = {}
        self._restores: list[Callable[[], None]] = []
        self._uuid_time = ""

    def begin(self, call: IssuedCommand) -> None:
        """Begin the next command."""
        state = self.state
        self.call = call
        self.is_dry_run = call.command.dry_run
        self._first = len(self.changes)  # those before the current command
        self._begun = len(self.checked), len(self._restores), state.epoch, state.next_token

    @property
    def has_changed(self) -> bool:
        """Whether the current command has changed anything."""
        return len(self.changes) > self._first

    def changed(self) -> list[Event]:
        """Return the changes of the current command."""
        return self.changes[self._first :]

    def undo(self) -> None:
        """Undo the changes of the current command. Its numbers are assigned again, because no response has them."""
        undone, state = self.changed(), self.state
        checked, restores, state.epoch, state.next_token = self._begun
        del self.changes[self._first :], self.checked[checked:]
        if not undone:
            return
        state.next_event = undone[0].seq
        made = [event for event in undone if event.before is None and event.after is not None]
        if made:
            state.next_job = made[0].job_seq
        if self.is_dry_run:
            return
        self._restore(undone, self._restores[restores:])
        del self._restores[restores:]
        for event in undone:
            for key in event.bodies or ():
                self.payloads.pop(key, None)
        for event in made:
            self.payloads.pop(event.job_seq, None)
            if event.request_hash:
                self.requests.pop(event.job_id, None)
        grants = [event.before.grant for event in undone if event.before is not None]
        lost = {grant.lock_id for grant in grants if grant is not None}
        self.ended = [lock_id for lock_id in self.ended if lock_id not in lost]

    def roll_back(self) -> None:
        """Undo all changes, because the batch was not written. Its numbers stay used."""
        self._restore(self.changes, self._restores)

    # -- changes ------------------------------------------------------------------------------------------------------

    def create(
        self,
        job: Job,
        event_type: EventType,
        payload: bytes,
        request_hash: str,
        schedule: dict[str, Any] | None = None,
    ) -> None:
        """Add a new job. Its number was assigned by `job_number`. `schedule` are the details of a firing."""
        self._add(None, job, event_type, details=schedule, payload=payload, request_hash=request_hash)
        if schedule is not None:
            self._fold_schedule(schedule["schedule"])
        if self.is_dry_run:
            return
        self.payloads[job.seq] = payload
        if request_hash:
            self.requests[job.id] = Payload(payload, request_hash)
        if event_type == "imported":
            self.state.unvalidated[job.seq] = job.id

    def update(
        self,
        job: Job,
        after: Job,
        event_type: EventType,
        *,
        worker: str | None = None,
        by: str | None = None,
        reason: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> Job:
        """Replace the row of `job` by `after`; return it with its `updated_at`. `worker` makes the call."""
        now, started_at, finished_at = self.now, after.started_at or 0, after.finished_at or 0
        if job.created_at > now or started_at > now or finished_at > now:
            # The wall clock stepped back. The times of a job stay in order.
            after = replace(after, updated_at=max(job.created_at, started_at, finished_at))
        elif after.updated_at != now:
            after = replace(after, updated_at=now)
        if worker is not None:
            by = f"worker:{worker}"
            self.state.presence.note_seen(worker, now)
        self._add(job, after, event_type, by, reason, details)
        return after

    def attach(self, key: int, body: bytes | None) -> None:
        """Store headers or a checkpoint with the latest change, whose row has its size. Without a body, do nothing."""
        if body:
            latest = self.changes[-1]
            self.changes[-1] = replace(latest, bodies={**(latest.bodies or {}), key: body})
            if not self.is_dry_run:
                self.payloads[key] = body

    def delete(self, job: Job, reason: str | None = None) -> None:
        self._add(job, None, "deleted", reason=reason)

    def keep_late(self, job: Job, late: LateResult, reason: str, details: dict[str, Any]) -> LateResult:
        """Store a late result beside the unchanged row of `job`; return it with the number of its event."""
        self.state.presence.note_seen(late.worker, self.now)
        late = replace(late, seq=self.state.next_event)
        self._add(job, job, "late_result", f"worker:{late.worker}", reason, details, late=late)
        self.late.results.setdefault(job.seq, []).append(late)
        remember(self.state.late_results, job.seq, late.seq)
        return late

    def note_call(self, job: Job, worker: str, reason: str, details: dict[str, Any]) -> None:
        """Record a rejected call. The row of `job` does not change."""
        self.state.presence.note_seen(worker, self.now)
        self._add(job, job, "late_call", f"worker:{worker}", reason, details)
        remember(self.state.late_calls, _call_of(self.changes[-1]), None)

    def set_pause(self, queue: str, pause: QueuePause | None, reason: str | None) -> None:
        """Pause a queue, or replace its pause. With None, end it."""
        event_type: EventType = "queue_resumed" if pause is None else "queue_paused"
        details = None if pause is None else {"since": pause.at, "until": pause.until}
        self._restores.append(partial(self.state.set_paused, queue, self.state.paused.get(queue)))
        self._add(None, None, event_type, reason=reason, details=details, queue=queue)
        self.state.set_paused(queue, pause)

    def quiet_workers(self, rule: QuietRule) -> None:
        """Add a quiet rule, or replace it."""
        selects = {name: value for name in ("host", "version", "queue") if (value := getattr(rule, name)) is not None}
        details = {"rule": rule.id, **selects, "since": rule.at, "until": rule.until}
        self._set_quiet(rule, "workers_quieted", rule.reason, details)

    def resume_workers(self, rule: QuietRule, reason: str | None) -> None:
        """End a quiet rule."""
        self._set_quiet(rule, "workers_resumed", reason, {"rule": rule.id})

    def change_schedule(
        self, name: str, event_type: EventType, queue: str, reason: str | None = None, **details: Any
    ) -> None:
        """Change a schedule, by the event alone. `queue` is that of its jobs."""
        self._add(None, None, event_type, reason=reason, details={"schedule": name, **details}, queue=queue)
        self._fold_schedule(name)

    # -- numbers and secrets ------------------------------------------------------------------------------------------

    def job_number(self) -> int:
        """Return the seq of a new job, in the order of creation, never reused."""
        state = self.state
        number, state.next_job = state.next_job, state.next_job + 1
        return number

    def token(self) -> int:
        """Return the fencing token of a new grant, greater than all before. A full counter begins the next epoch."""
        state = self.state
        if state.next_token > COUNTER_MASK:
            state.epoch, state.next_token = new_epoch(state.epoch, self.at.believed), 1
        counter, state.next_token = state.next_token, state.next_token + 1
        return (state.epoch << TOKEN_COUNTER_BITS) | counter

    def secret(self, number: int) -> str:
        """Return an unguessable lock id from the seed of the call. A replay returns the same."""
        if len(self.changes) == self._first:  # the seed itself is for the first grant of the call
            return self.call.seed.hex()
        return blake2b(b"lock id" + self.call.seed + number.to_bytes(8, "big"), digest_size=16).hexdigest()

    def job_id(self, number: int) -> str:
        """Return a UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then bits from the seed of the call.

        Ids are public, so a call that makes an id must not make a secret.
        """
        if not self._uuid_time:
            time = f"{self.now & (2**48 - 1):012x}"
            self._uuid_time = f"{time[:8]}-{time[8:]}-7"  # 7 is the version
        seed = self.call.seed
        if len(self.changes) > self._first:  # the seed itself is for the first job of the call
            seed = blake2b(b"job id" + seed + number.to_bytes(8, "big"), digest_size=16).digest()
        tail = seed.hex()
        return f"{self._uuid_time}{tail[:3]}-{_VARIANTS[tail[3]]}{tail[4:7]}-{tail[7:19]}"

    def fraction(self, number: int) -> float:
        """Return a number in [0, 1) from the seed of the call."""
        digest = blake2b(b"jitter" + self.call.seed + number.to_bytes(8, "big"), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    # -- internals ----------------------------------------------------------------------------------------------------

    def _restore(self, changes: Sequence[Event], restores: Sequence[Callable[[], None]]) -> None:
        """Restore the jobs of `changes` and the other values. A job that was quarantined meanwhile stays out."""
        state = self.state
        rows: dict[str, Job | None] = {}
        for event in changes:
            if event.job_seq:
                rows.setdefault(event.job_id, event.before)
        for job_id, row in rows.items():
            if job_id in state.quarantined:
                state.recount_unmoved(job_id, row)
            else:
                state.reindex(state.get(job_id), row)
        if any(row is not None and row.status == "processing" for row in rows.values()):
            state.processing.order()
        for event in reversed(changes):
            if event.type == "imported":
                state.unvalidated.pop(event.job_seq, None)
            elif event.type == "late_call":
                state.late_calls.pop(_call_of(event), None)
            elif event.late is not None:
                known = self.late.results[event.job_seq]
                known.remove(event.late)
                del state.late_results[event.job_seq]
                if known:
                    state.late_results[event.job_seq] = max(each.seq for each in known)
        for restore in reversed(restores):
            restore()

    def _fold_schedule(self, name: str) -> None:
        """Apply the last event to the schedule that it names."""
        before = self.state.schedules.get(name)
        self._restores.append(partial(self.state.set_schedule, name, before))
        self.state.set_schedule(name, fold_schedule(before, self.changes[-1]))

    def _set_quiet(self, rule: QuietRule, event_type: EventType, reason: str | None, details: dict[str, Any]) -> None:
        self._add(None, None, event_type, reason=reason, details=details, queue=rule.queue or "")
        self._restores.append(partial(self.state.set_quiet, self.state.quiet))
        self.state.set_quiet(fold_quiet(self.state.quiet, self.changes[-1]))

    def _add(
        self,
        before: Job | None,
        after: Job | None,
        event_type: EventType,
        by: str | None = None,
        reason: str | None = None,
        details: dict[str, Any] | None = None,
        *,
        payload: bytes | None = None,
        request_hash: str | None = None,
        late: LateResult | None = None,
        queue: str = "",
    ) -> None:
        """Add the event of a change of one row, or of `queue`, and apply it to the state."""
        state, job = self.state, before if after is None else after
        number, state.next_event = state.next_event, state.next_event + 1
        self.changes.append(
            Event(
                number,
                self.now,
                event_type,
                0 if job is None else job.seq,
                "" if job is None else job.id,
                queue if job is None else job.options.queue,
                None if before is None else before.status,
                None if after is None else after.status,
                by or self.call.by,
                reason,
                details,
                None,
                before,
                after,
                payload,
                request_hash,
                late,
            )
        )
        if before is not after and not self.is_dry_run:
            if before is not None and before.grant is not None and (after is None or after.grant is not before.grant):
                self.ended.append(before.grant.lock_id)
            state.reindex(before, after)


def _call_of(event: Event) -> tuple[int, int, str]:
    details = event.details
    assert details is not None
    return event.job_seq, details["fencing_token"], details["verb"]
