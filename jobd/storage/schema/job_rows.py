"""Migrate rows of jobs from schema version 12, which had a column for each field, to version 13.

This does not use the encoding of jobs in codec.py, because later versions may change it.
"""

from __future__ import annotations

import sqlite3
from functools import partial
from typing import Any, Final

import msgspec
from msgspec import Raw

from jobd.model.job import LIVE
from jobd.storage.codec import Row, checksum, json_value, original_checksum

_OLD_COLUMNS: Final = (
    "seq", "id", "status", "expires_at", "queue", "kind", "priority", "max_attempts", "backoff_kind",
    "backoff_base_ms", "backoff_max_ms", "backoff_jitter", "max_stalls", "on_stall", "stuck_after_ms",
    "max_processing_ms", "created_at", "updated_at", "run_at", "progress", "progress_message", "attempt", "stalls",
    "started_at", "finished_at", "lock_id", "fencing_token", "worker", "acquired_at", "lock_ttl_ms",
    "lock_stuck_after_ms", "lock_max_processing_ms", "lock_expires_lease_ms", "silent_lease_ms", "ceiling_lease_ms",
    "lock_cleared", "ended_lock_id", "ended_fencing_token", "ended_worker", "ended_at", "ended_rule", "ended_reason",
    "ended_verb", "ended_body_hash", "download_url", "file_path", "storage_key", "metadata", "error_message",
    "error_code", "releases",
)  # fmt: skip
_COLUMNS: Final = (
    "seq", "id", "status", "expires_at", "finished_at", "worker", "storage_key", "error_message", "error_code",
    "created_at", "queue", "kind",
)  # fmt: skip
_TABLE: Final = (
    "CREATE TABLE jobs (seq INTEGER PRIMARY KEY, id TEXT NOT NULL, status TEXT NOT NULL, expires_at INTEGER, "
    "finished_at INTEGER, worker TEXT, storage_key TEXT, error_message TEXT, error_code TEXT, "
    "created_at INTEGER NOT NULL, queue TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, "
    "crc INTEGER NOT NULL) STRICT"
)
_INDEXES: Final = (
    "CREATE UNIQUE INDEX jobs_id ON jobs (id)",
    "CREATE INDEX jobs_live ON jobs (status) WHERE status IN ('queued', 'processing')",
    "CREATE INDEX jobs_failed ON jobs (status) WHERE status IN ('failed', 'cancelled')",
    "CREATE INDEX jobs_expiry ON jobs (expires_at) "
    "WHERE expires_at IS NOT NULL AND status NOT IN ('queued', 'processing')",
    "CREATE INDEX jobs_storage_key ON jobs (storage_key) WHERE storage_key IS NOT NULL",
)
# The casts are for text that is not UTF-8, which is passed as bytes.
_INSERT: Final = (
    "INSERT INTO jobs VALUES (?1, CAST(?2 AS TEXT), CAST(?3 AS TEXT), ?4, ?5, CAST(?6 AS TEXT), CAST(?7 AS TEXT), "
    "CAST(?8 AS TEXT), CAST(?9 AS TEXT), ?10, CAST(?11 AS TEXT), CAST(?12 AS TEXT), ?13, ?14)"
)
_AT_ONCE: Final = 10_000  # rows
# A body omits fields with these values, and fields that are null.
_DEFAULTS: Final = {
    "priority": 0,
    "max_attempts": 1,
    "backoff": ["exponential", 1_000, 3_600_000, True],
    "max_stalls": 3,
    "on_stall": "auto",
    "progress": 0,
    "attempt": 0,
    "stalls": 0,
    "releases": 0,
}
_json = msgspec.json.Encoder().encode


def convert(conn: sqlite3.Connection) -> tuple[int, int]:
    """Convert all rows, including those in quarantine, inside a transaction.

    The checksum of a damaged row stays wrong by the same bits. Return the changes of the XOR of the checksums, for live
    jobs and for all other rows.
    """
    conn.execute("ALTER TABLE jobs RENAME TO old_jobs")
    conn.execute(_TABLE)
    xors = {True: 0, False: 0}
    last = -1
    sql = f"SELECT {', '.join(_OLD_COLUMNS)}, crc FROM old_jobs NOT INDEXED WHERE seq > ? ORDER BY seq LIMIT {_AT_ONCE}"
    conn.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    while rows := conn.execute(sql, (last,)).fetchall():
        last = rows[-1][0]
        converted = []
        for row in rows:
            new = _new_row(row)
            xors[row[2] in LIVE] ^= original_checksum(row) ^ original_checksum(new)
            converted.append(new)
        conn.executemany(_INSERT, converted)
    conn.text_factory = str
    conn.execute("DROP TABLE old_jobs")
    for index in _INDEXES:
        conn.execute(index)
    quarantined = conn.execute("SELECT row, seq FROM quarantined_jobs").fetchall()
    conn.executemany(
        "UPDATE quarantined_jobs SET row = ? WHERE seq = ?", [(_quarantined(text), seq) for text, seq in quarantined]
    )
    return xors[True], xors[False]


def _new_row(row: Row) -> Row:
    """Return a row of the new table, with its checksum."""
    *old, crc = row
    try:
        error = checksum(tuple(old)) ^ crc
    except UnicodeEncodeError:
        columns, _ = _converted(tuple(old), is_damaged=True)
        _, fields = _converted(tuple(map(json_value, old)), is_damaged=True)
        raw = [each.encode(errors="surrogateescape") if isinstance(each, str) else each for each in columns]
        return (*raw, _json(fields).decode(), crc)
    columns, fields = _converted(tuple(old), is_damaged=error != 0)
    new = (*columns, _json(fields).decode())
    return (*new, checksum(new) ^ error)


def _quarantined(text: str) -> str:
    """Convert the JSON of a row in quarantine. Other text is returned unchanged."""
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
        columns, fields = _converted(tuple(values[column] for column in _OLD_COLUMNS), is_damaged=True)
    except (msgspec.DecodeError, KeyError):
        return text
    return _json({**fields, **dict(zip(_COLUMNS, columns, strict=True)), "crc": values.get("crc")}).decode()


def _converted(row: Row, *, is_damaged: bool) -> tuple[Row, dict[str, Any]]:
    """Return the columns of the new table and the fields of the body."""
    (seq, id_, status, expires_at, queue, kind, priority, max_attempts) = row[:8]
    (*backoff, jitter, max_stalls, on_stall, stuck_after_ms, max_processing_ms) = row[8:16]
    (created_at, updated_at, run_at, progress, message, attempt, stalls, started_at, finished_at) = row[16:25]
    grant, (*deadlines, cleared), ended = row[25:32], row[32:36], row[36:44]
    (url, path, key, metadata, error_message, error_code, releases) = row[44:]
    latest = ended[2] if grant[0] is None else grant[2]
    fields = {
        "priority": priority,
        "max_attempts": max_attempts,
        "backoff": [*backoff, bool(jitter)],
        "max_stalls": max_stalls,
        "on_stall": on_stall,
        "stuck_after_ms": stuck_after_ms,
        "max_processing_ms": max_processing_ms,
        "updated_at": None if updated_at == created_at else updated_at,
        "run_at": None if run_at == created_at else run_at,
        "progress": int(progress) if isinstance(progress, float) and progress.is_integer() else progress,
        "progress_message": message,
        "attempt": attempt,
        "stalls": stalls,
        "started_at": started_at,
        "grant": _none_if_empty(grant),
        "lease": _none_if_empty((*deadlines, None if cleared is None else bool(cleared))),
        "ended": _none_if_empty(ended),
        "download_url": url,
        "file_path": path,
        "metadata": None if metadata is None else _metadata_json(metadata, is_damaged),
        "releases": releases,
    }
    columns = (
        seq, id_, status, expires_at, finished_at, latest, key, error_message, error_code, created_at, queue, kind,
    )  # fmt: skip
    return columns, {
        name: value for name, value in fields.items() if value is not None and value != _DEFAULTS.get(name)
    }


def _none_if_empty(columns: Row) -> Row | None:
    return None if all(value is None for value in columns) else columns


def _metadata_json(metadata: Any, is_damaged: bool) -> Any:
    """Return metadata, which is bytes or, in quarantine, {"hex": ...}, as raw JSON if it is valid.

    Metadata of an undamaged row is valid. It is not decoded, because its numbers may be out of range.
    """
    try:
        text = bytes.fromhex(metadata["hex"]) if isinstance(metadata, dict) else metadata
        str(text, "utf-8")
        if is_damaged:
            msgspec.json.decode(text, type=Raw)
    except (msgspec.DecodeError, KeyError, ValueError, TypeError, RecursionError):
        return json_value(metadata)
    return Raw(text)
