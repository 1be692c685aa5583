"""Bugs in the rules and in the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from jobd.core import transitions, views
from jobd.core.rules import late_result_rules, maintenance_rules, plan_rules, worker_rules
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.model.clocks import LockMs
from jobd.model.commands import Adopt, Bulk, ClockTrust, Moment, PlanAction, Recover
from jobd.model.errors import ApiError
from jobd.model.events import Change, QueuePause
from jobd.model.job import COUNTER_MASK, Job, new_epoch
from jobd.model.storage import OpenedStore
from tests.proof.planted.registry import ACTOR, RULES, SIMULATION, bug


@bug(
    "no-fence-on-complete",
    worker_rules._held,
    breaks="complete accepts an older grant",
    found_by=RULES,
)
def _(held: Any, tx: Transaction, command: worker_rules.Holders, verb: str) -> Any:
    job = tx.state.get(command.id)
    if verb == "complete" and job is not None and job.status == "processing" and job.deadlines is not None:
        return job
    return held(tx, command, verb)


@bug(
    "rejected-bulk-creates-jobs",
    worker_rules.bulk,
    breaks="a rejected bulk keeps its first jobs",
    found_by=RULES,
)
def _(bulk: Any, tx: Transaction, command: Bulk) -> Any:
    response = bulk(tx, command)
    if isinstance(response, ApiError):
        worker_rules.create(tx, command.jobs[0])
    return response


@bug(
    "recovered-before-its-time",
    maintenance_rules.recover,
    breaks="an expired lock counts as stalled",
    found_by=RULES,
)
def _(recover: Any, tx: Transaction, command: Recover) -> Any:
    for job_id in list(tx.state.expired_locks):
        transitions.stall(tx, tx.state.processing[job_id], "too early")
    return recover(tx, command)


@bug("downtime-not-credited", maintenance_rules._postponed, breaks="downtime ends locks", found_by=RULES)
def _(postponed: Any, deadlines: Any, since: LockMs, until: LockMs) -> Any:
    return deadlines


@bug(
    "deletion-by-a-suspect-clock",
    maintenance_rules._is_past,
    breaks="a clock that jumps a year ahead empties the store",
    found_by=ACTOR,
)
def _(is_past: Any, job: Job, at: Moment) -> Any:
    return is_past(job, replace(at, trusted=None))


@bug(
    "late-result-adopted-twice",
    late_result_rules.adopt,
    breaks="a late result replaces the result of a completed job",
    found_by=RULES,
)
def _(adopt: Any, tx: Transaction, command: Adopt) -> Any:
    job = tx.state.get(command.id)
    late = tx.late.results.get(job.seq, []) if job is not None else []
    if job is not None and job.status == "completed" and late:
        fields = transitions.completion(late[-1].result)
        return views.job_response(tx, transitions.finish(tx, job, "adopted", "completed", job.ended, fields))
    return adopt(tx, command)


@bug(
    "late-result-overrides-an-operator",
    late_result_rules._is_unclaimed,
    breaks="a job that an operator put back is completed by the worker that lost it",
    found_by=RULES,
)
def _(is_unclaimed: Any, tx: Transaction, job: Job, lock_id: str) -> bool:
    ended = job.ended
    return ended is not None and ended.lock_id == lock_id and ended.rule == "recovery" and job.status == "queued"


@bug(
    "plan-applied-blindly",
    plan_rules.version,
    breaks="a plan cancels a job that a worker has taken since the plan was made",
    found_by="tests/unit/maintenance/test_plan_runner.py",
)
def _(version: Any, job: Job, late: int | None = None, action: PlanAction | None = None) -> str:
    return str(job.seq)


@bug(
    "undo-forgets-an-index",
    Transaction._restore,
    breaks="an undone command leaves its mark in the average processing time",
    found_by=RULES,
)
def _(restore: Any, self: Transaction, changes: Sequence[Change], pauses: dict[str, QueuePause | None]) -> None:
    started_sum = self.state.started_sum
    restore(self, changes, pauses)
    self.state.started_sum = started_sum


@bug("event-omits-a-change", Transaction.update, breaks="the journal lacks updated_at", found_by=SIMULATION)
def _(update: Any, /, self: Transaction, job: Job, event_type: Any, *fields: Any, **more: Any) -> Job:
    after: Job = update(self, job, event_type, *fields, **more)
    change = self.changes[-1]
    assert change.event.changes is not None
    del change.event.changes["updated_at"]
    return after


@bug(
    "tokens-of-a-backup-repeat",
    new_epoch,
    breaks="two restores of one backup issue equal tokens",
    found_by="tests/unit/storage/test_startup.py",
)
def _(epoch: Any, highest: int, now_ms: int) -> int:
    return highest + 1


@bug(
    "suspicion-lost-in-a-restart",
    State.numbers,
    breaks="the next start trusts a clock that was suspect, and deletes by it",
    found_by=ACTOR,
)
def _(numbers: Any, self: State, lock_ms: LockMs, wall_ms: int, clock: ClockTrust) -> Any:
    return numbers(self, lock_ms, wall_ms, replace(clock, suspect=False))


@bug("tokens-reused-after-a-restart", State.opened, breaks="tokens continue from the live grants", found_by=SIMULATION)
def _(opened: Any, found: OpenedStore) -> State:
    state: State = opened(found)
    held = [job.grant.fencing_token & COUNTER_MASK for job in state.processing.values() if job.grant is not None]
    state.next_token = max(held, default=0) + 1
    return state


@bug(
    "job-numbers-reused-after-a-restart",
    State.opened,
    breaks="a new job gets a deleted one's number",
    found_by=SIMULATION,
)
def _(opened: Any, found: OpenedStore) -> State:
    state: State = opened(found)
    state.next_job = max((job.seq for job in found.live()), default=0) + 1
    return state
