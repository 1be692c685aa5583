"""One of the small worlds, walked through whole, and the beginning of each other one.

All of them: `python -m tests.proof.small_world`.
"""

from __future__ import annotations

from typing import get_args

import pytest
from msgspec.structs import replace

from jobd.core import transitions, worker_rules
from jobd.core.changeset import Draft
from jobd.model.commands import (
    AnyCommand,
    ApplyEndings,
    ApplyPlan,
    AuditLog,
    EndPauses,
    Export,
    ExtendAfterPause,
    GetVersion,
    ImportCheck,
    LateResults,
    ListJobs,
    Locks,
    Ping,
    Preview,
    Queues,
    RecordAction,
    Report,
    SearchJobs,
    Tick,
    Timeline,
    Workers,
)
from jobd.model.job import Job
from tests.proof.simulation.promises import Broken
from tests.proof.small_world import WORLDS, Walk, World, main

BEGINNING = 1_500  # states

pytestmark = pytest.mark.timeout(300)  # all of it is computing

# What one job can come to in a world of one attempt, where a lock that has expired is death.
EVENTS = {
    "created", "imported", "granted", "progress", "extended", "completed", "failed", "released", "undelivered",
    "cancelled", "stalled", "late_result", "late_call", "adopted", "force_failed", "force_reset", "transitioned",
    "fixed", "deleted", "queue_paused", "queue_resumed",
}  # fmt: skip
REFUSALS = {
    "job_not_found", "job_exists", "already_locked", "queue_paused", "invalid_transition", "lock_lost",
    "max_processing_time_exceeded", "late_result_not_found", "worker_not_found", "worker_not_silent",
}  # fmt: skip


# These look at many jobs, at history, or keep the clock: to one job they do nothing. An absence has a world of its own.
NOT_PLAYED = {
    EndPauses,
    ListJobs,
    SearchJobs,
    ImportCheck,
    Preview,
    ApplyPlan,
    ApplyEndings,
    Export,
    AuditLog,
    RecordAction,
    Timeline,
    GetVersion,
    LateResults,
    Locks,
    Queues,
    Workers,
    Ping,
    Tick,
    Report,
    ExtendAfterPause,
}


def test_every_state_of_a_world() -> None:
    """There is an end to them, and nothing that can happen to a job is left out."""
    walk = Walk(World("one tick", on_stall="fail", ttl=1, stuck_after=0, ceiling=1, max_stalls=0))
    assert walk.run() > 3_000
    assert walk.decisions > 50 * len(walk.states)
    assert walk.played | NOT_PLAYED == set(get_args(AnyCommand))
    assert walk.fired.keys() == {f"event {kind}" for kind in EVENTS} | {f"refusal {code}" for code in REFUSALS}


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_the_beginning_of_every_world(world: World) -> None:
    assert Walk(world).run(BEGINNING) >= BEGINNING


def test_a_state_tells_how_it_was_reached() -> None:
    walk = Walk(WORLDS[0])
    walk.run(200)
    path = walk.path(list(walk.states)[-1])
    assert path[0] == "the beginning"
    assert 2 < len(path) < 10


def test_a_rule_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that lives on at its very end, an ending that is taken from anybody, a grant that keeps its attempt."""

    def late(job: Job, lease_ms: int) -> bool:
        return job.status == "processing" and (job.lease is None or job.grant is None or lease_ms > job.lease.stuck)

    right, grant = worker_rules._held, transitions.grant

    def anybody(draft: Draft, command: worker_rules.Holders, verb: str) -> object:
        job = draft.book.get(command.id)
        if job is not None and job.grant is not None:
            command = replace(command, lock_id=job.grant.lock_id)
        return right(draft, command, verb)

    def free(draft: Draft, job: Job, *given: object) -> Job:
        return grant(draft, replace(job, attempt=job.attempt - 1), *given)  # type: ignore[arg-type]

    for room, name, wrong in (
        (transitions, "is_stuck", late),
        (worker_rules, "_held", anybody),
        (transitions, "grant", free),
    ):
        with monkeypatch.context() as patch, pytest.raises(Broken):  # noqa: PT012
            patch.setattr(room, name, wrong)
            Walk(WORLDS[3]).run(BEGINNING)


def test_the_program_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--limit", "100"]) == 0
    told = capsys.readouterr().out
    assert all(world.name in told for world in WORLDS)
    assert "every promise holds" in told
