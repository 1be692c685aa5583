"""The promises, checked at every decision, commit, answer and start. Changes nothing, decides nothing.

S1 to S14 are the names under which a broken one is told:

S1 one grant a job, S2 tokens rise, S3 only the latest grant speaks, S4 completed is final and a run ends once, S5 only
stuck jobs are recovered, S6 answered means on disk and refused means nothing done, S7 journal, memory and rows are one,
S8 a rule always answers and only reads, S9 the same key gets the same answer, S10 counters are a recount, S11 no lock
outlives its ceiling, S12 lease time never goes back, S13 only old finished jobs are deleted, S14 claims keep the order.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from jobd import rules, steps
from jobd.answers import Answer, GrantView, JobView
from jobd.batch import Batch, KeyRow
from jobd.book import Book
from jobd.commands import (
    AnyCommand,
    Call,
    Claim,
    Complete,
    DeleteExpired,
    EndGrants,
    Extend,
    ExtendLock,
    Fail,
    Import,
    KeyUse,
    Mend,
    Moment,
    Progress,
    Refusal,
    Release,
    ReleaseLock,
    Undelivered,
)
from jobd.draft import Decision
from jobd.events import Change, Event, fold
from jobd.job import FINISHED, STATUSES, TOKEN_COUNTER_BITS, TRANSITIONS, Job, Policy
from jobd.keys import KEPT_MS, SAFE_MS
from tests.desk import compare, due_order, picture

if TYPE_CHECKING:
    from tests.simulation.machine import Daemon, Machine

HOLDERS: Final = (Progress, Extend, Complete, Fail, Release, ExtendLock, ReleaseLock, Undelivered)
BY_TIME: Final = frozenset({"stalled", "expired"})  # what time does before a refused command is judged
ENDINGS: Final = frozenset({"completed", "failed", "retried", "released", "undelivered", "stalled"})
RECOUNT_EVERY: Final = 25  # commits
PICTURE_EVERY: Final = 500  # decisions

Decide = Callable[[Book, Call, Moment, Policy], Decision]


class Broken(Exception):
    """A promise was broken: which, how, and with which job."""

    def __init__(self, rule: str, what: str, job_id: str | None) -> None:
        super().__init__(f"{rule}: {what}")
        self.rule = rule
        self.what = what
        self.job_id = job_id


class Watch:
    """`first` is the first promise that was broken. `steps` counts decided commands, `fired` everything by name."""

    def __init__(self, machine: Machine, fired: Counter[str]) -> None:
        self.machine = machine
        self.fired = fired
        self.first: Broken | None = None
        self.steps = 0
        self.highest_token = 0  # of all that were ever committed, restored copies or not
        self.received: dict[int, str] = {}  # token -> who got it in an answer
        self.deleted: set[int] = set()  # seqs of jobs
        self.acknowledged: dict[int, tuple[str, int, str]] = {}  # event seq -> type, job seq, job id
        self._decided: dict[int, Decision | None] = {}  # by the identity of a command that is under way
        self._durable: dict[int, str] = {}  # event seq -> type, of this daemon
        self._last_token = 0
        self._last_lease = 0
        self._latest_wall = 0  # that this daemon has seen
        self.held_at_start: set[str] = set()
        self._live_at_start: set[str] = set()
        self._until = 0  # lease time of the end of the grace after a start
        self._key_rows: dict[str, KeyRow] = {}  # as committed, with answers
        self._commits = 0
        self._decide: Decide = rules.decide

    @property
    def daemon(self) -> Daemon | None:
        return self.machine.daemon

    def fail(self, rule: str, what: str, job_id: str | None = None) -> None:
        if self.first is None:
            self.first = Broken(rule, what, job_id)
            self.machine.note("broken", rule, what, job_id)
            self.machine.finished.set()

    def _must(self, condition: object, rule: str, what: str, job_id: str | None = None) -> None:
        if not condition:
            self.fail(rule, what, job_id)

    # -- a start ------------------------------------------------------------------------------------------------------

    def opened(self, daemon: Daemon, grace_ms: int) -> None:
        """A daemon has opened the disk: its memory is what the disk holds, and so is everything acknowledged."""
        self._durable = {}
        self._last_token = self._latest_wall = 0
        lease = self._last_lease = daemon.clock.moment().lease
        book = daemon.book
        held = [(job.grant.lock_id, job.lease) for job in book.processing.values() if job.grant and job.lease]
        self.held_at_start = {lock_id for lock_id, _ in held}
        self._live_at_start = {lock_id for lock_id, until in held if until.is_live(lease)}
        self._until = lease + grace_ms
        self.recount(book)
        self.whole()

    def whole(self) -> None:
        """Every acknowledged change is on disk, and the journal of each job folds to its row."""
        disk = self.machine.disk
        journal = {event.seq: event for event in disk.events}
        for seq, (kind, job_seq, job_id) in self.acknowledged.items():
            event = journal.get(seq)
            if event is not None:
                same = (event.type, event.job_id) == (kind, job_id)
                self._must(same, "S6", f"event {seq} was acknowledged as {kind}, now it is {event.type}", job_id)
            elif job_seq:
                gone = job_seq in self.deleted or job_id in disk.quarantined
                self._must(gone, "S6", f"event {seq} ({kind}) was acknowledged and is lost", job_id)
        rows: dict[int, Job | None] = {}
        for event in disk.events:
            if event.job_seq in disk.jobs:  # the journal of a deleted one may be gone in part
                rows[event.job_seq] = fold(rows.get(event.job_seq), event)
        for seq, row in disk.jobs.items():
            job = rows.get(seq)
            self._must(row == job, "S7", f"the journal folds to {job}, the row is {row}", row.id)

    def put_back(self, acknowledged: dict[int, tuple[str, int, str]]) -> None:
        """An older copy of the disk is in place: what was acknowledged after it is lost, as it must be."""
        self.acknowledged = dict(acknowledged)
        self._key_rows = dict(self.machine.disk.keys)

    # -- a decision ---------------------------------------------------------------------------------------------------

    def decide(self, book: Book, call: Call, at: Moment, policy: Policy) -> Decision:
        """The real `decide`, with everything looked at before and after."""
        self.steps += 1
        if self.steps == self.machine.enough:
            self.machine.finished.set()
        command = call.command
        job_id = getattr(command, "id", None)
        before = book.get(job_id) if job_id is not None else None
        expected = self._expected(book, command, at) if isinstance(command, Claim) else None
        whole = picture(book) if self.steps % PICTURE_EVERY == 0 else None
        brief = _brief(book, before)
        try:
            decision = self._decide(book, call, at, policy)
        except Exception as error:
            self.fail("S8", f"{type(command).__name__} raised {error!r}", job_id)
            raise
        self.fired[f"command {type(command).__name__}"] += 1
        self._must(brief == _brief(book, before), "S8", f"{type(command).__name__} changed the book", job_id)
        self._must(whole is None or whole == picture(book), "S8", f"{type(command).__name__} changed the book", job_id)
        self._must(at.lease >= self._last_lease, "S12", f"lease time went from {self._last_lease} to {at.lease}")
        self._last_lease = at.lease
        self._latest_wall = max(self._latest_wall, at.believed)
        if id(command) in self._decided:
            self._decided[id(command)] = decision
        if isinstance(command, HOLDERS):
            self._check_holder(command, decision, before, at)
        elif isinstance(decision.answer, Refusal):
            made = {change.event.type for change in decision.changes}
            self._must(made <= BY_TIME, "S6", f"a refused {type(command).__name__} made {made}", job_id)
        for change in decision.changes:
            self._check_change(change, command, at)
        if expected is not None:
            self._check_claim(command, decision, expected)
        return decision

    def _expected(self, book: Book, command: Claim, at: Moment) -> list[str]:
        """The ids that a claim has to grant, by a plain sort."""
        order = due_order(book.jobs.values(), at.now, command.queues, command.kinds, book.paused)
        return [job_id for job_id in order if not steps.is_overdue(book.jobs[job_id], at.now)][: command.limit]

    def _check_claim(self, command: AnyCommand, decision: Decision, expected: list[str]) -> None:
        assert isinstance(command, Claim)
        granted = [change.event.job_id for change in decision.changes if change.event.type == "granted"]
        self._must(granted == expected, "S14", f"a claim got {granted}, its order is {expected}", _first(granted))
        if not granted or self.daemon is None:
            return
        parked = self.daemon.actor.parked
        mine = next((asked for asked, _ in parked._all.values() if asked.call.command is command), None)
        for change in decision.changes:
            if change.event.type != "granted" or change.after is None:
                continue
            first = parked.first(change.event.queue, change.after.options.kind)
            passed = first is not None and first is not mine and not first.is_abandoned
            self._must(not passed, "S14", "a claim passed by one that waited longer", change.event.job_id)

    def _check_holder(self, command: Any, decision: Decision, job: Job | None, at: Moment) -> None:
        verb, lock_id = type(command).__name__, command.lock_id
        is_latest = (
            job is not None and job.status == "processing" and job.grant is not None and (job.grant.lock_id == lock_id)
        )
        if decision.changes:
            changed = [change.event.job_id for change in decision.changes]
            right = is_latest and changed == [command.id]
            self._must(right, "S3", f"{verb} of an old grant changed {changed}", command.id)
            self._must(isinstance(decision.answer, Answer), "S3", f"a refused {verb} changed {changed}", command.id)
        elif isinstance(decision.answer, Answer):
            ended = job is not None and job.ended is not None and job.ended.lock_id == lock_id
            self._must(ended, "S3", f"{verb} was taken from an older grant", command.id)
        elif is_latest and job is not None and job.lease is not None:
            code = decision.answer.code
            past = job.lease.is_past_ceiling(at.lease)
            allowed = {"invalid_request"} | ({"max_processing_time_exceeded"} if past else set())
            self._must(code in allowed, "S3", f"{verb} of the latest grant was refused: {code}", command.id)

    def _check_change(self, change: Change, command: AnyCommand, at: Moment) -> None:
        before, after, event = change.before, change.after, change.event
        if event.type == "stalled":
            assert before is not None
            self._check_stall(before, command, at)
        elif event.type == "expired":
            overdue = before is not None and steps.is_overdue(before, at.now)
            self._must(overdue, "S5", "a job expired before its time", event.job_id)
        elif event.type == "deleted":
            assert before is not None
            old = before.expires_at is not None and before.expires_at <= at.now
            fits = before.status in FINISHED and (old or not isinstance(command, DeleteExpired))
            self._must(fits, "S13", f"a job was deleted that is {before.status}", event.job_id)
        if after is not None:
            self._check_row(before, after, event, at)
        if before is not None and before.status == "completed":
            final = after is None or (event.type == "fixed" and after.status == "completed")
            self._must(final, "S4", f"{event.type} changed a completed job", event.job_id)
        if before is not None and event.type in ENDINGS:
            ran = before.status == "processing"
            self._must(ran, "S4", f"{event.type} ended a job that was {before.status}", before.id)

    def _check_stall(self, before: Job, command: AnyCommand, at: Moment) -> None:
        if isinstance(command, (EndGrants, Import)):
            return
        self._must(steps.is_stuck(before, at.lease), "S5", "a job was recovered that is not stuck", before.id)
        if isinstance(command, Mend) or before.grant is None or before.lease is None:
            return
        graced = before.grant.lock_id in self.held_at_start and at.lease < self._until
        self._must(not graced, "S5", "a job was recovered within the grace after a start", before.id)
        if before.lease.stuck >= (self.machine.closing_since or before.lease.stuck + 1):
            late_ms = at.lease - before.lease.stuck
            self._must(late_ms <= self.machine.recovery_ms + 1_000, "L2", f"recovery came {late_ms} ms late", before.id)

    def _check_row(self, before: Job | None, job: Job, event: Event, at: Moment) -> None:
        """One row after one event."""
        pair = (event.before, job.status)
        moved = before is not None and before.status != job.status
        self._must(not moved or pair in TRANSITIONS, "S4", f"{event.type} went from {pair[0]} to {pair[1]}", job.id)
        self._must(job.status in STATUSES, "S4", f"status {job.status}", job.id)
        held = job.grant is not None and job.lease is not None
        self._must(held == (job.status == "processing"), "S1", f"a {job.status} job has grant {job.grant}", job.id)
        if job.grant is not None and (before is None or before.grant is None):
            token = job.grant.fencing_token
            self._must(token > self._last_token, "S2", f"token {token} after {self._last_token}", job.id)
            self._last_token = token
        elif job.grant is not None and before is not None:
            self._must(job.grant == before.grant, "S1", f"{event.type} replaced a current grant", job.id)
        lease = job.lease
        if lease is not None:
            self._check_lease(before.lease if before is not None else None, job, event, at)
        if event.type == "granted" and before is not None:
            due = before.status == "queued" and before.run_at <= at.now
            self._must(due, "S14", "granted before it was due", job.id)
            self._must(job.attempt == before.attempt + 1, "S4", "a grant is one attempt", job.id)
        if event.type == "lock_expired" and job.grant is not None and job.grant.lock_id in self._live_at_start:
            self._must(at.lease >= self._until, "S5", "a live lock ended within the grace after a start", job.id)

    def _check_lease(self, before: Any, job: Job, event: Event, at: Moment) -> None:
        lease, grant = job.lease, job.grant
        assert lease is not None
        assert grant is not None
        if event.type == "imported":
            return
        within = lease.ceiling is None or lease.expires <= lease.ceiling
        ends = f"the lock ends at {lease.expires}, its ceiling is {lease.ceiling}"
        self._must(within, "S11", f"{event.type}: {ends}", job.id)
        limit = grant.max_processing_ms
        if event.type in ("granted", "progress"):
            earliest = at.lease + limit if limit else None
            fits = lease.ceiling == earliest or (
                before is not None and before.ceiling is not None and lease.ceiling == before.ceiling
            )
            self._must(fits, "S11", f"{event.type}: ceiling {lease.ceiling}, not {earliest}", job.id)
        elif event.type != "resumed" and before is not None:
            self._must(lease.ceiling == before.ceiling, "S11", f"{event.type} moved the ceiling", job.id)
        if before is not None and not lease.cleared:
            shorter = lease.expires < before.expires or lease.silent < min(before.silent, at.lease)
            self._must(not shorter, "S11", f"{event.type} made a lock shorter", job.id)

    # -- a commit -----------------------------------------------------------------------------------------------------

    def committed(self, batch: Batch) -> None:
        """A batch is on the disk for good."""
        self._commits += 1
        daemon = self.daemon
        for change in batch.changes:
            event, before, after = change.event, change.before, change.after
            self._durable[event.seq] = event.type
            self.fired[f"event {event.type}"] += 1
            self.machine.note("event", event)
            if event.job_seq == 0:
                continue
            self._must(fold(before, event) == after, "S7", f"{event.type} does not say what happened", event.job_id)
            if after is None:
                self.deleted.add(event.job_seq)
            elif after.grant is not None and (before is None or before.grant != after.grant):
                token = after.grant.fencing_token
                self._must(token > self.highest_token, "S2", f"token {token} after {self.highest_token}", after.id)
                self.highest_token = max(token, self.highest_token)
        counter = self.highest_token & ((1 << TOKEN_COUNTER_BITS) - 1)
        if self.highest_token >> TOKEN_COUNTER_BITS == batch.numbers.epoch:
            self._must(batch.numbers.next_token > counter, "S13", "the mark of the tokens went back")
        self._check_keys(batch)
        if daemon is not None:
            for change in batch.changes:
                if change.event.job_seq:
                    row = self.machine.disk.jobs.get(change.event.job_seq)
                    same = daemon.book.get(change.event.job_id) == row or row is None
                    self._must(same, "S7", "memory is not what the disk holds", change.event.job_id)
            if self._commits % RECOUNT_EVERY == 0:
                self.recount(daemon.book)

    def recount(self, book: Book) -> None:
        """Every order and counter of the book against the rows of the disk."""
        disk = self.machine.disk
        if disk.quarantined:
            return  # the book does not know the queue of a finished job that was not at hand when its row was set aside
        rows = {job.id: job for job in disk.jobs.values()}
        at = Moment(book._now, book._lease, book._now - book._lease)
        try:
            compare(book, rows, at, finished_at_hand=False)
            tokens = [job.grant.fencing_token for job in book.processing.values() if job.grant is not None]
            assert tokens == sorted(tokens), f"the oldest grant is not the first: {tokens}"
        except AssertionError as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.fail("S10", f"the book is not a recount: {place.line} {str(error)[:600]}")

    def _check_keys(self, batch: Batch) -> None:
        now = self._latest_wall
        rows = self._key_rows
        added = {row.digest: row for row in batch.keys}
        limit = self.machine.plan.keys
        for digest in [*batch.forget_keys, *added]:
            old = rows.get(digest)
            if old is None:
                continue
            if old.grants is not None:
                current = [job_id for job_id, lock_id in old.grants if self._holds(job_id, lock_id)]
                self._must(not current, "S9", f"the key of a current grant was forgotten: {current}", _first(current))
            else:
                kept_ms = SAFE_MS if len(rows) >= limit - len(batch.keys) else KEPT_MS
                suspect = self.daemon is not None and self.daemon.clock.suspect
                old_enough = now >= old.at + kept_ms or suspect
                self._must(old_enough, "S9", f"an answer of {now - old.at} ms ago was forgotten or made again")
        for digest in batch.forget_keys:
            rows.pop(digest, None)
        rows |= added

    def _holds(self, job_id: str, lock_id: str) -> bool:
        job = self.machine.disk.job(job_id)
        return job is not None and job.grant is not None and job.grant.lock_id == lock_id

    # -- an answer ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def under_way(self, command: AnyCommand) -> Iterator[None]:
        """What is decided about this very command is kept until it is answered."""
        self._decided[id(command)] = None
        try:
            yield
        finally:
            del self._decided[id(command)]

    def answered(self, command: AnyCommand, key: KeyUse | None, answer: Answer | Refusal) -> None:
        """The actor has answered; in a moment the answer is on the wire."""
        decision = self._decided[id(command)]
        job_id = getattr(command, "id", None)
        name = type(command).__name__
        if isinstance(answer, Refusal):
            self.fired[f"refusal {answer.code}"] += 1
            self._check_refusal(name, answer, decision, job_id)
            return
        if answer.replayed:
            self.fired["answer replayed"] += 1
            row = self._key_rows.get(key.digest) if key is not None else None
            if row is not None and isinstance(answer.data, Raw):
                self._must(row.answer == bytes(answer.data), "S9", "a replay differs from the first answer", job_id)
        elif decision is not None and decision.answer is answer:
            self._check_written(name, decision, key, answer)
        elif decision is not None:  # a claim that was nearly served, and then answered empty when its time was over
            self._check_undone(name, decision, "answered otherwise", job_id)
        for _, granted in _grants(answer):
            token = granted.fencing_token
            committed = token <= self.highest_token
            self._must(committed, "S6", f"grant {token} was answered before its commit", granted.job.id)

    def _check_refusal(self, name: str, answer: Refusal, decision: Decision | None, job_id: str | None) -> None:
        if answer.code == "internal_error":
            failing = self.machine.disk.failing & {"find", "timeline"} or self.machine.had_read_errors
            self._must(failing, "S8", f"{name}: {answer.message}", job_id)
        if decision is None or answer.code in ("outcome_unknown", "shutting_down"):
            return
        self._check_undone(name, decision, f"refused ({answer.code})", job_id)

    def _check_undone(self, name: str, decision: Decision, how: str, job_id: str | None) -> None:
        seqs = [change.event.seq for change in decision.changes]
        made = [seq for seq in seqs if self._durable.get(seq, "stalled") not in BY_TIME]
        self._must(not made, "S6", f"{name} was {how} and is on the disk: events {made}", job_id)

    def _check_written(self, name: str, decision: Decision, key: KeyUse | None, answer: Answer) -> None:
        for change in decision.changes:
            event = change.event
            written = event.seq in self._durable
            self._must(written, "S6", f"{name} was answered and {event.type} is not on the disk", event.job_id)
            self.acknowledged[event.seq] = (event.type, event.job_seq, event.job_id)
        if key is not None and decision.changes and name != "Claim" and not answer.grants:
            row = self._key_rows.get(key.digest)
            same = row is not None and row.answer == msgspec.json.encode(answer.data)
            self._must(same, "S9", f"the answer of {name} was not stored under its key")
        if isinstance(answer.data, JobView) and answer.data.lock is not None:
            self.fired["lock shown"] += 1

    def delivered(self, who: str, answer: Answer) -> None:
        """Somebody holds the answer in his hands."""
        for job_id, granted in _grants(answer):
            owner = self.received.setdefault(granted.fencing_token, who)
            self._must(owner == who, "S1", f"grant {granted.fencing_token} was given to {owner} and to {who}", job_id)


def _grants(answer: Answer) -> list[tuple[str, GrantView]]:
    if not answer.grants:
        return []
    data = answer.data
    views = [data] if isinstance(data, GrantView) else data.grants
    return [(view.job.id, view) for view in views]


def _brief(book: Book, job: Job | None) -> tuple[Any, ...]:
    """Enough of a book to see most changes at a small price; the whole is compared now and then."""
    job_id = None if job is None else job.id
    same = job_id is None or book.get(job_id) is job
    return book.next_event, book.next_token, book.next_job, *book.totals.values(), len(book.jobs), same, len(book.stuck)


def _first(ids: list[str]) -> str | None:
    return ids[0] if ids else None
