"""Maintenance: recovery in time, one cleanup run at a time, reports of every step and failure, no work without need."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
import pytest
from msgspec.structs import replace

from jobd.core.stats import Figures, Histogram
from jobd.engine.disk_full import Closed
from jobd.maintenance.cleanup_pass import CleanupSchedule
from jobd.maintenance.maintainer import TICK_S, read_extra, read_figures
from jobd.model.commands import Complete, Create, Delete, Extend, ForceFail, Get, Pause, Progress, Recover, Timeline
from jobd.model.errors import ApiError
from jobd.model.events import Event
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, Failure, Policy
from jobd.model.responses import CleanupReport, RecoverStuckView, Response
from jobd.model.storage import AuditEntry, DiskFull
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import WALL, VirtualEngine, in_virtual_time, row, seconds, until

RECOVERING = CleanupSchedule(interval_ms=DAY_MS, min_interval_ms=DAY_MS)
PASSES = CleanupSchedule(recover_every_ms=0)


def deletions(house: VirtualEngine) -> list[str]:
    return [event.job_id for event in house.disk.events if event.type == "deleted"]


def last_of(house: VirtualEngine, job_id: str) -> Event:
    return [event for event in house.disk.events if event.job_id == job_id][-1]


def kept(house: VirtualEngine) -> list[CleanupReport]:
    """Return the stored reports, oldest first."""
    return [msgspec.json.decode(body, type=CleanupReport) for body in house.disk.kept_reports]


async def finished(house: VirtualEngine, job_id: str, **fields: object) -> None:
    lock_id = await house.held(job_id)
    await house.yes(Complete(id=job_id, lock_id=lock_id, **fields))  # type: ignore[arg-type]


# -- recovery and ticks -----------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stuck_job_is_recovered_within_a_period_and_a_second() -> None:
    async with VirtualEngine(schedule=RECOVERING) as house:
        house.keep()
        await house.held("a", lock_ttl_ms=60_000)
        await seconds(59)
        assert house.book.jobs["a"].status == "processing"
        await seconds(12)
        assert house.book.jobs["a"].status == "queued"
        assert (last_of(house, "a").type, last_of(house, "a").by) == ("stalled", "recovery")


@in_virtual_time
async def test_a_job_that_reports_after_the_scan_is_not_recovered() -> None:
    async with VirtualEngine() as house:
        lock_id = await house.held("a", lock_ttl_ms=60_000)
        await seconds(61)
        at = house.clock.moment()
        house.book.advance(at.now, at.lease)
        assert list(house.book.stuck) == ["a"]
        # Both commands are in one batch; the scan found the job stuck.
        reporting = asyncio.create_task(house.actor.ask(Progress(id="a", lock_id=lock_id, progress=7)))
        recovering = asyncio.create_task(house.actor.ask(Recover(limit=10), by="recovery"))
        assert isinstance(await reporting, Response)
        recovered = await recovering
        assert isinstance(recovered, Response)
        assert (recovered.data.details, recovered.data.locks_cleared) == ([], 0)
        assert house.book.holds("a", lock_id)
        assert last_of(house, "a").type == "progress"


@in_virtual_time
async def test_an_expired_lock_is_cleared_and_the_grant_kept_until_its_stuck_time() -> None:
    async with VirtualEngine(schedule=RECOVERING) as house:
        house.keep()
        lock_id = await house.held("a", lock_ttl_ms=60_000, stuck_after_ms=10 * MINUTE_MS)
        await seconds(75)
        assert last_of(house, "a").type == "lock_expired"
        await house.yes(Extend(id="a", lock_id=lock_id))
        assert house.book.live_locks() == 1
        await seconds(11 * 60)
        assert last_of(house, "a").type == "stalled"
        assert house.cleaner.totals.found == Counter(expired_locks=2, stuck=1)


@in_virtual_time
async def test_recovery_runs_in_slices_until_nothing_is_stuck() -> None:
    async with VirtualEngine(schedule=replace(RECOVERING, batch=2)) as house:
        for number in range(7):
            await house.held(f"job-{number}", stuck_after_ms=HOUR_MS if number == 6 else 0)
        house.keep()
        await seconds(75)
        assert [job.status for job in house.book.jobs.values()].count("queued") == 6
        assert house.book.cleared_locks.keys() == {"job-6"}


@in_virtual_time
async def test_an_idle_daemon_sends_no_recovery_commands() -> None:
    async with VirtualEngine(schedule=RECOVERING) as house:
        for number in range(50):
            await house.yes(Create(id=f"job-{number}"))
        house.keep()
        await seconds(60)
        calls = dict(house.disk.calls)
        await seconds(3600)
        assert house.disk.calls == calls


@in_virtual_time
async def test_a_lock_that_is_kept_alive_costs_no_write() -> None:
    """A deadline that has moved on changes nothing."""
    async with VirtualEngine(schedule=RECOVERING) as house:
        lock_id = await house.held("a", lock_ttl_ms=20_000)
        house.keep()
        for _ in range(12):
            await seconds(10)
            await house.yes(Progress(id="a", lock_id=lock_id, progress=1))
        events = [event.type for event in house.disk.events]
        assert events == ["created", "granted", *["progress"] * 12]


@in_virtual_time
async def test_recover_every_0_leaves_recovery_to_cleanup_runs() -> None:
    async with VirtualEngine(schedule=PASSES) as house:
        house.keep()
        await seconds(1)
        await house.held("a")
        await seconds(200)
        assert house.book.processing.keys() == {"a"}
        await seconds(100)
        assert not house.book.processing
        assert house.cleaner.last_report is not None
        assert house.cleaner.last_report.stuck_jobs_recovered == 1


@in_virtual_time
async def test_the_next_cleanup_run_is_known_if_only_cleanup_runs_recover_jobs() -> None:
    async with VirtualEngine(schedule=replace(RECOVERING, recover_every_ms=0)) as house:
        assert house.book.next_cleanup_at == house.now, "the first one comes with the start"
        house.keep()
        await seconds(1)
        announced = house.book.next_cleanup_at
        assert announced is not None
        report = house.cleaner.last_report
        assert report is not None
        await seconds((announced - house.now) / 1000 - 1)
        assert house.cleaner.last_report is report
        await seconds(2)
        assert house.cleaner.last_report is not report
        assert house.book.next_cleanup_at is not None
        assert house.book.next_cleanup_at > house.now
        house.cleaner.set_schedule(RECOVERING)
        assert house.book.next_cleanup_at is None


@in_virtual_time
async def test_lease_time_is_persisted_while_a_job_is_processing_and_only_then() -> None:
    async with VirtualEngine(schedule=RECOVERING) as house:
        house.keep()
        await house.yes(Create(id="b", priority=1))
        await seconds(60)
        batches = len(house.disk.batches)
        lock_id = await house.held("a", lock_ttl_ms=HOUR_MS)
        lease = house.disk.numbers.lease_ms
        await seconds(10 * TICK_S)
        assert house.disk.numbers.lease_ms - lease >= 9 * TICK_S * SECOND_MS
        await house.yes(Complete(id="a", lock_id=lock_id))
        lease = house.disk.numbers.lease_ms
        await seconds(600)
        assert house.disk.numbers.lease_ms == lease
        ticks = [batch for batch in house.disk.batches[batches:] if not batch.changes]
        assert len(ticks) in (9, 10)


@in_virtual_time
async def test_a_pause_ends_by_itself_also_without_recovery() -> None:
    async with VirtualEngine(schedule=replace(RECOVERING, recover_every_ms=0)) as house:
        house.keep()
        await house.yes(Pause(name="q", until=house.clock.moment().now + 60_000))
        await seconds(60 - TICK_S)
        assert list(house.book.paused) == ["q"]
        await seconds(2 * TICK_S)
        assert house.book.paused == {}
        assert house.disk.queues["q"].pause is None


@in_virtual_time
async def test_recovery_and_ticks_survive_rejections() -> None:
    async with VirtualEngine(schedule=RECOVERING) as house:
        house.keep()
        await house.held("a")
        house.actor.full_disk.closed = Closed.ALL_WRITES
        house.disk.errors["probe"] = house.disk.errors["build_reserve"] = DiskFull("full")
        await seconds(90)
        assert house.book.processing.keys() == {"a"}
        house.disk.errors.clear()
        house.disk.free()
        await seconds(12)
        assert not house.book.processing


@in_virtual_time
async def test_a_long_cleanup_run_delays_no_recovery() -> None:
    release = asyncio.Event()

    class Slow(MemoryStorage):
        async def expired_jobs(self, now: int, limit: int, skip: int = 0) -> list[str]:
            await release.wait()
            return await super().expired_jobs(now, limit, skip)

    async with VirtualEngine(Slow(), schedule=replace(RECOVERING, interval_ms=MINUTE_MS)) as house:
        await house.held("a")
        await seconds(1)
        house.keep()
        await seconds(75)
        assert house.cleaner.is_running
        assert not house.book.processing
        release.set()


# -- when cleanup runs --------------------------------------------------------------------------------------------


@in_virtual_time
async def test_cleanup_runs_at_the_start_and_then_every_interval() -> None:
    async with VirtualEngine(schedule=PASSES) as house:
        assert house.cleaner.state().time_since_last_cleanup is None
        house.keep()
        await seconds(1)
        assert house.cleaner.totals.passes == 1
        state = house.cleaner.state()
        assert not state.cleanup_running
        assert 900 <= (state.time_since_last_cleanup or 0) <= 1000
        await seconds(298)
        assert house.cleaner.totals.passes == 1
        await seconds(2)
        assert house.cleaner.totals.passes == 2
        assert [report.forced for report in kept(house)] == [False, False]


@in_virtual_time
async def test_a_forced_run_starts_at_once_an_unforced_one_not_within_two_minutes() -> None:
    async with VirtualEngine(schedule=PASSES) as house:
        house.keep()
        await seconds(10)
        first = house.cleaner.last_report
        assert await house.cleaner.run_cleanup(forced=False) is first
        forced = await house.cleaner.run_cleanup(forced=True)
        assert forced.forced
        assert house.cleaner.totals.passes == 2
        await seconds(120)
        assert not (await house.cleaner.run_cleanup(forced=False)).forced
        assert house.cleaner.totals.passes == 3


@in_virtual_time
async def test_the_schedule_keeps_its_distance_from_a_forced_run() -> None:
    async with VirtualEngine(
        schedule=CleanupSchedule(interval_ms=10_000, min_interval_ms=60_000, recover_every_ms=0)
    ) as house:
        house.keep()
        await seconds(50)
        await house.cleaner.run_cleanup(forced=True)
        await seconds(59)
        assert house.cleaner.totals.passes == 2
        await seconds(2)
        assert house.cleaner.totals.passes == 3


@in_virtual_time
async def test_a_request_during_a_run_gets_its_report() -> None:
    async with VirtualEngine() as house:
        house.disk.gate.clear()
        house.keep()
        await house.disk.at_gate.wait()
        assert house.cleaner.state().cleanup_running
        asked = [asyncio.create_task(house.cleaner.run_cleanup(forced=forced)) for forced in (True, False)]
        await seconds(1)
        house.disk.gate.set()
        first, second = await asyncio.gather(*asked)
        assert first is second is house.cleaner.last_report
        assert not first.forced
        assert house.cleaner.totals.passes == 1


@in_virtual_time
async def test_requests_before_a_run_starts_share_it() -> None:
    async with VirtualEngine() as house:
        asked = [asyncio.create_task(house.cleaner.run_cleanup(forced=forced)) for forced in (False, True)]
        await seconds(0)
        house.keep()
        reports = await asyncio.gather(*asked)
        assert reports[0] is reports[1]
        assert reports[0].forced
        assert house.cleaner.totals.passes == 1


@in_virtual_time
async def test_a_cancelled_request_does_not_end_the_run() -> None:
    async with VirtualEngine() as house:
        house.keep()
        await seconds(1)
        house.disk.gate.clear()
        asked = asyncio.create_task(house.cleaner.run_cleanup(forced=True))
        await house.disk.at_gate.wait()
        asked.cancel()
        await asyncio.wait({asked})
        house.disk.gate.set()
        await until(lambda: house.cleaner.totals.passes == 2)
        assert [report.forced for report in kept(house)] == [False, True]


@in_virtual_time
async def test_a_new_schedule_applies_at_once() -> None:
    async with VirtualEngine() as house:
        house.keep()
        await seconds(30)
        await house.held("a")
        house.cleaner.set_schedule(CleanupSchedule(interval_ms=60_000, min_interval_ms=0, recover_every_ms=10_000))
        await seconds(31)
        assert house.cleaner.totals.passes == 2
        await seconds(40)
        assert house.cleaner.totals.found["stuck"] == 1


# -- steps of a cleanup run ---------------------------------------------------------------------------------------


@in_virtual_time
async def test_overdue_queued_jobs_fail_with_the_next_recovery() -> None:
    """No worker can claim them any more; they must not stay queued until the next cleanup run."""
    async with VirtualEngine(schedule=RECOVERING) as house:
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        await house.yes(Create(id="old", expires_at=house.now + 1000))
        await house.yes(Create(id="new", expires_at=house.now + HOUR_MS))
        await seconds(11.5)
        assert house.book.jobs.keys() == {"new"}
        assert last_of(house, "old").by == "recovery"
        assert house.cleaner.totals.passes == 1
        assert house.cleaner.totals.found == Counter(expired=1)


async def test_overdue_queued_jobs_fail() -> None:
    async with VirtualEngine(schedule=replace(PASSES, batch=2)) as house:
        for number in range(5):
            await house.yes(Create(id=f"old-{number}", expires_at=house.now + 1000))
        await house.yes(Create(id="new", expires_at=house.now + HOUR_MS))
        await seconds(1)
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        assert house.book.jobs.keys() == {"new"}
        assert house.book.totals["failed"] == 5
        old = house.disk.job("old-3")
        assert old is not None
        assert old.error is not None
        assert old.error.code == "expired"
        assert house.cleaner.totals.found == Counter(expired=5)


@in_virtual_time
async def test_finished_jobs_are_deleted_after_their_retention() -> None:
    async with VirtualEngine(schedule=replace(PASSES, batch=2)) as house:
        for number in range(5):
            await finished(house, f"old-{number}", storage_key=f"k-{number}", expires_at=house.now + 1000)
        await finished(house, "young", storage_key="k", expires_at=house.now + HOUR_MS)
        await seconds(1)
        report_at = house.now
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        assert sorted(deletions(house)) == [f"old-{number}" for number in range(5)]
        report = kept(house)[0]
        assert (report.expired_jobs_deleted, report.errors) == (5, [])
        assert report.timestamp >= report_at
        assert house.disk.job("young") is not None


@in_virtual_time
async def test_deletions_by_operators_do_not_count_as_deletions_by_age() -> None:
    async with VirtualEngine() as house:
        await finished(house, "a")
        await house.yes(Delete(id="a"), by="admin", admin=True)
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        assert kept(house)[0].expired_jobs_deleted == 0


@in_virtual_time
async def test_nothing_is_deleted_by_age_while_the_clock_is_suspect() -> None:
    async with VirtualEngine(schedule=PASSES) as house:
        await finished(house, "a", expires_at=house.now + 1000)
        await finished(house, "gone", expires_at=house.now + 1000)
        await house.yes(Delete(id="gone"), by="admin", admin=True)
        house.step_ms = 40 * DAY_MS
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        assert house.disk.job("a") is not None
        assert [event.type for event in house.disk.events if event.job_id == "gone"][-1] == "deleted"
        assert kept(house)[0].errors == []
        house.clock.accept()
        await seconds(301)
        assert house.disk.job("a") is None
        assert not [event for event in house.disk.events if event.job_id == "gone"]


@in_virtual_time
async def test_the_journal_of_a_deleted_job_is_kept_for_another_day() -> None:
    async with VirtualEngine(schedule=replace(PASSES, batch=1, interval_ms=HOUR_MS)) as house:
        await finished(house, "a", expires_at=house.now + 1000)
        house.keep()
        await seconds(24 * 3600)
        assert len(await house.disk.timeline(1)) == 4
        await seconds(3 * 3600)
        assert await house.disk.timeline(1) == []


class Stubborn(MemoryStorage):
    """A store that lists a job as expired although no deletion finds it."""

    async def expired_jobs(self, now: int, limit: int, skip: int = 0) -> list[str]:
        return ["a"]


@in_virtual_time
async def test_undeletable_expired_rows_end_the_step_with_an_error() -> None:
    async with VirtualEngine(Stubborn()) as house:
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        assert kept(house)[0].errors == ["deletion: 1 expired jobs could not be deleted, the first is a."]


@in_virtual_time
async def test_a_damaged_expired_row_is_quarantined_and_the_run_continues() -> None:
    disk = MemoryStorage()
    for seq, name in enumerate(("a", "b"), 1):
        disk.put(row(seq, name, "completed", progress=100, finished_at=WALL, expires_at=WALL))
    async with VirtualEngine(disk) as house:
        await house.yes(Get(id="a"))  # loads it into memory
        disk.bad_jobs["a"] = "its checksum is wrong"
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        assert kept(house)[0].errors == []
        assert house.book.quarantined == {"a": "its checksum is wrong"}
        assert house.book.totals["completed"] == 0
        assert (await house.no(Get(id="a"))).code == "job_quarantined"


@in_virtual_time
async def test_a_run_repairs_imported_and_hand_edited_rows() -> None:
    disk = MemoryStorage()
    disk.put(row(1, "over", progress=120))
    disk.put(row(2, "silent", "failed", finished_at=WALL))
    disk.put(row(3, "fine"))
    disk.put(row(4, "nobody", "processing", started_at=WALL))
    disk.put(row(5, "odd", "completed", progress=50, finished_at=WALL - 1, started_at=WALL))
    async with VirtualEngine(disk, schedule=replace(PASSES, batch=2)) as house:
        assert len(house.book.suspects) == 5
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        report = kept(house)[0]
        assert report.errors == []
        assert report.validation_issues_found == report.validation_issues_fixed == 5
        assert house.cleaner.totals.issues == Counter(error=4, critical=1)
        assert not house.book.suspects
        assert not disk.suspects
        over, silent, nobody, odd = (disk.job(name) for name in ("over", "silent", "nobody", "odd"))
        assert over is not None
        assert over.progress == 0
        assert silent is not None
        assert silent.error == Failure("No error message was recorded.")
        assert nobody is not None
        assert nobody.status == "queued"
        assert odd is not None
        assert (odd.progress, odd.finished_at) == (100, WALL)
        again = await house.cleaner.run_cleanup(forced=True)
        assert (again.validation_issues_found, again.validation_issues_fixed) == (0, 0)


@in_virtual_time
async def test_issues_without_a_safe_fix_are_reported_by_every_run() -> None:
    policy = Policy(require_download_url=True)
    disk = MemoryStorage()
    disk.put(row(1, "bare", "completed", progress=100, finished_at=WALL))
    live = row(2, "nameless")
    disk.put(replace(live, options=replace(live.options, queue="")))
    async with VirtualEngine(disk, policy=policy) as house:
        house.keep()
        first = await house.cleaner.run_cleanup(forced=True)
        assert (first.validation_issues_found, first.validation_issues_fixed) == (2, 0)
        second = await house.cleaner.run_cleanup(forced=True)
        assert (second.validation_issues_found, second.validation_issues_fixed) == (2, 0)
        assert disk.job("nameless") is not None


@in_virtual_time
async def test_valid_jobs_cost_no_command() -> None:
    async with VirtualEngine() as house:
        for number in range(1200):
            await house.yes(Create(id=f"job-{number}"))
        batches = len(house.disk.batches)
        house.keep()
        await until(lambda: house.cleaner.totals.passes == 1)
        assert len(house.disk.batches) - batches == 1  # the report


@in_virtual_time
async def test_workers_are_served_between_slices() -> None:
    async with VirtualEngine(schedule=replace(PASSES, batch=10)) as house:
        for number in range(200):
            await finished(house, f"old-{number}", expires_at=house.now + 1000)
        await seconds(1)
        lock_id = await house.held("a")
        house.keep()
        await until(lambda: bool(deletions(house)))
        await house.yes(Progress(id="a", lock_id=lock_id, progress=1))
        assert len(deletions(house)) < 40
        await until(lambda: house.cleaner.totals.passes == 1)
        assert len(deletions(house)) == 200


# -- the audit log ----------------------------------------------------------------------------------------------------


def deed(at: int) -> AuditEntry:
    return AuditEntry(at, "admin", "unix", "cancel", "a")


@in_virtual_time
async def test_old_audit_entries_are_deleted_and_the_newest_stays() -> None:
    disk = MemoryStorage()
    schedule = CleanupSchedule(audit_ms=10 * SECOND_MS, batch=2)
    async with VirtualEngine(disk, schedule=schedule) as house:
        disk.audited = {seq: deed(house.now) for seq in range(1, 6)}
        disk.audited[6] = deed(house.now + 5 * SECOND_MS)
        await seconds(12)
        house.keep()
        await house.cleaner.run_cleanup(forced=True)
        assert list(disk.audited) == [6]
        await seconds(60)
        await house.cleaner.run_cleanup(forced=True)
        assert list(disk.audited) == [6]


@in_virtual_time
async def test_no_audit_entry_is_old_while_the_clock_is_suspect() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as house:
        disk.audited = {1: deed(1), 2: deed(house.now)}
        house.step_ms = 2 * DAY_MS
        house.keep()
        await house.cleaner.run_cleanup(forced=True)
        assert list(disk.audited) == [1, 2]
        house.step_ms = 0
        await house.cleaner.run_cleanup(forced=True)
        assert list(disk.audited) == [2]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("expired", "deletion: OSError: broken"),
        ("prune", "journal: OSError: broken"),
        ("trim_audit", "audit: OSError: broken"),
        ("save_figures", "figures: OSError: broken"),
    ],
)
def test_a_failed_step_is_reported_and_the_others_run(method: str, error: str) -> None:
    @in_virtual_time
    async def test() -> None:
        disk = MemoryStorage()
        disk.put(row(1, "over", progress=120))
        async with VirtualEngine(disk) as house:
            await house.yes(Create(id="old", expires_at=house.now + 1))
            await seconds(1)
            disk.errors[method] = OSError("broken")
            house.keep()
            report = await house.cleaner.run_cleanup(forced=True)
            assert report.errors == [error]
            assert report.validation_issues_fixed == 1
            assert house.cleaner.totals.found["expired"] == 1
            assert len(kept(house)) == 1
            disk.errors.clear()

    test()


@in_virtual_time
async def test_writes_rejected_by_a_full_disk_are_reported_and_counted_next_time() -> None:
    disk = MemoryStorage()
    disk.put(row(1, "over", progress=120))
    async with VirtualEngine(disk) as house:
        await finished(house, "old", expires_at=house.now + 1)
        await seconds(1)
        house.actor.full_disk.closed = Closed.ALL_BUT_ENDINGS
        house.disk.errors["probe"] = DiskFull("full")
        house.keep()
        report = await house.cleaner.run_cleanup(forced=True)
        assert report.expired_jobs_deleted == 1
        assert [error.partition(":")[0] for error in report.errors] == ["validation", "report"]
        assert kept(house) == []
        del house.disk.errors["probe"]
        await seconds(2)
        report = await house.cleaner.run_cleanup(forced=True)
        assert report.errors == []
        assert (report.expired_jobs_deleted, report.validation_issues_fixed) == (1, 1)
        assert (await house.cleaner.run_cleanup(forced=True)).expired_jobs_deleted == 0


@in_virtual_time
async def test_changes_during_the_write_of_a_report_are_in_the_next_one() -> None:
    async with VirtualEngine() as house:
        house.keep()
        await seconds(1)
        house.disk.gate.clear()
        asked = asyncio.create_task(house.cleaner.run_cleanup(forced=True))
        await house.disk.at_gate.wait()
        house.book.figures.since_report.recovered += 3
        house.disk.gate.set()
        assert (await asked).stuck_jobs_recovered == 0
        assert (await house.cleaner.run_cleanup(forced=True)).stuck_jobs_recovered == 3
        assert house.book.figures.since_report.recovered == 0


@in_virtual_time
async def test_a_bug_in_a_run_does_not_end_cleanup() -> None:
    async with VirtualEngine(schedule=PASSES) as house:
        await house.yes(Create(id="a"))
        totals, house.cleaner.totals = house.cleaner.totals, None  # type: ignore[assignment]
        house.keep()
        report = await house.cleaner.run_cleanup(forced=True)
        assert report.errors == ["pass: 'NoneType' object has no attribute 'passes'"]
        house.cleaner.totals = totals
        assert (await house.cleaner.run_cleanup(forced=True)).errors == []


@pytest.mark.slow
@in_virtual_time
async def test_health_is_degraded_after_three_intervals_without_success() -> None:
    async with VirtualEngine(schedule=PASSES) as house:
        house.keep()
        await seconds(1)
        assert house.cleaner.degraded_reason() is None
        house.disk.errors["prune"] = OSError("broken")
        await seconds(899)
        assert house.cleaner.degraded_reason() is None
        await seconds(2)
        complaint = house.cleaner.degraded_reason()
        assert complaint is not None
        assert complaint.startswith("No cleanup run has succeeded for 90")
        assert "journal: OSError: broken" in complaint
        house.disk.errors.clear()
        await house.cleaner.run_cleanup(forced=True)
        assert house.cleaner.degraded_reason() is None


# -- reports and figures over a restart -------------------------------------------------------------------------------


@in_virtual_time
async def test_the_last_report_and_the_statistics_survive_a_restart() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as house:
        house.keep()
        await house.held("a")
        await seconds(61)
        await house.cleaner.recover_stuck()
        await house.cleaner.run_cleanup(forced=True)
        report = house.cleaner.last_report
    disk.gate.clear()
    async with VirtualEngine(disk) as house:
        assert house.book.figures.recovered_last_day(house.now) == 1
        await seconds(5)
        house.keep()
        await disk.at_gate.wait()
        state = house.cleaner.state()
        assert state.last_report == report
        assert 5000 <= (state.time_since_last_cleanup or 0) < 6000
        assert await house.cleaner.reports(10) == kept(house)[::-1]
        disk.gate.set()


@in_virtual_time
async def test_counts_since_the_last_report_survive_a_restart() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as house:
        house.keep()
        await house.held("a")
        await seconds(61)
        await house.cleaner.recover_stuck()
    async with VirtualEngine(disk) as house:
        house.keep()
        assert (await house.cleaner.run_cleanup(forced=True)).stuck_jobs_recovered == 1


@in_virtual_time
async def test_unreadable_reports_are_omitted() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as house:
        house.keep()
        report = await house.cleaner.run_cleanup(forced=True)
    disk.kept_reports.append(b"{}")
    async with VirtualEngine(disk) as house:
        assert await house.cleaner.reports(10) == [report]
        assert await house.cleaner.reports(1) == []


@in_virtual_time
async def test_cleanup_starts_even_if_no_report_can_be_read() -> None:
    async with VirtualEngine() as house:
        house.disk.errors["reports"] = OSError("broken")
        house.keep()
        assert (await house.cleaner.run_cleanup(forced=True)).errors == []


@in_virtual_time
async def test_extra_data_is_saved_with_the_statistics() -> None:
    async with VirtualEngine() as house:
        house.book.figures.stalls = 3
        house.cleaner.save_extra(lambda: b'{"hour":[1]}')
        house.keep()
        await house.cleaner.run_cleanup(forced=True)
        assert read_extra(house.disk.figures) == b'{"hour":[1]}'
        assert read_figures(house.disk.figures).stalls == 3
    without = msgspec.json.encode(Figures(stalls=3))  # as an older version saved them
    assert read_extra(without) == read_extra(None) == read_extra(b"{") == b"null"


def test_unreadable_statistics_start_empty() -> None:
    assert read_figures(None) == read_figures(b"{") == read_figures(b'{"stalls": "many"}') == Figures()


def test_histograms_with_other_buckets_are_dropped() -> None:
    figures = Figures(stalls=3, completions={5: (1, 2)})
    figures.processing = {"old": Histogram([1, 2]), "new": Histogram.empty((0.1,) * 11)}
    read = read_figures(msgspec.json.encode(figures))
    assert (read.stalls, read.completions, list(read.processing)) == (3, {5: (1, 2)}, ["new"])


# -- an operator recovers ---------------------------------------------------------------------------------------------


@in_virtual_time
async def test_recover_stuck_returns_the_action_for_each_job() -> None:
    async with VirtualEngine(schedule=replace(PASSES, batch=1)) as house:
        await house.held("a")
        lock_id = await house.held("b", on_stall="fail")
        await house.yes(Progress(id="b", lock_id=lock_id, progress=45))
        await house.held("live", lock_ttl_ms=HOUR_MS)
        await seconds(61)
        view = await house.cleaner.recover_stuck()
        assert isinstance(view, RecoverStuckView)
        assert (view.recovered_jobs, view.reset_jobs, view.failed_jobs) == (2, 1, 1)
        assert [(each.job_id, each.action) for each in view.details] == [("a", "reset"), ("b", "failed")]
        assert "No update from worker w-1" in view.details[0].reason
        assert view.timestamp == house.now
        assert last_of(house, "a").by == "admin"
        nothing = await house.cleaner.recover_stuck()
        assert isinstance(nothing, RecoverStuckView)
        assert nothing.details == []


@in_virtual_time
async def test_recover_stuck_returns_errors() -> None:
    async with VirtualEngine() as house:
        house.actor.stop()
        refusal = await house.cleaner.recover_stuck()
        assert isinstance(refusal, ApiError)
        assert refusal.code == "shutting_down"


# -- the end ----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_stop_ends_a_run_between_slices_and_resolves_its_waiters() -> None:
    async with VirtualEngine(schedule=replace(PASSES, batch=1)) as house:
        for number in range(20):
            await finished(house, f"old-{number}", expires_at=house.now + 1000)
        await seconds(1)
        running = house.keep()
        asked = asyncio.create_task(house.cleaner.run_cleanup(forced=True))
        await until(lambda: bool(deletions(house)))
        house.cleaner.stop()
        report = await asked
        await running
        assert 0 < len(deletions(house)) < 20
        assert report.errors == [
            "deletion: the daemon is stopping; the next cleanup run does the rest.",
            "pass: the run ended early because the daemon is stopping.",
        ]
        assert kept(house) == []
        assert read_figures(house.disk.figures).since_report.deleted == len(deletions(house))
        late = await house.cleaner.run_cleanup(forced=True)
        assert late.errors == ["pass: not run, because the daemon is stopping."]


@in_virtual_time
async def test_stop_resolves_a_request_whose_run_never_started() -> None:
    async with VirtualEngine() as house:
        asked = asyncio.create_task(house.cleaner.run_cleanup(forced=True))
        await seconds(0)
        house.cleaner.stop()
        await house.cleaner.run()
        assert (await asked).errors == ["pass: not run, because the daemon is stopping."]


@in_virtual_time
async def test_a_failed_save_of_statistics_does_not_raise_at_the_end() -> None:
    async with VirtualEngine() as house:
        running = house.keep()
        await seconds(1)
        house.disk.errors["save_figures"] = OSError("broken")
        house.cleaner.stop()
        await running


@in_virtual_time
async def test_operators_see_the_same_state() -> None:
    """Cleanup has no special rights: the first action on a job wins."""
    async with VirtualEngine() as house:
        await house.held("a")
        await house.yes(ForceFail(id="a", reason="enough"), by="admin", admin=True)
        await seconds(61)
        house.keep()
        await house.cleaner.run_cleanup(forced=True)
        events = (await house.yes(Timeline(id="a"))).events
        assert [event.type for event in events] == ["created", "granted", "force_failed"]
        assert (await house.yes(Get(id="a"))).error_message == "enough"


@in_virtual_time
async def test_failed_runs_do_not_reset_the_time_since_the_last_success() -> None:
    disk = MemoryStorage()
    async with VirtualEngine(disk) as house:
        house.keep()
        first = await house.cleaner.run_cleanup(forced=True)
        await seconds(10)
        house.disk.errors["expired"] = OSError("broken")
        for number in (1, 2):
            await seconds(50)
            failed = await house.cleaner.run_cleanup(forced=True)
            assert failed.errors
            state = house.cleaner.state()
            assert (state.failed_since_last_success, state.last_failure) == (number, failed)
        assert (state.time_since_last_cleanup or 0) >= 110_000
        assert house.cleaner.last_success == first
        assert await house.cleaner.run_cleanup(forced=False) is failed, "within min_interval no pass is made"
    async with VirtualEngine(disk) as house:
        assert house.cleaner.state().last_failure is None
        disk.gate.clear()
        house.keep()
        await disk.at_gate.wait()
        state = house.cleaner.state()
        assert (state.failed_since_last_success, house.cleaner.last_success) == (2, first), "a start reads it back"
        assert (state.time_since_last_cleanup or 0) >= 110_000
        del disk.errors["expired"]
        disk.gate.set()
        await house.cleaner.run_cleanup(forced=True)  # the running one had failed already
        await house.cleaner.run_cleanup(forced=True)
        state = house.cleaner.state()
        assert (state.failed_since_last_success, state.last_failure) == (0, None)
        assert (state.time_since_last_cleanup or 0) < 1_000
