"""After a start or a pause, no lock ends within the grace."""

from __future__ import annotations

from jobd.maintenance.restart_grace import GRACE_MS, URGENT_MS, extend_held_locks
from jobd.model.clocks import LockMs
from jobd.model.commands import Create, ExtendAfterPause, Ping
from jobd.model.job import MINUTE_MS
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import VirtualEngine, checked_engine, in_virtual_time, row, seconds

SLICE = 2
LONG_MS = 10 * MINUTE_MS


def extend(engine: VirtualEngine, since: LockMs | None = None) -> None:
    now = engine.clock.moment().lock_ms
    extend_held_locks(engine.actor, now, now if since is None else since, slice_jobs=SLICE)


def resumed(engine: VirtualEngine) -> list[str]:
    """Return the ids of the jobs that were extended."""
    changes = [change for batch in engine.disk.batches for change in batch.changes]
    return [change.job_id for change in changes if change.type == "resumed"]


@in_virtual_time
async def test_locks_are_extended_before_any_request() -> None:
    async with checked_engine() as engine:
        ids = [f"a-{number}" for number in range(2 * SLICE + 1)]
        for job_id in ids:
            await engine.held(job_id, lock_ttl_ms=URGENT_MS)
        extend(engine)
        await engine.yes(Ping())
        assert resumed(engine) == ids
        assert all(left_ms(engine, job_id) == GRACE_MS for job_id in ids)


@in_virtual_time
async def test_locks_that_end_later_are_extended_between_requests() -> None:
    async with checked_engine() as engine:
        ids = [f"a-{number}" for number in range(3 * SLICE)]
        for job_id in ids:
            await engine.held(job_id, lock_ttl_ms=2 * URGENT_MS)
        await engine.held("first", lock_ttl_ms=URGENT_MS)
        extend(engine)
        await engine.yes(Create(id="new"))
        created = next(batch for batch in engine.disk.batches if batch.changes[-1].job_id == "new")
        assert [change.job_id for change in created.changes] == ["first", "a-0", "new"]
        await seconds(1)
        assert resumed(engine) == ["first", *ids]


@in_virtual_time
async def test_a_command_is_no_longer_deferred_at_its_deadline() -> None:
    async with checked_engine() as engine:
        for job_id in ("a", "b", "c", "d"):
            await engine.held(job_id, lock_ttl_ms=URGENT_MS)
        since = engine.clock.moment().lock_ms
        for job_id, within_s in (("d", 1.0), ("b", 0.0), ("c", 0.0), ("a", -1.0)):
            engine.actor.defer_internal(ExtendAfterPause(ids=[job_id], grace_ms=GRACE_MS, since=since), within_s)
        await engine.yes(Create(id="new"))
        created = next(batch for batch in engine.disk.batches if batch.changes[-1].job_id == "new")
        assert [change.job_id for change in created.changes] == ["a", "b", "c", "new"]
        await engine.yes(Ping())
        assert resumed(engine) == ["a", "b", "c", "d"]


@in_virtual_time
async def test_each_deadline_is_postponed() -> None:
    late = {"lock_ttl_ms": LONG_MS, "stall_after_ms": LONG_MS, "progress_timeout_ms": LONG_MS}
    async with checked_engine() as engine:
        await engine.held("late", **late)
        await engine.held("expires", **late | {"lock_ttl_ms": URGENT_MS})
        await engine.held("stalls", **late | {"lock_ttl_ms": 1_000, "stall_after_ms": URGENT_MS})
        await engine.held("makes no progress", **late | {"progress_timeout_ms": URGENT_MS})
        await seconds(2)
        extend(engine)
        await engine.yes(Ping())
        assert sorted(resumed(engine)) == ["expires", "makes no progress", "stalls"]


@in_virtual_time
async def test_a_lock_that_had_expired_before_a_pause_stays_expired() -> None:
    async with checked_engine() as engine:
        await engine.held("expired", lock_ttl_ms=1_000)
        await engine.held("live", lock_ttl_ms=3_000)
        began = engine.clock.moment().lock_ms
        await seconds(4)
        extend(engine, since=began + 2_000)
        await engine.yes(Ping())
        assert left_ms(engine, "expired") < 0
        assert left_ms(engine, "live") == GRACE_MS


@in_virtual_time
async def test_a_job_without_a_lease_is_left_to_cleanup() -> None:
    disk = MemoryStorage()
    disk.put(row(1, "a", "processing"))
    async with VirtualEngine(disk) as engine:
        extend(engine)
        await engine.yes(Ping())
        assert resumed(engine) == []


def left_ms(engine: VirtualEngine, job_id: str) -> int:
    deadlines = engine.state.jobs[job_id].deadlines
    assert deadlines is not None
    return deadlines.expires - engine.clock.moment().lock_ms
