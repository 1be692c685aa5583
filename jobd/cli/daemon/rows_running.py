"""What `jobd doctor --running --rows` walks: the checksums of all rows of a running daemon, over its admin API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobd.cli.daemon.checkup import Finding
from jobd.cli.progress import bar

if TYPE_CHECKING:
    from jobd.client import AdminClient


def walk(client: AdminClient) -> list[Finding]:
    """Every damaged row. The daemon has set aside what it could; the walk takes minutes for millions of rows."""
    found: list[Finding] = []
    done, table, cursor = 0, "", None
    jobs = client.stats().total_jobs
    with bar("rows", unit="rows") as advance:
        while True:
            seen = client.check_rows(cursor)
            done = seen.checked + (done if seen.table == table else 0)
            table = seen.table
            advance(done, max(jobs, done) if table == "jobs" else None, f"checking {table}")
            found += [Finding(each.where, each.what, _mend(each.where)) for each in seen.damaged]
            cursor = seen.next_cursor
            if cursor is None:
                return found


def _mend(where: str) -> str:
    kind, _, name = where.partition(" ")
    if kind == "job":
        return f"restore a backup, or stop jobd, correct the row and take it as it is: jobd doctor --accept {name}"
    return "it is out of use; look at the disk's health, and at all of the database with jobd stopped: jobd doctor"
