"""The statements of the leader: they append, renew the lease, and take it. None is ever cancelled."""

from __future__ import annotations

import asyncio
from typing import Any, Final, NoReturn

from jobd.journal.checksum import checksum
from jobd.journal.postgres import partitions
from jobd.journal.postgres.postgres_errors import explain, is_disk_full, lacks_partition, was_rejected
from jobd.journal.postgres.session import JournalSession, Target, lock_keys
from jobd.journal.record import format_of
from jobd.model.journal import Fenced, Head, JournalOutcomeUnknown, JournalUnavailable, Record
from jobd.model.storage import JournalDiskFull

TAKE_OVER_S: Final = 10.0  # at least: a takeover waits for an append that waits for a standby
CLOSE_S: Final = 1.0
EXTEND_S: Final = 30.0
LOCK_TRIES: Final = 3
LOCK_RETRY_S: Final = 0.002

NOW: Final = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
EXPIRES: Final = "(extract(epoch FROM expires) * 1000000)::bigint"

# One statement: the row lock orders an append against a takeover.
_APPEND: Final = """
    WITH head AS (
        UPDATE jobd_journals SET number = number + 1, acked = $4, expires = clock_timestamp() + $5 * interval '1 ms',
            format = greatest(format, $12)
        WHERE name = $1 AND number = $2 AND epoch = $3 RETURNING number
    )
    INSERT INTO jobd_journal (name, number, first_event, last_event, epoch, at, crc, body)
    SELECT $1, head.number, $6, $7, $8, $9, $10, $11 FROM head RETURNING number"""
_RENEW: Final = f"""
    UPDATE jobd_journals SET acked = $3, expires = clock_timestamp() + $4 * interval '1 ms'
    WHERE name = $1 AND epoch = $2 RETURNING {NOW}"""
_RELEASE: Final = """
    UPDATE jobd_journals SET holder = NULL, expires = clock_timestamp() WHERE name = $1 AND epoch = $2"""
# The advisory lock is taken before other nodes see the takeover.
_LEAD: Final = f"""
    WITH taken AS (
        UPDATE jobd_journals
        SET epoch = greatest(epoch + 1, $2), expires = clock_timestamp() + $3 * interval '1 ms', %s RETURNING *
    ), noted AS (INSERT INTO jobd_epochs (name, epoch, first_number) SELECT name, epoch, number + 1 FROM taken)
    SELECT pg_try_advisory_lock($4, $5), number, epoch, holder, url, acked, {EXPIRES}, {NOW} FROM taken"""
_TAKE_OVER: Final = _LEAD % f"holder = $6, url = $7 WHERE name = $1 AND (epoch, number, {EXPIRES}) = ($8, $9, $10)"
_RESOLVE: Final = _LEAD % "url = url WHERE name = $1 AND holder = $6"

_LOCK: Final = "SELECT pg_try_advisory_lock($1, $2)"
_END_HOLDER: Final = """
    SELECT pg_terminate_backend(pid) FROM pg_locks
    WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND pid <> pg_backend_pid()
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND classid = $1::int::oid AND objid = $2::int::oid"""


class LeaderSession:
    """The session of the leader. It holds an advisory lock, by which standbys see that it is connected."""

    def __init__(self, target: Target, lease_ms: int) -> None:
        assert target.cluster_id is not None
        self._target = target
        self._name = target.name
        self._lease_ms = lease_ms
        self._session = JournalSession(target)
        self._keys = lock_keys(target.cluster_id, "leader")
        self._locked: Any = None  # the connection that holds the lock
        self._lock_tried_s = 0.0  # when it was last to be taken
        self._holder: str | None = None
        self._epoch = -1  # matches no epoch
        self._covered = 0  # first number without a partition, as far as known
        self._extending: asyncio.Task[None] | None = None
        self._records = 0  # number and size of the latest records: each new partition halves both
        self._bytes = 0

    async def append(self, record: Record, acked: int) -> None:
        await self._session.run(self._lease_ms / 1000, lambda conn: self._append(conn, record, acked))
        self._records += 1
        self._bytes += len(record.body)
        if self._extending is None and record.number + partitions.records_ahead(self._width()) >= self._covered:
            self._extending = asyncio.create_task(self._extend_ahead(record.number + 1))

    async def _append(self, conn: Any, record: Record, acked: int) -> None:
        row = (
            record.first_event,
            record.last_event,
            record.epoch,
            record.at,
            checksum(record),
            record.body,
            format_of(record),
        )
        arguments = (self._name, record.number - 1, self._epoch, acked, self._lease_ms, *row)
        try:
            found = await self._run(conn, _APPEND, *arguments)
        except _NoPartition:
            await self._extend(conn, record.number)
            found = await self._run(conn, _APPEND, *arguments)
        if found is None:
            self._fenced(conn)
        if asyncio.get_running_loop().time() - self._lock_tried_s >= self._lease_ms / 1000:  # appends replace renewals
            await self._hold_lock(conn, ends_other=True)

    async def renew(self, acked: int) -> int:
        return await self._session.run(self._lease_ms / 1000, lambda conn: self._renew(conn, acked))

    async def _renew(self, conn: Any, acked: int) -> int:
        row = await self._run(conn, _RENEW, self._name, self._epoch, acked, self._lease_ms)
        if row is None:
            self._fenced(conn)
        await self._hold_lock(conn, ends_other=True)
        now: int = row[0]
        return now

    async def take_over(self, seen: Head, holder: str, url: str, epoch: int) -> Head | None:
        state = (seen.epoch, seen.number, int(seen.renewed.rpartition(" ")[2]))
        self._holder = holder
        return await self._lead(_TAKE_OVER, epoch, holder, url, *state)

    async def resolve(self, epoch: int) -> Head:
        head = await self._lead(_RESOLVE, epoch, self._holder)
        if head is None:
            raise Fenced
        return head

    async def release(self) -> None:
        await self._session.run(self._lease_ms / 1000, self._release)

    async def _release(self, conn: Any) -> None:
        await self._run(conn, _RELEASE, self._name, self._epoch)
        conn.terminate()  # release the advisory lock, which belongs to the next leader

    async def connect(self) -> None:
        """Connect early, so that a takeover does not wait for it."""
        await self._session.run(TAKE_OVER_S, lambda conn: asyncio.sleep(0))

    async def close(self) -> None:
        """Close the session, after a moment for a statement that still runs."""
        if self._extending is not None:
            await asyncio.wait([self._extending], timeout=CLOSE_S)
        await self._session.close(CLOSE_S)

    async def _lead(self, statement: str, epoch: int, *arguments: Any) -> Head | None:
        async def work(conn: Any) -> Head | None:
            row = await self._run(conn, statement, self._name, epoch, self._lease_ms, *self._keys, *arguments)
            if row is None:
                return None
            is_locked, *columns = row
            head = head_of(*columns)
            self._epoch = head.epoch
            if is_locked:
                self._locked = conn
            else:
                await self._hold_lock(conn)
            return head

        return await self._session.run(max(self._lease_ms / 1000, TAKE_OVER_S), work)

    async def _run(self, conn: Any, statement: str, *arguments: Any) -> Any:
        """Return the row of a statement that writes, or None.

        Raises JournalDiskFull or JournalUnavailable if nothing was written, and JournalOutcomeUnknown.
        """
        warnings = self._session.warnings
        try:
            row = await conn.fetchrow(statement, *arguments)
        except Exception as error:
            if not was_rejected(error):
                conn.terminate()
                raise JournalOutcomeUnknown from error
            if lacks_partition(error):
                raise _NoPartition from error
            if is_disk_full(error):
                raise JournalDiskFull(str(explain(error, self._target.url))) from error
            conn.terminate()  # the next one may reach the primary
            raise explain(error, self._target.url) from error
        if warnings != self._session.warnings:  # the wait for a standby was cancelled
            conn.terminate()
            raise JournalOutcomeUnknown
        return row

    def _fenced(self, conn: Any) -> NoReturn:
        """Release the advisory lock, which belongs to the leader."""
        conn.terminate()
        raise Fenced

    async def _hold_lock(self, conn: Any, *, ends_other: bool = False) -> None:
        """Take the advisory lock unless this connection holds it. Without it, there is no early takeover.

        The poll of a standby holds it for a moment. A previous leader that did not notice its end may hold it: with
        `ends_other`, its session is ended, and the next call tries again.
        """
        self._lock_tried_s = asyncio.get_running_loop().time()
        if self._locked is conn:
            return
        try:
            for _ in range(LOCK_TRIES):
                if await conn.fetchval(_LOCK, *self._keys):
                    self._locked = conn
                    return
                await asyncio.sleep(LOCK_RETRY_S)
            if ends_other:
                await conn.fetch(_END_HOLDER, *self._keys)
        except Exception as error:
            explain(error, self._target.url)  # raises other errors

    # -- Partitions --

    def _width(self) -> int:
        return partitions.records_per_partition(self._records, self._bytes)

    async def _extend(self, conn: Any, number: int) -> None:
        """Add the partition of record `number`, which an append lacked."""
        try:
            self._covered = await partitions.extend(conn, self._name, number, self._width())
        except Exception as error:
            if is_disk_full(error):
                raise JournalDiskFull(str(explain(error, self._target.url))) from error
            raise explain(error, self._target.url) from error

    async def _extend_ahead(self, number: int) -> None:
        """Add the next partition before an append needs it. After a failure, an append adds it."""
        width = self._width()
        try:
            async with self._target.session(EXTEND_S) as conn:
                end = await partitions.end_of_last(conn, self._name)
                if end <= number + partitions.records_ahead(width):
                    end = await partitions.extend(conn, self._name, max(end, number), width)
                    self._records, self._bytes = self._records // 2, self._bytes // 2
                self._covered = end
        except JournalUnavailable:
            self._covered = number + width  # try again later
        finally:
            self._extending = None


class _NoPartition(Exception):
    pass


def head_of(
    number: int, epoch: int, holder: str | None, url: str | None, acked: int, expires: int, now: int, free: bool = False
) -> Head:
    """Return a head from the columns of a query. `free` says that no session holds the leader's lock."""
    return Head(number, epoch, holder, url, acked, f"{epoch} {number} {expires}", not free, now)
