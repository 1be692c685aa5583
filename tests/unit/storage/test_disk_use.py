"""What the disk of a store holds: exact sizes of its files, and estimates from a sample of its jobs."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.maintenance.disk_sampler import EMPTY_KEPT_MS, KEPT_MS, DiskSampler
from jobd.model.events import Event
from jobd.model.job import Options
from jobd.storage import disk_use
from jobd.storage.store import MEMORY, Store
from tests.support.factories import NOW, ChangeFactory
from tests.support.store_files import damage_tree, job_of, make_store, open_store

SIZES = {"monthly": 0, "charge": 3_000, "mail": 900, "scan": 200, "": 40}  # of payloads, by kind


async def fill(store: Store, maker: ChangeFactory, jobs: int) -> Counter[str]:
    """Create jobs of five kinds, delete a third of them, and return the bytes of payloads and results of each kind."""
    chance, taken, made = random.Random(5), dict.fromkeys(SIZES, 0), list[Event]()
    for number in range(jobs):
        kind = chance.choices(list(SIZES), (10, 10, 20, 5, 1))[0]
        created = maker.create(options=Options(queue="all", kind=kind))
        created = replace(created, payload=b'"%s"' % (b"x" * SIZES[kind]))
        ended = maker.finish(job_of(created), metadata=b'"%s"' % (b"r" * (5_000 if kind == "monthly" else 10)))
        made += [created, ended]
        if number % 3 == 1 or jobs // 4 < number < jobs // 3:
            made.append(maker.delete(job_of(ended)))
        else:
            taken[kind] += SIZES[kind] + (5_000 if kind == "monthly" else 10)
        if number % 100 == 99 or number == jobs - 1:
            await store.write(maker.batch(made))
            made = []
    return Counter(taken)


async def test_the_kinds_of_a_known_store_are_in_order_and_within_20_percent(
    store: Store, path: str, maker: ChangeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_use, "PLACES", 60)  # few enough not to read every job
    monkeypatch.setattr(disk_use, "PLACE_S", 10)
    monkeypatch.setattr(disk_use, "MAX_KINDS", 4)
    taken = await fill(store, maker, 6_000)
    await store.finish_upkeep()
    Path(f"{path}.ballast").write_bytes(b"x" * 100_000)
    disk = os.statvfs_result((4_096, 4_096, 100_000, 30_000, 20_000, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    use = await DiskSampler(store, lambda: NOW).measure()
    assert [each.kind for each in use.kinds[:3]] == [kind for kind, _ in taken.most_common(3)]
    for each in use.kinds[:3]:
        assert each.payloads + each.results == pytest.approx(taken[each.kind], rel=0.2)
    assert (use.kinds[0].name, use.kinds[0].main_part) == ("all / monthly", ("events", use.kinds[0].events))
    assert (len(use.kinds), use.more_kinds) == (4, 1)
    assert use.database_bytes == await store.used_bytes()
    assert 0 < use.other_bytes < use.database_bytes - sum(each.bytes for each in use.kinds)
    assert 1_000 < use.jobs_read < len(maker.jobs) / 2
    assert (use.measured_at, use.tail_bytes) == (NOW, 0)
    own = sum(entry.stat().st_blocks * 512 for entry in os.scandir(os.path.dirname(path)))
    assert use.not_jobd_bytes == pytest.approx(70_000 * 4_096 - own, rel=0.01)
    assert use.free_bytes == 20_000 * 4_096
    assert use.side_bytes >= 100_000


async def test_rows_stand_for_those_between_the_gaps(
    store: Store, maker: ChangeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_use, "PLACES", 10)
    monkeypatch.setattr(disk_use, "PLACE_S", 10)
    made = [maker.create(options=Options(kind="dense" if number < 1_000 else "sparse")) for number in range(2_000)]
    await store.write(maker.batch(made))
    await store.write(maker.batch([maker.delete(job_of(each)) for each in made[1_000:] if each.seq % 10]))
    await store.finish_upkeep()
    use = await DiskSampler(store, lambda: NOW).measure()
    assert {each.kind: each.jobs for each in use.kinds} == pytest.approx({"dense": 1_000, "sparse": 100}, rel=0.1)


async def test_each_of_a_few_jobs_with_wide_gaps_is_read(
    store: Store, maker: ChangeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_use, "PLACES", 10)
    monkeypatch.setattr(disk_use, "PLACE_S", 10)
    made = [maker.create() for _ in range(2_000)]
    await store.write(maker.batch(made))
    await store.write(maker.batch([maker.delete(job_of(each)) for each in made if each.seq % 50]))
    await store.finish_upkeep()
    assert (await DiskSampler(store, lambda: NOW).measure()).jobs_read == 40


async def test_a_slow_disk_ends_a_slice_after_one_row(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_use, "SLICE_S", 0)
    monkeypatch.setattr(disk_use, "PLACE_S", 0)
    maker = ChangeFactory()
    await fill(store, maker, 300)
    await store.finish_upkeep()
    sample = disk_use.Sample()
    assert await store.sample_jobs(sample)
    assert (sample.place, sample.jobs_read) == (1, 1)
    use = await DiskSampler(store, lambda: NOW).measure()
    assert use.jobs_read <= disk_use.PLACES
    assert sum(each.jobs for each in use.kinds) == pytest.approx(len(maker.jobs), abs=3)


async def test_a_store_in_memory_has_no_disk() -> None:
    async with (await Store.open(MEMORY))[0] as store:
        use = await DiskSampler(store, lambda: NOW).measure()
    assert (use.total_bytes, use.not_jobd_bytes, use.kinds, use.jobs_read) == (None, None, [], 0)


async def test_damaged_rows_are_left_out(path: str) -> None:
    await make_store(path)
    damage_tree(path, "events")
    async with open_store(path) as (store, _):
        assert (await DiskSampler(store, lambda: NOW).measure()).jobs_read == 0
        store._connection.raw.execute("UPDATE jobs SET body = '{'")
        assert disk_use._result_bytes(b"{") == 0


async def test_a_measurement_is_shared_and_kept_for_ten_minutes(store: Store) -> None:
    now = NOW
    sampler = DiskSampler(store, lambda: now)
    assert sampler.recent() is None
    first, second = await asyncio.gather(sampler.measure(), sampler.measure())
    assert first is second
    assert sampler.recent() is first
    now += KEPT_MS
    assert sampler.recent() is first
    assert await sampler.measure() is sampler.recent() is not first


async def test_a_measurement_without_jobs_is_kept_for_ten_seconds() -> None:
    now = NOW
    async with (await Store.open(MEMORY))[0] as store:
        sampler = DiskSampler(store, lambda: now)
        empty = await sampler.measure()
        now += EMPTY_KEPT_MS
        assert sampler.recent() is empty
        assert sampler._running is not None
        assert not sampler._running.done(), "it measures again"
        await sampler.measure()


async def test_a_measurement_that_fails_is_logged(
    store: Store, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = DiskSampler(store, lambda: NOW)
    monkeypatch.setattr(os, "statvfs", lambda path: 1 / 0)
    assert sampler.recent() is None
    with pytest.raises(ZeroDivisionError):
        await sampler.measure()
