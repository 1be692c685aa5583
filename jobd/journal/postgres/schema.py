"""The tables, and the creation of a journal in them."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from jobd.journal.postgres import partitions
from jobd.journal.postgres.session import VERSION, check_version
from jobd.model.journal import JournalMisconfigured

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS jobd_schema (version int NOT NULL);
CREATE TABLE IF NOT EXISTS jobd_journals (
    name text PRIMARY KEY, cluster_id text NOT NULL, number bigint NOT NULL, epoch bigint NOT NULL, holder text,
    url text, expires timestamptz NOT NULL, acked bigint NOT NULL, format int NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS jobd_journal (
    name text NOT NULL, number bigint NOT NULL, first_event bigint NOT NULL, last_event bigint NOT NULL,
    epoch bigint NOT NULL, at bigint NOT NULL, crc bigint NOT NULL, body bytea NOT NULL,
    PRIMARY KEY (name, number)
) PARTITION BY LIST (name);
CREATE TABLE IF NOT EXISTS jobd_epochs (
    name text NOT NULL, epoch bigint NOT NULL, first_number bigint NOT NULL, PRIMARY KEY (name, epoch)
);
CREATE TABLE IF NOT EXISTS jobd_snapshots (
    name text NOT NULL, number bigint NOT NULL, part int NOT NULL, complete boolean NOT NULL, at bigint NOT NULL,
    crc bigint NOT NULL, body bytea NOT NULL, PRIMARY KEY (name, number, part)
);
CREATE TABLE IF NOT EXISTS jobd_nodes (
    name text NOT NULL, node text NOT NULL, process text NOT NULL, url text NOT NULL, format int NOT NULL,
    config_hash text NOT NULL, projected_to bigint NOT NULL, ahead_ms bigint NOT NULL, seen timestamptz NOT NULL,
    schema_version int NOT NULL DEFAULT 0, lease_ms bigint NOT NULL DEFAULT 0, PRIMARY KEY (name, node)
);
ALTER TABLE jobd_journal ALTER COLUMN body SET STORAGE EXTERNAL;
ALTER TABLE jobd_snapshots ALTER COLUMN body SET STORAGE EXTERNAL;
"""  # EXTERNAL: without compression
# Columns that tables of earlier versions lack. Those versions insert rows without them.
_HAS_NEW_COLUMNS: Final = """
    SELECT count(*) = 3 FROM pg_attribute
    WHERE attrelid = 'jobd_nodes'::regclass AND attname IN ('schema_version', 'lease_ms')
        OR attrelid = 'jobd_journals'::regclass AND attname = 'format'"""
_NEW_COLUMNS: Final = """
    ALTER TABLE jobd_nodes ADD COLUMN IF NOT EXISTS schema_version int NOT NULL DEFAULT 0,
        ADD COLUMN IF NOT EXISTS lease_ms bigint NOT NULL DEFAULT 0;
    ALTER TABLE jobd_journals ADD COLUMN IF NOT EXISTS format int NOT NULL DEFAULT 0"""
_NAMES: Final = ("jobd_schema", "jobd_journals", "jobd_journal", "jobd_epochs", "jobd_snapshots", "jobd_nodes")
_LOCK: Final = "SELECT pg_advisory_xact_lock(x'6A6F6264'::int, 0)"  # for two nodes that run this at the same time
_EXISTS: Final = "SELECT to_regclass('jobd_schema') IS NOT NULL"
_JOURNAL: Final = """
    INSERT INTO jobd_journals (name, cluster_id, number, epoch, expires, acked)
    VALUES ($1, $2, $3, $4, clock_timestamp(), $3) ON CONFLICT DO NOTHING RETURNING cluster_id"""
_PRIVILEGES: Final = """
    SELECT given.name, pg_has_role(pg_class.relowner, 'USAGE'), has_table_privilege(oid, 'SELECT'),
        has_table_privilege(oid, 'INSERT'), has_table_privilege(oid, 'UPDATE'), has_table_privilege(oid, 'DELETE')
    FROM unnest($1::text[]) AS given(name) LEFT JOIN pg_class ON oid = to_regclass(given.name)"""
_CREATE: Final = "SELECT current_schema(), has_schema_privilege(current_schema(), 'CREATE')"


class Created(Struct, frozen=True):
    """A journal, and whether it is new."""

    cluster_id: str
    is_new: bool


async def create(conn: Any, database: str, name: str, cluster_id: str, number: int = 0, epoch: int = 0) -> Created:
    """Create the tables and the journal `name` if they do not exist. `number` is that of its last record.

    Raises JournalMisconfigured, and errors of PostgreSQL.
    """
    async with conn.transaction():
        await conn.execute(_LOCK)
        if await conn.fetchval(_EXISTS):
            check_version(await conn.fetchval("SELECT coalesce(max(version), 0) FROM jobd_schema"), database)
        await conn.execute(_TABLES)
        await add_columns(conn)
        await conn.execute(f"INSERT INTO jobd_schema SELECT {VERSION} WHERE NOT EXISTS (SELECT FROM jobd_schema)")
        is_new = await conn.fetchval(_JOURNAL, name, cluster_id, number, epoch) is not None
        await partitions.create_journal(conn, name)
        if is_new:
            await partitions.extend(conn, name, number + 1, partitions.FIRST_RECORDS)
        found = await conn.fetchval("SELECT cluster_id FROM jobd_journals WHERE name = $1", name)
    return Created(found, is_new)


async def add_columns(conn: Any) -> None:
    """Add the columns that the tables of an earlier version lack, while nodes of that version use them."""
    if not await conn.fetchval(_HAS_NEW_COLUMNS):
        await conn.execute(_NEW_COLUMNS)


async def check_privileges(conn: Any, role: str, name: str) -> None:
    """Raise JournalMisconfigured if the role lacks a privilege that journal `name` needs later."""
    advice = f'make it the owner of the tables of jobd, for example with REASSIGN OWNED BY … TO "{role}"'
    partitioned = ("jobd_journal", partitions.table_of(name))
    for table, is_owner, *granted in await conn.fetch(_PRIVILEGES, [*_NAMES, partitions.table_of(name)]):
        if not all(granted):
            missing = [what for what, has in zip(_ACTIONS, granted, strict=True) if not has]
            raise JournalMisconfigured(f'Role "{role}" lacks {", ".join(missing)} on table {table}: {advice}')
        if table in partitioned and not is_owner:
            raise JournalMisconfigured(f'Role "{role}" cannot add partitions to table {table}: {advice}')
    schema, can_create = await conn.fetchrow(_CREATE)
    if not can_create:
        grant = f'GRANT CREATE ON SCHEMA "{schema}" TO "{role}"'
        raise JournalMisconfigured(f'Role "{role}" cannot create partitions in schema "{schema}": {grant}')


_ACTIONS: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")
