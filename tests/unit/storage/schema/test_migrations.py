"""Schema versions: an older store is copied and migrated in one transaction, or not changed."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.model.job import FINISHED, LIVE, TOKEN_COUNTER_BITS, Job, Result
from jobd.model.storage import AuditEntry, AuditQuery, LateResultQuery
from jobd.storage import codec, files, startup
from jobd.storage.database import JOB_SQL
from jobd.storage.files import EpochFile
from jobd.storage.offline import doctor
from jobd.storage.offline.edited_rows import RepairRejected
from jobd.storage.schema import job_rows, migrations
from jobd.storage.store import Store, StoreTooNew, StoreUnreadable
from tests.support.factories import ChangeFactory, full_job
from tests.support.store_files import (
    SCHEMAS,
    as_version_10,
    as_version_12,
    as_version_13,
    assert_holds,
    edit_store,
    make_store,
    open_store,
    read_file,
    seqs,
    write_file,
)


def add_table(conn: sqlite3.Connection) -> None:
    conn.execute("CREATE TABLE notes (seq INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT")
    conn.execute("INSERT INTO notes SELECT seq, id FROM jobs")


def fail(conn: sqlite3.Connection) -> None:
    conn.execute("DELETE FROM events")
    raise sqlite3.OperationalError("the second step fails")


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> int:
    """Simulate a later version of jobd with two more migrations."""
    version = migrations.VERSION + 2
    steps = {migrations.VERSION: add_table, migrations.VERSION + 1: lambda conn: None}
    monkeypatch.setattr(migrations, "VERSION", version)
    monkeypatch.setattr(migrations, "MIGRATIONS", steps)
    return version


def test_the_header_of_the_schema_names_no_version() -> None:
    head, table, _ = Path(migrations.__file__).with_name("schema.sql").read_text("utf-8").partition("CREATE TABLE")
    assert table
    assert not re.search(r"version [0-9]", head)


def test_every_older_version_has_a_migration() -> None:
    assert sorted(migrations.MIGRATIONS) == list(range(1, migrations.VERSION))


async def test_version_1_does_not_record_which_events_were_pruned(path: str) -> None:
    maker = await make_store(path)
    as_of(1, path)
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)
        last = maker.numbers.next_event - 1
        page = await store.events_after(last, 10)
        assert (page.last, page.gone_to) == (last, last)
    with edit_store(path) as conn:
        assert conn.execute("SELECT schema_version, events_gone_to FROM meta").fetchone() == (migrations.VERSION, last)
        names = [name for (name,) in conn.execute("SELECT name FROM pragma_table_info('meta')")]
        assert names == ["id", *codec.META_COLUMNS, "crc"]
    [copy] = glob.glob(f"{path}.v1-*")
    assert os.path.getsize(copy) > 0


async def test_a_migration_does_not_fix_the_checksum_of_a_damaged_meta_row(path: str) -> None:
    await make_store(path)
    as_of(1, path)
    with edit_store(path) as conn:
        conn.execute("UPDATE meta SET next_token = next_token + 1")
    with pytest.raises(StoreUnreadable, match="meta row"):
        await Store.open(path)


def _make_version_9(conn: sqlite3.Connection) -> None:
    """Remove the columns that version 10 added."""
    for table, columns in {
        "queues": ("paused_at", "paused_by", "pause_reason", "paused_until"),
        "jobs": ("releases",),
        "meta": ("clock_suspect",),
    }.items():
        for column in columns:
            conn.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        for rowid, *row, _ in conn.execute(f"SELECT rowid, * FROM {table}").fetchall():
            crc = codec.with_checksum(tuple(row[1:] if table == "meta" else row))[-1]
            conn.execute(f"UPDATE {table} SET crc = ? WHERE rowid = ?", (crc, rowid))
    live, live_xor, finished, finished_xor = doctor.totals(conn)
    migrations.change_meta(conn, live_count=live, live_xor=live_xor, finished_count=finished, finished_xor=finished_xor)


def _make_version_1(conn: sqlite3.Connection) -> None:
    """Change the meta table to that of version 1."""
    found = migrations.read_meta(conn)
    assert found is not None
    row = {name: value for name, value in found.items() if name not in ("events_gone_to", "crc")}
    row["schema_version"] = 1
    names = [*row, "crc"]
    columns = ", ".join(f"{name} INTEGER NOT NULL" for name in names)
    conn.execute("DROP TABLE meta")
    conn.execute(f"CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), {columns}) STRICT")
    values = codec.with_checksum(tuple(row.values()))
    conn.execute(f"INSERT INTO meta (id, {', '.join(names)}) VALUES (1{', ?' * len(values)})", values)
    conn.execute("PRAGMA user_version = 1")


# Parts of a job as objects in events, as in all versions up to 8.
NAMES = {
    "options": "queue kind priority max_attempts backoff max_stalls on_stall stuck_after_ms max_processing_ms",
    "grant": "lock_id fencing_token worker acquired_at ttl_ms stuck_after_ms max_processing_ms",
    "lease": "expires silent ceiling cleared",
    "ended": "lock_id fencing_token worker at rule reason verb body_hash",
    "result": "download_url file_path storage_key metadata",
    "error": "message code",
}


def _name_parts(conn: sqlite3.Connection) -> None:
    """Store the parts of jobs in all events as objects."""
    found = conn.execute("SELECT * FROM events WHERE changes IS NOT NULL").fetchall()
    assert found
    for *row, changes, _ in found:
        named = {
            field: dict(zip(NAMES[field].split(), value, strict=True)) if isinstance(value, list) else value
            for field, value in json.loads(changes).items()
        }
        changed = codec.with_checksum((*row, json.dumps(named, separators=(",", ":")).encode()))
        conn.execute("UPDATE events SET changes = ?, crc = ? WHERE seq = ?", (*changed[-2:], row[0]))


async def test_an_older_store_is_copied_and_migrated(path: str, request: pytest.FixtureRequest) -> None:
    maker = await make_store(path)
    before = migrations.VERSION
    version = request.getfixturevalue("next_version")
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)
    with edit_store(path) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (version,)
        assert conn.execute("SELECT schema_version FROM meta").fetchone() == (version,)
        assert conn.execute("SELECT count(*) FROM notes").fetchone() == (len(maker.jobs),)
        migrations.check_meta(conn, path)
    (copy,) = glob.glob(f"{path}.v{before}-*")
    assert os.stat(copy).st_mode & 0o777 == 0o600
    with edit_store(copy) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (before,)
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert conn.execute("SELECT count(*) FROM jobs").fetchone() == (len(maker.jobs),)
    async with open_store(path) as (store, found):  # once
        await assert_holds(store, found, maker)
    assert glob.glob(f"{path}.v{before}-*") == [copy]


async def test_a_failed_migration_leaves_the_store_unchanged(
    path: str, next_version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as now:
        now.setattr(migrations, "VERSION", next_version - 2)
        maker = await make_store(path)
    with monkeypatch.context() as now:
        now.setitem(migrations.MIGRATIONS, next_version - 1, fail)
        with pytest.raises(sqlite3.OperationalError, match="second step"):
            await Store.open(path)
    with edit_store(path) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (next_version - 2,)
        assert conn.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'notes'").fetchone() == (0,)
        assert conn.execute("SELECT count(*) FROM events").fetchone() != (0,)
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)


def as_of(version: int, path: str) -> None:
    """Convert the store at `path` to an older version, with the rows that it had tables for."""
    was, now = f"{path}.was", migrations.VERSION
    with edit_store(path) as conn:
        for table in ("late_results", "tombstones", "audit", "webhooks", "deliveries"):
            assert conn.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), "older versions cannot have this"
        numbers = migrations.read_meta(conn)
        assert numbers is not None
        next_token = (numbers["epoch"] << TOKEN_COUNTER_BITS) + numbers["next_token"]
    (as_version_10 if version < 11 else as_version_12 if version < 13 else as_version_13)(path)
    with edit_store(path) as conn:
        if version < 10:
            migrations.change_meta(conn, epoch=next_token >> 40, next_token=next_token & ((1 << 40) - 1))
            _make_version_9(conn)
        if version == 1:
            _make_version_1(conn)
        if version < 9:
            _name_parts(conn)
    with edit_store(was) as old:
        for statement in migrations.statements((SCHEMAS / f"v{version}.sql").read_text("utf-8")):
            old.execute(statement)
        old.execute("ATTACH ? AS now", (path,))
        for (table,) in old.execute("SELECT name FROM main.sqlite_schema WHERE type = 'table'").fetchall():
            old.execute(f"INSERT INTO main.{table} SELECT * FROM now.{table}")
        old.execute("DETACH now")
        old.execute(f"PRAGMA application_id = {migrations.APPLICATION_ID}")
        migrations.set_version(old, version)
        assert version < now
    os.chmod(was, 0o600)
    os.replace(was, path)


def schema_of(path: str) -> dict[str, str]:
    """Return the SQL of every table and index by name, without comments and spaces."""
    with edit_store(path) as conn:
        found = conn.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    return {name: "".join(re.sub(r"--.*", "", sql).split()) for name, sql in found}


async def test_a_migration_does_not_hide_damaged_rows(path: str) -> None:
    maker = await make_store(path)
    as_of(9, path)
    live = next(job for job in maker.jobs.values() if job.status == "queued")
    finished, unreadable = [job for job in maker.jobs.values() if job.status in FINISHED][:2]
    with edit_store(path) as conn:
        conn.execute("UPDATE jobs SET crc = (crc | 4) - (crc & 4) WHERE seq = ?", (live.seq,))
        conn.execute("UPDATE jobs SET attempt = attempt + 1 WHERE seq = ?", (finished.seq,))
        conn.execute("UPDATE jobs SET kind = CAST(x'ff61' AS TEXT) WHERE seq = ?", (unreadable.seq,))
    async with open_store(path) as (store, found):
        assert list(found.quarantined) == [live.id]
        assert found.faults == [f"job {live.id} was quarantined: its checksum is wrong"]
        bad = (await store.load([finished.id, unreadable.id], [], [])).bad
        assert sorted(bad) == sorted([finished.id, unreadable.id])
    assert doctor.check(path) != []


@pytest.mark.parametrize("version", [9, 12])
async def test_a_job_quarantined_before_a_migration_can_be_accepted_after_it(path: str, version: int) -> None:
    maker = await make_store(path)
    async with open_store(path) as (store, _):
        result = Result(metadata=Raw(b"[1e400]"))
        await store.write(maker.batch([maker.create(progress_message="ü", result=result)]))
    job = maker.jobs[max(maker.jobs)]
    as_of(version, path)
    with edit_store(path) as conn:
        names = [name for (name,) in conn.execute("SELECT name FROM pragma_table_info('jobs')")]
        row = conn.execute("SELECT * FROM jobs WHERE seq = ?", (job.seq,)).fetchone()
        conn.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
        conn.execute(
            "INSERT INTO quarantined_jobs VALUES (?, ?, 'damaged', 1, ?, CAST('null' AS BLOB), '')",
            (job.seq, job.id, codec.as_text(tuple(names), row)),
        )
    async with open_store(path):
        pass
    assert "was accepted" in doctor.accept(path, [job.id])
    async with open_store(path) as (store, _):
        assert (await store.load([job.id], [], [])).jobs == {job.id: job}


async def test_migrated_rows_are_those_that_this_version_writes(path: str) -> None:
    maker = await make_store(path)
    unusual = replace(full_job(), seq=maker.numbers.next_job, id="full")
    async with open_store(path) as (store, _):
        fields = {name: getattr(unusual, name) for name in Job.__struct_fields__ if name not in ("seq", "id")}
        await store.write(maker.batch([maker.create("full", **fields)]))
    as_of(12, path)
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)
        rows = store._database.rows(f"SELECT {JOB_SQL} FROM jobs ORDER BY seq")
        assert rows == [codec.with_checksum(codec.job_row(job)) for _, job in sorted(maker.jobs.items())]
        assert store._database.totals == doctor.totals(store._connection.raw)
    assert doctor.check(path) == []


METADATA = (
    b"1e400",
    b"-0",
    b"1.0",
    b"9" * 5_000,
    b"[" * 500 + b"]" * 500,
    rb'"\ud83d\ude00\u0000"',
    '{"é": "😀\u2028"}'.encode(),
    b'{"a": 1 , "a": [2e999 ]}',
    b'{"hex": "00"}',
    b"[ ]",
)


@pytest.mark.parametrize("is_damaged", [False, True])
async def test_a_migration_does_not_change_metadata(path: str, is_damaged: bool) -> None:
    maker = await make_store(path)
    async with open_store(path) as (store, _):
        for metadata in METADATA:
            result = Result(metadata=Raw(metadata))
            await store.write(maker.batch([maker.create(status="completed", result=result)]))
    ids = [job.id for job in list(maker.jobs.values())[-len(METADATA) :]]
    as_of(12, path)
    if is_damaged:
        with edit_store(path) as conn:
            conn.executemany("UPDATE jobs SET crc = (crc | 4) - (crc & 4) WHERE id = ?", [(id_,) for id_ in ids])
    async with open_store(path) as (store, _):
        bad = (await store.load(ids, [], [])).bad
    assert list(bad) == (ids if is_damaged else [])
    if is_damaged:
        doctor.accept(path, ids)
    async with open_store(path) as (store, _):
        jobs = (await store.load(ids, [], [])).jobs
        assert [jobs[id_].result for id_ in ids] == [Result(metadata=Raw(each)) for each in METADATA]


async def test_metadata_of_any_depth_is_migrated(path: str) -> None:
    maker = await make_store(path)
    job = next(job for job in maker.jobs.values() if job.status in FINISHED)
    as_of(12, path)
    metadata = b"[" * 100_000 + b"]" * 100_000
    for error in (0, 4):
        with edit_store(path) as conn:
            (*row, _) = conn.execute("SELECT * FROM jobs WHERE seq = ?", (job.seq,)).fetchone()
            names = [name for (name,) in conn.execute("SELECT name FROM pragma_table_info('jobs')")]
            row[names.index("metadata")] = metadata
            new = job_rows._new_row((*row, codec.checksum(tuple(row)) ^ error))
            assert codec.checksum(new[:-1]) ^ error == new[-1]
            assert (metadata if error == 0 else metadata.hex().encode()).decode() in new[-2]


DAMAGE = {
    "crc": "crc = (crc | 4) - (crc & 4)",
    "a searched column": "queue = queue || 'x'",
    "a field of the body": "attempt = attempt + 1",
    "text of a searched column": "kind = CAST(x'ff61' AS TEXT)",
    "text of the body": "progress_message = CAST(x'ff61' AS TEXT)",
    "part of a grant": "fencing_token = NULL",
    "the first part of a grant": "lock_id = NULL",
    "metadata": "metadata = x'ff61'",
}


@pytest.mark.parametrize("what", DAMAGE)
async def test_damage_of_any_column_survives_the_migration(path: str, what: str) -> None:
    maker = await make_store(path)
    job = next(job for job in maker.jobs.values() if job.status == "processing")
    as_of(12, path)
    with edit_store(path) as conn:
        conn.execute(f"UPDATE jobs SET {DAMAGE[what]} WHERE seq = ?", (job.seq,))
    async with open_store(path) as (store, found):
        assert found.faults == [f"job {job.id} was quarantined: {found.quarantined[job.id]}"]
        assert job.seq not in seqs(found.live())
        assert store._database.totals == doctor.totals(store._connection.raw)
    with edit_store(path) as conn:
        (text,) = conn.execute("SELECT row FROM quarantined_jobs").fetchone()
    row = json.loads(text)
    assert job.grant is not None
    assert row["id"] == job.id
    assert row["started_at"] == job.started_at
    if what.startswith("text") or what == "metadata":
        assert {"hex": "ff61"} in row.values()
    else:
        assert row["grant"][2] == job.grant.worker
    if what.startswith("text") or "part" in what:
        with pytest.raises(RepairRejected):
            doctor.accept(path, [job.id])
    else:
        assert "was accepted" in doctor.accept(path, [job.id])


@pytest.mark.parametrize("row", ["{", "[1]", '{"seq": 1}'])
async def test_a_row_in_quarantine_that_is_not_a_row_does_not_change(path: str, row: str) -> None:
    await make_store(path)
    as_of(12, path)
    with edit_store(path) as conn:
        conn.execute("INSERT INTO quarantined_jobs VALUES (900, 'a', 'damaged', 1, ?, NULL, NULL)", (row,))
    async with open_store(path) as (_, found):
        assert found.quarantined == {"a": "damaged"}
    with edit_store(path) as conn:
        assert conn.execute("SELECT row FROM quarantined_jobs").fetchone() == (row,)


@pytest.mark.slow
@pytest.mark.parametrize("version", range(1, migrations.VERSION))
async def test_stores_of_all_older_versions_are_migrated(path: str, tmp_path: Path, version: int) -> None:
    maker = await make_store(path)
    as_of(version, path)
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)
        await store.write(maker.any_batch(5))
        job = next(iter(maker.jobs.values()))
        await store.write(maker.batch([maker.late(job, 1)], audit=[AuditEntry(maker.now, "eve", "::1", "cancel")]))
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)
        assert [row.who for _, row in (await store.read_audit(AuditQuery())).found] == ["eve"]
        assert len((await store.read_late_results([LateResultQuery(job.seq)])).results[job.seq]) == 1
        outbox = await store.open_outbox(["e"], maker.now)
        assert (outbox.cursors["e"].position, outbox.next_delivery) == (maker.numbers.next_event - 1, 1)
    assert doctor.check(path) == []
    fresh = str(tmp_path / "fresh.db")
    async with open_store(fresh):
        pass
    assert schema_of(path) == schema_of(fresh)


def write_old_epoch(path: str, epoch: int) -> None:
    """The format of schema version 9 and older."""
    write_file(f"{path}.epoch", b"%d %08x\n" % (epoch, zlib.crc32(b"%d" % epoch)))


@pytest.mark.parametrize(("clock", "epoch"), [(218_000_000, 218_000_000), (5, (4 << 16) + 0)])
async def test_a_migrated_store_begins_a_higher_epoch_and_keeps_its_grants(
    path: str, monkeypatch: pytest.MonkeyPatch, clock: int, epoch: int
) -> None:
    maker = await make_store(path)
    as_of(9, path)
    counter = (9 << TOKEN_COUNTER_BITS) + 7
    with edit_store(path) as conn:
        migrations.change_meta(conn, epoch=3, next_token=counter)
    write_old_epoch(path, 3)
    monkeypatch.setattr(startup, "now_ms", lambda: 1_577_836_800_000 + clock * 1000)
    async with open_store(path) as (_, found):
        assert not found.marked
        assert (found.numbers.epoch, found.numbers.next_token) == (epoch, 1)
        assert found.numbers.epoch << TOKEN_COUNTER_BITS > (3 << 40) | counter
        assert found.numbers.next_event == maker.numbers.next_event
        assert {job.seq for job in found.live()} == {seq for seq, job in maker.jobs.items() if job.status in LIVE}
    assert files.read_epoch(path) == EpochFile(epoch, is_current=True)
    assert doctor.check(path) == []


async def test_a_migration_does_not_change_the_next_token(path: str) -> None:
    await make_store(path)
    as_of(9, path)
    with edit_store(path) as conn:
        migrations.change_meta(conn, epoch=3, next_token=(9 << TOKEN_COUNTER_BITS) + 7)
        assert migrations.epoch_of(conn) == (3 << 16) + 9
        migrations.migrate(conn, 9)
        found = migrations.read_meta(conn)
        assert found is not None
        assert (found["epoch"], found["next_token"]) == ((3 << 16) + 9, 7)
        assert migrations.epoch_of(conn) == (3 << 16) + 9
        conn.execute("UPDATE meta SET epoch = epoch + 1")
        assert migrations.epoch_of(conn) == 0  # a damaged row has no epoch
        conn.execute("DELETE FROM meta")
        assert migrations.epoch_of(conn) == 0


async def test_an_older_copy_of_an_older_version_is_detected_by_its_epoch_file(path: str) -> None:
    await make_store(path)
    as_of(9, path)
    with edit_store(path) as conn:
        migrations.change_meta(conn, epoch=3, next_token=9)
    write_old_epoch(path, 4)
    async with open_store(path) as (_, found):
        assert (found.marked, found.numbers.epoch) == (True, 5 << 16)  # above every token of the old epoch 4


MIGRATOR = """
import asyncio, os, signal, sys
from jobd.storage.schema import migrations
from jobd.storage.store import Store

def step(conn):
    conn.execute("CREATE TABLE notes (a ANY) STRICT")
    conn.execute("DELETE FROM jobs")
    os.kill(os.getpid(), signal.SIGKILL)

migrations.MIGRATIONS = {migrations.VERSION: step}
migrations.VERSION += 1
asyncio.run(Store.open(sys.argv[1]))
"""


async def test_a_kill_during_a_migration_leaves_the_store_unchanged(path: str) -> None:
    maker = await make_store(path)
    done = subprocess.run([sys.executable, "-c", MIGRATOR, path], check=False)  # noqa: ASYNC221
    assert done.returncode == -signal.SIGKILL
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)


async def test_a_migrated_store_is_too_new_for_the_older_version(path: str, next_version: int) -> None:
    async with open_store(path) as (store, _):
        await store.write(ChangeFactory().any_batch(3))
    before = read_file(path)
    with pytest.MonkeyPatch.context() as now:
        now.setattr(migrations, "VERSION", next_version - 2)
        with pytest.raises(StoreTooNew, match=f"schema version {next_version}"):
            await Store.open(path)
    assert read_file(path) == before


def test_statements_are_split_with_their_comments() -> None:
    script = "-- a; comment\nCREATE TABLE a (\n  b INTEGER -- with; this\n) STRICT;\nCREATE TABLE c (d TEXT) STRICT;\n"
    assert len(list(migrations.statements(script))) == 2


def test_every_table_is_strict_and_durable_rows_have_a_checksum() -> None:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        migrations.create(conn)
        tables = conn.execute("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'").fetchall()
        assert all(strict for name, strict in tables if not name.startswith("sqlite_"))
        promised = ("jobs", "payloads", "late_results", "events", "keys", "queues", "meta", "reports", "figures")
        for table in (*promised, "tombstones", "audit", "webhooks", "deliveries"):
            assert "crc" in [row[1] for row in conn.execute(f"PRAGMA table_info({table})")], table
        assert conn.execute("PRAGMA application_id").fetchone() == (migrations.APPLICATION_ID,)


def test_changing_the_meta_row_updates_its_checksum() -> None:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        migrations.create(conn)
        migrations.change_meta(conn, marked=1, epoch=9)
        found = migrations.read_meta(conn)
        assert found is not None
        assert (found["marked"], found["epoch"], found["schema_version"]) == (1, 9, migrations.VERSION)
        assert codec.fault(tuple(found.values())) is None
