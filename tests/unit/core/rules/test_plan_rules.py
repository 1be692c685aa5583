"""Plans of maintenance: recover-stuck and cleanup, for jobs that the daemon selects."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from jobd.core.guards import CLOCK_SUSPECT
from jobd.core.rules import maintenance_rules, plan_rules
from jobd.core.rules.plan_rules import version
from jobd.core.transaction import Transaction
from jobd.maintenance import plan_builder, plan_runner
from jobd.maintenance.plan_runner import Planner
from jobd.model import commands as cmd
from jobd.model import responses
from jobd.model.errors import ApiError, ApiException
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, Job, requeues_on_stall
from tests.support.factories import full_job
from tests.support.plans import apply_plan, make_plan
from tests.support.rule_harness import RuleHarness
from tests.support.virtual_engine import WALL, VirtualEngine, in_engine, in_virtual_time

NO_MORE = "It is no longer due for deletion or expiry."


# -- what would become of a job ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "progress", "repeated"),
    [
        ({}, 0, True),
        ({"max_attempts": 1}, 40, False),
        ({"max_attempts": 2}, 40, True),
        ({"on_stall": "requeue"}, 40, True),
        ({"on_stall": "fail", "max_attempts": 2}, 0, False),
        ({"on_stall": "requeue", "max_stalls": 0}, 0, False),
    ],
)
def test_the_planned_status_of_a_stalled_job_matches_the_recovery(
    options: Any, progress: int, *, repeated: bool
) -> None:
    rules = RuleHarness()
    lock_id = rules.held(**options)
    if progress:
        rules.progress(lock_id, progress)
    rules.advance(HOUR_MS)
    job = rules.job()
    assert requeues_on_stall(job) == repeated
    assert (
        plan_rules.status_after("recover-stuck", job)
        == plan_rules.status_after("cleanup", job)
        == ("queued" if repeated else "failed")
    )
    rules.accept(cmd.Recover(limit=1))
    assert rules.job().status == ("queued" if repeated else "failed")


def test_the_planned_statuses_and_the_actions_allowed_on_a_full_disk(rules: RuleHarness) -> None:
    assert plan_rules.status_after("cleanup", rules.create()) == "failed"
    assert plan_rules.status_after("cleanup", rules.completed("b")) is None
    assert plan_rules.status_after("retry", rules.job()) == "queued"
    endings = {action for action in get_args(cmd.PlanAction) if plan_rules.is_ending(action)}
    assert endings == {"cancel", "force-fail", "delete", "recover-stuck", "cleanup"}


def test_for_maintenance_actions_reports_change_the_version() -> None:
    job = full_job()
    assert job.deadlines is not None
    alive = replace(job, deadlines=replace(job.deadlines, stall_due=job.deadlines.stall_due + 1))
    further = replace(job, progress=job.progress + 1)
    for action in get_args(cmd.PlanAction):
        versions = {version(each, None, action) for each in (job, alive, further)}
        assert len(versions) == (3 if action in cmd.MAINTENANCE_ACTIONS else 1), action
    assert version(job, None, "delete") == version(job)


def test_a_cleanup_plan_notes_only_late_results_that_it_deletes() -> None:
    stalled, old = responses.PlannedJob("a", "processing", "queued", 1), responses.PlannedJob("b", "failed", None, 2)
    assert responses.plan_late_results_note("cleanup", [stalled]) is None
    expected = "It has 2 late results that were not adopted. They are deleted with the job."
    assert responses.plan_late_results_note("cleanup", [stalled, old]) == expected
    assert responses.plan_late_results_note("retry", [stalled]) is not None


def transaction(rules: RuleHarness) -> Transaction:
    tx = Transaction(rules.state, rules.moment, rules.policy)
    tx.begin(cmd.IssuedCommand(cmd.Recover(limit=1), "daemon", b"s" * 16))
    return tx


def test_maintenance_of_one_job_returns_the_result_or_an_error(rules: RuleHarness) -> None:
    rules.create("a")
    for rule in (maintenance_rules.recover_one, maintenance_rules.clean_one):
        tx = transaction(rules)
        with pytest.raises(ApiException) as caught:
            rule(tx, cmd.JobCommand(id="a"))
        assert caught.value.error == ApiError("invalid_transition", NO_MORE, {"job_id": "a", "status": "queued"})
    rules.start("a")
    rules.advance(HOUR_MS)
    rules.create("b", expires_at=rules.now + 5)
    rules.advance(10)
    for rule, job_id in (
        (maintenance_rules.recover_one, "a"),
        (maintenance_rules.clean_one, "a"),
        (maintenance_rules.clean_one, "b"),
    ):
        tx = transaction(rules)
        assert rule(tx, cmd.JobCommand(id=job_id)) == responses.Response(responses.MaintenanceResult(1))
        assert len(tx.changes) == 1
        tx.undo()


# -- the rule ---------------------------------------------------------------------------------------------------------


def known(rules: RuleHarness, action: cmd.PlanAction, *ids: str) -> list[cmd.ExpectedVersion]:
    jobs = [rules.job(job_id) for job_id in ids]
    return [cmd.ExpectedVersion(job.id, version(job, rules.state.late_results.get(job.seq), action)) for job in jobs]


def apply(rules: RuleHarness, action: cmd.PlanAction, jobs: list[cmd.ExpectedVersion]) -> responses.PlanSlice:
    command = cmd.ApplyEndings(action=action, jobs=jobs, reason="the operator's")
    done: responses.PlanSlice = rules.accept(command, admin=True, by="admin:eve")
    return done


def due(rules: RuleHarness) -> list[str]:
    """A stuck job, an overdue one, one past its retention, and one of each kind that is not."""
    rules.create("late", expires_at=rules.now + MINUTE_MS)
    rules.create("waits", expires_at=rules.now + 2 * HOUR_MS)
    for job_id, after in (("old", MINUTE_MS), ("kept", 2 * HOUR_MS)):
        rules.accept(cmd.Complete(id=job_id, lock_id=rules.held(job_id), expires_at=rules.now + after))
    rules.held("stuck")
    rules.advance(HOUR_MS)
    rules.held("held")
    return ["stuck", "late", "old", "waits", "kept", "held"]


@pytest.mark.parametrize("action", sorted(cmd.MAINTENANCE_ACTIONS))
def test_a_plan_changes_due_jobs_and_rejects_others(rules: RuleHarness, action: cmd.PlanAction) -> None:
    ids = due(rules)
    done = apply(rules, action, known(rules, action, *ids))
    some = ids[:1] if action == "recover-stuck" else ids[:3]
    assert (done.applied, done.changed_meanwhile) == (len(some), [])
    rejected = [rules.job(each) for each in ids[len(some) :]]
    assert done.rejected == [responses.UnchangedJob(job.id, "", job.status, NO_MORE) for job in rejected]
    assert rules.job("stuck").status == "queued"
    assert ("old" in rules.rows) == (action == "recover-stuck")
    assert rules.job("late").status == ("queued" if action == "recover-stuck" else "failed")
    events_by_job = {event.job_id: event for event in rules.events[-len(some) :]}
    assert [events_by_job[each].type for each in some] == ["stalled", "expired", "deleted"][: len(some)]
    assert all(event.by == "admin:eve" for event in events_by_job.values())
    assert "Worker w-1 reported no progress" in (events_by_job["stuck"].reason or ""), (
        "its own cause, not the operator's"
    )
    repeated = apply(rules, action, known(rules, action, "stuck"))
    assert (repeated.applied, len(repeated.rejected)) == (0, 1)


def test_a_plan_applied_while_the_clock_is_suspect_says_why_it_deletes_nothing(rules: RuleHarness) -> None:
    due(rules)
    seen = known(rules, "cleanup", "stuck", "late", "old")
    rules.trusted = rules.now - HOUR_MS
    done = apply(rules, "cleanup", seen)
    assert (done.applied, done.changed_meanwhile) == (1, [])
    assert [(each.id, each.reason) for each in done.rejected] == [(each, CLOCK_SUSPECT) for each in ("late", "old")]


@pytest.mark.parametrize("how", ["extend", "progress", "complete", "recover", "delete"])
@pytest.mark.parametrize("action", sorted(cmd.MAINTENANCE_ACTIONS))
def test_a_plan_skips_revived_jobs(rules: RuleHarness, action: cmd.PlanAction, how: str) -> None:
    lock_id = rules.held(max_attempts=2)
    rules.advance(20 * MINUTE_MS)  # silent, but not past its progress timeout
    seen = known(rules, action, "a")
    if how == "extend":
        rules.accept(cmd.Extend(id="a", lock_id=lock_id, additional_ms=1))
        rules.advance(HOUR_MS)  # stuck again, at another time
    elif how == "progress":
        rules.progress(lock_id, 40)
        rules.advance(HOUR_MS)
    elif how == "complete":
        rules.accept(cmd.Complete(id="a", lock_id=lock_id))
    elif how == "recover":
        rules.accept(cmd.Recover(limit=1))
    else:
        rules.accept(cmd.Complete(id="a", lock_id=lock_id))
        rules.accept(cmd.Delete(id="a"))
    before, count = rules.rows.get("a"), len(rules.events)
    done = apply(rules, action, seen)
    gone = "There is no job a: it was never created, or it was deleted. "
    gone += "Search the list of jobs: GET /v1/jobs or jobctl jobs."
    status, why = (None, gone) if before is None else (before.status, "It has changed since the plan was made.")
    assert done == responses.PlanSlice(0, [responses.UnchangedJob("a", "", status, why)], [])
    assert (rules.rows.get("a"), len(rules.events)) == (before, count)


def test_maintenance_of_an_unknown_job_is_rejected(rules: RuleHarness) -> None:
    """They check for themselves, like the rule of any other action."""
    tx = transaction(rules)
    for rule in (maintenance_rules.recover_one, maintenance_rules.clean_one):
        with pytest.raises(ApiException, match="job_not_found"):
            rule(tx, cmd.JobCommand(id="gone"))


# -- made, and applied ------------------------------------------------------------------------------------------------


async def due_plan(engine: VirtualEngine) -> str:
    """Create jobs that are due for maintenance and as many that are not; return the lock of the stuck one."""
    lock_id = await engine.held("stuck", lock_ttl_ms=SECOND_MS)
    await engine.yes(cmd.Create(id="late", expires_at=engine.now + SECOND_MS))
    await engine.yes(cmd.Import(id="old", status="failed", error_message="x", expires_at=WALL + SECOND_MS))
    await engine.yes(cmd.Import(id="kept", status="failed", error_message="x", expires_at=engine.now + HOUR_MS))
    await asyncio.sleep(120)
    await engine.held("held")
    await engine.yes(cmd.Create(id="waits"))
    return lock_id


def moves(plan: responses.PlanView) -> list[tuple[str, str, str | None]]:
    return [(job.id, job.from_, job.to) for job in plan.jobs]


@in_engine()
async def test_a_maintenance_plan_shows_what_a_cleanup_run_would_do_and_does_it_once(engine: VirtualEngine) -> None:
    await due_plan(engine)
    plan = await make_plan(engine.planner, "r", action="recover-stuck")
    assert moves(plan) == [("stuck", "processing", "queued")]
    plan = await make_plan(engine.planner, action="cleanup", reason="now")
    assert moves(plan) == [("stuck", "processing", "queued"), ("late", "queued", "failed"), ("old", "failed", None)]
    assert (plan.filter, plan.more, plan.next_cursor, plan.skipped) == (None, False, None, [])
    assert plan.scope is not None
    assert "validation fixes are not part of a plan" in plan.scope
    assert (await engine.yes(cmd.Get(id="stuck"))).status == "processing", "nothing is done yet"
    result = await apply_plan(engine.planner)
    assert (result.applied, result.changed_meanwhile, result.rejected) == (3, [], [])
    assert (await engine.yes(cmd.Get(id="late"))).status == "failed"
    assert (await engine.no(cmd.Get(id="old"))).code == "job_not_found"
    rows = [(row.what, row.reason, row.who) for row in engine.disk.audited.values()]
    assert rows == [("plan-cleanup", "now", "eve"), ("plan-cleanup", None, "eve")], "a slice, and the whole"
    assert (await apply_plan(engine.planner)).repeated
    other = await apply_plan(engine.planner, "r")
    assert (other.applied, [each.id for each in other.changed_meanwhile]) == (0, ["stuck"])
    assert (await make_plan(engine.planner, "n", action="cleanup")).count == 0


@pytest.mark.parametrize(("action", "count"), [("recover-stuck", 1), ("cleanup", 3)])
@in_engine()
async def test_jobs_that_revived_since_the_plan_are_listed(
    engine: VirtualEngine, action: cmd.PlanAction, count: int
) -> None:
    lock_id = await due_plan(engine)
    assert (await make_plan(engine.planner, action=action)).count == count
    await engine.yes(cmd.Progress(id="stuck", lock_id=lock_id, progress=1))
    result = await apply_plan(engine.planner)
    assert (result.applied, [each.id for each in result.changed_meanwhile]) == (count - 1, ["stuck"])
    assert (await engine.yes(cmd.Get(id="stuck"))).status == "processing"
    assert (await make_plan(engine.planner, "q", action=action)).count == 0


@in_engine()
async def test_maintenance_plans_take_no_selection(engine: VirtualEngine) -> None:
    for action in get_args(cmd.PlanAction):
        for name, given in (("filter", cmd.PlanFilter()), ("ids", ["a"]), ("cursor", "failed.7")):
            wrong = await engine.planner.make(cmd.MakePlan(action=action, **{name: given}), "x")  # type: ignore[arg-type]
            if action in cmd.MAINTENANCE_ACTIONS:
                assert isinstance(wrong, ApiError)
                assert (wrong.code, wrong.details["field"]) == ("invalid_request", f"$.{name}")
                assert f"{action} does not accept `{name}`" in wrong.message
    engine.actor.stop()
    rejected = await engine.planner.make(cmd.MakePlan(action="cleanup"), "x")
    assert isinstance(rejected, ApiError)
    assert rejected.code == "shutting_down"


@in_engine()
async def test_while_the_clock_is_suspect_no_deletion_is_planned(engine: VirtualEngine) -> None:
    await due_plan(engine)
    engine.step_ms = 2 * DAY_MS
    assert [job.id for job in (await make_plan(engine.planner, action="cleanup")).jobs] == ["stuck"]


@in_engine()
async def test_on_a_full_disk_maintenance_plans_are_allowed(engine: VirtualEngine) -> None:
    await due_plan(engine)
    await make_plan(engine.planner, action="cleanup")
    engine.disk.fill()
    await engine.no(cmd.Create(id="x"))
    assert (await apply_plan(engine.planner)).applied == 3
    engine.disk.free()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_builder, "MAX_PLAN", 3)
    monkeypatch.setattr(plan_builder, "PAGE", 2)


async def crowd(engine: VirtualEngine, stalled: int, late: int, old: int) -> None:
    for n in range(stalled):
        await engine.held(f"s{n}", lock_ttl_ms=SECOND_MS)
    for n in range(late):
        await engine.yes(cmd.Create(id=f"l{n}", expires_at=engine.now + SECOND_MS))
    for n in range(old):
        expires_at = WALL + (n + 1) * SECOND_MS
        await engine.yes(cmd.Import(id=f"o{n}", status="failed", error_message="x", expires_at=expires_at))
    await asyncio.sleep(120)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("counts", "found", "more"),
    [
        ((3, 0, 0), ["s0", "s1", "s2"], False),
        ((4, 0, 0), ["s0", "s1", "s2"], True),
        ((2, 2, 0), ["s0", "s1", "l0"], True),
        ((0, 0, 3), ["o0", "o1", "o2"], False),
        ((0, 0, 5), ["o0", "o1", "o2"], True),
        ((1, 1, 1), ["s0", "l0", "o0"], False),
        ((2, 1, 1), ["s0", "s1", "l0"], True),
    ],
)
@in_engine()
async def test_a_plan_is_limited_and_the_rest_is_planned_later(
    engine: VirtualEngine, counts: tuple[int, int, int], found: list[str], *, more: bool
) -> None:
    await crowd(engine, *counts)
    plan = await make_plan(engine.planner, action="cleanup")
    assert ([job.id for job in plan.jobs], plan.more, plan.next_cursor) == (found, more, None)
    await apply_plan(engine.planner)
    assert (await make_plan(engine.planner, "q", action="cleanup")).count == sum(counts) - 3


@pytest.mark.parametrize(("counts", "found"), [((3, 0, 0), 0), ((0, 0, 3), 2)])
@pytest.mark.usefixtures("small")
@in_virtual_time
async def test_a_plan_ends_at_its_time_limit(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int, int], found: int
) -> None:
    monkeypatch.setattr(plan_builder, "MAX_PLANNING_S", 0)
    async with VirtualEngine() as engine:
        await crowd(engine, *counts)
        plan = await make_plan(Planner(engine.actor, engine.clock), action="cleanup")
        assert (plan.count, plan.more) == (found, True)


@pytest.mark.usefixtures("small")
@in_engine()
async def test_a_job_that_revives_during_planning_is_not_in_the_plan(engine: VirtualEngine) -> None:
    locks = [await engine.held(f"s{n}", lock_ttl_ms=SECOND_MS) for n in range(3)]
    await asyncio.sleep(120)
    making = asyncio.create_task(make_plan(Planner(engine.actor, engine.clock), action="recover-stuck"))
    await asyncio.sleep(plan_builder.PAUSE_S / 2)
    await engine.yes(cmd.Progress(id="s2", lock_id=locks[2], progress=1))
    assert [job.id for job in (await making).jobs] == ["s0", "s1"]


@in_engine()
async def test_a_job_that_is_no_longer_finished_is_not_in_the_plan(engine: VirtualEngine) -> None:
    await crowd(engine, 0, 0, 2)
    expired = engine.disk.expired_jobs

    async def moved_on(now: int, limit: int, skip: int = 0) -> list[str]:
        found = await expired(now, limit, skip)
        if not skip:
            await engine.yes(cmd.ForceReset(id="o0"))
        return found

    engine.disk.expired_jobs = moved_on  # type: ignore[method-assign]
    plan = await make_plan(Planner(engine.actor, engine.clock), action="cleanup")
    assert [job.id for job in plan.jobs] == ["o1"]


@in_engine()
async def test_a_job_found_twice_is_in_the_plan_once(engine: VirtualEngine) -> None:
    """A damaged row that cannot be moved counts in the order but is not listed."""
    await crowd(engine, 0, 0, 3)
    pages = {0: ["o0", "o1"], 2: ["o1", "o2"]}

    async def overlapping(now: int, limit: int, skip: int = 0) -> list[str]:
        return pages.get(skip, [])

    engine.disk.expired_jobs = overlapping  # type: ignore[method-assign]
    plan = await make_plan(Planner(engine.actor, engine.clock), action="cleanup")
    assert [job.id for job in plan.jobs] == ["o0", "o1", "o2"]


@in_engine()
async def test_late_results_of_deleted_jobs_are_counted_and_change_the_version(engine: VirtualEngine) -> None:
    locks = {}
    for job_id in ("a", "b"):
        locks[job_id] = await engine.held(job_id)
        await engine.yes(cmd.ForceFail(id=job_id))
    await engine.no(cmd.Complete(id="a", lock_id=locks["a"], file_path="/out"))
    await asyncio.sleep(40 * 24 * 3600)
    plan = await make_plan(engine.planner, action="cleanup")
    assert sorted((job.id, job.late_results) for job in plan.jobs) == [("a", 1), ("b", 0)]
    assert plan.with_late_results == 1
    await engine.no(cmd.Complete(id="b", lock_id=locks["b"], file_path="/out"))
    result = await apply_plan(engine.planner)
    assert (result.applied, [each.id for each in result.changed_meanwhile]) == (1, ["b"])
    await engine.yes(cmd.Adopt(id="b"))


@in_engine()
async def test_a_long_maintenance_plan_is_applied_in_slices(engine: VirtualEngine) -> None:
    await crowd(engine, 0, 0, plan_runner.SLICE + 5)
    assert (await make_plan(engine.planner, action="cleanup")).count == plan_runner.SLICE + 5
    assert (await apply_plan(engine.planner)).applied == plan_runner.SLICE + 5


def test_the_version_of_a_read_job_is_not_valid_for_maintenance_actions(rules: RuleHarness) -> None:
    """GetVersion returns the version for actions of operators; maintenance plans have their own."""
    rules.held()
    rules.advance(HOUR_MS)
    seen = rules.accept(cmd.GetVersion(id="a")).version
    assert apply(rules, "cleanup", [cmd.ExpectedVersion("a", seen)]).applied == 0
    job: Job = rules.job()
    assert job.status == "processing"


def test_a_command_for_a_version_that_has_changed_says_so(rules: RuleHarness) -> None:
    rules.create()
    seen = rules.accept(cmd.GetVersion(id="a")).version
    rules.start()
    rejected = rules.decide(cmd.Cancel(id="a"), admin=True, expected=seen).answer
    assert isinstance(rejected, ApiError)
    assert rejected.message == "The job has changed since you read it: it is processing now. Nothing was done."


def test_a_command_for_the_current_version_is_applied(rules: RuleHarness) -> None:
    rules.create()
    seen = rules.accept(cmd.GetVersion(id="a")).version
    assert not isinstance(rules.decide(cmd.Cancel(id="a"), admin=True, expected=seen).answer, ApiError)
    assert rules.job().status == "cancelled"
