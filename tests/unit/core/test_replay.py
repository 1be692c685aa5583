"""Committed batches applied to a state give the state that a start reads from the disk."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import replay
from jobd.core.state import State
from jobd.journal import record
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.journal import Record
from tests.support.factories import full_job
from tests.support.rule_harness import compare, snapshot
from tests.support.virtual_engine import VirtualEngine, in_engine, seconds


class Follower:
    """A state to which each record of `engine` is applied, after it was encoded and decoded."""

    def __init__(self, engine: VirtualEngine) -> None:
        self.engine = engine
        self.state = State.opened(engine.disk.opened())
        self.loaded: list[str] = []
        engine.disk.log.before_append = self.follow

    def follow(self, made: Record) -> None:
        batch = record.decode(made)[0]
        wanted = replay.rows_needed(self.state, batch)
        self.loaded += wanted
        rows = [job for job_id in wanted if (job := self.engine.disk.job(job_id)) is not None]
        replay.apply(self.state, batch, rows)

    def check(self) -> None:
        """Compare with a state that is opened from the disk, and with a recount over all rows."""
        opened = self.engine.disk.opened()
        fresh = State.opened(opened)
        fresh.unvalidated = dict(opened.unvalidated)
        at = self.engine.clock.moment()
        fresh.advance(opened.numbers.wall_ms, opened.numbers.lock_ms)
        replay.finish(self.state)
        self.state.finished.clear()  # a start knows none
        assert snapshot(self.state) == snapshot(fresh)
        assert list(self.state.processing) == list(fresh.processing)
        assert self.state.presence.workers.keys() == fresh.presence.workers.keys()
        for name, worker in fresh.presence.workers.items():
            mine = self.state.presence.workers[name]
            assert (mine.jobs, mine.expired, mine.heard) == (worker.jobs, worker.expired, worker.heard)
        assert self.state.numbers(LockMs(0), 0, self.state.clock) == fresh.numbers(LockMs(0), 0, fresh.clock)
        assert self.state.clock == fresh.clock
        compare(self.state, {job.id: job for job in self.engine.disk.jobs.values()}, at, finished_at_hand=False)


def grant(engine: VirtualEngine, job_id: str, **fields: Any) -> cmd.AnyCommand:
    return cmd.Start(id=job_id, worker="w-1", lock_ttl_ms=60_000, **fields)


@in_engine()
async def test_every_kind_of_change_is_applied(engine: VirtualEngine) -> None:
    follower = Follower(engine)
    for number in range(8):
        queue = "a" if number % 2 else "b"
        job = cmd.Create(id=f"job-{number}", queue=queue, priority=number % 3, max_attempts=2, payload=Raw(b"1"))
        await engine.yes(job)
    await engine.yes(cmd.Create(id="later", run_at=engine.now + 5_000))
    await engine.yes(cmd.Create(id="overdue", expires_at=engine.now + 2_000))
    held = {number: await engine.yes(grant(engine, f"job-{number}")) for number in range(6)}
    await engine.yes(cmd.Progress(id="job-0", lock_id=held[0].lock_id, progress=10))
    await engine.yes(cmd.Complete(id="job-1", lock_id=held[1].lock_id, file_path="/f"))
    await engine.yes(cmd.Fail(id="job-2", lock_id=held[2].lock_id, error_message="no", retry=False))
    await engine.yes(cmd.Release(id="job-3", lock_id=held[3].lock_id))
    await engine.yes(cmd.Cancel(id="job-4"))
    await engine.yes(cmd.Pause(name="b", reason="stop"), admin=True)
    await engine.yes(cmd.Pause(name="empty"), admin=True)
    for name in ("s", "t"):
        await engine.yes(cmd.PutSchedule(id=name, every_ms=1_000, job=cmd.ScheduledJob()), admin=True)
    for at in (9_000, 10_000):
        await engine.yes(cmd.Fire(id="s", version=engine.state.schedules["s"].version, scheduled_at=engine.now + at))
    await engine.yes(cmd.RunSchedule(id="t"), admin=True)
    await engine.yes(cmd.PauseSchedule(id="s"), admin=True)
    await engine.yes(cmd.DeleteSchedule(id="t"), admin=True)
    follower.check()
    await seconds(3)
    await engine.yes(cmd.Resume(name="b"), admin=True)
    await engine.yes(cmd.Claim(worker="w-2", queues=["a", "b"], limit=2))
    follower.check()
    await seconds(120)  # the locks of w-1 expire
    await engine.yes(cmd.Recover(limit=10))
    follower.check()


@in_engine()
async def test_rows_of_finished_jobs_are_loaded_only_for_changes(engine: VirtualEngine) -> None:
    for name in ("reset", "deleted", "late"):
        lock_id = await engine.held(name)
        await engine.yes(cmd.Fail(id=name, lock_id=lock_id, error_message="no", retry=False))
    follower = Follower(engine)  # it has not seen how they ended
    await engine.yes(cmd.ForceReset(id="reset"), admin=True)
    assert follower.loaded == ["reset"]
    await engine.yes(cmd.Cancel(id="reset"))
    await engine.yes(cmd.ForceReset(id="reset"), admin=True)
    assert follower.loaded == ["reset"], "it has seen how it ended this time"
    follower.check()


@in_engine()
async def test_jobs_with_equal_options_share_them(engine: VirtualEngine) -> None:
    follower = Follower(engine)
    for name in ("a", "b"):
        await engine.yes(cmd.Create(id=name, queue="video", kind="encode", run_at=engine.now + 5_000))
    first, second = (follower.state.jobs[name] for name in ("a", "b"))
    assert first.options is second.options


@pytest.mark.parametrize("half", [{"deadlines": None}, {"grant": None}])
def test_a_processing_row_without_a_complete_lock_has_no_worker(half: dict[str, Any]) -> None:
    state = State()
    state.reindex(None, replace(full_job(), status="processing", **half))
    replay.finish(state)
    assert (len(state.processing.without_deadlines), state.presence.workers) == (1, {})


@in_engine()
async def test_a_deleted_job_that_is_not_in_memory_is_no_longer_counted(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    await engine.yes(cmd.Cancel(id="a"))
    follower = Follower(engine)
    await engine.yes(cmd.Delete(id="a"), admin=True)
    assert (follower.loaded, follower.state.totals["cancelled"]) == ([], 0)
    follower.check()
    await engine.yes(cmd.Create(id="a"))  # the same id, another job
    await engine.yes(cmd.Cancel(id="a"))
    await engine.yes(cmd.Delete(id="a"), admin=True)
    follower.check()


@in_engine()
async def test_imported_rows_wait_for_their_validation(engine: VirtualEngine) -> None:
    follower = Follower(engine)
    for name in ("a", "b"):
        await engine.yes(cmd.Import(id=name, status="failed"), admin=True)
    follower.check()
    assert set(follower.state.unvalidated.values()) == {"a", "b"}
    await engine.yes(cmd.RepairJobs(ids=["a"]))
    await engine.yes(cmd.Delete(id="b"), admin=True)
    assert follower.state.unvalidated == {}
    follower.check()


@in_engine()
async def test_a_late_result_changes_no_row(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    await engine.yes(cmd.Cancel(id="a"))
    follower = Follower(engine)
    await engine.no(cmd.Complete(id="a", lock_id=lock_id, file_path="/late"))
    assert engine.disk.events[-1].type == "late_result"
    assert follower.loaded == []
    follower.check()


@in_engine()
async def test_a_quarantined_job_is_left_out(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    await engine.yes(cmd.Fail(id="a", lock_id=lock_id, error_message="no", retry=False))
    follower = Follower(engine)
    follower.state.quarantine("a", "damaged", ("default", "failed"))
    await engine.yes(cmd.ForceReset(id="a"), admin=True)
    assert (follower.loaded, len(follower.state.jobs), follower.state.total()) == ([], 0, 0)


@in_engine()
async def test_a_missing_row_is_an_error(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    await engine.yes(cmd.Fail(id="a", lock_id=lock_id, error_message="no", retry=False))
    state = State.opened(engine.disk.opened())
    records: list[Record] = []
    engine.disk.log.before_append = records.append
    await engine.yes(cmd.ForceReset(id="a"), admin=True)
    with pytest.raises(LookupError, match="changes job a, which has no row"):
        replay.apply(state, record.decode(records[0])[0])
