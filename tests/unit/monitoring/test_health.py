"""Health: measured, every problem is named with its fix, and concurrent work causes no false alarm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from msgspec.structs import replace

from jobd.engine.actor import Bounds
from jobd.engine.clock import loop_time
from jobd.engine.disk_full import WriteLimit
from jobd.maintenance.maintainer import Maintainer
from jobd.model.commands import Create, Get, Progress
from jobd.model.job import DAY_MS
from jobd.model.responses import CleanupState, ClusterView, HealthView, PartHealth
from jobd.model.storage import DiskFull, DiskSpace, JournalDiskFull, LoadedRows
from jobd.monitoring.health import (
    MAX_AGE_S,
    MAX_FAULTS,
    SAMPLE,
    SAMPLED_FROM,
    SPACE_MAX_AGE_S,
    STORAGE_TIMEOUT_S,
    TIMEOUT_S,
    Health,
    journal_health,
)
from jobd.storage.artifacts.filesystem import FileArtifactStore
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import VirtualEngine, in_engine, in_virtual_time, row, seconds


def health_of(
    engine: VirtualEngine,
    faults: Iterable[str] = (),
    take_faults: Callable[[], Iterable[str]] = tuple,
    **artifacts: Any,
) -> Health:
    return Health(engine.actor, engine.clock, engine.maintainer, faults=faults, take_faults=take_faults, **artifacts)


async def measured(engine: VirtualEngine) -> HealthView:
    return await health_of(engine).view()


class BlockableStorage(MemoryStorage):
    """Probes and loads wait while `responding` is cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.responding = asyncio.Event()
        self.responding.set()

    async def probe(self, spare_bytes: int = 0) -> None:
        await super().probe(spare_bytes)
        await self.responding.wait()

    async def measure_space(self) -> DiskSpace | None:
        found = await super().measure_space()
        await self.responding.wait()
        return found

    async def load(self, ids: list[str], payloads: list[int], digests: list[str]) -> LoadedRows:
        await self.responding.wait()
        return await super().load(ids, payloads, digests)


class StaleOnce(MemoryStorage):
    """The next load returns job `a` as it was in `stale`."""

    stale: object = None

    async def load(self, ids: list[str], payloads: list[int], digests: list[str]) -> LoadedRows:
        loaded = await super().load(ids, payloads, digests)
        if self.stale is not None:
            loaded.jobs["a"], self.stale = self.stale, None  # type: ignore[assignment]
        return loaded


# -- healthy ----------------------------------------------------------------------------------------------------------


@in_engine()
async def test_a_working_daemon_is_healthy(engine: VirtualEngine) -> None:
    await engine.held("a")
    await engine.yes(Create(id="b"))
    engine.run_maintainer()
    await seconds(1)
    view = await measured(engine)
    statuses = (view.status, view.database.status, view.cache.status, view.storage.status)
    assert statuses == ("healthy",) * 4
    assert view.database.total_jobs == 2
    assert view.database.message.startswith("A write and a read took ")
    assert view.cache.message.endswith(" 2 jobs match the disk.")
    assert view.storage.message == "not configured"
    assert view.cleanup_status.message == "Cleanup runs in time."
    assert not view.cleanup_status.running
    assert view.cleanup_status.time_since_last_cleanup == engine.maintainer.state().time_since_last_cleanup
    assert view.timestamp == engine.now


@in_engine()
async def test_health_is_measured_again_after_five_seconds(engine: VirtualEngine) -> None:
    health = health_of(engine)
    first = await health.view()
    await seconds(MAX_AGE_S - 0.1)
    assert (await health.view()).timestamp == first.timestamp
    assert engine.disk.calls["probe"] == 1
    await seconds(0.2)
    assert (await health.view()).timestamp > first.timestamp
    assert engine.disk.calls["probe"] == 2


@in_engine()
async def test_callers_share_one_measurement(engine: VirtualEngine) -> None:
    health = health_of(engine)
    views = await asyncio.gather(*(health.view() for _ in range(10)))
    assert all(view is views[0] for view in views)
    assert engine.disk.calls["probe"] == 1


@in_engine()
async def test_a_disconnected_caller_does_not_end_the_measurement(engine: VirtualEngine) -> None:
    health = health_of(engine)
    callers = [asyncio.create_task(health.view()) for _ in range(2)]
    await seconds(0)
    callers[0].cancel()
    assert (await callers[1]).status == "healthy"


# -- the database -----------------------------------------------------------------------------------------------------


@in_engine()
async def test_a_failing_disk_is_unhealthy(engine: VirtualEngine) -> None:
    engine.disk.errors["probe"] = OSError("I/O error")
    view = await measured(engine)
    assert view.status == view.database.status == "unhealthy"
    assert "I/O error" in view.database.message


@in_engine()
async def test_a_full_disk_is_unhealthy_and_says_what_to_do(engine: VirtualEngine) -> None:
    engine.disk.errors["probe"] = DiskFull("full")
    engine.disk.disk_space = DiskSpace("/disk/jobd.db", 4096, 1 << 20)
    view = await measured(engine)
    assert view.status == view.database.status == "unhealthy"
    assert view.database.message == (
        "The disk of the store is full (4096 bytes free at /disk/jobd.db): "
        "writes are accepted, but a test write failed. Free some space; jobd tries again every second."
    )
    assert (view.database.path, view.database.free_bytes, view.database.total_bytes) == ("/disk/jobd.db", 4096, 1 << 20)
    engine.disk.errors["probe"] = JournalDiskFull("full")
    assert (await measured(engine)).database.message.startswith("The disk of the journal's server is full: writes")


@in_engine()
async def test_a_full_disk_of_the_journals_server_makes_the_journal_unhealthy(engine: VirtualEngine) -> None:
    health = health_of(engine)
    health.cluster = lambda: ClusterView(role="leader", synchronous=True)
    assert (await health.view()).journal == PartHealth("healthy", ANY)
    engine.disk.write_errors.append(JournalDiskFull("full"))
    engine.disk.errors["probe"] = JournalDiskFull("full")
    await engine.no(Create(id="a"))
    await asyncio.sleep(MAX_AGE_S)
    assert (await health.view()).journal == PartHealth("unhealthy", "The disk of the journal's server is full.")


@in_virtual_time
async def test_a_missing_reserve_file_is_degraded_until_it_is_rebuilt() -> None:
    storage = MemoryStorage()
    storage.has_reserve = False
    storage.errors["build_reserve"] = DiskFull("no room for 16 MiB")
    storage.disk_space = DiskSpace("/disk/jobd.db", 2 << 20, 20 << 20)
    async with VirtualEngine(storage) as engine:
        health = health_of(engine, ["2 jobs have vanished"], output_failure=lambda: "disk I/O error")
        view = await health.view()
        assert view.status == view.database.status == "degraded"
        assert view.database.message == (
            "Damage: 2 jobs have vanished. Run: jobd doctor The reserve file is missing next to /disk/jobd.db "
            "(17825792 bytes are needed, 2097152 are free). On a full disk, running jobs may not be able to end. "
            "Free some space. The output of jobs is not kept: disk I/O error. Jobs go on without it."
        )
        await engine.yes(Create(id="a"))  # it is not rejected
        storage.disk_space = None
        assert "The reserve file is missing. On a full" in (await measured(engine)).database.message
        del storage.errors["build_reserve"]
        await seconds(1.1)
        assert (await measured(engine)).status == "healthy"
        assert "reserve" not in (await health.view()).database.message


@in_engine()
async def test_the_free_space_is_at_most_a_second_old(engine: VirtualEngine) -> None:
    health = health_of(engine)
    engine.disk.disk_space = first = DiskSpace("/disk/jobd.db", 2, 3)
    assert [await space for space in (health.space(), health.space())] == [first, first]
    engine.disk.disk_space = second = DiskSpace("/disk/jobd.db", 1, 3)
    assert await health.space() == first
    assert engine.disk.calls["space"] == 1
    await seconds(SPACE_MAX_AGE_S)
    assert await health.space() == second
    engine.disk.disk_space = None
    await seconds(SPACE_MAX_AGE_S)
    assert await health.space() is None
    database = (await health.view()).database
    assert (database.path, database.free_bytes, database.total_bytes) == (None, None, None)


@in_virtual_time
async def test_a_hanging_disk_leaves_the_last_free_space() -> None:
    storage = BlockableStorage()
    async with VirtualEngine(storage) as engine:
        health = health_of(engine)
        known = await health.space()
        assert known is not None
        storage.responding.clear()
        await seconds(SPACE_MAX_AGE_S)
        began = asyncio.get_running_loop().time()
        assert await asyncio.gather(*(health.space() for _ in range(3))) == [known] * 3
        assert asyncio.get_running_loop().time() - began < 2 * TIMEOUT_S
        assert await health.space() == known
        assert storage.calls["space"] == 2  # measured once meanwhile
        storage.responding.set()
        await health.close()


@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        (WriteLimit.CREATES, "new jobs are rejected"),
        (WriteLimit.ALL_BUT_ENDINGS, "only writes that end or delete jobs are accepted"),
        (WriteLimit.ALL_WRITES, "every change is rejected"),
    ],
)
@in_engine()
async def test_the_message_names_the_writes_that_a_full_disk_rejects(
    engine: VirtualEngine, closed: WriteLimit, expected: str
) -> None:
    engine.actor.full_disk.write_limit = closed
    engine.actor.full_disk.next_probe = loop_time() + 60
    view = await measured(engine)
    assert view.status == view.database.status == "unhealthy"
    assert expected in view.database.message
    assert "8589934592 bytes free at /disk/jobd.db" in view.database.message
    assert view.cache.status == "healthy"


@in_virtual_time
async def test_a_hanging_disk_is_unhealthy_and_not_probed_again() -> None:
    storage = BlockableStorage()
    async with VirtualEngine(storage) as engine:
        health = health_of(engine)
        storage.responding.clear()
        began = asyncio.get_running_loop().time()
        view = await health.view()
        assert asyncio.get_running_loop().time() - began < 3 * TIMEOUT_S
        assert view.database.status == "unhealthy"
        assert view.cache.status == "degraded"
        await seconds(MAX_AGE_S)
        assert (await health.view()).database.status == "unhealthy"
        assert storage.calls["probe"] == 1
        storage.responding.set()
        await seconds(MAX_AGE_S)
        assert (await health.view()).status == "healthy"


class SlowStorage(MemoryStorage):
    """Each probe takes `probe_s`."""

    probe_s = 0.0

    async def probe(self, spare_bytes: int = 0) -> None:
        await super().probe(spare_bytes)
        await asyncio.sleep(self.probe_s)


@pytest.mark.parametrize("probe_s", [TIMEOUT_S + 1, MAX_AGE_S + 1, 3 * MAX_AGE_S])
@in_virtual_time
async def test_a_slow_disk_is_unhealthy_in_every_measurement(probe_s: float) -> None:
    storage = SlowStorage()
    async with VirtualEngine(storage) as engine:
        health = health_of(engine)
        storage.probe_s = probe_s
        for _ in range(6):
            assert (await health.view()).database.status == "unhealthy"
            await seconds(MAX_AGE_S)
        storage.probe_s = 0.5
        await seconds(probe_s)
        assert (await health.view()).database.message == "A write and a read took 500.0 ms."
        await health.close()


@in_virtual_time
async def test_close_waits_for_pending_requests() -> None:
    storage = BlockableStorage()
    async with VirtualEngine(storage) as engine:
        health = health_of(engine)
        storage.responding.clear()
        await health.view()
        closing = asyncio.create_task(health.close())
        await seconds(60)
        assert not closing.done()
        storage.responding.set()
        await closing


@in_engine()
async def test_a_replaced_database_is_unhealthy_and_the_message_says_how_to_keep_its_jobs(
    engine: VirtualEngine,
) -> None:
    engine.disk.replaced = "/disk/jobd.db"
    view = await measured(engine)
    assert view.database.status == "unhealthy"
    assert view.database.message.startswith("/disk/jobd.db was deleted or replaced while the daemon runs.")
    assert "jobd backup FILE" in view.database.message


@in_virtual_time
async def test_damage_is_named_with_its_repair() -> None:
    storage = MemoryStorage()
    for number in range(7):
        storage.put(row(number + 1, f"job-{number}"))
        storage.bad_jobs[f"job-{number}"] = "its checksum is wrong"
    async with VirtualEngine(storage) as engine:
        later = [["keys k: the row was quarantined"], ["keys k: the row was quarantined"]]
        health = health_of(engine, ["2 jobs have vanished"], lambda: later.pop() if later else [])
        for _ in range(3):
            view = await health.view()
            assert view.status == view.database.status == "degraded"
            assert view.database.message == (
                "Quarantined jobs: job-0, job-1, job-2, job-3, job-4 and 2 more. "
                "Damage: 2 jobs have vanished; keys k: the row was quarantined. Run: jobd doctor"
            )
            await seconds(MAX_AGE_S)


@in_engine()
async def test_the_number_of_kept_faults_is_limited(engine: VirtualEngine) -> None:
    health = health_of(engine, (f"fault {number}" for number in range(10 * MAX_FAULTS)))
    assert f"and {MAX_FAULTS - 5} more" in (await health.view()).database.message


# -- memory -----------------------------------------------------------------------------------------------------------


@in_engine()
async def test_a_hanging_mailbox_is_unhealthy(engine: VirtualEngine) -> None:
    health = health_of(engine)
    engine.disk.gate.clear()
    task = asyncio.create_task(engine.yes(Create(id="a")))
    await engine.disk.at_gate.wait()
    view = await health.view()
    assert view.status == view.cache.status == "unhealthy"
    assert "1 command is waiting" in view.cache.message
    engine.disk.gate.set()
    await task
    await seconds(MAX_AGE_S)
    assert (await health.view()).cache.status == "healthy"


@in_engine(bounds=Bounds(mailbox=0))
async def test_a_full_mailbox_is_degraded_a_stopped_one_unhealthy(engine: VirtualEngine) -> None:
    health = health_of(engine)
    assert (await health.view()).cache.status == "degraded"
    engine.actor.stop()
    await seconds(MAX_AGE_S)
    assert (await health.view()).cache.status == "unhealthy"


@pytest.mark.parametrize(("status", "name"), [("queued", "a"), ("processing", "b"), ("completed", "c")])
@in_engine()
async def test_counters_that_disagree_are_unhealthy(engine: VirtualEngine, status: str, name: str) -> None:
    await engine.yes(Create(id="a"))
    await engine.held("b")
    assert (await measured(engine)).status == "healthy"
    engine.state.totals[status] += 1
    one = (await measured(engine)).cache
    assert one.status == "unhealthy"
    assert f"{status} jobs in total, but" in one.message
    engine.state.counts["default"][status] += 1
    both = (await measured(engine)).cache
    if status == "completed":  # finished jobs are not in memory, so there is nothing to compare
        assert both.status == "healthy"
    else:
        assert f"jobs are {status}, but the daemon counts" in both.message


@in_engine()
async def test_memory_that_differs_from_the_disk_is_unhealthy(engine: VirtualEngine) -> None:
    await engine.yes(Create(id="a"))
    await engine.held("b")
    engine.disk.jobs[2] = replace(engine.disk.jobs[2], progress=7)
    view = await measured(engine)
    assert view.status == view.cache.status == "unhealthy"
    assert view.cache.message.startswith("Memory and disk differ for b.")


@in_engine()
async def test_a_row_missing_on_the_disk_is_detected(engine: VirtualEngine) -> None:
    await engine.yes(Create(id="a"))
    engine.disk.delete(1)
    assert (await measured(engine)).cache.message.startswith("Memory and disk differ for a.")


@in_virtual_time
async def test_a_comparison_during_a_write_is_repeated() -> None:
    storage = StaleOnce()
    async with VirtualEngine(storage) as engine:
        await engine.held("a")
        storage.stale = row(1, "a", progress=9)
        assert (await measured(engine)).status == "healthy"
        assert storage.stale is None


@in_virtual_time
async def test_concurrent_work_never_looks_like_damage() -> None:
    """Commits, rejected commits and errors while health is measured."""
    storage = MemoryStorage()
    async with VirtualEngine(storage) as engine:
        locks = {f"job-{number}": await engine.held(f"job-{number}") for number in range(8)}
        stop = asyncio.Event()

        async def work(job_id: str) -> None:
            for turn in range(1_000_000):
                if stop.is_set():
                    return
                if turn % 5 == 0:
                    storage.write_errors.append(DiskFull("now and then"))
                await engine.actor.ask(Progress(id=job_id, lock_id=locks[job_id], progress=turn % 100))
                await engine.actor.ask(Create(id=f"{job_id}-{turn}"))

        working = [asyncio.create_task(work(job_id)) for job_id in locks]
        for _ in range(40):
            view = await measured(engine)
            assert view.cache.status == "healthy", view.cache
        stop.set()
        storage.write_errors.clear()
        await asyncio.gather(*working)


@in_engine()
async def test_a_bad_row_found_by_the_recount_is_quarantined(engine: VirtualEngine) -> None:
    health = health_of(engine)
    await engine.yes(Create(id="a"))
    engine.disk.bad_jobs["a"] = "its checksum is wrong"
    assert (await health.view()).cache.status == "healthy"
    assert (await engine.no(Get(id="a"))).code == "job_quarantined"
    await seconds(MAX_AGE_S)
    assert "Quarantined jobs: a." in (await health.view()).database.message


@in_engine()
async def test_samples_advance_over_the_oldest_jobs(engine: VirtualEngine) -> None:
    for number in range(3 * SAMPLE):
        await engine.yes(Create(id=f"job-{number}"))
    health = health_of(engine)
    seen = [set(health._sample()) for _ in range(3)]
    assert len(set.union(*seen)) == 3 * SAMPLE
    assert set(health._sample()) == seen[0]
    assert SAMPLED_FROM > SAMPLE


@in_engine()
async def test_a_part_that_cannot_be_measured_is_unhealthy_and_nothing_is_raised(engine: VirtualEngine) -> None:
    await engine.yes(Create(id="a"))
    engine.disk.errors["load"] = OSError("broken")
    view = await measured(engine)
    assert view.cache.status == "unhealthy"
    assert "OSError: broken" in view.cache.message
    assert view.database.status == "healthy"


# -- storage and cleanup ----------------------------------------------------------------------------------------------


async def test_the_artifact_store_is_measured(tmp_path: Path) -> None:
    place = tmp_path / "a b"
    store = FileArtifactStore(str(place), "test")
    async with VirtualEngine() as engine:
        view = await health_of(engine, artifacts=store).view()
        assert view.status == view.storage.status == "unhealthy"
        assert view.storage.message == f"{place} is not a directory. Create it, or change artifacts.url."
        place.mkdir()
        again = await health_of(engine, artifacts=store).view()
        assert again.storage.status == "healthy"
        assert again.storage.message.startswith(f"{place}: a write, a read and a deletion took ")
    await store.close()


class HangingArtifactStore:
    """A store that hangs."""

    place = "s3://far"

    async def probe(self) -> None:
        await asyncio.sleep(3600)


@in_engine()
async def test_a_hanging_artifact_store_is_unhealthy_in_time(engine: VirtualEngine) -> None:
    health = health_of(engine, artifacts=HangingArtifactStore())
    view = await health.view()
    assert view.storage.status == "unhealthy"
    assert view.storage.message == f"s3://far has not responded for {STORAGE_TIMEOUT_S:g} s."


@in_virtual_time
async def test_close_does_not_wait_for_a_hanging_artifact_store() -> None:
    for waited_s in (0.1, 60):  # during the measurement, and long after
        async with VirtualEngine() as engine:
            health = health_of(engine, artifacts=HangingArtifactStore())
            view = asyncio.create_task(health.view())
            await seconds(waited_s)
            async with asyncio.timeout(1):
                await health.close()
            assert (await view).storage.status == "unhealthy"


class DegradedSweeper:
    def degraded_reason(self) -> str | None:
        return "2 artifacts of deleted jobs cannot be deleted."


async def test_undeletable_artifacts_degrade_the_store(tmp_path: Path) -> None:
    store = FileArtifactStore(str(tmp_path), "test")
    async with VirtualEngine() as engine:
        view = await health_of(engine, artifacts=store, sweeper=DegradedSweeper()).view()
        assert view.status == view.storage.status == "degraded"
        assert view.storage.message == "2 artifacts of deleted jobs cannot be deleted."
    await store.close()


@in_engine()
async def test_a_suspect_clock_is_degraded_until_it_is_accepted(engine: VirtualEngine) -> None:
    health = health_of(engine)
    assert (await health.view()).status == "healthy"
    engine.step_ms = 40 * DAY_MS  # cached results have expired
    view = await health.view()
    assert view.status == "degraded"
    assert "The wall clock is 40 d ahead of its expected value" in view.cleanup_status.message
    assert "jobctl clock accept" in view.cleanup_status.message
    engine.clock.accept()
    assert (await health.view()).status == "healthy"


@in_engine()
async def test_late_cleanup_is_degraded(engine: VirtualEngine) -> None:
    health = health_of(engine)
    await seconds(3 * 3600 + 1)
    view = await health.view()
    assert view.status == "degraded"
    assert view.cleanup_status.message.startswith("No cleanup run has succeeded for 3 h")
    assert view.cleanup_status.time_since_last_cleanup is None


@in_virtual_time
async def test_a_bug_in_cleanup_is_unhealthy_and_nothing_is_raised() -> None:
    class FailingMaintainer(Maintainer):
        def state(self) -> CleanupState:
            raise ValueError("a bug")

    async with VirtualEngine() as engine:
        view = await Health(engine.actor, engine.clock, FailingMaintainer(engine.actor, engine.clock)).view()
        assert view.status == "unhealthy"
        assert "ValueError: a bug" in view.cleanup_status.message
        assert view.timestamp == engine.now


# -- the journal of a cluster -----------------------------------------------------------------------------------------


@in_engine()
async def test_the_journal_counts_in_a_cluster_only(engine: VirtualEngine) -> None:
    engine.run_maintainer()
    health = health_of(engine)
    assert not (await health.view()).journal
    health.cluster = lambda: ClusterView(role="leader", synchronous=False, require_sync=True)
    await seconds(MAX_AGE_S)
    view = await health.view()
    assert view.journal
    assert (view.status, view.journal.status) == ("degraded", "degraded")
    assert "synchronous_standby_names" in view.journal.message


@pytest.mark.parametrize(
    ("view", "status", "said"),
    [
        (ClusterView(role="leader", synchronous=None), "unhealthy", "does not respond"),
        (ClusterView(role="leader", synchronous=True, waits_for_sync=True), "unhealthy", "A write waits"),
        (ClusterView(role="leader", synchronous=False, require_sync=True), "degraded", "no synchronous standby"),
        (ClusterView(role="leader", synchronous=False), "healthy", "on one PostgreSQL server"),
        (
            ClusterView(role="leader", synchronous=True, journal="main", record=7),
            "healthy",
            "Record 7 of journal main is on two PostgreSQL servers.",
        ),
    ],
)
def test_the_health_of_the_journal_is_that_of_postgresql(view: ClusterView, status: str, said: str) -> None:
    health = journal_health(view)
    assert health is not None
    assert (health.status, said in health.message) == (status, True)
