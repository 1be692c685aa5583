"""Queries: pages of jobs, filters and late results."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.model.events import Event
from jobd.model.fingerprints import fingerprint
from jobd.model.job import FINISHED, Failure, Grant, Job, PreviousGrant, Result
from jobd.model.storage import JobQuery, LateResultQuery
from jobd.storage import queries
from jobd.storage.events import event_queries
from jobd.storage.store import Store
from tests.support.factories import NOW, OPTIONS, ChangeFactory, deadlines_at
from tests.support.store_files import all_pages, job_of


async def fill_for_pages(store: Store) -> ChangeFactory:
    maker = ChangeFactory(5)
    changes = [maker.create(options=OPTIONS[number % 2]) for number in range(60)]
    await store.write(maker.batch(changes))
    jobs = list(maker.jobs.values())
    await store.write(maker.batch([maker.grant(job) for job in jobs if job.seq % 3 == 0]))
    done = [job for job in maker.jobs.values() if job.seq % 4 == 0]
    ends = ("completed", "failed", "completed", "cancelled")
    done.sort(key=lambda job: job.seq % 7)
    await store.write(maker.batch([maker.finish(job, ends[job.seq // 4 % 4]) for job in done]))
    at_once = [job for job in maker.jobs.values() if job.finished_at and job.seq % 8 == 0]
    await store.write(maker.batch([maker.update(job, finished_at=NOW + 99) for job in at_once]))
    return maker


@pytest.mark.slow
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
    if wanted.get("status") in FINISHED:
        by_end, _ = await all_pages(store, JobQuery(limit=limit, scan=scan, by_end=True, **wanted))  # type: ignore[arg-type]
        assert by_end == sorted(matches, key=lambda job: (job.finished_at or 0, job.seq), reverse=True)
    upwards, pages_upwards = await all_pages(store, JobQuery(limit=limit, scan=scan, after=0, **wanted))  # type: ignore[arg-type]
    assert upwards == found[::-1]
    if scan > 60:
        assert len(pages) == len(pages_upwards) == max(1, -(-len(matches) // limit))


def _matches(job: Job, wanted: dict[str, str]) -> bool:
    has = {
        "status": job.status,
        "queue": job.options.queue,
        "kind": job.options.kind,
        "worker": job.grant.worker if job.grant else job.ended.worker if job.ended else None,
    }
    return all(has[name] == value for name, value in wanted.items())


@pytest.mark.parametrize("status", ["queued", "processing", "failed", "cancelled"])
async def test_a_failed_job_is_found_behind_many_newer_ones(maker: ChangeFactory, store: Store, status: str) -> None:
    created = maker.create("old")
    old = job_of(created)
    await store.write(maker.batch([created]))
    if status == "processing":
        await store.write(maker.batch([maker.grant(old)]))
    elif status != "queued":
        await store.write(maker.batch([maker.finish(old, status)]))
    await store.write(maker.batch([maker.create() for _ in range(50)]))
    await store.write(maker.batch([maker.finish(job) for job in list(maker.jobs.values()) if job.id != "old"]))
    page = await store.find_jobs(JobQuery(status=status, scan=5))
    assert ([job.id for job, _ in page.jobs], page.next_before, page.scanned_until) == (["old"], None, None)


async def test_a_page_that_ends_early_reports_how_far_it_scanned(maker: ChangeFactory, store: Store) -> None:
    await store.write(maker.batch([created_job(maker, f"j{n}", created_at=NOW + n) for n in range(9)]))
    page = await store.find_jobs(JobQuery(kind="none", scan=4))
    assert (page.jobs, page.next_before, page.scanned_until, page.scanned) == ([], 6, NOW + 5, 4)
    page = await store.find_jobs(JobQuery(kind="none", scan=4, before=5))
    assert (page.next_before, page.scanned_until) == (None, None), "that was the last one"
    page = await store.find_jobs(JobQuery(scan=4, limit=2))
    assert (len(page.jobs), page.next_before, page.scanned_until) == (2, 8, None), "the page is full"
    page = await store.find_jobs(JobQuery(scan=4))
    assert (len(page.jobs), page.next_before, page.scanned_until) == (4, 6, NOW + 5)


async def test_jobs_are_filtered_by_the_worker_of_their_latest_grant(maker: ChangeFactory, store: Store) -> None:
    """Also if it has ended. Workers of earlier grants do not count."""
    created = maker.create("a")
    await store.write(maker.batch([created]))
    first = PreviousGrant("old", 1, "w-before", NOW, "holder", "failed", "fail", "h")
    for status, grant in (("queued", None), ("processing", Grant("l", 2, "w-now", NOW, 1_000, 0, 0))):
        after = replace(
            job_of(created),
            status=status,
            grant=grant,
            ended=first,
            deadlines=grant and deadlines_at(1, 1, 1),
        )
        await store.write(maker.batch([maker._step(maker.jobs[1], after, "granted")]))
        expected = ["a"] if grant is None else []
        assert await ids(store, worker="w-before") == expected
        assert await ids(store, worker="w-before", status=status) == expected
        assert await ids(store, worker="w-now") == (["a"] if grant else [])


async def test_a_page_has_a_limited_amount_of_payload(maker: ChangeFactory, store: Store) -> None:
    changes = [replace(maker.create(), payload=b'"%s"' % (b"y" * 998)) for _ in range(10)]
    await store.write(maker.batch(changes))
    page = await store.find_jobs(JobQuery(payload_bytes=3_050))
    assert [job.seq for job, _ in page.jobs] == [10, 9, 8]
    assert page.next_before == 8
    page = await store.find_jobs(JobQuery(payload_bytes=10, before=2))  # a larger job fills a page
    assert [(job.seq, len(body)) for job, body in page.jobs] == [(1, 1_000)]
    assert page.next_before is None
    page = await store.find_jobs(JobQuery(payload_bytes=3_050, after=0))
    assert [job.seq for job, _ in page.jobs] == [1, 2, 3]
    assert page.next_before == 3


def with_metadata(maker: ChangeFactory, count: int, size: int) -> list[Event]:
    """Create and complete `count` jobs with metadata of this size."""
    changes = []
    for _ in range(count):
        created = maker.create(options=OPTIONS[0])
        result = Result(metadata=Raw(b'"%s"' % (b"y" * (size - 2))))
        done = replace(
            job_of(created), status="completed", progress=100, finished_at=NOW, expires_at=NOW, result=result
        )
        changes += [created, maker._step(job_of(created), done, "completed")]
    return changes


async def test_a_page_reads_a_limited_amount_of_metadata(maker: ChangeFactory, store: Store) -> None:
    await store.write(maker.batch(with_metadata(maker, 10, 1_000)))
    for after, expected in ((None, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]), (0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])):
        jobs, sizes = await all_pages(store, JobQuery(payload_bytes=3_500, after=after))
        assert ([job.seq for job in jobs], sizes) == (expected, [3, 3, 3, 1])
    page = await store.find_jobs(JobQuery(payload_bytes=10, before=2))
    assert [job.seq for job, _ in page.jobs] == [1]
    assert page.next_before is None


async def test_slices_of_events_and_of_expired_jobs_have_a_limited_size(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches wait for them, and a hundred events of 256 KiB each would take half a second."""
    monkeypatch.setattr(event_queries, "SLICE_BYTES", 3_000)
    maker = ChangeFactory()
    await store.write(maker.batch(with_metadata(maker, 10, 1_000)))
    seqs: list[int] = []
    while True:
        page = await store.events_after(seqs[-1] if seqs else 0, 100)
        seqs += [event.seq for event in page.events]
        assert page.last == 20
        if not page.more:
            break
        assert 2 <= len(page.events) <= 7
    assert seqs == list(range(1, 21))
    assert (await store.events_after(0, 2)).more
    assert await store.expired_jobs(NOW, 100) == ["job-1", "job-2", "job-3"]
    monkeypatch.setattr(event_queries, "SLICE_BYTES", 1)
    assert [event.seq for event in (await store.events_after(1, 100)).events] == [2, 3]  # at least one
    assert await store.expired_jobs(NOW, 100) == ["job-1"]


async def test_expired_returns_only_finished_jobs_oldest_first(maker: ChangeFactory, store: Store) -> None:
    first, second, third = (maker.create(expires_at=NOW - 5) for _ in range(3))
    await store.write(maker.batch([first, second, third]))
    late = maker.finish(job_of(second))
    maker.now -= 500
    soon = maker.finish(job_of(first))
    await store.write(maker.batch([late, soon]))
    assert await store.expired_jobs(NOW + 499, 10) == []
    assert await store.expired_jobs(NOW + 500, 10) == ["job-1"]
    assert await store.expired_jobs(NOW + 1_000, 10) == ["job-1", "job-2"]
    assert await store.expired_jobs(NOW + 1_000, 1) == ["job-1"]
    assert await store.expired_jobs(NOW + 1_000, 1, 1) == ["job-2"]
    assert await store.expired_jobs(NOW + 1_000, 10, 2) == []
    await store.write(maker.batch([maker.requeue(job_of(soon))]))
    assert await store.expired_jobs(NOW + 1_000, 10) == ["job-2"]


async def test_a_job_with_an_invalid_status_does_not_expire(maker: ChangeFactory, store: Store) -> None:
    """The index has it because it is not live, but no cleanup run could delete it."""
    jobs = [maker.create(expires_at=NOW - 5) for _ in range(3)]
    await store.write(maker.batch(jobs))
    ends = [maker.finish(job_of(job)) for job in jobs]
    ends[0] = replace(ends[0], after=replace(job_of(ends[0]), status="complete"))
    await store.write(maker.batch(ends))
    assert await store.expired_jobs(NOW + 1_000, 10) == ["job-2", "job-3"]
    assert await store.expired_jobs(NOW + 1_000, 1, 1) == ["job-3"]


async def test_late_results_are_counted_by_their_index(maker: ChangeFactory, store: Store) -> None:
    jobs = [maker.create(job_id) for job_id in "abc"]
    await store.write(maker.batch(jobs))
    await store.write(maker.batch([maker.late(job_of(jobs[0]), token) for token in (1, 2)]))
    await store.write(maker.batch([maker.late(job_of(jobs[2]), 3)]))
    seqs = [job_of(each).seq for each in jobs]
    assert await store.count_late_results([]) == {}
    assert await store.count_late_results([*seqs, 99]) == {seqs[0]: 2, seqs[2]: 1}


async def test_an_older_grant_is_found_only_in_the_journal_of_its_job(maker: ChangeFactory, store: Store) -> None:
    created = maker.create("a")
    granted = maker.grant(job_of(created))
    back = maker.requeue(job_of(granted))
    other = maker.create("b")
    again = maker.grant(job_of(other))
    await store.write(maker.batch([created, granted, back, other, again]))
    grant, foreign = job_of(granted).grant, job_of(again).grant
    assert grant is not None
    assert foreign is not None
    seq = job_of(created).seq
    lookups = [
        LateResultQuery(seq, lock_id) for lock_id in (grant.lock_id, foreign.lock_id, grant.lock_id[:-1], "never")
    ]
    assert (await store.read_late_results(lookups)).grants == {(seq, grant.lock_id): grant}


async def test_a_grant_is_searched_at_the_end_of_a_journal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job with a hundred thousand returned grants delays no batch."""
    maker = ChangeFactory()
    changes = [maker.create("a")]
    for _ in range(4):
        changes.append(maker.grant(job_of(changes[-1])))
        changes.append(maker.requeue(job_of(changes[-1])))
    await store.write(maker.batch(changes))
    seq = job_of(changes[0]).seq
    grants = [grant for change in changes if (grant := job_of(change).grant) is not None]
    lookups = [LateResultQuery(seq, grant.lock_id) for grant in grants]
    assert list((await store.read_late_results(lookups)).grants.values()) != []
    monkeypatch.setattr(queries, "GRANT_SEARCH_EVENTS", 4)
    found = (await store.read_late_results(lookups)).grants
    assert sorted(grant.fencing_token for grant in found.values()) == [grant.fencing_token for grant in grants[2:]]


async def test_many_queries_for_one_job_read_it_once(maker: ChangeFactory, store: Store) -> None:
    created = maker.create("a")
    await store.write(maker.batch([created]))
    change = maker.late(job_of(created), 1)
    await store.write(maker.batch([change]))
    seq = job_of(created).seq
    for lookups in (
        [LateResultQuery(seq), LateResultQuery(seq, with_results=True)],
        [LateResultQuery(seq, with_results=True), LateResultQuery(seq, "x")],
    ):
        assert (await store.read_late_results(lookups)).results == {seq: [change.late]}


def created_job(
    maker: ChangeFactory, job_id: str, *, payload: bytes = b"null", error: str | None = None, **fields: Any
) -> Event:
    change = maker.create(job_id, **fields)
    assert change.after is not None
    after = replace(change.after, error=None if error is None else Failure(error, None))
    maker.payloads[after.seq] = payload
    maker.jobs[after.seq] = after
    return replace(change, type="imported", after=after, payload=payload)


async def ids(store: Store, **query: Any) -> list[str]:
    return [job.id for job, _ in (await store.find_jobs(JobQuery(**query))).jobs]


async def test_text_is_found_in_id_payload_and_error_ignoring_case(maker: ChangeFactory, store: Store) -> None:
    changes = [
        created_job(maker, "Cat-1"),
        created_job(maker, "b", payload=b'{"pet": "big CAT"}'),
        created_job(maker, "c", error="no cAt here"),
        created_job(maker, "d", payload='"katze Ü"'.encode(), error="nothing"),
        created_job(maker, "e", payload=b'"100%_sure"'),
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


async def test_jobs_are_found_by_creation_time(maker: ChangeFactory, store: Store) -> None:
    changes = [created_job(maker, f"j{n}", created_at=NOW + n) for n in range(5)]
    await store.write(maker.batch(changes))
    assert await ids(store, since=NOW + 2) == ["j4", "j3", "j2"]
    assert await ids(store, until=NOW + 2) == ["j1", "j0"]
    assert await ids(store, since=NOW + 1, until=NOW + 3) == ["j2", "j1"]


async def test_jobs_are_found_by_finish_time(maker: ChangeFactory, store: Store) -> None:
    finished = [
        created_job(maker, f"j{n}", status="failed", finished_at=NOW + 9 - n, expires_at=NOW * 2) for n in range(4)
    ]
    await store.write(maker.batch([*finished, created_job(maker, "waits")]))
    assert await ids(store, finished_since=NOW + 8) == ["j1", "j0"]
    assert await ids(store, finished_until=NOW + 8) == ["j3", "j2"]
    assert await ids(store, finished_since=NOW + 7, finished_until=NOW + 9, status="failed") == ["j2", "j1"]
    assert await ids(store, finished_until=NOW * 2) == ["j3", "j2", "j1", "j0"], "queued jobs have not finished"
    assert await ids(store, finished_since=0, status="queued") == []


async def test_a_text_search_ends_early_if_payloads_are_large(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "TEXT_BYTES", 1_000)
    maker = ChangeFactory()
    big = b'"' + b"x" * 400 + b'needle"'
    await store.write(maker.batch([created_job(maker, f"j{n}", payload=big) for n in range(9)]))
    jobs, sizes = await all_pages(store, JobQuery(text="NEEDLE"))
    assert [job.id for job in jobs] == [f"j{n}" for n in range(8, -1, -1)]
    assert len(sizes) == 3


async def test_jobs_with_the_same_error_are_found(maker: ChangeFactory, store: Store) -> None:
    alike = [created_job(maker, f"j{n}", error=f"took {n} s", status="failed") for n in range(3)]
    other = [
        created_job(maker, "k", error="lost", status="failed"),
        created_job(maker, "l", error="took 4 s"),
        created_job(maker, "m"),
    ]
    await store.write(maker.batch([*alike, *other]))
    name = fingerprint("took 9 s", None)
    assert await ids(store, error=name, status="failed") == ["j2", "j1", "j0"]
    assert await ids(store, error=name) == ["l", "j2", "j1", "j0"]
    page = await store.find_jobs(JobQuery(error=name))
    assert page.last_event == maker.numbers.next_event - 1


async def test_a_page_can_omit_payloads(maker: ChangeFactory, store: Store) -> None:
    await store.write(maker.batch([created_job(maker, "a", payload=b'"p"')]))
    assert [body for _, body in (await store.find_jobs(JobQuery(payloads=False))).jobs] == [b"null"]
