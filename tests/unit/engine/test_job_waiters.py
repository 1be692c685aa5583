"""Requests that wait until jobs are finished."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobd.engine.actor import Bounds, DiskBroken
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.journal import LeadershipLost
from jobd.model.storage import BadRows, DiskFull
from tests.support.virtual_engine import VirtualEngine, in_checked_engine, in_virtual_time, seconds, settle, start_task


async def waiting(engine: VirtualEngine, *commands: Any) -> list[asyncio.Task[Any]]:
    tasks = [start_task(engine.actor.ask(command)) for command in commands]
    await settle()
    assert len(engine.actor.job_waiters) == len(tasks)
    return tasks


def statuses(task: asyncio.Task[Any]) -> list[str | None]:
    return [job.status for job in task.result().data.jobs]


@in_checked_engine()
async def test_a_read_is_answered_when_its_job_ends(engine: VirtualEngine) -> None:
    lock_id = await engine.held()
    tasks = await waiting(engine, *[cmd.Get(id="a", wait_ms=60_000) for _ in range(1_000)])
    began = asyncio.get_running_loop().time()
    await seconds(30)
    await engine.yes(cmd.Progress(id="a", lock_id=lock_id, progress=9))
    assert not any(task.done() for task in tasks)
    await engine.yes(cmd.Complete(id="a", lock_id=lock_id))
    await settle()
    assert {task.result().data.status for task in tasks} == {"completed"}
    assert asyncio.get_running_loop().time() - began < 30.02
    assert len(engine.actor.job_waiters) == 0
    assert (await engine.yes(cmd.Get(id="a", wait_ms=9))).status == "completed"


@in_checked_engine()
async def test_the_wait_for_several_jobs_ends_with_the_last(engine: VirtualEngine) -> None:
    for job_id in "abc":
        await engine.yes(cmd.Create(id=job_id))
    (task,) = await waiting(engine, cmd.WaitForJobs(ids=["a", "none", "b", "c", "a"], wait_ms=60_000))
    await engine.yes(cmd.Cancel(id="a"))
    await engine.yes(cmd.ForceFail(id="b", reason="r"))
    await engine.yes(cmd.RetryJob(id="b"))
    await engine.yes(cmd.Cancel(id="c"))
    await settle()
    assert not task.done(), "b is queued again"
    await engine.yes(cmd.Cancel(id="b"))
    await settle()
    assert statuses(task) == ["cancelled", None, "cancelled", "cancelled", "cancelled"]
    assert task.result().data.finished
    failed = await engine.yes(cmd.WaitForJobs(ids=["none"], wait_ms=60_000))
    assert failed.finished


@in_checked_engine()
async def test_a_wait_ends_after_its_time_and_with_its_caller(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    short, gone = await waiting(engine, cmd.WaitForJobs(ids=["a"], wait_ms=500), cmd.Get(id="a", wait_ms=60_000))
    gone.cancel()
    await seconds(0.4999)
    assert not short.done()
    await seconds(0.1)
    assert (statuses(short), short.result().data.finished) == (["queued"], False)
    assert len(engine.actor.job_waiters) == 0


@in_checked_engine(bounds=Bounds(parked_claims=1, claim_wait_ms=1_000))
async def test_waits_are_limited_with_the_claims(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    assert (await engine.no(cmd.Get(id="a", wait_ms=1_001))).code == "invalid_request"
    (task,) = await waiting(engine, cmd.Get(id="a", wait_ms=1_000))
    assert (await engine.no(cmd.Claim(worker="w", wait_ms=5))).code == "overloaded"
    engine.actor.stop()
    await settle()
    assert task.result().data.status == "queued"


@in_checked_engine()
async def test_a_batch_that_is_decided_again_leaves_one_wait(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Bulk(jobs=[cmd.Create(id="a"), cmd.Create(id="bad")]))
    engine.disk.write_errors += [BadRows({"bad": "checksum"}), DiskFull("full")]
    wait = cmd.WaitForJobs(ids=["a", "bad"], wait_ms=5_000)
    tasks = [start_task(engine.actor.ask(each)) for each in (wait, cmd.Create(id="b"))]
    await seconds(1)
    assert len(engine.actor.job_waiters) == 1
    await engine.yes(cmd.Cancel(id="a"))
    await settle()
    assert statuses(tasks[0]) == ["cancelled", None]
    assert engine.actor.job_waiters._by_job == {}


@pytest.mark.parametrize("error", [OSError("broken"), LeadershipLost("released")])
@in_virtual_time
async def test_a_failed_disk_answers_the_waiting_reads(error: Exception) -> None:
    async def run() -> None:
        async with VirtualEngine() as engine:
            await engine.yes(cmd.Create(id="a"))
            (task,) = await waiting(engine, cmd.Get(id="a", wait_ms=60_000))
            engine.actor.lose_disk(error)
            await settle()
            assert isinstance(task.result(), ApiError)

    with pytest.raises(DiskBroken):
        await run()
