"""Reads of history: pages and searches in slices."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from msgspec import Raw

from jobd.engine import history
from jobd.model import commands as cmd
from jobd.model.fingerprints import fingerprint
from jobd.model.responses import JobPage
from jobd.model.storage import JobQuery
from tests.support.virtual_engine import VirtualEngine, in_checked_engine, in_engine


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan about 7 jobs per page, in slices of 3."""
    monkeypatch.setattr(history, "SLICE", 3)
    monkeypatch.setattr(history, "MAX_SCANNED", 7)
    monkeypatch.setattr(history, "JobQuery", partial(JobQuery, scan=3))


@pytest.mark.usefixtures("small_pages")
@in_engine()
async def test_a_text_search_reads_slices_up_to_one_page(engine: VirtualEngine) -> None:
    for n in range(12):
        await engine.yes(cmd.Create(id=f"j{n}", payload=Raw(b'"needle"' if n in (0, 1, 6) else b"1")))
    finds = engine.disk.calls.get("find", 0)
    page = await engine.yes(cmd.SearchJobs(text="Needle"))
    assert [job.id for job in page.jobs] == ["j6"]
    assert engine.disk.calls["find"] == finds + 3
    assert page.next_cursor is not None
    rest = await engine.yes(cmd.SearchJobs(text="needle", cursor=page.next_cursor))
    assert [job.id for job in rest.jobs] == ["j1", "j0"]
    assert rest.next_cursor is None
    first = await engine.yes(cmd.SearchJobs(text="needle", limit=1, cursor=page.next_cursor))
    assert [job.id for job in first.jobs] == ["j1"]
    assert [
        job.id for job in (await engine.yes(cmd.SearchJobs(text="needle", limit=1, cursor=first.next_cursor))).jobs
    ] == ["j0"]


@pytest.mark.usefixtures("small_pages")
@in_engine()
async def test_a_page_scans_until_its_row_limit(engine: VirtualEngine) -> None:
    for n in range(15):
        await asyncio.sleep(1)
        await engine.yes(cmd.Create(id=f"j{n}", queue="b" if n in (1, 7, 8) else "a"))
    created = {f"j{n}": (await engine.yes(cmd.Get(id=f"j{n}"))).created_at for n in range(15)}
    finds = engine.disk.calls.get("find", 0)
    page = await engine.yes(cmd.ListJobs(queue="b"))
    assert [job.id for job in page.jobs] == ["j8", "j7"]
    assert (page.next_cursor is not None, page.searched_to_at) == (True, created["j6"])
    assert engine.disk.calls["find"] == finds + 3
    rest = await engine.yes(cmd.ListJobs(queue="b", cursor=page.next_cursor))
    assert ([job.id for job in rest.jobs], rest.next_cursor, rest.searched_to_at) == (["j1"], None, None)
    full = await engine.yes(cmd.ListJobs(queue="b", limit=2))
    assert ([job.id for job in full.jobs], full.searched_to_at) == (["j8", "j7"], None)
    assert full.next_cursor is not None
    none = await engine.yes(cmd.ListJobs(queue="nowhere"))
    assert (none.jobs, none.searched_to_at) == ([], created["j6"])


@pytest.fixture
def slow_pages(small_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan 12 jobs per page in slices of 3, which takes 3 s."""
    monkeypatch.setattr(history, "MAX_SCANNED", 1_000)
    monkeypatch.setattr(history, "PAUSES_AFTER_S", 0)
    monkeypatch.setattr(history, "PAUSE_S", 1.0)
    monkeypatch.setattr(history, "SEARCH_S", 2.5)
    monkeypatch.setattr(history, "SLOW_SEARCH_S", 1.5)


@pytest.mark.usefixtures("slow_pages")
@in_engine()
async def test_a_page_scans_until_its_time_limit(engine: VirtualEngine) -> None:
    for n in range(30):
        await engine.yes(cmd.Create(id=f"j{n}", queue="b" if n == 0 else "a"))
    began = engine.now
    page = await engine.yes(cmd.ListJobs(queue="b"))
    assert (page.jobs, page.next_cursor, engine.now - began) == ([], "19", 3_000)
    assert (await engine.yes(cmd.SearchJobs(text="nowhere"))).next_cursor == "22"
    found, pages = [], 1
    while page.next_cursor is not None:
        page = await engine.yes(cmd.ListJobs(queue="b", cursor=page.next_cursor))
        found += [job.id for job in page.jobs]
        pages += 1
    assert (found, pages) == (["j0"], 3)


@pytest.mark.usefixtures("slow_pages")
@in_engine()
async def test_a_long_scan_delays_no_other_request(engine: VirtualEngine) -> None:
    for n in range(30):
        await engine.yes(cmd.Create(id=f"j{n}"))
    far = [asyncio.create_task(engine.yes(cmd.ListJobs(queue="nowhere"))) for _ in range(2 * history.AT_ONCE)]
    await asyncio.sleep(0.5)
    began = engine.now
    assert len((await engine.yes(cmd.Timeline(id="j0"))).events) == 1
    await engine.yes(cmd.Create(id="new"))
    assert len((await engine.yes(cmd.ListJobs(limit=1))).jobs) == 1
    assert engine.now == began
    assert not any(task.done() for task in far)
    assert all(page.next_cursor is not None for page in await asyncio.gather(*far))
    assert engine.now - began < 2_500 + 1_000 * len(far), "they take turns, and none runs for long"


@in_engine()
async def test_jobs_that_change_between_pages_are_shown_once(engine: VirtualEngine) -> None:
    """A page begins below the one before, whichever index is used."""
    for n in range(12):
        await engine.yes(cmd.Create(id=f"j{n}"))
        if n % 2:
            await engine.yes(cmd.ForceFail(id=f"j{n}", reason="no"))
    seen: list[str] = []
    cursor = None
    while True:
        page = await engine.yes(cmd.ListJobs(status="failed", limit=2, cursor=cursor))
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            break
        await engine.yes(cmd.ForceReset(id=seen[-1]))  # leaves the index that is scanned
        await engine.yes(cmd.ForceFail(id=f"j{len(seen)}", reason="no")) if len(seen) == 2 else None  # enters it
    assert seen == ["j11", "j9", "j7", "j5", "j3", "j2", "j1"]


@in_checked_engine()
async def test_a_search_for_an_error_defaults_to_failed_jobs(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    await engine.yes(cmd.ForceFail(id="a", reason="no connection"))
    lock_id = await engine.held("b", max_attempts=2)
    await engine.yes(cmd.Fail(id="b", lock_id=lock_id, error_message="no connection", error_code="force_failed"))
    failed = await engine.yes(cmd.Get(id="a"))
    error = fingerprint(failed.error_message, failed.error_code)
    page = await engine.yes(cmd.SearchJobs(error=error))
    assert [job.id for job in page.jobs] == ["a"]
    assert [job.id for job in (await engine.yes(cmd.SearchJobs(error=error, status="queued"))).jobs] == ["b"]
    assert (await engine.yes(cmd.SearchJobs(error=error, worker="w"))).jobs == []


@in_engine()
async def test_finished_jobs_are_listed_by_their_ends(engine: VirtualEngine) -> None:
    for job_id in "abcd":
        await engine.yes(cmd.Create(id=job_id))
    for job_id in "bdac":
        await engine.yes(cmd.Cancel(id=job_id))
        await asyncio.sleep(1)
    first: JobPage = await engine.yes(cmd.ListJobs(status="cancelled", limit=3))
    rest: JobPage = await engine.yes(cmd.ListJobs(status="cancelled", limit=3, cursor=first.next_cursor))
    assert [[job.id for job in page.jobs] for page in (first, rest)] == [["c", "a", "d"], ["b"]]
    created: JobPage = await engine.yes(cmd.ListJobs(limit=3))
    assert [job.id for job in created.jobs] == ["d", "c", "b"]
    by_end, by_creation = first.next_cursor, created.next_cursor
    for command in (cmd.ListJobs(cursor=by_end), cmd.ListJobs(status="cancelled", cursor=by_creation)):
        rejected = await engine.no(command)
        assert "another status" in rejected.message


@in_checked_engine()
async def test_jobs_are_found_by_finish_time_and_last_worker(engine: VirtualEngine) -> None:
    lock_id = await engine.held()
    for job_id in ("b", "c"):
        await engine.yes(cmd.Create(id=job_id))
    await asyncio.sleep(10)
    middle = engine.now
    await engine.yes(cmd.Fail(id="a", lock_id=lock_id, error_message="no"))
    await asyncio.sleep(10)
    await engine.yes(cmd.ForceFail(id="b", reason="no"))

    async def found(**asked: Any) -> list[str]:
        return [job.id for job in (await engine.yes(cmd.SearchJobs(**asked))).jobs]

    assert await found(finished_since=middle) == ["b", "a"]
    assert await found(finished_since=middle, finished_until=middle + 1) == ["a"]
    assert await found(since=middle) == await found(until=middle - 60_000) == []
    assert await found(worker="w-1") == ["a"]
    assert await found(worker="w-1", status="failed", finished_since=middle) == ["a"]
    assert await found(worker="w-1", status="processing") == []


@in_engine()
async def test_a_search_returns_a_limited_amount_of_payload(engine: VirtualEngine) -> None:
    for n in range(4):
        await engine.yes(cmd.Create(id=f"j{n}", payload=Raw(b'"' + b"x" * (3 << 20) + b'"')))
    page = await engine.yes(cmd.SearchJobs(text="xxx"))
    assert ([job.id for job in page.jobs], page.searched_to_at) == (["j3"], None)
    assert (await engine.yes(cmd.SearchJobs(since=0, until=engine.now + 1))).next_cursor is not None
