"""The partitions of a journal: a range of numbers each. Old records are deleted with their partition.

`extend` and `trim` do not block an append: they take SHARE UPDATE EXCLUSIVE on the partitioned table, and no
stronger lock.
"""

from __future__ import annotations

import re
from typing import Any, Final

from jobd.journal.postgres.postgres_errors import exists_already, was_rejected

PARTITION_BYTES: Final = 256 << 20  # target size
MIN_RECORDS: Final = 1_000
FIRST_RECORDS: Final = 10_000  # of a partition, while too few records are known
KNOWN_RECORDS: Final = 100  # enough to estimate the size of the next ones
MAX_RECORDS: Final = 1_000_000
TRIM_S: Final = 10  # a transaction that reads a partition delays its removal

_ATTACHED: Final = """
    SELECT relname, pg_get_expr(relpartbound, oid), inhdetachpending
    FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = to_regclass($1)"""
_DETACHED: Final = """
    SELECT relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relname LIKE $1 AND relkind = 'r' AND nspname = current_schema() AND NOT relispartition"""
_BOUND: Final = re.compile(r"TO \('?([0-9]+)'?\)")


def table_of(name: str) -> str:
    """Return the table that has the partitions of journal `name`."""
    return f'"jobd_journal_{name}"'


async def create_journal(conn: Any, name: str) -> None:
    """Create the partitioned table of a journal if it does not exist."""
    await conn.execute(
        f"CREATE TABLE IF NOT EXISTS {table_of(name)} PARTITION OF jobd_journal FOR VALUES IN ('{name}') "
        "PARTITION BY RANGE (number)"
    )


def records_per_partition(records: int, size: int) -> int:
    """Return the width of a partition, from the number of the latest records and their bytes."""
    if records < KNOWN_RECORDS:
        return FIRST_RECORDS
    return max(MIN_RECORDS, min(MAX_RECORDS, PARTITION_BYTES * records // max(size, 1)))


def records_ahead(width: int) -> int:
    """Return how many records before the end of the last partition a new one of `width` records is added."""
    return min(width, FIRST_RECORDS) // 2


async def end_of_last(conn: Any, name: str) -> int:
    """Return the first number that no partition covers."""
    return max((end for _, end, _ in await _attached(conn, name)), default=0)


async def extend(conn: Any, name: str, number: int, width: int) -> int:
    """Make sure that there is a partition for record `number`, and return the first number that none covers."""
    first = max(number, await end_of_last(conn, name))
    if first > number:
        return first
    partition = f'"jobd_journal_{name}_p{first}"'
    try:
        async with conn.transaction():
            await conn.execute(f"CREATE TABLE {partition} (LIKE jobd_journal INCLUDING STORAGE)")
            bounds = f"FROM ({first}) TO ({first + width})"
            await conn.execute(f"ALTER TABLE {table_of(name)} ATTACH PARTITION {partition} FOR VALUES {bounds}")
    except Exception as error:
        if not (was_rejected(error) and exists_already(error)):
            raise
    return await end_of_last(conn, name)


async def trim(conn: Any, name: str, upto: int) -> None:
    """Drop the partitions with no record above `upto`."""
    await conn.execute(f"SET statement_timeout = {round(TRIM_S * 1000)}")
    for partition, end, is_detaching in await _attached(conn, name):
        if is_detaching:
            await conn.execute(f'ALTER TABLE {table_of(name)} DETACH PARTITION "{partition}" FINALIZE')
        elif end <= upto + 1:
            await conn.execute(f'ALTER TABLE {table_of(name)} DETACH PARTITION "{partition}" CONCURRENTLY')
    pattern = f"jobd_journal_{name}_p%".replace("_", r"\_")
    for (partition,) in await conn.fetch(_DETACHED, pattern):
        await conn.execute(f'DROP TABLE "{partition}"')


async def _attached(conn: Any, name: str) -> list[tuple[str, int, bool]]:
    """Return the partitions of a journal: name, first number after it, and whether it is being detached."""
    found = []
    for partition, bound, is_detaching in await conn.fetch(_ATTACHED, table_of(name)):
        end = _BOUND.search(bound or "")
        found.append((partition, int(end[1]) if end else 0, is_detaching))
    return sorted(found, key=lambda each: each[1])
