"""Tombstones: artifacts to be deleted."""

from __future__ import annotations

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.model.events import Event
from jobd.model.job import MAX_LATE_RESULTS, Job, Result
from jobd.model.storage import MAX_POSTPONE_MS, DueTombstones, Tombstone
from jobd.storage.store import Store
from tests.support.factories import NOW, ChangeFactory
from tests.support.store_files import edit_store, flip, job_of, late_of, late_results, open_store


def waiting_tombstone(seq: int, key: str = "k", due_at: int = NOW) -> Tombstone:
    return Tombstone(seq, f"job-{seq}", key, NOW, due_at)


async def due_seqs(store: Store, now: int = NOW, limit: int = 99) -> list[int]:
    return [tombstone.job_seq for tombstone, _ in (await store.due_tombstones(now, limit)).found]


async def test_a_tombstone_is_written_with_its_batch_and_due_later(maker: ChangeFactory, path: str) -> None:
    async with open_store(path) as (store, _):
        await store.write(
            maker.batch(
                [],
                tombstones=[
                    waiting_tombstone(1, due_at=NOW + 2),
                    waiting_tombstone(2, due_at=NOW + 1),
                    waiting_tombstone(3),
                ],
            )
        )
        assert await due_seqs(store, NOW - 1) == []
        assert await due_seqs(store, NOW) == [3]
        assert await due_seqs(store, NOW + 2) == [3, 2, 1]
        assert await due_seqs(store, NOW + 2, limit=2) == [3, 2]
    async with open_store(path) as (store, found):
        assert found.tombstones == 3
        assert (await store.due_tombstones(NOW, 1)).found == [(waiting_tombstone(3), False)]


async def test_tombstones_are_deleted_and_postponed(store: Store) -> None:
    await store.write(ChangeFactory().batch([], tombstones=[waiting_tombstone(seq) for seq in (1, 2, 3)]))
    late = replace(waiting_tombstone(3), due_at=NOW + 5, tries=1)
    await store.update_tombstones([1, 99], [late])
    assert await due_seqs(store) == [2]
    assert (await store.due_tombstones(NOW + 5, 9)).found == [(waiting_tombstone(2), False), (late, False)]
    await store.update_tombstones([2, 3], [])
    assert await store.due_tombstones(NOW + 5, 9) == DueTombstones([])


async def test_a_tombstone_postponed_by_a_wrong_clock_is_due(store: Store) -> None:
    await store.write(ChangeFactory().batch([], tombstones=[waiting_tombstone(1, due_at=NOW + MAX_POSTPONE_MS + 1)]))
    assert await due_seqs(store, NOW + 1) == []
    assert await due_seqs(store, NOW) == [1]


@pytest.mark.parametrize("status", ["queued", "failed", "completed"])
async def test_a_key_is_referenced_while_any_job_has_it(maker: ChangeFactory, store: Store, status: str) -> None:
    change = maker.create("holder", status=status, result=Result(storage_key="k/ü'\n"))
    await store.write(
        maker.batch(
            [change],
            tombstones=[waiting_tombstone(90, "k/ü'\n"), waiting_tombstone(91, "k/"), waiting_tombstone(92, "K/ü'\n")],
        )
    )
    assert [named for _, named in (await store.due_tombstones(NOW, 9)).found] == [True, False, False]
    await store.quarantine(job_of(change), "by hand")
    assert [named for _, named in (await store.due_tombstones(NOW, 9)).found] == [True, False, False]


async def test_a_late_result_keeps_its_artifact_until_its_job_is_deleted(maker: ChangeFactory, store: Store) -> None:
    job = job_of(maker.create("a", status="cancelled"))
    batch = maker.batch([], tombstones=[waiting_tombstone(90)])
    maker.jobs.clear()
    maker.payloads.clear()
    created = maker.create("b", status="cancelled")
    late = maker.late(job_of(created), 3, Result(storage_key="k"))
    assert job.seq != job_of(created).seq
    await store.write(maker.batch([created, late], tombstones=batch.tombstones))
    assert await store.due_tombstones(NOW, 9) == DueTombstones([(waiting_tombstone(90), False)], held={90})
    await store.write(maker.batch([maker.delete(job_of(created))]))
    assert await store.due_tombstones(NOW, 9) == DueTombstones([(waiting_tombstone(90), False)])


def late_result(maker: ChangeFactory, job: Job, token: int, key: str | None) -> Event:
    return maker.late(job, token, Result(file_path="/f", storage_key=key, metadata=Raw(b"[1]")))


def tombstones_of(*changes: Event, at: int = NOW) -> list[Tombstone]:
    """Return the tombstones that deleted late results leave, in the order of their numbers."""
    lates = [(change.job_id, late_of(change)) for change in reversed(changes)]
    return [Tombstone(-late.seq, job_id, late.result.storage_key or "", at, at) for job_id, late in lates]


async def tombstones_by_seq(store: Store, now: int = NOW) -> list[Tombstone]:
    found = [tombstone for tombstone, _ in (await store.due_tombstones(now, 99)).found]
    return sorted(found, key=lambda each: each.job_seq)


async def test_artifacts_of_late_results_are_deleted_with_their_job(maker: ChangeFactory, path: str) -> None:
    reported: list[int] = []
    async with open_store(path) as (store, _):
        store.on_tombstones = reported.append
        made_a = maker.create("a", status="failed", result=Result(storage_key="own"))
        made_b = maker.create("b", status="failed")
        job, other = job_of(made_a), job_of(made_b)
        keys = {1: "late/1", 2: None, 3: "own", 4: "late/4"}
        late = [late_result(maker, job, token, key) for token, key in keys.items()]
        await store.write(maker.batch([made_a, made_b, *late, late_result(maker, other, 5, "late/5")], sweeps=True))
        assert (await tombstones_by_seq(store), reported) == ([], [])
        maker.now += 7
        own = Tombstone(job.seq, job.id, "own", maker.now, maker.now)
        await store.write(maker.batch([maker.delete(job)], tombstones=[own], sweeps=True))
        await store.finish_upkeep()
        assert reported == [3], "the key of the job itself has one tombstone"
        assert [each.fencing_token for each in await late_results(store, other)] == [5]
    async with open_store(path) as (store, found):
        assert found.tombstones == 3
        assert await tombstones_by_seq(store, maker.now) == [*tombstones_of(late[0], late[3], at=maker.now), own]
        assert (await store.due_tombstones(maker.now, 9)).held == set()


async def test_the_artifact_of_a_displaced_late_result_is_deleted(maker: ChangeFactory, store: Store) -> None:
    created = maker.create("a")
    late = [late_result(maker, job_of(created), token, f"late/{token}") for token in (5, 3, 9, 1, 8)]
    await store.write(maker.batch([created, *late], sweeps=True))
    assert await tombstones_by_seq(store) == []
    late += [late_result(maker, job_of(created), token, f"late/{token}") for token in (7, 2)]
    await store.write(maker.batch(late[5:], sweeps=True))
    assert await tombstones_by_seq(store) == tombstones_of(late[3], late[6])
    assert [each.fencing_token for each in await late_results(store, job_of(created))] == [3, 5, 7, 8, 9]


async def test_a_late_result_in_the_batch_that_deletes_its_job_leaves_a_tombstone(store: Store) -> None:
    maker = ChangeFactory()
    created = maker.create("a", status="failed")
    await store.write(maker.batch([created]))
    late = late_result(maker, job_of(created), 3, "late/3")
    await store.write(maker.batch([late, maker.delete(job_of(created))], sweeps=True))
    assert await tombstones_by_seq(store) == tombstones_of(late)


async def test_a_key_referenced_by_another_late_result_is_kept(maker: ChangeFactory, store: Store) -> None:
    created = [maker.create(name, status="failed") for name in "ab"]
    late = [late_result(maker, job_of(change), token, "shared") for token, change in enumerate(created)]
    await store.write(maker.batch([*created, *late]))
    await store.write(maker.batch([maker.delete(job_of(created[0]))], sweeps=True))
    (gone,) = tombstones_of(late[0])
    assert await store.due_tombstones(NOW, 9) == DueTombstones([(gone, False)], held={gone.job_seq})
    await store.update_tombstones([], [replace(gone, due_at=NOW + 1)])
    await store.write(maker.batch([maker.delete(job_of(created[1]))], sweeps=True))
    assert await store.due_tombstones(NOW + 1, 9) == DueTombstones(
        [(tombstones_of(late[1])[0], False), (replace(gone, due_at=NOW + 1), False)]
    )
    await store.update_tombstones([gone.job_seq], [])
    assert await tombstones_by_seq(store) == tombstones_of(late[1])


async def test_without_sweeping_late_results_leave_no_tombstones(maker: ChangeFactory, store: Store) -> None:
    created = maker.create("a", status="failed")
    late = [late_result(maker, job_of(created), token, f"late/{token}") for token in range(MAX_LATE_RESULTS + 1)]
    await store.write(maker.batch([created, *late]))
    await store.write(maker.batch([maker.delete(job_of(created))]))
    assert await tombstones_by_seq(store) == []
    await store.finish_upkeep()
    assert store._connection.raw.execute("SELECT count(*) FROM late_results").fetchone() == (0,)


async def test_the_key_of_a_damaged_late_result_is_not_deleted(maker: ChangeFactory, path: str) -> None:
    created = maker.create("a", status="failed")
    late = [late_result(maker, job_of(created), token, f"late/{token}") for token in (1, 2, 3)]
    async with open_store(path) as (store, _):
        await store.write(maker.batch([created, *late]))
    flip(path, "late_results", "storage_key", "seq", late_of(late[0]).seq)
    with edit_store(path) as conn:
        conn.execute(
            "UPDATE late_results SET storage_key = CAST(X'ff6b' AS TEXT) WHERE seq = ?", (late_of(late[1]).seq,)
        )
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.delete(job_of(created))], sweeps=True))
        assert await tombstones_by_seq(store) == tombstones_of(late[2])
        faults = [fault for fault in store.take_faults() if fault.startswith("late_results")]
        assert [fault.partition(":")[0] for fault in faults] == [f"late_results {late_of(one).seq}" for one in late[:2]]
        assert all("its artifact is not deleted" in fault for fault in faults)
        await store.finish_upkeep()
        bad_rows = store._connection.raw.execute("SELECT place, row FROM bad_rows").fetchall()
        assert [place for place, _ in bad_rows] == ["late_results"] * 2
        assert "ff6b" in bad_rows[1][1]


async def test_a_job_without_its_key_keeps_no_artifact(maker: ChangeFactory, store: Store) -> None:
    job = job_of(maker.create("holder", status="failed", result=Result(storage_key="k")))
    first = maker.batch([], tombstones=[waiting_tombstone(90)])
    await store.write(maker.batch([maker.create("x", status="failed", result=Result(storage_key="k"))]))
    await store.write(first)
    assert (await store.due_tombstones(NOW, 9)).found == [(waiting_tombstone(90), True)]
    (other,) = (each for each in maker.jobs.values() if each.id == "x")
    del maker.jobs[job.seq]
    await store.write(maker.batch([maker.delete(other)]))
    assert (await store.due_tombstones(NOW, 9)).found == [(waiting_tombstone(90), False)]
