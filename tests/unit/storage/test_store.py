"""The store on real files: what was written is read back, page by page and event by event."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from jobd.model.events import KEEP_FIRST_GRANTS, KEEP_GRANTS, KEEP_HEARTBEATS, Change, Event, fold
from jobd.model.fingerprints import fingerprint
from jobd.model.job import COUNTER_MASK, MAX_LATE_RESULTS, Failure, Grant, Job, LateResult, Lease, PreviousGrant, Result
from jobd.model.storage import (
    MAX_POSTPONE_MS,
    SPARE_BYTES,
    BadRows,
    Batch,
    DiskFull,
    DueTombstones,
    JobQuery,
    JournalPage,
    LateResultQuery,
    LoadedRows,
    Numbers,
    OpenedStore,
    StoredResponse,
    Tombstone,
)
from jobd.storage import codec, database, files, queries
from jobd.storage.store import MEMORY, Store
from tests.support.factories import NOW, OPTIONS, ChangeFactory, all_of
from tests.support.store_help import assert_holds, edited, exists, flip, made, opened, recounted


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "jobd.db")


@pytest.fixture
async def store(path: str) -> AsyncIterator[Store]:
    store, _ = await Store.open(path)
    async with store:
        yield store


async def test_a_new_store_is_empty_private_and_durable(path: str) -> None:
    async with opened(path) as (store, found):
        assert found == OpenedStore(Numbers())
        for name in (path, f"{path}.lock", f"{path}.epoch", f"{path}.ballast"):
            assert stat.S_IMODE(os.stat(name).st_mode) == 0o600, name
        assert os.stat(f"{path}.ballast").st_blocks * 512 >= files.RESERVE_FILE_BYTES
        pragmas = ("journal_mode", "synchronous", "locking_mode")
        raw = store._connection.raw
        assert [raw.execute(f"PRAGMA {p}").fetchone()[0] for p in pragmas] == ["wal", 2, "exclusive"]
        assert not exists(f"{path}-shm")


async def test_synchronous_is_at_least_full(path: str) -> None:
    store, _ = await Store.open(path, synchronous="EXTRA")
    async with store:
        assert store._connection.raw.execute("PRAGMA synchronous").fetchone() == (3,)
    with pytest.raises(ValueError, match="loses acknowledged work"):
        await Store.open(path, synchronous="NORMAL")  # type: ignore[arg-type]


async def test_a_batch_survives_a_restart(path: str) -> None:
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        first = maker.create("a")
        second = maker.create("b", type_="imported")
        await store.write(maker.batch([first, second]))
        grant = maker.grant(made(first))
        report = maker.progress(made(grant), 45.0, "half")
        ended = maker.finish(made(second), "failed")
        shown = await store.write(maker.batch([grant, report, ended], payloads=[1, 2], report=b'{"r":1}'))
        assert shown == maker.payloads
    async with opened(path) as (store, found):
        await assert_holds(store, found, maker)
        assert await store.reports(5) == [b'{"r":1}']
        loaded = await store.load(["b", "nobody"], [2, 99], ["nothing"])
        assert loaded == LoadedRows({"b": maker.jobs[2]}, {2: loaded.payloads[2]}, {}, {})
        assert loaded.payloads[2].request_hash == "hash-2"


async def test_a_batch_is_one_transaction(store: Store) -> None:
    """Jobs, events, answers that are kept under their keys, queues, a report, what operators did."""
    maker, said = ChangeFactory(), list[str]()
    old = StoredResponse("d0", "b0", NOW, 200, b"{}")
    await store.write(maker.batch([maker.create("old")], keys=[old]))
    first, second = maker.create("a"), maker.create("b")
    changes = [first, second, maker.grant(made(first)), maker.finish(made(second), "cancelled")]
    keys = [StoredResponse("d1", "b1", NOW, 201, b'{"x":1}')]
    store._connection.raw.set_trace_callback(said.append)
    await store.write(maker.batch(changes, keys=keys, forget_keys=["d0"], report=b"{}", checked=[1]))
    store._connection.raw.set_trace_callback(None)
    words = [each.split()[0] for each in said]
    assert words[0] == "BEGIN"
    assert words[-1] == "COMMIT"
    assert (words.count("BEGIN"), words.count("COMMIT")) == (1, 1)
    for table in ("jobs", "events", "keys", "reports", "meta"):
        assert any(table in each for each in said[1:-1]), table


async def test_a_batch_returns_the_payload_of_a_job_that_it_creates(store: Store) -> None:
    maker = ChangeFactory()
    assert await store.write(maker.batch([maker.create()], payloads=[1])) == {1: maker.payloads[1]}


async def test_a_batch_behind_other_work_does_not_block_the_event_loop(store: Store) -> None:
    maker, busy = ChangeFactory(), threading.Event()
    other = asyncio.create_task(store._connection.run_in_thread(busy.wait))
    writing = asyncio.create_task(store.write(maker.batch([maker.create()])))
    await asyncio.sleep(0)
    busy.set()  # nobody would, if the loop waited for the thread
    assert await other is True
    assert await writing == {}


async def test_an_empty_batch_keeps_the_numbers(path: str) -> None:
    numbers = Numbers(1, 2, 3, 4, 5, 6)
    async with opened(path) as (store, _):
        assert await store.write(Batch([], numbers)) == {}
    async with opened(path) as (_, found):
        assert found.numbers == numbers


async def test_a_job_created_and_deleted_in_one_batch_leaves_its_journal(path: str) -> None:
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        first = maker.create("a", type_="imported")
        ended = maker.finish(made(first), "cancelled")
        gone = maker.delete(made(ended))
        again = maker.create("a")
        await store.write(maker.batch([first, ended, gone, again]))
    async with opened(path) as (store, found):
        await assert_holds(store, found, maker)
        assert [job.seq for job in found.live()] == [2]
        assert [event.type for event in await store.timeline(1)] == ["imported", "cancelled", "deleted"]
        assert (await store.load(["a"], [1], [])).payloads == {}


async def test_stored_responses_are_kept_replaced_and_deleted(path: str) -> None:
    answer, grant = (
        StoredResponse("d1", "b1", NOW, 201, b'{"x":1}'),
        StoredResponse("d2", "b2", NOW + 1, 200, None, [("a", "lock")]),
    )
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        await store.write(maker.batch([], keys=[answer, grant]))
    async with opened(path) as (store, found):
        assert found.keys == [replace(answer, body=None), grant]
        assert (await store.load([], [], ["d1", "d2"])).responses == {"d1": answer, "d2": grant}
        newer = replace(answer, body=b"[]", at=NOW + 2)
        await store.write(maker.batch([], keys=[newer], forget_keys=["d2"]))
        assert (await store.load([], [], ["d1", "d2"])).responses == {"d1": newer}


async def test_the_last_500_reports_are_kept(store: Store) -> None:
    maker = ChangeFactory()
    for number in range(503):
        await store.write(maker.batch([], report=b"%d" % number))
    kept = await store.reports(1_000)
    assert kept == [b"%d" % number for number in range(502, 2, -1)]
    assert await store.reports(2) == [b"502", b"501"]


async def test_stats_survive_a_restart(path: str) -> None:
    async with opened(path) as (store, found):
        assert found.figures is None
        await store.save_figures(b"1")
        await store.save_figures(b"2")
    async with opened(path) as (_, found):
        assert found.figures == b"2"


async def test_a_store_in_memory_behaves_the_same() -> None:
    maker = ChangeFactory(3)
    async with opened(MEMORY) as (store, found):
        assert found.live() == []
        for _ in range(30):
            await store.write(maker.any_batch(10))
        assert len((await store.find(JobQuery(limit=200))).jobs) == len(maker.jobs)
        assert await store.space() is None
        await store.probe(SPARE_BYTES)
        assert await store.drop_reserve() is False
        await store.build_reserve()
        await store.probe()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_rows_journal_totals_and_counts_agree_after_any_batches(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sizes: list[int]
) -> None:
    async def run() -> None:
        path = str(tmp_path_factory.mktemp("any") / "jobd.db")
        maker = ChangeFactory(seed)
        for part in (sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]):
            async with opened(path) as (store, _):
                for size in part:
                    batch = maker.any_batch(size)
                    shown = await store.write(batch)
                    assert shown == {seq: maker.payloads[seq] for seq in batch.payloads}
            async with opened(path) as (store, found):
                await assert_holds(store, found, maker)
                assert store._database.totals == recounted(store)

    asyncio.run(run())


# ---------------------------------------------------------------------------------------------------------------------
# The journal


async def test_the_last_heartbeats_of_each_grant_are_kept(path: str) -> None:
    maker = ChangeFactory(1)
    job = made(maker.create(options=OPTIONS[1]))
    async with opened(path) as (store, _):
        await store.write(
            Batch([Change(None, job, Event(1, NOW, "created", 1, job.id, "video", None, "queued", "c"))], maker.numbers)
        )
        change = maker.grant(job)
        await store.write(maker.batch([change]))
        for number in range(450):
            change = (
                maker.extend(made(change))
                if number % 3
                else maker.progress(made(change), None, "x" if number == 6 else None)
            )
            await store.write(maker.batch([change]))
        (rows_kept,) = store._connection.raw.execute("SELECT count(*) FROM events").fetchone()
        assert rows_kept <= 2 + 3 * KEEP_HEARTBEATS
        types = [event.type for event in await store.timeline(1)]
        assert types.count("progress") == types.count("extended") == KEEP_HEARTBEATS
    async with opened(path) as (store, _):
        await store.write(maker.batch([maker.extend(made(change))]))  # a grant of before the start: thinned at once
        (rows_kept,) = store._connection.raw.execute("SELECT count(*) FROM events").fetchone()
        assert rows_kept == 2 + 2 * KEEP_HEARTBEATS
        assert maker.jobs[1].progress_message == "x"


async def test_each_batch_thins_one_journal(path: str) -> None:
    """Everybody waits for it: sixteen workers that report alike would hold all up for sixteen times as long."""
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        created = [maker.create(), maker.create()]
        await store.write(maker.batch(created))
        held = [maker.grant(made(change)) for change in created]
        await store.write(maker.batch(held))

        def signs() -> list[int]:
            sql = "SELECT count(*) FROM events WHERE type = 'progress' GROUP BY job_seq ORDER BY job_seq"
            return [count for (count,) in store._connection.raw.execute(sql)]

        for _ in range(KEEP_HEARTBEATS + 1):
            held = [maker.progress(made(change)) for change in held]
            await store.write(maker.batch(held))
        assert signs() == [KEEP_HEARTBEATS, KEEP_HEARTBEATS + 1]
        await store.write(maker.batch([maker.finish(made(held[1])), maker.create()]))
        assert signs() == [KEEP_HEARTBEATS, KEEP_HEARTBEATS]
        assert list(store._database._signs) == [1], "whose grant has ended is not watched any more"
        await store.write(maker.batch([maker.create()]))
        assert signs() == [KEEP_HEARTBEATS, KEEP_HEARTBEATS]


async def test_a_pending_journal_is_thinned_from_its_recorded_grant(path: str) -> None:
    """The job may be in other hands when its turn comes."""
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        created = [maker.create(), maker.create()]
        held = [maker.grant(made(change)) for change in created]
        await store.write(maker.batch([*created, *held]))
        for _ in range(KEEP_HEARTBEATS + 1):
            held = [maker.progress(made(change)) for change in held]
            await store.write(maker.batch(held))
        back = maker.requeue(made(held[1]))
        await store.write(maker.batch([back, maker.grant(made(back))]))
        sql = "SELECT count(*) FROM events WHERE type = 'progress' AND job_seq = 2"
        assert store._connection.raw.execute(sql).fetchone() == (KEEP_HEARTBEATS,)


# ---------------------------------------------------------------------------------------------------------------------
# Grants that were given back


def round_of(maker: ChangeFactory, job: Job, signs: int = 0) -> tuple[Job, list[Change]]:
    """A grant that is given back."""
    changes = [maker.grant(job)]
    for _ in range(signs):
        changes.append(maker.extend(made(changes[-1])))
    changes.append(maker.requeue(made(changes[-1])))
    return made(changes[-1]), changes


def tokens_of(events: list[Event]) -> list[int]:
    grants = (event.changes.grant for event in events if event.type == "granted" and event.changes is not None)
    return [grant.fencing_token for grant in grants if isinstance(grant, Grant)]


def folded(events: list[Event]) -> Job | None:
    row = None
    for event in events:
        row = fold(row, event)
    return row


async def test_the_first_and_last_returned_grants_are_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, compact = ChangeFactory(), codec.compact
    read: list[int] = []
    tokens: list[int] = []

    def counting(events: list[Event]) -> tuple[list[int], list[Event]]:
        read.append(len(events))
        return compact(events)

    monkeypatch.setattr(codec, "compact", counting)
    change = maker.create()
    job, count = made(change), 0
    most = 1 + 2 * (KEEP_FIRST_GRANTS + 2 * KEEP_GRANTS)
    async with opened(path) as (store, _):
        await store.write(maker.batch([change]))
        for _ in range(5 * KEEP_GRANTS):
            job, changes = round_of(maker, job)
            tokens += tokens_of([each.event for each in changes])
            await store.write(maker.batch(changes))
            (count,) = store._connection.raw.execute("SELECT count(*) FROM events").fetchone()
            assert count <= most
        assert count == 1 + 2 * (KEEP_FIRST_GRANTS + KEEP_GRANTS)
        assert read == [2 * (KEEP_GRANTS - KEEP_FIRST_GRANTS) + 1, *[2 * KEEP_GRANTS + 1] * 3]
    async with opened(path) as (store, _):  # it knows nothing of them any more
        for _ in range(KEEP_GRANTS):
            job, changes = round_of(maker, job)
            tokens += tokens_of([each.event for each in changes])
            await store.write(maker.batch(changes))
        events = await store.timeline(1)
        assert tokens_of(events) == [*tokens[:KEEP_FIRST_GRANTS], *tokens[-KEEP_GRANTS:]]
        assert folded(events) == job
        page = await store.journal(0, 10_000)
        assert (page.gone_to, [event.seq for event in page.events]) == (0, [event.seq for event in events])


async def test_a_long_journal_is_compacted_in_slices(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch waits for more than one slice, even if a single grant is longer than that."""
    monkeypatch.setattr(database, "COMPACTED_AT_ONCE", 20)
    maker = ChangeFactory()
    change = maker.create()
    job, changes = made(change), [change]
    for number in range(2 * KEEP_GRANTS):
        job, more = round_of(maker, job, signs=40 if number == 50 else 0)
        changes += more
    kept = 1 + 2 * (KEEP_FIRST_GRANTS + KEEP_GRANTS)
    async with opened(path) as (store, _):
        await store.write(maker.batch(changes))
        counts = []
        while store._database._to_shorten:
            counts.append(store._connection.raw.execute("SELECT count(*) FROM events").fetchone()[0])
            await store.write(maker.batch([maker.create()]))
        assert counts[0] == len(changes) - 18, "two slices would be more: the grant at its end stays"
        (count,) = store._connection.raw.execute("SELECT count(*) FROM events WHERE job_seq = 1").fetchone()
        assert count == kept + 42, "what is longer than a slice stays whole"
        assert folded(await store.timeline(1)) == job


async def test_a_journal_is_compacted_after_a_damaged_row(path: str) -> None:
    maker = ChangeFactory()
    change = maker.create()
    job, changes = made(change), [change]
    for _ in range(2 * KEEP_GRANTS):
        job, more = round_of(maker, job)
        changes += more
    damaged = 1 + 2 * 45 + 1  # the event of a grant
    async with opened(path) as (store, _):
        await store.write(maker.batch(changes[: 2 * damaged]))
        store._connection.raw.execute("UPDATE events SET reason = 'x' WHERE seq = ?", (damaged,))
        await store.write(maker.batch(changes[2 * damaged :]))
        seqs = [
            seq for (seq,) in store._connection.raw.execute("SELECT seq FROM events WHERE job_seq = 1 ORDER BY seq")
        ]
        assert seqs == [*range(1, damaged + 2), *range(len(changes) - 2 * KEEP_GRANTS + 1, len(changes) + 1)]
        events = await store.timeline(1)
        assert folded(events) == job
        assert len(events) == len(seqs) - 1, "it was set aside"


async def test_returned_grants_are_counted_for_a_limited_number_of_jobs(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "GIVEN_BACK_KEPT", 2)
    maker = ChangeFactory()
    created = [maker.create() for _ in range(3)]
    async with opened(path) as (store, _):
        await store.write(maker.batch(created))
        jobs = []
        for change in [*created, created[1]]:
            job, changes = round_of(maker, maker.jobs[made(change).seq])
            jobs.append(job)
            await store.write(maker.batch(changes))
        assert store._database._given_back == {3: (0, 1), 2: (0, 2)}
        await store.write(maker.batch([maker.finish(jobs[2], "failed")]))
        assert store._database._given_back == {2: (0, 2)}


async def test_recently_written_payloads_are_cached(store: Store, path: str) -> None:
    maker = ChangeFactory()
    await store.write(maker.batch([maker.create(), maker.create()]))
    assert store.cached_payloads([1, 2, 3]) == {seq: maker.payloads[seq] for seq in (1, 2)}
    assert store.cached_payloads([]) == {}


async def test_a_timeline_can_be_limited_to_its_latest_events(store: Store) -> None:
    maker = ChangeFactory()
    change = maker.create()
    await store.write(maker.batch([change]))
    for _ in range(5):
        change = maker.grant(made(change))
        await store.write(maker.batch([change, maker.create()]))
        change = maker.requeue(made(change))
        await store.write(maker.batch([change]))
    whole = await store.timeline(1)
    assert len(whole) == 11
    for limit in (1, 2, 10, 11, 50):
        assert await store.timeline(1, limit) == whole[-limit:]


async def test_old_journals_of_deleted_jobs_are_pruned(store: Store) -> None:
    maker = ChangeFactory()
    first, second = maker.create(), maker.create()
    ended = maker.finish(made(first))
    await store.write(maker.batch([first, second, ended, maker.queue_event("video", True)]))
    maker.now += 1_000
    await store.write(maker.batch([maker.delete(made(ended))]))
    assert await store.prune(NOW, 100) == 0
    assert await store.prune(NOW + 1, 100) == 1  # of the queue
    assert await store.prune(NOW + 1_000, 100) == 0  # at that very time it is not yet past
    assert await store.prune(NOW + 1_001, 2) == 2
    assert [event.type for event in await store.timeline(1)] == ["deleted"]
    assert await store.prune(NOW + 1_001, 2) == 1
    assert await store.timeline(1) == []
    assert await store.prune(NOW + 1_001, 2) == 0
    assert len(await store.timeline(2)) == 1
    assert store._connection.raw.execute("SELECT count(*) FROM deleted_jobs").fetchone() == (0,)


async def test_the_journal_continues_after_a_position(store: Store) -> None:
    maker = ChangeFactory()
    await store.write(maker.batch([maker.create() for _ in range(5)]))
    page = await store.journal(2, 2)
    assert ([event.seq for event in page.events], page.last, page.gone_to) == ([3, 4], 5, 0)
    assert await store.journal(5, 2) == JournalPage([], 5, 0)


async def test_pruned_events_are_reported_after_a_restart(path: str) -> None:
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        first, second = maker.create(), maker.create()
        ended = maker.finish(made(maker.grant(made(first))))
        await store.write(maker.batch([first, second, ended, maker.queue_event("video", True)]))
        maker.now += 1_000
        await store.write(maker.batch([maker.delete(made(ended))]))
        last = maker.numbers.next_event - 1
        assert (await store.journal(0, 100)).gone_to == 0
        assert await store.prune(NOW + 1, 100) == 1
        of_the_queue = (await store.journal(0, 100)).gone_to
        assert of_the_queue == last - 1
        await store.prune(NOW + 1_001, 100)
        page = await store.journal(0, 100)
        assert (page.last, page.gone_to) == (last, last)
        assert [event.job_seq for event in page.events] == [2]  # older, and whole
    async with opened(path) as (store, _):
        assert (await store.journal(0, 100)).gone_to == last


async def test_a_damaged_event_is_reported_as_missing(path: str) -> None:
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        await store.write(maker.batch([maker.create() for _ in range(5)]))
    with edited(path) as conn:
        conn.execute("UPDATE events SET at = at + 1 WHERE seq = 3")
    async with opened(path) as (store, _):
        page = await store.journal(0, 4)
        assert ([event.seq for event in page.events], page.gone_to) == ([1, 2, 4], 3)
    async with opened(path) as (store, _):
        assert (await store.journal(3, 10)).gone_to == 3  # it was set aside, and that is remembered


async def test_a_damaged_event_number_marks_no_future_events_as_missing(path: str) -> None:
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        await store.write(maker.batch([maker.create() for _ in range(5)]))
    with edited(path) as conn:
        conn.execute(f"UPDATE events SET seq = {1 << 60} WHERE seq = 3")
    async with opened(path) as (store, _):
        assert (await store.journal(0, 10)).gone_to == 5


# ---------------------------------------------------------------------------------------------------------------------
# Pages


async def fill_for_pages(store: Store) -> ChangeFactory:
    maker = ChangeFactory(5)
    changes = [maker.create(options=OPTIONS[number % 2]) for number in range(60)]
    await store.write(maker.batch(changes))
    jobs = list(maker.jobs.values())
    await store.write(maker.batch([maker.grant(job) for job in jobs if job.seq % 3 == 0]))
    done = [job for job in maker.jobs.values() if job.seq % 4 == 0]
    ends = ("completed", "failed", "completed", "cancelled")
    await store.write(maker.batch([maker.finish(job, ends[job.seq // 4 % 4]) for job in done]))
    return maker


async def all_pages(store: Store, query: JobQuery) -> tuple[list[Job], int]:
    found: list[Job] = []
    pages = 0
    while True:
        page = await store.find(query)
        found += [job for job, _ in page.jobs]
        pages += 1
        if page.next_before is None:
            return found, pages
        beyond = {"before" if query.after is None else "after": page.next_before}
        query = replace(query, **beyond)


@pytest.mark.parametrize("scan", [1, 7, 5_000])
@pytest.mark.parametrize("limit", [1, 10, 200])
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"status": "queued"},
        {"status": "processing"},
        {"status": "completed"},
        {"queue": "video"},
        {"kind": "convert", "status": "processing"},
        {"worker": "w-1"},
        {"worker": "w-1", "queue": "default"},
        {"worker": "w-1", "status": "completed"},
        {"worker": "w-1", "status": "failed"},
        {"status": "failed"},
        {"status": "cancelled", "queue": "default"},
        {"queue": "nowhere"},
    ],
)
async def test_pages_return_each_match_once_in_either_order(
    store: Store, scan: int, limit: int, wanted: dict[str, str]
) -> None:
    maker = await fill_for_pages(store)
    matches = [job for job in maker.jobs.values() if _matches(job, wanted)]
    found, pages = await all_pages(store, JobQuery(limit=limit, scan=scan, **wanted))  # type: ignore[arg-type]
    assert found == sorted(matches, key=lambda job: -job.seq)
    upwards, pages_upwards = await all_pages(store, JobQuery(limit=limit, scan=scan, after=0, **wanted))  # type: ignore[arg-type]
    assert upwards == found[::-1]
    if scan > 60:
        assert pages == pages_upwards == max(1, -(-len(matches) // limit))


def _matches(job: Job, wanted: dict[str, str]) -> bool:
    has = {
        "status": job.status,
        "queue": job.options.queue,
        "kind": job.options.kind,
        "worker": job.grant.worker if job.grant else job.ended.worker if job.ended else None,
    }
    return all(has[name] == value for name, value in wanted.items())


@pytest.mark.parametrize("status", ["queued", "processing", "failed", "cancelled"])
async def test_a_failed_job_is_found_behind_many_newer_ones(store: Store, status: str) -> None:
    maker = ChangeFactory()
    created = maker.create("old")
    old = made(created)
    await store.write(maker.batch([created]))
    if status == "processing":
        await store.write(maker.batch([maker.grant(old)]))
    elif status != "queued":
        await store.write(maker.batch([maker.finish(old, status)]))
    await store.write(maker.batch([maker.create() for _ in range(50)]))
    await store.write(maker.batch([maker.finish(job) for job in list(maker.jobs.values()) if job.id != "old"]))
    page = await store.find(JobQuery(status=status, scan=5))
    assert ([job.id for job, _ in page.jobs], page.next_before, page.scanned_until) == (["old"], None, None)


async def test_a_page_that_ends_early_reports_how_far_it_scanned(store: Store) -> None:
    maker = ChangeFactory()
    await store.write(maker.batch([said(maker, f"j{n}", created_at=NOW + n) for n in range(9)]))
    page = await store.find(JobQuery(kind="none", scan=4))
    assert (page.jobs, page.next_before, page.scanned_until, page.scanned) == ([], 6, NOW + 5, 4)
    page = await store.find(JobQuery(kind="none", scan=4, before=5))
    assert (page.next_before, page.scanned_until) == (None, None), "that was the last one"
    page = await store.find(JobQuery(scan=4, limit=2))
    assert (len(page.jobs), page.next_before, page.scanned_until) == (2, 8, None), "it is full"
    page = await store.find(JobQuery(scan=4))
    assert (len(page.jobs), page.next_before, page.scanned_until) == (4, 6, NOW + 5)


async def test_jobs_are_filtered_by_the_worker_of_their_latest_grant(store: Store) -> None:
    """Also where it has ended. Who had the job before has no part in it any more."""
    maker = ChangeFactory()
    created = maker.create("a")
    await store.write(maker.batch([created]))
    first = PreviousGrant("old", 1, "w-before", NOW, "holder", "failed", "fail", "h")
    for status, grant in (("queued", None), ("processing", Grant("l", 2, "w-now", NOW, 1_000, 0, 0))):
        after = replace(made(created), status=status, grant=grant, ended=first, lease=grant and Lease(1, 1, 1))
        await store.write(maker.batch([maker._step(maker.jobs[1], after, "granted")]))
        expected = ["a"] if grant is None else []
        assert await ids(store, worker="w-before") == expected
        assert await ids(store, worker="w-before", status=status) == expected
        assert await ids(store, worker="w-now") == (["a"] if grant else [])


async def test_a_page_has_a_limited_amount_of_payload(store: Store) -> None:
    maker = ChangeFactory()
    changes = [replace(maker.create(), payload=b'"%s"' % (b"y" * 998)) for _ in range(10)]
    await store.write(maker.batch(changes))
    page = await store.find(JobQuery(payload_bytes=3_000))
    assert [job.seq for job, _ in page.jobs] == [10, 9, 8]
    assert page.next_before == 8
    page = await store.find(JobQuery(payload_bytes=10, before=2))  # one that is larger than that is a page of its own
    assert [(job.seq, len(body)) for job, body in page.jobs] == [(1, 1_000)]
    assert page.next_before is None
    page = await store.find(JobQuery(payload_bytes=3_000, after=0))
    assert [job.seq for job, _ in page.jobs] == [1, 2, 3]
    assert page.next_before == 3


def with_metadata(maker: ChangeFactory, count: int, size: int) -> list[Change]:
    """So many jobs, created and completed with so much metadata."""
    changes = []
    for _ in range(count):
        created = maker.create(options=OPTIONS[0])
        result = Result(metadata=Raw(b'"%s"' % (b"y" * (size - 2))))
        done = replace(made(created), status="completed", progress=100, finished_at=NOW, expires_at=NOW, result=result)
        changes += [created, maker._step(made(created), done, "completed")]
    return changes


async def test_a_page_reads_a_limited_amount_of_metadata(store: Store) -> None:
    maker = ChangeFactory()
    await store.write(maker.batch(with_metadata(maker, 10, 1_000)))
    for after, expected in ((None, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]), (0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])):
        seqs, sizes, query = [], [], JobQuery(payload_bytes=3_500, after=after)
        while True:
            page = await store.find(query)
            seqs += [job.seq for job, _ in page.jobs]
            sizes.append(len(page.jobs))
            if page.next_before is None:
                break
            query = replace(query, **{"before" if after is None else "after": page.next_before})
        assert seqs == expected
        assert sizes == [3, 3, 3, 1]
    page = await store.find(JobQuery(payload_bytes=10, before=2))
    assert [job.seq for job, _ in page.jobs] == [1]
    assert page.next_before is None


async def test_slices_of_events_and_of_expired_jobs_have_a_limited_size(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches wait for them: a hundred events of 256 KiB each would take half a second."""
    monkeypatch.setattr(queries, "SLICE_BYTES", 3_000)
    maker = ChangeFactory()
    await store.write(maker.batch(with_metadata(maker, 10, 1_000)))
    seqs: list[int] = []
    while True:
        page = await store.journal(seqs[-1] if seqs else 0, 100)
        seqs += [event.seq for event in page.events]
        assert page.last == 20
        if not page.more:
            break
        assert 2 <= len(page.events) <= 7
    assert seqs == list(range(1, 21))
    assert (await store.journal(0, 2)).more
    assert await store.expired(NOW, 100) == ["job-1", "job-2", "job-3"]
    monkeypatch.setattr(queries, "SLICE_BYTES", 1)
    assert [event.seq for event in (await store.journal(1, 100)).events] == [2]  # one at least
    assert await store.expired(NOW, 100) == ["job-1"]


async def test_expired_returns_only_finished_jobs_oldest_first(store: Store) -> None:
    maker = ChangeFactory()
    first, second, third = (maker.create(expires_at=NOW - 5) for _ in range(3))
    await store.write(maker.batch([first, second, third]))
    late = maker.finish(made(second))
    maker.now -= 500
    soon = maker.finish(made(first))
    await store.write(maker.batch([late, soon]))
    assert await store.expired(NOW + 499, 10) == []
    assert await store.expired(NOW + 500, 10) == ["job-1"]
    assert await store.expired(NOW + 1_000, 10) == ["job-1", "job-2"]
    assert await store.expired(NOW + 1_000, 1) == ["job-1"]
    assert await store.expired(NOW + 1_000, 1, 1) == ["job-2"]
    assert await store.expired(NOW + 1_000, 10, 2) == []
    await store.write(maker.batch([maker.requeue(made(soon))]))
    assert await store.expired(NOW + 1_000, 10) == ["job-2"]


async def test_a_job_with_an_invalid_status_does_not_expire(store: Store) -> None:
    """The index has it, as it is not live; no pass could delete it."""
    maker = ChangeFactory()
    jobs = [maker.create(expires_at=NOW - 5) for _ in range(3)]
    await store.write(maker.batch(jobs))
    ends = [maker.finish(made(job)) for job in jobs]
    ends[0] = replace(ends[0], after=replace(made(ends[0]), status="complete"))
    await store.write(maker.batch(ends))
    assert await store.expired(NOW + 1_000, 10) == ["job-2", "job-3"]
    assert await store.expired(NOW + 1_000, 1, 1) == ["job-3"]


# -- late results -----------------------------------------------------------------------------------------------------


def kept(change: Change) -> LateResult:
    assert change.late is not None
    return change.late


async def late_results(store: Store, job: Job, *, whole: bool = True) -> list[LateResult]:
    return (await store.late([LateResultQuery(job.seq, with_results=whole)])).results[job.seq]


async def test_late_results_survive_a_restart(path: str) -> None:
    maker = ChangeFactory()
    full = Result("https://x/y", "/a", "k/e/y", Raw(b'{"a": [1, null]}'))
    async with opened(path) as (store, _):
        created = maker.create("a")
        await store.write(maker.batch([created, maker.create("b")]))
        job = made(created)
        changes = [maker.late(job, 9, full), maker.late(job, 7, Result())]
        await store.write(maker.batch(changes))
        assert await store.timeline(job.seq) == [created.event, changes[0].event, changes[1].event]
    async with opened(path) as (store, found):
        await assert_holds(store, found, maker)
        assert await late_results(store, job) == [kept(changes[1]), kept(changes[0])], "the oldest grant first"
        names = await late_results(store, job, whole=False)
        addresses = [Result(), Result("https://x/y")]
        assert names == [
            replace(kept(change), result=each) for change, each in zip(reversed(changes), addresses, strict=True)
        ]
        assert (await store.late([LateResultQuery(2), LateResultQuery(99)])).results == {2: [], 99: []}


async def test_late_results_of_the_latest_grants_are_kept(store: Store) -> None:
    maker = ChangeFactory()
    first, second = maker.create("a"), maker.create("b")
    await store.write(maker.batch([first, second]))
    tokens = [5, 3, 9, 1, 8, 2, 7]
    changes = [maker.late(made(first), token) for token in tokens]
    await store.write(maker.batch([*changes[:3], maker.late(made(second), 4)]))
    for change in changes[3:]:
        await store.write(maker.batch([change]))
    left = [late.fencing_token for late in await late_results(store, made(first))]
    assert left == sorted(tokens)[-MAX_LATE_RESULTS:]
    assert [late.fencing_token for late in await late_results(store, made(second))] == [4]


async def test_late_results_are_counted_by_their_index(path: str) -> None:
    maker = ChangeFactory()
    jobs = [maker.create(job_id) for job_id in "abc"]
    async with opened(path) as (store, _):
        await store.write(maker.batch(jobs))
        await store.write(maker.batch([maker.late(made(jobs[0]), token) for token in (1, 2)]))
        await store.write(maker.batch([maker.late(made(jobs[2]), 3)]))
        seqs = [made(each).seq for each in jobs]
        assert await store.count_late([]) == {}
        assert await store.count_late([*seqs, 99]) == {seqs[0]: 2, seqs[2]: 1}


async def test_late_results_are_deleted_with_their_job(store: Store) -> None:
    maker = ChangeFactory()
    created, other = maker.create("a"), maker.create("b")
    cancelled = maker.finish(made(created), "cancelled")
    await store.write(maker.batch([created, other, cancelled]))
    await store.write(maker.batch([maker.late(made(cancelled), 1), maker.late(made(other), 2)]))
    # One that comes in the very batch in which its job goes leaves nothing either.
    await store.write(maker.batch([maker.late(made(cancelled), 3), maker.delete(made(cancelled))]))
    assert store._connection.raw.execute("SELECT fencing_token FROM late_results").fetchall() == [(2,)]


async def test_an_older_grant_is_found_only_in_the_journal_of_its_job(store: Store) -> None:
    maker = ChangeFactory()
    created = maker.create("a")
    granted = maker.grant(made(created))
    back = maker.requeue(made(granted))
    other = maker.create("b")
    again = maker.grant(made(other))
    await store.write(maker.batch([created, granted, back, other, again]))
    grant, foreign = made(granted).grant, made(again).grant
    assert grant is not None
    assert foreign is not None
    seq = made(created).seq
    asked = [LateResultQuery(seq, lock_id) for lock_id in (grant.lock_id, foreign.lock_id, grant.lock_id[:-1], "never")]
    assert (await store.late(asked)).grants == {(seq, grant.lock_id): grant}


async def test_a_grant_is_searched_at_the_end_of_a_journal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was given back a hundred thousand times holds nobody up."""
    maker = ChangeFactory()
    changes = [maker.create("a")]
    for _ in range(4):
        changes.append(maker.grant(made(changes[-1])))
        changes.append(maker.requeue(made(changes[-1])))
    await store.write(maker.batch(changes))
    seq = made(changes[0]).seq
    grants = [grant for change in changes if (grant := made(change).grant) is not None]
    asked = [LateResultQuery(seq, grant.lock_id) for grant in grants]
    assert list((await store.late(asked)).grants.values()) != []
    monkeypatch.setattr(queries, "GRANT_SEARCH_EVENTS", 4)
    found = (await store.late(asked)).grants
    assert sorted(grant.fencing_token for grant in found.values()) == [grant.fencing_token for grant in grants[2:]]


async def test_many_queries_for_one_job_read_it_once(store: Store) -> None:
    maker = ChangeFactory()
    created = maker.create("a")
    await store.write(maker.batch([created]))
    change = maker.late(made(created), 1)
    await store.write(maker.batch([change]))
    seq = made(created).seq
    for asked in (
        [LateResultQuery(seq), LateResultQuery(seq, with_results=True)],
        [LateResultQuery(seq, with_results=True), LateResultQuery(seq, "x")],
    ):
        assert (await store.late(asked)).results == {seq: [change.late]}


# -- filters of operators ---------------------------------------------------------------------------------------------


def said(
    maker: ChangeFactory, job_id: str, *, payload: bytes = b"null", error: str | None = None, **fields: Any
) -> Change:
    change = maker.create(job_id, **fields)
    assert change.after is not None
    after = replace(change.after, error=None if error is None else Failure(error, None))
    maker.payloads[after.seq] = payload
    maker.jobs[after.seq] = after
    event = replace(change.event, changes=all_of(after))
    return replace(change, after=after, payload=payload, event=event)


async def ids(store: Store, **query: Any) -> list[str]:
    return [job.id for job, _ in (await store.find(JobQuery(**query))).jobs]


async def test_text_is_found_in_id_payload_and_error_ignoring_case(store: Store) -> None:
    maker = ChangeFactory()
    changes = [
        said(maker, "Cat-1"),
        said(maker, "b", payload=b'{"pet": "big CAT"}'),
        said(maker, "c", error="no cAt here"),
        said(maker, "d", payload='"katze Ü"'.encode(), error="nothing"),
        said(maker, "e", payload=b'"100%_sure"'),
    ]
    await store.write(maker.batch(changes))
    assert await ids(store, text="cat") == ["c", "b", "Cat-1"]
    assert await ids(store, text="CAT-1") == ["Cat-1"]
    assert await ids(store, text="Ü") == ["d"]
    assert await ids(store, text="ü") == []
    assert await ids(store, text="%_") == ["e"]
    assert await ids(store, text="_at") == []
    assert await ids(store, text='pet": "big') == ["b"]
    assert await ids(store, text="cat", status="failed") == []
    assert await ids(store, text="cat", status="queued", limit=2) == ["c", "b"]


async def test_jobs_are_found_by_creation_time(store: Store) -> None:
    maker = ChangeFactory()
    changes = [said(maker, f"j{n}", created_at=NOW + n) for n in range(5)]
    await store.write(maker.batch(changes))
    assert await ids(store, since=NOW + 2) == ["j4", "j3", "j2"]
    assert await ids(store, until=NOW + 2) == ["j1", "j0"]
    assert await ids(store, since=NOW + 1, until=NOW + 3) == ["j2", "j1"]


async def test_jobs_are_found_by_finish_time(store: Store) -> None:
    maker = ChangeFactory()
    finished = [said(maker, f"j{n}", status="failed", finished_at=NOW + 9 - n, expires_at=NOW * 2) for n in range(4)]
    await store.write(maker.batch([*finished, said(maker, "waits")]))
    assert await ids(store, finished_since=NOW + 8) == ["j1", "j0"]
    assert await ids(store, finished_until=NOW + 8) == ["j3", "j2"]
    assert await ids(store, finished_since=NOW + 7, finished_until=NOW + 9, status="failed") == ["j2", "j1"]
    assert await ids(store, finished_until=NOW * 2) == ["j3", "j2", "j1", "j0"], "what waits has not finished"
    assert await ids(store, finished_since=0, status="queued") == []


async def test_a_text_search_ends_early_if_payloads_are_large(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "TEXT_BYTES", 1_000)
    maker = ChangeFactory()
    big = b'"' + b"x" * 400 + b'needle"'
    await store.write(maker.batch([said(maker, f"j{n}", payload=big) for n in range(9)]))
    found: list[str] = []
    pages, before = 0, None
    while pages == 0 or before is not None:
        page = await store.find(JobQuery(text="NEEDLE", before=before))
        found += [job.id for job, _ in page.jobs]
        pages, before = pages + 1, page.next_before
    assert found == [f"j{n}" for n in range(8, -1, -1)]
    assert pages == 3


async def test_jobs_with_the_same_error_are_found(store: Store) -> None:
    maker = ChangeFactory()
    alike = [said(maker, f"j{n}", error=f"took {n} s", status="failed") for n in range(3)]
    other = [said(maker, "k", error="lost", status="failed"), said(maker, "l", error="took 4 s"), said(maker, "m")]
    await store.write(maker.batch([*alike, *other]))
    name = fingerprint("took 9 s", None)
    assert await ids(store, error=name, status="failed") == ["j2", "j1", "j0"]
    assert await ids(store, error=name) == ["l", "j2", "j1", "j0"]
    page = await store.find(JobQuery(error=name))
    assert page.last_event == maker.numbers.next_event - 1


async def test_a_page_can_omit_payloads(store: Store) -> None:
    maker = ChangeFactory()
    await store.write(maker.batch([said(maker, "a", payload=b'"p"')]))
    assert [body for _, body in (await store.find(JobQuery(payloads=False))).jobs] == [b"null"]


# -- tombstones -------------------------------------------------------------------------------------------------------


def buried(seq: int, key: str = "k", due_at: int = NOW) -> Tombstone:
    return Tombstone(seq, f"job-{seq}", key, NOW, due_at)


async def due(store: Store, now: int = NOW, limit: int = 99) -> list[int]:
    return [tombstone.job_seq for tombstone, _ in (await store.due_tombstones(now, limit)).found]


async def test_a_tombstone_is_written_with_its_batch_and_due_later(path: str) -> None:
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        await store.write(maker.batch([], tombstones=[buried(1, due_at=NOW + 2), buried(2, due_at=NOW + 1), buried(3)]))
        assert await due(store, NOW - 1) == []
        assert await due(store, NOW) == [3]
        assert await due(store, NOW + 2) == [3, 2, 1]
        assert await due(store, NOW + 2, limit=2) == [3, 2]
    async with opened(path) as (store, found):
        assert found.tombstones == 3
        assert (await store.due_tombstones(NOW, 1)).found == [(buried(3), False)]


async def test_a_failed_batch_leaves_no_tombstone(path: str) -> None:
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        ghost = maker.create("ghost")
        with pytest.raises(BadRows):
            await store.write(maker.batch([], tombstones=[buried(1)], payloads=[made(ghost).seq]))
        assert await due(store) == []


async def test_tombstones_are_deleted_and_postponed(store: Store) -> None:
    await store.write(ChangeFactory().batch([], tombstones=[buried(seq) for seq in (1, 2, 3)]))
    late = replace(buried(3), due_at=NOW + 5, tries=1)
    await store.settle_tombstones([1, 99], [late])
    assert await due(store) == [2]
    assert (await store.due_tombstones(NOW + 5, 9)).found == [(buried(2), False), (late, False)]
    await store.settle_tombstones([2, 3], [])
    assert await store.due_tombstones(NOW + 5, 9) == DueTombstones([])


async def test_a_tombstone_postponed_by_a_wrong_clock_is_due(store: Store) -> None:
    await store.write(ChangeFactory().batch([], tombstones=[buried(1, due_at=NOW + MAX_POSTPONE_MS + 1)]))
    assert await due(store, NOW + 1) == []
    assert await due(store, NOW) == [1]


@pytest.mark.parametrize("status", ["queued", "failed", "completed"])
async def test_a_key_is_referenced_while_any_job_has_it(store: Store, status: str) -> None:
    maker = ChangeFactory()
    change = maker.create("holder", status=status, result=Result(storage_key="k/ü'\n"))
    await store.write(maker.batch([change], tombstones=[buried(90, "k/ü'\n"), buried(91, "k/"), buried(92, "K/ü'\n")]))
    assert [named for _, named in (await store.due_tombstones(NOW, 9)).found] == [True, False, False]
    await store.quarantine(made(change), "by hand")
    assert [named for _, named in (await store.due_tombstones(NOW, 9)).found] == [True, False, False]


async def test_a_late_result_keeps_its_artifact_until_its_job_is_deleted(store: Store) -> None:
    maker = ChangeFactory()
    job = made(maker.create("a", status="cancelled"))
    batch = maker.batch([], tombstones=[buried(90)])
    maker.jobs.clear()
    maker.payloads.clear()
    created = maker.create("b", status="cancelled")
    late = maker.late(made(created), 3, Result(storage_key="k"))
    assert job.seq != made(created).seq
    await store.write(maker.batch([created, late], tombstones=batch.tombstones))
    assert await store.due_tombstones(NOW, 9) == DueTombstones([(buried(90), False)], held={90})
    await store.write(maker.batch([maker.delete(made(created))]))
    assert await store.due_tombstones(NOW, 9) == DueTombstones([(buried(90), False)])


def came_late(maker: ChangeFactory, job: Job, token: int, key: str | None) -> Change:
    return maker.late(job, token, Result(file_path="/f", storage_key=key, metadata=Raw(b"[1]")))


def left_by(*changes: Change, at: int = NOW) -> list[Tombstone]:
    """What late results leave when they go, in the order of their numbers."""
    lates = [(change.event.job_id, kept(change)) for change in reversed(changes)]
    return [Tombstone(-late.seq, job_id, late.result.storage_key or "", at, at) for job_id, late in lates]


async def numbered(store: Store, now: int = NOW) -> list[Tombstone]:
    found = [tombstone for tombstone, _ in (await store.due_tombstones(now, 99)).found]
    return sorted(found, key=lambda each: each.job_seq)


async def test_artifacts_of_late_results_are_deleted_with_their_job(path: str) -> None:
    maker = ChangeFactory()
    told: list[int] = []
    async with opened(path) as (store, _):
        store.on_tombstones = told.append
        made_a = maker.create("a", status="failed", result=Result(storage_key="own"))
        made_b = maker.create("b", status="failed")
        job, other = made(made_a), made(made_b)
        keys = {1: "late/1", 2: None, 3: "own", 4: "late/4"}
        late = [came_late(maker, job, token, key) for token, key in keys.items()]
        await store.write(maker.batch([made_a, made_b, *late, came_late(maker, other, 5, "late/5")], sweeps=True))
        assert (await numbered(store), told) == ([], [])
        maker.now += 7
        own = Tombstone(job.seq, job.id, "own", maker.now, maker.now)
        await store.write(maker.batch([maker.delete(job)], tombstones=[own], sweeps=True))
        assert told == [3], "what the job named itself is looked at once"
        assert [each.fencing_token for each in await late_results(store, other)] == [5]
    async with opened(path) as (store, found):
        assert found.tombstones == 3
        assert await numbered(store, maker.now) == [*left_by(late[0], late[3], at=maker.now), own]
        assert (await store.due_tombstones(maker.now, 9)).held == set()


async def test_the_artifact_of_a_displaced_late_result_is_deleted(store: Store) -> None:
    maker = ChangeFactory()
    created = maker.create("a")
    late = [came_late(maker, made(created), token, f"late/{token}") for token in (5, 3, 9, 1, 8)]
    await store.write(maker.batch([created, *late], sweeps=True))
    assert await numbered(store) == []
    late += [came_late(maker, made(created), token, f"late/{token}") for token in (7, 2)]
    await store.write(maker.batch(late[5:], sweeps=True))
    assert await numbered(store) == left_by(late[3], late[6])
    assert [each.fencing_token for each in await late_results(store, made(created))] == [3, 5, 7, 8, 9]


async def test_a_late_result_in_the_batch_that_deletes_its_job_leaves_a_tombstone(store: Store) -> None:
    maker = ChangeFactory()
    created = maker.create("a", status="failed")
    await store.write(maker.batch([created]))
    late = came_late(maker, made(created), 3, "late/3")
    await store.write(maker.batch([late, maker.delete(made(created))], sweeps=True))
    assert await numbered(store) == left_by(late)


async def test_a_key_referenced_by_another_late_result_is_kept(store: Store) -> None:
    maker = ChangeFactory()
    created = [maker.create(name, status="failed") for name in "ab"]
    late = [came_late(maker, made(change), token, "shared") for token, change in enumerate(created)]
    await store.write(maker.batch([*created, *late]))
    await store.write(maker.batch([maker.delete(made(created[0]))], sweeps=True))
    (gone,) = left_by(late[0])
    assert await store.due_tombstones(NOW, 9) == DueTombstones([(gone, False)], held={gone.job_seq})
    await store.settle_tombstones([], [replace(gone, due_at=NOW + 1)])
    await store.write(maker.batch([maker.delete(made(created[1]))], sweeps=True))
    assert await store.due_tombstones(NOW + 1, 9) == DueTombstones(
        [(left_by(late[1])[0], False), (replace(gone, due_at=NOW + 1), False)]
    )
    await store.settle_tombstones([gone.job_seq], [])
    assert await numbered(store) == left_by(late[1])


async def test_without_sweeping_late_results_leave_no_tombstones(store: Store) -> None:
    maker = ChangeFactory()
    created = maker.create("a", status="failed")
    late = [came_late(maker, made(created), token, f"late/{token}") for token in range(MAX_LATE_RESULTS + 1)]
    await store.write(maker.batch([created, *late]))
    await store.write(maker.batch([maker.delete(made(created))]))
    assert await numbered(store) == []
    assert store._connection.raw.execute("SELECT count(*) FROM late_results").fetchone() == (0,)


async def test_a_failed_deletion_keeps_late_results_and_leaves_no_tombstone(path: str) -> None:
    maker = ChangeFactory()
    told: list[int] = []
    async with opened(path) as (store, _):
        store.on_tombstones = told.append
        created, ghost = maker.create("a", status="failed"), maker.create("ghost")
        await store.write(maker.batch([created, late := came_late(maker, made(created), 1, "late/1")], sweeps=True))
        deleted = maker.delete(made(created))
        with pytest.raises(BadRows):
            await store.write(maker.batch([deleted], sweeps=True, payloads=[made(ghost).seq]))
        assert (await numbered(store), told) == ([], [])
        assert await late_results(store, made(created)) == [kept(late)]
        await store.write(maker.batch([deleted], sweeps=True))
        assert (await numbered(store), told) == (left_by(late), [1])


async def test_the_key_of_a_damaged_late_result_is_not_deleted(path: str) -> None:
    maker = ChangeFactory()
    created = maker.create("a", status="failed")
    late = [came_late(maker, made(created), token, f"late/{token}") for token in (1, 2, 3)]
    async with opened(path) as (store, _):
        await store.write(maker.batch([created, *late]))
    flip(path, "late_results", "storage_key", "seq", kept(late[0]).seq)
    with edited(path) as conn:
        conn.execute("UPDATE late_results SET storage_key = CAST(X'ff6b' AS TEXT) WHERE seq = ?", (kept(late[1]).seq,))
    async with opened(path) as (store, _):
        await store.write(maker.batch([maker.delete(made(created))], sweeps=True))
        assert await numbered(store) == left_by(late[2])
        faults = [fault for fault in store.take_faults() if fault.startswith("late_results")]
        assert [fault.partition(":")[0] for fault in faults] == [f"late_results {kept(one).seq}" for one in late[:2]]
        assert all("its artifact is not deleted" in fault for fault in faults)
        aside = store._connection.raw.execute("SELECT place, row FROM bad_rows").fetchall()
        assert [place for place, _ in aside] == ["late_results"] * 2
        assert "ff6b" in aside[1][1]


async def test_a_job_without_its_key_keeps_no_artifact(store: Store) -> None:
    maker = ChangeFactory()
    job = made(maker.create("holder", status="failed", result=Result(storage_key="k")))
    first = maker.batch([], tombstones=[buried(90)])
    await store.write(maker.batch([maker.create("x", status="failed", result=Result(storage_key="k"))]))
    await store.write(first)
    assert (await store.due_tombstones(NOW, 9)).found == [(buried(90), True)]
    (other,) = (each for each in maker.jobs.values() if each.id == "x")
    del maker.jobs[job.seq]
    await store.write(maker.batch([maker.delete(other)]))
    assert (await store.due_tombstones(NOW, 9)).found == [(buried(90), False)]


# ---------------------------------------------------------------------------------------------------------------------
# A full counter of fencing tokens


async def test_the_epoch_after_a_full_counter_is_stored_before_its_first_token(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_epoch, has_room = files.write_epoch, [False, False, True]

    def write_if_there_is_room(path: str, epoch: int) -> None:
        if not has_room.pop(0):
            raise DiskFull("no room for the epoch file")
        write_epoch(path, epoch)

    maker = ChangeFactory(numbers=Numbers(epoch=1, next_token=COUNTER_MASK))
    monkeypatch.setattr(files, "write_epoch", write_if_there_is_room)
    has_room.insert(0, True)  # for the epoch of the new store
    async with opened(path) as (store, _):
        await store.write(maker.batch([maker.create("a"), maker.create("b"), maker.grant(maker.jobs[1])]))
        maker.numbers = replace(maker.numbers, epoch=9, next_token=1)
        batch = maker.batch([maker.grant(maker.jobs[2])])
        for _ in range(2):
            with pytest.raises(DiskFull, match="no room for the epoch file"):
                await store.write(batch)
            assert (await store.load(["b"], [], [])).jobs["b"].status == "queued"
            assert files.read_epoch(path).epoch == 1
        await store.write(batch)
        assert files.read_epoch(path).epoch == 9
    assert has_room == []
    async with opened(path) as (store, found):
        assert not found.marked
        await assert_holds(store, found, maker)


async def test_a_crash_between_two_epochs_ends_no_grant(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = ChangeFactory()
    async with opened(path) as (store, _):
        await store.write(maker.batch([maker.create("a"), maker.grant(maker.jobs[1])]))
        kept = maker.numbers

        def crash(epoch: int) -> None:
            raise OSError(errno.EIO, "the disk fails")

        monkeypatch.setattr(store._database, "store_epoch", crash)
        with pytest.raises(OSError, match="the disk fails"):
            await store.write(Batch([], replace(kept, epoch=9, next_token=4, lease_ms=77)))
    async with opened(path) as (_, found):
        assert (found.marked, found.numbers) == (False, replace(kept, epoch=9, next_token=1))
        assert found.live() == [maker.jobs[1]]
    assert files.read_epoch(path).epoch == 9
