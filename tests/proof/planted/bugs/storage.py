"""Bugs in the store: transactions, durability and what is trusted on disk."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from jobd.model.storage import Batch
from jobd.storage import files, migrations, outbox, startup
from jobd.storage.connection import StoreConnection
from jobd.storage.database import Database
from tests.proof.planted.registry import bug

STORE = "tests/unit/storage/test_store.py"
OUTAGES = "tests/integration/test_outages.py"


@bug("key-in-its-own-transaction", Database.write, breaks="a crash leaves a change without its key", found_by=STORE)
def _(write: Any, self: Database, batch: Batch, reported: int) -> Any:
    shown = write(self, replace(batch, keys=[]), reported)
    if batch.keys:
        write(self, replace(batch, changes=[], queues={}, audit=[], tombstones=[], report=None), reported)
    return shown


@bug(
    "journal-in-its-own-transaction",
    Database._write_events,
    breaks="a crash leaves rows without events",
    found_by=STORE,
)
def _(write_events: Any, self: Database, changes: Any) -> None:
    self.conn.execute("COMMIT")
    self.conn.execute("BEGIN IMMEDIATE")
    write_events(self, changes)


@bug(
    "outbox-cursor-in-another-transaction",
    outbox._add,
    breaks="a crash between two transactions loses events",
    found_by="tests/unit/storage/test_outbox.py",
)
def _(add: Any, db: Database, moved: Any, new: Any) -> None:
    add(db, moved, [])
    db.conn.execute("COMMIT")
    db.conn.execute("BEGIN IMMEDIATE")
    add(db, moved, new)


@bug("sums-kept-over-a-rollback", Database.commit, breaks="totals count a rejected batch", found_by=OUTAGES)
def _(commit: Any, self: Database, fn: Any, *args: Any) -> Any:
    totals = self.totals

    def run(*given: Any) -> Any:
        nonlocal totals
        result = fn(*given)
        totals = self.totals
        return result

    try:
        return commit(self, run, *args)
    except BaseException:
        self.totals = totals
        raise


@bug(
    "inline-commit-error-swallowed",
    StoreConnection.run_inline,
    breaks="a batch is acknowledged although its inline commit failed",
    found_by=OUTAGES,
)
def _(run_inline: Any, self: StoreConnection, fn: Any, *args: Any) -> Any:
    try:
        return run_inline(self, fn, *args)
    except Exception:
        return {}


@bug("commit-before-fsync", startup.connect, breaks="a commit returns before its fsync", found_by=STORE)
def _(connect: Any, path: str, synchronous: str) -> Any:
    conn = connect(path, synchronous)
    conn.execute("PRAGMA synchronous = NORMAL")
    return conn


@bug(
    "epoch-file-not-read",
    files.read_epoch,
    breaks="a second restore of one backup takes the epoch of the first",
    found_by="tests/unit/storage/test_startup.py",
)
def _(read_epoch: Any, path: str) -> Any:
    return files.EpochFile(is_current=True)


@bug(
    "backup-without-its-mark",
    migrations.change_meta,
    breaks="a restored backup continues as if nothing had happened since",
    found_by="tests/unit/storage/test_backup.py",
)
def _(change_meta: Any, /, conn: Any, **values: int) -> None:
    change_meta(conn, **{name: value for name, value in values.items() if name != "marked"})
