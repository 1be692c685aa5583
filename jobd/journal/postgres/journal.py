"""The shared journal in PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

from jobd.journal import url as journal_url
from jobd.journal.checksum import checked
from jobd.journal.postgres import nodes, partitions, schema, snapshots
from jobd.journal.postgres.leader_session import EXPIRES, NOW, LeaderSession, head_of
from jobd.journal.postgres.postgres_errors import explain, was_rejected
from jobd.journal.postgres.session import JournalSession, Target, check_commit, lock_keys
from jobd.journal.shielding import to_end
from jobd.model.journal import BadRecord, Head, JournalHealth, NodeEntry, NodeTooOld, Record, SnapshotInfo

T = TypeVar("T")

READ_S: Final = 10.0  # time limit of a read of much data
TRIM_S: Final = 60.0
READ_BYTES: Final = 16 << 20

# The leader's session holds the lock exclusively. A standby takes it shared, for this statement only.
_HEAD: Final = f"""
    SELECT number, epoch, holder, url, acked, {EXPIRES}, {NOW}, pg_try_advisory_xact_lock_shared($2, $3)
    FROM jobd_journals WHERE name = $1"""
_READ: Final = """
    SELECT number, first_event, last_event, epoch, at, body, crc FROM (
        SELECT *, sum(octet_length(body)) OVER (ORDER BY number) - octet_length(body) AS bytes_before
        FROM (SELECT * FROM jobd_journal WHERE name = $1 AND number > $2 ORDER BY number LIMIT $3) AS following
    ) AS sized WHERE bytes_before < $4 ORDER BY number"""
_NUMBER: Final = "SELECT number FROM jobd_journals WHERE name = $1"
_EPOCHS: Final = "SELECT epoch, first_number FROM jobd_epochs WHERE name = $1 ORDER BY epoch"
_HEALTH: Final = """
    SELECT current_setting('synchronous_standby_names') <> '',
        coalesce(bool_or(wait_event = 'SyncRep' AND clock_timestamp() - query_start > interval '1 s'), false),
        greatest(
            0,
            max(extract(epoch FROM clock_timestamp() - xact_start)) FILTER (WHERE backend_type <> 'autovacuum worker'),
            (SELECT max(extract(epoch FROM clock_timestamp() - prepared)) FROM pg_prepared_xacts
             WHERE database = current_database())
        )::float8
    FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"""


class PostgresJournal:
    """A SharedJournal. A lost connection is re-established when it is next needed.

    One session runs the statements of the leader, and one reads. Others are opened for snapshots and trimming.
    """

    def __init__(self, target: Target, lease_ms: int) -> None:
        assert target.cluster_id is not None
        self.cluster_id = target.cluster_id
        self._target = target
        self._name = target.name
        self._leader = LeaderSession(target, lease_ms)
        self._reading = JournalSession(target)
        self._lease_s = lease_ms / 1000
        self._search: asyncio.Task[None] | None = None
        self.on_timeline: Callable[[int], Awaitable[None]] = _ignore  # with the highest timeline that was seen
        self._keys = lock_keys(self.cluster_id, "leader")

    @classmethod
    async def open(cls, url: str, name: str, lease_ms: int, timeline: int = 0) -> PostgresJournal:
        """Connect, and check the server, the tables and the privileges. Raises JournalUnavailable.

        No server with a lower `timeline` is used.
        """
        target = Target(journal_url.parse(url), name, lease_ms=lease_ms, timeline=timeline)
        async with target.session(READ_S) as conn:
            await schema.check_privileges(conn, target.url.role, name)
            await schema.add_columns(conn)
        journal = cls(target, lease_ms)
        await journal._leader.connect()
        return journal

    @classmethod
    def later(cls, url: str, name: str, lease_ms: int, cluster_id: str, timeline: int) -> PostgresJournal:
        """Return a journal that is connected when it is first needed, for a node that knows its `cluster_id`."""
        target = Target(journal_url.parse(url), name, lease_ms=lease_ms, timeline=timeline)
        target.cluster_id = cluster_id
        return cls(target, lease_ms)

    async def check_commit(self) -> None:
        """Raise JournalUnavailable if no synchronous standby acknowledges a commit in a few seconds."""
        conn = await self._target.connect()
        try:
            await check_commit(conn)
        finally:
            conn.terminate()

    # -- The leader --

    async def append(self, record: Record, acked: int) -> None:
        await to_end(self._leader.append(record, acked))

    async def renew(self, acked: int) -> int:
        return await to_end(self._leader.renew(acked))

    async def take_over(self, seen: Head, *, holder: str, url: str, epoch: int) -> Head | None:
        return await to_end(self._leader.take_over(seen, holder, url, epoch))

    async def resolve(self, epoch: int) -> Head:
        return await to_end(self._leader.resolve(epoch))

    async def release(self) -> None:
        await to_end(self._leader.release())

    async def trim(self, upto: int) -> None:
        async with self._target.session(TRIM_S) as conn:
            await partitions.trim(conn, self._name, upto)

    # -- Every node --

    async def head(self) -> Head:
        return head_of(*await self._read(lambda conn: conn.fetchrow(_HEAD, self._name, *self._keys)))

    async def read(self, after: int, limit: int) -> list[Record]:
        rows = await self._read_rows(after, limit)
        if not rows and await self._read(lambda conn: conn.fetchval(_NUMBER, self._name)) > after:
            rows = await self._read_rows(after, limit)  # the first may have been appended in between
            if not rows:
                raise BadRecord(after + 1, "is missing")
        return checked(rows, after)

    async def _read_rows(self, after: int, limit: int) -> list[Any]:
        return await self._read(lambda conn: conn.fetch(_READ, self._name, after, limit, READ_BYTES), READ_S)

    async def epochs(self) -> list[tuple[int, int]]:
        return [(epoch, first) for epoch, first in await self._read(lambda conn: conn.fetch(_EPOCHS, self._name))]

    async def register(self, node: NodeEntry) -> str | None:
        row = await self._read(lambda conn: nodes.register(conn, self._name, node))
        if row is None:
            raise NodeTooOld(node)
        return None if row[0] == node.process else row[0]

    async def nodes(self) -> list[NodeEntry]:
        return await self._read(lambda conn: nodes.entries(conn, self._name))

    async def forget(self, name: str) -> None:
        await self._read(lambda conn: nodes.forget(conn, self._name, name))

    async def write_snapshot(self, number: int, parts: AsyncIterable[bytes], pause_s: float = 0.05) -> bool:
        return await snapshots.write(self._target, number, parts, pause_s)

    async def snapshots(self) -> list[SnapshotInfo]:
        return await self._read(lambda conn: snapshots.complete(conn, self._name), READ_S)

    def read_snapshot(self, number: int) -> AsyncIterator[bytes]:
        return snapshots.read(self._target, number)

    async def drop_snapshot(self, number: int) -> None:
        await self._read(lambda conn: snapshots.drop(conn, self._name, number), READ_S)

    async def health(self) -> JournalHealth:
        async def work(conn: Any) -> tuple[Any, ...]:
            return *await conn.fetchrow(_HEALTH), conn.timeline

        is_synchronous, is_waiting, oldest_s, timeline = await self._read(work)
        await self.on_timeline(self._target.timeline)
        self._start_search()
        writable = tuple(self._target.writable)
        return JournalHealth(is_synchronous, is_waiting, int(oldest_s * 1000), timeline, writable)

    async def records(self) -> dict[str, int | None]:
        """Return the number of the last record on each server; None for a server that cannot be asked."""
        return await self._target.records()

    def _start_search(self) -> None:
        """Ask all hosts which of them accept writes. Health does not wait for it."""
        if len(self._target.url.hosts) > 1 and (self._search is None or self._search.done()):
            self._search = asyncio.create_task(self._target.find_writable())

    async def close(self) -> None:
        if self._search is not None:
            self._search.cancel()
        await self._leader.close()
        await self._reading.close()

    async def _read(self, statement: Callable[[Any], Awaitable[T]], limit_s: float | None = None) -> T:
        """Run a statement that does not change leadership, within a lease. A cancelled caller does not cancel it.

        All of them share a session, so a poll of a standby waits for none that is longer.
        """

        async def work(conn: Any) -> T:
            try:
                return await statement(conn)
            except Exception as error:
                if not was_rejected(error):
                    conn.terminate()
                raise explain(error, self._target.url) from error

        return await to_end(self._reading.run(self._lease_s if limit_s is None else limit_s, work))


async def _ignore(_: int) -> None:
    pass


async def create(url: str, name: str, cluster_id: str, *, number: int = 0, epoch: int = 0) -> schema.Created:
    """Create the tables and a journal, which continues after record `number`. Raises JournalUnavailable."""
    target = Target(journal_url.parse(url), name)
    async with target.session(TRIM_S, is_new=True) as conn:
        await check_commit(conn)
        return await schema.create(conn, target.url.database, name, cluster_id, number, epoch)
