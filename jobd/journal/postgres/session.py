"""A session on the server that accepts writes: with the settings that durability needs, checked."""

from __future__ import annotations

import asyncio
import contextlib
import math
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, TypeVar

import asyncpg

from jobd.journal.postgres.errors import INIT, explain, most_useful, pooler
from jobd.journal.url import JournalUrl
from jobd.model.journal import JournalMisconfigured, JournalUnavailable

T = TypeVar("T")

VERSION: Final = 1  # of the tables
CONNECT_S: Final = 3.0
STAGGER_S: Final = 0.3  # between the connection attempts to several hosts
SILENT_S: Final = 1.5  # for the rest of them after one has failed, such as a standby
COMMIT_S: Final = 5.0  # for a synchronous standby to acknowledge an empty commit
OLDEST: Final = 140000  # server_version_num: DETACH PARTITION CONCURRENTLY is new in 14

_LOCKS: Final = 0x6A6F6264  # first key of the advisory locks: "jobd"

# A default of the role or database must not override them. Some are unknown to older servers.
_SETTINGS: Final = {
    "synchronous_commit": "on",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "client_min_messages": "notice",  # a cancelled wait for a synchronous standby ends with a warning, and no error
}
_EXPECTED: Final = {**_SETTINGS, "fsync": "on", "full_page_writes": "on", "transaction_read_only": "off"}
_SET: Final = """
    SELECT set_config(given.name, given.value, false) FROM unnest($1::text[], $2::text[]) AS given(name, value)
    JOIN pg_settings USING (name)"""
_READ_BACK: Final = "SELECT name, setting FROM pg_settings WHERE name = ANY ($1::text[])"
# The server ends the statement of a closed connection if it waits for a lock, but not if it waits for a synchronous
# standby. Otherwise, attempts to take leadership would use up the connections of the server.
_CHECK_CONNECTION: Final = "SELECT set_config('client_connection_check_interval', $1, false)"
CHECK_INTERVAL: Final = "1s"
_SERVER: Final = (
    "SELECT current_setting('server_version_num')::int, current_setting('server_version'), pg_backend_pid()"
)
_TABLES: Final = "SELECT max(version) FROM jobd_schema"
_EMPTY_COMMIT: Final = "SELECT pg_logical_emit_message(true, 'jobd', '')"
_CLUSTER: Final = "SELECT cluster_id FROM jobd_journals WHERE name = $1"


class Target:
    """The server and the journal that sessions are for. `cluster_id` is known after the first session."""

    def __init__(self, url: JournalUrl, name: str) -> None:
        self.url = url
        self.name = name
        self.cluster_id: str | None = None
        self._latest = 0  # index of the host that was connected last

    async def connect(self, *, is_new: bool = False) -> Any:
        """Return a connection with checked settings, to the first host that accepts writes.

        A journal that `is_new` need not exist. Raises JournalUnavailable.
        """
        left = sorted(range(len(self.url.hosts)), key=lambda each: each == self._latest)  # the latest host is last
        attempts: dict[asyncio.Task[tuple[int, Any]], str] = {}
        failures: dict[asyncio.Task[tuple[int, Any]], JournalUnavailable] = {}
        chosen = None
        try:
            while left or len(failures) < len(attempts):
                if left:
                    host = self.url.hosts[left[-1]]
                    attempts[asyncio.create_task(self._attempt(left.pop(), is_new))] = host
                limit_s = STAGGER_S if left else SILENT_S if failures else None
                pending = [each for each in attempts if each not in failures]
                done, _ = await asyncio.wait(pending, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    if (error := each.exception()) is None:
                        chosen = each
                        self._latest, conn = each.result()
                        return conn
                    failures[each] = explain(error, self.url, attempts[each])
                if not done and not left:
                    failures |= {each: explain(TimeoutError(), self.url, attempts[each]) for each in pending}
        finally:
            for each in attempts:
                if each is not chosen:
                    each.cancel()
                    each.add_done_callback(_discard)
        raise most_useful(list(failures.values()))

    @contextlib.asynccontextmanager
    async def session(self, limit_s: float, *, is_new: bool = False) -> AsyncIterator[Any]:
        """Yield a connection, which is closed at the end or after `limit_s`. Raises JournalUnavailable."""
        conn = await self.connect(is_new=is_new)
        try:
            with limited(conn, limit_s):
                yield conn
        except Exception as error:
            raise explain(error, self.url) from error
        finally:
            conn.terminate()

    async def _attempt(self, index: int, is_new: bool) -> tuple[int, Any]:
        url, host = self.url.urls[index], self.url.hosts[index]
        conn = None
        try:
            async with asyncio.timeout(CONNECT_S):
                conn = await asyncpg.connect(
                    url,
                    target_session_attrs="read-write",
                    timeout=CONNECT_S,
                    command_timeout=None,  # a timeout would cancel the statement
                    max_cached_statement_lifetime=0,
                    server_settings={"application_name": f"jobd {self.name}", "statement_timeout": "0"},
                )
                await check_session(conn, host)
                if not is_new:
                    await self._check_tables(conn)
                return index, conn
        except BaseException as error:
            if conn is not None:
                conn.terminate()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise explain(error, self.url, host) from error

    async def _check_tables(self, conn: Any) -> None:
        """Raise JournalMisconfigured unless the tables and the journal are the expected ones."""
        version = await conn.fetchval(_TABLES)
        check_version(version, self.url.database)
        found = await conn.fetchval(_CLUSTER, self.name)
        if found is None:
            raise JournalMisconfigured(f'Database "{self.url.database}" has no journal "{self.name}": {INIT}')
        if self.cluster_id not in (None, found):
            text = "another database took its place. Restart jobd if this was intended"
            raise JournalMisconfigured(f'The id of journal "{self.name}" has changed: {text}')
        self.cluster_id = found


def check_version(version: int | None, database: str) -> None:
    """Raise JournalMisconfigured if the tables are of a version that this jobd does not know."""
    if version is None:
        raise JournalMisconfigured(f'Database "{database}" has incomplete tables of jobd: {INIT}')
    if version > VERSION:
        text = f"this jobd supports version {VERSION}. Upgrade jobd on this node"
        raise JournalMisconfigured(f'Database "{database}" has tables of version {version}, and {text}')


async def check_session(conn: Any, host: str) -> None:
    """Set what durability needs, and read it back. Raises JournalMisconfigured."""
    number, text, pid = await conn.fetchrow(_SERVER)
    if number < OLDEST:
        raise JournalMisconfigured(f"PostgreSQL {text} at {host} is too old: jobd needs version 14 or newer")
    if pid != conn.get_server_pid():
        raise pooler(host)
    await conn.fetch(_SET, list(_SETTINGS), list(_SETTINGS.values()))
    with contextlib.suppress(asyncpg.InvalidParameterValueError):  # the system of the server cannot do it
        await conn.fetchval(_CHECK_CONNECTION, CHECK_INTERVAL)
    for name, value in await conn.fetch(_READ_BACK, list(_EXPECTED)):
        if name == "transaction_read_only" and value != "off":
            raise asyncpg.TargetServerAttributeNotMatched
        if value != _EXPECTED[name]:
            raise JournalMisconfigured(
                f"PostgreSQL at {host} has {name} = {value}, which can lose acknowledged records: "
                f"set it to {_EXPECTED[name]}"
            )


def _discard(attempt: asyncio.Task[tuple[int, Any]]) -> None:
    """Close the connection of an attempt that was too late."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result()[1].terminate()


class JournalSession:
    """A connection that is made when it is first needed, and again after it was lost. One caller at a time."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._conn: Any = None
        self._lock = asyncio.Lock()
        self._is_closed = False
        self._ends_s = math.inf  # time limit of the current caller
        self._timer: asyncio.TimerHandle | None = None  # not after `_ends_s`
        self.warnings = 0

    async def run(self, limit_s: float, work: Callable[[Any], Awaitable[T]]) -> T:
        """Return the result of `work` with the connection, which is closed after `limit_s`.

        Raises JournalUnavailable if there is no connection, and the errors of statements.
        """
        async with self._lock:
            if self._is_closed:
                raise JournalUnavailable("The journal is closed")
            if self._conn is None or self._conn.is_closed():
                self._conn = await self._target.connect()
                self._conn.add_log_listener(self._note)
            loop = asyncio.get_running_loop()
            self._ends_s = loop.time() + limit_s
            if self._timer is None or self._timer.when() > self._ends_s:
                self._set_timer()
            try:
                return await work(self._conn)
            finally:
                self._ends_s = math.inf

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._ends_s, self._check_time)

    def _check_time(self) -> None:
        """Close the connection if the current caller has reached its limit. One timer serves many callers."""
        self._timer = None
        if self._ends_s <= asyncio.get_running_loop().time():
            self._conn.terminate()
        elif self._ends_s < math.inf:
            self._set_timer()

    def _note(self, _: Any, message: Any) -> None:
        """Count a warning. If an operator cancels a wait for a synchronous standby, it ends with one and no error."""
        if message.severity_en == "WARNING":
            self.warnings += 1

    async def close(self, limit_s: float = 0) -> None:
        """Close the connection, after at most `limit_s` for a statement that still runs."""
        self._is_closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s), self._lock:
                pass
        if self._timer is not None:
            self._timer.cancel()
        if self._conn is not None:
            self._conn.terminate()


async def check_commit(conn: Any) -> None:
    """Raise JournalUnavailable if no synchronous standby acknowledges a commit in time. It commits nothing."""
    try:
        async with asyncio.timeout(COMMIT_S):
            await conn.execute(_EMPTY_COMMIT)
    except TimeoutError:
        with contextlib.suppress(Exception):
            await conn.close(timeout=CONNECT_S)  # after the server has ended the statement
        raise JournalUnavailable(
            "A write waits for a synchronous standby of PostgreSQL: start one that synchronous_standby_names names, or "
            "correct that setting"
        ) from None


@contextlib.contextmanager
def limited(conn: Any, limit_s: float) -> Iterator[None]:
    """Close the connection after `limit_s`. A timeout of asyncpg would cancel the statement in the server."""
    timer = asyncio.get_running_loop().call_later(limit_s, conn.terminate)
    try:
        yield
    finally:
        timer.cancel()


def lock_keys(cluster_id: str, purpose: str) -> tuple[int, int]:
    """Return the keys of an advisory lock of a journal."""
    crc = zlib.crc32(f"{cluster_id} {purpose}".encode())
    return _LOCKS, crc - (1 << 32) if crc >= 1 << 31 else crc
