"""The entries of the nodes."""

from __future__ import annotations

from typing import Any, Final

from jobd.model.journal import NodeEntry
from jobd.model.storage import EXTRA_FORMAT

# Does not wait for a synchronous standby: without one, the nodes still have to see each other.
_REGISTER: Final = """
    WITH before AS (SELECT process FROM jobd_nodes WHERE name = $1 AND node = $2)
    INSERT INTO jobd_nodes
        (name, node, process, url, format, config_hash, projected_to, ahead_ms, schema_version, lease_ms, seen)
    SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, clock_timestamp()
    FROM jobd_journals AS journal, set_config('synchronous_commit', 'local', true)
    WHERE journal.name = $1 AND (journal.format <= $5 OR journal.format < $11)
    ON CONFLICT (name, node) DO UPDATE SET process = excluded.process, url = excluded.url, format = excluded.format,
        config_hash = excluded.config_hash, projected_to = excluded.projected_to, ahead_ms = excluded.ahead_ms,
        schema_version = excluded.schema_version, lease_ms = excluded.lease_ms, seen = excluded.seen
    RETURNING (SELECT process FROM before) AS before"""
_NODES: Final = """
    SELECT node, process, url, format, config_hash, projected_to,
        greatest(0, extract(epoch FROM clock_timestamp() - seen) * 1000)::bigint, ahead_ms, xmin::text, schema_version,
        lease_ms
    FROM jobd_nodes WHERE name = $1 ORDER BY node COLLATE "C\""""
_FORGET: Final = "DELETE FROM jobd_nodes WHERE name = $1 AND node = $2"


async def register(conn: Any, name: str, node: NodeEntry) -> tuple[str | None] | None:
    """Write an entry, and return a row with the process that wrote it last.

    Write nothing and return None if the journal has records that the node does not read.
    """
    numbers = node.projected_to, node.ahead_ms, node.schema_version, node.lease_ms
    arguments = (node.name, node.process, node.url, node.format, node.config_hash, *numbers, EXTRA_FORMAT)
    row: tuple[str | None] | None = await conn.fetchrow(_REGISTER, name, *arguments)
    return row


async def entries(conn: Any, name: str) -> list[NodeEntry]:
    return [NodeEntry(*row) for row in await conn.fetch(_NODES, name)]


async def forget(conn: Any, name: str, node: str) -> None:
    await conn.execute(_FORGET, name, node)
