"""Check the invariants at every decision, commit, response and start.

invariants.py checks single decisions and explains the names.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from jobd.core import decide
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.engine.disk_full import WriteLimit
from jobd.engine.idempotency import KEPT_MS, SAFE_MS
from jobd.model.clocks import LockMs
from jobd.model.commands import AnyCommand, Claim, IdempotencyKey, IssuedCommand, Moment
from jobd.model.errors import ApiError
from jobd.model.events import Event, fold
from jobd.model.job import FINISHED, LIVE, MAX_LATE_RESULTS, SECOND_MS, TOKEN_COUNTER_BITS, Grant, Job
from jobd.model.responses import CleanupReport, GrantView, Response
from jobd.model.storage import Batch, StoredResponse
from tests.proof.simulation.firings import Firings
from tests.proof.simulation.invariants import BY_TIME, NOTES, Decide, DecisionChecks, Violation, told
from tests.proof.simulation.response_times import ResponseTimes
from tests.support.rule_harness import Decision, compare, snapshot

if TYPE_CHECKING:
    from tests.proof.simulation.machine import Machine, SimDaemon

RECOUNT_EVERY: Final = 25  # commits
RELEASE_CHECKS: Final = 4  # one slow step of the disk may outlast the slow phase
CHECK_EVERY_S: Final = 0.8
PICTURE_EVERY: Final = 500  # decisions
SMALL_STEPS_MS: Final = 2 * SECOND_MS  # steps back that the daemon does not report may add up to less


class Monitor(DecisionChecks):
    """`first` is the first broken invariant. `steps` counts decided commands, `fired` everything by name."""

    def __init__(self, machine: Machine, fired: Counter[str]) -> None:
        super().__init__()
        self.machine = machine
        self.fired = fired
        self.response_times = ResponseTimes(machine)
        self.firings = Firings(self)
        self.first: Violation | None = None
        self.steps = 0
        self.highest_token = 0  # over all commits, including those lost by a restore
        self.received: dict[int, str] = {}  # token -> the client that received it
        self.deleted: set[int] = set()  # seqs of jobs
        self._due: dict[int, int] = {}  # job seq -> run_at of jobs that were due, by a clock that was trusted
        self.acknowledged: dict[int, tuple[str, int, str]] = {}  # event seq -> type, job seq, job id
        self._decided: dict[int, Decision | None] = {}  # by the identity of a pending command
        self._durable: dict[int, str] = {}  # event seq -> type, of this daemon
        self._calls: set[tuple[Any, ...]] = set()  # job seq, token and verb of the late calls that this daemon noted
        self._latest_wall = 0  # that this daemon has seen or expected
        self._earliest_wall = sys.maxsize  # of the decisions since the latest commit
        self._held_at: LockMs | None = None  # lock time while the full disk holds it
        self._good_run_s = 0.0  # loop time of the start, or of the latest cleanup run without errors
        self._key_rows: dict[str, StoredResponse] = {}  # as committed, with responses
        self._commits = 0
        self._decide: Decide = decide.decide

    @property
    def daemon(self) -> SimDaemon | None:
        return self.machine.daemon

    def fail(self, rule: str, what: str, job_id: str | None = None) -> None:
        if self.first is None:
            self.first = Violation(rule, what, job_id)
            self.machine.note("broken", rule, what, job_id)
            self.machine.finished.set()

    # -- a start ------------------------------------------------------------------------------------------------------

    def check_start(self, daemon: SimDaemon, grace_ms: int) -> None:
        """Check after a start that memory equals the disk, and that every acknowledged change is there."""
        self._durable = {}
        self._calls = set()
        self._latest_wall = 0
        self._held_at = None
        self._good_run_s = self.machine.loop.now_s
        self.begin(daemon.state, daemon.clock.moment().lock_ms, grace_ms)
        self.recount(daemon.state)
        self.check_disk()
        self._note_due_on_disk()

    def check_disk(self) -> None:
        """Check that every acknowledged change is on disk, and that each job's journal folds to its row."""
        disk = self.machine.disk
        journal = {event.seq: event for event in disk.events}
        for seq, (kind, job_seq, job_id) in self.acknowledged.items():
            event = journal.get(seq)
            if event is not None:
                same = (event.type, event.job_id) == (kind, job_id)
                self.must(same, "S6", f"event {seq} was acknowledged as {kind}, now it is {event.type}", job_id)
            elif job_seq:
                gone = job_seq in self.deleted or job_id in disk.quarantined
                self.must(gone, "S6", f"event {seq} ({kind}) was acknowledged and is lost", job_id)
        self._check_late_results()
        rows: dict[int, Job | None] = {}
        for event in disk.events:
            if event.job_seq in disk.jobs:  # the journal of a deleted job may be partly pruned
                rows[event.job_seq] = fold(rows.get(event.job_seq), event)
        for seq, row in disk.jobs.items():
            job = rows.get(seq)
            if row != job:
                self.fail("S7", f"the journal folds to {job}, the row is {row}", row.id)

    def _check_late_results(self) -> None:
        """Check that every acknowledged late result is kept with its job, or was displaced by later ones."""
        disk = self.machine.disk
        for seq, (kind, job_seq, job_id) in self.acknowledged.items():
            if kind == "late_result" and job_seq in disk.jobs:
                kept = disk.late_results.get(job_seq, ())
                is_there = len(kept) == MAX_LATE_RESULTS or seq in [late.seq for late in kept]
                self.must(is_there, "S6", f"late result {seq} was acknowledged and is lost", job_id)
        for job_seq, kept in disk.late_results.items():
            tokens = [late.fencing_token for late in kept]
            one_each = len(tokens) <= MAX_LATE_RESULTS and tokens == sorted(set(tokens))
            self.must(one_each, "S6", f"job {job_seq} has late results of grants {tokens}")

    def note_restore(self, acknowledged: dict[int, tuple[str, int, str]]) -> None:
        """Forget the changes that were acknowledged after the restored copy."""
        self.acknowledged = dict(acknowledged)
        self._key_rows = dict(self.machine.disk.keys)
        self.firings.restored(self.machine.disk.schedules, self.machine.disk.numbers.next_event)

    # -- a decision ---------------------------------------------------------------------------------------------------

    def decide(self, tx: Transaction, call: IssuedCommand) -> Response | ApiError:
        """Call the real `decide`, with checks before and after. Now and then, do and undo the command first."""
        self.steps += 1
        if self.steps == self.machine.enough:
            self.machine.finished.set()
        self.fired[f"command {type(call.command).__name__}"] += 1
        self.fired["dry run"] += call.command.dry_run
        if self.steps % PICTURE_EVERY == 0:
            before = snapshot(tx.state)
            with contextlib.suppress(Exception):  # the checked decision raises it too
                self._decide(tx, call)
            tx.undo()
            self.must(before == snapshot(tx.state), "S8", f"undoing {type(call.command).__name__} left a change")
        decision = self.check(self._decide, tx, call)
        self._earliest_wall = min(self._earliest_wall, tx.at.believed)
        self._latest_wall = max(self._latest_wall, tx.at.believed, tx.at.expected)
        if id(call.command) in self._decided:
            self._decided[id(call.command)] = decision
        if isinstance(call.command, Claim):
            self.fired["busy worker told"] += call.command.busy is True and told(decision) is not None
            self._check_arrival(call.command, decision)
            self._check_due(tx)
            self._note_due(tx)
        for change in decision.changes:
            self._forget_due(change)
        if self.daemon is not None:
            self.fired["read that may go first"] += self.daemon.actor.reads_first and call.command.admission == "read"
            self._check_clock(self.daemon, tx.at)
        return decision.answer

    def _check_clock(self, daemon: SimDaemon, at: Moment) -> None:
        """Check that lock time stands still while the disk is full."""
        is_held = daemon.actor.full_disk.write_limit >= WriteLimit.ALL_BUT_ENDINGS
        self._held_at = (self._held_at or at.lock_ms) if is_held else None
        self.must(self._held_at in (None, at.lock_ms), "S11", f"lock time went on from {self._held_at} on a full disk")

    def check_aging(self, job: Job, at: Moment) -> None:
        """S13: nothing ages by a clock that is wrong, whether the daemon suspects it or not."""
        super().check_aging(job, at)
        self.must(not self.machine.jump_ms, "S13", f"a {job.status} job is old by a leap of the clock", job.id)

    def check_recovery(self, job: Job, at: Moment) -> None:
        """Check L2, after the faults have stopped."""
        assert job.deadlines is not None
        since = self.machine.closing_since
        if since is not None:
            late_ms = at.lock_ms - max(job.deadlines.stalled_at, since)
            self.must(late_ms <= self.machine.recovery_ms + 1_000, "L2", f"recovery came {late_ms} ms late", job.id)

    def _check_arrival(self, command: Claim, decision: Decision) -> None:
        """Check that waiting claims are served in order of arrival, and before new ones."""
        if self.daemon is None:
            return
        waiting = self.daemon.actor.waiting_claims
        mine = next((asked for asked, *_ in waiting.by_ticket.values() if asked.command is command), None)
        for change in decision.changes:
            if change.type != "granted" or change.after is None:
                continue
            first = waiting.first(change.queue, change.after.options.kind)
            passed = first is not None and first is not mine and not first.is_abandoned
            self.must(not passed, "S14", "a claim passed by one that waited longer", change.job_id)

    def _check_due(self, tx: Transaction) -> None:
        """L3: no job waits because the wall clock was set back if it was due before."""
        daemon = self.daemon
        if daemon is None or not daemon.due_jobs.idle.is_set() or self.machine.clocks_moved_s >= daemon.clock_checked_s:
            return
        for job in tx.state.not_due(tx.at.now + SMALL_STEPS_MS):
            was_due = self._due.get(job.seq) == job.run_at
            self.must(not was_due, "L3", "the wall clock was set back, and a due job waits", job.id)

    def _note_due(self, tx: Transaction) -> None:
        for job in tx.state.jobs.values():
            if job.run_at <= tx.at.believed:
                self._due[job.seq] = job.run_at

    def _note_due_on_disk(self) -> None:
        """Note which jobs were due at the last commit, or when they last changed. A start knows no others."""
        disk = self.machine.disk
        until = disk.numbers.wall_ms
        self._due = {
            job.seq: job.run_at
            for job in disk.jobs.values()
            if job.created_at <= job.run_at <= job.updated_at or (job.status in LIVE and job.run_at <= until)
        }

    def _forget_due(self, change: Event) -> None:
        """Count a delayed job that is kept due, and forget one that ends while it waits to be kept due."""
        before, after = change.before, change.after
        if before is not None and after is not None:
            is_kept = change.by == "daemon" and change.type == "updated"
            self.fired["delayed job kept due"] += is_kept and before.run_at > before.updated_at
            if after.status in FINISHED and after.run_at > after.updated_at:
                self._due.pop(change.job_seq, None)

    # -- a commit -----------------------------------------------------------------------------------------------------

    def check_commit(self, batch: Batch) -> None:
        """Check a committed batch. The disk has checked that its events say what happened (S7)."""
        self._commits += 1
        daemon = self.daemon
        for change in batch.changes:
            event, before, after = change, change.before, change.after
            self._durable[event.seq] = event.type
            self.fired[f"event {event.type}"] += 1
            self.fired["release delayed"] += event.type == "released" and event.details is not None
            self.fired["late result adopted"] += event.type == "adopted" and event.by.startswith("worker:")
            self.machine.note("event", event)
            self.firings.committed(event, self._latest_wall)
            if event.job_seq == 0:
                continue
            self.machine.artifacts.committed(change)
            if event.type == "late_call" and event.details is not None:
                call = (event.job_seq, event.details["fencing_token"], event.details["verb"])
                self.must(call not in self._calls, "S3", "a late call was recorded twice", event.job_id)
                self._calls.add(call)
            if event.type == "undelivered" and before is not None and before.grant is not None:
                token = before.grant.fencing_token
                self.must(token not in self.received, "S1", f"grant {token} was received and then released", before.id)
            if after is None:
                self.deleted.add(event.job_seq)
                self._check_tombstone(batch, change)
            elif after.grant is not None and (before is None or before.grant != after.grant):
                token = after.grant.fencing_token
                self.must(token > self.highest_token, "S2", f"token {token} after {self.highest_token}", after.id)
                self.highest_token = max(token, self.highest_token)
                if daemon is not None:
                    self._expect_delivery(daemon, after.id, after.grant, RELEASE_CHECKS)
        kept = batch.numbers.lock_ms
        self.must(
            batch.writes or kept >= self._last_lock_ms, "S12", f"lock time is {self._last_lock_ms}, {kept} is kept"
        )
        counter = self.highest_token & ((1 << TOKEN_COUNTER_BITS) - 1)
        if self.highest_token >> TOKEN_COUNTER_BITS == batch.numbers.epoch:
            self.must(batch.numbers.next_token > counter, "S2", "the mark of the tokens went back")
        self._check_audit(batch)
        self._check_keys(batch)
        self._check_cleanup(batch)
        if not batch.writes:
            self._earliest_wall = sys.maxsize
        if daemon is not None and not batch.writes:
            disk = self.machine.disk
            for change in batch.changes:
                if change.job_seq:
                    row = disk.jobs.get(change.job_seq)
                    same = daemon.state.get(change.job_id) == row or row is None or row.id in disk.unmoved
                    self.must(same, "S7", "memory is not what the disk holds", change.job_id)
            if self._commits % RECOUNT_EVERY == 0:
                self.recount(daemon.state)

    def _check_tombstone(self, batch: Batch, change: Event) -> None:
        """S13: a deletion and the tombstone of its object are on disk together."""
        job = change.before
        key = None if job is None or job.result is None else job.result.storage_key
        due = key is not None and self.machine.scenario.policy.artifacts
        left = [tombstone.key for tombstone in batch.tombstones if tombstone.job_seq == change.job_seq]
        expected = [key] if due else []
        self.must(left == expected, "S13", f"tombstones for {left}, not {expected}", change.job_id)

    def _check_audit(self, batch: Batch) -> None:
        """S15: an operator's change is on disk with its audit entry."""
        done = [entry for entry in batch.audit if entry.outcome == "done"]
        audited = {entry.job_id or entry.queue for entry in done}
        audited |= {job_id for entry in done if entry.what == "copy" for job_id in entry.changed_ids}
        moved_in = {change.job_id for change in batch.changes if change.type == "imported"}
        recovered = any(entry.what in ("recover-stuck", "take-back") for entry in batch.audit)
        entries = sum(entry.jobs for entry in batch.audit if entry.what == "import")
        self.must(entries == len(moved_in), "S15", f"{len(moved_in)} jobs were imported, the log says {entries}")
        planned: set[str] = set()
        counted = sum(entry.jobs for entry in batch.audit if entry.what.startswith("plan-"))
        for event in (change for change in batch.changes if change.by == "admin"):
            is_audited = event.job_id in moved_in or (event.job_id or event.queue) in audited
            if not is_audited and not (recovered and event.type in ("stalled", "lock_expired")):
                planned.add(event.job_id)
            is_audited = len(planned) <= counted
            self.must(is_audited, "S15", f"{event.type} by an operator is not in the audit log", event.job_id)

    def _check_cleanup(self, batch: Batch) -> None:
        """L5: if no cleanup run has succeeded for three periods, health reports it."""
        daemon, now_s = self.daemon, self.machine.loop.now_s
        if batch.report is not None and not msgspec.json.decode(batch.report, type=CleanupReport).errors:
            self._good_run_s = now_s
        if daemon is not None and daemon.is_open:
            schedule = daemon.maintainer.schedule
            late_s = 3 * max(schedule.interval_ms, schedule.min_interval_ms) / SECOND_MS
            is_reported = daemon.maintainer.degraded_reason() is not None
            self.fired["cleanup degraded"] += is_reported
            silent_s = now_s - self._good_run_s
            self.must(
                is_reported or silent_s <= late_s + 1,
                "L5",
                f"no cleanup run has succeeded for {silent_s:.0f} s, and health does not report it",
            )

    def note_freeze(self, seconds: float) -> None:
        """Note a freeze: a cleanup run may have been in progress."""
        self._good_run_s += seconds

    def check_prune(self, before: int) -> None:
        """S13: the journal of a deleted job is kept for its time."""
        kept_ms = self.machine.wall() - self.machine.jump_ms - before
        self.must(
            kept_ms >= self.machine.scenario.schedule.journal_ms, "S13", f"journals are deleted after {kept_ms} ms"
        )

    def recount(self, state: State) -> None:
        """Compare every queue and counter in memory with the rows on disk.

        Of a damaged row that could not be moved, memory holds only the id. A finished job counts until it is moved.
        """
        disk = self.machine.disk
        rows = {job.id: job for job in disk.jobs.values() if job.id not in disk.unmoved or job.status in FINISHED}
        lock_ms = state.processing.lock_ms
        at = Moment(state._now, lock_ms, state._now - int(lock_ms))
        try:
            compare(state, rows, at, finished_at_hand=False)
            tokens = [job.grant.fencing_token for job in state.processing.values() if job.grant is not None]
            assert tokens == sorted(tokens), f"the oldest grant is not the first: {tokens}"
        except AssertionError as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.fail("S10", f"the state is not a recount: {place.line} {str(error)[:600]}")

    def _check_keys(self, batch: Batch) -> None:
        now = self._latest_wall
        rows = self._key_rows
        added = {row.digest: row for row in batch.keys}
        limit = self.machine.scenario.keys
        for digest in [*batch.forget_keys, *added]:
            old = rows.get(digest)
            if old is None:
                continue
            if old.grants is not None:
                current = [job_id for job_id, lock_id in old.grants if self._holds(job_id, lock_id)]
                self.must(not current, "S9", f"the key of a current grant was forgotten: {current}", _first(current))
            else:
                is_full = len(rows) >= limit - len(batch.keys)
                kept_ms = SAFE_MS if is_full else KEPT_MS
                suspect = self.daemon is not None and self.daemon.clock.suspect
                is_ahead = is_full and self._earliest_wall < old.at  # from before a step back of the clock
                old_enough = now >= old.at + kept_ms or suspect or is_ahead
                self.must(old_enough, "S9", f"a response of {now - old.at} ms ago was forgotten or made again")
        for digest in batch.forget_keys:
            rows.pop(digest, None)
        rows |= added

    def _holds(self, job_id: str, lock_id: str) -> bool:
        job = self.machine.disk.job(job_id)
        if job_id in self.machine.disk.unmoved:
            return False  # no caller can use it
        return job is not None and job.grant is not None and job.grant.lock_id == lock_id

    # -- a response ----------------------------------------------------------------------------------------------------

    def note_request(self, command: AnyCommand) -> None:
        """Keep the decision on this command, until `forget_request`."""
        self._decided[id(command)] = None
        self.response_times.sent(command)

    def forget_request(self, command: AnyCommand) -> None:
        """Forget a command: it has its response, or its caller has left."""
        del self._decided[id(command)]
        self.response_times.forget(command)

    def _expect_delivery(self, daemon: SimDaemon, job_id: str, grant: Grant, checks_left: int) -> None:
        """Expect a grant that was not delivered to be released."""
        self.machine.loop.call_later(CHECK_EVERY_S, self._check_released, daemon, job_id, grant, checks_left)

    def _check_released(self, daemon: SimDaemon, job_id: str, grant: Grant, checks_left: int) -> None:
        if self.daemon is not daemon or not daemon.is_open or grant.fencing_token in self.received:
            return
        if not daemon.state.holds(job_id, grant.lock_id) or daemon.actor._decider._receivers.get(grant.lock_id):
            return
        if checks_left or self.machine.is_slow:
            self._expect_delivery(daemon, job_id, grant, max(checks_left - 1, 0))
            return
        self.fail("S1", f"grant {grant.fencing_token} was not delivered, and not released", job_id)

    def check_response(self, command: AnyCommand, key: IdempotencyKey | None, response: Response | ApiError) -> None:
        """Check a response of the actor before it is sent."""
        self.response_times.answered(command)
        decision = self._decided[id(command)]
        job_id = getattr(command, "id", None)
        name = type(command).__name__
        if isinstance(response, ApiError):
            self.fired[f"error {response.code}"] += 1
            self._check_error(name, response, decision, job_id)
            return
        if response.replayed:
            self.fired["response replayed"] += 1
            row = self._key_rows.get(key.digest) if key is not None else None
            same = row is None or key is None or row.body_hash == key.body_hash
            self.must(same, "S9", f"{name} got the response to another body", job_id)
            if row is not None and isinstance(response.data, Raw):
                self.must(row.body == bytes(response.data), "S9", "a replay differs from the first response", job_id)
        elif decision is not None and decision.answer is response:
            self._check_written(name, decision, key, response)
        elif decision is not None:  # the wait of a claim ended before it was served
            self._check_undone(name, decision, "answered otherwise", job_id)
        for _, granted in _grants(response):
            token = granted.fencing_token
            committed = token <= self.highest_token
            self.must(committed, "S6", f"grant {token} was answered before its commit", granted.job.id)

    def _check_error(self, name: str, response: ApiError, decision: Decision | None, job_id: str | None) -> None:
        if response.code == "internal_error":
            disk = self.machine.disk
            failing = disk.failing & {"find", "timeline"} or self.machine.had_read_errors or disk.is_broken
            self.must(failing, "S8", f"{name}: {response.message}", job_id)
        if decision is None or response.code in ("outcome_unknown", "shutting_down"):
            return
        if decision.answer is response:
            self._check_notes(decision)
        self._check_undone(name, decision, f"rejected ({response.code})", job_id)

    def _check_notes(self, decision: Decision) -> None:
        """Check that the late call or result of an error is on disk before the error is sent."""
        for event in decision.changes:
            if event.type in NOTES:
                self.must(
                    event.seq in self._durable, "S6", f"{event.type} was reported and is not on disk", event.job_id
                )
                self.acknowledged[event.seq] = (event.type, event.job_seq, event.job_id)

    def _check_undone(self, name: str, decision: Decision, how: str, job_id: str | None) -> None:
        seqs = [change.seq for change in decision.changes]
        made = [seq for seq in seqs if self._durable.get(seq, "stalled") not in BY_TIME | NOTES]
        self.must(not made, "S6", f"{name} was {how} and is on the disk: events {made}", job_id)

    def _check_written(self, name: str, decision: Decision, key: IdempotencyKey | None, response: Response) -> None:
        for event in decision.changes:
            written = event.seq in self._durable
            self.must(written, "S6", f"{name} was answered and {event.type} is not on the disk", event.job_id)
            self.acknowledged[event.seq] = (event.type, event.job_seq, event.job_id)
        if key is not None and decision.changes and name != "Claim" and not response.grants:
            row = self._key_rows.get(key.digest)
            same = row is not None and row.body == msgspec.json.encode(response.data)
            self.must(same, "S9", f"the response of {name} was not stored under its key")

    def note_delivery(self, who: str, response: Response) -> None:
        """Note that the caller has received the response."""
        for job_id, granted in _grants(response):
            owner = self.received.setdefault(granted.fencing_token, who)
            self.must(owner == who, "S1", f"grant {granted.fencing_token} was given to {owner} and to {who}", job_id)


def _grants(response: Response) -> list[tuple[str, GrantView]]:
    if not response.grants:
        return []
    data = response.data
    views = [data] if isinstance(data, GrantView) else data.grants
    return [(view.job.id, view) for view in views]


def _first(ids: list[str]) -> str | None:
    return ids[0] if ids else None
