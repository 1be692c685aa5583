"""Fold the journal again: an undamaged store has no difference, and each kind of difference is named."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from jobd.journal import event_codec
from jobd.storage.events import event_rows
from jobd.storage.offline import doctor
from jobd.storage.tables import projection
from tests.support.factories import ChangeFactory
from tests.support.store_files import edit_store, leave_tail, make_store, pick, stored_events


def refolded(path: str) -> dict[str, str]:
    return {problem.where: problem.what for problem in doctor.check(path, refold=True)}


async def test_the_events_of_a_store_give_its_rows(path: str) -> None:
    maker = await make_store(path)
    assert maker.deleted
    assert refolded(path) == {}
    await leave_tail(path, *(maker.any_batch(20) for _ in range(5)))
    assert refolded(path) == {}


async def test_an_accepted_row_differs_from_its_events(path: str) -> None:
    maker = await make_store(path)
    job = pick(maker, frozenset({"processing"}))
    assert job.grant is not None
    with edit_store(path) as conn:
        edit = "json_set(body, '$.attempt', ?, '$.grant[2]', 'me')"
        conn.execute(f"UPDATE jobs SET body = {edit} WHERE seq = ?", (job.attempt + 7, job.seq))
    assert refolded(path) == {f"job {job.id}": "its checksum is wrong"}, "a damaged row is not compared"
    doctor.accept(path, [job.id])
    assert doctor.check(path) == []
    difference = refolded(path)[f"job {job.id}"]
    assert f"attempt is {job.attempt + 7}, but its events give {job.attempt}" in difference
    assert "grant is not what its events give" in difference
    assert job.grant.lock_id not in difference


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (
            "UPDATE events SET at = 0 WHERE seq = {first}",
            "its events {first} to {last} are damaged (its checksum is wrong)",
        ),
        ("DELETE FROM events WHERE seq = {first}", "there is no event before its event "),
        ("DELETE FROM events WHERE job_seq = {seq}", "it has no events"),
    ],
)
async def test_missing_events_are_named(path: str, monkeypatch: pytest.MonkeyPatch, damage: str, what: str) -> None:
    monkeypatch.setattr(projection, "SLICE_EVENTS", 10)  # jobs have several rows of events
    maker = await make_store(path)
    job = pick(maker, frozenset({"processing"}))
    with edit_store(path) as conn:
        sql = "SELECT seq, last FROM events WHERE job_seq = ? ORDER BY seq LIMIT 1"
        first, last = conn.execute(sql, (job.seq,)).fetchone()
        conn.execute(damage.format(first=first, seq=job.seq))
    assert what.format(first=first, last=last) in refolded(path)[f"job {job.id}"]


async def test_a_deletion_without_effect_is_named(path: str) -> None:
    maker: ChangeFactory = await make_store(path)
    job = pick(maker, frozenset({"queued"}))
    with edit_store(path) as conn:
        *events, last = stored_events(conn, job.seq)
        conn.execute("DELETE FROM events WHERE job_seq = ?", (job.seq,))
        events.append(replace(last, type="deleted", changes=None))
        conn.executemany(event_rows.INSERT, event_rows.pack(map(event_codec.encode, events)))
    assert refolded(path)[f"job {job.id}"] == "its last event says that it was deleted"


async def test_a_tail_that_does_not_fit_the_rows_is_named(path: str) -> None:
    maker = await make_store(path)
    job = pick(maker, frozenset({"processing"}))
    await leave_tail(path, maker.batch([maker.progress(job), maker.progress(job)]))
    with edit_store(path) as conn:
        conn.execute("UPDATE jobs SET status = 'queued' WHERE seq = ?", (job.seq,))
    problems = [each.what for each in doctor.check(path, refold=True) if each.where == f"job {job.id}"]
    assert problems[0] == "its checksum is wrong"
    assert problems[1].endswith("of the journal is about a processing job, but it is queued")
    with edit_store(path) as conn:
        conn.execute("UPDATE jobs SET status = CAST(x'ff' AS TEXT) WHERE seq = ?", (job.seq,))
    assert any(what.endswith("about a processing job, but it is \ufffd") for what in refolded(path).values())
    with edit_store(path) as conn:
        conn.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
    assert any("about a processing job, but it has no row" in what for what in refolded(path).values())
