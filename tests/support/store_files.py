"""Helpers for stores on disk: open them, damage their files, and compare them with what was written."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from msgspec.structs import replace

from jobd.journal import event_codec
from jobd.model.events import Event, fold
from jobd.model.job import FINISHED, LIVE, Job, LateResult, extra_keys
from jobd.model.storage import Batch, JobQuery, LateResultQuery, OpenedStore
from jobd.storage.codec import SQL
from jobd.storage.commit_mode import CommitSetting
from jobd.storage.events import event_rows
from jobd.storage.schema import migrations
from jobd.storage.store import Store
from tests.support.factories import ChangeFactory


async def all_pages(store: Store, query: JobQuery) -> tuple[list[Job], list[int]]:
    """Return the jobs of all pages, and the number of jobs in each."""
    found: list[Job] = []
    sizes: list[int] = []
    while True:
        page = await store.find_jobs(query)
        found += [job for job, _ in page.jobs]
        sizes.append(len(page.jobs))
        if page.next_before is None:
            return found, sizes
        beyond = {"before" if query.after is None else "after": page.next_before}
        query = replace(query, **beyond, before_end=page.next_end)


def read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def write_file(path: str, content: bytes | bytearray) -> None:
    Path(path).write_bytes(content)


def exists(path: str) -> bool:
    return os.path.exists(path)


def remove(*paths: str) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def fill(directory: Path) -> Path:
    """Fill the disk."""
    name = directory / "filler"
    with contextlib.suppress(OSError), open(name, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return name


def omit_from_index(path: str, index: str, seq: int) -> None:
    """Remove the entry of a row from a partial index of jobs."""
    update = "UPDATE sqlite_schema SET sql = ? WHERE name = ?"
    with edit_store(path) as conn:
        conn.execute("PRAGMA writable_schema = ON")
        (sql,) = conn.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (index,)).fetchone()
        conn.execute(update, (sql.replace("WHERE", f"WHERE seq <> {seq} AND"), index))
    with edit_store(path) as conn:
        conn.execute("REINDEX")
        conn.execute("PRAGMA writable_schema = ON")
        conn.execute(update, (sql, index))


@contextlib.asynccontextmanager
async def open_store(path: str, commit: CommitSetting = "auto") -> AsyncIterator[tuple[Store, OpenedStore]]:
    store, found = await Store.open(path, commit=commit)
    async with store:
        yield store, found


async def make_empty_store(path: str) -> None:
    async with open_store(path):
        pass


@contextlib.contextmanager
def edit_store(path: str) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the closed store, as for a manual edit."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        yield conn


def damage_tree(path: str, name: str, damage: bytes = b"\xff" * 16) -> None:
    """Write `damage` at the beginning of the root page of a table or index."""
    with edit_store(path) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (name,)).fetchone()
    content = bytearray(read_file(path))
    begin = (page - 1) * 4096
    content[begin : begin + len(damage)] = damage
    write_file(path, content)


def stored_events(conn: sqlite3.Connection, job_seq: int | None = None) -> list[Event]:
    """Return the events in the tables, of all jobs or of one."""
    rows = conn.execute(f"SELECT {SQL['events']} FROM events").fetchall()
    events = [event_codec.decode(event) for row in rows for event in event_rows.unpack(row)]
    return sorted((each for each in events if job_seq in (None, each.job_seq)), key=lambda event: event.seq)


def job_of(change: Event) -> Job:
    assert change.after is not None
    return change.after


def late_of(change: Event) -> LateResult:
    assert change.late is not None
    return change.late


async def late_results(store: Store, job: Job, *, whole: bool = True) -> list[LateResult]:
    return (await store.read_late_results([LateResultQuery(job.seq, with_results=whole)])).results[job.seq]


def seqs(jobs: list[Job]) -> list[int]:
    return sorted(job.seq for job in jobs)


async def assert_holds(store: Store, found: OpenedStore, maker: ChangeFactory) -> None:
    """Check that a store that was just opened has the rows, payloads, journals and counts of `maker`."""
    live = {seq: job for seq, job in maker.jobs.items() if job.status in LIVE}
    assert found.faults == []
    assert {job.seq: job for job in found.live()} == live
    assert found.numbers == maker.numbers
    assert found.queues == maker.queues
    assert sorted(found.unvalidated.values()) == sorted(maker.jobs[seq].id for seq in maker.unvalidated)
    everything = await store.load([job.id for job in maker.jobs.values()], list(maker.payloads), [])
    assert everything.bad == {}
    assert everything.jobs == {job.id: job for job in maker.jobs.values()}
    assert {key: payload.body for key, payload in everything.payloads.items()} == maker.payloads
    for seq, job in maker.jobs.items():
        row = None
        for event in await store.timeline(seq):
            row = fold(row, event)
        assert row == job
    for seq in maker.deleted:
        events = await store.timeline(seq)
        assert events[-1].type == "deleted"


async def assert_store_holds(path: str, maker: ChangeFactory, *, epoch: int | None = None) -> None:
    """Open a store, and check that it `assert_holds`. `epoch` is the one that has begun without a grant since."""
    if epoch is not None:
        maker.numbers = replace(maker.numbers, epoch=epoch, next_token=1)
    async with open_store(path) as (store, found):
        await assert_holds(store, found, maker)


async def assert_restored(path: str, maker: ChangeFactory) -> None:
    """Open a restored store for the first time, and check that it is marked and has what `maker` has."""
    async with open_store(path) as (store, found):
        assert (found.marked, found.numbers.epoch) == (True, 2)
        maker.numbers = replace(maker.numbers, epoch=2, next_token=1, next_event=2 << 24)
        await assert_holds(store, found, maker)


def recounted(store: Store) -> tuple[int, int, int, int]:
    count, xor = {True: 0, False: 0}, {True: 0, False: 0}
    for status, crc in store._connection.raw.execute("SELECT status, crc FROM jobs NOT INDEXED"):
        count[status in LIVE] += 1
        xor[status in LIVE] ^= crc
    return count[True], xor[True], count[False], xor[False]


async def make_store(path: str, seed: int = 11) -> ChangeFactory:
    maker = ChangeFactory(seed)
    async with open_store(path) as (store, _):
        for _ in range(20):
            await store.write(maker.any_batch(15))
    return maker


@contextlib.asynccontextmanager
async def killed_store(path: str) -> AsyncIterator[tuple[Store, OpenedStore]]:
    """Yield a store that writes no slices, and leave its files as a kill does."""
    async with open_store(path, "inline") as (store, found):
        store._plan_slice = lambda: None  # type: ignore[method-assign]
        yield store, found
        left = {name: read_file(name) for name in (path, f"{path}-wal")}
    for name, content in left.items():
        write_file(name, content)


async def leave_tail(path: str, *batches: Batch) -> list[int]:
    """Write `batches` into the journal and not into the tables. Return the numbers of their records."""
    async with killed_store(path) as (store, _):
        first = store._projection.last + 1
        for batch in batches:
            await store.write(batch)
    return list(range(first, first + len(batches)))


def pick(maker: ChangeFactory, statuses: frozenset[str]) -> Job:
    return next(job for job in maker.jobs.values() if job.status in statuses)


def remove_quarantined(maker: ChangeFactory, job: Job) -> None:
    """Remove a quarantined job from `maker`."""
    for key in (job.seq, *extra_keys(job)):
        del maker.payloads[key]
    del maker.jobs[job.seq]
    maker.unvalidated.discard(job.seq)
    if job.status in FINISHED:
        row = maker.queues[job.options.queue]
        maker.queues[job.options.queue] = replace(row, **{job.status: getattr(row, job.status) - 1})


@contextlib.contextmanager
def hidden_indexes(conn: sqlite3.Connection) -> Iterator[None]:
    """Inside the context, changes leave the indexes alone."""
    hidden = "type = 'index' AND sql IS NOT NULL"
    conn.execute("PRAGMA writable_schema = ON")
    indexes = conn.execute(f"SELECT * FROM sqlite_schema WHERE {hidden}").fetchall()
    conn.execute(f"DELETE FROM sqlite_schema WHERE {hidden}")
    conn.execute("PRAGMA writable_schema = RESET")
    yield
    conn.execute("PRAGMA writable_schema = ON")
    conn.executemany("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", indexes)
    conn.execute("PRAGMA writable_schema = RESET")


@contextlib.contextmanager
def without_indexes(path: str) -> Iterator[sqlite3.Connection]:
    """Yield a connection with hidden indexes, so that a change damages only the row, as a bad disk would."""
    with edit_store(path) as conn, hidden_indexes(conn):
        yield conn


def flip(path: str, table: str, column: str, key: str, seq: int, bit: int = 0) -> None:
    """Flip one bit of a column, in its first byte if it is text or bytes."""
    with without_indexes(path) as conn:
        conn.text_factory = bytes
        (value,) = conn.execute(f"SELECT {column} FROM {table} WHERE {key} = ?", (seq,)).fetchone()
        if isinstance(value, bytes):
            value = bytes((value[0] ^ (1 << bit), *value[1:]))
            text = conn.execute(f"SELECT typeof({column}) FROM {table} WHERE {key} = ?", (seq,)).fetchone() == (
                b"text",
            )
            place = "CAST(? AS TEXT)" if text else "?"
        else:
            value, place = value ^ (1 << bit), "?"
        conn.execute(f"UPDATE {table} SET {column} = {place} WHERE {key} = ?", (value, seq))


def damage_backup(path: str, what: str) -> None:
    """Damage a backup so that it cannot be restored: missing, rubbish, foreign, newer, or a damaged row or page."""
    if what == "missing":
        remove(path)
    elif what == "rubbish":
        write_file(path, b"rubbish" * 1_000)
    elif what == "page":
        content = bytearray(read_file(path))
        content[-4096 + 3] ^= 0x10
        write_file(path, content)
    else:
        statements = {
            "foreign": "PRAGMA application_id = 5",
            "newer": f"PRAGMA user_version = {migrations.VERSION + 1}",
            "meta": "UPDATE meta SET next_job = 1",
        }
        with edit_store(path) as conn:
            conn.execute(statements[what])
