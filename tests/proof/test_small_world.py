"""Explore the beginning of every small world. All their states: `make world`."""

from __future__ import annotations

from typing import get_args

import pytest
from msgspec.structs import replace

from jobd.core import guards, transitions
from jobd.core.rules import worker_rules
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.job import Job
from tests.proof.simulation.invariants import Violation
from tests.proof.small_world import WORLDS, Exploration, World, main

BEGINNING = 400  # states

pytestmark = pytest.mark.timeout(300)  # CPU-bound

# The events of a world of one attempt, in which an expired lock is fatal.
EVENTS = {
    "created", "imported", "granted", "progress", "extended", "completed", "failed", "released", "undelivered",
    "cancelled", "stalled", "late_result", "late_call", "adopted", "force_failed", "force_reset", "transitioned",
    "retried_by_operator", "fixed", "deleted", "queue_paused", "queue_resumed", "workers_quieted", "schedule_put",
}  # fmt: skip
ERRORS = {
    "job_not_found", "job_exists", "already_locked", "queue_paused", "invalid_transition", "lock_lost",
    "progress_timeout", "late_result_not_found", "worker_not_found", "worker_not_silent", "quiet_rule_not_found",
    "schedule_not_found",
}  # fmt: skip


# These read many jobs or history, or persist the clock: they do nothing to one job. Downtime has its own world.
NOT_PLAYED = {
    cmd.EndPauses,
    cmd.ListJobs,
    cmd.SearchJobs,
    cmd.ImportCheck,
    cmd.Preview,
    cmd.ApplyPlan,
    cmd.ApplyEndings,
    cmd.Export,
    cmd.AuditLog,
    cmd.RecordAction,
    cmd.Timeline,
    cmd.GetVersion,
    cmd.LateResults,
    cmd.Locks,
    cmd.Queues,
    cmd.WhyQueue,
    cmd.QuietRules,
    cmd.Workers,
    cmd.Goodbye,
    cmd.Ping,
    cmd.Tick,
    cmd.Report,
    cmd.ExtendAfterPause,
    cmd.KeepDue,
    cmd.WaitForJobs,
    cmd.Schedules,
    cmd.GetSchedule,
    cmd.Fire,
}


def test_every_event_of_a_world_happens_in_its_first_states() -> None:
    walk = Exploration(World("one tick", on_stall="fail", ttl=1, stall_after=0, progress_due=1, max_stalls=0))
    walk.run(2 * BEGINNING)
    assert walk.decisions > 20 * len(walk.states)
    assert walk.played | NOT_PLAYED == set(get_args(cmd.AnyCommand))
    assert walk.fired.keys() == {f"event {kind}" for kind in EVENTS} | {f"error {code}" for code in ERRORS}


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_the_first_states_of_every_world_are_explored(world: World) -> None:
    assert Exploration(world).run(BEGINNING) >= BEGINNING


def test_a_state_has_the_path_that_reaches_it() -> None:
    walk = Exploration(WORLDS[0])
    walk.run(200)
    path = walk.path(list(walk.states)[-1])
    assert path[0] == "the beginning"
    assert 2 < len(path) < 10


def test_a_rule_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is live at its expiry, an ending from any worker, a grant that does not count as an attempt."""

    def late(job: Job, lock_ms: LockMs) -> bool:
        return job.status == "processing" and (
            job.deadlines is None or job.grant is None or lock_ms > job.deadlines.stalled_at
        )

    right, grant = worker_rules._held, transitions.grant

    def anybody(tx: Transaction, command: worker_rules.Holders, verb: str) -> object:
        job = tx.state.get(command.id)
        if job is not None and job.grant is not None:
            command = replace(command, lock_id=job.grant.lock_id)
        return right(tx, command, verb)

    def free(tx: Transaction, job: Job, *given: object) -> Job:
        return grant(tx, replace(job, attempt=job.attempt - 1), *given)  # type: ignore[arg-type]

    for layer, name, wrong in (
        (guards, "is_stalled", late),
        (worker_rules, "_held", anybody),
        (transitions, "grant", free),
    ):
        with monkeypatch.context() as patch, pytest.raises(Violation):  # noqa: PT012
            patch.setattr(layer, name, wrong)
            Exploration(WORLDS[3]).run(BEGINNING)


def test_the_program_prints_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--limit", "100"]) == 0
    output = capsys.readouterr().out
    assert all(world.name in output for world in WORLDS)
    assert "every invariant holds" in output
