"""Create the schema, and migrate databases of older schema versions.

All steps of a migration run in one transaction. A step does not commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from typing import Final

from jobd.journal.event_codec import EVENT_COLUMNS
from jobd.model.job import COUNTER_MASK, LIVE, TOKEN_COUNTER_BITS
from jobd.model.storage import Numbers
from jobd.storage.codec import META_COLUMNS, Row, checksum, fault, original_checksum, with_checksum
from jobd.storage.events import event_rows
from jobd.storage.files import StoreUnreadable
from jobd.storage.schema import job_rows

APPLICATION_ID: Final = 0x6A6F6264  # "jobd", in the header of the file
VERSION: Final = 14
FIRST_WITH_JOURNAL: Final = 11
_RECOMPUTED_AT_ONCE: Final = 10_000  # rows
_PACKED_AT_ONCE: Final = 1_000  # rows


def _add_late_results(conn: sqlite3.Connection) -> None:
    """Add late results."""
    conn.execute(
        "CREATE TABLE late_results (seq INTEGER PRIMARY KEY, job_seq INTEGER NOT NULL, at INTEGER NOT NULL, "
        "worker TEXT NOT NULL, fencing_token INTEGER NOT NULL, body_hash TEXT NOT NULL, expires_at INTEGER, "
        "download_url TEXT, file_path TEXT, storage_key TEXT, metadata BLOB, crc INTEGER NOT NULL) STRICT"
    )
    conn.execute("CREATE INDEX late_results_job ON late_results (job_seq)")


def _add_tombstones(conn: sqlite3.Connection) -> None:
    """Add tombstones of artifacts. Artifacts of jobs deleted earlier are unknown."""
    conn.execute(
        "CREATE TABLE tombstones (job_seq INTEGER PRIMARY KEY, job_id TEXT NOT NULL, key TEXT NOT NULL, "
        "at INTEGER NOT NULL, due_at INTEGER NOT NULL, tries INTEGER NOT NULL, crc INTEGER NOT NULL) STRICT"
    )
    conn.execute("CREATE INDEX tombstones_due ON tombstones (due_at)")
    conn.execute("CREATE INDEX jobs_storage_key ON jobs (storage_key) WHERE storage_key IS NOT NULL")
    conn.execute("CREATE INDEX late_results_storage_key ON late_results (storage_key) WHERE storage_key IS NOT NULL")


def _add_audit(conn: sqlite3.Connection) -> None:
    """Add the audit log. For earlier actions, the journal only has `admin`."""
    conn.execute(
        "CREATE TABLE audit (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, who TEXT NOT NULL, address TEXT NOT NULL, "
        "what TEXT NOT NULL, job_id TEXT, queue TEXT, reason TEXT, outcome TEXT NOT NULL, jobs INTEGER NOT NULL, "
        "details BLOB, part_of TEXT, crc INTEGER NOT NULL) STRICT"
    )
    conn.execute("CREATE INDEX audit_job ON audit (job_id) WHERE job_id IS NOT NULL")


def _add_webhooks(conn: sqlite3.Connection) -> None:
    """Add webhooks and their outbox."""
    conn.execute(
        "CREATE TABLE webhooks (name TEXT PRIMARY KEY NOT NULL, position INTEGER NOT NULL, gone_to INTEGER NOT NULL, "
        "next_delivery INTEGER NOT NULL, alerts BLOB NOT NULL, updated_at INTEGER NOT NULL, crc INTEGER NOT NULL) "
        "STRICT"
    )
    conn.execute(
        "CREATE TABLE deliveries (id INTEGER PRIMARY KEY, endpoint TEXT NOT NULL, state TEXT NOT NULL, "
        "subject TEXT NOT NULL, type TEXT NOT NULL, event_id TEXT NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, "
        "due_at INTEGER NOT NULL, tries INTEGER NOT NULL, ended_at INTEGER, status INTEGER, error TEXT, "
        "body BLOB NOT NULL, crc INTEGER NOT NULL) STRICT"
    )
    conn.execute("CREATE INDEX deliveries_place ON deliveries (endpoint, state, id)")


def _add_index_of_failed(conn: sqlite3.Connection) -> None:
    """Add an index of failed and cancelled jobs."""
    conn.execute("CREATE INDEX jobs_failed ON jobs (status) WHERE status IN ('failed', 'cancelled')")


def _replace_index_of_expiry(conn: sqlite3.Connection) -> None:
    """Give the index of jobs to delete by age a condition that SQLite evaluates faster."""
    conn.execute("DROP INDEX jobs_expiry")
    conn.execute(
        "CREATE INDEX jobs_expiry ON jobs (expires_at) "
        "WHERE expires_at IS NOT NULL AND status NOT IN ('queued', 'processing')"
    )


def _keep_old_events(conn: sqlite3.Connection) -> None:
    """Do nothing: new events store parts of jobs as arrays, old ones stay objects (see journal/event_codec.py)."""


# MIGRATIONS[n] turns schema version n into n + 1. A step that changes the columns of a table with checksums has to
# recompute them, and the XOR of the job checksums.
MIGRATIONS: Final[dict[int, Callable[[sqlite3.Connection], None]]] = {
    1: lambda conn: _record_missing_events(conn),
    2: _add_late_results,
    3: _add_tombstones,
    4: _add_audit,
    5: _add_webhooks,
    6: _add_index_of_failed,
    7: _replace_index_of_expiry,
    8: _keep_old_events,
    9: lambda conn: _add_pause_and_release_columns(conn),
    10: lambda conn: _add_journal(conn),
    11: lambda conn: _add_cluster(conn),
    12: lambda conn: _move_job_fields_into_body(conn),
    13: lambda conn: _pack_events(conn),
}
# REWRITTEN[n] has the tables that MIGRATIONS[n] writes again, except those with few rows. Used to estimate disk space.
REWRITTEN: Final = {9: ("jobs", "quarantined_jobs"), 12: ("jobs", "quarantined_jobs"), 13: ("events",)}


def statements(script: str) -> Iterator[str]:
    """Yield the statements of an SQL script, because `executescript` would commit."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def meta_row(
    numbers: Numbers, totals: tuple[int, int, int, int], marked: int, gone_to: int, projected_to: int, version: int
) -> tuple[int, ...]:
    """Return the row of META_COLUMNS with its checksum."""
    return with_checksum(
        (
            version,
            numbers.epoch,
            numbers.next_token,
            numbers.next_job,
            numbers.next_event,
            numbers.lease_ms,
            numbers.wall_ms,
            int(numbers.clock_suspect),
            *totals,
            marked,
            gone_to,
            projected_to,
        )
    )


def create(conn: sqlite3.Connection) -> None:
    """Create the schema in an empty database, in one transaction."""
    script = files("jobd.storage.schema").joinpath("schema.sql").read_text("utf-8")
    conn.execute("BEGIN IMMEDIATE")
    for statement in statements(script):
        conn.execute(statement)
    row = meta_row(Numbers(epoch=0), (0, 0, 0, 0), 0, 0, 0, VERSION)  # startup.py begins the first epoch
    names = ", ".join((*META_COLUMNS, "crc"))
    conn.execute(f"INSERT INTO meta (id, {names}) VALUES (1{', ?' * len(row)})", row)
    conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    conn.execute(f"PRAGMA user_version = {VERSION}")
    conn.execute("COMMIT")


def migrate(conn: sqlite3.Connection, current: int) -> None:
    """Migrate a database of schema version `current` to VERSION, in one transaction."""
    conn.execute("BEGIN IMMEDIATE")
    for version in range(current, VERSION):
        MIGRATIONS[version](conn)
    set_version(conn, VERSION)
    conn.execute("COMMIT")


def set_version(conn: sqlite3.Connection, version: int) -> None:
    """Write the schema version to the file header and the meta row."""
    change_meta(conn, schema_version=version)
    conn.execute(f"PRAGMA user_version = {version}")


def read_meta(conn: sqlite3.Connection) -> dict[str, int] | None:
    """Return the meta row of any schema version, column to value, with the checksum last; None if it is missing."""
    cursor = conn.execute("SELECT * FROM meta WHERE id = 1")
    row = cursor.fetchone()
    names = [column[0] for column in cursor.description]
    return None if row is None else dict(zip(names[1:], row[1:], strict=True))


def token_numbers(meta: dict[str, int]) -> tuple[int, int]:
    """Return epoch and counter of the next fencing token, from the meta row of any schema version.

    Before version 10 the counter had 40 bits. The number of the next token does not change.
    """
    epoch, counter = meta["epoch"], meta["next_token"]
    if meta["schema_version"] >= 10:
        return epoch, counter
    token = (epoch << 40) + counter
    return token >> TOKEN_COUNTER_BITS, token & COUNTER_MASK


def epoch_of(conn: sqlite3.Connection) -> int:
    """Return the epoch of a database of any schema version, in the current numbering; 0 if its meta row is damaged."""
    meta = read_meta(conn)
    if meta is None or fault(tuple(meta.values())) is not None:
        return 0
    return token_numbers(meta)[0]


def check_meta(conn: sqlite3.Connection, path: str) -> None:
    """Raise StoreUnreadable if the meta row is missing or damaged."""
    meta = read_meta(conn)
    error = "it is missing" if meta is None else fault(tuple(meta.values()))
    if error is not None:
        raise StoreUnreadable(f"{path}: the meta row is unusable ({error}): restore a backup with `jobd restore`")


def change_meta(conn: sqlite3.Connection, **values: int) -> None:
    """Set columns of the meta row and update its checksum. The caller has verified the row."""
    meta = read_meta(conn)
    assert meta is not None
    row = {**meta, **values}
    row["crc"] = with_checksum(tuple(row.values())[:-1])[-1]
    conn.execute(f"UPDATE meta SET {', '.join(f'{name} = ?' for name in row)} WHERE id = 1", tuple(row.values()))


def _record_missing_events(conn: sqlite3.Connection) -> None:
    """Mark all existing events as possibly pruned, because version 1 did not record what it pruned."""
    meta = read_meta(conn)
    assert meta is not None
    _rewrite_meta(conn, {**meta, "events_gone_to": meta["next_event"] - 1})


def _add_journal(conn: sqlite3.Connection) -> None:
    """Add the journal. The tables have all that was committed before."""
    conn.execute(
        "CREATE TABLE journal (number INTEGER PRIMARY KEY, first_event INTEGER NOT NULL, last_event INTEGER NOT NULL, "
        "epoch INTEGER NOT NULL, at INTEGER NOT NULL, body BLOB NOT NULL, crc INTEGER NOT NULL) STRICT"
    )
    meta = read_meta(conn)
    assert meta is not None
    _rewrite_meta(conn, {**meta, "projected_to": 0})


def _add_cluster(conn: sqlite3.Connection) -> None:
    """Add the membership in a cluster. A store of an earlier version belongs to none."""
    conn.execute(
        "CREATE TABLE cluster (id INTEGER PRIMARY KEY CHECK (id = 1), cluster_id TEXT NOT NULL, record_crc INTEGER, "
        "crc INTEGER NOT NULL) STRICT"
    )


def _move_job_fields_into_body(conn: sqlite3.Connection) -> None:
    """Move the fields of jobs that no query searches from their columns into a JSON body."""
    meta = read_meta(conn)
    assert meta is not None
    live_xor, finished_xor = job_rows.convert(conn)
    change_meta(conn, live_xor=meta["live_xor"] ^ live_xor, finished_xor=meta["finished_xor"] ^ finished_xor)


def _pack_events(conn: sqlite3.Connection) -> None:
    """Put several events of a job into one row. A damaged event gets a damaged row, which a later read finds."""
    conn.execute("DROP INDEX events_job")
    conn.execute("ALTER TABLE events RENAME TO old_events")
    conn.execute(
        "CREATE TABLE events (seq INTEGER PRIMARY KEY, last INTEGER NOT NULL, job_seq INTEGER NOT NULL, "
        "at INTEGER NOT NULL, body BLOB NOT NULL, crc INTEGER NOT NULL) STRICT"
    )
    sql = f"SELECT {', '.join(EVENT_COLUMNS)}, crc FROM old_events ORDER BY seq LIMIT {_PACKED_AT_ONCE}"
    conn.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    while rows := conn.execute(sql).fetchall():
        packed = event_rows.pack(row[:-1] for row in rows if fault(row) is None)
        packed += [event_rows.row_of_damaged_event(row[:-1]) for row in rows if fault(row) is not None]
        conn.executemany(event_rows.INSERT, packed)
        conn.execute("DELETE FROM old_events WHERE seq <= ?", (rows[-1][0],))
    conn.text_factory = str
    conn.execute("DROP TABLE old_events")
    conn.execute("CREATE INDEX events_job ON events (job_seq)")


def leave_cluster(conn: sqlite3.Connection) -> None:
    """End the membership of a database of any schema version."""
    if conn.execute("SELECT 1 FROM sqlite_schema WHERE name = 'cluster'").fetchone() is not None:
        conn.execute("DELETE FROM cluster")


def _rewrite_meta(conn: sqlite3.Connection, row: dict[str, int]) -> None:
    """Rebuild the meta table with the columns of `row`. The checksum remains the last column."""
    row["crc"] = row.pop("crc")
    columns = ", ".join(f"{name} INTEGER NOT NULL" for name in row)
    conn.execute("DROP TABLE meta")
    conn.execute(f"CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), {columns}) STRICT")
    names = ", ".join(row)
    conn.execute(
        f"INSERT INTO meta (id, {names}) VALUES (1{', ?' * len(row)})", with_checksum(tuple(row.values())[:-1])
    )


def _add_pause_and_release_columns(conn: sqlite3.Connection) -> None:
    """Add columns for the details of a pause, consecutive releases, and a suspect clock."""
    pause = {"paused_at": "INTEGER", "paused_by": "TEXT", "pause_reason": "TEXT", "paused_until": "INTEGER"}
    _add_columns(conn, "queues", pause, None)
    live_xor, finished_xor = _add_columns(conn, "jobs", {"releases": "INTEGER NOT NULL"}, 0)
    conn.execute("UPDATE quarantined_jobs SET row = json_set(row, '$.releases', 0) WHERE json_valid(row)")
    meta = read_meta(conn)
    assert meta is not None
    row: dict[str, int] = {}
    for name, value in meta.items():
        row[name] = value
        if name == "wall_ms":
            row["clock_suspect"] = 0
    row["epoch"], row["next_token"] = token_numbers(meta)
    row["live_xor"] ^= live_xor
    row["finished_xor"] ^= finished_xor
    _rewrite_meta(conn, row)


def _add_columns(conn: sqlite3.Connection, table: str, types: dict[str, str], value: int | None) -> tuple[int, int]:
    """Add columns with `value` before the checksum of every row, and recompute the checksums.

    Return the changes of the XOR of the checksums, for live jobs and for all other rows.
    """
    old = f"old_{table}"
    sql = "SELECT sql FROM sqlite_schema WHERE tbl_name = ? AND type = ? AND sql IS NOT NULL"
    [(create_sql,)] = conn.execute(sql, (table, "table"))
    indexes = conn.execute(sql, (table, "index")).fetchall()
    *before, _ = (name for (name,) in conn.execute("SELECT name FROM pragma_table_info(?)", (table,)))
    names = ", ".join(before)
    columns = "".join(f"{name} {type_}, " for name, type_ in types.items())
    conn.execute(f"ALTER TABLE {table} RENAME TO {old}")
    conn.execute(create_sql.replace("crc INTEGER NOT NULL", f"{columns}crc INTEGER NOT NULL"))
    # SQLite copies the rows, so that text that is not UTF-8 does not change.
    added = "".join(f"{'NULL' if value is None else value}, " for _ in types)
    conn.execute(f"INSERT INTO {table} ({names}, {', '.join(types)}, crc) SELECT {names}, {added}crc FROM {old}")
    conn.execute(f"DROP TABLE {old}")
    for (create_sql,) in indexes:
        conn.execute(create_sql)
    return _recompute_checksums(conn, table, names, (value,) * len(types))


def _recompute_checksums(conn: sqlite3.Connection, table: str, names: str, added: Row) -> tuple[int, int]:
    """Recompute the checksums of the rows of `table`, which now end with the values `added`.

    The checksum of a damaged row stays wrong by the same bits.
    """
    xors = {True: 0, False: 0}
    last = -1
    conn.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    sql = f"SELECT rowid, {'status' if table == 'jobs' else 'NULL'}, {names}, crc FROM {table} NOT INDEXED"
    while True:
        rows = conn.execute(f"{sql} WHERE rowid > ? ORDER BY rowid LIMIT {_RECOMPUTED_AT_ONCE}", (last,)).fetchall()
        if not rows:
            break
        last = rows[-1][0]
        recomputed = []
        for rowid, status, *columns, crc in rows:
            was, row = (*columns, crc), (*columns, *added)
            try:
                now = checksum(row) ^ checksum(tuple(columns)) ^ crc
            except (UnicodeEncodeError, OverflowError, TypeError):
                continue
            recomputed.append((now, rowid))
            xors[status in LIVE] ^= original_checksum(was) ^ original_checksum((*row, now))
        conn.executemany(f"UPDATE {table} SET crc = ? WHERE rowid = ?", recomputed)
    conn.text_factory = str
    return xors[True], xors[False]
