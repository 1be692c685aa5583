"""Plans: they list their changes and apply them once, to every job that is unchanged."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core.rules import plan_rules
from jobd.core.rules.plan_rules import version
from jobd.maintenance import plan_builder, plan_runner, preview
from jobd.maintenance.plan_runner import Planner
from jobd.model import commands as cmd
from jobd.model.errors import ApiError, checked
from jobd.model.job import DAY_MS, SECOND_MS, Grant, Options
from jobd.model.responses import PlanOutcome, PlanTrial, PlanView, PreviewView, late_results_note
from jobd.model.storage import DiskFull
from jobd.model.times import utc
from jobd.storage import codec
from tests.support.factories import full_job
from tests.support.memory_storage import MemoryStorage
from tests.support.plans import EVE, apply_plan, kept_plan, make_plan
from tests.support.rule_harness import RuleHarness
from tests.support.virtual_engine import WALL, VirtualEngine, error_in, in_engine, in_virtual_time, row, until

# -- versions and rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        ("retry", {"failed", "cancelled"}),
        ("force-reset", {"processing", "failed", "cancelled"}),
        ("cancel", {"queued", "processing"}),
        ("force-fail", {"queued", "processing"}),
        ("delete", {"completed", "failed", "cancelled"}),
    ],
)
def test_an_action_is_planned_if_its_rule_allows_it(action: cmd.PlanAction, allowed: set[str]) -> None:
    rules = RuleHarness()
    rules.create("queued")
    rules.held("processing")
    rules.completed("completed")
    for job_id, end in (("failed", cmd.ForceFail(id="failed")), ("cancelled", cmd.Cancel(id="cancelled"))):
        rules.create(job_id)
        rules.accept(end)
    jobs = {status: rules.job(status) for status in ("queued", "processing", "completed", "failed", "cancelled")}
    assert {status for status, job in jobs.items() if plan_rules.skip_reason(action, job) is None} == allowed
    assert all(job.status == status for status, job in jobs.items())
    for status, job in jobs.items():
        done = rules.accept(cmd.ApplyPlan(action=action, jobs=[cmd.ExpectedVersion(job.id, version(job))]), admin=True)
        assert done.applied == (status in allowed)
        if done.applied:
            there = rules.state.get(job.id)
            assert plan_rules.status_after(action, job) == (None if there is None else there.status)


@pytest.mark.parametrize(
    ("action", "status", "error", "found"),
    [
        ("retry", None, None, ["failed", "cancelled"]),
        ("retry", "cancelled", None, ["cancelled"]),
        ("retry", "queued", None, []),
        ("retry", None, "0" * 12, ["failed"]),
        ("force-fail", "queued", "0" * 12, ["queued"]),
        ("force-fail", None, "0" * 12, []),
    ],
)
def test_an_error_filter_selects_failed_jobs_unless_a_status_is_given(
    action: cmd.PlanAction, status: Any, error: str | None, found: list[str]
) -> None:
    assert plan_rules.statuses(action, cmd.PlanFilter(status=status, error=error)) == found


def test_a_version_is_short_and_unique() -> None:
    assert len(version(full_job())) == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq", 99),
        ("status", "failed"),
        ("options", Options(queue="another")),
        *((name, 1) for name in ("run_at", "attempt", "started_at", "finished_at", "expires_at")),
        ("stalls", 9),
        ("grant", Grant("lock", 1, "w-1", 0, 60_000, 0, 90_000)),
        *((name, None) for name in ("ended", "result", "error")),
    ],
)
def test_every_field_of_a_job_changes_its_version(field: str, value: Any) -> None:
    assert version(replace(full_job(), **{field: value})) != version(full_job())


def test_heartbeats_do_not_change_the_version() -> None:
    rules = RuleHarness()
    rules.create("a", max_attempts=3)
    seen = [version(rules.job())]

    def changed() -> bool:
        seen.append(version(rules.job()))
        return seen[-1] not in seen[:-1]

    lock_id = rules.start("a")
    assert changed()
    rules.advance(5)
    rules.progress(lock_id, 50)
    assert not changed()
    rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="x", retry_after_ms=0))
    assert changed()
    lock_id = rules.start("a")
    assert changed()
    rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="x", retry_after_ms=0))
    assert changed()
    rules.accept(cmd.Update(id="a", priority=3), admin=True)
    assert changed()
    rules.accept(cmd.ForceFail(id="a"), admin=True)
    assert changed()
    rules.accept(cmd.ForceReset(id="a"), admin=True)
    assert changed()
    rules.accept(cmd.ForceFail(id="a"), admin=True)
    assert changed() or rules.now == rules.job().finished_at


def test_a_job_read_from_its_row_has_the_same_version() -> None:
    job = full_job()
    repeated = codec.JobReader().job(codec.with_checksum(codec.job_row(job)))
    assert version(repeated) == version(job)
    assert job.result is not None
    other = replace(job, result=replace(job.result, metadata=Raw(b"{}")))
    assert version(other) != version(job)


def test_changed_jobs_are_skipped_and_rejected_ones_affect_no_other() -> None:
    rules = RuleHarness()
    for job_id in ("a", "b", "c"):
        rules.create(job_id)
    known = {job_id: cmd.ExpectedVersion(job_id, version(rules.job(job_id))) for job_id in ("a", "b", "c")}
    rules.start("b")
    error, odd = cmd.ExpectedVersion("gone", "x"), cmd.ExpectedVersion("d", "y")
    rules.completed("d")
    odd = cmd.ExpectedVersion("d", version(rules.job("d")))
    command = cmd.ApplyPlan(action="cancel", jobs=[known["a"], known["b"], error, odd, known["c"]], reason="enough")
    done = rules.accept(command, admin=True, by="admin:eve")
    assert done.applied == 2
    assert [(each.id, each.now) for each in done.changed_meanwhile] == [("b", "processing"), ("gone", None)]
    assert [(each.id, each.now) for each in done.rejected] == [("d", "completed")]
    assert [(rules.job(job_id).status) for job_id in ("a", "b", "c")] == ["cancelled", "processing", "cancelled"]
    assert [(event.by, event.reason) for event in rules.events[-2:]] == [("admin:eve", "enough")] * 2
    assert all("changed since" in each.reason or "no job" in each.reason for each in done.changed_meanwhile)


@pytest.mark.parametrize("action", sorted(set(get_args(cmd.PlanAction)) - cmd.MAINTENANCE_ACTIONS.keys()))
def test_the_reason_of_a_plan_is_the_reason_of_its_changes(action: cmd.PlanAction) -> None:
    rules = RuleHarness()
    rules.create("a")
    if action in ("retry", "delete"):
        rules.accept(cmd.ForceFail(id="a", reason="another"))
    elif action == "force-reset":
        rules.start("a")
    request = cmd.ApplyPlan(action=action, jobs=[cmd.ExpectedVersion("a", version(rules.job()))], reason="enough")
    assert rules.accept(request, admin=True).applied == 1
    assert rules.last().reason == "enough"


@pytest.mark.parametrize("detour", [False, True])
def test_a_command_with_an_expected_version_applies_to_that_version_only(*, detour: bool) -> None:
    rules = RuleHarness()
    rules.create("a")
    rules.accept(cmd.ForceFail(id="a"))
    seen = rules.accept(cmd.GetVersion(id="a"))
    assert (seen.id, seen.version) == ("a", version(rules.job()))
    if detour:
        rules.accept(cmd.ForceReset(id="a"))
        rules.advance(1)
        rules.accept(cmd.ForceFail(id="a"))
    decision = rules.decide(cmd.Delete(id="a"), expected=seen.version)
    assert isinstance(decision.answer, ApiError) == detour
    assert ("a" in rules.rows) == detour
    if isinstance(decision.answer, ApiError):
        assert decision.changes == []
        assert (decision.answer.code, decision.answer.details) == (
            "invalid_transition", {"job_id": "a", "status": "failed"},
        )  # fmt: skip
    assert error_in(rules.decide(cmd.Delete(id="none"), expected=seen.version).answer).code == "job_not_found"


@pytest.mark.parametrize("how", ["expected", "plan"])
def test_a_late_result_that_arrives_before_the_plan_is_applied_changes_the_version(how: str) -> None:
    rules = RuleHarness()
    lock_id = rules.held()
    rules.accept(cmd.ForceFail(id="a"))
    seen = rules.accept(cmd.GetVersion(id="a")).version
    rules.reject(cmd.Complete(id="a", lock_id=lock_id, file_path="/out"), "lock_lost")
    for left_alone in (True, False):
        if how == "expected":
            assert isinstance(rules.decide(cmd.Delete(id="a"), expected=seen).answer, ApiError) == left_alone
        else:
            done = rules.accept(cmd.ApplyPlan(action="delete", jobs=[cmd.ExpectedVersion("a", seen)]), admin=True)
            assert len(done.changed_meanwhile) == left_alone
        assert ("a" in rules.rows) == left_alone or how == "expected"
        seen = rules.accept(cmd.GetVersion(id="a")).version if left_alone else ""


def test_the_latest_late_result_is_remembered_for_a_limited_number_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.core.state.LATE_KEPT", 2)
    rules = RuleHarness()
    seqs: dict[str, int | None] = {}
    for job_id in ("a", "b", "a", "c"):
        lock_id = rules.start(job_id) if job_id in rules.rows else rules.held(job_id)
        rules.accept(cmd.ForceFail(id=job_id))
        rules.reject(cmd.Complete(id=job_id, lock_id=lock_id, file_path="/out"), "lock_lost")
        seqs[job_id] = rules.last().seq
        rules.accept(cmd.ForceReset(id=job_id))
    known = {job_id: rules.state.late_results.get(rules.job(job_id).seq) for job_id in seqs}
    assert known == seqs | {"b": None}


def test_a_reverted_change_is_still_a_change() -> None:
    rules = RuleHarness()
    rules.create("a", delay_ms=1_000)
    seen = version(rules.job())
    for priority in (5, 0):
        rules.advance(1)
        rules.accept(cmd.Update(id="a", priority=priority), admin=True)
    assert version(rules.job()) != seen


@pytest.mark.parametrize(
    ("action", "late", "note"),
    [
        ("delete", [0, 0], None),
        ("retry", [], None),
        ("delete", [1], "It has 1 late result that was not adopted. It is deleted with the job."),
        ("delete", [0, 2], "1 of these jobs has 2 late results that were not adopted. They are deleted with the job."),
        (
            "delete",
            [1, 1],
            "2 of these jobs have 2 late results that were not adopted. They are deleted with the jobs.",
        ),
        (
            "force-fail",
            [1, 0],
            "1 of these jobs has 1 late result that was not adopted. Check whether it can be adopted instead.",
        ),
        ("retry", [3], "It has 3 late results that were not adopted. Check whether they can be adopted instead."),
    ],
)
def test_the_sentence_about_late_results(action: cmd.PlanAction, late: list[int], note: str | None) -> None:
    assert late_results_note(action, late) == note


# -- building, keeping, applying ------------------------------------------------------------------------------------


async def create_failed(engine: VirtualEngine, *ids: str, **fields: Any) -> None:
    for job_id in ids:
        await engine.yes(cmd.Create(id=job_id, **fields))
        await engine.yes(cmd.ForceFail(id=job_id))


@in_engine()
async def test_a_plan_lists_its_changes_and_applies_them(engine: VirtualEngine) -> None:
    await create_failed(engine, "a", "b")
    await engine.yes(cmd.Create(id="c"))
    plan = await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter(), reason="mended")
    assert [(job.id, job.from_, job.to) for job in plan.jobs] == [
        ("b", "failed", "queued"),
        ("a", "failed", "queued"),
    ]
    assert (plan.filter, plan.scope) == (cmd.PlanFilter(), "Only failed and cancelled jobs can be retried.")
    assert (plan.count, plan.skipped_count, plan.more, plan.next_cursor, plan.result) == (2, 0, False, None, None)
    assert plan.expires_at - plan.created_at == plan_runner.KEPT_MS
    assert (await engine.yes(cmd.Get(id="a"))).status == "failed"
    result = await apply_plan(engine.planner)
    assert (result.applied, result.changed_meanwhile, result.rejected, result.repeated) == (2, [], [], False)
    assert (await engine.yes(cmd.Get(id="a"))).status == "queued"
    assert engine.disk.events[-1].reason == "mended"
    assert engine.disk.events[-1].details == {"plan": "p", "planned": 2}
    assert kept_plan(engine.planner).result == result


async def create_with_late_results(engine: VirtualEngine, job_id: str, times: int = 1) -> None:
    """Make a failed job with this many late results."""
    await engine.yes(cmd.Create(id=job_id))
    for _ in range(times):
        lock_id = (await engine.yes(cmd.Start(id=job_id, worker="w"))).lock_id
        await engine.yes(cmd.ForceFail(id=job_id))
        await engine.no(cmd.Complete(id=job_id, lock_id=lock_id, file_path="/out"))
        await engine.yes(cmd.ForceReset(id=job_id))
    await engine.yes(cmd.ForceFail(id=job_id))


@in_virtual_time
async def test_a_plan_counts_late_results_also_from_before_a_restart() -> None:
    async with VirtualEngine() as engine:
        await create_with_late_results(engine, "a", times=2)
        await create_with_late_results(engine, "b")
        await create_with_late_results(engine, "done")
        await engine.yes(cmd.Adopt(id="done"))
        await create_failed(engine, "c")
    async with VirtualEngine(engine.disk) as engine:
        for request in ({"ids": ["a", "b", "c", "done"]}, {"filter": cmd.PlanFilter()}):
            plan = await make_plan(engine.planner, action="delete", **request)
            late = {job.id: job.late_results for job in plan.jobs}
            assert (late, plan.with_late_results) == ({"a": 2, "b": 1, "c": 0, "done": 0}, 2)
        plan = await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter())
        assert [job.late_results for job in plan.jobs] == [0, 1, 2]


@in_engine()
async def test_a_late_result_during_planning_is_counted_or_changes_its_job(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    lock_id = (await engine.yes(cmd.Start(id="a", worker="w"))).lock_id
    await engine.yes(cmd.ForceFail(id="a"))
    count_late = engine.disk.count_late_results

    async def and_then(job_seqs: list[int]) -> dict[int, int]:
        counted = await count_late(job_seqs)
        await engine.no(cmd.Complete(id="a", lock_id=lock_id, file_path="/out"))
        return counted

    engine.disk.count_late_results = and_then  # type: ignore[method-assign]
    assert (await make_plan(engine.planner, action="delete", filter=cmd.PlanFilter())).with_late_results == 0
    assert [job.id for job in (await apply_plan(engine.planner)).changed_meanwhile] == ["a"]


@in_virtual_time
async def test_a_plan_of_named_jobs_reports_missing_ones() -> None:
    storage = MemoryStorage()
    storage.put(row(1, "bad"))
    storage.bad_jobs = {"bad": "its checksum is wrong"}
    async with VirtualEngine(storage) as engine:
        await create_failed(engine, "a")
        await engine.yes(cmd.Create(id="live"))
        plan = await make_plan(engine.planner, action="delete", ids=["a", "none", "bad", "a", "live"])
        assert [(job.id, job.to) for job in plan.jobs] == [("a", None)]
        assert [(job.id, job.status) for job in plan.skipped] == [("none", None), ("bad", None), ("live", "queued")]
        assert "quarantine" in plan.skipped[1].reason
        assert (await apply_plan(engine.planner)).applied == 1
        assert engine.disk.job("a") is None


@in_engine()
async def test_jobs_that_changed_since_the_plan_are_skipped_and_reported(engine: VirtualEngine) -> None:
    await create_failed(engine, "a", "b", "c")
    await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter(status="failed"))
    await engine.yes(cmd.ForceReset(id="a"))
    await engine.yes(cmd.Delete(id="b"))
    result = await apply_plan(engine.planner)
    assert result.applied == 1
    assert [(job.id, job.from_, job.now) for job in result.changed_meanwhile] == [
        ("b", "failed", None),
        ("a", "failed", "queued"),
    ]


@in_engine()
async def test_a_plan_is_applied_once(engine: VirtualEngine) -> None:
    await create_failed(engine, "a")
    await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter())
    first, second = await asyncio.gather(apply_plan(engine.planner), apply_plan(engine.planner))
    assert first == second
    await engine.yes(cmd.ForceFail(id="a"))
    repeated = await apply_plan(engine.planner)
    assert repeated == replace(first, repeated=True)
    assert (await engine.yes(cmd.Get(id="a"))).status == "failed"


@in_engine()
async def test_a_disconnected_caller_does_not_stop_a_plan(engine: VirtualEngine) -> None:
    await create_failed(engine, *(f"j{n}" for n in range(plan_runner.SLICE + 1)))
    await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter())
    waiting = asyncio.create_task(engine.planner.apply("p", EVE))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(1)
    result = await apply_plan(engine.planner)
    assert (result.applied, result.repeated) == (plan_runner.SLICE + 1, True)


@in_engine()
async def test_why_names_the_plan_that_cancelled_a_job(engine: VirtualEngine) -> None:
    for job_id in ("a", "b", "c"):
        await engine.yes(cmd.Create(id=job_id))
    for ids in (["a", "b"], ["c"]):
        await make_plan(engine.planner, action="cancel", ids=ids, reason="wrong file")
        await apply_plan(engine.planner)
    because = [(await engine.yes(cmd.Why(id=job_id))).because for job_id in ("a", "c")]
    assert because == [
        "It was cancelled by operator eve with plan p (2 jobs): wrong file.",
        "It was cancelled by operator eve: wrong file.",
    ]


@in_engine()
async def test_a_plan_is_applied_in_slices_and_is_one_audit_entry(engine: VirtualEngine) -> None:
    await create_failed(engine, *(f"j{n}" for n in range(2 * plan_runner.SLICE + 1)), queue="q")
    await make_plan(engine.planner, action="delete", filter=cmd.PlanFilter(queue="q", since=1))
    before = len(engine.disk.batches)
    await apply_plan(engine.planner)
    sizes = [len(batch.changes) for batch in engine.disk.batches[before:]]
    assert sizes == [plan_runner.SLICE, plan_runner.SLICE, 1, 0]
    entries = [entry for batch in engine.disk.batches[before:] for entry in batch.audit]
    assert {(entry.what, entry.who, entry.part_of) for entry in entries} == {("plan-delete", "eve", "p")}
    assert sum(entry.jobs for entry in entries) == 2 * plan_runner.SLICE + 1
    changed = [job_id for entry in entries for job_id in entry.changed_ids]
    assert sorted(changed) == sorted(f"j{n}" for n in range(2 * plan_runner.SLICE + 1))
    assert entries[-1].details == {
        "plan_id": "p",
        "planned": 2 * plan_runner.SLICE + 1,
        "changed_meanwhile": 0,
        "rejected": 0,
        "filter": {"queue": "q", "since": 1},
    }


@in_engine()
async def test_on_a_full_disk_a_plan_stops_and_later_continues(engine: VirtualEngine) -> None:
    await create_failed(engine, *(f"j{n}" for n in range(plan_runner.SLICE + 5)))
    await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter())
    engine.disk.write_errors.extend([None, *(DiskFull("full") for _ in range(3))])
    engine.disk.has_reserve = False
    engine.disk.fits = lambda batch: len(engine.disk.batches) < 2 * (plan_runner.SLICE + 5) + 1
    rejected = error_in(await engine.planner.apply("p", EVE))
    space = {"path": "/disk/jobd.db", "free_bytes": 8 << 30, "total_bytes": 16 << 30}
    assert (rejected.code, rejected.details) == ("storage_full", {**space, "applied": plan_runner.SLICE, "left": 5})
    engine.disk.write_errors.clear()
    engine.disk.free()
    await asyncio.sleep(2)
    result = await apply_plan(engine.planner)
    assert (result.applied, result.changed_meanwhile) == (plan_runner.SLICE + 5, [])


@in_engine()
async def test_a_plan_that_ends_jobs_is_applied_on_a_full_disk_too(engine: VirtualEngine) -> None:
    await create_failed(engine, "a")
    await make_plan(engine.planner, action="delete", filter=cmd.PlanFilter())
    await make_plan(engine.planner, "r", action="retry", filter=cmd.PlanFilter())
    engine.disk.fill()
    await engine.no(cmd.Create(id="x"))
    await engine.no(cmd.Update(id="a", priority=1))
    assert isinstance(await engine.planner.apply("r", EVE), ApiError)
    assert (await apply_plan(engine.planner)).applied == 1
    engine.disk.free()


@in_engine()
async def test_a_plan_is_kept_for_a_limited_time(engine: VirtualEngine) -> None:
    await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter())
    await asyncio.sleep(plan_runner.KEPT_MS / SECOND_MS - 1)
    assert isinstance(engine.planner.find("p"), PlanView)
    await asyncio.sleep(1)
    for error in (engine.planner.find("p"), await engine.planner.apply("p", EVE)):
        assert error_in(error).code == "plan_not_found"


@in_engine()
async def test_the_result_of_a_plan_can_be_read_for_hours(engine: VirtualEngine) -> None:
    await create_failed(engine, "a", "b")
    await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter())
    await asyncio.sleep(plan_runner.KEPT_MS / SECOND_MS - 1)
    await engine.yes(cmd.Delete(id="b"))
    result = await apply_plan(engine.planner)
    assert [job.id for job in result.changed_meanwhile] == ["b"]
    await asyncio.sleep(plan_runner.APPLIED_KEPT_MS / SECOND_MS - 1)
    shown = kept_plan(engine.planner)
    assert shown.result == result
    assert shown.expires_at == result.applied_at + plan_runner.APPLIED_KEPT_MS
    assert (await apply_plan(engine.planner)).repeated
    await asyncio.sleep(1)
    assert isinstance(engine.planner.find("p"), ApiError)


@in_virtual_time
async def test_new_plans_displace_no_results_and_results_no_plans() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plan_runner, "MAX_PLANS", 2)
        monkeypatch.setattr(plan_runner, "MAX_APPLIED", 3)
        async with VirtualEngine() as engine:
            await create_failed(engine, "a")

            def kept_ids() -> list[str]:
                return [name for name in "wxyz01234" if isinstance(engine.planner.find(name), PlanView)]

            await make_plan(engine.planner, "w", action="retry", filter=cmd.PlanFilter())
            for name in "0123":
                await make_plan(engine.planner, name, action="cancel", filter=cmd.PlanFilter())
                await apply_plan(engine.planner, name)
            assert kept_ids() == ["w", "1", "2", "3"]
            for name in "xyz":
                await make_plan(engine.planner, name, action="retry", filter=cmd.PlanFilter())
            assert kept_ids() == ["y", "z", "1", "2", "3"]
            monkeypatch.setattr(plan_runner, "MAX_JOBS", 0)
            await apply_plan(engine.planner, "z")
            assert kept_ids() == ["y", "z"], "the latest is kept, however many jobs it has"


@in_virtual_time
async def test_the_audit_log_names_a_limited_number_of_unchanged_jobs() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        async with VirtualEngine() as engine:
            monkeypatch.setattr(plan_runner, "MAX_NAMED", 3)
            for size, named in ((4_000, ["j4", "j3", "j2"]), (5, ["j4", "j3"]), (1, None)):
                monkeypatch.setattr(plan_runner, "MAX_NAMED_SIZE", size)
                await create_failed(engine, *(f"j{n}" for n in range(5)))
                await make_plan(engine.planner, f"p{size}", action="retry", filter=cmd.PlanFilter())
                for n in range(5):
                    await engine.yes(cmd.Delete(id=f"j{n}"))
                assert (await apply_plan(engine.planner, f"p{size}")).applied == 0
                details = engine.disk.batches[-1].audit[-1].details
                assert details is not None
                assert (details["changed_meanwhile"], details.get("not_changed")) == (5, named)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits."""
    for name, value in {"MAX_PLAN": 3, "MAX_SKIPPED": 2, "PAGE": 2, "SCAN": 4, "SLOW_SCAN": 4}.items():
        monkeypatch.setattr(plan_builder, name, value)
    monkeypatch.setattr(plan_runner, "MAX_JOBS", 5)


async def all_plans(planner: Planner, **request: Any) -> list[list[str]]:
    """Return the jobs of each plan, from the first to the last."""
    found: list[list[str]] = []
    cursor: str | None = None
    while not found or cursor is not None:
        plan = await make_plan(planner, f"p{len(found)}", cursor=cursor, **request)
        assert plan.more == (plan.next_cursor is not None)
        found.append([job.id for job in plan.jobs])
        cursor = plan.next_cursor
    return found


@pytest.mark.usefixtures("small")
@in_engine()
async def test_a_plan_has_a_maximum_size_and_the_next_one_continues(engine: VirtualEngine) -> None:
    await create_failed(engine, "a", "b", "c")
    assert await all_plans(engine.planner, action="retry", filter=cmd.PlanFilter()) == [["c", "b", "a"]]
    for n in range(3):
        await engine.yes(cmd.Create(id=f"live{n}"))
        await engine.yes(cmd.Create(id=f"x{n}"))
        await engine.yes(cmd.Cancel(id=f"x{n}"))
    await create_failed(engine, "d")
    wholes = [["d", "c", "b"], ["a", "x2", "x1"], ["x0"]]
    assert await all_plans(engine.planner, action="retry", filter=cmd.PlanFilter()) == wholes
    assert isinstance(engine.planner.find("p0"), ApiError)  # together they had too many jobs
    assert await all_plans(engine.planner, action="cancel", filter=cmd.PlanFilter()) == [["live2", "live1", "live0"]]


@pytest.mark.usefixtures("small")
@in_engine()
async def test_a_plan_of_named_jobs_lists_a_limited_number_of_skipped_ones(engine: VirtualEngine) -> None:
    plan = await make_plan(engine.planner, action="retry", ids=["a", "b", "c", "d", "e"])
    assert (plan.count, [job.id for job in plan.skipped], plan.skipped_count) == (0, ["a", "b"], 5)
    assert (plan.filter, plan.scope, plan.more) == (None, None, False)


@pytest.mark.usefixtures("small")
@in_engine()
async def test_jobs_that_the_action_does_not_apply_to_are_not_read(engine: VirtualEngine) -> None:
    """Hundreds of younger queued jobs do not slow this down."""
    await create_failed(engine, "needle")
    for n in range(300):
        await engine.yes(cmd.Create(id=f"j{n}"))
    engine.disk.calls.clear()
    plan = await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter())
    assert ([job.id for job in plan.jobs], plan.more) == (["needle"], False)
    plan = await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter(status="queued"))
    assert (plan.count, plan.skipped_count, plan.more) == (0, 0, False)
    assert plan.scope == "Only failed and cancelled jobs can be retried."


@pytest.mark.usefixtures("small")
@in_engine()
async def test_a_plan_finds_a_text_in_every_searched_field(engine: VirtualEngine) -> None:
    await create_failed(engine, "needle", *(f"j{n}" for n in range(20)))
    plan = await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter(text="NEEDLE"))
    assert [job.id for job in plan.jobs] == ["needle"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_PLANNING_S": 0, "SCAN": 1}.items():
        monkeypatch.setattr(plan_builder, name, value)


@pytest.mark.usefixtures("impatient")
@in_engine()
async def test_a_plan_that_takes_too_long_ends_and_the_next_one_continues(engine: VirtualEngine) -> None:
    await create_failed(engine, "a", "b", "c", "d")
    found = await all_plans(engine.planner, action="retry", filter=cmd.PlanFilter(queue="default"))
    assert len(found) > 2
    assert [job_id for each in found for job_id in each] == ["d", "c", "b", "a"]


@in_engine()
async def test_a_cursor_only_continues_a_plan_of_the_same_request(engine: VirtualEngine) -> None:
    for request in (
        cmd.MakePlan(action="cancel", filter=cmd.PlanFilter(), cursor="failed.7"),
        cmd.MakePlan(action="retry", filter=cmd.PlanFilter(status="cancelled"), cursor="failed.7"),
        cmd.MakePlan(action="retry", filter=cmd.PlanFilter(error="0123456789ab"), cursor="cancelled.7"),
        cmd.MakePlan(action="retry", ids=["a"], cursor="failed.7"),
    ):
        wrong = error_in(await engine.planner.make(request, "x"))
        assert (wrong.code, wrong.details["field"]) == ("invalid_request", "$.cursor")


@in_engine()
async def test_a_job_that_changes_status_during_planning_is_listed_once(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    making = asyncio.create_task(make_plan(engine.planner, action="cancel", filter=cmd.PlanFilter()))
    await asyncio.sleep(plan_builder.PAUSE_S / 2)
    await engine.yes(cmd.Start(id="a", worker="w"))
    plan = await making
    assert [(job.id, job.from_) for job in plan.jobs] == [("a", "queued")]
    result = await apply_plan(engine.planner)
    assert [(job.id, job.now) for job in result.changed_meanwhile] == [("a", "processing")]


@in_engine()
async def test_a_short_plan_does_not_wait_for_a_long_one(engine: VirtualEngine) -> None:
    await create_failed(engine, *(f"j{n}" for n in range(3 * plan_builder.PAGE)))
    long = asyncio.create_task(make_plan(engine.planner, "long", action="delete", filter=cmd.PlanFilter()))
    await asyncio.sleep(plan_builder.PAUSE_S / 2)
    short = await make_plan(engine.planner, "short", action="delete", ids=["j3"])
    assert (short.count, long.done()) == (1, False)
    assert (await long).count == 3 * plan_builder.PAGE


@in_engine()
async def test_empty_plans_displace_no_others(engine: VirtualEngine) -> None:
    await create_failed(engine, "a")
    await make_plan(engine.planner, "full", action="retry", filter=cmd.PlanFilter())
    for n in range(plan_runner.MAX_PLANS + 2):
        await make_plan(engine.planner, f"p{n}", action="cancel", filter=cmd.PlanFilter())
    assert isinstance(engine.planner.find("full"), PlanView)
    assert isinstance(engine.planner.find("p0"), ApiError)
    assert isinstance(engine.planner.find(f"p{plan_runner.MAX_PLANS + 1}"), PlanView)


@in_engine()
async def test_concurrent_plans_are_limited_and_need_a_filter_or_ids(engine: VirtualEngine) -> None:
    for request in (cmd.MakePlan(action="retry"), cmd.MakePlan(action="retry", filter=cmd.PlanFilter(), ids=["a"])):
        assert error_in(await engine.planner.make(request, "x")).code == "invalid_request"
    request = cmd.MakePlan(action="retry", filter=cmd.PlanFilter())
    ids = [f"p{n}" for n in range(plan_runner.MAX_BUILDERS + 1)]
    responses = await asyncio.gather(*(engine.planner.make(request, plan_id) for plan_id in ids))
    assert [response.code for response in responses if isinstance(response, ApiError)] == ["overloaded"]


@in_engine()
async def test_a_stopping_daemon_ends_a_plan_after_its_slice(engine: VirtualEngine) -> None:
    await create_failed(engine, *(f"j{n}" for n in range(3 * plan_runner.SLICE)))
    await make_plan(engine.planner, action="retry", filter=cmd.PlanFilter())
    waiting = asyncio.create_task(engine.planner.apply("p", EVE))
    await asyncio.sleep(plan_builder.PAUSE_S / 2)
    await engine.planner.close()
    rejected = error_in(await waiting)
    assert (rejected.code, rejected.details["applied"] % plan_runner.SLICE) == ("shutting_down", 0)


# -- jobs that are due by time --------------------------------------------------------------------------------------


def test_a_preview_lists_what_recovery_would_do_and_changes_nothing() -> None:
    rules = RuleHarness()
    lock_id = rules.held("stuck", max_attempts=1)
    rules.progress(lock_id, 40, "stuck")
    rules.held("fresh", stall_after_ms=0)
    rules.create("late", expires_at=rules.now + 10)
    rules.advance(3_600_000)
    before = [(job.id, job.status) for job in rules.rows.values()]
    decision = rules.decide(cmd.Preview(limit=9))
    assert decision.changes == []
    seen = checked(decision.answer).data
    assert {(each.job_id, each.action) for each in seen.details} == {("stuck", "failed"), ("fresh", "reset")}
    assert (seen.expired, seen.more) == (["late"], False)
    assert [(job.id, job.status) for job in rules.rows.values()] == before
    assert rules.accept(cmd.Preview(limit=1)).more


def test_a_preview_counts_expired_locks() -> None:
    rules = RuleHarness()
    rules.held("a", stall_after_ms=DAY_MS, progress_timeout_ms=0)
    assert rules.accept(cmd.Preview(limit=9)).locks == 0
    rules.advance(rules.policy.lock_ttl_ms)
    assert rules.accept(cmd.Preview(limit=9)).locks == 1


def test_a_preview_reports_that_it_is_incomplete() -> None:
    rules = RuleHarness()
    for name in ("a", "b"):
        rules.create(name, expires_at=rules.now + 10)
    rules.advance(10)
    for limit, named in ((1, ["a"]), (2, ["a", "b"])):
        seen = rules.accept(cmd.Preview(limit=limit))
        assert (seen.expired, seen.more) == (named, limit < 2)


async def previewed(engine: VirtualEngine, scan_s: float = 60) -> PreviewView:
    return checked(await engine.maintainer.preview(scan_s))


@in_virtual_time
async def test_a_preview_of_a_cleanup_run_matches_the_run() -> None:
    storage = MemoryStorage()
    storage.put(row(1, "over", progress=120))
    async with VirtualEngine(storage) as engine:
        await engine.held("stuck", lock_ttl_ms=SECOND_MS)
        await engine.yes(cmd.Create(id="late", expires_at=engine.now + SECOND_MS))
        await engine.yes(cmd.Import(id="old", status="failed", error_message="x", expires_at=WALL + SECOND_MS))
        await asyncio.sleep(120)
        view = await previewed(engine)
        assert [(each.job_id, each.action) for each in view.recover] == [("stuck", "reset")]
        assert (view.overdue_jobs, view.deleted_jobs, view.invalid_jobs) == (["late"], ["old"], ["over"])
        assert not view.more
        assert 0 <= engine.now - view.timestamp < SECOND_MS
        report = await engine.cleanup()
        assert (report.stuck_jobs_recovered, report.expired_jobs_deleted, report.validation_issues_fixed) == (1, 1, 1)
        after = await previewed(engine)
        assert (after.recover, after.overdue_jobs, after.deleted_jobs, after.invalid_jobs) == ([], [], [], [])


@in_virtual_time
async def test_the_scan_for_issues_is_limited() -> None:
    storage = MemoryStorage()
    for number in range(1, 31):
        storage.put(row(number, f"over-{number}", progress=120))

    async def found(engine: VirtualEngine, scan_s: float) -> tuple[int, bool]:
        view = await previewed(engine, scan_s)
        assert view.more == view.more_invalid
        return len(view.invalid_jobs), view.more_invalid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "SCAN", 10)
        async with VirtualEngine(storage) as engine:
            assert await found(engine, 60) == (30, False)
            assert await found(engine, 1e-9) == (10, True), "one slice takes longer"
            assert await found(engine, 0) == (0, True)
            patch.setattr(preview, "MAX_IDS", 25)
            assert await found(engine, 60) == (25, True)
            patch.setattr(preview, "MAX_IDS", 30)
            assert await found(engine, 60) == (30, False)


@in_virtual_time
async def test_a_preview_lists_expired_jobs_even_if_few_are_read_at_a_time() -> None:
    """Jobs with large results."""
    storage = MemoryStorage()

    async def one(now: int, limit: int, skip: int = 0) -> list[str]:
        return (await MemoryStorage.expired_jobs(storage, now, limit, skip))[:1]

    async def seen(engine: VirtualEngine, scan_s: float = 60) -> tuple[int, bool, bool]:
        view = await previewed(engine, scan_s)
        assert not (view.deleted_jobs and view.kept_jobs)
        return len(view.deleted_jobs or view.kept_jobs), view.more, view.more_kept

    async with VirtualEngine(storage) as engine:
        for number in range(1, 7):
            await engine.yes(
                cmd.Import(id=f"old-{number}", status="failed", error_message="x", expires_at=WALL + number)
            )
        await asyncio.sleep(60)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "expired_jobs", one)
            patch.setattr(preview, "MAX_SHOWN", 6)
            assert await seen(engine) == (6, False, False)
            patch.setattr(preview, "MAX_SHOWN", 5)
            assert await seen(engine) == (5, True, False)
            assert await seen(engine, 1e-9) == (1, True, False), "one read takes longer"
            engine.step_ms = 2 * DAY_MS
            assert await seen(engine) == (5, False, True)


@in_engine()
async def test_a_preview_while_the_clock_is_suspect_deletes_nothing(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Import(id="old", status="failed", error_message="x", expires_at=WALL + SECOND_MS))
    await asyncio.sleep(60)
    engine.step_ms = 2 * DAY_MS
    view = await previewed(engine)
    assert (view.deleted_jobs, view.kept_jobs, view.more_kept) == ([], ["old"], False)
    engine.step_ms = 0
    view = await previewed(engine)
    assert (view.deleted_jobs, view.kept_jobs) == (["old"], [])
    engine.maintainer.stop()
    stopped = await engine.maintainer.preview()
    assert isinstance(stopped, PreviewView | ApiError)
    engine.actor.stop()
    assert error_in(await engine.maintainer.preview()).code == "shutting_down"


# -- trials, rates, ages and outcomes ----------------------------------------------------------------------------------


async def attempt(engine: VirtualEngine, job_id: str, *, fails: bool = False) -> None:
    lock_id = (await engine.yes(cmd.Start(id=job_id, worker="w"))).lock_id
    await engine.yes(
        cmd.Fail(id=job_id, lock_id=lock_id, error_message="e") if fails else cmd.Complete(id=job_id, lock_id=lock_id)
    )


async def statuses(engine: VirtualEngine, *ids: str) -> list[str]:
    return [(await engine.yes(cmd.Get(id=job_id))).status for job_id in ids]


@in_engine()
async def test_the_other_jobs_follow_a_trial_that_completes(engine: VirtualEngine) -> None:
    await create_failed(engine, "a", "b", "c")
    planner = engine.planner
    assert (await make_plan(planner, action="retry", ids=["a", "b", "c"])).outcome is None
    await engine.yes(cmd.Update(id="a", priority=3))
    result = await apply_plan(planner, trial=True)
    assert (result.applied, result.left, result.trial) == (1, 1, PlanTrial("b", "waiting")), "a has changed"
    assert (await apply_plan(planner)).trial == PlanTrial("b", "waiting"), "a repeated request"
    assert await statuses(engine, "b", "c") == ["queued", "failed"]
    await attempt(engine, "b")
    view = await until_applied(planner)
    assert view.result is not None
    assert (view.result.applied, view.result.left, [each.id for each in view.result.changed_meanwhile]) == (2, 0, ["a"])
    assert (view.trial, view.outcome) == (PlanTrial("b", "completed"), PlanOutcome(1, 0, 0, 1))
    await planner.close()
    assert list(engine.disk.audited.values())[-1].details["trial"] == {"job_id": "b", "state": "completed"}  # type: ignore[index]


async def until_applied(planner: Planner) -> PlanView:
    await until(lambda: not isinstance(view := planner.find("p"), ApiError) and view.result is not None)
    return kept_plan(planner)


@pytest.mark.parametrize("end", ["fails", "is retried", "is cancelled", "the daemon stops"])
def test_no_job_follows_a_trial_that_does_not_complete(end: str) -> None:
    @in_virtual_time
    async def check() -> None:
        async with VirtualEngine() as engine:
            await create_failed(engine, "a", "b", max_attempts=2 if end == "is retried" else 1)
            planner = engine.planner
            await make_plan(planner, action="force-reset", ids=["a", "b"])
            await apply_plan(planner, trial=True)
            if end == "the daemon stops":
                await planner.close()
            elif end == "is cancelled":
                await engine.yes(cmd.Cancel(id="a"))
            else:
                await attempt(engine, "a", fails=True)
            view = await until_applied(planner)
            assert view.result is not None
            assert (view.result.applied, view.result.left, view.trial) == (1, 1, PlanTrial("a", "failed"))
            assert await statuses(engine, "b") == ["failed"]

    check()


@in_engine()
async def test_a_trial_without_a_job_left_to_try_ends(engine: VirtualEngine) -> None:
    await create_failed(engine, "a")
    await make_plan(engine.planner, action="retry", ids=["a"])
    await engine.yes(cmd.Update(id="a", priority=3))
    result = await apply_plan(engine.planner, trial=True)
    assert (result.applied, result.left, result.trial) == (0, 0, None)


@in_engine()
async def test_the_jobs_of_a_plan_become_due_at_its_rate(
    engine: VirtualEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_runner, "SLICE", 2)
    ids = [f"j{number}" for number in range(5)]
    await create_failed(engine, *ids)
    await make_plan(engine.planner, action="retry", ids=ids)
    result = await apply_plan(engine.planner, rate=cmd.PlanRate(2))
    due = [(await engine.yes(cmd.Get(id=job_id))).run_at for job_id in ids]
    assert [at - due[0] for at in due] == [0, 500, 1_000, 1_500, 2_000]
    assert result.due_until == due[-1]
    assert list(engine.disk.audited.values())[-1].details["rate"] == {"count": 2, "per_ms": 1_000}  # type: ignore[index]
    await make_plan(engine.planner, "c", action="cancel", ids=ids)
    for name, value in (("trial", True), ("rate", cmd.PlanRate(2))):
        pace: dict[str, Any] = {name: value}
        assert error_in(await engine.planner.apply("c", EVE, **pace)).details == {"field": f"$.{name}"}


@in_engine()
async def test_a_plan_counts_how_its_jobs_end(engine: VirtualEngine) -> None:
    await create_failed(engine, *"abcde")
    await make_plan(engine.planner, action="retry", ids=[*"abcde"])
    await apply_plan(engine.planner)
    await attempt(engine, "a")
    await attempt(engine, "b", fails=True)
    await engine.yes(cmd.Cancel(id="c"))
    await engine.yes(cmd.Start(id="d", worker="w"))
    assert str(kept_plan(engine.planner).outcome) == "1 completed, 1 failed again, 1 cancelled, 2 wait"
    await engine.yes(cmd.Delete(id="a"))
    await make_plan(engine.planner, "q", action="retry", ids=["b"])
    await apply_plan(engine.planner, "q")
    await attempt(engine, "b")
    assert str(kept_plan(engine.planner, "q").outcome) == "1 completed, 0 failed again, 0 wait"
    await asyncio.sleep(plan_runner.APPLIED_KEPT_MS / 1_000 + 1)
    assert isinstance(engine.planner.find("p"), ApiError)
    assert not engine.planner._watched


@in_engine()
async def test_a_plan_says_how_old_its_jobs_are(engine: VirtualEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    await create_failed(engine, "a", "b")
    await asyncio.sleep(7 * 3_600)
    await create_failed(engine, "c")
    view = await make_plan(engine.planner, action="retry", ids=[*"abc"])
    assert [each.jobs for each in view.ages] == [1, 2]
    assert view.aged == f"1 since {utc(view.ages[0].since)}, 2 older than 7 h"
    monkeypatch.setattr(plan_builder, "MAX_AGES", 1)
    view = await make_plan(engine.planner, action="retry", ids=[*"abc"])
    assert ([each.jobs for each in view.ages], view.aged) == ([3], f"3 since {utc(view.ages[0].since)}")
    assert (await make_plan(engine.planner, action="retry", ids=["a"])).aged == ""
