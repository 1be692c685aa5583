"""While the clock is suspect, no path deletes or fails anything by age, and the suspicion is durable.

The wall clock is fake: each test moves it and checks the effect of the next command.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

from jobd.api.services import AGREES, Services
from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, Policy
from jobd.model.responses import ClockView
from jobd.model.storage import AuditEntry
from tests.support.memory_storage import MemoryStorage
from tests.support.rule_harness import RuleHarness
from tests.support.virtual_engine import VirtualEngine, in_engine, in_virtual_time, seconds, until

STEP_MS: Final = 40 * DAY_MS
PASSES: Final = CleanupSchedule(interval_ms=5 * MINUTE_MS, min_interval_ms=2 * MINUTE_MS, recover_every_ms=0)


async def create_completed(engine: VirtualEngine, job_id: str = "done", **fields: Any) -> None:
    """Create a completed job."""
    await engine.yes(cmd.Complete(id=job_id, lock_id=await engine.held(job_id), download_url="https://x/y", **fields))


async def create_expiring(engine: VirtualEngine, job_id: str = "waits") -> None:
    """Create a queued job that expires after 20 days."""
    await engine.yes(cmd.Create(id=job_id, expires_at=engine.now + 20 * DAY_MS))


def status(engine: VirtualEngine, job_id: str) -> str | None:
    job = engine.disk.job(job_id)
    return None if job is None else job.status


# -- the rules, in the first batch after the step ----------------------------------------------------------------------


@in_engine()
async def test_the_first_command_after_a_step_fails_and_deletes_nothing(engine: VirtualEngine) -> None:
    await create_completed(engine)
    await create_expiring(engine)
    for command in (
        cmd.Claim(worker="w"),
        cmd.Expire(limit=10),
        cmd.DeleteExpired(ids=["done"]),
        cmd.Recover(limit=10),
        cmd.Preview(limit=10),
    ):
        engine.step_ms = STEP_MS
        data = await engine.yes(command)
        assert not getattr(data, "grants", None)
        assert not getattr(data, "done", None)
        assert not getattr(data, "expired", None)
        assert (status(engine, "done"), status(engine, "waits")) == ("completed", "queued")
        engine.step_ms = 0
    assert [grant.job.id for grant in (await engine.yes(cmd.Claim(worker="w"))).grants] == ["waits"]


def test_an_operator_can_still_end_and_delete_jobs() -> None:
    rules = RuleHarness()
    rules.create("waits", expires_at=rules.now + DAY_MS)
    rules.now, rules.trusted = rules.now + STEP_MS, rules.now
    rules.accept(cmd.Cancel(id="waits"))
    rules.accept(cmd.Delete(id="waits"), admin=True)
    assert "waits" not in rules.rows


def test_a_pause_ends_by_the_expected_time_and_may_end_at_any_time_after_it() -> None:
    rules = RuleHarness()
    expected = rules.now
    rules.now, rules.trusted = rules.now + STEP_MS, expected
    rules.reject(cmd.Pause(name="q", until=expected), "invalid_request")
    rules.accept(cmd.Pause(name="q", until=expected + HOUR_MS))
    assert rules.accept(cmd.EndPauses()).done == 0
    rules.trusted = expected + HOUR_MS
    assert rules.accept(cmd.EndPauses()).done == 1


# -- cleanup runs ------------------------------------------------------------------------------------------------------


@in_engine(schedule=PASSES)
async def test_forty_days_ahead_for_six_seconds_and_a_forced_cleanup_run_lose_nothing(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    for job_id in ("a", "b", "c", "gone"):
        await create_completed(engine, job_id)
    await create_expiring(engine)
    await engine.yes(cmd.Delete(id="gone"))
    engine.disk.audited = {1: AuditEntry(1, "admin", "", "pause")}
    engine.step_ms = STEP_MS
    report = await engine.maintainer.run_cleanup(forced=True)
    assert (report.expired_jobs_deleted, report.errors) == (0, [])
    await seconds(6)
    assert [event.type for event in engine.disk.events if event.job_id == "gone"][-1] == "deleted"
    assert list(engine.disk.audited) == [1]
    engine.step_ms = 0
    report = await engine.maintainer.run_cleanup(forced=True)
    assert (report.expired_jobs_deleted, report.errors) == (0, [])
    assert [status(engine, job_id) for job_id in ("a", "b", "c")] == ["completed"] * 3
    assert status(engine, "waits") == "queued"


@in_engine()
async def test_a_clock_that_steps_between_scan_and_rule_costs_no_job_and_no_cleanup_run(engine: VirtualEngine) -> None:
    await create_completed(engine)
    expired_jobs = engine.disk.expired_jobs

    async def expired(now: int, limit: int, skip: int = 0) -> list[str]:
        engine.step_ms = STEP_MS
        return await expired_jobs(engine.now, limit, skip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.disk, "expired_jobs", expired)
        report = await engine.cleanup()
    assert (report.expired_jobs_deleted, report.errors) == (0, [])
    assert status(engine, "done") == "completed"


@in_engine(schedule=PASSES)
async def test_after_acceptance_jobs_are_deleted_and_failed_by_age_again(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await create_completed(engine)
    await create_expiring(engine)
    engine.step_ms = STEP_MS
    await engine.maintainer.run_cleanup(forced=True)
    engine.clock.accept()
    report = await engine.maintainer.run_cleanup(forced=True)
    assert report.expired_jobs_deleted == 1
    assert (status(engine, "done"), status(engine, "waits")) == (None, "failed")


# -- what is done meanwhile --------------------------------------------------------------------------------------------


@pytest.mark.slow
@in_virtual_time
async def test_a_job_that_ends_while_the_clock_is_suspect_is_kept_for_its_whole_retention() -> None:
    for is_right in (True, False):
        async with VirtualEngine(schedule=PASSES, policy=Policy(keep_completed_ms=DAY_MS)) as engine:
            engine.run_maintainer()
            engine.step_ms = STEP_MS
            await create_completed(engine)
            if is_right:
                engine.clock.accept()
            else:
                engine.step_ms = 0
            await seconds(DAY_MS / SECOND_MS - 600)
            assert status(engine, "done") == "completed"


@in_engine()
async def test_times_given_by_a_caller_are_not_rejected(engine: VirtualEngine) -> None:
    right = engine.now
    engine.step_ms = STEP_MS
    await create_completed(engine, expires_at=right + DAY_MS)
    await engine.yes(cmd.Create(id="new", expires_at=right + DAY_MS))
    rejection = await engine.no(cmd.Create(id="past", expires_at=right - DAY_MS))
    assert rejection.code == "invalid_request"
    engine.step_ms = 0
    assert not (await engine.yes(cmd.Expire(limit=10))).done
    assert (status(engine, "done"), status(engine, "new")) == ("completed", "queued")


@in_engine()
async def test_idempotency_keys_age_by_the_expected_time(engine: VirtualEngine) -> None:
    use = cmd.IdempotencyKey("k", "body")
    await engine.actor.ask(cmd.Create(id="a"), key=use)
    engine.step_ms = STEP_MS
    assert (await engine.respond(cmd.Create(id="a"), key=use)).replayed
    await engine.actor.ask(cmd.Create(id="b"), key=cmd.IdempotencyKey("l", "body"))
    assert engine.disk.keys["l"].at < engine.now - DAY_MS
    engine.clock.accept()
    assert not (await engine.respond(cmd.Create(), key=use)).replayed


# -- durable -----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_the_suspicion_is_on_disk_with_the_first_batch_and_stays_with_the_next_write_and_start() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as engine:
        await create_completed(engine, expires_at=engine.now + DAY_MS)
        writes = len(disk.batches)
        right = engine.now
        engine.step_ms = 2 * DAY_MS  # less than half of the shortest retention: the next start would not notice
        await engine.yes(cmd.Get(id="done"))
        assert (len(disk.batches) - writes, disk.numbers.clock_suspect, disk.numbers.wall_ms) == (1, True, right)
        await engine.yes(cmd.Get(id="done"))
        assert len(disk.batches) - writes == 1
        await seconds(3)
        await engine.yes(cmd.Create(id="a"))
        assert (disk.numbers.clock_suspect, disk.numbers.wall_ms) == (True, right + 3 * SECOND_MS)
    for _ in range(2):
        async with VirtualEngine(disk, step_ms=2 * DAY_MS) as engine:
            engine.run_maintainer()
            assert engine.clock.suspect
            assert (await engine.maintainer.run_cleanup(forced=True)).expired_jobs_deleted == 0
            await engine.yes(cmd.Tick())
            assert disk.numbers.clock_suspect
            assert status(engine, "done") == "completed"
    async with VirtualEngine(disk, step_ms=2 * DAY_MS) as engine:
        engine.run_maintainer()
        engine.clock.accept()
        await engine.yes(cmd.Get(id="done"))
        assert not disk.numbers.clock_suspect
        assert disk.numbers.wall_ms == engine.now
    async with VirtualEngine(disk, step_ms=2 * DAY_MS) as engine:
        engine.run_maintainer()
        assert not engine.clock.suspect
        assert (await engine.maintainer.run_cleanup(forced=True)).expired_jobs_deleted == 1


@in_virtual_time
async def test_a_restart_29_days_ahead_deletes_nothing() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as engine:
        await create_completed(engine)
    async with VirtualEngine(disk, step_ms=29 * DAY_MS) as engine:
        assert (await engine.cleanup()).expired_jobs_deleted == 0
        assert status(engine, "done") == "completed"


@in_virtual_time
async def test_a_short_retention_does_not_make_the_clock_suspect_after_idle_time() -> None:
    disk, policy = MemoryStorage(), Policy(keep_cancelled_ms=MINUTE_MS)
    async with VirtualEngine(disk, policy=policy) as engine:
        engine.run_maintainer()
        await seconds(30 * 60)
        left_ms = engine.now
    assert disk.numbers.wall_ms >= left_ms - 10 * SECOND_MS
    async with VirtualEngine(disk, policy=policy, step_ms=15 * SECOND_MS) as engine:
        assert not engine.clock.suspect


@pytest.mark.slow
@in_engine()
async def test_an_idle_daemon_notices_a_step_and_its_end_by_itself(engine: VirtualEngine) -> None:
    disk = engine.disk
    engine.run_maintainer()
    await seconds(60)
    engine.step_ms = STEP_MS
    await until(lambda: disk.numbers.clock_suspect)
    engine.step_ms = 0
    await until(lambda: not disk.numbers.clock_suspect)
    engine.step_ms = STEP_MS
    engine.synchronised = True
    await until(lambda: disk.numbers.clock_suspect)
    await seconds(9 * 60)
    assert disk.numbers.clock_suspect
    await until(lambda: not disk.numbers.clock_suspect)
    assert disk.numbers.wall_ms >= engine.now - 10 * SECOND_MS


@in_engine()
async def test_on_a_full_disk_the_suspicion_is_written_when_there_is_space(engine: VirtualEngine) -> None:
    disk = engine.disk
    engine.run_maintainer()
    await engine.yes(cmd.Create(id="a"))
    disk.fill()
    await engine.no(cmd.Create(id="b"))
    writes = disk.calls["write"]
    engine.step_ms = STEP_MS
    await engine.yes(cmd.Get(id="a"))
    assert (disk.calls["write"], disk.numbers.clock_suspect) == (writes, False)
    disk.free()
    await until(lambda: disk.numbers.clock_suspect)


@in_engine()
async def test_a_read_is_answered_even_if_the_suspicion_cannot_be_written(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    engine.disk.fill()
    engine.step_ms = STEP_MS
    await engine.yes(cmd.Get(id="a"))
    assert engine.actor.full_disk.write_limit
    engine.disk.free()


def services_of(engine: VirtualEngine) -> Services:
    """The services that an accepted clock needs."""
    parts: Any = dict.fromkeys(Services.__struct_fields__)
    return Services(**{**parts, "actor": engine.actor, "clock": engine.clock, "is_alive": lambda: True})


@in_engine()
async def test_an_accepted_clock_is_on_disk_before_the_response(engine: VirtualEngine) -> None:
    services = services_of(engine)
    engine.step_ms = STEP_MS
    assert services.clock_view().suspect
    assert "40 d ahead" in services.clock_view().message
    await engine.yes(cmd.Tick())
    assert engine.disk.numbers.clock_suspect
    view = await services.accept_clock()
    assert not isinstance(view, ApiError)
    assert not view.suspect
    assert (engine.disk.numbers.clock_suspect, engine.disk.numbers.wall_ms) == (False, view.now)


@in_virtual_time
async def test_a_job_that_finishes_while_the_clock_is_behind_is_kept_for_its_whole_retention() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk, schedule=PASSES) as engine:
        await engine.yes(cmd.Create(id="seen"))
    async with VirtualEngine(disk, schedule=PASSES, step_ms=-STEP_MS) as engine:
        engine.run_maintainer()
        await create_completed(engine)
        view = services_of(engine).clock_view()
        assert not view.suspect
        assert "40 d behind" in view.message
    async with VirtualEngine(disk, schedule=PASSES) as engine:
        engine.run_maintainer()
        assert services_of(engine).clock_view() == ClockView(engine.now, False, AGREES)
        assert (await engine.maintainer.run_cleanup(forced=True)).expired_jobs_deleted == 0
        assert status(engine, "done") == "completed"


@in_virtual_time
async def test_a_key_outlives_the_step_of_a_clock_that_is_put_right() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as engine:
        await engine.yes(cmd.Create(id="seen"))
    async with VirtualEngine(disk, step_ms=-STEP_MS) as engine:
        key = cmd.IdempotencyKey("k", "body")
        first = await engine.actor.ask(cmd.Create(), key=key)
        engine.step_ms = 0
        again = await engine.respond(cmd.Create(), key=key)
        assert (engine.clock.suspect, again.replayed, len(engine.state.jobs)) == (False, True, 2), first


@in_virtual_time
async def test_a_forced_run_prunes_no_event_by_a_clock_that_is_or_becomes_suspect() -> None:
    disk = MemoryStorage()
    schedule = CleanupSchedule(journal_ms=HOUR_MS)
    async with VirtualEngine(disk, schedule=schedule) as engine:
        engine.run_maintainer()
        await engine.yes(cmd.Create(id="gone"))
        await engine.yes(cmd.Cancel(id="gone"))
        await engine.yes(cmd.Delete(id="gone"), admin=True)

        def kept() -> int:
            return sum(event.job_id == "gone" for event in disk.events)

        engine.step_ms = STEP_MS
        await engine.maintainer.run_cleanup(forced=True)
        assert kept() == 3
        engine.clock.accept()
        prune = disk.prune

        async def prune_once(before: int, limit: int) -> int:
            await prune(before, 1)
            engine.step_ms += STEP_MS
            return limit if kept() else 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "prune", prune_once)
            await engine.maintainer.run_cleanup(forced=True)
        assert (kept(), engine.clock.suspect) == (2, True)
        engine.clock.accept()
        await engine.maintainer.run_cleanup(forced=True)
        assert kept() == 0


@in_virtual_time
async def test_a_clock_is_not_accepted_if_that_cannot_be_stored() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as engine:
        engine.step_ms = STEP_MS
        disk.fill()
        await engine.no(cmd.Create(id="a"))
        await engine.no(cmd.Tick())
        rejected = await services_of(engine).accept_clock()
        assert isinstance(rejected, ApiError)
        assert rejected.code == "storage_full"
        assert engine.clock.suspect
        disk.free()
        await until(lambda: not engine.actor.full_disk.write_limit)
    rejected = await services_of(engine).accept_clock()
    assert isinstance(rejected, ApiError)
    assert rejected.code == "shutting_down"
    assert engine.clock.suspect


def test_the_shortest_retention_ignores_zero() -> None:
    assert Policy().shortest_keep_ms == 7 * DAY_MS
    assert Policy(keep_failed_ms=HOUR_MS, keep_cancelled_ms=0).shortest_keep_ms == HOUR_MS
    assert Policy(keep_failed_ms=0, keep_cancelled_ms=0, keep_completed_ms=0).shortest_keep_ms == 7 * DAY_MS
