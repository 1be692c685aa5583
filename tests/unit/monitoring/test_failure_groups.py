"""Failure groups: the counts match the jobs, in any order of commits and reads of the history."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from jobd.model import commands as cmd
from jobd.model.fingerprints import fingerprint
from jobd.model.job import DAY_MS, HOUR_MS
from jobd.model.responses import FailureGroup, Response
from jobd.monitoring import failure_groups
from jobd.monitoring.failure_groups import FailureGroups
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import VirtualEngine, in_engine, in_virtual_time


def counted(engine: VirtualEngine) -> dict[str, int]:
    """Return the failed jobs on disk by fingerprint, without those that have none."""
    failed = [job for job in engine.disk.jobs.values() if job.status == "failed"]
    names = [fingerprint(job.error.message, job.error.code, job.id) for job in failed if job.error]
    return dict(Counter(name for name in names if name))


def waiting(engine: VirtualEngine) -> dict[str, int]:
    """Return the jobs on disk that wait for a retry, by fingerprint."""
    jobs = [(job.id, job.error) for job in engine.disk.jobs.values() if job.status == "queued" and job.error]
    return dict(Counter(fingerprint(error.message, error.code, job_id) or "" for job_id, error in jobs))


def groups(known: FailureGroups) -> dict[str, int]:
    return {group.fingerprint: group.count for group in known.view(200).groups if group.count}


def groups_waiting(known: FailureGroups) -> dict[str, int]:
    return {group.fingerprint: group.retrying for group in known.view(200).groups if group.retrying}


async def try_once(engine: VirtualEngine, job_id: str, message: str, wait_ms: int = 0) -> None:
    """Claim the job, if possible, and fail it; it waits for a retry if it has attempts left."""
    granted = await engine.actor.ask(cmd.Start(id=job_id, worker="w"))
    if isinstance(granted, Response):
        lock_id = granted.data.lock_id
        await engine.yes(cmd.Fail(id=job_id, lock_id=lock_id, error_message=message, retry_after_ms=wait_ms))


def watching(engine: VirtualEngine) -> FailureGroups:
    known = FailureGroups(engine.disk, engine.clock.moment, engine.state.next_job, engine.state.jobs.values())
    engine.actor.on_commit.append(known.committed)
    return known


async def fail(engine: VirtualEngine, job_id: str, reason: str, **fields: Any) -> None:
    await engine.yes(cmd.Create(id=job_id, **fields))
    await engine.yes(cmd.ForceFail(id=job_id, reason=reason))


@in_engine()
async def test_a_group_shows_what_its_jobs_have_in_common(engine: VirtualEngine) -> None:
    known = watching(engine)
    await known.run()
    assert known.is_complete
    await fail(engine, "a", "took 12 s", queue="video", kind="convert")
    first = engine.now
    await asyncio.sleep(5)
    await fail(engine, "b", "took 40 s", queue="mail", kind="convert")
    await fail(engine, "c", "lost")
    view = known.view(200)
    assert (view.total, view.other, view.complete) == (3, 0, True)
    group = view.groups[0]
    assert group == FailureGroup(
        fingerprint=fingerprint("took 1 s", "force_failed") or "",
        message="took 40 s",
        error_code="force_failed",
        count=2,
        older_than_day=0,
        retrying=0,
        kinds=["convert"],
        queues=["video", "mail"],
        first_at=group.first_at,
        last_at=group.last_at,
        job_ids=["b", "a"],
    )
    assert group.first_at <= first < group.last_at
    assert [len(known.view(1).groups), known.view(1).other] == [1, 1]


@in_engine()
async def test_removed_jobs_are_no_longer_counted(engine: VirtualEngine) -> None:
    known = watching(engine)
    for job_id in ("a", "b", "c", "d"):
        await fail(engine, job_id, "took 12 s")
    await engine.yes(cmd.ForceReset(id="a"))
    await engine.yes(cmd.Delete(id="b"))
    assert groups(known) == counted(engine)
    assert known.view(9).groups[0].job_ids == ["c", "d"] or known.view(9).groups[0].job_ids == ["d", "c"]
    await engine.yes(cmd.Cancel(id="a"))
    await engine.yes(cmd.ForceReset(id="c"))
    await engine.yes(cmd.ForceReset(id="d"))
    assert known.view(9).groups == []
    moved = cmd.Transition(id="c", from_="queued", to="failed", updates=cmd.Updates(error_message="by hand"))
    await engine.yes(moved)
    await engine.yes(cmd.Import(id="e", status="failed"))
    assert groups(known) == counted(engine)
    assert (known.view(9).total, known.view(9).other) == (2, 1), "a job without an error is in no group"
    await engine.yes(cmd.Delete(id="e"))
    assert (known.view(9).total, known.view(9).other) == (1, 0)


@in_virtual_time
async def test_a_group_counts_its_jobs_that_ended_more_than_a_day_ago() -> None:
    async with VirtualEngine(MemoryStorage()) as engine:
        known = watching(engine)
        for hour in range(40):
            await fail(engine, f"j{hour}", "took 12 s")
            await asyncio.sleep(3600)
        again = watching(engine)
        await again.run()
        for seen in (known, again):
            [group] = seen.view(9).groups
            ended = [engine.now - job.finished_at for job in engine.disk.jobs.values() if job.finished_at]
            assert sum(ms >= 25 * HOUR_MS for ms in ended) <= group.older_than_day <= sum(ms > DAY_MS for ms in ended)
            assert (group.count, len(seen._groups[group.fingerprint].ended)) == (40, failure_groups.MAX_HOURS)
        older = group.older_than_day
        await engine.yes(cmd.ForceReset(id="j0"))
        await engine.yes(cmd.Delete(id="j39"))
        await engine.yes(cmd.Delete(id="j38"))
        assert [seen.view(9).groups[0].older_than_day for seen in (known, again)] == [older - 1] * 2
        await asyncio.sleep(24 * 3600)
        assert known.view(9).groups[0].older_than_day == known.view(9).groups[0].count == 37


@in_engine()
async def test_jobs_that_wait_for_a_retry_are_counted_separately(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="early", max_attempts=3, queue="mail"))
    await try_once(engine, "early", "took 7 s")
    await asyncio.sleep(5)
    await engine.yes(cmd.Create(id="moved", max_attempts=3))
    await try_once(engine, "moved", "took 8 s", wait_ms=3_600_000)
    await engine.yes(cmd.Create(id="new"))
    known = watching(engine)
    assert not known.is_complete
    await engine.yes(cmd.RunNow(id="moved"))
    assert sum(groups_waiting(known).values()) == 1, "its changes are counted before it is read"
    await known.run()
    assert known.is_complete
    view = known.view(9)
    assert (view.total, view.retrying, view.other, view.other_retrying) == (0, 2, 0, 0)
    [group] = view.groups
    assert (group.count, group.retrying, group.message) == (0, 2, "took 8 s")
    assert (sorted(group.queues), sorted(group.job_ids)) == (["default", "mail"], ["early", "moved"])
    await try_once(engine, "moved", "took 9 s")
    await try_once(engine, "moved", "took 10 s")
    assert counted(engine) == {group.fingerprint: 1}
    [group] = known.view(9).groups
    assert (group.count, group.retrying, group.message) == (1, 1, "took 10 s")
    assert sorted(group.job_ids) == ["early", "moved"]
    assert (groups(known), groups_waiting(known)) == (counted(engine), waiting(engine))
    await engine.yes(cmd.Start(id="early", worker="w"))
    assert (known.view(9).total, known.view(9).retrying) == (1, 0), "it is processing"
    assert [len(known.view(0).groups), known.view(0).other, known.view(0).other_retrying] == [0, 1, 0]


@in_engine()
async def test_the_first_occurrence_survives_an_empty_group(engine: VirtualEngine) -> None:
    known = watching(engine)
    await known.run()
    await fail(engine, "a", "took 12 s")
    [first] = known.view(9).groups
    await asyncio.sleep(60)
    await engine.yes(cmd.ForceReset(id="a"))
    assert known.view(9).groups == []
    await engine.yes(cmd.ForceFail(id="a", reason="took 13 s"))
    [repeated] = known.view(9).groups
    assert repeated.first_at == first.first_at
    assert repeated.last_at >= first.last_at + 60_000


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_groups, "SCAN", 3)
    monkeypatch.setattr(failure_groups, "LIMIT", 2)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("seed", range(12))
@in_virtual_time
async def test_history_is_counted_correctly_while_jobs_change(seed: int) -> None:
    """Commits between two reads, and commits reported after the read that includes them."""
    dice = random.Random(seed)
    async with VirtualEngine(MemoryStorage()) as engine:
        ids = [f"j{n}" for n in range(20)]
        for job_id in ids:
            await engine.yes(cmd.Create(id=job_id, max_attempts=9))
            if dice.random() < 0.5:
                await engine.yes(cmd.ForceFail(id=job_id, reason=f"error {dice.choice('abc')}"))
            elif dice.random() < 0.6:
                await try_once(engine, job_id, f"error {dice.choice('abc')}")
        known = watching(engine)
        running = asyncio.create_task(known.run())
        for n in range(60):
            job_id = dice.choice(ids)
            command = dice.choice(
                (
                    cmd.ForceReset(id=job_id),
                    cmd.ForceFail(id=job_id, reason=f"error {dice.choice('abcd')}"),
                    cmd.Delete(id=job_id),
                )
            )
            requests = [engine.actor.ask(command)]
            if dice.random() < 0.3:
                requests.append(engine.actor.ask(cmd.Create(id=f"new{n}")))
            await asyncio.gather(*requests)
            if dice.random() < 0.5:
                await try_once(engine, dice.choice(ids), f"error {dice.choice('abcd')}")
            if dice.random() < 0.5:
                await asyncio.sleep(dice.choice((0, failure_groups.PAUSE_S / 2, failure_groups.PAUSE_S)))
        await running
        assert known.is_complete
        assert groups(known) == counted(engine)
        assert groups_waiting(known) == waiting(engine)


@in_engine()
async def test_a_failed_read_is_repeated(engine: VirtualEngine) -> None:
    await fail(engine, "a", "x")
    known = watching(engine)
    engine.disk.errors["find"] = OSError("broken")
    running = asyncio.create_task(known.run())
    await asyncio.sleep(1)
    assert not known.is_complete
    assert not known.view(9).complete
    engine.disk.errors.clear()
    await asyncio.sleep(failure_groups.RETRY_S)
    await running
    assert known.view(9).total == 1


@in_engine()
async def test_stop_ends_the_reading(engine: VirtualEngine) -> None:
    await fail(engine, "a", "x")
    known = watching(engine)
    engine.disk.errors["find"] = OSError("broken")
    running = asyncio.create_task(known.run())
    await asyncio.sleep(1)
    known.stop()
    await running
    assert not known.is_complete


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    most = {"MAX_GROUPS": 2, "MAX_FORMER": 1, "MAX_NAMES": 2, "MAX_IDS": 3}
    for name, value in {**most, "SHOWN_IDS": 2, "SHOWN_TEXT": 4}.items():
        monkeypatch.setattr(failure_groups, name, value)


@pytest.mark.usefixtures("few")
@in_engine()
async def test_the_first_line_of_a_group_is_not_shortened(engine: VirtualEngine) -> None:
    known = watching(engine)
    await fail(engine, "a", "alphabet\nand more")
    await fail(engine, "b", "a\nb\nc")
    assert {group.message for group in known.view(9).groups} == {"alphabet", "a\nb\n"}


@in_engine()
async def test_a_group_does_not_depend_on_the_ids_of_its_jobs(engine: VirtualEngine) -> None:
    known = watching(engine)
    for job_id in ("order-abc", "k3f9z", "4711"):
        await fail(engine, job_id, f"{job_id}: no customer {job_id}-7, job {job_id} ends")
    assert [(group.count, group.fingerprint) for group in known.view(9).groups] == [
        (2, fingerprint("x: no customer x-7, job x ends", "force_failed", "x")),
        (1, fingerprint("1: no customer 1-7, job 1 ends", "force_failed")),
    ]
    found = await engine.yes(cmd.SearchJobs(error=known.view(9).groups[0].fingerprint))
    assert {job.id for job in found.jobs} == {"order-abc", "k3f9z"}


@pytest.mark.usefixtures("few")
@in_engine()
async def test_everything_kept_is_limited(engine: VirtualEngine) -> None:
    known = watching(engine)
    for n, reason in enumerate(("alpha", "beta", "gamma", "gamma", "alpha", "alpha", "alpha")):
        await fail(engine, f"j{n}", reason, queue=f"q{n}")
    view = known.view(9)
    assert [(group.message, group.count) for group in view.groups] == [("alpha", 4), ("beta", 1)]
    assert (view.total, view.other) == (7, 2)
    assert len(view.groups[0].job_ids) == 2
    assert view.groups[0].queues == ["q0", "q4"]
    await engine.yes(cmd.Delete(id="j6"))
    await engine.yes(cmd.Delete(id="j2"))
    await engine.yes(cmd.Delete(id="j1"))
    view = known.view(9)
    assert (view.total, view.other, len(view.groups)) == (4, 1, 1)
    await engine.yes(cmd.Delete(id="j3"))
    await engine.yes(cmd.Delete(id="j0"))
    await engine.yes(cmd.Delete(id="j4"))
    await engine.yes(cmd.Delete(id="j5"))
    assert (known.view(9).total, known.view(9).groups) == (0, [])
    await asyncio.sleep(5)
    later = engine.now
    await fail(engine, "j8", "alpha")
    await fail(engine, "j9", "beta")
    since = {group.message: group.first_at for group in known.view(9).groups}
    assert since["alpha"] < later <= since["beta"], "its first occurrence was forgotten"
    await engine.yes(cmd.Create(id="j10", max_attempts=2))
    await try_once(engine, "j10", "gamma")
    assert (known.view(9).retrying, known.view(9).other_retrying) == (1, 1)
    await engine.yes(cmd.Delete(id="j9"))
    await engine.yes(cmd.Create(id="j11", max_attempts=2))
    await try_once(engine, "j11", "gamma")
    await engine.yes(cmd.ForceFail(id="j10", reason="gamma"))
    assert (known.view(9).retrying, known.view(9).total) == (1, 2)


@in_engine()
async def test_a_search_finds_the_failed_jobs_of_a_group(engine: VirtualEngine) -> None:
    await fail(engine, "a", "took 12 s")
    await fail(engine, "b", "took 40 s")
    await fail(engine, "c", "lost")
    name = fingerprint("took 1 s", "force_failed")
    assert [job.id for job in (await engine.yes(cmd.SearchJobs(error=name))).jobs] == ["b", "a"]
    assert [job.id for job in (await engine.yes(cmd.SearchJobs(error=name, status="queued"))).jobs] == []
