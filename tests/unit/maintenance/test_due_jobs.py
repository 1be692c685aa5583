"""Due jobs stay due after the wall clock was set back, in slices, with requests between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from jobd.maintenance.due_jobs import PIECE, SLICE, DueJobs
from jobd.model.clocks import LockMs
from jobd.model.commands import Bulk, Claim, Create, ExtendAfterPause, Get, Ping, Start, Tick
from jobd.model.job import HOUR_MS, MINUTE_MS
from tests.support import virtual_engine

SLICES = 5


@asynccontextmanager
async def set_back() -> AsyncIterator[tuple[virtual_engine.VirtualEngine, DueJobs]]:
    """Create jobs, and set the clock back: they are not due any more."""
    async with virtual_engine.checked_engine() as engine:
        for first in range(0, SLICES * SLICE, SLICE):
            await engine.yes(Bulk(jobs=[Create(id=f"job-{first + number}") for number in range(SLICE)]))
        engine.step_ms -= HOUR_MS
        yield engine, DueJobs(engine.actor, engine.clock.moment)


def not_due(engine: virtual_engine.VirtualEngine) -> int:
    return len(list(engine.state.not_due(engine.now)))


@virtual_engine.in_virtual_time
async def test_requests_are_decided_between_the_slices() -> None:
    async with set_back() as (engine, due_jobs):
        due_jobs.keep(0)
        assert (await engine.yes(Get(id="job-1"))).run_at <= engine.now
        left = [not_due(engine)]
        while not due_jobs.idle.is_set():
            await engine.yes(Create())
            left.append(not_due(engine))
        assert left[0] == (SLICES - 1) * SLICE, "the first slice comes before the request"
        assert left[-1] == 0
        assert len(left) == SLICES
        updates = [sum(each.type == "updated" for each in batch.changes) for batch in engine.disk.batches]
        assert [count for count in updates if count] == SLICES * [SLICE]


@virtual_engine.in_virtual_time
async def test_a_start_keeps_the_jobs_due_before_the_first_request() -> None:
    async with virtual_engine.checked_engine() as engine:
        for _ in range(2 * PIECE // SLICE + 1):
            await engine.yes(Bulk(jobs=[Create(delay_ms=1_000) for _ in range(SLICE)]))
        await engine.yes(Create(id="later", delay_ms=5_000))
        await virtual_engine.seconds(2)
        await engine.yes(Tick())
        disk = engine.disk
    restarted = virtual_engine.VirtualEngine(disk)
    restarted.step_ms -= HOUR_MS
    due_jobs = DueJobs(restarted.actor, restarted.clock.moment)
    await due_jobs.keep_at_start(disk.numbers.wall_ms)
    async with restarted:
        assert (await restarted.yes(Claim(worker="w"))).grants
        while not due_jobs.idle.is_set():
            await restarted.yes(Ping())
        assert not_due(restarted) == 1
        assert (await restarted.no(Start(id="later", worker="w"))).code == "not_due"


@virtual_engine.in_virtual_time
async def test_locks_are_extended_before_the_slices() -> None:
    async with virtual_engine.checked_engine() as engine:
        await engine.held("a", lock_ttl_ms=1_000)
        await engine.yes(Create(id="b"))
        await virtual_engine.seconds(2)
        engine.step_ms -= HOUR_MS
        engine.actor.enqueue_internal(ExtendAfterPause(ids=["a"], grace_ms=MINUTE_MS, since=LockMs(0)))
        DueJobs(engine.actor, engine.clock.moment).keep(0)
        await engine.yes(Start(id="b", worker="w"))
        types = [change.type for batch in engine.disk.batches for change in batch.changes]
        assert types[-4:] == ["resumed", "updated", "updated", "granted"]


@virtual_engine.in_virtual_time
async def test_another_step_is_handled_after_the_first() -> None:
    async with set_back() as (engine, due_jobs):
        due_jobs.keep(0)
        until = engine.now
        engine.step_ms -= HOUR_MS
        due_jobs.keep(until)
        await virtual_engine.settle()
        assert due_jobs.idle.is_set()
        assert not_due(engine) == 0


@virtual_engine.in_virtual_time
async def test_no_job_is_to_be_kept_due() -> None:
    async with virtual_engine.checked_engine() as engine:
        await engine.yes(Create(delay_ms=MINUTE_MS))
        due_jobs = DueJobs(engine.actor, engine.clock.moment)
        due_jobs.keep(engine.now)
        assert due_jobs.idle.is_set()


@virtual_engine.in_virtual_time
async def test_a_full_disk_delays_the_slices() -> None:
    async with set_back() as (engine, due_jobs):
        engine.disk.fits = lambda batch: False
        due_jobs.keep(0)
        await virtual_engine.settle()
        assert not_due(engine) == SLICES * SLICE
        engine.disk.free()
        await virtual_engine.seconds(1.1)
        assert due_jobs.idle.is_set()
        assert not_due(engine) == 0


@virtual_engine.in_virtual_time
async def test_waiting_claims_get_the_jobs() -> None:
    async with set_back() as (engine, due_jobs):
        [waiting] = virtual_engine.ask_all(engine, [Claim(worker="w", limit=2, wait_ms=1_000)])
        await virtual_engine.settle()
        assert not waiting.done()
        due_jobs.keep(0)
        assert virtual_engine.granted_ids(await waiting) == ["job-0", "job-1"]
