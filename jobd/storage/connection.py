"""One SQLite connection that runs functions in its own thread, or in the caller's thread while it is idle."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import types
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import Any, Final, Self, TypeVar

import aiosqlite

from jobd.storage.files import StoreFailed

T = TypeVar("T")
_CHUNK: Final = 64
MAX_BLOCK_S: Final = 0.002  # a batch of a dozen commands reaches COMMIT in a fifth of this


class FunctionConnection(sqlite3.Connection):
    """A connection in autocommit mode whose `commit` runs the next queued function.

    aiosqlite calls methods of a connection in its thread. A function of ours runs a whole batch with one switch of
    threads, and `commit` has nothing else to do: transactions end with the statement COMMIT.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queued: deque[Callable[[], object]] = deque()

    def commit(self) -> None:
        self.queued.popleft()()


class StoreConnection:
    """The connection of a store. It has one owner at a time.

    Functions that were passed to `run` own it from the call until they return in the connection's thread, even if the
    caller is cancelled. A backup owns it inside `lend`. Otherwise it is idle, and the event loop can use it.
    """

    def __init__(self, raw: FunctionConnection, thread: aiosqlite.Connection) -> None:
        self.raw = raw
        self._thread = thread
        self._started = 0  # functions passed to `run`; written by the event loop
        self._finished = 0  # of these; written by the thread
        self._lent = 0

    @classmethod
    async def open(cls, connect: Callable[[], FunctionConnection]) -> Self:
        """Start the thread, and call `connect` in it. An error of `connect` is raised once the thread has ended."""
        made: list[FunctionConnection] = []
        errors: list[Exception] = []

        def connector() -> sqlite3.Connection:
            try:
                made.append(connect())
            except Exception as error:
                # aiosqlite does not wait for its thread after an error, and the thread then needs the event loop.
                errors.append(error)
                return sqlite3.connect(":memory:")
            return made[0]

        thread = await aiosqlite.Connection(connector, _CHUNK)
        if errors:
            await thread.close()
            raise errors[0]
        return cls(made[0], thread)

    async def close(self) -> None:
        """Close the connection after all earlier calls, and end its thread."""
        await self._thread.close()

    @property
    def is_idle(self) -> bool:
        """Whether no other thread uses the connection, or will before the event loop runs again."""
        return self._started == self._finished and not self._lent

    async def run(self, fn: Callable[..., T], *args: Any, until: threading.Event | None = None) -> T:
        """Run `fn` in the connection's thread, after all earlier calls.

        With `until`, block the event loop until `fn` sets it, for at most MAX_BLOCK_S. Otherwise both threads compete
        for the GIL, and a transaction is slow to reach COMMIT. Afterwards the event loop works while the disk writes.
        """
        results: list[T] = []

        def call() -> None:
            try:
                results.append(fn(*args))
            finally:
                self._finished += 1

        self._started += 1
        self.raw.queued.append(call)
        await (self._thread.commit() if until is None else _block_until_set(self._thread.commit(), until))
        return results[0]

    def run_inline(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn` in the calling thread, which is that of the event loop and blocks. The connection must be idle."""
        if not self.is_idle:
            raise AssertionError("another thread uses the connection")
        return fn(*args)

    @contextlib.contextmanager
    def lend(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection for an online backup in another thread. It is not idle until the end."""
        self._lent += 1
        try:
            yield self.raw
        finally:
            self._lent -= 1


@types.coroutine
def _block_until_set(call: Awaitable[None], until: threading.Event) -> Generator[Any, Any, None]:
    """Await `call`, and block the event loop until `until` is set once the thread has the call."""
    steps = call.__await__()
    future = next(steps)
    until.wait(MAX_BLOCK_S)
    try:
        yield future
    except BaseException as error:
        steps.throw(error)
        raise
    yield from steps


def read_number(conn: sqlite3.Connection, sql: str) -> int:
    """Return the number that a query or pragma yields."""
    (value,) = conn.execute(sql).fetchone()
    return int(value)


def page_bytes(conn: sqlite3.Connection) -> tuple[int, int]:
    """Return the bytes of the used pages of a database, and of the free ones."""
    size, pages, free = (read_number(conn, f"PRAGMA {each}") for each in ("page_size", "page_count", "freelist_count"))
    return (pages - free) * size, free * size


def journal_mode(conn: sqlite3.Connection, path: str, mode: str) -> None:
    """Change the journal mode. Raises StoreFailed if SQLite keeps the old mode, which is how it reports errors."""
    (now,) = conn.execute(f"PRAGMA journal_mode = {mode}").fetchone()
    if now != mode:
        raise StoreFailed(f"{path}: the disk failed: the journal mode is still {now}")
