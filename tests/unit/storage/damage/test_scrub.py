"""The scrub of an open store: all checksums, in short slices, with damaged rows quarantined."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from jobd.maintenance import scrubber
from jobd.maintenance.scrubber import Scrubber
from jobd.model.errors import ApiError
from jobd.model.job import FINISHED, LIVE
from jobd.model.responses import CheckedRows
from jobd.storage.damage import scrub
from jobd.storage.damage.scrub import TABLES
from jobd.storage.store import Store
from tests.support.store_files import damage_tree, edit_store, make_store, open_store, pick
from tests.unit.storage.offline.test_doctor import busy_store


async def scan_all(store: Store) -> tuple[Counter[str], dict[str, str]]:
    """Return how many rows of each table were checked, and the damaged ones with their errors."""
    checker, cursor = Scrubber(store), None
    counts: Counter[str] = Counter()
    damaged: dict[str, str] = {}
    while True:
        seen = await checker.scan(cursor)
        assert isinstance(seen, CheckedRows)
        counts[seen.table] += seen.checked
        damaged |= {each.where: each.what for each in seen.damaged}
        cursor = seen.next_cursor
        if cursor is None:
            return counts, damaged


def rows_of(store: Store) -> dict[str, int]:
    run = store._connection.raw.execute
    return {table: run(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}


@pytest.mark.parametrize("slice_s", [0, 10], ids=["row by row", "whole pages"])
async def test_every_row_is_checked_once(path: str, monkeypatch: pytest.MonkeyPatch, slice_s: float) -> None:
    monkeypatch.setattr(scrub, "SLICE_S", slice_s)
    monkeypatch.setattr(scrub, "MAX_ROWS", 50)
    await busy_store(path)
    async with open_store(path) as (store, _):
        expected = rows_of(store)
        assert expected["jobs"] > 10
        assert expected["events"] > scrub.MAX_ROWS
        assert await scan_all(store) == (Counter(expected), {})


async def test_a_scrub_is_split_into_calls(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrubber, "CALL_S", 0)
    monkeypatch.setattr(scrub, "MAX_ROWS", 5)
    await make_store(path)
    async with open_store(path) as (store, _):
        checker = Scrubber(store)
        first = await checker.scan(None)
        assert isinstance(first, CheckedRows)
        assert (first.table, first.checked) == ("jobs", 5)
        assert first.next_cursor is not None
        second = await checker.scan(first.next_cursor)
        assert isinstance(second, CheckedRows)
        assert second.table == "jobs"
        assert second.next_cursor != first.next_cursor
        assert (await scan_all(store))[0] == Counter(rows_of(store))
        rejected = await checker.scan("nowhere:7")
        assert isinstance(rejected, ApiError)
        assert rejected.code == "invalid_request"


async def test_one_slice_reads_a_limited_amount_of_payload(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "SLICE_S", 10)
    monkeypatch.setattr(scrub, "MAX_BYTES", 1)
    await make_store(path)
    async with open_store(path) as (store, _):
        seen = await store.check_rows(None)
        assert seen is not None
        assert seen.checked == 1
        assert (await scan_all(store))[0] == Counter(rows_of(store))


@pytest.mark.parametrize("statuses", [LIVE, FINISHED], ids=["live", "finished"])
async def test_a_damaged_job_is_quarantined(path: str, statuses: frozenset[str]) -> None:
    maker = await make_store(path)
    job = pick(maker, statuses)
    async with open_store(path) as (store, _):
        store._connection.raw.execute("UPDATE jobs SET body = body || ' ' WHERE seq = ?", (job.seq,))
        quarantined: list[str] = []
        store.on_quarantined = lambda found: quarantined.append(found.id)
        _, damaged = await scan_all(store)
        assert list(damaged) == [f"job {job.id}"]
        assert "checksum" in damaged[f"job {job.id}"]
        assert quarantined == [job.id]
        assert (await scan_all(store))[1] == {}
    with edit_store(path) as conn:
        assert conn.execute("SELECT id FROM quarantined_jobs").fetchall() == [(job.id,)]


@pytest.mark.parametrize("how", ["UPDATE payloads SET body = X'7b'", "DELETE FROM payloads"])
async def test_a_damaged_payload_quarantines_its_job(path: str, how: str) -> None:
    maker = await make_store(path)
    job = pick(maker, FINISHED)
    async with open_store(path) as (store, _):
        store._connection.raw.execute(f"{how} WHERE job_seq = ?", (job.seq,))
        _, damaged = await scan_all(store)
        assert list(damaged) == [f"job {job.id}"]
        assert "payload" in damaged[f"job {job.id}"]


async def test_damaged_rows_of_other_tables_are_reported_or_quarantined(path: str) -> None:
    await busy_store(path)
    async with open_store(path) as (store, _):
        expected = [table for table, count in rows_of(store).items() if count and table != "jobs"]
        assert {"events", "keys"} <= set(expected)
        for table in expected:
            store._connection.raw.execute(
                f"UPDATE {table} SET crc = crc + 1 WHERE rowid = (SELECT min(rowid) FROM {table})"
            )
        _, damaged = await scan_all(store)
        assert sorted({where.split()[0] for where in damaged}) == sorted(expected)
        again = {where.split()[0] for where in (await scan_all(store))[1]}
        assert again == set(expected) - {"events", "late_results", "audit", "audit_jobs"}
        if "keys" in expected:
            store._connection.raw.execute(
                "UPDATE keys SET response = X'00' WHERE rowid = (SELECT max(rowid) FROM keys)"
            )
            assert "the checksum of the stored response is wrong" in (await scan_all(store))[1].values()


async def test_other_work_runs_between_slices(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "MAX_ROWS", 2)
    maker = await make_store(path)
    async with open_store(path) as (store, _):
        task = asyncio.create_task(scan_all(store))
        batches = 0
        while not task.done() and batches < 200:  # the scrub is so slow here that the journal might grow faster
            await store.write(maker.any_batch(1))
            batches += 1
        counts, damaged = await task
    assert damaged == {}
    assert batches > 20
    assert counts["jobs"] > 10


async def test_an_unreadable_page_ends_only_its_table(path: str) -> None:
    await make_store(path)
    damage_tree(path, "audit")
    async with open_store(path) as (store, _):
        counts, damaged = await scan_all(store)
        assert damaged["audit after 0"].startswith("rows cannot be read")
        (jobs,) = store._connection.raw.execute("SELECT count(*) FROM jobs").fetchone()
        assert counts["jobs"] == jobs
