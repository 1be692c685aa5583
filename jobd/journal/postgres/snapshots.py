"""Snapshots of the tables, in parts. The last row of a snapshot says that it is complete, and has no body."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Final

from jobd.journal.postgres.postgres_errors import explain
from jobd.journal.postgres.session import Target, limited, lock_keys
from jobd.model.journal import SNAPSHOT_PART_BYTES, BadSnapshot, SnapshotInfo

PART_S: Final = 30.0  # time limit of a statement

_LOCK: Final = "SELECT pg_try_advisory_lock($1, $2)"
_EXISTS: Final = "SELECT EXISTS (SELECT FROM jobd_snapshots WHERE name = $1 AND number = $2 AND complete)"
_DROP_INCOMPLETE: Final = """
    DELETE FROM jobd_snapshots WHERE name = $1
    AND number NOT IN (SELECT number FROM jobd_snapshots WHERE name = $1 AND complete)"""
_WRITE: Final = """
    INSERT INTO jobd_snapshots (name, number, part, complete, at, crc, body)
    VALUES ($1, $2, $3, $4, (extract(epoch FROM clock_timestamp()) * 1000)::bigint, $5, $6)"""
_LIST: Final = """
    SELECT number, max(part), sum(octet_length(body))::bigint, max(at) FROM jobd_snapshots
    WHERE name = $1 GROUP BY number HAVING bool_or(complete) ORDER BY number"""
_COUNT: Final = "SELECT part FROM jobd_snapshots WHERE name = $1 AND number = $2 AND complete"
_READ: Final = "SELECT crc, body FROM jobd_snapshots WHERE name = $1 AND number = $2 AND part = $3"
_DROP: Final = "DELETE FROM jobd_snapshots WHERE name = $1 AND number = $2"


async def write(target: Target, number: int, parts: AsyncIterable[bytes], pause_s: float) -> bool:
    """Write a snapshot, each part in its own transaction. Return False if another node is writing one, or it exists."""
    conn = await target.connect()
    try:
        assert target.cluster_id is not None
        if not await _run(target, conn, conn.fetchval, _LOCK, *lock_keys(target.cluster_id, "snapshot")):
            return False
        if await _run(target, conn, conn.fetchval, _EXISTS, target.name, number):
            return False
        await _run(target, conn, conn.execute, _DROP_INCOMPLETE, target.name)
        count = 0
        async for body in parts:
            assert len(body) <= SNAPSHOT_PART_BYTES
            row = (target.name, number, count, False, zlib.crc32(body), body)
            await _run(target, conn, conn.execute, _WRITE, *row)
            count += 1
            await asyncio.sleep(pause_s)
        await _run(target, conn, conn.execute, _WRITE, target.name, number, count, True, 0, b"")
        return True
    finally:
        conn.terminate()


async def read(target: Target, number: int) -> AsyncIterator[bytes]:
    """Yield the parts as of one moment, so that a concurrent `drop` has no effect. Raises BadSnapshot."""
    conn = await target.connect()
    try:
        await _run(target, conn, conn.execute, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        count = await _run(target, conn, conn.fetchval, _COUNT, target.name, number)
        if count is None:
            raise BadSnapshot(f"there is no complete snapshot of record {number}")
        for part in range(count):
            row = await _run(target, conn, conn.fetchrow, _READ, target.name, number, part)
            if row is None:
                raise BadSnapshot(f"part {part} of the snapshot of record {number} is missing")
            crc, body = row
            if zlib.crc32(body) != crc:
                raise BadSnapshot(f"part {part} of the snapshot of record {number} is damaged: its checksum is wrong")
            yield body
    finally:
        conn.terminate()


async def complete(conn: Any, name: str) -> list[SnapshotInfo]:
    return [SnapshotInfo(*row) for row in await conn.fetch(_LIST, name)]


async def drop(conn: Any, name: str, number: int) -> None:
    await conn.execute(_DROP, name, number)


async def _run(target: Target, conn: Any, method: Any, *arguments: Any) -> Any:
    try:
        with limited(conn, PART_S):
            return await method(*arguments)
    except Exception as error:
        raise explain(error, target.url) from error
