"""Variants of the daemon for tests: `python -m tests.support.daemon_variants VARIANT serve …`."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from jobd import daemon, logging, resources, serving
from jobd.cli.daemon.main import main
from jobd.cluster import hand_over
from jobd.core import decide
from jobd.core.transaction import Transaction
from jobd.engine import history
from jobd.engine.actor import Actor
from jobd.http.server import HttpListener
from jobd.journal import record
from jobd.maintenance.artifact_sweeper import ArtifactSweeper
from jobd.model.commands import Create
from jobd.model.storage import DiskFull, JobQuery
from jobd.monitoring.alerts import Alerts
from jobd.storage import store
from jobd.storage.artifacts.base import Margins
from jobd.storage.store import Store
from jobd.storage.tables import projection
from jobd.storage.tables.projection import Projection
from jobd.webhooks import dispatcher
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.retry import RetryPolicy


def hung_actor() -> None:
    """Make the actor hang after SIGUSR2. The event loop still runs."""

    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    def let_hang(*_: Any) -> None:
        Actor._turn = hang  # type: ignore[method-assign,assignment]

    signal.signal(signal.SIGUSR2, let_hang)


def prompt_alerts() -> None:
    """Make alerts fire and resolve as soon as a check finds a change."""
    patched: Any = serving
    patched.Alerts = partial(Alerts, hold_ms=0, clear_ms=0)


def dot_names() -> None:
    """Create a job or queue `dot` as `.` and `dotdot` as `..`, which earlier versions accepted."""
    patched: Any = decide
    create, names = decide.RULES[Create], {"dot": ".", "dotdot": ".."}

    def create_renamed(tx: Transaction, command: Create) -> Any:
        names_of = {"id": names.get(command.id or "", command.id), "queue": names.get(command.queue, command.queue)}
        return create(tx, replace(command, **names_of))

    patched.RULES = {**decide.RULES, Create: create_renamed}


def quick_retries() -> None:
    """Retry deliveries of webhooks after fractions of a second."""
    policy = RetryPolicy(retry_ms=100, max_retry_ms=500, pause_ms=100, max_pause_ms=500)
    patched: Any = serving
    patched.DispatchContext = partial(DispatchContext, retry_policy=policy)


def patient_stop() -> None:
    """Wait for as long as a test takes for running deliveries, and for clients that do not read, at a stop."""
    stopping: Any = daemon
    delivering: Any = dispatcher
    assert {"STOP_S", "GRACE_S"} <= stopping.__dict__.keys() | delivering.__dict__.keys()
    stopping.STOP_S = delivering.GRACE_S = 3_600


def short_takeovers() -> None:
    """End an attempt to take leadership after the length of the lease."""
    from jobd.journal.postgres import leader_session

    patched: Any = leader_session
    assert "TAKE_OVER_S" in patched.__dict__
    patched.TAKE_OVER_S = 0


def full_tables() -> None:
    """Find the disk full when the tables are written, after SIGUSR2. Hand over leadership soon after."""

    def be_full(*_: Any) -> None:
        raise DiskFull("the test says so")

    patched: Any = Projection
    handing_over: Any = hand_over
    handing_over.SETTLED_S = 1.0
    signal.signal(signal.SIGUSR2, lambda *_: setattr(patched, "_project_slice", be_full))


def idle_sweeper() -> None:
    """Delete no artifacts."""

    async def leave_all(*_: Any) -> bool:
        return False

    patched: Any = ArtifactSweeper
    assert "_slice" in patched.__dict__
    patched._slice = leave_all


def eager_sweeper() -> None:
    """Delete artifacts however young they are."""
    patched: Any = serving
    patched.ArtifactSweeper = partial(ArtifactSweeper, margins=Margins(young_ms=0))


def hour_ahead() -> None:
    """Set the wall clock one hour ahead."""
    patched: Any = time
    true_ns = time.time_ns
    patched.time_ns = lambda: true_ns() + 3_600_000_000_000


def replayed_time() -> None:
    """Read every clock behind the true one by the nanoseconds in the file `behind_ns` beside the store."""
    with Path(os.environ["JOBD_STORE_PATH"]).with_name("behind_ns").open("rb") as file:
        behind = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    patched: Any = time
    wall_ns, monotonic_ns, clock_ns = time.time_ns, time.monotonic_ns, time.clock_gettime_ns
    patched.time_ns = lambda: wall_ns() - int.from_bytes(behind)
    patched.time = lambda: patched.time_ns() / 1e9
    patched.monotonic = lambda: (monotonic_ns() - int.from_bytes(behind)) / 1e9
    patched.clock_gettime_ns = lambda clock: clock_ns(clock) - int.from_bytes(behind)


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
        patched.open_listener = open_now
        os.kill(os.getpid(), signal.SIGTERM)
        return await open_now(*args)

    patched.open_listener = open_later


def _open_after(delay: Callable[[], Awaitable[None]]) -> None:
    patched: Any = resources
    open_now, patched.EXTENSION_S = Store.open, 0.2

    async def open_later(*args: Any, **named: Any) -> Any:
        await delay()
        return await open_now(*args, **named)

    patched.Store.open = open_later


def _work(duration_s: float) -> None:
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        pass


def slow_log() -> None:
    """Write each line of the log after 50 ms."""
    patched: Any = logging
    write = logging._write

    def later(text: str) -> None:
        time.sleep(0.05)
        write(text)

    patched._write = later


def failing_reload() -> None:
    """Fail with an internal error when a reload is applied."""

    def fail(*_: Any) -> None:
        raise ValueError("the test says so")

    patched: Any = daemon.Daemon
    assert "_apply" in patched.__dict__
    patched._apply = fail


def failing_last_slice() -> None:
    """Write the tables only at the stop, where the disk fails."""
    one_slice()
    patched: Any = store.Store
    finish_upkeep = patched.finish_upkeep

    async def fail(self: Any) -> None:
        def apply(_: object) -> int:
            raise OSError(errno.EIO, "the test says so")

        self._projection._apply = apply
        await finish_upkeep(self)

    patched.finish_upkeep = fail


def short_pages() -> None:
    """Make pages of jobs scan 20 jobs each, in slices of 10."""
    patched: Any = history
    assert {"JobQuery", "MAX_SCANNED", "SLICE"} <= patched.__dict__.keys()
    patched.JobQuery, patched.MAX_SCANNED, patched.SLICE = partial(JobQuery, scan=10), 20, 10


def one_slice() -> None:
    """Write the tables only for reads of history, at a start and at a stop, and then all in one slice."""
    journal: Any = projection
    tables: Any = store
    found = journal.__dict__.keys() | tables.__dict__.keys()
    assert {"SLICE_EVENTS", "SLICE_BYTES", "SLICE_DELAY_S", "MAX_DELAY_S"} <= found
    journal.SLICE_EVENTS = tables.SLICE_EVENTS = 1_000_000
    journal.SLICE_BYTES = 1 << 30
    tables.SLICE_DELAY_S = tables.MAX_DELAY_S = 3_600


def older_format() -> None:
    """Read records up to format 1, like an older version in a rolling upgrade."""
    patched: Any = record
    assert patched.FORMAT > 1
    patched.FORMAT = 1


def reported_stop() -> None:
    """Print to stderr in which order the parts stop."""
    _report(HttpListener, "stop", "listener")
    _report(Actor, "stop", "actor")
    _report(Store, "close", "store")


def _report(kind: type, name: str, part: str) -> None:
    """Print a line when `kind.name` begins, and when it has ended if it is a coroutine."""
    method: Callable[..., Any] = getattr(kind, name)

    async def slowly(*args: Any, **named: Any) -> Any:
        _print(f"begins: {part}")
        result = await method(*args, **named)
        _print(f"ended: {part}")
        return result

    def at_once(*args: Any, **named: Any) -> Any:
        _print(f"begins: {part}")
        return method(*args, **named)

    setattr(kind, name, at_once if kind is Actor else slowly)


def _print(text: str) -> None:
    """Write the line in one call, because the log writes to stderr from another thread."""
    os.write(2, f"{text}\n".encode())


VARIANTS: Final = {
    each.__name__: each
    for each in (
        hung_actor,
        prompt_alerts,
        dot_names,
        quick_retries,
        patient_stop,
        short_takeovers,
        full_tables,
        idle_sweeper,
        eager_sweeper,
        hour_ahead,
        replayed_time,
        slow_log,
        failing_reload,
        slow_start,
        hung_start,
        endless_start,
        stopped_start,
        short_pages,
        one_slice,
        failing_last_slice,
        older_format,
        reported_stop,
    )
}

if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()
    sys.exit(main())
