"""After a start or a pause, no lock ends within the grace, and requests do not wait for all locks."""

from __future__ import annotations

import asyncio

from jobd.maintenance.held_locks import GRACE_MS, HURRY_MS, SOON_MS, HeldLocks
from jobd.model.commands import Ping, Release, Start
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import (
    VirtualEngine,
    ask_all,
    checked_engine,
    in_virtual_time,
    row,
    seconds,
    settle,
)

SLICE = 2
LONG_MS = GRACE_MS - 1_000


def held_locks(engine: VirtualEngine) -> HeldLocks:
    return HeldLocks(engine.actor, engine.clock.moment, slice_jobs=SLICE)


def resumed(engine: VirtualEngine) -> list[list[str]]:
    """Return the ids of the jobs that each batch has extended."""
    batches = [
        [change.event.job_id for change in batch.changes if change.event.type == "resumed"]
        for batch in engine.disk.batches
    ]
    return [batch for batch in batches if batch]


def left_ms(engine: VirtualEngine, job_id: str) -> int:
    lease = engine.state.jobs[job_id].lease
    assert lease is not None
    return lease.expires - engine.clock.moment().lease


@in_virtual_time
async def test_requests_are_decided_between_the_slices() -> None:
    async with checked_engine() as engine:
        for number in range(3 * SLICE):
            await engine.held(f"a-{number}", lock_ttl_ms=LONG_MS)
        held_locks(engine).extend(engine.clock.moment().lease)
        await engine.yes(Ping())
        assert resumed(engine) == [["a-0", "a-1"]]
        await settle()
        assert resumed(engine) == [["a-0", "a-1"], ["a-2", "a-3"], ["a-4", "a-5"]]
        assert all(left_ms(engine, f"a-{number}") == GRACE_MS for number in range(3 * SLICE))


@in_virtual_time
async def test_locks_that_end_soon_come_before_any_request() -> None:
    async with checked_engine() as engine:
        await engine.held("long", lock_ttl_ms=LONG_MS)
        for number in range(2 * SLICE):
            await engine.held(f"soon-{number}", lock_ttl_ms=SOON_MS - 1)
        await engine.held("limited", lock_ttl_ms=LONG_MS, max_processing_ms=SOON_MS - 1)
        held_locks(engine).extend(engine.clock.moment().lease)
        await engine.yes(Ping())
        soon = [f"soon-{number}" for number in range(2 * SLICE)]
        assert resumed(engine) == [[*soon, "limited", "long"]]
        lease = engine.state.jobs["limited"].lease
        assert lease is not None
        assert lease.ceiling == engine.clock.moment().lease + GRACE_MS


@in_virtual_time
async def test_a_slow_disk_extends_all_locks_before_another_request() -> None:
    async with checked_engine() as engine:
        for number in range(4 * SLICE):
            await engine.held(f"a-{number}", lock_ttl_ms=LONG_MS)
        engine.disk.gate.clear()
        held_locks(engine).extend(engine.clock.moment().lease)
        await engine.disk.at_gate.wait()
        await seconds(HURRY_MS / 1000)
        engine.disk.gate.set()
        await engine.yes(Ping())
        assert [len(batch) for batch in resumed(engine)] == [SLICE, 3 * SLICE]


@in_virtual_time
async def test_a_grant_that_was_made_meanwhile_is_not_extended() -> None:
    async with checked_engine() as engine:
        lock_ids = [await engine.held(f"a-{number}", lock_ttl_ms=LONG_MS) for number in range(3 * SLICE)]
        held_locks(engine).extend(engine.clock.moment().lease)
        again = ask_all(
            engine, [Release(id="a-4", lock_id=lock_ids[4]), Start(id="a-4", worker="w-2", lock_ttl_ms=LONG_MS)]
        )
        await asyncio.gather(*again)
        await settle()
        assert resumed(engine) == [["a-0", "a-1"], ["a-2", "a-3"], ["a-5"]]
        assert left_ms(engine, "a-4") == LONG_MS


@in_virtual_time
async def test_a_job_without_a_lease_is_left_to_cleanup() -> None:
    disk = MemoryStorage()
    disk.put(row(1, "a", "processing"))
    async with VirtualEngine(disk) as engine:
        held_locks(engine).extend(engine.clock.moment().lease)
        await engine.yes(Ping())
        assert resumed(engine) == []
