"""The real rules over in-memory state: each command is decided and compared with a naive recount."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Final

from msgspec import Struct

from jobd.core import decide, guards
from jobd.core.rules import late_result_rules
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.errors import ApiError
from jobd.model.events import Event, fold
from jobd.model.job import (
    LIVE,
    MAX_LATE_RESULTS,
    STATUSES,
    Failure,
    Grant,
    Job,
    LateResult,
    LockDeadlines,
    Policy,
    PreviousGrant,
    is_release_loop,
    is_retried,
)
from jobd.model.responses import GrantView, Recovered, Response
from jobd.model.storage import LateResultRows, Payload
from tests.support.calls import HOLDERS, aimed
from tests.support.error_details import check_error
from tests.support.factories import as_stored

NOW: Final = 1_700_000_000_000
SEED: Final = b"0123456789abcdef"

# Attributes of a State that are compared as they are. Heaps are compared by their results.
PLAIN: Final = (
    "epoch", "next_token", "next_job", "next_event", "quarantined", "release_loops", "retrying", "paused",
    "quiet", "schedules", "counts", "totals", "unvalidated",
)  # fmt: skip
PROCESSING: Final = ("started_sum", "without_deadlines", "expired_locks", "noted_expired", "stalled")


class Decision(Struct):
    """The response to a command and its changes. `checked` has the seqs of jobs whose rows were validated."""

    answer: Response | ApiError
    changes: list[Event]
    checked: list[int]


class RuleHarness:
    """Decide commands. `rows` are the jobs folded from the events, and must equal those in the state."""

    def __init__(self, policy: Policy | None = None, *, now: int = NOW, lock_ms: LockMs = LockMs(1_000)) -> None:
        self.policy = policy or Policy()
        self.state = State()
        self.now = now
        self.lock_ms = lock_ms
        self.trusted: int | None = None  # the expected wall time while the clock is suspect
        self.behind_ms = 0  # by how much the wall clock is behind its expected value
        self.rows: dict[str, Job] = {}
        self.events: list[Event] = []
        self.checked: list[int] = []
        self.calls = 0
        self.requests: dict[str, Payload] = {}
        self.tokens: list[int] = []
        self.late_results: dict[int, list[LateResult]] = {}

    @property
    def moment(self) -> cmd.Moment:
        return cmd.Moment(self.now, self.lock_ms, self.now - int(self.lock_ms), self.trusted, -self.behind_ms)

    def advance(self, ms: int) -> None:
        """Advance both clocks."""
        self.now += ms
        self.lock_ms += ms
        self.state.advance(self.now, self.lock_ms)

    def rule(self, tx: Transaction, call: cmd.IssuedCommand) -> Response | ApiError:
        return decide.decide(tx, call)

    def decide(
        self, command: cmd.AnyCommand, *, admin: bool = False, by: str = "client", expected: str | None = None
    ) -> Decision:
        """Decide, undo and decide again; compare the state with that before, and with a recount of the rows."""
        self.state.advance(self.now, self.lock_ms)
        if isinstance(command, cmd.Start | cmd.Claim):
            self.state.presence.note_request(command)
        self.calls += 1
        seed = blake2b(self.calls.to_bytes(8, "big"), key=SEED, digest_size=16).digest()
        # What the actor reads from the disk for the command.
        tx = Transaction(self.state, self.moment, self.policy, self.requests, self.known_late(command))
        call = cmd.IssuedCommand(command, by, seed, admin, expected=expected)
        before = snapshot(self.state)
        first = self.rule(tx, call)
        events = list(tx.changes)
        tx.undo()
        after = snapshot(self.state)
        assert after == before, f"undo left a change: {[name for name in before if before[name] != after[name]]}"
        response = self.rule(tx, call)
        if not isinstance(command, cmd.Recover | cmd.TakeBack):  # undo may change the order in which they find jobs
            assert response == first
            assert list(tx.changes) == events
        for change in tx.changes:
            self._apply(change)
        self.checked += tx.checked
        compare(self.state, self.rows, self.moment)
        return Decision(response, tx.changes, tx.checked)

    def ask(self, command: cmd.AnyCommand, *, admin: bool = False, by: str = "client") -> Response | ApiError:
        return self.decide(command, admin=admin, by=by).answer

    def respond(self, command: cmd.AnyCommand, *, admin: bool = False, by: str = "client") -> Response:
        """Decide a command that must succeed; return the response."""
        response = self.ask(command, admin=admin, by=by)
        assert isinstance(response, Response), response
        return response

    def accept(self, command: cmd.AnyCommand, *, admin: bool = False, by: str = "client") -> Any:
        """Decide a command that must succeed; return the data of the response."""
        return self.respond(command, admin=admin, by=by).data

    def reject(self, command: cmd.AnyCommand, code: str, *, admin: bool = False, by: str = "client") -> ApiError:
        """Decide a command that must return the error `code` and change no job; late calls may be recorded."""
        decision = self.decide(command, admin=admin, by=by)
        assert isinstance(decision.answer, ApiError), decision.answer
        assert decision.answer.code == code, decision.answer
        check_error(decision.answer)
        assert all(change.type in ("late_result", "late_call") for change in decision.changes)
        return decision.answer

    def accept_admin(self, command: cmd.AnyCommand) -> Any:
        """Accept a command of an operator."""
        return self.accept(command, admin=True, by="admin")

    # -- shortcuts --------------------------------------------------------------------------------------------------

    def job(self, job_id: str = "a") -> Job:
        return self.rows[job_id]

    def grant(self, job_id: str = "a") -> Grant:
        grant = self.job(job_id).grant
        assert grant is not None
        return grant

    def deadlines(self, job_id: str = "a") -> LockDeadlines:
        deadlines = self.job(job_id).deadlines
        assert deadlines is not None
        return deadlines

    def ended(self, job_id: str = "a") -> PreviousGrant:
        """Return the last grant of the job that ended."""
        ended = self.job(job_id).ended
        assert ended is not None
        return ended

    def error(self, job_id: str = "a") -> Failure:
        error = self.job(job_id).error
        assert error is not None
        return error

    def create(self, job_id: str = "a", **fields: Any) -> Job:
        self.accept(cmd.Create(id=job_id, **fields))
        return self.job(job_id)

    def start(self, job_id: str = "a", *, worker: str = "w-1", **fields: Any) -> str:
        """Start a job; return the lock id."""
        granted: GrantView = self.accept(cmd.Start(id=job_id, worker=worker, **fields))
        return granted.lock_id

    def held(self, job_id: str = "a", *, worker: str = "w-1", **fields: Any) -> str:
        """Create and start a job; return the lock id."""
        self.create(job_id, **fields)
        return self.start(job_id, worker=worker)

    def claim(self, **fields: Any) -> list[str]:
        """Claim jobs; return their ids."""
        return [granted.job.id for granted in self.accept(cmd.Claim(worker="w-1", **fields)).grants]

    def progress(self, lock_id: str, progress: float = 50, job_id: str = "a") -> Any:
        return self.accept(cmd.Progress(id=job_id, lock_id=lock_id, progress=progress))

    def completed(self, job_id: str = "a", **fields: Any) -> Job:
        self.accept(cmd.Complete(id=job_id, lock_id=self.held(job_id), **fields))
        return self.job(job_id)

    def recover(self, after_ms: int) -> Recovered:
        """Recover the jobs that are stalled after this time."""
        self.advance(after_ms)
        recovered: Recovered = self.accept(cmd.Recover(limit=9))
        return recovered

    def types(self, job_id: str = "a") -> list[str]:
        """Return the event types of the timeline of a job."""
        return [event.type for event in self.events if event.job_id == job_id]

    def last(self) -> Event:
        return self.events[-1]

    def row(self, job: Job) -> Job:
        """Put a row into the state without any rule, like a manual edit."""
        self.state.reindex(self.rows.get(job.id), None)
        self.state.reindex(None, job)
        self.rows[job.id] = job
        return job

    def late(self, job_id: str = "a") -> list[LateResult]:
        """Return the late results of a job, oldest grant first."""
        return self.late_results.get(self.job(job_id).seq, [])

    # -- internals ----------------------------------------------------------------------------------------------------

    def known_late(self, command: cmd.AnyCommand) -> LateResultRows:
        """Return the late results that the actor would read from the storage."""
        query = late_result_rules.late_results_needed(self.state, command, self.policy)
        if query is None:
            return LateResultRows()
        made = (event for event in self.events if event.job_seq == query.job_seq and event.type == "granted")
        older = [event.grant for event in made if event.grant is not None and event.grant.lock_id == query.lock_id]
        late_results = list(self.late_results.get(query.job_seq, []))
        return LateResultRows({query.job_seq: late_results}, {(query.job_seq, grant.lock_id): grant for grant in older})

    def _store_late_result(self, change: Event) -> None:
        if change.late is not None:
            late_results = [*self.late_results.get(change.job_seq, []), change.late]
            late_results.sort(key=lambda late: late.fencing_token)
            self.late_results[change.job_seq] = late_results[-MAX_LATE_RESULTS:]

    def _apply(self, change: Event) -> None:
        event = as_stored(change)
        if self.events:
            assert event.seq > self.events[-1].seq
        self.events.append(event)
        if event.job_seq:
            assert self.rows.get(event.job_id) == change.before, "a change does not continue from the previous row"
            folded = fold(change.before, event)
            assert folded == change.after, "the event does not match the change"
            assert change.before is None or event.from_status == change.before.status
            assert event.to_status == (None if folded is None else folded.status)
            if folded is None:
                del self.rows[event.job_id]
                self.late_results.pop(event.job_seq, None)
                self.requests.pop(event.job_id, None)
            else:
                self.rows[event.job_id] = folded
        if change.type == "created":
            self.requests[event.job_id] = Payload(change.payload or b"null", change.request_hash or "")
        self._note_token(change)
        self._store_late_result(change)

    def _note_token(self, change: Event) -> None:
        grant = change.after.grant if change.after is not None else None
        if grant is None or (change.before is not None and change.before.grant == grant):
            return
        assert not self.tokens or grant.fencing_token > self.tokens[-1], "a token is not greater than the previous one"
        self.tokens.append(grant.fencing_token)


def holder_commands(lock_id: str) -> list[Any]:
    """Every command of a holder of job `a`, with this lock."""
    return [aimed(example.command, lock_id=lock_id) for example in HOLDERS]


def snapshot(state: State) -> dict[str, Any]:
    """Return everything in a state that an undone command must not change, without caches and stale heap entries."""
    shown = {name: copy.deepcopy(getattr(state, name)) for name in PLAIN}
    shown |= {name: copy.copy(getattr(state.processing, name)) for name in PROCESSING}
    shown |= {"jobs": dict(state.jobs), "processing": dict(state.processing), "finished": dict(state.finished)}
    shown["overdue"] = list(state.overdue())
    shown["order"] = [job.id for job in state.due(list(state.counts), None)]
    shown["workers"] = {name: set(seen.jobs) for name, seen in state.presence.workers.items() if seen.jobs}
    return shown


def due_order(
    rows: Iterable[Job], now: int, queues: Iterable[str], kinds: Iterable[str] | None, paused: Iterable[str]
) -> list[str]:
    """Return the order of claims, by a plain sort."""
    allowed, wanted = set(queues) - set(paused), None if kinds is None else set(kinds)
    due = [
        job
        for job in rows
        if job.status == "queued"
        and job.run_at <= now
        and job.options.queue in allowed
        and (wanted is None or job.options.kind in wanted)
        and not guards.is_overdue(job, now)
    ]
    return [job.id for job in sorted(due, key=lambda job: (job.options.priority, job.run_at, job.seq))]


def compare(state: State, rows: dict[str, Job], at: cmd.Moment, *, finished_at_hand: bool = True) -> None:
    """Compare every order and counter of the state with a recount over all rows.

    Without `finished_at_hand`, as after a start, the state need not know finished jobs.
    """
    state.advance(at.now, at.lock_ms)
    _compare_counts(state, rows)
    _compare_orders(state, rows, at)
    _compare_locks(state, rows, at)
    for job in rows.values():
        assert state.get(job.id) == job or (not finished_at_hand and job.id not in {*state.jobs, *state.finished})
        if job.status == "processing":
            continue
        assert job.grant is None or job.seq in state.unvalidated, "a lock on a job that is not processing"


def _compare_counts(state: State, rows: dict[str, Job]) -> None:
    counts: dict[str, dict[str, int]] = {name: dict.fromkeys(STATUSES, 0) for name in state.counts}
    known = [job for job in rows.values() if job.status in STATUSES]  # others are not counted
    for job in known:
        counts[job.options.queue][job.status] += 1
    assert state.counts == counts
    assert all(any(count.values()) for count in counts.values()), "a queue without jobs is kept"
    assert list(state.queue_names) == sorted(state.counts.keys() | state.paused.keys())
    assert state.total() == len(known)
    for status in STATUSES:
        assert state.totals[status] == sum(job.status == status for job in rows.values())
    for name, count in counts.items():
        row = state.queue_row(name)
        assert (row.completed, row.failed, row.cancelled) == (count["completed"], count["failed"], count["cancelled"])
        assert row.paused == (name in state.paused)


def _compare_orders(state: State, rows: dict[str, Job], at: cmd.Moment) -> None:
    jobs = rows.values()
    assert state.jobs == {job.id: job for job in jobs if job.status in LIVE}
    assert state.release_loops == {job.id: job.releases for job in jobs if job.status in LIVE and is_release_loop(job)}
    retried = Counter(job.options.queue for job in jobs if job.status == "queued" and is_retried(job))
    assert state.retrying == retried
    queues = sorted(state.counts)
    kinds = sorted({job.options.kind for job in jobs})
    assert [job.id for job in state.due(queues, None)] == due_order(jobs, at.now, queues, None, state.paused)
    for queue in queues:
        assert [job.id for job in state.due([queue], kinds[:1])] == due_order(
            jobs, at.now, [queue], kinds[:1], state.paused
        )
        queued = [job for job in jobs if job.status == "queued" and job.options.queue == queue]
        buckets = {(job.options.kind, job.options.priority) for job in queued}
        assert state.due_buckets(queue) == len(buckets)
        due = [job.run_at for job in queued if job.run_at <= at.now and not guards.is_overdue(job, at.now)]
        assert state.oldest_due_at(queue) == min(due, default=None)
    waiting = [job.run_at for job in jobs if job.status == "queued" and job.run_at > at.now]
    assert state.next_run_at() == min(waiting, default=None)


def _compare_locks(state: State, rows: dict[str, Job], at: cmd.Moment) -> None:
    processing = {job.id: job for job in rows.values() if job.status == "processing"}
    assert state.processing == processing
    lock_deadlines = {
        job.id: job.deadlines for job in processing.values() if job.deadlines is not None and job.grant is not None
    }
    stalled = {job_id for job_id, deadlines in lock_deadlines.items() if at.lock_ms >= deadlines.stalled_at}
    dead = {job_id for job_id, deadlines in lock_deadlines.items() if not deadlines.is_live(at.lock_ms)} - stalled
    assert set(state.processing.stalled) == stalled
    assert set(state.processing.expired_locks) == {job_id for job_id in dead if not lock_deadlines[job_id].cleared}
    assert set(state.processing.noted_expired) == {job_id for job_id in dead if lock_deadlines[job_id].cleared}
    assert state.processing.live_locks() == len(lock_deadlines) - len(stalled) - len(dead)
    assert set(state.overdue()) == {job.id for job in rows.values() if guards.is_overdue(job, at.now)}
    ahead = [deadlines.stalled_at for job_id, deadlines in lock_deadlines.items() if job_id in dead]
    ahead += [
        min(lock_deadlines[job_id].expires, lock_deadlines[job_id].stalled_at)
        for job_id in lock_deadlines.keys() - dead - stalled
    ]
    first = state.processing.next_deadline()
    assert first is None or first > at.lock_ms
    assert (first is None) == (not ahead)
    assert first is None or first <= min(ahead), "a deadline would be missed"
    holders: dict[str, set[str]] = {}
    for job in processing.values():
        if job.grant is not None and job.deadlines is not None:
            holders.setdefault(job.grant.worker, set()).add(job.id)
    assert {name: set(seen.jobs) for name, seen in state.presence.workers.items() if seen.jobs} == holders
