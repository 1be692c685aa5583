"""Late results and late calls, through the actor."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import Raw

from jobd.engine.disk_full import WriteLimit
from jobd.model import commands as cmd
from jobd.model.job import Policy
from jobd.model.responses import ErrorView
from jobd.model.storage import DiskFull, LateResultQuery, LateResultRows
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import (
    VirtualEngine,
    ask_all,
    checked_engine,
    in_checked_engine,
    in_virtual_time,
    key,
    late_calls,
    settle,
)


async def lose_lock(engine: VirtualEngine, job_id: str = "a", **fields: Any) -> str:
    """Create a job whose worker has lost its lock. Return the lock id."""
    lock_id = await engine.held(job_id, **fields)
    await engine.yes(cmd.ForceFail(id=job_id), admin=True)
    return lock_id


def complete(lock_id: str, job_id: str = "a", **fields: Any) -> cmd.Complete:
    return cmd.Complete(id=job_id, lock_id=lock_id, **({"file_path": "/out"} | fields))


def stored_paths(engine: VirtualEngine, job_id: str = "a") -> list[str | None]:
    """Return the file paths in the stored late results of a job."""
    job = engine.disk.job(job_id)
    assert job is not None
    return [late.result.file_path for late in engine.disk.late_results.get(job.seq, ())]


@in_checked_engine()
async def test_a_late_result_is_stored_before_its_error_is_sent(engine: VirtualEngine) -> None:
    lock_id = await lose_lock(engine)
    version = (await engine.yes(cmd.GetVersion(id="a"))).version
    asking = await engine.writing(complete(lock_id))
    await settle()
    assert not asking.done()
    engine.disk.gate.set()
    rejection = await asking
    assert rejection.code == "lock_lost"
    assert stored_paths(engine) == ["/out"]
    assert (await engine.yes(cmd.GetVersion(id="a"))).version != version


@in_checked_engine()
async def test_a_late_result_that_was_not_written_is_forgotten(engine: VirtualEngine) -> None:
    lock_id = await lose_lock(engine)
    version = (await engine.yes(cmd.GetVersion(id="a"))).version
    engine.disk.write_errors.append(DiskFull("full"))
    await engine.no(complete(lock_id))
    assert stored_paths(engine) == []
    assert (await engine.yes(cmd.GetVersion(id="a"))).version == version
    engine.disk.free()


@in_virtual_time
async def test_late_results_survive_a_restart_and_are_read_on_demand() -> None:
    disk = MemoryStorage()
    async with checked_engine(disk) as engine:
        lock_id = await lose_lock(engine, payload=Raw(b"[9]"))
        await engine.no(complete(lock_id, metadata=Raw(b'{"n": 1}')))
    async with checked_engine(disk) as engine:
        assert engine.state.get("a") is None
        (late,) = (await engine.yes(cmd.LateResults(id="a"), admin=True)).late_results
        assert (late.worker, late.file_path, bytes(late.metadata)) == ("w-1", "/out", b'{"n": 1}')
        assert "jobctl adopt a" in (await engine.yes(cmd.Why(id="a"))).do[0]
        assert (await engine.yes(cmd.Why(id="a"))).because == "It was failed by a client."
        second = await engine.no(complete(lock_id, metadata=Raw(b'{"n": 1}')))
        assert second.details["late_result"] == late.seq
        assert (await engine.no(cmd.Adopt(id="a", result=late.seq + 1))).code == "late_result_not_found"
        adopted = await engine.yes(cmd.Adopt(id="a", result=late.seq), admin=True, key=key("k"))
        assert (adopted.status, adopted.file_path, adopted.payload) == ("completed", "/out", Raw(b"[9]"))
        repeated = await engine.respond(cmd.Adopt(id="a", result=late.seq), admin=True, key=key("k"))
        assert repeated.replayed
    async with checked_engine(disk) as engine:
        assert (await engine.yes(cmd.Get(id="a"))).file_path == "/out"
        assert (await engine.yes(cmd.Delete(id="a"), admin=True)).status == "completed"
        assert disk.late_results == {}


@in_checked_engine()
async def test_the_current_policy_decides_whether_a_late_result_can_be_adopted(engine: VirtualEngine) -> None:
    lock_id = await lose_lock(engine)
    await engine.no(complete(lock_id))

    async def rejection_now() -> Any:
        (late,) = (await engine.yes(cmd.LateResults(id="a"), admin=True)).late_results
        return late.rejection

    assert await rejection_now() is None
    engine.actor.policy = Policy(require_download_url=True)
    rejection = await engine.no(cmd.Adopt(id="a"), admin=True)
    assert await rejection_now() == ErrorView(rejection.code, rejection.message)
    assert "cannot be adopted" in (await engine.yes(cmd.Why(id="a"))).do[0]
    engine.actor.policy = Policy()
    assert await rejection_now() is None
    written = len(engine.disk.batches)
    dry_run = await engine.yes(cmd.Adopt(id="a", dry_run=True), admin=True, key=key("k"))
    assert (dry_run.status, dry_run.file_path) == ("completed", "/out")
    assert (len(engine.disk.batches), engine.disk.keys) == (written, {})
    assert (await engine.yes(cmd.Get(id="a"))).status == "failed"


@in_checked_engine()
async def test_repeated_late_completes_are_stored_once(engine: VirtualEngine) -> None:
    lock_id = await lose_lock(engine)
    for _ in range(3):
        tasks = ask_all(engine, [complete(lock_id, metadata=Raw(b"%d" % number)) for number in range(40)])
        answers = [await task for task in tasks]
        assert {answer.code for answer in answers} == {"lock_lost"}
    assert [event.type for event in engine.disk.events].count("late_result") == 1
    assert stored_paths(engine) == ["/out"]
    written = len(engine.disk.batches)
    await engine.no(complete(lock_id))
    await engine.no(complete("never-one"))
    assert len(engine.disk.batches) == written


@in_checked_engine()
async def test_an_old_grant_is_found_in_the_journal(engine: VirtualEngine) -> None:
    old = await engine.held()
    await engine.yes(cmd.ForceReset(id="a"), admin=True)
    await engine.yes(cmd.Start(id="a", worker="w-2"))
    await engine.yes(cmd.ForceReset(id="a"), admin=True)
    assert "late_result" in (await engine.no(complete(old))).details
    assert stored_paths(engine) == ["/out"]


class RecordingStorage(MemoryStorage):
    """Records the queries for late results."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[LateResultQuery] = []

    async def read_late_results(self, wanted: list[LateResultQuery]) -> LateResultRows:
        self.asked += wanted
        return await super().read_late_results(wanted)


@in_virtual_time
async def test_a_lock_holder_needs_no_read_and_many_late_completes_need_one() -> None:
    disk = RecordingStorage()
    async with checked_engine(disk) as engine:
        await engine.yes(complete(await engine.held()))
        await engine.no(complete("none", "never created"))
        assert disk.asked == []
        lock_id = await lose_lock(engine, "b")
        tasks = ask_all(engine, [cmd.Adopt(id="b"), *(complete(lock_id, "b") for _ in range(9)), cmd.Why(id="b")])
        for task in tasks:
            await task
        assert disk.calls["late"] == 1
        assert [(each.lock_id, each.with_results) for each in disk.asked] == [(None, False), (None, True)]


@in_checked_engine()
async def test_a_full_disk_stores_no_late_result_and_still_reports_the_lost_lock(engine: VirtualEngine) -> None:
    """A worker without its lock gets that error at every step of a disk that fills up."""
    locks = {name: await lose_lock(engine, name) for name in ("a", "b", "c")}
    engine.disk.write_errors.append(DiskFull("no room for a nicety"))
    rejection = await engine.no(complete(locks["a"]))
    assert (rejection.code, "late_result" in rejection.details) == ("lock_lost", False)
    assert engine.actor.full_disk.write_limit == WriteLimit.CREATES
    engine.disk.fits = lambda batch: False
    rejection = await engine.no(complete(locks["b"], "b"))
    assert (rejection.code, "late_result" in rejection.details) == ("lock_lost", False)
    assert (await engine.no(cmd.Cancel(id="a"))).code == "invalid_transition"
    for _ in range(2):
        await engine.actor.full_disk.escalate(DiskFull("full"))
    assert (await engine.no(cmd.Tick())).code == "storage_full"
    assert (await engine.no(complete(locks["c"], "c"))).code == "lock_lost"
    assert engine.disk.late_results == {}
    engine.disk.free()
    await asyncio.sleep(2)
    assert "late_result" in (await engine.no(complete(locks["c"], "c"))).details


@in_virtual_time
async def test_repeated_late_calls_are_written_once_without_a_read() -> None:
    disk = RecordingStorage()
    async with checked_engine(disk) as engine:
        lock_id = await lose_lock(engine)
        for _ in range(20):
            assert (await engine.no(cmd.Progress(id="a", lock_id=lock_id, progress=1))).code == "lock_lost"
        written = len(disk.batches)
        assert late_calls(engine) == ["progress"]
        await engine.no(cmd.Release(id="a", lock_id=lock_id))
        for _ in range(20):
            await engine.no(cmd.Release(id="a", lock_id=lock_id))
            await engine.no(cmd.Extend(id="a", lock_id="never-one"))
        assert late_calls(engine) == ["progress", "release"]
        assert len(disk.batches) == written + 1
        assert disk.asked == []
    async with checked_engine(disk) as engine:  # memory is empty again
        await engine.no(cmd.Progress(id="a", lock_id=lock_id, progress=1))
        await engine.no(cmd.Progress(id="a", lock_id=lock_id, progress=1))
        assert late_calls(engine) == ["progress", "release", "progress"]


@in_checked_engine()
async def test_late_calls_on_a_full_disk_are_journaled_when_there_is_space(engine: VirtualEngine) -> None:
    lock_id = await lose_lock(engine)
    engine.disk.write_errors.append(DiskFull("no room for a nicety"))
    assert (await engine.no(cmd.Release(id="a", lock_id=lock_id))).code == "lock_lost"
    assert engine.actor.full_disk.write_limit == WriteLimit.CREATES
    assert (await engine.no(cmd.Release(id="a", lock_id=lock_id))).code == "lock_lost"
    assert late_calls(engine) == []
    await asyncio.sleep(2)
    assert (await engine.no(cmd.Release(id="a", lock_id=lock_id))).code == "lock_lost"
    assert late_calls(engine) == ["release"]


@in_checked_engine()
async def test_a_full_disk_also_rejects_lock_holders(engine: VirtualEngine) -> None:
    lock_id = await engine.held()
    for _ in range(3):
        await engine.actor.full_disk.escalate(DiskFull("full"))
    engine.disk.fits = lambda batch: False
    assert (await engine.no(complete(lock_id))).code == "storage_full"
    engine.disk.free()
    await asyncio.sleep(2)
    assert (await engine.yes(complete(lock_id))).status == "completed"
