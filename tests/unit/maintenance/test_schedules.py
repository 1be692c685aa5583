"""The timer of schedules, in virtual time: each time fires once, over late looks, clock steps and rejected commands."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import pytest

from jobd.maintenance import schedules
from jobd.maintenance.cron import load_zone, next_times
from jobd.maintenance.schedules import Scheduler
from jobd.model import commands as cmd
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS
from jobd.model.schedules import Timing
from tests.support.virtual_engine import WALL, VirtualEngine, checked_engine, in_virtual_time


def put(**fields: Any) -> cmd.PutSchedule:
    given: dict[str, Any] = {"id": "s", "every_ms": MINUTE_MS, "overlap": "allow", "job": cmd.ScheduledJob()}
    return cmd.PutSchedule(**given | fields, source="app:x")


@asynccontextmanager
async def running(engine: VirtualEngine) -> AsyncIterator[None]:
    scheduler = Scheduler(engine.actor, engine.clock.moment)
    task = asyncio.create_task(scheduler.run())
    yield
    scheduler.stop()
    await task


def times(engine: VirtualEngine, name: str | None = None) -> list[int]:
    """Return the times of the jobs of all schedules or of one, in the order of their creation."""
    made = [job.extra for job in sorted(engine.state.jobs.values(), key=lambda job: job.seq) if job.extra]
    return [each.scheduled_at for each in made if each.scheduled_at and name in (None, each.schedule_id)]


@in_virtual_time
async def test_each_time_fires_once_and_on_time() -> None:
    async with checked_engine() as engine, running(engine):
        await engine.yes(put())
        begun = engine.now
        await asyncio.sleep(600)
        found = times(engine)
        first = begun - begun % MINUTE_MS + MINUTE_MS
        assert found == [first + number * MINUTE_MS for number in range(len(found))]
        assert len(found) in (9, 10)
        late_ms = [job.created_at - job.extra.scheduled_at for job in engine.state.jobs.values() if job.extra]  # type: ignore[operator]
        assert max(late_ms) < 100


@in_virtual_time
async def test_after_an_absence_the_latest_time_fires_and_the_others_are_missed() -> None:
    async with checked_engine() as engine:
        await engine.yes(put())
        await engine.yes(put(id="none", catch_up="none", every_ms=HOUR_MS))
        engine.step_ms += 4 * HOUR_MS - engine.now % HOUR_MS + 30 * MINUTE_MS
        async with running(engine):
            await asyncio.sleep(5)
            assert len(times(engine)) == 1
            assert times(engine)[0] > engine.now - MINUTE_MS - 6_000
            assert engine.state.schedules["s"].missed >= 200
            assert engine.state.schedules["none"].missed in (4, 5)


@in_virtual_time
async def test_no_time_fires_twice_after_steps_of_the_clock() -> None:
    async with checked_engine() as engine, running(engine):
        await engine.yes(put())
        for step_ms in (HOUR_MS, -HOUR_MS, -2 * HOUR_MS, 3 * HOUR_MS, -MINUTE_MS):
            await asyncio.sleep(90)
            engine.step_ms += step_ms
        await asyncio.sleep(2 * 3_600)
        found = times(engine)
        assert found == sorted(set(found))


@in_virtual_time
async def test_a_schedule_goes_on_after_the_clock_was_set_back_by_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "LOOK_S", 600.0)  # else the timer looks at the clock in each second of two days
    async with checked_engine() as engine, running(engine):
        await engine.yes(put(every_ms=HOUR_MS))
        await asyncio.sleep(2 * 3_600)
        before = len(times(engine))
        engine.step_ms -= 2 * DAY_MS
        await asyncio.sleep(45 * 3_600)
        found = times(engine)[before:]
        assert found == list(range(found[0], found[0] + 45 * HOUR_MS, HOUR_MS))
        assert engine.state.schedules["s"].missed == 0


@pytest.fixture(
    params=[
        *[("Europe/Berlin", "2026-03-29T01:00"), ("Europe/Berlin", "2026-10-25T01:00")],
        *[("America/New_York", "2026-03-08T07:00"), ("America/New_York", "2026-11-01T06:00")],
        *[("Australia/Lord_Howe", "2026-04-04T15:00"), ("Australia/Lord_Howe", "2026-10-03T15:30")],
    ],
    ids=" ".join,
)
def change(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A time zone, and when daylight saving time ends or begins."""
    asyncio.run(load_zone(request.param[0]))  # which needs a thread
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("step_ms", [HOUR_MS, -HOUR_MS, 2 * DAY_MS, -2 * DAY_MS], ids=["+1h", "-1h", "+2d", "-2d"])
@in_virtual_time
async def test_each_time_fires_once_over_steps_of_the_clock_at_a_change(change: tuple[str, str], step_ms: int) -> None:
    """The clock is wrong for 20 min, from 10 min before the change."""
    zone, at = change
    begin = round(datetime.fromisoformat(f"{at}+00:00").timestamp() * 1000) - 15 * MINUTE_MS
    async with checked_engine(step_ms=begin - WALL - 1_000_000) as engine, running(engine):
        await asyncio.sleep(5)
        crons = {"fixed": "0,30 1-3 * * *", "elapsed": "*/10 * * * *"}
        for name, cron in crons.items():
            await engine.yes(put(id=name, cron=cron, every_ms=None, timezone=zone))
        for shift_ms, minutes in ((0, 5), (step_ms, 20), (-step_ms, 70)):
            engine.step_ms += shift_ms
            await asyncio.sleep(60 * minutes)
        for name, cron in crons.items():
            row = engine.state.schedules[name]
            due = next_times(Timing(cron, timezone=zone), row.created_at, 100)
            due = due[: bisect_right(due, engine.now)]
            fired = [at for at in times(engine, name) if at >= begin]
            assert fired == sorted(set(fired) & set(due))
            if step_ms > -DAY_MS:  # else times of two days before count, too
                assert len(fired) + row.missed == len(due)
            assert fired[-1] == due[-1]


@in_virtual_time
async def test_a_suspect_clock_fires_nothing() -> None:
    async with checked_engine() as engine, running(engine):
        await engine.yes(put())
        engine.step_ms += 40 * DAY_MS
        await asyncio.sleep(300)
        assert times(engine) == []
        engine.step_ms -= 40 * DAY_MS
        await asyncio.sleep(70)
        assert len(times(engine)) >= 1


@in_virtual_time
async def test_rejected_firings_are_made_up() -> None:
    async with checked_engine() as engine, running(engine):
        engine.actor.policy = engine.actor.policy.__class__(live_jobs=1)
        await engine.yes(cmd.Create(id="a"))
        await engine.yes(put())
        await asyncio.sleep(130)
        assert times(engine) == []
        engine.actor.policy = engine.actor.policy.__class__()
        await asyncio.sleep(10)
        assert len(times(engine)) == 1
        assert engine.state.schedules["s"].missed >= 1


@in_virtual_time
async def test_a_rejected_schedule_does_not_delay_others() -> None:
    async with checked_engine() as engine, running(engine):
        engine.actor.policy = engine.actor.policy.__class__(queues=1)
        await engine.yes(put(every_ms=1_000))
        await asyncio.sleep(2)
        await engine.yes(put(id="rejected", every_ms=1_000, job=cmd.ScheduledJob(queue="other")))
        await asyncio.sleep(30)
        assert (len(times(engine)), engine.state.schedules["s"].missed) in ((31, 0), (32, 0))


@in_virtual_time
async def test_runs_between_two_times_are_not_planned() -> None:
    async with checked_engine() as engine:
        scheduler = Scheduler(engine.actor, engine.clock.moment)
        task = asyncio.create_task(scheduler.run())
        await engine.yes(put(every_ms=DAY_MS))
        for _ in range(5):
            await engine.yes(cmd.RunSchedule(id="s"))
            await asyncio.sleep(1)
        assert len(scheduler._heap) == 1
        scheduler.stop()
        await task


@in_virtual_time
async def test_a_pause_ends_by_itself_and_nothing_of_it_is_made_up() -> None:
    async with checked_engine() as engine, running(engine):
        await engine.yes(put())
        await engine.yes(cmd.PauseSchedule(id="s", until=engine.now + 10 * MINUTE_MS))
        await asyncio.sleep(599)
        assert times(engine) == []
        await asyncio.sleep(62)
        assert len(times(engine)) == 1
        await engine.yes(cmd.PauseSchedule(id="s"))
        await asyncio.sleep(3_600)
        await engine.yes(cmd.ResumeSchedule(id="s"))
        await asyncio.sleep(61)
        assert len(times(engine)) == 2
        await engine.yes(cmd.DeleteSchedule(id="s"))
        await asyncio.sleep(3_600)
        assert len(times(engine)) == 2


@in_virtual_time
async def test_many_schedules_at_the_same_time() -> None:
    async with checked_engine() as engine, running(engine):
        for number in range(250):
            await engine.yes(put(id=f"s{number}"))
        await asyncio.sleep(65)
        assert len(times(engine)) in (250, 500)
