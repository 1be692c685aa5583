"""The end of a journal that cannot be used is deleted: nothing before it is lost, and no number is used twice."""

from __future__ import annotations

import glob

import pytest
from msgspec.structs import replace

from jobd.model.storage import Numbers
from jobd.storage.database import Database
from jobd.storage.files import StoreUnreadable
from jobd.storage.offline import doctor, journal_cut
from jobd.storage.offline.edited_rows import RepairRejected
from jobd.storage.store import Store, StoreBusy
from tests.support import store_files
from tests.support.factories import ChangeFactory


async def store_with_tail(path: str, keep: int) -> tuple[ChangeFactory, list[int], set[str]]:
    """A store whose tables lack three records. Return the model after the first `keep`, their numbers, and all ids."""
    maker = await store_files.make_store(path)
    batches = []
    back = maker.snapshot()
    numbers: Numbers = maker.numbers
    for count in range(3):
        if count == keep:
            back, numbers = maker.snapshot(), maker.numbers
        batches.append(maker.any_batch(4))
    ids = {change.job_id for batch in batches[keep:] for change in batch.changes}
    found = await store_files.leave_tail(path, *batches)
    back()
    maker.numbers = numbers
    return maker, found, ids


@pytest.mark.parametrize("damaged", [0, 1, 2])
async def test_a_damaged_record_and_all_later_ones_are_deleted(path: str, damaged: int) -> None:
    maker, numbers, _ = await store_with_tail(path, keep=damaged)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE journal SET at = 0 WHERE number = ?", (numbers[damaged],))
    before = {name: store_files.read_file(name) for name in (path, f"{path}.epoch")}
    lines = journal_cut.cut(path, numbers[damaged], is_dry_run=True).splitlines()
    assert {name: store_files.read_file(name) for name in before} == before
    records = {0: "3 records", 1: "2 records", 2: "1 record"}[damaged]
    assert lines[0].startswith(f"would delete {records} of the journal, from {numbers[damaged]} on, with ")
    assert lines[0].endswith("; 1 of them cannot be read, so their events and jobs are unknown")
    assert journal_cut.cut(path, numbers[damaged]).startswith(f"deleted {records} of the journal")
    assert doctor.check(path, refold=True) == []
    async with store_files.open_store(path) as (store, found):
        assert (found.marked, found.numbers.epoch, found.numbers.next_event) == (True, 2, 2 << 24)
        maker.numbers = replace(maker.numbers, epoch=2, next_token=1, next_event=2 << 24)
        await store_files.assert_holds(store, found, maker)


async def test_the_store_from_before_is_kept(path: str) -> None:
    _, numbers, ids = await store_with_tail(path, keep=0)
    line = journal_cut.cut(path, numbers[0])
    (copy,) = glob.glob(f"{path}.before-cut-*")
    assert f"kept as {copy}" in line
    assert all(id_ in line for id_ in ids if id_)
    with store_files.edit_store(copy) as conn:
        assert [number for (number,) in conn.execute("SELECT number FROM journal")] == numbers
        assert conn.execute("SELECT marked FROM meta").fetchone() == (0,)


async def test_records_below_the_tail_are_deleted_too(path: str) -> None:
    maker, numbers, _ = await store_with_tail(path, keep=0)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE journal SET number = number - 100 WHERE number = ?", (numbers[0],))
    (problem,) = doctor.check(path)
    assert f"--cut-journal {numbers[0]}" in problem.fix
    journal_cut.cut(path, numbers[0])
    await store_files.assert_restored(path, maker)


async def test_only_records_of_the_tail_can_be_deleted(path: str) -> None:
    _, numbers, _ = await store_with_tail(path, keep=0)
    with pytest.raises(RepairRejected, match=f"the tables have the records up to {numbers[0] - 1}"):
        journal_cut.cut(path, numbers[0] - 1)
    with pytest.raises(RepairRejected, match=f"the journal has no record {numbers[-1] + 1}"):
        journal_cut.cut(path, numbers[-1] + 1)
    assert glob.glob(f"{path}.before-cut-*") == []
    async with store_files.open_store(path):
        with pytest.raises(StoreBusy):
            journal_cut.cut(path, numbers[0])
    with pytest.raises(StoreUnreadable, match="does not exist"):
        journal_cut.cut(f"{path}-other", 1)


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize("count", [0, 3])
async def test_a_table_that_cannot_be_read_is_created_again(
    path: str, count: int, is_interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root page is written with every batch, and a store without it does not open."""
    maker = await store_files.make_store(path)
    if count:
        back = maker.snapshot()
        numbers = maker.numbers
        await store_files.leave_tail(path, *(maker.any_batch(4) for _ in range(count)))
        back()
        maker.numbers = numbers
    with store_files.edit_store(path) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'journal'").fetchone()
        (page_bytes,) = conn.execute("PRAGMA page_size").fetchone()
        (projected_to,) = conn.execute("SELECT projected_to FROM meta").fetchone()
    store_files.remove(f"{path}-wal")
    content = bytearray(store_files.read_file(path))
    content[(root - 1) * page_bytes] ^= 1
    store_files.write_file(path, content)
    with pytest.raises(StoreUnreadable, match=rf"cannot be read: .* --cut-journal {projected_to + 1}"):
        await Store.open(path)
    assert journal_cut.cut(path, projected_to + 1, is_dry_run=True).startswith("would delete the table of the journal")
    if is_interrupted:  # nothing was done, so that a second call deletes the table and marks the store
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write_meta", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                journal_cut.cut(path, projected_to + 1)
    assert journal_cut.cut(path, projected_to + 1).startswith("deleted the table of the journal")
    assert doctor.check(path, refold=True) == []
    await store_files.assert_restored(path, maker)


def _interrupt(_: Database) -> None:
    raise KeyboardInterrupt
