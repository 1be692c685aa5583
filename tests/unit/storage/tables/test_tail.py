"""The tail of the journal after a kill: it is checked before it is used, and no change of a bit in it is silent."""

from __future__ import annotations

import glob
import random
import sqlite3

import pytest
from msgspec.structs import replace

from jobd.journal.checksum import checksum
from jobd.model.job import FINISHED, LIVE
from jobd.model.journal import Record
from jobd.model.storage import Batch
from jobd.storage.files import StoreUnreadable
from jobd.storage.offline import doctor
from jobd.storage.schema import migrations
from jobd.storage.store import Store
from tests.support import store_files
from tests.support.factories import ChangeFactory

PAGE = 4096
LEAF = 13  # the type of a page


async def store_with_tail(path: str) -> tuple[ChangeFactory, list[int]]:
    """A store whose tables lack three records, and the numbers of these."""
    maker = await store_files.make_store(path)
    return maker, await store_files.leave_tail(path, *(maker.any_batch(4) for _ in range(3)))


def reseal(conn: sqlite3.Connection, number: int) -> None:
    """Give a record of the journal the right checksum."""
    *columns, _ = conn.execute("SELECT * FROM journal WHERE number = ?", (number,)).fetchone()
    conn.execute("UPDATE journal SET crc = ? WHERE number = ?", (checksum(Record(*columns)), number))


async def test_a_tail_is_named_and_is_not_a_problem(path: str) -> None:
    maker, _ = await store_with_tail(path)
    before = {name: store_files.read_file(name) for name in glob.glob(f"{path}*")}
    notes: list[str] = []
    assert doctor.check(path, refold=True, on_note=notes.append) == []
    size = "3 committed batches (12 events)"
    assert notes == [f"the tables lack {size} of the journal: the daemon writes them at its next start"]
    assert {name: store_files.read_file(name) for name in glob.glob(f"{path}*")} == before
    await store_files.assert_store_holds(path, maker)
    assert doctor.check(path, refold=True, on_note=notes.append) == []
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("damage", "at", "what"),
    [
        ("UPDATE journal SET at = at + 1 WHERE number = {1}", 1, "checksum is wrong"),
        ("UPDATE journal SET body = CAST(body || x'00' AS BLOB) WHERE number = {2}", 2, "checksum is wrong"),
        ("UPDATE journal SET number = {2} + 16 WHERE number = {2}", 2, "is missing"),
        ("UPDATE journal SET number = {0} - 16 WHERE number = {0}", 0, "may be missing"),
        ("DELETE FROM journal WHERE number = {1}", 1, "is missing"),
        ("DELETE FROM journal WHERE number = {0}", 0, "is missing"),
        (
            "UPDATE journal SET body = x'07' WHERE number = {1}",
            1,
            "has format 7, but this jobd supports formats up to 3",
        ),
        ("UPDATE journal SET body = x'' WHERE number = {1}", 1, "has format none"),
        ("UPDATE journal SET body = x'01c0' WHERE number = {1}", 1, "cannot be decoded"),
    ],
)
async def test_a_record_that_cannot_be_used_is_named_and_ends_the_start(
    path: str, damage: str, at: int, what: str
) -> None:
    _, numbers = await store_with_tail(path)
    with store_files.edit_store(path) as conn:
        conn.execute(damage.format(*numbers))
        if "body = x" in damage:
            reseal(conn, numbers[1])
    (problem,) = doctor.check(path)
    assert problem.where == "journal"
    assert f"record {numbers[at]} of the journal" in problem.what
    assert what in problem.what
    assert f"jobd doctor --cut-journal {numbers[at]}" in problem.fix
    with pytest.raises(StoreUnreadable, match=f"jobd doctor --cut-journal {numbers[at]}") as caught:
        await Store.open(path)
    assert caught.value.exit_code == 78
    assert problem.what in str(caught.value)


@pytest.mark.parametrize("column", ["number", "first_event", "last_event", "epoch", "at", "body", "crc"])
async def test_a_flipped_bit_of_a_record_is_reported(path: str, column: str) -> None:
    _, numbers = await store_with_tail(path)
    for bit in range(8):
        if column == "number" and numbers[1] ^ 1 << bit in numbers:
            continue
        store_files.flip(path, "journal", column, "number", numbers[1], bit)
        assert "journal" in [problem.where for problem in doctor.check(path)]
        with pytest.raises(StoreUnreadable):
            await Store.open(path)
        store_files.flip(
            path, "journal", column, "number", numbers[1] ^ 1 << bit if column == "number" else numbers[1], bit
        )


def is_reported(path: str) -> bool:
    try:
        return doctor.check(path) != []
    except StoreUnreadable:
        return True


@pytest.mark.slow
async def test_no_flipped_bit_of_the_pages_of_a_tail_is_silent(path: str) -> None:
    """A wrong number of cells in the header of the page hides the last records, without a gap in their numbers."""
    maker = ChangeFactory(3)
    await store_files.leave_tail(path, *(maker.any_batch(2) for _ in range(3)))
    with store_files.edit_store(path) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'journal'").fetchone()
    whole = {name: store_files.read_file(name) for name in (path, f"{path}.epoch")}
    first = (root - 1) * PAGE
    assert whole[path][first] == LEAF
    header, records = range(14), range(int.from_bytes(whole[path][first + 5 : first + 7]), PAGE)
    chance = random.Random(0)
    flips = [(place, bit) for place in header for bit in range(8)]
    flips += [(chance.choice(records), chance.randrange(8)) for _ in range(60)]
    for place, bit in flips:
        content = bytearray(whole[path])
        content[first + place] ^= 1 << bit
        store_files.remove(f"{path}-wal")
        for name, file in whole.items():
            store_files.write_file(name, content if name == path else file)
        assert is_reported(path), f"bit {bit} of byte {place}"
        with pytest.raises(StoreUnreadable):
            await Store.open(path)


async def test_the_row_of_a_changed_job_is_missing(path: str) -> None:
    """The daemon starts without the job, as it does without a tail."""
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, frozenset({"processing"}))
    await store_files.leave_tail(path, maker.batch([maker.progress(job)]), maker.batch([maker.create()]))
    with store_files.edit_store(path) as conn:
        conn.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
    assert any(each.where == f"job {job.id}" and "row is missing" in each.what for each in doctor.check(path))
    async with store_files.open_store(path) as (_, found):
        assert f"job {job.id}: its row is missing" in found.faults
        assert found.quarantined == {job.id: "its row is missing"}
        store_files.remove_quarantined(maker, job)
        found.faults.clear()
        assert {each.seq for each in found.live()} == {seq for seq, each in maker.jobs.items() if each.status in LIVE}


# ---------------------------------------------------------------------------------------------------------------------
# Repairs of a store with a tail


async def test_a_repair_writes_the_tail_first(path: str) -> None:
    maker = await store_files.make_store(path)
    job = next(job for job in maker.jobs.values() if job.status in FINISHED)
    new = maker.create("new")
    await store_files.leave_tail(path, maker.batch([new, maker.grant(store_files.job_of(new))]))
    first = "the tables lack 1 committed batch ("
    assert doctor.recount(path, is_dry_run=True).startswith(first)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE jobs SET body = json_set(body, '$.attempt', 7) WHERE seq = ?", (job.seq,))
    assert doctor.accept(path, [job.id], is_dry_run=True).startswith(first)
    doctor.accept(path, [job.id])
    assert doctor.check(path) == []
    with store_files.edit_store(path) as conn:
        assert conn.execute("SELECT count(*) FROM journal").fetchone() == (0,)
    async with store_files.open_store(path) as (store, found):
        assert (await store.load(["new"], [], [])).jobs
        assert found.unvalidated[job.seq] == job.id


async def test_an_edited_row_that_the_tail_changes_is_accepted_from_quarantine(path: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, frozenset({"processing"}))
    await store_files.leave_tail(path, maker.batch([maker.progress(job, 99)]))
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE jobs SET body = json_set(body, '$.progress', 42) WHERE seq = ?", (job.seq,))
    assert "the row in quarantine was accepted" in doctor.accept(path, [job.id])
    assert doctor.check(path) == []
    async with store_files.open_store(path) as (store, _):
        assert (await store.load([job.id], [], [])).jobs[job.id] == replace(job, progress=42)


async def test_a_record_that_contradicts_the_tables_is_named(path: str) -> None:
    """The start and a repair end with the same sentence."""
    maker = await store_files.make_store(path)
    other = store_files.pick(maker, LIVE)
    [number] = await store_files.leave_tail(path, maker.batch([maker.create("new")]))
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE jobs SET id = 'new' WHERE seq = ?", (other.seq,))
    contradicts = f"record {number} .* contradicts the tables .* --cut-journal {number}"
    with pytest.raises(StoreUnreadable, match=contradicts):
        await Store.open(path)
    with pytest.raises(StoreUnreadable, match=contradicts):
        doctor.recount(path)


async def test_a_job_in_quarantine_that_the_tail_changes_is_not_missing(path: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, frozenset({"processing"}))
    await store_files.leave_tail(path, maker.batch([maker.progress(job)]))
    with store_files.edit_store(path) as conn:
        conn.execute("INSERT INTO quarantined_jobs VALUES (?, ?, 'for a test', 1, '{}', NULL, NULL)", (job.seq, job.id))
        conn.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
    found = [each.what for each in doctor.check(path, refold=True) if each.where == f"job {job.id}"]
    assert found == ["it is in quarantine: for a test"]


async def test_a_repair_needs_a_usable_tail(path: str) -> None:
    _, numbers = await store_with_tail(path)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE journal SET at = 0 WHERE number = ?", (numbers[0],))
    with pytest.raises(StoreUnreadable, match="--cut-journal"):
        doctor.recount(path)


async def test_a_record_of_the_tail_can_remove_the_mark_of_a_backup(path: str) -> None:
    await store_files.make_store(path)
    with store_files.edit_store(path) as conn:
        migrations.change_meta(conn, marked=1)
    async with store_files.killed_store(path) as (store, found):
        assert found.marked
        await store.write(Batch([], found.numbers, unmark=True))
    async with store_files.open_store(path) as (_, found):
        assert not found.marked
