"""Bugs in the rules and in the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from jobd.core import transitions, views
from jobd.core.rules import create_rules, late_result_rules, maintenance_rules, plan_rules, worker_rules
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.model.clocks import LockMs
from jobd.model.commands import Adopt, Bulk, ClockTrust, Moment, PlanAction, Recover
from jobd.model.errors import ApiException
from jobd.model.events import Event, stored_changes
from jobd.model.job import COUNTER_MASK, Job, new_epoch
from jobd.model.storage import OpenedStore
from tests.proof.planted.registry import ACTOR, RULES, SIMULATION, bug


@bug(worker_rules._held, found_by=RULES)
def no_fence_on_complete(held: Any, tx: Transaction, command: worker_rules.Holders, verb: str) -> Any:
    """Complete accepts an older grant."""
    job = tx.state.get(command.id)
    if verb == "complete" and job is not None and job.status == "processing" and job.deadlines is not None:
        return job
    return held(tx, command, verb)


@bug(create_rules.bulk, found_by=RULES)
def rejected_bulk_creates_jobs(bulk: Any, tx: Transaction, command: Bulk) -> Any:
    """A rejected bulk keeps its first jobs."""
    try:
        return bulk(tx, command)
    except ApiException:
        create_rules.create(tx, command.jobs[0])
        raise


@bug(maintenance_rules.recover, found_by=RULES)
def recovered_before_its_time(recover: Any, tx: Transaction, command: Recover) -> Any:
    """An expired lock counts as stalled."""
    for job_id in list(tx.state.processing.expired_locks):
        transitions.stall(tx, tx.state.processing[job_id], "too early")
    return recover(tx, command)


@bug(maintenance_rules._postponed, found_by=RULES)
def downtime_not_credited(postponed: Any, deadlines: Any, since: LockMs, until: LockMs) -> Any:
    """Downtime ends locks."""
    return deadlines


@bug(maintenance_rules._is_past, found_by=ACTOR)
def deletion_by_a_suspect_clock(is_past: Any, job: Job, at: Moment) -> Any:
    """A clock that jumps a year ahead empties the store."""
    return is_past(job, replace(at, trusted=None))


@bug(late_result_rules.adopt, found_by=RULES)
def late_result_adopted_twice(adopt: Any, tx: Transaction, command: Adopt) -> Any:
    """A late result replaces the result of a completed job."""
    job = tx.state.get(command.id)
    late = tx.late.results.get(job.seq, []) if job is not None else []
    if job is not None and job.status == "completed" and late:
        done = transitions.completed(job, late[-1].result)
        return views.job_response(tx, transitions.finish(tx, job, done, "adopted", "completed", job.ended))
    return adopt(tx, command)


@bug(late_result_rules._is_unclaimed, found_by=RULES)
def late_result_overrides_an_operator(is_unclaimed: Any, tx: Transaction, job: Job, lock_id: str) -> bool:
    """A job that an operator put back is completed by the worker that lost it."""
    ended = job.ended
    return ended is not None and ended.lock_id == lock_id and ended.rule == "recovery" and job.status == "queued"


@bug(plan_rules.version, found_by="tests/unit/maintenance/test_plan_runner.py")
def plan_applied_blindly(version: Any, job: Job, late: int | None = None, action: PlanAction | None = None) -> str:
    """A plan cancels a job that a worker has taken since the plan was made."""
    return str(job.seq)


@bug(Transaction._restore, found_by=RULES)
def undo_forgets_an_index(restore: Any, self: Transaction, changes: Sequence[Event], restores: Any) -> None:
    """An undone command leaves its mark in the average processing time."""
    started_sum = self.state.processing.started_sum
    restore(self, changes, restores)
    self.state.processing.started_sum = started_sum


@bug(stored_changes, found_by=SIMULATION)
def event_omits_a_change(stored: Any, event: Event) -> Any:
    """The journal lacks updated_at."""
    if event.before is None or event.after is None:
        return stored(event)
    return stored(replace(event, after=replace(event.after, updated_at=event.before.updated_at)))


@bug(new_epoch, found_by="tests/unit/storage/test_startup.py")
def tokens_of_a_backup_repeat(epoch: Any, highest: int, now_ms: int) -> int:
    """Two restores of one backup issue equal tokens."""
    return highest + 1


@bug(State.numbers, found_by=ACTOR)
def suspicion_lost_in_a_restart(numbers: Any, self: State, lock_ms: LockMs, wall_ms: int, clock: ClockTrust) -> Any:
    """The next start trusts a clock that was suspect, and deletes by it."""
    return numbers(self, lock_ms, wall_ms, replace(clock, suspect=False))


@bug(State.opened, found_by=SIMULATION)
def tokens_reused_after_a_restart(opened: Any, found: OpenedStore) -> State:
    """Tokens continue from the live grants."""
    state: State = opened(found)
    held = [job.grant.fencing_token & COUNTER_MASK for job in state.processing.values() if job.grant is not None]
    state.next_token = max(held, default=0) + 1
    return state


@bug(State.opened, found_by=SIMULATION)
def job_numbers_reused_after_a_restart(opened: Any, found: OpenedStore) -> State:
    """A new job gets a deleted one's number."""
    state: State = opened(found)
    state.next_job = max((job.seq for job in found.live()), default=0) + 1
    return state
