"""A jobd two schema versions ahead, with real migrations: `python -m tests.proof.faults.next_version serve …`."""

from __future__ import annotations

import sqlite3

from jobd.cli.daemon.main import main
from jobd.storage.schema import migrations

AHEAD = 2


def _add_notes(conn: sqlite3.Connection) -> None:
    conn.execute("CREATE TABLE notes (seq INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT")
    conn.execute("INSERT INTO notes SELECT seq, id FROM jobs")


def _rewrite(conn: sqlite3.Connection) -> None:
    """Rewrite all rows, with a new index."""
    conn.execute("CREATE INDEX notes_text ON notes (text)")
    conn.execute("UPDATE events SET body = CAST(body || x'' AS BLOB)")
    conn.execute("UPDATE payloads SET request_hash = request_hash || ''")


def install_migrations() -> None:
    now = migrations.VERSION
    migrations.MIGRATIONS.update({now: _add_notes, now + 1: _rewrite})
    migrations.VERSION = now + AHEAD  # type: ignore[misc]


if __name__ == "__main__":
    install_migrations()
    main()
