"""After a start or a pause, no lock ends within the grace."""

from __future__ import annotations

from jobd.maintenance.held_locks import GRACE_MS, extend_held_locks
from jobd.model.commands import Ping
from jobd.model.job import MINUTE_MS
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import VirtualEngine, checked_engine, in_virtual_time, row, seconds

SLICE = 2
LONG_MS = 10 * MINUTE_MS


def extend(engine: VirtualEngine, since: int | None = None) -> None:
    now = engine.clock.moment().lease
    extend_held_locks(engine.actor, now, now if since is None else since, slice_jobs=SLICE)


def resumed(engine: VirtualEngine) -> list[str]:
    """Return the ids of the jobs that were extended."""
    changes = [change for batch in engine.disk.batches for change in batch.changes]
    return [change.event.job_id for change in changes if change.event.type == "resumed"]


@in_virtual_time
async def test_locks_are_extended_before_any_request() -> None:
    async with checked_engine() as engine:
        ids = [f"a-{number}" for number in range(2 * SLICE + 1)]
        for job_id in ids:
            await engine.held(job_id, lock_ttl_ms=GRACE_MS - 1_000)
        extend(engine)
        await engine.yes(Ping())
        assert resumed(engine) == ids
        assert all(left_ms(engine, job_id) == GRACE_MS for job_id in ids)


@in_virtual_time
async def test_each_deadline_is_postponed() -> None:
    deadlines = ["lock_ttl_ms", "stuck_after_ms", "max_processing_ms"]
    async with checked_engine() as engine:
        late = {"lock_ttl_ms": LONG_MS, "stuck_after_ms": LONG_MS, "max_processing_ms": LONG_MS}
        await engine.held("late", **late)
        for name in deadlines:
            await engine.held(name, **late | {name: GRACE_MS - 1_000})
        extend(engine)
        await engine.yes(Ping())
        assert resumed(engine) == deadlines


@in_virtual_time
async def test_a_lock_that_had_expired_before_a_pause_stays_expired() -> None:
    async with checked_engine() as engine:
        await engine.held("expired", lock_ttl_ms=1_000)
        await engine.held("live", lock_ttl_ms=3_000)
        began = engine.clock.moment().lease
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
    lease = engine.state.jobs[job_id].lease
    assert lease is not None
    return lease.expires - engine.clock.moment().lease
