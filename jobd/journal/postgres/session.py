"""A session on the server that accepts writes: with the settings that durability needs, checked."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Final, TypeVar

import asyncpg

from jobd.journal.postgres.postgres_errors import INIT, explain, is_unsupported, most_useful, pooler
from jobd.journal.url import JournalUrl
from jobd.model.journal import JournalMisconfigured, JournalUnavailable

T = TypeVar("T")

VERSION: Final = 1  # of the tables
CONNECT_S: Final = 3.0
OTHERS_S: Final = 0.3  # for other hosts after one accepts writes
SILENT_S: Final = 1.5  # for other hosts after one has failed, such as a standby
KEEPALIVE_S: Final = 1
LEASE_MS: Final = 10_000  # for commands
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
_CLUSTER: Final = "SELECT cluster_id, epoch, number FROM jobd_journals WHERE name = $1"
_RECORDS: Final = "SELECT number FROM jobd_journals WHERE name = $1 AND cluster_id = $2"
_TIMELINE: Final = "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)"


class Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection to `host`, with the `timeline` of this server; 0 if it does not tell.

    `position` is the epoch and the last record of the journal when it was connected.
    """

    host = ""
    timeline = 0
    cluster_id: str | None = None
    position: Sequence[int] = (0, 0)

    def __init__(self, protocol: Any, transport: asyncio.Transport, *others: Any) -> None:
        super().__init__(protocol, transport, *others)
        self._socket = transport.get_extra_info("socket")

    @property
    def branch(self) -> tuple[int, ...]:
        """The server with the highest one has the latest records. Servers can have been promoted to one timeline."""
        return (self.timeline, *self.position)

    def close_if_silent(self, limit_ms: int) -> None:
        """Let the system close the connection if the other machine acknowledges nothing for `limit_ms`."""
        opened = self._socket
        if opened.family == socket.AF_UNIX:
            return
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)


class Target:
    """The server and the journal that sessions are for. `cluster_id` is known after the first session.

    `timeline` is the highest that was seen, and no session is on a lower one. `writable` are the hosts that accepted
    writes when they were last asked, the one to use first.
    """

    def __init__(self, url: JournalUrl, name: str, *, lease_ms: int = LEASE_MS, timeline: int = 0) -> None:
        self.url = url
        self.name = name
        self.cluster_id: str | None = None
        self.timeline = timeline
        self.writable: list[str] = []
        self._lease_ms = lease_ms

    async def connect(self, *, is_new: bool = False) -> Connection:
        """Return a connection with checked settings, to the host with the highest timeline that accepts writes.

        A former primary that comes back accepts writes as well, with a lower timeline. A journal that `is_new` need not
        exist. Raises JournalUnavailable.
        """
        found, failures = await self._ask(is_new)
        best = max(found, key=lambda each: each.branch, default=None)
        for each in found:
            if each is not best:
                each.terminate()
        if best is None:
            raise most_useful(failures)
        if 0 < best.timeline < self.timeline:
            best.terminate()
            raise most_useful([*failures, self._superseded(best)])
        self.note(found)
        self.cluster_id = best.cluster_id or self.cluster_id
        return best

    async def find_writable(self) -> None:
        """Find the hosts that accept writes. Sessions on others than that with the highest timeline end."""
        found, _ = await self._ask(False)
        for each in found:
            each.terminate()
        self.note(found)

    def note(self, found: Sequence[Connection]) -> None:
        self.writable = [each.host for each in sorted(found, key=attrgetter("branch"), reverse=True)]
        self.timeline = max([self.timeline, *(each.timeline for each in found)])

    async def records(self) -> dict[str, int | None]:
        """Return the number of the last record of this journal on each host. None: the host cannot be asked."""
        numbers = await asyncio.gather(*(self._number(index) for index in range(len(self.url.hosts))))
        return dict(zip(self.url.hosts, numbers, strict=True))

    async def _number(self, index: int) -> int | None:
        try:
            async with asyncio.timeout(CONNECT_S):
                conn = await self._open(index, "any")
                try:
                    number: int | None = await conn.fetchval(_RECORDS, self.name, self.cluster_id)
                    return number
                finally:
                    conn.terminate()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return None

    async def _ask(self, is_new: bool) -> tuple[list[Connection], list[JournalUnavailable]]:
        """Return a connection to each host that accepts writes, and the failures of the others."""
        hosts = self.url.hosts
        attempts = {asyncio.create_task(self._attempt(index, is_new)): hosts[index] for index in range(len(hosts))}
        found: list[Connection] = []
        failures: list[JournalUnavailable] = []
        pending = set(attempts)
        try:
            while pending:
                limit_s = OTHERS_S if found else SILENT_S if failures else None
                done, pending = await asyncio.wait(pending, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    if (error := each.exception()) is None:
                        found.append(each.result())
                    else:
                        failures.append(explain(error, self.url, attempts[each]))
                if not done:
                    break
        except BaseException:
            for conn in found:
                conn.terminate()
            raise
        finally:
            for each in pending:
                each.cancel()
                each.add_done_callback(_discard)
        failures += [explain(TimeoutError(), self.url, attempts[each]) for each in pending]
        return sorted(found, key=lambda each: hosts.index(each.host)), failures

    def _superseded(self, conn: Connection) -> JournalUnavailable:
        text = "it is a former primary, or was restored. Stop it and start the present primary, or, if it was restored"
        return JournalUnavailable(
            f"PostgreSQL at {conn.host} has timeline {conn.timeline}, but this node has seen timeline {self.timeline}: "
            f"{text} on purpose, stop jobd and run `jobd join` on this node"
        )

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

    async def _attempt(self, index: int, is_new: bool) -> Connection:
        host = self.url.hosts[index]
        conn = None
        try:
            async with asyncio.timeout(CONNECT_S):
                conn = await self._open(index, "read-write")
                await check_session(conn, host)
                conn.timeline = await timeline_of(conn)
                if not is_new:
                    await self._check_tables(conn)
                return conn
        except BaseException as error:
            if conn is not None:
                conn.terminate()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise explain(error, self.url, host) from error

    async def _open(self, index: int, state: str) -> Connection:
        conn: Connection = await asyncpg.connect(
            self.url.urls[index],
            target_session_attrs=state,
            timeout=CONNECT_S,
            command_timeout=None,  # a timeout would cancel the statement
            max_cached_statement_lifetime=0,
            connection_class=Connection,
            server_settings={"application_name": f"jobd {self.name}", "statement_timeout": "0"},
        )
        conn.host = self.url.hosts[index]
        conn.close_if_silent(self._lease_ms)
        return conn

    async def _check_tables(self, conn: Connection) -> None:
        """Raise JournalMisconfigured unless the tables and the journal are the expected ones."""
        version = await conn.fetchval(_TABLES)
        check_version(version, self.url.database)
        found = await conn.fetchrow(_CLUSTER, self.name)
        if found is None:
            raise JournalMisconfigured(f'Database "{self.url.database}" has no journal "{self.name}": {INIT}')
        conn.cluster_id, *conn.position = found
        if self.cluster_id not in (None, conn.cluster_id):
            text = "another database took its place. Restart jobd if this was intended"
            raise JournalMisconfigured(f'The id of journal "{self.name}" has changed: {text}')


async def timeline_of(conn: Any) -> int:
    """Return the timeline of a primary, 0 if it does not tell: some managed servers have their own replication.

    The control file, which pg_control_checkpoint() reads, has the timeline of the latest checkpoint, which may be
    older than the promotion.
    """
    try:
        return int(await conn.fetchval(_TIMELINE), 16)
    except Exception as error:
        if not is_unsupported(error):
            raise
        return 0


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


def _discard(attempt: asyncio.Task[Connection]) -> None:
    """Close the connection of an attempt that was too late."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().terminate()


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
            if self._conn is not None and 0 < self._conn.timeline < self._target.timeline:
                self._conn.terminate()  # another server was promoted while this one is still running
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
