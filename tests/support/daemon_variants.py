"""Variants of the daemon for tests: `python -m tests.support.daemon_variants VARIANT serve …`."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from jobd import daemon, logging, resources, serving
from jobd.cli.daemon.main import main
from jobd.core import decide
from jobd.core.transaction import Transaction
from jobd.engine import history
from jobd.engine.actor import Actor
from jobd.journal import record
from jobd.maintenance.artifact_sweeper import ArtifactSweeper
from jobd.model.commands import Create
from jobd.model.storage import JobQuery
from jobd.monitoring.problems import board, queues_and_kinds
from jobd.monitoring.problems.board import ProblemBoard
from jobd.storage import store
from jobd.storage.artifacts.base import Margins
from jobd.storage.artifacts.filesystem import FileArtifactStore
from jobd.storage.schema import migrations
from jobd.storage.store import Store
from jobd.storage.tables import projection
from jobd.storage.tables.projection import Projection
from jobd.webhooks import dispatcher

AHEAD: Final = 2  # versions by which `next_version` is ahead


def hung_actor() -> None:
    """Make the actor hang after SIGUSR2. The event loop still runs."""

    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    signal.signal(signal.SIGUSR2, lambda *_: _set(Actor, _turn=hang))


def prompt_problems() -> None:
    """Evaluate problems without a pause, and open and close them at once. No time passes before jobs lack workers."""
    _set(board, EVALUATE_EVERY_S=0.05, DUE_FOR_MS=0, SETTLED_MS=0)
    _set(queues_and_kinds, SETTLED_MS=0)
    _set(serving, ProblemBoard=partial(ProblemBoard, hold_ms=0, clear_ms=0))


def dot_names() -> None:
    """Create a job or queue `dot` as `.` and `dotdot` as `..`, which earlier versions accepted."""
    create, names = decide.RULES[Create], {"dot": ".", "dotdot": ".."}

    def create_renamed(tx: Transaction, command: Create) -> Any:
        names_of = {"id": names.get(command.id or "", command.id), "queue": names.get(command.queue, command.queue)}
        return create(tx, replace(command, **names_of))

    _set(decide, RULES={**decide.RULES, Create: create_renamed})


def patient_stop() -> None:
    """Wait for as long as a test takes for running deliveries, and for clients that do not read, at a stop."""
    _set(daemon, STOP_S=3_600)
    _set(dispatcher, GRACE_S=3_600)


def eager_sweeper() -> None:
    """Delete artifacts however young they are."""
    _set(serving, ArtifactSweeper=partial(ArtifactSweeper, margins=Margins(young_ms=0)))


def hour_ahead() -> None:
    """Set the wall clock one hour ahead."""
    true_ns = time.time_ns
    _set(time, time_ns=lambda: true_ns() + 3_600_000_000_000)


def replayed_time() -> None:
    """Read every clock behind the true one by the nanoseconds in the file `behind_ns` beside the store."""
    with Path(os.environ["JOBD_STORE_PATH"]).with_name("behind_ns").open("rb") as file:
        behind = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    wall_ns, monotonic_ns, clock_ns = time.time_ns, time.monotonic_ns, time.clock_gettime_ns
    _set(
        time,
        time_ns=lambda: wall_ns() - int.from_bytes(behind),
        time=lambda: time.time_ns() / 1e9,
        monotonic=lambda: (monotonic_ns() - int.from_bytes(behind)) / 1e9,
        clock_gettime_ns=lambda clock: clock_ns(clock) - int.from_bytes(behind),
    )


def slow_start() -> None:
    """Open the store after a second of work, and extend the timeout of systemd every 50 ms."""
    _open_after(lambda: asyncio.to_thread(_work, 1.0))


def hung_start() -> None:
    """Open the store a second later, without any progress, and extend the timeout of systemd every 50 ms."""
    _open_after(lambda: asyncio.sleep(1))


def endless_start() -> None:
    """Print a line when the store is to be opened, and never open it."""

    def wait() -> Awaitable[Any]:
        _print("opens: store")
        return asyncio.Event().wait()

    _open_after(wait)


def stopped_start() -> None:
    """Get SIGTERM before the first listener is open."""
    patched: Any = daemon
    open_now = patched.open_listener

    async def open_later(*args: Any) -> Any:
        _set(daemon, open_listener=open_now)
        os.kill(os.getpid(), signal.SIGTERM)
        return await open_now(*args)

    _set(daemon, open_listener=open_later)


def _open_after(delay: Callable[[], Awaitable[None]]) -> None:
    open_now = Store.open

    async def open_later(*args: Any, **named: Any) -> Any:
        await delay()
        return await open_now(*args, **named)

    _set(resources, EXTENSION_S=0.2)
    _set(Store, open=open_later)


def _work(duration_s: float) -> None:
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        pass


def slow_log() -> None:
    """Write each line of the log after 50 ms."""
    write = logging._write

    def later(text: str) -> None:
        time.sleep(0.05)
        write(text)

    _set(logging, _write=later)


def failing_reload() -> None:
    """Fail with an internal error when a reload is applied."""

    def fail(*_: Any) -> None:
        raise ValueError("the test says so")

    _set(daemon.Daemon, _apply=fail)


def failing_last_slice() -> None:
    """Write the tables only at the stop, where the disk fails."""
    one_slice()
    finish_upkeep = Store.finish_upkeep

    async def fail(self: Any) -> None:
        def apply(_: object) -> int:
            raise OSError(errno.EIO, "the test says so")

        self._projection._apply = apply
        await finish_upkeep(self)

    _set(Store, finish_upkeep=fail)


def short_pages() -> None:
    """Make pages of jobs scan 20 jobs each, in slices of 10."""
    _set(history, JobQuery=partial(JobQuery, scan=10), MAX_SCANNED=20, SLICE=10)


def one_slice() -> None:
    """Write the tables only for reads of history, at a start and at a stop, and then all in one slice."""
    _set(projection, SLICE_EVENTS=1_000_000, SLICE_BYTES=1 << 30)
    _set(store, SLICE_DELAY_S=3_600, MAX_DELAY_S=3_600)


def older_format() -> None:
    """Read records up to format 1, like an older version in a rolling upgrade."""
    assert record.FORMAT > 1
    _set(record, FORMAT=1)


def hanging_mount() -> None:
    """Get no response of the directory of artifacts. SIGUSR2 makes the writes of the store fail."""

    def hang(*_: Any) -> None:
        threading.Event().wait()

    def fail(*_: Any) -> Any:
        raise OSError("simulated disk error")

    _set(FileArtifactStore, _probe=hang, _delete=hang)
    signal.signal(signal.SIGUSR2, lambda *_: _set(Projection, append=fail))


def next_version() -> None:
    """Be AHEAD schema versions ahead, with real migrations."""

    def add_notes(conn: sqlite3.Connection) -> None:
        conn.execute("CREATE TABLE notes (seq INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT")
        conn.execute("INSERT INTO notes SELECT seq, id FROM jobs")

    def rewrite(conn: sqlite3.Connection) -> None:
        """Rewrite all rows, with a new index."""
        conn.execute("CREATE INDEX notes_text ON notes (text)")
        conn.execute("UPDATE events SET body = CAST(body || x'' AS BLOB)")
        conn.execute("UPDATE payloads SET request_hash = request_hash || ''")

    now = migrations.VERSION
    migrations.MIGRATIONS.update({now: add_notes, now + 1: rewrite})
    _set(migrations, VERSION=now + AHEAD)


def _set(owner: Any, **values: Any) -> None:
    """Replace attributes, which must exist."""
    assert values.keys() <= vars(owner).keys(), f"{owner} has not all of {list(values)}"
    for name, value in values.items():
        setattr(owner, name, value)


def _print(text: str) -> None:
    """Write the line in one call, because the log writes to stderr from another thread."""
    os.write(2, f"{text}\n".encode())


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    sys.exit(main())
