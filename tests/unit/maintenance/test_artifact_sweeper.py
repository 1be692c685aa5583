"""The artifact sweeper: it deletes every artifact of a deleted job, no other one, and reports failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.maintenance import artifact_sweeper
from jobd.model.commands import Adopt, Complete, Delete, DeleteExpired, ForceFail, ForceReset
from jobd.model.job import DAY_MS, MAX_LATE_RESULTS, LateResult, Policy, Result
from jobd.model.journal import LeadershipLost
from jobd.model.storage import MAX_POSTPONE_MS, DiskFull, DueTombstones, FormatNotRead
from jobd.storage.artifacts.base import MARGINS, ArtifactStoreError
from tests.support.memory_artifacts import MemoryArtifacts
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import WALL, VirtualEngine, in_context, in_virtual_time, row, seconds, until

YOUNG_MS, SKEW_MS = MARGINS.young_ms, MARGINS.skew_ms


@dataclass
class SweeperHarness:
    engine: VirtualEngine
    store: MemoryArtifacts
    sweeper: artifact_sweeper.ArtifactSweeper

    @property
    def sweeps(self) -> artifact_sweeper.SweepStats:
        return self.sweeper.stats

    async def complete(self, job_id: str, key: str, *, upload: bool = True, old: bool = True) -> None:
        """Make a completed job with an old artifact."""
        lock_id = await self.engine.held(job_id)
        if upload:
            self.store.upload(key)
        if old:
            self.store.objects[key] -= YOUNG_MS
        await self.engine.yes(Complete(id=job_id, lock_id=lock_id, storage_key=key))

    async def delete(self, job_id: str) -> None:
        await self.engine.yes(Delete(id=job_id), by="admin", admin=True)


@asynccontextmanager
async def sweeping(
    storage: MemoryStorage | None = None,
    store: MemoryArtifacts | None = None,
    check: Callable[[], None] = lambda: None,
) -> AsyncIterator[SweeperHarness]:
    async with VirtualEngine(storage, policy=Policy(artifacts=True)) as engine:
        store = store or MemoryArtifacts(lambda: engine.now)
        stats = artifact_sweeper.SweepStats(waiting=len(engine.disk.tombstones))
        sweeper = artifact_sweeper.ArtifactSweeper(engine.disk, store, engine.clock, stats, check=check)
        engine.disk.on_tombstones = sweeper.expect
        engine.actor.on_commit.append(sweeper.committed)
        running = asyncio.create_task(sweeper.run())
        yield SweeperHarness(engine, store, sweeper)
        sweeper.stop()
        await running


@in_context(sweeping)
async def test_the_artifact_of_a_deleted_job_is_deleted(at: SweeperHarness) -> None:
    await at.complete("a", "k/a")
    await at.complete("b", "k/b")
    await at.delete("a")
    await until(lambda: at.sweeps.deleted == 1)
    assert list(at.store.objects) == ["k/b"]
    assert not at.engine.disk.tombstones
    assert at.sweeps == artifact_sweeper.SweepStats(waiting=0, deleted=1)


@in_context(sweeping)
async def test_the_artifact_of_an_expired_job_is_deleted(at: SweeperHarness) -> None:
    for number in range(3 * artifact_sweeper.SLICE + 1):
        await at.complete(f"job-{number}", f"k/{number}")
    at.engine.step_ms = 8 * DAY_MS
    at.engine.clock.accept()
    await at.engine.yes(DeleteExpired(ids=[f"job-{number}" for number in range(3 * artifact_sweeper.SLICE + 1)]))
    assert len(at.engine.disk.tombstones) > 0
    await until(lambda: not at.store.objects)
    await until(lambda: not at.engine.disk.tombstones)
    assert (at.sweeps.waiting, at.sweeps.deleted) == (0, 3 * artifact_sweeper.SLICE + 1)


@in_context(sweeping)
async def test_a_job_without_a_storage_key_leaves_no_tombstone(at: SweeperHarness) -> None:
    lock_id = await at.engine.held("a")
    await at.engine.yes(Complete(id="a", lock_id=lock_id, file_path="/f"))
    await at.delete("a")
    await seconds(1)
    assert at.engine.disk.calls["due_tombstones"] == 1  # at the start
    assert not at.engine.disk.tombstones


@in_context(sweeping)
async def test_an_idle_sweeper_does_no_work(at: SweeperHarness) -> None:
    await seconds(1)
    calls = dict(at.engine.disk.calls)
    await seconds(3600)
    assert at.engine.disk.calls == calls


class FullQuarantineStorage(MemoryStorage):
    """Many damaged tombstones come first, and the quarantine has no space for them."""

    crowd = 2

    async def due_tombstones(self, now: int, limit: int) -> DueTombstones:
        due = await super().due_tombstones(now, limit)
        return replace(due, unmoved=self.crowd)


@in_virtual_time
async def test_damaged_tombstones_that_cannot_be_quarantined_degrade_health() -> None:
    storage = FullQuarantineStorage()
    async with sweeping(storage) as at:
        at.sweeps.waiting = 2
        await at.complete("a", "k")
        await at.delete("a")
        await until(lambda: at.sweeps.deleted == 1)
        await seconds(artifact_sweeper.DEGRADED_AFTER_S + artifact_sweeper.POLL_S)
        assert at.sweeps.waiting == 2
        reason = at.sweeper.degraded_reason() or ""
        assert "Artifacts of deleted jobs cannot be deleted" in reason
        assert "2 damaged tombstones cannot be quarantined; run: jobd doctor" in reason
        storage.crowd = 0
        await seconds(artifact_sweeper.POLL_S)
        assert at.sweeper.degraded_reason() is None


@pytest.mark.parametrize("checks", [0, 1, 2])
@in_virtual_time
async def test_nothing_is_deleted_when_another_node_may_lead(checks: int) -> None:
    """The lock_ms ends before a slice, while its tombstones are read, or before the store deletes the artifact."""
    left: int | None = None

    def check() -> None:
        nonlocal left
        if left == 0:
            raise LeadershipLost("the lease is over")
        if left is not None:
            left -= 1

    async with sweeping(check=check) as at:
        await at.complete("a", "k")
        left = checks
        await at.delete("a")
        await seconds(60)
        assert "k" in at.store.objects
        assert (len(at.store.tried) > 0) == (checks == 2)
        assert len(at.engine.disk.tombstones) == 1
        left = None
        await seconds(artifact_sweeper.MAX_RETRY_MS / 1000)
        assert not at.store.objects


@in_context(sweeping)
async def test_an_artifact_stays_until_the_last_job_that_names_it_is_deleted(at: SweeperHarness) -> None:
    await at.complete("a", "shared")
    await at.complete("b", "shared")
    with capture_logs() as lines:
        await at.delete("a")
        await until(lambda: at.sweeps.kept == 1)
    assert [line["reason"] for line in lines if line["event"] == "artifact_left"] == ["another job names its key"]
    assert "shared" in at.store.objects
    assert not at.engine.disk.tombstones
    await at.delete("b")
    await until(lambda: at.sweeps.deleted == 1)
    assert not at.store.objects


class SlowArtifacts(MemoryArtifacts):
    """A store that takes a second to find an object."""

    async def pause(self) -> None:
        await asyncio.sleep(1.0)


@in_virtual_time
async def test_an_artifact_that_a_job_names_while_the_store_looks_for_it_stays() -> None:
    store = SlowArtifacts(lambda: 0)
    async with sweeping(store=store) as at:
        await at.complete("a", "k")
        lock_id = await at.engine.held("c")
        await at.delete("a")
        await until(lambda: store.tried == ["k"])
        await at.engine.yes(Complete(id="c", lock_id=lock_id, storage_key="k"))
        with capture_logs() as lines:
            await until(lambda: at.sweeps.kept == 1)
        assert [line["reason"] for line in lines if line["event"] == "artifact_left"] == ["another job names its key"]
        assert "k" in store.objects
        await at.delete("c")
        await until(lambda: at.sweeps.deleted == 1)


@in_virtual_time
async def test_an_artifact_named_by_a_quarantined_job_stays() -> None:
    storage = MemoryStorage()
    storage.put(row(1, "b", "completed", result=Result(storage_key="shared"), finished_at=WALL, progress=100))
    async with sweeping(storage) as at:
        await at.complete("a", "shared")
        await storage.quarantine(storage.jobs[1], "damaged")
        await at.delete("a")
        await until(lambda: at.sweeps.kept == 1)
        assert "shared" in at.store.objects


@in_context(sweeping)
async def test_an_artifact_stays_while_a_late_result_names_it(at: SweeperHarness) -> None:
    await at.complete("a", "k")
    at.engine.disk.late_results[77] = (LateResult(1, at.engine.now, "w", 1, "hash", result=Result(storage_key="k")),)
    await at.delete("a")
    await seconds(3 * 3600)
    assert "k" in at.store.objects
    assert len(at.engine.disk.tombstones) == 1
    assert at.sweeper.degraded_reason() is None
    at.engine.disk.late_results.clear()
    await seconds(3700)
    assert not at.store.objects
    assert not at.engine.disk.tombstones


async def late(at: SweeperHarness, job_id: str, key: str) -> str:
    """Complete a job after its lock is lost, with its own old artifact. Return the lock."""
    lock_id = await at.engine.held(job_id)
    await at.engine.yes(ForceFail(id=job_id), by="admin", admin=True)
    at.store.upload(key)
    at.store.objects[key] -= YOUNG_MS
    assert "late_result" in (await at.engine.no(Complete(id=job_id, lock_id=lock_id, storage_key=key))).details
    return lock_id


@pytest.mark.parametrize("is_adopted", [False, True])
@in_context(sweeping)
async def test_the_artifact_of_a_late_result_is_deleted_with_its_job(at: SweeperHarness, is_adopted: bool) -> None:
    await late(at, "a", "late/1")
    if is_adopted:
        await at.engine.yes(Adopt(id="a"), by="admin", admin=True)
    await seconds(3 * 3600)
    assert "late/1" in at.store.objects
    await at.delete("a")
    assert at.sweeps.waiting == 1
    await until(lambda: at.sweeps.deleted == 1)
    assert not at.store.objects
    assert not at.engine.disk.tombstones
    assert at.sweeps == artifact_sweeper.SweepStats(waiting=0, deleted=1)


@in_context(sweeping)
async def test_artifacts_of_displaced_late_results_are_deleted(at: SweeperHarness) -> None:
    for number in range(MAX_LATE_RESULTS + 2):
        await late(at, "a", f"late/{number}")
        await at.engine.yes(ForceReset(id="a"), by="admin", admin=True)
    await until(lambda: at.sweeps.deleted == 2)
    assert sorted(at.store.objects) == [f"late/{number}" for number in range(2, MAX_LATE_RESULTS + 2)]
    assert not at.engine.disk.tombstones


@in_context(sweeping)
async def test_a_young_artifact_is_kept_until_a_job_could_name_it(at: SweeperHarness) -> None:
    await at.complete("a", "k")
    lock_id = await at.engine.held("b")
    at.store.upload("k")  # b has stored it again and not reported it yet
    await at.delete("a")
    await seconds(60)
    assert "k" in at.store.objects
    await at.engine.yes(Complete(id="b", lock_id=lock_id, storage_key="k"))
    await seconds(2 * 3600)
    assert "k" in at.store.objects
    assert not at.engine.disk.tombstones
    assert at.sweeps.kept == 1


@pytest.mark.slow
@in_context(sweeping)
async def test_an_unnamed_artifact_is_deleted_when_it_is_old_enough(at: SweeperHarness) -> None:
    await at.complete("a", "k", old=False)
    uploaded_at = at.engine.now
    await at.delete("a")
    tried = len(at.store.tried)
    await seconds(3500)
    assert "k" in at.store.objects
    assert len(at.store.tried) <= tried + 2
    await until(lambda: "k" not in at.store.objects)
    assert YOUNG_MS <= at.engine.now - uploaded_at <= YOUNG_MS + (artifact_sweeper.POLL_S + 1) * 1000


@in_context(sweeping)
async def test_an_artifact_written_after_the_deletion_stays(at: SweeperHarness) -> None:
    await at.complete("a", "k")
    at.store.broken = ArtifactStoreError("down")
    await at.delete("a")
    await until(lambda: at.sweeps.failures > 0)
    await seconds(SKEW_MS / 1000 + 1)
    at.store.upload("k")
    at.store.broken = None
    await seconds(2 * 3600)
    assert "k" in at.store.objects
    assert not at.engine.disk.tombstones
    assert at.sweeps.kept == 1


@in_context(sweeping)
async def test_a_missing_artifact_counts_as_deleted(at: SweeperHarness) -> None:
    await at.complete("a", "k", upload=False, old=False)
    await at.delete("a")
    await until(lambda: at.sweeps.waiting == 0 and not at.engine.disk.tombstones)
    assert at.sweeps.deleted == 0


@in_context(sweeping)
async def test_failures_are_retried_with_backoff_and_delay_no_other_artifact(at: SweeperHarness) -> None:
    await at.complete("a", "bad")
    await at.complete("b", "good")
    at.store.faults["bad"] = "access denied"
    await at.delete("a")
    await at.delete("b")
    await until(lambda: at.sweeps.deleted == 1)
    assert list(at.store.objects) == ["bad"]
    await seconds(3600)
    assert 9 <= at.store.tried.count("bad") <= 16
    (tombstone,) = at.engine.disk.tombstones.values()
    assert tombstone.due_at - at.engine.now <= artifact_sweeper.MAX_RETRY_MS
    del at.store.faults["bad"]
    await seconds(artifact_sweeper.MAX_RETRY_MS / 1000 + artifact_sweeper.POLL_S + 1)
    assert not at.store.objects
    assert at.sweeps.waiting == 0


@pytest.mark.slow
@in_context(sweeping)
async def test_a_store_that_fails_for_long_degrades_health(at: SweeperHarness) -> None:
    await at.complete("a", "k/a")
    await at.complete("b", "k/b")
    at.store.broken = ArtifactStoreError("the bucket is gone")
    await at.delete("a")
    await at.delete("b")
    await seconds(artifact_sweeper.DEGRADED_AFTER_S - 1)
    assert at.sweeper.degraded_reason() is None
    await seconds(1 + artifact_sweeper.POLL_S)
    reason = at.sweeper.degraded_reason() or ""
    assert reason.startswith("2 artifacts of deleted jobs cannot be deleted, the first for 5 min")
    assert reason.endswith("the bucket is gone")
    at.store.broken = ValueError("a bug")
    await seconds(artifact_sweeper.MAX_RETRY_MS / 1000 + artifact_sweeper.POLL_S)
    assert (at.sweeper.degraded_reason() or "").endswith("memory: ValueError: a bug")
    at.store.broken = None
    await seconds(artifact_sweeper.MAX_RETRY_MS / 1000 + artifact_sweeper.POLL_S)
    assert at.sweeper.degraded_reason() is None
    assert not at.store.objects


@in_context(sweeping)
async def test_a_store_that_hangs_times_out(at: SweeperHarness) -> None:
    await at.complete("a", "k")
    at.store.gate.clear()
    await at.delete("a")
    await seconds(artifact_sweeper.CALL_TIMEOUT_S + 1)
    assert at.sweeps.failures == 1
    at.store.gate.set()
    await until(lambda: not at.store.objects)


@in_virtual_time
async def test_the_delay_of_the_oldest_tombstone_is_reported() -> None:
    storage = MemoryStorage()
    async with sweeping(storage) as at:
        for number in range(3 * artifact_sweeper.SLICE):
            await at.complete(f"job-{number}", f"k/{number}")
        at.store.gate.clear()
        for number in range(3 * artifact_sweeper.SLICE):
            await at.delete(f"job-{number}")
        assert at.sweeps.behind_ms == 0
        await seconds(artifact_sweeper.CALL_TIMEOUT_S - 1)
        at.store.gate.set()
        max_behind_ms = 0
        while at.store.objects:
            await seconds(0.001)
            max_behind_ms = max(max_behind_ms, at.sweeps.behind_ms)
        assert (artifact_sweeper.CALL_TIMEOUT_S - 2) * 1000 < max_behind_ms < artifact_sweeper.CALL_TIMEOUT_S * 1000
        await until(lambda: not at.engine.disk.tombstones)
        await seconds(1)
        assert at.sweeps.behind_ms == 0


@pytest.mark.parametrize("error", [DiskFull("full"), FormatNotRead("node b is older"), LeadershipLost("released")])
@in_context(sweeping)
async def test_the_sweeper_waits_until_its_results_can_be_written(at: SweeperHarness, error: Exception) -> None:
    await at.complete("a", "k")
    at.engine.disk.errors["update_tombstones"] = error
    await at.delete("a")
    await until(lambda: not at.store.objects)
    with capture_logs() as lines:
        await seconds(5)
    assert at.engine.disk.tombstones
    assert {(line["event"], line["reason"]) for line in lines} == {("artifact_sweep_waits", str(error))}
    del at.engine.disk.errors["update_tombstones"]
    await until(lambda: not at.engine.disk.tombstones)
    assert at.sweeps.waiting == 0


@in_context(sweeping)
async def test_the_sweeper_survives_a_failing_disk_and_degrades_health(at: SweeperHarness) -> None:
    at.engine.disk.errors["due_tombstones"] = OSError("broken")
    await at.complete("a", "k")
    await at.delete("a")
    await seconds(artifact_sweeper.DEGRADED_AFTER_S + 2 * artifact_sweeper.POLL_S)
    assert "the job store failed: broken" in (at.sweeper.degraded_reason() or "")
    at.engine.disk.errors.clear()
    await until(lambda: not at.store.objects)
    assert at.sweeper.degraded_reason() is None


@in_context(sweeping)
async def test_nothing_is_deleted_while_the_clock_is_suspect(at: SweeperHarness) -> None:
    await at.complete("a", "k")
    at.engine.step_ms = 2 * DAY_MS
    await at.delete("a")
    await seconds(60)
    assert at.store.objects
    at.engine.clock.accept()
    await until(lambda: not at.store.objects)


@in_context(sweeping)
async def test_a_clock_step_back_postpones_nothing_forever(at: SweeperHarness) -> None:
    at.engine.step_ms = 40 * DAY_MS
    at.engine.clock.accept()
    await at.complete("a", "k")
    at.store.broken = ArtifactStoreError("down")
    await at.delete("a")
    await until(lambda: at.sweeps.failures > 0)
    at.engine.step_ms = 0
    at.store.broken = None
    at.store.objects["k"] = at.engine.now - DAY_MS
    await seconds(2 * artifact_sweeper.POLL_S)
    assert not at.store.objects


@in_virtual_time
async def test_a_restart_continues_the_deletions() -> None:
    storage, store = MemoryStorage(), MemoryArtifacts(lambda: 0)
    async with sweeping(storage, store) as at:
        await at.complete("a", "k")
        store.objects["k"] = at.engine.now - DAY_MS
        store.broken = ArtifactStoreError("down")
        await at.delete("a")
        await until(lambda: at.sweeps.failures == 1)
    (tombstone,) = storage.tombstones.values()
    assert (tombstone.job_id, tombstone.key, tombstone.tries) == ("a", "k", 1)
    store.broken = None
    async with sweeping(storage, store) as at:
        assert at.sweeps.waiting == 1
        await until(lambda: not storage.tombstones)
        assert not store.objects
        assert at.sweeps.waiting == 0


@pytest.mark.slow
@in_context(sweeping)
async def test_the_number_of_remembered_failures_is_limited(at: SweeperHarness) -> None:
    for number in range(artifact_sweeper.MAX_FAILING + 50):
        await at.complete(f"job-{number}", f"k/{number}")
    at.store.broken = ArtifactStoreError("down")
    at.engine.step_ms = 8 * DAY_MS
    at.engine.clock.accept()
    await at.engine.yes(DeleteExpired(ids=[f"job-{number}" for number in range(artifact_sweeper.MAX_FAILING + 50)]))
    await seconds(3600)
    assert len(at.sweeper._failing) == artifact_sweeper.MAX_FAILING
    at.store.broken = None
    await seconds(3 * 3600)
    assert not at.store.objects
    assert at.sweeper.degraded_reason() is None


@in_virtual_time
async def test_without_an_artifact_store_deletions_leave_no_tombstone() -> None:
    async with VirtualEngine() as engine:
        lock_id = await engine.held("a")
        await engine.yes(Complete(id="a", lock_id=lock_id, storage_key="k"))
        await engine.yes(Delete(id="a"), by="admin", admin=True)
        assert not engine.disk.tombstones


def test_a_young_artifact_waits_for_less_than_the_maximum() -> None:
    """Otherwise the second scan would see a time of another clock."""
    assert YOUNG_MS + SKEW_MS < MAX_POSTPONE_MS
    assert artifact_sweeper.MAX_RETRY_MS < MAX_POSTPONE_MS
