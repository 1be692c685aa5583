"""The doctor: no defect in an undamaged store, a fix for every kind of damage, and edited rows."""

from __future__ import annotations

import glob
import os
import sqlite3
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from jobd.model.job import DAY_MS, FINISHED, LIVE, Extra, checkpoint_key, headers_key
from jobd.model.storage import AuditEntry, StoredResponse, Tombstone
from jobd.model.webhooks import Delivery, WebhookCursor
from jobd.storage import files
from jobd.storage.database import now_ms
from jobd.storage.offline import doctor
from jobd.storage.offline.doctor import Defect, accept, check, recount
from jobd.storage.offline.edited_rows import RepairRejected
from jobd.storage.schema import migrations
from jobd.storage.store import StoreBusy, StoreTooNew, StoreUnreadable
from tests.support import store_files
from tests.support.factories import NOW, ChangeFactory


def places(defects: list[Defect]) -> list[str]:
    return [defect.where for defect in defects]


async def busy_store(path: str) -> ChangeFactory:
    """A store with rows in every table."""
    maker = await store_files.make_store(path)
    async with store_files.open_store(path) as (store, _):
        keys = [StoredResponse("d1", "b", NOW, 200, b"{}"), StoredResponse("d2", "b", NOW, 200, None, [("a", "l")])]
        await store.write(
            maker.batch([maker.queue_event("video", True), maker.quiet_event("q1", False)], keys=keys, report=b"{}")
        )
        young = Tombstone(900, "gone", "k/1", now_ms(), now_ms())
        entry = AuditEntry(NOW, "eve", "127.0.0.1", "plan-fail", details={"from": "queued"}, changed_ids=["job-1"])
        await store.write(maker.batch([], tombstones=[young], audit=[entry]))
        await store.open_outbox(["e"], NOW)
        message = Delivery(7, "e", "waiting", "jobs/a", "job.failed", "evt_1", 1, NOW, NOW, 0, None, None, None, b"{}")
        await store.plan_deliveries(WebhookCursor("e", 1, next_delivery=8), [message])
        await store.save_stats(b"{}")
        await store.write(maker.batch([maker.late(store_files.pick(maker, LIVE), 1)]))
    return maker


@pytest.fixture
async def maker(path: str) -> ChangeFactory:
    return await busy_store(path)


async def test_an_undamaged_store_has_no_problem_and_is_not_changed(path: str) -> None:
    await busy_store(path)
    before = {name: store_files.read_file(name) for name in glob.glob(f"{path}*")}
    assert check(path) == []
    assert {name: store_files.read_file(name) for name in glob.glob(f"{path}*")} == before
    store_files.remove(f"{path}.lock")  # a copy that no daemon ever opened
    assert check(path) == []
    assert not store_files.exists(f"{path}.lock")


async def test_the_write_ahead_log_is_checked_and_not_changed(path: str) -> None:
    maker = await store_files.make_store(path)
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.any_batch(30))
        left = {suffix: store_files.read_file(path + suffix) for suffix in ("", "-wal")}
    for suffix, content in left.items():
        store_files.write_file(path + suffix, content)
    assert check(path) == []
    assert {suffix: store_files.read_file(path + suffix) for suffix in ("", "-wal")} == left
    assert not store_files.exists(f"{path}-shm")


async def test_a_store_held_by_a_daemon_is_not_checked(path: str) -> None:
    async with store_files.open_store(path):
        for call in (lambda: check(path), lambda: accept(path, ["a"]), lambda: recount(path)):
            with pytest.raises(StoreBusy, match=str(os.getpid())):
                call()


async def test_a_file_that_is_not_a_jobd_store_is_rejected(path: str) -> None:
    with pytest.raises(FileNotFoundError):
        check(path)
    with pytest.raises(StoreUnreadable, match="does not exist"):
        accept(path, ["a"])
    assert not store_files.exists(path)
    store_files.write_file(path, b"rubbish" * 100)
    with pytest.raises(StoreUnreadable, match="not a jobd database"):
        check(path)
    store_files.remove(path)
    await store_files.make_store(path)
    with store_files.edit_store(path) as conn:
        conn.execute(f"PRAGMA user_version = {migrations.VERSION + 1}")
    with pytest.raises(StoreTooNew):
        check(path)


async def test_an_older_store_has_to_be_migrated_first(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await store_files.make_store(path)
    monkeypatch.setattr(migrations, "VERSION", migrations.VERSION + 1)
    (defect,) = check(path)
    assert "start the daemon once" in defect.fix


@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        ("UPDATE meta SET next_job = next_job + 1", "meta", "checksum"),
        ("DELETE FROM payloads WHERE job_seq = {live}", "job {live_id}", "the payload is missing"),
        ("DELETE FROM jobs WHERE seq = {live}", "live jobs", "are recorded"),
        ("DELETE FROM jobs WHERE seq = {live}", "payload {live}", "its job does not exist"),
        ("DELETE FROM jobs WHERE seq = {live}", "job {live_id}", "it was not deleted"),
        ("DELETE FROM jobs WHERE seq = {done}", "finished jobs", "are recorded"),
        ("DELETE FROM jobs WHERE seq = {done}", "queue {done_queue}", "are recorded"),
        (
            "UPDATE events SET at = 0 WHERE seq = {events[0]}",
            "events {events[0]} to {events[1]} of job {live_id}",
            "checksum",
        ),
        ("DELETE FROM jobs WHERE seq = {live}", "late result {late}", "its job does not exist"),
        ("DROP INDEX deliveries_place", "schema deliveries_place", "missing"),
        ("DROP INDEX audit_job", "schema audit_job", "missing"),
        ("DROP INDEX jobs_storage_key", "schema jobs_storage_key", "missing"),
        ("DROP INDEX jobs_expiry", "schema jobs_expiry", "missing"),
    ],
)
async def test_every_kind_of_damage_is_reported_with_a_fix(
    path: str, damage: str, where: str, what: str, maker: ChangeFactory
) -> None:
    live, done = store_files.pick(maker, LIVE), store_files.pick(maker, FINISHED)
    late = maker.numbers.next_event - 1
    words = {"late": late, "live": live.seq, "live_id": live.id, "done": done.seq, "done_queue": done.options.queue}
    with store_files.edit_store(path) as conn:
        sql = "SELECT seq, last FROM events WHERE job_seq = ? AND last > seq"
        words["events"] = conn.execute(sql, (live.seq,)).fetchone()
        conn.execute(damage.format(**words))
    found = [defect for defect in check(path) if defect.where == where.format(**words)]
    assert found
    assert what in found[0].what
    assert all(defect.fix for defect in found)


async def test_a_damaged_index_is_reported_and_repaired_by_a_recount(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, FINISHED)
    store_files.omit_from_index(path, "jobs_expiry", job.seq)
    defects = check(path)
    assert any("jobs_expiry" in defect.what and "--recount" in defect.fix for defect in defects)
    recount(path)
    assert check(path) == []


async def test_an_unreadable_page_is_reported_and_the_check_continues(path: str) -> None:
    await busy_store(path)
    store_files.damage_tree(path, "reports")
    defects = check(path)
    assert "file" in places(defects)
    assert any("jobd restore" in defect.fix for defect in defects)


async def test_numbers_that_are_not_assigned_yet_are_reported(path: str) -> None:
    await busy_store(path)
    with store_files.edit_store(path) as conn:
        migrations.change_meta(conn, next_job=1, next_event=1)
    assert places(check(path)) == ["meta", "meta"]


async def test_a_tombstone_that_waits_too_long_is_reported(path: str) -> None:
    maker = await store_files.make_store(path)
    times = [now_ms() - DAY_MS + 60_000, now_ms() - 3 * DAY_MS - 1]
    tombstones = [Tombstone(900 + n, f"gone-{n}", f"k/{n}", at, at, tries=n) for n, at in enumerate(times)]
    async with store_files.open_store(path) as (store, _):
        await store.write(maker.batch([], tombstones=tombstones))
    (defect,) = check(path)
    assert defect.where == "artifact k/1"
    assert defect.what == "job gone-1 was deleted 3 days ago, but its artifact was not (failed attempts: 1)"
    assert "artifacts.url" in defect.fix
    late = Tombstone(-12, "a", "late/1", times[1], times[1], tries=4)
    async with store_files.open_store(path) as (store, _):
        await store.update_tombstones([901], [])
        await store.write(maker.batch([], tombstones=[late]))
    (defect,) = check(path)
    assert defect.where == "artifact late/1"
    assert defect.what == "a late result of job a was deleted 3 days ago, but its artifact was not (failed attempts: 4)"


async def test_many_defects_of_one_kind_are_counted(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MAX_LISTED", 3)
    await busy_store(path)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE events SET at = 0")
        (count,) = conn.execute("SELECT count(*) FROM events").fetchone()
    defects = check(path)
    assert len(defects) == 4
    assert defects[-1].what == f"and {count - 3} more of this kind"


async def test_quarantined_rows_and_other_files_are_checked(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, LIVE)
    store_files.flip(path, "jobs", "queue", "seq", job.seq)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE keys SET at = 1 WHERE digest = 'd1'")
    await store_files.make_empty_store(path)
    store_files.write_file(f"{path}.epoch", b"rubbish")
    os.chmod(path, 0o644)
    defects = check(path)
    assert places(defects) == [f"job {job.id}", "keys in quarantine", "epoch file", path]
    assert f"--accept {job.id}" in defects[0].fix
    assert "d1" in defects[1].what


async def test_an_epoch_file_of_a_newer_database_is_reported(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await busy_store(path)
    files.write_epoch(path, 4)
    owner = os.stat(path).st_uid
    stat = os.stat

    def of_another(name: Any, *args: Any, **settings: Any) -> Any:
        found = stat(name, *args, **settings)
        return os.stat_result((*found[:4], owner + 1, *found[5:])) if str(name).endswith(".epoch") else found

    monkeypatch.setattr(os, "stat", of_another)
    older, foreign = check(path)
    assert older.what == "it has epoch 4 and the database 1, so the database is an older copy"
    assert foreign.what == f"it belongs to user {owner + 1}, the database to user {owner}"
    assert foreign.fix == f"chown --reference {path} {path}.epoch"
    monkeypatch.undo()
    with store_files.edit_store(path) as conn:
        migrations.change_meta(conn, marked=1)
    assert check(path) == []  # a restored backup: its next start begins an epoch


# ---------------------------------------------------------------------------------------------------------------------
# Accepting rows


async def test_an_edited_row_is_accepted_in_place(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, frozenset({"processing"}))
    with store_files.edit_store(path) as conn:
        edit = "status = 'failed', body = json_set(json_remove(body, '$.grant'), '$.progress', 50)"
        conn.execute(f"UPDATE jobs SET {edit} WHERE seq = ?", (job.seq,))
    assert places(check(path))[0] == f"job {job.id}"
    assert "was accepted" in accept(path, [job.id])
    assert check(path) == []
    async with store_files.open_store(path) as (store, found):
        assert found.faults == []
        assert found.unvalidated[job.seq] == job.id
        back = (await store.load([job.id], [job.seq], [])).jobs[job.id]
        assert back == replace(job, status="failed", grant=None, progress=50)
        assert (await store.load([], [job.seq], [])).payloads[job.seq].body == maker.payloads[job.seq]


async def test_a_row_is_accepted_from_quarantine(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, LIVE)
    store_files.flip(path, "jobs", "queue", "seq", job.seq)
    async with store_files.open_store(path) as (_, found):
        assert list(found.quarantined) == [job.id]
    queue = job.options.queue
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE quarantined_jobs SET row = json_set(row, '$.queue', ?)", (queue,))
    accept(path, [job.id])
    assert check(path) == []
    async with store_files.open_store(path) as (store, found):
        assert (found.faults, found.quarantined) == ([], {})
        maker.unvalidated.add(job.seq)
        await store_files.assert_holds(store, found, maker)


async def test_all_damaged_rows_that_are_valid_jobs_are_accepted_at_once(path: str, maker: ChangeFactory) -> None:
    moved, in_place, invalid = (
        store_files.pick(maker, frozenset({"queued"})),
        *[job for job in maker.jobs.values() if job.status in FINISHED][:2],
    )
    store_files.flip(path, "jobs", "queue", "seq", moved.seq)
    await store_files.make_empty_store(path)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE quarantined_jobs SET row = json_set(row, '$.queue', ?)", (moved.options.queue,))
        edit = "UPDATE jobs SET body = json_set(body, ?, ?) WHERE seq = ?"
        conn.execute(edit, ("$.attempt", 7, in_place.seq))
        conn.execute(edit, ("$.ended", "l", invalid.seq))
    named = [moved.id, in_place.id, invalid.id]
    with pytest.raises(RepairRejected, match="is not a valid job"):
        accept(path, named)
    assert sorted(places(check(path))) == sorted(f"job {id_}" for id_ in named), "nothing was written"
    expected = doctor.accept(path, None, is_dry_run=True).splitlines()
    lines = accept(path, None).splitlines()
    assert [line.partition(":")[0] for line in lines] == [*(f"job {id_}" for id_ in named), "Counted"]
    assert "The row does not change" in lines[2]
    assert any("The row would not change" in line for line in expected)
    assert places(check(path)) == [f"job {invalid.id}"]
    assert accept(path, [in_place.id, in_place.id]).count("was accepted") == 1


async def test_nothing_is_accepted_if_nothing_is_damaged(path: str) -> None:
    await busy_store(path)
    assert accept(path, None) == doctor.accept(path, None, is_dry_run=True) == doctor.NOTHING_DAMAGED


async def test_a_job_is_accepted_with_a_repaired_payload(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, FINISHED)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE payloads SET body = X'7b' WHERE job_seq = ?", (job.seq,))
    async with store_files.open_store(path) as (store, _):
        assert list((await store.load([], [job.seq], [])).bad) == [job.id]
    with pytest.raises(RepairRejected, match="the payload is not JSON"):
        accept(path, [job.id])
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE quarantined_jobs SET payload = CAST('{}' AS BLOB)")
    accept(path, [job.id])
    assert check(path) == []
    async with store_files.open_store(path) as (store, found):
        assert (await store.load([], [job.seq], [])).payloads[job.seq].body == b"{}"
        assert found.queues == maker.queues


@pytest.mark.parametrize("damage", ["UPDATE {0} SET body = x'37'", "DELETE FROM {0}"])
@pytest.mark.parametrize("table", ["headers", "checkpoints"])
async def test_a_job_is_accepted_without_damaged_headers_or_checkpoint(path: str, table: str, damage: str) -> None:
    is_headers = table == "headers"
    extra = Extra(headers_bytes=9 * is_headers, checkpoint_bytes=9 * (not is_headers), copied_from="old")
    async with store_files.open_store(path) as (store, _):
        maker = ChangeFactory(has_extra=False)
        event = maker.create("a", extra=extra)
        body_key = headers_key(1) if is_headers else checkpoint_key(1)
        await store.write(maker.batch([replace(event, bodies={body_key: b'{"h":"1"}'})]))
    assert check(path) == []
    with store_files.edit_store(path) as conn:
        conn.execute(damage.format(table))
    assert places(check(path)) == ["job a"]
    accept(path, ["a"])
    assert check(path) == []
    async with store_files.open_store(path) as (store, found):
        assert found.live()[0].extra == Extra(copied_from="old")
    with store_files.edit_store(path) as conn:
        conn.execute(f"INSERT INTO {table} VALUES (1, x'37', 1)")
    assert places(check(path)) == [f"{table} 1"]


async def test_a_missing_payload_is_accepted_as_null(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, LIVE)
    with store_files.edit_store(path) as conn:
        conn.execute("DELETE FROM payloads WHERE job_seq = ?", (job.seq,))
    accept(path, [job.id])
    async with store_files.open_store(path) as (store, _):
        assert (await store.load([], [job.seq], [])).payloads[job.seq].body == b"null"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("body = json_set(body, '$.grant[2]', NULL)", r"got `null` - at `\$.grant\[2\]`"),
        ("body = json_set(body, '$.worker', 'w')", "unknown field `worker`"),
        ("body = 'x'", "JSON is malformed"),
        ("id = 'no id'", "not a valid job id"),
        ("body = json_set(body, '$.grant[1]', 1 << 60)", "never assigned"),
        ("body = json_set(body, '$.ended', json_array('l', 1 << 60, 'w', 1, 'r', 'r'))", "never assigned"),
        ("seq = -seq", "never assigned"),
        ("body = json_set(body, '$.attempt', -9223372036854775807 - 1)", "attempt -9223372036854775808 is not from 0"),
        ("created_at = 9223372036854775807", "created_at 9223372036854775807 is not"),
        ("body = json_set(body, '$.deadlines[0]', -1)", "expires -1 is not from 0"),
        (
            "body = json_set(body, '$.stalls', json('99999999999999999999'))",
            "stalls 99999999999999999999 is not from 0",
        ),
        ("body = json_set(body, '$.progress', 1 << 60)", "progress .* is not from -2"),
        (None, "there is no job"),
    ],
)
async def test_a_row_that_is_not_a_valid_job_is_rejected_without_changes(
    path: str, change: str | None, message: str, maker: ChangeFactory
) -> None:
    job = store_files.pick(maker, frozenset({"processing"}))
    edit = "DELETE FROM jobs" if change is None else f"UPDATE jobs SET {change}"
    with store_files.edit_store(path) as conn:
        conn.execute(f"{edit} WHERE seq = ?", (job.seq,))
    before = check(path)
    with pytest.raises(RepairRejected, match=message):
        accept(path, ["no id" if "no id" in edit else job.id])
    assert check(path) == before


async def test_a_reused_id_or_seq_is_rejected(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, LIVE)
    other = next(each for each in maker.jobs.values() if each.id != job.id)
    async with store_files.open_store(path) as (store, _):
        await store.quarantine(job, "for a test")
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE quarantined_jobs SET row = json_set(row, '$.id', ?)", (other.id,))
    with pytest.raises(RepairRejected, match="UNIQUE"):
        accept(path, [job.id])
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE quarantined_jobs SET row = json_set(row, '$.id', ?, '$.seq', ?)", (job.id, other.seq))
    with pytest.raises(RepairRejected, match=f"its seq {other.seq} is that of job {other.id}"):
        accept(path, [job.id])


async def test_a_quarantined_row_that_is_not_json_is_rejected(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, LIVE)
    async with store_files.open_store(path) as (store, _):
        await store.quarantine(job, "for a test")
    with store_files.edit_store(path) as conn:
        (huge,) = conn.execute("SELECT json_set(row, '$.created_at', json('1e30')) FROM quarantined_jobs").fetchone()
    huge = huge.replace("1e30", "1" + 30 * "0").encode()
    for row in (b"{", b"[]", msgspec.json.encode({"seq": 1}), b'{"\xff": 1}', huge):
        with store_files.edit_store(path) as conn:
            conn.execute("UPDATE quarantined_jobs SET row = CAST(? AS TEXT)", (row,))
        with pytest.raises(RepairRejected):
            accept(path, [job.id])


async def test_a_recount_accepts_the_existing_rows(path: str, maker: ChangeFactory) -> None:
    live, done = store_files.pick(maker, LIVE), store_files.pick(maker, FINISHED)
    with store_files.edit_store(path) as conn:
        conn.execute("DELETE FROM jobs WHERE seq IN (?, ?)", (live.seq, done.seq))
        for table in ("payloads", "headers", "checkpoints", "events", "late_results"):
            conn.execute(f"DELETE FROM {table} WHERE job_seq IN (?, ?)", (live.seq, done.seq))
        conn.execute("DELETE FROM queues WHERE name = 'video'")
    assert {"live jobs", "finished jobs"} <= set(places(check(path)))
    assert "Counted:" in recount(path)
    assert check(path) == []
    store_files.remove_quarantined(maker, live)
    store_files.remove_quarantined(maker, done)
    maker.queues["video"] = replace(maker.queues["video"], paused=False, paused_at=None, paused_by=None)
    await store_files.assert_store_holds(path, maker)


async def test_no_fix_advises_a_recount_after_a_recount(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, FINISHED)
    with store_files.edit_store(path) as conn:
        conn.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
    recount(path)
    defects = check(path)
    assert f"job {job.id}" in places(defects), "its events are left"
    assert not any("--recount" in defect.fix for defect in defects)


async def test_a_recount_does_not_hide_a_damaged_row(path: str, maker: ChangeFactory) -> None:
    job = store_files.pick(maker, LIVE)
    store_files.flip(path, "jobs", "body", "seq", job.seq)
    recount(path)
    assert f"job {job.id}" in places(check(path))


@pytest.mark.parametrize("are_queues_damaged", [False, True])
async def test_jobs_are_counted_although_the_queue_of_one_is_not_utf_8(
    path: str, are_queues_damaged: bool, maker: ChangeFactory
) -> None:
    job = store_files.pick(maker, frozenset({"completed"}))
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE jobs SET queue = CAST(x'ff' AS TEXT) WHERE seq = ?", (job.seq,))
        conn.execute("UPDATE queues SET crc = crc + ?", (are_queues_damaged,))
    for count_again in (recount, lambda path: accept(path, None)):
        assert "Counted: " in count_again(path)
        assert places(check(path))[:1] == [f"job {job.id}"]
    async with store_files.open_store(path) as (store, found):
        assert found.queues["\ufffd"].completed == 1
        assert (await store.load([job.id], [], [])).bad.keys() == {job.id}


async def test_a_recount_separates_a_damaged_row_that_has_the_id_of_another_job(
    path: str, maker: ChangeFactory
) -> None:
    first, second = list(maker.jobs.values())[:2]
    with store_files.edit_store(path) as conn:
        (sql,) = conn.execute("SELECT sql FROM sqlite_schema WHERE name = 'jobs_id'").fetchone()
        conn.execute("DROP INDEX jobs_id")
        conn.execute("UPDATE jobs SET id = ? WHERE seq = ?", (first.id, second.seq))
        conn.execute(sql.replace("UNIQUE", ""))
        conn.execute("PRAGMA writable_schema = ON")
        conn.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'jobs_id'", (sql,))
    assert "non-unique entry in index jobs_id" in check(path)[0].what
    recount(path)
    assert places(check(path)) == [f"job {second.id}"]


def test_a_new_store_has_no_problems(path: str) -> None:
    conn = sqlite3.connect(path, isolation_level=None)
    migrations.create(conn)
    conn.close()
    os.chmod(path, 0o600)
    assert check(path) == []


async def test_a_renamed_column_of_the_meta_row_is_reported(path: str) -> None:
    await store_files.make_store(path)
    with store_files.edit_store(path) as conn:
        conn.execute("ALTER TABLE meta RENAME COLUMN finished_xor TO finished_xos")
    (defect,) = [defect for defect in doctor.check(path) if defect.where == "meta"]
    assert "finished_xos" in defect.what
    assert "restore" in defect.fix
