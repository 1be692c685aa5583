"""The invariants that every decision must keep, for any state, command and time.

The checks follow the text of the invariants (docs/reliability.md) and share no code with the rules:

S1 one grant per job, S2 tokens increase, S3 only the latest grant changes a job, S4 completed is final and a run ends
once, S5 only stalled jobs are recovered, S6 acknowledged means on disk and rejected means nothing done, S7 journal,
memory and rows are equal, S8 a rule always returns, S9 the same key gets the same response, S10 counters
equal a recount, S11 no lock outlives its progress timeout, S12 lock time never goes back, S13 only old finished jobs
are deleted, S14 claims keep the order, S15 changes of operators are in the audit log, and a dry run changes nothing,
S16 a worker is told its directive. S18 is checked in cluster/cluster.py, S19 in firings.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from msgspec import UNSET

from jobd.core.quiet import open_queues
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.errors import ApiError
from jobd.model.events import Event, fold
from jobd.model.job import FINISHED, SECOND_MS, STATUSES, TRANSITIONS, Job, LockDeadlines, release_delay_ms
from jobd.model.responses import Recovered, Response
from tests.support.factories import as_stored
from tests.support.rule_harness import Decision, due_order

HOLDERS: Final = (
    cmd.Progress,
    cmd.Extend,
    cmd.Complete,
    cmd.Fail,
    cmd.Release,
    cmd.ExtendLock,
    cmd.ReleaseLock,
    cmd.Undelivered,
)
CALLS: Final = (cmd.Progress, cmd.Extend, cmd.Complete, cmd.Fail, cmd.Release)  # calls of workers
BY_TIME: Final = frozenset({"stalled", "expired"})  # events of time before a rejected command
NOTES: Final = frozenset({"late_result", "late_call"})  # events that change no row
ENDINGS: Final = frozenset({"completed", "failed", "retried", "released", "undelivered", "stalled"})
BY_HAND: Final = frozenset({"cancelled", "force_failed", "force_reset", "transitioned"})  # also end a grant

Decide = Callable[[Transaction, cmd.IssuedCommand], Response | ApiError]


class Violation(Exception):
    """An invariant was broken: its name, a description, and the job."""

    def __init__(self, rule: str, what: str, job_id: str | None) -> None:
        super().__init__(f"{rule}: {what}" + (f" (job {job_id})" if job_id else ""))
        self.rule = rule
        self.what = what
        self.job_id = job_id


def is_live(deadlines: LockDeadlines, lock_ms: LockMs) -> bool:
    """Return whether the lock is live. At its expiry it is not."""
    return not deadlines.cleared and lock_ms < deadlines.expires


def is_stalled(job: Job, lock_ms: LockMs) -> bool:
    """Return whether a processing job has no grant, is past its progress timeout, or stalled."""
    deadlines = job.deadlines
    if job.status != "processing" or deadlines is None or job.grant is None:
        return job.status == "processing"
    past = deadlines.progress_due is not None and lock_ms >= deadlines.progress_due
    return past or (not is_live(deadlines, lock_ms) and lock_ms >= deadlines.stall_due)


def _due_directive(state: State, claim: cmd.Claim, at: cmd.Moment) -> str | None:
    """Return what the worker is to be told: what it does not do yet, once in a second."""
    seen = state.presence.workers.get(claim.worker)
    if seen is None or seen.directive is None:
        return None
    action, told_at = seen.directive.view.action, seen.directive.told_at
    is_quiet = claim.limit == 0 and claim.busy is not True
    is_done = action == ("quiet" if is_quiet else "resume")
    return None if is_done or (told_at is not None and at.lock_ms - told_at < SECOND_MS) else action


def told(decision: Decision) -> str | None:
    """Return the directive in the response to a claim."""
    directive = decision.answer.data.directive if isinstance(decision.answer, Response) else UNSET
    return None if directive is UNSET or directive is None else directive.action


def is_overdue(job: Job, now: int) -> bool:
    return job.status == "queued" and job.expires_at is not None and now >= job.expires_at


class DecisionChecks:
    """Check each decision. `fail` is called if one breaks an invariant; `begin` marks a start of the daemon."""

    def __init__(self) -> None:
        self.held_at_start: set[str] = set()  # lock ids
        self._live_at_start: set[str] = set()
        self._grace_ends = LockMs(0)
        self._last_token = 0
        self._last_lock_ms = LockMs(0)

    def fail(self, rule: str, what: str, job_id: str | None = None) -> None:
        raise Violation(rule, what, job_id)

    def must(self, condition: object, rule: str, what: str, job_id: str | None = None) -> None:
        if not condition:
            self.fail(rule, what, job_id)

    def begin(self, state: State, lock_ms: LockMs, grace_ms: int) -> None:
        """Start the grace, within which no lock of a processing job may end."""
        held = [(job.grant.lock_id, job.deadlines) for job in state.processing.values() if job.grant and job.deadlines]
        self.held_at_start = {lock_id for lock_id, _ in held}
        self._live_at_start = {lock_id for lock_id, deadlines in held if is_live(deadlines, lock_ms)}
        self._grace_ends = lock_ms + grace_ms
        self._last_token, self._last_lock_ms = 0, lock_ms

    def check_recovery(self, job: Job, at: cmd.Moment) -> None:
        """Check that a stalled job is recovered in time."""

    def check_aging(self, job: Job, at: cmd.Moment) -> None:
        """Check that a job may be deleted or failed by age."""
        self.must(not at.suspect, "S13", f"a {job.status} job is old by a clock that is suspect", job.id)

    # -- one decision -------------------------------------------------------------------------------------------------

    def check(self, decide: Decide, tx: Transaction, call: cmd.IssuedCommand) -> Decision:
        """Decide a command, check the decision and return it."""
        state, at, command = tx.state, tx.at, call.command
        name, job_id = type(command).__name__, getattr(command, "id", None)
        job = state.get(job_id) if job_id is not None else None
        is_read = command.admission == "read"
        if job_id is None and not is_read:
            rows = {**state.finished, **state.jobs}
        else:  # it changes no other job
            rows = {} if job is None else {job.id: job}
        brief, paused = _brief(state, job), set(state.paused)
        due = _due_directive(state, command, at) if isinstance(command, cmd.Claim) else None
        try:
            decision = Decision(decide(tx, call), tx.changed(), tx.checked)
        except Exception as error:
            self.fail("S8", f"{name} raised {error!r}", job_id)
            raise
        self.must(at.lock_ms >= self._last_lock_ms, "S12", f"lock time went from {self._last_lock_ms} to {at.lock_ms}")
        self._last_lock_ms = at.lock_ms
        self._check_answer(state, rows, paused, command, decision, job, at)
        self.must(due is None or due == told(decision), "S16", f"a worker was not told to {due}")
        changes_nothing = is_read or command.dry_run
        self.must(not (changes_nothing and decision.changes), "S15", f"{name} did something, which only reads", job_id)
        self.must(decision.changes or brief == _brief(state, job), "S8", f"{name} changed the state silently", job_id)
        for change in decision.changes:
            changed = change.job_id
            goes_on = change.before == rows.get(changed)
            self.must(goes_on, "S7", f"{change.type} does not go on from the row before it", changed)
            if change.after is None:
                rows.pop(changed, None)
            else:
                rows[changed] = change.after
            self._check_change(change, command, at)
        for changed in {change.job_id for change in decision.changes}:
            self.must(
                state.get(changed) == rows.get(changed), "S7", "the state has another row than the event", changed
            )
        return decision

    def _check_answer(
        self,
        state: State,
        rows: Mapping[str, Job],
        paused: set[str],
        command: cmd.AnyCommand,
        decision: Decision,
        job: Job | None,
        at: cmd.Moment,
    ) -> None:
        """Check the response. `rows` and `paused` are as before the command."""
        if isinstance(command, HOLDERS):
            self._check_holder(command, decision, job, at)
        elif isinstance(decision.answer, ApiError):
            made = {change.type for change in decision.changes}
            self.must(made <= BY_TIME, "S6", f"a rejected {type(command).__name__} made {made}")
        if isinstance(command, cmd.Claim):
            self._check_claim(rows, paused, open_queues(state, command), command, decision, at)
        elif isinstance(command, cmd.Recover):
            self._check_recovery(rows, command, decision, at)
        elif isinstance(command, cmd.Start) and job is not None:
            self._check_start(job, decision, at)

    def _check_claim(
        self,
        rows: Mapping[str, Job],
        paused: set[str],
        queues: Sequence[str],
        command: cmd.Claim,
        decision: Decision,
        at: cmd.Moment,
    ) -> None:
        order = due_order(rows.values(), at.now, queues, command.kinds, paused)
        expected = [job_id for job_id in order if not is_overdue(rows[job_id], at.now)][: command.limit]
        granted = _ids(decision.changes, "granted")
        job_id = granted[0] if granted else None
        self.must(granted == expected, "S14", f"a claim got {granted}, its order is {expected}", job_id)

    def _check_recovery(
        self, rows: Mapping[str, Job], command: cmd.Recover, decision: Decision, at: cmd.Moment
    ) -> None:
        """Recovery takes every stalled job up to the limit. Rows without a grant are left to cleanup runs."""
        stalled = sum(
            is_stalled(job, at.lock_ms) and job.grant is not None and job.deadlines is not None for job in rows.values()
        )
        done = len(_ids(decision.changes, "stalled"))
        self.must(done == min(stalled, command.limit), "S5", f"{done} jobs were recovered, {stalled} are stalled")
        if isinstance(decision.answer, Response) and isinstance(decision.answer.data, Recovered):
            self.must(
                decision.answer.data.more or stalled <= done,
                "S5",
                "stalled jobs are left and not reported",
            )

    def _check_start(self, job: Job, decision: Decision, at: cmd.Moment) -> None:
        response = decision.answer
        if isinstance(response, ApiError) and response.code == "already_locked":
            self.must(not is_stalled(job, at.lock_ms), "S5", "a stalled job was called locked", job.id)

    def _check_holder(self, command: Any, decision: Decision, job: Job | None, at: cmd.Moment) -> None:
        verb, lock_id = type(command).__name__, command.lock_id
        if isinstance(command, cmd.Complete) and {change.type for change in decision.changes} & {*NOTES, "adopted"}:
            self._check_late(command, decision, job)
            return
        if isinstance(command, CALLS) and [change.type for change in decision.changes] == ["late_call"]:
            self._check_late_call(command, decision, job)
            return
        is_processing = job is not None and job.status == "processing" and job.grant is not None
        is_latest = is_processing and job is not None and job.grant is not None and job.grant.lock_id == lock_id
        if decision.changes:
            changed = [change.job_id for change in decision.changes]
            right = is_latest and changed == [command.id]
            self.must(right, "S3", f"{verb} of an old grant changed {changed}", command.id)
            self.must(isinstance(decision.answer, Response), "S3", f"a rejected {verb} changed {changed}", command.id)
        elif isinstance(decision.answer, Response):
            ended = job is not None and job.ended is not None and job.ended.lock_id == lock_id
            self.must(ended, "S3", f"{verb} was taken from an older grant", command.id)
        elif is_latest and job is not None and job.deadlines is not None:
            code, progress_due = decision.answer.code, job.deadlines.progress_due
            past = progress_due is not None and at.lock_ms >= progress_due
            allowed = {"invalid_request"} | ({"progress_timeout"} if past else set())
            self.must(code in allowed, "S3", f"{verb} of the latest grant was rejected: {code}", command.id)

    def _check_late(self, command: cmd.Complete, decision: Decision, job: Job | None) -> None:
        """A complete from an ended grant is rejected and noted, or adopted if the job was not granted since."""
        kinds = [change.type for change in decision.changes]
        is_current = job is not None and job.grant is not None and job.grant.lock_id == command.lock_id
        self.must(len(kinds) == 1 and not is_current, "S3", f"a complete made {kinds}", command.id)
        if kinds == ["late_call"]:
            self._check_late_call(command, decision, job)
            return
        if kinds == ["late_result"]:
            rejected = isinstance(decision.answer, ApiError) and decision.answer.code == "lock_lost"
            self.must(rejected, "S3", "a late result was kept, and its complete not rejected", command.id)
            return
        ended = job.ended if job is not None else None
        is_last = ended is not None and ended.lock_id == command.lock_id and ended.rule == "recovery"
        touched = job is None or ended is None or job.updated_at != ended.at
        self.must(is_last and not touched, "S3", "a late result was taken of a job that was not left alone", command.id)

    def _check_late_call(self, command: Any, decision: Decision, job: Job | None) -> None:
        """A rejected call is noted if its grant was the job's last one and its holder had not ended it."""
        response, event = decision.answer, decision.changes[0]
        rejected = isinstance(response, ApiError) and response.code == "lock_lost"
        ended = job.ended if job is not None else None
        was_theirs = ended is not None and ended.lock_id == command.lock_id and ended.verb is None
        self.must(rejected and was_theirs, "S3", f"a {type(command).__name__} was recorded as a late call", command.id)
        recorded = (event.details or {}).get("fencing_token"), (event.details or {}).get("verb")
        right = ended is not None and recorded == (ended.fencing_token, type(command).__name__.lower())
        self.must(right, "S3", f"a {type(command).__name__} was recorded as {recorded}", command.id)

    # -- one change ---------------------------------------------------------------------------------------------------

    def _check_change(self, change: Event, command: cmd.AnyCommand, at: cmd.Moment) -> None:
        before, after, event = change.before, change.after, as_stored(change)
        if event.job_seq == 0:
            return
        self.must(fold(before, event) == after, "S7", f"{event.type} does not say what happened", event.job_id)
        if before is not None:
            self._check_leaving(before, after, event, command, at)
        if after is not None:
            self._check_row(before, after, event, command, at)
            if after.deadlines is not None and event.type != "imported":
                self._check_deadlines(before.deadlines if before is not None else None, after, event, command, at)

    def _check_leaving(
        self, before: Job, after: Job | None, event: Event, command: cmd.AnyCommand, at: cmd.Moment
    ) -> None:
        """Check that the event is allowed for a job in the state `before`."""
        kind = event.type
        if kind == "stalled" and isinstance(command, cmd.TakeBack):
            is_live = before.deadlines is None or before.deadlines.is_live(at.lock_ms)
            is_its = before.grant is not None and before.grant.worker == command.name
            self.must(is_its and not is_live, "S5", "a live lock or that of another was taken back", before.id)
        elif kind == "stalled" and not isinstance(command, (cmd.EndGrants, cmd.Import)):
            self._check_stall(before, at)
        if kind == "expired":
            self.must(is_overdue(before, at.now), "S5", "a job expired before its time", before.id)
            self.check_aging(before, at)
        if kind == "deleted":
            old = before.expires_at is not None and before.expires_at <= at.now
            by_age = isinstance(command, cmd.DeleteExpired) or getattr(command, "action", None) == "cleanup"
            fits = before.status in FINISHED and (old or not by_age)
            self.must(fits, "S13", f"a job was deleted that is {before.status}", before.id)
            if by_age:
                self.check_aging(before, at)
        if before.status == "completed":
            final = after is None or (kind in {*NOTES, "fixed"} and after.status == "completed")
            self.must(final, "S4", f"{kind} changed a completed job", before.id)
        if kind in NOTES:
            self.must(after == before, "S3", f"{kind} changed a row", before.id)
        if kind == "adopted":
            fits = before.status in ("queued", "failed", "cancelled") and isinstance(command, (cmd.Adopt, cmd.Complete))
            self.must(fits, "S4", f"{kind} of a job that was {before.status}", before.id)
        if kind in ENDINGS:
            self.must(before.status == "processing", "S4", f"{kind} ended a job that was {before.status}", before.id)
        if before.status == "processing" and kind != "deleted":
            ends = after is None or after.status != "processing"
            self.must(ends == (kind in ENDINGS | BY_HAND), "S4", f"{kind} of a run, ended: {ends}", before.id)
        if kind in ("stalled", "undelivered", "released"):
            assert after is not None
            delay_ms = None
            if kind == "released" and (delay_ms := getattr(command, "delay_ms", None)) is None:
                delay_ms = release_delay_ms(before.releases + 1)
            stays = after.run_at == (before.run_at if delay_ms is None else at.now + delay_ms)
            self.must(stays, "S14", f"{kind} took the job from its place", before.id)

    def _check_stall(self, before: Job, at: cmd.Moment) -> None:
        self.must(is_stalled(before, at.lock_ms), "S5", "a job was recovered that is not stalled", before.id)
        if before.grant is None or before.deadlines is None:
            return
        graced = before.grant.lock_id in self.held_at_start and at.lock_ms < self._grace_ends
        self.must(not graced, "S5", "a job was recovered within the grace after a start", before.id)
        self.check_recovery(before, at)

    def _check_row(self, before: Job | None, job: Job, event: Event, command: cmd.AnyCommand, at: cmd.Moment) -> None:
        """Check the row after one event."""
        moved = before is not None and before.status != job.status
        pair = (event.from_status, job.status)
        self.must(not moved or pair in TRANSITIONS, "S4", f"{event.type} went from {pair[0]} to {pair[1]}", job.id)
        self.must(job.status in STATUSES, "S4", f"status {job.status}", job.id)
        held = job.grant is not None and job.deadlines is not None
        self.must(held == (job.status == "processing"), "S1", f"a {job.status} job has grant {job.grant}", job.id)
        if job.grant is not None and (before is None or before.grant is None):
            token = job.grant.fencing_token
            self.must(token > self._last_token, "S2", f"token {token} after {self._last_token}", job.id)
            self._last_token = token
        elif job.grant is not None and before is not None:
            self.must(job.grant == before.grant, "S1", f"{event.type} replaced a current grant", job.id)
        if event.type == "granted" and before is not None:
            due = before.status == "queued" and before.run_at <= at.now and not is_overdue(before, at.now)
            self.must(due, "S14", "granted before it was due, or after it had expired", job.id)
        if before is not None:
            self._check_attempt(before, job, event)
            self._check_releases(before, job, event, command)

    def _check_releases(self, before: Job, job: Job, event: Event, command: cmd.AnyCommand) -> None:
        """Consecutive releases without progress delay a job. Progress or another end of a grant resets their count."""
        expected = before.releases
        if event.type == "released":
            expected += (getattr(command, "delay_ms", None) or 0) < SECOND_MS
        elif event.type != "undelivered" and (job.progress > before.progress or job.status != before.status):
            expected = expected if event.type == "granted" else 0
        self.must(job.releases == expected, "S14", f"{event.type}: {before.releases} releases became {job.releases}")

    def _check_attempt(self, before: Job, job: Job, event: Event) -> None:
        """A grant is one attempt. Only `fail` and a stall with progress use it up."""
        given_back = event.type in ("released", "undelivered") or (event.type == "stalled" and before.progress == 0)
        if given_back:
            expected = max(before.attempt - 1, 0)
        elif event.type in ("force_reset", "retried_by_operator", "transitioned"):
            return
        else:
            expected = before.attempt + (event.type == "granted")
        self.must(job.attempt == expected, "S4", f"{event.type}: attempt {before.attempt} became {job.attempt}", job.id)

    def _check_deadlines(
        self, before: LockDeadlines | None, job: Job, event: Event, command: cmd.AnyCommand, at: cmd.Moment
    ) -> None:
        """Check the deadlines: not beyond the progress timeout, not earlier than before, at least as requested."""
        deadlines, grant, kind = job.deadlines, job.grant, event.type
        assert deadlines is not None
        assert grant is not None
        within = deadlines.progress_due is None or deadlines.expires <= deadlines.progress_due
        ends = f"the lock ends at {deadlines.expires}, its progress timeout is {deadlines.progress_due}"
        self.must(within, "S11", f"{kind}: {ends}", job.id)
        if kind == "granted":
            own, requested = job.options.progress_timeout_ms, getattr(command, "progress_timeout_ms", None)
            fits = own == grant.progress_timeout_ms or (own is None and requested in (None, grant.progress_timeout_ms))
            self.must(
                fits,
                "S11",
                f"{kind}: its progress timeout is {grant.progress_timeout_ms}, not {own} or {requested}",
                job.id,
            )
        credited = before.progress_due if before is not None else None
        if kind in ("granted", "progress"):
            progress_due = at.lock_ms + grant.progress_timeout_ms if grant.progress_timeout_ms else None
            fits = deadlines.progress_due == (
                progress_due if credited is None or progress_due is None else max(progress_due, credited)
            )
            self.must(fits, "S11", f"{kind}: progress_due {deadlines.progress_due}, not {progress_due}", job.id)
        elif kind != "resumed" and before is not None:
            self.must(
                deadlines.progress_due == before.progress_due, "S11", f"{kind} moved the progress timeout", job.id
            )
        if kind in ("granted", "progress", "extended"):
            requested = getattr(command, "additional_ms", None) or grant.ttl_ms
            until = min(
                at.lock_ms + requested,
                at.lock_ms + requested if deadlines.progress_due is None else deadlines.progress_due,
            )
            long = deadlines.expires == (until if before is None else max(until, before.expires))
            self.must(long and not deadlines.cleared, "S11", f"{kind}: {ends}, it should end at {until}", job.id)
            self.must(
                deadlines.stall_due >= at.lock_ms + grant.stall_after_ms, "S11", f"{kind}: stalled too early", job.id
            )
        if before is not None:
            back = deadlines.expires < before.expires or deadlines.stall_due < before.stall_due
            self.must(not back, "S11", f"{kind} made a lock shorter", job.id)
        if kind == "resumed" and before is not None and event.details is not None:
            until = at.lock_ms + event.details["grace_ms"]
            pairs = zip(_deadlines(before), _deadlines(deadlines), strict=True)
            fits = all(new == old or (new == until and (old is None or old < until)) for old, new in pairs)
            self.must(fits, "S11", f"{kind}: {before} became {deadlines}, credit is until {until}", job.id)
        if kind == "lock_expired":
            self.must(before is not None and at.lock_ms >= before.expires, "S5", "a live lock was cleared", job.id)
            graced = grant.lock_id in self._live_at_start and at.lock_ms < self._grace_ends
            self.must(not graced, "S5", "a live lock ended within the grace after a start", job.id)


def _deadlines(deadlines: LockDeadlines) -> tuple[LockMs | None, ...]:
    return deadlines.expires, deadlines.stall_due, deadlines.progress_due


def _ids(changes: Iterable[Event], kind: str) -> list[str]:
    return [change.job_id for change in changes if change.type == kind]


def _brief(state: State, job: Job | None) -> tuple[Any, ...]:
    """Summarize a state cheaply, enough to detect most changes. The whole state is compared now and then."""
    same = job is None or state.get(job.id) == job
    return (
        state.next_event,
        state.next_token,
        state.next_job,
        *state.totals.values(),
        len(state.jobs),
        same,
        len(state.processing.stalled),
    )
