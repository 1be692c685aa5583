"""The audit log on disk: atomic with its batch, one row per action, pages and trimming."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from jobd.model.storage import AuditEntry, AuditQuery, BadRows
from jobd.storage.store import Store
from jobd.storage.tables import writers
from tests.support.factories import NOW, ChangeFactory
from tests.support.store_files import damage_tree, job_of, open_store


def entry(number: int = 0, **fields: object) -> AuditEntry:
    return replace(AuditEntry(NOW + number, "eve", "127.0.0.1", "cancel", f"job-{number}", jobs=1), **fields)


async def write(store: Store, *audit: AuditEntry) -> None:
    await store.write(ChangeFactory().batch([], audit=list(audit)))


async def seqs(store: Store, **query: object) -> list[int]:
    return [seq for seq, _ in (await store.read_audit(AuditQuery(**query))).found]  # type: ignore[arg-type]


async def test_the_filter_artifact_finds_entries_with_the_former_spelling(store: Store) -> None:
    await write(store, entry(what="artefact"), entry(what="artifact"), entry(what="export"))
    assert await seqs(store, what="artifact") == [2, 1]


async def test_parts_of_one_action_share_a_row_that_counts_their_jobs(store: Store) -> None:
    first = entry(0, job_id=None, part_of="p1", jobs=2, details={"n": 1})
    await write(store, first, entry(1), replace(first, at=NOW + 2, jobs=3, details={"n": 2}))
    await write(store, replace(first, at=NOW + 3, jobs=4), entry(4, part_of="p2"))
    found = (await store.read_audit(AuditQuery())).found
    assert found == [(3, entry(4, part_of="p2")), (2, entry(1)), (1, replace(first, jobs=9))]


async def test_an_entry_of_a_failed_transaction_is_written_again(maker: ChangeFactory, store: Store) -> None:
    ghost = job_of(maker.create())
    with pytest.raises(BadRows):
        await store.write(maker.batch([], audit=[entry(part_of="p")], payloads=[ghost.seq]))
    await write(store, entry(5))  # has the number of the deleted row
    await write(store, entry(6, part_of="p"))
    assert (await store.read_audit(AuditQuery())).found == [(2, entry(6, part_of="p")), (1, entry(5))]


async def test_no_part_is_added_to_a_damaged_row(store: Store) -> None:
    part = entry(part_of="p")
    await write(store, part)
    await store.finish_upkeep()
    store._connection.raw.execute("UPDATE audit SET jobs = 77")
    await write(store, part)
    assert (await store.read_audit(AuditQuery())).found == [(2, part)]


@pytest.mark.parametrize("column", ["who", "what", "outcome"])
async def test_text_that_is_not_utf_8_stops_neither_a_part_nor_the_deletion(store: Store, column: str) -> None:
    await write(store, entry(part_of="p"))
    await store.finish_upkeep()
    store._connection.raw.execute(f"UPDATE audit SET {column} = CAST(x'ff' AS TEXT)")
    await write(store, entry(1, part_of="p"), entry(2))
    await store.trim_audit(NOW + 9, 9)
    assert await seqs(store) == [3]


async def test_an_action_continues_in_its_row_among_the_newest(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "OPEN_ROWS", 100)
    async with open_store(path) as (store, _):
        await write(store, *(entry(n, part_of=f"p{n}") for n in range(102)))
        await store.finish_upkeep()
        await write(store, entry(2, part_of="p2"), entry(1, part_of="p1"))
        assert (await seqs(store, limit=200))[0] == 103, "the row of p2 is the 100th, that of p1 is older"
    async with open_store(path) as (store, _):
        await write(store, entry(9, part_of="p1"), entry(9, part_of="p101"), entry(9, part_of="new"))
        assert (await seqs(store, limit=200))[0] == 104, "a restart changes nothing"


async def test_pages_are_filtered_and_newest_first(store: Store) -> None:
    whos, whats = ("eve", "bob"), ("cancel", "pause", "update")
    rows = [entry(n, who=whos[n % 2], what=whats[n % 3], job_id="a" if n % 5 == 0 else None) for n in range(30)]
    await write(store, *rows)
    assert await seqs(store) == list(range(30, 0, -1))
    assert await seqs(store, who="bob") == [n + 1 for n in range(29, -1, -1) if n % 2 == 1]
    assert await seqs(store, what="pause", who="eve") == [n + 1 for n in range(29, -1, -1) if n % 6 == 4]
    assert await seqs(store, job_id="a") == [26, 21, 16, 11, 6, 1]
    assert await seqs(store, job_id="a", what="cancel") == [16, 1]
    assert await seqs(store, since=NOW + 27) == [30, 29, 28]
    assert await seqs(store, who="nobody") == []
    page = await store.read_audit(AuditQuery(limit=4, job_id="a"))
    assert ([seq for seq, _ in page.found], page.next_before) == ([26, 21, 16, 11], 11)
    page = await store.read_audit(AuditQuery(limit=4, job_id="a", before=11))
    assert ([seq for seq, _ in page.found], page.next_before) == ([6, 1], None)


@pytest.mark.parametrize("scan", [1, 7, 29, 30, 31])
async def test_pages_scan_a_limited_number_of_rows_and_miss_none(store: Store, scan: int) -> None:
    await write(store, *(entry(n, who="eve" if n in (3, 28) else "bob") for n in range(30)))
    found: list[int] = []
    pages, before = 0, None
    while pages == 0 or before is not None:
        page = await store.read_audit(AuditQuery(who="eve", before=before, scan=scan))
        found += [seq for seq, _ in page.found]
        pages, before = pages + 1, page.next_before
    assert found == [29, 4]
    assert pages == -(-30 // scan)


async def test_old_rows_are_deleted_in_slices_and_the_newest_is_kept(store: Store) -> None:
    await write(store, *(entry(n) for n in range(10)))
    assert await store.trim_audit(NOW + 4, 3) == 3
    assert await store.trim_audit(NOW + 4, 3) == 1
    assert await store.trim_audit(NOW + 4, 3) == 0
    assert await seqs(store) == [10, 9, 8, 7, 6, 5]
    assert await store.trim_audit(NOW + 99, 99) == 5
    await write(store, entry(11))
    assert await seqs(store) == [11, 10]


async def test_jobs_of_an_action_on_many_lead_to_its_entry(path: str) -> None:
    part = entry(job_id=None, part_of="p", changed_ids=["a", "b"])
    async with open_store(path) as (store, _):
        await write(store, part, entry(1, job_id="a"), replace(part, changed_ids=["c"]))
        assert [await seqs(store, job_id=job_id) for job_id in "abcd"] == [[2, 1], [1], [1], []]
        assert await seqs(store, job_id="a", what="nothing") == []
        assert (await store.read_audit(AuditQuery(job_id="a", limit=1))).next_before == 2
    async with open_store(path) as (store, _):
        assert await seqs(store, job_id="c", who="eve") == [1]
        raw = store._connection.raw
        raw.execute("UPDATE audit_jobs SET audit_seq = 2 WHERE job_id = 'c'")
        assert await seqs(store, job_id="c") == [], "a damaged row leads nowhere"
        assert [await store.trim_audit(NOW + 9, 2) for _ in range(3)] == [1, 2, 0]
        assert raw.execute("SELECT count(*) FROM audit_jobs").fetchone() == (0,)
        assert await seqs(store) == [2]


async def test_rows_beyond_the_limit_are_deleted_at_any_age(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "KEEP_AUDIT", 4)
    await write(store, *(entry(n) for n in range(10)))
    assert await store.trim_audit(0, 99) == 6
    assert await seqs(store) == [10, 9, 8, 7]


@pytest.mark.parametrize("look", [1, 7, 2_000])
async def test_errors_and_reads_displace_only_their_own_kind(
    store: Store, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    monkeypatch.setattr(writers, "KEEP_AUDIT", 6)
    monkeypatch.setattr(writers, "KEEP_BESIDE", 3)
    monkeypatch.setattr(writers, "COUNTED_AT_ONCE", look)
    kinds = [{}, {"outcome": "job_not_found"}, {"what": "export"}, {"outcome": "invalid_transition"}]
    await write(store, *(entry(n, **kinds[n % 4]) for n in range(20)))
    calls = 0
    while await store.trim_audit(0, 4) == 4:
        calls += 1
    assert calls >= 20 // look
    left = [seq - 1 for seq in await seqs(store)]
    assert [n for n in left if n % 4 == 0] == [16, 12, 8, 4, 0]
    assert [n for n in left if n % 2 == 1] == [19, 17, 15]
    assert [n for n in left if n % 4 == 2] == [18, 14, 10]
    await write(store, *(entry(n, outcome="lock_lost") for n in range(20, 40)), entry(40), entry(41))
    while await store.trim_audit(0, 4) == 4:
        calls += 1
    left = [seq - 1 for seq in await seqs(store)]
    assert left == [41, 40, 39, 38, 37, 18, 16, 14, 12, 10, 8, 4]


async def test_sign_ins_displace_no_exports_and_no_errors(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "KEEP_BESIDE", 2)
    rows = [entry(0, what="export"), entry(1, what="backup"), entry(2, outcome="lock_lost"), entry(3)]
    wrong = [entry(n, what="sign-in", outcome="unauthorized") for n in range(4, 8)]
    await write(store, *rows, *wrong, *(entry(n, what=("sign-in", "sign-out")[n % 2]) for n in range(8, 12)))
    assert await store.trim_audit(0, 99) == 4
    assert [seq - 1 for seq in await seqs(store)] == [11, 10, 7, 6, 3, 2, 1, 0]


async def test_the_kinds_of_rows_are_counted_after_a_restart(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "KEEP_BESIDE", 2)
    async with open_store(path) as (store, _):
        await write(store, *(entry(n, outcome="lock_lost") for n in range(5)), entry(5))
    async with open_store(path) as (store, _):
        assert await store.trim_audit(0, 99) == 3
        assert await seqs(store) == [6, 5, 4]


async def test_a_reused_number_is_not_mistaken_for_its_old_row(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens if the newest row is damaged and quarantined."""
    monkeypatch.setattr(writers, "KEEP_BESIDE", 0)
    await write(store, entry(0), entry(1, outcome="lock_lost"))
    assert await store.trim_audit(0, 99) == 0, "the newest is kept"
    await store.finish_upkeep()
    store._connection.raw.execute("DELETE FROM audit WHERE seq = 2")
    await write(store, entry(2), entry(3))
    assert await store.trim_audit(0, 99) == 0
    assert await seqs(store) == [3, 2, 1]


async def test_an_unreadable_log_is_reported(path: str) -> None:
    async with open_store(path) as (store, _):
        await write(store, *(entry(n, reason="x" * 2_000) for n in range(40)))
    damage_tree(path, "audit", b"\xff" * 64)
    async with open_store(path) as (store, _):
        assert (await store.read_audit(AuditQuery())).found == []
        assert any("the audit log cannot be read" in fault for fault in store.take_faults())
        assert await store.trim_audit(0, 99) == 0
        assert any("the audit log cannot be read" in fault for fault in store.take_faults())
