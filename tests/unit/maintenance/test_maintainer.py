"""Maintenance: recovery in time, one cleanup run at a time, reports of every step and failure, no work without need."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.core.stats import Counters, Histogram
from jobd.engine.disk_full import WriteLimit
from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.maintenance.maintainer import TICK_S, read_extra, read_stats
from jobd.model.commands import AnyCommand, Cancel, Complete, Create, Delete, Extend, Get, Pause, Progress, Recover
from jobd.model.errors import ApiError, checked
from jobd.model.events import Event
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, Failure, Policy
from jobd.model.journal import LeadershipLost
from jobd.model.responses import CleanupReport, Response
from jobd.model.storage import AuditEntry, DiskFull, FormatNotRead
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import WALL, VirtualEngine, error_in, in_engine, in_virtual_time, row, seconds, until

RECOVERING = CleanupSchedule(interval_ms=DAY_MS, min_interval_ms=DAY_MS)
PASSES = CleanupSchedule(recover_every_ms=0)


def deletions(engine: VirtualEngine) -> list[str]:
    return [event.job_id for event in engine.disk.events if event.type == "deleted"]


def last_of(engine: VirtualEngine, job_id: str) -> Event:
    return [event for event in engine.disk.events if event.job_id == job_id][-1]


def stored_reports(engine: VirtualEngine) -> list[CleanupReport]:
    """Return the stored reports, oldest first."""
    return [msgspec.json.decode(body, type=CleanupReport) for body in engine.disk.kept_reports]


async def finished(engine: VirtualEngine, job_id: str, **fields: object) -> None:
    lock_id = await engine.held(job_id)
    await engine.yes(Complete(id=job_id, lock_id=lock_id, **fields))  # type: ignore[arg-type]


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


# -- recovery and ticks -----------------------------------------------------------------------------------------------


@in_engine(schedule=RECOVERING)
async def test_a_stalled_job_is_recovered_within_a_period_and_a_second(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await engine.held("a", lock_ttl_ms=60_000)
    await seconds(59)
    assert engine.state.jobs["a"].status == "processing"
    await seconds(12)
    assert engine.state.jobs["a"].status == "queued"
    assert (last_of(engine, "a").type, last_of(engine, "a").by) == ("stalled", "recovery")


@in_engine()
async def test_a_job_that_reports_after_the_scan_is_not_recovered(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a", lock_ttl_ms=60_000)
    await seconds(61)
    at = engine.clock.moment()
    engine.state.advance(at.now, at.lock_ms)
    assert list(engine.state.processing.stalled) == ["a"]
    # Both commands are in one batch; the scan found the job stuck.
    reporting = asyncio.create_task(engine.actor.ask(Progress(id="a", lock_id=lock_id, progress=7)))
    recovering = asyncio.create_task(engine.actor.ask(Recover(limit=10), by="recovery"))
    checked(await reporting)
    recovered = checked(await recovering)
    assert (recovered.data.details, recovered.data.locks_cleared) == ([], 0)
    assert engine.state.holds("a", lock_id)
    assert last_of(engine, "a").type == "progress"


@in_engine(schedule=RECOVERING)
async def test_an_expired_lock_is_cleared_and_the_grant_kept_until_its_stalled_time(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    lock_id = await engine.held("a", lock_ttl_ms=60_000, stall_after_ms=10 * MINUTE_MS)
    await seconds(75)
    assert last_of(engine, "a").type == "lock_expired"
    await engine.yes(Extend(id="a", lock_id=lock_id))
    assert engine.state.processing.live_locks() == 1
    await seconds(11 * 60)
    assert last_of(engine, "a").type == "stalled"
    assert engine.maintainer.totals.found == Counter(expired_locks=2, stalled=1)


@in_engine(schedule=replace(RECOVERING, batch=2))
async def test_recovery_runs_in_slices_until_nothing_is_stalled(engine: VirtualEngine) -> None:
    for number in range(7):
        await engine.held(f"job-{number}", stall_after_ms=HOUR_MS if number == 6 else 0)
    engine.run_maintainer()
    await seconds(75)
    assert [job.status for job in engine.state.jobs.values()].count("queued") == 6
    assert engine.state.processing.noted_expired.keys() == {"job-6"}


@in_engine(schedule=RECOVERING)
async def test_an_idle_daemon_sends_no_recovery_commands(engine: VirtualEngine) -> None:
    for number in range(50):
        await engine.yes(Create(id=f"job-{number}"))
    engine.run_maintainer()
    await seconds(60)
    calls = dict(engine.disk.calls)
    await seconds(3600)
    assert engine.disk.calls == calls


@in_engine(schedule=RECOVERING)
async def test_a_lock_that_is_kept_alive_costs_no_write(engine: VirtualEngine) -> None:
    """A deadline that has moved on changes nothing."""
    lock_id = await engine.held("a", lock_ttl_ms=20_000)
    engine.run_maintainer()
    for _ in range(12):
        await seconds(10)
        await engine.yes(Progress(id="a", lock_id=lock_id, progress=1))
    events = [event.type for event in engine.disk.events]
    assert events == ["created", "granted", *["progress"] * 12]


@in_engine(schedule=PASSES)
async def test_recover_every_0_leaves_recovery_to_cleanup_runs(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await seconds(1)
    await engine.held("a")
    await seconds(200)
    assert engine.state.processing.keys() == {"a"}
    await seconds(100)
    assert not engine.state.processing
    assert stored_reports(engine)[-1].stuck_jobs_recovered == 1


@in_engine(schedule=replace(RECOVERING, recover_every_ms=0))
async def test_the_next_cleanup_run_is_known_if_only_cleanup_runs_recover_jobs(engine: VirtualEngine) -> None:
    assert engine.state.recovery.next_cleanup_at == engine.now, "the first one comes with the start"
    engine.run_maintainer()
    await seconds(1)
    announced = engine.state.recovery.next_cleanup_at
    report = engine.maintainer.last_report
    assert report is not None
    await seconds((announced - engine.now) / 1000 - 1)
    assert engine.maintainer.last_report is report
    await seconds(2)
    assert engine.maintainer.last_report is not report
    assert engine.state.recovery.next_cleanup_at > engine.now
    engine.maintainer.set_schedule(RECOVERING)
    assert engine.state.recovery.recover_every_ms == RECOVERING.recover_every_ms


@in_engine(schedule=RECOVERING)
async def test_lock_time_is_persisted_while_a_job_is_processing_and_only_then(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await engine.yes(Create(id="b", priority=1))
    await seconds(60)
    batches = len(engine.disk.batches)
    lock_id = await engine.held("a", lock_ttl_ms=HOUR_MS)
    lock_ms = engine.disk.numbers.lock_ms
    await seconds(10 * TICK_S)
    assert engine.disk.numbers.lock_ms - lock_ms >= 9 * TICK_S * SECOND_MS
    await engine.yes(Complete(id="a", lock_id=lock_id))
    lock_ms = engine.disk.numbers.lock_ms
    await seconds(600)
    assert engine.disk.numbers.lock_ms == lock_ms
    ticks = [batch for batch in engine.disk.batches[batches:] if not batch.changes]
    assert len(ticks) in (9, 10)


@in_engine(schedule=replace(RECOVERING, recover_every_ms=0))
async def test_a_pause_ends_by_itself_also_without_recovery(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await engine.yes(Pause(name="q", until=engine.clock.moment().now + 63_000))
    await seconds(62)
    assert list(engine.state.paused) == ["q"]
    await seconds(1.1)  # between two ticks
    assert engine.state.paused == {}
    assert engine.disk.queues["q"].pause is None


@in_engine(schedule=RECOVERING)
async def test_recovery_and_ticks_survive_rejections(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await engine.held("a")
    engine.actor.full_disk.write_limit = WriteLimit.ALL_WRITES
    engine.disk.errors["probe"] = engine.disk.errors["build_reserve"] = DiskFull("full")
    await seconds(90)
    assert engine.state.processing.keys() == {"a"}
    engine.disk.errors.clear()
    engine.disk.free()
    await seconds(12)
    assert not engine.state.processing


@in_virtual_time
async def test_a_long_cleanup_run_delays_no_recovery() -> None:
    release = asyncio.Event()

    class Slow(MemoryStorage):
        async def expired_jobs(self, now: int, limit: int, skip: int = 0) -> list[str]:
            await release.wait()
            return await super().expired_jobs(now, limit, skip)

    async with VirtualEngine(Slow(), schedule=replace(RECOVERING, interval_ms=MINUTE_MS)) as engine:
        await engine.held("a")
        await seconds(1)
        engine.run_maintainer()
        await seconds(75)
        assert engine.maintainer.is_running
        assert not engine.state.processing
        release.set()


# -- when cleanup runs --------------------------------------------------------------------------------------------


@in_engine(schedule=PASSES)
async def test_cleanup_runs_at_the_start_and_then_every_interval(engine: VirtualEngine) -> None:
    assert engine.maintainer.state().time_since_last_cleanup is None
    engine.run_maintainer()
    await seconds(1)
    assert engine.maintainer.totals.runs == 1
    state = engine.maintainer.state()
    assert not state.cleanup_running
    assert 900 <= (state.time_since_last_cleanup or 0) <= 1000
    await seconds(298)
    assert engine.maintainer.totals.runs == 1
    await seconds(2)
    assert engine.maintainer.totals.runs == 2
    assert [report.forced for report in stored_reports(engine)] == [False, False]


@in_engine(schedule=PASSES)
async def test_a_forced_run_starts_at_once_an_unforced_one_not_within_two_minutes(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await seconds(10)
    first = engine.maintainer.last_report
    assert await engine.maintainer.run_cleanup(forced=False) is first
    forced = await engine.cleanup()
    assert forced.forced
    assert engine.maintainer.totals.runs == 2
    await seconds(120)
    assert not (await engine.maintainer.run_cleanup(forced=False)).forced
    assert engine.maintainer.totals.runs == 3


@in_virtual_time
async def test_the_schedule_keeps_its_distance_from_a_forced_run() -> None:
    async with VirtualEngine(
        schedule=CleanupSchedule(interval_ms=10_000, min_interval_ms=60_000, recover_every_ms=0)
    ) as engine:
        engine.run_maintainer()
        await seconds(50)
        await engine.cleanup()
        await seconds(59)
        assert engine.maintainer.totals.runs == 2
        await seconds(2)
        assert engine.maintainer.totals.runs == 3


@in_engine()
async def test_a_request_during_a_run_gets_its_report(engine: VirtualEngine) -> None:
    engine.disk.gate.clear()
    engine.run_maintainer()
    await engine.disk.at_gate.wait()
    assert engine.maintainer.state().cleanup_running
    tasks = [asyncio.create_task(engine.maintainer.run_cleanup(forced=forced)) for forced in (True, False)]
    await seconds(1)
    engine.disk.gate.set()
    first, second = await asyncio.gather(*tasks)
    assert first is second is engine.maintainer.last_report
    assert not first.forced
    assert engine.maintainer.totals.runs == 1


@in_engine()
async def test_requests_before_a_run_starts_share_it(engine: VirtualEngine) -> None:
    tasks = [asyncio.create_task(engine.maintainer.run_cleanup(forced=forced)) for forced in (False, True)]
    await seconds(0)
    engine.run_maintainer()
    reports = await asyncio.gather(*tasks)
    assert reports[0] is reports[1]
    assert reports[0].forced
    assert engine.maintainer.totals.runs == 1


@in_engine()
async def test_a_cancelled_request_does_not_end_the_run(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await seconds(1)
    engine.disk.gate.clear()
    tasks = asyncio.create_task(engine.cleanup())
    await engine.disk.at_gate.wait()
    tasks.cancel()
    await asyncio.wait({tasks})
    engine.disk.gate.set()
    await until(lambda: engine.maintainer.totals.runs == 2)
    assert [report.forced for report in stored_reports(engine)] == [False, True]


@in_engine()
async def test_a_new_schedule_applies_at_once(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await seconds(30)
    await engine.held("a")
    engine.maintainer.set_schedule(CleanupSchedule(interval_ms=60_000, min_interval_ms=0, recover_every_ms=10_000))
    await seconds(31)
    assert engine.maintainer.totals.runs == 2
    await seconds(40)
    assert engine.maintainer.totals.found["stalled"] == 1


# -- steps of a cleanup run ---------------------------------------------------------------------------------------


@in_engine(schedule=replace(RECOVERING, batch=2))
async def test_overdue_queued_jobs_fail_with_the_next_recovery(engine: VirtualEngine) -> None:
    """No worker can claim them; they must not stay queued until the next cleanup run."""
    await engine.first_cleanup()
    for number in range(5):
        await engine.yes(Create(id=f"old-{number}", expires_at=engine.now + 1000))
    await engine.yes(Create(id="new", expires_at=engine.now + HOUR_MS))
    await seconds(11.5)
    assert engine.state.jobs.keys() == {"new"}
    assert engine.state.totals["failed"] == 5
    assert [job.error and job.error.code for job in engine.disk.jobs.values()] == [*["expired"] * 5, None]
    assert last_of(engine, "old-3").by == "recovery"
    assert engine.maintainer.totals.runs == 1
    assert engine.maintainer.totals.found == Counter(expired=5)


@in_engine(schedule=replace(PASSES, batch=2))
async def test_finished_jobs_are_deleted_after_their_retention(engine: VirtualEngine) -> None:
    for number in range(5):
        await finished(engine, f"old-{number}", storage_key=f"k-{number}", expires_at=engine.now + 1000)
    await finished(engine, "young", storage_key="k", expires_at=engine.now + HOUR_MS)
    await seconds(1)
    report_at = engine.now
    await engine.first_cleanup()
    assert sorted(deletions(engine)) == [f"old-{number}" for number in range(5)]
    report = stored_reports(engine)[0]
    assert (report.expired_jobs_deleted, report.errors) == (5, [])
    assert report.timestamp >= report_at
    assert engine.disk.job("young") is not None


@in_engine(schedule=PASSES)
async def test_jobs_that_expire_during_a_cleanup_run_wait_for_the_next_one(engine: VirtualEngine) -> None:
    at = engine.now + 1000
    for number in range(50):
        await finished(engine, f"job-{number}", expires_at=at + number)
    await seconds((at - engine.now) / 1000)
    await engine.first_cleanup()
    assert len(deletions(engine)) < 10
    await seconds(1)
    await engine.cleanup()
    assert len(deletions(engine)) == 50


@in_engine()
async def test_deletions_by_operators_do_not_count_as_deletions_by_age(engine: VirtualEngine) -> None:
    await finished(engine, "a")
    await engine.yes(Delete(id="a"), by="admin", admin=True)
    await engine.first_cleanup()
    assert stored_reports(engine)[0].expired_jobs_deleted == 0


@in_engine(schedule=PASSES)
async def test_nothing_is_deleted_by_age_while_the_clock_is_suspect(engine: VirtualEngine) -> None:
    await finished(engine, "a", expires_at=engine.now + 1000)
    await finished(engine, "gone", expires_at=engine.now + 1000)
    await engine.yes(Delete(id="gone"), by="admin", admin=True)
    engine.step_ms = 40 * DAY_MS
    await engine.first_cleanup()
    assert engine.disk.job("a") is not None
    assert [event.type for event in engine.disk.events if event.job_id == "gone"][-1] == "deleted"
    assert stored_reports(engine)[0].errors == []
    engine.clock.accept()
    await seconds(301)
    assert engine.disk.job("a") is None
    assert not [event for event in engine.disk.events if event.job_id == "gone"]


@in_engine(schedule=PASSES)
async def test_events_are_deleted_by_the_time_after_the_size_was_read(engine: VirtualEngine) -> None:
    await finished(engine, "gone", expires_at=engine.now + 1000)
    await engine.yes(Delete(id="gone"), by="admin", admin=True)
    engine.step_ms = 40 * DAY_MS
    engine.clock.accept()
    used_bytes = engine.disk.used_bytes

    async def set_back() -> int:
        engine.step_ms = 0
        return await used_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.disk, "used_bytes", set_back)
        await engine.first_cleanup()
    assert [event.type for event in engine.disk.events if event.job_id == "gone"][-1] == "deleted"


@in_virtual_time
async def test_a_large_store_keeps_the_newest_events_of_deleted_jobs() -> None:
    schedule = CleanupSchedule(
        interval_ms=MINUTE_MS, min_interval_ms=0, recover_every_ms=0, batch=3, journal_bytes=1_000
    )
    held: list[int] = [0]
    async with VirtualEngine(schedule=schedule, hold_events_ms=lambda: held[-1]) as engine:
        for job_id in ("a", "b", "c", "d"):
            await engine.yes(Create(id=job_id))
            await engine.yes(Cancel(id=job_id))
            await engine.yes(Delete(id=job_id))
            await seconds(1)
        await engine.yes(Create(id="lives"))
        engine.disk.event_bytes = 100
        await engine.cleanup()
        assert [event.job_id for event in engine.disk.events] == [*"bbbcccddd", "lives"]
        held.append(DAY_MS)
        engine.disk.event_bytes = 1_000
        await engine.cleanup()
        assert len(engine.disk.events) == 10


@in_engine(schedule=replace(PASSES, batch=1, interval_ms=HOUR_MS))
async def test_the_journal_of_a_deleted_job_is_kept_for_another_day(engine: VirtualEngine) -> None:
    await finished(engine, "a", expires_at=engine.now + 1000)
    engine.run_maintainer()
    await seconds(24 * 3600)
    assert len(await engine.disk.timeline(1)) == 4
    await seconds(3 * 3600)
    assert await engine.disk.timeline(1) == []


class UndeletableJobStorage(MemoryStorage):
    """A store that lists a job as expired although no deletion finds it."""

    async def expired_jobs(self, now: int, limit: int, skip: int = 0) -> list[str]:
        return ["a"]


@in_virtual_time
async def test_undeletable_expired_rows_end_the_step_with_an_error() -> None:
    async with VirtualEngine(UndeletableJobStorage()) as engine:
        await engine.first_cleanup()
        assert stored_reports(engine)[0].errors == ["deletion: 1 expired jobs could not be deleted, the first is a."]


@in_virtual_time
async def test_a_damaged_expired_row_is_quarantined_and_the_run_continues(storage: MemoryStorage) -> None:
    for seq, name in enumerate(("a", "b"), 1):
        storage.put(row(seq, name, "completed", progress=100, finished_at=WALL, expires_at=WALL))
    async with VirtualEngine(storage) as engine:
        await engine.yes(Get(id="a"))  # loads it into memory
        storage.bad_jobs["a"] = "its checksum is wrong"
        await engine.first_cleanup()
        assert stored_reports(engine)[0].errors == []
        assert engine.state.quarantined == {"a": "its checksum is wrong"}
        assert engine.state.totals["completed"] == 0
        assert (await engine.no(Get(id="a"))).code == "job_quarantined"


@in_virtual_time
async def test_a_run_repairs_imported_and_hand_edited_rows(storage: MemoryStorage) -> None:
    storage.put(row(1, "over", progress=120))
    storage.put(row(2, "silent", "failed", finished_at=WALL))
    storage.put(row(3, "fine"))
    storage.put(row(4, "nobody", "processing", started_at=WALL))
    storage.put(row(5, "odd", "completed", progress=50, finished_at=WALL - 1, started_at=WALL))
    async with VirtualEngine(storage, schedule=replace(PASSES, batch=2)) as engine:
        assert len(engine.state.unvalidated) == 5
        await engine.first_cleanup()
        report = stored_reports(engine)[0]
        assert report.errors == []
        assert report.validation_issues_found == report.validation_issues_fixed == 5
        assert engine.maintainer.totals.issues == Counter(error=4, critical=1)
        assert not engine.state.unvalidated
        assert not storage.unvalidated
        over, silent, _, nobody, odd = storage.jobs.values()
        assert over.progress == 0
        assert silent.error == Failure("No error message was recorded.")
        assert nobody.status == "queued"
        assert (odd.progress, odd.finished_at) == (100, WALL)
        repeated = await engine.cleanup()
        assert (repeated.validation_issues_found, repeated.validation_issues_fixed) == (0, 0)


@in_virtual_time
async def test_issues_without_a_safe_fix_are_reported_by_every_run(storage: MemoryStorage) -> None:
    policy = Policy(require_download_url=True)
    storage.put(row(1, "bare", "completed", progress=100, finished_at=WALL))
    live = row(2, "nameless")
    storage.put(replace(live, options=replace(live.options, queue="")))
    async with VirtualEngine(storage, policy=policy) as engine:
        first = await engine.cleanup()
        assert (first.validation_issues_found, first.validation_issues_fixed) == (2, 0)
        second = await engine.cleanup()
        assert (second.validation_issues_found, second.validation_issues_fixed) == (2, 0)
        assert storage.job("nameless") is not None


@in_engine()
async def test_valid_jobs_cost_no_command(engine: VirtualEngine) -> None:
    for number in range(1200):
        await engine.yes(Create(id=f"job-{number}"))
    batches = len(engine.disk.batches)
    await engine.first_cleanup()
    assert len(engine.disk.batches) - batches == 1  # the report


@in_engine(schedule=replace(PASSES, batch=10))
async def test_workers_are_served_between_slices(engine: VirtualEngine) -> None:
    for number in range(200):
        await finished(engine, f"old-{number}", expires_at=engine.now + 1000)
    await seconds(1)
    lock_id = await engine.held("a")
    engine.run_maintainer()
    await until(lambda: bool(deletions(engine)))
    await engine.yes(Progress(id="a", lock_id=lock_id, progress=1))
    assert len(deletions(engine)) < 40
    await until(lambda: engine.maintainer.totals.runs == 1)
    assert len(deletions(engine)) == 200


# -- the audit log ----------------------------------------------------------------------------------------------------


def entry(at: int) -> AuditEntry:
    return AuditEntry(at, "admin", "unix", "cancel", "a")


@in_virtual_time
async def test_old_audit_entries_are_deleted_and_the_newest_stays(storage: MemoryStorage) -> None:
    schedule = CleanupSchedule(audit_ms=10 * SECOND_MS, batch=2)
    async with VirtualEngine(storage, schedule=schedule) as engine:
        storage.audited = {seq: entry(engine.now) for seq in range(1, 6)}
        storage.audited[6] = entry(engine.now + 5 * SECOND_MS)
        await seconds(12)
        await engine.cleanup()
        assert list(storage.audited) == [6]
        await seconds(60)
        await engine.cleanup()
        assert list(storage.audited) == [6]


@in_virtual_time
async def test_no_audit_entry_is_old_while_the_clock_is_suspect(storage: MemoryStorage) -> None:
    async with VirtualEngine(storage) as engine:
        storage.audited = {1: entry(1), 2: entry(engine.now)}
        engine.step_ms = 2 * DAY_MS
        await engine.cleanup()
        assert list(storage.audited) == [1, 2]
        engine.step_ms = 0
        await engine.cleanup()
        assert list(storage.audited) == [2]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("expired", "deletion: OSError: broken"),
        ("prune", "events: OSError: broken"),
        ("trim_audit", "audit: OSError: broken"),
        ("save_figures", "statistics: OSError: broken"),
    ],
)
@in_virtual_time
async def test_a_failed_step_is_reported_and_the_others_run(method: str, error: str, storage: MemoryStorage) -> None:
    storage.put(row(1, "over", progress=120))
    async with VirtualEngine(storage) as engine:
        await engine.yes(Create(id="old", expires_at=engine.now + 1))
        await seconds(1)
        storage.errors[method] = OSError("broken")
        report = await engine.cleanup()
        assert report.errors == [error]
        assert report.validation_issues_fixed == 1
        assert engine.maintainer.totals.found["expired"] == 1
        assert len(stored_reports(engine)) == 1
        storage.errors.clear()


@in_virtual_time
async def test_writes_rejected_by_a_full_disk_are_reported_and_counted_next_time(storage: MemoryStorage) -> None:
    storage.put(row(1, "over", progress=120))
    async with VirtualEngine(storage) as engine:
        await finished(engine, "old", expires_at=engine.now + 1)
        await seconds(1)
        engine.actor.full_disk.write_limit = WriteLimit.ALL_BUT_ENDINGS
        engine.disk.errors["probe"] = DiskFull("full")
        report = await engine.cleanup()
        assert report.expired_jobs_deleted == 1
        assert [error.partition(":")[0] for error in report.errors] == ["validation", "report"]
        assert stored_reports(engine) == []
        del engine.disk.errors["probe"]
        await seconds(2)
        report = await engine.cleanup()
        assert report.errors == []
        assert (report.expired_jobs_deleted, report.validation_issues_fixed) == (1, 1)
        assert (await engine.cleanup()).expired_jobs_deleted == 0


@in_engine()
async def test_changes_during_the_write_of_a_report_are_in_the_next_one(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await seconds(1)
    engine.disk.gate.clear()
    tasks = asyncio.create_task(engine.cleanup())
    await engine.disk.at_gate.wait()
    engine.state.counters.since_report.recovered += 3
    engine.disk.gate.set()
    assert (await tasks).stuck_jobs_recovered == 0
    assert (await engine.cleanup()).stuck_jobs_recovered == 3
    assert engine.state.counters.since_report.recovered == 0


@in_engine(schedule=PASSES)
async def test_a_bug_in_a_run_does_not_end_cleanup(engine: VirtualEngine) -> None:
    await engine.yes(Create(id="a"))
    totals, engine.maintainer.totals = engine.maintainer.totals, None  # type: ignore[assignment]
    assert (await engine.cleanup()).errors == ["run: 'NoneType' object has no attribute 'runs'"]
    engine.maintainer.totals = totals
    assert (await engine.cleanup()).errors == []


@pytest.mark.slow
@in_engine(schedule=PASSES)
async def test_health_is_degraded_after_three_intervals_without_success(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    await seconds(1)
    assert engine.maintainer.degraded_reason() is None
    engine.disk.errors["prune"] = OSError("broken")
    await seconds(899)
    assert engine.maintainer.degraded_reason() is None
    await seconds(2)
    reason = engine.maintainer.degraded_reason() or ""
    assert reason.startswith("No cleanup run has succeeded for 15 min")
    assert "events: OSError: broken" in reason
    engine.disk.errors.clear()
    await engine.cleanup()
    assert engine.maintainer.degraded_reason() is None


@in_engine(schedule=PASSES)
async def test_steps_that_an_older_node_could_not_read_wait(engine: VirtualEngine) -> None:
    for step in ("prune", "trim_audit", "save_figures"):
        engine.disk.errors[step] = FormatNotRead("node b is older")
    engine.run_maintainer()
    with capture_logs() as lines:
        report = await engine.cleanup()
    assert report.errors == []
    waits = [line["step"] for line in lines if line["event"] == "cleanup_step_waits"]
    assert waits == ["events", "audit", "statistics"]


# -- reports and statistics after a restart ------------------------------------------------------------------------


@in_virtual_time
async def test_the_last_report_and_the_statistics_survive_a_restart(storage: MemoryStorage) -> None:
    async with VirtualEngine(storage) as engine:
        engine.run_maintainer()
        await engine.held("a")
        await seconds(61)
        await engine.maintainer.recover_stuck()
        await engine.cleanup()
        report = engine.maintainer.last_report
    storage.gate.clear()
    async with VirtualEngine(storage) as engine:
        assert engine.state.counters.recovered_last_day(engine.now) == 1
        await seconds(5)
        engine.run_maintainer()
        await storage.at_gate.wait()
        state = engine.maintainer.state()
        assert state.last_report == report
        assert 5000 <= (state.time_since_last_cleanup or 0) < 6000
        assert await engine.maintainer.reports(10) == stored_reports(engine)[::-1]
        storage.gate.set()


@in_virtual_time
async def test_counts_since_the_last_report_survive_a_restart(storage: MemoryStorage) -> None:
    async with VirtualEngine(storage) as engine:
        engine.run_maintainer()
        await engine.held("a")
        await seconds(61)
        await engine.maintainer.recover_stuck()
    async with VirtualEngine(storage) as engine:
        assert (await engine.cleanup()).stuck_jobs_recovered == 1


@in_virtual_time
async def test_unreadable_reports_are_omitted(storage: MemoryStorage) -> None:
    async with VirtualEngine(storage) as engine:
        report = await engine.cleanup()
    storage.kept_reports.append(b"{}")
    async with VirtualEngine(storage) as engine:
        assert await engine.maintainer.reports(10) == [report]
        assert await engine.maintainer.reports(1) == []


@in_engine()
async def test_cleanup_starts_even_if_no_report_can_be_read(engine: VirtualEngine) -> None:
    engine.disk.errors["reports"] = OSError("broken")
    assert (await engine.cleanup()).errors == []


@in_virtual_time
async def test_extra_data_is_saved_with_the_statistics() -> None:
    async with VirtualEngine(extra=lambda: b'{"hour":[1]}') as engine:
        engine.state.counters.completions = {5: (1, 2)}
        await engine.cleanup()
        assert read_extra(engine.disk.figures) == b'{"hour":[1]}'
        assert read_stats(engine.disk.figures).completions == {5: (1, 2)}
    without = msgspec.json.encode(Counters(stalls=3))  # as an older version saved them
    assert read_extra(without) == read_extra(None) == read_extra(b"{") == b"null"


def test_unreadable_statistics_start_empty() -> None:
    assert read_stats(None) == read_stats(b"{") == read_stats(b'{"stalls": "many"}') == Counters()


def test_histories_are_restored_and_totals_start_at_0() -> None:
    """Otherwise a counter would go back after a crash, which Prometheus takes for a start at 0."""
    counters = Counters(stalls=3, completions={5: (1, 2)}, recoveries={5: 1}, recovered={6: 1}, events={"granted": 9})
    counters.grants, counters.processing = {"video": 9}, {"old": Histogram([1, 2])}
    counters.double_grants.minutes, counters.double_grants.total = {5: 1}, 7
    expected = Counters(completions={5: (1, 2)}, recoveries={5: 1}, recovered={6: 1})
    expected.double_grants.minutes = {5: 1}
    assert read_stats(msgspec.json.encode(counters)) == expected


@in_virtual_time
async def test_recovery_tries_again_soon_while_the_mailbox_is_full() -> None:
    schedule = CleanupSchedule(interval_ms=HOUR_MS, min_interval_ms=HOUR_MS, recover_every_ms=10 * SECOND_MS)
    async with VirtualEngine(schedule=schedule) as engine:
        await engine.held("a", lock_ttl_ms=SECOND_MS)
        engine.run_maintainer()
        await seconds(5)
        really_ask, attempts = engine.actor.ask, 0

        async def ask(command: AnyCommand, **asked: Any) -> Response | ApiError:
            nonlocal attempts
            attempts += 1
            return ApiError("overloaded", "full") if attempts % 10 else await really_ask(command, **asked)

        engine.actor.ask = ask  # type: ignore[method-assign]
        await seconds(7)
        assert engine.state.jobs["a"].status == "queued"


# -- an operator recovers ---------------------------------------------------------------------------------------------


@in_engine(schedule=replace(PASSES, batch=1))
async def test_recover_stalled_returns_the_action_for_each_job(engine: VirtualEngine) -> None:
    await engine.held("a")
    lock_id = await engine.held("b", on_stall="fail")
    await engine.yes(Progress(id="b", lock_id=lock_id, progress=45))
    await engine.held("live", lock_ttl_ms=HOUR_MS)
    await seconds(61)
    view = checked(await engine.maintainer.recover_stuck())
    assert (view.recovered_jobs, view.reset_jobs, view.failed_jobs) == (2, 1, 1)
    assert [(each.job_id, each.action) for each in view.details] == [("a", "reset"), ("b", "failed")]
    assert "No update from worker w-1" in view.details[0].reason
    assert view.timestamp == engine.now
    assert last_of(engine, "a").by == "admin"
    assert checked(await engine.maintainer.recover_stuck()).details == []


@in_engine()
async def test_recover_stalled_returns_errors(engine: VirtualEngine) -> None:
    engine.actor.stop()
    assert error_in(await engine.maintainer.recover_stuck()).code == "shutting_down"


# -- the end ----------------------------------------------------------------------------------------------------------


@in_engine(schedule=replace(PASSES, batch=1))
async def test_stop_ends_a_run_between_slices_and_resolves_its_waiters(engine: VirtualEngine) -> None:
    for number in range(20):
        await finished(engine, f"old-{number}", expires_at=engine.now + 1000)
    await seconds(1)
    running = engine.run_maintainer()
    tasks = asyncio.create_task(engine.cleanup())
    await until(lambda: bool(deletions(engine)))
    engine.maintainer.stop()
    report = await tasks
    await running
    assert 0 < len(deletions(engine)) < 20
    assert report.errors == [
        "deletion: the daemon is stopping; the next cleanup run continues.",
        "run: it ended early because the daemon is stopping.",
    ]
    assert stored_reports(engine) == []
    assert read_stats(engine.disk.figures).since_report.deleted == len(deletions(engine))
    late = await engine.cleanup()
    assert late.errors == ["run: not started because the daemon is stopping."]


@in_engine()
async def test_stop_resolves_a_request_whose_run_never_started(engine: VirtualEngine) -> None:
    tasks = asyncio.create_task(engine.maintainer.run_cleanup(forced=True))
    await seconds(0)
    engine.maintainer.stop()
    await engine.maintainer.run()
    assert (await tasks).errors == ["run: not started because the daemon is stopping."]


@in_engine()
async def test_a_failed_save_of_statistics_does_not_raise_at_the_end(engine: VirtualEngine) -> None:
    running = engine.run_maintainer()
    await seconds(1)
    engine.disk.errors["save_figures"] = OSError("broken")
    engine.maintainer.stop()
    await running


@in_virtual_time
async def test_failed_runs_do_not_reset_the_time_since_the_last_success(storage: MemoryStorage) -> None:
    async with VirtualEngine(storage) as engine:
        first = await engine.cleanup()
        await seconds(10)
        engine.disk.errors["expired"] = OSError("broken")
        for number in (1, 2):
            await seconds(50)
            failed = await engine.cleanup()
            assert failed.errors
            state = engine.maintainer.state()
            assert (state.failed_since_last_success, state.last_failure) == (number, failed)
        assert (state.time_since_last_cleanup or 0) >= 110_000
        assert engine.maintainer.last_success == first
        assert await engine.maintainer.run_cleanup(forced=False) is failed, "there is no run within min_interval"
    async with VirtualEngine(storage) as engine:
        assert engine.maintainer.state().last_failure is None
        storage.gate.clear()
        engine.run_maintainer()
        await storage.at_gate.wait()
        state = engine.maintainer.state()
        assert (state.failed_since_last_success, engine.maintainer.last_success) == (2, first), (
            "it is read at the start"
        )
        assert (state.time_since_last_cleanup or 0) >= 110_000
        del storage.errors["expired"]
        storage.gate.set()
        await engine.cleanup()  # the running one had failed already
        await engine.cleanup()
        state = engine.maintainer.state()
        assert (state.failed_since_last_success, state.last_failure) == (0, None)
        assert (state.time_since_last_cleanup or 0) < 1_000


@in_virtual_time
async def test_a_lost_lead_is_not_a_failure_of_a_cleanup() -> None:
    with capture_logs() as logs:
        async with VirtualEngine() as engine:
            engine.disk.errors["save_figures"] = LeadershipLost("another node leads the journal")
            engine.run_maintainer()
            await seconds(1)
    rejected = [(line["event"], line["log_level"]) for line in logs if line["event"] != "cleanup_run"]
    assert rejected == [("cleanup_step_failed", "warning"), ("cleanup_rejected", "warning")]
